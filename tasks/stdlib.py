"""Conversations about the standard library, made of the docstrings of the Python that runs this.

    DocQuestion    "What does shutil.copytree do?" and the first sentence of its docstring
    DocChoice      four-way multiple choice: which sentence describes a name, or which name a sentence

One name in six, by a hash of it, is kept for the tests, and the wrong choices of a question come from the same
split as the right one: that a choice was never seen in training says nothing about it.
"""

from __future__ import annotations

import inspect
import re
import zlib
from functools import cache

from nanochat.embedded import library_entries
from tasks.common import Conversation, Task, item_random, render_mc

LETTERS = ("A", "B", "C", "D")


@cache
def descriptions(split: str) -> tuple[tuple[str, str], ...]:
    """Return (name, first sentence) of what is public and described in 20 to 100 characters."""
    found: dict[str, str] = {}
    for heading, docstring in library_entries():
        name = heading.removeprefix("class ").split("(")[0]
        if any(part.startswith("_") for part in name.split(".")) or len(name) > 40:
            continue
        paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
        if 20 <= len(sentence) <= 100:
            found.setdefault(name, sentence)
    is_test = {name: zlib.crc32(name.encode()) % 6 == 0 for name in found}
    return tuple((name, text) for name, text in sorted(found.items()) if is_test[name] is (split == "test"))


class DocQuestion(Task):
    """What does a name do? One conversation a name."""

    def __init__(self, split: str, **slices):
        super().__init__(**slices)
        self.split, self.items = split, descriptions(split)

    def num_examples(self) -> int:
        """One a name."""
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        """Return the question about name number index."""
        name, text = self.items[index]
        question = {"role": "user", "content": f"What does {name} do?"}
        return {"messages": [question, {"role": "assistant", "content": text}]}


class DocChoice(Task):
    """Four-way multiple choice; size items, which go round the names."""

    eval_type = "categorical"

    def __init__(self, size: int, split: str, **slices):
        super().__init__(**slices)
        self.size, self.split, self.items = size, split, descriptions(split)

    def num_examples(self) -> int:
        """The size."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """Return question number index."""
        rng = item_random(self.split, index)
        chosen = rng.sample(self.items, 4)
        right = rng.randrange(4)
        names, texts = zip(*chosen, strict=True)
        if rng.random() < 0.5:
            question, choices = f"What does {names[right]} do?", texts
        else:
            question, choices = f"Which of these does this: {texts[right]}", names
        messages = [
            {"role": "user", "content": render_mc(question, LETTERS, choices)},
            {"role": "assistant", "content": LETTERS[right]},
        ]
        return {"messages": messages, "letters": LETTERS}
