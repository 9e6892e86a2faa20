"""The sandbox, tested by attacking it. What a system cannot give is probed here, not asked of the sandbox."""

import ctypes
import logging
import math
import os
import platform
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.execution import OUTPUT_BYTES, ExecutionResult, execute_code

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


@pytest.fixture(autouse=True)
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
    child = tmp_path / "child.py"
    child.write_text(
        f"import sys; sys.path.insert(0, {str(execution.CHILD.parent)!r}); import execution_child as child\n"
        f"for wall in {walls}: setattr(child, wall, lambda libc: False)\n"
        "child.main(*map(int, sys.argv[1:]))\n"
    )
    monkeypatch.setattr(execution, "CHILD", child)
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


# ---------------------------------------------------------------------------------------------------------
# Programs that mean well


def test_success():
    assert execute_code("print('out')\nimport sys; print('err', file=sys.stderr)") == ExecutionResult(
        success=True, stdout="out\n", stderr="err\n", error=None, timeout=False, memory_exceeded=False
    )


def test_an_exception():
    result = execute_code("print('before')\ndef f():\n    raise ValueError('first\\nsecond')\nf()")
    assert (result.success, result.stdout, result.error) == (False, "before\n", "ValueError: first\nsecond")
    assert 'File "program.py", line 3, in f\n    raise ValueError' in result.stderr
    assert "execution_child" not in result.stderr


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("x = '\ud800'", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 5"),
        ("1\0", ("ValueError: source", "SyntaxError: source")),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("input()", "EOFError: EOF when reading a line"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import execution_child", "ModuleNotFoundError"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("raise ValueError('\ud800')".encode("unicode_escape").decode(), "ValueError: \\ud800"),
        ("import os; os._exit(0)", "ended early by exit status 0"),
        ("import os; os._exit(3)", "ended early by exit status 3"),
        ("import atexit, os; atexit.register(os._exit, 3)", "ended early by exit status 3"),
        ("import os; os.abort()", "ended early by signal SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "ended early by signal SIGKILL"),
        ("import os; os.kill(os.getpid(), 40)", "ended early by signal"),  # has no name; was a ValueError
        ("import sys; sys.stdout.close(); sys.stderr.close(); 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_failure(code, error):
    result = execute_code(code)
    assert (result.success, result.timeout, result.memory_exceeded) == (False, False, False)
    assert result.error.startswith(error)
    assert len(result.error) <= 1000


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("print('\u65e5\u672c \U0001f600')", "\u65e5\u672c \U0001f600\n"),
        ("import os; os.write(1, b'a\\xff\\xf0b')", "a\ufffd\ufffdb"),
        ("print(__name__); import sys; print(sys.argv)", "__main__\n['program.py']\n"),
        ("import sys; print(sys.modules['__main__'].__dict__ is globals())", "True\n"),
        ("import threading as t; x = t.Thread(target=print, args=(1,)); x.start(); x.join()", "1\n"),
        ("import asyncio; print(asyncio.run(asyncio.sleep(0, 7)))", "7\n"),
        ("import tempfile as t; f = t.TemporaryFile(); f.write(b'1'); f.seek(0); print(f.read())", "b'1'\n"),
        ("import os; os.mkdir('a'); open('a/b', 'w').write('c'); print(os.listdir('a'))", "['b']\n"),
        ("import socket; a, b = socket.socketpair(); a.sendall(b'1'); print(b.recv(1))", "b'1'\n"),
        ("import sqlite3, decimal, hashlib, zoneinfo, random; print(len(random.randbytes(4)))", "4\n"),
        ("try: [0] * 10**12\nexcept MemoryError: print('caught')", "caught\n"),
    ],
)
def test_what_programs_may_do(code, stdout):
    result = execute_code(code)
    assert result == ExecutionResult(True, stdout, "")


def test_a_long_program():
    assert execute_code("x = 1\n" * 50_000 + "print(x)").stdout == "1\n"


def test_threads_may_run_programs_at_the_same_time():
    n_threads = threading.active_count()  # other tests' included
    with ThreadPoolExecutor(4) as pool:
        program = "import time; print({}, time.monotonic()); time.sleep(1); print(time.monotonic())"
        results = list(pool.map(execute_code, map(program.format, range(4))))
    numbers, begins, ends = zip(*(map(float, result.stdout.split()) for result in results), strict=True)
    assert numbers == (0, 1, 2, 3)
    assert sorted(begins)[1] < min(ends)
    assert threading.active_count() <= n_threads


def test_an_exception_that_cannot_be_written_out():
    """Frames of the sandbox were shown, and the error was an exit status."""
    result = execute_code("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E")
    assert result.error == "E: <exception str() failed>"
    assert "execution_child" not in result.stderr


def test_packages_can_be_imported():
    assert execute_code("import numpy; print(numpy.arange(3).sum())", timeout=60).stdout == "3\n"


@pytest.mark.parametrize("number", [0, -1, math.nan, math.inf, 1e300])
def test_a_time_that_cannot_be_given(number):
    with pytest.raises(ValueError, match=f"timeout={re.escape(str(number))} must be above 0"):
        execute_code("", timeout=number)


@pytest.mark.parametrize("number", [2**20, math.nan, math.inf, 2**80, 1e8 + 0.5])
def test_memory_that_cannot_be_given(number):
    with pytest.raises(ValueError, match=f"={re.escape(str(number))} must be a whole number from"):
        execute_code("", maximum_memory_bytes=number)


def test_memory_as_a_float():
    """256e6 ended as a sandbox that does not start."""
    assert execute_code("", timeout=5, maximum_memory_bytes=256e6).success


def test_a_program_that_ends_between_two_looks(monkeypatch):
    """On a busy machine: it wrote and ended after select had found nothing, and was not read any more."""

    class Slow(selectors.DefaultSelector):
        is_first = True

        def select(self, timeout=None):
            if not self.is_first:
                return super().select(timeout)
            self.is_first = False
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            return []

    monkeypatch.setattr(selectors, "DefaultSelector", Slow)
    assert execute_code("print(1)", timeout=PATIENCE_S) == ExecutionResult(True, "1\n", "")


def test_a_sandbox_that_does_not_start_is_not_the_programs_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "CHILD", tmp_path / "no such file")
    with pytest.raises(RuntimeError, match=r"did not start.*no such file"):
        execute_code("")


# ---------------------------------------------------------------------------------------------------------
# Time, memory, output


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\nwhile True: time.sleep(1)",
        "import signal, time\nfor s in (15, 2, 1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "import os, time; os.closerange(0, 64); time.sleep(60)",
        "import atexit, time; atexit.register(time.sleep, 60)",
        "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()",
        "while True: print('x' * 1000)",
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
        "try:\n    while True: pass\nfinally:\n    while True: pass",
    ],
)
def test_timeout(code):
    began = time.monotonic()
    result = execute_code(code, timeout=0.7)
    assert (result.success, result.timeout, result.error) == (False, True, "TimeoutError: over 0.7 seconds")
    assert time.monotonic() - began < PATIENCE_S
    assert len(result.stdout) <= OUTPUT_BYTES
    assert len(result.stderr) <= OUTPUT_BYTES


