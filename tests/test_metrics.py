import dataclasses
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanochat.common import Runtime
from nanochat.metrics import MetricsLog, read_metrics


def open_log(path, resume_step):
    return MetricsLog(path, Runtime.cpu(), resume_step=resume_step, wandb_run="dummy", config={})


def test_a_resumed_run_records_no_step_twice(tmp_path):
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


# ---------------------------------------------------------------------------------------------------------
# wandb


class FakeRun(list):
    def log(self, record):
        self.append(record)

    def finish(self):
        self.append("finished")


def test_wandb_gets_what_the_file_gets(tmp_path, monkeypatch):
    run, settings = FakeRun(), {}
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: settings.update(given) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path, Runtime.cpu(), resume_step=0, wandb_run="d4", config={"depth": 4})
    log({"step": 0, "loss": 1.0})
    log.close()
    assert run == [*read_metrics(path), "finished"]
    assert settings == {"project": "nanochat", "name": "d4", "config": {"depth": 4}}


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    """It was a traceback, after the model was built; and a run without wandb must not notice."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"run='d4' sends the numbers to wandb, which is not installed"):
        MetricsLog(tmp_path / "m.jsonl", Runtime.cpu(), resume_step=0, wandb_run="d4", config={})
    assert not (tmp_path / "m.jsonl").exists()
    open_log(tmp_path / "m.jsonl", 0).close()


def test_wandb_that_is_not_logged_in(tmp_path, monkeypatch):
    """It was a traceback. All errors of the real one's are wandb.Errors."""
    fake = types.ModuleType("wandb")
    fake.Error = type("Error", (Exception,), {})

    def init(**settings):
        raise fake.Error("No API key configured. Use `wandb login` to log in.")

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"run='d4': wandb reports: No API key .*; or omit --run"):
        MetricsLog(tmp_path / "m.jsonl", Runtime.cpu(), resume_step=0, wandb_run="d4", config={})


@pytest.mark.slow
def test_nothing_imports_wandb_before_it_is_requested():
    root = Path(__file__).parent.parent
    files = [path for folder in ("nanochat", "scripts", "tasks") for path in (root / folder).glob("*.py")]
    names = [f"{path.parent.name}.{path.stem}" for path in files]
    assert {"nanochat.metrics", "scripts.chat_rl", "tasks.mixtures"} < set(names)
    code = f"import importlib, sys; [*map(importlib.import_module, {names})]; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
