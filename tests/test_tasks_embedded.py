"""Tasks that need no network: disjoint splits, exact answers, wrong answers that are refused."""

import json
import re
from collections import defaultdict

import pytest

from nanochat.calculator import calculate
from tasks import embedded_mixtures, mixtures
from tasks.arithmetic import Arithmetic
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.stdlib import KINDS, DocChoice, DocQuestion, entries
from tests.helpers.vocabulary import train_tokenizer

WORDS = [a + b + c for a in "bcdfg" for b in "aeiou" for c in "lmnrst"]


def user(conversation):
    return conversation["messages"][0]["content"]


def reply(conversation):
    return conversation["messages"][-1]["content"]


def words_of(task):
    """Return the words that are spelled."""
    text = [reply(conversation) for conversation in task]
    return {re.search(r"^(\w+):", t if isinstance(t, str) else t[0]["text"], re.M)[1] for t in text}


@pytest.mark.parametrize("task_class", [SimpleSpelling, SpellingBee])
def test_no_word_is_in_both_splits(task_class):
    """With negative seeds, test items would be shifted training items: Random(-n) is Random(n)."""
    train, test = (words_of(task_class(WORDS, 300, split)) for split in ("train", "test"))
    assert min(len(train), len(test)) > 10
    assert not train & test


def test_spelling():
    task = SimpleSpelling(["tree"], 5, "train")
    assert user(task[0]) == "Spell the word: tree"
    assert reply(task[0]) == "tree:t,r,e,e"
    assert task.evaluate(task[0], " tree:t,r,e,e\n")
    for wrong in ("tree:t,r,e", "tree:t,r,e,e,e", "t,r,e,e", "tree", ""):
        assert not task.evaluate(task[0], wrong)
    with pytest.raises(ValueError, match="give more words"):
        SimpleSpelling(["tree"], 5, "test")


def test_letters_are_counted_by_hand_and_by_the_calculator():
    task = SpellingBee(WORDS, 50, "train")
    counts = set()
    for i in range(50):
        by_hand, call, output, text = reply(task[i])
        word, letter = re.fullmatch(r"'(\w+)'.count\('(\w)'\)", call["text"]).groups()
        assert output["text"] == calculate(call["text"]) == str(word.count(letter))
        assert by_hand["text"].count("hit!") == word.count(letter)
        assert by_hand["text"].endswith(f"\nBy hand {output['text']}, by Python:")
        assert text["text"] == f"\n#### {output['text']}"
        counts.add(output["text"])
    assert counts == {"0", "1"}
    banana = [reply(SpellingBee(["banana"], 90, "train")[i]) for i in range(90)]
    assert {output["text"] for _, _, output, _ in banana} == {"0", "1", "2", "3"}
    correct = reply(task[0])[2]["text"]
    assert task.evaluate(task[0], f"By hand 5\n#### {correct}")
    assert not task.evaluate(task[0], f"#### {int(correct) + 1}")
    assert not task.evaluate(task[0], f"By hand {correct}")


def test_arithmetic():
    task = Arithmetic(400, "train")
    for i in range(0, 400, 7):
        call, output, text = reply(task[i])
        numbers = [int(n) for n in re.findall(r"\d+", user(task[i]))]
        assert sorted(numbers) == sorted(int(n) for n in re.findall(r"\d+", call["text"]))
        assert output["text"] == calculate(call["text"])
        assert text["text"] == f"#### {output['text']}"
        assert task.evaluate(task[i], text["text"])
        assert not task.evaluate(task[i], text["text"] + "1")
        assert not task.evaluate(task[i], "")
    minus = next(task[i] for i in range(400) if re.fullmatch(r"What is \d+ minus \d+\?", user(task[i])))
    a, b = (int(n) for n in re.findall(r"\d+", user(minus)))
    assert reply(minus)[1]["text"] == str(a - b)


def test_no_pair_of_numbers_is_in_both_splits():
    pairs = [
        {tuple(re.findall(r"\d+", user(task[i]))[:2]) for i in range(1000)}
        for task in (Arithmetic(1000, "train"), Arithmetic(1000, "test"))
    ]
    assert not pairs[0] & pairs[1]


@pytest.mark.slow
def test_splits_of_documentation_questions_share_no_name_and_no_sentence():
    """Regression: 76 test names, such as threading.Barrier.wait, had the sentence of a training name."""
    train, test = DocQuestion("train"), DocQuestion("test")
    for part in (user, reply):
        texts = [{part(task[i]) for i in range(len(task))} for task in (train, test)]
        assert min(map(len, texts)) > 100
        assert not texts[0] & texts[1]
    assert 0.12 < len(test) / len(entries()) < 0.21
    known = {entry.name: entry for entry in entries()}
    assert known["json.dumps"].text.startswith("Serialize ``obj``")
    kinds = ("json.dumps", "json", "json.decoder.JSONDecodeError", "json.decoder.JSONDecoder")
    assert [known[name].kind for name in kinds if name in known] == [
        kind
        for name, kind in zip(kinds, ("function", "module", "exception", "class"), strict=True)
        if name in known
    ]


