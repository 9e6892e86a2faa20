"""chat_rl from an SFT checkpoint to a better one, with a tiny task and a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import engine
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_model, load_tensors, model_path
from nanochat.decode.graph_decoder import supports
from nanochat.decode.running import decoder_for
from nanochat.gpt import GPTConfig
from nanochat.report import text as report_text
from scripts import chat_rl
from tasks import mixtures as recipes
from tests.helpers.chats import untimed_records
from tests.helpers.wordtask import WordTask, write_sft_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = ["--device-type=cpu", "--examples-per-step=4", "--num-samples=8", "--max-new-tokens=4"]
SMALL += ["--init-lr-frac=1", "--eval-every=0", "--sample-every=0", "--save-every=0"]
EXACT = ["--top-k=0", "--scale-lr-by-contrast"]


@pytest.fixture(autouse=True)
def sft_checkpoint(base_dir, monkeypatch):
    write_sft_checkpoint(base_dir)
    monkeypatch.setattr(recipes, "rl_tasks", lambda data: (WordTask(10), WordTask(stop=6)))


def weights(step, tag="d2"):
    return load_tensors(model_path(checkpoint_dir("rl", tag), step), "cpu")


def test_train_and_report(base_dir, capsys):
    assert chat_rl.main([*SMALL, "--num-steps=20", "--eval-every=10"]) == 0
    result = json.loads((base_dir / "report" / "chat_rl.json").read_text())
    records = untimed_records("rl")
    rewards = [r["reward"] for r in records if "reward" in r]
    assert len(rewards) == 20
    assert result["steps"] == 20
    assert result["first_reward"] == pytest.approx(sum(rewards[:2]) / 2)
    assert result["last_reward"] == pytest.approx(sum(rewards[-2:]) / 2)
    assert result["last_reward"] > result["first_reward"] + 0.3
    measured = [(r["step"], r["accuracy"], r["n"]) for r in records if "accuracy" in r]
    assert [(step, n) for step, _, n in measured] == [(0, 6), (10, 6), (20, 6)]
    assert (result["first_accuracy"], result["accuracy"]) == (measured[0][1], measured[-1][1])
    assert result["accuracy"] == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("chat_rl: d2, 20 steps in ")
    assert f"reward {result['first_reward']:.4f} -> {result['last_reward']:.4f}, accuracy" in last
    _, _, meta = load_model("rl", torch.device("cpu"), "eval")
    assert (meta["step"], meta["user_config"]["num_samples"]) == (20, 8)


def test_rl_follows_the_recipe_of_its_model():
    path = checkpoint_dir("sft", "d2").glob("meta_*.json")
    path = next(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "user_config": {"recipe": "saint_iberis_2"}}))
    assert chat_rl.main([*SMALL, "--num-steps=1", "--matrix-lr=0.03"]) == 0
    _, _, meta = load_model("rl", torch.device("cpu"), "eval")
    found = meta["user_config"]
    assert found["recipe"] == "saint_iberis_2"
    assert (found["optimizer"]["matrix_lr"], found["optimizer"]["embedding_lr"]) == (0.03, 0.4)


@pytest.mark.parametrize("more", [[], EXACT])
def test_resume_is_bitwise(more):
    """Two steps, stop, two more: questions, samples, weights and metrics equal those of four in one go."""
    (checkpoint_dir("sft", "whole")).symlink_to(checkpoint_dir("sft", "d2"))
    flags = [*SMALL, *more, "--num-steps=4", "--save-every=2", "--eval-every=2"]
    chat_rl.main([*flags, "--model-tag=whole"])
    chat_rl.main(flags)
    for path in checkpoint_dir("rl", "d2").glob("*_000004*"):
        path.unlink()
    chat_rl.main([*flags, "--resume"])
    assert all(torch.equal(one, weights(4)[key]) for key, one in weights(4, "whole").items())
    assert untimed_records("rl", "whole") == untimed_records("rl")
    assert len(untimed_records("rl")) == 7
    with pytest.raises(ValueError, match="a checkpoint of step 4, but these settings end at step 2"):
        chat_rl.main([*SMALL, "--num-steps=2", "--resume"])


def test_a_finished_run_without_its_metrics(base_dir, capsys):
    """Copied from elsewhere, say: resumed at its end it divided by the number of steps in the metrics, 0."""
    chat_rl.main([*SMALL, "--num-steps=1"])
    (checkpoint_dir("rl", "d2") / "metrics.jsonl").unlink()
    capsys.readouterr()
    chat_rl.main([*SMALL, "--num-steps=1", "--resume"])
    result = json.loads((base_dir / "report" / "chat_rl.json").read_text())
    assert (result["first_reward"], result["rewards"]) == (None, {})
    assert result["first_accuracy"] is None  # the accuracy of its end was reported as that of its start
    assert f"min; accuracy {result['accuracy']:.4f} +-" in capsys.readouterr().out
    shown = " ".join(report_text.section("chat_rl", result).split())
    assert "| greedy accuracy, before | - |" in shown


def test_resume_with_other_steps():
    """Their number and the learning rates changed without a message."""
    chat_rl.main([*SMALL, "--num-steps=1"])
    with pytest.raises(ValueError, match=r"examples_per_step=2 is not that .* took 4: resume with 4, or"):
        chat_rl.main([*SMALL, "--examples-per-step=2", "--num-steps=2", "--resume"])


def test_steps_of_an_epoch():
    """Ten questions, four a step: the third step takes two of the next epoch."""
    chat_rl.main([*SMALL, "--max-new-tokens=2"])
    assert complete_steps(checkpoint_dir("rl", "d2")) == [3]


def test_batch_sizes_that_do_not_divide_the_samples():
    """num_samples // device_batch_size was 0 for a batch larger than the samples, and dropped a remainder."""
    for samples, batch in ((3, 64), (5, 3)):
        flags = [f"--num-samples={samples}", f"--device-batch-size={batch}", "--num-steps=1", "--overwrite"]
        assert chat_rl.main([*SMALL, *flags]) == 0


