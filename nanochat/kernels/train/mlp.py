"""The MLP in training: relu^2 in the epilogue of a matrix product, of which only the result is saved.

    post = relu(h W1^T)^2;  y = post W2^T
    dpre = 2 (dy W2) sqrt(post);  dW2 = dy^T post;  dW1 = dpre^T h;  dh = dpre W1

relu(pre) is the root of post, so pre, the largest activation of a layer, is not saved (modded-nanogpt, Jordan
et al. 2024). With the rest in the epilogue of the product, the hidden layer goes to memory once forward and
once backward. cuBLAS computes the other products.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Tile(NamedTuple):
    """Tile sizes and launch settings of a matrix product."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int
    halves: bool = False  # store halves in turn: slower, but leaves shared memory for deeper prefetching


FORWARD, BACKWARD = Tile(128, 256, 64, 8, 3), Tile(128, 256, 32, 8, 4)
GROUP = 8  # row tiles computed together for each column of tiles, so that both stay in the cache


@triton.jit
def _finish(acc, m, n, post_desc, out_desc, scale_ptr, IS_BACKWARD: tl.constexpr, LIMIT: tl.constexpr):
    """Apply the epilogue to the part of the product at row m and column n, and store it."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr)
    if IS_BACKWARD:
        acc *= 2.0 * tl.sqrt(post_desc.load([m, n]).to(tl.float32))
    else:
        acc = tl.maximum(acc, 0.0)
        acc *= acc
    if LIMIT is not None:
        acc = tl.clamp(acc, -LIMIT, LIMIT)
    out_desc.store([m, n], acc.to(out_desc.dtype))


@triton.jit
def _linear_relu2(
    a_desc,
    b_desc,
    post_desc,
    out_desc,
    scale_ptr,
    M,
    N,
    K,
    PROGRAMS,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    HALVES: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BACKWARD: tl.constexpr,
    B_IS_KN: tl.constexpr,
    LIMIT: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        group = tile // (GROUP * tiles_n)
        height = min(tiles_m - group * GROUP, GROUP)
        m = (group * GROUP + tile % (GROUP * tiles_n) % height) * TILE_M
        n = tile % (GROUP * tiles_n) // height * TILE_N
        acc = tl.zeros((TILE_M, TILE_N), tl.float32)
        for k in range(0, K, TILE_K):
            a = a_desc.load([m, k])
            if B_IS_KN:
                acc = tl.dot(a, b_desc.load([k, n]), acc)
            else:
                acc = tl.dot(a, b_desc.load([n, k]).T, acc)
        if HALVES:
            halves = tl.permute(tl.reshape(acc, (TILE_M, 2, TILE_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _finish(left, m, n, post_desc, out_desc, scale_ptr, IS_BACKWARD, LIMIT)
            n += TILE_N // 2
            _finish(right, m, n, post_desc, out_desc, scale_ptr, IS_BACKWARD, LIMIT)
        else:
            _finish(acc, m, n, post_desc, out_desc, scale_ptr, IS_BACKWARD, LIMIT)


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def launch(
    a: Tensor, b: Tensor, out: Tensor, tile: Tile, *, post: Tensor | None = None, scale: Tensor | None = None
) -> None:
    """Write relu(a b^T)^2 to out (M,N), or with post (M,N) the gradient 2 (a b) sqrt(post); a (M,K).

    In 8 bits, as kernels/fp8.py says, the product is multiplied by scale, 0-D float32, and the result clipped
    to what out can hold; b is then (N,K) both ways.
    """
    (M, K), N = a.shape, out.size(1)
    b_is_kn = post is not None and scale is None
    tiles = triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    programs = min(tiles, _multiprocessors(a.device.index)) if a.is_cuda else tiles
    _linear_relu2[(programs,)](
        TensorDescriptor.from_tensor(a, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(b, [tile.k, tile.n] if b_is_kn else [tile.n, tile.k]),
        *(
            TensorDescriptor.from_tensor(t, [tile.m, tile.n // (1 + tile.halves)])
            for t in (out if post is None else post, out)
        ),
        scale, M, N, K, programs, tile.m, tile.n, tile.k, tile.halves, GROUP, post is not None, b_is_kn,
        None if scale is None else torch.finfo(out.dtype).max,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@torch.library.custom_op("nanochat::linear_relu2", mutates_args=())
def linear_relu2(h: Tensor, weight: Tensor) -> Tensor:
    """Return relu(h weight^T)^2 (M,N); h (M,K), weight (N,K) of one dtype, rows of a multiple of 16 bytes."""
    post = h.new_empty(len(h), len(weight))
    launch(h, weight, post, FORWARD)
    return post


@linear_relu2.register_fake
def _(h, weight):
    return h.new_empty(len(h), len(weight))


@torch.library.custom_op("nanochat::linear_relu2_backward", mutates_args=())
def linear_relu2_backward(dy: Tensor, weight: Tensor, post: Tensor) -> Tensor:
    """Return 2 (dy weight) sqrt(post) (M,N); dy (M,K), weight (K,N) and post (M,N) of one dtype."""
    dpre = torch.empty_like(post)
    launch(dy, weight, dpre, BACKWARD, post=post)
    return dpre


@linear_relu2_backward.register_fake
def _(dy, weight, post):
    return torch.empty_like(post)


def mlp(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """Return y (...,E) of h (...,E), w_fc (F,E) and w_proj (E,F), cast to the dtype of h."""
    return _MLP.apply(h.flatten(0, -2), w_fc.to(h.dtype), w_proj.to(h.dtype)).view_as(h)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        post = linear_relu2(h, w_fc)
        ctx.save_for_backward(h, post, w_fc, w_proj)
        return post @ w_proj.T

    @staticmethod
    def backward(ctx, dy: Tensor):
        h, post, w_fc, w_proj = ctx.saved_tensors
        dpre = linear_relu2_backward(dy.contiguous(), w_proj, post)
        return dpre @ w_fc, dpre.T @ h, dy.T @ post
