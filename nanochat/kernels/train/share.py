"""Share the embedding x0 among all layers in training, so that its gradient is summed once, by one kernel.

The join to layer i (join.py) computes s = rho_i (...) + lam_i x0, and its backward, with g the gradient of s,
writes dx_i = rho_i g for the stream. A lam_i g of its own would be one tensor more a layer, added to those of
the other layers. Instead each join returns dx_i also as the gradient of its share, and here

    dx0 = sum_i (lam_i / rho_i) dx_i

in float32 and in the order of the layers, each dx_i read once. bfloat16 has float32's exponents, so
dx_i / rho_i is as precise for a small rho_i. Below TINY nothing may be left to divide: dx0 is NaN then, and
training stops before its update (check_finite in nanochat/train/steps.py), as it did without shares: the
gradient of rho_i needs the same quotient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # elements and warps of a program
TINY = tl.constexpr(2.0**-40)  # of a scale of the stream; it starts near 1


@triton.jit
def _share_backward(dxs, rho_ptr, lam_ptr, dx0_ptr, SIZE, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(dxs)):
        rho = tl.load(rho_ptr + i)
        ratio = tl.load(lam_ptr + i) / tl.where(tl.abs(rho) < TINY, float("nan"), rho)
        total += ratio * tl.load(dxs[i] + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(dx0_ptr + at, total, mask=at < SIZE)


@torch.library.custom_op("nanochat::share_backward", mutates_args=())
def share_backward(dxs: Sequence[Tensor], rho: Tensor, lam: Tensor) -> Tensor:
    """Return the gradient of x0, shape and dtype of each of dxs, contiguous; rho and lam (n,) float32."""
    dx0 = torch.empty_like(dxs[0])
    grid = (triton.cdiv(dx0.numel(), BLOCK),)
    _share_backward[grid](tuple(dxs), rho, lam, dx0, dx0.numel(), BLOCK, num_warps=WARPS)
    return dx0


@share_backward.register_fake
def _(dxs, rho, lam):
    return torch.empty_like(dxs[0])


def share(x0: Tensor, rho: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    """Return x0 (B,T,E) for each layer; rho and lam (n,) float32 are the layers' scales.

    Share i is for the join with rho[i] and lam[i], and for nothing else: the gradient that it gets is dx_i.
    """
    return _Share.apply(x0, rho, lam)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x0, rho, lam):
        ctx.save_for_backward(rho, lam)
        return tuple(x0.detach() for _ in range(rho.numel()))

    @staticmethod
    def backward(ctx, *dxs):
        return share_backward([dx.contiguous() for dx in dxs], *ctx.saved_tensors), None, None
