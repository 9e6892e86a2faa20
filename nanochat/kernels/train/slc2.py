"""SLC2 in training, from the projections to c_proj (nanochat/slc2.py): one kernel forward, two backward.

`packed` (N, W) holds for each token x (E), B (E), A (D) and alpha (H), in this order, and zeros up to W: the
result of one matrix product. With j counting back from the current token, w_j its tap, and zeros before the
start of a sequence:

    g = A * silu(alpha);  u = round(silu(g) * x);  c[t] = sum_j w_j u[t-j];  y = B * silu(c)

    dB = dy * silu(c)                                dc = dy * B * silu'(c)
    du[t] = sum_j w_j dc[t+j]                        dw_j = sum_t u[t-j] dc[t]
    dx = du * silu(g);  dg = du * x * silu'(g)       dA = sum_heads dg * silu(alpha)
    dalpha = silu'(alpha) * sum_channels dg * A

u is rounded to the dtype of the activations, as in decoding, where it is the state. The backward saves only
packed and recomputes u and c: arithmetic is cheaper than memory here. It is two kernels, because dc is read
with taps into the future: the first writes dc, the second reads it. Every sum has a fixed order, so two runs
agree bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.instructions import has_instructions, round_to, sigmoid
from nanochat.layers import short_conv
from nanochat.slc2 import gate

PACKED_ALIGN = 64  # columns of packed are a multiple of it: rows of whole 128-byte lines
BLOCK_T = 16  # tokens of a program at a time
CONV_BLOCK_T, CONV_BLOCKS = 8, 32  # _slc2_backward_conv: tokens, and repetitions, for few partial sums of dw


def slc2_reference(packed: Tensor, conv: Tensor, seq_len: int, n_head: int, dtype: torch.dtype) -> Tensor:
    """Return y (N,E) by the equations of nanochat/slc2.py, with u rounded to dtype; see `slc2_mix`."""
    E = conv.size(0)
    D = E // n_head
    x, b, a, alpha = packed[:, : 2 * E + D + n_head].split([E, E, D, n_head], dim=1)
    u = gate(x, alpha, a)
    u = u + (u.to(dtype).to(u.dtype) - u).detach()
    z = short_conv(u.unflatten(0, (-1, seq_len)), conv).flatten(0, 1)
    return b * F.silu(z)


@triton.jit
def _silu(v, APPROX: tl.constexpr):
    return v * sigmoid(v, APPROX)


@triton.jit
def _silu_and_slope(v, APPROX: tl.constexpr):
    """Return silu(v) and its derivative."""
    s = sigmoid(v, APPROX)
    silu = v * s
    return silu, s + silu * (1.0 - s)


@triton.jit
def _linked(t, k, N, T):
    """Return true where tokens t and t-k exist and are in one sequence."""
    return (t < N) & (t % T >= k)


@triton.jit
def _gate(row, head, D: tl.constexpr, E: tl.constexpr, mask, dtype: tl.constexpr, APPROX: tl.constexpr):
    """Return u of the tokens whose rows of packed begin at row, 0 where mask is false."""
    d = tl.arange(0, D)[None, :]
    alpha = tl.load(row + 2 * E + D + head, mask=mask, other=0.0).to(tl.float32)
    a = tl.load(row + 2 * E + d, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(row + head * D + d, mask=mask, other=0.0).to(tl.float32)
    return round_to(_silu(a * _silu(alpha, APPROX), APPROX) * x, dtype, APPROX)


@triton.jit
def _slc2_forward(
    packed_ptr,
    conv_ptr,
    y_ptr,
    N,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    APPROX: tl.constexpr,
):
    head = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, D)[None, :]
    c = head * D + d
    rows = packed_ptr + t.to(tl.int64) * WIDTH
    z = tl.zeros((BLOCK_T, D), tl.float32)
    for j in tl.static_range(TAPS):
        seen = _linked(t, j, N, T)
        u = _gate(rows - j * WIDTH, head, D, E, seen, y_ptr.dtype.element_ty, APPROX)
        z += u * tl.load(conv_ptr + c * TAPS + TAPS - 1 - j)
    b = tl.load(rows + E + c, mask=t < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + t.to(tl.int64) * E + c, b * _silu(z, APPROX), mask=t < N)


@triton.jit
def _slc2_backward_conv(
    dy_ptr,
    packed_ptr,
    conv_ptr,
    dpacked_ptr,
    dc_ptr,
    dconv_ptr,
    N,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Compute dB, dc and the program's part of dw from dy."""
    head = tl.program_id(0)
    c = head * D + tl.arange(0, D)[None, :]
    taps, dtaps = (), ()
    for j in tl.static_range(TAPS):
        taps += (tl.load(conv_ptr + c * TAPS + TAPS - 1 - j),)
        dtaps += (tl.zeros((BLOCK_T, D), tl.float32),)
    for block in range(BLOCKS):
        t = (tl.program_id(1) * BLOCKS + block) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
        rows = packed_ptr + t.to(tl.int64) * WIDTH
        us = ()
        z = tl.zeros((BLOCK_T, D), tl.float32)
        for j in tl.static_range(TAPS):
            seen = _linked(t, j, N, T)
            us += (_gate(rows - j * WIDTH, head, D, E, seen, packed_ptr.dtype.element_ty, APPROX),)
            z += us[j] * taps[j]
        silu_z, slope = _silu_and_slope(z, APPROX)
        dy = tl.load(dy_ptr + t.to(tl.int64) * E + c, mask=t < N, other=0.0).to(tl.float32)
        b = tl.load(rows + E + c, mask=t < N, other=0.0).to(tl.float32)
        dc = dy * b * slope
        tl.store(dpacked_ptr + t.to(tl.int64) * WIDTH + E + c, dy * silu_z, mask=t < N)
        tl.store(dc_ptr + t.to(tl.int64) * E + c, dc, mask=t < N)
        sums = ()
        for j in tl.static_range(TAPS):
            sums += (dtaps[j] + us[j] * dc,)
        dtaps = sums
    dconv_ptr += tl.program_id(1).to(tl.int64) * TAPS * E
    for j in tl.static_range(TAPS):
        tl.store(dconv_ptr + (TAPS - 1 - j) * E + c, tl.sum(dtaps[j], 0)[None, :])


