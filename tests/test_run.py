"""Momentum taken over from the stage before, and the report of a run; for resuming see test_base_train."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    load_optimizer_shards,
    save_checkpoint,
    tokenizer_dir,
)
from nanochat.common import Runtime
from nanochat.optim import build_optimizer
from nanochat.optim.schedule import LearningRates, Plan
from nanochat.train.run import EmaLoss, Progress, report_training, start_or_resume, warm_start
from tests.helpers.chats import write_base_checkpoint
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer


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


def test_warm_start_with_a_part_of_the_optimizer_state(tmp_path):
    """It went on with no momentum at all, as if none had been saved."""
    _, optimizer = a_run(tmp_path, [3])
    meta = json.loads((tmp_path / "meta_000003.json").read_text())
    (tmp_path / "meta_000003.json").write_text(json.dumps({**meta, "optimizer_shards": 2}))
    with pytest.raises(ValueError, match=r"optim_000003_rank1.pt is missing"):
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


# ---------------------------------------------------------------------------------------------------------
# Checkpoints that are damaged, missing or in the way


def a_run(directory, steps):
    """A model and its optimizer, saved after each of steps, the weights all equal to the step."""
    model = random_model(small_config())
    optimizer = build_optimizer(model, LearningRates())
    for step in steps:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        meta = {"progress": asdict(Progress(step=step, ema=EmaLoss(total=1.0, weight=1.0)))}
        save_checkpoint(directory, step, model, optimizer.state_dict(), meta)
    return model, optimizer


def resume(directory, model, optimizer, runtime=None):
    tokenizer = train_tokenizer()
    tokenizer.save(tokenizer_dir(directory))
    return start_or_resume(
        directory, model, tokenizer, optimizer, runtime or Runtime.cpu(), resume=True, overwrite=False
    )


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt", "meta_000003.json"])
@pytest.mark.parametrize("keep", [0, 100, None])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, name, keep):
    """It is cut short, or not there at all."""
    model, optimizer = a_run(tmp_path, [1, 2, 3])
    path = tmp_path / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    (tmp_path / ".model_000004.pt.99.partial").touch()
    assert resume(tmp_path, model, optimizer).step == 2
    assert (model.lm_head.weight == 2).all()
    is_seen = keep is not None or name.startswith(
        "optim"
    )  # without model or meta file there is no checkpoint
    assert (f"{name}" in caplog.text and "trying the checkpoint before" in caplog.text) == is_seen
    assert not list(tmp_path.glob(".*"))
    has_meta = (tmp_path / "meta_000003.json").exists()
    is_left = (tmp_path / "optim_000003_rank0.pt").exists()
    assert is_left == (has_meta and (keep is not None or not name.startswith("optim")))


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt"])
def test_a_flipped_bit_is_seen(tmp_path, caplog, name):
    model, optimizer = a_run(tmp_path, [2, 3])
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    assert resume(tmp_path, model, optimizer).step == 2
    assert f"{name} is damaged (in " in caplog.text


def test_no_checkpoint_can_be_read(tmp_path):
    model, optimizer = a_run(tmp_path, [1, 2])
    for path in tmp_path.glob("model_*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: start anew with --overwrite"):
        resume(tmp_path, model, optimizer)


def test_optimizer_state_of_another_model(tmp_path):
    a_run(tmp_path, [1])
    model = random_model(small_config())
    other = build_optimizer(random_model(small_config(n_embd=32)), LearningRates())
    with pytest.raises(ValueError, match=r"optimizer state has 50 x .24,., the model needs 50 x .32,."):
        resume(tmp_path, model, other)


def test_ranks_that_see_different_checkpoints(tmp_path):
    """Two machines, each with a base directory of its own."""

    class FirstOfTwo(Runtime):
        def gather(self, value):
            return [value, []]

    model, optimizer = a_run(tmp_path, [1])
    runtime = FirstOfTwo(device=torch.device("cpu"), compute_dtype=torch.float32, world_size=2)
    with pytest.raises(ValueError, match="put NANOCHAT_BASE_DIR on a disk that all nodes share"):
        resume(tmp_path, model, optimizer, runtime)


def test_a_directory_that_cannot_be_written():
    with pytest.raises(OSError, match="/proc/checkpoints"):
        a_run(Path("/proc/checkpoints"), [1])
