"""The CORE bundle: its download, its files and its examples.

A bundle is a folder, or a zip of one, in the layout of DCLM (Li et al. 2024, arXiv 2406.11794):

    core.yaml             icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, delimiters
    eval_meta_data.csv    "Eval Task", "Random baseline" in percent
    eval_data/            the dataset_uris, one JSON object per line

Three kinds of task become one kind of example: options, each a continuation of a context, one of them gold.

    multiple_choice       one context (query), several continuations (choices)
    schema                several contexts (context_options), one continuation
    language_modeling     one context, one continuation

Texts keep the white space around them, for the protocol to decide (nanochat/core_protocol.py). A download is
unpacked and checked in a hidden folder, so a bundle under its own name is complete. It records its address
and digest in origin.json, so that a request for another address is not answered with the same bundle. A
bundle comes from elsewhere: its names must stay in its folder, and its size is bounded.
"""

import csv
import hashlib
import json
import logging
import lzma
import shutil
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import yaml

from nanochat.common import Runtime, base_dir, locked, write_json
from nanochat.data.download import download

logger = logging.getLogger(__name__)
N_CORE_TASKS = 22  # in the published metric
ORIGIN = "origin.json"  # in a downloaded bundle: address and SHA-256 of the zip
EVAL_BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_UNPACKED_BYTES = 4 << 30  # of a zip; more is no bundle


@dataclass(frozen=True)
class Example:
    """One row: (context, continuation) texts, the index of the right one, and a category ("" for none)."""

    options: tuple[tuple[str, str], ...]
    gold: int
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One entry of core.yaml, under its names there, with its examples and its random baseline in percent."""

    label: str
    dataset_uri: str
    num_fewshot: int
    icl_task_type: str
    continuation_delimiter: str = " "
    has_categories: bool = False
    random_baseline: float
    examples: tuple[Example, ...]

    @cached_property
    def pools(self) -> dict[str, list[int]]:
        """Indices of the examples of each category, from which its few-shot examples are drawn."""
        pools = defaultdict(list)
        for index, example in enumerate(self.examples):
            pools[example.category].append(index)
        return pools


@dataclass(frozen=True)
class Bundle:
    """The tasks in the order of core.yaml, and the labels of those without rows in the bundle."""

    tasks: list[CoreTask]
    missing_tasks: list[str]


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle; leave out a task without rows, with a warning.

    Raises FileNotFoundError for any other missing file, ValueError naming file and line for a bad one.
    """
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} is not a CORE bundle: it has no {name}; delete it or name another with --bundle"
            )
    baselines = _read_baselines(folder / "eval_meta_data.csv")
    tasks, missing = [], []
    for entry in _read_entries(folder / "core.yaml"):
        label, path = entry["label"], folder / "eval_data" / entry["dataset_uri"]
        if label not in baselines:
            raise ValueError(f"{folder / 'eval_meta_data.csv'} states no random baseline of task {label!r}")
        if path.exists():
            examples = _read_examples(path, entry["icl_task_type"], entry.get("has_categories", False))
            tasks.append(CoreTask(**entry, random_baseline=baselines[label], examples=examples))
        else:
            missing.append(label)
    if not tasks:
        raise FileNotFoundError(f"{folder / 'eval_data'} has rows for none of the tasks of core.yaml")
    if missing:
        logger.warning("warning: %s lacks the rows of %s; CORE goes without", folder, ", ".join(missing))
    return Bundle(tasks, missing)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Read core.yaml, with num_fewshot as one number."""
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))["icl_tasks"]
        for entry in entries:
            (entry["num_fewshot"],) = entry["num_fewshot"]
            # which raises for a missing or unknown key
            _check_task(CoreTask(**entry, random_baseline=0, examples=()))
        if len({entry["label"] for entry in entries}) < len(entries):
            raise ValueError("two tasks have the same label")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of CORE tasks: {error}") from error
    return entries


def _check_task(task: CoreTask) -> None:
    """Raise ValueError for a value that is of a wrong type or leads out of the bundle."""
    for name in ("label", "dataset_uri", "continuation_delimiter"):
        if not isinstance(getattr(task, name), str):
            raise ValueError(f"{name}={getattr(task, name)!r} of task {task.label!r} must be a text")
    if task.icl_task_type not in ("multiple_choice", "schema", "language_modeling"):
        raise ValueError(f"unknown icl_task_type {task.icl_task_type!r}")
    if type(task.num_fewshot) is not int or task.num_fewshot < 0:
        raise ValueError(
            f"num_fewshot=[{task.num_fewshot!r}] of task {task.label!r} must be a whole number, 0 or more"
        )
    if type(task.has_categories) is not bool:
        raise ValueError(f"has_categories={task.has_categories!r} of {task.label!r} must be true or false")
    if _leaves_folder(task.dataset_uri):
        raise ValueError(
            f"dataset_uri={task.dataset_uri!r} of task {task.label!r} must be a path within eval_data"
        )


def _leaves_folder(name: str) -> bool:
    """Return whether a relative path may lead out of its folder, on any system."""
    path = PureWindowsPath(name)  # parses both kinds of slashes, and drives
    return bool(path.anchor) or ".." in path.parts


def _read_baselines(path: Path) -> dict[str, float]:
    """Read the random baseline of each task, in percent."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: needs columns 'Eval Task', 'Random baseline' ({error!r})") from error
    for label, baseline in baselines.items():
        if not 0 <= baseline < 100:
            raise ValueError(f"{path}: the random baseline of {label} is {baseline} %, not in [0, 100)")
    return baselines


