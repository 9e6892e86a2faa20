"""The requests of OpenAI's clients, and which of their fields are served.

A field that would change the response and is not served is an error, never ignored. A field that is null, or
has the value that turns it off, is accepted: many clients send every field that they know.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from nanochat.serve.api_errors import ApiError
from nanochat.serve.chat_request import Items, Message, Sampling, StrictModel, Whole

MAX_PROMPTS = 128  # of one request

# Fields that are not served, with the values that turn them off.
_OFF: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "reasoning_effort": ["none"],
    "verbosity": ["medium"],
    "service_tier": ["auto", "default"],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "function_call": ["none", "auto"],
    "store": [False],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}
# These identify the user, or say how to use tools, of which there are none.
_NO_EFFECT = ("user", "safety_identifier", "metadata", "prompt_cache_key", "parallel_tool_calls")


def _must_be(description: str) -> WrapValidator:
    """Return a validator with one message for a union of types; pydantic has one for each type."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            raise ValueError(f"must be {description}") from error

    return WrapValidator(check)


StopString = Annotated[str, Field(min_length=1, max_length=200)]
Stops = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=4)],
    _must_be("a string of 1 to 200 characters, or a list of up to 4 such strings"),
]
TokenId = Annotated[Whole, Field(ge=0)]
TokenIds = Annotated[Items[TokenId], Field(min_length=1)]
SEVERAL = Field(min_length=1, max_length=MAX_PROMPTS)
Prompts = Annotated[
    str | TokenIds | Annotated[Items[str], SEVERAL] | Annotated[Items[TokenIds], SEVERAL],
    _must_be(f"a string or a list of token ids, or a list of 1 to {MAX_PROMPTS} of one kind of them"),
]


class StreamOptions(StrictModel):
    """Options of a stream: with include_usage, it ends with a chunk that has the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # not served


class Completing(Sampling):
    """The fields that both kinds of completion have."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Whole = Field(1, ge=1, le=8)
    stop: Stops = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def drop_disabled(cls, fields: Any) -> Any:
        """Drop fields that are null or turned off; ApiError 400 for other fields that are not served."""
        if not isinstance(fields, dict):
            return fields
        kept = {name: v for name, v in fields.items() if v is not None and name not in _NO_EFFECT}
        for name, off in _OFF.items():
            if name in kept and (value := kept.pop(name)) not in off:
                message = f"{name}={reprlib.repr(value)} is not served here; leave {name} out"
                raise ApiError(400, message, param=name)
        return kept

    @model_validator(mode="after")
    def check_stream_options(self) -> Completing:
        """Raise ApiError 400 if there are stream options without a stream."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options need stream=true", param="stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class TextPart(StrictModel):
    """A part of a message's content, which must be text."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """A message in OpenAI's format."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Items[TextPart], _must_be('a string, or a list of {"type": "text", "text": ...}')
    ]

    @model_validator(mode="before")
    @classmethod
    def drop_empty(cls, fields: Any) -> Any:
        """Drop null and []: clients send a reply back with all the fields that it came with."""
        if not isinstance(fields, dict):
            return fields
        return {name: v for name, v in fields.items() if name == "content" or v not in (None, [])}

    def plain(self) -> Message:
        """Return it in our format."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatCompleting(Completing):
    """The body of POST /v1/chat/completions."""

    messages: Items[ChatMessage]
    max_completion_tokens: Whole | None = Field(None, ge=1, le=4096)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_pairs(self) -> ChatCompleting:
        """Raise ApiError 400 for two limits, or for alternatives without log probabilities."""
        if self.max_tokens and self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens are the same; give one of them"
            raise ApiError(400, message, param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Return the number of alternatives to each token; None without log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextCompleting(Completing):
    """The body of POST /v1/completions: prompts, as text or as tokens."""

    prompt: Prompts
    logprobs: Whole | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, one or several, as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]
