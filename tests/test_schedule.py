import pytest

from nanochat.schedule import Cadence, lr_multiplier, muon_momentum


def test_lr_multiplier():
    def rate(progress):
        return lr_multiplier(progress, warmup=0.1, warmdown=0.2, final=0.1)

    assert [rate(p) for p in (0, 0.05, 0.1, 0.5, 0.8)] == pytest.approx([0, 0.5, 1, 1, 1])
    assert [rate(p) for p in (0.9, 1.0)] == pytest.approx([0.55, 0.1])
    assert rate(0.8 + 1e-9) == pytest.approx(1)  # continuous at the knee
    assert lr_multiplier(0.0) == 1
    assert lr_multiplier(1.0) == 0
    assert lr_multiplier(0.5, warmdown=1.0) == pytest.approx(0.5)


def test_muon_momentum():
    assert [muon_momentum(step) for step in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_cadence_refuses_negative_numbers():
    with pytest.raises(ValueError, match="save_every=-1 must be 0"):
        Cadence(save_every=-1)
