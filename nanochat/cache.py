"""HybridCache: all that a batch of sequences must remember between two forwards.

An attention layer remembers keys and values, which grow with the sequence; an SLC2 layer remembers the
last K-1 inputs of its convolution, which do not. At d20 in bfloat16 that is 7 * 2 * 1280 * 2 = 35,840 bytes
a token plus 66,560 bytes a sequence, where 20 attention layers would keep 102,400 bytes a token.

The cache belongs to the batch, never to the model: modules hold parameters only, so two conversations cannot
mix. `pos` counts the tokens that each row has seen; GPT.forward advances it once, after the last layer. Rows
may be of different lengths: a forward over rows that are padded on the right is told how many tokens of each
are real, and what the padding left behind is masked until real tokens overwrite it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanochat.gpt import GPTConfig


@dataclass
class Span:
    """Where the T new tokens of each row come to stand, for the layers of one forward."""

    start: int | None  # the same in every row; None: see positions
    positions: Tensor  # (B,T) int64
    end: int  # no row reaches further
    mask: Tensor | None  # (B,1,T,end) bool, what each new token may attend to; None: see is_causal
    is_causal: bool  # the new tokens are all there is
    lengths: Tensor | None  # (B,) int64, how many of the T are real; None: all


@dataclass
class KVState:
    """Keys and values of one attention layer, (B, H_kv, max_len, D) each, valid up to the row's pos."""

    k: Tensor
    v: Tensor

    def append(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D) and return all that may be valid now, (B, H_kv, span.end, D)."""
        for stored, new in ((self.k, k), (self.v, v)):
            if span.start is not None:
                stored[:, :, span.start : span.end] = new
            else:
                rows = torch.arange(new.size(0), device=new.device)[:, None]
                stored[rows, :, span.positions] = new.transpose(1, 2)
        return self.k[:, :, : span.end], self.v[:, :, : span.end]


@dataclass
class ConvState:
    """The last K-1 convolution inputs of one SLC2 layer, oldest first, (B, K-1, E)."""

    window: Tensor


class HybridCache:
    """Decode state of `batch_size` sequences of at most `max_len` tokens each, one entry a layer."""

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.batch_size, self.max_len = batch_size, max_len
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest, self.is_even = (
            0,
            True,
        )  # the host's knowledge of pos: its maximum, whether all are equal
        kv_shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        conv_shape = (batch_size, config.n_kernel - 1, config.n_embd)
        # zeros: what a short row has not written is read when a longer row is, and masked, but 0 * NaN is NaN
        self.layers: list[KVState | ConvState] = [
            KVState(*(torch.zeros(kv_shape, device=device, dtype=dtype) for _ in "kv"))
            if kind == "attention"
            else ConvState(torch.zeros(conv_shape, device=device, dtype=dtype))
            for kind in config.layer_kinds
        ]

    def span(self, T: int, lengths: Tensor | None = None) -> Span:
        """Say where T more tokens of each row go; ValueError when there is no room."""
        end = self.longest + T
        if end > self.max_len:
            raise ValueError(
                f"{T} tokens after {self.longest} do not fit a cache of {self.max_len} tokens a row"
            )
        positions = self.pos[:, None] + torch.arange(T, device=self.pos.device)
        mask = None
        if self.longest > 0 and not (self.is_even and T == 1):
            mask = (torch.arange(end, device=self.pos.device) <= positions[..., None])[:, None]
        return Span(
            start=self.longest if self.is_even else None,
            positions=positions,
            end=end,
            mask=mask,
            is_causal=self.longest == 0,
            lengths=lengths,
        )

    def advance(self, span: Span) -> None:
        """Count the tokens of a forward as seen."""
        self.longest = span.end
        if span.lengths is None:
            self.pos += span.positions.size(1)
        else:
            self.pos += span.lengths
            self.is_even = False

    def reset(self) -> None:
        """Forget everything: the next forward starts new sequences."""
        self.pos.zero_()  # keys and values beyond pos are masked or never read
        self.longest, self.is_even = 0, True
        for layer in self.layers:
            if isinstance(layer, ConvState):
                layer.window.zero_()

    def select(self, rows: Sequence[int]) -> HybridCache:
        """Copy some rows into a new cache, in this order; a row may come several times."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.pos.device)
        chosen = object.__new__(HybridCache)
        chosen.batch_size, chosen.max_len = len(rows), self.max_len
        chosen.pos, chosen.longest, chosen.is_even = self.pos[index], self.longest, self.is_even
        chosen.layers = [
            type(layer)(*(state[index] for state in vars(layer).values())) for layer in self.layers
        ]
        return chosen

    def fork(self, n: int) -> HybridCache:
        """Turn the cache of one sequence into a cache of n copies of it (prefill once, sample n times)."""
        if self.batch_size != 1:
            raise ValueError(f"fork needs a cache of one sequence, this one holds {self.batch_size}")
        return self.select([0] * n)
