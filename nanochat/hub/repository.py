"""Pull models from the Hugging Face hub and push them, in the layout of nanochat's repositories.

    model/model_000700.pt, model/meta_000700.json    a checkpoint, in any folder or in none
    tokenizer/tokenizer.pkl                          its tokenizer (or tokenizer_nanochat.json), likewise
    report/                                          measurements
    README.md                                        the model card

A pulled model is checked before it gets its name: weights against architecture, vocabulary against tokenizer.
Nothing in it is executed, and no existing file is changed: the tokenizer stays in the folder of its
checkpoint (checkpoint_manager). A checkpoint of nanochat itself, as of November 2025, can be pulled too: it
is a model whose layers are all attention.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.checkpoint_manager import (
    REPORTS,
    UNSET,
    check_vocabulary,
    checkpoint_dir,
    load_tensors,
    load_tokenizer,
    load_weights,
    meta_path,
    model_config,
    model_path,
    read_meta,
    resolve_step,
    tokenizer_dir,
)
from nanochat.common import base_dir, write_json
from nanochat.data.download import download, hub_api, hub_url, one_line
from nanochat.gpt import GPT
from nanochat.hub.model_card import model_card
from nanochat.report import read_results
from nanochat.tokenizer import JSON_FILE, PICKLE_FILE, SPECIAL_TOKENS, RustBPETokenizer

logger = logging.getLogger(__name__)

REPORT_SUFFIXES = (".json", ".md", ".png")


# ---------------------------------------------------------------------------------------------------------
# Pull


def pull(
    repo: str,
    stage: str,
    tag: str,
    *,
    step: int | None = None,
    folder: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Download a checkpoint into the folder of stage and tag, and return that folder.

    step None or -1 selects the newest; `folder` is needed if several folders hold checkpoints. Raises OSError
    if the download fails (the next attempt resumes it), ValueError if the files are not a checkpoint of ours.
    """
    directory = checkpoint_dir(stage, tag)
    if directory.exists() and not overwrite:
        raise ValueError(f"{directory} exists already: choose another --model-tag, or --overwrite it")
    staging = directory.with_name(f".{tag}.pull")
    api = hub_api()
    with _explained(f"pull {repo}"):
        found = api.model_info(repo, revision=revision)
        listed = [file.rfilename for file in found.siblings or ()]
        home, step = _find_checkpoint(listed, step, folder)
        names = [f"{home}model_{step:06d}.pt", f"{home}meta_{step:06d}.json"]
        names += _find_tokenizer(listed, home)
        logger.info("pulling %s of %s", ", ".join(names), repo)
        _fetch(repo, names, found.sha, staging / "download")
    origin = {"repo": repo, "commit": found.sha, "file": names[0]}
    try:
        _make_checkpoint(staging / "download", step, staging / "checkpoint", origin)
    except ValueError:
        shutil.rmtree(staging)  # another attempt would download the same
        raise
    old = directory.with_name(f".{tag}.old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    (staging / "checkpoint").rename(directory)
    for rest in (staging, old):
        shutil.rmtree(rest, ignore_errors=True)
    return directory


def _find_checkpoint(names: Sequence[str], step: int | None, folder: str | None) -> tuple[str, int]:
    """Return the folder ("" or with a slash at its end) and the step of the requested checkpoint."""
    models = [re.fullmatch(r"((?:.*/)?)model_(\d{6,})\.pt", name) for name in names]
    found = [(match[1], int(match[2])) for match in models if match]
    found = [(home, step) for home, step in found if f"{home}meta_{step:06d}.json" in names]
    if not found:
        raise FileNotFoundError("it holds no model_NNNNNN.pt with a meta_NNNNNN.json beside it")
    homes = sorted({home for home, _ in found})
    if folder is not None:
        homes = [home for home in homes if home.strip("/") == folder.strip("/")]
    wanted = [pair for pair in found if pair[0] in homes and step in (*UNSET, pair[1])]
    if len(homes) > 1 or not wanted:
        known = ", ".join(f"{home or './'} step {step}" for home, step in sorted(found))
        raise FileNotFoundError(f"choose one of its checkpoints with --folder and --step: {known}")
    return max(wanted, key=lambda pair: pair[1])


def _find_tokenizer(names: Sequence[str], home: str) -> list[str]:
    """Return the files of the tokenizer nearest to the folder of a checkpoint."""
    homes = {name: str(PurePosixPath(name).parent) for name in names}
    near = PurePosixPath(home)
    for place in (near / "tokenizer", near, near.parent / "tokenizer", near.parent, "tokenizer", "."):
        kinds = (JSON_FILE, PICKLE_FILE)
        if files := [n for n, at in homes.items() if at == str(place) and PurePosixPath(n).name in kinds]:
            return files
    raise FileNotFoundError(f"it holds neither {PICKLE_FILE} nor {JSON_FILE}")


def _fetch(repo: str, names: Sequence[str], commit: str | None, folder: Path) -> None:
    """Download files into one folder, without the folders in their names."""
    targets = {name: folder / PurePosixPath(name).name for name in names}
    stale = [path for path in folder.glob("[!.]*") if path.is_file() and path not in targets.values()]
    for path in stale:  # of an interrupted pull of another checkpoint
        path.unlink()
    for name, path in targets.items():
        download(hub_url(repo, name, revision=commit), path, is_hub=True)


def _make_checkpoint(download_folder: Path, step: int, folder: Path, origin: dict[str, str]) -> None:
    """Check the downloaded model, meta file and tokenizer and make a checkpoint folder of them."""
    model = model_path(download_folder, step)
    meta = read_meta(download_folder, step)
    state = load_tensors(model, "cpu")
    if not isinstance(meta, dict) or not isinstance(state, dict):
        name = meta_path(download_folder, step).name
        raise ValueError(f"{model.name} and {name} are not a checkpoint in nanochat's format")
    config = model_config(_with_layer_plan(meta, state))
    load_weights(GPT(config), state)
    tokenizer = RustBPETokenizer.from_directory(download_folder)
    check_vocabulary(config, tokenizer)
    for token in SPECIAL_TOKENS:
        tokenizer.encode_special(token)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    tokenizer.save(tokenizer_dir(folder))
    write_json(
        meta_path(folder, step),
        {**meta, "step": step, "model_config": config.to_meta(), "pulled_from": origin},
    )
    model.rename(model_path(folder, step))


def _with_layer_plan(meta: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Return meta with slc_rate=0 (all layers attention) for a nanochat model, whose config lacks it."""
    config = meta.get("model_config")
    is_hybrid = any(key.endswith("conv1d.weight") for key in state)
    if isinstance(config, dict) and "slc_rate" not in config and not is_hybrid:
        return {**meta, "model_config": {**config, "slc_rate": 0}}
    return meta


# ---------------------------------------------------------------------------------------------------------
# Push


def push(
    repo: str,
    stage: str,
    tag: str,
    *,
    step: int | None = None,
    card: Path | None = None,
    license: str = "mit",
    private: bool = False,
    overwrite: bool = False,
) -> str:
    """Upload the files of `gather` in one commit, with the token in HF_TOKEN, and return its address.

    Raises ValueError without a token, or if the repository holds files and `overwrite` is not set; OSError
    if the hub refuses. No message contains the token.
    """
    from huggingface_hub import CommitOperationAdd

    token = _token()
    if not re.fullmatch("[!-~]+", token):  # an error about an invalid header would contain it
        raise ValueError("push needs a token with write access in the environment, as HF_TOKEN")
    files = gather(repo, stage, tag, step=step, card=card, license=license)
    api = hub_api(token)
    with _explained(f"push to {repo}"):
        api.whoami()  # fails for an invalid token
        api.create_repo(repo, private=private or None, exist_ok=True)
        found = api.model_info(repo)
    if private and not found.private:
        raise ValueError(f"{repo} exists already and is public: choose another name, or omit --private")
    present = {file.rfilename for file in found.siblings or ()} - {".gitattributes"}
    if present and not overwrite:
        raise ValueError(
            f"{repo} holds {len(present)} file(s) already: choose another name, or --overwrite those of the "
            f"same names ({', '.join(sorted(present.intersection(files))) or 'none'})"
        )
    with _explained(f"push to {repo}"):
        operations = [CommitOperationAdd(name, source) for name, source in files.items()]
        return api.create_commit(repo, operations, commit_message=f"{stage} model {tag}").commit_url


def gather(
    repo: str,
    stage: str,
    tag: str,
    *,
    step: int | None = None,
    card: Path | None = None,
    license: str = "mit",
) -> dict[str, Path | bytes]:
    """Return the files of a push: names in the repository, and local files or contents.

    The card is generated unless `card` is a file. The report is included if it is that of this model.
    """
    if not re.fullmatch("[^/]+/[^/]+", repo):
        raise ValueError(f"repo={repo!r} must be the name of an owner and of a repository, as in me/my-d12")
    directory = checkpoint_dir(stage, tag)
    step = resolve_step(directory, step)
    meta = read_meta(directory, step)
    config = model_config(meta)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(config, tokenizer)
    results, report = _report(stage, tag, step)
    if card is None:
        text = model_card(repo, stage, meta, config, results, license).encode()
    else:
        text = card.read_bytes()
    files: dict[str, Path | bytes] = {"README.md": text}
    for path in (model_path(directory, step), meta_path(directory, step)):
        files[f"model/{path.name}"] = path
    own = tokenizer_dir(directory)
    for path in sorted((own if own.exists() else base_dir() / "tokenizer").iterdir()):
        if path.name in (JSON_FILE, PICKLE_FILE):
            files[f"tokenizer/{path.name}"] = path
    return files | {f"report/{path.name}": path for path in report}


def _report(stage: str, tag: str, step: int) -> tuple[dict[str, dict], list[Path]]:
    """Return the results and the files of the report if it is that of this checkpoint, else ({}, [])."""
    folder = base_dir() / "report"
    results, _ = read_results(folder)
    own = results.get(REPORTS[stage], {})
    metrics = Path(str(own.get("metrics")))
    if own.get("steps") != step or metrics.parts[-3:-1] != checkpoint_dir(stage, tag).parts[-2:]:
        logger.info("the report in %s is not that of step %d of %s: it is not uploaded", folder, step, tag)
        return {}, []
    return results, sorted(path for path in folder.iterdir() if path.suffix in REPORT_SUFFIXES)


def _token() -> str:
    return os.environ.get("HF_TOKEN", "").strip()


@contextmanager
def _explained(task: str) -> Iterator[None]:
    """Turn errors of the hub into an OSError of one line, `cannot task: reason`, without the token."""
    from huggingface_hub.utils import httpx

    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise OSError(f"cannot {task}: {one_line(error)}") from None  # the cause may contain the token
