"""Tasks with known answers, on rows defined here: exact prompts, correct and wrong answers."""

import json
from decimal import Decimal

import pytest

from tasks.arc import ARC
from tasks.gsm8k import GSM8K, extract_answer
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def rows(tmp_path):
    """Write rows to a file and return its path."""

    def write(*values):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return path

    return write


def learned(tokenizer, conversation):
    """Return the text that the model learns to produce in a conversation."""
    ids, mask = tokenizer.render_conversation(conversation)
    return tokenizer.decode([id for id, is_learned in zip(ids, mask, strict=True) if is_learned])


# ---------------------------------------------------------------------------------------------------------
# ARC and MMLU

ONLY = "Respond only with the letter of the correct answer."


def arc_row(texts, labels, key):
    return {
        "id": "x",
        "question": "Which floats?",
        "choices": {"text": list(texts), "label": list(labels)},
        "answerKey": key,
    }


@pytest.mark.parametrize(
    ("texts", "labels", "key", "listed"),
    [
        (("iron", "cork", "lead", "gold"), "ABCD", "B", "- iron=A\n- cork=B\n- lead=C\n- gold=D"),
        (("iron", "lead", "gold", "cork"), "1234", "4", "- iron=1\n- lead=2\n- gold=3\n- cork=4"),
        (("cork", "lead", "gold"), "123", "1", "- cork=1\n- lead=2\n- gold=3"),
        (
            ("tin", "lead", "gold", "cork", "iron"),
            "ABCDE",
            "D",
            "- tin=A\n- lead=B\n- gold=C\n- cork=D\n- iron=E",
        ),
    ],
)
def test_arc_keeps_its_labels(tokenizer, rows, texts, labels, key, listed):
    task = ARC("ARC-Easy", "train", path=rows(arc_row(texts, labels, key)))
    conversation = task[0]
    assert conversation == {
        "messages": [
            {"role": "user", "content": f"Multiple Choice question: Which floats?\n{listed}\n\n{ONLY}"},
            {"role": "assistant", "content": key},
        ],
        "letters": list(labels),
    }
    assert task.eval_type == "categorical"
    assert [letter for letter in labels if task.evaluate(conversation, letter)] == [key]
    assert learned(tokenizer, conversation) == f"{key}<|assistant_end|>"


def test_arc_checks_its_settings_and_rows(rows):
    bad = [{**arc_row((), (), "A"), "choices": ["iron", "cork"]}, arc_row(("iron", "cork"), "A", "A")]
    for row in (arc_row(("iron", "cork"), "AB", "C"), *bad):
        path = rows(row)
        with pytest.raises(ValueError, match=r"of 'Which floats\?' has choices=.*iron.*, answerKey='.': c"):
            ARC("ARC-Challenge", "test", path=path)[0]
    with pytest.raises(ValueError, match="subset='ARC' must be one of ARC-Easy, ARC-Challenge"):
        ARC("ARC", "test", path=path)
    with pytest.raises(ValueError, match="split='val' must be one of train, validation, test"):
        ARC("ARC-Easy", "val", path=path)


def test_mmlu_by_hand(tokenizer, rows):
    path = rows({"question": "2+2?", "subject": "sums", "choices": ["3", "5", "4", "6"], "answer": 2})
    task = MMLU("all", "auxiliary_train", path=path)
    conversation = task[0]
    assert conversation == {
        "messages": [
            {
                "role": "user",
                "content": f"Multiple Choice question: 2+2?\n- 3=A\n- 5=B\n- 4=C\n- 6=D\n\n{ONLY}",
            },
            {"role": "assistant", "content": "C"},
        ],
        "subject": "sums",
        "letters": ["A", "B", "C", "D"],
    }
    assert task.eval_type == "categorical"
    assert [letter for letter in "ABCD" if task.evaluate(conversation, letter)] == ["C"]
    assert task.reward(conversation, "C") == 1
    assert learned(tokenizer, conversation) == "C<|assistant_end|>"


@pytest.mark.parametrize(
    ("choices", "answer"),
    [("wxyz", "B"), ("wxyz", -1), ("wxyz", 4), ("wxyz", 1.0), ("wxyz", None), ("wxy", 1), ("vwxyz", 1)],
)
def test_mmlu_row_without_an_answer_is_an_error(rows, choices, answer):
    """Regression: -1 was silently D; other values were a TypeError, an IndexError or an error of zip."""
    path = rows({"question": "Which?", "subject": "", "choices": list(choices), "answer": answer})
    with pytest.raises(
        ValueError, match=f"row of 'Which\\?' has choices=.*, answer={answer!r}: choices must"
    ):
        MMLU("all", "test", path=path)[0]
    path = rows({"question": "Which?", "subject": "", "choices": choices, "answer": 0})
    with pytest.raises(ValueError, match=f"choices='{choices}', answer=0: choices must be a list of four"):
        MMLU("all", "test", path=path)[0]


