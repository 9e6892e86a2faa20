"""Linear layers for a few rows x, limited by memory bandwidth: the time to read the weights W.

Decoding reads every weight once per token and computes little with it, so the memory bus must be kept
busy: a program requests its rows of W before it waits for x (launch.py). For one row they are held in
registers (matrix-vector product); for up to 32 rows they are prefetched into the L2 cache and multiplied
on the tensor cores. RMSNorm has no weights and commutes with the product: norm(x) W^T = s (x W^T), s = 1 /
rms(x) per row. So a single row is scaled at the end. For several rows of an MLP, relu(s h)^2 = s^2
relu(h)^2: they are scaled when the second product is added to the residual stream, by the s that one extra
program of the first product computes. In the second generation this product is convolved before it is added,
and the sum is mixed (residual_conv.py); a program computes all rows of its channels, so it does that too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait
from nanochat.kernels.decode.residual_conv import (
    Conv,
    Mix,
    convolve,
    load_rows,
    n_taps,
    shift_window,
)

ELEMENTS = 10240  # weights held by a program of row_linear, 80 per thread
MAX_ROWS = 32
COUNTERS = 1024  # upper bound on the blocks of rows of W in a split product


def linear_reference(x: Tensor, weight: Tensor, *, norm=False, relu2=False, residual=None) -> Tensor:
    """Return x W^T (R,N) of x (R,K), weight (N,K): rms_norm of x first; relu^2, then residual (R,N) last."""
    if norm:
        x = F.rms_norm(x, (x.size(-1),), eps=2.0**-23)
    y = x @ weight.T
    y = torch.relu(y).square() if relu2 else y
    return y if residual is None else residual + y


@triton.jit
def _row_linear(
    x_ptr,
    w_ptr,
    y_ptr,
    slots_ptr,
    taps_ptr,
    windows_ptr,
    x0_ptr,
    scales_ptr,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    RELU2: tl.constexpr,
    ADD: tl.constexpr,
    TAPS: tl.constexpr,
    MIXED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    held = ()
    for i in tl.static_range(K // BLOCK_K):
        held += (tl.load(rows + i * BLOCK_K, mask=n[:, None] < N, other=0.0),)
    if TAPS:
        window = windows_ptr + tl.load(slots_ptr).to(tl.int64) * (TAPS - 1) * N + n
        past = load_rows(window, N, n < N, TAPS - 1)
        taps = load_rows(taps_ptr + n, N, n < N, TAPS)
    if MIXED:
        scale_x, scale_x0 = tl.load(scales_ptr), tl.load(scales_ptr + 1)
        _prefetch_line(x0_ptr + tl.minimum(n, N - 1), PDL)  # since the last layer it may have left the cache
    wait(PDL)
    if ADD:
        before = tl.load(y_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if MIXED:
        x0 = tl.load(x0_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(K // BLOCK_K):
        x = tl.load(x_ptr + i * BLOCK_K + k).to(tl.float32)
        total += held[i].to(tl.float32) * x[None, :]
        squares += x * x
    y = tl.sum(total, 1)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 0) / K + 2.0**-23)
    if RELU2:
        y = tl.maximum(y, 0.0)
        y *= y
    if TAPS:
        u = y.to(y_ptr.dtype.element_ty)
        y = convolve(u, past, taps, TAPS)
        shift_window(window, u, past, N, n < N, TAPS)
    if ADD:
        y += before
    if MIXED:
        y = scale_x * y + scale_x0 * x0
    tl.store(y_ptr + n, y, mask=n < N)


def row_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    norm: bool = False,
    relu2: bool = False,
    add: bool = False,
    slots: Tensor | None = None,
    conv: Conv | None = None,
    mix: Mix | None = None,
) -> None:
    """Write linear_reference of one row x (1,K) to out (1,N), or add it to out; all tensors contiguous.

    With conv it is convolved first, with the state at slots (1,) int32; with a mix, out is mixed last.
    """
    N, K = weight.shape
    block_k = min(1024, K & -K)
    block_n = max(1, triton.next_power_of_2(ELEMENTS // K + 1) // 2)
    taps, windows, _ = conv or (None, None, None)
    _row_linear[(triton.cdiv(N, block_n),)](
        x, weight, out, slots, taps, windows, *(mix or (None, None)), N, K, block_n, block_k, norm, relu2,
        add, n_taps(conv), mix is not None, num_warps=4, **pdl(),
    )  # fmt: skip


def norm_linear(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write linear_reference of rms_norm(x) (R,K) to out (R,N) float32."""
    if len(x) == 1:
        row_linear(x, weight, out, norm=True)
        return
    x = F.rms_norm(x, (x.size(-1),), eps=2.0**-23)
    if x.dtype == torch.float32:
        torch.mm(x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, torch.float32, out=out)


@triton.jit
def _prefetch(pointers, bytes):
    """Prefetch into the L2 cache a number of bytes, a multiple of 16, at each pointer."""
    addresses = pointers.to(tl.int64)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [addresses, (addresses * 0 + bytes).to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_line(pointers, PDL: tl.constexpr):
    """Prefetch into the L2 cache the line of each pointer, if the code after it will wait."""
    if PDL:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _product(x_ptr, w_rows, r, R, begin, END: tl.constexpr, K: tl.constexpr, n, BLOCK_K: tl.constexpr):
    """Return x W^T for rows r of x and the given rows of W, over END columns from begin."""
    y = tl.zeros((r.shape[0], n.shape[0]), tl.float32)
    for k0 in range(0, END, BLOCK_K):
        k = begin + k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + r[:, None] * K + k[None, :], mask=r[:, None] < R, other=0.0)
        y = tl.dot(x, tl.trans(tl.load(w_rows + k[None, :])), y, input_precision="ieee")
    return y


