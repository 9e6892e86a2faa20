import pytest

from nanochat.optim.schedule import Cadence, lr_multiplier, muon_momentum


def test_lr_multiplier():
    rates = [lr_multiplier(p, peak=0.3, warmdown=0.2) for p in (0, 0.5, 0.8, 0.8 + 1e-9, 0.9, 1.0)]
    assert rates == pytest.approx([0.3, 0.3, 0.3, 0.3, 0.15, 0])  # continuous at the knee
    assert lr_multiplier(0.0) == 1
    assert lr_multiplier(1.0) == 0
    assert lr_multiplier(0.5, warmdown=1.0) == pytest.approx(0.5)


def test_muon_momentum():
    assert [muon_momentum(step) for step in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_cadence_refuses_negative_numbers():
    with pytest.raises(ValueError, match="save_every=-1 must be 0"):
        Cadence(save_every=-1)
