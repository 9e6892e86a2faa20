"""Token ids in, text out, while the ids are still coming.

A token is a run of bytes, and a character of UTF-8 has up to four of them, so a token may end in the
middle of one: an emoji decoded token by token shows as two or three U+FFFD. To decode all ids anew after each
would be right but quadratic. An incremental decoder is both: it holds back the bytes, three at most, that
may still become a character, and only those, as bytes that never can are U+FFFD at once. What it says in all
is what tokenizer.decode says of all the ids.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer


class StreamDecoder:
    """Decodes one stream of ids. Special tokens are the caller's to catch: their names would be text here."""

    def __init__(self, tokenizer: RustBPETokenizer):
        self._token_bytes = tokenizer.enc.decode_single_token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the characters that this token completes: none, one or many. KeyError if it is no id."""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """Return U+FFFD if the text ends within a character, else nothing; a new text may follow."""
        return self._utf8.decode(b"", final=True)
