"""The tokenizer: byte-pair encoding learned by rustbpe, run by tiktoken, plus nine special tokens.

SPLIT_PATTERN cuts text into chunks that no token crosses: words with the space before them, numbers two
digits at a time, runs of punctuation. Training starts from the 256 bytes and, again and again, makes a token
of the pair of neighbours that is most frequent within the chunks. A token's id is the order in which it was
made ("rank"), and encoding repeats the merges in that order. The ids after the last rank are the
SPECIAL_TOKENS. No text encodes to them, however much it looks like one: only code places them, so that no
user can type the end of a message.

A saved tokenizer is a folder with the same four fields twice: `tokenizer_nanochat.json` (tokens in base64)
and `tokenizer.pkl`, a pickle of the tiktoken.Encoding, which is what nanochat writes and reads. Either alone
will do. Pickles come from strangers and can carry code, so the reader of ours knows one name only, tiktoken's
Encoding, and takes even that for a box of four fields.

    python -m scripts.tok_train        # learn a vocabulary from the training text
    python -m scripts.tok_eval         # bytes per token, beside GPT-2 and GPT-4
"""

from __future__ import annotations

import base64
import json
import logging
import pickle
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import tiktoken

from nanochat import chat_format
from nanochat.common import atomic_write, base_dir, write_json

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = [
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a call of the calculator, written by the assistant
    "<|python_end|>",
    "<|output_start|>",  # its result, put into the stream by the engine
    "<|output_end|>",
]

# GPT-4's, but with numbers cut after two digits instead of three: a small vocabulary has better uses for its
# ids than a thousand numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

JSON_FILE = "tokenizer_nanochat.json"  # not tokenizer.json, which is Hugging Face's and another format
PICKLE_FILE = "tokenizer.pkl"

# A run of a million whitespace characters overflows the stack of tiktoken's regex engine, which panics.
_SPACE_LIMIT = 500_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{_SPACE_LIMIT}}}\s*")


