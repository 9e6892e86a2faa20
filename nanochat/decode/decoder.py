"""The interface through which engine and server decode many sequences at once.

A sequence has a slot: `open` it, `feed` it all of its prompt but the last token, and `fork` it for more
samples of the same prompt. Each `launch` then appends the last token of every running sequence, and `collect`
returns the next tokens, drawn by each sequence's own settings and seed, independently of the others.
`PlainDecoder` calls the model and runs anywhere; nanochat/decode/graph_decoder.py does the same on NVIDIA
GPUs without Python in the loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.cache import HybridCache
from nanochat.gpt import GPT
from nanochat.sampling import SamplingParams, sample_rows


class Decoder(ABC):
    """A number of slots for sequences, and the model that continues them. Not thread-safe."""

    slots: int
    context: int  # largest number of tokens in a slot
    device: torch.device
    overlaps: bool  # launch returns before its work is done
    logits: Tensor  # (B,V) float32, soft-capped, of the last launch, in its order

    @abstractmethod
    def open(self, params: SamplingParams) -> int:
        """Return the slot of a new sequence; IndexError if all are taken."""

    @abstractmethod
    def feed(self, slot: int, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence that has not been launched yet."""

    @abstractmethod
    def fork(self, slot: int, params: SamplingParams) -> int:
        """Return the slot of a new sequence that has been fed the same tokens as this one."""

    @abstractmethod
    def launch(self, last: Mapping[int, int | None]) -> None:
        """Start to append a token to each slot and to draw the next; None appends the one drawn last.

        A slot that has been launched must take part in every launch until it is closed.
        """

    @abstractmethod
    def collect(self) -> list[int]:
        """Wait for the oldest launch not yet collected; return its tokens in its order."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """Free a slot."""

    @abstractmethod
    def load(self, model: GPT) -> None:
        """Use the weights of a model of the same shape from now on."""

    def warm_up(self) -> None:  # noqa: B027 - most decoders need none
        """Do the work that would otherwise delay the first launches."""

    def step(self, last: Mapping[int, int | None]) -> list[int]:
        """Launch and collect."""
        self.launch(last)
        return self.collect()


@dataclass
class _Sequence:
    params: SamplingParams
    cache: HybridCache | None  # its own until the first launch, then a row of the decoder's
    tokens: list[int] = field(default_factory=list)
    fed: int = 0  # how many of them
    drawn: int = 0  # token of the last launch


class PlainDecoder(Decoder):
    """A Decoder that calls GPT.next_logits; running sequences are the first rows of one cache."""

    overlaps = False

    def __init__(self, model: GPT, slots: int, context: int | None = None):
        self.model, self.slots, self.context = model, slots, context or model.config.sequence_len
        self.device = model.device
        self.logits = torch.empty(0)
        self._cache = model.new_cache(slots, self.context)
        self._running: list[int] = []  # the slot of each row
        self._sequences: dict[int, _Sequence] = {}
        self._free = list(range(slots))[::-1]
        self._drawn: deque[list[int]] = deque()

    def open(self, params: SamplingParams) -> int:
        """See Decoder."""
        sequence = _Sequence(params, self.model.new_cache(1, self.context))  # first: it may run out of memory
        slot = self._free.pop()
        self._sequences[slot] = sequence
        return slot

    @torch.inference_mode()
    def feed(self, slot: int, tokens: Sequence[int]) -> None:
        """See Decoder."""
        sequence = self._sequences[slot]
        self.model.hidden(torch.tensor([tokens], device=self.device), sequence.cache)
        sequence.tokens += tokens
        sequence.fed += len(tokens)

    @torch.inference_mode()
    def fork(self, slot: int, params: SamplingParams) -> int:
        """See Decoder."""
        source, copy = self._sequences[slot], self.open(params)
        sequence = self._sequences[copy]
        assert sequence.cache is not None
        assert source.cache is not None, "a fork of a sequence that has been launched"
        sequence.cache.copy_row(0, source.cache, 0)
        sequence.tokens, sequence.fed = [*source.tokens], source.fed
        return copy

    @torch.inference_mode()
    def launch(self, last: Mapping[int, int | None]) -> None:
        """See Decoder."""
        for slot, token in last.items():
            sequence = self._sequences[slot]
            self._join(slot, sequence)
            sequence.tokens.append(sequence.drawn if token is None else token)
        assert set(last) == set(self._running), "a launch without some of the running sequences"
        rows = self._cache.first(len(last))
        tokens = [self._sequences[slot].tokens[-1] for slot in self._running]
        logits = self.model.next_logits(torch.tensor(tokens, device=self.device)[:, None], rows)
        self._cache.lengths[: len(last)] = rows.lengths
        self.logits = logits[[self._running.index(slot) for slot in last]]
        sequences = [self._sequences[slot] for slot in last]
        drawn = sample_rows(
            self.logits,
            [s.params for s in sequences],
            [len(s.tokens) - s.fed - 1 for s in sequences],
            [s.tokens for s in sequences],
        )
        for sequence, token in zip(sequences, drawn, strict=True):
            sequence.drawn = token
        self._drawn.append(drawn)

    def collect(self) -> list[int]:
        """See Decoder."""
        return self._drawn.popleft()

    @torch.inference_mode()
    def close(self, slot: int) -> None:
        """See Decoder."""
        del self._sequences[slot]
        self._free.append(slot)
        if slot in self._running:  # the last row moves into the gap
            row, end = self._running.index(slot), len(self._running) - 1
            if row != end:
                self._cache.copy_row(row, self._cache, end)
                self._running[row] = self._running[end]
            self._running.pop()

    def load(self, model: GPT) -> None:
        """See Decoder."""
        self.model = model

    def _join(self, slot: int, sequence: _Sequence) -> None:
        if sequence.cache is not None:
            self._cache.copy_row(len(self._running), sequence.cache, 0)
            self._running.append(slot)
            sequence.cache = None
