"""tokenizer.json in Hugging Face's tokenizers: the same ids for every text, and the conversion back."""

import json
import random

import pytest
import tiktoken
from tokenizers import Tokenizer

from nanochat.hub.hf_tokenizer import load_hf_tokenizer, save_hf_tokenizer
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from tests.helpers.texts import MULTILINGUAL, SPECIAL_LOOKING

ALPHABET = (
    " \n\r\t'sStlLvVeErReEdmM19.,-<|>\u0663\u00bd\u00e9\u017f\u1e9e\u3042\u4e2d\U0001f469\u200d\u0301"
    "\u00a0\u2028\u0085"
)


def every_substring_tokenizer(texts):
    """Return a tokenizer whose ids reveal the splits of these texts: every substring is a token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    lengths = range(1, max(map(len, texts)) + 1)
    substrings = (t[i : i + n].encode() for n in lengths for t in texts for i in range(len(t) - n + 1))
    for substring in substrings:
        for end in range(2, len(substring) + 1):  # every token needs its prefixes as tokens of lower rank
            ranks.setdefault(substring[:end], len(ranks))
    special_tokens = {token: id for id, token in enumerate(SPECIAL_TOKENS, start=len(ranks))}
    return RustBPETokenizer(
        tiktoken.Encoding(
            "split", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
        )
    )


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(MULTILINGUAL * 2), 2000)


@pytest.fixture
def convert(tmp_path):
    """Return a function that converts a tokenizer of ours to one of Hugging Face."""

    def convert(tokenizer):
        save_hf_tokenizer(tokenizer, tmp_path, 64)
        return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    return convert


def test_same_ids(tokenizer, convert):
    theirs = convert(tokenizer)
    rng = random.Random(0)
    noise = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 60))) for _ in range(3000)]
    cut = [text[rng.randrange(len(text)) :] for text in MULTILINGUAL if text for _ in range(10)]
    for text in [*MULTILINGUAL, *cut, *noise]:
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode(text), repr(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_same_splits(convert):
    """The ids of an ordinary small vocabulary rarely depend on the splits; these ids always do."""
    rng = random.Random(1)
    texts = ["".join(rng.choices(ALPHABET, k=12)) for _ in range(400)]
    tokenizer = every_substring_tokenizer(texts)
    theirs = convert(tokenizer)
    for text in texts:
        assert theirs.encode(text).ids == tokenizer.encode(text), repr(text)
    longer = every_substring_tokenizer(["1234"])
    assert len(longer.encode("1234")) == 2  # 12 34
    assert convert(longer).encode("1234").ids == longer.encode("1234")


def test_a_vocabulary_not_made_of_merges_is_refused(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"bc": 257}
    special_tokens = {token: 258 + i for i, token in enumerate(SPECIAL_TOKENS)}
    enc = tiktoken.Encoding(
        "odd", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    with pytest.raises(ValueError, match="token b'abc' is not the merge of two tokens of lower rank"):
        save_hf_tokenizer(RustBPETokenizer(enc), tmp_path, 64)
    assert not list(tmp_path.iterdir())


def test_special_tokens_in_text(tokenizer, convert):
    """transformers recognizes them in text unless split_special_tokens is set."""
    theirs = convert(tokenizer)
    for token in SPECIAL_TOKENS:
        assert theirs.encode(token).ids == [tokenizer.encode_special(token)]
    theirs.encode_special_tokens = True
    for text in [*SPECIAL_TOKENS, *SPECIAL_LOOKING]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_conversion_back(tokenizer, tmp_path):
    save_hf_tokenizer(tokenizer, tmp_path, 64)
    assert load_hf_tokenizer(tmp_path).fields() == {**tokenizer.fields(), "name": "rustbpe"}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content["model"].update(type="WordPiece"),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["model"]["vocab"].update({"\u00a0 ": 3}),  # not the symbol of a space
        lambda content: content.update(added_tokens=[]),
    ],
)
def test_a_foreign_tokenizer_is_refused(tokenizer, tmp_path, change):
    save_hf_tokenizer(tokenizer, tmp_path, 64)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer of an exported"):
        load_hf_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not the tokenizer"):
        load_hf_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_hf_tokenizer(tmp_path)