class RustBPETokenizer:
    """A byte-pair vocabulary with special tokens; `enc` is the tiktoken.Encoding that does the work."""

    def __init__(self, enc: tiktoken.Encoding):
        self.enc = enc
        self._special_ids = {token: enc.encode_single_token(token) for token in enc.special_tokens_set}
        bos = next((token for token in ("<|bos|>", "<|endoftext|>") if token in self._special_ids), None)
        if bos is None:
            raise ValueError(f"{enc} has neither <|bos|> nor <|endoftext|> to start a document with")
        self.bos_token_id = self._special_ids[bos]

    # -----------------------------------------------------------------------------------------------------
    # Where tokenizers come from and go to

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """Learn a vocabulary of `vocab_size` tokens, the 256 bytes and the special tokens included.

        Text that is too short for so many merges gives a smaller vocabulary and a warning. Raises ValueError
        if vocab_size is below 265, or if there is nothing to learn a merge from.
        """
        from rustbpe import Tokenizer

        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size} must be at least {least}: all bytes and special tokens"
            )
        trainer = Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        size = len(ranks) + len(SPECIAL_TOKENS)
        if size < vocab_size:
            if size == least:
                raise ValueError("the text to learn a vocabulary from is empty or has no pair of characters")
            logger.warning("vocab_size=%d, but the text yields a vocabulary of only %d", vocab_size, size)
        enc = tiktoken.Encoding(
            name="rustbpe",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={token: id for id, token in enumerate(SPECIAL_TOKENS, start=len(ranks))},
        )
        return cls(enc)

    @classmethod
    def from_pretrained(cls, name: str) -> RustBPETokenizer:
        """Take one of tiktoken's own encodings ("gpt2", "cl100k_base"); it may have to be downloaded."""
        return cls(tiktoken.get_encoding(name))

    @classmethod
    def from_directory(cls, directory: Path | str) -> RustBPETokenizer:
        """Load what `save` wrote, or a folder with nothing but nanochat's tokenizer.pkl.

        Raises FileNotFoundError if neither file is there, ValueError if one is damaged or is no tokenizer, or
        if the two hold different ones.
        """
        paths = [Path(directory) / name for name in _READERS]
        found = {path: _read(path) for path in paths if path.exists()}
        if not found:
            raise FileNotFoundError(f"no tokenizer in {directory}; train one: python -m scripts.tok_train")
        tokenizer, *others = found.values()
        if any(other.fields() != tokenizer.fields() for other in others):
            raise ValueError(f"{' and '.join(map(str, found))} hold different tokenizers; delete one of them")
        return tokenizer

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> RustBPETokenizer:
        """Make a tokenizer of what `fields` returns; ValueError if that cannot be one."""
        ranks = fields["mergeable_ranks"]
        ids = [*ranks.values(), *fields["special_tokens"].values()]
        # The two mistakes that tiktoken does not report but panics at, now or when it meets the byte.
        if len(set(ids)) < len(ids):
            raise ValueError("some tokens share an id")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("some bytes have no token")
        return cls(tiktoken.Encoding(**fields))

    def save(self, directory: Path | str) -> None:
        """Write both files into a folder, which is made if needed."""
        directory = Path(directory)
        fields = self.fields()
        ranks = {base64.b64encode(token).decode(): rank for token, rank in fields["mergeable_ranks"].items()}
        # The old pickle goes first: a death between two writes must not leave two different tokenizers.
        (directory / PICKLE_FILE).unlink(missing_ok=True)
        write_json(directory / JSON_FILE, {**fields, "mergeable_ranks": ranks})
        with atomic_write(directory / PICKLE_FILE) as file:
            # A copy, because tiktoken pickles the encodings that it has loaded itself as a mere name.
            pickle.dump(tiktoken.Encoding(**fields), file)

    def is_same_as(self, other: RustBPETokenizer) -> bool:
        """Whether every text has the same ids in both."""
        return {**self.fields(), "name": ""} == {**other.fields(), "name": ""}

    # -----------------------------------------------------------------------------------------------------
    # The vocabulary

    def fields(self) -> dict[str, Any]:
        """Return the four arguments that make `enc`, under the names that its pickles use."""
        return {
            "name": self.enc.name,
            "pat_str": self.enc._pat_str,
            "special_tokens": self.enc._special_tokens,
            "mergeable_ranks": self.enc._mergeable_ranks,
        }

    def get_vocab_size(self) -> int:
        """Return the number of ids, those of the special tokens included."""
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        """Return the names of the special tokens."""
        return self.enc.special_tokens_set

    def get_bos_token_id(self) -> int:
        """Return the id of the token that starts every document."""
        return self.bos_token_id

    def encode_special(self, token: str) -> int:
        """Return the id of a special token by its exact name; ValueError if there is none."""
        if token not in self._special_ids:
            raise ValueError(f"{token!r} is not a special token; there are: {', '.join(self._special_ids)}")
        return self._special_ids[token]

    def id_to_token(self, id: int) -> str:
        """Return one token as text; bytes that are no whole character show as U+FFFD."""
        return self.enc.decode([id])

    def token_bytes(self) -> np.ndarray:
        """Return how many bytes of text each id stands for: (vocab_size,) int32, special tokens 0.

        Counted in the tokens' own bytes, as a part of a character would decode to U+FFFD, which has three.
        """
        lengths = np.zeros(self.get_vocab_size(), dtype=np.int32)
        for token, rank in self.fields()["mergeable_ranks"].items():
            lengths[rank] = len(token)
        return lengths

    # -----------------------------------------------------------------------------------------------------
    # Text and ids

    @overload
    def encode(
        self,
        text: str,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        text: Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | Sequence[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """Return the ids of a text, or for a list of texts a list of them, encoded on `num_threads` threads.

        `prepend` and `append`, an id or the name of a special token, are put around each text. What looks
        like a special token in the text itself is ordinary text.
        """
        first, last = (self.encode_special(t) if isinstance(t, str) else t for t in (prepend, append))
        encode_one = partial(self._encode_one, first=first, last=last)
        if isinstance(text, str):
            return encode_one(text)
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken works without Python's global lock
            return list(pool.map(encode_one, text))

    __call__ = encode

    def _encode_one(self, text: str, first: int | None, last: int | None) -> list[int]:
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self.enc.encode_ordinary(piece)
        if first is not None:
            ids.insert(0, first)  # ten times faster than making a new list
        if last is not None:
            ids.append(last)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD. ValueError if one is no token's."""
        try:
            return self.enc.decode(ids)
        except (KeyError, OverflowError) as error:
            last = self.get_vocab_size() - 1
            raise ValueError(f"the ids are not all those of tokens, 0 to {last} ({error})") from error

    # -----------------------------------------------------------------------------------------------------
    # Conversations: see chat_format

    def render_conversation(
        self, conversation: dict[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Return a conversation to learn from as (ids, mask), both at most max_tokens long."""
        return chat_format.render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict[str, Any], max_tokens: int = 2048) -> list[int]:
        """Return the ids, at most max_tokens, after which the assistant speaks."""
        return chat_format.render_for_completion(self, conversation, max_tokens)


def get_tokenizer(directory: Path | str | None = None) -> RustBPETokenizer:
    """Load the tokenizer in `directory`, by default the one that scripts.tok_train made."""
    return RustBPETokenizer.from_directory(directory or base_dir() / "tokenizer")


def _pieces(text: str) -> list[str]:
    """Cut a text within its enormous runs of whitespace; any other text is one piece."""
    runs = _LONG_SPACE.finditer(text)
    cuts = [cut for run in runs for cut in range(run.start() + _SPACE_LIMIT, run.end(), _SPACE_LIMIT)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


# ---------------------------------------------------------------------------------------------------------
# Files


class _PickledEncoding:
    """Stands for tiktoken's Encoding while a pickle is read: keeps the fields and does nothing."""

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


class _EncodingUnpickler(pickle.Unpickler):
    """Admits tiktoken's Encoding and nothing else: a pickle cannot call what it cannot name."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")
        return _PickledEncoding


def _read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _EncodingUnpickler(file).load().fields


def _read_json(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text("utf-8"))
    ranks = {base64.b64decode(token): rank for token, rank in fields["mergeable_ranks"].items()}
    return {**fields, "mergeable_ranks": ranks}


_READERS = {JSON_FILE: _read_json, PICKLE_FILE: _read_pickle}


def _read(path: Path) -> RustBPETokenizer:
    try:
        return RustBPETokenizer.from_fields(_READERS[path.name](path))
    except Exception as error:  # a damaged or hostile file may fail in any way
        raise ValueError(f"{path} holds no usable tokenizer ({error}); train or download it again") from error
