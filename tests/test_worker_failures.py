"""Failures of a worker: each ends the requests that it affects, and no thread or client waits for ever."""

import subprocess
import sys
import threading

import pytest
import torch

from nanochat.cache import HybridCache
from nanochat.engine import Engine
from nanochat.sampling import GREEDY
from nanochat.serve.protocol import Closed, Request
from nanochat.serve.worker import Worker
from tests.helpers.workers import TOKENIZER, Reader, small_model


def test_a_failed_step_ends_its_requests_and_no_others(make_worker, monkeypatch):
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


def test_a_failed_prefill_ends_its_request_and_no_other(make_worker, monkeypatch):
    """It ended all samples, and the slots of samples that were being forked were never freed."""
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


@pytest.mark.parametrize("cancelled", ["none", "a running sample", "a prefill"])
def test_a_lost_device_ends_all_requests(make_worker, monkeypatch, cancelled):
    """Cleaning up failed, too, and ended the thread: clients waited for ever.

    Closing a slot copies a row on the device, so it fails as well.
    """
    worker = make_worker(start=False, slots=3, prefill_chunk=4)
    prompts = ([1, 2], [1, 2], [*range(30)], [*range(30)])
    readers = [Reader(worker, tokens=prompt, max_tokens=30, temperature=0.0) for prompt in prompts]
    for _ in range(2):
        worker._turn()
    if cancelled != "none":
        readers[0 if cancelled == "a running sample" else 2].handle.cancel()

    def lost(*args):
        raise RuntimeError("device-side assert triggered")

    for name in ("feed", "launch", "collect", "close"):
        monkeypatch.setattr(worker.decoder, name, lost)
    monkeypatch.setattr(HybridCache, "copy_row", lost)
    worker.decoder.device = torch.device("meta")  # no value can be read from it
    assert not worker.is_broken
    worker.start()
    expected = ["error"] * 4
    if cancelled == "a prefill":
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
from tests.helpers.workers import TOKENIZER, small_model
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
def test_a_lost_gpu():
    """In another process: an index out of range makes every later call to the GPU fail."""
    done = subprocess.run([sys.executable, "-c", LOSE_THE_GPU], capture_output=True, text=True, timeout=300)
    assert done.stdout == "the GPU has failed\nTrue True True\n", done.stderr


def test_requests_are_submitted_while_the_worker_reads_its_queue():
    """A deque must not grow during iteration: now and then, all running samples failed."""
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
