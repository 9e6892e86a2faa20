"""What all training loops do around a step: schedule, checkpoint, evaluation, log lines, SIGTERM.

Order between two steps: checkpoint, then evaluation, so that a failing evaluation loses nothing.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nanochat.optim.muon_adamw import MuonAdamW
from nanochat.optim.schedule import Plan
from nanochat.train.run import Run

logger = logging.getLogger(__name__)
Record = dict[str, Any]  # a line of metrics.jsonl


@dataclass
class Stop:
    """A request to end the run early, by SIGTERM."""

    here: bool = False  # this rank has received it
    anywhere: bool = False  # a rank has; the loop sets it after each step, on all ranks alike


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Note SIGTERM in the Stop that this yields, rather than dying in the middle of a step."""
    stop = Stop()

    def on_sigterm(_signum: int, _frame: object) -> None:
        stop.here = True

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def steps(
    run: Run,
    plan: Plan,
    stop: Stop,
    *,
    evaluate: Callable[[], None],
    sample: Callable[[], object],
    extras: Sequence[tuple[int, Callable[[], object]]] = (),
) -> Iterator[int]:
    """Yield the number of each step from run.progress.step on; save, evaluate and sample where due.

    The loop body trains the step and calls `finish_step`. extras are pairs (every, action): an action is due
    at multiples of `every`, except before the first step and after the last. Ends after plan.num_steps steps,
    or after saving once stop.anywhere is set.
    """
    cadence, start = run.config.cadence, run.progress.step
    while True:
        step = run.progress.step
        is_last = step == plan.num_steps
        if step > start and (is_last or stop.anywhere or is_due(step, cadence.save_every)):
            run.save()
        if stop.anywhere and not is_last:
            logger.info(f"SIGTERM: saved step {step}, stopping")
            return
        if is_last or step == 0 or is_due(step, cadence.eval_every):
            evaluate()
        if is_last or (step > 0 and is_due(step, cadence.sample_every)):
            sample()
        for every, action in extras:
            if 0 < step < plan.num_steps and is_due(step, every):
                action()
        if is_last:
            return
        yield step


def is_due(step: int, every: int) -> bool:
    """Return True if `step` is a multiple of `every`; 0 and -1 mean never."""
    return every > 0 and step % every == 0


def set_schedule(optimizer: MuonAdamW, plan: Plan, step: int, share: float = 1.0) -> float:
    """Set rates, momentum and weight decay of a step; return the factor on the learning rates.

    The factor is `share` of the schedule's.
    """
    progress = step / plan.num_steps
    multiplier = share * plan.lr_multiplier(progress)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = plan.momentum(step)
            group["weight_decay"] = group["initial_weight_decay"] * (1 - progress)
    return multiplier


def check_finite(step: int, loss: float, grad_norm: float, multiplier: float) -> None:
    """Raise FloatingPointError, before the update, unless loss and gradients are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}, rates x {multiplier:.3f}; "
            "stopped before the update, so the last checkpoint is good: --resume with lower rates"
        )


def finish_step(run: Run, plan: Plan, record: Record, describe: Callable[[Run, Plan, Record], str]) -> None:
    """Count a step that took record["seconds"], log the record, and print its description where due."""
    progress = run.progress
    progress.step += 1
    progress.train_seconds += record["seconds"]
    run.log({**record, "train_seconds": progress.train_seconds})
    if progress.step == plan.num_steps or is_due(progress.step, run.config.cadence.log_every):
        done = f"{progress.step:05d}/{plan.num_steps} ({100 * progress.step / plan.num_steps:.0f} %)"
        logger.info(f"step {done} | {describe(run, plan, record)}")
