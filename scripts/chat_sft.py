"""Supervised finetuning: learn the assistant's replies, one conversation a row.

    python -m scripts.chat_sft --data=embedded
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --model-tag=d20 --run=d20

Only the assistant's tokens are learned, all with the same weight. Checkpoints and metrics.jsonl go to
$NANOCHAT_BASE_DIR/chatsft_checkpoints/<model tag>.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from nanochat.common import parse, require_counts, setup_runtime
from nanochat.common import run as run_script
from nanochat.optim.schedule import require_interval
from nanochat.train.chat import ChatTrainConfig, follow_recipe

if TYPE_CHECKING:
    from nanochat.task import Task
    from nanochat.train.run import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(ChatTrainConfig):
    """Settings of supervised finetuning."""

    source: Literal["mid", "base"] = "mid"
    """stage whose model is finetuned"""
    compile: bool | None = False
    """compile the blocks with torch.compile; off, since micro-batches differ in width"""
    device_batch_size: int = 4
    """conversations of one forward on one device; lower it when memory runs out"""
    conversations_per_step: Annotated[int, tyro.conf.arg(aliases=["--target-examples-per-step"])] = 32
    """conversations of one optimizer step, over all devices"""
    init_lr_frac: float = 0.02
    """factor on all learning rates"""
    warmdown_ratio: float = 1.0
    """last share of training, over which the learning rates fall to 0"""
    eval_metrics_every: int = 0
    """steps between accuracies of multiple choice on the way, of MMLU and ARC, or with embedded data of
    DocChoice; 0 or -1: none"""
    eval_metrics_max_problems: int = 1024
    """problems of each of these tasks; -1: all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_interval("eval_metrics_every", self.eval_metrics_every)
        require_counts(self, "eval_metrics_max_problems")

    def rows_per_step(self, seq_len: int) -> int:
        """Return conversations_per_step: a row is a conversation, whatever its length."""
        return self.conversations_per_step


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/chat_sft.json."""
    config = parse(ChatSFTConfig, argv)
    config = follow_recipe(config, config.source, argv)

    from nanochat.train.accelerate import accelerate
    from nanochat.train.chat_data import ChatData, StepShape
    from nanochat.train.loop import train
    from nanochat.train.results import report_training
    from nanochat.train.run import Run
    from nanochat.train.samples import print_replies
    from tasks.mixtures import choice_tasks, sft_tasks, with_own

    train_task, val_task = with_own(sft_tasks(config.data), config.add)
    every = config.eval_metrics_every
    choices = choice_tasks(config.data) if every > 0 else {}
    runtime = setup_runtime(config.device_type, config.dtype, trains=True)
    run = Run.open_from(config.source, "sft", config, runtime)
    shape = StepShape.choose(run)
    accelerate(run.model, compile=runtime.compiles(config.compile), fused=config.fused)
    data = ChatData.lay_out(run, shape, train_task, val_task, packed=False)
    plan, batches = data.plan(), data.batches()
    sample = partial(print_replies, run.model, run.tokenizer, runtime, val_task, decoder=config.decoder)
    run.begin(plan)
    extras = [(every, partial(measure_choices, run, choices))]
    is_finished = train(run, batches, plan, evaluate=data.evaluate, sample=sample, extras=extras)
    run.close()
    if is_finished and runtime.is_main:
        print(report_training(run, plan))
    return 0


def measure_choices(run: Run[ChatSFTConfig], tasks: Mapping[str, Task]) -> None:
    """Evaluate multiple-choice tasks and log their accuracies."""
    from nanochat.chat_eval import evaluate_task

    config, accuracies = run.config, {}
    for name, task in tasks.items():
        figures = evaluate_task(
            task,
            run.model,
            run.tokenizer,
            run.runtime,
            batch_size=config.device_batch_size,
            max_new_tokens=1,
            max_problems=config.eval_metrics_max_problems,
            name=name,
        )
        accuracies[name] = figures["accuracy"]
    run.log({"step": run.progress.step, "accuracies": accuracies})
    shown = ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in accuracies.items())
    logger.info(f"step {run.progress.step:05d} | accuracy {shown}")


if __name__ == "__main__":
    run_script(main)
