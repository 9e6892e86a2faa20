"""Requests that come and go: each is answered as if it were alone, and leaves nothing behind."""

import itertools
import queue
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanochat.cache import HybridCache
from nanochat.decode.decoder import PlainDecoder
from nanochat.engine import Engine
from nanochat.sampling import GREEDY, SamplingParams
from nanochat.serve.protocol import Closed, End, QueueFull, Request, Token
from nanochat.serve.worker import Worker
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

TOKENIZER = train_tokenizer()


def small_model(**changes):
    shape = {"sequence_len": 64, "vocab_size": TOKENIZER.get_vocab_size(), **changes}
    return random_model(small_config(**shape)).eval()


@pytest.fixture(params=[False, True], ids=["in step", "overlapping"])
def make_worker(request, monkeypatch):
    """Workers that land a launch before the next one, or after it."""
    monkeypatch.setattr(PlainDecoder, "overlaps", request.param)
    workers = []

    def make(model=None, start=True, **settings):
        worker = Worker(model or small_model(), TOKENIZER, "small", **settings)
        workers.append(worker)
        if start:
            worker.start()
        return worker

    yield make
    for worker in workers:
        if worker._thread.is_alive():
            worker.close(drain=False)


SPECIAL = ("python_start", "python_end", "output_start", "output_end", "assistant_end")


def next_token_model(chain, then):
    """A model without mixers and MLPs, which says of each token in a chain the next, and so for then."""
    model = small_model(vocab_size=TOKENIZER.get_vocab_size(), n_embd=48, n_head=2)
    followers = {**dict(itertools.pairwise(chain)), **then}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                parameter.zero_()
        embeddings = torch.nn.functional.normalize(model.transformer.wte.weight)
        for token, follower in followers.items():
            model.lm_head.weight[follower] = 4 * embeddings[token]
    return model


class Reader:
    """Collects what a request emits."""

    def __init__(self, worker, *, tokens, max_tokens, n=1, logprobs=None, **sampling):
        self.events = queue.Queue()
        self.n = n
        request = Request(
            tokens=tokens, max_tokens=max_tokens, sampling=SamplingParams(**sampling), n=n, logprobs=logprobs
        )
        self.handle = worker.submit(request, self.events.put)
        self.tokens = [[] for _ in range(self.n)]
        self.ends = {}

    def next(self):
        event = self.events.get(timeout=60)
        if isinstance(event, Token):
            assert event.sample not in self.ends
            self.tokens[event.sample].append(event.token)
        else:
            assert event.sample not in self.ends
            self.ends[event.sample] = event.reason
        return event

    def all(self):
        while len(self.ends) < self.n:
            self.next()
        assert self.events.empty()
        return self


def prompts(n, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(rng.randint(1, 30))] for _ in range(n)]


def test_greedy_answers_in_a_crowd_are_the_engine_s(make_worker):
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


def test_a_seed_says_the_same_alone_and_in_a_crowd(make_worker):
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


def test_a_long_prompt_does_not_hold_up_others():
    """By hand: a turn at a time, without the thread."""
    worker = Worker(small_model(), TOKENIZER, "small", slots=3, prefill_chunk=4)
    quick = Reader(worker, tokens=[1], max_tokens=30, temperature=0.0)
    worker._turn()
    Reader(worker, tokens=list(range(20)), max_tokens=5, temperature=0.0)  # a sample may be the end at once
    for _ in range(4):
        before = quick.events.qsize()
        worker._turn()
        assert quick.events.qsize() == before + 1
        assert len(worker._queue) == 1
    worker._turn()
    assert len(worker._samples) == 2


def test_rows_that_end_free_their_slots_at_once(make_worker):
    """By hand: whoever waits has the slot of a row that has ended while others still run."""
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
    assert worker.stats()["tokens_generated"] < 3 * 4 + 3 * 4 + 6  # and each began at once
    while worker._has_work():
        worker._turn()
    assert long.all().tokens == [chain[1:41]]


def test_cancelled_requests_end_once_and_free_their_slots(make_worker):
    """By hand, or the thread might be at the end before it is told."""
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


