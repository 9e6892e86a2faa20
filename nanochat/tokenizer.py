"""The tokenizer: byte-pair encoding trained by rustbpe, run by tiktoken, plus nine special tokens.

SPLIT_PATTERN cuts text into chunks that no token crosses: words with the preceding space, numbers in groups
of two digits, runs of punctuation. Training starts from the 256 bytes and repeatedly merges the most frequent
pair of adjacent tokens within the chunks into a new token. The id of a token is its position in the order of
merges ("rank"), and encoding applies the merges in that order. The SPECIAL_TOKENS have the ids after the last
rank. No text encodes to a special token, even if it is spelled like one: only code inserts them, so no user
can type the end of a message.

A saved tokenizer is a directory that holds the same four fields twice: in `tokenizer_nanochat.json` (tokens
in base64) and in `tokenizer.pkl`, a pickle of the tiktoken.Encoding, the format that nanochat writes and
reads. Either file is sufficient. Pickles from untrusted sources can execute code, so our unpickler admits a
single class, tiktoken's Encoding, and replaces it by a plain container of the four fields.

    python -m scripts.tok_train        # learn a vocabulary from the training text
    python -m scripts.tok_eval         # bytes per token, compared with GPT-2 and GPT-4
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
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import tiktoken

from nanochat import chat_format
from nanochat.common import atomic_write, base_dir, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = [
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # a call of the calculator, written by the assistant
    "<|python_end|>",
    "<|output_start|>",  # the result of the call, inserted by the engine
    "<|output_end|>",
]

# GPT-4's pattern with numbers cut after two digits instead of three: three would spend a thousand ids of a
# small vocabulary on numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

JSON_FILE = "tokenizer_nanochat.json"  # not tokenizer.json, which is Hugging Face's name for another format
PICKLE_FILE = "tokenizer.pkl"

# tiktoken's regex engine panics with a stack overflow on a run of a million whitespace characters.
_SPACE_LIMIT = 500_000
_LONG_SPACE = re.compile(rf"(?<!\s)\s{{{_SPACE_LIMIT}}}\s*")


class RustBPETokenizer:
    """A byte-pair tokenizer with special tokens, around the tiktoken.Encoding `enc`."""

    def __init__(self, enc: tiktoken.Encoding):
        self.enc = enc
        self._special_ids = {token: enc.encode_single_token(token) for token in enc.special_tokens_set}
        bos = next((token for token in ("<|bos|>", "<|endoftext|>") if token in self._special_ids), None)
        if bos is None:
            raise ValueError(f"{enc} has no token to start a document: it needs <|bos|> or <|endoftext|>")
        self.bos_token_id = self._special_ids[bos]

    # -----------------------------------------------------------------------------------------------------
    # Training, loading and saving

    @classmethod
    def train_from_iterator(cls, texts: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """Learn a vocabulary of `vocab_size` tokens, including the 256 bytes and the special tokens.

        If the text is too short for that many merges, the vocabulary is smaller and a warning is logged.
        Raise ValueError if vocab_size is below 265, or if the texts have no pair to merge.
        """
        from rustbpe import Tokenizer

        minimum = 256 + len(SPECIAL_TOKENS)
        if vocab_size < minimum:
            raise ValueError(
                f"vocab_size={vocab_size} must be at least {minimum}: all bytes and special tokens"
            )
        trainer = Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        size = len(ranks) + len(SPECIAL_TOKENS)
        if size < vocab_size:
            if size == minimum:
                raise ValueError("the training text is empty or has no pair of characters; give more text")
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
        """Return one of tiktoken's encodings ("gpt2", "cl100k_base"), downloading it if necessary."""
        return cls(tiktoken.get_encoding(name))

    @classmethod
    def from_directory(cls, directory: Path | str) -> RustBPETokenizer:
        """Load a tokenizer from a directory that `save` wrote, or that only has nanochat's tokenizer.pkl.

        Raise FileNotFoundError if both files are missing, ValueError if one is damaged or not a tokenizer, or
        if the two files hold different tokenizers.
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
        """Return a tokenizer made from the result of `fields`; raise ValueError if it is not a tokenizer."""
        ranks = fields["mergeable_ranks"]
        ids = [*ranks.values(), *fields["special_tokens"].values()]
        # tiktoken panics on these two mistakes instead of raising, at once or when it encodes the byte.
        if len(set(ids)) < len(ids):
            raise ValueError("some tokens share an id")
        if not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError("some bytes have no token")
        return cls(tiktoken.Encoding(**fields))

    def save(self, directory: Path | str) -> None:
        """Write both files into a directory; create it if necessary."""
        directory = Path(directory)
        fields = self.fields()
        ranks = {base64.b64encode(token).decode(): rank for token, rank in fields["mergeable_ranks"].items()}
        # Delete the old pickle first: a crash between the two writes must not leave two different tokenizers.
        (directory / PICKLE_FILE).unlink(missing_ok=True)
        write_json(directory / JSON_FILE, {**fields, "mergeable_ranks": ranks})
        with atomic_write(directory / PICKLE_FILE) as file:
            # A copy, because tiktoken pickles only the name of an encoding from its registry.
            pickle.dump(tiktoken.Encoding(**fields), file)

    def is_same_as(self, other: RustBPETokenizer) -> bool:
        """Return True if both tokenizers encode every text to the same ids."""
        return {**self.fields(), "name": ""} == {**other.fields(), "name": ""}

    # -----------------------------------------------------------------------------------------------------
    # The vocabulary

    def fields(self) -> dict[str, Any]:
        """Return the four constructor arguments of `enc`, under the names that its pickles use."""
        return {
            "name": self.enc.name,
            "pat_str": self.enc._pat_str,
            "special_tokens": self.enc._special_tokens,
            "mergeable_ranks": self.enc._mergeable_ranks,
        }

    def get_vocab_size(self) -> int:
        """Return the number of ids, including those of the special tokens."""
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        """Return the names of the special tokens."""
        return self.enc.special_tokens_set

    def get_bos_token_id(self) -> int:
        """Return the id of the token that starts every document."""
        return self.bos_token_id

    def encode_special(self, token: str) -> int:
        """Return the id of a special token by its exact name; raise ValueError if there is none."""
        if token not in self._special_ids:
            raise ValueError(f"{token!r} is not a special token; there are: {', '.join(self._special_ids)}")
        return self._special_ids[token]

    def id_to_token(self, id: int) -> str:
        """Return one token as text; bytes of an incomplete character become U+FFFD."""
        return self.enc.decode([id])

    def token_bytes(self) -> np.ndarray:
        """Return the number of text bytes of each id: (vocab_size,) int32, 0 for special tokens.

        Counts the raw bytes of the tokens: part of a character would decode to U+FFFD, which has three bytes.
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
        """Return the ids of a text; for a list of texts, a list of their ids, using `num_threads` threads.

        `prepend` and `append`, an id or the name of a special token, are added to each text. The spelling of
        a special token within a text is encoded as ordinary text.
        """
        first, last = (self.encode_special(t) if isinstance(t, str) else t for t in (prepend, append))
        encode_one = partial(self._encode_one, first=first, last=last)
        if isinstance(text, str):
            return encode_one(text)
        with ThreadPoolExecutor(num_threads) as pool:  # tiktoken releases the GIL
            return list(pool.map(encode_one, text))

    __call__ = encode

    def _encode_one(self, text: str, first: int | None, last: int | None) -> list[int]:
        ids: list[int] = []
        for piece in _split_long_whitespace(text):
            ids += self.enc.encode_ordinary(piece)
        if first is not None:
            ids.insert(0, first)  # ten times faster than building a new list
        if last is not None:
            ids.append(last)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD. Raise ValueError for an unknown id."""
        try:
            return self.enc.decode(ids)
        except (KeyError, OverflowError) as error:
            last = self.get_vocab_size() - 1
            raise ValueError(f"every id must be that of a token, from 0 to {last} ({error})") from error

    # -----------------------------------------------------------------------------------------------------
    # Conversations (see chat_format.py)

    def render_conversation(
        self, conversation: dict[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Return a conversation for training as (ids, mask), both at most max_tokens long."""
        return chat_format.render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict[str, Any], max_tokens: int = 2048) -> list[int]:
        """Return the prompt, at most max_tokens ids, that the assistant's reply continues."""
        return chat_format.render_for_completion(self, conversation, max_tokens)


def get_tokenizer(directory: Path | str | None = None) -> RustBPETokenizer:
    """Load the tokenizer in `directory`, by default the one that scripts.tok_train wrote."""
    return RustBPETokenizer.from_directory(directory or base_dir() / "tokenizer")


def get_token_bytes(device: torch.device | str = "cpu") -> Tensor:
    """Return token_bytes of the tokenizer that scripts.tok_train wrote, (vocab_size,) int32 on a device."""
    import torch

    return torch.from_numpy(get_tokenizer().token_bytes()).to(device)


def _split_long_whitespace(text: str) -> list[str]:
    """Split a text within runs of at least _SPACE_LIMIT whitespace characters; other texts are one piece."""
    runs = _LONG_SPACE.finditer(text)
    cuts = [cut for run in runs for cut in range(run.start() + _SPACE_LIMIT, run.end(), _SPACE_LIMIT)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


# ---------------------------------------------------------------------------------------------------------
# Files


class _PickledEncoding:
    """Stand-in for tiktoken's Encoding while a pickle is read: stores the fields and runs no code."""

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


class _EncodingUnpickler(pickle.Unpickler):
    """An unpickler that admits tiktoken's Encoding only: a pickle cannot call a function it cannot name."""

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
