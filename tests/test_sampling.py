import pytest
import torch

from nanochat.sampling import (
    GREEDY,
    SamplingParams,
    filter_logits,
    gumbel_noise,
    penalize_repetition,
    sample,
    sample_rows,
)

LOGITS = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]]).log()


def kept(logits):
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k():
    assert kept(filter_logits(LOGITS, top_k=1)) == [[0], [3]]
    assert kept(filter_logits(LOGITS, top_k=0)) == kept(filter_logits(LOGITS, top_k=99)) == [[0, 1, 2, 3]] * 2


def test_top_p_is_the_smallest_set_of_each_row():
    """The published code shifted along the batch: a no-op for one row, wrong rows for several."""
    assert kept(filter_logits(LOGITS, top_p=0.6)) == [[0, 1, 2], [3]]  # 1 and 2 are equal
    assert kept(filter_logits(LOGITS, top_p=0.5)) == [[0], [3]]
    assert kept(filter_logits(LOGITS, top_p=0.95)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert kept(filter_logits(LOGITS, top_p=1e-9)) == [[0], [3]]
    assert kept(filter_logits(LOGITS, top_p=1.0)) == [[0, 1, 2, 3]] * 2


def test_top_p_is_a_share_of_the_mass_after_top_k():
    assert kept(filter_logits(LOGITS[:1], top_k=3, top_p=0.5)) == [[0]]
    logits = torch.tensor([[0.5, 0.21, 0.19, 0.1]]).log()
    assert kept(filter_logits(logits, top_k=3, top_p=0.57)) == [[0, 1]]
    assert kept(filter_logits(logits, top_p=0.72)) == [[0, 1, 2]]


def test_repetition_penalty():
    logits = penalize_repetition(torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[0, 1, 1]]), 2.0)
    assert logits.tolist() == [[1.0, -4.0, 1.0]]


def test_greedy_and_seeded_draws():
    assert sample(LOGITS, GREEDY).tolist() == [[0], [3]]
    logits = LOGITS[:1].repeat(4000, 1)
    draws = [sample(logits, SamplingParams(), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    shares = torch.bincount(draws[0].flatten(), minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.2, 0.2, 0.1], abs=0.03)
    cold = sample(logits, SamplingParams(temperature=0.5), torch.Generator().manual_seed(1))
    assert (cold == 0).float().mean() == pytest.approx(0.25 / 0.34, abs=0.03)


def test_noise_depends_only_on_seed_and_position():
    seeds, positions = torch.tensor([1, 2, 1, 2**40 + 5]), torch.tensor([0, 0, 3, 7])
    noise = gumbel_noise(seeds, positions, 1000)
    assert torch.equal(noise[2], gumbel_noise(seeds[2:3], positions[2:3], 1000)[0])
    assert noise.isfinite().all()
    correlation = torch.corrcoef(noise)
    assert (correlation - torch.eye(4)).abs().max() < 0.12


def test_noise_is_gumbel_and_its_argmax_a_draw_from_the_softmax():
    noise = gumbel_noise(torch.arange(2000), torch.zeros(2000, dtype=torch.long), 4)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.15)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = (probabilities.log() + noise).argmax(-1).bincount(minlength=4) / 2000
    torch.testing.assert_close(drawn, probabilities, rtol=0, atol=0.04)
    steps = gumbel_noise(torch.zeros(2000, dtype=torch.long), torch.arange(2000), 4)
    drawn = (probabilities.log() + steps).argmax(-1).bincount(minlength=4) / 2000
    torch.testing.assert_close(drawn, probabilities, rtol=0, atol=0.04)


def test_sample_rows_have_settings_of_their_own():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(4, 1)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.1),
        SamplingParams(temperature=0.0, repetition_penalty=10.0),
    ]
    before = logits.clone()
    for place in range(20):
        assert sample_rows(logits, params, [place] * 4, [[1]] * 4) == [1, 1, 1, 2]
    assert torch.equal(logits, before)
    free = [sample_rows(logits[:1], [SamplingParams(seed=s)], [0], [[]])[0] for s in range(200)]
    assert set(free) == {0, 1, 2, 3}
    unseeded = [sample_rows(logits[:1], [SamplingParams(seed=s)], [0], [[]]) for s in (None, 0)]
    assert unseeded[0] == unseeded[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be 0 .greedy. or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1 must be 0 .off. or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be in .0, 1.; 1 turns it off"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be above 0; 1 turns it off"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_none_is_off_in_flat_signatures_alone():
    assert SamplingParams.from_flat(0.5, None, None) == SamplingParams(temperature=0.5, top_k=0, top_p=1.0)
    assert SamplingParams.from_flat(0.5, 3, 0.9, 1.2, 7) == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=1.2, seed=7
    )
    for name in ("top_k", "top_p"):
        with pytest.raises(TypeError):
            SamplingParams(**{name: None})


def test_samples_of_a_request_have_seeds_of_their_own():
    params = SamplingParams(top_k=3, seed=2**40 + 5)
    assert params.seeded() is params
    samples = [params.for_sample(number) for number in range(100)]
    assert len({sample.seed for sample in samples}) == 100
    assert all(0 <= sample.seed < 2**32 and sample.top_k == 3 for sample in samples)
    fresh = [SamplingParams(top_k=3).seeded() for _ in range(20)]
    assert len({params.seed for params in fresh}) == 20
    assert all(params.top_k == 3 for params in fresh)


@pytest.mark.parametrize("tiny", [1e-50, 1e-300, 1e-7])
def test_tiny_settings_are_greedy(tiny):
    """In float32 they were 0: a top_p of 0 kept nothing and gave token 0, a temperature of 0 gave NaN."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    for settings in ({"temperature": tiny}, {"top_p": tiny}):
        params = SamplingParams(**settings)
        assert all(sample_rows(logits, [params], [place], [[]]) == [1] for place in range(20))
        assert torch.tensor([params.top_p]).item() > 0
        assert params.temperature in (0, 1)
        assert sample(logits, params).item() == 1
