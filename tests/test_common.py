import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.common import (
    Runtime,
    atomic_write,
    autodetect_device_type,
    base_dir,
    get_base_dir,
    get_dist_info,
    print0,
    run,
    setup_runtime,
    write_json,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def unused_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


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


def test_write_json_creates_the_directory(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "x": 1\n}\n'


def test_base_dir_that_cannot_be_created(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="set NANOCHAT_BASE_DIR"):
        base_dir()


def test_names_that_scripts_of_nanochat_import(monkeypatch, capsys):
    assert get_base_dir() == str(base_dir())
    assert autodetect_device_type() in ("cuda", "mps", "cpu")
    assert get_dist_info() == (False, 0, 0, 1)
    print0("from", "rank 0", end="!")
    for name, value in {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    assert get_dist_info() == (True, 9, 1, 16)
    print0("from rank 9")
    assert capsys.readouterr().out == "from rank 0!"


def test_run_prints_user_errors_as_one_line():
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
    late = work.get_future().then(lambda future: time.sleep(1))  # its thread will request the GIL again
    time.sleep(0.2)
    print("done", end="")
    {end}
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "error"),
    [
        ("return 0", 0, ""),
        ("raise ValueError('depth=0')", 1, "error: depth=0\n"),
        (
            "raise RuntimeError('timeout caused pair closure')",
            1,
            "with another: timeout caused pair closure\n",
        ),
        ("raise RuntimeError('lost')", 1, "RuntimeError: lost\n"),
    ],
)
def test_a_rank_does_not_finalise_the_interpreter(end, status, error):
    """A gloo thread that requested the GIL during finalisation aborted ranks whose work was done."""
    command = [sys.executable, "-c", RANK_WITH_A_LATE_THREAD.replace("{end}", end)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "doneat exit\n")
    assert done.stderr.endswith(error)


TWO_RANKS = """
import sys, time
import torch
from nanochat.common import run, setup_runtime
def main():
    runtime = setup_runtime("cpu")
    for step in range(10**6):
        runtime.sum_(torch.ones(1))
        if step == 9:
            print("running", flush=True)
run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_ends_the_other_with_a_message(fault, unused_port):
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS],
            env={**os.environ, **group, "RANK": str(rank), "NANOCHAT_TIMEOUT_S": "5"},
            **pipes,
        )
        for rank in range(2)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks] == ["running\n"] * 2
        ranks[1].send_signal(fault)
        _, error = ranks[0].communicate(timeout=60)
        assert ranks[0].returncode == 1
        assert error.startswith("error: rank 0 lost contact with another: ")
        assert "Traceback" not in error
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_an_error_on_one_rank_is_raised_on_all():
    class FirstOfTwo(Runtime):
        def gather(self, value):
            return [value, OSError("disk of the other rank is full")]

    cpu = Runtime.cpu()
    runtime = FirstOfTwo(device=cpu.device, compute_dtype=cpu.compute_dtype, world_size=2)
    with pytest.raises(OSError, match="disk of the other rank is full"), runtime.together():
        pass
    with pytest.raises(ValueError, match="mine"), runtime.together():
        raise ValueError("mine")


def test_invalid_timeout(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for setting in ("0", "-1", "soon"):
        monkeypatch.setenv("NANOCHAT_TIMEOUT_S", setting)
        with pytest.raises(ValueError, match=f"NANOCHAT_TIMEOUT_S='{setting}' must be a number"):
            setup_runtime("cpu")


def test_unknown_device():
    with pytest.raises(ValueError, match=r"device_type='tpu' is not available here; choose from: .*cpu"):
        setup_runtime("tpu")
    assert setup_runtime("cpu") == Runtime.cpu()
    assert setup_runtime("cpu", "float16") == replace(Runtime.cpu(), compute_dtype=torch.float16)
    assert setup_runtime("cpu", "bfloat16", trains=True).compute_dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=r"dtype=float16 is for inference: .* train with bfloat16 or float32"
    ):
        setup_runtime("cpu", "float16", trains=True)


SCRIPTS = sorted(f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("*.py"))
HELP = """
import runpy, sys
slow = {"fastapi", "huggingface_hub", "matplotlib", "numpy", "pyarrow", "tiktoken", "torch", "transformers"}
try:
    runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
finally:
    print(slow & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("script", [*SCRIPTS, "nanochat.dataset", "nanochat.report"])
def test_help_is_fast(script, monkeypatch):
    """--help imports no slow library, and does not show a key in the environment as a default."""
    monkeypatch.setenv("NANOCHAT_API_KEY", "sesame")
    command = [sys.executable, "-c", HELP, script, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert done.stdout.startswith("usage: ")
    assert "sesame" not in done.stdout
