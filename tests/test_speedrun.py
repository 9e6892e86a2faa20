"""What speedrun.sh decides: which flags on which machine, and which stages a second start runs again."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING = ["base_train", "mid_train", "chat_sft", "chat_rl"]
# instead of Python: tells of the machine that a test wants, notes all else, and fails where it is told to
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then
    case $2 in *import\\ wandb*) exit 1 ;; *) echo "$MACHINE" ;; esac
    exit
fi
name=$(echo "$*" | grep -oE '(scripts|tasks|nanochat)\\.[a-z_]+' | head -1)
echo "$*" >>calls
case $* in *"${FAILS:-nothing}"*) exit 1 ;; esac
echo "saved to somewhere"
[ "${STOPS:-}" = "${name#*.}" ] || echo "${name#*.}: done"
"""


@pytest.fixture
def speedrun(tmp_path):
    """Run speedrun.sh on a machine of that many GPUs; returns the commands that it ran, or why it failed."""
    for folder in ("dev", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    (tmp_path / "dev/setup.sh").touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(*args, gpus=0, gib=80, has_fp8=True, **env):
        calls = tmp_path / "calls"
        calls.write_text("")
        env |= {"PATH": "/usr/bin:/bin", "MACHINE": f"{gpus} {gib if gpus else 0} {bool(gpus) and has_fp8}"}
        env.setdefault("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
        result = subprocess.run(
            ["bash", tmp_path / "speedrun.sh", *args], env=env, capture_output=True, text=True, timeout=60
        )
        if result.returncode:
            return result.stderr.strip().splitlines()[-1]
        return calls.read_text().splitlines()

    return run


def command(calls, name):
    (line,) = [line for line in calls if f".{name} " in f"{line} "]
    return line


def names(calls):
    return [
        part for line in calls for part in line.replace(".", " ").split() if part in (*TRAINING, "tok_train")
    ]


def test_a_laptop_trains_on_what_it_has(speedrun):
    calls = speedrun()
    assert names(calls) == ["tok_train", *TRAINING]
    assert not any("hub" in line or "distributed" in line for line in calls)
    assert "--depth=4" in command(calls, "base_train")
    assert calls[-1] == "-m nanochat.report generate --dollars-per-hour=0"


@pytest.mark.parametrize(
    ("gpus", "ranks", "depth"), [(1, 1, 12), (3, 2, 12), (6, 4, 12), (8, 8, 20), (10, 8, 20)]
)
def test_as_many_gpus_as_batches_divide_by(speedrun, gpus, ranks, depth):
    calls = speedrun(gpus=gpus)
    base = command(calls, "base_train")
    assert ("distributed" in base) == (ranks > 1)
    assert ranks == 1 or f"--nproc_per_node={ranks} " in base
    assert f"--depth={depth} " in base
    assert "--data=hub" in base
    assert "--data=hub" in command(calls, "chat_sft")
    assert "chat_rl" not in names(calls)


def test_embedded_data_on_eight_gpus_is_shared_out(speedrun):
    calls = speedrun(gpus=8, DATA="embedded")
    rows, total, seq_len = 2, 8192, 256
    base = command(calls, "base_train")
    assert f"--device-batch-size={rows} " in base
    assert f"--max-seq-len={seq_len} --total-batch-size={total} " in base
    assert total % (8 * rows * seq_len) == 0


def test_8_bits_are_for_pretraining_on_cards_that_have_them(speedrun):
    calls = speedrun(gpus=1, FP8="1")
    assert [line for line in calls if "--fp8" in line] == [command(calls, "base_train")]
    assert "Hopper" in speedrun(gpus=1, has_fp8=False, FP8="1", NANOCHAT_BASE_DIR="other")
    assert "Hopper" in speedrun(FP8="1", NANOCHAT_BASE_DIR="other")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NPROC_PER_NODE": "3"}, "must be 1, 2, 4 or 8"),
        ({"WANDB_RUN": "x"}, "needs wandb"),
        ({"CORE_BUNDLE": "/nowhere"}, "no folder with a core.yaml"),
        ({"FAILS": "scripts.doctor"}, "the doctor found"),
        ({"FAILS": "nanochat.dataset", "gpus": 1}, "no data from the hub"),
        ({"STOPS": "mid_train"}, "told to stop"),
    ],
)
def test_what_is_wrong_is_said(speedrun, env, message):
    assert message in speedrun(**env)
    assert "unknown argument" in speedrun("--frehs")


def test_a_second_start_does_what_is_left(speedrun):
    assert "told to stop" in speedrun(STOPS="mid_train")
    calls = speedrun()
    assert names(calls) == TRAINING[1:]
    assert command(calls, "mid_train").endswith("--resume")
    assert command(calls, "chat_sft").endswith("--overwrite")  # what came before it is new
    assert names(speedrun()) == []
    assert "began with SEED=42" in speedrun(SEED="43")
    assert names(speedrun("--fresh")) == ["tok_train", *TRAINING]
    assert "told to stop" in speedrun("--fresh", STOPS="chat_sft")
    assert names(speedrun(DEVICE_BATCH_SIZE="4")) == TRAINING
