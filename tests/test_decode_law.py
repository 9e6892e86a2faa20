"""The decode law: full forward == prefill + decode == any chunking, per position, for every layer plan."""

import itertools

import pytest
import torch

from nanochat.cache import HybridCache
from tests.helpers.models import SECOND, random_model, small_config

PLANS = [{"slc_rate": 0}, {"slc_rate": 1}, {"slc_rate": 2}, {"slc_rate": 3}, {"slc_rate": 3, "n_kernel": 1}]
PLANS += [SECOND, {**SECOND, "residual_conv": 4, "slc_rate": 0, "n_head": 4, "n_kv_head": 2}]
PLANS += [{"residual_conv": 1}, {"residual_conv": 2, "n_kernel": 4}, {"value_embeds": True}, {"x0_mix": True}]
PLANS += [{"slc_rate": 3, "n_kernel": 4}, {"slc_rate": 2, "n_head": 4, "n_kv_head": 2}, {"n_layer": 7}]


def poisoned_cache(config, batch_size, max_len):
    """Return a cache whose unwritten keys and values are NaN: reading one spreads NaN to the output."""
    cache = HybridCache(config, batch_size, max_len)
    for layer in cache.layers:
        for state in layer.kv:
            state.fill_(float("nan"))
    return cache


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("cuts", [(1,), (2,), (3,), (5,), (6,), (1, 2), (2, 9), (3, 4, 11), (12,)], ids=str)
def test_decode_is_the_full_forward(plan, batch_size, cuts):
    """Chunked prefill, then decoding token by token, equals the full forward at every position."""
    config = small_config(**plan)
    model = random_model(config)
    idx = torch.randint(0, 50, (batch_size, 14))
    full = model(idx)
    cache = poisoned_cache(config, batch_size, 14)
    bounds = [0, *cuts, *range(cuts[-1] + 1, 15)]
    parts = [model(idx[:, a:b], cache=cache) for a, b in itertools.pairwise(bounds)]
    assert cache.pos.tolist() == [14] * batch_size
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decode_beyond_the_training_length():
    config = small_config(sequence_len=8)
    model, idx = random_model(config), torch.randint(0, 50, (1, 30))
    cache = HybridCache(config, 1, 30)
    parts = [model(idx[:, :7], cache=cache), *(model(idx[:, t : t + 1], cache=cache) for t in range(7, 30))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_two_conversations_do_not_mix_and_a_reset_cache_is_empty():
    """The published convolution state was an attribute of the module: a second prompt inherited it."""
    config = small_config()
    model = random_model(config)
    one, two = torch.randint(0, 50, (2, 1, 10))
    a, b = poisoned_cache(config, 1, 10), poisoned_cache(config, 1, 10)
    mixed = [(model(one[:, t : t + 1], cache=a), model(two[:, t : t + 1], cache=b)) for t in range(10)]
    for idx, parts in zip((one, two), zip(*mixed, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), rtol=1e-4, atol=1e-4)
    a.reset()
    assert a.pos.tolist() == [0]
    torch.testing.assert_close(model(two, cache=a), model(two), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fork_serves_many_rows_from_one_prefill():
    config = small_config()
    model = random_model(config)
    prompt, rows = torch.randint(0, 50, (1, 5)), torch.randint(0, 50, (3, 4))
    cache = poisoned_cache(config, 1, 9)
    model(prompt, cache=cache)
    forked = cache.fork(3)
    full = model(torch.cat([prompt.expand(3, -1), rows], dim=1))[:, 5:]
    torch.testing.assert_close(model(rows, cache=forked), full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(rows[1:2], cache=cache), full[1:2], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one sequence"):
        forked.fork(2)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_of_different_lengths_are_independent(plan):
    """Chunks and single tokens: positions beyond the end of a short row affect no result."""
    config = small_config(**plan)
    model = random_model(config)
    idx = torch.randint(0, 50, (4, 20))
    full = model(idx)
    cache = model.new_cache(4, 24)
    seen = torch.tensor([1, 5, 2, 6])
    for row, length in enumerate(seen.tolist()):
        alone = model.new_cache(1, length)
        model(idx[row : row + 1, :length], cache=alone)
        cache.copy_row(row, alone, 0)
    order = torch.arange(4)
    for T in (1, 3, 1, 1, 2):
        chunk = torch.stack([idx[order[row], seen[row] : seen[row] + T] for row in range(4)])
        logits = model.next_logits(chunk, cache)
        seen += T
        torch.testing.assert_close(logits, full[order, seen - 1], rtol=1e-4, atol=1e-4)
        assert cache.pos.tolist() == cache.lengths == seen.tolist()
        shuffle = torch.tensor([2, 0, 3, 3])
        cache, seen, order = cache.select(shuffle.tolist()), seen[shuffle], order[shuffle]


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_rows_are_copied_moved_and_stepped(plan):
    """Slots as a server uses them: copy rows in, move rows, step only the first few."""
    config = small_config(**plan)
    model = random_model(config)
    idx = torch.randint(0, 50, (3, 12))
    full = model(idx)
    slots = model.new_cache(5, 12)
    for row, length in enumerate((4, 1, 7)):
        alone = model.new_cache(1, length)
        model.next_logits(idx[row : row + 1, :length], alone)
        slots.copy_row(row, alone, 0)

    def step(rows):
        view = slots.first(len(rows))
        places = list(view.lengths)
        tokens = torch.stack([idx[row, place] for row, place in zip(rows, places, strict=True)])
        logits = model.next_logits(tokens[:, None], view)
        slots.lengths[: len(rows)] = view.lengths
        expected = torch.stack([full[row, place] for row, place in zip(rows, places, strict=True)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    step([0, 1, 2])
    step([0, 1, 2])
    slots.copy_row(0, slots, 2)  # row 0 has finished: the last row replaces it
    step([2, 1])
    step([2, 1])
    assert slots.pos.tolist()[:2] == slots.lengths[:2] == [11, 5]
    with pytest.raises(ValueError, match="does not fit"):
        model.new_cache(1, 3).copy_row(0, slots, 0)


def test_a_cache_that_is_too_small_raises():
    config = small_config()
    model, cache = random_model(config), HybridCache(config, 2, 4)
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    assert cache.pos.tolist() == [0, 0]
