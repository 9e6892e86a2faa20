"""The conversations of a midtraining or finetuning run: rows of a step, batches, plan and validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanochat.common import Runtime
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim.schedule import Plan, lr_multiplier
from nanochat.task import Task
from nanochat.train.chat import ChatTrainConfig
from nanochat.train.conversations import Conversations, Piece, by_width
from nanochat.train.memory import choose_rows
from nanochat.train.run import Run


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """How an optimizer step is divided into forwards."""

    seq_len: int  # tokens of a row, at most
    rows: int  # of a step, over all ranks
    batch_size: int  # rows of a forward on one rank
    accumulation: int  # forwards of a step on one rank

    @classmethod
    def choose(cls, run: Run[ChatTrainConfig]) -> StepShape:
        """Derive the shape from the settings and the memory; ValueError if rows or tokens do not divide."""
        config, context = run.config, run.model.config.sequence_len
        seq_len = context if config.max_seq_len == -1 else config.max_seq_len
        if seq_len > context:
            raise ValueError(f"max_seq_len={seq_len} must be at most {context}, the model's context")
        rows = config.rows_per_step(seq_len)
        batch_size = choose_rows(config.device_batch_size, run.model, rows, run.runtime, fused=config.fused)
        accumulation = accumulation_steps(rows, batch_size, run.runtime)
        return cls(seq_len=seq_len, rows=rows, batch_size=batch_size, accumulation=accumulation)


def accumulation_steps(rows_per_step: int, device_batch_size: int, runtime: Runtime) -> int:
    """Return the forwards of a step on one rank; ValueError if the rows of a step do not divide."""
    if device_batch_size < 1:
        raise ValueError(
            f"device_batch_size={device_batch_size} must be at least 1, or 0 to choose it by memory"
        )
    micro_batch = device_batch_size * runtime.world_size
    if rows_per_step < 1 or rows_per_step % micro_batch:
        raise ValueError(
            f"a step of {rows_per_step} rows must be a multiple of device_batch_size x ranks = "
            f"{device_batch_size} x {runtime.world_size}; "
            f"try {max(1, rows_per_step // micro_batch) * micro_batch}"
        )
    return rows_per_step // micro_batch


@dataclass(frozen=True, kw_only=True)
class ChatData:
    """Training and validation conversations, laid out in rows for the steps of a run."""

    run: Run[ChatTrainConfig]
    shape: StepShape
    train_set: Conversations
    val_set: Conversations
    rows: list[list[Piece]]  # of an epoch
    val_rows: list[list[Piece]]
    token_bytes: Tensor  # (V,) int32, the length of each token's text

    @classmethod
    def lay_out(
        cls, run: Run[ChatTrainConfig], shape: StepShape, train_task: Task, val_task: Task, *, packed: bool
    ) -> ChatData:
        """Measure the conversations of both tasks and lay them out; all ranks take part."""
        conversations = partial(Conversations, tokenizer=run.tokenizer, seq_len=shape.seq_len, packed=packed)
        train_set, val_set = conversations(task=train_task), conversations(task=val_task)
        n_val = run.config.val_conversations
        val_rows = val_set.plan(run.runtime, n_val)[: run.config.rows_per_validation(shape.seq_len)]
        return cls(
            run=run,
            shape=shape,
            train_set=train_set,
            val_set=val_set,
            rows=by_width(train_set.plan(run.runtime), shape.rows),
            val_rows=by_width(val_rows, n_val),
            token_bytes=torch.from_numpy(run.tokenizer.token_bytes()),
        )

    def plan(self) -> Plan:
        """Derive the steps from the settings and the rows of an epoch."""
        config = self.run.config
        num_steps = -(-config.num_epochs * len(self.rows) // self.shape.rows)
        n_places = sum(end - begin for row in self.rows for _, begin, end in row)
        return Plan(
            num_steps=num_steps if config.num_iterations == -1 else config.num_iterations,
            accumulation=self.shape.accumulation,
            # on average, without padding
            tokens_per_step=max(1, n_places * self.shape.rows // len(self.rows)),
            lr_multiplier=partial(lr_multiplier, peak=config.init_lr_frac, warmdown=config.warmdown_ratio),
            momentum=config.optimizer.momentum_at,
        )

    def batches(self) -> Iterator[tuple[Tensor, Tensor, dict]]:
        """Yield the batches that are left of the run; ValueError if it was started with other rows."""
        config = self.run.config
        return self.train_set.batches(
            self.rows,
            self.shape.batch_size,
            self.run.runtime,
            start=self._first_row(),
            stop=config.num_epochs * len(self.rows) if config.num_iterations == -1 else None,
        )

    def _first_row(self) -> int:
        """Return the row that the run starts or resumes at."""
        state = self.run.progress.loader_state
        if not state:
            return 0
        started = state["n_rows"], state["next_row"] // self.run.progress.step
        if started != (len(self.rows), self.shape.rows):
            raise ValueError(
                f"the run was started with {started[0]} rows an epoch and {started[1]} a step, "
                f"these settings make {len(self.rows)} and {self.shape.rows}: resume with the data, "
                "max_seq_len and batch size that it was started with"
            )
        return state["next_row"]

    def evaluate(self) -> float:
        """Return the bits per byte of the validation conversations."""
        run, n_rows, batch_size = self.run, len(self.val_rows), self.shape.batch_size
        batches = self.val_set.batches(self.val_rows, batch_size, run.runtime, stop=n_rows)
        n_batches = -(-n_rows // (batch_size * run.runtime.world_size))
        return evaluate_bpb(run.model, batches, n_batches, self.token_bytes)
