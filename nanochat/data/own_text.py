"""The user's own text as a folder of shards: parquet, jsonl and txt files, one document in 20 held out."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from nanochat.common import base_dir
from nanochat.data.shards import SHARD_NAME, open_shard, read_row_group, write_parquet

logger = logging.getLogger(__name__)

VAL_EVERY = 20  # one document of this many is held out
SUFFIXES = (".jsonl", ".parquet", ".txt")


def build_once(directory: Path, fill: Callable[[Path], None]) -> Path:
    """Return a directory, filled by `fill` if it does not exist. It appears under its name when complete.

    If two processes fill it at the same time, both use the one that is complete first.
    """
    if not directory.exists():
        logger.info("making %s, once", directory)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as temporary:
            unfinished = Path(temporary) / directory.name
            unfinished.mkdir()
            fill(unfinished)
            try:
                unfinished.rename(directory)
            except OSError:
                if not directory.exists():
                    raise
    return directory


def own_files(name: str, suffixes: tuple[str, ...], context: str) -> list[Path]:
    """Return the sorted files with these suffixes that a file, a folder or a glob (** for any depth) names.

    Raises FileNotFoundError, `context no file, folder or glob ...`, if there are none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]  # not a glob: its name may contain brackets
    else:
        found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file.resolve() for file in found if file.name.endswith(suffixes) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{context} no file, folder or glob of files in {', '.join(suffixes)}")
    return files


def own_shards(data: str) -> Path:
    """Return the folder of shards for a file, folder or glob of the user's.

    A folder of two parquet files or more is used in place; other text is converted once. Raises
    FileNotFoundError if there are no files, ValueError for a bad file or fewer than two documents.
    """
    path = Path(data).expanduser()
    files = own_files(data, SUFFIXES, f"data={data!r} is none of auto, hub and embedded, and")
    if path.is_dir() and len(files) >= 2 and all(file.suffix == ".parquet" for file in files):
        return path
    if len(list(islice(_own_documents(files), 2))) < 2:
        raise ValueError(f"data={data!r} holds fewer than two documents; one is needed for validation")

    def fill(directory: Path) -> None:
        for number, is_val in enumerate((False, True)):
            # The second of every twenty, so that two documents are enough.
            texts = (t for i, t in enumerate(_own_documents(files)) if (i % VAL_EVERY == 1) is is_val)
            write_parquet(directory / SHARD_NAME.format(number), texts)

    versions = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
    return build_once(base_dir() / f"own_data_{name}", fill)


def _own_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yield every text that is not blank: a row of parquet, a line of jsonl, some paragraphs of txt.

    A byte order mark, which Windows puts at the start of a file, is dropped.
    """
    readers = {".parquet": _parquet_documents, ".jsonl": _jsonl_documents, ".txt": _txt_documents}
    for path in files:
        try:
            yield from filter(str.strip, readers[path.suffix](path))
        except UnicodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error})") from error


def _parquet_documents(path: Path) -> Iterator[str]:
    for index in range(open_shard(path).num_row_groups):
        yield from read_row_group(path, index).to_pylist()


def _jsonl_documents(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # JSON can contain half a surrogate pair, which UTF-8 cannot
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}} ({error!r})') from error
            yield text


def _txt_documents(path: Path) -> Iterator[str]:
    """Yield pieces that end at a blank line after 2,000 characters, or at any line end after 8,000."""
    lines: list[str] = []
    size = 0
    with open(path, encoding="utf-8-sig") as file:
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= 8000 or (size >= 2000 and not line.strip()):
                yield "".join(lines).strip()
                lines, size = [], 0
    yield "".join(lines).strip()
