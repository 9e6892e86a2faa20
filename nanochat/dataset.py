"""Where the text comes from: folders of parquet shards with one string column, `text`.

A setting called `data` says which folder:

    hub        $NANOCHAT_BASE_DIR/base_data, downloaded from karpathy/fineweb-edu-100b-shuffle by this module
    embedded   the documentation of the Python that runs this (nanochat/data/embedded.py), made on first use
    a path     your own text: a file, a folder or a glob of .parquet (column text), .jsonl (key text) or .txt
    auto       hub if it has been downloaded, else embedded; never downloads

The last shard in the order of names is the validation set, all others are for training. On the hub that is
shard_01822, whatever the number of training shards, so that losses compare between runs and while a download
goes on. Your own folder of two parquet files or more is used where it lies, in the same way; anything else is
converted once, with every twentieth document held out.

A download resumes where it was cut, and a shard that has its name is whole: see nanochat/data/download.py.
HF_ENDPOINT is honoured. The first 240 shards, four at a time, and the validation shard:

    python -m nanochat.dataset -n 240 -w 4
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from nanochat.common import atomic_write, base_dir, parse, run
from nanochat.data.download import download_shard

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

REPO_ID = "karpathy/fineweb-edu-100b-shuffle"
SHARD_NAME = "shard_{:05d}.parquet"
N_TRAIN_SHARDS = 1822
VAL_SHARD = SHARD_NAME.format(N_TRAIN_SHARDS)
VAL_EVERY = 20  # in text of the user's own, one document of this many is held out
ROWS_PER_GROUP = 1024
SUFFIXES = (".jsonl", ".parquet", ".txt")


# ---------------------------------------------------------------------------------------------------------
# Sources and splits


def source(data: str) -> str:
    """Return data, with "auto" decided: "hub" if that has been downloaded, else "embedded"."""
    hub = base_dir() / "base_data"
    if data != "auto":
        return data
    return "hub" if (hub / VAL_SHARD).exists() and len(list(hub.glob("*.parquet"))) > 1 else "embedded"


def resolve(data: str) -> Path:
    """Return the folder of shards that `data` (see above) means; makes it if that takes no network."""
    hub, embedded = base_dir() / "base_data", base_dir() / "embedded_data"
    data = source(data)
    if data == "hub":
        if not (hub / VAL_SHARD).exists():
            raise FileNotFoundError(f"{hub / VAL_SHARD} is missing; run `python -m nanochat.dataset -n 8`")
        return hub
    if data == "embedded":
        from nanochat.data.embedded import write_shards

        return _build_once(embedded, write_shards)
    return _own_shards(data)


def shard_paths(data: str, split: str) -> list[Path]:
    """Return the shards of a split ("train" or "val") in their fixed order, each checked to be usable."""
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} must be 'train' or 'val'")
    directory = resolve(data)
    paths = sorted(directory.glob("*.parquet"))
    if len(paths) < 2:
        raise FileNotFoundError(
            f"{directory} holds {len(paths)} parquet shard(s), but needs two: the last is for validation, "
            "the others for training; `python -m nanochat.dataset -n 8` downloads some"
        )
    paths = paths[:-1] if split == "train" else paths[-1:]
    for path in paths:
        open_shard(path).close()  # a broken shard is told now, not hours into training
    return paths


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, data: str = "auto"
) -> Iterator[list[str]]:
    """Yield the documents of a split once, a list of texts a row group: row groups start, start + step, ...

    Row groups are counted through all shards of the split, so `start=rank, step=world_size` deals them out.
    """
    if step < 1 or not 0 <= start < step:
        raise ValueError(f"start={start}, step={step}: needs 0 <= start < step")
    paths = shard_paths(data, split)
    row_groups = ((path, index) for path in paths for index in range(open_shard(path).num_row_groups))
    for path, index in islice(row_groups, start, None, step):
        yield read_row_group(path, index).to_pylist()


# ---------------------------------------------------------------------------------------------------------
# Shards


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard; ValueError if it is corrupt or truncated, has no string column `text` or no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable parquet file ({error}); delete it and try again") from error
    columns = {field.name: field.type for field in shard.schema_arrow}
    if columns.get("text") not in (pa.string(), pa.large_string()):
        raise ValueError(f"{path} needs a string column 'text', but its columns are {columns}")
    if shard.metadata.num_rows == 0:
        raise ValueError(f"{path} holds no documents; delete it")
    return shard


def read_row_group(path: Path, index: int) -> pa.ChunkedArray:
    """Read the texts of one row group, nulls as empty texts. ValueError if the bytes are corrupt."""
    import pyarrow as pa

    with open_shard(path) as shard:
        try:
            return shard.read_row_group(index, columns=["text"])["text"].fill_null("")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}, row group {index}, is corrupt ({error}); delete the file") from error


def write_parquet(path: Path, texts: Iterable[str], rows_per_group: int = ROWS_PER_GROUP) -> None:
    """Write a shard atomically; holds one row group in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, texts = pa.schema([("text", pa.string())]), iter(texts)
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := list(islice(texts, rows_per_group)):
            writer.write_table(pa.table({"text": rows}, schema=schema))


