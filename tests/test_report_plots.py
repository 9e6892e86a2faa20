import json
import math

import pytest
from matplotlib.image import imread

from nanochat.report import plots
from nanochat.report.__main__ import main
from nanochat.report.text import PICTURES
from tests.helpers.reports import RESULTS, generate, write_metrics, write_results


def assert_is_a_picture(path):
    assert path.stat().st_size < 200_000
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.02  # 0 for a blank image


@pytest.mark.slow
def test_pictures(base_dir, tmp_path):
    folder = write_results(base_dir / "report")
    for stage in ("base_train", "mid_train", "chat_sft"):
        metrics = write_metrics(tmp_path / f"{stage}.jsonl")
        (folder / f"{stage}.json").write_text(json.dumps({"metrics": metrics}))
    with open(tmp_path / "base_train.jsonl", "a") as file:
        file.write('{"step": 20, "core": 0.1}\n')
    rewards = "".join(json.dumps({"step": i, "reward": i % 5 / 9}) + "\n" for i in range(30))
    (tmp_path / "rl.jsonl").write_text(rewards)
    (folder / "chat_rl.json").write_text(json.dumps({"metrics": str(tmp_path / "rl.jsonl")}))
    text = generate(folder)
    for name, title in PICTURES.items():
        assert f"![{title}]({name})" in text.splitlines()
        assert_is_a_picture(folder / name)

    (folder / "chat_rl.json").unlink()
    (tmp_path / "base_train.jsonl").unlink()
    assert "reward.png" not in generate(folder)
    assert not (folder / "reward.png").exists()


def test_core_during_training():
    records = [{"step": 2, "loss": 1.0}, {"step": 2, "core": 0.1}, {"step": 4, "core": 0.2}]
    during, end = plots.core(records, {"step": 5, "core": 0.25}).axes[0].lines
    assert [[*line.get_xydata().ravel()] for line in (during, end)] == [[2, 0.1, 4, 0.2], [5, 0.25]]
    assert len(plots.core(records, {}).axes[0].lines[1].get_xdata()) == 0
    assert plots.core(records[:1], {"step": 5, "core": 0.25}) is None


def test_rewards_of_several_tasks():
    rewards = [{"A": 0.5, "B": 1.0}, {"A": 1.0}]
    records = [{"step": i, "reward": 0.75, "rewards": rewards[i % 2]} for i in range(4)]
    _, mean, *tasks = plots.reward(records, window=2).axes[0].lines
    assert [[*line.get_xdata()] for line in tasks] == [[0, 1, 2, 3], [0, 2]]
    assert [[*line.get_ydata()] for line in tasks] == [[0.5, 0.75, 0.75, 0.75], [1.0, 1.0]]
    assert len({line.get_color() for line in (mean, *tasks)}) == 3
    assert [line.get_label() for line in (mean, *tasks)] == ["mean of 2 steps", "of these, A", "of these, B"]
    assert len(plots.reward([r | {"rewards": {"A": 1.0}} for r in records]).axes[0].lines) == 2


def test_bars_are_the_accuracies():
    axis = plots.chat_tasks(RESULTS).axes[0]
    errors, groups = axis.containers[0::2], axis.containers[1::2]
    bars = {group.get_label(): [bar.get_height() for bar in group.patches] for group in groups}
    assert bars["MID"] == [0.38, 0.0341]
    assert bars["SFT"][0] == 0.3864
    assert math.isnan(bars["SFT"][1])
    assert errors[0].lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.37, 0.39])
    assert [line[0, 1] for line in axis.collections[-1].get_segments()] == [0.25, 0]  # chance
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["ARC-Easy", "GSM8K"]


