"""Draw dev/slc2.svg: the data flow of an SLC2 layer, and the layer plan of a d20.

python dev/draw_slc2.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

from nanochat.gpt import GPTConfig

OUT = Path(__file__).with_name("slc2.svg")
INK, LINEAR, POINTWISE, CONV, ATTENTION = "#333333", "#dbe7f3", "#f1f1ee", "#bfe0c2", "#f4c99a"


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5) -> None:
    """Draw a rounded box with its centre at x, y, and the text in it."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.25),
            width,
            0.5,
            "round,pad=0,rounding_size=0.1",
            facecolor=colour,
            edgecolor=INK,
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def operator(axes: Axes, x: float, y: float, text: str) -> None:
    """Draw a symbol in a small circle."""
    axes.add_patch(Circle((x, y), 0.22, facecolor="white", edgecolor=INK))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def wire(axes: Axes, *points: tuple[float, float], label: str = "") -> None:
    """Draw straight lines from point to point, the last with an arrow, and a label at its middle."""
    *start, last = points
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1)
    axes.annotate(
        "", last, start[-1], arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    )
    if label:
        (x0, y0), (x1, y1) = start[-1], last
        axes.text((x0 + x1) / 2 + 0.08, (y0 + y1) / 2, label, fontsize=8, va="center", color=INK)


def draw_layer(axes: Axes) -> None:
    """Draw the data flow of nanochat/slc2.py, from bottom to top."""
    columns = {"al": 0.9, "a": 2.7, "x": 4.5, "b": 6.7}
    wire(axes, (3.7, 0.15), (3.7, 0.65))
    axes.text(3.85, 0.2, "h = rms_norm(r)    (T, E)", fontsize=9, va="center")
    axes.plot([columns["al"], columns["b"]], [0.65, 0.65], color=INK, linewidth=1)
    shapes = {"al": "H", "a": "D", "x": "E", "b": "E"}
    for name, x in columns.items():
        wire(axes, (x, 0.65), (x, 1.0))
        box(axes, x, 1.25, f"W{name}:  E \u2192 {shapes[name]}", LINEAR)
    wire(axes, (0.9, 1.5), (0.9, 2.0), label="al")
    box(axes, 0.9, 2.25, "silu", POINTWISE, 0.9)
    wire(axes, (0.9, 2.5), (0.9, 3.1), (1.58, 3.1))
    wire(axes, (2.7, 1.5), (2.7, 3.1), (2.02, 3.1))
    axes.text(2.78, 2.3, "a, the same\nfor all heads", fontsize=8, va="center")
    operator(axes, 1.8, 3.1, "\u2297")
    axes.text(1.8, 2.78, "outer\nproduct", fontsize=8, ha="center", va="top")
    wire(axes, (1.8, 3.32), (1.8, 3.75))
    box(axes, 1.8, 4.0, "silu", POINTWISE, 0.9)
    wire(axes, (2.25, 4.0), (4.28, 4.0))
    axes.text(3.27, 4.08, "one gate for each\nof E = H D channels", fontsize=8, ha="center", va="bottom")
    wire(axes, (4.5, 1.5), (4.5, 3.78), label="x")
    operator(axes, 4.5, 4.0, "\u00d7")
    wire(axes, (4.5, 4.22), (4.5, 4.9), label="u")
    box(axes, 4.5, 5.15, "", CONV, 4.1)
    axes.text(
        4.5, 5.15, "z[t] = w0 u[t\u22122] + w1 u[t\u22121] + w2 u[t]", ha="center", va="center", fontsize=9
    )
    axes.text(2.35, 5.15, "decoding keeps\nu[t\u22122], u[t\u22121]", fontsize=8, ha="right", va="center")
    wire(axes, (4.5, 5.4), (4.5, 5.75), label="z")
    box(axes, 4.5, 6.0, "silu", POINTWISE, 0.9)
    wire(axes, (4.95, 6.0), (6.48, 6.0))
    wire(axes, (6.7, 1.5), (6.7, 5.78))
    axes.text(6.78, 3.6, "b", fontsize=8, va="center")
    operator(axes, 6.7, 6.0, "\u00d7")
    wire(axes, (6.7, 6.22), (6.7, 6.6))
    box(axes, 6.7, 6.85, "Wc:  E \u2192 E", LINEAR)
    wire(axes, (6.7, 7.1), (6.7, 7.45))
    axes.text(6.85, 7.3, "y, added to r", fontsize=9, va="center")
    axes.set(xlim=(0, 8.3), ylim=(0, 7.6), aspect="equal")
    axes.set_title("One SLC2 layer", fontsize=11, loc="left")


def draw_plan(axes: Axes, depth: int) -> None:
    """Draw the kinds of the layers, the first at the bottom."""
    config = GPTConfig.from_depth(depth)
    for i, kind in enumerate(config.layer_kinds):
        colour = ATTENTION if kind == "attention" else CONV
        axes.barh(i, 1, height=0.82, color=colour, edgecolor=INK, linewidth=0.7)
        axes.text(
            0.5, i, "attention" if kind == "attention" else "SLC2", ha="center", va="center", fontsize=8
        )
        axes.text(-0.06, i, i, ha="right", va="center", fontsize=8)
    axes.set(xlim=(-0.2, 1.1), ylim=(-0.6, depth - 0.4))
    axes.set_title(f"Layers of a d{depth}", fontsize=11, loc="left")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figure to argv[0], or to dev/slc2.svg."""
    mpl.rcParams["svg.hashsalt"] = "slc2"  # path names that do not change from run to run
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(4.6, 1))
    draw_layer(left)
    draw_plan(right, 20)
    for axes in (left, right):
        axes.axis("off")
    out = Path(argv[0]) if argv else OUT
    figure.savefig(out, dpi=80, metadata={"Date": None} if out.suffix == ".svg" else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
