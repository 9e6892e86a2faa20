"""Recipes and the command line: whose values are the defaults, what overrides them, how long a run is."""

from dataclasses import replace

import pytest
import torch

from nanochat.command_line import parse
from nanochat.common import Runtime
from nanochat.config import GPTConfig
from nanochat.dataset import CLIMBMIX, FINEWEB, HUB_TEXTS
from nanochat.gpt import GPT
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.recipes import RECIPES, asked_recipe, chat_data, find_recipe, trained_text
from nanochat.train.base import BaseTrainConfig, count_steps, make_plan, model_shape, with_recipe, with_text
from scripts import base_train, bench_train
from tests.helpers.models import SECOND

PUBLISHED = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_kernel", "slc_rate"}


def read(*argv, config_class=BaseTrainConfig):
    return parse(config_class, argv, None, with_recipe(config_class, argv))


def test_the_published_recipe_is_the_default():
    """Its values have been those of every command, and its models have no field more."""
    assert read() == BaseTrainConfig() == read("--recipe=saint_iberis")
    config = read()
    assert (config.total_batch_size, config.warmdown_ratio, config.final_lr_frac) == (524_288, 0.2, 0.0)
    assert set(model_shape(config, 300).to_meta()) == PUBLISHED
    assert model_shape(config, 300) == GPTConfig.from_depth(20, vocab_size=300)
    rates = {"embedding_lr": 0.2, "unembedding_lr": 0.004, "conv_lr": 0.02, "matrix_lr": 0.02}
    options = {"table_beta2": 0.95, "normuon": False, "weight_decay": 0.0}
    momentum = {"momentum_start": 0.85, "momentum": 0.95, "momentum_warmup": 300}
    found = vars(config.optimizer)
    assert {name: found[name] for name in {**rates, **options, **momentum}} == {
        **rates,
        **options,
        **momentum,
    }


def test_the_second_generation():
    config = read("--recipe=saint_iberis_2", "--depth=4")
    shape = GPTConfig.from_depth(4, vocab_size=300, **SECOND)
    assert model_shape(config, 300) == shape
    assert set(shape.to_meta()) - PUBLISHED == set(SECOND)
    assert (config.total_batch_size, config.warmdown_ratio, config.final_lr_frac) == (524_288, 0.65, 0.05)
    changed = {"embedding_lr": 0.4, "unembedding_lr": 0.012, "matrix_lr": 0.04, "table_beta2": 0.99}
    changed |= {"momentum": 0.9, "normuon": True, "weight_decay": 0.1}
    assert config.optimizer == replace(OptimizerConfig(), **changed)
    assert config.recipe == "saint_iberis_2"


def test_names():
    assert [recipe.name for recipe in RECIPES] == ["saint_iberis", "saint_iberis_2"]
    for recipe in RECIPES:
        assert find_recipe(recipe.name) is recipe


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_text_of_a_recipe(recipe, base_dir):
    """It is what hub and auto mean, and what is saved; a text that is named stays."""
    hub = {"saint_iberis": FINEWEB, "saint_iberis_2": CLIMBMIX}[recipe.name]
    assert recipe.text is hub

    def text(data):
        return with_text(read(f"--recipe={recipe.name}", f"--data={data}")).data

    assert text("hub") == hub.data
    assert text("auto") == "embedded"
    for other in HUB_TEXTS:
        other.directory.mkdir(parents=True)
        for name in ("shard_00000.parquet", other.val_shard):
            (other.directory / name).touch()
        assert text("auto") == (hub.data if hub.is_downloaded else "embedded")
        assert text(other.data) == other.data
    assert (text("embedded"), text("mine.txt")) == ("embedded", "mine.txt")
    with pytest.raises(ValueError, match="data='hub:pile' is no data set of the hub"):
        text("hub:pile")


def test_the_text_of_a_checkpoint():
    """The one it names, else that of its recipe; published checkpoints name neither."""
    assert trained_text({}) is trained_text({"data": "auto", "recipe": "saint_iberis"}) is FINEWEB
    assert trained_text({"data": "embedded", "recipe": "saint_iberis_2"}) is CLIMBMIX
    assert trained_text({"data": "hub:fineweb", "recipe": "saint_iberis_2"}) is FINEWEB
    assert trained_text({"data": "hub:climbmix", "recipe": "saint_iberis"}) is CLIMBMIX


def test_flags_override_the_recipe():
    flags = ["--matrix-lr=0.5", "--no-x0-mix", "--recipe", "saint_iberis_2", "--value-embeds", "False"]
    config = read(*flags, "--warmdown-ratio=1", "--no-normuon")
    assert (config.optimizer.matrix_lr, config.optimizer.embedding_lr) == (0.5, 0.4)
    assert (config.optimizer.normuon, config.optimizer.weight_decay) == (False, 0.1)
    assert (config.warmdown_ratio, config.final_lr_frac) == (1.0, 0.05)
    found = model_shape(config, 300)
    assert (found.residual_conv, found.value_embeds, found.x0_mix, found.score_scale) == (
        3,
        False,
        False,
        1.44,
    )
    parts = ["--residual-conv=4", "--value-embeds=True", "--x0-mix", "--score-scale=2"]
    found = model_shape(read(*parts), 300)
    assert (found.residual_conv, found.value_embeds, found.x0_mix, found.score_scale) == (4, True, True, 2.0)


