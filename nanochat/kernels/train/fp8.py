"""Matrix products in 8 bits: twice the rate of bfloat16 on Hopper, in the MLP and the output head.

A tensor is multiplied by a scale, rounded to float8 and divided by the scale after the product: e4m3 (3 bits
of mantissa, at most 448) for values, e5m2 (2 bits, at most 57,344) for gradients, whose range is wider
(Micikevicius et al. 2022). A float has the same precision at any scale within its range, so only weights and
the incoming gradient need their largest element. The other scales are constants:

    h      an rms_norm, so no element is over sqrt(E), 36 for E = 1,280
    post   relu^2 of sums of many terms: up to 1,792 it is not clipped
    dpre   2 (dy W2) sqrt(post): with dy's own scale, 56 times its largest element is not clipped
    dl     the gradient of a logit is a probability, less 1 at the target; up to 56 is not clipped

The tensor cores need both 8-bit operands with the summed dimension contiguous, so operands of two products
are also transposed. The gradient of the head's weight stays in bfloat16; so do the output products of mixers
and all gradients of their input products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.hardware import compiled
from nanochat.kernels.train.mlp import Tile, launch

FORWARD = BACKWARD = Tile(128, 256, 128, 8, 3, halves=True)
H_SCALE, POST_SCALE = 8.0, 0.25
LOGIT_GRADIENT_SCALE = 1024.0
WEIGHT_PEAK, GRADIENT_PEAK = 448.0, 1024.0  # scaled value of the largest element
BLOCK = 128  # rows and columns of a program that transposes


def narrow(x: Tensor, scale: float | Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return x * scale rounded to dtype, clipped to its range."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def peak_scale(x: Tensor, peak: float) -> Tensor:
    """Return the scale, 0-D float32, that maps the largest element of x to peak."""
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    return peak / largest.clamp(min=1e-12)


@triton.jit
def _transpose(x_ptr, out_ptr, M, N, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < N)
    x = tl.load(x_ptr + rows * N + columns, mask=inside)
    tl.store(out_ptr + columns.T * M + rows.T, x.T, mask=inside.T)


@torch.library.custom_op("nanochat::transpose", mutates_args=())
def transpose(x: Tensor) -> Tensor:
    """Return x (M,N), of 8 bits, transposed (N,M)."""
    M, N = x.shape
    out = x.new_empty(N, M)
    grid = triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK)
    # a separate pass: with the rounding in this kernel, ptxas 12.8 miscompiled some elements
    _transpose[grid](x.contiguous().view(torch.uint8), out.view(torch.uint8), M, N, BLOCK, num_warps=8)
    return out


@transpose.register_fake
def _(x):
    return x.new_empty(x.shape[::-1])


def product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    *,
    is_fast: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return a b^T / (a_scale b_scale) in dtype; a (M,K) and b (N,K) are float8, rows contiguous.

    The tensor cores sum with 14 bits; unless is_fast, every few terms go into a float32 sum.
    """
    return torch._scaled_mm(
        a, b.T, scale_a=1 / a_scale, scale_b=1 / b_scale, out_dtype=dtype, use_fast_accum=is_fast
    )


