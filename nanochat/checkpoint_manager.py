"""Checkpoints: atomic saving, finding, and loading with their architecture and tokenizer.

A checkpoint of step 700 consists of three files in <stage>_checkpoints/<model tag>/:

    model_000700.pt          state dict under the published keys
    optim_000700_rank0.pt    optimizer state, one file per rank with its share
    meta_000700.json         architecture, settings, loop and loader state

Each file is written atomically, and the meta file last: a checkpoint exists once its meta file does. Tensors
are read with torch's weights_only loader, which executes no code from the file. Several ranks save and load
together, each its own share; an error on one of them is raised on all.

The subdirectory tokenizer/ holds the tokenizer that the run was trained with. So a checkpoint stays usable
when another tokenizer is trained, or downloaded with another model; the vocabulary size alone cannot
distinguish two tokenizers. Checkpoint directories from before this rule have none, and use the tokenizer of
the base directory.
"""

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import Runtime, atomic_write, base_dir, write_json
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

logger = logging.getLogger(__name__)
STAGES = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}  # names of folders
REPORTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}  # names of reports
UNSET = (None, -1)  # values of a step that is not given, by a caller or on a command line


class DamagedError(ValueError):
    """A file of a checkpoint exists but is damaged or incomplete."""


def checkpoint_dir(stage: str, model_tag: str) -> Path:
    """Return base_dir()/<stage>_checkpoints/<model_tag>; an empty tag gives the directory of the stage."""
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    if model_tag == ".." or Path(model_tag).name != model_tag:
        raise ValueError(f"model_tag={model_tag!r} must be the name of a directory, without a path")
    return base_dir() / f"{STAGES[stage]}_checkpoints" / model_tag


def complete_steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints in directory, in ascending order."""
    metas = (re.fullmatch(r"meta_(\d+)\.json", path.name) for path in directory.glob("meta_*.json"))
    steps = sorted(int(match[1]) for match in metas if match)
    return [step for step in steps if model_path(directory, step).exists()]


def model_path(directory: Path, step: int) -> Path:
    """Return the path of a checkpoint's state dict."""
    return directory / f"model_{step:06d}.pt"


def _optim_path(directory: Path, step: int, rank: int) -> Path:
    return directory / f"optim_{step:06d}_rank{rank}.pt"


def meta_path(directory: Path, step: int) -> Path:
    """Return the path of a checkpoint's meta file: architecture, settings, loop and loader state."""
    return directory / f"meta_{step:06d}.json"


def save_checkpoint(
    directory: Path,
    step: int,
    model: GPT,
    optimizer_state: dict | None,
    meta: dict[str, Any],
    keep_last: int = 0,
    runtime: Runtime | None = None,
) -> None:
    """Write a checkpoint, then delete all but the keep_last newest ones (0: keep all).

    Every rank of a run must call this, with its share of the optimizer state. If the checkpoint cannot be
    written completely, raise OSError on all ranks; older checkpoints stay intact.
    """
    runtime = runtime or Runtime.cpu()
    with runtime.together():
        directory.mkdir(parents=True, exist_ok=True)
        if runtime.is_main:  # an existing checkpoint of this step must not count as complete while it changes
            meta_path(directory, step).unlink(missing_ok=True)
    with runtime.together():
        if optimizer_state is not None:
            _save_tensors(_optim_path(directory, step, runtime.rank), optimizer_state)
    with runtime.together():
        if runtime.is_main:
            # copied: weights are views into the optimizer's stacks, and torch.save would write whole stacks
            weights = {key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}
            _save_tensors(model_path(directory, step), weights)
            header = {"format_version": 1, "step": step, "model_config": model.config.to_meta()}
            n_shards = 0 if optimizer_state is None else runtime.world_size
            write_json(meta_path(directory, step), {**header, "optimizer_shards": n_shards, **meta})
            older = [other for other in complete_steps(directory) if other < step]
            for old in older[: max(0, len(older) + 1 - keep_last)] if keep_last else []:
                delete_checkpoint(directory, old)


