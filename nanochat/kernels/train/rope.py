"""Rotate and normalise queries and keys in place in training: one kernel forward, one backward.

`packed` (B,T,W) holds, for each token, H queries, H_kv keys and H_kv values of D channels, with value
embeddings also H_kv logits of gates, and padding: the result of one matrix product. With R_t the rotation of
position t, R_t^T its transpose and x a query or key:

    y = R_t x;  s = rsqrt(mean(y^2) + eps);  h = s y    h replaces x, values stay
    dx = R_t^T s (dh - h mean(dh h))                    dv beside it: the product's gradient in one piece

The backward needs h, which attention saves as well, and s, one number a head. So a layer keeps packed,
overwritten, instead of packed for its values and separate queries and keys. Only the result is rounded to
packed's dtype.

Convolved keys k + conv(k) (residual_conv.py) are memory of their own, since the convolution's gradient needs
the keys of packed. A value embedding e changes its value (nanochat/attention.py):

    a = 2 sigmoid(gate);  v' = v + a e        dv = dv';  de = a dv';  dgate = a (1 - a/2) sum_channels dv' e
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.residual_conv import backward_into, residual_conv

CHANNELS = 2048  # of a program, in whole heads of one token or of several: 2 x 16 bytes a thread


@triton.jit
def _place(T, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sequence of the program's rows and, as (BLOCK,1), the token in it and head of each."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    return tl.program_id(1).to(tl.int64), (row // HEADS).to(tl.int64), row % HEADS


@triton.jit
def _gate(packed_ptr, token, head, FIRST: tl.constexpr, WIDTH: tl.constexpr, mask):
    """Return the gate of a value embedding; its logit is column FIRST + head of packed."""
    logit = tl.load(packed_ptr + token * WIDTH + FIRST + head, mask=mask, other=0.0)
    return 2.0 * tl.sigmoid(logit.to(tl.float32))


@triton.jit
def _rope_forward(
    packed_ptr,
    keys_ptr,
    embeds_ptr,
    embeds_row,
    cos_ptr,
    sin_ptr,
    scales_ptr,
    T,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    D: tl.constexpr = 2 * HALF
    b, t, head = _place(T, HEADS, BLOCK)
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    token = b * T + t
    x_ptr = packed_ptr + token * WIDTH + head * D + d
    if keys_ptr is not None:
        is_key = (head >= H) & (head < H + H_KV)
        x_ptr = tl.where(is_key, keys_ptr + (token * H_KV + head - H) * D + d, x_ptr)
    x1 = tl.load(x_ptr, mask=is_in, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF, mask=is_in, other=0.0).to(tl.float32)
    is_turned = is_in & (head < H + H_KV)
    cos = tl.load(cos_ptr + t * HALF + d, mask=is_turned, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * HALF + d, mask=is_turned, other=0.0).to(tl.float32)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    scale = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 1)[:, None] / D + eps)
    y1, y2 = y1 * scale, y2 * scale
    tl.store(scales_ptr + token * (H + H_KV) + head, scale, mask=is_turned)
    if embeds_ptr is not None:
        is_value, of_value = is_in & (head >= H + H_KV), head - H - H_KV
        a = _gate(packed_ptr, token, of_value, HEADS * D, WIDTH, is_value)
        e_ptr = embeds_ptr + token * embeds_row + of_value * D + d
        y1 = tl.where(is_value, x1 + a * tl.load(e_ptr, mask=is_value, other=0.0).to(tl.float32), y1)
        y2 = tl.where(is_value, x2 + a * tl.load(e_ptr + HALF, mask=is_value, other=0.0).to(tl.float32), y2)
    tl.store(x_ptr, y1, mask=is_in)
    tl.store(x_ptr + HALF, y2, mask=is_in)


@triton.jit
def _rope_backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    packed_ptr,
    keys_ptr,
    embeds_ptr,
    embeds_row,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    dpacked_ptr,
    dkeys_ptr,
    dembeds_ptr,
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
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
):
    HEADS: tl.constexpr = H + 2 * H_KV
    D: tl.constexpr = 2 * HALF
    b, t, head = _place(T, HEADS, BLOCK)
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    token, of_value = b * T + t, head - H - H_KV
    dk_row = dk_ptr + b * dk_b + (head - H) * dk_h + t * dk_t
    dv_row = dv_ptr + b * dv_b + of_value * dv_h + t * dv_t
    dh_row = tl.where(head < H + H_KV, dk_row, dv_row)
    dh_row = tl.where(head < H, dq_ptr + b * dq_b + head * dq_h + t * dq_t, dh_row)
    dh1 = tl.load(dh_row + d, mask=is_in, other=0.0).to(tl.float32)
    dh2 = tl.load(dh_row + HALF + d, mask=is_in, other=0.0).to(tl.float32)
    # for values, h = 0, scale = 1 and no rotation leave dv unchanged
    is_turned = is_in & (head < H + H_KV)
    at = token * WIDTH + head * D + d
    h_ptr, dx_ptr = packed_ptr + at, dpacked_ptr + at
    if keys_ptr is not None:
        is_key, at_key = (head >= H) & (head < H + H_KV), (token * H_KV + head - H) * D + d
        h_ptr, dx_ptr = (
            tl.where(is_key, keys_ptr + at_key, h_ptr),
            tl.where(is_key, dkeys_ptr + at_key, dx_ptr),
        )
    h1 = tl.load(h_ptr, mask=is_turned, other=0.0).to(tl.float32)
    h2 = tl.load(h_ptr + HALF, mask=is_turned, other=0.0).to(tl.float32)
    scale = tl.load(scales_ptr + token * (H + H_KV) + head, mask=is_turned, other=1.0)
    cos = tl.load(cos_ptr + t * HALF + d, mask=is_turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * HALF + d, mask=is_turned, other=0.0).to(tl.float32)
    mean = tl.sum(dh1 * h1 + dh2 * h2, 1)[:, None] / D
    dy1, dy2 = scale * (dh1 - h1 * mean), scale * (dh2 - h2 * mean)
    tl.store(dx_ptr, dy1 * cos - dy2 * sin, mask=is_in)
    tl.store(dx_ptr + HALF, dy1 * sin + dy2 * cos, mask=is_in)
    if embeds_ptr is not None:
        is_value = is_in & (head >= H + H_KV)
        a = _gate(packed_ptr, token, of_value, HEADS * D, WIDTH, is_value)
        e_ptr = embeds_ptr + token * embeds_row + of_value * D + d
        along = dh1 * tl.load(e_ptr, mask=is_value, other=0.0).to(tl.float32)
        along += dh2 * tl.load(e_ptr + HALF, mask=is_value, other=0.0).to(tl.float32)
        da = tl.sum(along, 1)[:, None] * a * (1.0 - 0.5 * a)
        tl.store(dpacked_ptr + token * WIDTH + HEADS * D + of_value, da, mask=is_value)
        de_ptr = dembeds_ptr + (token * H_KV + of_value) * D + d
        tl.store(de_ptr, a * dh1, mask=is_value)
        tl.store(de_ptr + HALF, a * dh2, mask=is_value)
        pad = HEADS * D + H_KV + tl.arange(0, PAD)[None, :]
        is_pad = is_in & (head == 0) & (pad < WIDTH)
        tl.store(dpacked_ptr + token * WIDTH + pad, tl.zeros((BLOCK, PAD), tl.float32), mask=is_pad)


@torch.library.custom_op("nanochat::rope_", mutates_args=("packed", "keys"))
def rope_(
    packed: Tensor,
    keys: Tensor | None,
    embeds: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> Tensor:
    """Rotate and normalise queries and keys in place, add value embeddings; return s (B,T,H+H_kv) float32.

    packed (B,T,W) is contiguous, W = (H + 2 H_kv) D, with embeds at least H_kv more; D a power of two, 16 or
    more; cos and sin (T,D/2) contiguous. keys (B,T,H_kv*D), contiguous, stand in for those of packed. embeds
    (B,T,H_kv*D) have rows of any stride.
    """
    (B, T, W), half, heads = packed.shape, cos.size(1), n_head + n_kv_head
    scales = packed.new_empty(B, T, heads, dtype=torch.float32)
    block, row = triton.cdiv(CHANNELS, 2 * half), 0 if embeds is None else embeds.stride(1)
    rows = heads if embeds is None else heads + n_kv_head
    _rope_forward[(triton.cdiv(T * rows, block), B)](
        packed, keys, embeds, row, cos, sin, scales, T, eps, n_head, n_kv_head, half, W, rows, block,
        num_warps=4,
    )  # fmt: skip
    return scales


@rope_.register_fake
def _(packed, keys, embeds, cos, sin, n_head, n_kv_head, eps):
    return packed.new_empty(*packed.shape[:2], n_head + n_kv_head, dtype=torch.float32)


@torch.library.custom_op("nanochat::rope_backward", mutates_args=())
def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    packed: Tensor,
    keys: Tensor | None,
    conv: Tensor | None,
    embeds: Tensor | None,
    scales: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rope_'s packed (B,T,W), of the taps conv on keys and of embeds, empty if None.

    packed, keys and scales are its results; dq (B,H,T,D), dk and dv (B,H_kv,T,D) of packed's dtype may have
    any strides.
    """
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    (B, H, T, D), H_kv, W = dq.shape, dk.size(1), packed.size(2)
    dpacked, dconv, dembeds = torch.empty_like(packed), scales.new_empty(0), packed.new_empty(0)
    dkeys, row = None if keys is None else torch.empty_like(keys), 0
    if embeds is not None:
        dembeds, row = packed.new_empty(embeds.shape), embeds.stride(1)
    block, pad = triton.cdiv(CHANNELS, D), triton.next_power_of_2(max(1, W - (H + 2 * H_kv) * D - H_kv))
    _rope_backward[(triton.cdiv(T * (H + 2 * H_kv), block), B)](
        dq, dk, dv, packed, keys, embeds, row, scales, cos, sin, dpacked, dkeys, dembeds, T,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], H, H_kv, D // 2, W, block, pad, num_warps=4,
    )  # fmt: skip
    if conv is not None and dkeys is not None:
        place = slice(H * D, (H + H_kv) * D)
        dconv = backward_into(dpacked[..., place], dkeys, packed[..., place], conv)
    return dpacked, dconv, dembeds


