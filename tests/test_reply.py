"""The text of a sample: whole characters, stop strings, the calculator, log probabilities."""

import random

import pytest

from nanochat.serve.protocol import End, Token
from nanochat.serve.reply import Sample, find_stop
from tests.helpers.fake_backend import FakeBackend
from tests.helpers.vocabulary import train_tokenizer

ROCKET = "\U0001f680"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def backend(tokenizer):
    return FakeBackend(tokenizer)


def byte_ids(tokenizer, text):
    return [tokenizer.enc.encode_single_token(bytes([byte])) for byte in text.encode()]


def play(sample, backend, *script):
    """Feed a script to a sample and return its deltas."""
    tokens = [Token(0, id) for text in script for id in backend.ids(text)]
    return [sample.feed(event) for event in (*tokens, End(0, "length"))]


# ---------------------------------------------------------------------------------------------------------
# Text and stop strings


def test_characters_come_whole(tokenizer, backend):
    sample = Sample(tokenizer)
    deltas = play(sample, backend, *byte_ids(tokenizer, f"a{ROCKET}b"))
    assert [delta.text for delta in deltas] == ["a", "", "", "", ROCKET, "b", ""]
    assert (sample.text, sample.finish, sample.num_tokens) == (f"a{ROCKET}b", "length", 6)


def test_an_incomplete_character_is_shown(tokenizer, backend):
    """It was lost, because the decoder was not flushed at the end."""
    sample = Sample(tokenizer)
    play(sample, backend, *byte_ids(tokenizer, ROCKET)[:2])
    assert sample.text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one EEND", ["END"], "one E"),
        ("END", ["END"], ""),
        ("one EN", ["END"], "one EN"),  # the held text comes at the end
        ("aabaabaac", ["aabaac"], "aab"),
        ("abcd", ["abcd", "bc"], "a"),  # complete first
        ("abc", ["c", "abc"], ""),  # complete at the same time: the longer one
        (f"{ROCKET}\n\nx", ["\n\n"], ROCKET),
        (f"x{ROCKET}y", [ROCKET], "x"),
    ],
)
def test_stop_strings(tokenizer, backend, text, stops, expected):
    """However the text is cut into tokens, no part of a stop string is ever emitted."""
    for ids in (byte_ids(tokenizer, text), tokenizer.encode(text)):
        sample = Sample(tokenizer, stops)
        emitted = ""
        for delta in play(sample, backend, *ids):
            emitted += delta.text
            assert expected.startswith(emitted)
        assert emitted == sample.text == expected
        assert sample.finish == ("length" if find_stop(text, stops) is None else "stop")


def test_stop_strings_of_random_texts(tokenizer, backend):
    """Compare with the definition: the text before the stop string that is complete first."""
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        expected = text
        for end in range(1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                expected = text[: end - len(max(ending, key=len))]
                break
        sample = Sample(tokenizer, stops)
        play(sample, backend, *byte_ids(tokenizer, text))
        assert sample.text == expected, (text, stops)


def test_text_is_held_back_no_longer_than_needed(tokenizer, backend):
    deltas = play(Sample(tokenizer, ["END"]), backend, *byte_ids(tokenizer, "aENb"))
    assert [delta.text for delta in deltas] == ["a", "", "", "ENb", ""]


def test_nothing_comes_after_a_stop_string(tokenizer, backend):
    sample = Sample(tokenizer, ["\n"])
    deltas = play(sample, backend, "the river", "\n", "of light")
    assert sample.text == "the river"
    assert [delta.finish for delta in deltas if delta.finish] == ["stop"]


def test_tokens_that_only_occur_after_a_reply_end_it(tokenizer, backend):
    sample = Sample(tokenizer)
    play(sample, backend, "the river", "<|user_start|>", "of light")
    assert (sample.text, sample.finish) == ("the river", "stop")


# ---------------------------------------------------------------------------------------------------------
# The calculator


CALL = ("<|python_start|>", "12*7", "<|python_end|>")
RESULT = ("<|output_start|>", "84", "<|output_end|>")


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        (("a", *CALL, *RESULT, "b"), ["a", ("12*7", "84"), "b"]),
        (("a", *CALL, "b"), ["a", ("12*7", None), "b"]),
        ((*CALL, *CALL, *RESULT), [("12*7", None), ("12*7", "84")]),
        ((*CALL,), [("12*7", None)]),
        (("<|python_start|>", "12"), [("12", None)]),  # max_tokens in the middle of a call
        ((*CALL, "<|output_start|>", "8"), [("12*7", "8")]),
        ((*RESULT, "a"), [("", "84"), "a"]),
        (("<|python_end|>", "<|output_end|>", "a"), ["a"]),
    ],
)
def test_calculator(tokenizer, backend, script, shown):
    deltas = play(Sample(tokenizer), backend, *script)
    found = []
    for delta in deltas:
        found += [tuple(delta.tool.values())] if delta.tool else []
        found += [delta.text] if delta.text else []
    assert found == shown


# ---------------------------------------------------------------------------------------------------------
# Log probabilities


def test_scored_tokens_have_their_offsets(tokenizer):
    sample = Sample(tokenizer)
    ids = [*tokenizer.encode("the"), *byte_ids(tokenizer, ROCKET), *tokenizer.encode(" of")]
    for place, id in enumerate(ids):
        sample.feed(Token(0, id, logprob=-float(place)))
    sample.feed(End(0, "stop"))
    starts = [start for start, _ in sample.scored]
    lengths = [0] + [len(tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")) for i in range(len(ids) - 1)]
    assert starts == lengths
    assert [token.logprob for _, token in sample.scored] == [-float(i) for i in range(len(ids))]


def test_scored_tokens_come_with_their_text(tokenizer):
    """Tokens of held text wait with it, and those of a stop string are never emitted."""
    sample = Sample(tokenizer, ["END"])
    deltas = [sample.feed(Token(0, id, logprob=-1.0)) for id in byte_ids(tokenizer, "aENbEND")]
    assert [len(delta.scored) for delta in deltas] == [1, 0, 0, 3, 0, 0, 0]
    assert [start for start, _ in sample.scored] == [0, 1, 2, 3]


def test_tokens_of_the_calculator_are_not_scored(tokenizer, backend):
    sample = Sample(tokenizer)
    for text in ("a", *CALL, *RESULT, "b"):
        for id in backend.ids(text):
            sample.feed(Token(0, id, logprob=-1.0))
    assert [token.token for _, token in sample.scored] == [*backend.ids("a"), *backend.ids("b")]
