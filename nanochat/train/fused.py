"""The training kernels as `Ops`: they compute what gpt.py, ops.py and the mixers compute."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch.nn.functional as F

from nanochat.kernels.train import cross_entropy, fp8, look_up, mlp, share
from nanochat.ops import SOFTCAP, Ops
from nanochat.train.chunked_loss import head_loss
from nanochat.train.fused_layers import (
    fused_attention_inputs,
    fused_join,
    fused_residual_conv,
    fused_slc2_mix,
)


def fused_ops(*, large_tiles: bool = True, in_8_bits: bool = False) -> Ops:
    """Return the training kernels; those of the MLP only where a card has memory for large tiles."""
    product = fp8.linear if in_8_bits else F.linear
    loss = partial(
        head_loss,
        cap=SOFTCAP,
        cross_entropy_=cross_entropy.cross_entropy_,
        narrow_head=fp8.Head if in_8_bits else None,
    )
    fused = Ops(
        look_up_values=look_up.look_up,
        share=share.share,
        join=fused_join,
        attention_inputs=partial(fused_attention_inputs, product=product),
        residual_conv=fused_residual_conv,
        slc2_mix=partial(fused_slc2_mix, product=product),
        loss=loss,
    )
    if large_tiles:
        fused = replace(fused, mlp=fp8.mlp if in_8_bits else mlp.mlp)
    return fused
