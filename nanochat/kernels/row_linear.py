"""y = f(norm(x) W^T) for a few rows x, as fast as W can be read.

Decoding reads every weight for each token and does next to nothing with it, so what counts is that the memory
bus never rests. A program holds its rows of W in registers before it waits for x (nanochat/kernels/launch.py).
RMSNorm has no weights and commutes with the product, norm(x) W^T = (x W^T) / rms(x), so it costs nothing here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.launch import pdl, release, wait

ELEMENTS = 10240  # weights a program holds, 80 a thread


def row_linear_reference(x: Tensor, weight: Tensor, *, norm=False, relu2=False, residual=None) -> Tensor:
    """y (B,N) of x (B,K), weight (N,K): rms_norm on x first, relu^2 or adding a residual (B,N) last."""
    if norm:
        x = torch.nn.functional.rms_norm(x, (x.size(-1),), eps=2.0**-23)
    y = x @ weight.T
    y = torch.relu(y).square() if relu2 else y
    return y if residual is None else residual + y


@triton.jit
def _row_linear(
    x_ptr,
    w_ptr,
    y_ptr,
    N,
    B: tl.constexpr,
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
    totals, squares = (), ()
    for _ in tl.static_range(B):
        totals += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
        squares += (tl.zeros((BLOCK_K,), tl.float32),)
    for i in tl.static_range(K // BLOCK_K):
        w = held[i].to(tl.float32)
        new_totals, new_squares = (), ()
        for b in tl.static_range(B):
            x = tl.load(x_ptr + b * K + i * BLOCK_K + k).to(tl.float32)
            new_totals += (totals[b] + w * x[None, :],)
            new_squares += (squares[b] + x * x,)
        totals, squares = new_totals, new_squares
    for b in tl.static_range(B):
        y = tl.sum(totals[b], 1)
        if NORM:
            y *= tl.rsqrt(tl.sum(squares[b], 0) / K + 2.0**-23)
        if RELU2:
            y = tl.maximum(y, 0.0)
            y *= y
        out = y_ptr + b * N + n
        if ADD:
            y += tl.load(out, mask=n < N).to(tl.float32)
        tl.store(out, y, mask=n < N)


def row_linear(x: Tensor, weight: Tensor, out: Tensor, *, norm=False, relu2=False, add=False) -> None:
    """Write y (row_linear_reference) to out (B,N), or add it to what is there; all contiguous."""
    (B, K), N = x.shape, weight.size(0)
    block_k = min(1024, K & -K)
    block_n = max(1, triton.next_power_of_2(ELEMENTS // K + 1) // 2)
    _row_linear[(triton.cdiv(N, block_n),)](
        x, weight, out, N, B, K, block_n, block_k, norm, relu2, add, num_warps=4, **pdl()
    )
