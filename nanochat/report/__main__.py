"""The report's command.

python -m nanochat.report reset                                # before the first stage
python -m nanochat.report reset --since=mid_train              # before this stage is done again
python -m nanochat.report generate --dollars-per-hour=24       # at any time, also of an unfinished run
python -m nanochat.report plot d12 sft/d12 B/metrics.jsonl --out=curves.png
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, subcommand

from nanochat.common import parse, run
from nanochat.report import generate, reset
from nanochat.report.text import STAGES

logger = logging.getLogger(__name__)


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


if __name__ == "__main__":
    run(main)
