"""What OpenAI's clients send, and what of it is served.

A field that would change the answer and is not served is an error, never passed over. One that is null, or
says "off", is let through: many clients send every field that they know.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from nanochat.serve.api_errors import ApiError
from nanochat.serve.chat_request import Items, Message, Sampling, StrictModel, Whole

MAX_PROMPTS = 128  # of one request

# Fields that are not served, and the values of them that ask for nothing.
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
# These say who asks, not what, or how to use the tools, of which there are none.
_NO_EFFECT = ("user", "safety_identifier", "metadata", "prompt_cache_key", "parallel_tool_calls")


def _must_be(what: str) -> WrapValidator:
    """Say so of whatever is wrong, where pydantic would say of each of several types why it is not that."""

    def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            raise ValueError(f"must be {what}") from error

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
    """Whether a stream ends with a chunk that has the usage."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False  # there is none


class Completing(Sampling):
    """What both kinds of completion take."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Whole = Field(1, ge=1, le=8)
    stop: Stops = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def drop_what_is_off(cls, fields: Any) -> Any:
        """Leave out what is null or asks for nothing; ApiError 400 for the rest of what is not served."""
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
        """ApiError 400 if there are options of a stream and no stream."""
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options need stream=true", param="stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class TextPart(StrictModel):
    """A part of a message's content; there is only text."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """A message as OpenAI has it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Items[TextPart], _must_be('a string, or a list of {"type": "text", "text": ...}')
    ]

    @model_validator(mode="before")
    @classmethod
    def drop_what_is_empty(cls, fields: Any) -> Any:
        """Leave out null and []: clients send a reply back with all the fields that it came with."""
        if not isinstance(fields, dict):
            return fields
        return {name: v for name, v in fields.items() if name == "content" or v not in (None, [])}

    def plain(self) -> Message:
        """Return it as a message of ours."""
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
        """ApiError 400 for two limits, or for alternatives without log probabilities."""
        if self.max_tokens and self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens are the same; give one of them"
            raise ApiError(400, message, param="max_completion_tokens")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Tokens to list beside each one; None if nobody wants to know."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextCompleting(Completing):
    """The body of POST /v1/completions: prompts, as text or as tokens."""

    prompt: Prompts
    logprobs: Whole | None = Field(None, ge=0, le=5)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, however many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]
