"""The model as the decoding kernels compute it, from packed weights and the state of slots.

RMSNorm without weights commutes with a matrix product, so no norm is computed by itself: the kernel that uses
the product divides by the norm. Attention reads the keys and values that exist and no more. What the second
generation adds (nanochat/ops.py, nanochat/attention.py) is computed by kernels that a published model needs
too; only a prefill has one more for each convolution of an output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.decode.packed import Layer, PackedWeights
from nanochat.decode.slots import Slots
from nanochat.kernels.decode.attention import attend, attend_causal
from nanochat.kernels.decode.linear import (
    COUNTERS,
    MAX_ROWS,
    batch_linear_add,
    batch_linear_relu2,
    norm_linear,
    row_linear,
)
from nanochat.kernels.decode.pointwise import embed, norm_relu2
from nanochat.kernels.decode.residual_conv import Conv, Mix, residual_conv_rows
from nanochat.kernels.decode.rope import Values, rope_append
from nanochat.kernels.decode.slc2 import slc2_mix, slc2_row

ATTENTION_PROGRAMS = 640  # at least, where the batch allows: about five for each multiprocessor


@dataclass
class Batch:
    """R new tokens, R/S of each of S sequences; all int32, x0 apart."""

    tokens: Tensor  # (R,); a negative one is the token drawn last in its slot
    slots: Tensor  # (S,)
    positions: Tensor  # (S,) of the first tokens
    counts: Tensor  # (S,) of tokens before padding
    # the windows after several tokens of one sequence, by name (layers,1,K-1,C); None: one token a sequence
    tails: dict[str, Tensor] | None = None
    x0: Tensor | None = None  # (R,E), the embedding


class KernelModel:
    """The layers of a model on the slots of sequences."""

    def __init__(self, weights: PackedWeights, slots: Slots):
        self.config, self.layers = weights.config, weights.layers
        self.weights, self.slots = weights, slots
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=weights.device)

    def prefill(self, tokens: Tensor, slot: Tensor, position: Tensor, count: Tensor) -> None:
        """Append tokens (R,) of one sequence; slot, first position and number of real tokens are (1,)."""
        tails = self.slots.new_tails()
        self.trunk(Batch(tokens, slot, position, count, tails))
        self.slots.store(slot, tails)

    def logits(self, x: Tensor, out: Tensor) -> None:
        """Write the logits (B,V), not yet soft-capped, of the residual stream x (B,E)."""
        norm_linear(x, self.weights.head, out)

    def trunk(self, batch: Batch) -> Tensor:
        """Return the residual stream (R,E) after the last layer."""
        x = self.embed(batch)
        for layer in self.layers:
            self.add_mixer(x, layer, batch)
            self.add_mlp(x, layer, batch)
        return x

    def embed(self, batch: Batch) -> Tensor:
        """Return the residual stream (R,E) before the first mixer, and keep the embedding in the batch."""
        weights, slots, R = self.weights, self.slots, len(batch.tokens)
        x = torch.empty(R, self.config.n_embd, dtype=weights.dtype, device=weights.device)
        mix = None
        if weights.scales is not None:
            batch.x0 = torch.empty_like(x)
            mix = Mix(batch.x0, weights.scales[0])
        embed(batch.tokens, weights.wte, batch.slots, batch.counts, slots.latest, slots.seen, x, mix)
        return x

    def add_mixer(self, x: Tensor, layer: Layer, batch: Batch) -> None:
        """Add mixer(norm(x)) to x (R,E)."""
        if layer.conv is None:
            y = self._attention(x, layer, batch)
        else:
            y = self._slc2(x, layer, layer.conv, batch)
        self._add(x, y, layer.mixer_out, batch)

    def _slc2(self, x: Tensor, layer: Layer, taps: Tensor, batch: Batch) -> Tensor:
        y, n_head = torch.empty_like(x), self.config.n_head
        windows = self.slots.windows["u"][layer.state]
        if len(x) == 1:
            slc2_row(x, layer.mixer_in, taps, windows, batch.slots, y, n_head)
        else:
            tails = windows if batch.tails is None else batch.tails["u"][layer.state]
            packed = self._product(x, layer.mixer_in)
            slc2_mix(packed, x, taps, windows, batch.slots, batch.counts, tails, y, n_head)
        return y

    def _attention(self, x: Tensor, layer: Layer, batch: Batch) -> Tensor:
        c, slots, R = self.config, self.slots, len(x)
        k, v = slots.k[layer.state], slots.v[layer.state]
        q = x.new_empty(R, c.n_head, c.head_dim)
        y = torch.empty_like(q)
        values = None
        if layer.value_table is not None and layer.value_gate is not None:
            values = Values(batch.tokens, slots.latest, layer.value_table, layer.value_gate)
        k_conv = self._conv(batch, "k", layer.state, layer.k_conv)
        y_conv = self._conv(batch, "y", layer.state, layer.y_conv)
        packed, places = self._product(x, layer.mixer_in), (batch.slots, batch.positions)
        rope_append(packed, x, slots.rotary, *places, q, k, v, values, batch.counts, k_conv)
        if batch.tails is None:
            splits = max(1, min(32, ATTENTION_PROGRAMS // (R * c.n_kv_head)))
            attend(q, k, v, *places, y, splits, c.score_scale, y_conv)
            return y.view_as(x)
        attend_causal(q, k, v, *places, y, c.score_scale)
        y = y.view_as(x)
        if y_conv is None:
            return y
        out = torch.empty_like(y)
        residual_conv_rows(y, out, batch.slots, batch.counts, y_conv)
        return out

    def _conv(self, batch: Batch, name: str, index: int, taps: Tensor | None) -> Conv | None:
        """Return a convolution and its state, the index-th of this name."""
        if taps is None:
            return None
        tails = None if batch.tails is None else batch.tails[name][index]
        return Conv(taps, self.slots.windows[name][index], tails)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T, not yet divided by rms(x)."""
        if len(x) > 1:
            return x @ weight.T
        y = x.new_empty(1, len(weight))
        row_linear(x, weight, y)
        return y

    def _add(
        self,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        batch: Batch,
        scale: Tensor | None = None,
        conv: Conv | None = None,
        mix: Mix | None = None,
    ) -> None:
        """Add y W^T, times scale (R,) squared if given, to x; convolve it before and mix the sum after."""
        has_epilogue = conv is None or batch.tails is None  # which convolves one token a sequence
        if len(x) == 1:
            row_linear(y, weight, x, add=True, slots=batch.slots, conv=conv, mix=mix)
        elif len(x) <= MAX_ROWS and has_epilogue:
            batch_linear_add(y, weight, x, self._counters, scale, batch.slots, conv, mix)
        elif conv is None and mix is None:
            x.addmm_(y, weight.T)
        else:
            if scale is None:
                product = y @ weight.T
            else:
                product = torch.zeros_like(x)
                batch_linear_add(y, weight, product, self._counters, scale)
            residual_conv_rows(product, x, batch.slots, batch.counts, conv, mix, add=True)

    def add_mlp(self, x: Tensor, layer: Layer, batch: Batch) -> None:
        """Add MLP(norm(x)), convolved, to x, and mix x for the next layer."""
        h = x.new_empty(len(x), len(layer.mlp_in))
        scale = None
        if len(x) == 1:
            row_linear(x, layer.mlp_in, h, norm=True, relu2=True)
        elif len(x) <= MAX_ROWS:
            scale = torch.empty(len(x), device=x.device)
            batch_linear_relu2(x, layer.mlp_in, h, scale)
        else:
            torch.mm(x, layer.mlp_in.T, out=h)
            norm_relu2(h, x)
        conv = self._conv(batch, "mlp", layer.index, layer.mlp_conv)
        x0, scales = batch.x0, layer.next_scales
        mix = None if x0 is None or scales is None else Mix(x0, scales)
        self._add(x, h, layer.mlp_out, batch, scale, conv, mix)
