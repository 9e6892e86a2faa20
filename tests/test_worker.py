"""The worker: requests come and go, and each gets the tokens that it would get alone."""

import random
import time

import pytest
import torch

from nanochat.engine import Engine
from nanochat.sampling import GREEDY
from nanochat.serve.protocol import Closed, End, QueueFull
from nanochat.serve.worker import Worker
from tests.helpers.workers import TOKENIZER, Reader, next_token_model, prompts, small_model

SPECIAL = ("python_start", "python_end", "output_start", "output_end", "assistant_end")


def test_greedy_tokens_in_a_batch_are_the_engine_s(make_worker):
    model = small_model()
    worker = make_worker(model, slots=5, prefill_chunk=7)
    readers = [Reader(worker, tokens=p, max_tokens=20, temperature=0.0) for p in prompts(23)]
    engine = Engine(model, TOKENIZER)
    for prompt, reader in zip(prompts(23), readers, strict=True):
        expected = engine.complete([prompt], max_tokens=20, sampling=GREEDY)[0]
        assert reader.all().tokens[0] == expected.tokens
        assert reader.ends[0] == ("length" if expected.end_token is None else "stop")
    stats = worker.stats()
    assert (stats["running"], stats["waiting"], stats["requests_finished"]) == (0, 0, 23)


def test_a_seed_draws_the_same_tokens_alone_and_in_a_batch(make_worker):
    model = small_model()
    settings = {"max_tokens": 15, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2}
    alone = make_worker(model, slots=1)
    wanted = [Reader(alone, tokens=p, seed=i, **settings).all().tokens for i, p in enumerate(prompts(9))]
    crowd = make_worker(model, slots=9)
    readers = [Reader(crowd, tokens=p, seed=i, **settings) for i, p in enumerate(prompts(9))]
    assert [reader.all().tokens for reader in readers] == wanted
    fresh = [Reader(crowd, tokens=[1, 2], max_tokens=15, temperature=1.0).all().tokens for _ in range(3)]
    assert len({tuple(tokens[0]) for tokens in fresh}) == 3


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed(make_worker):
    worker = make_worker(slots=4)
    first, second = (Reader(worker, tokens=[5, 6, 7], max_tokens=10, n=4, seed=3).all() for _ in range(2))
    assert first.tokens == second.tokens
    assert len({tuple(tokens) for tokens in first.tokens}) == 4


def test_a_long_prompt_does_not_delay_others():
    """Step by step, without the thread."""
    worker = Worker(small_model(), TOKENIZER, "small", slots=3, prefill_chunk=4)
    quick = Reader(worker, tokens=[1], max_tokens=30, temperature=0.0)
    worker._turn()
    Reader(worker, tokens=list(range(20)), max_tokens=5, temperature=0.0)  # a sample may end at once
    for _ in range(4):
        before = quick.events.qsize()
        worker._turn()
        assert quick.events.qsize() == before + 1
        assert len(worker._queue) == 1
    worker._turn()
    assert len(worker._samples) == 2


def test_rows_that_end_free_their_slots_at_once(make_worker):
    """Step by step: a waiting request gets the slot of an ended row while others still run."""
    chain = [TOKENIZER.encode("ask")[0], *range(300, 340)]
    worker = make_worker(next_token_model(chain, then={}), start=False, slots=2)
    request = {"tokens": chain[:1], "temperature": 0.0}
    long = Reader(worker, **request, max_tokens=40)
    readers = [Reader(worker, **request, max_tokens=3) for _ in range(4)]
    for reader in readers:
        while not reader.ends:
            worker._turn()
            while not reader.events.empty():
                reader.next()
        assert reader.tokens == [chain[1:4]]
        assert worker.stats()["running"] == 1
    assert worker.stats()["waiting"] == 0
    assert worker.stats()["tokens_generated"] < 3 * 4 + 3 * 4 + 6  # and each started at once
    while worker._has_work():
        worker._turn()
    assert long.all().tokens == [chain[1:41]]


