"""Shards of text: parquet files with a string column `text`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SHARD_NAME = "shard_{:05d}.parquet"
ROWS_PER_GROUP = 1024


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard. Raises ValueError if it is corrupt, has no string column `text` or no rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        shard = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} is not a readable parquet file ({error}); delete it and try again"
        ) from error
    columns = {field.name: field.type for field in shard.schema_arrow}
    if columns.get("text") not in (pa.string(), pa.large_string()):
        raise ValueError(f"{path} needs a string column 'text', but its columns are {columns}")
    if shard.metadata.num_rows == 0:
        raise ValueError(f"{path} holds no documents; delete it")
    return shard


def text_bytes(paths: Iterable[Path]) -> int:
    """Return the bytes of all texts in shards, from the footers alone: nothing is decoded.

    Included are four a text, for its length, and the headers of pages; equal texts of a row group count once.
    """
    total = 0
    for path in paths:
        with open_shard(path) as shard:
            groups = [shard.metadata.row_group(index) for index in range(shard.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")
    return total


def read_row_group(path: Path, index: int) -> pa.ChunkedArray:
    """Return the texts of one row group, nulls as empty texts. Raises ValueError if it is corrupt."""
    import pyarrow as pa

    with open_shard(path) as shard:
        try:
            return shard.read_row_group(index, columns=["text"])["text"].fill_null("")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}, row group {index}, is corrupt ({error}); delete the file") from error


def write_parquet(path: Path, texts: Iterable[str], rows_per_group: int = ROWS_PER_GROUP) -> None:
    """Write a shard atomically, with one row group in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, texts = pa.schema([("text", pa.string())]), iter(texts)
    with atomic_write(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        while rows := list(islice(texts, rows_per_group)):
            writer.write_table(pa.table({"text": rows}, schema=schema))
