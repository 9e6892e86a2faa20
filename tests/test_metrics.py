import dataclasses

from nanochat.common import Runtime
from nanochat.metrics import MetricsLog, read_metrics


def open_log(path, resume_step):
    return MetricsLog(path, Runtime.cpu(), resume_step=resume_step, wandb_run="dummy", config={})


def test_a_resumed_run_tells_no_step_twice(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = open_log(path, 0)
    for step in range(5):
        log({"step": step, "loss": 1.0})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    log = open_log(path, 3)
    log({"step": 3, "loss": 2.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_other_ranks_write_nothing(tmp_path):
    runtime = dataclasses.replace(Runtime.cpu(), rank=1, world_size=2)
    log = MetricsLog(tmp_path / "m.jsonl", runtime, resume_step=0, wandb_run="dummy", config={})
    log({"step": 0})
    log.close()
    assert not (tmp_path / "m.jsonl").exists()
