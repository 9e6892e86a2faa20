"""Attacks on the sandbox. The tests probe for features of the kernel themselves, without the sandbox."""

import logging
import os
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from nanochat import execution
from tests.helpers.sandboxes import (
    HAS_SECCOMP,
    PATIENCE_S,
    PRELUDE,
    disable_protections,
    needs_landlock,
    needs_linux,
    needs_scopes,
    needs_seccomp,
)

pytest_plugins = "tests.helpers.sandboxes"
# on a loaded machine the usual 5 seconds may pass before Python ends
execute_code = partial(execution.execute_code, timeout=60)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


# ---------------------------------------------------------------------------------------------------------
# Access to the rest of the system


def test_environment_of_the_caller_is_hidden(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy")
    names = {"HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    allowed = names | {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # set by Python, and by macOS
    result = execute_code("import os; print(*os.environ)")
    assert names <= set(result.stdout.split()) <= allowed


@needs_landlock
@pytest.mark.parametrize(
    "code",
    [
        "open('/proc/%d/environ' % os.getppid())",
        "open('/proc/self/environ')",
        "open('/etc/passwd')",
        "os.listdir('/')",
        "open({outside!r})",
        "open({outside!r}, 'w')",
        "open({outside!r}, 'a')",
        "os.open({outside!r}, os.O_RDONLY | os.O_TRUNC)",
        "open({outside!r} + '2', 'w')",
        "os.mkdir({outside!r} + '2')",
        "os.remove({outside!r})",
        "os.rename({outside!r}, {outside!r} + '2')",
        "os.rename({outside!r}, 'mine')",
        "os.link({outside!r}, 'mine')",
        "os.symlink({outside!r}, 'link'); open('link')",
        "os.rmdir(os.getcwd())",
        "os.rename(os.getcwd(), {outside!r} + '2')",
        "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    ],
)
def test_files_outside_are_inaccessible(code, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    result = execute_code("import os\n" + code.format(outside=str(outside)))
    assert result.error.startswith(("PermissionError", "OSError: [Errno 18]")), result
    assert outside.read_text() == "precious"
    assert not Path(f"{outside}2").exists()


@needs_seccomp
@pytest.mark.parametrize(
    "code",
    [
        "os.fork()",
        "[os.fork() for _ in range(6)]",
        "subprocess.run(['true'])",
        "os.system('true') == 0 or os.posix_spawn('/bin/true', ['true'], {{}})",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "socket.create_connection(('127.0.0.1', 1))",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "os.kill(os.getppid(), 0)",
        "os.kill(-1, 0)",
        "os.kill(0, 0)",
        "os.pidfd_open({parent})",
        "resource.prlimit({parent}, resource.RLIMIT_CORE, (0, 0))",
        "os.setpriority(os.PRIO_PROCESS, {parent}, 5)",
        "os.sched_setaffinity({parent}, [0])",
        "os.memfd_create('x')",
        "os.chmod({outside!r}, 0o777)",
        "os.chown({outside!r}, 1, 1)",
        "os.utime({outside!r})",
        "os.truncate({outside!r}, 0)",
        "os.setxattr({outside!r}, 'user.x', b'')",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)",
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
        "system_call(53 if is_x86 else 199, 1, 2 | 1 << 32, 0, 0)",
        "system_call(157 if is_x86 else 167, 1, 0)",  # prctl(PR_SET_PDEATHSIG), to outlive the parent
        "os.open('/dev/zero', os.O_TRUNC)",  # stands for any readable file
        "os.open({outside!r}, 3)",  # neither reading nor writing
        "os.open({outside!r}, 3 | os.O_TRUNC)",
        "os.posix_fallocate(os.open('mine', os.O_RDWR | os.O_CREAT), 0, 4096)",
        # without a Python function: ptrace(ATTACH), unshare(user namespace), io_uring_setup, shmctl(INFO)
        "system_call(101 if is_x86 else 117, 16, {parent}, 0, 0)",
        "system_call(272 if is_x86 else 97, 0x10000000)",
        "system_call(425, 1, 0)",
        "system_call(*((31, 0, 14, 0) if is_x86 else (195, 0, 14, 0)))",
    ],
)
def test_system_calls_are_denied(code, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    before = outside.stat()
    result = execute_code(PRELUDE + code.format(outside=str(outside), parent=os.getpid()))
    assert result.error.startswith("PermissionError: [Errno 1]"), result
    assert outside.stat() == before


@needs_seccomp
@pytest.mark.parametrize("number", [435, 454, 10_000, 0x40000000 + 57])
def test_system_calls_without_a_rule_are_not_implemented(number):
    code = "import ctypes as c; l = c.CDLL(None, use_errno=True); print(l.syscall({}), c.get_errno())"
    assert execute_code(code.format(number)).stdout == "-1 38\n"


# The kernel, with its own rights, signals the owner of a file that has input.
SIGNALS = (
    "fcntl.fcntl(r, 8, {pid}); fcntl.fcntl(r, 10, 9)",  # F_SETOWN, F_SETSIG
    "fcntl.fcntl(r, 8, -{pid}); fcntl.fcntl(r, 10, 9)",
    "fcntl.fcntl(r, 15, struct.pack('ii', 1, {pid})); fcntl.fcntl(r, 10, 9)",  # F_SETOWN_EX
    "system_call(72 if is_x86 else 25, r, 8 | 1 << 32, {pid}); fcntl.fcntl(r, 10, 9)",  # 32 bits count
    "fcntl.ioctl(r, 0x8901, struct.pack('i', {pid}))",  # FIOSETOWN; SIGIO kills, too
    "fcntl.ioctl(r, 0x8902, struct.pack('i', -{pid}))",  # SIOCSPGRP
)
TRIGGER_SIGNAL = """
a, b = socket.socketpair()
r, w = a.fileno(), b.fileno()
{}
fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
os.write(w, b'x')
"""


@needs_seccomp
@pytest.mark.parametrize("code", SIGNALS)
def test_no_signal_through_a_file_owner(code, neighbor):
    """Regression: a program could kill any process of the same user, including this one."""
    result = execute_code(PRELUDE + TRIGGER_SIGNAL.format(code.format(pid=neighbor.pid)))
    assert result.error.startswith("PermissionError: [Errno 1]"), result
    assert neighbor.poll() is None


@needs_scopes
@pytest.mark.parametrize("code", [*SIGNALS, "os.kill({pid}, 9)"])
def test_landlock_alone_blocks_signals(code, neighbor, tmp_path, monkeypatch):
    disable_protections(["confine_calls"], tmp_path, monkeypatch)
    result = execute_code(PRELUDE + TRIGGER_SIGNAL.format(code.format(pid=neighbor.pid)))
    assert result.success or result.error.startswith("PermissionError: [Errno 1]"), result
    time.sleep(0.1)
    assert neighbor.poll() is None


@needs_scopes
def test_landlock_alone_blocks_datagrams(tmp_path, monkeypatch):
    disable_protections(["confine_calls"], tmp_path, monkeypatch)
    code = "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', {!r})"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0nanochat {os.getpid()}")
        result = execute_code(PRELUDE + code.format(listener.getsockname()))
        assert result.error.startswith("PermissionError: [Errno 1]"), result


@needs_landlock
def test_an_editable_install_does_not_expose_the_repository():
    """Regression: it is on sys.path, so .git/config, .env and a base directory in it were readable."""
    for path in (execution.CHILD, Path(__file__).parent.parent / "pyproject.toml"):
        result = execute_code(f"open({str(path)!r})")
        assert result.error.startswith("PermissionError"), result


@needs_linux
def test_no_capabilities():
    code = (
        "import ctypes, struct\nheader = ctypes.create_string_buffer(struct.pack('=Ii', 0x20080522, 0))\n"
        "data = ctypes.create_string_buffer(24)\n"
        "assert ctypes.CDLL(None).capget(header, data) == 0\nprint(data.raw == bytes(24))"
    )
    assert execute_code(code).stdout == "True\n"


DAEMON = """
import os, time
if os.fork() == 0:
    {leave}
    if os.fork() == 0:
        time.sleep(30)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("leave", ["pass", "os.setsid()"])
def test_no_process_survives(leave):
    result = execute_code(DAEMON.format(leave=leave))
    if HAS_SECCOMP or os.getuid() != 0:
        assert not result.success  # the fixture looks for survivors


def test_background_processes_are_killed_without_seccomp(unprotected):
    start = time.monotonic()
    result = execute_code(DAEMON.format(leave="pass"))
    assert result.success == (os.getuid() == 0)
    assert time.monotonic() - start < PATIENCE_S


# ---------------------------------------------------------------------------------------------------------
# Attacks on the sandbox itself


def test_closing_file_descriptors_is_a_failure():
    result = execute_code("import os; os.closerange(0, 64)")
    assert (result.success, result.timeout) == (False, False)
    assert result.error.startswith("ended early by exit status")


@pytest.mark.parametrize("noise", [b"\xff" * 100_000, b"ok", b"ok\n", b"memory", b"\n\n\n", b"error"])
def test_noise_in_the_report_is_a_failure(noise):
    code = f"import os\nfor fd in range(3, 64):\n    try: os.write(fd, {noise!r})\n    except OSError: pass\n"
    assert not execute_code(code).success


def test_deep_and_locked_directories_are_removed():
    code = (
        "import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "    if i in (0, 1, 1000): open('f', 'w').close(); os.mkdir('e', 0)\n"
        "os.symlink('/', 'root')\n"
    )
    assert execute_code(code).success


def test_directories_of_any_name_are_removed():
    """Regression: a directory with a name used during the removal was left behind."""
    assert execute_code("import os; os.makedirs('a/b'); os.makedirs('lifted 1/x')").success


def test_directories_of_any_mode_are_removed(unprotected):
    code = (
        "import os; os.makedirs('a/b'); open('a/b/c', 'w')\nfor path in ('a/b', 'a', '.'): os.chmod(path, 0)"
    )
    assert execute_code(code).success


def test_a_directory_that_removed_itself_is_a_warning(unprotected, caplog):
    assert execute_code("import os; os.rmdir(os.getcwd())").success
    assert "cannot remove" in caplog.text


def test_missing_protections_are_logged_once(unprotected, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert execute_code("print(1)").stdout == "1\n"
    (record,) = caplog.records
    assert "without restricted file access, isolation from the network" in record.message


@needs_landlock
@needs_seccomp
def test_no_warning_on_a_full_featured_kernel(caplog):
    execution._warn_once.cache_clear()
    execute_code("")
    assert not caplog.records
