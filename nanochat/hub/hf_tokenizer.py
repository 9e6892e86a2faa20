"""The tokenizer as Hugging Face's tokenizer.json, and back.

tiktoken merges any two neighbours whose bytes together are a token, the lowest rank first; tokenizer.json
lists the pairs that may be merged. One pair a token is enough where tokens are made of tokens of lower rank,
as training makes them: when a token comes to be, all lower ranks have been merged within its bytes, and what
that leaves of them depends on nothing outside. So a token's pair is what its bytes alone come to before its
own rank is due.

In text that transformers is given, special tokens count; with split_special_tokens=True they are ordinary
text, as for our encode. The chat template hides them in messages, see ESCAPED.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanochat.common import write_json
from nanochat.tokenizer import RustBPETokenizer

JSON_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE = Path(__file__).parent / "transformers_model" / "chat_template.jinja"
# What the chat template writes for "<|" in a message: no special token begins with it. The normalizer, which
# runs after special tokens have been cut out, turns it back.
ESCAPED = "<\ue000|"


def save_hf_tokenizer(tokenizer: RustBPETokenizer, directory: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, which holds the chat template, into a folder.

    max_length is the context length of the model, in tokens.
    """
    write_json(directory / JSON_FILE, _tokenizer_json(tokenizer))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        # an end of text itself, so that generation never takes one in a prompt for padding
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE.read_text("utf-8"),
    }
    write_json(directory / CONFIG_FILE, config)


def load_hf_tokenizer(directory: Path) -> RustBPETokenizer:
    """Read tokenizer.json back; ValueError if it is not what save_hf_tokenizer, or a copy of that, wrote."""
    path = directory / JSON_FILE
    try:
        content = json.loads(path.read_text("utf-8"))
        split, byte_level = content["pre_tokenizer"]["pretokenizers"]
        if byte_level["type"] != "ByteLevel" or content["model"]["type"] != "BPE":
            raise ValueError("it is no byte-level BPE")
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
            f"{path} is no tokenizer of an exported Saint Iberis model ({error!r}); "
            "export or download it again"
        ) from error


def _tokenizer_json(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    fields = tokenizer.fields()
    ranks: dict[bytes, int] = fields["mergeable_ranks"]
    symbols = _byte_symbols()

    def spell(token: bytes) -> str:
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
            "vocab": {spell(token): ranks[token] for token in tokens},
            "merges": [" ".join(map(spell, pair)) for pair in pairs],
        },
    }


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts that merges of lower rank leave of a token; ValueError if they leave more."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, ranks[token]), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == ranks[token]:
            raise ValueError(f"token {token!r} is not made of two of lower rank: no vocabulary of merges")
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_symbols() -> list[str]:
    """Return the characters that stand for the 256 bytes in this format: visible ones, each once."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]
