"""Residual short convolution in training (nanochat/layers.py): one kernel forward, one backward.

With j counting back from the current token, w_j its tap, and zeros before the start of a sequence:

    y[t] = u[t] + sum_j w_j u[t-j]
    du[t] = dy[t] + sum_j w_j dy[t+j]        dw_j = sum_t u[t] dy[t+j]

Only the result is rounded. Every sum has a fixed order, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_C = 16, 128  # tokens and channels of a program's tile
BLOCKS = 16  # tiles of a program in turn in the backward, for few partial sums of dw


@triton.jit
def linked(t, k, N, T):
    """Return true where tokens t and t-k exist and are in one sequence."""
    return (t < N) & (t % T >= k)


@triton.jit
def _residual_conv_forward(
    u_ptr, conv_ptr, y_ptr, N, T, C, TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    at = t.to(tl.int64) * C + c
    y = tl.load(u_ptr + at, mask=(t < N) & (c < C), other=0.0).to(tl.float32)
    for j in tl.static_range(TAPS):
        u = tl.load(u_ptr + at - j * C, mask=linked(t, j, N, T) & (c < C), other=0.0).to(tl.float32)
        y += u * tl.load(conv_ptr + c * TAPS + TAPS - 1 - j, mask=c < C, other=0.0)
    tl.store(y_ptr + at, y, mask=(t < N) & (c < C))


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
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    taps, dtaps = (), ()
    for j in tl.static_range(TAPS):
        taps += (tl.load(conv_ptr + c * TAPS + TAPS - 1 - j, mask=c < C, other=0.0),)
        dtaps += (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
    for block in range(BLOCKS):
        t = (tl.program_id(1) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        at = t.to(tl.int64) * C + c
        u = tl.load(u_ptr + at, mask=(t < N) & (c < C), other=0.0).to(tl.float32)
        du = tl.load(dy_ptr + at, mask=(t < N) & (c < C), other=0.0).to(tl.float32)
        sums = ()
        for j in tl.static_range(TAPS):
            near = linked(t + j, j, N, T) & (c < C)
            dy = tl.load(dy_ptr + at + j * C, mask=near, other=0.0).to(tl.float32)
            du += dy * taps[j]
            sums += (dtaps[j] + u * dy,)
        dtaps = sums
        tl.store(du_ptr + at, du, mask=(t < N) & (c < C))
    dconv_ptr += tl.program_id(1).to(tl.int64) * TAPS * C
    for j in tl.static_range(TAPS):
        tl.store(dconv_ptr + (TAPS - 1 - j) * C + c, tl.sum(dtaps[j], 0)[None, :], mask=c < C)


@torch.library.custom_op("nanochat::residual_conv", mutates_args=())
def residual_conv(u: Tensor, conv: Tensor) -> Tensor:
    """Return y (B,T,C) in u's dtype of u (B,T,C) contiguous; conv (C,1,K) float32."""
    (B, T, C), y = u.shape, torch.empty_like(u)
    grid = (triton.cdiv(C, BLOCK_C), triton.cdiv(B * T, BLOCK_T))
    _residual_conv_forward[grid](u, conv, y, B * T, T, C, conv.size(-1), BLOCK_T, BLOCK_C, num_warps=4)
    return y


@residual_conv.register_fake
def _(u, conv):
    return torch.empty_like(u)


@torch.library.custom_op("nanochat::residual_conv_backward", mutates_args=())
def residual_conv_backward(dy: Tensor, u: Tensor, conv: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of u (B,T,C), in its dtype, and of conv (C,1,K), float32; all contiguous."""
    (B, T, C), K, du = u.shape, conv.size(-1), torch.empty_like(u)
    programs = triton.cdiv(B * T, BLOCK_T * BLOCKS)
    dconv = conv.new_empty(programs, K, C)
    _residual_conv_backward[(triton.cdiv(C, BLOCK_C), programs)](
        dy, u, conv, du, dconv, B * T, T, C, K, BLOCK_T, BLOCK_C, BLOCKS, num_warps=4
    )
    return du, dconv.sum(0).T.unsqueeze(1).contiguous()


@residual_conv_backward.register_fake
def _(dy, u, conv):
    return torch.empty_like(u), torch.empty_like(conv)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return residual_conv_backward(dy.contiguous(), *ctx.saved_tensors)


residual_conv.register_autograd(_differentiate, setup_context=_save)
