"""Decode a stream of token ids to text while the ids are still coming.

A token is a run of bytes, and a character of UTF-8 has up to four bytes, so that a token may end within a
character: an emoji that is decoded token by token shows as two or three U+FFFD. Decoding all ids again after
each one would be right but quadratic. An incremental decoder is both right and linear: it holds back only the
bytes, three at most, that may still become a character. Bytes that cannot are U+FFFD at once. The whole text
is the one that tokenizer.decode returns for all ids.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer


class StreamDecoder:
    """Decodes one stream of ids. The caller must catch special tokens, whose names would become text."""

    def __init__(self, tokenizer: RustBPETokenizer):
        self._token_bytes = tokenizer.enc.decode_single_token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the characters that a token completes: none, one or many. KeyError for an unknown id."""
        return self._utf8.decode(self._token_bytes(token))

    def flush(self) -> str:
        """Return U+FFFD if the text ends within a character, else nothing; a new text may follow."""
        return self._utf8.decode(b"", final=True)
