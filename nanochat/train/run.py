"""What a run remembers over a restart, and how it starts, saves and goes on.

A resumed run continues exactly: weights, optimizer, place in the data and moving average come back, and there
is no random state to restore, since training itself draws no random numbers. The loader's place is kept by
stream and the optimizer's state by tensor or row, neither by rank, so a run may go on with another number of
ranks.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import (
    DamagedError,
    check_bytes,
    checkpoint_dir,
    complete_steps,
    delete_checkpoint,
    load_for,
    load_optimizer_shards,
    load_tensors,
    load_tokenizer,
    load_weights,
    model_config,
    model_path,
    read_meta,
    remove_partial_files,
    resolve_tag,
    save_checkpoint,
    tokenizer_dir,
)
from nanochat.common import Runtime, process_seconds, write_report
from nanochat.dataloader import merge_states
from nanochat.gpt import GPT
from nanochat.hardware import describe
from nanochat.metrics import MetricsLog, read_metrics
from nanochat.optim import MuonAdamW, build_optimizer
from nanochat.optim.schedule import Plan
from nanochat.tokenizer import RustBPETokenizer

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
    earlier_seconds: float = 0.0  # of wall clock, in processes before this one
    first_val_bpb: float | None = None
    min_val_bpb: float | None = None
    val_bpb: float | None = None  # at the last evaluation
    loader_state: dict | None = None  # after the last step; of all ranks' streams once saved

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Progress":
        """Undo dataclasses.asdict."""
        return cls(**{**saved, "ema": EmaLoss(**saved["ema"])})


def start_or_resume(
    directory: Path,
    model: GPT,
    tokenizer: RustBPETokenizer,
    optimizer: MuonAdamW,
    runtime: Runtime,
    *,
    resume: bool,
    overwrite: bool,
) -> Progress:
    """Start a run in directory, or load model and optimizer from its newest whole checkpoint and go on.

    With overwrite nothing is deleted yet: `begin` does that, once all else has been found to work. Raises
    ValueError when checkpoints are there and neither was asked for, or when they do not fit the model or were
    made with another tokenizer.
    """
    steps = complete_steps(directory)
    if any(found != steps for found in runtime.gather(steps)):
        raise ValueError(
            f"the ranks do not all see the same checkpoints in {directory}: put NANOCHAT_BASE_DIR on a disk "
            "that all nodes share"
        )
    if runtime.is_main:
        remove_partial_files(directory)
    if not steps or overwrite:
        return Progress()
    if not resume:
        raise ValueError(
            f"{directory} has checkpoints up to step {steps[-1]}: go on with --resume, start anew with "
            "--overwrite, or choose another --model-tag"
        )
    if not load_tokenizer(directory).is_same_as(tokenizer):
        raise ValueError(
            f"{directory} was begun with another tokenizer than the one that is there now: start anew with "
            "--overwrite, or choose another --model-tag"
        )
    for step in reversed(steps):
        try:
            with runtime.together():
                progress = _load(directory, step, model, optimizer, runtime)
        except (DamagedError, FileNotFoundError) as error:
            logger.warning(f"warning: {error}; trying the checkpoint before")
            continue
        logger.info(f"resuming from step {step} of {directory}")
        return progress
    raise ValueError(f"no checkpoint in {directory} can be read: start anew with --overwrite")


def _load(directory: Path, step: int, model: GPT, optimizer: MuonAdamW, runtime: Runtime) -> Progress:
    check_bytes(directory, step, runtime)
    meta = read_meta(directory, step)
    if model_config(meta) != model.config:
        raise ValueError(
            f"{directory} holds {model_config(meta)}, these settings make {model.config}: "
            "give the settings that it was started with, or another --model-tag"
        )
    load_weights(model, load_tensors(model_path(directory, step), model.device))
    optimizer.load_shards(load_optimizer_shards(directory, step))
    return Progress.from_dict(meta["progress"])


def begin(
    directory: Path,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    config: Any,
    plan: Plan,
    progress: Progress,
) -> MetricsLog:
    """Open the metrics of a run that is ready to train; one from step 0 deletes what was there before it.

    ValueError for one that is already beyond the end of its plan, where learning rates would be negative.
    """
    if progress.step > plan.num_steps:
        raise ValueError(
            f"{directory} has a checkpoint of step {progress.step}, but these settings end at step "
            f"{plan.num_steps}: resume for as many steps at least, or start anew with --overwrite"
        )
    with runtime.together():
        log = MetricsLog(
            directory / "metrics.jsonl",
            runtime,
            resume_step=progress.step,
            wandb_run=config.run,
            config=asdict(config),
        )
        if runtime.is_main and progress.step == 0:
            for step in complete_steps(directory):
                delete_checkpoint(directory, step)
            tokenizer.save(tokenizer_dir(directory))
    return log


def start_from(source: str, config: Any, runtime: Runtime) -> tuple[GPT, RustBPETokenizer, MuonAdamW, str]:
    """Take over the model of another stage: return it, its tokenizer, an optimizer for it and its model tag.

    Of the config it reads model_tag, step, rates and warm_start.
    """
    tag = resolve_tag(source, config.model_tag)
    model, tokenizer, meta = load_for(runtime, source, "train", tag, config.step)
    optimizer = build_optimizer(model, config.rates, runtime)
    if config.warm_start:
        warm_start(checkpoint_dir(source, tag), meta["step"], optimizer, runtime)
    return model, tokenizer, optimizer, tag


def warm_start(directory: Path, step: int, optimizer: MuonAdamW, runtime: Runtime) -> None:
    """Take over the momentum of the stage before, if it was saved."""
    try:
        with runtime.together():
            optimizer.load_shards(load_optimizer_shards(directory, step))
    except FileNotFoundError:
        logger.info(f"no optimizer state beside step {step} in {directory}: its momentum starts at zero")


def save_progress(
    directory: Path,
    model: GPT,
    optimizer: MuonAdamW,
    runtime: Runtime,
    config: Any,
    progress: Progress,
) -> None:
    """Save a checkpoint that start_or_resume can go on from, with the config that the user asked for."""
    loader_state = merge_states(runtime.gather(progress.loader_state))
    seconds = progress.earlier_seconds + process_seconds()
    saved = {**asdict(progress), "loader_state": loader_state, "earlier_seconds": seconds}
    meta = {"user_config": asdict(config), "progress": saved}
    keep_last = config.cadence.keep_last
    save_checkpoint(directory, progress.step, model, optimizer.state_dict(), meta, keep_last, runtime)
    logger.info(f"step {progress.step:05d} | saved to {directory}")


def report_training(
    stage: str, plan: Plan, model: GPT, progress: Progress, directory: Path, settings: dict[str, Any]
) -> str:
    """Write report/<stage>.json of a finished run and return its one-line result."""
    steps = [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
    middle = sorted(steps, key=lambda record: record["seconds"])[len(steps) // 2] if steps else {}
    parameters = model.num_parameters()
    tokens = plan.num_steps * plan.tokens_per_step
    is_cuda = model.device.type == "cuda"
    result = {
        "settings": settings,
        "hardware": describe(model.device),
        "model": asdict(model.config),
        "parameters": parameters,
        "flops_per_token": model.flops_per_token(),
        "steps": plan.num_steps,
        "tokens": tokens,
        "train_seconds": progress.train_seconds,
        "median_tokens_per_second": middle.get("tokens_per_second"),
        "median_mfu": middle.get("mfu"),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "train_loss": progress.ema.value,
        "first_val_bpb": progress.first_val_bpb,
        "min_val_bpb": progress.min_val_bpb,
        "val_bpb": progress.val_bpb,
        "metrics": str(directory / "metrics.jsonl"),
    }
    write_report(stage, result, progress.earlier_seconds)
    return (
        f"{stage}: {directory.name}, {parameters['total'] / 1e6:.1f} M parameters, "
        f"{tokens / 1e6:.1f} M tokens in {progress.train_seconds / 60:.1f} min; "
        f"validation bpb {progress.first_val_bpb:.4f} -> {progress.val_bpb:.4f} "
        f"({100 * progress.val_bpb / progress.first_val_bpb:.1f} % of step 0)"
    )
