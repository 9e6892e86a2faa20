"""base_train from text to checkpoint, on a model and a corpus of a few kilobytes."""

import json
import logging
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat import common, report
from nanochat.checkpoint_manager import complete_steps, load_model, load_tensors, model_path, read_meta
from nanochat.common import Runtime, parse, run
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.data.shards import write_parquet
from nanochat.dataset import CLIMBMIX, FINEWEB
from nanochat.metrics import read_metrics
from nanochat.tokenizer import get_tokenizer
from nanochat.train.base import BaseTrainConfig, with_recipe
from nanochat.train.repeats import settle_value_embeds
from scripts import base_loss, base_train, tok_train
from tests.helpers.core_bundles import write_bundle
from tests.helpers.models import SECOND

pytestmark = pytest.mark.slow

REPORTS = ("tok_train", "base_train")
ROOT = Path(__file__).parent.parent
SMALL = ["--device-type=cpu", "--depth=2", "--max-seq-len=16", "--device-batch-size=2"]
SMALL += [
    "--total-batch-size=64",
    "--eval-every=5",
    "--eval-tokens=256",
    "--save-every=0",
    "--sample-every=0",
]


@pytest.fixture
def corpus(tmp_path, base_dir):
    """A folder of text with a vocabulary learned from it."""
    rng = random.Random(0)
    nouns, verbs = ["file", "list", "function", "module", "string"], ["returns", "reads", "makes", "sorts"]
    folder = tmp_path / "corpus"
    folder.mkdir()
    sentences = [
        f"The {rng.choice(nouns)} {rng.choice(verbs)} a {rng.choice(nouns)} of {rng.randrange(100)} items."
        for _ in range(400)
    ]
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("\n".join(sentences[10 * i : 10 * i + 10]))
    assert tok_train.main([f"--data={folder}", "--vocab-size=320"]) == 0
    return folder


def train(corpus, *flags):
    return base_train.main([f"--data={corpus}", *SMALL, *flags])


def losses(base_dir, tag="d2"):
    records = read_metrics(base_dir / "base_checkpoints" / tag / "metrics.jsonl")
    return [r["loss"] for r in records if "loss" in r]


def weights(base_dir, step, tag="d2"):
    return load_tensors(model_path(base_dir / "base_checkpoints" / tag, step), "cpu")


# Twenty steps of the small model below. A change here means that the model, the data order, the optimizer or
# the schedule computes something else than before, and needs a line in dev/LOG.md.
GOLDEN = [5.7683, 5.1026, 3.8096, 2.9921, 1.8666, 1.9007, 2.2356, 1.2807, 1.2633, 1.1894]
GOLDEN += [1.4270, 1.1419, 1.1495, 1.2689, 1.2354, 1.1256, 1.1937, 1.1431, 1.0771, 1.1064]


def test_twenty_golden_losses(corpus, base_dir):
    assert train(corpus, "--num-iterations=20") == 0
    assert losses(base_dir) == pytest.approx(GOLDEN, rel=1e-3)


# The same for the second generation.
GOLDEN_2 = [5.7683, 3.9840, 2.1299, 2.1691, 1.4833, 2.0718, 2.1189, 1.3692, 1.3267, 1.2160]
GOLDEN_2 += [1.3753, 1.1950, 1.0490, 1.1860, 1.3288, 1.0061, 1.0334, 0.9893, 1.0440, 0.9187]


def test_the_second_generation(corpus, base_dir):
    """Its losses, and what its files say that published ones do not."""
    assert train(corpus, "--num-iterations=20", "--recipe=saint_iberis_2") == 0
    assert losses(base_dir) == pytest.approx(GOLDEN_2, rel=1e-3)
    meta = read_meta(base_dir / "base_checkpoints" / "d2", 20)
    assert {name: meta["model_config"][name] for name in SECOND} == SECOND
    config = meta["user_config"]
    assert (config["recipe"], config["final_lr_frac"], config["value_embeds"]) == (
        "saint_iberis_2",
        0.05,
        True,
    )
    assert (config["optimizer"]["matrix_lr"], config["optimizer"]["normuon"]) == (0.04, True)
    train(corpus, "--num-iterations=2", "--model-tag=first")
    meta = read_meta(base_dir / "base_checkpoints" / "first", 2)
    assert not set(meta["model_config"]) & set(SECOND)
    assert (meta["user_config"]["recipe"], meta["user_config"]["value_embeds"]) == ("saint_iberis", False)


