"""The base class of tasks: a fixed list of conversations that can grade answers to them.

A conversation is {"messages": [...]} as defined in nanochat/chat_format.py; its last message is the reply to
learn. There are two types of evaluation:

    generative     the model generates a completion, which the task grades
    categorical    the conversation has "letters", one of which is the last message; the model's answer is the
                   letter with the highest probability as the first token of the reply

An index always gives the same conversation, on every machine and in any order of access: random choices in a
task come from a generator seeded with split and index.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from itertools import accumulate
from typing import TypedDict

import numpy as np

from nanochat.task import Conversation

HELD_OUT_SEED = 10_000_000  # added to the index; negative seeds would not do: Random(-n) is Random(n)


class Bounds(TypedDict, total=False):
    """Keyword arguments of all tasks, which select conversations of the data set."""

    start: int
    stop: int | None
    step: int


class Task:
    """The conversations start, start + step, ... below stop (None: the end) of a data set."""

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self._set_bounds(start, stop, step)

    def slice(self, start: int = 0, stop: int | None = None, step: int = 1) -> Task:
        """Return a task of other conversations of the same data set, without loading it again."""
        other = copy.copy(self)
        other._set_bounds(start, stop, step)
        return other

    def _set_bounds(self, start: int, stop: int | None, step: int) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(
                f"start={start}, stop={stop}, step={step} must satisfy 0 <= start <= stop and step >= 1"
            )
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """Return the number of conversations in the whole data set."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """Return conversation `index` of the whole data set."""
        raise NotImplementedError

    def __len__(self) -> int:
        stop = self.num_examples() if self.stop is None else min(self.stop, self.num_examples())
        return len(range(self.start, stop, self.step))

    def __getitem__(self, index: int) -> Conversation:
        return self.get_example(self._number(index))

    def part(self, index: int) -> Task:
        """Return the task that grades answers to conversation `index`: one of parts()."""
        return self._get_part(self._number(index))

    def _number(self, index: int) -> int:
        """Return the number in the whole data set of conversation `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for a task of {len(self)} conversations")
        return self.start + index * self.step

    def _get_part(self, number: int) -> Task:
        return self

    def parts(self) -> list[Task]:
        """Return the tasks that this one combines, or itself."""
        return [self]

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if a completion (categorical: a letter) is correct."""
        if self.eval_type == "categorical":
            return completion == conversation["messages"][-1]["content"]
        raise NotImplementedError(f"{type(self).__name__} cannot be evaluated: it is for training only")

    def evaluate_strict(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the judge of the published figures takes a completion: here, as evaluate does."""
        return self.evaluate(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Return the reward for reinforcement learning: 1 for a correct answer, else 0."""
        return float(self.evaluate(conversation, completion))


class TaskSequence(Task):
    """The conversations of several tasks, one task after the other; a task may occur more than once.

    Answers are graded by the task of their conversation: see part.
    """

    def __init__(self, tasks: Sequence[Task]):
        super().__init__()
        self.tasks = list(tasks)
        self.ends = list(accumulate(map(len, self.tasks)))

    def num_examples(self) -> int:
        """Return the sum over the tasks."""
        return self.ends[-1] if self.ends else 0

    def get_example(self, index: int) -> Conversation:
        """Return conversation `index`, counted through all tasks."""
        task, place = self._find(index)
        return task[place]

    def _get_part(self, index: int) -> Task:
        task, place = self._find(index)
        return task.part(place)

    def _find(self, index: int) -> tuple[Task, int]:
        """Return the task of conversation `index`, counted through all tasks, and the index in that task."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.tasks[number], index - (self.ends[number - 1] if number else 0)

    def parts(self) -> list[Task]:
        """Return the parts of all tasks."""
        return [part for task in self.tasks for part in task.parts()]


class TaskMixture(TaskSequence):
    """The conversations of several tasks in a shuffled order, which depends on the seed only."""

    def __init__(self, tasks: Sequence[Task], seed: int = 42):
        super().__init__(tasks)
        self.order = np.random.default_rng(seed).permutation(self.num_examples())

    def get_example(self, index: int) -> Conversation:
        """Return conversation `index` of the shuffled order."""
        return super().get_example(int(self.order[index]))

    def _get_part(self, index: int) -> Task:
        return super()._get_part(int(self.order[index]))


def item_random(split: str, index: int) -> random.Random:
    """Return the random generator of item `index` of a synthetic task; no two splits share one."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    return random.Random(index + (HELD_OUT_SEED if split == "test" else 0))


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """Format a multiple-choice question, with a choice on each line, as the published run asked it.

    A letter comes after its choice, so that it can attend to it, and without white space before it, so that
    it is the same token as at the start of a reply.
    """
    lines = (f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True))
    return "\n".join(
        [
            f"Multiple Choice question: {question}",
            *lines,
            "",
            "Respond only with the letter of the correct answer.",
        ]
    )
