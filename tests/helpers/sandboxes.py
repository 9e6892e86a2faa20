"""What the tests of the sandbox share: a place that must be empty afterwards, and systems that lack walls.

A test module takes the fixtures with `pytest_plugins = "tests.helpers.sandboxes"`.
"""

import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from nanochat import execution

PATIENCE_S = 20  # less than any program here would go on by itself, more than a busy machine needs
IS_LINUX = sys.platform == "linux"
LIBC = ctypes.CDLL(None)
LANDLOCK_VERSION = LIBC.syscall(*map(ctypes.c_long, (444, 0, 0, 1))) if IS_LINUX else -1
HAS_SECCOMP = (
    IS_LINUX
    and platform.machine() in ("x86_64", "aarch64")
    and LIBC.prctl(*map(ctypes.c_long, (21, 0, 0, 0, 0))) >= 0
)
needs_linux = pytest.mark.skipif(not IS_LINUX, reason="memory is limited on Linux only")
needs_landlock = pytest.mark.skipif(LANDLOCK_VERSION < 1, reason="this kernel has no Landlock")
needs_seccomp = pytest.mark.skipif(not HAS_SECCOMP, reason="no seccomp here, or no table for this machine")
needs_scopes = pytest.mark.skipif(LANDLOCK_VERSION < 6, reason="this Landlock does not know signals")
PRELUDE = """
import ctypes, fcntl, multiprocessing, os, resource, socket, struct, subprocess
is_x86 = os.uname().machine == 'x86_64'
def system_call(*words):
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, words)) < 0:
        raise OSError(ctypes.get_errno(), 'system call')
"""


@pytest.fixture
def leaves_nothing(tmp_path, monkeypatch):
    """Temporary directories go to a place of the test's own. No file, zombie or process may be left."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    began = time.monotonic()
    yield
    assert list(place.iterdir()) == []
    assert time.monotonic() - began < PATIENCE_S
    with pytest.raises(ChildProcessError):  # no zombie is left either
        os.waitpid(-1, os.WNOHANG)
    deadline = time.monotonic() + PATIENCE_S  # what was killed needs a moment to die
    while processes_in_sandboxes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_in_sandboxes() == []


def processes_in_sandboxes() -> list[str]:
    """Command lines of the processes that this test's sandboxes hold."""
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={tempfile.gettempdir()}/" in (path / "environ").read_text(errors="replace"):
                lines.append((path / "cmdline").read_text())
        except OSError:
            continue
    return lines


def take_walls_away(walls, tmp_path, monkeypatch):
    """Let the far side find a system without these walls."""
    weakened = tmp_path / "weakened_child.py"
    weakened.write_text(
        f"import sys; sys.path.insert(0, {str(execution.CHILD.parent)!r}); import child\n"
        f"for wall in {walls}: setattr(child, wall, lambda libc: False)\n"
        "child.main(*map(int, sys.argv[1:]))\n"
    )
    monkeypatch.setattr(execution, "CHILD", weakened)
    execution._warn_once.cache_clear()


@pytest.fixture
def unprotected(tmp_path, monkeypatch):
    """A system without Landlock and seccomp."""
    take_walls_away(["confine_files", "confine_calls"], tmp_path, monkeypatch)
    yield
    execution._warn_once.cache_clear()


@pytest.fixture
def neighbour():
    """A process of the same user, in a group of its own."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()
