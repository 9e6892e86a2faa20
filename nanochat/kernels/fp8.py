"""Matrix products in 8 bits: twice the rate of bfloat16 on Hopper, for forwards and for gradients of inputs.

A tensor is multiplied by a scale, rounded to float8 and divided by the scale after the product: e4m3 (3 bits
of mantissa, at most 448) for values, e5m2 (2 bits, at most 57,344) for gradients, whose range is wider
(Micikevicius et al. 2022). A float is as precise at any scale, as long as it is in range, so only weights and
the gradient that comes in need their largest element found. The other scales are constants:

    h      an rms_norm, so no element is over sqrt(E), 36 for E = 1,280
    post   relu^2 of sums of many terms: up to 1,792 it is not clipped
    dpre   2 (dy W2) sqrt(post): with dy's own scale, 56 times its largest element is not clipped
    dl     the gradient of a logit is a probability, less 1 at the target; up to 56 is not clipped

Gradients of weights, sums over all tokens, stay in bfloat16; so do the products that leave a mixer and the
gradients of those that enter it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.accelerate import compiled
from nanochat.kernels.mlp import Tile, launch

FORWARD = BACKWARD = Tile(128, 256, 128, 8, 3, halves=True)
H_SCALE, POST_SCALE = 8.0, 0.25
LOGIT_GRADIENT_SCALE = 1024.0
WEIGHT_PEAK, GRADIENT_PEAK = 448.0, 1024.0  # where the largest element is brought to
BLOCK = 64  # rows and columns of a weight that a program turns over


def narrow(x: Tensor, scale: float | Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return x * scale rounded to dtype, clipped to its range."""
    limit = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-limit, limit).to(dtype)


def peak_scale(x: Tensor, peak: float) -> Tensor:
    """Return the scale, 0-D float32, that brings the largest element of x to peak."""
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    return peak / largest.clamp(min=1e-12)


@triton.jit
def _narrow_weight(x_ptr, scale_ptr, out_ptr, transposed_ptr, M, N, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < M) & (columns < N)
    x = tl.load(x_ptr + rows * N + columns, mask=inside).to(tl.float32) * tl.load(scale_ptr)
    x = tl.clamp(x, -LIMIT, LIMIT).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * N + columns, x, mask=inside)
    tl.store(transposed_ptr + columns.T * M + rows.T, x.T, mask=inside.T)


