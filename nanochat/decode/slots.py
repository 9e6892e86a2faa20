"""The state of all slots of a GraphDecoder, as tensors that never move: recorded graphs refer to them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from nanochat.attention import rotary_tables
from nanochat.cache import window_channels
from nanochat.config import GPTConfig


class Slots:
    """Keys and values, the windows of all convolutions, and the tokens of a number of sequences.

    k, v are (attention layers, slots, H_kv, context, D), windows, by the names of nanochat/cache.py, (layers
    that have such a convolution, slots, K-1, C).
    """

    def __init__(self, config: GPTConfig, slots: int, context: int, device: torch.device, dtype: torch.dtype):
        kinds = config.layer_kinds
        kv_shape = (kinds.count("attention"), slots, config.n_kv_head, context, config.head_dim)
        self.k, self.v = (torch.empty(kv_shape, dtype=dtype, device=device) for _ in "kv")
        convs = [conv for kind in kinds for conv in window_channels(config, kind).items()]
        self.windows = {
            name: torch.zeros(n, slots, K - 1, C, dtype=dtype, device=device)
            for (name, (K, C)), n in Counter(convs).items()
        }
        # 1: the token occurs in the slot
        self.seen = torch.zeros(slots, config.vocab_size, dtype=torch.uint8, device=device)
        self.latest = torch.zeros(slots, dtype=torch.int32, device=device)  # token drawn last
        self.rotary = rotary_tables(context, config.head_dim, device)  # of the positions in a slot

    def reset(self, slot: int) -> None:
        """Clear a slot for a new sequence."""
        for window in self.windows.values():
            window[:, slot].zero_()
        self.seen[slot].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the state of a slot that has so many tokens to another."""
        for state in (self.k, self.v):
            state[:, target, :, :length] = state[:, source, :, :length]
        for window in self.windows.values():
            window[:, target] = window[:, source]
        self.seen[target] = self.seen[source]

    def new_tails(self) -> dict[str, Tensor]:
        """Return memory for the windows of one sequence."""
        return {name: torch.empty_like(window[:, :1]) for name, window in self.windows.items()}

    def store(self, slot: Tensor, tails: dict[str, Tensor]) -> None:
        """Replace the windows of a slot (1,) by those of one sequence."""
        for name, window in self.windows.items():
            window[:, slot] = tails[name]
