"""What every task is: a fixed list of conversations, and a judge of the model's answers.

A conversation is {"messages": [...]} as nanochat/chat_format.py has it, its last message being the reply to
learn. Tasks are measured in one of two ways:

    generative     the model writes a completion, which the task judges
    categorical    the conversation has "letters", one of which the last message is; the model is only asked
                   which of them it finds likeliest as the first token of its reply

An index always gives the same conversation, on every machine and in every order of access: what is random in
a task is drawn from a generator seeded with split and index.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import TypedDict

import numpy as np

from nanochat.task import Conversation

HELD_OUT_SEED = 10_000_000  # random.Random(-n) is random.Random(n): splits never differ by a sign


class Bounds(TypedDict, total=False):
    """Keyword arguments of every task: which conversations of its data set it takes."""

    start: int
    stop: int | None
    step: int


class Task:
    """Conversations number start, start + step, ... below stop (None: all) of a data set."""

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self._set_bounds(start, stop, step)

    def slice(self, start: int = 0, stop: int | None = None, step: int = 1) -> Task:
        """Return a task of other conversations of the same data set, which is not read again."""
        other = copy.copy(self)
        other._set_bounds(start, stop, step)
        return other

    def _set_bounds(self, start: int, stop: int | None, step: int) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(
                f"start={start}, stop={stop}, step={step}: needs 0 <= start <= stop and step >= 1"
            )
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """How many conversations the whole data set has."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Return conversation number index of the whole data set."""
        raise NotImplementedError

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else min(self.stop, self.num_examples())
        return len(range(self.start, stop, self.step))

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a task of {len(self)} conversations")
        return self.get_example(self.start + index * self.step)

    def parts(self) -> list[Task]:
        """The tasks that this one consists of: itself, or those of a sequence."""
        return [self]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion (categorical: a letter) answers the conversation rightly."""
        if self.eval_type == "categorical":
            return completion == conversation["messages"][-1]["content"]
        raise NotImplementedError(f"{type(self).__name__} is there to learn from, not to be measured on")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """What reinforcement learning maximises: 1 for a right answer, else 0."""
        return float(self.evaluate(conversation, completion))


class TaskSequence(Task):
    """All conversations of several tasks, one task after the other. To repeat a task, name it twice.

    A conversation names the task that it is from, under "task", and that task judges answers to it.
    """

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = list(tasks)
        self.ends = list(accumulate(map(len, self.tasks)))

    def num_examples(self) -> int:
        """The sum over the tasks."""
        return self.ends[-1] if self.ends else 0

    def get_example(self, index: int) -> Conversation:
        """Return conversation number index of the row of tasks."""
        which = int(np.searchsorted(self.ends, index, side="right"))
        conversation = self.tasks[which][index - (self.ends[which - 1] if which else 0)]
        return {"task": self.tasks[which], **conversation}

    def parts(self) -> list[Task]:
        """Those of its tasks."""
        return [part for task in self.tasks for part in task.parts()]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """What its task says."""
        return conversation["task"].evaluate(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        """What its task says."""
        return conversation["task"].reward(conversation, completion)


class TaskMixture(TaskSequence):
    """All conversations of several tasks in one shuffled order, the same for the same seed."""

    def __init__(self, tasks: Sequence[Task], seed: int = 42):
        super().__init__(tasks)
        self.order = np.random.default_rng(seed).permutation(self.num_examples())

    def get_example(self, index: int) -> Conversation:
        """Return conversation number index of the shuffled order."""
        return super().get_example(int(self.order[index]))


def item_random(split: str, index: int) -> random.Random:
    """Return the generator that item number index of a synthetic task draws from; splits share none."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    return random.Random(index + (HELD_OUT_SEED if split == "test" else 0))


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Lay out a multiple-choice question, one choice a line.

    A letter stands at the start of its line, where it is the same token as at the start of a reply, and
    before its choice, so that every token of the choice can know its letter.
    """
    lines = (f"{letter}) {choice}" for letter, choice in zip(letters, choices, strict=True))
    return "\n".join([question, *lines])
