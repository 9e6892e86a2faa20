"""Rotate and normalise queries and keys in place in training: one kernel forward, one backward.

`packed` (B,T,W) holds, for each token, H queries, H_kv keys and H_kv values of D channels: the result of one
matrix product. With R_t the rotation of position t, R_t^T its transpose and x a query or key:

    y = R_t x;  s = rsqrt(mean(y^2) + eps);  h = s y    h replaces x, values stay
    dx = R_t^T s (dh - h mean(dh h))                    dv beside it: the product's gradient in one piece

The backward needs h, which attention saves as well, and s, one number a head. So a layer keeps packed,
overwritten, instead of packed for its values and separate queries and keys. Only the result is rounded to
packed's dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 2048  # of a program, in whole heads of one token or of several: 2 x 16 bytes a thread


@triton.jit
def _place(T, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sequence of the program's rows and, as (BLOCK,1), the token in it and head of each."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    return tl.program_id(1).to(tl.int64), (row // HEADS).to(tl.int64), row % HEADS


@triton.jit
def _rope_forward(
    packed_ptr,
    cos_ptr,
    sin_ptr,
    scales_ptr,
    T,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, t, head = _place(T, HEADS, BLOCK)
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    x_ptr = packed_ptr + (b * T + t) * WIDTH + head * 2 * HALF + d
    x1 = tl.load(x_ptr, mask=is_in, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF, mask=is_in, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * HALF + d, mask=is_in, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * HALF + d, mask=is_in, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    scale = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 1)[:, None] / (2 * HALF) + eps)
    tl.store(x_ptr, y1 * scale, mask=is_in)
    tl.store(x_ptr + HALF, y2 * scale, mask=is_in)
    tl.store(scales_ptr + (b * T + t) * HEADS + head, scale, mask=is_in)


@triton.jit
def _rope_backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    packed_ptr,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    dpacked_ptr,
    T,
    dq_b,
    dq_h,
    dq_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HEADS: tl.constexpr = H + 2 * H_KV
    b, t, head = _place(T, HEADS, BLOCK)
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    dk_row = dk_ptr + b * dk_b + (head - H) * dk_h + t * dk_t
    dv_row = dv_ptr + b * dv_b + (head - H - H_KV) * dv_h + t * dv_t
    dh_row = tl.where(head < H + H_KV, dk_row, dv_row)
    dh_row = tl.where(head < H, dq_ptr + b * dq_b + head * dq_h + t * dq_t, dh_row)
    dh1 = tl.load(dh_row + d, mask=is_in, other=0.0).to(tl.float32)
    dh2 = tl.load(dh_row + HALF + d, mask=is_in, other=0.0).to(tl.float32)
    # for values, h = 0, scale = 1 and no rotation leave dv unchanged
    is_turned = is_in & (head < H + H_KV)
    at = (b * T + t) * (2 * HALF * HEADS) + head * 2 * HALF + d
    h1 = tl.load(packed_ptr + at, mask=is_turned, other=0.0).to(tl.float32)
    h2 = tl.load(packed_ptr + at + HALF, mask=is_turned, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + (b * T + t) * (H + H_KV) + head, mask=is_turned, other=1.0)
    cos = tl.load(cos_ptr + t * HALF + d, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * HALF + d, mask=is_turned, other=0.0).to(tl.float32)
    mean = tl.sum(dh1 * h1 + dh2 * h2, 1)[:, None] / (2 * HALF)
    dy1, dy2 = scale * (dh1 - h1 * mean), scale * (dh2 - h2 * mean)
    tl.store(dpacked_ptr + at, dy1 * cos - dy2 * sin, mask=is_in)
    tl.store(dpacked_ptr + at + HALF, dy1 * sin + dy2 * cos, mask=is_in)


@torch.library.custom_op("nanochat::rope_", mutates_args=("packed",))
def rope_(packed: Tensor, cos: Tensor, sin: Tensor, n_head: int, n_kv_head: int, eps: float) -> Tensor:
    """Rotate and normalise the queries and keys of packed (B,T,W) in place; return s (B,T,H+H_kv) float32.

    packed is contiguous and W = (H + 2 H_kv) D, D a power of two, 16 or more; cos and sin (T,D/2) contiguous.
    """
    (B, T, W), half, heads = packed.shape, cos.size(1), n_head + n_kv_head
    scales = packed.new_empty(B, T, heads, dtype=torch.float32)
    block = triton.cdiv(CHANNELS, 2 * half)
    _rope_forward[(triton.cdiv(T * heads, block), B)](
        packed, cos, sin, scales, T, eps, heads, half, W, block, num_warps=4
    )
    return scales


@rope_.register_fake
def _(packed, cos, sin, n_head, n_kv_head, eps):
    return packed.new_empty(*packed.shape[:2], n_head + n_kv_head, dtype=torch.float32)


@torch.library.custom_op("nanochat::rope_backward", mutates_args=())
def rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, packed: Tensor, scales: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Return the gradient (B,T,W) of rope_'s input; packed and scales are its results.

    dq (B,H,T,D), dk and dv (B,H_kv,T,D) of packed's dtype may have any strides.
    """
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    (B, H, T, D), H_kv = dq.shape, dk.size(1)
    dpacked = torch.empty_like(packed)
    block = triton.cdiv(CHANNELS, D)
    _rope_backward[(triton.cdiv(T * (H + 2 * H_kv), block), B)](
        dq, dk, dv, packed, scales, cos, sin, dpacked, T,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], H, H_kv, D // 2, block, num_warps=4,
    )  # fmt: skip
    return dpacked


@rope_backward.register_fake
def _(dq, dk, dv, packed, scales, cos, sin):
    return torch.empty_like(packed)


def rope(packed: Tensor, cos: Tensor, sin: Tensor, n_head: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B,H,T,D), rotated and normalised, k likewise and v (B,H_kv,T,D): views of packed (B,T,W).

    packed is overwritten, so the operation that computed it must not need it in its backward (a matrix
    product does not).
    """
    return _Rope.apply(packed, cos, sin, n_head, eps)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, cos: Tensor, sin: Tensor, n_head: int, eps: float):
        packed = packed.detach()  # to autograd the result is a new tensor, not a change of the old one
        heads = packed.unflatten(2, (-1, 2 * cos.size(1))).transpose(1, 2)  # (B, H + 2 H_kv, T, D)
        n_kv_head = (heads.size(1) - n_head) // 2
        scales = rope_(packed, cos, sin, n_head, n_kv_head, eps)
        ctx.save_for_backward(packed, scales, cos, sin)
        return heads.split([n_head, n_kv_head, n_kv_head], dim=1)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
        return rope_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None
