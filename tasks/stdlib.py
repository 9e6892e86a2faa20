"""Questions about the standard library, generated from the docstrings of the running Python.

    DocQuestion    "What does shutil.copytree do?" and the first sentence of its docstring
    DocChoice      multiple choice: does this name, or this first sentence, belong to a class, an exception, a
                   function or a module?

One sentence in six, by a hash, is in the test split, with all names that it describes, so test items have
names and sentences of no training item. The four choices are in random order, so the model has to read the
letter of its answer from the question. A small model learns this much faster if it first learns the answers
from questions with choices in alphabetical order (dev/LOG.md).
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
    """A public name, described in 20 to 100 characters."""

    name: str
    text: str  # the first sentence of the docstring
    kind: str  # one of KINDS, or "attribute"


@cache
def entries() -> tuple[Entry, ...]:
    """Return all entries of the standard library, sorted by name."""
    documented = list(library_entries())
    parents = {heading.split("(")[0].rpartition(".")[0] for heading, _ in documented}
    by_name: dict[str, Entry] = {}
    for heading, docstring in documented:
        name = heading.removeprefix("class ").split("(")[0]
        if any(part.startswith("_") for part in name.split(".")) or len(name) > 40:
            continue
        paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
        text = re.split(r"(?<=[.!?])\s", paragraph)[0]
        if 20 <= len(text) <= 100:
            by_name.setdefault(name, Entry(name, text, _kind(heading, parents)))
    return tuple(by_name[name] for name in sorted(by_name))


def _kind(heading: str, parents: set[str]) -> str:
    if heading.startswith("class "):
        return "exception" if re.search(r"(Error|Exception|Warning)\b", heading) else "class"
    if "(" in heading:
        return "function"
    return "module" if heading in parents else "attribute"


def _split(split: str) -> list[Entry]:
    return [e for e in entries() if (zlib.crc32(e.text.encode()) % 6 == 0) is (split == "test")]


class DocQuestion(Task):
    """A question for each name: what does it do?"""

    def __init__(self, split: str, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.items = _split(split)

    def num_examples(self) -> int:
        """See Task."""
        return len(self.items)

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        entry = self.items[index]
        question = {"role": "user", "content": f"What does {entry.name} do?"}
        return {"messages": [question, {"role": "assistant", "content": entry.text}]}


class DocChoice(Task):
    """`size` multiple-choice questions; the four kinds are equally often the correct answer.

    alphabetical: the fraction of questions whose choices are in alphabetical instead of random order.
    """

    eval_type = "categorical"

    def __init__(self, size: int, split: str, *, alphabetical: float = 0.0, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        if not 0 <= alphabetical <= 1:
            raise ValueError(f"alphabetical={alphabetical} must be a fraction from 0 to 1")
        self.size, self.split, self.alphabetical = size, split, alphabetical
        self.items = {kind: [e for e in _split(split) if e.kind == kind] for kind in KINDS}

    def num_examples(self) -> int:
        """See Task."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """See Task."""
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
        return {"messages": messages, "letters": list(LETTERS)}
