"""A short form of tests/kills.py, which runs as long as one likes."""

import random

from tests import kills


def test_killed_ranks_lose_nothing(tmp_path, base_dir):
    rng = random.Random(9)  # kills rank 0, then rank 1
    text = kills.prepare(tmp_path)
    for _ in range(2):
        kills.kill_once(text, 30, rng)
    kills.check_end(text, 30)