def test_a_sample_can_be_stopped_and_others_go_on(make_worker):
    worker = make_worker(start=False, slots=3)
    reader = Reader(worker, tokens=[1, 2], max_tokens=60, n=2, temperature=1.0, seed=0)
    served = Reader(worker, tokens=[1, 2], max_tokens=60, temperature=1.0, seed=0)
    while served.events.empty():  # by hand: the thread might be at the end before it is told to stop
        worker._turn()
    reader.handle.stop(1)
    served.handle.stop(0)
    served.handle.cancel()  # as the server does once all is said
    worker.start()
    reader.all()
    assert reader.ends[1] == "stop"
    assert 0 < len(reader.tokens[1]) < len(reader.tokens[0])
    assert served.all().ends[0] == "stop"
    assert worker.stats()["requests_finished"] == 2


def test_calculator_results_are_forced_into_the_stream(make_worker):
    """The model's weights make it say 12*7; what follows is the result, whatever it would say."""
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


def test_large_seeds_harm_nobody(make_worker):
    worker = make_worker(slots=4)
    other = Reader(worker, tokens=[3], max_tokens=40, temperature=0.0)
    assert set(Reader(worker, tokens=[1], max_tokens=4, n=2, seed=2**63 - 1).all().ends.values()) <= {
        "stop",
        "length",
    }
    assert other.all().ends[0] in ("stop", "length")


def test_a_request_that_waits_can_be_cancelled():
    worker = Worker(small_model(), TOKENIZER, "small", slots=1)
    Reader(worker, tokens=[1], max_tokens=50)
    waiting = Reader(worker, tokens=[2], max_tokens=50)
    worker._turn()
    waiting.handle.cancel()
    worker._turn()
    assert waiting.next() == End(0, "cancelled")
    assert worker.stats()["requests_cancelled"] == 1
    assert not worker._queue


def test_a_full_queue_says_so():
    """Those that come at once to free slots do not count: they need not wait."""
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


def test_a_failing_step_ends_its_requests_and_no_others(make_worker, monkeypatch):
    worker = make_worker(start=False, slots=2)
    good = worker.model.next_logits
    broken = threading.Event()

    def next_logits(idx, *rest):
        if broken.is_set() and idx.size(1) == 1:
            raise RuntimeError("out of memory")
        return good(idx, *rest)

    monkeypatch.setattr(worker.model, "next_logits", next_logits)
    broken.set()
    worker.start()
    failed = Reader(worker, tokens=[1, 2, 3], max_tokens=30, n=2).all()
    assert set(failed.ends.values()) == {"error"}
    broken.clear()
    assert Reader(worker, tokens=[1, 2, 3], max_tokens=3).all().ends[0] in ("stop", "length")
    assert worker.stats()["requests_failed"] == 1


def test_a_failing_prompt_ends_its_request_and_no_other(make_worker, monkeypatch):
    """It ended all that ran; and the slots of samples that were being forked were lost for ever."""
    worker = make_worker(start=False, slots=4)
    good = Reader(worker, tokens=[1], max_tokens=40, temperature=0.0)
    worker._turn()
    feed, fork = worker.decoder.feed, worker.decoder.fork

    def no_memory(*args):
        raise RuntimeError("out of memory")

    def no_third(slot, params):
        return no_memory() if len(worker._queue[0].slots) == 2 else fork(slot, params)

    for name, failing, whole in (("feed", no_memory, feed), ("fork", no_third, fork)):
        monkeypatch.setattr(worker.decoder, name, failing)
        assert set(_turns_until_all(worker, tokens=[1, 2, 3], max_tokens=5, n=3).values()) == {"error"}
        monkeypatch.setattr(worker.decoder, name, whole)
    assert "error" not in _turns_until_all(worker, tokens=[1, 2, 3], max_tokens=5, n=3).values()
    worker.start()
    expected = Engine(worker.model, TOKENIZER).complete([[1]], max_tokens=40, sampling=GREEDY)[0]
    assert good.all().tokens[0] == expected.tokens


def _turns_until_all(worker, **request):
    reader = Reader(worker, **request)
    while len(reader.ends) < reader.n:
        worker._turn()
        while not reader.events.empty():
            reader.next()
    return reader.ends


