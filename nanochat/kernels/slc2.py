"""SLC2 in training: everything between the projections and c_proj (nanochat/slc2.py), one kernel each way.

`packed` (N, W) holds for each token x (E), B (E), A (D) and alpha (H), in this order, and zeros up to W: the
result of one matrix product. With j counting back from the current token, w_j its tap, and only tokens of the
same document in sight:

    g = A * silu(alpha);  u = round(silu(g) * x);  c[t] = sum_j w_j u[t-j];  y = B * silu(c)

    dB = dy * silu(c)                                dc = dy * B * silu'(c)
    du[t] = sum_j w_j dc[t+j]                        dw_j = sum_t u[t] dc[t+j]
    dx = du * silu(g);  dg = du * x * silu'(g)       dA = sum_heads dg * silu(alpha)
    dalpha = silu'(alpha) * sum_channels dg * A

u is rounded to the dtype of the activations, as in decoding, whose state it is. Nothing but packed is saved
for the backward, which computes u and c again: arithmetic is cheaper than memory here. A program owns a few
tokens and all their heads, so every sum is taken in one order, and two runs agree bit for bit.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.approx import is_approx_enough, round_to, sigmoid, silu
from nanochat.slc2 import PACKED_ALIGN, gate, short_conv

BLOCK_T = 16  # tokens of a program


def slc2_reference(
    packed: Tensor, conv: Tensor, positions: Tensor | None, seq_len: int, n_head: int
) -> Tensor:
    """y (N,E) by the equations of nanochat/slc2.py, one document after the other."""
    E = conv.size(0)
    D = E // n_head
    x, b, a, alpha = packed[:, : 2 * E + D + n_head].split([E, E, D, n_head], dim=1)
    u = gate(x, alpha, a)
    if positions is None:
        positions = torch.arange(len(u), device=u.device) % seq_len
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(u)]
    z = [short_conv(u[None, i:j], conv)[0] for i, j in pairwise(starts)]
    return b * F.silu(torch.cat(z))


@triton.jit
def _silu_and_slope(v, APPROX: tl.constexpr):
    """silu(v) and its derivative."""
    s = sigmoid(v, APPROX)
    silu = v * s
    return silu, s + silu * (1.0 - s)


@triton.jit
def _linked(positions_ptr, t, k, N, T, HAS_POSITIONS: tl.constexpr):
    """Whether token t, and token t-k with it, is there and in one document."""
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + t, mask=t < N, other=0)
    else:
        position = t % T
    return (t < N) & (position >= k)


@triton.jit
def _gate(row, head, D: tl.constexpr, E: tl.constexpr, mask, dtype: tl.constexpr, APPROX: tl.constexpr):
    """u of the tokens whose rows of packed begin at row, 0 where mask is false."""
    d = tl.arange(0, D)[None, :]
    alpha = tl.load(row + 2 * E + D + head, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(row + 2 * E + d, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(row + head * D + d, mask=mask, other=0.0).to(tl.float32)
    return round_to(silu(a * silu(alpha, APPROX), APPROX) * x, dtype, APPROX)


@triton.jit
def _slc2_forward(
    packed_ptr,
    conv_ptr,
    positions_ptr,
    y_ptr,
    N,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    APPROX: tl.constexpr,
):
    head = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, D)[None, :]
    c = head * D + d
    rows = packed_ptr + t.to(tl.int64) * WIDTH
    z = tl.zeros((BLOCK_T, D), tl.float32)
    for j in tl.static_range(TAPS):
        seen = _linked(positions_ptr, t, j, N, T, HAS_POSITIONS)
        u = _gate(rows - j * WIDTH, head, D, E, seen, y_ptr.dtype.element_ty, APPROX)
        z += u * tl.load(conv_ptr + c * TAPS + TAPS - 1 - j)
    b = tl.load(rows + E + c, mask=t < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * E + c, b * silu(z, APPROX), mask=t < N)


@triton.jit
def _slc2_backward(
    dy_ptr,
    packed_ptr,
    conv_ptr,
    positions_ptr,
    dpacked_ptr,
    dconv_ptr,
    N,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    APPROX: tl.constexpr,
):
    E: tl.constexpr = H * D
    dtype: tl.constexpr = packed_ptr.dtype.element_ty
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, D)[None, :]
    rows = packed_ptr + t.to(tl.int64) * WIDTH
    drows = dpacked_ptr + t.to(tl.int64) * WIDTH
    dys = dy_ptr + t.to(tl.int64) * E
    dconv = dconv_ptr + tl.program_id(0).to(tl.int64) * TAPS * E
    dA = tl.zeros((BLOCK_T, D), tl.float32)
    for head in range(H):
        c = head * D + d
        taps, us = (), ()  # us: of tokens t-(TAPS-1) ... t+(TAPS-1), 0 in another document
        for j in tl.static_range(TAPS):
            taps += (tl.load(conv_ptr + c * TAPS + TAPS - 1 - j),)
        alpha = tl.load(rows + 2 * E + D + head, mask=t < N, other=0.0).to(tl.float32)
        a = tl.load(rows + 2 * E + d, mask=t < N, other=0.0).to(tl.float32)
        x = tl.load(rows + c, mask=t < N, other=0.0).to(tl.float32)
        silu_alpha, alpha_slope = _silu_and_slope(alpha, APPROX)
        silu_g, g_slope = _silu_and_slope(a * silu_alpha, APPROX)
        own_u = round_to(silu_g * x, dtype, APPROX)
        for j in tl.static_range(TAPS - 1, 0, -1):
            before = _linked(positions_ptr, t, j, N, T, HAS_POSITIONS)
            us += (_gate(rows - j * WIDTH, head, D, E, before, dtype, APPROX),)
        us += (own_u,)
        for k in tl.static_range(1, TAPS):
            after = _linked(positions_ptr, t + k, k, N, T, HAS_POSITIONS)
            us += (_gate(rows + k * WIDTH, head, D, E, after, dtype, APPROX),)
        du = tl.zeros((BLOCK_T, D), tl.float32)
        for k in tl.static_range(TAPS):  # what u of token t is to the output of token t+k
            z = tl.zeros((BLOCK_T, D), tl.float32)
            for j in tl.static_range(TAPS):
                z += us[TAPS - 1 + k - j] * taps[j]
            silu_z, z_slope = _silu_and_slope(z, APPROX)
            near = _linked(positions_ptr, t + k, k, N, T, HAS_POSITIONS)
            dy = tl.load(dys + k * E + c, mask=near, other=0.0).to(tl.float32)
            b = tl.load(rows + k * WIDTH + E + c, mask=near, other=0.0).to(tl.float32)
            dz = dy * b * z_slope
            if k == 0:
                tl.store(drows + E + c, dy * silu_z, mask=t < N)
            du += dz * taps[k]
            dtap = tl.sum(own_u * dz, 0)[None, :]
            tl.store(dconv + (TAPS - 1 - k) * E + c, dtap)
        dg = du * x * g_slope
        dA += dg * silu_alpha
        tl.store(drows + c, du * silu_g, mask=t < N)
        dalpha = alpha_slope * tl.sum(dg * a, 1)[:, None]
        tl.store(drows + 2 * E + D + head, dalpha, mask=t < N)
    tl.store(drows + 2 * E + d, dA, mask=t < N)
    pad = 2 * E + D + H + tl.arange(0, PAD)[None, :]
    tl.store(drows + pad, tl.zeros((BLOCK_T, PAD), tl.float32), mask=(t < N) & (pad < WIDTH))


@torch.library.custom_op("nanochat::slc2_mix", mutates_args=())
def slc2_mix(packed: Tensor, conv: Tensor, positions: Tensor | None, seq_len: int, n_head: int) -> Tensor:
    """Return y (N,E) in packed's dtype, for N tokens of sequences of seq_len tokens one after the other.

    packed (N,W) contiguous, W at most 15 more than 2E+D+H; conv (E,1,K) float32, K at most 4; D = E/n_head
    a power of two. positions (N,) int32, if given, counts the tokens before each token in its document, over
    whose start no tap reaches.
    """
    N, E = packed.size(0), conv.size(0)
    y = packed.new_empty(N, E)
    _slc2_forward[(n_head, triton.cdiv(N, BLOCK_T))](
        packed, conv, positions, y, N, seq_len, E, E // n_head, packed.size(1), conv.size(-1), BLOCK_T,
        positions is not None, is_approx_enough(packed), num_warps=4,
    )  # fmt: skip
    return y


@slc2_mix.register_fake
def _(packed, conv, positions, seq_len, n_head):
    return packed.new_empty(packed.size(0), conv.size(0))


@torch.library.custom_op("nanochat::slc2_mix_backward", mutates_args=())
def slc2_mix_backward(
    dy: Tensor, packed: Tensor, conv: Tensor, positions: Tensor | None, seq_len: int, n_head: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed (N,W), in its dtype, and of conv (E,1,K), float32."""
    (N, W), (E, _, K) = packed.shape, conv.shape
    blocks = triton.cdiv(N, BLOCK_T)
    dpacked, dconv = torch.empty_like(packed), conv.new_empty(blocks, K, E)
    _slc2_backward[(blocks,)](
        dy, packed, conv, positions, dpacked, dconv, N, seq_len, n_head, E // n_head, W, K, PACKED_ALIGN,
        BLOCK_T, positions is not None, is_approx_enough(packed), num_warps=8,
    )  # fmt: skip
    return dpacked, dconv.sum(0).T.unsqueeze(1).contiguous()


@slc2_mix_backward.register_fake
def _(dy, packed, conv, positions, seq_len, n_head):
    return torch.empty_like(packed), torch.empty_like(conv)


def _save(ctx, inputs, output):
    packed, conv, positions, ctx.seq_len, ctx.n_head = inputs
    ctx.save_for_backward(packed, conv, positions)


def _differentiate(ctx, dy):
    dpacked, dconv = slc2_mix_backward(dy.contiguous(), *ctx.saved_tensors, ctx.seq_len, ctx.n_head)
    return dpacked, dconv, None, None, None


slc2_mix.register_autograd(_differentiate, setup_context=_save)
