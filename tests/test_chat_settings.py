"""Invalid settings of mid_train, chat_sft and chat_eval: one clear line, and no change on disk."""

import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_optimizer_shards, read_meta
from nanochat.common import parse, run
from nanochat.dataset import CLIMBMIX, FINEWEB, HUB_TEXTS
from nanochat.recipes import find_recipe
from nanochat.train.chat import follow_recipe
from scripts import chat_eval, chat_sft, mid_train
from scripts.chat_rl import ChatRLConfig
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
        ("mid", ["--recipe=mine"], "recipe='mine' is none of saint_iberis, saint_iberis_2"),
        ("mid", ["--normuon", "--warm-start"], r"'second_moment'.* --no-warm-start"),
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


def settings_of(stage, step):
    """Return the recipe and the optimizer's constants of a checkpoint."""
    config = read_meta(checkpoint_dir(stage, "d2"), step)["user_config"]
    return config["recipe"], config["optimizer"]


def constants(recipe):
    return asdict(find_recipe(recipe).chat_optimizer)


@pytest.mark.parametrize("config_class", [mid_train.MidTrainConfig, chat_sft.ChatSFTConfig, ChatRLConfig])
@pytest.mark.parametrize(
    ("recipe", "momenta", "is_warm"),
    [("saint_iberis", [0.95, 0.95, 0.95], False), ("saint_iberis_2", [0.85, 0.875, 0.9], True)],
)
def test_how_a_stage_starts(config_class, recipe, momenta, is_warm, base_dir):
    """As published; in the second generation with the state of the stage before, and a rising momentum."""
    write_base_checkpoint(base_dir, recipe=recipe)
    flags = ["--model-tag=d2", "--data=embedded"]
    config = follow_recipe(parse(config_class, flags), "base", flags)
    assert [config.optimizer.momentum_at(step) for step in (0, 150, 300)] == pytest.approx(momenta)
    assert config.warm_start == (is_warm and config_class is not ChatRLConfig)
    flags += ["--warm-start", "--momentum-warmup=600", "--momentum-start=0.7"]  # flags override both
    config = follow_recipe(parse(config_class, flags), "base", flags)
    assert config.warm_start
    assert config.optimizer.momentum_at(300) == pytest.approx(0.7 + (momenta[2] - 0.7) / 2)
    if not is_warm:
        assert config_class().optimizer == replace(config.optimizer, momentum_warmup=0, momentum_start=0.85)


def second_moments(stage, step):
    """Return the state of NorMuon in a checkpoint."""
    (saved,) = load_optimizer_shards(checkpoint_dir(stage, "d2"), step)
    return [state["second_moment"] for state in saved["state"].values() if "second_moment" in state]


def test_a_published_model_is_trained_as_before():
    """Its files name no recipe."""
    train("mid", "--num-iterations=1")
    assert settings_of("mid", 1) == ("saint_iberis", constants("saint_iberis"))
    assert second_moments("mid", 1) == []
    train("sft", "--source=mid", "--num-iterations=1", "--conv-lr=0.5")
    assert settings_of("sft", 1) == ("saint_iberis", {**constants("saint_iberis"), "conv_lr": 0.5})


def test_stages_follow_the_recipe_of_their_model(base_dir):
    """Through midtraining to SFT; flags override it, for their stage alone; NorMuon's state is taken over."""
    write_base_checkpoint(base_dir, recipe="saint_iberis_2")
    name, second = "saint_iberis_2", constants("saint_iberis_2")
    train("mid", "--num-iterations=1", "--matrix-lr=0", "--value-embed-lr=0")
    assert settings_of("mid", 1) == (name, {**second, "matrix_lr": 0, "value_embed_lr": 0})
    before, after = second_moments("base", 3), second_moments("mid", 1)
    assert len(before) == len(after) > 3
    assert all((new >= 0.9 * old).all() and new.any() for old, new in zip(before, after, strict=True))
    base, mid = weights("base", 3), weights("mid", 1)
    for key in base:
        is_frozen = "value_embeds" in key or not any(
            part in key for part in ("wte", "lm_head", "conv", "gate", "scales")
        )
        assert (base[key] == mid[key]).all() == is_frozen, key
    train("sft", "--source=mid", "--num-iterations=1")
    assert settings_of("sft", 1) == (name, second)


@pytest.mark.parametrize(("recipe", "text"), [("saint_iberis", FINEWEB), ("saint_iberis_2", CLIMBMIX)])
@pytest.mark.parametrize("flag", ["--data=hub", "--data=auto"])
def test_stages_follow_the_text_of_their_model(recipe, text, flag, base_dir, monkeypatch):
    """Their words to spell are from there; a text that is named is taken, by the stages after it too."""
    write_base_checkpoint(base_dir, recipe=recipe)
    for hub in HUB_TEXTS:
        hub.directory.mkdir(parents=True)
        for name in ("shard_00000.parquet", hub.val_shard):
            (hub.directory / name).touch()
    asked = []

    def tasks(data):
        asked.append(data)
        return ColourTask(20), ColourTask(5, seed=1)

    def graded(data):
        asked.append(data)
        return {"Colour": lambda: ColourTask(4, seed=1)}

    for name, make in {"mid_tasks": tasks, "sft_tasks": tasks, "eval_tasks": graded}.items():
        monkeypatch.setattr(recipes, name, make)
    train("mid", "--num-iterations=1", flag)
    train("sft", "--source=mid", "--num-iterations=1", flag)
    assert chat_eval.main(["--device-type=cpu", "-i", "sft", flag]) == 0
    assert asked == 3 * [text.data]
    saved = [read_meta(checkpoint_dir(stage, "d2"), 1)["user_config"]["data"] for stage in ("mid", "sft")]
    assert saved == 2 * [text.data]
    train("mid", "--num-iterations=1", "--overwrite", "--data=hub:fineweb")
    train("sft", "--source=mid", "--num-iterations=1", "--overwrite", flag)
    assert asked[3:] == ["hub:fineweb", "hub:fineweb"]
    assert "data='hub:pile' is no data set" in error_of(
        lambda: train("mid", "--overwrite", "--data=hub:pile")
    )


def test_a_stage_may_follow_another_recipe(base_dir):
    write_base_checkpoint(base_dir, recipe="saint_iberis_2")
    train("mid", "--num-iterations=1", "--recipe=saint_iberis")
    assert settings_of("mid", 1) == ("saint_iberis", constants("saint_iberis"))
    assert second_moments("mid", 1) == []


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
        (["-i", "base", "-a", "Color"], "unknown tasks Color; there are Colour"),
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
