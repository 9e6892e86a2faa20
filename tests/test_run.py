"""How a run starts, resumes, overwrites and saves; whole stages are in test_base_train and so on."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    complete_steps,
    load_optimizer_shards,
    load_tokenizer,
    read_meta,
    save_checkpoint,
)
from nanochat.common import Runtime
from nanochat.metrics import read_metrics
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import Cadence, OptimizerConfig
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.run import DryRun, warm_start
from tests.helpers.chats import write_base_checkpoint
from tests.helpers.models import random_model, small_config
from tests.helpers.runs import RunConfig, a_plan, open_run
from tests.helpers.vocabulary import training_texts


@pytest.fixture
def directory(base_dir):
    return checkpoint_dir("base", "small")


def saved_run(steps, **settings):
    """A run that was saved after each of `steps`, with all weights equal to the step."""
    run = open_run(**settings)
    run.begin(a_plan(100))
    for step in steps:
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(step)
        run.progress.step = step
        run.progress.ema.update(step)
        run.progress.loader_state = {"next_row": step, "positions": {}}
        run.log({"step": step - 1, "loss": 1.0})
        run.save()
    run.close()
    return run


# ---------------------------------------------------------------------------------------------------------
# Momentum of the stage before


def test_warm_start_takes_momentum_and_keeps_the_settings(base_dir):
    write_base_checkpoint(base_dir)
    directory = checkpoint_dir("base", "d2")
    (saved,) = load_optimizer_shards(directory, 3)
    shape = {"n_layer": 2, "n_embd": 32, "n_kernel": 4, "slc_rate": 2, "vocab_size": 350}
    optimizer = build_optimizer(
        random_model(small_config(**shape)), OptimizerConfig(matrix_lr=0.5, conv_lr=0.1)
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
    optimizer = build_optimizer(model, OptimizerConfig())
    save_checkpoint(tmp_path, 3, model, None, {})
    with caplog.at_level(logging.INFO):
        warm_start(tmp_path, 3, optimizer, Runtime.cpu())
    assert "momentum starts at zero" in caplog.text
    for state in optimizer.state_dict()["state"].values():
        assert state["n_steps"] == 0
    save_checkpoint(tmp_path, 3, model, {}, {})
    (tmp_path / "optim_000003_rank0.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"optim_000003_rank0.pt is damaged"):  # damaged is not missing
        warm_start(tmp_path, 3, optimizer, Runtime.cpu())


def test_warm_start_with_a_part_of_the_optimizer_state(directory):
    """Training went on with no momentum at all, as if none had been saved."""
    run = saved_run([3])
    path = directory / "meta_000003.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "optimizer_shards": 2}))
    with pytest.raises(ValueError, match=r"optim_000003_rank1.pt is missing"):
        warm_start(directory, 3, run.optimizer, Runtime.cpu())


# ---------------------------------------------------------------------------------------------------------
# Start, resume, overwrite


def test_a_new_run_leaves_nothing_before_it_begins(directory):
    run = open_run()
    assert not directory.exists()
    run.begin(a_plan(3))
    assert sorted(path.name for path in directory.iterdir()) == ["metrics.jsonl", "tokenizer"]


def test_a_resumed_run_has_all_that_was_saved(directory):
    saved = saved_run([1, 2])
    run = open_run(model=random_model(small_config(), seed=1), resume=True)
    assert (run.progress.step, run.progress.ema) == (2, saved.progress.ema)
    assert run.progress.loader_state == {"next_row": 2, "positions": {}}
    for one, two in zip(run.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(one, two)
    meta = read_meta(directory, 2)
    assert meta["user_config"]["cadence"]["keep_last"] == 2
    assert meta["progress"]["earlier_seconds"] > 0
    run.begin(a_plan(3))
    assert complete_steps(directory) == [1, 2]
    assert [record["step"] for record in read_metrics(directory / "metrics.jsonl")] == [0, 1]


def test_checkpoints_need_resume_or_overwrite(directory):
    saved_run([1, 2])
    with pytest.raises(ValueError, match="up to step 2: continue with --resume, start over with --overwrite"):
        open_run()


def test_overwriting_deletes_nothing_before_the_run_begins(directory):
    saved_run([1, 2])
    before = {path: path.read_bytes() for path in directory.rglob("*.*")}
    run = open_run(overwrite=True)
    assert run.progress.step == 0
    assert {path: path.read_bytes() for path in directory.rglob("*.*")} == before
    run.begin(a_plan(3))
    assert complete_steps(directory) == []
    assert read_metrics(directory / "metrics.jsonl") == []
    assert not list(directory.glob("*.pt"))


def test_a_run_that_cannot_begin_deletes_nothing(directory, monkeypatch):
    """--run=NAME without wandb fails when the metrics are opened."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    saved_run([1, 2])
    run = open_run(overwrite=True, run="mine")
    with pytest.raises(ValueError, match="wandb"):
        run.begin(a_plan(3))
    assert complete_steps(directory) == [1, 2]


