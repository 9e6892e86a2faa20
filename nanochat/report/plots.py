"""The plots of the report, and the comparison of runs.

Stages differ in length by factors of ten, and their losses differ by more than any stage changes its loss, so
each stage has its own axes. The steep start of a curve would flatten the rest: the y limits are fitted to the
points after the first twentieth, and the start is clipped at the top.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from nanochat.checkpoint_manager import STAGES, checkpoint_dir
from nanochat.common import atomic_write, base_dir
from nanochat.metrics import read_metrics
from nanochat.report.markdown import dig, entries, is_number
from nanochat.report.text import CHAT_EVALS, chance, task_names

logger = logging.getLogger(__name__)
TRAINING = {"BASE": "base_train", "MID": "mid_train", "SFT": "chat_sft"}
COLORS = {"BASE": "tab:gray", "MID": "tab:orange", "SFT": "tab:blue", "RL": "tab:green"}


def draw_all(results: dict[str, dict], folder: Path) -> list[str]:
    """Draw every plot that has data; return the file names written to folder.

    Files of plots without data, left by an earlier report, are removed.
    """
    runs = {label: _metrics(stage, results) for label, stage in TRAINING.items()}
    figures = {
        "chat_tasks.png": chat_tasks(results),
        "losses.png": losses(runs),
        "throughput.png": throughput(runs),
        "core.png": core(runs["BASE"], results.get("base_eval", {})),
        "reward.png": reward(_metrics("chat_rl", results)),
    }
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)
        else:
            _save(figure, folder / name)
    return [name for name, figure in figures.items() if figure is not None]


def losses(runs: dict[str, list[dict]]) -> Figure | None:
    """Plot training loss above validation bits per byte, a column for each stage; None without data."""
    runs = {label: records for label, records in runs.items() if series(records, "step", "smooth_loss")[0]}
    if not runs:
        return None
    figure = Figure(figsize=(1 + 3.6 * len(runs), 5.6), layout="constrained")
    rows = figure.subplots(2, len(runs), squeeze=False, sharex="col")
    for (loss_axis, bpb_axis), (label, records) in zip(rows.T, runs.items(), strict=True):
        _curve(loss_axis, *series(records, "step", "smooth_loss"), color=COLORS[label])
        _curve(bpb_axis, *series(records, "step", "val_bpb"), color=COLORS[label], marker=".")
        loss_axis.set_title(label)
        bpb_axis.set_xlabel("step")
    rows[0, 0].set_ylabel("training loss\n(nats per token)")
    rows[1, 0].set_ylabel("validation\n(bits per byte)")
    return figure


def throughput(runs: dict[str, list[dict]]) -> Figure | None:
    """Plot tokens per second over steps, a column for each stage; None without data."""
    points = {label: series(records, "step", "tokens_per_second") for label, records in runs.items()}
    points = {label: point for label, point in points.items() if point[0]}
    if not points:
        return None
    figure = Figure(figsize=(1 + 3.6 * len(points), 3), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    for axis, (label, (steps, speeds)) in zip(axes, points.items(), strict=True):
        axis.plot(steps, speeds, color=COLORS[label], linewidth=1)
        axis.set(title=label, xlabel="step", ylim=(0, 1.1 * max(speeds)))
        axis.yaxis.set_major_formatter(EngFormatter())
        _style_axis(axis)
    axes[0].set_ylabel("tokens per second")
    return figure


def core(records: list[dict], result: dict[str, Any]) -> Figure | None:
    """Plot CORE during pretraining and, if available, the result of base_eval; None without data."""
    steps, values = series(records, "step", "core")
    if not steps:
        return None
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(steps, values, color=COLORS["BASE"], marker=".", label="during training, with fewer examples")
    axis.plot(*series([result], "step", "core"), "o", color="black", label="base_eval")
    axis.set(xlabel="step", ylabel="CORE")
    axis.legend(loc="lower right")
    _style_axis(axis)
    return figure


def reward(records: list[dict], window: int = 20) -> Figure | None:
    """Plot the reward of each RL step and its mean over the last `window` steps; None without data.

    With several tasks, plot the mean of each task too.
    """
    steps, rewards = series(records, "step", "reward")
    if not steps:
        return None
    tasks = sorted({task for record in records for task in entries(record, "rewards")})
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.set_prop_cycle(color=[color for color in TABLEAU_COLORS if color != COLORS["RL"]])
    axis.plot(steps, rewards, color=COLORS["RL"], alpha=0.35, linewidth=1, label="step")
    axis.plot(steps, _moving_average(rewards, window), color=COLORS["RL"], label=f"mean of {window} steps")
    for task in tasks if len(tasks) > 1 else ():
        steps, rewards = series(records, "step", f"rewards.{task}")
        axis.plot(steps, _moving_average(rewards, window), linewidth=1, label=f"of these, {task}")
    axis.set(xlabel="step", ylabel="reward")
    _disable_math(figure.legend(loc="outside upper left", ncols=3))
    _style_axis(axis)
    return figure


def _moving_average(values: Sequence[float], window: int) -> list[float]:
    windows = [values[max(0, i + 1 - window) : i + 1] for i in range(len(values))]
    return [sum(recent) / len(recent) for recent in windows]


def chat_tasks(results: dict[str, dict[str, Any]]) -> Figure | None:
    """Plot accuracy with standard errors, a group for each task and a bar for each stage; None without data.

    A dashed line marks the accuracy of guessing.
    """
    tasks = task_names(results)
    stages = {label: stage for label, stage in CHAT_EVALS.items() if entries(results, stage, "tasks")}
    if not tasks:
        return None
    inches = max(1.0, 0.1 * max(map(len, tasks)))  # per task, so that the names do not overlap
    figure = Figure(figsize=(max(6.0, inches * len(tasks)), 3.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(stages)
    for number, (label, stage) in enumerate(stages.items()):
        heights, errors = (
            [_or_nan(dig(results, stage, "tasks", task, key)) for task in tasks]
            for key in ("accuracy", "standard_error")
        )
        errors = [error if error >= 0 else math.nan for error in errors]
        centers = [i + width * (number - (len(stages) - 1) / 2) for i in range(len(tasks))]
        axis.bar(centers, heights, width, yerr=errors, label=label, color=COLORS[label], capsize=3)
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


def compare(runs: Sequence[str], out: Path) -> None:
    """Plot training loss, validation bits per byte and throughput of several runs, one color for each run.

    runs: arguments of find_metrics. Raise ValueError for a run without any data; a run without evaluations is
    missing only from the validation panel.
    """
    paths = [find_metrics(run) for run in runs]
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = (
        ("step", "smooth_loss", "training loss (nats per token)"),
        ("train_seconds", "val_bpb", "validation (bits per byte)"),
        ("step", "tokens_per_second", "tokens per second"),
    )
    axes = figure.subplots(1, len(panels))
    for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True)):
        records = read_metrics(path)
        curves = [series(records, x, y) for x, y, _ in panels]
        if not any(xs for xs, _ in curves):
            raise ValueError(f"{path} has no steps and no evaluations to plot; choose another run")
        for axis, curve, (_, y, _) in zip(axes, curves, panels, strict=True):
            if curve[0]:
                style = {"marker": "."} if y == "val_bpb" else {}
                _curve(axis, *curve, label=name, color=f"C{number % 10}", linewidth=1.2, **style)
    for axis, (x, _, label) in zip(axes, panels, strict=True):
        axis.set(xlabel="seconds of training" if x == "train_seconds" else x, title=label)
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    _disable_math(figure.legend(lines.values(), lines, loc="outside lower center", ncols=4))
    axes[-1].set_ylim(bottom=0)
    axes[-1].yaxis.set_major_formatter(EngFormatter())
    _save(figure, out)


def find_metrics(run: str) -> Path:
    """Return the metrics.jsonl given by its path, its folder or a model tag.

    A tag selects the first stage that has it; mid/d4, sft/d4 and rl/d4 select the stage. Raise
    FileNotFoundError if there is no such file.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return path
    stage, _, tag = run.rpartition("/")
    stages = [stage] if stage in STAGES else STAGES if not stage else []
    for folder in (path, *(checkpoint_dir(stage, tag) for stage in stages)):
        if (folder / "metrics.jsonl").is_file():
            return folder / "metrics.jsonl"
    raise FileNotFoundError(
        f"no metrics.jsonl for run {run!r}: give the file, its folder, or the tag of a model under "
        f"{base_dir()}, such as d4 or sft/d4"
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest path suffixes that tell the runs apart; a metrics.jsonl is named by its folder."""
    stems = [path.absolute().with_suffix("") for path in paths]
    stems = [stem.parent if stem.name == "metrics" else stem for stem in stems]
    for depth in range(1, max(len(stem.parts) for stem in stems)):
        names = ["/".join(stem.parts[-depth:]) for stem in stems]
        if len(set(names)) == len(set(stems)):
            break
    return names


def series(records: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """Return x and y of the records in which both are finite numbers; y = "a.b" selects key b of object a."""
    pairs = [(dig(record, x), dig(record, *y.split("."))) for record in records]
    pairs = [pair for pair in pairs if all(map(is_number, pair))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _metrics(stage: str, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the metric records of a stage; empty if it was not run or its file is missing or damaged."""
    path = dig(results, stage, "metrics")
    if not isinstance(path, str):
        return []
    try:
        return read_metrics(path)
    except (OSError, ValueError) as error:
        logger.warning(f"warning: no curves of {stage}: {error}")
        return []


def _or_nan(value: object) -> float:
    return value if is_number(value) else math.nan  # matplotlib leaves a gap for NaN


def _curve(axis: Axes, xs: list[float], ys: list[float], **style: Any) -> None:
    """Plot a curve, then fit the y limits to all curves of the axis without the first twentieth of each.

    At least one point is left out of curves of five points or more, none of shorter curves.
    """
    axis.plot(xs, ys, **style)
    curves = [np.asarray(line.get_ydata()).tolist() for line in axis.lines]
    settled = [y for ys in curves for y in ys[max(len(ys) // 20, len(ys) >= 5) :]]
    if settled:
        margin = 0.06 * (max(settled) - min(settled)) or 0.1
        axis.set_ylim(min(settled) - margin, max(settled) + margin)
    _style_axis(axis)


def _style_axis(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _disable_math(legend: Legend) -> None:
    """Show dollar signs in names literally: matplotlib takes text between them for a formula."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix("."), dpi=110)
