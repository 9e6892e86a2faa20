"""y = f(norm(x) W^T) for up to 128 rows x, as fast as W can be read.

Decoding reads every weight for each token and does next to nothing with it, so what counts is that the memory
bus never rests: a program asks for its rows of W before it waits for x (nanochat/kernels/launch.py). For one row
they are held in registers, a matrix-vector product; for more the tensor cores multiply what the L2 cache was asked
to fetch. RMSNorm has no weights and commutes with the product, norm(x) W^T = (x W^T) / rms(x), so it costs nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.launch import pdl, release, wait

ELEMENTS = 10240  # weights that a program for one row holds, 80 a thread
PROGRAMS = 132  # as many as there are multiprocessors, at least, for more rows
MAX_ROWS = 128
COUNTERS = 8192


def linear_reference(x: Tensor, weight: Tensor, *, norm=False, relu2=False, residual=None) -> Tensor:
    """y (R,N) of x (R,K), weight (N,K): rms_norm on x first, relu^2 or adding a residual (R,N) last."""
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
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    RELU2: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    held = ()
    for i in tl.static_range(K // BLOCK_K):
        held += (tl.load(rows + i * BLOCK_K, mask=n[:, None] < N, other=0.0),)
    wait(PDL)
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
    if ADD:
        y += tl.load(y_ptr + n, mask=n < N).to(tl.float32)
    tl.store(y_ptr + n, y, mask=n < N)


@triton.jit
def _prefetch(pointers, bytes):
    """Ask the L2 cache for some bytes, a multiple of 16, at each pointer."""
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
def _batch_linear(
    x_ptr,
    w_ptr,
    y_ptr,
    partial_ptr,
    counter_ptr,
    R,
    N,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    RELU2: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    begin = split * (K // SPLITS)
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        part: tl.constexpr = K // SPLITS // 4
        parts = w_rows + begin + part * tl.arange(0, 4)[None, :]
        _prefetch(parts, part * w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    wait(PDL)
    y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for k0 in range(begin, begin + K // SPLITS, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + r[:, None] * K + k[None, :], mask=r[:, None] < R, other=0.0)
        w = tl.load(w_rows + k[None, :])
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
        if NORM:
            squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    inside = (r[:, None] < R) & (n[None, :] < N)
    at = r.to(tl.int64)[:, None] * N + n[None, :]
    is_last = True
    if SPLITS > 1:  # whoever comes last adds up what all have left, in their order: the same sum every time
        tl.store(partial_ptr + split * R * N + at, y, mask=inside)
        tl.debug_barrier()
        is_last = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            y = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
            for s in range(SPLITS):
                y += tl.load(partial_ptr + s * R * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter_ptr + block, 0)
    if is_last:
        if NORM:
            y *= tl.rsqrt(squares / K + 2.0**-23)[:, None]
        if RELU2:
            y = tl.maximum(y, 0.0)
            y *= y
        if ADD:
            y += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y, mask=inside)


def linear(
    x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, *, norm=False, relu2=False, add=False
) -> None:
    """Write y (linear_reference) to out (R,N), or add it to what is there; all contiguous, R <= MAX_ROWS.

    counters are COUNTERS int32 zeros, and are so again afterwards; kernels that run at once must not share them.
    """
    (R, K), N = x.shape, weight.size(0)
    if R == 1:
        block_k = min(1024, K & -K)
        block_n = max(1, triton.next_power_of_2(ELEMENTS // K + 1) // 2)
        _row_linear[(triton.cdiv(N, block_n),)](
            x, weight, out, N, K, block_n, block_k, norm, relu2, add, num_warps=4, **pdl()
        )
        return
    block_n = 64 if N >= 64 * 4 * PROGRAMS else 32 if N >= 32 * PROGRAMS else 16
    splits = 1
    while not norm and triton.cdiv(N, block_n) * splits < PROGRAMS and K // splits % 256 == 0:
        splits *= 2
    block_k = min(128, (K // splits) & -(K // splits))
    partial = torch.empty((splits, R, N) if splits > 1 else 0, device=x.device)
    _batch_linear[(triton.cdiv(N, block_n), splits)](
        x, weight, out, partial, counters, R, N, K, splits, max(16, triton.next_power_of_2(R)), block_n, block_k,
        norm, relu2, add, num_warps=4, num_stages=4, **pdl(),
    )  # fmt: skip