def _read_examples(path: Path, kind: str, has_categories: bool) -> tuple[Example, ...]:
    examples = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                examples.append(_example(row, kind, row["category"] if has_categories else ""))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: not a {kind} example ({error!r})") from error
    if not examples:
        raise ValueError(f"{path} is empty")
    return tuple(examples)


def _example(row: dict[str, Any], kind: str, category: str) -> Example:
    gold = 0 if kind == "language_modeling" else row["gold"]
    if kind == "multiple_choice":
        options = [(row["query"], choice) for choice in row["choices"]]
    elif kind == "schema":
        options = [(context, row["continuation"]) for context in row["context_options"]]
    else:
        options = [(row["context"], row["continuation"])]
    if not 0 <= gold < len(options):
        raise ValueError(f"gold={gold} of {len(options)} options")
    if not all(continuation.strip() for _, continuation in options):
        raise ValueError("an empty continuation")
    if not all(isinstance(context, str) for context, _ in options):
        raise TypeError("a context that is no text")
    return Example(tuple(options), gold, category)


# ---------------------------------------------------------------------------------------------------------
# Location and download


def bundle_folder(path: str) -> Path:
    """Return the folder `path`, or eval_bundle in the base directory if that is empty."""
    return Path(path).expanduser() if path else base_dir() / "eval_bundle"


def find_bundle(runtime: Runtime, path: str = "", url: str = "", sha256: str = "") -> Path:
    """Return the folder `path`, or base_dir()/eval_bundle, downloaded if it does not exist.

    It comes from url, by default EVAL_BUNDLE_URL.

    A collective: all ranks call this together, and the first rank of each machine downloads. All raise
    OSError or ValueError if that fails, or if eval_bundle was downloaded from another address.
    """
    folder = bundle_folder(path)
    if path:
        return folder
    with runtime.together():
        if runtime.is_first_of_node:
            with locked(folder):  # machines may share the disk
                if folder.exists():
                    _check_origin(folder, url, sha256)
                else:
                    download_bundle(url or EVAL_BUNDLE_URL, sha256, folder)
    return folder


def _check_origin(folder: Path, url: str, sha256: str) -> None:
    """Raise ValueError if an existing bundle is not the requested one, if any is requested."""
    if not url:
        return
    if not (folder / ORIGIN).exists():
        logger.warning("warning: the origin of %s is not known; it is used, and %s is not", folder, url)
        return
    origin = json.loads((folder / ORIGIN).read_text("utf-8"))
    # the same zip may have moved: a digest, if given, decides alone
    if sha256.lower() != origin["sha256"] if sha256 else url != origin["url"]:
        raise ValueError(
            f"{folder} is the bundle of {origin['url']}, SHA-256 {origin['sha256']}, not of {url}"
            f"{f', SHA-256 {sha256}' if sha256 else ''}; delete it to download that one"
        )
    logger.info("CORE bundle: %s, downloaded before", folder)


def download_bundle(url: str, sha256: str, folder: Path) -> None:
    """Download a zip, check it and unpack it as `folder`, which appears when it is complete.

    Resumes a download that broke. Raises OSError if the transfer fails, ValueError if the zip does not have
    this SHA-256 (hex; empty: not checked), is damaged, would write outside its folder, unpacks to more than
    MAX_UNPACKED_BYTES or contains no bundle.
    """
    logger.info("downloading the CORE bundle from %s", url)
    staging = folder.with_name(f".{folder.name}.download")  # a fixed name, so that a download can resume
    archive, unpacked = staging / "bundle.zip", staging / "unpacked"
    _fetch(url, archive)
    try:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if sha256 and digest != sha256.lower():
            raise ValueError(f"{url} has the SHA-256 {digest}, not {sha256}")
        shutil.rmtree(unpacked, ignore_errors=True)  # left by a kill
        _unpack(archive, unpacked, url)
        core_yaml = next(unpacked.rglob("core.yaml"), None)  # it may be in a folder of the zip
        if core_yaml is None:
            raise ValueError(f"{url} contains no core.yaml: it is not a CORE bundle")
        load_bundle(core_yaml.parent)
        write_json(core_yaml.parent / ORIGIN, {"url": url, "sha256": digest})
        core_yaml.parent.rename(folder)
    finally:
        shutil.rmtree(staging)


def _fetch(url: str, path: Path) -> None:
    try:
        if url.startswith("file:"):
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(url2pathname(urlsplit(url).path), path)
        else:
            download(url, path)
    except OSError as error:
        raise OSError(f"cannot download {url}: {error}") from error


def _unpack(archive: Path, folder: Path, url: str) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if _leaves_folder(name):
                    raise ValueError(f"{url} would write outside its folder: {name!r}")
            n_bytes = sum(member.file_size for member in file.infolist())  # zipfile writes no more than these
            if n_bytes > MAX_UNPACKED_BYTES:
                raise ValueError(
                    f"{url} unpacks to {n_bytes} bytes; a CORE bundle has at most {MAX_UNPACKED_BYTES}"
                )
            file.extractall(folder)
    # RuntimeError: a password or an unknown compression; OSError: an offset before the start of the file
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot unpack {url}: {error!r}") from error
