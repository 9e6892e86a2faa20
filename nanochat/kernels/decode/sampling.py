"""nanochat.sampling.sample_rows on the GPU: settings and seed per row, and only token ids to copy back.

`_score` scores all blocks of the vocabulary in parallel. For a row without filters, `_pick` only compares
the best tokens of the blocks. For top-k and top-p, `_pick` finds the cut-off score by bisection over the
ordered bit patterns of float32; nothing is sorted. Tokens of equal score are kept or removed together.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanochat.kernels.decode.launch import pdl, release, wait

BLOCK = 1024


@triton.jit
def _mix(x):
    """Return MurmurHash3's 32-bit finaliser (Appleby 2011) of uint32 values."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, place, tokens):
    key = _mix(_mix(seed.to(tl.uint32, bitcast=True)) + _mix(place.to(tl.uint32, bitcast=True)) * 0x9E3779B9)
    bits = _mix(_mix(tokens.to(tl.uint32) * 0x9E3779B1 + key) ^ key)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) / 8388608.0
    return -tl.log(-tl.log(uniform))


@triton.jit
def _order(x):
    """Return int32 keys in the same order as the float32 values."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _score(
    logits_ptr,
    seen_ptr,
    slots_ptr,
    temperature_ptr,
    penalty_ptr,
    top_k_ptr,
    top_p_ptr,
    seed_ptr,
    place_ptr,
    scores_ptr,
    best_ptr,
    winner_ptr,
    V,
    CAP: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    token = block * SIZE + tl.arange(0, SIZE)
    inside = token < V
    at = row.to(tl.int64) * V + token
    wait(PDL)
    logit = tl.load(logits_ptr + at, mask=inside, other=0.0)
    logit = CAP * (2.0 * tl.sigmoid(2.0 / CAP * logit) - 1.0)  # tanh
    tl.store(logits_ptr + at, logit, mask=inside)
    penalty = tl.load(penalty_ptr + row)
    score = logit
    if penalty != 1.0:
        seen = tl.load(seen_ptr + tl.load(slots_ptr + row).to(tl.int64) * V + token, mask=inside, other=0)
        score = tl.where(seen != 0, tl.where(logit > 0, logit / penalty, logit * penalty), logit)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    is_filtered = (temperature > 0) & (((top_k > 0) & (top_k < V)) | (tl.load(top_p_ptr + row) < 1.0))
    if temperature > 0:
        score = score / temperature
        if is_filtered:
            tl.store(scores_ptr + at, score, mask=inside)
        else:
            score += _gumbel(tl.load(seed_ptr + row), tl.load(place_ptr + row), token)
    score = tl.where(inside, score, float("-inf"))
    best, winner = tl.max(score, 0, return_indices=True)
    out = row * tl.num_programs(1) + block
    tl.store(best_ptr + out, best)
    tl.store(winner_ptr + out, block * SIZE + winner)


@triton.jit
def _count(scores, V, cut, SIZE: tl.constexpr):
    """Return the number of scores at or above the cut."""
    total = tl.zeros((SIZE,), tl.int32)
    for start in range(0, V, SIZE):
        token = start + tl.arange(0, SIZE)
        score = tl.load(scores + token, mask=token < V, other=float("-inf"))
        total += (_order(score) >= cut).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _mass(scores, V, highest, cut, SIZE: tl.constexpr):
    """Return the sum of exp(score - highest) over the scores at or above the cut."""
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, V, SIZE):
        token = start + tl.arange(0, SIZE)
        score = tl.load(scores + token, mask=token < V, other=float("-inf"))
        total += tl.where(_order(score) >= cut, tl.exp(score - highest), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _middle(low, high):
    return ((low.to(tl.int64) + high.to(tl.int64)) >> 1).to(tl.int32)


@triton.jit
def _top_k_cut(scores, V, top_k, keys, none, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Return the highest cut that keeps at least top_k tokens.

    keys are those of the best token of each block; none is a cut that keeps no token.
    """
    cut = tl.full((), -2147483647, tl.int32)
    if top_k <= BLOCKS:  # the best tokens of top_k blocks give a lower bound
        high = none
        while high.to(tl.int64) - cut.to(tl.int64) > 1:
            middle = _middle(cut, high)
            if tl.sum((keys >= middle).to(tl.int32), 0) >= top_k:
                cut = middle
            else:
                high = middle
    kept = _count(scores, V, cut, SIZE)
    while (kept > top_k) & (none.to(tl.int64) - cut.to(tl.int64) > 1):
        middle = _middle(cut, none)
        n = _count(scores, V, middle, SIZE)
        if n >= top_k:
            cut = middle
            kept = n
        else:
            none = middle
    return cut