def _build_once(directory: Path, fill: Callable[[Path], None]) -> Path:
    """Fill a new folder, which gets its name when it is whole; if two processes do, the first one's stays."""
    if not directory.exists():
        logger.info("making %s, once", directory)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as workplace:
            unfinished = Path(workplace) / directory.name
            unfinished.mkdir()
            fill(unfinished)
            try:
                unfinished.rename(directory)
            except OSError:
                if not directory.exists():
                    raise
    return directory


# ---------------------------------------------------------------------------------------------------------
# Text of the user's own


def own_files(name: str, suffixes: tuple[str, ...], complaint: str) -> list[Path]:
    """Return, in order, the files of these suffixes that a file, a folder or a glob (** is any depth) names.

    FileNotFoundError if there are none; it begins with the complaint.
    """
    path = Path(name).expanduser()
    if path.is_file():
        found = [path]  # whatever brackets it has in its name
    else:
        found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file.resolve() for file in found if file.name.endswith(suffixes) and file.is_file())
    if not files:
        raise FileNotFoundError(f"{complaint} no file, folder or glob of files in {', '.join(suffixes)}")
    return files


def _own_shards(data: str) -> Path:
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
    return _build_once(base_dir() / f"own_data_{name}", fill)


def _own_documents(files: Sequence[Path]) -> Iterator[str]:
    """Yield every text that is not blank: a row of parquet, a line of jsonl, some paragraphs of txt.

    A byte order mark, which Windows puts at the start of a file, is no text.
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
                text.encode()  # JSON can spell half a surrogate pair, which is no text
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError, UnicodeError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"text": "..."}} ({error!r})') from error
            yield text


def _txt_documents(path: Path) -> Iterator[str]:
    """Cut at a blank line after 2,000 characters or more, at any line end after 8,000."""
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


# ---------------------------------------------------------------------------------------------------------
# Download


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which shards to download, and how."""

    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """training shards, about 100 MB each: the first n of 1822 (the validation shard always comes along)"""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """downloads at a time"""

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= N_TRAIN_SHARDS:
            raise ValueError(f"num_shards={self.num_shards} must be from 1 to {N_TRAIN_SHARDS}")
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Download; 1 if a shard could not be had, after a line for each of those."""
    from tqdm import tqdm

    config = parse(DatasetConfig, argv)
    directory = base_dir() / "base_data"
    directory.mkdir(exist_ok=True)
    names = [SHARD_NAME.format(index) for index in range(config.num_shards)]
    fractions = dict.fromkeys([*names, VAL_SHARD], 0.0)
    failures = []

    def show(name: str, fraction: float) -> None:
        fractions[name] = fraction
        bar.update(sum(fractions.values()) - bar.n)

    with (
        ThreadPoolExecutor(config.num_workers) as pool,
        tqdm(total=len(fractions), bar_format="{l_bar}{bar}| {n:.1f}/{total} shards, {remaining}") as bar,
    ):
        # First and alone: nothing works without the validation shard, and no network is told at once.
        fetch = partial(download_shard, REPO_ID, directory=directory, on_progress=show)
        fetch(VAL_SHARD)
        transfers = [pool.submit(fetch, name) for name in names]
        try:
            for transfer in as_completed(transfers):
                try:
                    transfer.result()
                except OSError as error:
                    failures.append(error)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for error in failures:
        logger.error("failed: %s", error)
    logger.info("%d of %d shards are in %s", len(fractions) - len(failures), len(fractions), directory)
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
