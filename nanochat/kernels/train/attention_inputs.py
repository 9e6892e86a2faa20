"""Queries, keys and values in training with convolved keys and value embeddings.

`packed` (B,T,W) holds, for each token, H queries, H_kv keys and H_kv values of D channels, H_kv logits of
gates, and zeros up to W: the result of one matrix product. With j counting back from the current token, w_j
the tap on keys, R_t the rotation of position t and e the value embedding (nanochat/attention.py):

    q' = N(R_t q);  k' = N(R_t kc), kc[t] = k[t] + sum_j w_j k[t-j];  v' = v + a e, a = 2 sigmoid(gate)
    N(x) = s x, s = rsqrt(mean(x^2) + eps)

    dx = R_t^T s (dx' - x' mean(dx' x'))  for q and kc
    dk[t] = dkc[t] + sum_j w_j dkc[t+j];  dw_j = sum_t k[t] dkc[t+j]
    dv = dv';  de = a dv';  dgate = a (1 - a/2) sum_channels dv' e

q' and v' replace q and v in packed; k', whose convolution reads keys of other programs, goes to memory of its
own. Only results are rounded. Every sum has a fixed order, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.residual_conv import linked

ROWS = 16  # heads or tokens of a program's tile
BLOCKS = 8  # tiles of a program in turn where it sums the gradient of taps


@triton.jit
def _rotated(x1, x2, cos, sin, eps, HALF: tl.constexpr):
    """Return the halves of N(R x) and the scale s."""
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    scale = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 1)[:, None] / (2 * HALF) + eps)
    return y1 * scale, y2 * scale, scale


@triton.jit
def _rotated_back(d1, d2, y1, y2, scale, cos, sin, HALF: tl.constexpr):
    """Return the gradient of x from that of y = N(R x)."""
    mean = tl.sum(d1 * y1 + d2 * y2, 1)[:, None] / (2 * HALF)
    g1, g2 = scale * (d1 - y1 * mean), scale * (d2 - y2 * mean)
    return g1 * cos - g2 * sin, g1 * sin + g2 * cos


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _attention_inputs_forward(
    packed_ptr,
    conv_ptr,
    embeds_ptr,
    embeds_b,
    embeds_t,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    scales_ptr,
    T,
    eps,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    HEADS: tl.constexpr = H + 2 * H_KV
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    b, t, head = tl.program_id(1).to(tl.int64), row // HEADS, row % HEADS
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    is_key, is_value = is_in & (head >= H) & (head < H + H_KV), is_in & (head >= H + H_KV)
    is_turned = is_in & (head < H + H_KV)
    x_ptr = packed_ptr + (b * T + t) * WIDTH + head * D + d
    x1, x2 = _load(x_ptr, is_in), _load(x_ptr + HALF, is_in)
    for j in tl.static_range(TAPS):
        w_ptr = conv_ptr + ((head - H) * D + d) * TAPS + TAPS - 1 - j
        is_near = is_key & (t >= j)
        x1 += _load(w_ptr, is_key) * _load(x_ptr - j * WIDTH, is_near)
        x2 += _load(w_ptr + HALF * TAPS, is_key) * _load(x_ptr - j * WIDTH + HALF, is_near)
    cos, sin = _load(cos_ptr + t * HALF + d, is_turned), _load(sin_ptr + t * HALF + d, is_turned)
    y1, y2, scale = _rotated(x1, x2, cos, sin, eps, HALF)
    tl.store(scales_ptr + (b * T + t) * (H + H_KV) + head, scale, mask=is_turned)
    if embeds_ptr is not None:
        of_value = head - H - H_KV
        a = 2.0 * tl.sigmoid(_load(packed_ptr + (b * T + t) * WIDTH + HEADS * D + of_value, is_value))
        e_ptr = embeds_ptr + b * embeds_b + t * embeds_t + of_value * D + d
        x1 += a * _load(e_ptr, is_value)
        x2 += a * _load(e_ptr + HALF, is_value)
    keys_ptr += ((b * T + t) * H_KV + head - H) * D + d
    tl.store(keys_ptr, y1, mask=is_key)
    tl.store(keys_ptr + HALF, y2, mask=is_key)
    is_query = is_turned & (head < H)
    tl.store(x_ptr, tl.where(is_query, y1, x1), mask=is_query | is_value)
    tl.store(x_ptr + HALF, tl.where(is_query, y2, x2), mask=is_query | is_value)


@triton.jit
def _queries_and_values_backward(
    dq_ptr,
    dv_ptr,
    packed_ptr,
    embeds_ptr,
    embeds_b,
    embeds_t,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    dpacked_ptr,
    dembeds_ptr,
    T,
    dq_b,
    dq_h,
    dq_t,
    dv_b,
    dv_h,
    dv_t,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write dpacked without the keys' part, with zeros in its padding, and the embeddings' gradient."""
    D: tl.constexpr = 2 * HALF
    FILLED: tl.constexpr = (H + 2 * H_KV) * D
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    b, t, head = tl.program_id(1).to(tl.int64), row // (H + H_KV), row % (H + H_KV)
    d = tl.arange(0, HALF)[None, :]
    is_in = t < T
    is_query, is_value = is_in & (head < H), is_in & (head >= H)
    of_value = head - H
    dy_ptr = dv_ptr + b * dv_b + of_value * dv_h + t * dv_t
    dy_ptr = tl.where(head < H, dq_ptr + b * dq_b + head * dq_h + t * dq_t, dy_ptr) + d
    d1, d2 = _load(dy_ptr, is_in), _load(dy_ptr + HALF, is_in)
    token = (b * T + t) * WIDTH
    at = token + tl.where(head < H, head, head + H_KV) * D + d
    # for values, y = 0, scale = 1 and no rotation leave dv unchanged
    y1, y2 = _load(packed_ptr + at, is_query), _load(packed_ptr + at + HALF, is_query)
    scale = tl.load(scales_ptr + (b * T + t) * (H + H_KV) + head, mask=is_query, other=1.0)
    cos = tl.load(cos_ptr + t * HALF + d, mask=is_query, other=1.0).to(tl.float32)
    sin = _load(sin_ptr + t * HALF + d, is_query)
    x1, x2 = _rotated_back(d1, d2, y1, y2, scale, cos, sin, HALF)
    tl.store(dpacked_ptr + at, x1, mask=is_in)
    tl.store(dpacked_ptr + at + HALF, x2, mask=is_in)
    pad = tl.arange(0, PAD)[None, :]
    is_pad = is_in & (head == 0) & (FILLED + pad < WIDTH) & ((pad >= H_KV) | (embeds_ptr is None))
    tl.store(dpacked_ptr + token + FILLED + pad, tl.zeros((ROWS, PAD), tl.float32), mask=is_pad)
    if embeds_ptr is not None:
        a = 2.0 * tl.sigmoid(_load(packed_ptr + token + FILLED + of_value, is_value))
        e_ptr = embeds_ptr + b * embeds_b + t * embeds_t + of_value * D + d
        along = tl.sum(d1 * _load(e_ptr, is_value) + d2 * _load(e_ptr + HALF, is_value), 1)[:, None]
        tl.store(dpacked_ptr + token + FILLED + of_value, a * (1.0 - 0.5 * a) * along, mask=is_value)
        de_ptr = dembeds_ptr + ((b * T + t) * H_KV + of_value) * D + d
        tl.store(de_ptr, a * d1, mask=is_value)
        tl.store(de_ptr + HALF, a * d2, mask=is_value)


