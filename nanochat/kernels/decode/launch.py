"""Programmatic dependent launch of consecutive kernels (PDL, CUDA programming guide 4.5).

Every kernel releases its successor first, and waits for its predecessor only where it needs the results.
The code before `wait`, mainly loads of weights, overlaps with the end of the previous kernel, so the
memory bus is not idle while one kernel drains and the next one starts. Kernels write their results only
after `wait`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@functools.cache
def uses_pdl() -> bool:
    """Return True if the current GPU supports PDL (Hopper and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start as soon as multiprocessors have room for it."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until the previous kernel has finished, and with it all earlier ones."""
    if PDL:
        cuda.gdc_wait()


def pdl() -> dict[str, bool]:
    """Return the launch options of a kernel that calls `release` and `wait`."""
    return {"PDL": uses_pdl(), **({"launch_pdl": True} if uses_pdl() else {})}
