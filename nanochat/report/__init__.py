"""The report of a run: report/report.md and its plots, generated from the JSON each stage writes to report/.

Stages call nanochat.common.write_report and do not depend on this package. It formats (text.py) and plots
(plots.py) their numbers and never recomputes them. __main__.py is the command line.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, base_dir, write_json
from nanochat.report.markdown import duration, items
from nanochat.report.text import PICTURES, STAGES, card, cost, render, total_seconds

logger = logging.getLogger(__name__)
DOLLARS_PER_GPU_HOUR = 3.0  # a rented H100; the speedrun's $24 an hour are eight of them


def reset(since: str | None) -> None:
    """Remove the results of `since` (None: the first stage) and of all later stages from report/.

    Other files are kept. A new run starts, and report/start.json is rewritten, if `since` is None or if the
    result of a finished pretraining is removed.
    """
    folder = base_dir() / "report"
    stages = STAGES[STAGES.index(since) :] if since else STAGES
    had_pretrained = "base_train" in stages and (folder / "base_train.json").exists()
    parts = [f"{stage}_part.json" for stage in stages]  # unfinished chat evaluations
    for name in (*(f"{stage}.json" for stage in stages), *parts, "report.md", *PICTURES):
        (folder / name).unlink(missing_ok=True)
    if since is None or had_pretrained:
        write_json(folder / "start.json", {"started_at": time.time(), **environment()})
    logger.info(f"report: reset {folder}" + (f" from {since} on" if since else ""))


def generate(dollars_per_hour: float | None) -> None:
    """Write report/report.md and its plots from the results available so far.

    dollars_per_hour: rent of the whole machine; None: DOLLARS_PER_GPU_HOUR for each GPU of report/start.json.
    """
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
    """Return the results by stage (and "start"), and for each stage without a result the reason."""
    results, problems = {}, {}
    for stage in ("start", *STAGES):
        try:
            result = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
            if not isinstance(result, dict):
                raise ValueError(f"expected an object, found {type(result).__name__}")
            results[stage] = result
        except FileNotFoundError:
            problems[stage] = "not run"
        except (OSError, ValueError) as error:  # json and UTF-8 errors are ValueErrors
            problems[stage] = f"damaged file ({error})"
    return results, problems


def environment() -> dict[str, Any]:
    """Return what results may depend on: commit, versions, CPU, memory (bytes) and GPUs."""
    import torch

    source = str(Path(__file__).parent)
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else None
    changes = _output("git", "-C", source, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _output("git", "-C", source, "rev-parse", "HEAD"),
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
    """Return the output of a program, or None if it is missing or fails."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def _cpu_model() -> str:
    """Return the processor's name, from /proc/cpuinfo on Linux and from `platform` elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