def delete_checkpoint(directory: Path, step: int) -> None:
    """Delete a checkpoint, its meta file first, so that the remains after a crash do not count as one."""
    optim_paths = directory.glob(_optim_path(directory, step, 0).name.replace("rank0", "rank*"))
    for path in (meta_path(directory, step), model_path(directory, step), *optim_paths):
        path.unlink(missing_ok=True)


def remove_partial_files(directory: Path) -> None:
    """Delete the files of interrupted saves; no process may be saving to the directory at the same time.

    Weights without a meta file are kept: a user may have copied them there.
    """
    for path in [*directory.glob(".*.partial"), *directory.glob("optim_*.pt")]:
        step = re.fullmatch(r"optim_(\d+)_rank\d+\.pt", path.name)
        if path.suffix == ".partial" or (step and not meta_path(directory, int(step[1])).exists()):
            path.unlink(missing_ok=True)


def _save_tensors(path: Path, value: Any) -> None:
    try:
        with atomic_write(path) as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch raises this for a full disk
        raise OSError(
            f"cannot write {path}: {error}; free some space, older checkpoints are intact"
        ) from error


def load_tensors(path: Path, device: torch.device | str, mmap: bool = False) -> Any:
    """Read a file that torch.save wrote; with mmap, tensors are read from disk on use.

    Raise FileNotFoundError if the file is missing, DamagedError if it is damaged or incomplete.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises many types of errors for a damaged file
        raise DamagedError(
            f"{path} is damaged or no checkpoint ({error}); delete it or copy it again"
        ) from error


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """Read a checkpoint's meta file; raise FileNotFoundError or DamagedError."""
    path = meta_path(directory, step)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        have = complete_steps(directory)
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; there are: {have}") from None
    except json.JSONDecodeError as error:
        raise DamagedError(f"{path} is damaged ({error}); delete it or copy it again") from error


def read_settings(stage: str, model_tag: str, step: int) -> dict[str, Any]:
    """Read the settings that a model was trained with, {} if its meta file has none; tag and step: see below.

    The model is not loaded. Raise FileNotFoundError or DamagedError.
    """
    directory = checkpoint_dir(stage, resolve_tag(stage, model_tag))
    return read_meta(directory, resolve_step(directory, step)).get("user_config") or {}


def load_optimizer_shards(directory: Path, step: int) -> list[dict[str, Any]]:
    """Read the optimizer state of a checkpoint: the share of every rank that saved it, in order of rank.

    Raise FileNotFoundError if there is none, DamagedError if a part of it is missing.
    """
    n_shards = read_meta(directory, step).get("optimizer_shards", 1)
    paths = [_optim_path(directory, step, rank) for rank in range(n_shards)]
    missing = [path for path in paths if not path.exists()]
    if len(missing) == n_shards:
        raise FileNotFoundError(f"the checkpoint of step {step} in {directory} has no optimizer state")
    if missing:
        raise DamagedError(f"{missing[0]} is missing: the optimizer state is incomplete without it")
    return [load_tensors(path, "cpu", mmap=True) for path in paths]


def check_bytes(directory: Path, step: int, runtime: Runtime) -> None:
    """Verify the checksums that torch.save stored with the tensors; raise DamagedError on a mismatch.

    Loading alone detects missing bytes but no changed ones. Each rank checks a part of the files, so all
    ranks must call this.
    """
    n_shards = read_meta(directory, step).get("optimizer_shards", 1)
    paths = [model_path(directory, step), *(_optim_path(directory, step, rank) for rank in range(n_shards))]
    for path in paths[runtime.rank :: runtime.world_size]:
        try:
            with zipfile.ZipFile(path) as archive:
                name = archive.testzip()
        except zipfile.BadZipFile as error:
            raise DamagedError(f"{path} is damaged ({error})") from error
        if name is not None:
            raise DamagedError(f"{path} is damaged (in {name})")


