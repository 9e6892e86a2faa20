"""Which tasks a stage learns from, and which it is measured on.

    hub         the sets of the published run
    embedded    what needs no network: spelling, arithmetic, and questions about the standard library
    a path      a .jsonl of your own conversations to learn from; one in twenty is held out
    auto        hub where the hub's text was downloaded, else embedded

Conversations that give the model a name and a character are learned with the hub's sets if they are there, as
$NANOCHAT_BASE_DIR/identity_conversations.jsonl.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

from nanochat.common import base_dir
from nanochat.dataset import source
from tasks.arc import ARC
from tasks.arithmetic import FORMS, NEW_FORMS, Arithmetic
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, word_list
from tasks.stdlib import DocChoice, DocQuestion

logger = logging.getLogger(__name__)
VAL_EVERY = 20  # of conversations of your own, one of this many is held out
SHORT = 6  # letters of a word that the embedded tasks ask about


def mid_tasks(data: str) -> tuple[Task, Task]:
    """Return what midtraining learns from and what it is validated on."""
    data = source(data)
    if data != "hub":
        return _local(data, 16_000, alphabetical=1.0)
    words = word_list("hub")
    train = [
        SmolTalk("train"),
        MMLU("all", "auxiliary_train"),
        GSM8K("main", "train"),
        *2 * _identity(),
        SimpleSpelling(words, 200_000, "train"),
        SpellingBee(words, 80_000, "train"),
    ]
    val = [SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)]
    return TaskMixture(train), TaskMixture(val)


def sft_tasks(data: str) -> tuple[Task, Task]:
    """Return what supervised finetuning learns from and what it is validated on."""
    data = source(data)
    if data != "hub":
        return _local(data, 40_000, alphabetical=0.5)
    words = word_list("hub")
    train = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train"),
        SmolTalk("train", stop=10_000),
        *_identity(),
        SimpleSpelling(words, 300, "train"),
        SpellingBee(words, 300, "train"),
    ]
    return TaskMixture(train), SmolTalk("test")


def rl_tasks(data: str) -> tuple[Task, Task]:
    """Return what reinforcement learning is rewarded on, and what it is measured on."""
    if source(data) == "hub":
        return GSM8K("main", "train"), GSM8K("main", "test")
    forms = (*FORMS, *NEW_FORMS)
    return Arithmetic(8000, "train", forms), Arithmetic(400, "test", forms)


def eval_tasks(data: str) -> dict[str, Callable[[], Task]]:
    """Return how to make each task of a chat evaluation; none is loaded before it is asked for."""
    if source(data) == "hub":
        return {
            "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
            "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
            "MMLU": lambda: MMLU("all", "test"),
            "GSM8K": lambda: GSM8K("main", "test"),
            "HumanEval": HumanEval,
            "SpellingBee": lambda: SpellingBee(word_list("hub"), 256, "test"),
        }
    words = cache(_short_words)
    return {
        "Arithmetic": lambda: Arithmetic(500, "test"),
        "Arithmetic, new forms": lambda: Arithmetic(500, "test", NEW_FORMS),
        "SimpleSpelling": lambda: SimpleSpelling(words(), 500, "test"),
        "SpellingBee": lambda: SpellingBee(words(), 500, "test"),
        "DocChoice": lambda: DocChoice(1000, "test"),
    }


def _local(data: str, size: int, alphabetical: float) -> tuple[Task, Task]:
    if data != "embedded":
        return _own(data)
    words = _short_words()
    return _embedded(words, "train", size, alphabetical), _embedded(words, "test", 800, alphabetical)


def _embedded(words: list[str], split: str, size: int, alphabetical: float) -> Task:
    """Mix about size conversations, in shares that a d4 learns all of them from (dev/LOG.md)."""
    tasks = [
        SimpleSpelling(words, round(0.32 * size), split),
        SpellingBee(words, round(0.07 * size), split),
        Arithmetic(round(0.06 * size), split),
        DocChoice(round(0.53 * size), split, alphabetical=alphabetical),
        DocQuestion(split, stop=round(0.02 * size)),
    ]
    return TaskMixture(tasks)


def _short_words() -> list[str]:
    return word_list("embedded", max_length=SHORT)


def _own(path: str) -> tuple[Task, Task]:
    conversations = CustomJSON(path)
    train = [conversations.slice(start=i, step=VAL_EVERY) for i in range(1, VAL_EVERY)]
    return TaskMixture(train), conversations.slice(step=VAL_EVERY)


def _identity() -> list[Task]:
    path = base_dir() / "identity_conversations.jsonl"
    if path.exists():
        return [CustomJSON(path)]
    logger.info(f"no {path}: the model learns no identity")
    return []
