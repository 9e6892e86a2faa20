"""What speedrun.sh decides: flags for this machine, what it refuses, and what a second start does again."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_readme import module_and_arguments, read_flags

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case $1 in
    -c) [[ $2 != *wandb* ]] || exit "${NO_WANDB:-0}"; echo "$MACHINE" ;;
    -m)
        while [ "$1" != -m ] || [[ $2 == torch.* ]]; do shift; done
        [ "${2#*.}" != "${CUT:-}" ] || { echo "$LAST_WORDS"; exit 1; }
        echo "${2#*.}: done"
        [ -z "${AFTER:-}" ] || echo "$AFTER" ;;
esac
"""
MACHINES = {  # GPUs, their GiB, and whether they have 8 bits
    "no GPU": "0 0 False",
    "one of 24 GiB": "1 23 False",
    "eight of 80 GiB": "8 79 True",
    "six of 80 GiB": "6 79 True",
}
TRAINING = ("base_train", "mid_train", "chat_sft")


@pytest.fixture
def speedrun(tmp_path):
    """The script with a Python that only notes what it is told; returns how it ends and the scripts run."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "setup.sh").touch()
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def start(*arguments, machine="no GPU", **settings):
        calls.unlink(missing_ok=True)
        environment = {**os.environ, **settings, "CALLS": str(calls), "MACHINE": MACHINES[machine]}
        done = subprocess.run(["bash", "speedrun.sh", *arguments], cwd=tmp_path, env=environment)
        lines = calls.read_text().splitlines() if calls.exists() else []
        return done.returncode, [shlex.split(line) for line in lines if "scripts." in line]

    return start


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("setting", ["", "DEPTH=8", "DEVICE_BATCH_SIZE=4", "DATA=PATH"])
def test_gives_flags_that_are_read(machine, setting, speedrun):
    status, calls = speedrun(machine=machine, **dict([setting.split("=")] if setting else []))
    assert status == 0
    for words in calls:
        read_flags(*module_and_arguments(words))
    assert len(calls) >= 8


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("data", ["hub", "embedded", "PATH"])
@pytest.mark.parametrize("more", [{}, {"NPROC_PER_NODE": "4"}, {"DEVICE_BATCH_SIZE": "4"}])
def test_gives_batches_that_divide(machine, data, more, speedrun):
    """DATA=embedded on four GPUs or more, or ranks, ended after pretraining, or before it."""
    status, calls = speedrun(machine=machine, DATA=data, **more)
    assert status == 0
    for words in calls:
        module, arguments = module_and_arguments(words)
        stage = module.removeprefix("scripts.")
        if stage not in TRAINING:
            continue
        n_ranks = next((int(w.partition("=")[2]) for w in words if w.startswith("--nproc_per_node")), 1)
        config = read_flags(module, arguments)
        if stage == "chat_sft":
            n_rows = config.conversations_per_step
        else:
            seq_len = config.max_seq_len if config.max_seq_len > 0 else 2048
            n_rows = config.total_batch_size // seq_len
        assert n_rows % (n_ranks * max(1, config.device_batch_size)) == 0, (stage, n_ranks, config)
        is_chat_of_embedded = data != "hub" and stage == "mid_train"
        assert not is_chat_of_embedded or config.total_batch_size == 4096  # else two steps are all there are


def test_8_bits_are_for_pretraining_on_cards_that_have_them(speedrun, capfd):
    """Elsewhere it would end after download and tokenizer."""
    assert speedrun(FP8="1", machine="one of 24 GiB") == speedrun(FP8="1") == (1, [])
    assert "FP8=1 needs Hopper GPUs" in capfd.readouterr().err
    status, calls = speedrun(FP8="1", machine="eight of 80 GiB")
    assert status == 0
    in_8_bits = [module_and_arguments(words) for words in calls if "--fp8" in words]
    assert [module for module, _ in in_8_bits] == ["scripts.base_train"]
    assert read_flags(*in_8_bits[0]).fp8


def test_goes_on_only_with_what_it_began(speedrun):
    """Cut off while it started anew, before old checkpoints were deleted, a stage went on with those."""
    cut = {"CUT": "mid_train", "LAST_WORDS": "step 00000 | validation bpb 3.1"}
    saved = {**cut, "LAST_WORDS": "step 00040 | saved to there"}
    found = []
    for arguments, settings in (([], {}), (["--fresh"], cut), ([], cut), ([], saved), ([], cut), ([], {})):
        status, calls = speedrun(*arguments, **settings)
        found += [(status, words[-1]) for words in calls if "scripts.mid_train" in words]
    again, anew = "--resume", "--overwrite"
    assert found == [(0, anew), (1, anew), (1, anew), (1, anew), (1, again), (0, again)]


def test_does_not_pass_over_another_seed(speedrun, capfd):
    """A finished stage would not be trained again, and the seed be without effect."""
    assert speedrun(SEED="7")[0] == 0
    assert speedrun(SEED="8") == (1, [])
    assert "SEED=7" in capfd.readouterr().err
    assert speedrun(SEED="7")[0] == 0
    status, calls = speedrun("--fresh", SEED="8")
    assert status == 0
    assert any("--seed=8" in words for words in calls)


def test_does_not_pass_over_another_precision(speedrun, capfd):
    """Pretraining went on at its last step, did nothing, and all after it was done again for that."""
    assert speedrun(FP8="1", machine="eight of 80 GiB", CUT="tok_train")[0] == 1  # before that it can change
    assert speedrun(machine="eight of 80 GiB")[0] == 0
    assert speedrun(FP8="1", machine="eight of 80 GiB") == (1, [])
    assert "FP8=1, but the run in" in capfd.readouterr().err
    assert speedrun("--fresh", FP8="1", machine="eight of 80 GiB")[0] == 0
    assert speedrun(machine="eight of 80 GiB") == (1, [])


@pytest.mark.parametrize("setting", ["RL=yes", "RL=2", "FP8=yes", "FP8=2", "DATA=auto"])
def test_does_not_guess_what_a_setting_means(setting, speedrun, capfd):
    """RL=yes was off, FP8=no was on, and DATA=auto a path."""
    name, value = setting.split("=")
    assert speedrun(**{name: value}, machine="eight of 80 GiB") == (1, [])
    assert f"{setting} must be " in capfd.readouterr().err


def test_the_report_is_of_one_run(speedrun, tmp_path):
    """That of a deeper model, without RL or cut off, had results of the last one beside its own."""
    start = Path(os.environ["NANOCHAT_BASE_DIR"]) / "report" / "start.json"
    start.parent.mkdir(parents=True)
    start.touch()

    def before_training(**settings):
        speedrun(**settings)
        lines = (tmp_path / "calls").read_text().splitlines()
        assert sum(" reset" in line for line in lines) <= 1
        return [line.partition("reset --since=")[2] for line in lines if " reset" in line]

    cut = {"CUT": "mid_train", "LAST_WORDS": "step 00000"}
    assert before_training() == ["tok_train"]
    assert before_training() == []
    assert before_training(DEPTH="6", RL="0", **cut) == ["base_train"]
    assert before_training(DEPTH="6", RL="0") == ["mid_train"]
    assert before_training(DEPTH="6") == ["chat_rl"]


def test_takes_as_many_ranks_as_batches_divide_by(speedrun, capfd):
    """With six GPUs it ended after download and tokenizer: no batch of 524,288 tokens divides by six."""
    status, calls = speedrun(machine="six of 80 GiB")
    assert status == 0
    assert {word for words in calls for word in words if "nproc_per_node" in word} == {"--nproc_per_node=4"}
    assert speedrun(machine="six of 80 GiB", NPROC_PER_NODE="3") == (1, [])
    assert "NPROC_PER_NODE=3 must be 1, 2, 4 or 8" in capfd.readouterr().err


def test_looks_for_wandb_before_it_needs_it(speedrun, capfd):
    """It was missed after download and tokenizer, and `pip`, which .venv lacks, put it elsewhere."""
    assert speedrun(WANDB_RUN="mine", NO_WANDB="1") == (1, [])
    assert "uv pip install --python .venv wandb" in capfd.readouterr().err
    status, calls = speedrun(WANDB_RUN="mine")
    assert status == 0
    assert any("--run=mine-base" in words for words in calls)


def test_looks_for_the_core_bundle_before_it_needs_it(speedrun, tmp_path, capfd):
    assert speedrun(CORE_BUNDLE=str(tmp_path)) == (1, [])
    assert "is no folder with a core.yaml" in capfd.readouterr().err
    (tmp_path / "core.yaml").touch()
    for bundle, flag in ((str(tmp_path), "--bundle"), ("https://there/it.zip", "--bundle-url")):
        status, calls = speedrun(CORE_BUNDLE=bundle)
        assert status == 0
        assert any(f"{flag}={bundle}" in words for words in calls if "scripts.base_eval" in words)


def test_is_not_misled_by_what_libraries_print_at_the_end(speedrun):
    """NCCL with NCCL_DEBUG=INFO, as some clouds set it, has the last word: a stage never counted as done."""
    assert speedrun(AFTER="host:1:2 [0] NCCL INFO comm 0x5 rank 0 - Destroy COMPLETE")[0] == 0
