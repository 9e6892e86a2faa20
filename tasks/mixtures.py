"""The tasks of each stage: training, validation and evaluation, by source of data.

    hub         the data sets of the published run (hub_mixtures.py); hub:fineweb and hub:climbmix: the same
    embedded    tasks that need no network (embedded_mixtures.py)
    a path      your own conversations: a file, a folder or a glob of .jsonl; one in twenty is held out
    auto        hub if the hub's text has been downloaded, else embedded

    python -m tasks.mixtures    # download the hub's data sets before the stages that need them

With hub and embedded, models also learn a name and a character from the conversations in
$NANOCHAT_BASE_DIR/identity_conversations.jsonl, if that file exists; dev/gen_identity.py generates it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanochat.common import base_dir, parse, run
from nanochat.data.own_text import own_files
from nanochat.dataset import hub_text, source
from tasks import embedded_mixtures, hub_mixtures
from tasks.common import Task, TaskMixture, TaskSequence
from tasks.customjson import CustomJSON

logger = logging.getLogger(__name__)
VAL_EVERY = 20  # one of this many of your own conversations is held out
SUFFIXES = (".jsonl", ".jsonl.xz")


def mid_tasks(data: str) -> tuple[Task, Task]:
    """Return the training and validation task of midtraining."""
    return _chat_tasks(data, hub_mixtures.mid_tasks, embedded_mixtures.mid_tasks)


def sft_tasks(data: str) -> tuple[Task, Task]:
    """Return the training and validation task of supervised finetuning."""
    return _chat_tasks(data, hub_mixtures.sft_tasks, embedded_mixtures.sft_tasks)


def rl_tasks(data: str) -> tuple[Task, Task]:
    """Return the training and evaluation task of reinforcement learning."""
    return embedded_mixtures.rl_tasks() if _graded_source(data) == "embedded" else hub_mixtures.rl_tasks()


def eval_tasks(data: str) -> dict[str, Callable[[], Task]]:
    """Return a constructor for each task of the chat evaluation; only constructed tasks load their data."""
    data = _graded_source(data)
    return embedded_mixtures.eval_tasks() if data == "embedded" else hub_mixtures.eval_tasks()


def choice_tasks(data: str) -> dict[str, Task]:
    """Return the tasks of multiple choice that are measured during supervised finetuning."""
    names = ("MMLU", "ARC-Easy", "ARC-Challenge", "DocChoice")
    return {name: make() for name, make in eval_tasks(data).items() if name in names}


def _chat_tasks(
    data: str,
    from_hub: Callable[[Sequence[Task]], tuple[Task, Task]],
    embedded: Callable[[Sequence[Task]], tuple[Task, Task]],
) -> tuple[Task, Task]:
    data = source(data)
    if hub_text(data):
        return from_hub(_identity())
    if data == "embedded":
        return embedded(_identity())
    return _own(data, f"data={data!r} is none of auto, hub and embedded, and")


def _graded_source(data: str) -> str:
    """Return the source of tasks with known answers, as `source` does; raise ValueError for a path."""
    data = source(data)
    if data != "embedded" and not hub_text(data):
        raise ValueError(
            f"data={data!r} must be hub, embedded or auto: your own conversations cannot grade answers"
        )
    return data


def with_own(tasks: tuple[Task, Task], path: str) -> tuple[Task, Task]:
    """Add your own conversations at a path ("": none) to a training and a validation task."""
    if not path:
        return tasks
    own = _own(path, f"add={path!r} is")
    return TaskMixture([tasks[0], own[0]]), TaskMixture([tasks[1], own[1]])


def _own(path: str, complaint: str) -> tuple[Task, Task]:
    conversations = TaskSequence([CustomJSON(file) for file in own_files(path, SUFFIXES, complaint)])
    if len(conversations) < 2:
        raise ValueError(f"{path} has only one conversation; give at least two, one is for validation")
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
    """Download all data sets of the hub that the stages use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Load all data sets of the hub once; later loads read the downloaded files."""
    parse(DownloadConfig, argv)
    n_conversations = sum(map(len, mid_tasks("hub")))
    sft_tasks("hub")
    rl_tasks("hub")
    for make in eval_tasks("hub").values():
        make()
    logger.info(f"chat_data: downloaded; {n_conversations:,} conversations for midtraining and validation")
    return 0


if __name__ == "__main__":
    run(main)
