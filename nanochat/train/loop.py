"""The training loop of pretraining, midtraining and SFT, which differ in batches, schedule and evaluations.

A step accumulates the gradients of its micro-batches, each one's summed loss divided by the number of target
tokens of the whole step over all ranks. So neither the micro-batch size nor the number of ranks nor the
padding of a batch changes the update, and a batch without any target adds nothing instead of NaN.
The next step's batches are fetched while the device still works on the current ones; one synchronisation a
step brings back loss and gradient norm, which are checked before the optimizer changes a weight.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from nanochat.hardware import peak_flops
from nanochat.optim.schedule import Plan
from nanochat.train.run import Run
from nanochat.train.steps import (
    Record,
    Stop,
    check_finite,
    finish_step,
    set_schedule,
    steps,
    stop_on_sigterm,
)

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor, dict]  # inputs (B,T), targets (B,T), loader state after them


def train(
    run: Run,
    batches: Iterator[Batch],
    plan: Plan,
    *,
    evaluate: Callable[[], float],
    sample: Callable[[], object],
    extras: Sequence[tuple[int, Callable[[], object]]] = (),
) -> bool:
    """Train to plan.num_steps; return False if SIGTERM ended the run early, after saving.

    evaluate returns bits per byte; extras are those of `steps`. Raises FloatingPointError before the
    optimizer step when loss or gradients are not finite.
    """
    start = run.progress.step
    peak = peak_flops(run.runtime.device)
    flops = run.model.flops_per_token() * plan.tokens_per_step / run.runtime.world_size
    micro_batches = list(islice(batches, plan.accumulation))
    validate = partial(_validate, run, evaluate)
    with stop_on_sigterm() as stop, _garbage_collector_stop() as stop_garbage_collector:
        for step in steps(run, plan, stop, evaluate=validate, sample=sample, extras=extras):
            began = time.perf_counter()
            record, micro_batches = _train_step(run, plan, micro_batches, batches, stop)
            # the device may still be updating: that time counts to the next step, whose loss waits for it
            seconds = time.perf_counter() - began
            record |= {
                "seconds": seconds,
                "tokens_per_second": plan.tokens_per_step / seconds,
                "mfu": peak and flops / seconds / peak,
            }
            finish_step(run, plan, record, _describe)
            if step == start:
                stop_garbage_collector()
    return run.progress.step == plan.num_steps


def _train_step(
    run: Run, plan: Plan, micro_batches: list[Batch], batches: Iterator[Batch], stop: Stop
) -> tuple[Record, list[Batch]]:
    """Train on micro_batches; return the step's record and the next step's micro-batches."""
    step, loader_state = run.progress.step, micro_batches[-1][2]
    multiplier = set_schedule(run.optimizer, plan, step)
    loss, grad_norm, upcoming = _accumulate(run, micro_batches, batches, stop)
    check_finite(step, loss, grad_norm, multiplier)
    run.optimizer.clip(grad_norm)
    run.optimizer.step()
    run.progress.loader_state = loader_state
    record = {
        "step": step,
        "loss": loss,
        "smooth_loss": run.progress.ema.update(loss),
        "grad_norm": grad_norm,
        "lr_multiplier": multiplier,
    }
    return record, upcoming


def _accumulate(
    run: Run, micro_batches: list[Batch], batches: Iterator[Batch], stop: Stop
) -> tuple[float, float, list[Batch]]:
    """Run a step's forwards and backwards; leave the gradients, summed over ranks, in the optimizer.

    Returns the loss in nats a token, the gradient norm and the next step's micro-batches.
    """
    runtime = run.runtime
    counts = torch.stack([(targets >= 0).sum() for _, targets, _ in micro_batches])
    n_targets = runtime.sum_(counts.sum()).clamp(min=1)
    total = torch.zeros((), device=runtime.device)
    upcoming: list[Batch] = []
    for i, (inputs, targets, _) in enumerate(micro_batches):
        loss = run.model(inputs, targets, loss_reduction="sum") / n_targets
        if i == len(micro_batches) - 1:
            run.optimizer.begin_reduction()
        loss.backward()
        total += loss.detach()
        upcoming += islice(batches, 1)
    stops = torch.full_like(total, float(stop.here))  # torch.tensor would wait for the device
    sums = runtime.sum_(torch.stack([total, run.optimizer.finish_reduction(), stops]))
    loss, squared_norm, n_stops = sums.tolist()  # the step's one synchronisation
    stop.anywhere = n_stops > 0
    return loss, squared_norm**0.5, upcoming


def _validate(run: Run, evaluate: Callable[[], float]) -> None:
    progress = run.progress
    progress.add_validation(bpb := evaluate())
    run.log({"step": progress.step, "val_bpb": bpb, "train_seconds": progress.train_seconds})
    logger.info(f"step {progress.step:05d} | validation bpb {bpb:.4f} (best {progress.min_val_bpb:.4f})")


def _describe(run: Run, plan: Plan, record: Record) -> str:
    mfu = f" | mfu {100 * record['mfu']:.1f} %" if record["mfu"] else ""
    eta = (plan.num_steps - run.progress.step) * record["seconds"]
    return (
        f"loss {record['smooth_loss']:.4f} | lr x {record['lr_multiplier']:.2f}"
        f" | {1000 * record['seconds']:.0f} ms | {record['tokens_per_second']:,.0f} tok/s{mfu}"
        f" | eta {eta / 60:.1f} min"
    )


@contextmanager
def _garbage_collector_stop() -> Iterator[Callable[[], None]]:
    """Yield a function that stops Python's garbage collector: its pauses cost up to half a second each."""

    def stop() -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    try:
        yield stop
    finally:
        gc.enable()
        gc.unfreeze()
