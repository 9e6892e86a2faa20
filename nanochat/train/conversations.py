"""Conversations as training batches: packed for midtraining, padded and masked for supervised finetuning.

A plan assigns conversations to rows. It is made once, from the lengths of all conversations, and depends on
nothing else: not on ranks, micro-batch size or the step of a resume. So an epoch is a fixed list of rows,
each rank takes its share of every step's rows, and the state of the loader is a row number.

    packed      rows of seq_len tokens, conversations laid end to end by best fit; one that is longer than a
                row is cut into pieces, so that every token is learned and none is cropped away
    padded      one conversation a row, as wide as the widest of its micro-batch; only the assistant's tokens
                are learned; a conversation of more places than seq_len is cut as chat_format describes

The target of a token is the next token of its conversation, so a conversation of n tokens fills n - 1 places.
Rows missing from the last step are empty: they have no targets and add nothing to the loss.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.chat_format import render_conversation
from nanochat.common import Runtime
from nanochat.task import Task
from nanochat.tokenizer import RustBPETokenizer

Piece = tuple[int, int, int]  # conversation, its first place, its last place + 1
OPEN_ROWS = 256  # rows that still accept conversations, at most


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """A task's conversations, rendered for one stage."""

    task: Task
    tokenizer: RustBPETokenizer
    seq_len: int
    packed: bool

    def render(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and mask of a conversation: packed whole and unmasked, padded cut to fit and masked."""
        max_tokens = 2**31 if self.packed else self.seq_len + 1
        ids, mask = render_conversation(self.tokenizer, self.task[index], max_tokens)
        return ids, [1] * len(ids) if self.packed else mask

    def plan(self, runtime: Runtime, max_conversations: int | None = None) -> list[list[Piece]]:
        """Return the rows of the first max_conversations (None: all); every rank measures its share."""
        n = len(self.task) if max_conversations is None else min(max_conversations, len(self.task))
        if n == 0:
            raise ValueError(f"{type(self.task).__name__} has no conversations")
        share = range(runtime.rank, n, runtime.world_size)
        progress = tqdm(share, "measuring conversations", disable=not runtime.is_main, leave=False)
        shares = runtime.gather([len(self.render(index)[0]) - 1 for index in progress])
        n_places = [shares[i % runtime.world_size][i // runtime.world_size] for i in range(n)]
        if self.packed:
            return pack(n_places, self.seq_len)
        return [[(index, 0, end)] for index, end in enumerate(n_places)]

    def batches(
        self,
        rows: Sequence[list[Piece]],
        batch_size: int,
        runtime: Runtime,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield inputs and targets, (B,T) int64 on the device, and the loader state after them, without end.

        Rows are counted from `start` over ranks and epochs: after the last one of the plan comes the first.
        Rows from `stop` on (None: no such row) are empty.
        """
        while True:
            mine = range(start + runtime.rank * batch_size, start + (runtime.rank + 1) * batch_size)
            start += batch_size * runtime.world_size
            batch = self._lay_out(
                [rows[row % len(rows)] if stop is None or row < stop else [] for row in mine]
            )
            if runtime.device.type == "cuda":  # else the copy would wait until the GPU is idle
                batch = batch.pin_memory()
            inputs, targets = batch.to(runtime.device, non_blocking=True)
            # positions would be those of a rank's own streams; here all ranks share next_row
            state = {"next_row": start, "n_rows": len(rows), "positions": {}}
            yield inputs, targets, state

    def _lay_out(self, rows: list[list[Piece]]) -> Tensor:
        """Return inputs and targets, (2,B,T) int64."""
        width = self.seq_len if self.packed else max(1, *map(_places, rows))
        batch = torch.full((2, len(rows), width), -1)
        inputs, targets = batch
        inputs.fill_(self.tokenizer.get_bos_token_id())
        for i, row in enumerate(rows):
            place = 0
            for index, begin, end in row:
                ids, mask = map(torch.tensor, self.render(index))
                places = slice(place, place + end - begin)
                inputs[i, places] = ids[begin:end]
                targets[i, places] = ids[begin + 1 : end + 1].where(mask[begin + 1 : end + 1] == 1, -1)
                place = places.stop
        return batch


def by_width(rows: Sequence[list[Piece]], rows_per_step: int) -> list[list[Piece]]:
    """Sort the rows within each step by length: same steps, but micro-batches with less padding."""
    steps = (rows[first : first + rows_per_step] for first in range(0, len(rows), rows_per_step))
    return [row for step in steps for row in sorted(step, key=_places)]


def _places(row: list[Piece]) -> int:
    return sum(end - begin for _, begin, end in row)


def pack(n_places: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Lay conversations of these lengths into rows of `capacity` places by best fit (Johnson 1973).

    Each goes into the open row that it fills best. At most OPEN_ROWS rows are open; the fullest is closed
    first. Rows come in the order of their first conversation.
    """
    rows: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # (places left, row) of the open rows, in order
    for index, n in enumerate(n_places):
        for begin in range(0, n, capacity):
            piece = (index, begin, min(begin + capacity, n))
            size = piece[2] - begin
            fit = bisect_left(room, (size, -1))
            if fit < len(room):
                left, row = room.pop(fit)
                rows[row].append(piece)
            else:
                left, row = capacity, len(rows)
                rows.append([piece])
            if left > size:
                insort(room, (left - size, row))
            if len(room) > OPEN_ROWS:
                room.pop(0)  # the fullest
    return rows
