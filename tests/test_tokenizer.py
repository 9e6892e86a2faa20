"""The tokenizer: vocabulary, files that can be trusted, and conversations cut to any length."""

import contextlib
import json
import os
import pickle
import random
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

VOCAB_SIZE = 350
BYTES = {bytes([byte]): byte for byte in range(256)}
WORDS = [
    *(
        "the",
        "of",
        "and",
        "a",
        "river",
        "bridge",
        "water",
        "light",
        "1887",
        "3.14",
        "isn't",
        "they've",
        "stone,",
    ),
    *(
        "over;",
        "under!",
        "\u00e9t\u00e9",
        "\u00fcber",
        "\ud55c\uad6d\uc5b4",
        "\u65e5\u672c\u8a9e",
        "\U0001f680",
    ),
    *("def", "return", "x**2", "==", "{}", "\n", "\n\n", "\t"),
]
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


def training_texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=200)) for _ in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(training_texts()), VOCAB_SIZE)


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
def test_nothing_to_learn_from(texts):
    with pytest.raises(ValueError, match="empty"):
        RustBPETokenizer.train_from_iterator(texts, VOCAB_SIZE)


def test_short_text_gives_the_honest_smaller_vocabulary(caplog):
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
def test_same_ids_as_the_trainer_and_back(tokenizer, trainer, text):
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
    with pytest.raises(ValueError, match=r"'<\|nobody\|>' is not a special token"):
        encode(prepend="<|nobody|>")


@pytest.mark.parametrize("space", [" ", "\t", "\u3000"])
def test_a_million_spaces(tokenizer, space):
    """tiktoken's regex engine panics on them, with an exception that is no Exception."""
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
def test_nanochats_pickle_alone_serves_the_published_program(tokenizer, tmp_path, protocol):
    (tmp_path / PICKLE_FILE).write_bytes(pickle.dumps(tokenizer.enc, protocol))
    loaded = RustBPETokenizer.from_directory(str(tmp_path))
    assert_same(loaded, tokenizer)
    loaded.bos_token_id = loaded.enc.encode_single_token("<|bos|>")
    loaded.stop_tokens = {loaded.enc.encode_single_token("<|assistant_end|>"), loaded.bos_token_id}
    assert loaded.decode([loaded.enc.encode_single_token("<|assistant_end|>")]) == "<|assistant_end|>"


def test_other_encodings_can_be_saved(tmp_path, monkeypatch):
    """tiktoken pickles what is in its registry as a mere name, which would have to be downloaded again."""
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
def test_save_that_is_cut_short_leaves_one_tokenizer(tokenizer, tmp_path, monkeypatch, writer, survivor):
    RustBPETokenizer.train_from_iterator(training_texts(), VOCAB_SIZE - 1).save(tmp_path)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(writer, full_disk)
    with pytest.raises(OSError, match="No space"):
        tokenizer.save(tmp_path)
    size = RustBPETokenizer.from_directory(tmp_path).get_vocab_size()
    assert size == {"old": VOCAB_SIZE - 1, "new": VOCAB_SIZE}[survivor]


class Calls:
    """Pickles as a call of `function(*args)`, which is made when the pickle is read."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pickled_encoding(fields):
    """A pickle of a tiktoken.Encoding with anything at all for its fields."""
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
    """nanochat unpickles the tokenizer of a downloaded checkpoint, and so runs whatever its author likes."""
    marker = tmp_path / "marker"
    evil = EVIL_PICKLES[kind](marker)
    with contextlib.suppress(Exception):
        pickle.loads(evil)  # noqa: S301 to see that it works
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


# ---------------------------------------------------------------------------------------------------------
# Conversations


def chat(*texts, system=None):
    """user, assistant, user ... in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


@pytest.fixture(scope="module")
def spell(tokenizer):
    """Spell ids: names of special tokens as they are, other texts encoded."""

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
    shown = tokenizer.visualize_tokenization(ids, mask)
    assert shown.count("\033[32m") == sum(mask)
    assert "\033[31m<|bos|>\033[0m|" in shown


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
        ([("assistant", "x")], "message 0 has role 'assistant' where 'user' is due"),
        ([("user", "x"), ("user", "y")], "message 1 has role 'user' where 'assistant' is due"),
        ([("system", "x"), ("assistant", "y")], "message 1 has role 'assistant' where 'user' is due"),
        (
            [("user", "x"), ("assistant", "y"), ("system", "z")],
            "message 2 has role 'system' where 'user' is due",
        ),
        ([("user", "x"), (None, "y")], "message 1 has role None"),
        ([("user", "x"), ("assistant", "")], "message 1 is empty"),
        ([("user", "x"), ("assistant", [])], "message 1 is empty"),
        ([("user", None)], "message 0 is empty"),
        ([("user", [{"type": "text", "text": "x"}])], r"message 0 has \[.* where text is due"),
        ([("user", "x"), ("assistant", 7)], "message 1 has 7 where text is due"),
        (
            [("user", "x"), ("assistant", [{"type": "image", "text": "x"}])],
            "message 1 has a part of type 'image'",
        ),
        ([("user", "x"), ("assistant", [{"type": "text"}])], "message 1 has None where text is due"),
    ],
)
def test_malformed_conversations(tokenizer, messages, message):
    conversation = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(ValueError, match=message):
        tokenizer.render_conversation(conversation)
    with pytest.raises(ValueError, match=message):
        tokenizer.render_for_completion(conversation)


LONG_CHAT = (
    "a river and a bridge over the water",
    "it is light",
    "who isn't?",
    "they've stone",
    "and 1887?",
    "def",
)


def assert_well_formed(tokenizer, ids, open_end):
    """bos, then user and assistant blocks in turn; the last may lack its end."""
    marks = [tokenizer.id_to_token(id) for id in ids if id >= VOCAB_SIZE - 9]
    block = ["<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
    blocks = ["<|bos|>", *block * (len(marks) // 4 + 1)]
    assert marks == blocks[: len(marks)]
    assert ids[0] == tokenizer.get_bos_token_id()
    assert marks[-1] == "<|assistant_end|>" or (open_end and marks[-1] == "<|assistant_start|>")


def test_conversation_cut_at_every_length(tokenizer):
    """Whole exchanges from the start; within the first one, always something to learn."""
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
    """nanochat cut on the right: a long question lost its answer, and the loss was NaN."""
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
        if kept_r != r:  # the question gave way down to half of the room
            assert len(kept_q) == min(len(q), (max_tokens - 3) // 2)


def test_completion_cut_at_every_length(tokenizer, spell):
    """nanochat cut on the right: the last question went first, and <|user_end|> with it."""
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


@pytest.mark.parametrize("max_tokens", [-1, 0, 5])
def test_too_few_tokens_for_any_conversation(tokenizer, max_tokens):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(ValueError, match=f"max_tokens={max_tokens} must be 6 at least"):
            render(chat("Hi", "Hello"), max_tokens=max_tokens)
