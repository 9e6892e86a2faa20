"""How training is made fast: by the kernels of nanochat/kernels where they run, and by torch.compile."""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from nanochat.gpt import GPT, NORM_EPS, SOFTCAP

logger = logging.getLogger(__name__)
SHARED_MEMORY = 226 * 1024  # bytes that a tile of the MLP takes; Hopper and data-centre Blackwell have 227 KB
MAX_TAPS = 4  # of a convolution: the kernel holds a row of them in registers


def lacking(model: GPT) -> str:
    """Say what is in the way of training this model by the kernels; "" if nothing is."""
    D, K = model.config.head_dim, model.config.n_kernel
    if model.device.type != "cuda":
        return "they need an NVIDIA GPU"
    if torch.cuda.get_device_properties(model.device).shared_memory_per_block_optin < SHARED_MEMORY:
        return "they are for Hopper and data-centre Blackwell cards"
    if model.activation_dtype != torch.bfloat16:
        return f"activations are {model.activation_dtype}, not bfloat16"
    if D < 16 or D & (D - 1):
        return f"heads of {D} channels are not a power of two, 16 or more"
    if K > MAX_TAPS:
        return f"n_kernel={K} is more than {MAX_TAPS}"
    return ""


def fuse(model: GPT, fp8: bool = False) -> None:
    """Let the model compute by the kernels, except where it has a decode state to keep."""
    from nanochat.kernels import cross_entropy, mlp, norm, rope, slc2
    from nanochat.kernels import fp8 as kernels_fp8

    for block in model.transformer.h:
        block.norm = partial(norm.rms_norm, eps=NORM_EPS)
        block.attn.product = kernels_fp8.linear if fp8 else F.linear
        block.mlp.kernel = kernels_fp8.mlp if fp8 else mlp.mlp
        if block.is_attention:
            block.attn.rope = rope.rope
        else:
            block.attn.mix = slc2.slc2_mix
    model.loss = partial(cross_entropy.head_loss, cap=SOFTCAP, fp8=fp8)


def accelerate(model: GPT, *, compile: bool, fused: bool, fp8: bool = False) -> None:
    """Make a model that is to be trained fast: by the kernels, in 8 bits where they pay, and compiled.

    Raises ValueError if the kernels do not run here, and for fp8 without fused.
    """
    if fp8 and not fused:
        raise ValueError("fp8=True is for the kernels of training: say fused, too")
    if fused and (reason := lacking(model)):
        raise ValueError(f"fused=True: the kernels of training do not run here: {reason}; leave it out")
    if fused:
        fuse(model, fp8)
    if compile:
        model.compile_blocks()
    if model.device.type == "cuda":
        by = "kernels in 8 bits" if fp8 else "kernels" if fused else "plain PyTorch"
        how = f"{by}, compiled" if compile else by
        logger.info(f"training by {how}; attention by {attention_backend(model)}")


def attention_backend(model: GPT) -> str:
    """Name what scaled_dot_product_attention chooses for training this model: the fastest on its card."""
    shape = (1, model.config.n_head, model.config.sequence_len, model.config.head_dim)
    q = torch.empty(shape, device=model.device, dtype=model.activation_dtype, requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
