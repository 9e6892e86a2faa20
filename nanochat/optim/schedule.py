"""The constants of the optimizer, schedules, and the intervals of evaluation, sampling, saving and logging.

The schedules are pure functions of progress or step, so a resumed run follows the same curve. This module
must not import torch: commands build their help text from these classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Peak learning rates and the other constants of Muon and AdamW.

    The rates of embedding, head and taps are for a width of 768 and are scaled by (n_embd / 768)^-0.5.
    """

    embedding_lr: float = 0.2
    """learning rate of the token embedding (AdamW)"""
    unembedding_lr: float = 0.004
    """learning rate of the output head (AdamW)"""
    conv_lr: float = 0.02
    """learning rate of the convolution taps (AdamW)"""
    value_embed_lr: float = 0.1
    """learning rate of the value embeddings (AdamW)"""
    value_gate_lr: float = 0.02
    """learning rate of the gates of value embeddings (AdamW)"""
    resid_scale_lr: float = 0.005
    """learning rate of the scales of the residual stream (AdamW)"""
    x0_scale_lr: float = 0.1
    """learning rate of the scales of the embedding in the residual stream (AdamW)"""
    table_beta2: float = 0.95
    """decay of AdamW's second moment for tables: both embeddings and the head"""
    matrix_lr: float = 0.02
    """learning rate of all matrices (Muon)"""
    momentum_start: float = 0.85
    """Muon's momentum at the first step"""
    momentum: float = 0.95
    """Muon's momentum, after a linear rise"""
    momentum_warmup: int = 300
    """steps of that rise"""
    normuon: bool = False
    """divide the rows of Muon's updates by their running root mean square (NorMuon)"""
    weight_decay: float = 0.0
    """cautious weight decay of the matrices, falling linearly to 0 over the run"""
    grad_clip: float = 0.0
    """scale the gradients of a step down to this global norm where theirs is larger; 0: off"""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must be 0 or more, and finite")
        for name in ("table_beta2", "momentum_start", "momentum"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be below 1")

    def momentum_at(self, step: int) -> float:
        """Return Muon's momentum at a step: from momentum_start linearly to momentum, then constant."""
        rise = min(step / self.momentum_warmup, 1.0) if self.momentum_warmup else 1.0
        return self.momentum_start + (self.momentum - self.momentum_start) * rise


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Intervals of a run's recurring actions, in steps."""

    eval_every: int = 250
    """steps between validations; 0 or -1: only at the start and the end"""
    sample_every: int = 2000
    """steps between printed samples; 0 or -1: only at the end"""
    save_every: int = 500
    """steps between checkpoints; 0 or -1: only at the end"""
    keep_last: int = 2
    """number of checkpoints to keep; 0: all"""
    log_every: int = 10
    """steps between printed lines, 0 or -1: only the last; metrics.jsonl has every step"""

    def __post_init__(self) -> None:
        for name in ("eval_every", "sample_every", "save_every", "log_every"):
            require_interval(name, getattr(self, name))
        if self.keep_last < 0:
            raise ValueError(f"keep_last={self.keep_last} must be 0 (all) or more")


def require_interval(name: str, every: int) -> None:
    """Raise ValueError unless `every` is a number of steps, or 0 or -1, which both mean off."""
    if every < -1:
        raise ValueError(f"{name}={every} must be a number of steps, or 0 or -1 for off")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Length, batch size and learning-rate schedule of a run."""

    num_steps: int
    accumulation: int  # micro-batches per step on this rank
    tokens_per_step: int  # summed over all ranks
    lr_multiplier: Callable[[float], float]  # function of progress in [0, 1]
    momentum: Callable[[int], float]  # Muon's, function of the step


def lr_multiplier(
    progress: float,
    *,
    peak: float = 1.0,
    warmdown: float = 0.2,
    final: float = 0.0,
    warmup: float = 0.0,
    step: float = 0.0,
) -> float:
    """Return the factor on every learning rate at a progress in [0, 1] through training.

    The factor rises linearly to `peak` over the first `warmup` fraction of the run, and falls linearly over
    the last `warmdown` fraction, to `final` of it. A step, which is the fraction `step` of the run, has the
    rise of its end: that of its start is 0 for the first.
    """
    rise = (progress + step) / warmup if warmup else 1.0
    return peak * min(1.0, rise, final + (1 - final) * (1 - progress) / warmdown)
