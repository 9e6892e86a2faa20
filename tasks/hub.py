"""The rows of a task, read by the `datasets` library: from the Hugging Face hub, or from files of your own.

    hub        a split of a data set, downloaded once into the library's cache ($HF_HOME, by default
               ~/.cache/huggingface); HF_ENDPOINT is honoured. Without a network that cache is read: at once
               with HF_HUB_OFFLINE=1, else after half a minute
    a file     .parquet, .jsonl or .jsonl.xz with the whole split
    a folder   in the layout of a repository: {subset}/{split}-0000.parquet, {subset}/{split}.jsonl

All are then put into one fixed random order, that of `shuffle(seed=42)`, so that the first thousand rows of a
task are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.data.download import one_line, retry

if TYPE_CHECKING:
    from datasets import Dataset

SHUFFLE_SEED = 42
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.xz": "json"}  # by the end of a file's name


def load_rows(
    repo: str, subset: str | None, split: str, columns: Sequence[str], path: Path | str | None = None
) -> Dataset:
    """Return some columns of a split, shuffled: of `path` if given, else of the data set `repo` on the hub.

    subset None stands for a data set without subsets. Raises FileNotFoundError if there are no such files,
    OSError if they cannot be downloaded, ValueError if a file is corrupt, has no rows or lacks a column.
    """
    if path is None:
        source, rows = f"the data set {repo}", _load_from_hub(repo, subset, split)
    else:
        source, rows = str(path), _load_files(Path(path).expanduser(), subset or "data", split)
    if missing := set(columns).difference(rows.column_names):
        raise ValueError(
            f"{source} lacks {', '.join(sorted(missing))}; its columns are {', '.join(rows.column_names)}"
        )
    return rows.select_columns(list(columns)).shuffle(seed=SHUFFLE_SEED, keep_in_memory=True)


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError if a setting has a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


def _load_from_hub(repo: str, subset: str | None, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        return retry(lambda: load_dataset(repo, subset, split=split), f"the data set {repo}", attempts=3)
    except (OSError, ValueError) as error:
        name = " ".join(filter(None, (repo, subset, split)))
        raise OSError(
            f"cannot load the data set {name}: {one_line(error)}. It needs the network once; without it, "
            "copy the cache ($HF_HOME) from a machine that has it, or name a file of your own as the path"
        ) from error


def _load_files(source: Path, subset: str, split: str) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    found = [source] if source.is_file() else sorted(source.glob(f"{subset}/{split}[-.]*"))
    files = {end: [str(file) for file in found if file.name.endswith(end)] for end in BUILDERS}
    kinds = [end for end in BUILDERS if files[end]]
    if not kinds:
        raise FileNotFoundError(
            f"{source} is neither a file that ends in {', '.join(BUILDERS)} nor a folder with such files "
            f"called {subset}/{split}-*"
        )
    if len(kinds) > 1:
        raise ValueError(f"{source} has {subset}/{split} as {' and '.join(kinds)}; keep one of them")
    try:
        return load_dataset(BUILDERS[kinds[0]], data_files=files[kinds[0]], split="train")
    except (DatasetGenerationError, ValueError, OSError, EOFError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"{source} cannot be read, or holds no rows ({one_line(cause)})") from error
