"""The step from one layer to the next in training (nanochat/ops.py): MLP's output, embedding and norm.

With m the MLP's output, j counting back from the current token, and rho and lam the scales of stream and
embedding (1 and 0 in a model without them):

    s = rho (x + m + sum_j w_j m[t-j]) + lam x0;  k = rsqrt(mean(s^2) + eps);  h = k s

    g = ds + k (dh - h mean(dh h))                 dx = rho g;  dlam = sum g x0
    dm[t] = dx[t] + sum_j w_j dx[t+j]              drho = (sum g h / k - lam dlam) / rho
    dw_j = sum_t m[t] dx[t+j]                      x0 is a share (share.py): dx stands for its gradient, lam g

A program walks along the tokens, backwards in the backward, with its neighbours in registers. The backward
computes dx of the K-1 tokens after its own a second time. It needs h, which the product after the norm saves
as well, and m. Every sum has a fixed order, so two runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.residual_conv import load_before, load_taps, shifted, transposed, zeros

FORWARD, WARPS = 8, 2  # tokens of a program, in turn
BACKWARD, WARP_CHANNELS = 64, 256  # tokens of a program; channels of a warp, eight a thread


@triton.jit
def _join_forward(
    x_ptr,
    m_ptr,
    conv_ptr,
    x0_ptr,
    rho_ptr,
    lam_ptr,
    s_ptr,
    h_ptr,
    k_ptr,
    N,
    T,
    eps,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * ROWS
    taps = load_taps(conv_ptr, c, E, TAPS)
    before = load_before(m_ptr, first, E, c, E, TAPS)
    for i in range(ROWS):
        t = first + i
        at = t * E + c
        is_in = (c < E) & (t < N)
        s = tl.load(x_ptr + at, mask=is_in, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + at, mask=is_in, other=0.0).to(tl.float32)
        s += m
        if TAPS > 0:
            s += taps[0] * m
        for j in tl.static_range(1, TAPS):
            s += tl.where(t % T >= j, taps[j], 0.0) * before[j - 1]
        if TAPS > 1:
            before = shifted(m, before)
        if x0_ptr is not None:
            x0 = tl.load(x0_ptr + at, mask=is_in, other=0.0).to(tl.float32)
            s = tl.load(rho_ptr) * s + tl.load(lam_ptr) * x0
        k = tl.rsqrt(tl.sum(s * s, 0) / E + eps)
        tl.store(s_ptr + at, s, mask=is_in)
        tl.store(h_ptr + at, s * k, mask=is_in)
        tl.store(k_ptr + t, k, mask=t < N)


@triton.jit
def _load_row(ds_ptr, dh_ptr, h_ptr, k_ptr, m_ptr, x0_ptr, t, c, is_in, E: tl.constexpr):
    """Return ds, dh, h, k, m and x0 of token t as they are in memory; something for what is None."""
    at = t * E + c
    mask = (c < E) & is_in
    ds = tl.load(ds_ptr + at, mask=mask, other=0.0)
    dh = tl.load(dh_ptr + at, mask=mask, other=0.0)
    h = tl.load(h_ptr + at, mask=mask, other=0.0)
    m, x0 = h, h
    if m_ptr is not None:
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
    if x0_ptr is not None:
        x0 = tl.load(x0_ptr + at, mask=mask, other=0.0)
    return ds, dh, h, tl.load(k_ptr + t, mask=is_in, other=1.0), m, x0


@triton.jit
def _stream_gradient(ds, dh, h, k, E: tl.constexpr):
    dh = dh.to(tl.float32)
    return ds.to(tl.float32) + k * (dh - h * (tl.sum(dh * h, 0) / E))


@triton.jit
def _join_backward(
    ds_ptr,
    dh_ptr,
    h_ptr,
    k_ptr,
    m_ptr,
    conv_ptr,
    x0_ptr,
    rho_ptr,
    dx_ptr,
    dm_ptr,
    dconv_ptr,
    sums_ptr,
    N,
    T,
    E: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    first = tl.program_id(0).to(tl.int64) * ROWS
    end = first + ROWS
    rho = 1.0
    if x0_ptr is not None:
        rho = tl.load(rho_ptr)
    taps, dtaps, after = load_taps(conv_ptr, c, E, TAPS), zeros(TAPS, BLOCK), ()
    for j in tl.static_range(1, TAPS):
        t = end + j - 1
        row = _load_row(ds_ptr, dh_ptr, h_ptr, k_ptr, None, None, t, c, t < N, E)
        after += (rho * _stream_gradient(row[0], row[1], row[2].to(tl.float32), row[3], E),)
    of_stream, of_x0 = zeros(2, BLOCK)
    row = _load_row(ds_ptr, dh_ptr, h_ptr, k_ptr, m_ptr, x0_ptr, end - 1, c, end <= N, E)
    for i in range(ROWS):
        t = end - 1 - i
        ds, dh, narrow_h, k, m, x0 = row
        is_next = (t > first) & (t <= N)  # loaded before the sum over the channels waits for all threads
        row = _load_row(ds_ptr, dh_ptr, h_ptr, k_ptr, m_ptr, x0_ptr, t - 1, c, is_next, E)
        h = narrow_h.to(tl.float32)
        g = _stream_gradient(ds, dh, h, k, E)
        if x0_ptr is not None:
            of_stream += g * h / k
            of_x0 += g * x0.to(tl.float32)
        dx = rho * g
        at = t * E + c
        tl.store(dx_ptr + at, dx, mask=(c < E) & (t < N))
        if TAPS > 0:
            dm, dtaps = transposed(dx, m.to(tl.float32), after, taps, dtaps, t, T, TAPS)
            tl.store(dm_ptr + at, dm, mask=(c < E) & (t < N))
        if TAPS > 1:
            after = shifted(dx, after)
    for j in tl.static_range(TAPS):
        row = tl.program_id(0).to(tl.int64) * TAPS + TAPS - 1 - j
        tl.store(dconv_ptr + row * E + c, dtaps[j], mask=c < E)
    if x0_ptr is not None:
        tl.store(sums_ptr + 2 * tl.program_id(0), tl.sum(of_stream, 0))
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, tl.sum(of_x0, 0))


@torch.library.custom_op("nanochat::join", mutates_args=())
def join(
    x: Tensor,
    m: Tensor,
    conv: Tensor | None,
    rho: Tensor | None,
    lam: Tensor | None,
    x0: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return s and h (B,T,E) in x's dtype, and k (B,T) float32, of x, m and x0 (B,T,E), contiguous.

    conv (E,1,K), rho and lam (1,) are float32; without x0 there is no rho and lam. x0 must be a share of it:
    the gradient given for it is that of x.
    """
    B, T, E = x.shape
    s, h = torch.empty_like(x), torch.empty_like(x)
    k = x.new_empty(B, T, dtype=torch.float32)
    taps = 0 if conv is None else conv.size(-1)
    _join_forward[(triton.cdiv(B * T, FORWARD),)](
        x, m, conv, x0, rho, lam, s, h, k, B * T, T, eps, E, taps, triton.next_power_of_2(E), FORWARD,
        num_warps=WARPS,
    )  # fmt: skip
    return s, h, k


