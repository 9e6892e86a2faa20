"""Which tasks a stage learns from, and which it is measured on.

    hub         the sets of the published run
    embedded    what needs no network: spelling, arithmetic, and questions about the standard library
    a path      conversations of your own: a file, a folder or a glob of .jsonl; one in twenty is held out
    auto        hub where the hub's text was downloaded, else embedded

    python -m tasks.mixtures    # download the hub's sets, so that no stage after pretraining misses one

Conversations that give the model a name and a character are learned with the hub's and with the embedded sets
if they are there, as $NANOCHAT_BASE_DIR/identity_conversations.jsonl; dev/gen_identity.py writes some.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from nanochat.common import base_dir, parse, run
from nanochat.data.own_text import own_files
from nanochat.dataset import source
from tasks.arc import ARC
from tasks.arithmetic import FORMS, NEW_FORMS, Arithmetic
from tasks.common import Task, TaskMixture, TaskSequence
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, word_list
from tasks.stdlib import DocChoice, DocQuestion

logger = logging.getLogger(__name__)
VAL_EVERY = 20  # of conversations of your own, one of this many is held out
SUFFIXES = (".jsonl", ".jsonl.xz")
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
    if _judged(data) == "hub":
        return GSM8K("main", "train"), GSM8K("main", "test")
    forms, words = (*FORMS, *NEW_FORMS), _short_words()
    train = [  # with arithmetic alone, letters were unlearnt in two runs of three (dev/LOG.md)
        Arithmetic(4000, "train", forms),
        SimpleSpelling(words, 2000, "train"),
        SpellingBee(words, 2000, "train"),
    ]
    return TaskMixture(train), Arithmetic(400, "test", forms)


def eval_tasks(data: str) -> dict[str, Callable[[], Task]]:
    """Return how to make each task of a chat evaluation; none is loaded before it is asked for."""
    if _judged(data) == "hub":
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


def _judged(data: str) -> str:
    """Return which data that knows right answers is meant: hub or embedded."""
    data = source(data)
    if data not in ("hub", "embedded"):
        raise ValueError(f"data={data!r} must be hub, embedded or auto: conversations alone judge no answer")
    return data


def _local(data: str, size: int, alphabetical: float) -> tuple[Task, Task]:
    if data != "embedded":
        return _own(data, f"data={data!r} is none of auto, hub and embedded, and")
    words = _short_words()
    train = TaskMixture([*_embedded(words, "train", size, alphabetical), *_identity()])
    return train, TaskMixture(_embedded(words, "test", 800, alphabetical))


def _embedded(words: list[str], split: str, size: int, alphabetical: float) -> list[Task]:
    """Return about size conversations, in shares that a d4 learns all of them from (dev/LOG.md)."""
    return [
        SimpleSpelling(words, round(0.32 * size), split),
        SpellingBee(words, round(0.07 * size), split),
        Arithmetic(round(0.06 * size), split),
        DocChoice(round(0.53 * size), split, alphabetical=alphabetical),
        DocQuestion(split, stop=round(0.02 * size)),
    ]


def _short_words() -> list[str]:
    return word_list("embedded", max_length=SHORT)


def with_own(tasks: tuple[Task, Task], path: str) -> tuple[Task, Task]:
    """Mix conversations of your own, if a path names any, into what is learned and what is validated on."""
    if not path:
        return tasks
    own = _own(path, f"add={path!r} is")
    return TaskMixture([tasks[0], own[0]]), TaskMixture([tasks[1], own[1]])


def _own(path: str, complaint: str) -> tuple[Task, Task]:
    conversations = TaskSequence([CustomJSON(file) for file in own_files(path, SUFFIXES, complaint)])
    if len(conversations) < 2:
        raise ValueError(f"{path} holds one conversation; two are needed, one of them for validation")
    train = [conversations.slice(start=i, step=VAL_EVERY) for i in range(1, VAL_EVERY)]
    return TaskMixture(train), conversations.slice(step=VAL_EVERY)


def _identity() -> list[Task]:
    path = base_dir() / "identity_conversations.jsonl"
    if path.exists():
        return [CustomJSON(path)]
    logger.info(f"no {path}: the model learns no identity")
    return []


@dataclass(frozen=True)
class DownloadConfig:
    """No settings: what is downloaded is all that the recipes name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Read all sets of the hub once; what is read is there for ever after."""
    parse(DownloadConfig, argv)
    train, _ = TaskMixture(mid_tasks("hub")), sft_tasks("hub")
    rl_tasks("hub")
    for make in eval_tasks("hub").values():
        make()
    logger.info(f"chat_data: {len(train):,} conversations of midtraining and validation are there")
    return 0


if __name__ == "__main__":
    run(main)
