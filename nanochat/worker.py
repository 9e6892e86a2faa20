"""The decoding worker: one thread that owns a model and serves requests that come and go.

Each turn of its loop runs a chunk of one waiting prompt, so that long prompts do not hold up those who are
being answered, and then one decoding step for all rows (continuous batching, Yu et al. 2022, Orca). The rows
that are being answered are the first of a fixed number of slots: a new one is put behind them, and when one
ends the last one takes its place. So a step computes what is alive and nothing else. Requests are served in
the order in which they came; what a row says depends on its prompt, settings and seed, never on its
neighbours.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.cache import HybridCache
from nanochat.gpt import GPT
from nanochat.row import Row, special_ids
from nanochat.sampling import SamplingParams, sample_rows
from nanochat.serving import End, QueueFull, Request, Token
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
Emit = Callable[[Token | End], None]


class Job:
    """A request under way; what submit returns (serving.Handle)."""

    def __init__(self, request: Request, emit: Emit):
        self.request, self.emit = request, emit
        self.is_cancelled = False
        self.ended: set[int] = set()  # samples
        self.cache: HybridCache | None = None  # of the prompt, while it is being run

    def cancel(self) -> None:
        """See serving.Handle; the worker looks at it before its next step."""
        self.is_cancelled = True


@dataclass
class _Sample:
    """What occupies a slot."""

    job: Job
    number: int
    row: Row
    params: SamplingParams

    @property
    def tokens(self) -> list[int]:
        return self.row.completion.tokens


class Worker:
    """A serving.Backend. The model must be in eval mode, and no one else's."""

    def __init__(
        self,
        model: GPT,
        tokenizer: RustBPETokenizer,
        name: str,
        *,
        slots: int = 32,
        max_waiting: int = 256,
        prefill_chunk: int = 256,
    ):
        if min(slots, max_waiting, prefill_chunk) < 1:
            raise ValueError(f"slots={slots}, {max_waiting=}, {prefill_chunk=}: each must be at least 1")
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.context = model.config.sequence_len
        self.n_slots, self.max_waiting, self.prefill_chunk = slots, max_waiting, prefill_chunk
        self.special = special_ids(tokenizer)
        self._cache = model.new_cache(slots, self.context)
        self._samples: list[_Sample] = []  # of the first slots
        self._queue: deque[Job] = deque()  # jobs that have no slots yet; guarded by _changed
        self._changed = threading.Condition()
        self._is_closing = False
        self._counts = dict.fromkeys(("tokens_generated", "finished", "cancelled", "failed"), 0)
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    # -----------------------------------------------------------------------------------------------------
    # For any thread

    def submit(self, request: Request, emit: Emit) -> Job:
        """See serving.Backend."""
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
        _params(request, 0, 0)  # says what is wrong with the settings
        job = Job(request, emit)
        with self._changed:
            if self._is_closing:
                raise QueueFull("shutting down")
            if len(self._queue) >= self.max_waiting:
                raise QueueFull(f"{self.max_waiting} requests are waiting")
            self._queue.append(job)
            self._changed.notify()
        return job

    def stats(self) -> dict[str, Any]:
        """See serving.Backend."""
        return {
            "model": self.name,
            "slots": self.n_slots,
            "running": len(self._samples),
            "waiting": len(self._queue),
            "tokens_generated": self._counts["tokens_generated"],
            **{f"requests_{kind}": self._counts[kind] for kind in ("finished", "cancelled", "failed")},
        }

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self, drain: bool) -> None:
        """See serving.Backend."""
        with self._changed:
            self._is_closing = True
            if not drain:
                for job in (*self._queue, *(sample.job for sample in self._samples)):
                    job.cancel()
            self._changed.notify()
        self._thread.join()

    # -----------------------------------------------------------------------------------------------------
    # For the worker's thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._samples or self._is_closing)
            if not (self._queue or self._samples):
                return
            try:
                self._turn()
            except Exception:  # whatever it was, nobody may wait for ever for a dead thread
                logger.exception("decoding failed")
                self._fail()

    @torch.inference_mode()
    def _turn(self) -> None:
        self._drop_cancelled()
        budget = self.prefill_chunk
        while budget > 0 and self._queue and len(self._samples) + self._queue[0].request.n <= self.n_slots:
            budget -= self._prefill(self._queue[0], budget)
        if self._samples:
            self._step()

    def _drop_cancelled(self) -> None:
        for i in reversed(range(len(self._samples))):
            if self._samples[i].job.is_cancelled:
                self._remove(i, "cancelled")
        for job in [job for job in self._queue if job.is_cancelled]:
            self._unqueue(job)
            for number in range(job.request.n):
                self._end(job, number, "cancelled")

    def _prefill(self, job: Job, budget: int) -> int:
        """Run up to budget tokens of a prompt; once all are run, let its samples have slots."""
        request = job.request
        if job.cache is None:
            job.cache = self.model.new_cache(1, len(request.tokens))
        done = job.cache.lengths[0]
        chunk = request.tokens[done : done + budget]
        logits = self.model.next_logits(torch.tensor([chunk], device=self.model.device), job.cache)
        if done + len(chunk) == len(request.tokens):
            seed = secrets.randbits(32) if request.seed is None else request.seed
            samples = [
                _Sample(job, number, Row(self.tokenizer, self.special), _params(request, seed, number))
                for number in range(request.n)
            ]
            reasons = self._advance(samples, logits.repeat(request.n, 1))
            for sample in (s for s, reason in zip(samples, reasons, strict=True) if reason is None):
                self._cache.copy_row(len(self._samples), job.cache, 0)
                self._samples.append(sample)
            self._unqueue(job)
            job.cache = None
            for sample, reason in zip(samples, reasons, strict=True):
                if reason is not None:
                    self._end(job, sample.number, reason)
        return len(chunk)

    def _step(self) -> None:
        """One token for every sample."""
        rows = self._cache.first(len(self._samples))
        tokens = torch.tensor([sample.row.last[0] for sample in self._samples], device=self.model.device)
        logits = self.model.next_logits(tokens[:, None], rows)
        self._cache.lengths[: len(self._samples)] = rows.lengths
        reasons = self._advance(self._samples, logits)
        for i, reason in reversed(list(enumerate(reasons))):
            if reason is not None:
                self._remove(i, reason)

    def _advance(self, samples: Sequence[_Sample], logits: Tensor) -> list[str | None]:
        """Sample and emit; return why each sample is over, None if it goes on; logits (len(samples),V)."""
        said = [  # read only where repetition has a price
            [*s.job.request.tokens, *s.tokens] if s.params.repetition_penalty != 1 else [] for s in samples
        ]
        places = [len(s.tokens) for s in samples]
        drawn = sample_rows(logits, [s.params for s in samples], places, said)
        self._counts["tokens_generated"] += len(samples)
        reasons: list[str | None] = []
        for sample, token, row_logits in zip(samples, drawn, logits, strict=True):
            sample.row.take(token)
            if sample.row.has_ended:
                reasons.append("stop")
                continue
            sample.job.emit(_token(sample, row_logits))
            reasons.append("length" if len(sample.tokens) == sample.job.request.max_tokens else None)
        return reasons

    def _end(self, job: Job, number: int, reason: str, message: str = "") -> None:
        if number in job.ended:  # told before the step failed
            return
        job.ended.add(number)
        if len(job.ended) == job.request.n:
            self._counts[{"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")] += 1
        job.emit(End(number, reason, message))

    def _remove(self, i: int, reason: str) -> None:
        """Free slot i, into which the last sample moves; only then tell that its sample is over."""
        sample = self._samples[i]
        last = len(self._samples) - 1
        if i != last:
            self._cache.copy_row(i, self._cache, last)
            self._samples[i] = self._samples[last]
        self._samples.pop()
        self._end(sample.job, sample.number, reason)

    def _unqueue(self, job: Job) -> None:
        with self._changed:
            self._queue.remove(job)

    def _fail(self) -> None:
        """End everything that a failed step may have left half done: what runs, and the prompt being run."""
        samples, self._samples = self._samples, []
        for sample in samples:
            self._end(sample.job, sample.number, "error", "decoding failed")
        for job in [job for job in self._queue if job.cache is not None]:
            self._unqueue(job)
            for number in range(job.request.n):
                self._end(job, number, "error", "decoding failed")


def _params(request: Request, seed: int, number: int) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        repetition_penalty=request.repetition_penalty,
        seed=seed + 0x9E3779B1 * number,
    )


def _token(sample: _Sample, logits: Tensor) -> Token:
    token, is_sampled = sample.row.last
    n = sample.job.request.logprobs
    if n is None:
        return Token(sample.number, token, not is_sampled)
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(n)
    alternatives = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(sample.number, token, not is_sampled, logprobs[token].item(), alternatives)
