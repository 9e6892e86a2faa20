"""Arithmetic with the calculator: generated questions with small numbers, plain or as one-line stories.

The model must find the expression; the calculator evaluates it. Items are drawn with a seed of split and
index. A pair of numbers (a, b) belongs to one of the splits, by a remainder, so no pair of a test item occurs
in a training item.

Midtraining and finetuning use FORMS. NEW_FORMS never come with answers: reinforcement learning has to
discover how to solve them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanochat.calculator import calculate
from tasks.common import Bounds, Conversation, Task, item_random
from tasks.gsm8k import is_correct_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

# (question, expression); c is a small number
FORMS = (
    ("What is {a} + {b}?", "{a}+{b}"),
    ("What is {a} - {b}?", "{a}-{b}"),
    ("What is {a} * {b}?", "{a}*{b}"),
    ("What is {a} plus {b}?", "{a}+{b}"),
    ("What is {a} minus {b}?", "{a}-{b}"),
    ("What is {a} times {b}?", "{a}*{b}"),
    ("{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?", "{a}+{b}"),
    ("{name} has {a} {thing} and gives away {b}. How many {thing} are left?", "{a}-{b}"),
    ("There are {a} boxes with {b} {thing} each. How many {thing} is that?", "{a}*{b}"),
    ("{name} has {a} boxes with {b} {thing} each and loses {c} {thing}. How many are left?", "{a}*{b}-{c}"),
    (
        "{name} buys {a} {thing} at {b} dollars each and pays {c} dollars for a bag. What is the price?",
        "{a}*{b}+{c}",
    ),
)
NEW_FORMS = (
    ("What is {a} + {b} - {c}?", "{a}+{b}-{c}"),
    ("What is {a} * {b} + {c}?", "{a}*{b}+{c}"),
    ("{name} reads {a} {thing} today and {b} tomorrow. How many {thing} is that in all?", "{a}+{b}"),
    ("{name} has {a} {thing}, gives away {b} and then gets {c} more. How many are there now?", "{a}-{b}+{c}"),
    ("Of {a} {thing} {b} are lost. How many {thing} does {name} still have?", "{a}-{b}"),
    ("A page has {a} lines and a book has {b} pages. How many lines does the book have?", "{a}*{b}"),
)
NAMES = ("Ann", "Ben", "Eva", "Tom", "Mia", "Max")
THINGS = ("files", "lines", "strings", "names", "pages", "bytes")


class Arithmetic(Task):
    """`size` items with numbers from 2 to 99; forms: templates (question, expression)."""

    def __init__(
        self, size: int, split: str, forms: Sequence[tuple[str, str]] = FORMS, **bounds: Unpack[Bounds]
    ):
        super().__init__(**bounds)
        self.size, self.split, self.forms = size, split, forms

    def num_examples(self) -> int:
        """See Task."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        rng = item_random(self.split, index)
        question, expression = rng.choice(self.forms)
        numbers = dict(zip("ab", self._pair(rng), strict=True))
        numbers["c"] = rng.randint(2, 20)
        expression = expression.format(**numbers)
        question = question.format(**numbers, name=rng.choice(NAMES), thing=rng.choice(THINGS))
        result = calculate(expression)
        parts = [
            {"type": "python", "text": expression},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"#### {result}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def _pair(self, rng: random.Random) -> tuple[int, int]:
        while True:
            a, b = sorted((rng.randint(2, 99), rng.randint(2, 99)), reverse=True)
            if ((7 * a + b) % 8 == 0) is (self.split == "test"):
                return a, b

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """See is_correct_number."""
        return is_correct_number(conversation, completion)
