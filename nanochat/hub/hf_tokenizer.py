"""Conversion of the tokenizer to Hugging Face's tokenizer.json, and back.

tiktoken merges any two neighboring tokens whose concatenation is a token, lowest rank first; tokenizer.json
lists the pairs that may be merged. One pair per token suffices if every token is the merge of two tokens of
lower rank, which BPE training guarantees: before a token can be formed, all merges of lower rank within its
bytes have been applied, and their result does not depend on the surrounding text. So the pair of a token is
obtained by applying all merges of lower rank to its bytes alone.

transformers recognizes special tokens in plain text; with split_special_tokens=True it treats them as text,
as RustBPETokenizer.encode does. The chat template escapes them in messages, see ESCAPED.
"""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanochat.common import write_json
from nanochat.tokenizer import RustBPETokenizer

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# The chat template writes this for "<|" in a message, since no special token starts with it. The normalizer
# of tokenizer.json, which runs after special tokens have been split off, converts it back.
ESCAPED = "<\ue000|"


def save_hf_tokenizer(tokenizer: RustBPETokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which includes the chat template, to a folder.

    max_length: the context length of the model, in tokens. Raise ValueError, before anything is written, if
    the vocabulary is not the result of BPE merges.
    """
    template = files("nanochat.hub") / "transformers_model" / "chat_template.jinja"
    write_json(directory / JSON_FILE, _tokenizer_json(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        # one of the stop tokens: transformers then does not mistake a <|bos|> in a prompt for padding
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template.read_text("utf-8"),
    }
    write_json(directory / CONFIG_FILE, config)


def load_hf_tokenizer(directory: Path) -> RustBPETokenizer:
    """Return the tokenizer in tokenizer.json; raise ValueError if it is of another kind."""
    path = directory / JSON_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        split, byte_level = content["pre_tokenizer"]["pretokenizers"]
        if byte_level["type"] != "ByteLevel" or content["model"]["type"] != "BPE":
            raise ValueError("not a byte-level BPE")
        byte_of = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        vocabulary = content["model"]["vocab"]
        fields = {
            "name": "rustbpe",
            "pat_str": split["pattern"]["Regex"],
            "mergeable_ranks": {bytes(map(byte_of.__getitem__, t)): id for t, id in vocabulary.items()},
            "special_tokens": {token["content"]: token["id"] for token in content["added_tokens"]},
        }
        return RustBPETokenizer.from_fields(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not the tokenizer of an exported Saint Iberis model ({error!r}); "
            "export or download it again"
        ) from error


def _tokenizer_json(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    fields = tokenizer.fields()
    ranks: dict[bytes, int] = fields["mergeable_ranks"]
    symbols = _byte_symbols()

    def to_symbols(token: bytes) -> str:
        return "".join(symbols[byte] for byte in token)

    tokens = sorted(ranks, key=ranks.__getitem__)
    pairs = [_merged_pair(token, ranks) for token in tokens if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": fields["pat_str"]},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "special": True}
            for token, id in sorted(fields["special_tokens"].items(), key=lambda item: item[1])
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": ESCAPED}, "content": "<|"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {to_symbols(token): ranks[token] for token in tokens},
            "merges": [" ".join(map(to_symbols, pair)) for pair in pairs],
        },
    }


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts left of a token's bytes by all merges of lower rank.

    Raise ValueError if more than two are left.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == ranks[token]:
            raise ValueError(
                f"token {token!r} is not the merge of two tokens of lower rank; "
                "only vocabularies of BPE merges, as RustBPETokenizer trains them, can be exported"
            )
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_symbols() -> list[str]:
    """Return the printable characters that represent the 256 bytes in tokenizer.json (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
