"""Export of a checkpoint to a folder that Hugging Face's transformers loads, and import of such a folder.

    config.json  generation_config.json  model.safetensors    shape and weights, dtypes unchanged
    tokenizer.json  tokenizer_config.json                      see nanochat/hub/hf_tokenizer.py
    {configuration,cache,modeling}_saint_iberis.py             model code, needs torch and transformers only

The weights keep their names, so an import after an export restores them bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nanochat.checkpoint_manager import (
    UNSET,
    check_vocabulary,
    checkpoint_dir,
    complete_steps,
    load_tensors,
    load_tokenizer,
    load_weights,
    model_config,
    model_path,
    read_meta,
    resolve_step,
    resolve_tag,
    save_checkpoint,
    tokenizer_dir,
)
from nanochat.common import atomic_write, write_json
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.hub.export_check import check_exported_code
from nanochat.hub.hf_tokenizer import load_hf_tokenizer, save_hf_tokenizer

MODEL_TYPE = "saint_iberis"
WEIGHTS_FILE = "model.safetensors"


def export_checkpoint(
    source: str, model_tag: str | None, step: int | None, directory: Path
) -> tuple[str, int]:
    """Write a checkpoint and its tokenizer to a folder for transformers; return its model tag and step.

    source, model_tag and step select the checkpoint and default as in load_model. Raise FileNotFoundError or
    ValueError, before anything is written, if it is missing or damaged or does not match its tokenizer.
    """
    model_tag = resolve_tag(source, model_tag)
    checkpoints = checkpoint_dir(source, model_tag)
    step = resolve_step(checkpoints, step)
    meta = read_meta(checkpoints, step)
    state = load_tensors(model_path(checkpoints, step), "cpu")
    model = _model(model_config(meta), state)
    tokenizer = load_tokenizer(checkpoints)
    check_vocabulary(model.config, tokenizer)
    check_exported_code(model.config)
    bos, end = (tokenizer.encode_special(token) for token in ("<|bos|>", "<|assistant_end|>"))
    ids = {"bos_token_id": bos, "eos_token_id": end, "pad_token_id": bos}
    directory.mkdir(parents=True, exist_ok=True)
    save_hf_tokenizer(tokenizer, directory, model.config.sequence_len)
    for code in files("nanochat.hub").joinpath("transformers_model").iterdir():
        if code.name.endswith(".py"):
            with atomic_write(directory / code.name) as file:
                file.write(code.read_bytes())
    with atomic_write(directory / WEIGHTS_FILE) as file:
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        file.write(save(tensors, metadata={"format": "pt"}))
    write_json(
        directory / "generation_config.json",
        {**ids, "eos_token_id": [end, bos]},  # the tokens at which GPT.generate stops
    )
    config = {
        "architectures": ["SaintIberisForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_saint_iberis.SaintIberisConfig",
            "AutoModel": "modeling_saint_iberis.SaintIberisModel",
            "AutoModelForCausalLM": "modeling_saint_iberis.SaintIberisForCausalLM",
        },
        "model_type": MODEL_TYPE,
        **model.config.to_meta(),
        **ids,
        "tie_word_embeddings": False,
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        "checkpoint": {"source": source, "model_tag": model_tag, "step": step},
    }
    write_json(directory / "config.json", config)  # last: it marks the folder as complete
    return model_tag, step


def import_checkpoint(
    directory: Path, source: str | None = None, model_tag: str | None = None, step: int | None = None
) -> tuple[str, str, int]:
    """Save an exported folder as a checkpoint; return its source, model tag and step.

    All three default to those of the exported checkpoint. The tokenizer is saved beside the checkpoint. Raise
    FileNotFoundError or ValueError, before anything is written, if the folder is not a valid export, the
    checkpoint exists, or the other checkpoints of its model tag have a different tokenizer.
    """
    config = _read_config(directory)
    exported = config.get("checkpoint", {})
    source, model_tag = source or exported.get("source"), model_tag or exported.get("model_tag")
    step = exported.get("step") if step in UNSET else step
    if not source or not model_tag or step is None:
        raise ValueError(
            f"{directory} does not name the checkpoint it was exported from; give source, model tag and step"
        )
    checkpoints = checkpoint_dir(source, model_tag)
    steps = complete_steps(checkpoints)
    if step in steps:
        raise ValueError(f"{checkpoints} already has step {step}; give another model tag or step")
    names = {field.name for field in fields(GPTConfig)}
    shape = {name: value for name, value in config.items() if name in names}
    model = _model(model_config({"model_config": shape}), _read_weights(directory))
    tokenizer = load_hf_tokenizer(directory)
    check_vocabulary(model.config, tokenizer)
    if steps and not load_tokenizer(checkpoints).is_same_as(tokenizer):
        raise ValueError(f"{checkpoints} has checkpoints of a different tokenizer; give another model tag")
    tokenizer.save(tokenizer_dir(checkpoints))
    save_checkpoint(checkpoints, step, model, None, {})
    return source, model_tag, step


def _model(config: GPTConfig, state: dict[str, Tensor]) -> GPT:
    with torch.device("meta"):
        model = GPT(config)
    load_weights(model, state, keep_dtypes=True)
    return model


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no {path}; give a folder written by scripts.export_hf")
    try:
        config = json.loads(path.read_text("utf-8"))
        model_type = config.get("model_type")
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); export or download it again") from error
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"{path} describes a model of type {model_type!r}; only {MODEL_TYPE!r} can be imported"
        )
    return config


def _read_weights(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("model*.safetensors")):  # save_pretrained splits large models
        try:
            state |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); export or download it again") from error
    if not state:
        raise FileNotFoundError(f"no model.safetensors in {directory}; export or download it again")
    return state
