"""Byte-pair-encoding trainer and encoder. Invalid values raise ValueError, wrong types TypeError."""

from collections.abc import Iterable, Sequence

class Tokenizer:
    """A byte-level BPE tokenizer. Before training its vocabulary is the 256 bytes."""

    def __init__(self) -> None: ...
    def train_from_iterator(
        self, iterator: Iterable[str], vocab_size: int, buffer_size: int = 8192, pattern: str | None = None
    ) -> None:
        """Learn a vocabulary of `vocab_size` tokens, or fewer if the texts have no more pairs to merge.

        Texts are read in batches of `buffer_size` texts or 1 MiB, whichever is reached first, and counted on
        all cores. `pattern` is a regular expression whose matches are the chunks; merges do not cross chunks.
        None means GPT-4's pattern. If training fails, the tokenizer does not change.
        """

    def get_pattern(self) -> str:
        """Return the split pattern."""

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Return every token's bytes and its id, which is also its rank in tiktoken's sense."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including the 256 bytes."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, using all cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; raise UnicodeDecodeError, a ValueError, for invalid UTF-8."""
