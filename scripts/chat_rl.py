"""Reinforcement learning: sample answers to questions, and learn from which of them were right.

    python -m scripts.chat_rl --data=embedded
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --model-tag=d20 --run=d20

The update is in nanochat/train/rl.py, the sampling of answers in nanochat/train/rollouts.py.
Checkpoints and metrics.jsonl go to $NANOCHAT_BASE_DIR/chatrl_checkpoints/<model tag>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

import tyro

from nanochat.common import DType, parse, require_at_least, require_counts, setup_runtime
from nanochat.common import run as run_script
from nanochat.decode import DecoderKind
from nanochat.optim.schedule import Cadence, OptimizerConfig, Plan, lr_multiplier
from nanochat.recipes import SAINT_IBERIS
from nanochat.train.chat import check_start, follow_recipe

if TYPE_CHECKING:
    from nanochat.train.run import Run


@dataclass(frozen=True, kw_only=True)
class ChatRLConfig:
    """Settings of reinforcement learning."""

    run: str = "dummy"
    """name of the wandb run; "dummy" keeps the numbers in metrics.jsonl alone"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage whose model is trained: sft or mid"""
    data: str = "auto"
    """questions: hub (GSM8K; the same for hub:fineweb and hub:climbmix), embedded (arithmetic and spelling,
    measured on arithmetic) or auto"""
    device_type: str = ""
    """cuda, mps or cpu; empty finds the best there is"""
    dtype: DType = "auto"
    """of activations: float32 or bfloat16; auto: bfloat16 on CUDA cards that have it, else float32"""
    model_tag: str = ""
    """name of the checkpoint folder to start from and to write to; empty: the deepest dN there is"""
    step: int = -1
    """which checkpoint to start from; -1: the newest"""
    seed: int = 42
    """of the order of the questions and of the samples"""

    num_epochs: int = 1
    """passes over the questions; the last step is filled up from the next pass"""
    num_steps: int = -1
    """optimizer steps; -1: as many as num_epochs take"""
    examples_per_step: int = 16
    """questions of one optimizer step, over all devices"""
    num_samples: int = 16
    """answers to each question"""
    max_new_tokens: int = 256
    """tokens of an answer, at most; half of the context at most"""
    temperature: float = 1.0
    """of sampling; the gradient is that of temperature 1, and biased at any other"""
    top_k: int = 50
    """sample from the k likeliest tokens, for which the gradient is biased; 0: from all"""
    rollout_batch_size: int = 128
    """answers decoded at a time on one device, on a GPU fastest up to 128; lower it when memory runs out in
    sampling or evaluation"""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""
    device_batch_size: int = 8
    """answers of one forward to learn from on one device; lower it when memory runs out in learning"""

    warm_start: bool = False
    """start with the optimizer state of the stage before, if it was saved"""
    init_lr_frac: float = 0.05
    """factor on all learning rates, which fall from there linearly to 0"""
    scale_lr_by_contrast: bool = False
    """multiply the rates of a step by the share of its answers rewarded unlike others to their question"""
    recipe: str = ""
    """recipe that the optimizer's defaults are from; empty: that of the model to start from"""
    optimizer: OptimizerConfig = SAINT_IBERIS.chat_optimizer
    eval_examples: int = 400
    """test questions of an evaluation, at most all"""
    cadence: Cadence = field(
        default_factory=partial(Cadence, eval_every=60, sample_every=60, save_every=60, log_every=1)
    )
    resume: bool = False
    """continue from the newest checkpoint of this stage, if any"""
    overwrite: bool = False
    """delete the checkpoints that this stage has under this model tag and start over"""
    dry_run: bool = False
    """train, but write no checkpoint, metrics or report"""

    def __post_init__(self) -> None:
        ones = ("num_epochs", "examples_per_step", "max_new_tokens", "device_batch_size", "eval_examples")
        # one sample alone is never better than the mean
        require_at_least(self, seed=0, num_samples=2, top_k=0, **dict.fromkeys(ones, 1))
        require_counts(self, "num_steps")
        if self.rollout_batch_size < self.num_samples:
            raise ValueError(
                f"rollout_batch_size={self.rollout_batch_size} must hold the num_samples={self.num_samples} "
                "of a question"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0: greedy answers do not differ")
        if not 0 < self.init_lr_frac < math.inf:
            raise ValueError(f"init_lr_frac={self.init_lr_frac} must be above 0 and finite")
        if self.source not in ("mid", "sft"):
            raise ValueError(f"source={self.source!r} must be sft or mid; to continue with rl, --resume")
        check_start(self)


def check_resumed(run: Run[ChatRLConfig]) -> None:
    """Raise ValueError if the steps done took other numbers of questions: plan and rates would change."""
    step, n = run.progress.step, run.config.examples_per_step
    if step and run.progress.loader_state["next_question"] != step * n:
        before = run.progress.loader_state["next_question"] // step
        raise ValueError(
            f"examples_per_step={n} is not that of the run to resume, whose steps took {before}: resume with "
            f"{before}, or start over with --overwrite"
        )


def make_plan(config: ChatRLConfig, n_questions: int, max_new_tokens: int) -> Plan:
    """Derive the steps from the settings; the last one is filled up from the next epoch."""
    num_steps = -(-config.num_epochs * n_questions // config.examples_per_step)
    return Plan(
        num_steps=num_steps if config.num_steps == -1 else config.num_steps,
        accumulation=1,
        tokens_per_step=config.examples_per_step * config.num_samples * max_new_tokens,  # at most
        lr_multiplier=partial(lr_multiplier, peak=config.init_lr_frac, warmdown=1.0),
        momentum=config.optimizer.momentum_at,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/chat_rl.json."""
    config = parse(ChatRLConfig, argv)
    config = follow_recipe(config, config.source, argv)

    from nanochat.chat_eval import evaluate_task
    from nanochat.chat_format import limit_reply
    from nanochat.engine import Engine
    from nanochat.train.results import report_rl
    from nanochat.train.rl import train
    from nanochat.train.rollouts import Rollouts
    from nanochat.train.run import Run
    from nanochat.train.samples import print_replies
    from tasks.mixtures import rl_tasks

    train_task, test_task = rl_tasks(config.data)
    runtime = setup_runtime(config.device_type, config.dtype, trains=True)
    run = Run.open_from(config.source, "rl", config, runtime)
    check_resumed(run)
    model, tokenizer = run.model, run.tokenizer

    warn = print if runtime.is_main else None
    max_new_tokens = limit_reply(config.max_new_tokens, model.config.sequence_len, warn)
    rollouts = Rollouts(
        task=train_task,
        engine=Engine(model, tokenizer, config.decoder),
        examples_per_step=config.examples_per_step,
        num_samples=config.num_samples,
        max_new_tokens=max_new_tokens,
        batch_size=config.rollout_batch_size,
        temperature=config.temperature,
        top_k=config.top_k,
        seed=config.seed,
    )
    plan = make_plan(config, len(train_task), max_new_tokens)
    evaluate = partial(
        evaluate_task,
        test_task,
        model,
        tokenizer,
        runtime,
        batch_size=config.rollout_batch_size,
        max_new_tokens=max_new_tokens,
        max_problems=config.eval_examples,
        decoder=config.decoder,
    )
    sample = partial(
        print_replies,
        model,
        tokenizer,
        runtime,
        test_task,
        max_tokens=max_new_tokens,
        decoder=config.decoder,
    )
    run.begin(plan)
    is_finished = train(
        run,
        rollouts,
        plan,
        batch_size=config.device_batch_size,
        scale_lr_by_contrast=config.scale_lr_by_contrast,
        evaluate=evaluate,
        sample=sample,
    )
    run.close()
    if is_finished and runtime.is_main:
        print(report_rl(run, plan))
    return 0


if __name__ == "__main__":
    run_script(main)