def test_cancelled_requests_end_once_and_free_their_slots(make_worker):
    """Step by step, or the thread might reach the end before the cancellation."""
    worker = make_worker(start=False, slots=2)
    running = Reader(worker, tokens=[1, 2], max_tokens=60, n=2, temperature=1.0, seed=0)
    waiting = Reader(worker, tokens=[3], max_tokens=3)
    for _ in range(3):
        worker._turn()
    running.handle.cancel()
    running.handle.cancel()
    worker._turn()
    assert running.all().ends == {0: "cancelled", 1: "cancelled"}
    assert worker.stats()["running"] == 1
    worker.start()
    assert waiting.all().ends[0] in ("stop", "length")
    assert worker.stats()["running"] == 0


def test_a_sample_can_be_stopped_and_others_continue(make_worker):
    worker = make_worker(start=False, slots=3)
    reader = Reader(worker, tokens=[1, 2], max_tokens=60, n=2, temperature=1.0, seed=0)
    served = Reader(worker, tokens=[1, 2], max_tokens=60, temperature=1.0, seed=0)
    while served.events.empty():  # step by step, as the thread might reach the end first
        worker._turn()
    reader.handle.stop(1)
    served.handle.stop(0)
    served.handle.cancel()  # as the server does when a response is complete
    worker.start()
    reader.all()
    assert reader.ends[1] == "stop"
    assert 0 < len(reader.tokens[1]) < len(reader.tokens[0])
    assert served.all().ends[0] == "stop"
    assert worker.stats()["requests_finished"] == 2


def test_calculator_results_are_forced_into_the_stream(make_worker):
    """The model's weights make it write 12*7; the result follows, whatever the model draws."""
    special = {name: TOKENIZER.encode_special(f"<|{name}|>") for name in SPECIAL}
    call = [special["python_start"], *TOKENIZER.encode("12*7"), special["python_end"]]
    result = [special["output_start"], *TOKENIZER.encode("84"), special["output_end"]]
    model = next_token_model(
        [TOKENIZER.encode("ask")[0], *call, 5], then={result[-1]: special["assistant_end"]}
    )
    worker = make_worker(model, slots=3)
    readers = [
        Reader(worker, tokens=[TOKENIZER.encode("ask")[0]], max_tokens=40, temperature=0.0) for _ in range(5)
    ]
    for reader in readers:
        assert reader.all().tokens[0] == [*call, *result]
        assert reader.ends[0] == "stop"


def test_large_seeds_are_allowed(make_worker):
    worker = make_worker(slots=4)
    other = Reader(worker, tokens=[3], max_tokens=40, temperature=0.0)
    assert set(Reader(worker, tokens=[1], max_tokens=4, n=2, seed=2**63 - 1).all().ends.values()) <= {
        "stop",
        "length",
    }
    assert other.all().ends[0] in ("stop", "length")


def test_a_waiting_request_can_be_cancelled():
    worker = Worker(small_model(), TOKENIZER, "small", slots=1)
    Reader(worker, tokens=[1], max_tokens=50)
    waiting = Reader(worker, tokens=[2], max_tokens=50)
    worker._turn()
    waiting.handle.cancel()
    worker._turn()
    assert waiting.next() == End(0, "cancelled")
    assert worker.stats()["requests_cancelled"] == 1
    assert not worker._queue


def test_a_full_queue():
    """Requests for free slots do not count, since they need not wait."""
    worker = Worker(small_model(), TOKENIZER, "small", slots=3, max_waiting=2)
    for _ in range(5):
        Reader(worker, tokens=[1], max_tokens=5)
    for _ in range(2):  # before and after the first three have their slots
        with pytest.raises(QueueFull, match="2 requests are waiting"):
            Reader(worker, tokens=[1], max_tokens=5)
        worker._admit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "0 tokens"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 64}, "do not fit"),
        ({"n": 3}, "n=3"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
    ids=str,
)
def test_bad_requests(changes, message):
    worker = Worker(small_model(), TOKENIZER, "small", slots=2)
    with pytest.raises(ValueError, match=message):
        Reader(worker, **{"tokens": [1], "max_tokens": 5, **changes})