@pytest.mark.parametrize("leaves", ["nobody", "one who is answered", "one whose prompt is run"])
def test_a_device_that_is_lost_ends_everything(make_worker, monkeypatch, leaves):
    """What was under way failed once more in the clean-up, and the thread died: clients waited for ever.

    To close a slot copies a row on the device, so that fails, too.
    """
    worker = make_worker(start=False, slots=3, prefill_chunk=4)
    prompts = ([1, 2], [1, 2], [*range(30)], [*range(30)])
    readers = [Reader(worker, tokens=prompt, max_tokens=30, temperature=0.0) for prompt in prompts]
    for _ in range(2):
        worker._turn()
    if leaves != "nobody":
        readers[0 if leaves == "one who is answered" else 2].handle.cancel()

    def lost(*args):
        raise RuntimeError("device-side assert triggered")

    for name in ("feed", "launch", "collect", "close"):
        monkeypatch.setattr(worker.decoder, name, lost)
    monkeypatch.setattr(HybridCache, "copy_row", lost)
    worker.decoder.device = torch.device("meta")  # from which no value comes back
    assert not worker.is_broken
    worker.start()
    expected = ["error"] * 4
    if leaves == "one whose prompt is run":
        expected[2] = "cancelled"
    assert [reader.all().ends[0] for reader in readers] == expected
    worker._thread.join(timeout=60)
    assert worker.is_broken
    with pytest.raises(Closed, match="the GPU has failed"):
        Reader(worker, tokens=[1], max_tokens=5)


LOSE_THE_GPU = """
import queue, torch
from nanochat.serve.protocol import Closed, End, Request
from nanochat.serve.worker import Worker
from tests.test_worker import TOKENIZER, small_model
worker = Worker(small_model().to("cuda"), TOKENIZER, "small", slots=2)
worker.start()
reasons, is_lost = [], False
while len(reasons) < 20:
    events = queue.Queue()
    try:
        worker.submit(Request(tokens=[1, 2], max_tokens=5), events.put)
    except Closed as error:
        print(error)
        break
    while not isinstance(event := events.get(timeout=60), End):
        pass
    reasons.append(event.reason)
    if not is_lost:
        is_lost = True
        try:
            torch.zeros(3, device="cuda")[torch.tensor([9], device="cuda")].cpu()
        except RuntimeError:
            pass
worker.close(drain=True)
print(worker.is_broken, reasons[0] in ("stop", "length"), set(reasons[1:]) <= {"error"})
"""


@pytest.mark.gpu
def test_a_gpu_that_is_lost():
    """In a process of its own: an index out of range makes every later call to the GPU fail."""
    done = subprocess.run([sys.executable, "-c", LOSE_THE_GPU], capture_output=True, text=True, timeout=300)
    assert done.stdout == "the GPU has failed\nTrue True True\n", done.stderr


def test_handlers_submit_while_the_worker_looks_through_its_queue():
    """A deque must not grow while it is read: all that ran failed, once in a while."""
    worker = Worker(small_model(), TOKENIZER, "small", slots=1, max_waiting=1 << 20)
    request, is_over = Request(tokens=[1], max_tokens=5), threading.Event()

    def submit():
        while not is_over.is_set():
            worker.submit(request, print)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    handlers = [threading.Thread(target=submit) for _ in range(2)]
    try:
        for handler in handlers:
            handler.start()
        while worker.stats()["waiting"] < 1000:
            worker._drop()
    finally:
        is_over.set()
        sys.setswitchinterval(interval)
        for handler in handlers:
            handler.join()


def test_logprobs_of_many_rows_come_in_one_transfer(make_worker, monkeypatch):
    """Each row of a client with logprobs cost two more waits for the GPU, in everyone's step."""
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
    assert len(transfers) == 1 + 1  # with the tokens drawn
    for i, (n, reader) in enumerate(zip((3, None, 0, 1), readers, strict=True)):
        event = reader.next()
        expected = model(torch.tensor([[i + 1, 5]]))[0, -1].log_softmax(-1)
        best = expected.topk(n or 0)
        assert [token for token, _ in event.alternatives] == best.indices.tolist()
        assert [value for _, value in event.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert event.logprob == (None if n is None else pytest.approx(expected[event.token].item(), abs=1e-4))


def test_logprobs_are_the_model_s_own(make_worker):
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
    """Random arrivals and cancellations: what ends by itself is right, and all slots are free in the end."""
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