@triton.jit
def _keys_backward(
    dk_ptr,
    packed_ptr,
    conv_ptr,
    keys_ptr,
    scales_ptr,
    cos_ptr,
    sin_ptr,
    dpacked_ptr,
    dconv_ptr,
    N,
    T,
    dk_b,
    dk_h,
    dk_t,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the keys' part of dpacked and the program's part of the taps' gradient."""
    D: tl.constexpr = 2 * HALF
    head = tl.program_id(0)
    d = tl.arange(0, HALF)[None, :]
    w1, w2, dw1, dw2 = (), (), (), ()
    for j in tl.static_range(TAPS):
        w_ptr = conv_ptr + (head * D + d) * TAPS + TAPS - 1 - j
        w1 += (tl.load(w_ptr),)
        w2 += (tl.load(w_ptr + HALF * TAPS),)
        dw1 += (tl.zeros((ROWS, HALF), tl.float32),)
        dw2 += (tl.zeros((ROWS, HALF), tl.float32),)
    for block in range(BLOCKS):
        n = ((tl.program_id(1) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        at = n * WIDTH + (H + head) * D + d
        k1, k2 = _load(packed_ptr + at, n < N), _load(packed_ptr + at + HALF, n < N)
        x1, x2 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
        sums1, sums2 = (), ()
        for j in tl.static_range(max(TAPS, 1)):
            near, b, t = linked(n + j, j, N, T), (n + j) // T, (n + j) % T
            dy_ptr = dk_ptr + b * dk_b + head * dk_h + t * dk_t + d
            y_ptr = keys_ptr + ((n + j) * H_KV + head) * D + d
            scale = tl.load(scales_ptr + (n + j) * (H + H_KV) + H + head, mask=near, other=0.0)
            cos, sin = _load(cos_ptr + t * HALF + d, near), _load(sin_ptr + t * HALF + d, near)
            g1, g2 = _rotated_back(
                _load(dy_ptr, near), _load(dy_ptr + HALF, near),
                _load(y_ptr, near), _load(y_ptr + HALF, near), scale, cos, sin, HALF,
            )  # fmt: skip
            if j == 0:
                x1, x2 = g1, g2
            if TAPS > 0:
                x1, x2 = x1 + w1[j] * g1, x2 + w2[j] * g2
                sums1 += (dw1[j] + k1 * g1,)
                sums2 += (dw2[j] + k2 * g2,)
        dw1, dw2 = sums1, sums2
        tl.store(dpacked_ptr + at, x1, mask=n < N)
        tl.store(dpacked_ptr + at + HALF, x2, mask=n < N)
    dconv_ptr += (tl.program_id(1).to(tl.int64) * H_KV + head) * D + d
    for j in tl.static_range(TAPS):
        place = (TAPS - 1 - j) * tl.num_programs(1) * H_KV * D
        tl.store(dconv_ptr + place, tl.sum(dw1[j], 0)[None, :])
        tl.store(dconv_ptr + place + HALF, tl.sum(dw2[j], 0)[None, :])


@torch.library.custom_op("nanochat::attention_inputs_", mutates_args=("packed",))
def attention_inputs_(
    packed: Tensor,
    conv: Tensor | None,
    embeds: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Replace queries and values in packed (B,T,W); return k' (B,T,H_kv,D) and s (B,T,H+H_kv) float32.

    packed is contiguous, D a power of two, 16 or more; cos and sin (T,D/2) contiguous; conv (H_kv*D,1,K)
    float32; embeds (B,T,H_kv*D) with channels side by side.
    """
    (B, T, W), half, taps = packed.shape, cos.size(1), 0 if conv is None else conv.size(-1)
    keys = packed.new_empty(B, T, n_kv_head, 2 * half)
    scales = packed.new_empty(B, T, n_head + n_kv_head, dtype=torch.float32)
    strides = (0, 0) if embeds is None else embeds.stride()[:2]
    _attention_inputs_forward[(triton.cdiv(T * (n_head + 2 * n_kv_head), ROWS), B)](
        packed, conv, embeds, *strides, cos, sin, keys, scales, T, eps, n_head, n_kv_head, half, W, taps,
        ROWS, num_warps=4,
    )  # fmt: skip
    return keys, scales


@attention_inputs_.register_fake
def _(packed, conv, embeds, cos, sin, n_head, n_kv_head, eps):
    shape = packed.shape[:2]
    return (
        packed.new_empty(*shape, n_kv_head, 2 * cos.size(1)),
        packed.new_empty(*shape, n_head + n_kv_head, dtype=torch.float32),
    )


@torch.library.custom_op("nanochat::attention_inputs_backward", mutates_args=())
def attention_inputs_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    packed: Tensor,
    keys: Tensor,
    scales: Tensor,
    conv: Tensor | None,
    embeds: Tensor | None,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of packed, conv and embeds (empty for those that are None).

    packed, keys and scales are results of attention_inputs_; dq (B,H,T,D), dk and dv (B,H_kv,T,D) may have
    any strides.
    """
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    (B, H, T, D), H_kv, W = dq.shape, dk.size(1), packed.size(2)
    taps, dpacked = 0 if conv is None else conv.size(-1), torch.empty_like(packed)
    dembeds = packed.new_empty((B, T, H_kv * D) if embeds is not None else 0)
    strides = (0, 0) if embeds is None else embeds.stride()[:2]
    pad = triton.next_power_of_2(max(1, W - (H + 2 * H_kv) * D))
    _queries_and_values_backward[(triton.cdiv(T * (H + H_kv), ROWS), B)](
        dq, dv, packed, embeds, *strides, scales, cos, sin, dpacked, dembeds, T,
        *dq.stride()[:3], *dv.stride()[:3], H, H_kv, D // 2, W, pad, ROWS, num_warps=4,
    )  # fmt: skip
    programs = triton.cdiv(B * T, ROWS * BLOCKS)
    dconv = scales.new_empty(taps, programs, H_kv * D)
    _keys_backward[(H_kv, programs)](
        dk, packed, conv, keys, scales, cos, sin, dpacked, dconv, B * T, T, *dk.stride()[:3],
        H, H_kv, D // 2, W, taps, ROWS, BLOCKS, num_warps=4,
    )  # fmt: skip
    return dpacked, dconv.sum(1).T.unsqueeze(1).contiguous() if taps else scales.new_empty(0), dembeds


@attention_inputs_backward.register_fake
def _(dq, dk, dv, packed, keys, scales, conv, embeds, cos, sin):
    dembeds = packed.new_empty(0) if embeds is None else packed.new_empty(embeds.shape)
    return torch.empty_like(packed), scales.new_empty(0 if conv is None else conv.shape), dembeds


def attention_inputs(
    packed: Tensor,
    conv: Tensor | None,
    embeds: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    n_head: int,
    n_kv_head: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B,H,T,D), k and v (B,H_kv,T,D); packed (B,T,W) is overwritten, as `rope` does.

    conv (H_kv*D,1,K) or None, embeds (B,T,H_kv*D) or None: see the equations above.
    """
    return _AttentionInputs.apply(packed, conv, embeds, cos, sin, n_head, n_kv_head, eps)


class _AttentionInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, conv, embeds, cos, sin, n_head, n_kv_head, eps):
        packed = packed.detach()  # to autograd the result is a new tensor, not a change of the old one
        keys, scales = attention_inputs_(packed, conv, embeds, cos, sin, n_head, n_kv_head, eps)
        ctx.save_for_backward(packed, keys, scales, conv, embeds, cos, sin)
        D = 2 * cos.size(1)
        heads = packed[..., : (n_head + 2 * n_kv_head) * D].unflatten(2, (-1, D)).transpose(1, 2)
        q, _, v = heads.split([n_head, n_kv_head, n_kv_head], dim=1)
        return q, keys.transpose(1, 2), v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        grads = attention_inputs_backward(dq, dk, dv, *ctx.saved_tensors)
        given = ctx.saved_tensors[3:5]
        dconv, dembeds = (grad if x is not None else None for grad, x in zip(grads[1:], given, strict=True))
        return grads[0], dconv, dembeds, None, None, None, None, None