def test_the_last_name_counts(monkeypatch):
    assert asked_recipe(["--recipe=a", "--depth=3", "--recipe", "b"]) == "b"
    assert asked_recipe(["--depth=3", "--recipes=b"]) == "saint_iberis"
    monkeypatch.setattr("sys.argv", ["base_train", "--recipe=saint_iberis_2"])
    assert with_recipe(BaseTrainConfig, None).optimizer.normuon


@pytest.mark.parametrize("script", [base_train, bench_train])
def test_help_shows_the_values_of_the_recipe(script, capsys):
    shown = []
    for recipe in ("saint_iberis", "saint_iberis_2"):
        with pytest.raises(SystemExit):
            script.main(["--help", f"--recipe={recipe}"])
        shown.append(" ".join(capsys.readouterr().out.replace("\u2502", " ").split()))
    assert "all matrices (Muon) (default: 0.02)" in shown[0]
    assert "all matrices (Muon) (default: 0.04)" in shown[1]
    assert "optimizer steps to time, after two that warm up (default: 8)" in shown[1] or script is base_train


@pytest.mark.parametrize("script", [base_train, bench_train])
@pytest.mark.parametrize("flags", [["--recipe=mine"], ["--recipe", "mine", "--help"]])
def test_an_unknown_recipe(script, flags):
    with pytest.raises(ValueError, match="recipe='mine' is none of saint_iberis, saint_iberis_2"):
        script.main(flags)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--recipe", "recipe='' is none of saint_iberis"),
        ("--warmdown-ratio=0", "warmdown_ratio=0.0 must be in"),
        ("--warmup-ratio=-0.1", "warmup_ratio=-0.1 must be 0 or more"),
        ("--warmup-ratio=0.9", "warmup_ratio=0.9 must be .* with warmdown_ratio=0.2 at most 1"),
        ("--grad-clip=-1", "grad_clip=-1.0 must be 0 or more"),
        ("--final-lr-frac=1.5", "final_lr_frac=1.5 must be in"),
        ("--final-lr-frac=nan", "final_lr_frac=nan must be in"),
        ("--momentum=1", "momentum=1.0 must be below 1"),
        ("--value-embeds=maybe", "value-embeds"),
    ],
)
def test_values_that_cannot_be(flag, message):
    with pytest.raises(ValueError, match=message):
        read(flag)


def test_the_schedule_of_a_run():
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_embd=32, n_head=2, n_kv_head=2))
    flags = ["--max-seq-len=16", "--device-batch-size=2", "--total-batch-size=32", "--num-iterations=100"]
    plans = [make_plan(read(*flags, f"--recipe={r.name}"), model, Runtime.cpu()) for r in RECIPES]
    found = [[plan.lr_multiplier(p) for p in (0.0, 0.5, 0.9, 1.0)] for plan in plans]
    assert found[0] == pytest.approx([1, 1, 0.5, 0])
    assert found[1] == pytest.approx([1, 0.05 + 0.95 * 0.5 / 0.65, 0.05 + 0.95 * 0.1 / 0.65, 0.05])
    assert [plan.momentum(300) for plan in plans] == pytest.approx([0.95, 0.90])


def test_a_run_may_rise_clip_and_decay():
    """Under the names and with the values that nanochat's users type."""
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_embd=32, n_head=2, n_kv_head=2))
    flags = ["--max_seq_len=16", "--device_batch_size=2", "--total_batch_size=32", "--num_iterations=10"]
    flags += ["--warmup_ratio=0.18", "--final_lr_frac=0.5", "--grad_clip=1.0", "--weight_decay=0.2"]
    config = read(*flags)
    plan = make_plan(config, model, Runtime.cpu())
    assert [plan.lr_multiplier(i / 10) for i in range(10)] == pytest.approx([0.5, *8 * [1], 0.75])
    assert (config.optimizer.grad_clip, config.optimizer.weight_decay) == (1.0, 0.2)
    optimizer = build_optimizer(model, config.optimizer)
    assert optimizer.grad_clip == 1.0
    decays = [group["weight_decay"] for group in optimizer.param_groups if group["kind"] == "muon"]
    assert decays == [0.2] * len(decays)
    assert decays


def test_value_embeddings_do_not_lengthen_a_run():
    """Tokens are counted by parameters, and a table with a row for each token would double them."""
    steps = {}
    for flag in ("True", "False"):
        config = read("--recipe=saint_iberis_2", "--depth=8", f"--value-embeds={flag}")
        with torch.device("meta"):
            model = GPT(model_shape(config, 65_536))
        steps[flag] = count_steps(config, model)
    assert abs(steps["True"] - steps["False"]) <= 1  # the gates count: 12 numbers a head
    assert model.num_parameters()["total"] * 20 / 524_288 == pytest.approx(steps["False"], abs=0.5)


@pytest.mark.parametrize(
    ("saved", "auto"),
    [
        ({}, "hub:fineweb"),
        ({"recipe": "saint_iberis_2"}, "hub:climbmix"),
        ({"data": "embedded"}, "embedded"),
        ({"data": "hub:climbmix"}, "hub:climbmix"),
        ({"data": "/my/talks.jsonl"}, "embedded"),
        ({"data": "auto"}, "embedded"),
    ],
)
def test_chat_stages_by_default_have_the_tasks_of_their_model(saved, auto, base_dir):
    """A published model was asked the embedded questions, which it never saw, until text was downloaded."""
    assert chat_data("auto", saved) == auto
    assert chat_data("embedded", saved) == "embedded"
    assert chat_data("mine.jsonl", saved) == "mine.jsonl"
    assert chat_data("hub:fineweb", saved) == "hub:fineweb"
