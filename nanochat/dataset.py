"""The text for pretraining: folders of parquet shards with one string column, `text`.

The setting `data` selects the folder:

    hub:fineweb    $NANOCHAT_BASE_DIR/base_data, from karpathy/fineweb-edu-100b-shuffle
    hub:climbmix   $NANOCHAT_BASE_DIR/base_data_climbmix, from karpathy/climbmix-400b-shuffle
    hub            the one of the recipe (nanochat/recipes.py); of commands without a recipe, hub:fineweb
    embedded       the documentation of the running Python (nanochat/data/embedded.py), made on first use
    a path         your own text: a file, a folder or a glob of .parquet (column text), .jsonl (key text) or
                   .txt
    auto           hub if it has been downloaded, else embedded; never downloads

The last shard in the order of names is the validation set, all others are for training. On the hub that is
the data set's last, shard_01822 or shard_06542, whatever the number of training shards, so that losses are
comparable between runs and during a download. Your own folder of two parquet files or more is used in place,
in the same way; anything else is converted once, with every twentieth document held out.

This module downloads the hub's shards. A download resumes where it broke, and a shard under its own name is
complete (nanochat/data/download.py). HF_ENDPOINT is honoured. To download the first 240 shards, four at a
time, and the validation shard:

    python -m nanochat.dataset -n 240 -w 4
    python -m nanochat.dataset -n 240 -w 4 --data=hub:climbmix
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


# ---------------------------------------------------------------------------------------------------------
# Sources and splits


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set of the hub: shard_00000, shard_00001, ... for training, and one more for validation."""

    name: str
    repo: str
    n_train_shards: int
    folder: str  # in the base directory; no other data set has it

    @property
    def data(self) -> str:
        """Its value of the setting `data`."""
        return f"hub:{self.name}"

    @property
    def val_shard(self) -> str:
        """The file name of the validation shard."""
        return SHARD_NAME.format(self.n_train_shards)

    @property
    def directory(self) -> Path:
        """The folder of the downloaded shards, which may not exist."""
        return base_dir() / self.folder

    @property
    def shards(self) -> list[Path]:
        """The downloaded shards in the order of their names."""
        return sorted(self.directory.glob("*.parquet"))

    @property
    def is_downloaded(self) -> bool:
        """True if there are the validation shard and another one."""
        return (self.directory / self.val_shard).exists() and len(self.shards) > 1

    def check(self) -> Path:
        """Return the folder of the shards.

        Raises FileNotFoundError if too few are downloaded, ValueError if another data set's are among them.
        """
        shards, val_shard = self.shards, self.directory / self.val_shard
        download = f"`python -m nanochat.dataset -n 8 --data={self.data}`"
        if val_shard not in shards:
            raise FileNotFoundError(f"{val_shard} is missing; run {download}")
        if shards[-1] != val_shard:
            raise ValueError(
                f"{shards[-1]} is no shard of {self.data}, whose last one is {self.val_shard}; move it away"
            )
        if len(shards) < 2:
            raise FileNotFoundError(
                f"{self.directory} holds 1 parquet shard, but needs two: the last is for validation, the "
                f"others for training; run {download}"
            )
        return self.directory


FINEWEB = HubText(
    name="fineweb", repo="karpathy/fineweb-edu-100b-shuffle", n_train_shards=1822, folder="base_data"
)
CLIMBMIX = HubText(
    name="climbmix", repo="karpathy/climbmix-400b-shuffle", n_train_shards=6542, folder="base_data_climbmix"
)
HUB_TEXTS = (FINEWEB, CLIMBMIX)


def find_hub_text(data: str) -> HubText:
    """Return the data set that `data` names; "hub" is FineWeb-EDU. ValueError for any other value."""
    for text in HUB_TEXTS:
        if data == text.data or (data == "hub" and text is FINEWEB):
            return text
    names = " or ".join(text.data for text in HUB_TEXTS)
    raise ValueError(f"data={data!r} is no data set of the hub; choose {names}")


def source(data: str, hub: HubText = FINEWEB) -> str:
    """Return data, with "hub" and "auto" replaced: by hub.data, or by "embedded" if auto finds no download.

    hub is the data set of the recipe. Raises ValueError for an unknown one in `data`.
    """
    if data == "auto":
        return hub.data if hub.is_downloaded else "embedded"
    if data == "hub":
        return hub.data
    return find_hub_text(data).data if data.startswith("hub:") else data


def hub_text(data: str) -> HubText | None:
    """Return the data set of the hub that `data` (see above) selects, or None for other text."""
    data = source(data)
    return find_hub_text(data) if data.startswith("hub:") else None


def resolve(data: str) -> Path:
    """Return the folder of shards that `data` (see above) selects; make it if that needs no network."""
    data = source(data)
    if text := hub_text(data):
        return text.check()
    if data == "embedded":
        return build_once(base_dir() / "embedded_data", write_shards)
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
            "the others for training; delete it, and it is made again"
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

    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n", "--num-files"])]
    """training shards, about 100 MB each: the first n, -1: all (the validation shard is always downloaded)"""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """number of simultaneous downloads"""
    data: str = FINEWEB.data
    """data set: hub:fineweb (1,822 training shards) or hub:climbmix (6,542)"""

    def __post_init__(self) -> None:
        text = find_hub_text(self.data)
        if self.num_shards != -1 and not 1 <= self.num_shards <= text.n_train_shards:
            raise ValueError(
                f"num_shards={self.num_shards} must be from 1 to {text.n_train_shards}, the training shards "
                f"of {text.data}, or -1 for all"
            )
        if self.num_workers < 1:
            raise ValueError(f"num_workers={self.num_workers} must be 1 or more")


def main(argv: Sequence[str] | None = None) -> int:
    """Download the shards. Return 1 if some failed, after logging one line for each of them."""
    from tqdm import tqdm

    config = parse(DatasetConfig, argv)
    text = find_hub_text(config.data)
    directory = text.directory
    directory.mkdir(exist_ok=True)
    n_shards = text.n_train_shards if config.num_shards == -1 else config.num_shards
    names = [SHARD_NAME.format(index) for index in range(n_shards)]
    fractions = dict.fromkeys([*names, text.val_shard], 0.0)
    failures = []

    def show(name: str, n_bytes: int, size: int | None) -> None:
        fractions[name] = n_bytes / (size or 1)
        bar.update(sum(fractions.values()) - bar.n)

    def fetch(name: str) -> None:
        if (directory / name).exists():
            show(name, 1, 1)
        else:
            url = hub_url(text.repo, name, repo_type="dataset")
            download(url, directory / name, is_hub=True, on_progress=partial(show, name))

    with (
        ThreadPoolExecutor(config.num_workers) as pool,
        tqdm(total=len(fractions), bar_format="{l_bar}{bar}| {n:.1f}/{total} shards, {remaining}") as bar,
    ):
        # First and alone: nothing works without it, and a missing network is one error instead of hundreds.
        fetch(text.val_shard)
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
