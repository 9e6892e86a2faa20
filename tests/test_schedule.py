import struct

import pytest

from nanochat.optim.schedule import Cadence, OptimizerConfig, lr_multiplier


def test_lr_multiplier():
    rates = [lr_multiplier(p, peak=0.3, warmdown=0.2) for p in (0, 0.5, 0.8, 0.8 + 1e-9, 0.9, 1.0)]
    assert rates == pytest.approx([0.3, 0.3, 0.3, 0.3, 0.15, 0])  # continuous at the knee
    assert lr_multiplier(0.0) == 1
    assert lr_multiplier(1.0) == 0
    assert lr_multiplier(0.5, warmdown=1.0) == pytest.approx(0.5)


def test_the_multiplier_ends_at_its_floor():
    rates = [
        lr_multiplier(p, peak=0.5, warmdown=0.65, final=0.05) for p in (0, 0.35, 0.35 + 1e-9, 0.675, 1.0)
    ]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.5 * 0.525, 0.5 * 0.05])
    assert lr_multiplier(0.9, final=1.0) == 1


def test_the_multiplier_rises_by_hand():
    """As nanochat's: over the first W steps to (step + 1) / W, so the first step changes the weights."""
    rise = {"warmup": 4 / 20, "step": 1 / 20, "warmdown": 0.5}
    rates = [lr_multiplier(step / 20, **rise) for step in range(20)]
    assert rates[:11] == pytest.approx([0.25, 0.5, 0.75, *8 * [1]])
    assert rates[11:] == pytest.approx([0.9 - 0.1 * i for i in range(9)])
    assert lr_multiplier(0.0, peak=0.5, **rise) == pytest.approx(0.125)


def test_the_published_multiplier_is_unchanged():
    for step in range(1001):
        progress = step / 1000
        assert lr_multiplier(progress, peak=0.02, warmdown=0.2) == 0.02 * min(1.0, (1 - progress) / 0.2)


def momenta(steps, **settings):
    return [OptimizerConfig(**settings).momentum_at(step) for step in steps]


def test_momentum():
    assert momenta((0, 150, 300, 9999)) == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momenta((0, 150, 300, 9999), momentum=0.9) == pytest.approx([0.85, 0.875, 0.9, 0.9])
    assert momenta((0, 7), momentum_start=0.6, momentum=0.7, momentum_warmup=14) == pytest.approx([0.6, 0.65])
    assert momenta((0, 7), momentum_warmup=0) == [0.95, 0.95]


def test_the_published_momentum_is_unchanged():
    """In float32, as the update takes it."""
    found, published = momenta(range(400)), [0.85 + 0.10 * min(step / 300, 1.0) for step in range(400)]
    assert struct.pack("400f", *found) == struct.pack("400f", *published)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"x0_scale_lr": -0.1}, "x0_scale_lr=-0.1 must be 0 or more"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be 0 or more, and finite"),
        ({"momentum": 1.0}, "momentum=1.0 must be below 1"),
        ({"momentum_warmup": -1}, "momentum_warmup=-1 must be 0 or more"),
        ({"table_beta2": 1.5}, "table_beta2=1.5 must be below 1"),
    ],
)
def test_constants_of_no_optimizer(setting, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**setting)


def test_cadence_refuses_negative_numbers():
    with pytest.raises(ValueError, match="save_every=-2 must be a number of steps, or 0 or -1"):
        Cadence(save_every=-2)
    with pytest.raises(ValueError, match="keep_last=-1 must be 0"):
        Cadence(keep_last=-1)
