"""A short form of tests/helpers/kills.py."""

import random

import pytest

from tests.helpers import kills

pytestmark = pytest.mark.slow


def test_killed_ranks_lose_nothing(tmp_path, base_dir):
    """One kill in each stage, the last at its end: of rank 0 and of rank 1."""
    rng = random.Random(9)
    text = kills.prepare(tmp_path)
    for target in (5, 12, 18, 28):  # 8 steps a stage
        assert kills.kill_once(text, 8, target, rng)
    kills.check_end(text, 8)
