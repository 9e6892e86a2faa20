"""The tasks of each stage without network: spelling, arithmetic, and questions about the standard library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tasks.arithmetic import FORMS, NEW_FORMS, Arithmetic
from tasks.common import Task, TaskMixture
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.stdlib import DocChoice, DocQuestion
from tasks.words import text_words

MAX_LETTERS = 6  # of the words that are spelled and whose letters are counted


def mid_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of midtraining."""
    return _mixtures(16_000, identity, alphabetical=1.0)


def sft_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of supervised finetuning."""
    return _mixtures(40_000, identity, alphabetical=0.5)


def _mixtures(size: int, identity: Sequence[Task], alphabetical: float) -> tuple[Task, Task]:
    words = _short_words()
    train = TaskMixture([*_parts(words, "train", size, alphabetical), *identity])
    return train, TaskMixture(_parts(words, "test", 800, alphabetical))


def _parts(words: list[str], split: str, size: int, alphabetical: float) -> list[Task]:
    """Return tasks of about `size` conversations, in proportions from which a d4 learns all (dev/LOG.md)."""
    return [
        SimpleSpelling(words, round(0.27 * size), split),
        SpellingBee(words, round(0.06 * size), split),
        Arithmetic(round(0.06 * size), split),
        DocChoice(round(0.59 * size), split, alphabetical=alphabetical),
        DocQuestion(split, stop=round(0.02 * size)),
    ]


def rl_tasks() -> tuple[Task, Task]:
    """Return the training and evaluation task of reinforcement learning."""
    forms, words = (*FORMS, *NEW_FORMS), _short_words()
    train = [  # with arithmetic alone, two runs of three unlearned spelling (dev/LOG.md)
        Arithmetic(4000, "train", forms),
        SimpleSpelling(words, 2000, "train"),
        SpellingBee(words, 2000, "train"),
    ]
    return TaskMixture(train), Arithmetic(400, "test", forms)


def eval_tasks() -> dict[str, Callable[[], Task]]:
    """Return a constructor for each task of the chat evaluation."""
    words = cache(_short_words)
    return {
        "Arithmetic": lambda: Arithmetic(500, "test"),
        "Arithmetic, new forms": lambda: Arithmetic(500, "test", NEW_FORMS),
        "SimpleSpelling": lambda: SimpleSpelling(words(), 500, "test"),
        "SpellingBee": lambda: SpellingBee(words(), 500, "test"),
        "DocChoice": lambda: DocChoice(1000, "test"),
    }


def _short_words() -> list[str]:
    return text_words("embedded", max_length=MAX_LETTERS)
