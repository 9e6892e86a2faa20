"""Delivery of events from the worker's thread to the event loop."""

import asyncio
import threading

import pytest

from nanochat.serve.delivery import SEND_S, TICK_S, Generations
from nanochat.serve.protocol import End, Request, Token
from tests.helpers.fake_backend import FakeBackend, FakeHandle, Pause, wait_for
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture
def backend():
    return FakeBackend(train_tokenizer())


def test_a_worker_that_emits_after_the_loop_is_closed(backend, monkeypatch):
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    pause = Pause()
    backend.prepare(["the", pause, "river"])

    async def leave():
        generation = Generations(backend).start(Request(tokens=[1], max_tokens=9))
        async for _ in generation.deltas():
            return

    asyncio.run(leave())
    pause.end()
    wait_for(lambda: not backend.stats()["running"])
    assert not failures
    assert backend.tokens_generated > len(backend.ids("the"))


def test_waiting_events_are_delivered_together(backend):
    """So a slow client costs no more than a fast one."""
    backend.prepare(["the river of light"])

    async def count():
        generation = Generations(backend).start(Request(tokens=[1], max_tokens=99))
        backend.threads[-1].join()
        return [len(deltas) async for deltas in generation.deltas()]

    num_tokens = len(backend.ids("the river of light"))
    assert num_tokens > 3
    assert asyncio.run(count())[-1] >= num_tokens


def test_the_loop_wakes_at_most_once_per_tick(backend):
    """It woke for every token, and took the interpreter from the worker each time."""
    backend.prepare(*[[*["river"] * 500, Pause()]] * 3)

    async def count():
        loop = asyncio.get_running_loop()
        wakes = []
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args: (wakes.append(args), call(*args))
        generations = Generations(backend)
        start = loop.time()
        started = [generations.start(Request(tokens=[1], max_tokens=5000)) for _ in range(3)]
        texts = ["", "", ""]
        for i, generation in enumerate(started):
            async for deltas in generation.deltas():
                texts[i] += "".join(delta.text for delta in deltas)
                if len(texts[i]) == len("river" * 500):
                    break
        return len(wakes), loop.time() - start, texts

    num_wakes, seconds, texts = asyncio.run(count())
    for handle in backend.handles:
        handle.cancel()
    assert texts == ["river" * 500] * 3
    assert num_wakes <= 10 + seconds / TICK_S  # of 1,500 tokens


class Emitters:
    """A backend that records the emit functions of its requests."""

    def __init__(self, tokenizer):
        self.tokenizer, self.emits = tokenizer, []

    def submit(self, request, emit):
        self.emits.append(emit)
        return FakeHandle()


def test_many_clients_get_fewer_larger_packets(backend):
    """Two hundred streams with a packet every 20 ms each kept the loop busy with sending."""
    num_clients = int(5 * TICK_S / SEND_S)

    async def wait_for_second():
        emitters = Emitters(backend.tokenizer)
        generations = Generations(emitters)
        started = [generations.start(Request(tokens=[1], max_tokens=9)) for _ in range(num_clients)]
        times = []
        for number in range(2):
            for emit in emitters.emits[: None if number == 0 else 1]:
                emit(Token(0, backend.ids("the")[0]))
            async for deltas in started[0].deltas():
                assert len(deltas) == 1
                times.append(asyncio.get_running_loop().time())
                break
        return times[1] - times[0]

    assert asyncio.run(wait_for_second()) > 4 * TICK_S


def test_many_waiting_events_let_other_tasks_run(backend):
    """A long answer that was waiting became text in one go, which blocked the loop."""

    async def turns():
        emitters = Emitters(backend.tokenizer)
        generation = Generations(emitters).start(Request(tokens=[1], max_tokens=2000))
        for token in backend.ids("the") * 1000:
            emitters.emits[0](Token(0, token))
        emitters.emits[0](End(0, "length"))
        taken = asyncio.ensure_future(_all(generation))
        count = 0
        while not taken.done():
            await asyncio.sleep(0)
            count += bool(generation.samples[0].num_tokens)
        return count

    assert asyncio.run(turns()) > 10


async def _all(generation):
    return [deltas async for deltas in generation.deltas()]
