"""Parse a reply, token by token, into its parts: text, calls of the calculator, and their results.

The special tokens of chat_format begin and end the parts; this is the way back from tokens to the parts that
chat_format renders. A row follows the parts by their tokens alone (PartTracker), since it sees every token of
every sequence. The server and the terminal chat need their text (ReplyParser).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nanochat.chat_format import part_boundaries
from nanochat.decode.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer

Part = dict[str, str]  # {"type": one of chat_format.PART_TYPES, "text": ...}


class PartTracker:
    """The type of the part that a reply is in."""

    def __init__(self, tokenizer: RustBPETokenizer):
        self.type = "text"
        self._type_after = part_boundaries(tokenizer)

    def feed(self, token: int) -> str | None:
        """Take a token; return the type of the part that it ends, None if it belongs to the current part."""
        following = self._type_after.get(token)
        if following is None:
            return None
        ended, self.type = self.type, following
        return ended


class PartDelta(NamedTuple):
    """What one token adds to a part: the characters that it completes, none, one or many."""

    part: Part  # after the addition
    text: str
    ends: bool  # the next token belongs to another part


class ReplyParser:
    """A reply as it is decoded: `parts` are content as chat_format takes it.

    The caller must stop at the tokens in `ends`: special tokens that only occur after a reply.
    """

    def __init__(self, tokenizer: RustBPETokenizer):
        self.parts: list[Part] = [{"type": "text", "text": ""}]
        specials = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
        self.ends = specials - set(part_boundaries(tokenizer))
        self._tracker = PartTracker(tokenizer)
        self._decoder = StreamDecoder(tokenizer)

    def feed(self, token: int) -> PartDelta:
        """Take a token and return what it adds to the current part."""
        if self._tracker.feed(token) is None:
            return self._add(self._decoder.feed(token))
        delta = self.flush()._replace(ends=True)
        self.parts.append({"type": self._tracker.type, "text": ""})
        return delta

    def flush(self) -> PartDelta:
        """Return U+FFFD if the current part ends within a character, else an empty addition."""
        return self._add(self._decoder.flush())

    def _add(self, text: str) -> PartDelta:
        part = self.parts[-1]
        part["text"] += text
        return PartDelta(part, text, ends=False)
