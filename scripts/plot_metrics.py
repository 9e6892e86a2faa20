"""Plot loss and validation bits per byte of one or more runs over their tokens and their time.

python -m scripts.plot_metrics --out=curves.png --runs ~/.cache/nanochat/base_checkpoints/d4/metrics.jsonl
python -m scripts.plot_metrics --out=curves.png --runs hybrid.jsonl attention.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import atomic_write, parse, run


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """What to draw, and where to."""

    runs: tuple[Path, ...]
    """metrics.jsonl files; a file's name, or that of its folder, names its curve"""
    out: Path = Path("curves.png")
    """the picture: .png, .svg or .pdf"""
    skip: int = 20
    """steps left out at the start of the loss curve, which would dwarf the rest"""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture."""
    config = parse(PlotConfig, argv)

    import matplotlib as mpl

    from nanochat.metrics import read_metrics

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (loss_axis, bpb_axis) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for path in config.runs:
        records = read_metrics(path)
        steps = [r for r in records if "loss" in r][config.skip :]
        evals = [r for r in records if "val_bpb" in r][1:]
        if not steps or not evals:
            raise ValueError(f"{path} has too few steps or evaluations to draw")
        name = path.parent.name if path.stem == "metrics" else path.stem
        loss_axis.plot([r["step"] for r in steps], [r["smooth_loss"] for r in steps], label=name)
        bpb_axis.plot(
            [r["train_seconds"] for r in evals], [r["val_bpb"] for r in evals], marker="o", label=name
        )
    loss_axis.set(xlabel="step", ylabel="training loss (nats a token)")
    bpb_axis.set(xlabel="seconds of training", ylabel="validation bits per byte")
    for axis in (loss_axis, bpb_axis):
        axis.grid(alpha=0.3)
        axis.legend()
    with atomic_write(config.out) as file:
        figure.savefig(file, format=config.out.suffix.removeprefix("."), dpi=120)
    print(f"plot_metrics: {len(config.runs)} run(s) drawn to {config.out}")
    return 0


if __name__ == "__main__":
    run(main)
