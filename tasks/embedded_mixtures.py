"""The tasks of each stage without network: spelling, arithmetic, and questions about the standard library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tasks.arithmetic import FORMS, NEW_FORMS, Arithmetic
from tasks.common import Task, TaskMixture
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.stdlib import DocChoice, DocQuestion
from tasks.words import text_words

MAX_LETTERS = 6  # of the words that are tested, and whose letters are counted


def mid_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of midtraining."""
    shares = {"spelling": 0.27, "counting": 0.06, "arithmetic": 0.06, "choice": 0.59}
    return _mixtures(16_000, identity, shares, alphabetical=1.0)


def sft_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of supervised finetuning.

    An answer of counting has 40 times the learned tokens of one of multiple choice, which more of them would
    crowd out. Words of up to eight letters hold nearly all tokens of the shorter ones that are tested.
    """
    shares = {"spelling": 0.215, "counting": 0.035, "arithmetic": 0.05, "choice": 0.68}
    return _mixtures(40_000, identity, shares, alphabetical=0.5, max_letters=8)


def _mixtures(
    size: int,
    identity: Sequence[Task],
    shares: dict[str, float],
    *,
    alphabetical: float,
    max_letters: int = MAX_LETTERS,
) -> tuple[Task, Task]:
    """Return mixtures of about `size` and 800 conversations; from these shares a d4 learns all (dev/LOG.md)."""

    def parts(split: str, size: int, spelled: list[str]) -> list[Task]:
        n = {name: round(share * size) for name, share in shares.items()}
        return [
            SimpleSpelling(spelled, n["spelling"], split),
            SpellingBee(words, n["counting"], split),
            Arithmetic(n["arithmetic"], split),
            DocChoice(n["choice"], split, alphabetical=alphabetical),
            DocQuestion(split, stop=round(0.02 * size)),
        ]

    words = _short_words()
    train = parts("train", size, text_words("embedded", max_length=max_letters))
    return TaskMixture([*train, *identity]), TaskMixture(parts("test", 800, words))


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
