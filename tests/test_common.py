import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import Runtime, atomic_write, base_dir, run, setup_runtime, write_json

ROOT = Path(__file__).parent.parent


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:  # noqa: PT012 - the write must fail half-way
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with atomic_write(path, "w") as file:
        file.write("new \u00e9")
    assert path.read_text(encoding="utf-8") == "new \u00e9"


def test_write_json_makes_the_folder(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "x": 1\n}\n'


def test_base_dir_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="set NANOCHAT_BASE_DIR"):
        base_dir()


def test_run_turns_errors_of_the_user_into_one_line():
    def main():
        raise ValueError("depth=0 must be at least 1")

    with pytest.raises(SystemExit, match="error: depth=0 must be at least 1"):
        run(main)
    with pytest.raises(SystemExit) as end:
        run(lambda: 0)
    assert end.value.code == 0


RANK_WITH_A_LATE_THREAD = """
import atexit, sys, time
import torch
import torch.distributed as dist
from nanochat.common import run
store = dist.TCPStore("localhost", 0, 1, is_master=True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
other = dist.ProcessGroupGloo(dist.PrefixStore("other", store), 0, 1)
atexit.register(print, "at exit")
def main():
    work = other.allreduce([torch.ones(3)])
    late = work.get_future().then(lambda future: time.sleep(1))  # its thread will want Python's lock again
    time.sleep(0.2)
    print("done", end="")
    {end}
run(main)
"""


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("return 0", 0, ""),
        ("raise ValueError('depth=0')", 1, "error: depth=0\n"),
        ("raise RuntimeError('lost')", 1, "RuntimeError: lost\n"),
    ],
)
def test_a_rank_does_not_finalise_the_interpreter(end, status, error):
    """A thread of gloo's that came for Python's lock after that aborted ranks whose work was all done."""
    command = [sys.executable, "-c", RANK_WITH_A_LATE_THREAD.replace("{end}", end)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "doneat exit\n")
    assert done.stderr.endswith(error)


def test_unknown_device():
    with pytest.raises(ValueError, match=r"device_type='tpu' is not available here; choose from: .*cpu"):
        setup_runtime("tpu")
    assert setup_runtime("cpu") == Runtime.cpu()


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_scripts_do_nothing_on_import(script):
    """Importing a script neither trains nor loads torch, so that --help is quick and tests can call main."""
    code = f"import sys, scripts.{script} as s; assert callable(s.main); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
