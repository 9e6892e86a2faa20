"""Sampling: from logits to the next token, in pure functions that treat every row by itself.

The filters come in the usual order: repetition penalty (Keskar et al. 2019, CTRL), temperature, top-k, then
top-p (Holtzman et al. 2020) over the tokens that top-k left.

`sample` draws all rows of a call from one generator. `sample_rows` is for requests that come and go: each row
has its own SamplingParams, and its random numbers depend only on its seed, the position in the sequence and
the token (gumbel_noise). A request therefore gets the same tokens whatever else is decoded beside it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF  # of 32 bits
_EPSILON = 1e-6  # smallest temperature and top_p that are used as given: in float32, 1e-50 is zero


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample one request; ValueError for settings out of range.

    Temperatures below 1e-6 become 0, top_p below 1e-6 becomes 1e-6, which keeps the likeliest token alone.
    """

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None  # None: engine and server draw a fresh one, a decoder by itself uses 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 turns it off")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 turns it off")
        if self.temperature < _EPSILON:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, _EPSILON))

    @classmethod
    def from_flat(
        cls,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> SamplingParams:
        """Return the settings of nanochat's flat signatures, in which None also turns top_k and top_p off."""
        return cls(
            temperature=temperature,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    def seeded(self) -> SamplingParams:
        """Return the same settings, with a fresh seed of 32 bits if they have none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))

    def for_sample(self, number: int) -> SamplingParams:
        """Return the settings of one sample of a request that is seeded: the same, with a seed of its own."""
        assert self.seed is not None
        return replace(self, seed=self.seed + 0x9E3779B1 * number & _MASK)


GREEDY = SamplingParams(temperature=0.0)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits (B,V) of the tokens in seen (B,S) by penalty."""
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits (B,V) to -inf outside the top_k, then outside the smallest set with mass top_p.

    Tokens with equal logits are kept or removed together.
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        probs, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        mass_before = probs.cumsum(dim=-1) - probs
        kept = logits.gather(1, order).masked_fill(mass_before >= max(top_p, _EPSILON), torch.inf)
        logits = logits.masked_fill(logits < kept.amin(dim=-1, keepdim=True), -torch.inf)
    return logits


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token id for each row of logits (B,V): (B,1) int64. The caller penalizes repetition."""
    if params.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = filter_logits(logits / params.temperature, params.top_k, params.top_p).softmax(dim=-1)
    return torch.multinomial(probs, num_samples=1, generator=generator)


def sample_rows(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], seen: Sequence[Sequence[int]]
) -> list[int]:
    """Draw one token for each row of logits (B,V), by its own settings.

    The token of row i goes to positions[i] of its sequence; seen[i] are the tokens before it.
    """
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
        seeds = torch.tensor([params[i].seed or 0 for i in rows], device=device)
        at = torch.tensor([positions[i] for i in rows], device=device)
        drawn[rows] = (scores + gumbel_noise(seeds, at, logits.size(1))).argmax(dim=-1)
    return drawn.tolist()


def gumbel_noise(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """Return standard Gumbel noise (B,size) that depends only on each row's seed and position, (B,) int64.

    The argmax of logits + noise is a draw from their softmax (Gumbel 1954). The bits are MurmurHash3's 32-bit
    finaliser (Appleby 2011) over a counter, twice, with a key for each row.
    """
    key = _mix(_mix(seeds & _MASK) + 0x9E3779B9 * _mix(positions & _MASK) & _MASK)[:, None]
    bits = _mix(_mix(torch.arange(size, device=seeds.device) * 0x9E3779B1 + key & _MASK) ^ key)
    uniform = ((bits >> 9).float() + 0.5) / 2**23  # exact in float32, never 0 or 1
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """Apply a bijection of 32-bit values, held in int64, that spreads every bit over all others."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)
