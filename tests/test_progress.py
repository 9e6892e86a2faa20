import json
import time
from dataclasses import replace

import pytest

from nanochat import common
from nanochat.common import Runtime
from nanochat.train.progress import EmaLoss, Progress


def test_the_first_average_is_the_first_value():
    """An uncorrected average starts at a tenth of it."""
    ema = EmaLoss()
    assert ema.update(3.0) == pytest.approx(3.0)
    assert ema.update(1.0) == pytest.approx((0.9 * 3 + 1) / 1.9)
    assert ema.value == ema.update(ema.value)


def test_validations():
    progress = Progress()
    for bpb in (2.0, 1.0, 1.5):
        progress.add_validation(bpb)
    assert (progress.first_val_bpb, progress.min_val_bpb, progress.val_bpb) == (2.0, 1.0, 1.5)


def test_there_and_back_through_json(monkeypatch):
    """All but the wall clock, which continues from one process to the next."""
    monkeypatch.setattr(common, "_STARTED", time.monotonic() - 1000)
    progress = Progress(step=3, train_seconds=7.0, earlier_seconds=50.0)
    progress.loader_state = {"next_row": 12, "positions": {}}
    progress.ema.update(2.0)
    progress.add_validation(1.25)
    found = Progress.from_dict(json.loads(json.dumps(progress.to_dict(Runtime.cpu()))))
    assert 1050 <= found.earlier_seconds < 1100
    assert replace(found, earlier_seconds=50.0) == progress


def test_positions_of_all_ranks_are_kept():
    class OneOfTwo(Runtime):
        def gather(self, value):
            return [value, {**value, "positions": {"1": [0, 5, 0]}}]

    progress = Progress(loader_state={"next_stream": 0, "positions": {"0": [0, 4, 0]}})
    cpu = Runtime.cpu()
    runtime = OneOfTwo(device=cpu.device, compute_dtype=cpu.compute_dtype, world_size=2)
    saved = progress.to_dict(runtime)["loader_state"]
    assert saved == {"next_stream": 0, "positions": {"0": [0, 4, 0], "1": [0, 5, 0]}}
