"""Training conversations: rows that SmolTalk drops, and errors in files of your own."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.customjson import CustomJSON
from tasks.smoltalk import SmolTalk, well_formed
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def chat(*turns):
    """Return messages, given as "u:text", "a:text", "s:text" and "t:text"."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


GOOD = [
    chat("u:Hi", "a:Hello"),
    chat("s:Be brief.", "u:Hi", "a:Hello"),
    chat("u:Hi", "a:Hello", "u:\u00e9t\u00e9?", "a: "),
]
BAD = [
    [],
    chat("u:", "a:Hello"),
    chat("u:Hi", "a:"),
    chat("s:", "u:Hi", "a:Hello"),
    chat("u:Hi"),
    chat("s:Be brief."),
    chat("s:Be brief.", "u:Hi"),
    chat("a:Hello", "u:Hi"),
    chat("s:Be brief.", "a:Hello"),
    chat("u:Hi", "u:Hi", "a:Hello", "a:Hello"),
    chat("u:Hi", "a:Hello", "s:Be brief.", "a:Hello"),
    chat("u:Hi", "a:Hello", "u:Bye"),
    chat("u:Hi", "t:Hello"),
    chat("s:One.", "s:Two.", "u:Hi", "a:Hello"),
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}],
    [{"role": None, "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
]


def column(*chunks):
    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    return pa.chunked_array([pa.array(chunk, pa.list_(message)) for chunk in chunks])


# ---------------------------------------------------------------------------------------------------------
# SmolTalk


def test_well_formed():
    assert well_formed(column(GOOD)).tolist() == [True] * len(GOOD)
    assert well_formed(column(BAD)).tolist() == [False] * len(BAD)
    assert well_formed(column([None, [None], GOOD[0]])).tolist() == [False, False, True]


def test_well_formed_does_not_depend_on_chunks():
    rng = np.random.default_rng(0)
    pool = [(messages, True) for messages in GOOD] * 4 + [(messages, False) for messages in BAD]
    drawn = [pool[i] for i in rng.integers(len(pool), size=200)]
    rows, expected = [messages for messages, _ in drawn], [is_good for _, is_good in drawn]
    assert well_formed(column(rows)).tolist() == expected
    assert well_formed(column(rows[:1], [], rows[1:90], rows[90:])).tolist() == expected
    assert well_formed(column(rows).slice(7, 100)).tolist() == expected[7:107]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_smoltalk_drops_malformed_rows_and_keeps_the_order(tokenizer, tmp_path, caplog, file_format):
    numbered = [chat(f"u:{i}", f"a:{i}" if i not in (0, 9) else "a:") for i in range(10)]
    path = tmp_path / f"rows.{file_format}"
    if file_format == "jsonl":
        path.write_text("".join(json.dumps({"messages": m, "source": "x"}) + "\n" for m in numbered))
    else:
        pq.write_table(pa.table({"source": ["x"] * 10, "messages": column(numbered)}), path, row_group_size=3)
    with caplog.at_level("INFO"):
        task = SmolTalk("train", path=path)
    assert "dropped 2 of 10 conversations" in caplog.text
    # the order of the datasets library is 5 6 0 7 3 2 4 9 1 8
    assert list(task) == [{"messages": numbered[i]} for i in (5, 6, 7, 3, 2, 4, 1, 8)]
    assert len(SmolTalk("train", path=path, stop=3)) == 3
    for conversation in task:
        tokenizer.render_conversation(conversation)


def test_smoltalk_keeps_the_system_message(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": GOOD[1]}) + "\n")
    conversation = SmolTalk("test", path=path)[0]
    assert conversation == {"messages": GOOD[1]}
    merged = {"messages": chat("u:Be brief.\n\nHi", "a:Hello")}
    assert tokenizer.render_conversation(conversation) == tokenizer.render_conversation(merged)


def test_smoltalk_on_the_hub(monkeypatch):
    class Called(Exception):
        pass

    def load_rows(*args):
        raise Called(*args)

    monkeypatch.setattr("tasks.smoltalk.load_rows", load_rows)
    with pytest.raises(Called) as call:
        SmolTalk("test")
    assert call.value.args == ("HuggingFaceTB/smol-smoltalk", None, "test", ("messages",), None)
    with pytest.raises(ValueError, match="split='val' must be one of train, test"):
        SmolTalk("val")


# ---------------------------------------------------------------------------------------------------------
# CustomJSON


def write(tmp_path, *values):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_customjson_accepts_both_formats_and_keeps_the_order(tokenizer, tmp_path):
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
    with_call = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": parts}]
    path = write(tmp_path, {"messages": GOOD[0], "id": 1}, GOOD[1], GOOD[2], {"messages": with_call})
    task = CustomJSON(path)
    assert list(task) == [{"messages": messages} for messages in (*GOOD, with_call)]
    assert list(CustomJSON(str(path), start=1, step=2)) == [{"messages": GOOD[1]}, {"messages": with_call}]
    for conversation in task:
        tokenizer.render_conversation(conversation)


@pytest.mark.parametrize("messages", BAD)
def test_customjson_refuses_what_smoltalk_drops(tmp_path, messages):
    with pytest.raises(ValueError, match=r"own\.jsonl, line 2: "):
        CustomJSON(write(tmp_path, GOOD[0], messages))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"conversation": GOOD[0]}, r'expected {"messages": \[{"role": ..., "content": ...}'),
        ("Hi", "expected"),
        (["Hi"], "expected"),
        (chat("u:Hi", "u:Hi"), "message 1 has role 'user', expected 'assistant'"),
        (chat("s:Be brief.", "a:Hi"), "message 1 has role 'assistant', expected 'user'"),
        (chat("u:Hi", "a:"), "message 1 has content '', expected non-empty text"),
        ([{"role": "user", "content": ["Hi"]}], r"message 0 has content \['Hi'\], expected non-empty text"),
        ([{"role": "user", "content": "\ud800"}], "surrogates not allowed"),
        (chat("u:Hi", "a:Hello", "u:Bye"), "the last of the 3 messages must be from the assistant"),
        ([*chat("u:Hi"), {"role": "assistant", "content": []}], r"message 1 has content \[\], expected non"),
        (
            [*chat("u:Hi"), {"role": "assistant", "content": ["Hi"]}],
            "type of part 'Hi' must be one of text, ",
        ),
        (
            [*chat("u:Hi"), {"role": "assistant", "content": [{"type": "image", "text": "x"}]}],
            "must be one of text, python",
        ),
        (
            [*chat("u:Hi"), {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
            "message 1 has content '', expected non-empty text",
        ),
    ],
)
def test_customjson_errors(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"line 1: .*{message}"):
        CustomJSON(write(tmp_path, value))


def test_customjson_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        CustomJSON(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="has no conversations"):
        CustomJSON(write(tmp_path))
    path = write(tmp_path, GOOD[0])
    path.write_text(path.read_text() + "\n{")
    with pytest.raises(ValueError, match=r"own\.jsonl, line 3: not JSON"):
        CustomJSON(path)
