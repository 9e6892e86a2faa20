"""Byte-pair-encoding trainer and encoder. Wrong values raise ValueError, wrong types TypeError."""

from collections.abc import Iterable, Sequence

class Tokenizer:
    """A byte-level BPE tokenizer. Before training it knows the 256 bytes."""

    def __init__(self) -> None: ...
    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, buffer_size: int = 8192, pattern: str | None = None
    ) -> None:
        """Learn a vocabulary of `vocab_size` tokens, fewer if the texts run out of pairs.

        Texts are read ahead in batches of `buffer_size` or 1 MiB, whichever is reached first, and counted
        on all cores. `pattern` is a regular expression whose matches are the chunks that merges stay within;
        None means GPT-4's. A training that fails leaves the tokenizer as it was.
        """

    def get_pattern(self) -> str:
        """The split pattern."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Every token's bytes and its id, which is also its rank in tiktoken's sense."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the 256 bytes included."""

    def encode(self, text: str) -> list[int]:
        """The token ids of a text."""

    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, on all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids. Raises UnicodeDecodeError, a ValueError, where their bytes are not UTF-8."""
