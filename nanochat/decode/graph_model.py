"""The model as the decoding kernels compute it: packed weights, the state of all slots, and the layers.

Weights are cast once, and those that share an input are packed into one matrix. RMSNorm without weights
commutes with a matrix product, so no norm is computed by itself: the kernel that uses the product divides by
the norm. Attention reads the keys and values that exist and no more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import rotary_tables
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.decode.attention import attend, attend_causal, rope_append
from nanochat.kernels.decode.linear import (
    COUNTERS,
    MAX_ROWS,
    batch_linear_add,
    batch_linear_relu2,
    row_linear,
)
from nanochat.kernels.decode.pointwise import embed, norm_relu2
from nanochat.kernels.decode.slc2 import slc2_mix, slc2_row
from nanochat.layers import norm
from nanochat.slc2 import SLC2

ATTENTION_PROGRAMS = 640  # at least, where the batch allows: about five for each multiprocessor


def packed_weights(model: GPT, dtype: torch.dtype) -> list[Tensor]:
    """Return copies of wte, lm_head and, for each layer, mixer in, mixer out, MLP in and out, SLC2's taps.

    The inputs of a mixer are one matrix: q, k, v or x, B, A, alpha, and rows of zeros. Taps stay float32.
    """

    def pack(*weights: Tensor) -> Tensor:
        return torch.cat([weight.detach().to(dtype) for weight in weights])

    packed = [pack(model.transformer.wte.weight), pack(model.lm_head.weight)]
    for block in model.blocks:
        mixer = block.attn
        names = ("c_q", "c_k", "c_v") if block.is_attention else ("x_proj", "B_proj", "A_proj", "alpha_proj")
        mixer_in = pack(*(getattr(mixer, name).weight for name in names))
        packed.append(F.pad(mixer_in, (0, 0, 0, -len(mixer_in) % 64)))  # cuBLAS is slow with odd sizes
        packed += [pack(layer.weight) for layer in (mixer.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
        if isinstance(mixer, SLC2):
            packed.append(mixer.conv1d.weight.detach().float().clone())
    return packed


@dataclass
class Layer:
    """Weights of a block; `state` is its number among the layers of its kind."""

    state: int
    mixer_in: Tensor
    mixer_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    conv: Tensor | None = None  # None: attention


def _layers(config: GPTConfig, weights: list[Tensor]) -> list[Layer]:
    counts, rest = Counter[str](), iter(weights)
    layers = []
    for kind in config.layer_kinds:
        layers.append(Layer(counts[kind], *islice(rest, 4 if kind == "attention" else 5)))
        counts[kind] += 1
    return layers


class KernelModel:
    """Packed weights of a model and the decode state of a number of slots, as tensors that never move."""

    def __init__(self, model: GPT, slots: int, context: int):
        c = self.config = model.config
        self.context = context
        self.device, self.dtype = model.device, model.activation_dtype
        self.weights = packed_weights(model, self.dtype)
        self.wte, self.head, *of_layers = self.weights
        self.layers = _layers(c, of_layers)
        self.tables = rotary_tables(context, c.head_dim, self.device)
        n_attention, n_slc2 = (c.layer_kinds.count(kind) for kind in ("attention", "slc2"))
        kv_shape = (n_attention, slots, c.n_kv_head, context, c.head_dim)
        self.k, self.v = (torch.empty(kv_shape, dtype=self.dtype, device=self.device) for _ in "kv")
        self.windows = self.zeros(n_slc2, slots, c.n_kernel - 1, c.n_embd, dtype=self.dtype)
        self.seen = self.zeros(slots, c.vocab_size, dtype=torch.uint8)  # 1: the token occurs in the slot
        self.latest = self.zeros(slots, dtype=torch.int32)  # token drawn last
        self._counters = self.zeros(COUNTERS, dtype=torch.int32)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return zeros on the device of the model."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.no_grad()
    def load(self, model: GPT) -> None:
        """Copy the weights of a model of the same shape, in place, so that recorded graphs use them."""
        for ours, weight in zip(self.weights, packed_weights(model, self.dtype), strict=True):
            ours.copy_(weight)

    def reset(self, slot: int) -> None:
        """Clear a slot for a new sequence."""
        self.windows[:, slot].zero_()
        self.seen[slot].zero_()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the state of a slot that has so many tokens to another."""
        for state in (self.k, self.v):
            state[:, target, :, :length] = state[:, source, :, :length]
        self.windows[:, target] = self.windows[:, source]
        self.seen[target] = self.seen[source]

    def prefill(self, tokens: Tensor, slot: Tensor, position: Tensor, count: Tensor) -> None:
        """Append tokens (R,) of one sequence; slot, first position and number of real tokens are (1,)."""
        tails = torch.empty_like(self.windows[:, :1])
        self.trunk(tokens, slot, position, count, tails)
        self.windows[:, slot] = tails

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits (B,V), not yet soft-capped, of the residual stream x (B,E)."""
        if len(x) == 1:
            row_linear(x, self.head, out, norm=True)
        elif self.dtype == torch.float32:
            torch.mm(norm(x), self.head.T, out=out)
        else:
            torch.mm(norm(x), self.head.T, torch.float32, out=out)

    def trunk(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, counts: Tensor, tails: Tensor | None = None
    ) -> Tensor:
        """Return the residual stream (R,E) after the last layer, for R/S tokens of each of S sequences.

        tokens (R,); slots, positions of the first tokens, and counts of real ones (S,); all int32. With
        several tokens a sequence, the convolution state after them goes to tails (SLC2 layers,S,K-1,E).
        """
        c, R = self.config, len(tokens)
        x = torch.empty(R, c.n_embd, dtype=self.dtype, device=self.device)
        embed(tokens, self.wte, slots, counts, self.latest, self.seen, x)
        for layer in self.layers:
            self.add_mixer(x, layer, slots, positions, counts, tails)
            self.add_mlp(x, layer)
        return x

    def add_mixer(
        self,
        x: Tensor,
        layer: Layer,
        slots: Tensor,
        positions: Tensor,
        counts: Tensor,
        tails: Tensor | None = None,
    ) -> None:
        """Add mixer(norm(x)) to x (R,E); the other arguments are those of trunk."""
        c, R, i = self.config, len(x), layer.state
        y = torch.empty_like(x)
        if layer.conv is None:
            q = torch.empty_like(x).view(R, c.n_head, c.head_dim)
            packed = self._product(x, layer.mixer_in)
            rope_append(packed, x, self.tables, slots, positions, q, self.k[i], self.v[i])
            if tails is None:
                splits = max(1, min(32, ATTENTION_PROGRAMS // (R * c.n_kv_head)))
                attend(q, self.k[i], self.v[i], slots, positions, y.view_as(q), splits)
            else:
                attend_causal(q, self.k[i], self.v[i], slots, positions, y.view_as(q))
        elif R == 1:
            slc2_row(x, layer.mixer_in, layer.conv, self.windows[i], slots, y, c.n_head)
        else:
            packed = self._product(x, layer.mixer_in)
            tail = self.windows[i] if tails is None else tails[i]
            slc2_mix(packed, x, layer.conv, self.windows[i], slots, counts, tail, y, c.n_head)
        self._add(x, y, layer.mixer_out)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T, not yet divided by rms(x)."""
        if len(x) > 1:
            return x @ weight.T
        y = x.new_empty(1, len(weight))
        row_linear(x, weight, y)
        return y

    def _add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """Add y W^T to x."""
        if len(x) == 1:
            row_linear(y, weight, x, add=True)
        elif len(x) <= MAX_ROWS:
            batch_linear_add(y, weight, x, self._counters)
        else:
            x.addmm_(y, weight.T)

    def add_mlp(self, x: Tensor, layer: Layer) -> None:
        """Add MLP(norm(x)) to x."""
        h = x.new_empty(len(x), len(layer.mlp_in))
        if len(x) == 1:
            row_linear(x, layer.mlp_in, h, norm=True, relu2=True)
            row_linear(h, layer.mlp_out, x, add=True)
        elif len(x) <= MAX_ROWS:
            scale = torch.empty(len(x), device=self.device)
            batch_linear_relu2(x, layer.mlp_in, h, scale)
            batch_linear_add(h, layer.mlp_out, x, self._counters, scale)
        else:
            torch.mm(x, layer.mlp_in.T, out=h)
            norm_relu2(h, x)
            x.addmm_(h, layer.mlp_out.T)