@triton.jit
def _batch_linear_relu2(
    x_ptr,
    w_ptr,
    y_ptr,
    scale_ptr,
    R,
    N,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_N >= N:  # the extra program, which computes scale
        wait(PDL)
        squares = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            at = r[:, None] * K + k0 + tl.arange(0, BLOCK_K)[None, :]
            x = tl.load(x_ptr + at, mask=r[:, None] < R, other=0.0).to(tl.float32)
            squares += x * x
        tl.store(scale_ptr + r, tl.rsqrt(tl.sum(squares, 1) / K + 2.0**-23), mask=r < R)
    else:
        w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
        if PDL:
            parts = w_rows + (K // 4) * tl.arange(0, 4)[None, :]
            _prefetch(parts, K // 4 * w_ptr.dtype.element_ty.primitive_bitwidth // 8)
        wait(PDL)
        y = tl.maximum(_product(x_ptr, w_rows, r, R, 0, K, K, n, BLOCK_K), 0.0)
        tl.store(y_ptr + r[:, None] * N + n[None, :], y * y, mask=(r[:, None] < R) & (n[None, :] < N))


def batch_linear_relu2(x: Tensor, weight: Tensor, out: Tensor, scale: Tensor) -> None:
    """Write relu(x W^T)^2 to out (R,N), and 1 / rms(x) to scale (R,) float32, for R <= MAX_ROWS."""
    (R, K), N = x.shape, weight.size(0)
    block_n = 64
    _batch_linear_relu2[(triton.cdiv(N, block_n) + 1,)](
        x, weight, out, scale, R, N, K, _rows(R), block_n, _block_k(x, K), num_warps=4, num_stages=6, **pdl()
    )


@triton.jit
def _batch_linear_add(
    x_ptr,
    w_ptr,
    y_ptr,
    scale_ptr,
    partial_ptr,
    counter_ptr,
    slots_ptr,
    taps_ptr,
    windows_ptr,
    x0_ptr,
    scales_ptr,
    R,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
    TAPS: tl.constexpr,
    MIXED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    part: tl.constexpr = K // SPLITS
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        parts = w_rows + split * part + (part // 4) * tl.arange(0, 4)[None, :]
        _prefetch(parts, part // 4 * w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    inside = (r[:, None] < R) & (n[None, :] < N)
    at = r[:, None] * N + n[None, :]
    if TAPS:
        slot = tl.load(slots_ptr + r, mask=r < R, other=0).to(tl.int64)
        window = windows_ptr + (slot * (TAPS - 1) * N)[:, None] + n[None, :]
        past = load_rows(window, N, inside, TAPS - 1)
        taps = load_rows(taps_ptr + n[None, :], N, n[None, :] < N, TAPS)
    if MIXED:
        scale_x, scale_x0 = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    wait(PDL)
    if MIXED:
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0)
    before = tl.load(y_ptr + at, mask=inside, other=0.0)
    y = _product(x_ptr, w_rows, r, R, split * part, part, K, n, BLOCK_K)
    tl.store(partial_ptr + split * R * N + at, y, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr + block, 1, sem="acq_rel") == SPLITS - 1:
        # the last program to finish adds all partial sums in a fixed order: the result is deterministic
        y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for s in tl.static_range(SPLITS):
            y += tl.load(partial_ptr + s * R * N + at, mask=inside, other=0.0, cache_modifier=".cg")
        if SCALED:
            scale = tl.load(scale_ptr + r, mask=r < R, other=0.0)
            y *= (scale * scale)[:, None]
        if TAPS:
            u = y.to(y_ptr.dtype.element_ty)
            y = convolve(u, past, taps, TAPS)
            shift_window(window, u, past, N, inside, TAPS)
        y += before.to(tl.float32)
        if MIXED:
            y = scale_x * y + scale_x0 * x0.to(tl.float32)
        tl.store(y_ptr + at, y, mask=inside)
        tl.store(counter_ptr + block, 0)


def batch_linear_add(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    counters: Tensor,
    scale: Tensor | None = None,
    slots: Tensor | None = None,
    conv: Conv | None = None,
    mix: Mix | None = None,
) -> None:
    """Add x W^T, times scale (R,) squared if given, to out (R,N) in place, for R <= MAX_ROWS.

    With conv it is convolved before, each row with the state at its slots (R,) int32; with a mix, the sum is
    mixed. counters (COUNTERS,) int32 must be zero; the kernel sets them back to zero.
    """
    (R, K), N = x.shape, weight.size(0)
    splits, block_n = (8 if K > 2048 else 2), 32
    while K // splits % 32:
        splits //= 2
    block_k = _block_k(x, K // splits)
    partial = torch.empty(splits, R, N, device=x.device)
    taps, windows, _ = conv or (None, None, None)
    _batch_linear_add[(triton.cdiv(N, block_n), splits)](
        x, weight, out, scale, partial, counters, slots, taps, windows, *(mix or (None, None)), R, N, K,
        splits, _rows(R), block_n, block_k, scale is not None, n_taps(conv), mix is not None, num_warps=4,
        num_stages=5, **pdl(),
    )  # fmt: skip


def _rows(R: int) -> int:
    return max(16, triton.next_power_of_2(R))


def _block_k(x: Tensor, K: int) -> int:
    """Return the columns of a tile, a divisor of K: 256 bytes, so that six tiles fit into shared memory."""
    return min(256 // x.element_size(), K & -K)
