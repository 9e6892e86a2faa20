"""bench_infer: a line for each batch size and context, and the bytes that a step must read."""

import json

import pytest

from nanochat.cache import state_bytes
from nanochat.gpt import GPTConfig
from scripts.bench_infer import main, random_model, step_bytes
from tests.helpers.models import small_config

pytestmark = pytest.mark.slow


def test_lines(capsys):
    shape = ["--depth=1", "--vocab-size=300", "--batch-sizes", "1", "3", "--contexts", "8", "40"]
    main([*shape, "--steps=4", "--device-type=cpu", "--top-k=5", "--temperature=0.7"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["batch_size"], line["context"]) for line in lines] == [(1, 8), (1, 40), (3, 8), (3, 40)]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(
            1e3 * line["batch_size"] / line["step_ms"], rel=1e-2
        )
        assert all(line[name] > 0 for name in ("floor_share", "prefill_ms", "first_token_ms"))
        assert (line["temperature"], line["top_k"], line["depth"]) == (0.7, 5, 1)
        assert line["decoder"] == "PlainDecoder"  # it used to print "best", whatever the decoder was


def test_no_weight_is_zero_and_the_floor_counts_each_weight_once():
    config = small_config(vocab_size=100)
    model = random_model(config, "cpu")
    assert all((parameter != 0).float().mean() > 0.9 for parameter in model.parameters())
    wte = model.transformer.wte.weight.numel()
    weights = 4 * (sum(p.numel() for p in model.parameters()) - wte)
    attention, slc2 = 4 * 2 * 24, 4 * 2 * 24  # bytes per token and layer, and per sequence and layer
    kinds = config.layer_kinds
    state = 10 * kinds.count("attention") * attention + kinds.count("slc2") * slc2
    assert step_bytes(model, batch_size=3, context=10) == weights + 3 * state


def test_bytes_of_a_step_at_d20_equal_those_computed_by_hand():
    import torch

    from nanochat.gpt import GPT

    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(20, vocab_size=65_536), compute_dtype=torch.bfloat16)
    assert step_bytes(model, 32, 2048) == 916_298_240 + 32 * (2048 * 35_840 + 66_560)


def test_second_generation(capsys):
    shape = ["--depth=2", "--vocab-size=300", "--batch-sizes", "1", "--contexts", "8", "--steps=4"]
    main([*shape, "--recipe=saint_iberis_2", "--device-type=cpu"])
    assert json.loads(capsys.readouterr().out)["recipe"] == "saint_iberis_2"


def test_the_floor_counts_no_table_of_value_embeddings():
    model = random_model(small_config(vocab_size=100, value_embeds=True), "cpu")
    tables = (model.transformer.wte.weight, model.transformer.value_embeds.weight)
    weights = sum(p.numel() for p in model.parameters()) - sum(table.numel() for table in tables)
    state = state_bytes(model.config, model.activation_dtype)
    assert step_bytes(model, 1, 0) == 4 * weights + state["per_sequence"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=64", "--contexts", "64"], "steps=64"),
        (
            ["--steps=64", "--contexts", "67"],
            "must be more than 67 tokens each",
        ),  # it used to crash in a prefill
        (["--batch-sizes", "0"], "batch_sizes"),
        (["--depth=0"], "depth=0"),
        (["--recipe=third"], "recipe='third' is none of"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)
