"""The training loop that every stage shares; stages differ by batches, schedule and evaluations.

A step accumulates the gradients of its micro-batches, each one's summed loss divided by the number of target
tokens of the whole step over all ranks. So neither the micro-batch size nor the number of ranks nor the
padding of a batch changes what is learnt, and a batch without any target adds nothing instead of NaN.
The next step's batches are fetched while the device still works on this one's; one synchronisation a step
brings back loss and gradient norm, which are checked before the optimizer may touch a weight.

Order at a boundary: checkpoint, then evaluation, so that a failing evaluation loses nothing.
"""

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.hardware import peak_flops
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import Cadence, Plan, muon_momentum
from nanochat.train.run import Progress

logger = logging.getLogger(__name__)
Batch = tuple[Tensor, Tensor, dict]  # inputs (B,T), targets (B,T), state of the loader after them


def train(
    model: GPT,
    optimizer: MuonAdamW,
    batches: Iterator[Batch],
    plan: Plan,
    cadence: Cadence,
    runtime: Runtime,
    progress: Progress,
    *,
    save: Callable[[Progress], None],
    evaluate: Callable[[], float],
    sample: Callable[[], None],
    log: Callable[[dict], None],
    extras: Sequence[tuple[int, Callable[[], None]]] = (),
) -> bool:
    """Train from progress.step to plan.num_steps; return False if SIGTERM ended it before, after saving.

    Raises FloatingPointError before the optimizer step when loss or gradients are not finite.
    """
    start = progress.step
    flops_per_step = model.flops_per_token() * plan.tokens_per_step / runtime.world_size
    peak = peak_flops(runtime.device)
    micro_batches = list(islice(batches, plan.accumulation))
    stop = [False]
    with sigterm_flag() as sigterm, _garbage_collector_stop() as stop_garbage_collector:
        validate = partial(_evaluate, evaluate, progress, log)
        for step in steps_to_do(
            plan, cadence, progress, stop, save=save, evaluate=validate, sample=sample, extras=extras
        ):
            began = time.perf_counter()
            multiplier = set_schedule(optimizer, plan, step)
            last_state = micro_batches[-1][2]
            loss, grad_norm, stop[0], micro_batches = _accumulate(
                model, optimizer, micro_batches, batches, runtime, sigterm
            )
            check_finite(step, loss, grad_norm, multiplier)
            optimizer.step()
            # the device may still be updating: that time falls to the next step, whose loss waits for it
            seconds = time.perf_counter() - began
            progress.step += 1
            progress.train_seconds += seconds
            progress.loader_state = last_state
            record = {
                "step": step,
                "loss": loss,
                "smooth_loss": progress.ema.update(loss),
                "grad_norm": grad_norm,
                "lr_multiplier": multiplier,
                "seconds": seconds,
                "tokens_per_second": plan.tokens_per_step / seconds,
                "mfu": peak and flops_per_step / seconds / peak,
                "train_seconds": progress.train_seconds,
            }
            log(record)
            if progress.step == plan.num_steps or is_due(progress.step, cadence.log_every):
                _print_step(record, plan)
            if step == start:
                stop_garbage_collector()
    return progress.step == plan.num_steps


def steps_to_do(
    plan: Plan,
    cadence: Cadence,
    progress: Progress,
    stop: list[bool],
    *,
    save: Callable[[Progress], None],
    evaluate: Callable[[], None],
    sample: Callable[[], None],
    extras: Sequence[tuple[int, Callable[[], None]]] = (),
) -> Iterator[int]:
    """Yield progress.step until plan.num_steps of them are done; save, evaluate and sample when that is due.

    extras are done every so many steps between start and end, at neither of them. Whoever does the steps
    counts them in progress, and may set stop[0], on all ranks alike, to end after saving.
    """
    start = progress.step
    while True:
        step = progress.step
        is_last = step == plan.num_steps
        if step > start and (is_last or stop[0] or is_due(step, cadence.save_every)):
            save(progress)
        if stop[0] and not is_last:
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


