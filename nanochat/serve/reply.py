"""What a sample says, token by token: text, use of the calculator, the end.

Characters come whole. Text that may be the start of a stop string is held back until that is decided, so that
no part of a stop string is ever said, over however many tokens it comes; of several, the one that is complete
first counts. What the assistant types into the calculator and reads off it is no text but the `tool` of a
piece. Tokens that are scored come with the text that they begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nanochat.chat_format import part_after
from nanochat.decode.stream_decoder import StreamDecoder
from nanochat.serve.protocol import End, Token
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class Said:
    """What was said, in all or of late."""

    text: str = ""
    scored: list[tuple[int, Token]] = field(default_factory=list)  # tokens of text, and where each begins
    finish: Literal["stop", "length"] | None = None


@dataclass
class Piece(Said):
    """What an event adds to a sample. The tool, if there is one, comes before the text."""

    sample: int = 0
    tool: dict[str, str | None] | None = None  # expression and result, None if it has none


class Sample(Said):
    """A sample in the making."""

    def __init__(self, tokenizer: RustBPETokenizer, stops: Sequence[str] = ()):
        super().__init__()
        self.num_tokens = 0  # with those of the calculator and of a stop string
        self._stops = stops
        self._decoder = StreamDecoder(tokenizer)
        self._part_after = part_after(tokenizer)
        specials = map(tokenizer.encode_special, tokenizer.get_special_tokens())
        self._ends = set(specials) - set(self._part_after)  # what can only come after a reply
        self._part = "text"
        self._call: dict[str, str | None] | None = None  # to the calculator, not yet told of
        self._held = ""  # text that may be the start of a stop string
        self._waiting: deque[tuple[int, Token]] = deque()  # tokens of text that is not said yet

    def take(self, event: Token | End) -> Piece:
        """Return what an event adds, which is nothing once the sample has finished."""
        piece = Piece(sample=event.sample)
        if self.finish is not None:  # by a stop string, while other samples of the request still run
            return piece
        if isinstance(event, Token) and event.token not in self._ends:
            self.num_tokens += 1
            self._go_on(event, piece)
        else:
            self._add(self._decoder.flush(), piece)
            self._tell_call(piece)
            if piece.finish is None:
                self._say(len(self._held), piece)
                piece.finish = "stop" if isinstance(event, Token) else event.reason
        self.text += piece.text
        self.scored += piece.scored
        self.finish = piece.finish
        return piece

    def _go_on(self, event: Token, piece: Piece) -> None:
        part = self._part_after.get(event.token)
        if part is None:
            if self._part == "text" and event.logprob is not None:
                self._waiting.append((len(self.text) + len(self._held), event))
            self._add(self._decoder.feed(event.token), piece)
            return
        self._add(self._decoder.flush(), piece)
        if part == "python" or self._part == "python_output":
            self._tell_call(piece)
        if part == "python":
            self._call = {"expression": "", "result": None}
        elif part == "python_output":
            self._call = {**(self._call or {"expression": ""}), "result": ""}
        self._part = part

    def _add(self, text: str, piece: Piece) -> None:
        if not text:
            return
        if self._part != "text":
            self._call["expression" if self._part == "python" else "result"] += text
            return
        self._tell_call(piece)  # one that had no result
        self._held += text
        stop = find_stop(self._held, self._stops)
        if stop is not None:
            piece.finish = "stop"
        self._say(safe_length(self._held, self._stops) if stop is None else stop, piece)

    def _tell_call(self, piece: Piece) -> None:
        if self._call is not None:
            piece.tool, self._call = self._call, None

    def _say(self, num_chars: int, piece: Piece) -> None:
        piece.text += self._held[:num_chars]
        self._held = self._held[num_chars:]
        while self._waiting and self._waiting[0][0] < len(self.text) + len(piece.text):
            piece.scored.append(self._waiting.popleft())


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
