"""The CORE bundle: where it comes from, and what its rows mean.

A bundle is a folder (or a zip of one) as DCLM (Li et al. 2024, arXiv 2406.11794) evaluates with:

    core.yaml             icl_tasks: label, dataset_uri, num_fewshot, icl_task_type, delimiters
    eval_meta_data.csv    "Eval Task", "Random baseline" in percent
    eval_data/            the dataset_uris, one JSON object a line

Three kinds of task become one kind of example: options, each a continuation after a context, one being gold.

    multiple_choice       one context (query), several continuations (choices)
    schema                several contexts (context_options), one continuation
    language_modeling     one context, one continuation

Texts lose the white space around them: what separates them is up to the prompt. A download is unpacked and
read in a hidden folder, which takes the bundle's name when all is well: what has that name is whole. It also
holds where it came from, in origin.json, so that another address is not taken for the same bundle.
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
N_CORE_TASKS = 22  # of the published metric
ORIGIN = "origin.json"  # in a bundle that was downloaded: its address and the SHA-256 of the zip


@dataclass(frozen=True)
class Example:
    """One row: (context, continuation) texts, which of them is right, and its category ("": all are one)."""

    options: tuple[tuple[str, str], ...]
    gold: int
    category: str = ""


@dataclass(frozen=True, kw_only=True)
class CoreTask:
    """One entry of core.yaml under its names there, with its rows and its random baseline in percent."""

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
        """The numbers of the examples of each category: few-shot examples are of one's own category."""
        pools = defaultdict(list)
        for index, example in enumerate(self.examples):
            pools[example.category].append(index)
        return pools


@dataclass(frozen=True)
class Bundle:
    """The tasks in the order of core.yaml, and the labels of those whose rows are not there."""

    tasks: list[CoreTask]
    missing_tasks: list[str]


def load_bundle(folder: Path) -> Bundle:
    """Read a bundle; a task without its rows is left out with a warning.

    Raises FileNotFoundError for any other missing file, ValueError naming file and line for a bad one.
    """
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder} is no CORE bundle: it has no {name}; delete it or name another with --bundle"
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
        raise FileNotFoundError(f"{folder / 'eval_data'} holds the rows of none of the tasks of core.yaml")
    if missing:
        logger.warning("warning: %s lacks the rows of %s; CORE goes without", folder, ", ".join(missing))
    return Bundle(tasks, missing)


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """Read core.yaml, with num_fewshot as one number."""
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))["icl_tasks"]
        for entry in entries:
            if entry["icl_task_type"] not in ("multiple_choice", "schema", "language_modeling"):
                raise ValueError(f"unknown icl_task_type {entry['icl_task_type']!r}")
            (entry["num_fewshot"],) = entry["num_fewshot"]
            CoreTask(**entry, random_baseline=0, examples=())  # has it every key, and none that we ignore?
        if len({entry["label"] for entry in entries}) < len(entries):
            raise ValueError("two tasks have the same label")
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of CORE tasks: {error}") from error
    return entries


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
                raise ValueError(f"{path}, line {number}: no {kind} example ({error!r})") from error
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
    options = tuple((context.strip(), continuation.strip()) for context, continuation in options)
    if not all(continuation for _, continuation in options):
        raise ValueError("an empty continuation")
    return Example(options, gold, category)


# ---------------------------------------------------------------------------------------------------------
# Finding one


def bundle_folder(path: str) -> Path:
    """Return where a bundle is, or is to be: the folder `path`, or eval_bundle if that is empty."""
    return Path(path).expanduser() if path else base_dir() / "eval_bundle"


def find_bundle(runtime: Runtime, path: str = "", url: str = "", sha256: str = "") -> Path:
    """Return the folder `path`, else base_dir()/eval_bundle, into which a zip may have to be downloaded.

    The first rank of each machine does that. All ranks call this together, and all raise OSError or
    ValueError if a download fails, or if eval_bundle was downloaded from elsewhere.
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
                    download_bundle(url, sha256, folder)
    return folder


def _check_origin(folder: Path, url: str, sha256: str) -> None:
    """Raise ValueError if a bundle that is there is another one than what is asked for, if anything is."""
    if not url:
        return
    if not (folder / ORIGIN).exists():
        logger.warning("warning: where %s came from is not known; it is used, and %s is not", folder, url)
        return
    origin = json.loads((folder / ORIGIN).read_text("utf-8"))
    # the same zip may have moved: if its digest is given, that alone counts
    if sha256.lower() != origin["sha256"] if sha256 else url != origin["url"]:
        raise ValueError(
            f"{folder} is the bundle of {origin['url']}, SHA-256 {origin['sha256']}, not of {url}"
            f"{f', SHA-256 {sha256}' if sha256 else ''}; delete it to download that one"
        )
    logger.info("CORE bundle: %s, downloaded before", folder)


def download_bundle(url: str, sha256: str, folder: Path) -> None:
    """Download a zip, check it, and unpack it as `folder`, which appears when it is whole and readable.

    Raises FileNotFoundError without a url, OSError if the transfer fails, ValueError if the zip is not what
    its SHA-256 (hex; empty: not checked) says, is damaged, reaches outside its folder or holds no bundle.
    """
    if not url:
        raise FileNotFoundError(
            f"no CORE bundle in {folder}; unpack one there, name a folder with --bundle, "
            "or the address of a zip with --bundle-url"
        )
    logger.info("downloading the CORE bundle from %s", url)
    workplace = folder.with_name(f".{folder.name}.download")  # of this name, so that a download can resume
    archive, unpacked = workplace / "bundle.zip", workplace / "unpacked"
    _fetch(url, archive)
    try:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if sha256 and digest != sha256.lower():
            raise ValueError(f"{url} has the SHA-256 {digest}, not {sha256}")
        shutil.rmtree(unpacked, ignore_errors=True)  # left by a kill
        _unpack(archive, unpacked, url)
        core_yaml = next(unpacked.rglob("core.yaml"), None)  # zips may have a folder around it all
        if core_yaml is None:
            raise ValueError(f"{url} holds no core.yaml: it is no CORE bundle")
        load_bundle(core_yaml.parent)
        write_json(core_yaml.parent / ORIGIN, {"url": url, "sha256": digest})
        core_yaml.parent.rename(folder)
    finally:
        shutil.rmtree(workplace)


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
                path = PureWindowsPath(name)  # which knows both kinds of slashes, and drives
                if path.anchor or ".." in path.parts:
                    raise ValueError(f"{url} would write outside its folder: {name!r}")
            file.extractall(folder)
    # the last two: a password, a way to compress that Python lacks; an offset before the file's beginning
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(f"cannot unpack {url}: {error!r}") from error
