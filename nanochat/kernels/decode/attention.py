"""Attention for decoding: single-query attention, causal prefill.

`attend` reads only the tokens that a sequence has so far; that read is its whole cost. The tokens of a
row are split over several programs, because a single program would use one multiprocessor and leave the
others idle (Flash-Decoding, Dao et al. 2023); their partial softmaxes are then combined (Milakov &
Gimelshein 2018), and convolved in the second generation. `attend_causal` is for prefill, many new tokens of
one sequence (FlashAttention-2, Dao 2023); one recorded graph serves every length of the context.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait
from nanochat.kernels.decode.residual_conv import (
    Conv,
    convolve,
    load_rows,
    n_taps,
    shift_window,
)

BLOCK_T = 64  # tokens per iteration of a program
LOG2_E = 1.4426950408889634


def attend_reference(q: Tensor, k: Tensor, v: Tensor, score_scale: float = 1.0) -> Tensor:
    """Return the attention output (H,D) of one query q (H,D) over k, v (H_kv,T,D)."""
    k, v = (state.repeat_interleave(len(q) // len(k), dim=0) for state in (k, v))
    return F.scaled_dot_product_attention(q[:, None], k, v, scale=score_scale * q.size(-1) ** -0.5)[:, 0]


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    positions_ptr,
    partial_ptr,
    logsum_ptr,
    max_len,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    wait(PDL)
    length = tl.load(positions_ptr + row) + 1  # includes the current token
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK) * BLOCK
    begin = split * chunk
    end = tl.minimum(begin + chunk, length)
    start = (tl.load(slots_ptr + row).to(tl.int64) * H_KV + head) * max_len * D
    q_rows = (row * H_KV + head) * GROUP + g
    q = tl.load(q_ptr + q_rows[:, None] * D + d[None, :], mask=g[:, None] < GROUP, other=0.0)
    highest = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    y = tl.zeros((BLOCK_G, D), tl.float32)
    for t0 in range(begin, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        at = start + t[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=t[:, None] < end, other=0.0)
        v = tl.load(v_ptr + at, mask=t[:, None] < end, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        scores = tl.where(t[None, :] < end, scores, -1e30)
        peak = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        fade = tl.exp2(highest - peak)
        total = total * fade + tl.sum(p, 1)
        y = y * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = peak
    out = q_rows * SPLITS + split
    tl.store(logsum_ptr + out, highest + tl.log2(tl.maximum(total, 1e-30)), mask=g < GROUP)
    y = y / tl.maximum(total, 1e-30)[:, None]
    tl.store(partial_ptr + out[:, None] * D + d[None, :], y, mask=g[:, None] < GROUP)


@triton.jit
def _combine(
    partial_ptr,
    logsum_ptr,
    y_ptr,
    slots_ptr,
    taps_ptr,
    windows_ptr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    TAPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0)
    s = tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    if TAPS:
        c = row % H * D + d
        window = windows_ptr + tl.load(slots_ptr + row // H).to(tl.int64) * (TAPS - 1) * H * D + c
        past = load_rows(window, H * D, d < D, TAPS - 1)
        taps = load_rows(taps_ptr + c, H * D, d < D, TAPS)
    wait(PDL)
    logsum = tl.load(logsum_ptr + row * SPLITS + s, mask=s < SPLITS, other=-1e30)
    weight = tl.exp2(logsum - tl.max(logsum, 0))
    weight /= tl.sum(weight, 0)
    at = (row * SPLITS + s)[:, None] * D + d[None, :]
    partial = tl.load(partial_ptr + at, mask=s[:, None] < SPLITS, other=0.0)
    y = tl.sum(partial * weight[:, None], 0)
    if TAPS:
        u = y.to(y_ptr.dtype.element_ty)
        y = convolve(u, past, taps, TAPS)
        shift_window(window, u, past, H * D, d < D, TAPS)
    tl.store(y_ptr + row * D + d, y)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    positions: Tensor,
    y: Tensor,
    splits: int,
    score_scale: float = 1.0,
    conv: Conv | None = None,
) -> None:
    """Write to y (B,H,D) the attention of q (B,H,D) over the first positions + 1 tokens of its slots.

    k and v are (slots,H_kv,max_len,D), slots and positions (B,) int32. splits programs share each row. conv
    convolves the output, each row with the state at its slot.
    """
    (B, H, D), (_, H_kv, max_len, _) = q.shape, k.shape
    group = H // H_kv
    partial = torch.empty(B, H, splits, D, device=q.device)
    logsum = torch.empty(B, H, splits, device=q.device)
    _attend[(B, H_kv, splits)](
        q, k, v, slots, positions, partial, logsum, max_len, splits, group, H_kv, D,
        max(16, triton.next_power_of_2(group)), BLOCK_T, score_scale * D**-0.5 * LOG2_E, num_warps=4,
        num_stages=3, **pdl(),
    )  # fmt: skip
    taps, windows, _ = conv or (None, None, None)
    _combine[(B * H,)](
        partial, logsum, y, slots, taps, windows, splits, triton.next_power_of_2(splits), H, D, n_taps(conv),
        num_warps=1, **pdl(),
    )  # fmt: skip


@triton.jit
def _attend_causal(
    q_ptr,
    k_ptr,
    v_ptr,
    slot_ptr,
    position_ptr,
    y_ptr,
    T,
    max_len,
    GROUP: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # longest rows first, for load balance
    head = tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, D)
    wait(PDL)
    position = tl.load(position_ptr)
    start = (tl.load(slot_ptr).to(tl.int64) * H_KV + head // GROUP) * max_len * D
    at_q = (rows[:, None] * H_KV * GROUP + head) * D + d[None, :]
    q = tl.load(q_ptr + at_q, mask=rows[:, None] < T, other=0.0)
    highest = tl.full((BLOCK_Q,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    y = tl.zeros((BLOCK_Q, D), tl.float32)
    end = tl.minimum(position + tl.minimum(first + BLOCK_Q, T), max_len)
    for t0 in range(0, end, BLOCK):
        t = t0 + tl.arange(0, BLOCK)
        at = start + t[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=t[:, None] < end, other=0.0)
        v = tl.load(v_ptr + at, mask=t[:, None] < end, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        if t0 + BLOCK > position + first:
            scores = tl.where(t[None, :] <= position + rows[:, None], scores, -1e30)
        peak = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - peak[:, None])
        fade = tl.exp2(highest - peak)
        total = total * fade + tl.sum(p, 1)
        y = y * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = peak
    tl.store(y_ptr + at_q, y / total[:, None], mask=rows[:, None] < T)


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, slot: Tensor, position: Tensor, y: Tensor, score_scale: float = 1.0
) -> None:
    """Write to y (T,H,D) causal attention of queries q (T,H,D) at position, position + 1, ...

    slot and position are (1,) int32; k and v (slots,H_kv,max_len,D) already include the new tokens.
    """
    (T, H, D), (_, H_kv, max_len, _) = q.shape, k.shape
    block_q = 128 if T > 64 else 16
    _attend_causal[(triton.cdiv(T, block_q), H)](
        q, k, v, slot, position, y, T, max_len, H // H_kv, H_kv, D, block_q, BLOCK_T,
        score_scale * D**-0.5 * LOG2_E, num_warps=8 if T > 64 else 4, num_stages=3, **pdl(),
    )  # fmt: skip
