"""What to do when: learning rates, their schedule, and how often to evaluate and save.

The schedules are pure functions of progress or step, so that a resumed run follows the same curve. No torch
here: commands build their help text from these classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak rates; AdamW's are for a width of 768 and are scaled by (n_embd / 768)^-0.5."""

    embedding_lr: float = 0.2
    """learning rate of the token embedding (AdamW)"""
    unembedding_lr: float = 0.004
    """learning rate of the output head (AdamW)"""
    conv_lr: float = 0.02
    """learning rate of the convolution taps (AdamW)"""
    matrix_lr: float = 0.02
    """learning rate of all matrices (Muon)"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """How often a run does what, in steps."""

    eval_every: int = 250
    """steps between validations; 0: only at the start and the end"""
    sample_every: int = 2000
    """steps between printed samples; 0: only at the end"""
    save_every: int = 500
    """steps between checkpoints; 0: only at the end"""
    keep_last: int = 2
    """how many checkpoints to keep; 0: all"""
    log_every: int = 10
    """steps between printed lines; metrics.jsonl has every step"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}={value} must be 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how large."""

    num_steps: int
    accumulation: int  # micro-batches a step on this rank
    tokens_per_step: int  # over all ranks
    lr_multiplier: Callable[[float], float]  # of progress in [0, 1]


def lr_multiplier(progress: float, *, peak: float = 1.0, warmdown: float = 0.2) -> float:
    """Factor on every learning rate at progress in [0, 1] through training.

    `peak`, then linear to 0 over the last `warmdown` of it.
    """
    return peak * min(1.0, (1 - progress) / warmdown)


def muon_momentum(step: int) -> float:
    """Muon's momentum: 0.85 rising linearly to 0.95 over the first 300 steps."""
    return 0.85 + 0.10 * min(step / 300, 1.0)
