"""Several workers as one: the least busy one serves, and those with full queues are skipped."""

import queue

import pytest

from nanochat.sampling import GREEDY
from nanochat.serve.pool import Pool
from nanochat.serve.protocol import Closed, End, QueueFull, Request
from nanochat.serve.worker import Worker
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

TOKENIZER = train_tokenizer()


@pytest.fixture
def pool():
    config = small_config(sequence_len=64, vocab_size=TOKENIZER.get_vocab_size())
    limits = {"slots": 1, "max_waiting": 2}
    return Pool([Worker(random_model(config).eval(), TOKENIZER, "d1", **limits, gpu=gpu) for gpu in range(2)])


def submit(pool):
    events = queue.Queue()
    return pool.submit(Request(tokens=[1, 2], max_tokens=5, sampling=GREEDY), events.put), events


def test_requests_are_spread_and_get_the_same_tokens(pool):
    requests = [submit(pool) for _ in range(6)]
    assert sorted(handle.gpu for handle, _ in requests) == [0, 0, 0, 1, 1, 1]
    assert requests[0][0].gpu != requests[1][0].gpu
    with pytest.raises(QueueFull):
        submit(pool)
    assert (pool.stats()["model"], pool.stats()["slots"], pool.stats()["waiting"]) == ("d1", 2, 6)
    pool.start()
    pool.close(drain=True)
    answers = [list(events.queue) for _, events in requests]
    assert isinstance(answers[0][-1], End)
    assert all(answer == answers[0] for answer in answers)
    assert pool.stats()["requests_finished"] == 6
    with pytest.raises(Closed, match="shutting down"):
        submit(pool)


def test_a_broken_worker_is_skipped(pool):
    """It is the least busy one, so it got nearly all requests."""
    first, second = pool.workers
    first._is_closing = first.is_broken = True
    assert not pool.is_broken
    assert {submit(pool)[0].gpu for _ in range(3)} == {second.gpu}
    second._is_closing = second.is_broken = True
    assert pool.is_broken
    with pytest.raises(Closed, match="the GPU has failed"):
        submit(pool)


def test_a_full_worker_is_skipped(pool):
    full, free = pool.workers
    for _ in range(3):
        full.submit(Request(tokens=[1], max_tokens=5), lambda event: None)
    free._running.seats, free.max_waiting = [None] * 9, 20  # busy, but its queue has room
    assert submit(pool)[0].gpu == 1
