"""The words that are spelled: English words from the web with the hub's data, else those of a text.

Tasks split them by a hash, so that no training item asks about a test word.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from nanochat.common import base_dir
from nanochat.data.download import download
from nanochat.dataset import parquets_iter_batched

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
MIN_LENGTH = 3  # letters of a word of a text
N_BATCHES = 40  # batches of the training text that text_words reads


def english_words() -> list[str]:
    """Return 370,000 English words in lower case, one a line of dwyl/english-words' words_alpha.txt.

    The environment variable WORDS_URL names another such file. It is downloaded once, to its own name in the
    base directory. Raises OSError without a network, ValueError for other letters than a to z and no words.
    """
    url = os.environ.get("WORDS_URL") or WORDS_URL
    path = base_dir() / (PurePosixPath(urlparse(url).path).name or "words.txt")
    if not path.exists():
        try:
            download(url, path)
        except OSError as error:
            raise OSError(
                f"cannot download the words to spell ({error}): copy {path} from a machine that has it, or "
                f"name another list by WORDS_URL, now {url}"
            ) from error
    return _read(path)


def _read(path: Path) -> list[str]:
    words = path.read_text(encoding="utf-8").split()
    if not words:
        raise ValueError(f"{path} has no words; remove it, and it is downloaded again")
    if wrong := next((word for word in words if not re.fullmatch("[a-z]+", word)), None):
        raise ValueError(f"{path} must be words of the letters a to z, but has {wrong!r:.60}")
    return words


def text_words(data: str, max_length: int = 20) -> list[str]:
    """Return the lower-case words that the start of the training text has twice or more, by frequency."""
    counts: Counter[str] = Counter()
    for texts in islice(parquets_iter_batched("train", data=data), N_BATCHES):
        for text in texts:
            counts.update(re.findall(r"\b[a-z]+\b", text))
    return [word for word, n in counts.most_common() if n > 1 and MIN_LENGTH <= len(word) <= max_length]