@triton.jit
def _slc2_backward_gate(
    dc_ptr,
    packed_ptr,
    conv_ptr,
    dpacked_ptr,
    N,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    APPROX: tl.constexpr,
):
    """Compute dx, dA and dalpha from dc; write zeros to the padding columns."""
    E: tl.constexpr = H * D
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, D)[None, :]
    rows = packed_ptr + t.to(tl.int64) * WIDTH
    drows = dpacked_ptr + t.to(tl.int64) * WIDTH
    dcs = dc_ptr + t.to(tl.int64) * E
    a = tl.load(rows + 2 * E + d, mask=t < N, other=0.0).to(tl.float32)
    dA = tl.zeros((BLOCK_T, D), tl.float32)
    for head in range(H):
        c = head * D + d
        du = tl.zeros((BLOCK_T, D), tl.float32)
        for k in tl.static_range(TAPS):
            near = _linked(t + k, k, N, T)
            dc = tl.load(dcs + k * E + c, mask=near, other=0.0).to(tl.float32)
            du += dc * tl.load(conv_ptr + c * TAPS + TAPS - 1 - k)
        alpha = tl.load(rows + 2 * E + D + head, mask=t < N, other=0.0).to(tl.float32)
        x = tl.load(rows + c, mask=t < N, other=0.0).to(tl.float32)
        silu_alpha, alpha_slope = _silu_and_slope(alpha, APPROX)
        silu_g, g_slope = _silu_and_slope(a * silu_alpha, APPROX)
        tl.store(drows + c, du * silu_g, mask=t < N)
        dg = du * x * g_slope
        dA += dg * silu_alpha
        dalpha = alpha_slope * tl.sum(dg * a, 1)[:, None]
        tl.store(drows + 2 * E + D + head, dalpha, mask=t < N)
    tl.store(drows + 2 * E + d, dA, mask=t < N)
    pad = 2 * E + D + H + tl.arange(0, PAD)[None, :]
    tl.store(drows + pad, tl.zeros((BLOCK_T, PAD), tl.float32), mask=(t < N) & (pad < WIDTH))


@torch.library.custom_op("nanochat::slc2_mix", mutates_args=())
def slc2_mix(packed: Tensor, conv: Tensor, seq_len: int, n_head: int) -> Tensor:
    """Return y (N,E) in packed's dtype, for N tokens of consecutive sequences of seq_len tokens.

    packed (N,W) contiguous, W from 2E+D+H to the next multiple of PACKED_ALIGN; conv (E,1,K) float32, K at
    most 4; D = E/n_head a power of two.
    """
    N, E = packed.size(0), conv.size(0)
    y = packed.new_empty(N, E)
    _slc2_forward[(n_head, triton.cdiv(N, BLOCK_T))](
        packed, conv, y, N, seq_len, E, E // n_head, packed.size(1), conv.size(-1), BLOCK_T,
        has_instructions(packed), num_warps=8,
    )  # fmt: skip
    return y


@slc2_mix.register_fake
def _(packed, conv, seq_len, n_head):
    return packed.new_empty(packed.size(0), conv.size(0))


@torch.library.custom_op("nanochat::slc2_mix_backward", mutates_args=())
def slc2_mix_backward(
    dy: Tensor, packed: Tensor, conv: Tensor, seq_len: int, n_head: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of packed (N,W), in its dtype, and of conv (E,1,K), float32."""
    (N, W), (E, _, K) = packed.shape, conv.shape
    D, is_approx = E // n_head, has_instructions(packed)
    dpacked, dc = torch.empty_like(packed), torch.empty_like(dy)
    programs = triton.cdiv(N, CONV_BLOCK_T * CONV_BLOCKS)
    dconv = conv.new_empty(programs, K, E)
    _slc2_backward_conv[(n_head, programs)](
        dy, packed, conv, dpacked, dc, dconv, N, seq_len, E, D, W, K, CONV_BLOCK_T, CONV_BLOCKS,
        is_approx, num_warps=4,
    )  # fmt: skip
    _slc2_backward_gate[(triton.cdiv(N, BLOCK_T),)](
        dc, packed, conv, dpacked, N, seq_len, n_head, D, W, K, PACKED_ALIGN, BLOCK_T,
        is_approx, num_warps=8,
    )  # fmt: skip
    return dpacked, dconv.sum(0).T.unsqueeze(1).contiguous()


@slc2_mix_backward.register_fake
def _(dy, packed, conv, seq_len, n_head):
    return torch.empty_like(packed), torch.empty_like(conv)


def _save(ctx, inputs, output):
    packed, conv, ctx.seq_len, ctx.n_head = inputs
    ctx.save_for_backward(packed, conv)


def _differentiate(ctx, dy):
    dpacked, dconv = slc2_mix_backward(dy.contiguous(), *ctx.saved_tensors, ctx.seq_len, ctx.n_head)
    return dpacked, dconv, None, None


slc2_mix.register_autograd(_differentiate, setup_context=_save)
