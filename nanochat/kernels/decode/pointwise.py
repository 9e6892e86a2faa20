"""Pointwise operations between matrix products: embedding, and relu^2 with a deferred RMSNorm."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait
from nanochat.kernels.decode.residual_conv import Mix


@triton.jit
def _embed(
    tokens_ptr,
    wte_ptr,
    slots_ptr,
    counts_ptr,
    latest_ptr,
    seen_ptr,
    x_ptr,
    x0_ptr,
    scales_ptr,
    T,
    V,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    MIXED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    wait(PDL)
    slot = tl.load(slots_ptr + row // T).to(tl.int64)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    token = tl.where(token < 0, tl.load(latest_ptr + slot), token)
    x = tl.load(wte_ptr + token * E + c, mask=c < E, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / E + 2.0**-23)
    at = row.to(tl.int64) * E + c
    if MIXED:
        x0 = x.to(x0_ptr.dtype.element_ty)
        tl.store(x0_ptr + at, x0, mask=c < E)
        x = tl.load(scales_ptr) * x0.to(tl.float32) + tl.load(scales_ptr + 1) * x0.to(tl.float32)
    tl.store(x_ptr + at, x, mask=c < E)
    is_real = row % T < tl.load(counts_ptr + row // T)
    tl.store(seen_ptr + slot * V + token, 1, mask=is_real)


def embed(
    tokens: Tensor,
    wte: Tensor,
    slots: Tensor,
    counts: Tensor,
    latest: Tensor,
    seen: Tensor,
    x: Tensor,
    mix: Mix | None = None,
) -> None:
    """Write rms_norm(wte[tokens]) to x (R,E), and mark the tokens in seen (slots,V) uint8.

    With a mix, write it to mix.x0, and to x what the first layer mixes of a stream that equals it.

    tokens (R,) holds R/S tokens of each of S sequences; a negative one means latest[slot]. slots (S,) is
    the slot of each sequence, counts (S,) its number of tokens without padding, latest (slots,) the token
    sampled last in each slot. All of these are int32.
    """
    (R, E), V = x.shape, wte.size(0)
    _embed[(R,)](
        tokens, wte, slots, counts, latest, seen, x, *(mix or (None, None)), R // len(slots), V, E,
        triton.next_power_of_2(E), mix is not None, num_warps=4, **pdl(),
    )  # fmt: skip


@triton.jit
def _norm_relu2(h_ptr, x_ptr, N: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    wait(PDL)
    x = tl.load(x_ptr + row * E + c, mask=c < E, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / E + 2.0**-23)
    for i in tl.static_range((N + BLOCK - 1) // BLOCK):
        at = h_ptr + row * N + i * BLOCK + c
        h = tl.load(at, mask=i * BLOCK + c < N, other=0.0).to(tl.float32)
        h = tl.maximum(h * scale, 0.0)
        tl.store(at, h * h, mask=i * BLOCK + c < N)


def norm_relu2(h: Tensor, x: Tensor) -> None:
    """Replace h (R,N) = x W^T in place by relu(rms_norm(x) W^T)^2, for x (R,E)."""
    (R, E), N = x.shape, h.size(1)
    _norm_relu2[(R,)](h, x, N, E, triton.next_power_of_2(E), num_warps=8, **pdl())
