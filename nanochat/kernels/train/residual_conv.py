"""Residual short convolution in training (nanochat/layers.py): one kernel forward, one backward.

With j counting back from the current token, w_j its tap, and zeros before the start of a sequence:

    y[t] = u[t] + sum_j w_j u[t-j]
    du[t] = dy[t] + sum_j w_j dy[t+j]        dw_j = sum_t u[t] dy[t+j]

A program walks along the tokens, backwards in the backward, and holds its neighbours in registers: each value
is read once. Only the result is rounded. Every sum has a fixed order, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C, WARPS = 256, 1  # channels of a program, eight a thread
FORWARD, BACKWARD = 32, 32  # tokens of a program


@triton.jit
def load_taps(conv_ptr, c, C, TAPS: tl.constexpr):
    """Return the taps of channels c, that of the current token first."""
    taps = ()
    for j in tl.static_range(TAPS):
        taps += (tl.load(conv_ptr + c * TAPS + TAPS - 1 - j, mask=c < C, other=0.0),)
    return taps


@triton.jit
def load_before(u_ptr, first, row, c, C, TAPS: tl.constexpr):
    """Return the K-1 values of channels c before token `first`, latest first, 0 before the first of all.

    row is the distance of two tokens in memory.
    """
    before = ()
    for j in tl.static_range(1, TAPS):
        is_in = (c < C) & (first >= j)
        before += (tl.load(u_ptr + (first - j) * row + c, mask=is_in, other=0.0).to(tl.float32),)
    return before


@triton.jit
def shifted(value, others):
    """Return (value, *others) without the last: the neighbours of the next token."""
    kept = (value,)
    for j in tl.static_range(len(others) - 1):
        kept += (others[j],)
    return kept


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return sums (BLOCK,) that start at zero."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((BLOCK,), tl.float32),)
    return sums


@triton.jit
def transposed(dy, u, after, taps, dtaps, t, T, TAPS: tl.constexpr):
    """Return du of token t, and dtaps with its part added; after: dy of the tokens after it, next first."""
    du = dy + taps[0] * dy
    sums = (dtaps[0] + u * dy,)
    for j in tl.static_range(1, TAPS):
        near = tl.where(t % T + j < T, after[j - 1], 0.0)
        du += taps[j] * near
        sums += (dtaps[j] + u * near,)
    return du, sums


@triton.jit
def _residual_conv_forward(
    u_ptr, conv_ptr, y_ptr, N, T, C, u_row, TAPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_C: tl.constexpr
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    taps = load_taps(conv_ptr, c, C, TAPS)
    before = load_before(u_ptr, first, u_row, c, C, TAPS)
    for i in range(TOKENS):
        t = first + i
        u = tl.load(u_ptr + t * u_row + c, mask=(c < C) & (t < N), other=0.0).to(tl.float32)
        y = u + taps[0] * u
        for j in tl.static_range(1, TAPS):
            y += tl.where(t % T >= j, taps[j], 0.0) * before[j - 1]
        tl.store(y_ptr + t * C + c, y, mask=(c < C) & (t < N))
        if TAPS > 1:
            before = shifted(u, before)


@triton.jit
def _residual_conv_backward(
    dy_ptr,
    u_ptr,
    conv_ptr,
    du_ptr,
    dconv_ptr,
    N,
    T,
    C,
    u_row,
    du_row,
    TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    end = (tl.program_id(1).to(tl.int64) + 1) * TOKENS
    taps = load_taps(conv_ptr, c, C, TAPS)
    dtaps, after = zeros(TAPS, BLOCK_C), ()
    for j in tl.static_range(1, TAPS):
        is_in = (c < C) & (end + j - 1 < N)
        after += (tl.load(dy_ptr + (end + j - 1) * C + c, mask=is_in, other=0.0).to(tl.float32),)
    for i in range(TOKENS):
        t = end - 1 - i
        is_in = (c < C) & (t < N)
        dy = tl.load(dy_ptr + t * C + c, mask=is_in, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + t * u_row + c, mask=is_in, other=0.0).to(tl.float32)
        du, dtaps = transposed(dy, u, after, taps, dtaps, t, T, TAPS)
        tl.store(du_ptr + t * du_row + c, du, mask=is_in)
        if TAPS > 1:
            after = shifted(dy, after)
    dconv_ptr += tl.program_id(1).to(tl.int64) * TAPS * C
    for j in tl.static_range(TAPS):
        tl.store(dconv_ptr + (TAPS - 1 - j) * C + c, dtaps[j], mask=c < C)


@torch.library.custom_op("nanochat::residual_conv", mutates_args=())
def residual_conv(u: Tensor, conv: Tensor) -> Tensor:
    """Return y (B,T,C) contiguous, in u's dtype; u has rows of any stride, conv (C,1,K) is float32."""
    (B, T, C), y = u.shape, torch.empty(u.shape, dtype=u.dtype, device=u.device)
    grid = (triton.cdiv(C, BLOCK_C), triton.cdiv(B * T, FORWARD))
    _residual_conv_forward[grid](
        u, conv, y, B * T, T, C, u.stride(1), conv.size(-1), FORWARD, BLOCK_C, num_warps=WARPS
    )
    return y


@residual_conv.register_fake
def _(u, conv):
    return u.new_empty(u.shape)


def backward_into(du: Tensor, dy: Tensor, u: Tensor, conv: Tensor) -> Tensor:
    """Write the gradient of u to du (B,T,C); return that of conv (C,1,K), float32.

    dy (B,T,C) is contiguous; u and du have rows of any stride.
    """
    (B, T, C), K = u.shape, conv.size(-1)
    programs = triton.cdiv(B * T, BACKWARD)
    dconv = conv.new_empty(programs, K, C)
    _residual_conv_backward[(triton.cdiv(C, BLOCK_C), programs)](
        dy, u, conv, du, dconv, B * T, T, C, u.stride(1), du.stride(1), K, BACKWARD, BLOCK_C, num_warps=WARPS
    )
    return dconv.sum(0).T.unsqueeze(1).contiguous()


@torch.library.custom_op("nanochat::residual_conv_backward", mutates_args=())
def residual_conv_backward(dy: Tensor, u: Tensor, conv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u (B,T,C), in its dtype, and of conv (C,1,K), float32; dy is contiguous."""
    du = torch.empty_like(dy)
    return du, backward_into(du, dy, u, conv)


@residual_conv_backward.register_fake
def _(dy, u, conv):
    return torch.empty_like(dy), torch.empty_like(conv)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return residual_conv_backward(dy.contiguous(), *ctx.saved_tensors)


residual_conv.register_autograd(_differentiate, setup_context=_save)