def test_multiple_choice_is_balanced_and_its_letter_is_correct():
    task = DocChoice(400, "test")
    kinds = defaultdict(set)  # one for a name, possibly several for a sentence
    for entry in entries():
        kinds[f"What is {entry.name}?"].add(entry.kind)
        kinds[f"What is this? {entry.text}"].add(entry.kind)
    letters, orders = [], set()
    for i in range(400):
        question, *lines = user(task[i]).removeprefix("Multiple Choice question: ").split("\n")[:5]
        choices = {line[-1]: line[2:-2] for line in lines}
        assert set(choices.values()) == set(KINDS)
        assert choices[reply(task[i])] in kinds[question]
        letters.append(reply(task[i]))
        orders.add(tuple(choices.values()))
    assert len(orders) == 24
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")
    assert task.evaluate(task[0], reply(task[0]))
    assert not task.evaluate(task[0], next(x for x in "ABCD" if x != reply(task[0])))


def test_alphabetical_choices():
    task = DocChoice(50, "train", alphabetical=1.0)
    assert all(
        user(task[i]).split("\n")[1:5] == ["- class=A", "- exception=B", "- function=C", "- module=D"]
        for i in range(50)
    )
    with pytest.raises(ValueError, match="must be a fraction"):
        DocChoice(50, "train", alphabetical=2)


def test_items_do_not_depend_on_the_order_of_access():
    task = Arithmetic(10, "train")
    backwards = [task[i] for i in reversed(range(10))]
    assert backwards[::-1] == [task[i] for i in range(10)]


def test_tasks_of_your_own_file(tmp_path):
    path = tmp_path / "chat.jsonl"
    roles = (("user", "q"), ("assistant", "a"))
    chats = [[{"role": role, "content": f"{x}{i}"} for role, x in roles] for i in range(41)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for make in (mixtures.mid_tasks, mixtures.sft_tasks):
        train, val = make(str(path))
        questions = [{user(task[i]) for i in range(len(task))} for task in (train, val)]
        assert questions[1] == {"q0", "q20", "q40"}
        assert questions[0] == {f"q{i}" for i in range(41)} - questions[1]


def write_chats(path, questions):
    lines = [[{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] for q in questions]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8-sig")


def questions(task):
    return sorted(user(task[i]) for i in range(len(task)))


def test_your_own_conversations_in_a_folder_or_glob(tmp_path):
    write_chats(tmp_path / "chats" / "a.jsonl", "abc")
    write_chats(tmp_path / "chats" / "b.jsonl", "de")
    (tmp_path / "chats" / "notes.txt").write_text("no conversation")
    for data in (tmp_path / "chats", tmp_path / "*" / "*.jsonl"):
        train, val = mixtures.sft_tasks(str(data))
        assert (questions(train), questions(val)) == (list("bcde"), ["a"])
    with pytest.raises(
        FileNotFoundError, match=r"none of auto, hub and embedded, and no file, folder or glob"
    ):
        mixtures.sft_tasks(str(tmp_path / "chats" / "notes.txt"))
    (tmp_path / "chats" / "b.jsonl").write_text('["d"]\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: expected"):
        mixtures.mid_tasks(str(tmp_path / "chats"))
    write_chats(tmp_path / "one.jsonl", "a")
    with pytest.raises(ValueError, match=r"one\.jsonl has only one conversation; give at least two"):
        mixtures.mid_tasks(str(tmp_path / "one.jsonl"))


def test_your_own_conversations_with_others(tmp_path):
    """--data=PATH alone would make the model forget everything else."""
    write_chats(tmp_path / "others.jsonl", [f"other {i}" for i in range(40)])
    write_chats(tmp_path / "own.jsonl", "abcde")
    others = mixtures.sft_tasks(str(tmp_path / "others.jsonl"))
    assert mixtures.with_own(others, "") == others
    train, val = mixtures.with_own(others, str(tmp_path / "own.jsonl"))
    assert questions(train) == sorted([*questions(others[0]), *"bcde"])
    assert questions(val) == ["a", "other 0", "other 20"]
    with pytest.raises(FileNotFoundError, match=r"add='nowhere' is no file, folder or glob"):
        mixtures.with_own(others, "nowhere")


def test_an_identity_is_learned_with_the_embedded_data(monkeypatch, base_dir):
    monkeypatch.setattr(embedded_mixtures, "text_words", lambda data, max_length=0: WORDS)
    without, val = mixtures.sft_tasks("embedded")
    write_chats(base_dir / "identity_conversations.jsonl", ["Who are you?", "What is your name?"])
    train, same_val = mixtures.sft_tasks("embedded")
    assert len(train) == len(without) + 2
    assert "Who are you?" in questions(train)
    assert questions(same_val) == questions(val)


def test_tasks_of_the_embedded_data(monkeypatch):
    monkeypatch.setattr(embedded_mixtures, "text_words", lambda data, max_length=0: WORDS)
    tokenizer = train_tokenizer()
    for make in (mixtures.mid_tasks, mixtures.sft_tasks):
        train, val = make("embedded")
        assert len(train) > 10_000 > len(val) > 500
        for i in range(50):
            tokenizer.render_conversation(train[i])
    tasks = mixtures.eval_tasks("embedded")
    assert all(len(make()) >= 500 for make in tasks.values())


def test_words_to_spell_may_be_longer_in_training_than_in_tests(monkeypatch):
    words = [*WORDS, *(f"{word}{word}er" for word in WORDS)]  # of 3 and 8 letters
    monkeypatch.setattr(
        embedded_mixtures, "text_words", lambda data, max_length: [w for w in words if len(w) <= max_length]
    )
    for tasks, longest in ((mixtures.mid_tasks, 3), (mixtures.sft_tasks, 8)):
        train, val = tasks("embedded")
        spelled, counted, *_ = train.parts()
        assert (max(map(len, spelled.words)), max(map(len, counted.words))) == (longest, 3)
        assert {max(map(len, part.words)) for part in val.parts()[:2]} == {3}
