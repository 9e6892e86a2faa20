"""How our kernels follow one another: programmatic dependent launch (PDL, CUDA programming guide 4.5).

Every kernel first lets its successor start, and waits for its predecessor only where it needs its
results. What comes before `wait`, loads of weights above all, so overlaps with the end of the kernel
before: the memory bus is never idle while one kernel drains and the next one starts. Results are written
after `wait` only.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@functools.cache
def uses_pdl() -> bool:
    """Whether the current GPU knows PDL (Hopper and later)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start as soon as it finds room."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait for the kernel before, and so for all before it."""
    if PDL:
        cuda.gdc_wait()


def pdl() -> dict[str, bool]:
    """Launch options of a kernel that calls release and wait."""
    return {"PDL": uses_pdl(), **({"launch_pdl": True} if uses_pdl() else {})}
