"""The report of a finished run: report/<stage>.json for the machine, one line for the terminal.

Losses and speeds come from the records of all steps. A dry run has the line alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nanochat.hardware import describe
from nanochat.optim.schedule import Plan
from nanochat.train.run import REPORTS, Run


def report_training(run: Run, plan: Plan) -> str:
    """Write the report of pretraining, midtraining or SFT and return its one-line result."""
    model, progress = run.model, run.progress
    first, last = progress.first_val_bpb, progress.val_bpb
    assert first is not None  # every run is evaluated at its start,
    assert last is not None  # and at its end
    steps = [record for record in run.logged() if "loss" in record]
    middle = sorted(steps, key=lambda record: record["seconds"])[len(steps) // 2] if steps else {}
    parameters = model.num_parameters()
    tokens = plan.num_steps * plan.tokens_per_step
    is_cuda = model.device.type == "cuda"
    run.report({
        **_machine_and_model(run),
        "parameters": parameters,
        "flops_per_token": model.flops_per_token(),
        "steps": plan.num_steps,
        "tokens": tokens,
        "train_seconds": progress.train_seconds,
        "median_tokens_per_second": middle.get("tokens_per_second"),
        "median_mfu": middle.get("mfu"),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "train_loss": progress.ema.value,
        "first_val_bpb": first,
        "min_val_bpb": progress.min_val_bpb,
        "val_bpb": last,
    })  # fmt: skip
    return (
        f"{REPORTS[run.stage]}: {run.directory.name}, {parameters['total'] / 1e6:.1f} M parameters, "
        f"{tokens / 1e6:.1f} M tokens in {progress.train_seconds / 60:.1f} min; "
        f"validation bpb {first:.4f} -> {last:.4f} ({100 * last / first:.1f} % of step 0)"
    )


def report_rl(run: Run, plan: Plan) -> str:
    """Write the report of reinforcement learning and return its one-line result.

    Its rewards are means over the first and last tenth of the steps, its contrast is the mean over all, its
    accuracies are those before and after.
    """
    records = run.logged()
    rewards = [record["reward"] for record in records if "reward" in record]
    contrasts = [record["contrast"] for record in records if "contrast" in record]
    evaluations = [record for record in records if "accuracy" in record]
    first, last = _tenths(rewards) if rewards else (None, None)  # none where the metrics file was lost
    before = evaluations[0]["accuracy"] if evaluations[0]["step"] == 0 else None
    by_task = {
        task: _tenths([r["rewards"][task] for r in records if task in r.get("rewards", {})])
        for task in sorted({task for record in records for task in record.get("rewards", {})})
    }
    after = evaluations[-1]
    run.report({
        **_machine_and_model(run),
        "steps": plan.num_steps,
        "seconds": run.progress.train_seconds,
        "first_reward": first,
        "last_reward": last,
        "contrast": sum(contrasts) / len(contrasts) if contrasts else None,
        "rewards": {
            task: dict(zip(("first", "last"), tenths, strict=True)) for task, tenths in by_task.items()
        },
        "first_accuracy": before,
        "accuracy": after["accuracy"],
        "standard_error": after["standard_error"],
    })  # fmt: skip
    return (
        f"chat_rl: {run.directory.name}, {plan.num_steps} steps in "
        f"{run.progress.train_seconds / 60:.1f} min; "
        + (f"reward {first:.4f} -> {last:.4f}, " if rewards else "")
        + "accuracy "
        + ("" if before is None else f"{before:.4f} -> ")
        + f"{after['accuracy']:.4f} +- {after['standard_error']:.4f}"
    )


def _machine_and_model(run: Run) -> dict[str, Any]:
    return {"hardware": describe(run.model.device), "model": asdict(run.model.config)}


def _tenths(values: Sequence[float]) -> tuple[float, float]:
    """Return the means of the first and of the last tenth."""
    tenth = -(-len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