@rope_backward.register_fake
def _(dq, dk, dv, packed, keys, conv, embeds, scales, cos, sin):
    dembeds = packed.new_empty(0 if embeds is None else embeds.shape)
    return torch.empty_like(packed), scales.new_empty(0 if conv is None else conv.shape), dembeds


def rope(
    packed: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    eps: float,
    conv: Tensor | None = None,
    embeds: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B,H,T,D), rotated and normalised, k likewise and v (B,H_kv,T,D), of packed (B,T,W).

    packed is overwritten, so the operation that computed it must not need it in its backward (a matrix
    product does not). conv (H_kv*D,1,K), float32, are taps on the keys, embeds (B,T,H_kv*D) value embeddings.
    """
    return _Rope.apply(packed, conv, embeds, cos, sin, n_head, n_kv_head, eps)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, conv, embeds, cos, sin, n_head, n_kv_head, eps):
        packed = packed.detach()  # to autograd the result is a new tensor, not a change of the old one
        D = 2 * cos.size(1)
        heads = packed[..., : (n_head + 2 * n_kv_head) * D].unflatten(2, (-1, D)).transpose(1, 2)
        q, k, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)
        keys = None
        if conv is not None:
            place = slice(n_head * D, (n_head + n_kv_head) * D)
            keys = residual_conv(packed[..., place], conv.detach())
            k = keys.unflatten(2, (-1, D)).transpose(1, 2)
        scales = rope_(packed, keys, embeds, cos, sin, n_head, n_kv_head, eps)
        ctx.save_for_backward(packed, keys, conv, embeds, scales, cos, sin)
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        _, _, conv, embeds, *_ = saved = ctx.saved_tensors  # with checkpoints they can be read only once
        dpacked, dconv, dembeds = rope_backward(dq, dk, dv, *saved)
        dconv, dembeds = None if conv is None else dconv, None if embeds is None else dembeds
        return dpacked, dconv, dembeds, None, None, None, None, None
