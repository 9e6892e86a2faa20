"""Reinforcement learning: GRPO (Shao et al. 2024) without all that one update a step makes superfluous.

A step samples several answers to each of some questions, and makes those likelier that were rewarded more
than the question's others:

    advantage = reward - mean reward of the question's samples
    loss      = -sum over sampled tokens of advantage * log p(token | all before it) / n

n counts the sampled tokens of the whole step over all ranks, so neither micro-batches nor padding change a
gradient. Each answer teaches the very model that gave it, once: there is no ratio to clip, no reference model
and no KL term. Nor is the advantage divided by its deviation, which would favour questions that are nearly
always or nearly never answered (Liu et al. 2025). p is the model's own, without temperature and top-k.

Questions whose samples are all rewarded alike teach nothing and cost no forward; a step of such questions
alone changes nothing, not even by momentum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import Runtime, write_report
from nanochat.gpt import GPT
from nanochat.hardware import describe
from nanochat.metrics import read_metrics
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import Cadence, Plan
from nanochat.train.loop import check_finite, is_due, set_schedule, sigterm_flag, steps_to_do
from nanochat.train.rollouts import Rollouts, Sample
from nanochat.train.run import Progress

logger = logging.getLogger(__name__)


def policy_loss(model: GPT, samples: Sequence[Sample], n_tokens: float) -> Tensor:
    """-sum of advantage * log p over the sampled tokens, divided by n_tokens; 0-D, in nats."""
    width = max(len(sample.ids) for sample in samples) - 1
    inputs = torch.zeros((len(samples), width), dtype=torch.int64)  # (B,T), padded on the right
    targets = torch.full_like(inputs, -1)
    for row, sample in enumerate(samples):
        ids, mask = torch.tensor(sample.ids), torch.tensor(sample.mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].where(mask[1:] == 1, -1)
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    nats = model(inputs, targets, loss_reduction="none").view_as(targets)  # -log p; 0 at target -1
    weights = torch.tensor([sample.advantage for sample in samples], device=nats.device, dtype=nats.dtype)
    return (weights[:, None] * nats).sum() / n_tokens


def accumulate(model: GPT, samples: Sequence[Sample], n_tokens: float, batch_size: int) -> Tensor:
    """Leave the gradients of this rank's samples in the model, none if it has none; return its loss, 0-D.

    Goes batch_size rows at a time, the longest first: if memory does not suffice, that is seen at once.
    """
    samples = sorted((s for s in samples if s.advantage != 0), key=lambda s: len(s.ids), reverse=True)
    total = torch.zeros((), device=model.device)
    for start in range(0, len(samples), batch_size):
        loss = policy_loss(model, samples[start : start + batch_size], n_tokens)
        loss.backward()
        total += loss.detach()
    return total


def train(
    model: GPT,
    optimizer: MuonAdamW,
    rollouts: Rollouts,
    plan: Plan,
    cadence: Cadence,
    runtime: Runtime,
    progress: Progress,
    *,
    batch_size: int,
    save: Callable[[Progress], None],
    evaluate: Callable[[], dict[str, Any]],
    sample: Callable[[], None],
    log: Callable[[dict], None],
) -> bool:
    """Train from progress.step to plan.num_steps; return False if SIGTERM ended it before, after saving.

    train_loop's loop does not serve here: it fetches the next batches before the update. Raises
    FloatingPointError before an update that is not finite.
    """
    progress.loader_state = progress.loader_state or {"next_question": 0, "positions": {}}
    stop = [False]

    def measure() -> None:
        found = evaluate()
        log({"step": progress.step, **found})
        accuracy = f"{found['accuracy']:.4f} +- {found['standard_error']:.4f}"
        logger.info(f"step {progress.step:05d} | accuracy {accuracy}")

    with sigterm_flag() as sigterm:
        for _ in steps_to_do(plan, cadence, progress, stop, save=save, evaluate=measure, sample=sample):
            record = _train_step(model, optimizer, rollouts, plan, runtime, progress, batch_size)
            log(record)
            if progress.step == plan.num_steps or is_due(progress.step, cadence.log_every):
                _print_step(record, plan, progress)
            stop[0] = runtime.sum_(torch.tensor(float(sigterm[0]), device=runtime.device)).item() > 0
    return progress.step == plan.num_steps


def _train_step(
    model: GPT,
    optimizer: MuonAdamW,
    rollouts: Rollouts,
    plan: Plan,
    runtime: Runtime,
    progress: Progress,
    batch_size: int,
) -> dict[str, Any]:
    """Sample, learn, update; return what metrics.jsonl says of it."""
    began = time.perf_counter()
    step, first = progress.step, progress.loader_state["next_question"]
    multiplier = set_schedule(optimizer, plan, step)
    samples = rollouts.sample(step, first, runtime)
    sums = torch.zeros(len(rollouts.task_names), 5)
    for s in samples:
        counted = (1, s.reward, sum(s.mask), s.has_ended, s.advantage != 0)
        sums[rollouts.task_names.index(s.task)] += torch.tensor(counted)
    sums = runtime.sum_(sums.to(runtime.device))
    n_samples, reward, n_tokens, ended, n_useful = sums.sum(0).tolist()
    by_task = zip(rollouts.task_names, sums.tolist(), strict=True)
    loss = grad_norm = 0.0
    if n_useful:
        loss = accumulate(model, samples, n_tokens, batch_size)
        loss, squared_norm = runtime.sum_(torch.stack([loss, optimizer.finish_reduction()])).tolist()
        grad_norm = squared_norm**0.5
        check_finite(step, loss, grad_norm, multiplier)
        optimizer.step()
    seconds = time.perf_counter() - began
    progress.step += 1
    progress.train_seconds += seconds
    progress.loader_state = {"next_question": first + rollouts.examples_per_step, "positions": {}}
    return {
        "step": step,
        "reward": reward / n_samples,
        "rewards": {task: reward / n for task, (n, reward, *_) in by_task if n},
        "smooth_reward": progress.ema.update(reward / n_samples),
        "contrast": n_useful / n_samples,  # share of samples that were better or worse than others
        "length": n_tokens / n_samples,
        "ended": ended / n_samples,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr_multiplier": multiplier,
        "seconds": seconds,
        "tokens_per_second": n_tokens / seconds,
        "train_seconds": progress.train_seconds,
    }


def _print_step(record: dict[str, Any], plan: Plan, progress: Progress) -> None:
    done = progress.step
    eta = (plan.num_steps - done) * progress.train_seconds / done
    logger.info(
        f"step {done:05d}/{plan.num_steps} ({100 * done / plan.num_steps:.0f} %)"
        f" | reward {record['smooth_reward']:.4f} | length {record['length']:.0f}"
        f" | ended {100 * record['ended']:.0f} % | lr x {record['lr_multiplier']:.4f}"
        f" | {record['seconds']:.1f} s | {record['tokens_per_second']:,.0f} tok/s | eta {eta / 60:.1f} min"
    )


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last tenth."""
    tenth = -(-len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def report_rl(model: GPT, plan: Plan, progress: Progress, directory: Path, settings: dict[str, Any]) -> str:
    """Write report/chat_rl.json of a finished run and return its one-line result.

    Its rewards are means over the first and last tenth of the steps, its accuracies those before and after.
    """
    path = directory / "metrics.jsonl"
    records = read_metrics(path)
    rewards = [record["reward"] for record in records if "reward" in record]
    measured = [record for record in records if "accuracy" in record]
    first, last = _tenths(rewards) if rewards else (None, None)  # of a run that came without its metrics
    before = measured[0]["accuracy"] if measured[0]["step"] == 0 else None
    by_task = {
        task: _tenths([r["rewards"][task] for r in records if task in r.get("rewards", {})])
        for task in sorted({task for record in records for task in record.get("rewards", {})})
    }
    result = {
        "settings": settings,
        "hardware": describe(model.device),
        "model": asdict(model.config),
        "steps": plan.num_steps,
        "seconds": progress.train_seconds,
        "first_reward": first,
        "last_reward": last,
        "rewards": {
            task: dict(zip(("first", "last"), tenths, strict=True)) for task, tenths in by_task.items()
        },
        "first_accuracy": before,
        "accuracy": measured[-1]["accuracy"],
        "standard_error": measured[-1]["standard_error"],
        "metrics": str(path),
    }
    write_report("chat_rl", result, progress.earlier_seconds)
    return (
        f"chat_rl: {directory.name}, {plan.num_steps} steps in {progress.train_seconds / 60:.1f} min; "
        + (f"reward {first:.4f} -> {last:.4f}, " if rewards else "")
        + "accuracy "
        + ("" if before is None else f"{before:.4f} -> ")
        + f"{result['accuracy']:.4f} +- {result['standard_error']:.4f}"
    )
