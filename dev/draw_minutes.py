"""Draw dev/minutes.png: validation loss against training time of a d12, a point for each run of dev/LOG.md.

python dev/draw_minutes.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from matplotlib.figure import Figure

OUT = Path(__file__).with_name("minutes.png")


class System(NamedTuple):
    """Runs of one model and recipe."""

    name: str
    colour: str
    label: tuple[str, int]  # side of the last point, and points above it
    runs: dict[float, tuple[float, ...]]  # training seconds: bits per byte at the schedule's end, one a seed


# one H200 a run; time without compilation and evaluation
SYSTEMS = (
    System(
        "Saint Iberis 2", "#b03a2e", ("left", 0), {38.8: (1.2077, 1.2089, 1.2124), 49.2: (1.1717, 1.1729)}
    ),
    System("Saint Iberis 2, all attention", "#dc7633", ("left", 0), {38.8: (1.2198, 1.2215, 1.2206)}),
    System("Saint Iberis, published", "#1a5276", ("left", 0), {71.3: (1.2329, 1.2285)}),
    System("published, all attention", "#5499c7", ("left", 8), {80.6: (1.2190, 1.2175)}),
    System("nanochat, November 2025", "#707b7c", ("right", -10), {100.5: (1.2169,)}),
    System("nanochat, July 2026", "#17202a", ("right", 0), {96.2: (1.1806,)}),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw into dev/minutes.png, or into the file that is named."""
    paths = sys.argv[1:] if argv is None else list(argv)
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, colour, (side, above), runs in SYSTEMS:
        means = {seconds / 60: mean(values) for seconds, values in runs.items()}
        axes.plot(list(means), list(means.values()), color=colour, linewidth=1)
        for seconds, values in runs.items():
            axes.scatter([seconds / 60] * len(values), values, color=colour, s=22)
        last, shift = list(means.items())[-1], (8 if side == "left" else -8, above)
        axes.annotate(name, last, shift, textcoords="offset points", ha=side, va="center", color=colour)
    axes.set_xlim(0.5, 1.8)
    axes.set_xlabel("minutes of training, one H200")
    axes.set_ylabel("validation bits per byte")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(paths[0] if paths else OUT, dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
