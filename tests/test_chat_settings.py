"""Invalid settings of mid_train, chat_sft and chat_eval: one clear line, and no change on disk."""

import re
import sys
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import checkpoint_dir, complete_steps
from nanochat.common import run
from scripts import chat_eval, chat_sft, mid_train
from tasks import mixtures as recipes
from tests.helpers.chats import ColourTask, learn, same, train, weights, write_base_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def base(base_dir, monkeypatch):
    """Save a base model d2 and set the tasks of training and evaluation."""
    write_base_checkpoint(base_dir)
    learn(monkeypatch, ColourTask(20))
    monkeypatch.setattr(recipes, "eval_tasks", lambda data: {"Colour": lambda: ColourTask(30, seed=1)})


def error_of(main):
    with pytest.raises(SystemExit) as end:
        run(main)
    message = end.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("mid", ["--total-batch-size=200"], "total_batch_size=200 must be a multiple of 48, .* try 192"),
        ("mid", ["--total-batch-size=20"], "total_batch_size=20 must be a multiple of 48, .* try 48"),
        ("mid", ["--total-batch-size=48"], "a step of 1 rows must be a multiple of .* 2 x 1; try 2"),
        ("mid", ["--warmdown-ratio=0"], r"warmdown_ratio=0.0 must be in \(0, 1\]"),
        ("sft", ["--warmdown-ratio=1.5"], r"warmdown_ratio=1.5 must be in \(0, 1\]"),
        ("mid", ["--device-batch-size=-1"], "device_batch_size=-1 must be at least 1, or 0"),
        ("mid", ["--max-seq-len=49"], "max_seq_len=49 must be at most 48"),
        ("sft", ["--conversations-per-step=7"], "a step of 7 rows must be a multiple of .* 2 x 1; try 6"),
        ("sft", ["--conversations-per-step=0"], "a step of 0 rows"),
        ("sft", ["--device-batch-size=-4"], "device_batch_size=-4"),
        ("sft", ["--max-seq-len=0"], "max_seq_len=0 must be at least 1, or -1"),
        ("sft", ["--num-iterations=0"], "num_iterations=0 must be at least 1, or -1"),
        ("sft", ["--num-epochs=0"], "num_epochs=0 must be at least 1"),
        ("sft", ["--val-conversations=0"], "val_conversations=0"),
        ("sft", ["--init-lr-frac=-1"], "init_lr_frac=-1.0 must be above 0"),
        ("sft", ["--fused=True"], "the kernels of training do not run here"),
        ("mid", ["--run=mine"], "wandb, which is not installed"),
        ("sft", ["--source=sft"], "invalid choice 'sft'"),
        ("sft", ["--source=mid"], "no model dN in .*mid_checkpoints"),
        ("sft", ["--step=7"], "no checkpoint of step 7"),
        ("sft", ["--resume"], "resume and overwrite exclude each other"),
        ("sft", ["--epochs=2"], "Unrecognized options: --epochs=2"),
    ],
)
def test_invalid_settings(stage, flags, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    directory = checkpoint_dir(stage, "d2")
    directory.mkdir(parents=True)
    names = ("model_000001.pt", "meta_000001.json")
    for name in names:
        (directory / name).touch()
    assert re.search(message, error_of(lambda: train(stage, *flags, "--overwrite")))
    assert sorted(path.name for path in directory.iterdir()) == sorted(names)


def test_midtraining_validates_as_often_as_the_published_run():
    assert mid_train.MidTrainConfig().cadence.eval_every == 150
    assert chat_sft.ChatSFTConfig().cadence.eval_every == 250


def test_checkpoints_are_not_mixed_or_overwritten_by_default():
    train("sft", "--num-iterations=2")
    before = weights("sft", 2)
    assert "--resume" in error_of(lambda: train("sft", "--num-iterations=1"))
    message = error_of(lambda: train("sft", "--conversations-per-step=8", "--resume"))
    assert "started with 20 rows an epoch and 4 a step, these settings make 20 and 8" in message
    assert same(before, weights("sft", 2))
    train("sft", "--num-iterations=5", "--resume")
    assert complete_steps(checkpoint_dir("sft", "d2")) == [2, 5]


def test_a_resume_with_other_conversations(monkeypatch):
    train("mid", "--num-iterations=2")
    learn(monkeypatch, ColourTask(70))
    assert "these settings make" in error_of(lambda: train("mid", "--num-iterations=4", "--resume"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-a", "Color"], "unknown tasks Color; there are Colour"),
        (["-b", "0"], "batch_size=0"),
        (["-m", "0"], "max_new_tokens=0"),
        (["-x", "0"], "max_problems=0"),
        (["-i", "sft"], "no model dN in .*chatsft_checkpoints"),
        (["-i", "best"], "'best' is not one of base"),
    ],
)
def test_invalid_evaluations(flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        chat_eval.main(["--device-type=cpu", *flags])