@triton.jit
def _top_p_cut(scores, V, top_p, highest, cut, SIZE: tl.constexpr):
    """Return the lowest score above which lies less than top_p of the mass that a cut keeps."""
    wanted = top_p * _mass(scores, V, highest, cut, SIZE)
    low, high = cut - 1, _order(highest)
    while high.to(tl.int64) - low.to(tl.int64) > 1:
        middle = _middle(low, high)
        if _mass(scores, V, highest, middle + 1, SIZE) < wanted:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _pick(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    seed_ptr,
    place_ptr,
    scores_ptr,
    best_ptr,
    winner_ptr,
    slots_ptr,
    latest_ptr,
    out_ptr,
    V,
    BLOCKS: tl.constexpr,
    ALL_BLOCKS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0)
    block = tl.arange(0, ALL_BLOCKS)
    wait(PDL)
    best = tl.load(best_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    highest, first = tl.max(best, 0, return_indices=True)
    winner = tl.load(winner_ptr + row * BLOCKS + first)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if (tl.load(temperature_ptr + row) > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1.0)):
        scores = scores_ptr + row.to(tl.int64) * V
        cut = tl.full((), -2147483647, tl.int32)  # keeps all
        if (top_k > 0) & (top_k < V):
            cut = _top_k_cut(scores, V, top_k, _order(best), _order(highest) + 1, BLOCKS, SIZE)
        if top_p < 1.0:
            cut = _top_p_cut(scores, V, top_p, highest, cut, SIZE)
        seed, place = tl.load(seed_ptr + row), tl.load(place_ptr + row)
        lead = float("-inf")
        for start in range(0, V, SIZE):
            token = start + tl.arange(0, SIZE)
            score = tl.load(scores + token, mask=token < V, other=float("-inf"))
            score = tl.where(_order(score) >= cut, score + _gumbel(seed, place, token), float("-inf"))
            top, at = tl.max(score, 0, return_indices=True)
            if top > lead:
                lead = top
                winner = start + at
    tl.store(out_ptr + row, winner)
    tl.store(latest_ptr + tl.load(slots_ptr + row).to(tl.int64), winner)


def sample_rows(
    logits: Tensor,
    seen: Tensor,
    slots: Tensor,
    settings: dict[str, Tensor],
    buffers: tuple[Tensor, Tensor, Tensor],
    latest: Tensor,
    out: Tensor,
    cap: float,
) -> None:
    """Sample the next token of each row of logits (B,V) into out (B,) and latest[slots] (slots,), int32.

    The logits are float32, and soft-capped in place to cap * tanh(logits / cap). seen (slots,V) uint8 marks
    the tokens that a slot has seen. settings, (B,) each: temperature, repetition_penalty and top_p (float32),
    top_k, seed and place (int32). buffers: scores (B*V float32), then a float32 and an int32 for each row and
    block of BLOCK tokens.
    """
    B, V = logits.shape
    s, (scores, best, winner) = settings, buffers
    blocks = triton.cdiv(V, BLOCK)
    _score[(B, blocks)](
        logits, seen, slots, s["temperature"], s["repetition_penalty"], s["top_k"], s["top_p"], s["seed"],
        s["place"], scores, best, winner, V, cap, BLOCK, num_warps=4, **pdl(),
    )  # fmt: skip
    _pick[(B,)](
        s["temperature"], s["top_k"], s["top_p"], s["seed"], s["place"], scores, best, winner, slots, latest,
        out, V, blocks, triton.next_power_of_2(blocks), 8 * BLOCK, num_warps=32, **pdl(),
    )  # fmt: skip
