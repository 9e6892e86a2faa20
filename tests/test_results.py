"""Reports computed by hand; for those of whole stages see test_base_train and test_chat_rl."""

import json

import pytest

from nanochat.common import Runtime
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.train.progress import EmaLoss, Progress
from nanochat.train.results import report_rl, report_training
from nanochat.train.run import Run
from tests.helpers.models import random_model, small_config
from tests.helpers.runs import RunConfig, a_plan
from tests.helpers.vocabulary import train_tokenizer


def a_run(directory, stage, lines, progress):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = random_model(small_config())
    return Run(
        stage=stage,
        directory=directory,
        model=model,
        tokenizer=train_tokenizer(),
        optimizer=build_optimizer(model, OptimizerConfig()),
        runtime=Runtime.cpu(),
        config=RunConfig(resume=True),
        progress=progress,
    )


def test_training_by_hand(tmp_path, base_dir):
    steps = [
        {"step": i, "loss": 1.0, "seconds": s, "tokens_per_second": 600 / s, "mfu": None}
        for i, s in enumerate([30.0, 1.0, 2.0, 3.0, 4.0])
    ]
    lines = [{"step": 0, "val_bpb": 2.0}, *steps, {"step": 5, "val_bpb": 1.5}]
    progress = Progress(
        step=5, ema=EmaLoss(total=0.3, weight=0.1), train_seconds=120.0, earlier_seconds=900.0
    )
    progress.first_val_bpb, progress.min_val_bpb, progress.val_bpb = 2.0, 1.25, 1.5
    run = a_run(tmp_path / "d2", "mid", lines, progress)
    line = report_training(run, a_plan(5, tokens_per_step=600_000))
    n = sum(p.numel() for p in run.model.parameters())
    assert line == (
        f"mid_train: d2, {n / 1e6:.1f} M parameters, 3.0 M tokens in 2.0 min; "
        "validation bpb 2.0000 -> 1.5000 (75.0 % of step 0)"
    )
    report = json.loads((base_dir / "report" / "mid_train.json").read_text())
    assert report["median_tokens_per_second"] == 200
    assert (report["steps"], report["tokens"], report["parameters"]["total"]) == (5, 3_000_000, n)
    assert [report[f"{name}val_bpb"] for name in ("first_", "min_", "")] == [2.0, 1.25, 1.5]
    assert report["train_loss"] == pytest.approx(3.0)
    assert report["settings"]["resume"] is True
    assert report["model"]["n_kernel"] == 3
    assert report["metrics"] == str(tmp_path / "d2" / "metrics.jsonl")
    assert report["wall_seconds"] > 900


def test_reinforcement_learning_by_hand(tmp_path, base_dir):
    """Twenty steps: a tenth of them is two."""
    steps = [{"step": i, "reward": i / 20, "rewards": {"A": i / 20}, "contrast": i / 10} for i in range(20)]
    steps[19]["rewards"] = {"B": 0.5}
    before, after = ({"step": i, "accuracy": a, "standard_error": 0.1} for i, a in ((0, 0.25), (20, 0.75)))
    run = a_run(tmp_path / "d2", "rl", [before, *steps, after], Progress(step=20, train_seconds=60.0))
    line = report_rl(run, a_plan(20))
    assert line == (
        "chat_rl: d2, 20 steps in 1.0 min; reward 0.0250 -> 0.9250, accuracy 0.2500 -> 0.7500 +- 0.1000"
    )
    report = json.loads((base_dir / "report" / "chat_rl.json").read_text())
    assert (report["first_reward"], report["last_reward"]) == pytest.approx((0.025, 0.925))
    assert report["contrast"] == pytest.approx(0.95)
    assert report["rewards"]["A"] == pytest.approx({"first": 0.025, "last": 0.875})
    assert report["rewards"]["B"] == {"first": 0.5, "last": 0.5}
    assert (report["first_accuracy"], report["accuracy"], report["seconds"]) == (0.25, 0.75, 60.0)