def model_config(meta: dict[str, Any]) -> GPTConfig:
    """Return the architecture of a meta file; keys missing in old ones (n_kernel, slc_rate) have defaults."""
    try:
        return GPTConfig(**meta["model_config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint's model_config does not describe a Saint Iberis GPT: {error}"
        ) from error


def load_weights(model: GPT, state: dict[str, Tensor], keep_dtypes: bool = False) -> None:
    """Load a state dict, also a published one: strip an `_orig_mod.` prefix, convert bfloat16 to float32.

    With keep_dtypes the tensors are assigned unconverted; the model may then be on the meta device. Raise
    ValueError if keys or shapes do not match. Warn if all convolution weights are zero, as in published
    weights, which were trained without initialising the convolution.
    """
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    try:
        model.load_state_dict(state, strict=True, assign=keep_dtypes)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit the architecture: {error}") from error
    taps = [value for key, value in state.items() if key.endswith("conv1d.weight")]
    if taps and not any(tap.any() for tap in taps):
        logger.warning("warning: every convolution weight is zero: the SLC2 layers of this model add nothing")


def tokenizer_dir(directory: Path) -> Path:
    """Return the tokenizer's subdirectory of a checkpoint directory."""
    return directory / "tokenizer"


def load_tokenizer(directory: Path) -> RustBPETokenizer:
    """Load the tokenizer of a checkpoint directory, or if it has none that of the base directory."""
    own = tokenizer_dir(directory)
    return get_tokenizer(own if own.exists() else None)


def load_model(
    source: str, device: torch.device, phase: str, model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Return model, tokenizer and meta data of a stage ("base", "mid", "sft", "rl").

    phase is "train" or "eval". model_tag defaults to the deepest dN of the stage, step (None or -1) to the
    newest complete checkpoint.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f'phase {phase!r} is not "train" or "eval"')
    directory = checkpoint_dir(source, resolve_tag(source, model_tag))
    step = resolve_step(directory, step)
    meta = read_meta(directory, step)
    model = GPT(model_config(meta))
    load_weights(model, load_tensors(model_path(directory, step), "cpu"))
    tokenizer = load_tokenizer(directory)
    check_vocabulary(model.config, tokenizer)
    return model.to(device).train(phase == "train"), tokenizer, meta


def load_for(
    runtime: Runtime, source: str, phase: str, model_tag: str, step: int
) -> tuple[GPT, RustBPETokenizer, dict[str, Any]]:
    """Load a model as `load_model` does, on the runtime's device and in its dtype."""
    model, tokenizer, meta = load_model(source, runtime.device, phase, model_tag, step)
    model.compute_dtype = runtime.compute_dtype
    return model, tokenizer, meta


def check_vocabulary(config: GPTConfig, tokenizer: RustBPETokenizer) -> None:
    """Raise ValueError unless model and tokenizer have vocabularies of the same size."""
    if config.vocab_size != tokenizer.get_vocab_size():
        raise ValueError(
            f"the model has a vocabulary of {config.vocab_size}, the tokenizer one of "
            f"{tokenizer.get_vocab_size()}: they are not from the same run"
        )


def newest_step(directory: Path) -> int:
    """Return the step of the newest complete checkpoint; raise FileNotFoundError if there is none."""
    steps = complete_steps(directory)
    if not steps:
        raise FileNotFoundError(
            f"no checkpoint in {directory}; train one first (python -m scripts.base_train)"
        )
    return steps[-1]


def resolve_step(directory: Path, step: int | None) -> int:
    """Return step, or if it is None or -1 the newest one; raise FileNotFoundError if there is none."""
    return newest_step(directory) if step in UNSET else step


def resolve_tag(stage: str, model_tag: str | None) -> str:
    """Return model_tag, or if it is empty the stage's deepest dN, or else its only model.

    Raises FileNotFoundError, with the models that there are, if neither exists.
    """
    if model_tag:
        return model_tag
    stage_dir = checkpoint_dir(stage, "")
    tags = sorted(path.name for path in stage_dir.glob("[!.]*") if path.is_dir())
    depths = (re.fullmatch(r"d(\d+)", tag) for tag in tags)
    found = max((int(match[1]) for match in depths if match), default=None)
    if found is None and len(tags) == 1:
        return tags[0]
    if found is None:
        raise FileNotFoundError(
            f"no model dN in {stage_dir}, which has {', '.join(tags) or 'no other'}; train one first or name "
            "one with --model-tag"
        )
    return f"d{found}"
