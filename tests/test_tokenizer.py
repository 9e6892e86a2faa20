"""The tokenizer: vocabulary, encoding and decoding, and safe loading of files."""

import contextlib
import json
import os
import pickle
from functools import partial

import numpy as np
import pytest
import tiktoken

import rustbpe
from nanochat.tokenizer import (
    JSON_FILE,
    PICKLE_FILE,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    RustBPETokenizer,
    get_tokenizer,
)
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer, training_texts

BYTES = {bytes([byte]): byte for byte in range(256)}
HARD_TEXTS = [
    "",
    "a",
    "I've said: don't!! 1234567 3.14e-10",
    "\r\n\tdef f(x):\n        return x**2  # square\n\n\n",
    "trailing spaces   ",
    "   \n  \n leading",
    "\ud55c\uad6d\uc5b4 \u65e5\u672c\u8a9e\u3000\u0440\u0443\u0441",
    "\U0001f469\u200d\U0001f680 \U0001f1eb\U0001f1f7",
    "e\u0301 \u00a0 \u2028 \x00 \x1f \ufeff \uffff",
    "<|bos|>hello<|assistant_end|>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


# ---------------------------------------------------------------------------------------------------------
# Vocabulary


def test_special_tokens_are_the_last_ids(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    ids = [tokenizer.encode_special(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert [tokenizer.id_to_token(id) for id in ids] == SPECIAL_TOKENS
    assert tokenizer.get_bos_token_id() == ids[0]


def test_encode_special_refuses_ordinary_tokens(tokenizer):
    with pytest.raises(ValueError, match=r"'the' is not a special token; there are: .*<\|output_end\|>"):
        tokenizer.encode_special("the")


def test_token_bytes_counts_raw_bytes(tokenizer):
    """nanochat counted decoded text, where each lone byte of a character is U+FFFD: 3 bytes instead of 1."""
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (VOCAB_SIZE,)
    assert np.issubdtype(sizes.dtype, np.integer)
    assert sizes[:256].tolist() == [1] * 256
    assert sizes[-9:].tolist() == [0] * 9
    for text in HARD_TEXTS:
        assert sizes[tokenizer.encode(text, prepend="<|bos|>")].sum() == len(text.encode())


@pytest.mark.parametrize("vocab_size", [0, 256, 264])
def test_vocabulary_too_small(vocab_size):
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size} must be at least 265"):
        RustBPETokenizer.train_from_iterator(training_texts(), vocab_size)


def test_smallest_vocabulary_is_the_bytes():
    tokenizer = RustBPETokenizer.train_from_iterator(training_texts(), 265)
    assert tokenizer.get_vocab_size() == 265
    assert len(tokenizer.encode("the")) == 3


@pytest.mark.parametrize("texts", [[], [""], ["a", "b"]])
def test_text_without_pairs(texts):
    with pytest.raises(ValueError, match="empty"):
        RustBPETokenizer.train_from_iterator(texts, VOCAB_SIZE)


def test_short_text_gives_a_smaller_vocabulary_and_a_warning(caplog):
    tokenizer = RustBPETokenizer.train_from_iterator(["abc"], VOCAB_SIZE)
    assert tokenizer.get_vocab_size() == 265 + 2
    assert tokenizer.decode(tokenizer.encode("abc cab")) == "abc cab"
    assert f"vocab_size={VOCAB_SIZE}, but the text yields a vocabulary of only 267" in caplog.text


# ---------------------------------------------------------------------------------------------------------
# Text and ids


@pytest.fixture(scope="module")
def trainer():
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(training_texts()), VOCAB_SIZE - 9, pattern=SPLIT_PATTERN)
    return trainer


@pytest.mark.parametrize("text", HARD_TEXTS + training_texts()[:3])
def test_round_trip_with_the_ids_of_the_trainer(tokenizer, trainer, text):
    ids = tokenizer.encode(text)
    assert ids == trainer.encode(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_is_never_a_special_token(tokenizer, token):
    ids = tokenizer.encode(f"{token} {token}")
    assert max(ids) < VOCAB_SIZE - 9
    assert tokenizer.decode(ids) == f"{token} {token}"


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("id", [-1, VOCAB_SIZE, 2**40])
def test_unknown_ids(tokenizer, id):
    """They raised KeyError or OverflowError, without a word about the vocabulary."""
    with pytest.raises(ValueError, match=rf"id must be that of a token, from 0 to {VOCAB_SIZE - 1} \("):
        tokenizer.decode([97, id])


@pytest.mark.parametrize("num_threads", [1, 8])
def test_encode_list_prepend_append(tokenizer, num_threads):
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_end|>")
    expected = [[bos, *tokenizer.encode(text), end] for text in HARD_TEXTS]
    encode = partial(tokenizer.encode, HARD_TEXTS, num_threads=num_threads)
    assert encode(prepend=bos, append="<|user_end|>") == expected
    assert encode(prepend="<|bos|>", append=end) == expected
    assert encode() == [row[1:-1] for row in expected]
    assert tokenizer("a", prepend=0) == [0, ord("a")]
    assert tokenizer.encode([]) == []
    with pytest.raises(ValueError, match=r"'<\|unknown\|>' is not a special token"):
        encode(prepend="<|unknown|>")


@pytest.mark.parametrize("space", [" ", "\t", "\u3000"])
def test_a_million_spaces(tokenizer, space):
    """tiktoken's regex engine panics on them, with an error that does not derive from Exception."""
    text = "x" + space * 1_200_000 + "y " + space * 3 + "\n"
    ids, alone = tokenizer.encode([text, "y"])
    assert tokenizer.decode(ids) == text
    assert alone == tokenizer.encode("y")
    shorter = "x" + space * 400_000 + "y"
    assert tokenizer.encode(shorter) == tokenizer.enc.encode_ordinary(shorter)


# ---------------------------------------------------------------------------------------------------------
# Files


def assert_same(loaded, tokenizer):
    assert loaded.get_vocab_size() == VOCAB_SIZE
    assert [loaded.encode_special(token) for token in SPECIAL_TOKENS] == list(
        range(VOCAB_SIZE - 9, VOCAB_SIZE)
    )
    assert loaded.encode(HARD_TEXTS) == tokenizer.encode(HARD_TEXTS)


@pytest.mark.parametrize("kept", [(JSON_FILE, PICKLE_FILE), (JSON_FILE,), (PICKLE_FILE,)])
def test_save_and_load(tokenizer, base_dir, kept):
    directory = base_dir / "tokenizer"
    tokenizer.save(directory)
    assert sorted(os.listdir(directory)) == sorted((JSON_FILE, PICKLE_FILE))
    for name in {JSON_FILE, PICKLE_FILE} - set(kept):
        (directory / name).unlink()
    assert_same(get_tokenizer(), tokenizer)
    assert_same(get_tokenizer(str(directory)), tokenizer)


def test_nanochat_can_read_our_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    enc = pickle.loads((tmp_path / PICKLE_FILE).read_bytes())  # noqa: S301 our own
    assert isinstance(enc, tiktoken.Encoding)
    assert enc.encode_ordinary(HARD_TEXTS[2]) == tokenizer.encode(HARD_TEXTS[2])


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_nanochats_pickle_is_enough_for_the_published_program(tokenizer, tmp_path, protocol):
    (tmp_path / PICKLE_FILE).write_bytes(pickle.dumps(tokenizer.enc, protocol))
    loaded = RustBPETokenizer.from_directory(str(tmp_path))
    assert_same(loaded, tokenizer)
    loaded.bos_token_id = loaded.enc.encode_single_token("<|bos|>")
    loaded.stop_tokens = {loaded.enc.encode_single_token("<|assistant_end|>"), loaded.bos_token_id}
    assert loaded.decode([loaded.enc.encode_single_token("<|assistant_end|>")]) == "<|assistant_end|>"


def test_other_encodings_can_be_saved(tmp_path, monkeypatch):
    """tiktoken pickles encodings of its registry by name only, which would need another download."""
    enc = tiktoken.Encoding(
        "other",
        pat_str=r"\w+|\W+",
        mergeable_ranks=BYTES,
        special_tokens={"<|endoftext|>": 300},
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "other", enc)
    tokenizer = RustBPETokenizer.from_pretrained("other")
    assert tokenizer.get_bos_token_id() == 300
    assert tokenizer.token_bytes()[256:].tolist() == [0] * 45
    tokenizer.save(tmp_path)
    (tmp_path / JSON_FILE).unlink()
    assert RustBPETokenizer.from_directory(tmp_path).encode("ab", prepend="<|endoftext|>") == [300, 97, 98]


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*nowhere.*python -m scripts\.tok_train"):
        get_tokenizer(tmp_path / "nowhere")


def test_two_different_tokenizers_in_one_folder(tokenizer, tmp_path):
    other = RustBPETokenizer.train_from_iterator(training_texts(), VOCAB_SIZE - 1)
    tokenizer.save(tmp_path)
    (tmp_path / PICKLE_FILE).write_bytes(pickle.dumps(other.enc))
    with pytest.raises(ValueError, match=rf"{JSON_FILE} and .*{PICKLE_FILE} hold different tokenizers"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(("writer", "survivor"), [("json.dump", "old"), ("pickle.dump", "new")])
def test_interrupted_save_leaves_one_tokenizer(tokenizer, tmp_path, monkeypatch, writer, survivor):
    RustBPETokenizer.train_from_iterator(training_texts(), VOCAB_SIZE - 1).save(tmp_path)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, full_disk)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path)
    size = RustBPETokenizer.from_directory(tmp_path).get_vocab_size()
    assert size == {"old": VOCAB_SIZE - 1, "new": VOCAB_SIZE}[survivor]


class Calls:
    """An object whose pickle calls `function(*args)` when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pickled_encoding(fields):
    """Return a pickle of a tiktoken.Encoding with arbitrary fields."""
    return b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + pickle.dumps(fields, 3)[2:-1] + b"b."


def fields(**changes):
    good = {
        "name": "bytes",
        "pat_str": r"\w+|\W+",
        "mergeable_ranks": BYTES,
        "special_tokens": {"<|bos|>": 256},
    }
    return good | changes


EVIL_PICKLES = {
    "os.system": lambda marker: pickle.dumps(Calls(os.system, f"touch {marker}")),
    "eval": lambda marker: pickle.dumps(Calls(eval, f"open({str(marker)!r}, 'w')")),
    "protocol 0": lambda marker: pickle.dumps(Calls(os.mkdir, str(marker)), 0),
    "INST opcode": lambda marker: b"(S'touch %s'\nios\nsystem\n." % bytes(marker),
    "name with dots": lambda marker: (
        b"\x80\x04\x8c\x0dtiktoken.load\x8c\x09os.system\x93(S'touch %s'\ntR." % bytes(marker)
    ),
    "in a field": lambda marker: pickled_encoding(fields(name=Calls(os.mkdir, str(marker)))),
    "in a rank": lambda marker: pickled_encoding(
        fields(mergeable_ranks={b"a": Calls(eval, f"open({str(marker)!r}, 'w')")})
    ),
    "call in a call": lambda marker: pickle.dumps(Calls(getattr, Calls(os.mkdir, str(marker)), "x")),
    "before a good one": lambda marker: (
        b"\x80\x03"
        + pickle.dumps(Calls(os.mkdir, str(marker)), 3)[2:-1]
        + b"0"
        + pickled_encoding(fields())[2:]
    ),
}


@pytest.mark.parametrize("kind", EVIL_PICKLES)
def test_evil_pickles_run_nothing(tmp_path, kind):
    """nanochat unpickles the tokenizer of a downloaded checkpoint, which runs any code its author wants."""
    marker = tmp_path / "marker"
    evil = EVIL_PICKLES[kind](marker)
    with contextlib.suppress(Exception):
        pickle.loads(evil)  # noqa: S301 to prove that the attack works
    assert marker.exists()
    marker.rmdir() if marker.is_dir() else marker.unlink()

    (tmp_path / PICKLE_FILE).write_bytes(evil)
    with pytest.raises(
        ValueError, match=rf"{PICKLE_FILE} holds no usable tokenizer \(it asks for .*download"
    ):
        RustBPETokenizer.from_directory(tmp_path)
    assert not marker.exists()


GOOD_PICKLE = pickled_encoding(fields())


def test_good_pickle_made_by_hand_loads(tmp_path):
    (tmp_path / PICKLE_FILE).write_bytes(GOOD_PICKLE)
    assert RustBPETokenizer.from_directory(tmp_path).encode("ab") == [97, 98]


DAMAGED_PICKLES = {
    "empty": b"",
    "noise": bytes(range(256)),
    "cut": GOOD_PICKLE[:-40],
    "a dict": pickle.dumps(fields()),
    "the class": b"ctiktoken.core\nEncoding\n.",
    "state for the class": b"ctiktoken.core\nEncoding\n}b.",
    "no state": b"ctiktoken.core\nEncoding\n)\x81.",
    "a name to download": pickled_encoding("cl100k_base"),
    "no ranks": pickled_encoding({"name": "x"}),
    "an unknown field": pickled_encoding(fields(more=1)),
    "a bad pattern": pickled_encoding(fields(pat_str="(")),
    "text for bytes": pickled_encoding(fields(mergeable_ranks=BYTES | {"ab": 300})),
    "an id twice": pickled_encoding(fields(mergeable_ranks=BYTES | {b"ab": 97})),
    "a special id twice": pickled_encoding(fields(special_tokens={"<|bos|>": 97})),
    "a byte without token": pickled_encoding(fields(mergeable_ranks={b"a": 97})),
}


@pytest.mark.parametrize("kind", DAMAGED_PICKLES)
def test_damaged_pickles(tmp_path, kind):
    (tmp_path / PICKLE_FILE).write_bytes(DAMAGED_PICKLES[kind])
    with pytest.raises(ValueError, match=rf"{PICKLE_FILE} holds no usable tokenizer"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"mergeable_ranks"', '"ranks"'),
        lambda text: json.dumps(json.loads(text) | {"mergeable_ranks": {"YQ==": 97}}),
        lambda text: text.replace('"YQ==": 97', '"YQ==": 98'),
    ],
)
def test_damaged_json(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    (tmp_path / PICKLE_FILE).unlink()
    path = tmp_path / JSON_FILE
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(ValueError, match=rf"{JSON_FILE} holds no usable tokenizer"):
        RustBPETokenizer.from_directory(tmp_path)