def set_schedule(optimizer: MuonAdamW, plan: Plan, step: int) -> float:
    """Give the optimizer the rates and the momentum of a step; return the factor on the rates."""
    multiplier = plan.lr_multiplier(step / plan.num_steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step)
    return multiplier


def _accumulate(
    model: GPT,
    optimizer: MuonAdamW,
    micro_batches: list[Batch],
    batches: Iterator[Batch],
    runtime: Runtime,
    sigterm: list[bool],
) -> tuple[float, float, bool, list[Batch]]:
    """Forward and backward of one step; leaves its gradients in the optimizer, summed over ranks.

    Returns loss in nats a token, gradient norm, whether a rank was told to stop, and the next micro-batches.
    """
    counts = torch.stack([(targets >= 0).sum() for _, targets, _ in micro_batches])
    n_targets = runtime.sum_(counts.sum()).clamp(min=1)
    total = torch.zeros((), device=runtime.device)
    upcoming: list[Batch] = []
    for i, (inputs, targets, _) in enumerate(micro_batches):
        loss = model(inputs, targets, loss_reduction="sum") / n_targets
        if i == len(micro_batches) - 1:
            optimizer.begin_reduction()
        loss.backward()
        total += loss.detach()
        upcoming += islice(batches, 1)
    told_to_stop = torch.full_like(total, float(sigterm[0]))  # torch.tensor would wait for the device
    sums = runtime.sum_(torch.stack([total, optimizer.finish_reduction(), told_to_stop]))
    loss, squared_norm, stop = sums.tolist()  # the step's one synchronisation
    return loss, squared_norm**0.5, stop > 0, upcoming


def _evaluate(evaluate: Callable[[], float], progress: Progress, log: Callable[[dict], None]) -> None:
    bpb = progress.val_bpb = evaluate()
    progress.min_val_bpb = min(bpb, progress.min_val_bpb or bpb)
    progress.first_val_bpb = progress.first_val_bpb or bpb
    log({"step": progress.step, "val_bpb": bpb, "train_seconds": progress.train_seconds})
    logger.info(f"step {progress.step:05d} | validation bpb {bpb:.4f} (best {progress.min_val_bpb:.4f})")


def _print_step(record: dict[str, Any], plan: Plan) -> None:
    done = record["step"] + 1
    mfu = f" | mfu {100 * record['mfu']:.1f} %" if record["mfu"] else ""
    eta = (plan.num_steps - done) * record["seconds"]
    logger.info(
        f"step {done:05d}/{plan.num_steps} ({100 * done / plan.num_steps:.0f} %)"
        f" | loss {record['smooth_loss']:.4f} | lr x {record['lr_multiplier']:.2f}"
        f" | {1000 * record['seconds']:.0f} ms | {record['tokens_per_second']:,.0f} tok/s{mfu}"
        f" | eta {eta / 60:.1f} min"
    )


def check_finite(step: int, loss: float, grad_norm: float, multiplier: float) -> None:
    """Raise FloatingPointError, before the update, unless loss and gradients are finite."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}, rates x {multiplier:.3f}; "
            "stopped before the update, so the last checkpoint is good: --resume with lower rates"
        )


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps is done at this one; 0: never."""
    return every > 0 and step % every == 0


@contextmanager
def sigterm_flag() -> Iterator[list[bool]]:
    """A one-element list that turns true on SIGTERM, instead of dying in the middle of a step."""
    flag = [False]

    def on_sigterm(_signum: int, _frame: object) -> None:
        flag[0] = True

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _garbage_collector_stop() -> Iterator[Callable[[], None]]:
    """Give a function that stops Python's garbage collector: its pauses cost up to half a second each."""

    def stop() -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    try:
        yield stop
    finally:
        gc.enable()
        gc.unfreeze()
