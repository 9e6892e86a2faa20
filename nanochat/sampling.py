"""From logits to the next token: pure functions, rows independent of one another.

The filters come in the usual order: repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k, then
top-p (Holtzman et al. 2020) over what top-k left.

`sample` draws the rows of one call from one generator. `sample_rows` serves requests that come and go: each
has settings and a seed of its own, and its randomness is a function of seed, place in the sequence and token
alone (gumbel_noise), so that it says the same whoever else is being served.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_LEAST = 1e-6  # a lower temperature is greedy, a lower top_p keeps no less: float32 makes zeros of some


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> None:
    """Raise ValueError for settings that mean nothing."""
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 turns it off")
    if not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty={repetition_penalty} must be above 0; 1 turns it off")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits (B,V) of the tokens in seen (B,S) by penalty."""
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set logits (B,V) to -inf outside the top_k, then outside the least set with mass top_p.

    Tokens of equal logits stay or go together.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = probs.cumsum(dim=-1) - probs
        kept = logits.gather(1, order).masked_fill(mass_before >= max(top_p, _LEAST), torch.inf)
        logits = logits.masked_fill(logits < kept.amin(dim=-1, keepdim=True), -torch.inf)
    return logits


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token id for each row of logits (B,V): (B,1) int64. Temperature 0 is greedy, top_k 0 is off."""
    if temperature < _LEAST:
        return logits.argmax(dim=-1, keepdim=True)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one sequence; ValueError for settings that mean nothing."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        if self.temperature < _LEAST:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, _LEAST))


def seed_or_fresh(seed: int | None) -> int:
    """The seed, or one that nobody has chosen."""
    return secrets.randbits(32) if seed is None else seed


def sample_seed(seed: int, number: int) -> int:
    """Seed, of 32 bits, of one of several samples that are to differ."""
    return seed + 0x9E3779B1 * number & _MASK


def sample_rows(
    logits: Tensor, params: Sequence[SamplingParams], places: Sequence[int], seen: Sequence[Sequence[int]]
) -> list[int]:
    """Draw the token at places[i] of sequence i, of which seen[i] came before, from row i of logits (B,V)."""
    device = logits.device
    for i, row in enumerate(params):
        if row.repetition_penalty != 1:
            ids = torch.tensor([seen[i]], device=device)
            penalized = penalize_repetition(logits[i : i + 1], ids, row.repetition_penalty)
            logits = torch.cat([logits[:i], penalized, logits[i + 1 :]])
    drawn = logits.argmax(dim=-1)
    for top_k, top_p in {(row.top_k, row.top_p) for row in params if row.temperature > 0}:
        rows = [
            i
            for i, row in enumerate(params)
            if row.temperature > 0 and (row.top_k, row.top_p) == (top_k, top_p)
        ]
        temperature = torch.tensor([params[i].temperature for i in rows], device=device)
        scores = filter_logits(logits[rows] / temperature[:, None], top_k, top_p)
        seeds, at = (
            torch.tensor(values, device=device)
            for values in ([params[i].seed for i in rows], [places[i] for i in rows])
        )
        drawn[rows] = (scores + gumbel_noise(seeds, at, logits.size(1))).argmax(dim=-1)
    return drawn.tolist()


def gumbel_noise(seeds: Tensor, places: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise (B,size) that depends on a row's seed and place (B,), int64, alone.

    The argmax of logits + noise is a draw from their softmax (Gumbel 1954). The bits are MurmurHash3's 32-bit
    finaliser (Appleby 2011) over a counter, twice, with a key for each row.
    """
    key = _mix(_mix(seeds & _MASK) + 0x9E3779B9 * _mix(places & _MASK) & _MASK)[:, None]
    bits = _mix(_mix(torch.arange(size, device=seeds.device) * 0x9E3779B1 + key & _MASK) ^ key)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # exact in float32, never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit values, kept in int64, that spreads every bit over all."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
