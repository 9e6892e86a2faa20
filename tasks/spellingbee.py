"""Spelling: SimpleSpelling asks for the letters of a word, SpellingBee for the number of times one occurs.

A model sees tokens, not letters, so it must learn how its tokens are spelled. It counts badly, so SpellingBee
teaches it to call the calculator with word and letter. The words themselves are split: one in eight, by a
hash, is a test word, about which no training item of either task asks.

The words come from the training text (word_list), so nothing is downloaded. The call in an answer has a space
before the quoted word, so that the word has the same tokens as in the question.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from nanochat.dataset import parquets_iter_batched
from tasks.common import Bounds, Conversation, Task, item_random
from tasks.gsm8k import is_correct_number, is_published_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

SPELL = ('Spell the word "{word}".', 'How do you spell "{word}"?', 'What are the letters of "{word}"?')
COUNT = (
    'How many times does "{letter}" occur in "{word}"?',
    'How often is the letter "{letter}" in "{word}"?',
    'Count the "{letter}" in "{word}".',
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MIN_LENGTH = 3  # letters of a word
N_BATCHES = 40  # batches of the training text that word_list reads


def word_list(data: str, max_length: int = 20) -> list[str]:
    """Return the lower-case words that the start of the training text has twice or more, by frequency."""
    counts: Counter[str] = Counter()
    for texts in islice(parquets_iter_batched("train", data=data), N_BATCHES):
        for text in texts:
            counts.update(re.findall(r"\b[a-z]+\b", text))
    return [word for word, n in counts.most_common() if n > 1 and MIN_LENGTH <= len(word) <= max_length]


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
    """Spell a word: its letters, separated by spaces."""

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        rng = item_random(self.split, index)
        word = rng.choice(self.words)
        question = rng.choice(SPELL).format(word=word)
        answer = {"role": "assistant", "content": " ".join(word)}
        return {"messages": [{"role": "user", "content": question}, answer]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Return True if the completion is the spelled word and nothing else."""
        return completion.strip() == conversation["messages"][-1]["content"]


class SpellingBee(_WordTask):
    """Count a letter in a word with the calculator; in three of four items the letter is from the word."""

    def get_example(self, index: int) -> Conversation:
        """See Task."""
        rng = item_random(self.split, index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.75 else LETTERS)
        question = rng.choice(COUNT).format(word=word, letter=letter)
        count = str(word.count(letter))
        parts = [
            {"type": "python", "text": f' "{word}".count("{letter}")'},
            {"type": "python_output", "text": count},
            {"type": "text", "text": f"#### {count}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """See is_correct_number."""
        return is_correct_number(conversation, completion)

    def evaluate_strict(self, conversation: Conversation, completion: str) -> bool:
        """See is_published_number."""
        return is_published_number(conversation, completion)
