"""What midtraining and supervised finetuning share: a model that is there, conversations, a pass over them.

Both start from the newest checkpoint of another stage, with its optimizer's momentum if that was saved, and
end when every conversation has been seen `num_epochs` times. They differ in what train_on_conversations is
told: the tasks, whether rows are packed, how many make a step, and the schedule.

Everything that settings can get wrong is told before a checkpoint is deleted or a conversation is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from nanochat.common import Runtime, require_at_least, require_counts
from nanochat.optim.schedule import Cadence, LearningRates, Plan

if TYPE_CHECKING:
    from nanochat.task import Task
    from nanochat.train.conversations import Piece
    from nanochat.train.run import Progress


@dataclass(frozen=True, kw_only=True)
class ChatTrainConfig:
    """Settings that midtraining and SFT have in common."""

    run: str = "dummy"
    """name of the wandb run; "dummy" keeps the numbers in metrics.jsonl alone"""
    data: str = "auto"
    """conversations: auto, hub, embedded, or your own: a .jsonl file, a folder or a glob"""
    add: str = ""
    """conversations of your own to learn beside those of `data`: a .jsonl file, a folder or a glob"""
    device_type: str = ""
    """cuda, mps or cpu; empty finds the best there is"""
    compile: bool | None = None
    """compile the blocks with torch.compile; None: on CUDA only"""
    fused: bool | None = None
    """train by the kernels of nanochat/kernels; None: where they run, with bfloat16 on NVIDIA cards"""
    model_tag: str = ""
    """name of the checkpoint folder to start from and to write to; empty: the deepest dN there is"""
    step: int = -1
    """which checkpoint to start from; -1: the newest"""
    max_seq_len: int = -1
    """tokens of a row; -1: the model's context"""
    num_epochs: int = 1
    """passes over the conversations"""
    num_iterations: int = -1
    """optimizer steps; -1: as many as num_epochs take"""
    warm_start: bool = True
    """start with the optimizer state of the stage before, if it was saved"""
    init_lr_frac: float = 1.0
    """factor on all learning rates"""
    warmdown_ratio: float = 0.2
    """last share of training, over which the learning rates fall to 0"""
    rates: LearningRates = field(default_factory=LearningRates)
    cadence: Cadence = field(default_factory=Cadence)
    val_conversations: int = 5000
    """validation conversations, at most all"""
    resume: bool = False
    """go on from the newest checkpoint of this stage, if there is one"""
    overwrite: bool = False
    """delete the checkpoints that this stage has under this model tag and start anew"""

    def __post_init__(self) -> None:
        require_at_least(self, num_epochs=1, val_conversations=1)
        require_counts(self, "num_iterations", "max_seq_len")
        if not 0 < self.init_lr_frac < math.inf:
            raise ValueError(f"init_lr_frac={self.init_lr_frac} must be above 0 and finite")
        if not 0 < self.warmdown_ratio <= 1:
            raise ValueError(f"warmdown_ratio={self.warmdown_ratio} must be in (0, 1]")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")


