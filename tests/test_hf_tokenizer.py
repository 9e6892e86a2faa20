"""tokenizer.json, read by Hugging Face's tokenizers: the same ids for every text, and the way back."""

import json
import random

import pytest
import tiktoken
from tokenizers import Tokenizer

from nanochat.hub.hf_tokenizer import load_hf_tokenizer, save_hf_tokenizer
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from scripts.tok_eval import TEXTS

MULTILINGUAL = [
    *TEXTS.values(),
    # Arabic, Hindi, Thai, Russian, Chinese, German, Vietnamese
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645\u060c \u0643\u062a\u0627\u0628\u064c"
    " \u0661\u0662\u0663",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430 1 234,56 \u20bd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u7b2c\uff11\uff12\u7ae0\u3000\U00020bb7",
    "Gr\u00fc\u00dfe aus K\u00f6ln; stra\u00dfe STRASSE \u1e9e \ufb03 \u0130\u0131",
    "Vi\u1ec7t Nam, Vie\u0323\u0302t Nam",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7\U0001f1e9 \U0001f44d\U0001f3fd",
    "I've, WE'LL, he'D, it\u2019s, '\u017fa, 'Sx, ''re,'t",  # U+017F is an s to whoever ignores case
    "1 12 123 1234567 3.14e-10 0x1F \u00bd \u2167 \u0663\u0664",
    "for (int i=0; i<n; ++i) {\n\tsum += a[i]; // x\r\n}\r\n\r\n    return 0;",
    "  a   b\t\tc \n \n\n  d\r\r\n \u00a0\u2003\u3000\u2028\u0085 e   ",
    " " * 100 + "x" + "\n" * 50 + "\t" * 7,
    "\x00\x01\x1f\x7f\ufeff\uffff\ufffd",
    "a" * 1000,
    "-----====!!!!????....",
    "",
]
SPECIAL_LOOKING = ["<|bos|>", "x<|user_end|>y <|assistant_end|>\n", "<|bos|", "<<|bos|>>", "<|unknown|>"]
ALPHABET = (
    " \n\r\t'sStlLvVeErReEdmM19.,-<|>\u0663\u00bd\u00e9\u017f\u1e9e\u3042\u4e2d\U0001f469\u200d\u0301"
    "\u00a0\u2028\u0085"
)


def with_every_substring(texts):
    """A tokenizer that gives away where text is split: every chunk of these texts is a token."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    lengths = range(1, max(map(len, texts)) + 1)
    substrings = (t[i : i + n].encode() for n in lengths for t in texts for i in range(len(t) - n + 1))
    for substring in substrings:
        for end in range(2, len(substring) + 1):  # bytes of a character, and each string from shorter ones
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
def read(tmp_path):
    """Give a tokenizer to Hugging Face."""

    def read(tokenizer):
        save_hf_tokenizer(tokenizer, tmp_path, 64)
        return Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    return read


def test_same_ids_on_texts_of_many_kinds(tokenizer, read):
    theirs = read(tokenizer)
    rng = random.Random(0)
    noise = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 60))) for _ in range(3000)]
    cut = [text[rng.randrange(len(text)) :] for text in MULTILINGUAL if text for _ in range(10)]
    for text in [*MULTILINGUAL, *cut, *noise]:
        ids = theirs.encode(text).ids
        assert ids == tokenizer.encode(text), repr(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_same_splits(read):
    """Where chunks end shows in few ids of a small vocabulary; in these it always shows."""
    rng = random.Random(1)
    texts = ["".join(rng.choices(ALPHABET, k=12)) for _ in range(400)]
    tokenizer = with_every_substring(texts)
    theirs = read(tokenizer)
    for text in texts:
        assert theirs.encode(text).ids == tokenizer.encode(text), repr(text)
    longer = with_every_substring(["1234"])
    assert len(longer.encode("1234")) == 2  # 12 34
    assert read(longer).encode("1234").ids == longer.encode("1234")


def test_a_vocabulary_that_is_not_of_merges_is_refused(tmp_path):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"bc": 257}
    special_tokens = {token: 258 + i for i, token in enumerate(SPECIAL_TOKENS)}
    enc = tiktoken.Encoding(
        "odd", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special_tokens
    )
    with pytest.raises(ValueError, match="token b'abc' is not made of two of lower rank"):
        save_hf_tokenizer(RustBPETokenizer(enc), tmp_path, 64)
    assert not list(tmp_path.iterdir())


def test_special_tokens_in_text(tokenizer, read):
    """They count for transformers, unless split_special_tokens is asked for: then they are text."""
    theirs = read(tokenizer)
    for token in SPECIAL_TOKENS:
        assert theirs.encode(token).ids == [tokenizer.encode_special(token)]
    theirs.encode_special_tokens = True
    for text in [*SPECIAL_TOKENS, *SPECIAL_LOOKING]:
        assert theirs.encode(text).ids == tokenizer.encode(text)


def test_the_way_back(tokenizer, tmp_path):
    save_hf_tokenizer(tokenizer, tmp_path, 64)
    assert load_hf_tokenizer(tmp_path).fields() == {**tokenizer.fields(), "name": "rustbpe"}


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content["model"].update(type="WordPiece"),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["model"]["vocab"].update({"\u00a0 ": 3}),  # a space is spelled otherwise
        lambda content: content.update(added_tokens=[]),
    ],
)
def test_another_tokenizer_is_refused(tokenizer, tmp_path, change):
    save_hf_tokenizer(tokenizer, tmp_path, 64)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer of an exported Saint Iberis model"):
        load_hf_tokenizer(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no tokenizer"):
        load_hf_tokenizer(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_hf_tokenizer(tmp_path)
