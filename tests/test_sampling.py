import pytest
import torch

from nanochat.sampling import filter_logits, penalize_repetition, sample

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]).log()


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k():
    assert kept(filter_logits(LOGITS, top_k=1)) == [[0], [3]]
    assert kept(filter_logits(LOGITS, top_k=0)) == kept(filter_logits(LOGITS, top_k=99)) == [[0, 1, 2, 3]] * 2


def test_top_p_is_the_least_set_of_each_row():
    """The published code shifted along the batch: a no-op for one row, wrong rows for several."""
    assert kept(filter_logits(LOGITS, top_p=0.6)) == [[0, 1], [3]]
    assert kept(filter_logits(LOGITS, top_p=0.95)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(filter_logits(LOGITS, top_p=1e-9)) == [[0], [3]]
    assert kept(filter_logits(LOGITS, top_p=1.0)) == [[0, 1, 2, 3]] * 2


def test_top_p_counts_the_mass_that_top_k_left():
    assert kept(filter_logits(LOGITS[:1], top_k=3, top_p=0.5)) == [[0]]
    assert kept(filter_logits(LOGITS[:1], top_k=3, top_p=0.56)) == [[0, 1]]


def test_repetition_penalty():
    logits = penalize_repetition(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1, 1]]), 2.0)
    assert logits.tolist() == [[1.0, -4.0, 1.0]]


def test_greedy_and_seeded_draws():
    assert sample(LOGITS, temperature=0).tolist() == [[0], [3]]
    logits = LOGITS[:1].repeat(4000, 1)
    draws = [sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    shares = torch.bincount(draws[0].flatten(), minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)
    cold = sample(logits, temperature=0.5, generator=torch.Generator().manual_seed(1))
    assert (cold == 0).float().mean() == pytest.approx(0.25 / 0.34, abs=0.03)
