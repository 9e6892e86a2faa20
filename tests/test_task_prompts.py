"""Conversations of ten rows a task against prompts.jsonl: text and ids, written from the protocol by hand."""

import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from tasks.arc import ARC
from tasks.common import TaskMixture, TaskSequence
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.letter_questions import QUESTIONS
from tasks.mmlu import MMLU
from tasks.spellingbee import SimpleSpelling, SpellingBee, _answer
from tests.helpers.vocabulary import train_tokenizer

CASES = [
    json.loads(line) for line in (Path(__file__).parent / "prompts.jsonl").read_text("utf-8").splitlines()
]
LETTER = r"(?P<letter_quote>['\"]?)(?P<letter>[a-z])(?P=letter_quote)"
WORD = r"(?P<word_quote>['\"]?)(?P<word>[a-z]{2,})(?P=word_quote)"
WORDS = [case["row"] for case in CASES if case["task"] == "SimpleSpelling"]


def conversation_of(task, row, path):
    """Return the conversation that a task makes of a row."""
    if task == "SimpleSpelling":
        words = SimpleSpelling([row] * 2, 1, "train" if splits_of([row])["train"] else "test")
        return words[0]
    if task == "SpellingBee":
        return {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": _answer(*row)}]
        }
    path.write_text(json.dumps(row))
    makers = {
        "ARC": partial(ARC, "ARC-Easy", "test"),
        "MMLU": partial(MMLU, "all", "test"),
        "GSM8K": partial(GSM8K, "main", "test"),
        "HumanEval": HumanEval,
    }
    return makers[task](path=path)[0]


def splits_of(words):
    """Return the words of each split."""
    splits = {}
    for split in ("train", "test"):
        try:
            splits[split] = SpellingBee(words, 1, split).words
        except ValueError:
            splits[split] = []
    return splits


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['task']}-{case['row']!s:.30}")
def test_text_and_ids(tokenizer, tmp_path, case):
    conversation = conversation_of(case["task"], case["row"], tmp_path / "row.jsonl")
    ids, _ = tokenizer.render_conversation(conversation)
    assert tokenizer.decode(ids) == case["text"]
    assert ids == case["ids"]
    assert json.loads(json.dumps(conversation)) == conversation


def test_ten_rows_a_task():
    assert set(Counter(case["task"] for case in CASES).values()) == {10}
    splits = splits_of(WORDS)
    assert sorted(splits["train"] + splits["test"]) == sorted(WORDS)


def test_letter_questions():
    """Twenty wordings and more, in seven languages, each with a place for the letter and one for the word."""
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 20
    for question in QUESTIONS:
        assert sorted(re.findall(r"{\w*}", question)) == ["{letter}", "{word}"]
        assert question == question.strip().rstrip("?\uff1f")
    scripts = ("[a-z]", "[ß-ü]", "¿", "[\u3040-\u30ff]", "[\u4e00-\u9fff]", "[\uac00-\ud7af]", "ê|ç|é|ombien")
    for script in scripts:
        assert any(re.search(script, question) for question in QUESTIONS), script


def test_questions_vary_as_published():
    """Nine in ten letters of the word (and some by chance), three in ten in lower case, half with ?."""
    task = SpellingBee(WORDS, 4000, "train")
    patterns = [
        re.escape(question).replace(r"\{letter\}", LETTER).replace(r"\{word\}", WORD)
        for question in QUESTIONS
    ]
    kinds = Counter()
    for conversation in task:
        text = conversation["messages"][0]["content"]
        body = text.removesuffix("?")
        match = next(filter(None, (re.fullmatch(p, body, re.IGNORECASE) for p in patterns)), None)
        assert match, text
        exact = any(re.fullmatch(p, body) for p in patterns)
        call = conversation["messages"][1]["content"][1]["text"]
        assert call == f"'{match['word']}'.count('{match['letter']}')"
        kinds["lower"] += not exact
        kinds["?"] += text != body
        kinds["in the word"] += match["letter"] in match["word"]
        kinds[f"letter in {match['letter_quote']}"] += 1
        kinds[f"word in {match['word_quote']}"] += 1
    assert 0.47 < kinds["?"] / 4000 < 0.53
    assert 0.90 < kinds["in the word"] / 4000 < 0.95
    has_capital = sum(question != question.lower() for question in QUESTIONS) / len(QUESTIONS)
    assert 0.27 < kinds["lower"] / 4000 / has_capital < 0.33
    for quote in ("", "'", '"'):
        for part in ("letter", "word"):
            assert 0.3 < kinds[f"{part} in {quote}"] / 4000 < 0.37


def test_conversations_of_mixtures_are_plain_data():
    """They held their task, which json.dumps refused."""
    bee, spelling = SpellingBee(WORDS, 30, "train"), SimpleSpelling(WORDS, 30, "train")
    mixture = TaskMixture([TaskSequence([bee, spelling]), spelling]).slice(start=1, step=2)
    for index, conversation in enumerate(mixture):
        assert json.loads(json.dumps(conversation)) == conversation
        is_bee = isinstance(conversation["messages"][1]["content"], list)
        assert mixture.part(index) is (bee if is_bee else spelling)
    with pytest.raises(IndexError, match="45"):
        mixture.part(45)
