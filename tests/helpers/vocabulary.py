"""A small tokenizer for tests, and its training texts."""

import random

from nanochat.tokenizer import RustBPETokenizer

VOCAB_SIZE = 350
WORDS = [
    *(
        "the",
        "of",
        "and",
        "a",
        "river",
        "bridge",
        "water",
        "light",
        "1887",
        "3.14",
        "isn't",
        "they've",
        "stone,",
    ),
    *(
        "over;",
        "under!",
        "\u00e9t\u00e9",
        "\u00fcber",
        "\ud55c\uad6d\uc5b4",
        "\u65e5\u672c\u8a9e",
        "\U0001f680",
    ),
    *("def", "return", "x**2", "==", "{}", "\n", "\n\n", "\t"),
]


def training_texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=200)) for _ in range(40)]


def train_tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(training_texts()), VOCAB_SIZE)
