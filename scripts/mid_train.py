"""Midtraining: teach the base model conversations, multiple choice and the calculator.

    python -m scripts.mid_train --data=embedded
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --model-tag=d20 --run=d20

Conversations are packed into full rows and every token of them is learned. Checkpoints and metrics.jsonl go
to $NANOCHAT_BASE_DIR/mid_checkpoints/<model tag>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from nanochat.common import parse, require_counts, setup_runtime
from nanochat.common import run as run_script
from nanochat.optim.schedule import Cadence
from nanochat.train.chat import ChatTrainConfig, follow_recipe


@dataclass(frozen=True, kw_only=True)
class MidTrainConfig(ChatTrainConfig):
    """Settings of midtraining."""

    device_batch_size: int = 0
    """rows of one forward on one device; 0: as many as its memory holds, at most 32"""
    total_batch_size: int = 524_288
    """tokens of one optimizer step, over all devices"""
    cadence: Cadence = field(default_factory=partial(Cadence, eval_every=150))
    eval_tokens: int = -1
    """tokens of a validation, in whole rows, at most those of val_conversations; -1: all of those"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "eval_tokens")

    def rows_per_step(self, seq_len: int) -> int:
        """Return the rows that hold the tokens of a step; ValueError if they do not divide."""
        n_rows = self.total_batch_size // seq_len
        if n_rows * seq_len != self.total_batch_size:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} must be a multiple of {seq_len}, the tokens of a "
                f"row; try {max(1, n_rows) * seq_len}"
            )
        return n_rows

    def rows_per_validation(self, seq_len: int) -> int | None:
        """Return the rows that hold eval_tokens, the last one perhaps more than needed."""
        return None if self.eval_tokens == -1 else -(-self.eval_tokens // seq_len)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/mid_train.json."""
    config = parse(MidTrainConfig, argv)
    config = follow_recipe(config, "base", argv)

    from nanochat.train.accelerate import accelerate
    from nanochat.train.chat_data import ChatData, StepShape
    from nanochat.train.loop import train
    from nanochat.train.results import report_training
    from nanochat.train.run import Run
    from nanochat.train.samples import print_replies
    from tasks.mixtures import mid_tasks, with_own

    train_task, val_task = with_own(mid_tasks(config.data), config.add)
    runtime = setup_runtime(config.device_type, config.dtype, trains=True)
    run = Run.open_from("base", "mid", config, runtime)
    shape = StepShape.choose(run)
    accelerate(run.model, compile=runtime.compiles(config.compile), fused=config.fused)
    data = ChatData.lay_out(run, shape, train_task, val_task, packed=True)
    plan, batches = data.plan(), data.batches()
    sample = partial(print_replies, run.model, run.tokenizer, runtime, val_task, decoder=config.decoder)
    run.begin(plan)
    is_finished = train(run, batches, plan, evaluate=data.evaluate, sample=sample)
    run.close()
    if is_finished and runtime.is_main:
        print(report_training(run, plan))
    return 0


if __name__ == "__main__":
    run_script(main)
