"""The pictures of the report, and the comparison of runs.

Stages differ in length by factors of ten and in loss by more than any of them changes it, so each has axes
of its own. A curve begins with a fall that would flatten all the rest: the view is fitted to what comes after
the first twentieth, and the fall runs out of its top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from nanochat.common import atomic_write
from nanochat.metrics import read_metrics
from nanochat.report_format import dig, entries, is_number
from nanochat.report_text import CHAT_EVALS, chance, task_names

logger = logging.getLogger(__name__)
TRAINING = {"BASE": "base_train", "MID": "mid_train", "SFT": "chat_sft"}
COLOURS = {"BASE": "tab:gray", "MID": "tab:orange", "SFT": "tab:blue", "RL": "tab:green"}


def draw_all(results: dict[str, dict], folder: Path) -> list[str]:
    """Draw what the results of the stages allow; return the names of the pictures in folder."""
    runs = {label: _metrics(stage, results) for label, stage in TRAINING.items()}
    figures = {
        "chat_tasks.png": chat_tasks(results),
        "losses.png": losses(runs),
        "throughput.png": throughput(runs),
        "reward.png": reward(_metrics("chat_rl", results)),
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
        else:
            _save(figure, folder / name)
    return [name for name, figure in figures.items() if figure is not None]


def losses(runs: dict[str, list[dict]]) -> Figure | None:
    """Training loss above validation bits per byte, a column a stage."""
    runs = {label: records for label, records in runs.items() if series(records, "step", "smooth_loss")[0]}
    if not runs:
        return None
    figure = Figure(figsize=(1 + 3.6 * len(runs), 5.6), layout="constrained")
    rows = figure.subplots(2, len(runs), squeeze=False, sharex="col")
    for (loss_axis, bpb_axis), (label, records) in zip(rows.T, runs.items(), strict=True):
        _curve(loss_axis, *series(records, "step", "smooth_loss"), color=COLOURS[label])
        _curve(bpb_axis, *series(records, "step", "val_bpb"), color=COLOURS[label], marker=".")
        loss_axis.set_title(label)
        bpb_axis.set_xlabel("step")
    rows[0, 0].set_ylabel("training loss\n(nats a token)")
    rows[1, 0].set_ylabel("validation\n(bits per byte)")
    return figure


def throughput(runs: dict[str, list[dict]]) -> Figure | None:
    """Tokens a second over steps, a column a stage."""
    points = {label: series(records, "step", "tokens_per_second") for label, records in runs.items()}
    points = {label: point for label, point in points.items() if point[0]}
    if not points:
        return None
    figure = Figure(figsize=(1 + 3.6 * len(points), 3), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    for axis, (label, (steps, speeds)) in zip(axes, points.items(), strict=True):
        axis.plot(steps, speeds, color=COLOURS[label], linewidth=1)
        axis.set(title=label, xlabel="step", ylim=(0, 1.1 * max(speeds)))
        axis.yaxis.set_major_formatter(EngFormatter())
        _tidy(axis)
    axes[0].set_ylabel("tokens a second")
    return figure


def reward(records: list[dict], window: int = 20) -> Figure | None:
    """Reward of each RL step, and its mean over the last `window` steps."""
    steps, rewards = series(records, "step", "reward")
    if not steps:
        return None
    recent = [rewards[max(0, i + 1 - window) : i + 1] for i in range(len(rewards))]
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, rewards, color=COLOURS["RL"], alpha=0.35, linewidth=1, label="step")
    axis.plot(steps, [sum(r) / len(r) for r in recent], color=COLOURS["RL"], label=f"mean of {window} steps")
    axis.set(xlabel="step", ylabel="reward")
    axis.legend()
    _tidy(axis)
    return figure


def chat_tasks(results: dict[str, dict]) -> Figure | None:
    """Bars of accuracy with standard errors, a group a task and a bar a stage; a line marks chance."""
    tasks = task_names(results)
    stages = {label: stage for label, stage in CHAT_EVALS.items() if entries(results, stage, "tasks")}
    if not tasks:
        return None
    inches = max(1.0, 0.1 * max(map(len, tasks)))  # a task, so that names do not touch
    figure = Figure(figsize=(max(6.0, inches * len(tasks)), 3.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(stages)
    for number, (label, stage) in enumerate(stages.items()):
        heights, errors = (
            [_or_nan(dig(results, stage, "tasks", task, key)) for task in tasks]
            for key in ("accuracy", "standard_error")
        )
        centres = [i + width * (number - (len(stages) - 1) / 2) for i in range(len(tasks))]
        axis.bar(centres, heights, width, yerr=errors, label=label, color=COLOURS[label], capsize=3)
    ends = ([i + side * 0.45 for i in range(len(tasks))] for side in (-1, 1))
    guesses = [_or_nan(chance(results, task)) for task in tasks]
    axis.hlines(guesses, *ends, colors="black", linestyles="--", label="chance")
    axis.set_xticks(range(len(tasks)), tasks, parse_math=False)
    axis.set_ylim(0, 1)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylabel("accuracy")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def compare(paths: Sequence[Path], out: Path) -> None:
    """Draw loss over steps and validation bits per byte over seconds of several runs in one picture.

    A path is a metrics.jsonl or the folder of one; the file's name, or the folder's, names its curve.
    ValueError for a run that has nothing to draw.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss_axis, bpb_axis = figure.subplots(1, 2)
    for path in paths:
        path = path / "metrics.jsonl" if path.is_dir() else path
        records = read_metrics(path)
        steps, evals = series(records, "step", "smooth_loss"), series(records, "train_seconds", "val_bpb")
        if not steps[0] or not evals[0]:
            raise ValueError(f"{path} has no steps or no evaluations to draw")
        name = path.parent.name if path.stem == "metrics" else path.stem
        _curve(loss_axis, *steps, label=name)
        _curve(bpb_axis, *evals, marker=".", label=name)
    loss_axis.set(xlabel="step", ylabel="training loss (nats a token)")
    bpb_axis.set(xlabel="seconds of training", ylabel="validation bits per byte")
    for axis in (loss_axis, bpb_axis):
        axis.legend()
    _save(figure, out)


def series(records: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return the values of x and y of the records that have a finite number for both."""
    pairs = [(dig(record, x), dig(record, y)) for record in records]
    pairs = [pair for pair in pairs if all(map(is_number, pair))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _metrics(stage: str, results: dict[str, dict]) -> list[dict]:
    """Return the records of a stage; none where it was not run or its file is gone."""
    path = dig(results, stage, "metrics")
    if not isinstance(path, str):
        return []
    try:
        return read_metrics(path)
    except (OSError, ValueError) as error:
        logger.warning(f"warning: no curves of {stage}: {error}")
        return []


def _or_nan(value: Any) -> float:
    return value if is_number(value) else math.nan  # which leaves a gap in a picture


def _curve(axis: Axes, xs: list[float], ys: list[float], **style: Any) -> None:
    """Plot a curve, and fit the view to all curves of the axis but the first twentieth of each.

    Of five points or more that is at least the first; of fewer, all are in view.
    """
    axis.plot(xs, ys, **style)
    curves = [list(line.get_ydata()) for line in axis.lines]
    settled = [y for ys in curves for y in ys[max(len(ys) // 20, len(ys) >= 5) :]]
    if settled:
        margin = 0.06 * (max(settled) - min(settled)) or 0.1
        axis.set_ylim(min(settled) - margin, max(settled) + margin)
    _tidy(axis)


def _tidy(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=110)