@pytest.mark.parametrize("more", [[], EXACT])
def test_two_ranks(more):
    """Each learns from its own questions and both keep the same weights; one may have no useful samples."""
    code = """
import sys
from nanochat import common
from nanochat.train import rl
from nanochat.gpt import GPTConfig
from nanochat.decode.graph_decoder import supports
from scripts import chat_rl
from tasks import mixtures as recipes
from tests.helpers.chats import untimed_records
from tests.helpers.wordtask import WordTask
recipes.rl_tasks = lambda data: (WordTask(10), WordTask(stop=6))
train_step = rl._train_step
def checked(run, *rest):
    record = train_step(run, *rest)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    found = run.runtime.gather([*rates, *(p.double().sum().item() for p in run.model.parameters())])
    assert found[0] == found[1]
    return record
rl._train_step = checked
common.run(lambda: chat_rl.main(sys.argv[1:]))
"""
    script = Path(os.environ["NANOCHAT_BASE_DIR"]) / "two_ranks.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), *SMALL, *more, "--examples-per-step=3", "--num-steps=12"]
    env = {**os.environ, "RANK": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, check=True, env=env, timeout=300)
    rewards = [r["reward"] for r in untimed_records("rl") if "reward" in r]
    assert len(rewards) == 12
    assert rewards[0] * 24 == pytest.approx(round(rewards[0] * 24), abs=1e-4)  # the samples of both ranks
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-samples=1"], "num_samples=1 must be at least 2"),
        (["--num-samples=300"], "rollout_batch_size=128 must hold the num_samples=300"),
        (["--temperature=0"], "temperature=0.0 must be above 0"),
        (["--examples-per-step=0"], "examples_per_step=0 must be at least 1"),
        (["--num-steps=0"], "num_steps=0 must be at least 1, or -1"),
        (["--init-lr-frac=nan"], "init_lr_frac=nan must be above 0"),  # made NaN of the weights
        (["--source=rl"], "source='rl' must be sft or mid"),
        (["--resume", "--overwrite"], "exclude each other"),
    ],
)
def test_settings_that_cannot_work(flags, message):
    with pytest.raises(ValueError, match=message):
        chat_rl.main([*SMALL, *flags])
    assert not checkpoint_dir("rl", "d2").exists()


@pytest.mark.parametrize("flags", [[], ["--decoder=plain"]])
def test_decoder(flags, monkeypatch):
    """Of rollouts, evaluation and samples."""
    kinds = []
    monkeypatch.setattr(engine, "decoder_for", lambda *args: kinds.append(args[3]) or decoder_for(*args))
    chat_rl.main([*SMALL, "--num-steps=1", "--eval-every=1", "--sample-every=1", *flags])
    assert len(kinds) >= 3
    assert set(kinds) == {"plain" if flags else "best"}


def test_too_many_new_tokens_are_reported(capsys):
    chat_rl.main([*SMALL, "--max-new-tokens=256", "--num-steps=1"])
    assert "replies have at most 16 tokens, half of the context, not 256" in capsys.readouterr().out


def test_checkpoints_are_not_overwritten_without_the_flag():
    chat_rl.main([*SMALL, "--num-steps=1"])
    with pytest.raises(ValueError, match="--resume"):
        chat_rl.main([*SMALL, "--num-steps=2"])


def test_rollouts_fit_the_graphs():
    """The former default, 256, was too large for them: one GPU decoded step by step in PyTorch."""
    assert supports(GPTConfig.from_depth(20), chat_rl.ChatRLConfig().rollout_batch_size)
