"""HybridCache: the decode state of a batch of sequences between two forwards.

An attention layer stores keys and values, which grow with the sequence; each convolution, in SLC2 layers and
in the second generation also in attention and MLP, stores its last K-1 inputs, which do not. At d20 in
bfloat16 this is 7 * 2 * 1280 * 2 = 35,840 bytes per token plus 66,560 bytes per sequence (240,640 in the
second generation); 20 attention layers would store 102,400 bytes per token.

The cache belongs to the batch, never to the model: modules hold parameters only, so two conversations cannot
mix. `pos` counts the tokens that each row has seen; GPT.forward advances it once, after the last layer. Rows
may have different lengths: positions beyond a short row are masked until its tokens overwrite them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanochat.config import GPTConfig


@dataclass
class Span:
    """Positions and attention mask of the T new tokens of each row, for the layers of one forward."""

    start: int | None  # common start of all rows; None: rows differ, see positions
    positions: Tensor  # (B,T) int64
    end: int  # end of the longest row
    mask: Tensor | None  # (B,1,T,end) bool, True where a new token may attend; None: see is_causal
    is_causal: bool  # the cache was empty: plain causal attention among the new tokens

    @property
    def places(self) -> slice | Tensor:
        """Return an index for a table of positions: a slice if all rows have the same."""
        return self.positions if self.start is None else slice(self.start, self.end)


@dataclass
class LayerState:
    """State of one layer: keys and values if it attends, and the window of each of its convolutions.

    kv: keys and values (B, H_kv, max_len, D) each, valid up to the row's pos, or (). windows: by the name of
    a convolution's input, its last K-1 values (B, K-1, C), oldest first.
    """

    kv: tuple[Tensor, ...]
    windows: dict[str, Tensor]

    def window(self, name: str) -> Tensor | None:
        """Return a convolution's window, None if the layer has no such convolution."""
        return self.windows.get(name)

    def append(self, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D); return views of all keys and values, (B, H_kv, span.end, D) each."""
        keys, values = self.kv
        for stored, new in ((keys, k), (values, v)):
            if span.start is not None:
                stored[:, :, span.start : span.end] = new
            else:
                rows = torch.arange(new.size(0), device=new.device)[:, None]
                stored[rows, :, span.positions] = new.transpose(1, 2)
        return keys[:, :, : span.end], values[:, :, : span.end]

    def rows(self, index: Tensor | slice) -> LayerState:
        """Return the state of some rows: copies for a tensor of row numbers, views for a slice."""
        windows = {name: window[index] for name, window in self.windows.items()}
        return LayerState(tuple(state[index] for state in self.kv), windows)


def window_channels(config: GPTConfig, kind: str) -> dict[str, tuple[int, int]]:
    """Return the taps K and channels C of the convolutions of a layer of this kind, by their input.

    "u" is SLC2's, "k" and "y" are keys and output of attention, "mlp" the output of the MLP.
    """
    c, E = config, config.n_embd
    convs = {"u": (c.n_kernel, E)} if kind == "slc2" else {}
    if c.residual_conv:
        if kind == "attention":
            convs |= {"k": (c.residual_conv, c.n_kv_head * c.head_dim), "y": (c.residual_conv, E)}
        convs |= {"mlp": (c.residual_conv, E)}
    return convs


def state_bytes(config: GPTConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Return the decode state's bytes per token (keys, values) and per sequence (conv windows)."""
    c = config
    kv = 2 * c.n_kv_head * c.head_dim * c.layer_kinds.count("attention") * dtype.itemsize
    windows = [conv for kind in c.layer_kinds for conv in window_channels(c, kind).values()]
    conv = sum((K - 1) * C for K, C in windows) * dtype.itemsize
    return {"per_token": kv, "per_sequence": conv}


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
        for name, value in (("batch_size", batch_size), ("max_len", max_len)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        kv_shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        self.max_len = max_len
        self.pos = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.lengths = [0] * batch_size  # pos as the host knows it
        # zeros, because unwritten positions of short rows are read and masked, and 0 * NaN would be NaN
        zeros = partial(torch.zeros, device=device, dtype=dtype)
        self.layers = [
            LayerState(
                tuple(zeros(kv_shape) for _ in "kv") if kind == "attention" else (),
                {name: zeros(batch_size, K - 1, C) for name, (K, C) in window_channels(config, kind).items()},
            )
            for kind in config.layer_kinds
        ]

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def span(self, B: int, T: int) -> Span:
        """Return the span of T more tokens of each of B rows; raise ValueError if they do not fit."""
        if self.batch_size != B:
            raise ValueError(f"{B} rows do not fit a cache of {self.batch_size} rows")
        longest = max(self.lengths)
        is_even = min(self.lengths) == longest
        end = longest + T
        if end > self.max_len:
            raise ValueError(f"{T} tokens after {longest} do not fit a cache of {self.max_len} tokens a row")
        device = self.pos.device
        positions = self.pos[:, None] + torch.arange(T, device=device)
        mask = None
        if longest > 0 and not (is_even and T == 1):
            mask = (torch.arange(end, device=device) <= positions[..., None])[:, None]
        return Span(
            start=longest if is_even else None,
            positions=positions,
            end=end,
            mask=mask,
            is_causal=longest == 0,
        )

    def advance(self, span: Span) -> None:
        """Advance every row by the tokens of a span, after a forward."""
        T = span.positions.size(1)
        self.pos += T
        self.lengths = [seen + T for seen in self.lengths]

    def reset(self) -> None:
        """Clear the state: the next forward starts new sequences."""
        self.pos.zero_()  # keys and values beyond pos are masked or not read
        self.lengths = [0] * self.batch_size
        for layer in self.layers:
            for window in layer.windows.values():
                window.zero_()

    def select(self, rows: Sequence[int]) -> HybridCache:
        """Return a new cache with copies of the given rows, in this order; a row may be repeated."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.pos.device)
        return self._of_rows(index, [self.lengths[row] for row in rows])

    def first(self, n: int) -> HybridCache:
        """Return a view of the first n rows, which shares all state except `lengths`."""
        return self._of_rows(slice(n), self.lengths[:n])

    def _of_rows(self, index: Tensor | slice, lengths: list[int]) -> HybridCache:
        chosen = object.__new__(HybridCache)
        chosen.max_len, chosen.pos, chosen.lengths = self.max_len, self.pos[index], lengths
        chosen.layers = [layer.rows(index) for layer in self.layers]
        return chosen

    def copy_row(self, row: int, source: HybridCache, source_row: int) -> None:
        """Copy the state of a row, of this cache or another, into a row of this one."""
        length = source.lengths[source_row]
        if length > self.max_len:
            raise ValueError(f"a row of {length} tokens does not fit a cache of {self.max_len} tokens a row")
        self.lengths[row] = length
        self.pos[row] = length
        for ours, theirs in zip(self.layers, source.layers, strict=True):
            for name, window in ours.windows.items():
                window[row] = theirs.windows[name][source_row]
            for state, other in zip(ours.kv, theirs.kv, strict=True):
                state[row, :, :length] = other[source_row, :, :length]

    def fork(self, n: int) -> HybridCache:
        """Return a cache of n copies of this cache's only sequence (prefill once, sample n times)."""
        if self.batch_size != 1:
            raise ValueError(f"fork needs a cache of one sequence, this one holds {self.batch_size}")
        return self.select([0] * n)
