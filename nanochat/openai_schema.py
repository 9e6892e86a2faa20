"""What OpenAI's clients send, and what of it is served.

A field that would change the answer and is not served is an error, never passed over. One that is null, or
says "off", is let through: many clients send every field that they know.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nanochat.chat_request import Items, Message, Sampling, StrictModel, Whole

# Fields that are not served, and the values of them that ask for nothing.
_OFF: dict[str, list[Any]] = {
    "frequency_penalty": [0],
    "presence_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "tool_choice": ["none", "auto"],
    "functions": [[]],
    "store": [False],
    "echo": [False],
    "best_of": [1],
    "suffix": [""],
}
_NO_EFFECT = ("user", "safety_identifier", "metadata")  # say who asks, not what

StopString = Annotated[str, Field(min_length=1, max_length=200)]
TokenId = Annotated[Whole, Field(ge=0)]
ONE = Field(min_length=1, max_length=1)


class StreamOptions(StrictModel):
    """Whether a stream ends with a chunk that has the usage."""

    include_usage: bool = False


class Completing(Sampling):
    """What both kinds of completion take."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Whole = Field(1, ge=1, le=8)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def drop_what_is_off(cls, fields: Any) -> Any:
        """Leave out what is null or asks for nothing; ValueError for the rest of what is not served."""
        if not isinstance(fields, dict):
            return fields
        kept = {name: v for name, v in fields.items() if v is not None and name not in _NO_EFFECT}
        for name, off in _OFF.items():
            if name in kept and kept.pop(name) not in off:
                raise ValueError(f"{name} is not served here; leave it out")
        return kept

    @model_validator(mode="after")
    def check_stream_options(self) -> Completing:
        """ValueError if there are options of a stream and no stream."""
        if self.stream_options and not self.stream:
            raise ValueError("stream_options need stream=true")
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
    content: str | Items[TextPart]

    @model_validator(mode="before")
    @classmethod
    def drop_what_is_empty(cls, fields: Any) -> Any:
        """Leave out null and []: clients send a reply back with all the fields that it came with."""
        if not isinstance(fields, dict):
            return fields
        return {name: v for name, v in fields.items() if name == "content" or v not in (None, [])}

    def plain(self) -> Message:
        """Return it as a message of ours."""
        is_text = isinstance(self.content, str)
        text = self.content if is_text else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatCompleting(Completing):
    """The body of POST /v1/chat/completions."""

    messages: Items[ChatMessage]
    max_completion_tokens: Whole | None = Field(None, ge=1, le=4096)
    logprobs: bool = False
    top_logprobs: Whole | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_pairs(self) -> ChatCompleting:
        """ValueError for two limits, or for alternatives without log probabilities."""
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Tokens to list beside each one; None if nobody wants to know."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextCompleting(Completing):
    """The body of POST /v1/completions: one prompt, as text or as tokens."""

    prompt: str | Annotated[Items[TokenId], Field(min_length=1)] | Annotated[Items[str], ONE]
    logprobs: Whole | None = Field(None, ge=0, le=5)
