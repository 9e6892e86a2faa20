"""The interface through which training and evaluation use a task; tasks/common.py holds the base class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Conversation = dict[str, Any]  # {"messages": [...], ...}: see nanochat/chat_format.py and tasks/common.py


class Task(Protocol):
    """A fixed list of conversations that scores the answers to them."""

    @property
    def eval_type(self) -> str:
        """Return "generative" or "categorical": how evaluation gets an answer from the model."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Conversation: ...

    def part(self, index: int, /) -> Task:
        """Return the task that grades answers to conversation `index`: one of parts()."""
        ...

    def parts(self) -> Sequence[Task]:
        """Return the tasks that this one combines, or itself."""
        ...

    def evaluate(self, conversation: Conversation, completion: str, /) -> bool:
        """Return True if a completion (categorical: a letter) is correct."""
        ...

    def evaluate_strict(self, conversation: Conversation, completion: str, /) -> bool:
        """Return True if the judge of the published figures takes a completion."""
        ...

    def reward(self, conversation: Conversation, completion: str, /) -> float:
        """Return the reward of a completion for reinforcement learning."""
        ...
