"""SLC2 for decoding: everything between the residual stream and c_proj (nanochat/slc2.py).

The packed weight holds the rows of x_proj (E), B_proj (E), A_proj (D) and alpha_proj (H), in this order;
rows after these are ignored. The conv state of a sequence is the last K-1 values of u, oldest first, at
its slot in windows (slots, K-1, E).

For one token of one sequence, `slc2_row` is a single kernel limited by reading the weights: a program
computes a few channels of one head from start to end, so the state needs no second kernel. A is shared by
the heads; every head reads its rows again, but from the cache. For more tokens the projections are a
separate matrix product, and `slc2_mix` does the rest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait
from nanochat.layers import short_conv
from nanochat.slc2 import gate

CHANNELS = 4  # channels per program of slc2_row


def slc2_mix_reference(
    packed: Tensor, x: Tensor, conv: Tensor, window: Tensor, n_head: int
) -> tuple[Tensor, Tensor]:
    """Return y (T,E) and the next window (K-1,E) of one sequence.

    packed (T, >= 2E+D+H) = x W^T is not yet divided by rms(x); x is (T,E), conv (E,1,K), window (K-1,E).
    """
    E = x.size(1)
    packed = packed * torch.rsqrt(x.square().mean(1, keepdim=True) + 2.0**-23)
    p, b, a, alpha = packed[:, : 2 * E + E // n_head + n_head].split([E, E, E // n_head, n_head], dim=1)
    window = window[None].clone()
    z = short_conv(gate(p, alpha, a)[None], conv, window)
    return b * F.silu(z[0]), window[0]


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _slc2_row(
    x_ptr,
    w_ptr,
    conv_ptr,
    windows_ptr,
    slots_ptr,
    y_ptr,
    E: tl.constexpr,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    head = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = head * D + d
    k = tl.arange(0, BLOCK_K)
    x_rows = w_ptr + c[:, None] * E + k[None, :]
    a_rows = w_ptr + (2 * E + d)[:, None] * E + k[None, :]
    alpha_row = w_ptr + (2 * E + D + head) * E + k
    wx, wb, wa, walpha = (), (), (), ()
    for i in tl.static_range(E // BLOCK_K):
        wx += (tl.load(x_rows + i * BLOCK_K),)
        wb += (tl.load(x_rows + E * E + i * BLOCK_K),)
        wa += (tl.load(a_rows + i * BLOCK_K),)
        walpha += (tl.load(alpha_row + i * BLOCK_K),)
    wait(PDL)
    px = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    pb = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    pa = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    palpha = tl.zeros((BLOCK_K,), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for i in tl.static_range(E // BLOCK_K):
        x = tl.load(x_ptr + i * BLOCK_K + k).to(tl.float32)
        px += wx[i].to(tl.float32) * x[None, :]
        pb += wb[i].to(tl.float32) * x[None, :]
        pa += wa[i].to(tl.float32) * x[None, :]
        palpha += walpha[i].to(tl.float32) * x
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, 0) / E + 2.0**-23)
    A = _silu(tl.sum(palpha, 0) * scale) * (tl.sum(pa, 1) * scale)
    u = (_silu(A) * (tl.sum(px, 1) * scale)).to(y_ptr.dtype.element_ty)
    z = u.to(tl.float32) * tl.load(conv_ptr + c * TAPS + TAPS - 1)
    window = windows_ptr + tl.load(slots_ptr).to(tl.int64) * (TAPS - 1) * E + c
    past = ()
    for w in tl.static_range(TAPS - 1):
        past += (tl.load(window + w * E),)
        z += past[w].to(tl.float32) * tl.load(conv_ptr + c * TAPS + w)
    tl.debug_barrier()  # threads may share channels: all must have read the window before one writes it
    for w in tl.static_range(TAPS - 2):
        tl.store(window + w * E, past[w + 1])
    tl.store(window + (TAPS - 2) * E, u)
    tl.store(y_ptr + c, tl.sum(pb, 1) * scale * _silu(z))


def slc2_row(
    x: Tensor, weight: Tensor, conv: Tensor, windows: Tensor, slots: Tensor, y: Tensor, n_head: int
) -> None:
    """Write to y (1,E) the output for one token x (1,E) of the residual stream; update windows[slots].

    weight (>= 2E+D+H, E) is packed; conv (E,1,K) float32, K > 1; windows (slots,K-1,E); slots (1,) int32.
    """
    (_, E), K = x.shape, conv.size(-1)
    D = E // n_head
    _slc2_row[(n_head, D // CHANNELS)](
        x, weight, conv, windows, slots, y, E, D, K, CHANNELS, min(1024, E & -E), num_warps=4, **pdl()
    )


@triton.jit
def _slc2_mix(
    packed_ptr,
    x_ptr,
    conv_ptr,
    windows_ptr,
    slots_ptr,
    counts_ptr,
    tails_ptr,
    y_ptr,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    t = row % T
    c = tl.arange(0, BLOCK)
    inside = c < E
    wait(PDL)
    window = windows_ptr + tl.load(slots_ptr + row // T).to(tl.int64) * (TAPS - 1) * E + c
    z = tl.zeros((BLOCK,), tl.float32)
    b = tl.load(packed_ptr + row * WIDTH + E + c, mask=inside, other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(TAPS):  # current token first, then earlier ones; no branch delays a load
        is_new = inside & (t >= j)
        x = tl.load(x_ptr + (row - j) * E + c, mask=is_new, other=0.0).to(tl.float32)
        packed = packed_ptr + (row - j) * WIDTH
        a = tl.load(packed + 2 * E + c % D, mask=is_new, other=0.0).to(tl.float32)
        alpha = tl.load(packed + 2 * E + D + c // D, mask=is_new, other=0.0).to(tl.float32)
        p = tl.load(packed + c, mask=is_new, other=0.0).to(tl.float32)
        old = tl.load(window + (TAPS - 1 + t - j) * E, mask=inside & (t < j), other=0.0)
        scale = tl.rsqrt(tl.sum(x * x, 0) / E + 2.0**-23)
        u = (_silu(_silu(alpha * scale) * a * scale) * p * scale).to(y_ptr.dtype.element_ty)
        u = tl.where(t >= j, u, old)
        if j == 0:
            b *= scale
        taps += (u,)
        z += u.to(tl.float32) * tl.load(conv_ptr + c * TAPS + TAPS - 1 - j, mask=inside, other=0.0)
    tl.store(y_ptr + row * E + c, b * _silu(z), mask=inside)
    tl.debug_barrier()  # the tail may be the window itself: finish reading before writing
    if t == tl.load(counts_ptr + row // T) - 1:
        tail = (
            tails_ptr + (tl.load(slots_ptr + row).to(tl.int64) if T == 1 else row // T) * (TAPS - 1) * E + c
        )
        for j in tl.static_range(TAPS - 1):
            tl.store(tail + (TAPS - 2 - j) * E, taps[j], mask=inside)


def slc2_mix(
    packed: Tensor,
    x: Tensor,
    conv: Tensor,
    windows: Tensor,
    slots: Tensor,
    counts: Tensor,
    tails: Tensor,
    y: Tensor,
    n_head: int,
) -> None:
    """Write to y (R,E) the output for packed (R, >= 2E+D+H) = x W^T: R/S tokens of each of S sequences.

    slots (S,) int32 is the slot of each sequence, counts (S,) int32 its number of tokens before padding. With
    one token per sequence the next windows are written to windows[slots]; with more, to tails (S,K-1,E),
    because the program of the last token may finish before that of the first has read the window.
    """
    (R, E), K = x.shape, conv.size(-1)
    T = R // len(slots)
    _slc2_mix[(R,)](
        packed, x, conv, windows, slots, counts, windows if T == 1 else tails, y, T, E, E // n_head,
        packed.size(1), K, triton.next_power_of_2(E), num_warps=8, **pdl(),
    )  # fmt: skip
