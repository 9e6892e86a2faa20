"""Rendering of conversations: compared with tokens by hand, malformed input, and cuts to any length."""

import json
import random

import pytest

from nanochat.chat_format import limit_reply
from nanochat.tokenizer import SPECIAL_TOKENS
from tests.helpers.vocabulary import VOCAB_SIZE, WORDS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def chat(*texts, system=None):
    """Return a conversation in which user and assistant take turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


@pytest.fixture(scope="module")
def spell(tokenizer):
    """Return a function that gives the ids of texts and of names of special tokens."""

    def spelled(*pieces):
        return [
            id
            for piece in pieces
            for id in (
                [tokenizer.encode_special(piece)] if piece in SPECIAL_TOKENS else tokenizer.encode(piece)
            )
        ]

    return spelled


def test_conversation_by_hand(tokenizer, spell):
    conversation = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 12*12?<|user_end|>"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "It is "},
                    {"type": "python", "text": "12*12"},
                    {"type": "python_output", "text": "144"},
                    {"type": "text", "text": "144."},
                ],
            },
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "content": "Bye"},
        ]
    }
    before = json.dumps(conversation)
    spans = [
        (0, ["<|bos|>", "<|user_start|>", "Be brief.\n\nWhat is 12*12?<|user_end|>"]),
        (0, ["<|user_end|>", "<|assistant_start|>"]),
        (1, ["It is ", "<|python_start|>", "12*12", "<|python_end|>"]),
        (0, ["<|output_start|>", "144", "<|output_end|>"]),
        (1, ["144.", "<|assistant_end|>"]),
        (0, ["<|user_start|>", "Thanks", "<|user_end|>", "<|assistant_start|>"]),
        (1, ["Bye", "<|assistant_end|>"]),
    ]
    ids, mask = tokenizer.render_conversation(conversation)
    assert ids == [id for _, pieces in spans for id in spell(*pieces)]
    assert mask == [learned for learned, pieces in spans for _ in spell(*pieces)]
    assert json.dumps(conversation) == before


def test_completion_by_hand(tokenizer, spell):
    expected = spell(
        *(
            "<|bos|>",
            "<|user_start|>",
            "Hi",
            "<|user_end|>",
            "<|assistant_start|>",
            "Hello",
            "<|assistant_end|>",
        ),
        *("<|user_start|>", "Who?", "<|user_end|>", "<|assistant_start|>"),
    )
    assert tokenizer.render_for_completion(chat("Hi", "Hello", "Who?")) == expected
    assert (
        tokenizer.render_for_completion(chat("Hi", "Hello", "Who?", "the answer of a data set")) == expected
    )


def test_conversation_without_last_reply(tokenizer, spell):
    ids, mask = tokenizer.render_conversation(chat("Hi"))
    assert ids == spell("<|bos|>", "<|user_start|>", "Hi", "<|user_end|>")
    assert mask == [0] * len(ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "none of the 0 messages is the user's"),
        ([("system", "x")], "none of the 1 messages is the user's"),
        ([("assistant", "x")], "message 0 has role 'assistant' and must have 'user'"),
        ([("user", "x"), ("user", "y")], "message 1 has role 'user' and must have 'assistant'"),
        ([("system", "x"), ("assistant", "y")], "message 1 has role 'assistant' and must have 'user'"),
        (
            [("user", "x"), ("assistant", "y"), ("system", "z")],
            "message 2 has role 'system' and must have 'user'",
        ),
        ([("user", "x"), (None, "y")], "message 1 has role None"),
        ([("user", "x"), ("assistant", "")], "message 1 is empty"),
        ([("user", "x"), ("assistant", [])], "message 1 is empty"),
        ([("user", None)], "message 0 is empty"),
        ([("user", [{"type": "text", "text": "x"}])], r"message 0 has \[.* and must have text"),
        ([("user", "x"), ("assistant", 7)], "message 1 has 7 and must have text"),
        (
            [("user", "x"), ("assistant", [{"type": "image", "text": "x"}])],
            "message 1 has a part of type 'image'",
        ),
        ([("user", "x"), ("assistant", [{"type": "text"}])], "message 1 has None and must have text"),
    ],
)
def test_malformed_conversations(tokenizer, messages, message):
    conversation = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation(conversation)
    with pytest.raises(ValueError, match=message):
        tokenizer.render_for_completion(conversation)


@pytest.mark.parametrize("conversation", [None, {}, {"messages": "x"}, {"messages": ["x"]}])
def test_values_that_are_not_conversations(tokenizer, conversation):
    """These used to be a KeyError or an AttributeError."""
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(ValueError, match="a conversation must be"):
            render(conversation)


LONG_CHAT = (
    "a river and a bridge over the water",
    "it is light",
    "who isn't?",
    "they've stone",
    "and 1887?",
    "def",
)


def assert_well_formed(tokenizer, ids, open_end):
    """Check for bos, then user and assistant blocks in turn; the last may lack its end."""
    marks = [tokenizer.id_to_token(id) for id in ids if id >= VOCAB_SIZE - 9]
    block = ["<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
    blocks = ["<|bos|>", *block * (len(marks) // 4 + 1)]
    assert marks == blocks[: len(marks)]
    assert ids[0] == tokenizer.get_bos_token_id()
    assert marks[-1] == "<|assistant_end|>" or (open_end and marks[-1] == "<|assistant_start|>")


def test_conversation_cut_at_every_length(tokenizer):
    """Whole exchanges are kept from the start; the first one always has tokens to learn."""
    wholes = [tokenizer.render_conversation(chat(*LONG_CHAT[:n]), 10_000) for n in (2, 4, 6)]
    sizes = [len(ids) for ids, _ in wholes]
    for max_tokens in range(6, sizes[-1] + 3):
        ids, mask = tokenizer.render_conversation(chat(*LONG_CHAT), max_tokens)
        assert len(ids) == len(mask) <= max_tokens
        assert sum(mask) > 0
        fitting = [whole for whole, size in zip(wholes, sizes, strict=True) if size <= max_tokens]
        if fitting:
            assert (ids, mask) == fitting[-1]
        else:
            assert len(ids) == max_tokens
        assert_well_formed(tokenizer, ids, open_end=not fitting)


@pytest.mark.parametrize(("question_words", "reply_words"), [(60, 1), (60, 60), (1, 60), (20, 40)])
def test_first_exchange_cut_at_every_length(tokenizer, spell, question_words, reply_words):
    """nanochat cuts on the right: a long question lost its answer, and the loss was NaN."""
    rng = random.Random(1)
    question, reply = (" ".join(rng.choices(WORDS, k=k)) for k in (question_words, reply_words))
    q, r = spell(question), spell("<|assistant_start|>", reply, "<|assistant_end|>")
    for max_tokens in range(6, len(q) + len(r) + 5):
        ids, mask = tokenizer.render_conversation(chat(question, reply), max_tokens)
        middle = ids.index(tokenizer.encode_special("<|user_end|>"))
        kept_q, kept_r = ids[2:middle], ids[middle + 1 :]
        assert ids[:2] == spell("<|bos|>", "<|user_start|>")
        assert kept_q == q[len(q) - len(kept_q) :]
        assert kept_r == r[: len(kept_r)]
        assert mask == [0] * (middle + 2) + [1] * (len(kept_r) - 1)
        assert len(ids) == min(max_tokens, 3 + len(q) + len(r))
        assert len(kept_r) >= min(len(r), 2)
        if kept_r != r:  # the question is cut to half of the room
            assert len(kept_q) == min(len(q), (max_tokens - 3) // 2)


def test_completion_cut_at_every_length(tokenizer, spell):
    """nanochat cuts on the right: the last question and its <|user_end|> were lost first."""
    wholes = [tokenizer.render_for_completion(chat(*LONG_CHAT[n:5]), 10_000) for n in (4, 2, 0)]
    sizes = [len(ids) for ids in wholes]
    question = spell(LONG_CHAT[4])
    for max_tokens in range(6, sizes[-1] + 3):
        ids = tokenizer.render_for_completion(chat(*LONG_CHAT[:5]), max_tokens)
        assert len(ids) <= max_tokens
        fitting = [whole for whole, size in zip(wholes, sizes, strict=True) if size <= max_tokens]
        if fitting:
            assert ids == fitting[-1]
        else:
            tail = question[len(question) - (max_tokens - 4) :]
            assert ids == [
                *spell("<|bos|>", "<|user_start|>"),
                *tail,
                *spell("<|user_end|>", "<|assistant_start|>"),
            ]
        assert_well_formed(tokenizer, ids, open_end=True)


def test_the_system_text_stays_when_exchanges_are_dropped(tokenizer):
    """It is in the oldest exchange, so a long chat lost it first."""
    wholes = [
        tokenizer.render_for_completion(chat(*LONG_CHAT[n:5], system="stone"), 10_000) for n in (4, 2, 0)
    ]
    sizes = [len(ids) for ids in wholes]
    for max_tokens in range(sizes[0], sizes[-1] + 3):
        ids = tokenizer.render_for_completion(chat(*LONG_CHAT[:5], system="stone"), max_tokens)
        fitting = [whole for whole, size in zip(wholes, sizes, strict=True) if size <= max_tokens]
        assert ids == fitting[-1]
        assert tokenizer.decode(ids).startswith("<|bos|><|user_start|>stone\n\n")


def test_a_long_question_leaves_the_system_text_half_of_the_room(tokenizer, spell):
    question = " ".join(random.Random(1).choices(WORDS, k=60))
    preface, words = spell("Be brief.\n\n"), spell(question)
    whole = tokenizer.render_for_completion(chat(question, system="Be brief."), 10_000)
    assert whole[2:-2] == preface + words
    for max_tokens in range(6, len(whole) + 3):
        ids = tokenizer.render_for_completion(chat("Hi", "Hi", question, system="Be brief."), max_tokens)
        assert len(ids) == min(max_tokens, len(whole))
        kept, room = ids[2:-2], max_tokens - 4
        n = min(len(preface), room // 2)
        assert kept[:n] == preface[:n]
        assert kept[n:] == (preface + words)[n:][-(room - n) :]
        assert_well_formed(tokenizer, ids, open_end=True)


@pytest.mark.parametrize("max_tokens", [-1, 0, 5])
def test_too_few_tokens_for_any_conversation(tokenizer, max_tokens):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(ValueError, match=f"max_tokens={max_tokens} must be at least 6"):
            render(chat("Hi", "Hello"), max_tokens=max_tokens)


def test_a_reply_has_half_of_the_context_at_most():
    warnings = []
    assert limit_reply(20, 41, warnings.append) == limit_reply(20, 40, warnings.append) == 20
    assert warnings == []
    assert limit_reply(21, 41, warnings.append) == limit_reply(21, 41) == 20
    assert warnings == ["replies have at most 20 tokens, half of the context, not 21"]
