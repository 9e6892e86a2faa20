"""The decoding worker: one thread that owns a model and serves requests that come and go.

Each turn of its loop prefills a chunk of one waiting prompt, so that long prompts do not delay running
samples, and then runs one decoding step for all samples (continuous batching, Yu et al. 2022, Orca). The
tokens of a row depend on its prompt, settings and seed, never on its neighbours.

Requests are served first come, first served, whichever client sent them. None starves, but a request for
eight slots leaves seven idle while it waits for the last, and one client can fill the queue for all.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.decode import DecoderKind
from nanochat.decode.row import Row, special_ids
from nanochat.decode.running import Running, Seat, decoder_for
from nanochat.gpt import GPT
from nanochat.serve.protocol import Closed, End, QueueFull, Reason, Request, Token
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
Emit = Callable[[Token | End], None]
# the counter of requests that each reason belongs to
OUTCOMES: dict[Reason, str] = {
    "stop": "finished",
    "length": "finished",
    "cancelled": "cancelled",
    "error": "failed",
}
Scores = tuple[float, tuple[tuple[int, float], ...]]  # logprob and alternatives of a Token


class Job:
    """A request in progress; submit returns it (protocol.Handle)."""

    def __init__(self, request: Request, emit: Emit, gpu: int):
        self.request, self.emit, self.gpu = request, emit, gpu
        self.is_cancelled = False
        self.stopped: set[int] = set()  # samples to end
        self.ended: set[int] = set()
        self.slots: list[int] = []  # during prefill: of the prompt and of its samples
        self.fed = 0  # tokens of the prompt that have been prefilled
        self.sampling = request.sampling.seeded()

    def cancel(self) -> None:
        """See protocol.Handle; the worker acts on it before its next step."""
        self.is_cancelled = True

    def stop(self, sample: int) -> None:
        """See protocol.Handle; the worker acts on it before its next step."""
        self.stopped.add(sample)


@dataclass(eq=False, kw_only=True)
class _Sample(Seat):
    """A seat with a sample of a job."""

    job: Job
    number: int


class Worker:
    """A protocol.Backend. The model must be in eval mode, and nothing else may use it."""

    def __init__(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        name: str,
        *,
        slots: int = 32,
        max_waiting: int = 256,
        prefill_chunk: int = 256,
        gpu: int = 0,
        decoder: DecoderKind = "best",
    ):
        if min(slots, max_waiting, prefill_chunk) < 1:
            raise ValueError(f"slots={slots}, {max_waiting=}, {prefill_chunk=}: each must be at least 1")
        self.model, self.tokenizer, self.name, self.gpu = model, tokenizer, name, gpu
        self.context = model.config.sequence_len
        self.n_slots, self.max_waiting, self.prefill_chunk = slots, max_waiting, prefill_chunk
        self.special = special_ids(tokenizer)
        self.decoder = decoder_for(model, slots, kind=decoder)
        self._running: Running[_Sample] = Running(self.decoder)
        self._queue: deque[Job] = deque()  # jobs whose prompts are not prefilled; guarded by _changed
        self._changed = threading.Condition()
        self._is_closing = self.is_broken = False
        self._counts = dict.fromkeys(OUTCOMES.values(), 0)
        self._tokens_generated = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    # -----------------------------------------------------------------------------------------------------
    # For any thread

    def submit(self, request: Request, emit: Emit) -> Job:
        """See protocol.Backend."""
        if not request.tokens or request.max_tokens < 1:
            raise ValueError(
                f"a prompt of {len(request.tokens)} tokens, max_tokens={request.max_tokens}: 1 each at least"
            )
        if len(request.tokens) + request.max_tokens > self.context:
            raise ValueError(
                f"a prompt of {len(request.tokens)} tokens and max_tokens={request.max_tokens} do not fit "
                f"the context of {self.context}"
            )
        if not 1 <= request.n <= self.n_slots:
            raise ValueError(f"n={request.n} must be from 1 to {self.n_slots}, the number of slots")
        job = Job(request, emit, self.gpu)
        with self._changed:
            if self._is_closing:
                raise Closed("the GPU has failed" if self.is_broken else "shutting down")
            if len(self._queue) >= self.max_waiting + self.n_slots - len(self._samples):
                raise QueueFull(f"{self.max_waiting} requests are waiting")
            self._queue.append(job)
            self._changed.notify()
        return job

    @property
    def load(self) -> int:
        """Return the number of waiting requests and running samples."""
        return len(self._queue) + len(self._samples)

    def stats(self) -> dict[str, Any]:
        """See protocol.Backend."""
        return {
            "model": self.name,
            "slots": self.n_slots,
            "running": len(self._samples),
            "waiting": len(self._queue),
            "tokens_generated": self._tokens_generated,
            **{f"requests_{kind}": self._counts[kind] for kind in self._counts},
        }

    def start(self) -> None:
        """Warm up the decoder and start the thread."""
        self.decoder.warm_up()
        self._thread.start()

    def close(self, drain: bool) -> None:
        """See protocol.Backend."""
        self.stop_taking(drain)
        self._thread.join()

    def stop_taking(self, drain: bool) -> None:
        """Begin to close: see protocol.Backend.close."""
        with self._changed:
            self._is_closing = True
            if not drain:
                for job in (*self._queue, *(sample.job for sample in [*self._samples])):
                    job.cancel()
            self._changed.notify()

    # -----------------------------------------------------------------------------------------------------
    # For the worker's own thread

    def _run(self) -> None:
        if self.decoder.device.type == "cuda":
            torch.cuda.set_device(self.decoder.device)  # every thread has its own current device
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_work() or self._is_closing)
            if not self._has_work():
                return
            self._turn()

    @property
    def _samples(self) -> list[_Sample]:
        return self._running.seats

    def _has_work(self) -> bool:
        return bool(self._queue or self._running)

    def _turn(self) -> None:
        phases = ((self._drop, self._fail), (self._admit, self._fail_prompt), (self._step, self._fail))
        for phase, undo in phases:
            try:
                phase()
            except Exception:  # of any kind: if the thread died, its clients would wait for ever
                logger.exception("decoding failed")
                undo()
                self._check_device()

    def _admit(self) -> None:
        """Prefill a chunk of the prompts that are next and for which there are slots."""
        budget = self.prefill_chunk
        while budget > 0 and self._queue and len(self._samples) + self._queue[0].request.n <= self.n_slots:
            budget -= self._prefill(self._queue[0], budget)

    def _step(self) -> None:
        """Run one decoding step of all samples."""
        wants_logits = any(sample.job.request.logprobs is not None for sample in self._samples)
        advanced = self._running.step(overlap=not wants_logits)
        scores = _scores(self.decoder.logits, advanced) if wants_logits else {}
        for index, sample in advanced:
            self._tokens_generated += 1
            if sample.row.has_ended:
                self._remove(sample, "stop")
                continue
            logprob, alternatives = scores.get(index, (None, ()))
            sample.job.emit(Token(sample.number, sample.row.last[0], logprob, alternatives))
            if len(sample.row.completion.tokens) == sample.job.request.max_tokens:
                self._remove(sample, "length")

    def _drop(self) -> None:
        """End stopped samples and cancelled requests."""
        for sample in [*self._samples]:
            if sample.number in sample.job.stopped:
                self._remove(sample, "stop")
            elif sample.job.is_cancelled:
                self._remove(sample, "cancelled")
        with self._changed:  # handlers append to the queue
            dropped = [job for job in self._queue if job.is_cancelled]
        for job in dropped:
            self._unqueue(job)
            for number in range(job.request.n):
                self._end(job, number, "cancelled")

    def _prefill(self, job: Job, budget: int) -> int:
        """Prefill up to budget tokens of a prompt; its last token is the input of the first decoding step."""
        request = job.request
        *tokens, last = request.tokens
        if not job.slots:
            job.slots = [self.decoder.open(job.sampling.for_sample(0))]
        chunk = tokens[job.fed : job.fed + budget]
        if chunk:
            self.decoder.feed(job.slots[0], chunk)
            job.fed += len(chunk)
        if job.fed == len(tokens):
            while (number := len(job.slots)) < request.n:
                job.slots.append(self.decoder.fork(job.slots[0], job.sampling.for_sample(number)))
            for number, slot in enumerate(job.slots):
                row = Row(self.tokenizer, self.special)
                self._samples.append(_Sample(slot=slot, row=row, last=last, job=job, number=number))
            job.slots = []
            self._unqueue(job)  # after its samples are in _samples: stop_taking must find it in one of both
        return len(chunk)

    def _end(self, job: Job, number: int, reason: Reason, message: str = "") -> None:
        if number in job.ended:  # it ended before the step failed
            return
        job.ended.add(number)
        if len(job.ended) == job.request.n:
            self._counts[OUTCOMES[reason]] += 1
        job.emit(End(number, reason, message))

    def _remove(self, sample: _Sample, reason: Reason) -> None:
        """Free a sample's slot, and then emit its end."""
        self._running.remove(sample)
        self._end(sample.job, sample.number, reason)

    def _unqueue(self, job: Job) -> None:
        with self._changed:
            self._queue.remove(job)
        for slot in job.slots:
            with suppress(Exception):  # a lost device has no slots to free
                self.decoder.close(slot)

    def _fail(self) -> None:
        """End all samples: a failed step may have left their state inconsistent."""
        samples = [*self._samples]
        self._running.clear()
        for sample in samples:
            self._end(sample.job, sample.number, "error", "decoding failed")

    def _fail_prompt(self) -> None:
        """End the request whose prompt is being prefilled; running samples are not affected."""
        job = self._queue[0]
        self._unqueue(job)
        for number in range(job.request.n):
            self._end(job, number, "error", "decoding failed")

    def _check_device(self) -> None:
        """End all requests if the device is lost: after some errors every later call to a GPU fails."""
        try:
            torch.zeros((), device=self.decoder.device).item()
        except Exception:
            logger.exception("%s works no more; restart the server", self.decoder.device)
            with self._changed:
                self._is_closing = self.is_broken = True
            self._fail()
            while self._queue:
                self._fail_prompt()


def _scores(logits: Tensor, advanced: Sequence[tuple[int, _Sample]]) -> dict[int, Scores]:
    """Return log probabilities by index in logits, for samples that want them, in one transfer."""
    counts = {i: s.job.request.logprobs for i, s in advanced if s.job.request.logprobs is not None}
    if not counts:
        return {}
    logprobs = logits[list(counts)].log_softmax(-1)
    tokens = torch.tensor([[s.row.last[0]] for i, s in advanced if i in counts], device=logits.device)
    best = logprobs.topk(max(counts.values()))
    found = torch.cat([logprobs.gather(1, tokens), best.values, best.indices.float()], 1)  # ids are exact
    scores: dict[int, Scores] = {}
    for (i, n), (logprob, *rest) in zip(counts.items(), found.tolist(), strict=True):
        values, ids = rest[: len(rest) // 2], map(int, rest[len(rest) // 2 :])
        scores[i] = logprob, tuple(zip(ids, values, strict=True))[:n]
    return scores