def test_text_that_repeats_has_no_value_embeddings(corpus, base_dir, caplog):
    """Unless they are asked for; one line says which it is. The text has some 4,400 tokens, a step 64."""
    tokenizer = get_tokenizer()
    recipe = ["--recipe=saint_iberis_2"]

    def settled(*flags):
        arguments = [f"--data={corpus}", *SMALL, *flags]
        config = parse(BaseTrainConfig, arguments, None, with_recipe(BaseTrainConfig, arguments))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = settle_value_embeds(config, tokenizer).value_embeds
        return found, [r.message for r in caplog.records if "value embeddings" in r.message]

    assert settled("--num-iterations=60", *recipe) == (True, [])
    assert settled("--num-iterations=60", *recipe, "--value-embeds=False") == (False, [])
    assert settled("--num-iterations=300") == (False, [])
    assert settled("--num-iterations=300", *recipe, "--value-embeds=False") == (False, [])
    found, (line,) = settled("--num-iterations=300", *recipe)
    assert not found
    assert "its text 4." in line
    assert "19,200 tokens of about" in line
    assert line.endswith("would overfit: left out; --value-embeds=True keeps them")
    for flags in (recipe, []):
        found, (line,) = settled("--num-iterations=300", *flags, "--value-embeds=True")
        assert found
        assert line.endswith("would overfit: kept, as asked")
    train(corpus, "--num-iterations=80", *recipe, "--eval-every=0")
    meta = read_meta(base_dir / "base_checkpoints" / "d2", 80)
    assert "value_embeds" not in meta["model_config"]
    assert meta["model_config"]["x0_mix"]
    assert meta["user_config"]["value_embeds"] is False


def test_core_on_the_way(corpus, base_dir, tmp_path):
    """Every core_every steps but not at the ends; training does not change; a missing bundle fails first."""
    folder = write_bundle(tmp_path / "bundle")
    often = ["--num-iterations=8", "--save-every=4", "--keep-last=0"]
    train(corpus, *often, "--core-every=4", f"--core-bundle={folder}", "--core-max-per-task=3")
    records = read_metrics(base_dir / "base_checkpoints" / "d2" / "metrics.jsonl")
    measured = [record for record in records if "core" in record]
    model, tokenizer, _ = load_model("base", torch.device("cpu"), "eval", "d2", 4)
    expected = evaluate_core(model, tokenizer, load_bundle(folder), Runtime.cpu(), 3)["core"]
    assert measured == [{"step": 4, "core": pytest.approx(expected)}]
    train(corpus, "--num-iterations=8", "--model-tag=without")
    assert losses(base_dir, "without") == losses(base_dir)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(corpus, "--num-iterations=8", "--model-tag=new", "--core-bundle=nowhere")


def test_the_wall_clock_continues_over_restarts(corpus, base_dir, monkeypatch):
    """A run that was resumed at its end had taken seconds, and cost next to nothing."""

    def wall_seconds(so_far, *flags):
        monkeypatch.setattr(common, "_STARTED", time.monotonic() - so_far)
        train(corpus, "--num-iterations=2", *flags)
        return json.loads((base_dir / "report" / "base_train.json").read_text())["wall_seconds"]

    assert 1000 < wall_seconds(1000) < 1100
    assert 1010 < wall_seconds(10, "--resume") < 1110