def test_mmlu_auxiliary_train_is_a_split(rows):
    """Regression: in the hub's subset of that name, rows are nested one level deeper."""
    with pytest.raises(ValueError, match='subset="all", split="auxiliary_train"'):
        MMLU("auxiliary_train", "train", path=rows())
    with pytest.raises(ValueError, match="subset='anatomy' must be one of all"):
        MMLU("anatomy", "test", path=rows())
    with pytest.raises(ValueError, match="split='train' must be one of auxiliary_train, dev"):
        MMLU("all", "train", path=rows())


@pytest.mark.parametrize(
    ("make", "repo", "subset", "split"),
    [
        (lambda: ARC("ARC-Easy", "validation"), "allenai/ai2_arc", "ARC-Easy", "validation"),
        (lambda: ARC("ARC-Challenge", "test"), "allenai/ai2_arc", "ARC-Challenge", "test"),
        (lambda: MMLU("all", "auxiliary_train"), "cais/mmlu", "all", "auxiliary_train"),
        (lambda: GSM8K("main", "train"), "openai/gsm8k", "main", "train"),
        (HumanEval, "openai/openai_humaneval", "openai_humaneval", "test"),
    ],
)
def test_names_on_the_hub(monkeypatch, make, repo, subset, split):
    calls = []

    def load_rows(*args):
        calls.append((*args[:3], args[4]))
        return []

    for module in ("arc", "mmlu", "gsm8k", "humaneval"):
        monkeypatch.setattr(f"tasks.{module}.load_rows", load_rows)
    make()
    assert calls == [(repo, subset, split, None)]


def test_slices_of_a_task(rows):
    path = rows(*({"question": str(i), "answer": "#### 1"} for i in range(10)))

    def questions(**bounds):
        return [c["messages"][0]["content"] for c in GSM8K("main", "train", path=path, **bounds)]

    assert questions() == list("5607324918"), "the order is not that of the datasets library"
    assert questions(start=1, stop=6, step=2) == list("672")


# ---------------------------------------------------------------------------------------------------------
# GSM8K


def gsm8k(rows, answer):
    return GSM8K("main", "train", path=rows({"question": "How many?", "answer": answer}))


def test_gsm8k_calculations_become_calls(tokenizer, rows):
    task = gsm8k(rows, "She sold 48/2 = <<48/2=24>>24 in May.\nIn all <<48+24=72>>72.\n#### 72")
    parts = [
        {"type": "text", "text": "She sold 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": "24 in May.\nIn all "},
        {"type": "python", "text": "48+24"},
        {"type": "python_output", "text": "72"},
        {"type": "text", "text": "72.\n#### 72"},
    ]
    assert task[0] == {
        "messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": parts}]
    }
    assert task.eval_type == "generative"
    assert learned(tokenizer, task[0]) == (
        "She sold 48/2 = <|python_start|>48/2<|python_end|>24 in May.\nIn all "
        "<|python_start|>48+24<|python_end|>72.\n#### 72<|assistant_end|>"
    )


