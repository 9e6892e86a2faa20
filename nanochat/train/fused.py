"""The model's functions by the training kernels: `Ops` that compute what gpt.py and slc2.py compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import CausalSelfAttention
from nanochat.kernels.train import cross_entropy, fp8, mlp
from nanochat.kernels.train.rope import rope
from nanochat.kernels.train.slc2 import PACKED_ALIGN, slc2_mix
from nanochat.layers import NORM_EPS, Linear
from nanochat.ops import SOFTCAP, Ops
from nanochat.slc2 import SLC2
from nanochat.train.chunked_loss import head_loss

Product = Callable[[Tensor, Tensor], Tensor]


def joint_linear(h: Tensor, layers: Sequence[Linear], product: Product, multiple: int = 1) -> Tensor:
    """Return the outputs of layers for h (..., E) side by side, padded with zeros to a multiple of columns.

    One product instead of several. The parameters stay apart: optimizer and checkpoints see no difference.
    """
    weight = torch.cat([layer.weight for layer in layers])
    weight = F.pad(weight, (0, 0, 0, -len(weight) % multiple))
    return product(h, weight.to(h.dtype))


def fused_attention_inputs(
    attn: CausalSelfAttention, h: Tensor, cos: Tensor, sin: Tensor, *, product: Product
) -> tuple[Tensor, ...]:
    """Compute gpt.attention_inputs by one product and one kernel that rotates and normalises in place."""
    return rope(joint_linear(h, [attn.c_q, attn.c_k, attn.c_v], product), cos, sin, attn.n_head, NORM_EPS)


def fused_slc2_mix(layer: SLC2, h: Tensor, window: None = None, *, product: Product) -> Tensor:
    """Compute slc2.slc2_mix, without decode state, by one product and one kernel."""
    assert window is None, "decoding uses the plain layer"
    parts = [layer.x_proj, layer.B_proj, layer.A_proj, layer.alpha_proj]
    packed = joint_linear(h, parts, product, PACKED_ALIGN).flatten(0, 1)
    return slc2_mix(packed, layer.conv1d.weight, h.size(1), layer.n_head).view_as(h)


def fused_ops(*, large_tiles: bool = True, in_8_bits: bool = False) -> Ops:
    """Return the training kernels; those of the MLP only where a card has memory for large tiles."""
    product = fp8.linear if in_8_bits else F.linear
    loss = partial(
        head_loss,
        cap=SOFTCAP,
        cross_entropy_=cross_entropy.cross_entropy_,
        narrow_head=fp8.Head if in_8_bits else None,
    )
    ops = Ops(
        attention_inputs=partial(fused_attention_inputs, product=product),
        slc2_mix=partial(fused_slc2_mix, product=product),
        loss=loss,
    )
    if large_tiles:
        ops = replace(ops, mlp=fp8.mlp if in_8_bits else mlp.mlp)
    return ops
