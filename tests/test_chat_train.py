"""mid_train, chat_sft and chat_eval from one checkpoint to the next, on conversations of a few words."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat import engine
from nanochat.chat_format import render_conversation
from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_model, read_meta
from nanochat.decode.running import decoder_for
from nanochat.gpt import GPT
from nanochat.train import chat_data, samples
from scripts import chat_eval
from tasks import mixtures as recipes
from tests.helpers import chats
from tests.helpers.chats import (
    ColourTask,
    both_stages,
    copy_base,
    learn,
    losses,
    records,
    same,
    train,
    weights,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SFT_TASKS = recipes.sft_tasks


@pytest.fixture(autouse=True)
def base(base_dir, monkeypatch):
    """Write a base model d2, and replace the tasks of each stage by tiny ones."""
    chats.write_base_checkpoint(base_dir)
    learn(monkeypatch, ColourTask(20))
    monkeypatch.setattr(recipes, "eval_tasks", lambda data: {"Colour": lambda: ColourTask(30, seed=1)})


def spied(function, on_result):
    """Return a function that does the same and passes its result on."""

    def call(*args, **settings):
        on_result(result := function(*args, **settings))
        return result

    return call


# ---------------------------------------------------------------------------------------------------------
# From stage to stage


def test_from_base_to_report_card(base_dir, capsys):
    """Later stages wrote under a tag of their own, and dropped unknown settings of the architecture."""
    chats.write_base_checkpoint(base_dir, "d4")
    flags = ["--model-tag=d2", "--save-every=2", "--keep-last=0"]
    flags += ["--warm-start", "--momentum-warmup=300"]  # the fastest to learn in thirty steps
    assert train("mid", *flags, "--num-epochs=6") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("mid_train: d2, ")
    mid = complete_steps(checkpoint_dir("mid", "d2"))
    assert mid[:2] == [2, 4]
    assert train("sft", "--source=mid", *flags, "--num-epochs=8", "--init-lr-frac=1") == 0
    assert not checkpoint_dir("mid", "d4").exists()
    for stage in ("mid", "sft"):
        _, _, meta = load_model(stage, torch.device("cpu"), "eval", "d2")
        assert meta["model_config"] == read_meta(checkpoint_dir("base", "d2"), 3)["model_config"]
        assert (meta["model_config"]["n_kernel"], meta["model_config"]["slc_rate"]) == (4, 2)
        result = json.loads((base_dir / "report" / f"{chat_name(stage)}.json").read_text())
        assert result["val_bpb"] < result["first_val_bpb"]
        assert result["steps"] == meta["step"] == len(losses(stage))
        assert result["settings"]["num_epochs"] == {"mid": 6, "sft": 8}[stage]
        assert result["settings"] == meta["user_config"]
        rates = [r["tokens_per_second"] for r in records(stage) if "loss" in r]
        assert min(rates) <= result["median_tokens_per_second"] <= max(rates)

    capsys.readouterr()
    assert chat_eval.main(["--device-type=cpu", "-i", "sft", "-g", "d2", "-x", "20", "--bench"]) == 0
    result = json.loads((base_dir / "report" / "chat_eval_sft.json").read_text())
    colour = result["tasks"]["Colour"]
    assert (colour["n"], colour["chance"], result["step"]) == (20, 0.5, meta["step"])
    assert result["chatcore"] == pytest.approx(2 * colour["strict"] - 1)
    out = capsys.readouterr().out
    assert f"Colour: {100 * colour['accuracy']:.1f} +- " in out
    assert out.splitlines()[-1].startswith(f"chat_eval: sft step {meta['step']}, ChatCORE ")


def test_a_part_of_the_tasks_makes_no_chatcore(base_dir, capsys, monkeypatch):
    """The mean of a single task was called ChatCORE and replaced the report of all tasks."""
    tasks = {name: partial(ColourTask, 30, seed=seed) for seed, name in enumerate(("Colour", "Hue"))}
    monkeypatch.setattr(recipes, "eval_tasks", lambda data: tasks)
    train("sft", "--num-iterations=1")
    path, part = (base_dir / "report" / f"chat_eval_sft{suffix}.json" for suffix in ("", "_part"))
    assert chat_eval.main(["--device-type=cpu", "-x", "10", "-a", "Hue|Colour"]) == 0
    whole = path.read_bytes()
    assert {"chatcore", "chatcore_without_spellingbee"} < set(json.loads(whole))
    assert not part.exists()
    out = capsys.readouterr().out.splitlines()
    assert "replies have at most 24 tokens, half of the context, not 512" in out
    assert chat_eval.main(["--device-type=cpu", "-x", "10", "-m", "24", "-a", "Hue"]) == 0
    assert path.read_bytes() == whole
    assert not [key for key in json.loads(part.read_text()) if "chatcore" in key]
    out = capsys.readouterr().out
    assert "max_new_tokens" not in out
    assert out.endswith(f"chat_eval: sft step 1, 1 of 2 tasks, which make no ChatCORE, in {part}\n")


def chat_name(stage):
    return {"mid": "mid_train", "sft": "chat_sft"}[stage]


def test_finetuning_starts_from_the_newest_midtrained_checkpoint():
    train("mid", "--num-iterations=3", "--save-every=1", "--keep-last=0")
    almost_nothing = ["--source=mid", "--num-iterations=1", "--init-lr-frac=1e-9"]
    train("sft", *almost_nothing)
    newest, older = weights("mid", 3), weights("mid", 2)
    found = weights("sft", 1)
    assert all(torch.allclose(found[key], newest[key], atol=1e-6) for key in found)
    assert not any(torch.allclose(found[key], older[key], atol=1e-6) for key in found)
    train("sft", *almost_nothing, "--step=2", "--overwrite")
    assert all(torch.allclose(weights("sft", 1)[key], older[key], atol=1e-6) for key in found)


@both_stages
def test_resume_is_bitwise(stage):
    """Three steps, stop, three more: weights, losses and progress equal those of six in one go."""
    copy_base("whole")
    flags = ["--num-iterations=6", "--save-every=3", "--keep-last=0"]
    train(stage, *flags, "--model-tag=whole")
    train(stage, *flags)
    for path in checkpoint_dir(stage, "d2").glob("*_000006*"):
        path.unlink()
    train(stage, *flags, "--resume")
    assert same(weights(stage, 6, "whole"), weights(stage, 6))
    assert losses(stage, "whole") == losses(stage)
    whole, resumed = (read_meta(checkpoint_dir(stage, tag), 6)["progress"] for tag in ("whole", "d2"))
    times = ("train_seconds", "earlier_seconds")
    assert {**whole, **dict.fromkeys(times)} == {**resumed, **dict.fromkeys(times)}
    train(stage, *flags, "--resume")  # nothing is left to do, and no file is damaged
    with pytest.raises(ValueError, match="a checkpoint of step 6, but these settings end at step 5"):
        train(stage, "--num-iterations=5", "--resume")
    assert same(weights(stage, 6, "whole"), weights(stage, 6))


@both_stages
def test_one_step(stage, base_dir):
    """The loss of the only step was undefined, and so was a validation that was never due."""
    train(stage, "--num-iterations=1", "--init-lr-frac=0.5")
    first, step, last = records(stage)
    assert (first["step"], step["step"], last["step"]) == (0, 0, 1)
    assert step["lr_multiplier"] == 0.5
    result = json.loads((base_dir / "report" / f"{chat_name(stage)}.json").read_text())
    assert (result["first_val_bpb"], result["val_bpb"]) == (first["val_bpb"], last["val_bpb"])
    assert result["train_loss"] == pytest.approx(step["loss"])


# ---------------------------------------------------------------------------------------------------------
# Losses, rows and schedules


@both_stages
def test_the_micro_batch_size_changes_nothing(stage):
    """The loss was a mean of means: tokens of micro-batches with few of them counted more."""
    found, bpb = {}, {}
    for size in (1, 2, 4):
        copy_base(f"of{size}")
        train(stage, "--num-iterations=5", f"--device-batch-size={size}", f"--model-tag=of{size}")
        found[size] = losses(stage, f"of{size}")
        bpb[size] = records(stage, f"of{size}")[0]["val_bpb"]
    assert found[1] == pytest.approx(found[4], rel=1e-5)
    assert found[2] == pytest.approx(found[4], rel=1e-5)
    assert len(set(found[4])) == 5
    assert bpb[2] == pytest.approx(bpb[1], rel=1e-5)  # none of the five conversations counts twice
    assert bpb[4] == pytest.approx(bpb[1], rel=1e-5)


def test_the_loss_is_the_mean_over_learned_tokens():
    train("sft", "--num-iterations=1")
    model, tokenizer, _ = load_model("base", torch.device("cpu"), "eval")
    nats = n = 0
    for conversation in map(ColourTask().get_example, range(4)):
        ids, mask = (torch.tensor(x) for x in render_conversation(tokenizer, conversation, 49))
        targets = ids[1:].where(mask[1:] == 1, -1)
        nats += float(model(ids[None, :-1], targets[None], loss_reduction="sum").detach())
        n += int((targets >= 0).sum())
    assert losses("sft") == pytest.approx([nats / n], rel=1e-5)


def test_conversations_without_targets(monkeypatch):
    """A micro-batch without targets was 0 / 0 and made the weights NaN; here whole steps have none, too."""
    learn(monkeypatch, chats.Unanswered(6))
    train("sft", "--device-batch-size=1", "--conversations-per-step=1")
    assert [loss == 0 for loss in losses("sft")] == [True, False] * 3
    train("sft", "--device-batch-size=1", "--conversations-per-step=4", "--overwrite")
    assert len(losses("sft")) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses("sft"))
    assert all(weight.isfinite().all() for weight in weights("sft", 2).values())


@both_stages
def test_momentum_is_taken_over(stage, caplog):
    """With it, without it on request, and without it where it was not saved: the last two are equal."""
    for tag in ("kept", "refused"):
        copy_base(tag)
    train(stage, "--num-iterations=3", "--model-tag=kept", "--warm-start")
    train(stage, "--num-iterations=3", "--model-tag=refused")  # as published
    (checkpoint_dir("base", "d2") / "optim_000003_rank0.pt").unlink()
    with caplog.at_level("INFO"):
        train(stage, "--num-iterations=3", "--warm-start")
    assert "no optimizer state beside step 3" in caplog.text
    assert losses(stage) == losses(stage, "refused")
    assert losses(stage)[0] == losses(stage, "kept")[0]
    assert losses(stage)[2] != losses(stage, "kept")[2]


@both_stages
def test_rows_have_the_requested_length(stage, monkeypatch):
    shapes = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT, "hidden", lambda self, idx, *rest: (shapes.append(idx.shape), hidden(self, idx, *rest))[1]
    )
    monkeypatch.setattr(samples, "print_replies", lambda *args, **settings: None)
    train(stage, "--max-seq-len=24", "--num-epochs=1")
    widths = {width for _, width in shapes}
    assert max(widths) == 24
    assert (widths == {24}) == (stage == "mid")


@both_stages
@pytest.mark.parametrize("flags", [[], ["--decoder=plain"]])
def test_decoder_of_samples(stage, flags, monkeypatch):
    kinds = []
    monkeypatch.setattr(engine, "decoder_for", lambda *args: kinds.append(args[3]) or decoder_for(*args))
    train(stage, "--num-iterations=1", "--sample-every=1", *flags)
    assert set(kinds) == {"plain" if flags else "best"}


def test_epochs_schedules_and_validation(monkeypatch):
    learn(monkeypatch, ColourTask(10))
    steps = []
    evaluate_bpb = chat_data.evaluate_bpb
    monkeypatch.setattr(
        chat_data, "evaluate_bpb", lambda m, b, n, t: (steps.append(n), evaluate_bpb(m, b, n, t))[1]
    )
    train("sft", "--num-epochs=2", "--init-lr-frac=0.1")  # 20 conversations, 4 a step
    multipliers = [r["lr_multiplier"] for r in records("sft") if "loss" in r]
    assert multipliers == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    train("mid", "--num-iterations=5", "--warmdown-ratio=0.4", "--val-conversations=2", "--eval-every=5")
    assert [r["lr_multiplier"] for r in records("mid") if "loss" in r] == pytest.approx([1, 1, 1, 1, 0.5])
    train("sft", "--num-iterations=1", "--val-conversations=2", "--overwrite")
    assert steps == [3, 3, 1, 1, 1, 1]


def test_tokens_of_a_validation(monkeypatch):
    """Whole rows, at most those of the validation conversations."""
    seen = []
    monkeypatch.setattr(
        chat_data, "evaluate_bpb", lambda model, batches, n, token_bytes: seen.append(n) or 1.0
    )
    for n_tokens in (1, 48, 49, 10**6):
        train(
            "mid", "--num-iterations=1", f"--eval_tokens={n_tokens}", "--device-batch-size=1", "--overwrite"
        )
    assert seen[::2] == seen[1::2]
    assert seen[::2] == [1, 1, 2, 3]


def test_accuracies_during_finetuning(monkeypatch, caplog):
    """At multiples of the interval but not at the ends, of the tasks of multiple choice among all."""
    names = ("MMLU", "ARC-Easy", "GSM8K")
    tasks = {name: partial(ColourTask, 30, seed) for seed, name in enumerate(names, 1)}
    monkeypatch.setattr(recipes, "eval_tasks", lambda data: tasks)
    flags = ["--num-iterations=5", "--eval-metrics-every=2"]
    with caplog.at_level("INFO"):
        train("sft", *flags, "--eval_metrics_max_problems=20")
    found = [(r["step"], r["accuracies"]) for r in records("sft") if "accuracies" in r]
    assert [step for step, _ in found] == [2, 4]
    for _, accuracies in found:
        assert list(accuracies) == ["MMLU", "ARC-Easy"]
        assert all(0 < 20 * accuracy == round(20 * accuracy) for accuracy in accuracies.values())
    assert f"step 00002 | accuracy MMLU {found[0][1]['MMLU']:.4f}, ARC-Easy " in caplog.text
    measured = losses("sft")
    train("sft", "--num-iterations=5", "--eval-metrics-every=-1", "--overwrite")
    assert losses("sft") == measured
    assert not any("accuracies" in r for r in records("sft"))
    with pytest.raises(ValueError, match="eval_metrics_max_problems=0 must be at least 1, or -1"):
        train("sft", "--eval-metrics-max-problems=0")


@both_stages
def test_dtype(stage):
    """Activations in 16 bits train nearly alike; float16 is refused in training, and evaluates."""
    copy_base("short")
    train(stage, "--num-iterations=2")
    train(stage, "--num-iterations=2", "--model-tag=short", "--dtype=bfloat16")
    assert losses(stage, "short") != losses(stage)
    assert losses(stage, "short") == pytest.approx(losses(stage), rel=0.02)
    with pytest.raises(ValueError, match="dtype=float16 is for inference"):
        train(stage, "--dtype=float16", "--overwrite")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "hidden", spied(GPT.hidden, lambda hidden: seen.append(hidden.dtype)))
        assert chat_eval.main(["--device-type=cpu", "-i", stage, "-g", "d2", "--dtype=float16"]) == 0
    assert set(seen) == {torch.float16}


@both_stages
def test_a_dry_run_writes_nothing(stage, base_dir, capsys):
    """Nor do checkpoints of the stage stand in its way; its numbers are those of a run."""
    train(stage, "--num-iterations=2")
    line = capsys.readouterr().out
    before = {path: path.read_bytes() for path in base_dir.rglob("*") if path.is_file()}
    train(stage, "--num-iterations=2", "--save-every=1", "--dry-run")
    assert {path: path.read_bytes() for path in base_dir.rglob("*") if path.is_file()} == before
    assert re.sub("in .* min", "", capsys.readouterr().out) == re.sub("in .* min", "", line)
    for flag in ("--resume", "--overwrite", "--run=mine"):
        with pytest.raises(ValueError, match="dry_run writes nothing: leave out"):
            train(stage, "--dry-run", flag)


def test_checkpoint_before_evaluation(monkeypatch):
    """An evaluation that ran out of memory lost the run."""
    bpb = [2.0]
    monkeypatch.setattr(chat_data, "evaluate_bpb", lambda *args: bpb.pop())
    with pytest.raises(IndexError):
        train("sft", "--num-iterations=2")
    assert complete_steps(checkpoint_dir("sft", "d2")) == [2]


def test_two_ranks_compute_the_same_as_one(tmp_path, monkeypatch):
    """On a user's own file, of which every twentieth conversation is held out."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(ColourTask(45).get_example(i)) + "\n" for i in range(45)))
    flags = [f"--data={path}", "--num-iterations=4"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "scripts.chat_sft", *chats.SCRIPTS["sft"][1], *flags]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "RANK": ""}, timeout=300)
    two = losses("sft")
    monkeypatch.setattr(recipes, "sft_tasks", SFT_TASKS)
    train("sft", *flags, "--overwrite")
    assert two == pytest.approx(losses("sft"), rel=1e-5)
    assert len(two) == 4
