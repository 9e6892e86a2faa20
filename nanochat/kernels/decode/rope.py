"""From projections to attention: queries, and keys and values appended to the slots of a KV state.

Rotary embeddings, and in the second generation a convolution of keys and value embeddings, as in
nanochat/attention.py, of which `attention_inputs` is the plain version.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Values(NamedTuple):
    """Value embeddings of a layer: v += 2 sigmoid(gate h[:12]) * table[token], a gate a head."""

    tokens: Tensor  # (R,) int32; a negative one means latest[slot]
    latest: Tensor  # (slots,) int32, the token sampled last; a step writes it after its last layer
    table: Tensor  # (V, H_kv*D), each row contiguous
    gate: Tensor  # (H_kv,12)


@triton.jit
def _norm_scale(x_ptr, row, mask, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return 1 / rms(x) of a row of the residual stream, if the mask is True."""
    c = tl.arange(0, BLOCK_E)
    x = tl.load(x_ptr + row * E + c, mask=mask & (c < E), other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / E + 2.0**-23)


@triton.jit
def _angles(cos_ptr, sin_ptr, position, mask, half, D: tl.constexpr):
    cos = tl.load(cos_ptr + position * (D // 2) + half, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + position * (D // 2) + half, mask=mask, other=0.0)
    return cos.to(tl.float32), sin.to(tl.float32)


@triton.jit
def _token(tokens_ptr, latest_ptr, row, slot):
    token = tl.load(tokens_ptr + row).to(tl.int64)
    return tl.where(token < 0, tl.load(latest_ptr + slot), token)


@triton.jit
def _load(pointers, mask, D: tl.constexpr):
    """Return the halves of heads, in float32."""
    x1 = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return x1, tl.load(pointers + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, x1, x2, mask, D: tl.constexpr):
    tl.store(pointers, x1, mask=mask)
    tl.store(pointers + D // 2, x2, mask=mask)


@triton.jit
def _rotate(x1, x2, cos, sin, D: tl.constexpr):
    """Return the halves of rms_norm of the rotated heads x."""
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin  # norm not preserved: cos and sin are rounded
    rms = tl.rsqrt(tl.sum(y1 * y1 + y2 * y2, 1)[:, None] / D + 2.0**-23)
    return y1 * rms, y2 * rms


@triton.jit
def _past_keys(
    keys,
    window,
    x_ptr,
    row,
    t,
    mask,
    WIDTH,
    STRIDE: tl.constexpr,
    TAPS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return the K-1 keys before those of a row, oldest first: from rows before it, then from the window."""
    past = ()
    for j in tl.static_range(TAPS - 1, 0, -1):
        is_new = t >= j
        scale = _norm_scale(x_ptr, row - j, is_new, E, BLOCK_E)
        new = tl.load(keys - j * WIDTH, mask=mask & is_new, other=0.0).to(tl.float32) * scale
        old = tl.load(window + (TAPS - 1 + t - j) * STRIDE, mask=mask & (t < j), other=0.0)
        past += (tl.where(is_new, new.to(old.dtype), old),)
    return past


@triton.jit
def _rope_append(
    packed_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    positions_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens_ptr,
    latest_ptr,
    table_ptr,
    gate_ptr,
    counts_ptr,
    taps_ptr,
    windows_ptr,
    tails_ptr,
    T,
    max_len,
    WIDTH,
    TABLE_WIDTH,
    E: tl.constexpr,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    GATE_INPUTS: tl.constexpr,
    TAPS: tl.constexpr,
    IS_SINGLE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    sequence, t = row // T, row % T
    h, half = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, D // 2)[None, :]
    c, is_kv = h * D + half, h < H_KV
    STATE: tl.constexpr = H_KV * D
    # before the wait: inputs and weights, and state that no kernel before this one writes in a step
    slot = tl.load(slots_ptr + sequence).to(tl.int64)
    position = tl.load(positions_ptr + sequence) + t
    has_room = position < max_len  # padding tokens may exceed the context
    cos, sin = _angles(cos_ptr, sin_ptr, position, has_room, half, D)
    if GATE_INPUTS:
        token = _token(tokens_ptr, latest_ptr, row, slot)
        embeds1, embeds2 = _load(table_ptr + token * TABLE_WIDTH + c, is_kv, D)
        g = tl.arange(0, BLOCK_G)[None, :]
        gate = tl.load(gate_ptr + h * GATE_INPUTS + g, mask=is_kv & (g < GATE_INPUTS), other=0.0)
    if TAPS:
        is_last = t == tl.load(counts_ptr + sequence) - 1
        window = windows_ptr + slot * (TAPS - 1) * STATE + c
        taps = (
            load_rows(taps_ptr + c, STATE, is_kv, TAPS),
            load_rows(taps_ptr + c + D // 2, STATE, is_kv, TAPS),
        )
        if IS_SINGLE:
            past = (
                load_rows(window, STATE, is_kv, TAPS - 1),
                load_rows(window + D // 2, STATE, is_kv, TAPS - 1),
            )
    wait(PDL)
    keys = packed_ptr + row * WIDTH + H * D + c
    q1, q2 = _load(keys - H * D, h < H, D)
    k1, k2 = _load(keys, is_kv, D)
    v1, v2 = _load(keys + STATE, is_kv, D)
    if GATE_INPUTS:
        inputs = tl.load(x_ptr + row * E + g, mask=g < GATE_INPUTS, other=0.0).to(tl.float32)
        logits = tl.sum(gate.to(tl.float32) * inputs, 1)[:, None]
    scale = _norm_scale(x_ptr, row, True, E, BLOCK_E)
    q1, q2 = _rotate(q1 * scale, q2 * scale, cos, sin, D)
    _store(q_ptr + row * H * D + c, q1, q2, has_room & (h < H), D)
    k1, k2 = k1 * scale, k2 * scale
    if TAPS:
        u1, u2 = k1.to(k_ptr.dtype.element_ty), k2.to(k_ptr.dtype.element_ty)
        if not IS_SINGLE:
            past = (
                _past_keys(keys, window, x_ptr, row, t, is_kv, WIDTH, STATE, TAPS, E, BLOCK_E),
                _past_keys(
                    keys + D // 2, window + D // 2, x_ptr, row, t, is_kv, WIDTH, STATE, TAPS, E, BLOCK_E
                ),
            )
            window = tails_ptr + sequence * (TAPS - 1) * STATE + c
        k1, k2 = convolve(u1, past[0], taps[0], TAPS), convolve(u2, past[1], taps[1], TAPS)
        if is_last:
            shift_window(window, u1, past[0], STATE, is_kv, TAPS)
            shift_window(window + D // 2, u2, past[1], STATE, is_kv, TAPS)
    k1, k2 = _rotate(k1, k2, cos, sin, D)
    v1, v2 = v1 * scale, v2 * scale
    if GATE_INPUTS:
        weight = 2.0 * tl.sigmoid(logits * scale)
        v1, v2 = v1 + weight * embeds1, v2 + weight * embeds2
    state = (slot * H_KV + h) * max_len * D + position * D + half
    _store(k_ptr + state, k1, k2, has_room & is_kv, D)
    _store(v_ptr + state, v1, v2, has_room & is_kv, D)


def rope_append(
    packed: Tensor,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    slots: Tensor,
    positions: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Values | None = None,
    counts: Tensor | None = None,
    conv: Conv | None = None,
) -> None:
    """Write queries to q (R,H,D), and keys and values to k, v (slots,H_kv,max_len,D).

    packed (R, >= (H + 2 H_kv) D) = x W^T holds R/S tokens of each of S sequences. Sequence i uses slots[i]
    and continues at positions[i], both (S,) int32. x (R,E) is the residual stream; its RMSNorm is applied
    here. tables are cos and sin, (max_len, D/2) each. conv convolves the keys; counts (S,) int32 is the
    number of tokens of each sequence before padding. With one token a sequence the next windows are written
    to conv.windows[slots], with more to conv.tails (see residual_conv_rows).
    """
    (R, H, D), (_, H_kv, max_len, _), E = q.shape, k.shape, x.size(1)
    T, n_gate = R // len(slots), 0 if values is None else values.gate.size(1)
    taps, windows, tails = conv or (None, None, None)
    _rope_append[(R,)](
        packed, x, *tables, slots, positions, q, k, v, *(values or [None] * 4), counts, taps, windows, tails,
        T, max_len, packed.size(1), 0 if values is None else values.table.stride(0), E, H, H_kv, D, n_gate,
        n_taps(conv), T == 1, triton.next_power_of_2(E), triton.next_power_of_2(H),
        triton.next_power_of_2(n_gate), num_warps=4, **pdl(),
    )  # fmt: skip
