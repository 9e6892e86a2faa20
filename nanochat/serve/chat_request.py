"""Settings of the server, the fields that requests of all routes share, and the prompt of a chat.

The types of numbers have the bounds of nanochat's API; the limits of text are settings of the server. A field
that is left out takes the server's default, and an unknown field is an error.

Prompt and reply share the context. A reply has at most half of it. If the conversation is longer than the
rest, its oldest exchanges are dropped (see chat_format).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nanochat.chat_format import limit_reply, render_for_completion
from nanochat.sampling import SamplingParams
from nanochat.serve.api_errors import ApiError
from nanochat.serve.protocol import Request
from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Default sampling, limits of requests, and access to the server."""

    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    max_messages: int = 500
    max_message_chars: int = 8_000
    max_chars: int = 32_000  # of all messages, or of a prompt
    max_body_bytes: int = 1 << 19  # max_chars as JSON escapes take three quarters of it
    api_key: str = ""  # empty: no key is needed
    allowed_hosts: tuple[str, ...] = ()  # names by which the server may be addressed; empty: any
    allowed_origins: tuple[str, ...] = ()  # other web pages that may use it, say "https://example.org"
    log_chats: bool = False  # write prompts and replies to the log

    def __post_init__(self) -> None:
        try:
            Sampling(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{first['loc'][0]}={first['input']!r}: {first['msg']}") from error
        if not re.fullmatch("[!-~]*", self.api_key):  # the message must not show the key
            raise ValueError("api_key must be ASCII without spaces or line ends, or no client can send it")
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"allowed_origins: {origin!r} must be like https://example.org, or *")

    def chat_tokens(self, asked: int | None, context: int) -> int:
        """Return how many tokens a reply may have, asked for or by default."""
        return limit_reply(asked or self.max_tokens, context)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # 7.0 is an integer in JSON
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # a body may have a hundred thousand bad items


class StrictModel(BaseModel):
    """A JSON object with exactly the declared fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Sampling(StrictModel):
    """Sampling settings and the length of a reply."""

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: Whole | None = Field(default=None, ge=0, le=200)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    seed: Whole | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: Whole | None = Field(default=None, ge=1, le=4096)

    def to_request(self, settings: Settings, tokens: list[int], max_tokens: int, **more: Any) -> Request:
        """Return the request for the worker; `more` are its other fields."""
        names = {"temperature", "top_k", "top_p", "repetition_penalty", "seed"}
        chosen = self.model_dump(include=names, exclude_none=True)
        defaults = {"temperature": settings.temperature, "top_k": settings.top_k}
        sampling = SamplingParams(**{**defaults, **chosen})
        return Request(tokens=tokens, max_tokens=max_tokens, sampling=sampling, **more)


class Message(StrictModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def chat_prompt(
    tokenizer: RustBPETokenizer, settings: Settings, messages: Sequence[Message], room: int
) -> list[int]:
    """Return a chat as the prompt for a reply, at most `room` tokens; ApiError 400 if it has no reply."""
    _check_messages(settings, messages)
    rendered = [
        # A reply may be empty, which chat_format accepts only as a list of parts.
        {"role": "assistant", "content": [{"type": "text", "text": message.content}]}
        if message.role == "assistant"
        else {"role": message.role, "content": message.content}
        for message in messages
    ]
    try:
        return render_for_completion(tokenizer, {"messages": rendered}, room)
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from error


def _check_messages(settings: Settings, messages: Sequence[Message]) -> None:
    if not messages or messages[-1].role != "user":
        raise ApiError(
            400, "the last message must be the user's, since the reply answers it", param="messages"
        )
    if len(messages) > settings.max_messages:
        raise ApiError(
            400, f"{len(messages)} messages are more than {settings.max_messages}", param="messages"
        )
    lengths = [len(message.content) for message in messages]
    if max(lengths) > settings.max_message_chars:
        longest = lengths.index(max(lengths))
        raise ApiError(
            400,
            f"message {longest} has {lengths[longest]} characters; {settings.max_message_chars} is the most",
            param=f"messages.{longest}.content",
        )
    check_length(settings, sum(lengths), "messages")


def check_length(settings: Settings, num_chars: int, param: str) -> None:
    """Raise ApiError 400 if there are more than max_chars characters."""
    if num_chars > settings.max_chars:
        raise ApiError(
            400, f"{num_chars} characters of {param} are more than {settings.max_chars}", param=param
        )