@torch.library.custom_op("nanochat::narrow_weight", mutates_args=())
def narrow_weight(
    weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Return weight (M,N) as narrow does, and transposed (N,M): operands of a product must lie in rows."""
    M, N = weight.shape
    out, transposed = (weight.new_empty(shape, dtype=dtype) for shape in ((M, N), (N, M)))
    grid = triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK)
    _narrow_weight[grid](
        weight.contiguous(), scale, out, transposed, M, N, torch.finfo(dtype).max, BLOCK, num_warps=4
    )
    return out, transposed


@narrow_weight.register_fake
def _(weight, scale, dtype=torch.float8_e4m3fn):
    M, N = weight.shape
    return weight.new_empty(M, N, dtype=dtype), weight.new_empty(N, M, dtype=dtype)


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, is_fast: bool = True) -> Tensor:
    """Return a b^T / (a_scale b_scale) in bfloat16; a (M,K) and b (N,K) are float8, rows contiguous.

    The tensor cores sum with 14 bits; unless is_fast, these sums are added up in float32 every few terms.
    """
    return torch._scaled_mm(
        a, b.T, scale_a=1 / a_scale, scale_b=1 / b_scale, out_dtype=torch.bfloat16, use_fast_accum=is_fast
    )


@torch.library.custom_op("nanochat::linear_relu2_fp8", mutates_args=())
def linear_relu2_fp8(h: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return post = relu(scales[0] h weight^T)^2 (M,N) twice.

    In bfloat16 times scales[1], and in e4m3 times scales[2]; h (M,K) and weight (N,K) are e4m3.
    """
    post = h.new_empty(len(h), len(weight), dtype=torch.bfloat16)
    post8 = torch.empty_like(post, dtype=torch.float8_e4m3fn)
    launch(h, weight, post, FORWARD, narrow=post8, scales=scales)
    return post, post8


@linear_relu2_fp8.register_fake
def _(h, weight, scales):
    post = h.new_empty(len(h), len(weight), dtype=torch.bfloat16)
    return post, torch.empty_like(post, dtype=torch.float8_e4m3fn)


@torch.library.custom_op("nanochat::linear_relu2_backward_fp8", mutates_args=())
def linear_relu2_backward_fp8(
    dy: Tensor, weight: Tensor, post: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dpre = 2 scales[0] (dy weight^T) sqrt(post) (M,N), as linear_relu2_fp8 does, but in e5m2.

    dy (M,K) is e5m2, weight (N,K) e4m3, post (M,N) bfloat16.
    """
    dpre, dpre8 = torch.empty_like(post), torch.empty_like(post, dtype=torch.float8_e5m2)
    launch(dy, weight, dpre, BACKWARD, post=post, narrow=dpre8, scales=scales)
    return dpre, dpre8


@linear_relu2_backward_fp8.register_fake
def _(dy, weight, post, scales):
    return torch.empty_like(post), torch.empty_like(post, dtype=torch.float8_e5m2)


def mlp(h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
    """Return y (...,E) of h (...,E), an rms_norm in bfloat16, w_fc (F,E) and w_proj (E,F) of any dtype."""
    return _MLP.apply(h.flatten(0, -2), w_fc, w_proj).view_as(h)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, w_fc: Tensor, w_proj: Tensor) -> Tensor:
        fc_scale, proj_scale = peak_scale(w_fc, WEIGHT_PEAK), peak_scale(w_proj, WEIGHT_PEAK)
        (fc8, fc8_t), (proj8, proj8_t) = narrow_weight(w_fc, fc_scale), narrow_weight(w_proj, proj_scale)
        one = torch.ones_like(fc_scale)
        scales = torch.stack([1 / (H_SCALE * fc_scale), one, POST_SCALE * one])
        post, post8 = linear_relu2_fp8(narrow(h, H_SCALE), fc8, scales)
        ctx.save_for_backward(h, post, fc8_t, proj8_t, fc_scale, proj_scale)
        ctx.dtype = w_fc.dtype
        return product(post8, proj8, scales[2], proj_scale)

    @staticmethod
    def backward(ctx, dy: Tensor):
        h, post, fc8_t, proj8_t, fc_scale, proj_scale = ctx.saved_tensors
        dy_scale = peak_scale(dy, GRADIENT_PEAK)
        dy8 = narrow(dy, dy_scale, torch.float8_e5m2)
        scales = torch.stack([1 / proj_scale, 1 / dy_scale, torch.ones_like(dy_scale)])
        dpre, dpre8 = linear_relu2_backward_fp8(dy8, proj8_t, post, scales)
        dh = product(dpre8, fc8_t, dy_scale, fc_scale)
        return dh, (dpre.T @ h).to(ctx.dtype), (dy.T @ post).to(ctx.dtype)


def linear(h: Tensor, weight: Tensor) -> Tensor:
    """Return h weight^T (...,N) of h (...,K), an rms_norm, and weight (N,K), both bfloat16.

    Its gradients are products in bfloat16: to bring them to 8 bits would cost more than it spares.
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
        self.weight, self.weight_t = narrow_weight(weight, self.scale)
        self.x_scale = torch.full_like(self.scale, H_SCALE)
        self.x = compiled(narrow)(x, self.x_scale)

    def logits(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return logits (n,V) in bfloat16, and memory (n,V) for their gradient in e5m2."""
        logits = product(self.x[rows], self.weight, self.x_scale, self.scale)
        return logits, torch.empty_like(logits, dtype=torch.float8_e5m2)

    def gradient(self, dlogits: Tensor) -> Tensor:
        """Return dx (n,E) in bfloat16 of dlogits (n,V) in e5m2, as cross_entropy_ leaves it."""
        scale = torch.full_like(self.scale, LOGIT_GRADIENT_SCALE)
        return product(dlogits, self.weight_t, scale, self.scale, is_fast=False)
