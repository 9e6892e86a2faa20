"""What a run remembers over a restart, and how it starts, saves and goes on.

A resumed run continues exactly: weights, optimizer, place in the data and moving average come back, and there
is no random state to restore, since training itself draws no random numbers. The loader's place is kept by
stream and not by rank, so a run may go on with another number of ranks.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.checkpoint_manager import (
    complete_steps,
    delete_checkpoint,
    load_optimizer_state,
    load_tensors,
    load_weights,
    model_config,
    model_path,
    read_meta,
    save_checkpoint,
)
from nanochat.common import Runtime
from nanochat.dataloader import merge_states
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW

logger = logging.getLogger(__name__)


@dataclass
class EmaLoss:
    """Exponential moving average, corrected for its start at zero: after one update it is that value."""

    beta: float = 0.9
    total: float = 0.0
    weight: float = 0.0

    def update(self, value: float) -> float:
        """Take in a value, return the average."""
        self.total = self.beta * self.total + (1 - self.beta) * value
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.value

    @property
    def value(self) -> float:
        """The average so far."""
        return self.total / self.weight


@dataclass
class Progress:
    """The loop's own memory."""

    step: int = 0
    ema: EmaLoss = field(default_factory=EmaLoss)
    train_seconds: float = 0.0  # in steps, evaluations not counted
    first_val_bpb: float | None = None
    min_val_bpb: float | None = None
    val_bpb: float | None = None  # at the last evaluation
    loader_state: dict | None = None  # after the last step; of all ranks' streams once saved

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        """Undo dataclasses.asdict."""
        return cls(**{**saved, "ema": EmaLoss(**saved["ema"])})


def start_or_resume(
    directory: Path, model: GPT, optimizer: MuonAdamW, runtime: Runtime, *, resume: bool, overwrite: bool
) -> Progress:
    """Start a run in directory, or load model and optimizer from its newest checkpoint and go on.

    Raises ValueError when checkpoints are there and neither was asked for, or when they do not fit the model.
    """
    steps = complete_steps(directory)
    if not steps:
        return Progress()
    if overwrite:
        if runtime.is_main:
            for step in steps:
                delete_checkpoint(directory, step)
        return Progress()
    if not resume:
        raise ValueError(
            f"{directory} has checkpoints up to step {steps[-1]}: go on with --resume, start anew with "
            "--overwrite, or choose another --model-tag"
        )
    meta = read_meta(directory, steps[-1])
    if model_config(meta) != model.config:
        raise ValueError(
            f"{directory} holds {model_config(meta)}, these settings make {model.config}: "
            "give the settings that it was started with, or another --model-tag"
        )
    load_weights(model, load_tensors(model_path(directory, steps[-1]), runtime.device))
    saved = load_optimizer_state(directory, steps[-1], runtime.device)
    groups = optimizer.state_dict()["param_groups"]  # learning rates are those of the settings, not the saved
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    logger.info(f"resuming from step {steps[-1]} of {directory}")
    return Progress.from_dict(meta["progress"])


def save_progress(
    directory: Path,
    model: GPT,
    optimizer: MuonAdamW,
    runtime: Runtime,
    progress: Progress,
    settings: dict[str, Any],
    keep_last: int,
) -> None:
    """Save a checkpoint that start_or_resume can go on from; settings are what the user asked for."""
    loader_state = merge_states(runtime.gather(progress.loader_state))
    if runtime.is_main:
        meta = {"user_config": settings, "progress": {**asdict(progress), "loader_state": loader_state}}
        save_checkpoint(directory, progress.step, model, optimizer.state_dict(), meta, keep_last)
        logger.info(f"step {progress.step:05d} | saved to {directory}")
    runtime.gather(None)  # no rank runs ahead, or ends the job, before the checkpoint is there
