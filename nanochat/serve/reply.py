"""The text of a sample, token by token: its characters, uses of the calculator, and why it ended.

Characters come whole. Text that may be the start of a stop string is held back until more text decides it, so
that no part of a stop string is ever sent, over however many tokens it comes. Of several stop strings, the
one that is complete first counts. A call of the calculator and its result are not text but the `tool` of a
delta. Scored tokens come with the text that they begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.decode.parts import Part, PartDelta, ReplyParser
from nanochat.serve.protocol import End, Reason, Token
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class Output:
    """Text of a sample: all of it, or the latest part."""

    text: str = ""
    scored: list[tuple[int, Token]] = field(default_factory=list)  # tokens of text, and where each begins
    finish: Reason | None = None


@dataclass
class Delta(Output):
    """What one event adds to a sample. If there is a tool, it comes before the text."""

    sample: int = 0
    tool: dict[str, str | None] | None = None  # expression and result; None as result: it has none


class Sample(Output):
    """A sample in progress."""

    def __init__(self, tokenizer: RustBPETokenizer, stops: Sequence[str] = ()):
        super().__init__()
        self.num_tokens = 0  # including those of the calculator and of a stop string
        self._stops = stops
        self._parser = ReplyParser(tokenizer)
        self._call: list[Part] = []  # a call and its result, if not yet emitted
        self._held = ""  # text that may be the start of a stop string
        self._waiting: deque[tuple[int, Token]] = deque()  # scored tokens whose text is not yet emitted

    def feed(self, event: Token | End) -> Delta:
        """Return what an event adds: nothing once the sample has finished."""
        delta = Delta(sample=event.sample)
        if self.finish is not None:  # by a stop string, while other samples of the request still run
            return delta
        if isinstance(event, Token) and event.token not in self._parser.ends:
            self.num_tokens += 1
            self._feed_token(event, delta)
        else:
            self._append(self._parser.flush(), delta)
            self._emit_call(delta)
            if delta.finish is None:
                self._emit_text(len(self._held), delta)
                delta.finish = "stop" if isinstance(event, Token) else event.reason
        self.text += delta.text
        self.scored += delta.scored
        self.finish = delta.finish
        return delta

    def _feed_token(self, event: Token, delta: Delta) -> None:
        addition = self._parser.feed(event.token)
        is_text = addition.part["type"] == "text"
        if is_text and not addition.ends and event.logprob is not None:
            self._waiting.append((len(self.text) + len(self._held), event))
        self._append(addition, delta)
        if addition.ends:
            part = self._parser.parts[-1]  # the next one
            if part["type"] == "python" or addition.part["type"] == "python_output":
                self._emit_call(delta)
            if part["type"] != "text":
                self._call.append(part)

    def _append(self, addition: PartDelta, delta: Delta) -> None:
        if not addition.text or addition.part["type"] != "text":
            return
        self._emit_call(delta)  # one without a result
        self._held += addition.text
        stop = find_stop(self._held, self._stops)
        if stop is not None:
            delta.finish = "stop"
        self._emit_text(safe_length(self._held, self._stops) if stop is None else stop, delta)

    def _emit_call(self, delta: Delta) -> None:
        if self._call:
            texts = {part["type"]: part["text"] for part in self._call}
            delta.tool = {"expression": texts.get("python", ""), "result": texts.get("python_output")}
            self._call = []

    def _emit_text(self, num_chars: int, delta: Delta) -> None:
        delta.text += self._held[:num_chars]
        self._held = self._held[num_chars:]
        while self._waiting and self._waiting[0][0] < len(self.text) + len(delta.text):
            delta.scored.append(self._waiting.popleft())


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the stop string that is the first to be complete begins, or None."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def safe_length(text: str, stops: Sequence[str]) -> int:
    """Return how many characters of a text without stop strings cannot be the start of one."""
    if not stops:
        return len(text)
    longest = max(map(len, stops))
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return start
    return len(text)