def test_the_start_of_stdout_and_the_end_of_stderr_are_kept():
    code = "import sys\nfor i in range(50_000): print(i); print(i, file=sys.stderr)\nraise ValueError('end')"
    result = execute_code(code)
    assert len(result.stdout) == len(result.stderr) == OUTPUT_BYTES
    assert result.stdout.startswith("0\n1\n")
    assert result.stderr.endswith("ValueError: end\n")


@needs_linux
@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(10 * 2**30)",
        "x = [0] * 10**10",
        "x = []\nwhile True: x.append(bytearray(100_000))",
        "x = 0\nwhile True: x = [x]",  # the last free byte goes too
    ],
)
def test_memory_exceeded(code):
    result = execute_code(code, maximum_memory_bytes=64 * 2**20)
    assert (result.success, result.timeout, result.memory_exceeded) == (False, False, True)
    assert result.error.startswith("MemoryError")


@needs_linux
def test_the_limit_on_memory_is_the_callers():
    code = "x = bytearray(150 * 2**20)"
    assert execute_code(code).success
    assert execute_code(code, maximum_memory_bytes=128 * 2**20).memory_exceeded


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("f = open('big', 'wb')\nwhile True: f.write(bytes(2**20))", "OSError: [Errno 27]"),
        ("files = []\nwhile True: files.append(open('many', 'w'))", "OSError: [Errno 24]"),
        ("import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 65))", "ValueError: not allowed to raise"),
    ],
)
def test_files_are_bounded(code, error):
    assert execute_code(code).error.startswith(error)


