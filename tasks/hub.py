"""The rows of a task: from a data set of the Hugging Face hub, or from a file or folder of your own.

    hub        the parquet files {subset}/{split}-* of a repository, downloaded once to
               $NANOCHAT_BASE_DIR/task_data and read from there afterwards, without a network
    a file     .parquet, .jsonl or .jsonl.xz with the whole split
    a folder   in the layout of the repository: {subset}/{split}-0000.parquet, {subset}/{split}.jsonl

All are then put into one fixed random order, that of `shuffle(seed=42)` in the `datasets` library, so that
the first thousand rows of a task are the same everywhere.

Rows stay in Arrow's columns and become dicts one at a time, so that half a million open in two seconds.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatch
from itertools import islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanochat.common import base_dir, locked
from nanochat.data.download import download, hub_api, hub_url, one_line, retry

if TYPE_CHECKING:
    import pyarrow as pa

SHUFFLE_SEED = 42
SUFFIXES = (".parquet", ".jsonl", ".jsonl.xz")
ROWS_PER_BATCH = 4096


class Rows(Sequence[dict[str, Any]]):
    """Rows of a table in a given order; each becomes a dict when it is read."""

    def __init__(self, table: pa.Table, order: np.ndarray):
        self.table, self.order = table, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.table.slice(int(self.order[index]), 1).to_pylist()[0]

    def only(self, is_kept: np.ndarray) -> Rows:
        """Return some of the rows in the same order; is_kept is bool (rows of the table,)."""
        return Rows(self.table, self.order[is_kept[self.order]])


def load_rows(
    repo: str, subset: str, split: str, columns: Sequence[str], path: Path | str | None = None
) -> Rows:
    """Return the shuffled rows of a split: of `path` if given, else of the data set `repo` on the hub.

    Raises FileNotFoundError if there are no such files, OSError if they cannot be downloaded, ValueError if a
    file is corrupt, has no rows or lacks a column.
    """
    import pyarrow as pa

    source = _download(repo, subset, split) if path is None else Path(path).expanduser()
    files = [source] if source.is_file() else sorted(source.glob(f"{subset}/{split}[-.]*"))
    files = [file for file in files if file.name.endswith(SUFFIXES)]
    if not files:
        raise FileNotFoundError(
            f"{source} is neither a file that ends in {', '.join(SUFFIXES)} nor a folder with such files "
            f"called {subset}/{split}-*"
        )
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".xz": _read_jsonl}
    tables = [readers[file.suffix](file, columns) for file in files]
    table = pa.concat_tables(tables, promote_options="permissive")
    if table.num_rows == 0:
        raise ValueError(f"{source} holds no rows")
    return Rows(table, np.random.default_rng(SHUFFLE_SEED).permutation(table.num_rows))


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError if a setting has a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


# ---------------------------------------------------------------------------------------------------------
# Files


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of each line of .jsonl or .jsonl.xz that is not blank.

    Raises ValueError, with the line number, for a line that is not JSON and for a corrupt file.
    """
    number = 0
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        except (UnicodeError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is corrupt after line {number} ({error})") from error


def _read_jsonl(path: Path, columns: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    def pick(number: int, row: Any) -> dict[str, Any]:
        try:
            return {name: row[name] for name in columns}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: needs an object with {', '.join(columns)}") from error

    rows = starmap(pick, json_lines(path))
    tables = [pa.table({name: [] for name in columns})]
    try:
        while batch := list(islice(rows, ROWS_PER_BATCH)):
            tables.append(pa.Table.from_pylist(batch))
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path}: a column has invalid or mixed values ({error})") from error


def _read_parquet(path: Path, columns: Sequence[str]) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = set(columns).difference(names)
            if not missing:
                return file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error})") from error
    raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; its columns are {', '.join(names)}")


# ---------------------------------------------------------------------------------------------------------
# Download


def _download(repo: str, subset: str, split: str) -> Path:
    """Return a folder with the files of a split; it appears under its name when it is complete."""
    folder = base_dir() / "task_data" / "--".join([*repo.split("/"), subset, split])
    folder.parent.mkdir(exist_ok=True)
    with locked(folder):  # one rank downloads; the others then find the folder
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.partial")
            _fetch(repo, subset, split, partial)
            partial.rename(folder)
    return folder


def _fetch(repo: str, subset: str, split: str, folder: Path) -> None:
    """Download the files of a split into a folder, resuming an earlier attempt. Raises OSError on failure.

    The files are listed here, because snapshot_download without a network returns an incomplete folder.
    """
    wanted = f"{subset}/{split}-*.parquet"
    api = hub_api()
    try:
        entries = retry(
            lambda: list(api.list_repo_tree(repo, subset, repo_type="dataset")),
            "its list of files",
            attempts=3,
        )
        names = [entry.path for entry in entries if fnmatch(entry.path, wanted)]
        if not names:
            raise FileNotFoundError("there are no such files")
        for name in names:
            download(hub_url(repo, name, repo_type="dataset"), folder / name, is_hub=True)
    except OSError as error:
        raise OSError(
            f"cannot download {wanted} of the data set {repo}: {one_line(error)}. It needs the network once; "
            f"without it, copy {folder.parent} from a machine that has it, or name a file of your own as the "
            "path"
        ) from error
