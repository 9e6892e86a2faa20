"""StreamDecoder: characters as soon as they are complete, and the same text as tokenizer.decode."""

import random

import pytest

from nanochat.decode.stream_decoder import StreamDecoder
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.mark.parametrize("character", ["\u00f1", "\u732b", "\U0001f63a"])
def test_a_character_comes_with_its_last_byte(tokenizer, character):
    """Decoding token by token broke emoji and CJK: each byte of a character became U+FFFD."""
    ids = tokenizer.encode(character)
    assert len(ids) == len(character.encode()) > 1  # none is in the vocabulary, so each byte is a token
    decoder = StreamDecoder(tokenizer)
    assert [decoder.feed(id) for id in ids] == [""] * (len(ids) - 1) + [character]
    assert decoder.flush() == ""


def test_characters_joined_from_several(tokenizer):
    text = "a \U0001f469\u200d\U0001f680 \u732b\u304c\u597d\u304d! \U0001f1ef\U0001f1f5"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_complete_characters_are_not_held_back(tokenizer):
    decoder = StreamDecoder(tokenizer)
    for id in tokenizer.encode("the river, the bridge"):
        assert decoder.feed(id) == tokenizer.decode([id])


def test_flush_ends_a_broken_character_and_resets_the_decoder(tokenizer):
    decoder = StreamDecoder(tokenizer)
    first, *_, last = tokenizer.encode("\U0001f63a")
    assert decoder.feed(first) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
    assert decoder.feed(last) == "\ufffd"  # a last byte alone: no byte of the first text is left
    assert "".join(map(decoder.feed, tokenizer.encode("\u732b"))) == "\u732b"


def test_the_text_of_any_ids_equals_decode(tokenizer):
    """Random bytes, valid or not, in tokens of any length."""
    rng = random.Random(0)
    ordinary = tokenizer.get_vocab_size() - len(tokenizer.get_special_tokens())
    for _ in range(200):
        ids = [rng.randrange(ordinary) for _ in range(rng.randrange(30))]
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_an_unknown_token(tokenizer):
    with pytest.raises(KeyError):
        StreamDecoder(tokenizer).feed(tokenizer.get_vocab_size())
