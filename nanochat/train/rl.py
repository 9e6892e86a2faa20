"""Reinforcement learning: GRPO (Shao et al. 2024) reduced to what one update a step needs.

A step samples several answers to each of some questions, and raises the probability of those that were
rewarded more than the question's others:

    advantage = reward - mean reward of the question's samples
    loss      = -sum over sampled tokens of advantage * log p(token | all before it) / n

n counts the sampled tokens of the whole step over all ranks, so neither micro-batches nor padding change a
gradient. Each answer is used once, to update the very model that gave it: there is no ratio to clip, no
reference model and no KL term. Nor is the advantage divided by its deviation, which would favour questions
that are nearly always or nearly never answered (Liu et al. 2025).

p is the softmax over all tokens at temperature 1. Samples drawn with temperature 1 and top_k 0 are from p
itself, and the gradient of the sum is in expectation that of the expected reward, times a constant (Williams
1992). With another temperature or with top_k they are from another distribution, and it is biased.

Questions whose samples all have the same reward add nothing and cost no forward; a step of such questions
alone changes nothing, not even by momentum. But Muon and AdamW normalise their updates, so that a step in
which one question tells anything would move the weights as far as one in which all do. scale_lr_by_contrast
multiplies its learning rates by its contrast, the share of samples of all ranks that have an advantage.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanochat.gpt import GPT
from nanochat.optim.schedule import Plan
from nanochat.train.rollouts import Rollouts, Sample
from nanochat.train.run import Run
from nanochat.train.steps import Record, check_finite, finish_step, set_schedule, steps, stop_on_sigterm

logger = logging.getLogger(__name__)
SUMS = ("samples", "reward", "tokens", "ended", "useful")  # useful: rewarded unlike others to its question


def policy_loss(model: GPT, samples: Sequence[Sample], n_tokens: float) -> Tensor:
    """Return -sum of advantage * log p over the sampled tokens, divided by n_tokens; 0-D, in nats."""
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
    """Leave the gradients of this rank's samples in the model, none if it has none; return their loss, 0-D.

    Takes batch_size rows at a time, the longest first, so that a lack of memory shows at once.
    """
    samples = sorted((s for s in samples if s.advantage != 0), key=lambda s: len(s.ids), reverse=True)
    total = torch.zeros((), device=model.device)
    for start in range(0, len(samples), batch_size):
        loss = policy_loss(model, samples[start : start + batch_size], n_tokens)
        loss.backward()
        total += loss.detach()
    return total


def train(
    run: Run,
    rollouts: Rollouts,
    plan: Plan,
    *,
    batch_size: int,
    scale_lr_by_contrast: bool,
    evaluate: Callable[[], dict[str, Any]],
    sample: Callable[[], object],
) -> bool:
    """Train to plan.num_steps; return False if SIGTERM ended the run early, after saving.

    batch_size is the number of answers of a forward, evaluate returns the figures of `evaluate_task`. Raises
    FloatingPointError before an update that is not finite. (train/loop.py fetches the next step's batches
    before the update; here the next answers come from the updated model.)
    """
    run.progress.loader_state = run.progress.loader_state or {"next_question": 0, "positions": {}}
    measure = partial(_measure, run, evaluate)
    with stop_on_sigterm() as stop:
        for _ in steps(run, plan, stop, evaluate=measure, sample=sample):
            record = _train_step(run, rollouts, plan, batch_size, scale_lr_by_contrast)
            finish_step(run, plan, record, _describe)
            stops = torch.tensor(float(stop.here), device=run.runtime.device)
            stop.anywhere = run.runtime.sum_(stops).item() > 0
    return run.progress.step == plan.num_steps


def _train_step(
    run: Run, rollouts: Rollouts, plan: Plan, batch_size: int, scale_lr_by_contrast: bool
) -> Record:
    """Sample answers, learn from them, and return the step's record."""
    began = time.perf_counter()
    progress, first = run.progress, run.progress.loader_state["next_question"]
    samples = rollouts.sample(progress.step, first, run.runtime)
    sums, rewards = _sum_up(samples, rollouts.task_names, run)
    n = sums["samples"]
    contrast = sums["useful"] / n
    multiplier = set_schedule(run.optimizer, plan, progress.step, contrast if scale_lr_by_contrast else 1.0)
    loss = grad_norm = 0.0
    if sums["useful"]:
        loss, grad_norm = _update(run, samples, sums["tokens"], batch_size, multiplier)
    seconds = time.perf_counter() - began
    progress.loader_state = {"next_question": first + rollouts.examples_per_step, "positions": {}}
    return {
        "step": progress.step,
        "reward": sums["reward"] / n,
        "rewards": rewards,
        "smooth_reward": progress.ema.update(sums["reward"] / n),
        "contrast": contrast,
        "length": sums["tokens"] / n,
        "ended": sums["ended"] / n,
        "loss": loss,
        "grad_norm": grad_norm,
        "lr_multiplier": multiplier,
        "seconds": seconds,
        "tokens_per_second": sums["tokens"] / seconds,
    }


def _sum_up(
    samples: Sequence[Sample], tasks: Sequence[str], run: Run
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the SUMS over the samples of all ranks, and the mean reward of each task among them."""
    sums = torch.zeros(len(tasks), len(SUMS))
    for s in samples:
        counted = (1, s.reward, sum(s.mask), s.has_ended, s.advantage != 0)
        sums[tasks.index(s.task)] += torch.tensor(counted)
    sums = run.runtime.sum_(sums.to(run.runtime.device))
    rewards = {task: reward / n for task, (n, reward, *_) in zip(tasks, sums.tolist(), strict=True) if n}
    return dict(zip(SUMS, sums.sum(0).tolist(), strict=True)), rewards


def _update(
    run: Run, samples: Sequence[Sample], n_tokens: float, batch_size: int, multiplier: float
) -> tuple[float, float]:
    """Change the weights; return loss and gradient norm over all ranks."""
    loss = accumulate(run.model, samples, n_tokens, batch_size)
    sums = run.runtime.sum_(torch.stack([loss, run.optimizer.finish_reduction()]))
    loss, squared_norm = sums.tolist()
    check_finite(run.progress.step, loss, squared_norm**0.5, multiplier)
    run.optimizer.clip(squared_norm**0.5)
    run.optimizer.step()
    return loss, squared_norm**0.5


def _measure(run: Run, evaluate: Callable[[], dict[str, Any]]) -> None:
    found = evaluate()
    run.log({"step": run.progress.step, **found})
    accuracy = f"{found['accuracy']:.4f} +- {found['standard_error']:.4f}"
    logger.info(f"step {run.progress.step:05d} | accuracy {accuracy}")


def _describe(run: Run, plan: Plan, record: Record) -> str:
    done = run.progress.step
    eta = (plan.num_steps - done) * run.progress.train_seconds / done
    return (
        f"reward {record['smooth_reward']:.4f} | contrast {record['contrast']:.2f}"
        f" | length {record['length']:.0f} | ended {100 * record['ended']:.0f} %"
        f" | lr x {record['lr_multiplier']:.4f} | {record['seconds']:.1f} s"
        f" | {record['tokens_per_second']:,.0f} tok/s | eta {eta / 60:.1f} min"
    )
