"""Kill a rank of a run repeatedly and check that only the steps since the last checkpoint are lost.

    python -m tests.helpers.kills 70

Kills four stages of 70 steps until a run completes, about 70 times, which takes some minutes. The test suite
runs a short version.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from nanochat.checkpoint_manager import check_bytes, checkpoint_dir, complete_steps, load_tensors, model_path
from nanochat.common import Runtime
from nanochat.metrics import read_metrics
from tests.helpers.chats import untimed_records
from tests.helpers.stages import SAVE_EVERY, STAGES
from tests.helpers.vocabulary import train_tokenizer

ROOT = Path(__file__).parents[2]


def prepare(folder):
    """Save a tokenizer to the base directory; return the path of a training text."""
    train_tokenizer().save(Path(os.environ["NANOCHAT_BASE_DIR"]) / "tokenizer")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["file", "list", "reads", "a", "the"], k=12)) for _ in range(4000)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder / "text.txt"


def launch(text, num_steps, *tags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.helpers.stages", str(text), str(num_steps), *tags]
    environment = {**os.environ, "RANK": "", "OMP_NUM_THREADS": "1", "NANOCHAT_TIMEOUT_S": "60"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipe)


def rank_pids(launcher):
    """Return the process id of each rank that a launcher has started."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            match = re.search(r"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_text())
            if match:
                found[int(match[1])] = int(child)
    return found


def steps_done():
    """Return the number of steps that each stage has logged."""
    paths = [checkpoint_dir(stage, "killed") / "metrics.jsonl" for stage in STAGES]
    records = [read_metrics(path) if path.exists() else [] for path in paths]
    return [max((r["step"] + 1 for r in lines if "loss" in r), default=0) for lines in records]


def steps_saved():
    """Return the complete checkpoints of each stage."""
    return [complete_steps(checkpoint_dir(stage, "killed")) for stage in STAGES]


def kill_once(text, num_steps, target, rng):
    """Start or resume, kill a random rank after `target` steps of all stages together, check the files.

    Return a description of their state, or None if the run completed first. A target of 0 means a random
    moment after the start.
    """
    first, before = sum(steps_done()), steps_saved()
    launcher = launch(text, num_steps, "killed")
    deadline = time.monotonic() + 300
    while len(pids := rank_pids(launcher)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if target == 0:
        time.sleep(rng.uniform(0, 5))  # possibly before the first step
    else:
        while launcher.poll() is None and not first < sum(steps_done()) >= target:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
    victim = rng.randrange(2)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pids[victim], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=300)
    assert "trying the checkpoint before" not in output, output
    if launcher.returncode == 0:
        return None
    assert "SIGKILL" in output, output  # the run ended because of the kill
    done, saved = steps_done(), steps_saved()
    for stage, last, steps, old in zip(STAGES, done, saved, before, strict=True):
        assert not old or (steps and steps[-1] >= old[-1]), (stage, old, steps)
        assert last - (steps[-1] if steps else 0) <= SAVE_EVERY, (stage, last, steps)
        for step in steps:
            check_bytes(checkpoint_dir(stage, "killed"), step, Runtime.cpu())
    return f"rank {victim} killed after steps {done}; checkpoints {saved}"


def check_end(text, num_steps):
    """Let the run complete; its weights and metrics must equal those of an uninterrupted run."""
    launcher = launch(text, num_steps, "killed", "whole")
    output, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, output
    for stage in STAGES:
        killed, whole = (checkpoint_dir(stage, tag) for tag in ("killed", "whole"))
        one, two = (load_tensors(model_path(directory, num_steps), "cpu") for directory in (whole, killed))
        assert all(torch.equal(weight, two[name]) for name, weight in one.items()), stage
        records = untimed_records(stage, "whole")
        assert records == untimed_records(stage, "killed")
        losses = [record["loss"] for record in records if "loss" in record]
        assert len(losses) == num_steps
        assert len(set(losses)) > num_steps / 2  # the loss did change
        assert not list(killed.glob(".*.partial"))


if __name__ == "__main__":
    num_steps = int(sys.argv[1])
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    n_kills = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = f"{folder}/base"
        text = prepare(Path(folder))
        while True:
            ahead = rng.randint(1, 3 * SAVE_EVERY)
            target = 0 if rng.random() < 0.2 else sum(steps_done()) + ahead
            if (found := kill_once(text, num_steps, target, rng)) is None:
                break
            n_kills += 1
            sys.stdout.write(found + "\n")
            sys.stdout.flush()
        check_end(text, num_steps)
    sys.stdout.write(f"{n_kills} kills, nothing lost\n")
