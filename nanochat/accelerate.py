"""How training is made fast: by the kernels of nanochat/kernels where they run, and by torch.compile."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from nanochat.gpt import GPT, SOFTCAP, GPTConfig

SHARED_MEMORY = 220 * 1024  # bytes that a tile of the MLP takes; Hopper and data-centre Blackwell have 227 KB
MAX_TAPS = 4  # of a convolution: the kernel holds a row of them in registers


def lacking(config: GPTConfig, device: torch.device) -> str:
    """Say what is in the way of training this model on this device by the kernels; "" if nothing is."""
    D = config.head_dim
    if device.type != "cuda":
        return "they need an NVIDIA GPU"
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SHARED_MEMORY:
        return "they are for Hopper and data-centre Blackwell cards"
    if D < 16 or D & (D - 1):
        return f"heads of {D} channels are not a power of two, 16 or more"
    if config.n_kernel > MAX_TAPS:
        return f"n_kernel={config.n_kernel} is more than {MAX_TAPS}"
    return ""


def fuse(model: GPT, fp8: bool = False) -> None:
    """Let the model compute by the kernels, except where it has a decode state to keep."""
    from nanochat.kernels import cross_entropy, mlp, slc2
    from nanochat.kernels import fp8 as kernels_fp8

    for block in model.transformer.h:
        block.attn.product = kernels_fp8.linear if fp8 else F.linear
        block.mlp.kernel = kernels_fp8.mlp if fp8 else mlp.mlp
        if not block.is_attention:
            block.attn.mix = slc2.slc2_mix
    model.loss = partial(cross_entropy.head_loss, cap=SOFTCAP)


def accelerate(model: GPT, *, compile: bool, fused: bool | None, fp8: bool = False) -> None:
    """Make a model that is to be trained fast: by the kernels (None: wherever they run), and compiled.

    Raises ValueError if the kernels are asked for and do not run here, or products in 8 bits without them.
    """
    reason = lacking(model.config, model.device)
    if fused is False:
        reason = "fused=False"
    if (fused or fp8) and reason:
        flag = "fused=True" if fused else "fp8=True"
        raise ValueError(f"{flag}: the kernels of training are not to be had: {reason}; leave it out")
    if not reason:
        fuse(model, fp8)
    if compile:
        model.compile_blocks()
