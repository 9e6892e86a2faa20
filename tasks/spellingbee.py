"""Spelling: SimpleSpelling asks for the letters of a word, SpellingBee for the number of times one occurs.

A model sees tokens, not letters, so it must learn how its tokens are spelled. SpellingBee shows it how to
count: spell the word, go through its letters, and check the result by the calculator.

    Spell the word: tree                 tree:t,r,e,e

    How often is 'e' in tree?            The letter 'e' in 'tree':
                                         tree:t,r,e,e
                                         1:t
                                         2:r
                                         3:e hit! count=1
                                         4:e hit! count=2
                                         By hand 2, by Python: <'tree'.count('e')> <2>
                                         #### 2

The words themselves are split: one in eight, by a hash, is a test word, about which no training item of
either task asks. The question of SimpleSpelling and the form of both answers are those of the published run,
whose weights know no others; the wordings of SpellingBee are our own (letter_questions.py).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.common import Bounds, Conversation, Task, item_random
from tasks.gsm8k import is_correct_number, is_published_number
from tasks.letter_questions import QUESTIONS

if TYPE_CHECKING:
    from typing_extensions import Unpack

LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUOTES = ("", "'", '"')


class _WordTask(Task):
    """`size` items about the words of a split."""

    def __init__(self, words: Sequence[str], size: int, split: str, **bounds: Unpack[Bounds]):
        super().__init__(**bounds)
        self.words = [word for word in words if (zlib.crc32(word.encode()) % 8 == 0) is (split == "test")]
        if not self.words:
            raise ValueError(f"none of the {len(words)} words is in split={split!r}; give more words")
        self.size, self.split = size, split

    def num_examples(self) -> int:
        """See Task."""
        return self.size


class SimpleSpelling(_WordTask):
    """Spell a word."""

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        word = item_random(self.split, index).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": _spelled(word)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion is the spelled word and nothing else."""
        return completion.strip() == conversation["messages"][-1]["content"]


class SpellingBee(_WordTask):
    """Count a letter in a word, by hand and by the calculator; in nine of ten items it is in the word."""

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        rng = item_random(self.split, index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else LETTERS)
        return {
            "messages": [
                {"role": "user", "content": _question(rng, letter, word)},
                {"role": "assistant", "content": _answer(letter, word)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """See is_correct_number."""
        return is_correct_number(conversation, completion)

    def evaluate_strict(self, conversation: Conversation, completion: str) -> bool:
        """See is_published_number."""
        return is_published_number(conversation, completion)


def _spelled(word: str) -> str:
    return f"{word}:{','.join(word)}"


def _question(rng: random.Random, letter: str, word: str) -> str:
    """Return one of QUESTIONS; three of ten are in lower case, half end in a question mark."""
    question = rng.choice(QUESTIONS)
    if rng.random() < 0.3:
        question = question.lower()
    quotes = {"letter": rng.choice(QUOTES), "word": rng.choice(QUOTES)}
    question = question.format(
        letter=quotes["letter"] + letter + quotes["letter"], word=quotes["word"] + word + quotes["word"]
    )
    return question + ("?" if rng.random() < 0.5 else "")


def _answer(letter: str, word: str) -> list[dict[str, str]]:
    lines, count = [f"The letter '{letter}' in '{word}':", _spelled(word)], 0
    for number, character in enumerate(word, start=1):
        hit = ""
        if character == letter:
            count += 1
            hit = f" hit! count={count}"
        lines.append(f"{number}:{character}{hit}")
    lines.append(f"By hand {count}, by Python:")
    return [
        {"type": "text", "text": "\n".join(lines)},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n#### {count}"},
    ]