def test_close_lets_requests_end_or_cancels_them(make_worker):
    worker = make_worker(slots=1)
    readers = [Reader(worker, tokens=[i + 1], max_tokens=10, temperature=0.0) for i in range(3)]
    worker.close(drain=True)
    assert all(reader.all().ends[0] in ("stop", "length") for reader in readers)
    with pytest.raises(Closed, match="shutting down"):
        Reader(worker, tokens=[1], max_tokens=5)
    hurried = make_worker(start=False, slots=1)
    readers = [Reader(hurried, tokens=[i + 1], max_tokens=60) for i in range(3)]
    hurried._turn()
    hurried.stop_taking(drain=False)
    hurried.start()
    hurried.close(drain=False)
    assert [reader.all().ends[0] for reader in readers] == ["cancelled"] * 3


def test_logprobs_of_many_rows_come_in_one_transfer(make_worker, monkeypatch):
    """Each row with logprobs cost two more waits for the GPU, in every step of all rows."""
    model = small_model()
    worker = make_worker(model, start=False, slots=4)
    readers = [
        Reader(worker, tokens=[i + 1, 5], max_tokens=1, temperature=0.0, logprobs=n)
        for i, n in enumerate((3, None, 0, 1))
    ]
    transfers = []
    tolist = torch.Tensor.tolist
    worker._admit()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.shape) or tolist(self))
    worker._step()
    assert len(transfers) == 1 + 1  # the other one has the drawn tokens
    for i, (n, reader) in enumerate(zip((3, None, 0, 1), readers, strict=True)):
        event = reader.next()
        expected = model(torch.tensor([[i + 1, 5]]))[0, -1].log_softmax(-1)
        best = expected.topk(n or 0)
        assert [token for token, _ in event.alternatives] == best.indices.tolist()
        assert [value for _, value in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert event.logprob == (None if n is None else pytest.approx(expected[event.token].item(), abs=1e-4))


def test_logprobs_ignore_temperature_and_filters(make_worker):
    model = small_model()
    worker = make_worker(model)
    reader = Reader(worker, tokens=[4, 5], max_tokens=1, temperature=0.5, top_k=3, logprobs=2, seed=0)
    event = reader.next()
    expected = model(torch.tensor([[4, 5]]))[0, -1].log_softmax(-1)
    assert event.logprob == pytest.approx(expected[event.token].item(), abs=1e-4)
    best = expected.topk(2)
    assert [token for token, _ in event.alternatives] == best.indices.tolist()
    assert [value for _, value in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_many_clients_come_and_go(make_worker):
    """Random arrivals and cancellations: complete answers are right, and all slots are free in the end."""
    model = small_model()
    worker = make_worker(model, slots=6, prefill_chunk=16)
    rng = random.Random(1)
    readers = []
    for i, prompt in enumerate(prompts(60, seed=2)):
        readers.append(Reader(worker, tokens=prompt, max_tokens=rng.randint(1, 30), seed=i, temperature=0.8))
        if rng.random() < 0.3:
            rng.choice(readers).handle.cancel()
        time.sleep(rng.random() * 0.004)
    kept = [reader for reader in readers if reader.all().ends[0] != "cancelled"]
    assert len(kept) > 10
    again = make_worker(model, slots=1)
    for reader in kept[::5]:
        request = reader.handle.request
        seed = request.sampling.seed
        alone = Reader(
            again, tokens=request.tokens, max_tokens=request.max_tokens, seed=seed, temperature=0.8
        )
        assert alone.all().tokens == reader.tokens
    stats = worker.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert stats["requests_finished"] + stats["requests_cancelled"] == 60
