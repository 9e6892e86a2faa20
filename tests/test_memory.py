import pytest

from nanochat.common import Runtime
from nanochat.gpt import GPTConfig
from nanochat.train.memory import choose_rows, fit, training_bytes
from scripts import bench_train
from tests.helpers.models import SECOND, random_model, small_config

GIB = 2**30


def d(depth, vocab_size=65_536, **changes):
    return GPTConfig.from_depth(depth, vocab_size=vocab_size, **changes)


@pytest.mark.parametrize(
    ("config", "rows", "fused", "measured"),
    [
        (d(12, 32_768), 32, False, 29.3),
        (d(20, 32_768), 32, False, 67.3),
        (d(12), 32, True, 16.1),
        (d(20), 32, True, 40.2),
        (d(26), 16, True, 42.0),
        (d(20), 8, True, 17.5),
        (d(12, 32_768, **SECOND), 32, True, 19.6),
        (d(20, **SECOND), 32, True, 55.4),
    ],
)
def test_estimate_is_near_what_was_measured(config, rows, fused, measured):
    """On an H100, the second generation on an H200, dev/LOG.md."""
    estimate = training_bytes(config, rows, checkpointing=False, fused=fused) / GIB
    assert measured <= estimate * 1.05
    assert estimate < 1.15 * measured


def test_small_cards_train_small_models():
    assert fit(d(12), 15 * GIB)[1] is False
    assert fit(d(20), 23 * GIB)[1] is False
    assert fit(d(20), 79 * GIB) == (32, False)
    assert fit(d(20), 11 * GIB) == (1, True)
    assert fit(d(20), 23 * GIB, fused_mlp=False)[0] < fit(d(20), 23 * GIB)[0]


def test_memory_that_is_too_small_says_how_much_is_needed():
    with pytest.raises(ValueError, match=r"takes about \d+\.\d GiB, 8\.0 GiB are free"):
        fit(d(20), 8 * GIB)


def test_rows_are_as_asked_or_divide_a_step():
    model, cpu = random_model(small_config()), Runtime.cpu()
    assert choose_rows(7, model, 64, cpu, fused=False) == 7
    assert choose_rows(0, model, 1024, cpu, fused=False) == 32
    assert choose_rows(0, model, 24, cpu, fused=False) == 8


@pytest.mark.gpu
def test_a_step_fits_a_smaller_card():
    """A d12 in 16 GiB, with the rows that are found to fit."""
    flags = ["--depth=12", "--memory-gib=16", "--num-iterations=1", "--total-batch-size=32768"]
    assert bench_train.main(flags) == 0