@pytest.mark.parametrize("flags", [[], ["--recipe=saint_iberis_2"]], ids=["published", "second"])
def test_resume_is_bitwise(corpus, base_dir, caplog, flags):
    """Seven steps, stop, five more: weights, losses and moving average equal those of twelve in one go."""
    flags = ["--num-iterations=12", *flags]
    train(corpus, *flags, "--model-tag=whole", "--save-every=7", "--keep-last=0")
    train(corpus, *flags, "--model-tag=parts", "--save-every=7", "--keep-last=0")
    parts = base_dir / "base_checkpoints" / "parts"
    for path in parts.glob("*_000012*"):
        path.unlink()
    with caplog.at_level(logging.INFO):
        train(corpus, *flags, "--model-tag=parts", "--resume")
    assert any("resuming from step 7" in r.message for r in caplog.records)
    whole, resumed = weights(base_dir, 12, "whole"), weights(base_dir, 12, "parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(base_dir, "whole") == losses(base_dir, "parts")
    metas = [
        json.loads((base_dir / "base_checkpoints" / tag / "meta_000012.json").read_text())["progress"]
        for tag in ("whole", "parts")
    ]
    for key in ("ema", "loader_state", "first_val_bpb", "min_val_bpb", "val_bpb"):
        assert metas[0][key] == metas[1][key], key


def test_first_logged_loss_is_the_loss(corpus, base_dir):
    """The fork's moving average was not corrected at its first step: it printed 0.53 of the loss."""
    train(corpus, "--num-iterations=1")
    record = read_metrics(base_dir / "base_checkpoints" / "d2" / "metrics.jsonl")[1]
    assert record["smooth_loss"] == pytest.approx(record["loss"])
    assert record["loss"] == pytest.approx(5.77, abs=0.01)  # ln 320: the head starts at zero


def test_report_and_base_loss(corpus, base_dir, capsys):
    train(corpus, "--num-iterations=10")
    out = capsys.readouterr().out
    result = json.loads((base_dir / "report" / "base_train.json").read_text())
    assert result["val_bpb"] < result["first_val_bpb"]
    assert result["tokens"] == 640
    assert result["parameters"]["total"] == sum(w.numel() for w in weights(base_dir, 10).values())
    assert f"validation bpb {result['first_val_bpb']:.4f} -> {result['val_bpb']:.4f}" in out

    assert base_loss.main([f"--data={corpus}", "--device-type=cpu", "--device-batch-size=2"]) == 0
    loss = json.loads((base_dir / "report" / "base_loss.json").read_text())
    assert loss["step"] == 10
    assert set(loss["bpb"]) == {"train", "val"}
    assert loss["bpb"]["val"] == pytest.approx(result["val_bpb"], rel=0.05)
    assert loss["samples"][1].startswith("The capital of France is")


@pytest.mark.parametrize(("recipe", "text"), [("saint_iberis", FINEWEB), ("saint_iberis_2", CLIMBMIX)])
def test_tokenizer_training_and_loss_read_the_text_of_the_recipe(recipe, text, corpus, base_dir, capsys):
    """Both texts are downloaded. base_loss follows its checkpoint, whose files name the text."""
    for hub, word in ((FINEWEB, "river"), (CLIMBMIX, "stone")):
        hub.directory.mkdir(parents=True)
        for name in ("shard_00000.parquet", hub.val_shard):
            documents = [f"{word} {name} {i} " * (2 if hub is text else 20) for i in range(100)]
            write_parquet(hub.directory / name, documents)
    tok_train.main([f"--data={text.data}", "--vocab-size=300"])
    flags = [*SMALL, "--num-iterations=4", f"--recipe={recipe}"]
    assert base_train.main([*flags, "--data=hub"]) == 0
    losses = []
    for flag in ([], ["--data=hub"], [f"--data={text.data}"]):
        assert base_loss.main(["--device-type=cpu", *flag]) == 0
        losses.append(json.loads((base_dir / "report" / "base_loss.json").read_text()))
    assert losses[0]["bpb"] == losses[1]["bpb"] == losses[2]["bpb"]
    other = CLIMBMIX if text is FINEWEB else FINEWEB
    assert base_loss.main(["--device-type=cpu", f"--data={other.data}"]) == 0
    assert json.loads((base_dir / "report" / "base_loss.json").read_text())["bpb"] != losses[0]["bpb"]
    meta = read_meta(base_dir / "base_checkpoints" / "d2", 4)
    reports = [json.loads((base_dir / "report" / f"{stage}.json").read_text()) for stage in REPORTS]
    named = [meta["user_config"], *(report.get("settings") or report["config"] for report in reports)]
    named += [loss["settings"] for loss in losses]
    assert [settings["data"] for settings in named] == 6 * [text.data]


def test_a_text_that_is_not_downloaded(corpus, base_dir):
    for recipe, data in (("saint_iberis", "hub:fineweb"), ("saint_iberis_2", "hub:climbmix")):
        message = error_of(lambda r=recipe: base_train.main([*SMALL, f"--recipe={r}", "--data=hub"]))
        assert f"run `python -m nanochat.dataset -n 8 --data={data}`" in message
    assert "data='hub:pile' is no data set" in error_of(lambda: base_train.main([*SMALL, "--data=hub:pile"]))


def test_resuming_beyond_the_end_is_refused(corpus, base_dir):
    """It trained on with negative learning rates, for ever."""
    train(corpus, "--num-iterations=4")
    with pytest.raises(ValueError, match="a checkpoint of step 4, but these settings end at step 3"):
        train(corpus, "--num-iterations=3", "--resume")
    assert list(weights(base_dir, 4))


def test_a_finished_run_without_its_metrics(corpus, base_dir, capsys):
    """Copied from elsewhere, say: everything but the speed is reported."""
    train(corpus, "--num-iterations=2")
    (base_dir / "base_checkpoints" / "d2" / "metrics.jsonl").unlink()
    assert train(corpus, "--num-iterations=2", "--resume") == 0
    result = json.loads((base_dir / "report" / "base_train.json").read_text())
    assert result["median_tokens_per_second"] is None
    assert result["val_bpb"] > 0
    report.generate(0)


SIGTERM_AT_A_STEP = """
import os, signal, sys
from nanochat.train import loop
from nanochat.common import run
from scripts import base_train
step, *flags = sys.argv[1:]
set_schedule = loop.set_schedule
def send_sigterm(optimizer, plan, number):
    if number == int(step):
        os.kill(os.getpid(), signal.SIGTERM)
    return set_schedule(optimizer, plan, number)
loop.set_schedule = send_sigterm
run(lambda: base_train.main(flags))
"""


def test_sigterm_saves_and_exits_with_zero_and_the_run_resumes(corpus, base_dir):
    """It comes in the middle of the fourth step."""
    flags = [f"--data={corpus}", *SMALL, "--num-iterations=9", "--eval-every=0"]
    base_train.main([*flags, "--model-tag=whole"])
    command = [sys.executable, "-c", SIGTERM_AT_A_STEP, "3", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: saved step 4, stopping" in done.stdout
    assert complete_steps(base_dir / "base_checkpoints" / "d2") == [4]
    base_train.main([*flags, "--resume"])
    whole, resumed = weights(base_dir, 9, "whole"), weights(base_dir, 9)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(base_dir, "whole") == losses(base_dir)


# ---------------------------------------------------------------------------------------------------------
# Bad input: one clear line, a non-zero exit, and what was on disk is still good


def error_of(main):
    with pytest.raises(SystemExit) as end:
        run(main)
    message = end.value.code
    assert isinstance(message, str)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_no_tokenizer(tmp_path):
    assert "scripts.tok_train" in error_of(lambda: base_train.main(SMALL))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depht=3"], "Unrecognized options: --depht=3"),
        (["--depth=x"], "--depth: invalid literal"),
        (["--depth=0"], "depth=0 must be at least 1"),
        (["--warmdown-ratio=0"], "warmdown_ratio=0.0 must be in"),
        (["--save-every=-2"], "save_every=-2 must be a number of steps"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--total-batch-size=100"], "total_batch_size=100 must be a multiple of .* = 32; try 96"),
        (["--total-batch-size=16"], "must be a multiple of .* = 32; try 32"),
        (["--target-flops=1"], "a run of 0 steps"),
        (["--matrix-lr=nan"], "matrix_lr=nan must be 0 or more"),
        (["--num-iterations=0"], "num_iterations=0 must be above 0, or -1"),  # trained for days
        (["--target-flops=0"], "target_flops=0.0 must be above 0, or -1"),
        (["--recipe=mine"], "recipe='mine' is none of saint_iberis, saint_iberis_2"),
        (["--residual-conv=-1"], "residual_conv=-1 must be 0"),
        (["--final-lr-frac=2"], "final_lr_frac=2.0 must be in"),
        (["--device-type=tpu"], "device_type='tpu' is not available"),
    ],
)
def test_settings_that_cannot_work(corpus, base_dir, flags, message):
    import re

    assert re.search(message, error_of(lambda: train(corpus, *flags)))
    assert not (base_dir / "base_checkpoints").exists()


def test_not_a_number_stops_before_the_update(corpus, base_dir):
    """A loss of NaN used to poison the weights and every checkpoint after it."""
    train(corpus, "--num-iterations=2")
    good = weights(base_dir, 2)
    flags = ["--num-iterations=6", "--resume", "--matrix-lr=1e30", "--save-every=1"]
    message = error_of(lambda: train(corpus, *flags))
    assert "stopped before the update" in message
    steps = complete_steps(base_dir / "base_checkpoints" / "d2")
    assert steps == [2, 3]
    after = weights(base_dir, 2)
    assert all(torch.equal(good[key], after[key]) for key in good)


def test_checkpoints_are_never_mixed_or_overwritten_without_the_flag(corpus, base_dir):
    train(corpus, "--num-iterations=2")
    assert "--resume" in error_of(lambda: train(corpus, "--num-iterations=1"))
    assert complete_steps(base_dir / "base_checkpoints" / "d2") == [2]
    message = error_of(lambda: train(corpus, "--resume", "--slc-rate=2", "--num-iterations=3"))
    assert "slc_rate=3" in message
    assert "slc_rate=2" in message
    flags = ["--resume", "--num-iterations=3", "--total-batch-size=32"]
    assert "streams=2, not 1" in error_of(lambda: train(corpus, *flags))
    train(corpus, "--overwrite", "--num-iterations=1")
    assert complete_steps(base_dir / "base_checkpoints" / "d2") == [1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=typo"], "data='typo' is none of"),
        (["--total-batch-size=3200"], "fewer than the streams=100"),
        (["--fused=True"], "the kernels of training do not run here"),
        (["--run=mine"], "wandb, which is not installed"),
    ],
)
def test_nothing_is_overwritten_by_a_run_that_cannot_start(corpus, base_dir, monkeypatch, flags, message):
    """A typo in another setting cost the checkpoints that --overwrite names."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    train(corpus, "--num-iterations=1")
    directory = base_dir / "base_checkpoints" / "d2"
    before = {path: path.read_bytes() for path in directory.rglob("*.*")}
    assert message in error_of(lambda: train(corpus, "--overwrite", *flags))
    assert {path: path.read_bytes() for path in directory.rglob("*.*")} == before


def test_a_model_keeps_the_tokenizer_that_it_learned_with(corpus, base_dir, tmp_path):
    """Another tokenizer of the same size passed every check, and older models produced garbage."""
    train(corpus, "--num-iterations=1")
    _, learned_with, _ = load_model("base", torch.device("cpu"), "eval")
    other = tmp_path / "other"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_text(path.read_text().upper())
    tok_train.main([f"--data={other}", "--vocab-size=320"])
    _, found, _ = load_model("base", torch.device("cpu"), "eval")
    assert found.is_same_as(learned_with)
    assert not found.is_same_as(get_tokenizer())
    assert "started with another tokenizer" in error_of(
        lambda: train(corpus, "--num-iterations=2", "--resume")
    )
    train(corpus, "--num-iterations=1", "--overwrite")
    assert load_model("base", torch.device("cpu"), "eval")[1].is_same_as(get_tokenizer())


def test_another_tokenizer_than_the_checkpoint_s(corpus, base_dir):
    train(corpus, "--num-iterations=1")
    shutil.rmtree(base_dir / "base_checkpoints" / "d2" / "tokenizer")  # as in folders older than these copies
    tok_train.main([f"--data={corpus}", "--vocab-size=300"])
    message = error_of(lambda: base_loss.main([f"--data={corpus}", "--device-type=cpu"]))
    assert "320" in message
    assert "300" in message


def test_broken_shard_is_named(corpus, base_dir, tmp_path):
    from nanochat.dataset import shard_paths

    shards = tmp_path / "shards"
    shards.mkdir()
    for split in ("train", "val"):
        for path in shard_paths(str(corpus), split):
            (shards / path.name).write_bytes(path.read_bytes())
    first = min(shards.iterdir())
    first.write_bytes(first.read_bytes()[:-100])
    assert first.name in error_of(lambda: train(shards))


def test_all_attention_baseline(corpus, base_dir):
    """slc_rate=0: the published config has a value for it, and there are no convolutions to train."""
    train(corpus, "--num-iterations=2", "--slc-rate=0")
    assert not any("conv1d" in key for key in weights(base_dir, 2))
    _, _, meta = load_model("base", torch.device("cpu"), "eval")
    assert meta["model_config"]["slc_rate"] == 0