@torch.library.custom_op("nanochat::linear_relu2_fp8", mutates_args=())
def linear_relu2_fp8(h: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return relu(scale h weight^T)^2 (M,N) in e4m3; h (M,K) and weight (N,K) are e4m3, scale 0-D float32."""
    post = h.new_empty(len(h), len(weight))
    launch(h, weight, post, FORWARD, scale=scale)
    return post


@linear_relu2_fp8.register_fake
def _(h, weight, scale):
    return h.new_empty(len(h), len(weight))


@torch.library.custom_op("nanochat::linear_relu2_backward_fp8", mutates_args=())
def linear_relu2_backward_fp8(dy: Tensor, weight: Tensor, post: Tensor, scale: Tensor) -> Tensor:
    """Return 2 scale (dy weight^T) sqrt(post) (M,N) in e5m2.

    dy (M,K) is e5m2, weight (N,K) and post (M,N) are e4m3, scale is 0-D float32.
    """
    dpre = torch.empty_like(post, dtype=dy.dtype)
    launch(dy, weight, dpre, BACKWARD, post=post, scale=scale)
    return dpre


@linear_relu2_backward_fp8.register_fake
def _(dy, weight, post, scale):
    return torch.empty_like(post, dtype=dy.dtype)


def mlp(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """Return y (...,E) of h (...,E), an rms_norm in bfloat16, w_fc (F,E) and w_proj (E,F) of any dtype."""
    return _MLP.apply(h.flatten(0, -2), w_fc, w_proj).view_as(h)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        fc_scale, proj_scale = peak_scale(w_fc, WEIGHT_PEAK), peak_scale(w_proj, WEIGHT_PEAK)
        h_scale, post_scale = torch.full_like(fc_scale, H_SCALE), torch.full_like(fc_scale, POST_SCALE)
        h, fc, proj = narrow(h, h_scale), narrow(w_fc, fc_scale), narrow(w_proj, proj_scale)
        post = linear_relu2_fp8(h, fc, post_scale.sqrt() / (h_scale * fc_scale))
        transposed = map(transpose, (h, fc, proj))
        ctx.save_for_backward(post, *transposed, h_scale, post_scale, fc_scale, proj_scale)
        ctx.dtype = w_fc.dtype
        return product(post, proj, post_scale, proj_scale)

    @staticmethod
    def backward(ctx, dy: Tensor):
        post, h_t, fc_t, proj_t, h_scale, post_scale, fc_scale, proj_scale = ctx.saved_tensors
        scale = peak_scale(dy, GRADIENT_PEAK)
        dy = narrow(dy, scale, torch.float8_e5m2)
        dpre = linear_relu2_backward_fp8(dy, proj_t, post, 1 / (proj_scale * post_scale.sqrt()))
        dh = product(dpre, fc_t, scale, fc_scale)
        dw_fc = product(transpose(dpre), h_t, scale, h_scale, is_fast=False, dtype=ctx.dtype)
        dw_proj = product(transpose(dy), transpose(post), scale, post_scale, is_fast=False, dtype=ctx.dtype)
        return dh, dw_fc, dw_proj


def linear(h: Tensor, weight: Tensor) -> Tensor:
    """Return h weight^T (...,N) of h (...,K), an rms_norm, and weight (N,K), both bfloat16.

    Its gradients are products in bfloat16: converting them to 8 bits would cost more than it saves.
    """
    return _Linear.apply(h.flatten(0, -2), weight).view(*h.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        scale = peak_scale(weight, WEIGHT_PEAK)
        return product(narrow(h, H_SCALE), narrow(weight, scale), torch.full_like(scale, H_SCALE), scale)

    @staticmethod
    def backward(ctx, dy: Tensor):
        h, weight = ctx.saved_tensors
        return dy @ weight, dy.T @ h


class Head:
    """The output head, for chunks of rows of x (N,E), an rms_norm in bfloat16; weight (V,E) of any dtype."""

    def __init__(self, x: Tensor, weight: Tensor):
        self.scale = peak_scale(weight, WEIGHT_PEAK)
        self.weight = compiled(narrow)(weight, self.scale)
        self.weight_t = transpose(self.weight)
        self.x_scale = torch.full_like(self.scale, H_SCALE)
        self.x = compiled(narrow)(x, self.x_scale)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return logits (n,V) in bfloat16, and an uninitialised e5m2 tensor (n,V) for their gradient."""
        logits = product(self.x[rows], self.weight, self.x_scale, self.scale)
        return logits, torch.empty_like(logits, dtype=torch.float8_e5m2)

    def gradient(self, dlogits: Tensor) -> Tensor:
        """Return dx (n,E) in bfloat16 of dlogits (n,V) in e5m2, as cross_entropy_ leaves it."""
        scale = torch.full_like(self.scale, LOGIT_GRADIENT_SCALE)
        return product(dlogits, self.weight_t, scale, self.scale, is_fast=False)
