"""The command line of the report.

python -m nanochat.report reset                                # before the first stage
python -m nanochat.report reset --since=mid_train              # before this stage is repeated
python -m nanochat.report                                      # at any time, also for an unfinished run
python -m nanochat.report generate --dollars-per-hour=24
python -m nanochat.report plot d12 sft/d12 B/metrics.jsonl --out=curves.png
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, subcommand

from nanochat.common import parse, run
from nanochat.report import generate, reset
from nanochat.report.text import STAGES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reset:
    """Start a new report: remove the results of the last run and record the time and the environment."""

    since: str | None = None
    """the first stage to repeat: results of earlier stages are kept; the recorded time and environment are
    kept too, unless a finished pretraining is repeated"""

    def __post_init__(self) -> None:
        if self.since not in (None, *STAGES):
            raise ValueError(f"since={self.since!r} must be one of {', '.join(STAGES)}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write report.md and its plots, and print a short summary."""

    dollars_per_hour: float | None = None
    """rent of the machine; None: 3 for each GPU recorded at the start"""

    def __post_init__(self) -> None:
        if self.dollars_per_hour is not None and not 0 <= self.dollars_per_hour < math.inf:
            raise ValueError(f"dollars_per_hour={self.dollars_per_hour} must be finite and at least 0")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Compare runs: plot training loss, validation bits per byte and tokens per second."""

    runs: Positional[tuple[str, ...]]
    """metrics.jsonl files, checkpoint folders, or model tags (d12, or sft/d12 for a later stage)"""
    out: Path = Path("curves.png")
    """the plot to write: .png, .svg or .pdf"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("plot needs at least one run: a metrics.jsonl, its folder, or a model tag")
        if self.out.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"out={str(self.out)!r} must end in .png, .svg or .pdf")
        if not self.out.parent.is_dir():
            raise ValueError(f"out={str(self.out)!r}: create folder {self.out.parent} first")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Reset the report of a run, generate it, or plot runs."""

    command: (
        Annotated[Reset, subcommand("reset", prefix_name=False)]
        | Annotated[Generate, subcommand("generate", prefix_name=False)]
        | Annotated[Plot, subcommand("plot", prefix_name=False)]
    ) = field(default_factory=Generate)


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
            logger.info(f"report: plotted {len(runs)} run(s) to {out}")
    return 0


if __name__ == "__main__":
    run(main)
