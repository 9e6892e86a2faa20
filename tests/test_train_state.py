"""Momentum taken over from the stage before, and the report of a run; for resuming see test_base_train."""

import json
import logging

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, load_optimizer_shards, save_checkpoint
from nanochat.common import Runtime
from nanochat.optim import build_optimizer
from nanochat.schedule import LearningRates, Plan
from nanochat.train_state import EmaLoss, Progress, report_training, warm_start
from tests.chats import write_base_checkpoint
from tests.models import random_model, small_config


def test_warm_start_takes_momentum_and_keeps_the_settings(base_dir):
    write_base_checkpoint(base_dir)
    directory = checkpoint_dir("base", "d2")
    (saved,) = load_optimizer_shards(directory, 3)
    shape = {"n_layer": 2, "n_embd": 32, "n_kernel": 4, "slc_rate": 2, "vocab_size": 350}
    optimizer = build_optimizer(
        random_model(small_config(**shape)), LearningRates(matrix_lr=0.5, conv_lr=0.1)
    )
    before = optimizer.state_dict()
    warm_start(directory, 3, optimizer, Runtime.cpu())
    found = optimizer.state_dict()
    assert found["param_groups"] == before["param_groups"]
    assert found["param_groups"] != saved["param_groups"]
    assert found["state"].keys() == saved["state"].keys()
    for index, state in saved["state"].items():
        assert state["n_steps"] == 3
        assert any(value.any() for key, value in state.items() if key not in ("n_steps", "n_slots", "slots"))
        for key, value in state.items():
            torch.testing.assert_close(found["state"][index][key], value, rtol=0, atol=0)


def test_warm_start_without_optimizer_state(tmp_path, caplog):
    model = random_model(small_config())
    optimizer = build_optimizer(model, LearningRates())
    save_checkpoint(tmp_path, 3, model, None, {})
    with caplog.at_level(logging.INFO):
        warm_start(tmp_path, 3, optimizer, Runtime.cpu())
    assert "momentum starts at zero" in caplog.text
    for state in optimizer.state_dict()["state"].values():
        assert state["n_steps"] == 0
    save_checkpoint(tmp_path, 3, model, {}, {})
    (tmp_path / "optim_000003_rank0.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"optim_000003_rank0.pt is damaged"):  # that is not missing
        warm_start(tmp_path, 3, optimizer, Runtime.cpu())


def test_report_by_hand(tmp_path, base_dir):
    steps = [
        {"step": i, "loss": 1.0, "seconds": s, "tokens_per_second": 600 / s, "mfu": None}
        for i, s in enumerate([30.0, 1.0, 2.0, 3.0, 4.0])
    ]
    lines = [{"step": 0, "val_bpb": 2.0}, *steps, {"step": 5, "val_bpb": 1.5}]
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = random_model(small_config())
    progress = Progress(step=5, ema=EmaLoss(total=0.3, weight=0.1), train_seconds=120.0)
    progress.first_val_bpb, progress.min_val_bpb, progress.val_bpb = 2.0, 1.25, 1.5
    plan = Plan(num_steps=5, accumulation=1, tokens_per_step=600_000, lr_multiplier=lambda p: 1.0)
    line = report_training("mid_train", plan, model, progress, tmp_path / "d2", {"depth": 2})
    n = sum(p.numel() for p in model.parameters())
    assert line == (
        f"mid_train: d2, {n / 1e6:.1f} M parameters, 3.0 M tokens in 2.0 min; "
        "validation bpb 2.0000 -> 1.5000 (75.0 % of step 0)"
    )
    report = json.loads((base_dir / "report" / "mid_train.json").read_text())
    assert report["median_tokens_per_second"] == 200
    assert (report["steps"], report["tokens"], report["parameters"]["total"]) == (5, 3_000_000, n)
    assert [report[f"{name}val_bpb"] for name in ("first_", "min_", "")] == [2.0, 1.25, 1.5]
    assert report["train_loss"] == pytest.approx(3.0)
    assert report["settings"] == {"depth": 2}
    assert report["model"]["n_kernel"] == 3
