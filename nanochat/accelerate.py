"""How training is made fast: by the kernels of nanochat/kernels where they run, and by torch.compile."""

from __future__ import annotations

from functools import partial

import torch

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


def fuse(model: GPT) -> None:
    """Let the model compute by the kernels, except where it has a decode state to keep."""
    from nanochat.kernels import cross_entropy, mlp, slc2

    for block in model.transformer.h:
        if block.is_attention:
            block.attn.is_joint = True
        else:
            block.attn.mix = slc2.slc2_mix
        block.mlp.kernel = mlp.mlp
    model.loss = partial(cross_entropy.head_loss, cap=SOFTCAP)


def accelerate(model: GPT, *, compile: bool, fused: bool | None) -> None:
    """Make a model that is to be trained fast: by the kernels (None: wherever they run), and compiled.

    Raises ValueError if the kernels are asked for and do not run here.
    """
    reason = lacking(model.config, model.device)
    if fused and reason:
        raise ValueError(f"fused=True: the kernels of training do not run here, {reason}; leave it out")
    if fused is not False and not reason:
        fuse(model)
    if compile:
        model.compile_blocks()