@pytest.mark.parametrize(
    ("answer", "types"),
    [
        ("Just 7.\n#### 7", ["text"]),
        ("<<1+1=2>>2\n#### 2", ["python", "python_output", "text"]),
        ("<<1+1=2>><<2*.5=1>>\n#### 1", ["python", "python_output", "python", "python_output", "text"]),
    ],
)
def test_gsm8k_has_no_empty_parts(tokenizer, rows, answer, types):
    conversation = gsm8k(rows, answer)[0]
    parts = conversation["messages"][-1]["content"]
    assert [part["type"] for part in parts] == types
    assert all(part["text"] for part in parts)
    tokenizer.render_conversation(conversation)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 18.\n#### 18.", "18"),
        ("####18.0", "18"),
        ("#### $1,080", "1080"),
        ("#### -$5.50.", "-5.5"),
        ("#### -3 degrees", "-3"),
        ("#### .5", "0.5"),
        ("#### 7\n#### 8", "7"),
        ("#### +5", "5"),
        ("#### $ 5", "5"),
        ("#### $-5", "-5"),
        ("#### -$ 5", "-5"),
        ("#### **72**", "72"),
        ("**#### $-1,072.**", "-1072"),
        ("#### 20%", "20"),
        ("#### $20/hour", "20"),
        ("#### 5\n/x", "5"),
        ("#### 10-", "10"),
        ("####\n18 of 20 / 4", "18"),
        ("#### 1 080", "1080"),
        ("#### 1\u00a0080\u202f000 yen", "1080"),
        ("#### 1,234,567.5 in all", "1234567.5"),
        ("#### 18, not 20", "18"),
        ("#### **72** (8 * 9)", "72"),
        ("#### 5 xylophones", "5"),
        ("#### 5 kg", "5"),
        ("#### 3: three", "3"),
    ],
)
def test_answers_are_numbers(text, number):
    """Regression: "18." was not "18", so correct answers at the end of a sentence were wrong."""
    assert extract_answer(text) == Decimal(number)


FRACTIONS = ["#### 3/4", "#### 1/2 and #### 4", "#### 13 / 4", "#### 1.5/2", "#### 1,000/4"]

NO_NUMBERS = ["1,23", "1,0800", "10,80", "1 08", "1,080 000", "2 1/2", "1e5", "2E-3", "0x1F", "0xff", "5k"]
SUMS = ["7 x 6 = 42", "7x6", "$7 * $6", "8+1", "8 + -1", "2**3", "2^3", "**42** = 7 * 6", "3:40", "8 - .5"]
WORDS = ["7 times 6", r"7 \times 6", "7 \u00d7 6", "8 divided by 2", "8 - 2", "8\u20132"]


@pytest.mark.parametrize("text", [*NO_NUMBERS, *SUMS, *WORDS])
def test_the_start_of_something_longer_is_no_answer(text):
    """Regression: "7 x 6 = 42" was taken for 7, "1 080" for 1 and "1,23" for 123."""
    assert extract_answer(f"#### {text}") is None


@pytest.mark.parametrize(
    "text",
    ["", "18", "#### ", "#### eighteen", "#### -", "#### 1-2", "#### 1.2.3", "## 18", "### 18", *FRACTIONS],
)
def test_no_answer(text):
    assert extract_answer(text) is None


def test_gsm8k_compares_values(rows):
    task = gsm8k(rows, "It is <<500*2+80=1080>>1,080.\n#### 1,080")
    correct = ["#### 1080", "So it is:\n#### $1,080.", "#### 1080.00 dollars"]
    wrong = ["1080", "#### 108", "#### -1080", "#### 1080.5", "#### ?", ""]
    assert [task.evaluate(task[0], text) for text in correct] == [True] * 3
    assert [task.evaluate(task[0], text) for text in wrong] == [False] * 6
    assert [task.reward(task[0], text) for text in ("#### 1080", "#### 1")] == [1.0, 0.0]
    unanswered = gsm8k(rows, "Nobody knows.")
    assert not unanswered.evaluate(unanswered[0], "Nobody knows.")


@pytest.mark.parametrize(
    ("reply", "fair", "strict"),
    [
        ("#### 1080", True, True),
        ("#### 1,080", True, True),
        ("So it is #### 1,0,80", False, True),  # commas anywhere
        ("##### 1080", False, True),
        ("#### 1080 x 1", False, True),
        ("#### $1,080", True, False),
        ("#### **1080**", True, False),
        ("####1080", True, False),
        ("####\n1080", True, False),
        ("#### 1080.00", True, False),
        ("#### 1080.", True, False),
        ("#### 1 080", True, False),
        ("#### ? no, #### 1080", False, True),  # the first that is followed by a number
        ("#### 108", False, False),
        ("#### -1080", False, False),
        ("1080", False, False),
    ],
)
def test_fair_and_strict_judge_of_numbers(rows, reply, fair, strict):
    task = gsm8k(rows, "It is <<500*2+80=1080>>1,080.\n#### 1,080")
    bee = SpellingBee(["tree", "apple", "river"], 1, "train")
    for judge in (task, bee):
        assert judge.evaluate(task[0], reply) is fair
        assert judge.evaluate_strict(task[0], reply) is strict


def test_without_a_reference_nothing_is_right(rows):
    unanswered = gsm8k(rows, "Nobody knows.")
    assert not unanswered.evaluate_strict(unanswered[0], "Nobody knows.")
