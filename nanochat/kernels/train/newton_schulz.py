"""Newton-Schulz iteration of nanochat/optim/updates.py with half the work for symmetric products.

With R = X X^T a step is X <- Q X, Q = a I + b R + c R^2. R and Q are symmetric: only their tiles on and below
the diagonal are computed, and each is stored a second time, transposed. a I is part of Q, so that cuBLAS's
product with X has no addend, which it would copy first. If the long side of X is at least twice the short
one, updating X in every step is wasteful. Polynomials in R commute, so

    R <- R Q Q                     short side squared; symmetric, as is the product of all Q
    X <- Q_3 Q_2 Q_1 X             once for three steps

An error in a small eigenvalue of R, which may make it negative, grows by a factor of a^2 per step. So R is
recomputed from X after three steps, and the polynomials in R are in float16, which has 3 more mantissa bits
than bfloat16. The result is then closer to float32 than a computation entirely in bfloat16 (dev/LOG.md,
2026-11-24).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanochat.kernels.train.mlp import Tile
from nanochat.optim.updates import NEWTON_SCHULZ_COEFFICIENTS, NEWTON_SCHULZ_STEPS

TILE = Tile(128, 128, 64, 8, 3)  # two fit on a multiprocessor: one computes while the other stores


@triton.jit
def _symmetric_product(
    a_desc,
    b_desc,
    addend_desc,
    out_desc,
    scale_ptr,
    alpha,
    beta,
    gamma,
    M,
    K,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
    IS_TALL: tl.constexpr,
):
    # tiles of the lower triangle, numbered row by row: 0 | 1 2 | 3 4 5 | ...
    tile, n = tl.program_id(0), tl.program_id(1)
    row = ((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    i, j = row * TILE, (tile - row * (row + 1) // 2) * TILE
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in range(0, K, TILE_K):
        if IS_TALL:
            acc = tl.dot(a_desc.load([n * K + k, i]).T, b_desc.load([n * K + k, j]), acc)
        else:
            acc = tl.dot(a_desc.load([n * M + i, k]), b_desc.load([n * M + j, k]).T, acc)
    acc *= alpha
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + n)
    if addend_desc is not None:
        acc += beta * addend_desc.load([n * M + i, j]).to(tl.float32)
    rows, cols = i + tl.arange(0, TILE)[:, None], j + tl.arange(0, TILE)[None, :]
    out = (acc + tl.where(rows == cols, gamma, 0.0)).to(out_desc.dtype)
    if i == j:  # rounding may have made the tile asymmetric
        out_desc.store([n * M + i, j], (out + out.T) * 0.5)
    else:
        out_desc.store([n * M + i, j], out)
        out_desc.store([n * M + j, i], out.T)


@torch.library.custom_op("nanochat::symmetric_product", mutates_args=())
def symmetric_product(
    a: Tensor,
    b: Tensor,
    dtype: torch.dtype,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
) -> Tensor:
    """Return scale alpha a b^T + beta a + gamma I (n,m,m) in dtype, for a result that is symmetric.

    Tiles above the diagonal are copies of those below. a and b (n,m,k) have one dtype, are contiguous, and
    satisfy `fits`; tall ones, k < m, give a^T b (n,k,k). scale is (n,) float32. beta needs a square a.
    """
    (n, rows, cols), is_tall = a.shape, a.size(1) > a.size(2)
    M, K = (cols, rows) if is_tall else (rows, cols)
    out = a.new_empty(n, M, M, dtype=dtype)
    tiles = M // TILE.m
    block = [TILE.k, TILE.m] if is_tall else [TILE.m, TILE.k]
    _symmetric_product[(tiles * (tiles + 1) // 2, n)](
        TensorDescriptor.from_tensor(a.flatten(0, 1), block),
        TensorDescriptor.from_tensor(b.flatten(0, 1), block),
        TensorDescriptor.from_tensor(a.flatten(0, 1), [TILE.m, TILE.m]) if beta else None,
        TensorDescriptor.from_tensor(out.flatten(0, 1), [TILE.m, TILE.m]),
        scale, alpha, beta, gamma, M, K, TILE.m, TILE.k, is_tall,
        num_warps=TILE.num_warps, num_stages=TILE.num_stages,
    )  # fmt: skip
    return out


@symmetric_product.register_fake
def _(a, b, dtype, scale=None, alpha=1.0, beta=0.0, gamma=0.0):
    M = min(a.shape[1:])
    return a.new_empty(a.size(0), M, M, dtype=dtype)


def fits(rows: int, cols: int) -> bool:
    """Return True if whole tiles cover the matrix: a partial tile would overlap the next one in the stack."""
    return min(rows, cols) % TILE.m == 0 and max(rows, cols) % TILE.k == 0


def iterate(X: Tensor, norm: Tensor) -> Tensor:
    """Return norm times the nearest orthogonal matrix of each X (n,rows,cols), contiguous, satisfying `fits`.

    norm (n,) float32 is the Frobenius norm of X. If X is bfloat16, polynomials in X X^T are float16.
    """
    rows, cols = X.shape[1:]
    small = torch.float16 if X.dtype == torch.bfloat16 else X.dtype
    is_long = max(rows, cols) >= 2 * min(rows, cols)
    for n_steps in (3, 2) if is_long else (1,) * NEWTON_SCHULZ_STEPS:
        Q = factor(symmetric_product(X, X, small, norm**-2), n_steps, X.dtype)
        X = X @ Q if rows > cols else Q @ X
    return X


def factor(R: Tensor, n_steps: int, dtype: torch.dtype) -> Tensor:
    """Return in dtype the factor (n,m,m) by which n_steps iterations multiply X, for R = X X^T (n,m,m)."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    Q = symmetric_product(R, R, dtype if n_steps == 1 else R.dtype, alpha=c, beta=b, gamma=a)
    if n_steps == 1:
        return Q
    R = symmetric_product(symmetric_product(R, Q, R.dtype), Q, R.dtype)
    return symmetric_product(factor(R, n_steps - 1, R.dtype), Q, dtype)
