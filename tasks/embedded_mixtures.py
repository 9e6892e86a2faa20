"""The tasks of each stage without network: spelling, arithmetic, and questions about the standard library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from tasks.arithmetic import FORMS, NEW_FORMS, Arithmetic
from tasks.common import Task, TaskMixture
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.stdlib import DocChoice, DocQuestion
from tasks.words import text_words

MAX_LETTERS = 6  # of the words that are tested, and whose letters are counted


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The conversations of a stage: their number, and the share of each kind from which a d4 learns all."""

    size: int
    spelling: float
    counting: float  # an answer has 40 times the learned tokens of one of multiple choice
    arithmetic: float
    choice: float
    alphabetical: float  # fraction of the choices
    max_letters: int = MAX_LETTERS  # of the words to spell


# dev/LOG.md says how they were found; words of eight letters hold nearly all tokens of the shorter test words
MID = Mix(size=16_000, spelling=0.27, counting=0.06, arithmetic=0.06, choice=0.59, alphabetical=1.0)
SFT = Mix(
    size=40_000,
    spelling=0.215,
    counting=0.035,
    arithmetic=0.05,
    choice=0.68,
    alphabetical=0.5,
    max_letters=8,
)


def mid_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of midtraining."""
    return _mixtures(MID, identity)


def sft_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of supervised finetuning."""
    return _mixtures(SFT, identity)


def _mixtures(mix: Mix, identity: Sequence[Task]) -> tuple[Task, Task]:
    val = replace(mix, size=800, max_letters=MAX_LETTERS)
    return TaskMixture([*_parts(mix, "train"), *identity]), TaskMixture(_parts(val, "test"))


def _parts(mix: Mix, split: str) -> list[Task]:
    def share(fraction: float) -> int:
        return round(fraction * mix.size)

    words = text_words("embedded", mix.max_letters)
    short_words = [word for word in words if len(word) <= MAX_LETTERS]
    return [
        SimpleSpelling(words, share(mix.spelling), split),
        SpellingBee(short_words, share(mix.counting), split),
        Arithmetic(share(mix.arithmetic), split),
        DocChoice(share(mix.choice), split, alphabetical=mix.alphabetical),
        DocQuestion(split, stop=share(0.02)),
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
