"""Learning rates, their schedules, and the intervals of evaluation, sampling, saving and logging.

The schedules are pure functions of progress or step, so a resumed run follows the same curve. This module
must not import torch: commands build their help text from these classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Peak learning rates; AdamW's are for a width of 768 and are scaled by (n_embd / 768)^-0.5."""

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
    """Intervals of a run's recurring actions, in steps."""

    eval_every: int = 250
    """steps between validations; 0: only at the start and the end"""
    sample_every: int = 2000
    """steps between printed samples; 0: only at the end"""
    save_every: int = 500
    """steps between checkpoints; 0: only at the end"""
    keep_last: int = 2
    """number of checkpoints to keep; 0: all"""
    log_every: int = 10
    """steps between printed lines; metrics.jsonl has every step"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name}={value} must be 0 (off) or more")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Length, batch size and learning-rate schedule of a run."""

    num_steps: int
    accumulation: int  # micro-batches per step on this rank
    tokens_per_step: int  # summed over all ranks
    lr_multiplier: Callable[[float], float]  # function of progress in [0, 1]


def lr_multiplier(progress: float, *, peak: float = 1.0, warmdown: float = 0.2) -> float:
    """Return the factor on every learning rate at a progress in [0, 1] through training.

    The factor is `peak`, then falls linearly to 0 over the last `warmdown` fraction of the run.
    """
    return peak * min(1.0, (1 - progress) / warmdown)


def muon_momentum(step: int) -> float:
    """Return Muon's momentum: 0.85, rising linearly to 0.95 over the first 300 steps."""
    return 0.85 + 0.10 * min(step / 300, 1.0)
