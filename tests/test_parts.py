"""Parts of a reply: parsing is the way back from what chat_format renders."""

import random

import pytest

from nanochat.chat_format import PART_TYPES
from nanochat.decode.parts import PartTracker, ReplyParser
from tests.helpers.vocabulary import train_tokenizer

CALL = ("<|python_start|>", "12*7", "<|python_end|>")
RESULT = ("<|output_start|>", "84", "<|output_end|>")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def ids(tokenizer):
    """Token ids of texts and of names of special tokens."""

    def ids(*texts):
        special = tokenizer.get_special_tokens()
        parts = [[tokenizer.encode_special(t)] if t in special else tokenizer.encode(t) for t in texts]
        return [id for part in parts for id in part]

    return ids


def parse(tokenizer, tokens):
    parser = ReplyParser(tokenizer)
    deltas = [parser.feed(token) for token in tokens]
    deltas.append(parser.flush())
    assert "".join(delta.text for delta in deltas) == "".join(part["text"] for part in parser.parts)
    return parser.parts


def test_parts_of_a_rendered_reply(tokenizer):
    """Random parts with text: rendering puts no token between two texts, so they come back as one."""
    rng = random.Random(0)
    for _ in range(100):
        types = rng.choices(PART_TYPES, k=rng.randint(1, 6))
        parts = [{"type": t, "text": rng.choice(["12*7", "the river", "\U0001f680"])} for t in types]
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": parts}]
        tokens, _ = tokenizer.render_conversation({"messages": messages})
        start = tokens.index(tokenizer.encode_special("<|assistant_start|>")) + 1
        expected = []
        for part in parts:
            if expected and part["type"] == expected[-1]["type"] == "text":
                expected[-1] = {"type": "text", "text": expected[-1]["text"] + part["text"]}
            else:
                expected.append(part)
        found = parse(tokenizer, tokens[start:-1])
        assert [part for part in found if part["text"]] == expected


@pytest.mark.parametrize(
    ("texts", "parts"),
    [
        ((), [("text", "")]),
        (("a", *CALL, *RESULT, "b"), ["a", ("python", "12*7"), "", ("python_output", "84"), "b"]),
        (CALL[:2], ["", ("python", "12*7")]),
        (("<|python_start|>", *CALL), ["", ("python", ""), ("python", "12*7"), ""]),
        ((*CALL[:2], *RESULT), ["", ("python", "12*7"), ("python_output", "84"), ""]),
        (("a", "<|python_end|>", "b"), ["a", "b"]),
    ],
)
def test_parts(tokenizer, ids, texts, parts):
    expected = [("text", part) if isinstance(part, str) else part for part in parts]
    assert [(part["type"], part["text"]) for part in parse(tokenizer, ids(*texts))] == expected


def test_a_part_that_ends_within_a_character(tokenizer, ids):
    first, *_ = ids("\U0001f680")
    found = parse(tokenizer, [first, *ids(*CALL), first])
    assert [part["text"] for part in found] == ["\ufffd", "12*7", "\ufffd"]


def test_types_of_parts(tokenizer, ids):
    tracker = PartTracker(tokenizer)
    start, end, output_start, output_end, other = ids(
        "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>", "<|user_start|>"
    )
    tokens = [5, start, 5, other, end, output_start, output_end, end, start, start, output_end]
    assert [tracker.feed(token) for token in tokens] == [
        *(None, "text", None, None, "python", "text", "python_output", "text"),
        *("text", "python", "python"),
    ]
    assert tracker.type == "text"


def test_tokens_that_only_occur_after_a_reply(tokenizer, ids):
    names = ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
    assert ReplyParser(tokenizer).ends == set(ids(*(f"<|{name}|>" for name in names)))
