"""Kill a rank of a run again and again, and see that nothing is lost but the steps since the last checkpoint.

python -m tests.kills 30        an hour's worth of bad luck in some minutes; the suite runs a short form
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

from nanochat.checkpoint_manager import checkpoint_dir, complete_steps, load_tensors, model_path
from nanochat.metrics import read_metrics
from tests.vocabulary import train_tokenizer

ROOT = Path(__file__).parent.parent
SAVE_EVERY = 3
FLAGS = [
    "--device-type=cpu",
    "--depth=2",
    "--max-seq-len=16",
    "--device-batch-size=2",
    "--total-batch-size=64",
]
FLAGS += ["--eval-every=0", "--eval-tokens=64", "--sample-every=0", f"--save-every={SAVE_EVERY}"]
FLAGS += ["--log-every=1000000"]


def prepare(folder):
    """Make a tokenizer in the base directory and return a text to learn from."""
    train_tokenizer().save(Path(os.environ["NANOCHAT_BASE_DIR"]) / "tokenizer")
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["file", "list", "reads", "a", "the"], k=12)) for _ in range(4000)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return folder / "text.txt"


def launch(text, num_steps, tag="killed"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "scripts.base_train", *FLAGS, f"--data={text}", f"--num-iterations={num_steps}"]
    environment = {**os.environ, "RANK": "", "OMP_NUM_THREADS": "1", "NANOCHAT_TIMEOUT_S": "20"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, f"--model-tag={tag}", "--resume"], cwd=ROOT, env=environment, **pipe)


def rank_pids(launcher):
    """Process ids of the ranks that a launcher has started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            match = re.search(r"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_text())
            if match:
                found[int(match[1])] = int(child)
    return found


def last_step(directory):
    path = directory / "metrics.jsonl"
    return max([r["step"] + 1 for r in read_metrics(path) if "loss" in r], default=0) if path.exists() else 0


def kill_once(text, num_steps, rng):
    """Start or go on, kill a random rank at a random moment, check what is left, and say what that is."""
    directory = checkpoint_dir("base", "killed")
    begun = last_step(directory)
    launcher = launch(text, num_steps)
    deadline = time.monotonic() + 60
    while len(pids := rank_pids(launcher)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))  # perhaps before the first step
    else:
        ahead = rng.randint(1, 3 * SAVE_EVERY)
        while launcher.poll() is None and not begun < last_step(directory) >= min(
            begun + ahead, num_steps - 1
        ):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
    victim = rng.randrange(2)
    before = complete_steps(directory)
    os.kill(pids[victim], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=60)
    done, steps = last_step(directory), complete_steps(directory)
    assert launcher.returncode != 0, output
    assert not before or (steps and steps[-1] >= before[-1])
    assert done - (steps[-1] if steps else 0) <= SAVE_EVERY, (done, steps)
    return f"rank {victim} killed after step {done}; checkpoints {steps}"


def check_end(text, num_steps):
    """Let the run end; it must end where one that was never killed does, bit for bit."""
    for tag in ("killed", "whole"):
        launcher = launch(text, num_steps, tag)
        output, _ = launcher.communicate(timeout=240)
        assert launcher.returncode == 0, output
    killed, whole = (checkpoint_dir("base", tag) for tag in ("killed", "whole"))
    one, two = (load_tensors(model_path(directory, num_steps), "cpu") for directory in (whole, killed))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    losses = [[r["loss"] for r in read_metrics(d / "metrics.jsonl") if "loss" in r] for d in (whole, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == num_steps
    assert not list(killed.glob(".*.partial"))


if __name__ == "__main__":
    n_kills = int(sys.argv[1])
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = f"{folder}/base"
        text = prepare(Path(folder))
        num_steps = 60 * n_kills
        for _ in range(n_kills):
            sys.stdout.write(kill_once(text, num_steps, rng) + "\n")
            sys.stdout.flush()
        check_end(text, num_steps)
    sys.stdout.write(f"{n_kills} kills, nothing lost\n")
