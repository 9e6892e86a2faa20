"""The step from one layer to the next in training (nanochat/ops.py): MLP's output, embedding and norm.

With m the MLP's output, j counting back from the current token, and rho and lam the scales of stream and
embedding (1 and 0 in a model without them):

    s = rho (x + m + sum_j w_j m[t-j]) + lam x0;  k = rsqrt(mean(s^2) + eps);  h = k s

    g = ds + k (dh - h mean(dh h))                 dx = rho g;  dx0 = lam g
    dm[t] = dx[t] + sum_j w_j dx[t+j]              dlam = sum g x0;  drho = (sum g h / k - lam dlam) / rho

A program of the forward walks along the tokens, with the neighbours of m in registers. The backward needs h,
which the product after the norm saves as well, and m; its part for the convolution is that of
residual_conv.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.train.residual_conv import (
    load_before,
    load_taps,
    residual_conv_backward,
    shifted,
)

ROWS, WARPS = 8, 2  # tokens of a program, in turn


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
def _join_backward(
    ds_ptr,
    dh_ptr,
    h_ptr,
    k_ptr,
    x0_ptr,
    rho_ptr,
    lam_ptr,
    dx_ptr,
    dx0_ptr,
    sums_ptr,
    N,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    of_stream, of_x0 = 0.0, 0.0
    for i in range(ROWS):
        t = tl.program_id(0) * ROWS + i
        at = t.to(tl.int64) * E + c
        is_in = (c < E) & (t < N)
        h = tl.load(h_ptr + at, mask=is_in, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + at, mask=is_in, other=0.0).to(tl.float32)
        g = tl.load(ds_ptr + at, mask=is_in, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + t, mask=t < N, other=1.0)
        g += k * (dh - h * (tl.sum(dh * h, 0) / E))
        if x0_ptr is not None:
            x0 = tl.load(x0_ptr + at, mask=is_in, other=0.0).to(tl.float32)
            of_stream += tl.sum(g * h, 0) / k
            of_x0 += tl.sum(g * x0, 0)
            tl.store(dx0_ptr + at, tl.load(lam_ptr) * g, mask=is_in)
            g *= tl.load(rho_ptr)
        tl.store(dx_ptr + at, g, mask=is_in)
    if x0_ptr is not None:
        tl.store(sums_ptr + 2 * tl.program_id(0), of_stream)
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, of_x0)


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

    conv (E,1,K), rho and lam (1,) are float32; without x0 there is no rho and lam.
    """
    B, T, E = x.shape
    s, h = torch.empty_like(x), torch.empty_like(x)
    k = x.new_empty(B, T, dtype=torch.float32)
    taps = 0 if conv is None else conv.size(-1)
    _join_forward[(triton.cdiv(B * T, ROWS),)](
        x, m, conv, x0, rho, lam, s, h, k, B * T, T, eps, E, taps, triton.next_power_of_2(E), ROWS,
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
    h: Tensor,
    k: Tensor,
    x0: Tensor | None,
    rho: Tensor | None,
    lam: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx and dx0 (B,T,E) and the gradients (2,) of rho and lam; without x0 the last two are empty."""
    (B, T, E), dx = h.shape, torch.empty_like(h)
    programs = triton.cdiv(B * T, ROWS)
    dx0 = torch.empty_like(h) if x0 is not None else h.new_empty(0)
    sums = k.new_empty(programs, 2) if x0 is not None else k.new_empty(0)
    _join_backward[(programs,)](
        ds, dh, h, k, x0, rho, lam, dx, dx0, sums, B * T, E, triton.next_power_of_2(E), ROWS, num_warps=WARPS
    )
    if rho is None or lam is None:
        return dx, dx0, sums
    of_stream, of_x0 = sums.sum(0).split(1)
    return dx, dx0, torch.cat([(of_stream - lam * of_x0) / rho, of_x0])


@join_backward.register_fake
def _(ds, dh, h, k, x0, rho, lam):
    is_mixed = x0 is not None
    return (
        torch.empty_like(h),
        torch.empty_like(h) if is_mixed else h.new_empty(0),
        k.new_empty(2 if is_mixed else 0),
    )


def _save(ctx, inputs, output):
    _, m, conv, rho, lam, x0, _ = inputs
    ctx.save_for_backward(m, conv, x0, rho, lam, *output[1:])


def _differentiate(ctx, ds, dh, _):
    m, conv, x0, rho, lam, h, k = ctx.saved_tensors
    dx, dx0, dscales = join_backward(ds.contiguous(), dh.contiguous(), h, k, x0, rho, lam)
    dm, dconv = (dx, None) if conv is None else residual_conv_backward(dx, m, conv)
    if x0 is None:
        return dx, dm, dconv, None, None, None, None
    return dx, dm, dconv, dscales[:1], dscales[1:], dx0, None


join.register_autograd(_differentiate, setup_context=_save)
