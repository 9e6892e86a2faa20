"""Fixtures for tests of the sandbox: a check for leftovers, and systems that lack protections.

Test modules take the fixtures with `pytest_plugins = "tests.helpers.sandboxes"`.
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

PATIENCE_S = 20  # less than the sleeps of the test programs, more than a busy machine needs
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
needs_seccomp = pytest.mark.skipif(not HAS_SECCOMP, reason="no seccomp, or no table for this machine")
needs_scopes = pytest.mark.skipif(LANDLOCK_VERSION < 6, reason="this Landlock does not restrict signals")
PRELUDE = """
import ctypes, fcntl, multiprocessing, os, resource, socket, struct, subprocess
is_x86 = os.uname().machine == 'x86_64'
def system_call(*words):
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, words)) < 0:
        raise OSError(ctypes.get_errno(), 'system call')
"""


@pytest.fixture
def no_leftovers(tmp_path, monkeypatch):
    """Give the test its own directory for temporary files; check that no file, zombie or process is left."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    start = time.monotonic()
    yield
    assert list(directory.iterdir()) == []
    assert time.monotonic() - start < PATIENCE_S
    with pytest.raises(ChildProcessError):  # raised if there are no zombies
        os.waitpid(-1, os.WNOHANG)
    deadline = time.monotonic() + PATIENCE_S  # killed processes need a moment to end
    while processes_in_sandboxes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_in_sandboxes() == []


def processes_in_sandboxes() -> list[str]:
    """Return the command lines of the processes in this test's sandboxes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={tempfile.gettempdir()}/" in (path / "environ").read_text(errors="replace"):
                lines.append((path / "cmdline").read_text())
        except OSError:
            continue
    return lines


def disable_protections(functions, tmp_path, monkeypatch):
    """Make these functions of child.py report that the system lacks their protection."""
    weakened = tmp_path / "weakened_child.py"
    weakened.write_text(
        f"import sys; sys.path.insert(0, {str(execution.CHILD.parent)!r}); import child\n"
        f"for function in {functions}: setattr(child, function, lambda libc: False)\n"
        "child.main(*map(int, sys.argv[1:]))\n"
    )
    monkeypatch.setattr(execution, "CHILD", weakened)
    execution._warn_once.cache_clear()


@pytest.fixture
def unprotected(tmp_path, monkeypatch):
    """A system without Landlock and seccomp."""
    disable_protections(["confine_files", "confine_calls"], tmp_path, monkeypatch)
    yield
    execution._warn_once.cache_clear()


@pytest.fixture
def neighbor():
    """A process of the same user, in its own process group."""
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()