def test_limits():
    names = ("RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")
    code = f"import resource as r\nfor name in {names}: print(*r.getrlimit(getattr(r, name)))"
    assert execute_code(code, timeout=8.5).stdout.split() == f"10 10 {2**24} {2**24} 64 64 0 0".split()


# ---------------------------------------------------------------------------------------------------------
# Reaching out


def test_the_callers_environment_is_not_visible(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "xyzzy")
    names = {"HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    allowed = names | {"LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # Python's own, and macOS's
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
def test_files_outside(code, tmp_path):
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
        "system_call(157 if is_x86 else 167, 1, 0)",  # prctl(PR_SET_PDEATHSIG): to outlive the parent
        "os.open('/dev/zero', os.O_TRUNC)",  # readable, but of no size: it could be any readable file
        "os.open({outside!r}, 3)",  # for neither reading nor writing
        "os.open({outside!r}, 3 | os.O_TRUNC)",
        "os.posix_fallocate(os.open('mine', os.O_RDWR | os.O_CREAT), 0, 4096)",
        # no functions of Python's: ptrace(ATTACH), unshare(user namespace), io_uring_setup, shmctl(INFO)
        "system_call(101 if is_x86 else 117, 16, {parent}, 0, 0)",
        "system_call(272 if is_x86 else 97, 0x10000000)",
        "system_call(425, 1, 0)",
        "system_call(*((31, 0, 14, 0) if is_x86 else (195, 0, 14, 0)))",
    ],
)
def test_the_rest_of_the_system(code, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    before = outside.stat()
    result = execute_code(PRELUDE + code.format(outside=str(outside), parent=os.getpid()))
    assert result.error.startswith("PermissionError: [Errno 1]"), result
    assert outside.stat() == before


@needs_seccomp
@pytest.mark.parametrize("number", [435, 454, 10_000, 0x40000000 + 57])
def test_system_calls_that_a_filter_cannot_judge_do_not_exist(number):
    code = "import ctypes as c; l = c.CDLL(None, use_errno=True); print(l.syscall({}), c.get_errno())"
    assert execute_code(code.format(number)).stdout == "-1 38\n"


# Signals are sent by the kernel, with its rights, to the owner of a file that has something to read.
SIGNALS = (
    "fcntl.fcntl(r, 8, {pid}); fcntl.fcntl(r, 10, 9)",  # F_SETOWN, F_SETSIG
    "fcntl.fcntl(r, 8, -{pid}); fcntl.fcntl(r, 10, 9)",
    "fcntl.fcntl(r, 15, struct.pack('ii', 1, {pid})); fcntl.fcntl(r, 10, 9)",  # F_SETOWN_EX
    "system_call(72 if is_x86 else 25, r, 8 | 1 << 32, {pid}); fcntl.fcntl(r, 10, 9)",  # it counts 32 bits
    "fcntl.ioctl(r, 0x8901, struct.pack('i', {pid}))",  # FIOSETOWN; then SIGIO, which kills, too
    "fcntl.ioctl(r, 0x8902, struct.pack('i', -{pid}))",  # SIOCSPGRP
)
HAVE_IT_SENT = """
a, b = socket.socketpair()
r, w = a.fileno(), b.fileno()
{}
fcntl.fcntl(r, fcntl.F_SETFL, fcntl.fcntl(r, fcntl.F_GETFL) | os.O_ASYNC)
os.write(w, b'x')
"""


@needs_seccomp
@pytest.mark.parametrize("code", SIGNALS)
def test_no_signal_by_way_of_a_file(code, neighbour):
    """A program could kill whatever runs as the same user, this process too."""
    result = execute_code(PRELUDE + HAVE_IT_SENT.format(code.format(pid=neighbour.pid)))
    assert result.error.startswith("PermissionError: [Errno 1]"), result
    assert neighbour.poll() is None


@needs_scopes
@pytest.mark.parametrize("code", [*SIGNALS, "os.kill({pid}, 9)"])
def test_landlock_alone_lets_no_signal_out(code, neighbour, tmp_path, monkeypatch):
    take_walls_away(["confine_calls"], tmp_path, monkeypatch)
    result = execute_code(PRELUDE + HAVE_IT_SENT.format(code.format(pid=neighbour.pid)))
    assert result.success or result.error.startswith("PermissionError: [Errno 1]"), result
    time.sleep(0.1)
    assert neighbour.poll() is None


@needs_scopes
def test_landlock_alone_lets_no_datagram_out(tmp_path, monkeypatch):
    take_walls_away(["confine_calls"], tmp_path, monkeypatch)
    code = "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', {!r})"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0nanochat {os.getpid()}")
        result = execute_code(PRELUDE + code.format(listener.getsockname()))
        assert result.error.startswith("PermissionError: [Errno 1]"), result


@needs_landlock
def test_an_editable_install_does_not_show_the_repository():
    """Its place is on sys.path: .git/config, .env and a base directory there could be read."""
    for path in (execution.CHILD, execution.CHILD.parent.parent / "pyproject.toml"):
        result = execute_code(f"open({str(path)!r})")
        assert result.error.startswith("PermissionError"), result


@needs_linux
def test_root_is_root_in_name_only():
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
def test_nothing_survives(leave):
    result = execute_code(DAEMON.format(leave=leave))
    if HAS_SECCOMP or os.getuid() != 0:
        assert not result.success  # and the fixture looks for survivors


def test_a_background_process_is_killed_where_it_can_be_started(unprotected):
    began = time.monotonic()
    result = execute_code(DAEMON.format(leave="pass"))
    assert result.success == (os.getuid() == 0)
    assert time.monotonic() - began < PATIENCE_S


# ---------------------------------------------------------------------------------------------------------
# Spoiling the sandbox


def test_closed_file_descriptors_are_no_success():
    result = execute_code("import os; os.closerange(0, 64)")
    assert (result.success, result.timeout) == (False, False)
    assert result.error.startswith("ended early by exit status")


@pytest.mark.parametrize("noise", [b"\xff" * 100_000, b"ok", b"ok\n", b"memory", b"\n\n\n", b"error"])
def test_noise_in_the_report_is_no_success(noise):
    code = f"import os\nfor fd in range(3, 64):\n    try: os.write(fd, {noise!r})\n    except OSError: pass\n"
    assert not execute_code(code).success


def test_deep_and_locked_directories_are_removed():
    code = (
        "import os\nfor i in range(1100):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "    if i in (0, 1, 1000): open('f', 'w').close(); os.mkdir('e', 0)\n"
        "os.symlink('/', 'root')\n"
    )
    assert execute_code(code).success


def test_directories_are_removed_whatever_their_names():
    """One of a name that was needed to unpack another stayed for ever."""
    assert execute_code("import os; os.makedirs('a/b'); os.makedirs('lifted 1/x')").success


def test_directories_are_removed_whatever_their_modes(unprotected):
    code = (
        "import os; os.makedirs('a/b'); open('a/b/c', 'w')\nfor path in ('a/b', 'a', '.'): os.chmod(path, 0)"
    )
    assert execute_code(code).success


def test_a_directory_that_removed_itself_is_a_warning(unprotected, caplog):
    assert execute_code("import os; os.rmdir(os.getcwd())").success
    assert "cannot remove" in caplog.text


def test_what_is_missing_is_said_once(unprotected, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        assert execute_code("print(1)").stdout == "1\n"
    (record,) = caplog.records
    assert "without a bound on the files that they reach, a wall against" in record.message


@needs_landlock
@needs_seccomp
def test_nothing_is_missing_where_the_kernel_has_it(caplog):
    execution._warn_once.cache_clear()
    execute_code("")
    assert not caplog.records
