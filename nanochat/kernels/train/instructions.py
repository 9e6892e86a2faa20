"""GPU instructions that Triton does not select by itself, exact enough for results in bfloat16."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def has_instructions(x: torch.Tensor) -> bool:
    """Return True if these instructions apply to x: a bfloat16 tensor on an NVIDIA GPU."""
    return x.is_cuda and x.dtype == torch.bfloat16


@triton.jit
def tanh(v, APPROX: tl.constexpr):
    """Return tanh of a float32 tile, accurate to float32's rounding at 1; APPROX: relative error 2^-11.

    That is accurate enough for a soft-cap (PTX ISA, tanh) but not for a sigmoid, whose small values would be
    differences of numbers near 1.
    """
    if APPROX:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0


@triton.jit
def sigmoid(v, APPROX: tl.constexpr):
    """Return 1 / (1 + exp(-v)) of a float32 tile; APPROX: relative error 2^-21 in 4 instructions."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f", [v * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.sigmoid(v)


@triton.jit
def round_to(v, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """Return a float32 tile rounded to dtype; PAIRED converts two values at a time if dtype is bfloat16.

    The conversion that Triton selects takes one value and runs on the special-function units.
    """
    if PAIRED and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2;"
            " shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f", [v], dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
        return rounded.to(tl.float32, bitcast=True)
    return v.to(dtype).to(tl.float32)
