"""rustbpe against a naive trainer, HF tokenizers, tiktoken, the regex module and the published wheel.

The Rust tests (`cargo test` in rustbpe/) compare the scanner with the regex engine on every character.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex
import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import rustbpe
from scripts import bench_tokenizer

GPT4_PATTERN = rustbpe.Tokenizer().get_pattern()
SPLIT_PATTERN = GPT4_PATTERN.replace("{1,3}", "{1,2}")  # the project's

# Corner cases of the split pattern: contractions with all characters that fold to their letters, whitespace
# of every kind, numbers that are not digits, marks, joiners, emoji, right-to-left, unassigned.
NASTY = (
    "''''sStTdDmMlLvVeErRaZ\u017f\u212a\u0130\u00df    \t\r\n\r\n\x0b\x0c\x85\xa0\u1680\u2003\u2028\u2029"
    "\u202f\u3000\u180e\u200b0123\u0665\u00bd\u2167\U0001d7d8.-_!\u2019\u0301\u0903\u200d\ufe0f\U0001f600"
    "\U0001f469\u4e2d\u3042\u05d0\u0627\u0e01\0\U0010ffff"
)
# Letters, numbers and a sign of Unicode 14, 15, 15.1 and 16, an unassigned character, and two that Python's
# re but not Unicode treats as whitespace: engines with other tables differ here.
NEWEST = (
    NASTY + "\u0870\U0001dff0\U00011f50\U0001e4d0\U0002ebf0\u1c89\ua7da\U00010d40\U00016d40\u0378\x1c\x1f"
)


def nasty_texts(alphabet: str, n_texts: int, max_length: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randint(1, max_length))) for _ in range(n_texts)]


def prose(n_words: int, seed: int = 0) -> list[str]:
    """Return lines of invented words with Zipf-like frequencies, numbers, accents and punctuation."""
    rng = random.Random(seed)
    syllables = [
        "an",
        "the",
        "ro",
        "ti",
        "es",
        "qu",
        "\u00e9",
        "\u4e2d",
        "s",
        "mo",
        "k",
        "'ll",
        "\U0001f600",
        "ing",
    ]
    lexicon = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(800)]
    lexicon += [str(rng.randrange(10**5)) for _ in range(100)]
    weights = [1 / (rank + 1) for rank in range(len(lexicon))]
    words = rng.choices(lexicon, weights, k=n_words)
    separators = rng.choices([" ", ", ", ".\n", "  ", "\n\n"], [30, 4, 2, 1, 1], k=n_words)
    parts = [word + separator for word, separator in zip(words, separators, strict=True)]
    return ["".join(parts[start : start + 50]) for start in range(0, n_words, 50)]


def trained(texts: list[str], vocab_size: int, **settings: object) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **settings)
    return tokenizer


def to_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding(
        "test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={}
    )


def chunk_counts(texts: list[str], pattern: str) -> Counter[bytes]:
    return Counter(chunk.encode() for text in texts for chunk in regex.findall(pattern, text))


def naive_vocabulary(chunks: Counter[bytes], vocab_size: int) -> list[bytes]:
    """The definition: recount all pairs for each merge; the most frequent wins, the smaller among equals."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = {tuple(chunk): count for chunk, count in chunks.items()}
    while len(tokens) < vocab_size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {joined(word, best, len(tokens)): count for word, count in words.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def joined(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    result, index = [], 0
    while index < len(word):
        is_pair = word[index : index + 2] == pair
        result.append(new if is_pair else word[index])
        index += 2 if is_pair else 1
    return tuple(result)


# ---------------------------------------------------------------------------------------------------------
# Merges


@pytest.mark.parametrize("pattern", [GPT4_PATTERN, SPLIT_PATTERN, r"\w+|\s"])
def test_merges_equal_the_naive_trainers(pattern: str) -> None:
    for texts in (prose(3_000), nasty_texts(NASTY, 60, 30), ["aaaa aaaaaaa aaa", "ababab bababa abab"]):
        ranks = trained(texts, 420, pattern=pattern).get_mergeable_ranks()
        expected = naive_vocabulary(chunk_counts(texts, pattern), 420)
        assert ranks == list(zip(expected, range(len(expected)), strict=True))


def test_merges_equal_those_of_hf_tokenizers() -> None:
    """HF breaks ties by character, so byte b is represented as chr(0x100 + b)."""
    texts, alphabet = prose(20_000), [chr(0x100 + byte) for byte in range(256)]
    words = [
        " ".join(
            "".join(alphabet[byte] for byte in chunk.encode()) for chunk in regex.findall(SPLIT_PATTERN, text)
        )
        for text in texts
    ]
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=2_000, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator(words, trainer)
    vocabulary = json.loads(reference.to_str())["model"]["vocab"]

    ranks = trained(texts, 2_000, pattern=SPLIT_PATTERN).get_mergeable_ranks()
    assert vocabulary == {"".join(alphabet[byte] for byte in token): rank for token, rank in ranks}


@pytest.mark.parametrize(
    ("pattern", "digest"),
    [(None, "b23169897f299602"), (SPLIT_PATTERN, "31b5019f6f143162")],
)
def test_merges_equal_those_of_the_published_wheel(pattern: str | None, digest: str) -> None:
    """The digests were computed with the wheel of rustbpe 0.1.0 on the same texts."""
    texts = prose(20_000, seed=1) + nasty_texts(NASTY, 300, 40, seed=1)
    ranks = trained(texts, 3_000, pattern=pattern).get_mergeable_ranks()
    assert hashlib.sha256(repr(ranks).encode()).hexdigest()[:16] == digest


# ---------------------------------------------------------------------------------------------------------
# Chunks


def our_chunks(texts: list[str], pattern: str) -> list[list[str]]:
    """Return the chunks of each text: after training until no pair is left, every chunk is one token."""
    tokenizer = trained(texts, 10**6, pattern=pattern)
    return [[tokenizer.decode([token]) for token in ids] for ids in tokenizer.batch_encode(texts)]


def tiktoken_chunks(texts: list[str], pattern: str) -> list[list[str]]:
    """Return the chunks of each text: with all substrings in the vocabulary, every chunk is one token."""
    substrings = {
        text[i:j].encode() for text in texts for i, j in itertools.combinations(range(len(text) + 1), 2)
    }
    tokens = [bytes([byte]) for byte in range(256)] + [part for part in substrings if len(part) > 1]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [[encoding.decode([token]) for token in encoding.encode_ordinary(text)] for text in texts]


@pytest.mark.parametrize("pattern", [GPT4_PATTERN, SPLIT_PATTERN])
def test_chunks_equal_tiktokens(pattern: str) -> None:
    texts = nasty_texts(NEWEST, 4_000, 10)
    assert our_chunks(texts, pattern) == tiktoken_chunks(texts, pattern)


@pytest.mark.parametrize("pattern", [GPT4_PATTERN, SPLIT_PATTERN])
def test_chunks_equal_the_regex_modules(pattern: str) -> None:
    texts = nasty_texts(NASTY, 3_000, 60) + prose(1_000)
    assert our_chunks(texts, pattern) == [regex.findall(pattern, text) for text in texts]


def test_another_pattern_is_used_as_given() -> None:
    """The pattern's matches do not cover the text: text outside of matches is dropped, as in tiktoken."""
    assert our_chunks(["ab, cd  ef"], r"[a-d]+|x*") == [["ab", "cd"]]
    assert trained(["ab"], 300, pattern=r"[a-d]+|x*").get_pattern() == r"[a-d]+|x*"


# ---------------------------------------------------------------------------------------------------------
# Encoding and decoding


@pytest.mark.parametrize("pattern", [SPLIT_PATTERN, r"\w+|\W"])
def test_export_to_tiktoken_encodes_identically(pattern: str) -> None:
    tokenizer = trained(prose(20_000), 2_000, pattern=pattern)
    encoding = to_tiktoken(tokenizer)
    texts = [*prose(3_000, seed=2), *nasty_texts(NEWEST, 500, 80), "", "an" * 3_000, "anthe" * 3_000]
    expected = [encoding.encode_ordinary(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    assert tokenizer.batch_encode(texts) == expected


def test_any_text_survives_a_round_trip() -> None:
    tokenizer = trained(prose(3_000), 600)
    everything = "".join(map(chr, itertools.chain(range(0xD800), range(0xE000, 0x110000))))
    for text in [everything, *nasty_texts(NEWEST, 300, 100)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_untrained_tokenizer_has_the_bytes() -> None:
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == len(tokenizer.get_mergeable_ranks()) == 256
    assert tokenizer.encode("\u00e9 ") == [0xC3, 0xA9, 0x20]
    assert tokenizer.batch_encode([]) == []


@pytest.mark.parametrize("unit", ["a", "ab", " ", "\n", "'", "1", "\u4e2d", "\u0301", "\U0001f600"])
def test_a_chunk_of_a_million_bytes_is_fast(unit: str) -> None:
    """A loop over all pairs for each merge would be quadratic: minutes for one such chunk."""
    text = unit * (1_000_000 // len(unit.encode()))
    started = time.process_time()
    tokenizer = trained([text], 300)
    ids = tokenizer.encode(text)
    assert time.process_time() - started < 20
    assert tokenizer.decode(ids) == text


# ---------------------------------------------------------------------------------------------------------
# Streaming


def test_merges_do_not_depend_on_how_the_texts_arrive() -> None:
    texts = prose(5_000)
    expected = trained(texts, 700).get_mergeable_ranks()
    for size in (1, 3, 10**6):
        assert trained(texts, 700, buffer_size=size).get_mergeable_ranks() == expected
    assert trained(texts[::-1], 700).get_mergeable_ranks() == expected


def test_training_ends_early_when_no_pair_is_left() -> None:
    tokenizer = trained(["aaaa", "b"], 1_000)
    assert tokenizer.vocab_size == 258
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"aa", 256), (b"aaaa", 257)]
    assert trained([], 1_000).vocab_size == trained(["ab"], 256).vocab_size == 256


MEMORY_PROGRAM = """
import itertools, resource, rustbpe
text = " ".join(f"word{n}" for n in range(20_000)) + "\\u4e2d"
def peak_mb(n_texts):
    rustbpe.Tokenizer().train_from_iterator(itertools.repeat(text, n_texts), 300)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
warm = peak_mb(40)
print(peak_mb(400) - warm)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_text() -> None:
    """80 MB of text with few distinct chunks; a trainer that stored the text would need 80 MB."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 16


def test_other_threads_run_during_training() -> None:
    """Without releasing the GIL there would be no ticks during the merges, in any number of attempts."""
    ticks = itertools.count()
    is_done = threading.Event()

    def tick() -> None:
        while not is_done.is_set():
            next(ticks)
            time.sleep(0.001)

    def texts() -> Iterator[str]:
        yield from prose(400_000)  # enough text for merges that take many milliseconds
        ticks_before.append(next(ticks))

    ticks_before: list[int] = []
    n_ticks: list[int] = []
    thread = threading.Thread(target=tick)
    thread.start()
    while len(n_ticks) < 20 and max(n_ticks, default=0) <= 3:  # on a busy machine the thread waits for a core
        trained(texts(), 20_000)  # the iterator is exhausted before the merges are learned
        n_ticks.append(next(ticks) - ticks_before.pop())
    is_done.set()
    thread.join()
    assert max(n_ticks) > 3, n_ticks


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send SIGINT to a child process")
def test_ctrl_c_stops_an_endless_iterator() -> None:
    """itertools.repeat runs no Python code, which would check for signals."""
    program = "import itertools, rustbpe, signal; t = rustbpe.Tokenizer()\n"
    program += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & ignores SIGINT
    program += "print(flush=True); t.train_from_iterator(itertools.repeat('hello world ' * 100), 300)"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert errors.rstrip().endswith(b"KeyboardInterrupt")


# ---------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        (["ab"], {"vocab_size": 255}, ValueError, "vocab_size=255 must be at least 256"),
        (["ab"], {"vocab_size": -1}, ValueError, "vocab_size=-1 must be at least 256"),
        (["ab"], {"vocab_size": 300.5}, TypeError, "integer"),
        (["ab"], {"buffer_size": 0}, ValueError, "buffer_size=0 must be at least 1"),
        (["ab"], {"pattern": "("}, ValueError, r'pattern="\(" is not a regular expression'),
        (["ab" * 1_000], {"pattern": "(?:a|b|ab)*(?!c)bc"}, ValueError, "the split pattern failed on a text"),
        (["ab", 1], {}, TypeError, "expected texts of type str, got 1"),
        ([b"ab"], {}, TypeError, "expected texts of type str, got b'ab'"),
        (["a\ud800"], {}, ValueError, "surrogates not allowed"),
        (5, {}, TypeError, "not iterable"),
    ],
)
def test_a_failed_training_raises_and_changes_nothing(
    texts: list[str], settings: dict[str, object], error: type[Exception], message: str
) -> None:
    """The published wheel panics below 256 tokens and hangs with buffer_size 0."""
    tokenizer = trained(["ab ab"], 300)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(error, match=message):
        tokenizer.train_from_iterator(texts, **{"vocab_size": 300, **settings})
    assert tokenizer.get_mergeable_ranks() == before


def test_an_error_of_the_iterator_is_propagated() -> None:
    def texts() -> Iterator[str]:
        yield "ab"
        raise LookupError("no more shards")

    with pytest.raises(LookupError, match="no more shards"):
        trained(texts(), 300)


def test_bad_arguments_of_encode_and_decode() -> None:
    tokenizer = trained(["ab"], 300)
    for token in (257, -1, 2**40):
        with pytest.raises(
            ValueError, match=f"unknown token id {token}: the ids of this vocabulary are 0 to 256"
        ):
            tokenizer.decode([token])
    with pytest.raises(UnicodeDecodeError, match="can't decode byte 0xff in position 1"):
        tokenizer.decode([97, 255])
    with pytest.raises(TypeError, match="expected texts of type str, got None"):
        tokenizer.encode(None)
    with pytest.raises(TypeError, match="expected texts of type str, got 1"):
        tokenizer.batch_encode(["a", 1])
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("\udfff")


# ---------------------------------------------------------------------------------------------------------
# The benchmark


@pytest.mark.parametrize("has_wheel", [True, False])
def test_the_benchmark_compares(
    has_wheel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the published wheel it prints both rows; without it, one row and a line that says why."""

    def wheel_python() -> Path:
        if not has_wheel:
            raise OSError("offline")
        return Path(sys.executable)

    monkeypatch.setattr(bench_tokenizer, "wheel_python", wheel_python)
    (tmp_path / "own.txt").write_text("\n\n".join(prose(2_000)), encoding="utf-8")
    settings = ["--max_chars=30000", "--encode_chars=5000", "--vocab_size=400", "--repeats=1"]
    assert bench_tokenizer.main([f"--data={tmp_path / 'own.txt'}", *settings]) == 0
    output = capsys.readouterr().out
    assert ("merges     identical" in output) == has_wheel
    assert ("the published wheel is left out, as it cannot be installed: offline" in output) != has_wheel
    assert "400 tokens" in output
    assert "tokens     identical" in output
