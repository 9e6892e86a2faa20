"""The tasks of each stage with data from the hub: the data sets of the published run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.words import english_words


def mid_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of midtraining; identity conversations are repeated twice."""
    words = english_words()
    train = [
        SmolTalk("train"),
        MMLU("all", "auxiliary_train"),
        GSM8K("main", "train"),
        *2 * [*identity],
        SimpleSpelling(words, 200_000, "train"),
        SpellingBee(words, 80_000, "train"),
    ]
    val = [SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)]
    return TaskMixture(train), TaskMixture(val)


def sft_tasks(identity: Sequence[Task]) -> tuple[Task, Task]:
    """Return the training and validation task of supervised finetuning."""
    words = english_words()
    train = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train"),
        SmolTalk("train", stop=10_000),
        *identity,
        SimpleSpelling(words, 300, "train"),
        SpellingBee(words, 300, "train"),
    ]
    return TaskMixture(train), SmolTalk("test")


def rl_tasks() -> tuple[Task, Task]:
    """Return the training and evaluation task of reinforcement learning."""
    return GSM8K("main", "train"), GSM8K("main", "test")


def eval_tasks() -> dict[str, Callable[[], Task]]:
    """Return a constructor for each task of the chat evaluation."""
    return {
        "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
        "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
        "MMLU": lambda: MMLU("all", "test"),
        "GSM8K": lambda: GSM8K("main", "test"),
        "HumanEval": HumanEval,
        "SpellingBee": lambda: SpellingBee(english_words(), 256, "test"),
    }
