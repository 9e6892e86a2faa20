"""The report of a run: report/report.md with pictures, made of the JSON that each stage leaves in report/.

    python -m nanochat.report reset                                # before the first stage
    python -m nanochat.report reset --since=mid_train              # before this stage is done again
    python -m nanochat.report generate --dollars-per-hour=24       # at any time, also of an unfinished run
    python -m nanochat.report plot d12 sft/d12 B/metrics.jsonl --out=curves.png

Stages call nanochat.common.write_report and know nothing of this; here their numbers are read and laid out
(report_text.py), drawn (report_plots.py), and never computed anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, subcommand

from nanochat.common import atomic_write, base_dir, parse, run, write_json
from nanochat.report.markdown import duration, items
from nanochat.report.text import PICTURES, STAGES, card, cost, render, total_seconds

logger = logging.getLogger(__name__)
DOLLARS_PER_GPU_HOUR = 3.0  # of an H100 that is rented, eight of which are the $24 of the speedrun


@dataclass(frozen=True)
class Reset:
    """Start a new report: remove the results of the last run, note the time and the environment."""

    since: str | None = None
    """the first stage that is done again: the results of those before it stay, and so do time and environment
    unless a finished pretraining is done again"""

    def __post_init__(self) -> None:
        if self.since not in (None, *STAGES):
            raise ValueError(f"since={self.since!r} must be one of {', '.join(STAGES)}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write report.md and its pictures, and show a short card."""

    dollars_per_hour: float | None = None
    """rent of the machine; None: 3 for each GPU that was there at the start"""

    def __post_init__(self) -> None:
        if self.dollars_per_hour is not None and not 0 <= self.dollars_per_hour < math.inf:
            raise ValueError(f"dollars_per_hour={self.dollars_per_hour} must be 0 or more, and finite")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Compare runs: training loss, validation bits per byte and tokens a second in one picture."""

    runs: Positional[tuple[str, ...]]
    """metrics.jsonl files, checkpoint folders, or model tags (d12, or sft/d12 for a later stage)"""
    out: Path = Path("curves.png")
    """the picture: .png, .svg or .pdf"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("plot needs at least one run: a metrics.jsonl, its folder, or a model tag")
        if self.out.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"out={str(self.out)!r} must end in .png, .svg or .pdf")
        if not self.out.parent.is_dir():
            raise ValueError(f"out={str(self.out)!r}: there is no folder {self.out.parent}; make it first")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to do."""

    command: (
        Annotated[Reset, subcommand("reset", prefix_name=False)]
        | Annotated[Generate, subcommand("generate", prefix_name=False)]
        | Annotated[Plot, subcommand("plot", prefix_name=False)]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Reset, generate or plot."""
    match parse(ReportConfig, argv).command:
        case Reset(since=since):
            reset(since)
        case Generate(dollars_per_hour=dollars_per_hour):
            generate(dollars_per_hour)
        case Plot(runs=runs, out=out):
            from nanochat.report.plots import compare

            compare(runs, out)
            logger.info(f"report: {len(runs)} run(s) drawn to {out}")
    return 0


def reset(since: str | None) -> None:
    """Remove what an earlier run left in report/ of a stage (None: the first) and all after it, and no more.

    With None, or if a finished pretraining is removed, another run begins: write report/start.json.
    """
    folder = base_dir() / "report"
    stages = STAGES[STAGES.index(since) :] if since else STAGES
    had_pretrained = "base_train" in stages and (folder / "base_train.json").exists()
    parts = [f"{stage}_part.json" for stage in stages]  # of a chat evaluation, which no report shows
    for name in (*(f"{stage}.json" for stage in stages), *parts, "report.md", *PICTURES):
        (folder / name).unlink(missing_ok=True)
    if since is None or had_pretrained:
        write_json(folder / "start.json", {"started_at": time.time(), **environment()})
    logger.info(f"report: started anew in {folder}" + (f" from {since} on" if since else ""))


def generate(dollars_per_hour: float | None) -> None:
    """Write report/report.md and its pictures from whatever results there are."""
    from nanochat.report.plots import draw_all

    folder = base_dir() / "report"
    folder.mkdir(exist_ok=True)
    results, problems = read_results(folder)
    if dollars_per_hour is None:
        dollars_per_hour = DOLLARS_PER_GPU_HOUR * len(items(results, "start", "gpus"))
    pictures = draw_all(results, folder)
    with atomic_write(folder / "report.md", "w") as file:
        file.write(render(results, problems, pictures, dollars_per_hour))
    logger.info(card(results, problems))
    seconds = total_seconds(results)
    logger.info(
        f"report: {sum(stage in results for stage in STAGES)} of {len(STAGES)} stages, {duration(seconds)}, "
        f"{cost(seconds, dollars_per_hour)}; {folder / 'report.md'}"
    )


def read_results(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """Return the results of the stages and of "start", and why there are none of the others."""
    results, problems = {}, {}
    for stage in ("start", *STAGES):
        try:
            result = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
            if not isinstance(result, dict):
                raise ValueError(f"a {type(result).__name__} instead of an object")
            results[stage] = result
        except FileNotFoundError:
            problems[stage] = "not run"
        except (OSError, ValueError) as error:  # json and UTF-8 errors are ValueErrors
            problems[stage] = f"damaged file ({error})"
    return results, problems


def environment() -> dict[str, Any]:
    """Return what results may depend on: commit, versions, processors, memory (bytes), GPUs."""
    import torch

    here = str(Path(__file__).parent)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output("git", "-C", here, "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_model(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "driver": drivers and drivers.splitlines()[0],
        "cuda": torch.version.cuda,
        "nproc_per_node": os.environ.get("NPROC_PER_NODE"),
    }


def _output(*command: str) -> str | None:
    """Return what a program prints; None where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    """Return the processor's name: of /proc/cpuinfo on Linux, of the platform elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    run(main)
