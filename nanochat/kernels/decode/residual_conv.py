"""The convolutions y = u + conv(u) of the second generation, for decoding.

The state of a convolution of K > 1 taps is a window (slots, K-1, C): the last K-1 values of u in each slot,
oldest first, in the dtype of activations; nanochat/layers.py has the plain version. Where a sequence has one
new token, the kernel that computes u also convolves it and shifts the window, by the functions below. Window
and taps do not depend on the kernels before it, so they are loaded before `wait` (launch.py). For several
tokens `residual_conv_rows` is a pass of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait
from nanochat.layers import residual_conv


class Conv(NamedTuple):
    """A convolution and its state."""

    taps: Tensor  # (K,C) float32, K > 1, the current token's last
    windows: Tensor  # (slots,K-1,C)
    tails: Tensor | None = None  # (S,K-1,C): the next windows, where sequences have several new tokens


class Mix(NamedTuple):
    """What a layer does to the residual stream x first: scales[0] x + scales[1] x0."""

    x0: Tensor  # (R,E)
    scales: Tensor  # (2,) float32


def residual_conv_reference(u: Tensor, taps: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Return u + conv(u) (T,C) and the next window (K-1,C) of one sequence u (T,C)."""
    window = window[None].clone()
    return residual_conv(u[None], taps.T[:, None], window)[0], window[0]


@triton.jit
def load_rows(pointers, stride, mask, N: tl.constexpr):
    """Return N rows of some channels: the K-1 of a window, or K taps."""
    rows = ()
    for i in tl.static_range(N):
        rows += (tl.load(pointers + i * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def convolve(u, past, taps, TAPS: tl.constexpr):
    """Return u + conv(u) in float32."""
    y = u.to(tl.float32)
    y += y * taps[TAPS - 1]
    for w in tl.static_range(TAPS - 1):
        y += past[w].to(tl.float32) * taps[w]
    return y


@triton.jit
def shift_window(window, u, past, stride, mask, TAPS: tl.constexpr):
    """Store the last K-1 values of [past, u]."""
    tl.debug_barrier()  # threads may share channels: all must have read the window before one writes it
    for w in tl.static_range(TAPS - 2):
        tl.store(window + w * stride, past[w + 1], mask=mask)
    tl.store(window + (TAPS - 2) * stride, u, mask=mask)


@triton.jit
def _residual_conv_rows(
    u_ptr,
    out_ptr,
    slots_ptr,
    counts_ptr,
    taps_ptr,
    windows_ptr,
    tails_ptr,
    x0_ptr,
    scales_ptr,
    T,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    ADD: tl.constexpr,
    MIXED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    sequence, t = row // T, row % T
    c = tl.arange(0, BLOCK)
    inside = c < C
    if TAPS:
        slot = tl.load(slots_ptr + sequence).to(tl.int64)
        window = windows_ptr + slot * (TAPS - 1) * C + c
        taps = load_rows(taps_ptr + c, C, inside, TAPS)
    wait(PDL)
    u = tl.load(u_ptr + row * C + c, mask=inside, other=0.0)
    y = u.to(tl.float32)
    if TAPS:
        past = ()
        for j in tl.static_range(TAPS - 1, 0, -1):  # oldest first
            new = tl.load(u_ptr + (row - j) * C + c, mask=inside & (t >= j), other=0.0)
            old = tl.load(window + (TAPS - 1 + t - j) * C, mask=inside & (t < j), other=0.0)
            past += (tl.where(t >= j, new, old),)
        y = convolve(u, past, taps, TAPS)
        if t == tl.load(counts_ptr + sequence) - 1:
            tail = window if IS_SINGLE else tails_ptr + sequence * (TAPS - 1) * C + c
            shift_window(tail, u, past, C, inside, TAPS)
    out = out_ptr + row * C + c
    if ADD:
        y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    if MIXED:
        x0 = tl.load(x0_ptr + row * C + c, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(scales_ptr) * y + tl.load(scales_ptr + 1) * x0
    tl.store(out, y, mask=inside)


def residual_conv_rows(
    u: Tensor,
    out: Tensor,
    slots: Tensor,
    counts: Tensor,
    conv: Conv | None,
    mix: Mix | None = None,
    add: bool = False,
) -> None:
    """Write u + conv(u), of u (R,C), to out (R,C), or add it to out; then mix out. conv None: u alone.

    The rows are R/S tokens of each of S sequences. slots (S,) int32 is the slot of each sequence, counts (S,)
    int32 its number of tokens before padding. With one token a sequence the next windows are written to
    conv.windows[slots]; with more, to conv.tails, since the program of the last token may finish before that
    of the first has read the window.
    """
    (R, C), T = u.shape, len(u) // len(slots)
    taps, windows, tails = conv or (None, None, None)
    _residual_conv_rows[(R,)](
        u, out, slots, counts, taps, windows, tails, *(mix or (None, None)), T, C, n_taps(conv),
        triton.next_power_of_2(C), T == 1, add, mix is not None, num_warps=8, **pdl(),
    )  # fmt: skip


def n_taps(conv: Conv | None) -> int:
    """Return the number of taps, 0 without a convolution."""
    return 0 if conv is None else len(conv.taps)