def test_limits_ignore_the_first_steps(tmp_path):
    records = plots.read_metrics(write_metrics(tmp_path / "m.jsonl"))
    loss_axis, bpb_axis = plots.losses({"BASE": records}).axes
    assert len(loss_axis.lines[0].get_ydata()) == 40
    assert 3 <= loss_axis.get_ylim()[1] < 5  # the loss is 9 at step 0, 3 after a twentieth of the steps
    assert list(bpb_axis.lines[0].get_xdata()) == [0, 20, 40]
    assert bpb_axis.get_ylim()[1] > 2  # of three evaluations none is left out
    falling = [{"step": i, "smooth_loss": 1, "val_bpb": bpb} for i, bpb in enumerate((3, 1.3, 1.2, 1.1, 1))]
    assert plots.losses({"BASE": falling}).axes[1].get_ylim() == pytest.approx((0.982, 1.318))


def test_plot_compares_runs(tmp_path):
    write_metrics(tmp_path / "a.jsonl")
    write_metrics(tmp_path / "d4" / "metrics.jsonl")
    out = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "a.jsonl"), str(tmp_path / "d4"), f"--out={out}"]) == 0
    assert_is_a_picture(out)
    write_metrics(tmp_path / "b.jsonl", n_steps=0)
    out.unlink()
    main(["plot", str(tmp_path / "b.jsonl"), f"--out={out}"])
    assert_is_a_picture(out)
    write_metrics(tmp_path / "b.jsonl", n_steps=0, evals=())
    with pytest.raises(ValueError, match=r"b\.jsonl has no steps and no evaluations"):
        main(["plot", str(tmp_path / "b.jsonl"), f"--out={out}"])


def test_names_are_not_formulas(tmp_path):
    """Regression: matplotlib failed to parse the name of this run as a formula."""
    run = write_metrics(tmp_path / "$x^$" / "metrics.jsonl")
    assert main(["plot", run, f"--out={tmp_path / 'curves.png'}"]) == 0
    records = [{"step": i, "reward": 0.5, "rewards": {"$x^$": 1.0, "b": 0.0}} for i in range(3)]
    plots._save(plots.reward(records), tmp_path / "reward.png")


def test_panels_of_a_comparison(tmp_path, base_dir, monkeypatch):
    """Runs are given by tag and have one color each; without evaluations they miss one panel only."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    for stage in ("base", "chatsft"):
        write_metrics(base_dir / f"{stage}_checkpoints" / "d4" / "metrics.jsonl")
    write_metrics(tmp_path / "quick" / "metrics.jsonl", evals=())
    main(["plot", "d4", "sft/d4", str(tmp_path / "quick")])
    loss, bpb, speed = saved[0].axes
    names = ["base_checkpoints/d4", "chatsft_checkpoints/d4", f"{tmp_path.name}/quick"]
    assert [line.get_label() for line in loss.lines] == [line.get_label() for line in speed.lines] == names
    assert [line.get_label() for line in bpb.lines] == names[:2]
    assert [line.get_color() for line in speed.lines] == ["C0", "C1", "C2"]
    assert [axis.get_title() for axis in saved[0].axes] == [
        "training loss (nats per token)",
        "validation (bits per byte)",
        "tokens per second",
    ]
    assert [axis.get_xlabel() for axis in saved[0].axes] == ["step", "seconds of training", "step"]
    assert list(bpb.lines[0].get_xdata()) == [0, 20, 40]
    assert [text.get_text() for text in saved[0].legends[0].get_texts()] == names
    assert speed.get_ylim()[0] == 0
    main(["plot", str(tmp_path / "quick")])
    assert [line.get_label() for line in saved[1].axes[0].lines] == ["quick"]


@pytest.mark.parametrize("run", ["d9", "sft/d4", "nowhere/d4", "d4/metrics.json"])
def test_missing_run(run, base_dir):
    write_metrics(base_dir / "base_checkpoints" / "d4" / "metrics.jsonl")
    with pytest.raises(
        FileNotFoundError, match=f"no metrics.jsonl for run '{run}': give the file, its folder"
    ):
        main(["plot", "d4", run])
