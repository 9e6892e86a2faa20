"""Conversations about the standard library, made of the docstrings of the Python that runs this.

    DocQuestion    "What does shutil.copytree do?" and the first sentence of its docstring
    DocChoice      four-way multiple choice: is it a class, an exception, a function or a module that has
                   this name, or this first sentence?

One sentence in six, by a hash of it, is kept for the tests, with all names that it describes: tests ask about
names and sentences that no training question had. The four choices come in random order, so a letter has to
be read off the question. A small model is long in finding that out, and much sooner if it has first learned,
from questions with the choices in alphabetical order, what the answers are (dev/LOG.md).
"""

from __future__ import annotations

import inspect
import re
import zlib
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from nanochat.data.embedded import library_entries
from tasks.common import Bounds, Conversation, Task, item_random, render_mc

if TYPE_CHECKING:
    from typing_extensions import Unpack

LETTERS = ("A", "B", "C", "D")
KINDS = ("class", "exception", "function", "module")


class Entry(NamedTuple):
    """What is public and described in 20 to 100 characters."""

    name: str
    text: str  # the first sentence of the docstring
    kind: str  # one of KINDS, or "attribute"


@cache
def entries() -> tuple[Entry, ...]:
    """Return all entries of the library, in order of their names."""
    documented = list(library_entries())
    parents = {heading.split("(")[0].rpartition(".")[0] for heading, _ in documented}
    found: dict[str, Entry] = {}
    for heading, docstring in documented:
        name = heading.removeprefix("class ").split("(")[0]
        if any(part.startswith("_") for part in name.split(".")) or len(name) > 40:
            continue
        paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        text = re.split(r"(?<=[.!?])\s", paragraph)[0]
        if 20 <= len(text) <= 100:
            found.setdefault(name, Entry(name, text, _kind(heading, parents)))
    return tuple(found[name] for name in sorted(found))


def _kind(heading: str, parents: set[str]) -> str:
    if heading.startswith("class "):
        return "exception" if re.search(r"(Error|Exception|Warning)\b", heading) else "class"
    if "(" in heading:
        return "function"
    return "module" if heading in parents else "attribute"


def _split(split: str) -> list[Entry]:
    return [e for e in entries() if (zlib.crc32(e.text.encode()) % 6 == 0) is (split == "test")]


class DocQuestion(Task):
    """What does a name do? One conversation a name."""

    def __init__(self, split: str, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.items = _split(split)

    def num_examples(self) -> int:
        """One a name."""
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        """Return the question about name number index."""
        entry = self.items[index]
        question = {"role": "user", "content": f"What does {entry.name} do?"}
        return {"messages": [question, {"role": "assistant", "content": entry.text}]}


class DocChoice(Task):
    """Size four-way questions, each kind as often right as the others.

    alphabetical is the share of questions whose choices are in alphabetical order, not in random order.
    """

    eval_type = "categorical"

    def __init__(self, size: int, split: str, *, alphabetical: float = 0.0, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        if not 0 <= alphabetical <= 1:
            raise ValueError(f"alphabetical={alphabetical} is a share, from 0 to 1")
        self.size, self.split, self.alphabetical = size, split, alphabetical
        self.items = {kind: [e for e in _split(split) if e.kind == kind] for kind in KINDS}

    def num_examples(self) -> int:
        """The size."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """Return question number index."""
        rng = item_random(self.split, index)
        kind = rng.choice(KINDS)
        entry = rng.choice(self.items[kind])
        question = f"What is {entry.name}?" if rng.random() < 0.5 else f"What is this? {entry.text}"
        is_shuffled = rng.random() >= self.alphabetical
        choices = rng.sample(KINDS, 4) if is_shuffled else KINDS
        messages = [
            {"role": "user", "content": render_mc(question, LETTERS, choices)},
            {"role": "assistant", "content": LETTERS[choices.index(kind)]},
        ]
        return {"messages": messages, "letters": LETTERS}
