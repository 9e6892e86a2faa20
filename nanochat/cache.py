"""HybridCache: all that a batch of sequences must remember between two forwards.

An attention layer remembers keys and values, which grow with the sequence; an SLC2 layer remembers the
last K-1 inputs of its convolution, which do not. At d20 in bfloat16 that is 7 * 2 * 1280 * 2 = 35,840 bytes
a token plus 66,560 bytes a sequence, where 20 attention layers would keep 102,400 bytes a token.

The cache belongs to the batch, never to the model: modules hold parameters only, so two conversations cannot
mix. `pos` counts the tokens seen; GPT.forward advances it once, after the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanochat.gpt import GPTConfig


@dataclass
class KVState:
    """Keys and values of one attention layer, (B, H_kv, max_len, D) each, valid up to the cache's pos."""

    k: Tensor
    v: Tensor

    def append(self, k: Tensor, v: Tensor, pos: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D) at pos and return all that is valid now, (B, H_kv, pos+T, D)."""
        end = pos + k.size(2)
        self.k[:, :, pos:end] = k
        self.v[:, :, pos:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


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
        self.batch_size, self.max_len, self.pos = batch_size, max_len, 0
        kv_shape = (batch_size, config.n_kv_head, max_len, config.head_dim)
        conv_shape = (batch_size, config.n_kernel - 1, config.n_embd)
        self.layers: list[KVState | ConvState] = [
            KVState(*(torch.empty(kv_shape, device=device, dtype=dtype) for _ in "kv"))
            if kind == "attention"
            else ConvState(torch.zeros(conv_shape, device=device, dtype=dtype))
            for kind in config.layer_kinds
        ]

    def reset(self) -> None:
        """Forget everything: the next forward starts a new sequence."""
        self.pos = 0  # keys and values beyond pos are never read
        for layer in self.layers:
            if isinstance(layer, ConvState):
                layer.window.zero_()

    def fork(self, n: int) -> HybridCache:
        """Turn the cache of one sequence into a cache of n copies of it (prefill once, sample n times)."""
        if self.batch_size != 1:
            raise ValueError(f"fork needs a cache of one sequence, this one holds {self.batch_size}")
        forked = object.__new__(HybridCache)
        forked.batch_size, forked.max_len, forked.pos = n, self.max_len, self.pos
        forked.layers = [
            type(layer)(*(state.repeat_interleave(n, dim=0) for state in vars(layer).values()))
            for layer in self.layers
        ]
        return forked
