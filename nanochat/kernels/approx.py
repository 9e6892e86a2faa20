"""Functions that a GPU has instructions for, exact to about 11 bits, more than bfloat16 keeps.

A sigmoid made of exp and a division asks the special-function units twice, tanh.approx once; in kernels with
ten sigmoids an element these units, and not memory, would be the limit (PTX ISA, tanh: relative error 2^-11).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def is_approx_enough(x: torch.Tensor) -> bool:
    """Whether the instructions may be used for results in the dtype of x, and where it is."""
    return x.is_cuda and x.dtype == torch.bfloat16


@triton.jit
def tanh(v, APPROX: tl.constexpr):
    """Return tanh of a float32 tile; APPROX by the instruction, else within float32's rounding of 1."""
    if APPROX:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    return 2.0 * tl.sigmoid(2.0 * v) - 1.0


@triton.jit
def sigmoid(v, APPROX: tl.constexpr):
    """Return 1 / (1 + exp(-v)) of a float32 tile."""
    if APPROX:
        return 0.5 + 0.5 * tanh(0.5 * v, APPROX)
    return tl.sigmoid(v)


@triton.jit
def silu(v, APPROX: tl.constexpr):
    """Return v * sigmoid(v) of a float32 tile."""
    if APPROX:
        half = 0.5 * v
        return half + half * tanh(half, APPROX)
    return v * tl.sigmoid(v)


@triton.jit
def round_to(v, dtype: tl.constexpr, PAIRED: tl.constexpr):
    """Return a float32 tile rounded to dtype; PAIRED two values at a time, if dtype is bfloat16.

    The conversion that Triton chooses takes one value and runs on the special-function units.
    """
    if PAIRED and dtype == tl.bfloat16:
        rounded = tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2;"
            " shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,f,f", [v], dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
        return rounded.to(tl.float32, bitcast=True)
    return v.to(dtype).to(tl.float32)