def train_on_conversations(
    config: ChatTrainConfig,
    runtime: Runtime,
    *,
    stage: str,
    source: str,
    train_task: Task,
    val_task: Task,
    packed: bool,
    rows_per_step: Callable[[int], int],
    device_batch_size: int,
    schedule: Callable[[float], float],
) -> str | None:
    """Train the model of stage `source`; leave checkpoints and metrics.jsonl of `stage`, and its report.

    rows_per_step says of a row length how many rows a step takes, over all ranks. Returns the one-line result
    on the main rank; None elsewhere, and if SIGTERM ended it before, after saving.
    """
    import torch

    from nanochat.checkpoint_manager import checkpoint_dir
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.train.accelerate import accelerate
    from nanochat.train.conversations import Conversations, by_width
    from nanochat.train.loop import train
    from nanochat.train.memory import choose_rows
    from nanochat.train.run import begin, report_training, save_progress, start_from, start_or_resume
    from nanochat.train.samples import print_replies

    model, tokenizer, optimizer, tag = start_from(source, config, runtime)
    seq_len = model.config.sequence_len if config.max_seq_len == -1 else config.max_seq_len
    if seq_len > model.config.sequence_len:
        raise ValueError(
            f"max_seq_len={seq_len} must be at most {model.config.sequence_len}, the model's context"
        )
    n_rows = rows_per_step(seq_len)
    device_batch_size = choose_rows(device_batch_size, model, n_rows, runtime, fused=config.fused)
    accumulation = accumulation_steps(n_rows, device_batch_size, runtime)
    directory = checkpoint_dir(stage, tag)
    progress = start_or_resume(
        directory, model, tokenizer, optimizer, runtime, resume=config.resume, overwrite=config.overwrite
    )
    accelerate(model, compile=runtime.compiles(config.compile), fused=config.fused)

    form = partial(Conversations, tokenizer=tokenizer, seq_len=seq_len, packed=packed)
    train_set, val_set = form(task=train_task), form(task=val_task)
    rows = by_width(train_set.plan(runtime), n_rows)
    val_rows = by_width(val_set.plan(runtime, config.val_conversations), config.val_conversations)
    plan = make_plan(config, rows, n_rows, accumulation, schedule)
    val_steps = -(-len(val_rows) // (device_batch_size * runtime.world_size))
    token_bytes = torch.from_numpy(tokenizer.token_bytes())

    def evaluate() -> float:
        batches = val_set.batches(val_rows, device_batch_size, runtime, stop=len(val_rows))
        return evaluate_bpb(model, batches, val_steps, token_bytes)

    log = begin(directory, tokenizer, runtime, config, plan, progress)
    is_finished = train(
        model,
        optimizer,
        train_set.batches(
            rows,
            device_batch_size,
            runtime,
            start=first_row(progress, rows, n_rows),
            stop=config.num_epochs * len(rows) if config.num_iterations == -1 else None,
        ),
        plan,
        config.cadence,
        runtime,
        progress,
        save=partial(save_progress, directory, model, optimizer, runtime, config),
        evaluate=evaluate,
        sample=partial(print_replies, model, tokenizer, runtime, val_task),
        log=log,
    )
    log.close()
    if not (is_finished and runtime.is_main):
        return None
    name = {"mid": "mid_train", "sft": "chat_sft"}[stage]
    return report_training(name, plan, model, progress, directory, asdict(config))


def accumulation_steps(rows_per_step: int, device_batch_size: int, runtime: Runtime) -> int:
    """Micro-batches of a step on this rank; ValueError when the rows of a step do not divide."""
    if device_batch_size < 1:
        raise ValueError(
            f"device_batch_size={device_batch_size} must be at least 1, or 0 to let it be found by memory"
        )
    micro_batch = device_batch_size * runtime.world_size
    if rows_per_step < 1 or rows_per_step % micro_batch:
        raise ValueError(
            f"a step of {rows_per_step} rows must be a multiple of device_batch_size x ranks = "
            f"{device_batch_size} x {runtime.world_size}; "
            f"try {max(1, rows_per_step // micro_batch) * micro_batch}"
        )
    return rows_per_step // micro_batch


def make_plan(
    config: ChatTrainConfig,
    rows: Sequence[list[Piece]],
    rows_per_step: int,
    accumulation: int,
    schedule: Callable[[float], float],
) -> Plan:
    """Derive the steps from the rows of an epoch."""
    num_steps = -(-config.num_epochs * len(rows) // rows_per_step)
    n_places = sum(end - begin for row in rows for _, begin, end in row)
    return Plan(
        num_steps=num_steps if config.num_iterations == -1 else config.num_iterations,
        accumulation=accumulation,
        tokens_per_step=max(1, n_places * rows_per_step // len(rows)),  # on average, without padding
        lr_multiplier=schedule,
    )


def first_row(progress: Progress, rows: Sequence[list[Piece]], rows_per_step: int) -> int:
    """Where a run begins or goes on; ValueError when it was begun with other rows or other steps."""
    state = progress.loader_state
    if state is None:
        return 0
    begun = {"n_rows": state["n_rows"], "rows_per_step": state["next_row"] // progress.step}
    if begun != {"n_rows": len(rows), "rows_per_step": rows_per_step}:
        raise ValueError(
            f"the run was begun with {begun['n_rows']} rows an epoch and {begun['rows_per_step']} a step, "
            f"these settings make {len(rows)} and {rows_per_step}: resume with the data, max_seq_len and "
            "batch size that it was begun with"
        )
    return state["next_row"]
