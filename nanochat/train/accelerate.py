"""Fast training: the kernels of nanochat/kernels/train where they run, and torch.compile."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from nanochat.gpt import GPT
from nanochat.hardware import has_large_tiles
from nanochat.kernels.train.norm import rms_norm
from nanochat.layer_check import BOUND_8_BITS, BOUNDS, check_ops
from nanochat.layers import NORM_EPS
from nanochat.ops import SOFTCAP, Ops
from nanochat.train.chunked_loss import head_loss

logger = logging.getLogger(__name__)
MAX_TAPS = 4  # of a convolution: the kernel holds a row of them in registers


def why_not_fused(model: GPT, fp8: bool = False) -> str:
    """Return why the fused kernels cannot train this model, or ""."""
    config = model.config
    T, V, D, K = config.sequence_len, config.vocab_size, config.head_dim, config.n_kernel
    if model.device.type != "cuda" or torch.version.hip:
        return "they need an NVIDIA GPU"
    if model.activation_dtype != torch.bfloat16:
        return f"activations are {model.activation_dtype}, not bfloat16"
    if D < 16 or D & (D - 1):
        return f"heads of {D} channels are not a power of two, 16 or more"
    if max(K, config.residual_conv) > MAX_TAPS:
        return f"n_kernel={K} or residual_conv={config.residual_conv} is more than {MAX_TAPS}"
    if fp8 and not has_large_tiles(model.device):
        return "in 8 bits they are for Hopper and data-centre Blackwell cards"
    if fp8 and (T % 16 or V % 16):
        return f"in 8 bits 16 must divide the length of sequences, {T}, and the vocabulary, {V}"
    return ""


def uses_kernels(asked: bool | None, model: GPT) -> bool:
    """Return whether the kernels train a model: as asked, or, if that is None, where they run."""
    return not why_not_fused(model) if asked is None else asked


def accelerate(model: GPT, *, compile: bool, fused: bool | None, fp8: bool = False) -> None:
    """Prepare a model for fast training: by the kernels (None: where they run), in 8 bits, compiled.

    With fused None, a CPU, which has no kernels, computes the head's loss in chunks, unless in 16 bits.
    Raise ValueError if kernels are asked for that do not run here (fp8 is one of them), or that compute
    something else than the plain layers.
    """
    asked, reason, fused = fused, why_not_fused(model, fp8), uses_kernels(fused, model)
    if (fused or fp8) and reason:
        raise ValueError(f"fused={fused}, fp8={fp8}: the kernels of training do not run here: {reason}")
    if fp8 and not fused:
        raise ValueError("fp8=True with fused=False: products in 8 bits are kernels of training, too")
    if fused:
        from nanochat.train.fused import fused_ops  # Triton is not installed everywhere

        ops = fused_ops(large_tiles=has_large_tiles(model.device), in_8_bits=fp8)
        check_ops(model, ops, BOUND_8_BITS if fp8 else BOUNDS[model.activation_dtype])
        model.use(ops)
    elif asked is None and model.device.type == "cpu" and model.activation_dtype == torch.float32:
        model.use(Ops(loss=partial(head_loss, cap=SOFTCAP)))
    if compile:
        if fused:  # not compiled it would be many passes over memory
            norm = partial(rms_norm, eps=NORM_EPS)
            model.use(replace(model.ops, norm=norm, join=partial(model.ops.join, norm=norm)))
        model.compile_blocks()
    if model.device.type == "cuda":
        by = "kernels in 8 bits" if fp8 else "kernels" if fused else "plain PyTorch"
        by += ", the MLP by plain PyTorch" if fused and not has_large_tiles(model.device) else ""
        how = f"{by}, compiled" if compile else by
        logger.info(f"training by {how}; attention by {attention_backend(model)}")


def attention_backend(model: GPT) -> str:
    """Name what scaled_dot_product_attention chooses for training this model: the fastest on its card."""
    shape = (1, model.config.n_head, model.config.sequence_len, model.config.head_dim)
    q = torch.empty(shape, device=model.device, dtype=model.activation_dtype, requires_grad=True)
    return SDPBackend(torch.ops.aten._fused_sdp_choice(q, q, q, is_causal=True)).name
