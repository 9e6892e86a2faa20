"""The layers by the training kernels: each function computes what one of `Ops` does, without decode state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.attention import GATE_INPUTS, CausalSelfAttention
from nanochat.kernels.train.join import join
from nanochat.kernels.train.residual_conv import residual_conv
from nanochat.kernels.train.rope import rope
from nanochat.kernels.train.slc2 import PACKED_ALIGN, slc2_mix
from nanochat.layers import NORM_EPS, norm
from nanochat.slc2 import SLC2

Product = Callable[[Tensor, Tensor], Tensor]
Norm = Callable[[Tensor], Tensor]


def joint_linear(h: Tensor, weights: Sequence[Tensor], product: Product, multiple: int = 1) -> Tensor:
    """Return h W^T of h (..., E) for each of weights (n,E), side by side, padded with zeros to a multiple.

    One product instead of several. The parameters stay apart: optimizer and checkpoints see no difference.
    """
    weight = torch.cat(list(weights))
    weight = F.pad(weight, (0, 0, 0, -len(weight) % multiple))
    return product(h, weight.to(h.dtype))


def fused_attention_inputs(
    attn: CausalSelfAttention,
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    value_embeds: Tensor | None = None,
    window: None = None,
    *,
    product: Product,
) -> tuple[Tensor, ...]:
    """Compute attention.attention_inputs, without decode state, by one product and one kernel."""
    assert window is None, "decoding uses the plain layer"
    weights, multiple = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight], 1
    if attn.value_gate is None:
        value_embeds = None
    else:
        weights.append(F.pad(attn.value_gate.weight, (0, h.size(-1) - GATE_INPUTS)))
        multiple = PACKED_ALIGN
    packed = joint_linear(h, weights, product, multiple)
    conv = None if attn.k_conv is None else attn.k_conv.weight
    return rope(packed, cos, sin, attn.n_head, attn.n_kv_head, NORM_EPS, conv, value_embeds)


def fused_residual_conv(u: Tensor, weight: Tensor, window: None = None) -> Tensor:
    """Compute layers.residual_conv, without decode state, by one kernel."""
    assert window is None, "decoding uses the plain layer"
    return residual_conv(u, weight)


def fused_join(x: Tensor, delta: Tensor, link: ops.Link, norm: Norm = norm) -> tuple[Tensor, Tensor]:
    """Compute ops.join, without decode state: by one kernel if it is more than a sum and its norm."""
    assert link.window is None, "decoding uses the plain layer"
    if link.conv is None and link.mix is None:
        return ops.join(x, delta, link, norm)
    return join(x, delta, link.conv, *(link.mix or (None, None, None)), NORM_EPS)[:2]


def fused_slc2_mix(layer: SLC2, h: Tensor, window: None = None, *, product: Product) -> Tensor:
    """Compute slc2.slc2_mix, without decode state, by one product and one kernel."""
    assert window is None, "decoding uses the plain layer"
    parts = [layer.x_proj, layer.B_proj, layer.A_proj, layer.alpha_proj]
    packed = joint_linear(h, [part.weight for part in parts], product, PACKED_ALIGN).flatten(0, 1)
    return slc2_mix(packed, layer.conv1d.weight, h.size(1), layer.n_head).view_as(h)
