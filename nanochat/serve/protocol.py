"""What the server and the decoding worker say to each other.

The server makes a Request and gives it to a Backend; the backend's thread emits Tokens and, last of all and
exactly once, an End for each of the samples. Whoever submits must take emits from another thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nanochat.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it."""

    tokens: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1  # samples, from one prefill
    logprobs: int | None = None  # how many alternatives to each token; None: no logprobs


@dataclass(frozen=True)
class Token:
    """A token of a sample."""

    sample: int
    token: int
    logprob: float | None = None  # of the model's own distribution, in nats
    alternatives: tuple[tuple[int, float], ...] = ()  # (token, logprob), likeliest first


@dataclass(frozen=True)
class End:
    """The end of a sample, without the token that ended it."""

    sample: int
    reason: Literal["stop", "length", "cancelled", "error"]
    message: str = ""


class QueueFull(Exception):
    """As many requests wait as may wait; try again later."""


class Closed(Exception):
    """No more requests are taken, and the message says why."""


class Handle(Protocol):
    """A request under way."""

    gpu: int  # which one serves it

    def cancel(self) -> None:
        """Stop decoding and free its rows; its samples that still run end as "cancelled". May come twice."""

    def stop(self, sample: int) -> None:
        """End one sample, as "stop", if it still runs: it has said all that is wanted."""


class Backend(Protocol):
    """Decodes requests, many at a time. All methods may be called from any thread."""

    tokenizer: RustBPETokenizer
    context: int  # tokens of prompt and completion together
    name: str  # of the model, say "d20-sft"
    is_broken: bool  # its device works no more, and only a new process can help

    def submit(self, request: Request, emit: Callable[[Token | End], None]) -> Handle:
        """Queue a request; ValueError if it cannot be served, QueueFull or Closed if it is not taken."""

    def stats(self) -> dict[str, Any]:
        """Return model, slots, running, waiting, tokens_generated, requests_{finished,cancelled,failed}."""

    def start(self) -> None:
        """Start the worker."""

    def close(self, drain: bool) -> None:
        """Take no more requests; let those that run end (drain) or cancel them; return when all is over."""
