"""The text for pretraining: folders of parquet shards with one string column, `text`.

The setting `data` selects the folder:

    hub        $NANOCHAT_BASE_DIR/base_data, downloaded from karpathy/fineweb-edu-100b-shuffle by this module
    embedded   the documentation of the running Python (nanochat/data/embedded.py), made on first use
    a path     your own text: a file, a folder or a glob of .parquet (column text), .jsonl (key text) or .txt
    auto       hub if it has been downloaded, else embedded; never downloads

The last shard in the order of names is the validation set, all others are for training. On the hub that is
shard_01822, whatever the number of training shards, so that losses are comparable between runs and during a
download. Your own folder of two parquet files or more is used in place, in the same way; anything else is
converted once, with every twentieth document held out.

A download resumes where it broke, and a shard under its own name is complete (nanochat/data/download.py).
HF_ENDPOINT is honoured. To download the first 240 shards, four at a time, and the validation shard:

    python -m nanochat.dataset -n 240 -w 4
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

from nanochat.common import base_dir, parse, run
from nanochat.data.download import download, hub_url
from nanochat.data.embedded import write_shards
from nanochat.data.own_text import build_once, own_shards
from nanochat.data.shards import SHARD_NAME, open_shard, read_row_group

logger = logging.getLogger(__name__)

REPO_ID = "karpathy/fineweb-edu-100b-shuffle"
N_TRAIN_SHARDS = 1822
VAL_SHARD = SHARD_NAME.format(N_TRAIN_SHARDS)


# ---------------------------------------------------------------------------------------------------------
# Sources and splits


def source(data: str) -> str:
    """Return data, with "auto" replaced: by "hub" if that has been downloaded, else by "embedded"."""
    hub = base_dir() / "base_data"
    if data != "auto":
        return data
    return "hub" if (hub / VAL_SHARD).exists() and len(list(hub.glob("*.parquet"))) > 1 else "embedded"


def resolve(data: str) -> Path:
    """Return the folder of shards that `data` (see above) selects; make it if that needs no network."""
    hub, embedded = base_dir() / "base_data", base_dir() / "embedded_data"
    data = source(data)
    if data == "hub":
        if not (hub / VAL_SHARD).exists():
            raise FileNotFoundError(f"{hub / VAL_SHARD} is missing; run `python -m nanochat.dataset -n 8`")
        return hub
    if data == "embedded":
        return build_once(embedded, write_shards)
    return own_shards(data)


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
        open_shard(path).close()  # fail now, not hours into training
    return paths


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, data: str = "auto"
) -> Iterator[list[str]]:
    """Yield the documents of a split once, one list of texts per row group: start, start + step, ...

    Row groups are numbered through all shards of the split: `start=rank, step=world_size` divides them.
    """
    if step < 1 or not 0 <= start < step:
        raise ValueError(f"start={start}, step={step}: needs 0 <= start < step")
    paths = shard_paths(data, split)
    row_groups = ((path, index) for path in paths for index in range(open_shard(path).num_row_groups))
    for path, index in islice(row_groups, start, None, step):
        yield read_row_group(path, index).to_pylist()


# ---------------------------------------------------------------------------------------------------------
# Download


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The shards to download."""

    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])]
    """training shards, about 100 MB each: the first n of 1822 (the validation shard is always downloaded)"""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """number of simultaneous downloads"""

    def __post_init__(self) -> None:
        if not 1 <= self.num_shards <= N_TRAIN_SHARDS:
            raise ValueError(f"num_shards={self.num_shards} must be from 1 to {N_TRAIN_SHARDS}")
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Download the shards. Return 1 if some failed, after logging one line for each of them."""
    from tqdm import tqdm

    config = parse(DatasetConfig, argv)
    directory = base_dir() / "base_data"
    directory.mkdir(exist_ok=True)
    names = [SHARD_NAME.format(index) for index in range(config.num_shards)]
    fractions = dict.fromkeys([*names, VAL_SHARD], 0.0)
    failures = []

    def show(name: str, n_bytes: int, size: int | None) -> None:
        fractions[name] = n_bytes / (size or 1)
        bar.update(sum(fractions.values()) - bar.n)

    def fetch(name: str) -> None:
        if (directory / name).exists():
            show(name, 1, 1)
        else:
            url = hub_url(REPO_ID, name, repo_type="dataset")
            download(url, directory / name, is_hub=True, on_progress=partial(show, name))

    with (
        ThreadPoolExecutor(config.num_workers) as pool,
        tqdm(total=len(fractions), bar_format="{l_bar}{bar}| {n:.1f}/{total} shards, {remaining}") as bar,
    ):
        # First and alone: nothing works without it, and a missing network is one error instead of hundreds.
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
