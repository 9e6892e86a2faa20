"""How training is made fast: by the kernels of nanochat/kernels where they run, and by torch.compile."""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from nanochat.gpt import GPT, NORM_EPS, SOFTCAP
from nanochat.hardware import has_large_tiles
from nanochat.kernels.train.norm import rms_norm
from nanochat.train.chunked_loss import head_loss

logger = logging.getLogger(__name__)
MAX_TAPS = 4  # of a convolution: the kernel holds a row of them in registers


def lacking(model: GPT, fp8: bool = False) -> str:
    """Say what is in the way of training this model by the kernels; "" if nothing is."""
    config = model.config
    T, V, D, K = config.sequence_len, config.vocab_size, config.head_dim, config.n_kernel
    if model.device.type != "cuda" or torch.version.hip:
        return "they need an NVIDIA GPU"
    if model.activation_dtype != torch.bfloat16:
        return f"activations are {model.activation_dtype}, not bfloat16"
    if D < 16 or D & (D - 1):
        return f"heads of {D} channels are not a power of two, 16 or more"
    if K > MAX_TAPS:
        return f"n_kernel={K} is more than {MAX_TAPS}"
    if fp8 and not has_large_tiles(model.device):
        return "in 8 bits they are for Hopper and data-centre Blackwell cards"
    if fp8 and (T % 16 or V % 16):
        return f"in 8 bits 16 must divide the length of sequences, {T}, and the vocabulary, {V}"
    return ""


def uses_kernels(asked: bool | None, model: GPT) -> bool:
    """Whether a model is trained by the kernels: as asked, or, if that is None, where they run."""
    return not lacking(model) if asked is None else asked


def fuse(model: GPT, fp8: bool = False) -> None:
    """Let the model compute by the kernels, except where it has a decode state to keep."""
    from nanochat.kernels.train import cross_entropy, mlp, rope, slc2
    from nanochat.kernels.train import fp8 as kernels_fp8

    for block in model.transformer.h:
        block.attn.product = kernels_fp8.linear if fp8 else F.linear
        if has_large_tiles(model.device):
            block.mlp.kernel = kernels_fp8.mlp if fp8 else mlp.mlp
        if block.is_attention:
            block.attn.rope = rope.rope
        else:
            block.attn.mix = slc2.slc2_mix
    model.loss = partial(
        head_loss,
        cap=SOFTCAP,
        cross_entropy_=cross_entropy.cross_entropy_,
        narrow_head=kernels_fp8.Head if fp8 else None,
    )


def accelerate(model: GPT, *, compile: bool, fused: bool | None, fp8: bool = False) -> None:
    """Make a model that is to be trained fast: by the kernels (None: where they run), in 8 bits, compiled.

    Where fused is None a CPU, which has no kernels, takes the head's loss in chunks.
    Raises ValueError if the kernels are asked for and do not run here: fp8 is one of theirs.
    """
    asked, reason, fused = fused, lacking(model, fp8), uses_kernels(fused, model)
    if (fused or fp8) and reason:
        raise ValueError(f"fused={fused}, fp8={fp8}: the kernels of training do not run here: {reason}")
    if fp8 and not fused:
        raise ValueError("fp8=True with fused=False: products in 8 bits are kernels of training, too")
    if fused:
        fuse(model, fp8)
    elif asked is None and model.device.type == "cpu":
        model.loss = partial(head_loss, cap=SOFTCAP)
    if compile:
        for block in model.transformer.h if fused else ():
            block.norm = partial(rms_norm, eps=NORM_EPS)  # not compiled it would be many passes
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
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
