from dataclasses import replace

import pytest

from nanochat.common import Runtime
from nanochat.train.rollouts import advantages, shuffled, step_seed
from tests.helpers.vocabulary import train_tokenizer
from tests.helpers.wordtask import FakeEngine, WordTask, rollouts_of

RUNTIME = Runtime.cpu()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_the_end_token_is_learned_and_forced_tokens_are_not(tokenizer):
    """generate_batch strips the end token, so <|assistant_end|> used to get no gradient."""
    rollouts = rollouts_of(tokenizer, examples_per_step=1)
    samples = replace(rollouts, engine=FakeEngine(rollouts.engine.model, tokenizer)).sample(0, 0, RUNTIME)
    whole, cut = samples[0], samples[-1]
    e, seven = tokenizer.encode("e7")
    start, end = map(tokenizer.encode_special, ("<|assistant_start|>", "<|assistant_end|>"))
    assert whole.ids[-4:] == [start, e, seven, end]
    assert whole.mask == [0] * (len(whole.ids) - 3) + [1, 0, 1]
    assert (whole.has_ended, cut.has_ended) == (True, False)
    assert cut.ids == whole.ids[:-1]
    assert cut.mask == whole.mask[:-1]


def test_rewards_and_advantages_within_a_question(tokenizer):
    samples = rollouts_of(tokenizer, examples_per_step=5, num_samples=6, max_new_tokens=4).sample(
        0, 0, RUNTIME
    )
    assert len(samples) == 30
    start = tokenizer.encode_special("<|assistant_start|>")
    for i in range(0, 30, 6):
        group = samples[i : i + 6]
        assert len({tuple(s.ids[: s.ids.index(start) + 1]) for s in group}) == 1
        for s in group:
            said = s.ids[s.ids.index(start) + 1 : -1 if s.has_ended else None]
            assert s.reward == float("e" in tokenizer.decode(said))
            assert s.advantage == pytest.approx(s.reward - sum(t.reward for t in group) / 6)
    assert any(s.advantage > 0 for s in samples)


def test_no_two_places_share_their_random_numbers(tokenizer):
    """A fixed seed gave all steps the same random numbers; samples of a question shared their first token."""
    rollouts = rollouts_of(tokenizer, task=WordTask(1), examples_per_step=1, num_samples=8)
    drawn = [[s.ids for s in rollouts.sample(step, 0, RUNTIME)] for step in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    prompt = next(i for i, bit in enumerate(rollouts.sample(0, 0, RUNTIME)[0].mask) if bit)
    assert len({ids[prompt] for ids in drawn[0]}) > 1
    places = [(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)]
    assert len({step_seed(*place) for place in places}) == 27


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_the_questions(tokenizer, world_size):
    """More ranks than questions: some have none."""
    rollouts = rollouts_of(tokenizer, task=WordTask(100), examples_per_step=7, num_samples=2)

    def prompts(samples):
        return sorted({tuple(s.ids[: s.mask.index(1)]) for s in samples})

    ranks = [replace(RUNTIME, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [rollouts.sample(0, 3, runtime) for runtime in ranks]
    together = [s for share in shares for s in share]
    assert len(together) == 14
    assert prompts(together) == prompts(rollouts.sample(0, 3, RUNTIME))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2


def test_every_epoch_has_every_question_once_in_its_own_order():
    epochs = [[shuffled(number, 50, 7) for number in range(50 * e, 50 * e + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(50)]}) == 4
    assert [shuffled(number, 50, 8) for number in range(50)] != epochs[0]


def test_advantages():
    assert advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([0.0, 0.0, 0.0, 8.0]) == [-2.0, -2.0, -2.0, 6.0]  # not divided by a deviation
    assert advantages([0.1] * 3) == [0.0] * 3  # whose mean is not 0.1
