"""Programs in the sandbox, and their limits on time, memory and output."""

import math
import os
import re
import selectors
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat import execution
from nanochat.execution import OUTPUT_BYTES, ExecutionResult, execute_code
from tests.helpers.sandboxes import (
    PATIENCE_S,
    needs_linux,
)

pytest_plugins = "tests.helpers.sandboxes"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


# ---------------------------------------------------------------------------------------------------------
# Benign programs


def test_success():
    assert execute_code("print('out')\nimport sys; print('err', file=sys.stderr)") == ExecutionResult(
        success=True, stdout="out\n", stderr="err\n", error=None, timeout=False, memory_exceeded=False
    )


def test_exception():
    result = execute_code("print('before')\ndef f():\n    raise ValueError('first\\nsecond')\nf()")
    assert (result.success, result.stdout, result.error) == (False, "before\n", "ValueError: first\nsecond")
    assert 'File "program.py", line 3, in f\n    raise ValueError' in result.stderr
    assert "child.py" not in result.stderr


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
        ("import child", "ModuleNotFoundError"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("raise ValueError('x' * 10**6)", "ValueError: xxx"),
        ("raise ValueError('\ud800')".encode("unicode_escape").decode(), "ValueError: \\ud800"),
        ("import os; os._exit(0)", "ended early by exit status 0"),
        ("import os; os._exit(3)", "ended early by exit status 3"),
        ("import atexit, os; atexit.register(os._exit, 3)", "ended early by exit status 3"),
        ("import os; os.abort()", "ended early by signal SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", "ended early by signal SIGKILL"),
        # regression: a signal without a name was a ValueError
        ("import os; os.kill(os.getpid(), 40)", "ended early by signal"),
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
def test_allowed_features(code, stdout):
    result = execute_code(code)
    assert result == ExecutionResult(True, stdout, "")


def test_long_program():
    assert execute_code("x = 1\n" * 50_000 + "print(x)").stdout == "1\n"


def test_threads_run_programs_concurrently():
    n_threads = threading.active_count()  # includes threads of other tests
    with ThreadPoolExecutor(4) as pool:
        program = "import time; print({}, time.monotonic()); time.sleep(1); print(time.monotonic())"
        results = list(pool.map(execute_code, map(program.format, range(4))))
    numbers, starts, ends = zip(*(map(float, result.stdout.split()) for result in results), strict=True)
    assert numbers == (0, 1, 2, 3)
    assert sorted(starts)[1] < min(ends)
    assert threading.active_count() <= n_threads


def test_exception_with_a_failing_str():
    """Regression: frames of the sandbox were shown, and the error was an exit status."""
    result = execute_code("class E(Exception):\n    def __str__(self): return 1 / 0\nraise E")
    assert result.error == "E: <exception str() failed>"
    assert "child.py" not in result.stderr


def test_packages_can_be_imported():
    assert execute_code("import numpy; print(numpy.arange(3).sum())", timeout=60).stdout == "3\n"


@pytest.mark.parametrize("number", [0, -1, math.nan, math.inf, 1e300])
def test_invalid_timeout(number):
    with pytest.raises(ValueError, match=f"timeout={re.escape(str(number))} must be above 0"):
        execute_code("", timeout=number)


@pytest.mark.parametrize("number", [2**20, math.nan, math.inf, 2**80, 1e8 + 0.5])
def test_invalid_memory(number):
    with pytest.raises(ValueError, match=f"={re.escape(str(number))} must be a whole number from"):
        execute_code("", maximum_memory_bytes=number)


def test_memory_as_a_float():
    """Regression: with 256e6 the sandbox did not start."""
    assert execute_code("", timeout=5, maximum_memory_bytes=256e6).success


def test_a_program_that_ends_between_select_and_poll(monkeypatch):
    """Regression: on a busy machine, output written after an empty select was lost if the program ended."""

    class SlowSelector(selectors.DefaultSelector):
        is_first = True

        def select(self, timeout=None):
            if not self.is_first:
                return super().select(timeout)
            self.is_first = False
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            return []

    monkeypatch.setattr(selectors, "DefaultSelector", SlowSelector)
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
    start = time.monotonic()
    result = execute_code(code, timeout=0.7)
    assert (result.success, result.timeout, result.error) == (False, True, "TimeoutError: over 0.7 seconds")
    assert time.monotonic() - start < PATIENCE_S
    assert len(result.stdout) <= OUTPUT_BYTES
    assert len(result.stderr) <= OUTPUT_BYTES


def test_start_of_stdout_and_end_of_stderr_are_kept():
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
        "x = 0\nwhile True: x = [x]",  # uses the last free byte, too
    ],
)
def test_memory_exceeded(code):
    result = execute_code(code, maximum_memory_bytes=64 * 2**20)
    assert (result.success, result.timeout, result.memory_exceeded) == (False, False, True)
    assert result.error.startswith("MemoryError")


@needs_linux
def test_memory_limit_is_an_argument():
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
def test_files_are_limited(code, error):
    assert execute_code(code).error.startswith(error)


def test_limits():
    names = ("RLIMIT_CPU", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE")
    code = f"import resource as r\nfor name in {names}: print(*r.getrlimit(getattr(r, name)))"
    assert execute_code(code, timeout=8.5).stdout.split() == f"10 10 {2**24} {2**24} 64 64 0 0".split()
