"""The interface between the server and the decoding worker.

The server makes a Request and submits it to a Backend. The backend's thread emits Tokens and, last and
exactly once for each sample, an End. The `emit` that is submitted must therefore accept calls from another
thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nanochat.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer

Reason = Literal["stop", "length", "cancelled", "error"]  # why a sample ended


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    tokens: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # samples, from one prefill
    logprobs: int | None = None  # number of alternatives to each token; None: no log probabilities


@dataclass(frozen=True)
class Token:
    """A token of a sample."""

    sample: int
    token: int
    logprob: float | None = None  # in nats, in the model's distribution before temperature and filters
    alternatives: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


@dataclass(frozen=True)
class End:
    """The end of a sample, without the token that ended it."""

    sample: int
    reason: Reason
    message: str = ""


class QueueFull(Exception):
    """The queue holds as many requests as it may; try again later."""


class Closed(Exception):
    """The backend takes no more requests; the message says why."""


class Handle(Protocol):
    """A request in progress."""

    @property
    def gpu(self) -> int:
        """Return the number of the GPU that serves it."""
        ...

    def cancel(self) -> None:
        """Stop decoding and free the rows: samples that still run end as "cancelled". May be called twice."""

    def stop(self, sample: int) -> None:
        """End one sample, as "stop", if it still runs."""


class Backend(Protocol):
    """Decodes requests, many at a time. All methods may be called from any thread."""

    @property
    def tokenizer(self) -> RustBPETokenizer:
        """Return the tokenizer of the model."""
        ...

    @property
    def context(self) -> int:
        """Return the number of tokens that prompt and completion may have together."""
        ...

    @property
    def name(self) -> str:
        """Return the name of the model, for example "d20-sft"."""
        ...

    @property
    def is_broken(self) -> bool:
        """Return True if the device is lost, so that only a new process can help."""
        ...

    def submit(self, request: Request, emit: Callable[[Token | End], None]) -> Handle:
        """Queue a request; ValueError if it cannot be served, QueueFull or Closed if it is not taken."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return model, slots, running, waiting, tokens_generated, requests_{finished,cancelled,failed}."""
        ...

    def start(self) -> None:
        """Start the worker."""

    def close(self, drain: bool) -> None:
        """Take no more requests, let running ones finish (drain) or cancel them, and wait for their end."""
