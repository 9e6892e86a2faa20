"""Packed batches: documents tokenised, joined end to end and cut into rows; exact and resumable.

A document is <|bos|> and its tokens. The micro-batches of one optimizer step, over all ranks, each have a
*stream* of their own: stream s joins the documents s, s + S, s + 2S, ... of the epoch (S streams) and
continues with the next epoch. A micro-batch reads B * T + 1 tokens of its stream and advances by B * T: the
last token is read again as the first input of the stream's next micro-batch, so that no pair of neighbours is
lost. Row b of the micro-batch is its b-th piece of T tokens.

    stream 0:  <bos> a a a a <bos> c c c ...      rank 0 of 2, or the first half of an accumulation
    stream 1:  <bos> b b <bos> d d d d d ...      rank 1 of 2, or the second half

Rank r of W serves the streams r, r + W, ... in turn. So the data of a step depend on S, B and T but not on W:
one rank that accumulates gradients sees the data of eight ranks that do not. A seed shuffles the row groups,
since the shards of a user are often sorted by content. A state holds the position of each stream as (epoch,
document, offset in its tokens); to resume, that document is tokenised again. The row counts in the parquet
footers locate a document by its number, so nothing before it is decoded.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from nanochat.common import Runtime
from nanochat.data.shards import open_shard, read_row_group, text_bytes

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE = 64  # documents that tell the bytes of a token; each may be in a row group of its own
DOCUMENTS_PER_CALL = 16  # tokenised together; few, so that no single batch takes long
CACHE_BYTES = (
    256 * 2**20
)  # of decoded row groups: the streams read at different positions, but near one another

State = dict[str, Any]


class Tokenizer(Protocol):
    """The part of a tokenizer that the loader uses."""

    def get_bos_token_id(self) -> int: ...
    def encode(self, text: list[str], *, prepend: int, num_threads: int) -> list[list[int]]: ...


def packed_batches(
    tokenizer: Tokenizer,
    shards: Sequence[Path],
    *,
    batch_size: int,
    seq_len: int,
    streams: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    seed: int | None = None,
    state: State | None = None,
    epochs: int | None = None,
    num_threads: int = 4,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
    """Return an iterator of (inputs, targets, state): two contiguous int64 (batch_size, seq_len) on `device`.

    `streams` is the number of micro-batches in one optimizer step over all ranks. The documents come in the
    order of the shards, or with a seed in an order of row groups drawn from it. `state` consists of plain
    JSON values; passed as an argument, it continues with the batch after the one that it was yielded with. A
    rank's state has the positions of its own streams; `merge_states` combines them for any number of ranks.

    epochs=None repeats without end. With a number (validation: 1) every token of these epochs is a target
    once, except the first <|bos|> of each stream, which nothing precedes; a stream's last micro-batch is
    padded with inputs <|bos|> and targets -1, and a stream that has ended is skipped. Streams differ in
    length, so ranks may yield different numbers of batches: sum locally and reduce after the loop, not in it.

    Raises ValueError for inconsistent sizes, fewer documents than streams, or a state of other data or sizes.
    """
    if min(batch_size, seq_len, streams) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"{batch_size=}, {seq_len=} and {streams=} must be 1 or more, and {rank=} less than {world_size=}"
        )
    if streams % world_size:
        suggestion = max(1, round(streams / world_size)) * world_size
        raise ValueError(f"{streams=} must be a multiple of {world_size=}; try {suggestion}")
    documents = _Documents(shards, seed)
    if len(documents) < streams:
        raise ValueError(
            f"the shards hold {len(documents)} documents, fewer than the {streams=} that need one each; "
            "use more text, a smaller total batch or a larger device batch"
        )
    fixed = {
        "streams": streams,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "documents": len(documents),
        "seed": seed,
    }
    state = state or {**fixed, "next_stream": 0, "positions": {str(s): [0, s, 0] for s in range(streams)}}
    own = range(rank, streams, world_size)
    _check_state(state, fixed, own, world_size)

    bos = tokenizer.get_bos_token_id()

    def encode(indices: list[int]) -> list[np.ndarray]:
        ids = tokenizer.encode(documents.read(indices), prepend=bos, num_threads=num_threads)
        return [np.array(document, dtype=np.int32) for document in ids]

    cursors = [
        _Stream(encode, state["positions"][str(s)], first=s, step=streams, stop=len(documents), epochs=epochs)
        for s in own
    ]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, State]]:
        turn = state["next_stream"] // world_size
        n_ended = 0  # consecutive streams without tokens
        while n_ended < len(cursors):
            cursor = cursors[turn]
            turn = (turn + 1) % len(cursors)
            tokens = cursor.peek(batch_size * seq_len + 1)
            n_ended = 0 if len(tokens) > 1 else n_ended + 1
            if n_ended:
                continue
            cursor.advance(len(tokens) - 1)
            positions = {str(s): list(stream.position) for s, stream in zip(own, cursors, strict=True)}
            inputs, targets = _to_device(tokens, (batch_size, seq_len), bos, torch.device(device))
            yield inputs, targets, {**fixed, "next_stream": turn * world_size, "positions": positions}

    return batches()


def validation_batches(
    tokenizer: Tokenizer,
    shards: Sequence[Path],
    runtime: Runtime,
    *,
    batch_size: int,
    seq_len: int,
    n_tokens: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return this rank's share of the batches of the first n_tokens, rounded up; of all, if there are fewer.

    Two int64 (batch_size, seq_len) each, on the CPU: 16 bytes a token, made once for all evaluations. All
    ranks together have the same batches, whatever their number: each makes all and keeps its own.
    """
    batches = packed_batches(
        tokenizer,
        shards,
        batch_size=batch_size,
        seq_len=seq_len,
        streams=1,
        device="cpu",
        epochs=1,
    )
    own = islice(batches, runtime.rank, -(-n_tokens // (batch_size * seq_len)), runtime.world_size)
    return [(inputs, targets) for inputs, targets, _ in own]


def estimate_tokens(tokenizer: Tokenizer, shards: Sequence[Path]) -> int:
    """Estimate the tokens of an epoch: the bytes of the text, by those a token in an even sample of it.

    For the hub's shards it is exact to about 1 %, for row groups of a few kilobytes some per cent too high.
    """
    documents = _Documents(shards, None)
    n = min(SAMPLE, len(documents))
    texts = documents.read([i * len(documents) // n for i in range(n)])
    ids = tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id(), num_threads=4)
    n_bytes = sum(len(text.encode()) for text in texts)
    return text_bytes(shards) * sum(map(len, ids)) // max(1, n_bytes)


def merge_states(states: Sequence[State]) -> State:
    """Return one state, for any number of ranks, from those of all ranks after the same batch."""
    merged = {**states[0], "positions": {}}
    for state in states:
        if {**state, "positions": {}} != {**merged, "positions": {}}:
            raise ValueError(f"loader states of different batches cannot be merged: {state} and {states[0]}")
        merged["positions"].update(state["positions"])
    return merged


def _check_state(state: State, fixed: dict[str, int | None], own: range, world_size: int) -> None:
    for name, value in fixed.items():
        if state.get(name) != value:
            raise ValueError(
                f"the loader state was saved with {name}={state.get(name)}, not {value}; resume with the same"
            )
    if state["next_stream"] % world_size:
        raise ValueError(
            f"the loader state was saved at stream {state['next_stream']} of a step, which {world_size=} "
            "does not divide; resume with the same number of ranks, or from a state saved after a whole step"
        )
    if missing := [s for s in own if str(s) not in state["positions"]]:
        raise ValueError(f"the loader state lacks the streams {missing}; merge the states of all ranks")


def _to_device(
    tokens: np.ndarray, shape: tuple[int, int], bos: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy B * T + 1 tokens to the device as (inputs, targets) with one copy, asynchronous on CUDA.

    The buffer is new each time, from PyTorch's cache of pinned memory, which tracks when a copy has ended. A
    buffer of our own could be overwritten before the GPU has read it.
    """
    batch = torch.empty((2, *shape), dtype=torch.int64, pin_memory=device.type == "cuda")
    flat = batch.view(2, -1).numpy()
    n = len(tokens) - 1
    flat[0, :n], flat[0, n:] = tokens[:-1], bos
    flat[1, :n], flat[1, n:] = tokens[1:], -1
    inputs, targets = batch.to(device, non_blocking=True)
    return inputs, targets


class _Stream:
    """The tokens of documents first, first + step, ... < stop, epoch after epoch, starting at a position."""

    def __init__(
        self,
        encode: Callable[[list[int]], list[np.ndarray]],
        position: Sequence[int],
        *,
        first: int,
        step: int,
        stop: int,
        epochs: int | None,
    ) -> None:
        self.encode = encode
        self.epoch, self.document, self.offset = position  # of the next token
        self.first, self.step, self.stop = first, step, stop
        self.upcoming = self._indices(self.epoch, self.document, epochs)
        self.tokenised: deque[np.ndarray] = deque()  # the documents from self.document on
        self.n_ahead = -self.offset  # tokens in them after the position

    @property
    def position(self) -> tuple[int, int, int]:
        """(epoch, document, offset in its tokens) of the next token."""
        return self.epoch, self.document, self.offset

    def peek(self, n: int) -> np.ndarray:
        """Return the next n tokens, int32 (n,), without advancing; fewer at the end of the last epoch."""
        while self.n_ahead < n and (indices := list(islice(self.upcoming, DOCUMENTS_PER_CALL))):
            documents = self.encode(indices)
            self.tokenised.extend(documents)
            self.n_ahead += sum(map(len, documents))
        if self.tokenised and self.offset >= len(self.tokenised[0]):
            raise ValueError(
                f"the loader state points to token {self.offset} of document {self.document}, which has "
                f"{len(self.tokenised[0])}; resume with the text and the tokenizer that it was saved with"
            )
        pieces: list[np.ndarray] = []
        start, missing = self.offset, n
        for document in self.tokenised:
            pieces.append(document[start : start + missing])
            start, missing = 0, missing - len(pieces[-1])
            if missing == 0:
                break
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)

    def advance(self, n: int) -> None:
        """Move the position by n tokens, which `peek` has returned."""
        self.offset += n
        self.n_ahead -= n
        while self.tokenised and self.offset >= len(self.tokenised[0]):
            self.offset -= len(self.tokenised.popleft())
            self.epoch, self.document = self._after(self.epoch, self.document)

    def _after(self, epoch: int, document: int) -> tuple[int, int]:
        document += self.step
        return (epoch, document) if document < self.stop else (epoch + 1, self.first)

    def _indices(self, epoch: int, document: int, epochs: int | None) -> Iterator[int]:
        while epochs is None or epoch < epochs:
            yield document
            epoch, document = self._after(epoch, document)


class _Documents:
    """Read documents by their number in the epoch, with a cache of the row groups that were used last."""

    def __init__(self, shards: Sequence[Path], seed: int | None) -> None:
        self.row_groups: list[tuple[Path, int, int]] = []  # shard, index in it, documents
        for path in shards:
            with open_shard(path) as shard:
                rows = [shard.metadata.row_group(i).num_rows for i in range(shard.num_row_groups)]
                self.row_groups.extend((path, index, n) for index, n in enumerate(rows))
        if seed is not None:
            random.Random(seed).shuffle(self.row_groups)
        self.starts = np.cumsum([0, *(n for _, _, n in self.row_groups)])  # of each row group, and the end
        self.cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, indices: list[int]) -> list[str]:
        """Return the texts of these documents, in this order."""
        groups = np.searchsorted(self.starts, indices, side="right") - 1
        return [
            column[index - int(self.starts[group])].as_py()
            for group, pairs in groupby(zip(groups.tolist(), indices, strict=True), key=lambda pair: pair[0])
            for column in [self._column(group)]
            for _, index in pairs
        ]

    def _column(self, group: int) -> pa.ChunkedArray:
        column = self.cache.pop(group, None)
        if column is None:
            column = read_row_group(*self.row_groups[group][:2])
            while self.cache and column.nbytes + sum(c.nbytes for c in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache[group] = column
        return column