@join.register_fake
def _(x, m, conv, rho, lam, x0, eps):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("nanochat::join_backward", mutates_args=())
def join_backward(
    ds: Tensor,
    dh: Tensor,
    m: Tensor,
    conv: Tensor | None,
    rho: Tensor | None,
    lam: Tensor | None,
    x0: Tensor | None,
    h: Tensor,
    k: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx and dm (B,T,E) and the gradients of conv (E,1,K) and of rho and lam (2,), float32.

    Empty are: without conv, its gradient and dm, which is dx then; without x0, that of rho and lam.
    """
    (B, T, E), dx = h.shape, torch.empty_like(h)
    programs, taps = triton.cdiv(B * T, BACKWARD), 0 if conv is None else conv.size(-1)
    block = triton.next_power_of_2(E)
    dm = h.new_empty(0) if conv is None else torch.empty_like(h)
    dconv, sums = k.new_empty(programs, taps, E), k.new_empty(programs, 2)
    _join_backward[(programs,)](
        ds, dh, h, k, None if conv is None else m, conv, x0, rho, dx, dm, dconv, sums, B * T, T, E, taps,
        block, BACKWARD, num_warps=max(1, block // WARP_CHANNELS),
    )  # fmt: skip
    dconv = dconv.sum(0).T.unsqueeze(1).contiguous()
    if rho is None or lam is None:
        return dx, dm, dconv, k.new_empty(0)
    of_stream, of_x0 = sums.sum(0).split(1)
    return dx, dm, dconv, torch.cat([(of_stream - lam * of_x0) / rho, of_x0])


@join_backward.register_fake
def _(ds, dh, m, conv, rho, lam, x0, h, k):
    dm, dconv = (h.new_empty(0), (h.size(-1), 1, 0)) if conv is None else (torch.empty_like(h), conv.shape)
    return torch.empty_like(h), dm, k.new_empty(dconv), k.new_empty(0 if x0 is None else 2)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:-1], *output[1:])


def _differentiate(ctx, ds, dh, _):
    _, conv, _, _, x0, *_ = saved = ctx.saved_tensors  # with checkpoints they can be read only once
    dx, dm, dconv, dscales = join_backward(ds.contiguous(), dh.contiguous(), *saved)
    dm, dconv = (dx, None) if conv is None else (dm, dconv)
    drho, dlam, dshare = (None, None, None) if x0 is None else (*dscales.split(1), dx)
    return dx, dm, dconv, drho, dlam, dshare, None


join.register_autograd(_differentiate, setup_context=_save)