def test_a_plan_that_ends_before_the_checkpoint(directory):
    saved_run([1, 2])
    with pytest.raises(ValueError, match="a checkpoint of step 2, but these settings end at step 1"):
        open_run(resume=True).begin(a_plan(1))


def test_as_many_checkpoints_are_kept_as_the_cadence_says(directory):
    saved_run([1, 2, 3, 4], cadence=Cadence(keep_last=3))
    assert complete_steps(directory) == [2, 3, 4]


def test_a_dry_run_writes_nothing(base_dir):
    model = random_model(small_config())
    optimizer = build_optimizer(model, OptimizerConfig())
    run = DryRun(model=model, optimizer=optimizer, runtime=Runtime.cpu(), config=RunConfig())
    run.log({"step": 0})
    run.save()
    assert run.records == [{"step": 0}]
    assert not base_dir.exists()


# ---------------------------------------------------------------------------------------------------------
# Checkpoints that are damaged, missing or of another run


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt", "meta_000003.json"])
@pytest.mark.parametrize("keep", [0, 100, None])
def test_a_damaged_checkpoint_is_passed_over(directory, caplog, name, keep):
    """It is cut short, or missing."""
    saved_run([1, 2, 3], cadence=Cadence(keep_last=0))
    path = directory / name
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    (directory / ".model_000004.pt.99.partial").touch()
    run = open_run(resume=True)
    assert run.progress.step == 2
    assert (run.model.lm_head.weight == 2).all()
    # without model or meta file there is no checkpoint
    is_found = keep is not None or name.startswith("optim")
    assert (f"{name}" in caplog.text and "trying the checkpoint before" in caplog.text) == is_found
    assert not list(directory.glob(".*"))
    has_meta = (directory / "meta_000003.json").exists()
    has_state = (directory / "optim_000003_rank0.pt").exists()
    assert has_state == (has_meta and (keep is not None or not name.startswith("optim")))


@pytest.mark.parametrize("name", ["model_000003.pt", "optim_000003_rank0.pt"])
def test_a_flipped_bit_is_detected(directory, caplog, name):
    saved_run([2, 3])
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    assert open_run(resume=True).progress.step == 2
    assert f"{name} is damaged (in " in caplog.text


def test_no_checkpoint_can_be_read(directory):
    saved_run([1, 2])
    for path in directory.glob("model_*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: start over with --overwrite"):
        open_run(resume=True)


def test_optimizer_state_of_another_model(directory):
    saved_run([1])
    other = build_optimizer(random_model(small_config(n_embd=32)), OptimizerConfig())
    with pytest.raises(ValueError, match=r"optimizer state has 50 x .24,., the model needs 50 x .32,."):
        open_run(optimizer=other, resume=True)


def test_ranks_that_see_different_checkpoints(directory):
    """Two machines, each with a base directory of its own."""

    class FirstOfTwo(Runtime):
        def gather(self, value):
            return [value, []]

    saved_run([1])
    runtime = FirstOfTwo(device=torch.device("cpu"), compute_dtype=torch.float32, world_size=2)
    with pytest.raises(ValueError, match="put NANOCHAT_BASE_DIR on a disk that all nodes share"):
        open_run(runtime=runtime, resume=True)


def test_a_directory_that_cannot_be_written():
    run = open_run()
    run.directory = Path("/proc/checkpoints")
    run.progress.loader_state = {"positions": {}}
    for write in (lambda: run.begin(a_plan(3)), run.save):
        with pytest.raises(OSError, match="/proc/checkpoints"):
            write()


def test_another_tokenizer(directory):
    run = saved_run([1])
    assert load_tokenizer(directory).is_same_as(run.tokenizer)
    other = RustBPETokenizer.train_from_iterator(iter(training_texts()), 300)
    with pytest.raises(ValueError, match="started with another tokenizer than the present one"):
        open_run(tokenizer=other, resume=True)
