"""From tokens to text: whole characters, stop strings, the calculator, log probabilities."""

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
    """Let a sample take what a script says, and return its pieces."""
    tokens = [Token(0, id) for piece in script for id in backend.ids(piece)]
    return [sample.feed(event) for event in (*tokens, End(0, "length"))]


# ---------------------------------------------------------------------------------------------------------
# Text and stop strings


def test_characters_come_whole(tokenizer, backend):
    sample = Sample(tokenizer)
    pieces = play(sample, backend, *byte_ids(tokenizer, f"a{ROCKET}b"))
    assert [piece.text for piece in pieces] == ["a", "", "", "", ROCKET, "b", ""]
    assert (sample.text, sample.finish, sample.num_tokens) == (f"a{ROCKET}b", "length", 6)


def test_a_character_that_never_completes_shows(tokenizer, backend):
    """It was lost: nothing flushed the decoder at the end."""
    sample = Sample(tokenizer)
    play(sample, backend, *byte_ids(tokenizer, ROCKET)[:2])
    assert sample.text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "said"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one EEND", ["END"], "one E"),
        ("END", ["END"], ""),
        ("one EN", ["END"], "one EN"),  # all that was held back comes at the end
        ("aabaabaac", ["aabaac"], "aab"),
        ("abcd", ["abcd", "bc"], "a"),  # complete first
        ("abc", ["c", "abc"], ""),  # complete at the same time: the longer one
        (f"{ROCKET}\n\nx", ["\n\n"], ROCKET),
        (f"x{ROCKET}y", [ROCKET], "x"),
    ],
)
def test_stop_strings(tokenizer, backend, text, stops, said):
    """However the text is cut into tokens, no part of a stop string is said, not even for a while."""
    for ids in (byte_ids(tokenizer, text), tokenizer.encode(text)):
        sample = Sample(tokenizer, stops)
        so_far = ""
        for piece in play(sample, backend, *ids):
            so_far += piece.text
            assert said.startswith(so_far)
        assert so_far == sample.text == said
        assert sample.finish == ("length" if find_stop(text, stops) is None else "stop")


def test_stop_strings_of_random_texts(tokenizer, backend):
    """Against the definition: the text up to the stop string that is the first to be complete."""
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]
        said = text
        for end in range(1, len(text) + 1):
            ending = [stop for stop in stops if text[:end].endswith(stop)]
            if ending:
                said = text[: end - len(max(ending, key=len))]
                break
        sample = Sample(tokenizer, stops)
        play(sample, backend, *byte_ids(tokenizer, text))
        assert sample.text == said, (text, stops)


def test_text_is_held_back_no_longer_than_needed(tokenizer, backend):
    pieces = play(Sample(tokenizer, ["END"]), backend, *byte_ids(tokenizer, "aENb"))
    assert [piece.text for piece in pieces] == ["a", "", "", "ENb", ""]


def test_nothing_is_said_after_a_stop_string(tokenizer, backend):
    sample = Sample(tokenizer, ["\n"])
    pieces = play(sample, backend, "the river", "\n", "of light")
    assert sample.text == "the river"
    assert [piece.finish for piece in pieces if piece.finish] == ["stop"]


def test_tokens_that_only_come_after_a_reply_end_it(tokenizer, backend):
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
        (("<|python_start|>", "12"), [("12", None)]),  # in the middle of which the tokens were up
        ((*CALL, "<|output_start|>", "8"), [("12*7", "8")]),
        ((*RESULT, "a"), [("", "84"), "a"]),
        (("<|python_end|>", "<|output_end|>", "a"), ["a"]),
    ],
)
def test_calculator(tokenizer, backend, script, shown):
    pieces = play(Sample(tokenizer), backend, *script)
    found = []
    for piece in pieces:
        found += [tuple(piece.tool.values())] if piece.tool else []
        found += [piece.text] if piece.text else []
    assert found == shown


# ---------------------------------------------------------------------------------------------------------
# Log probabilities


def test_tokens_have_the_places_where_they_begin(tokenizer):
    sample = Sample(tokenizer)
    ids = [*tokenizer.encode("the"), *byte_ids(tokenizer, ROCKET), *tokenizer.encode(" of")]
    for place, id in enumerate(ids):
        sample.feed(Token(0, id, logprob=-float(place)))
    sample.feed(End(0, "stop"))
    starts = [start for start, _ in sample.scored]
    lengths = [0] + [len(tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")) for i in range(len(ids) - 1)]
    assert starts == lengths
    assert [token.logprob for _, token in sample.scored] == [-float(i) for i in range(len(ids))]


def test_tokens_come_with_their_text(tokenizer):
    """Tokens that are held back wait with their text, and those of a stop string are never told."""
    sample = Sample(tokenizer, ["END"])
    pieces = [sample.feed(Token(0, id, logprob=-1.0)) for id in byte_ids(tokenizer, "aENbEND")]
    assert [len(piece.scored) for piece in pieces] == [1, 0, 0, 3, 0, 0, 0]
    assert [start for start, _ in sample.scored] == [0, 1, 2, 3]


def test_what_the_calculator_says_has_no_place_in_the_text(tokenizer, backend):
    sample = Sample(tokenizer)
    for piece in ("a", *CALL, *RESULT, "b"):
        for id in backend.ids(piece):
            sample.feed(Token(0, id, logprob=-1.0))
    assert [token.token for _, token in sample.scored] == [*backend.ids("a"), *backend.ids("b")]
