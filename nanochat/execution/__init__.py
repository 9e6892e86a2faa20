"""The sandbox: execution of model-written Python programs in a separate process with minimal rights.

    execute_code(code) -> new `python -I` -> child.py drops its rights -> the program

The program gets a minimal environment, an empty stdin and an empty directory that is removed afterwards. Its
process group is killed at the timeout and after every run. All output is read, but only OUTPUT_BYTES are kept
(the start of stdout, the end of stderr), so that endless output neither blocks the program nor fills memory.

Guarantees by platform:

    POSIX                  limits on time, CPU time, file size and open files; no secrets in the environment
    POSIX, not as root     a single process
    Linux                  a memory limit
    Linux 5.13             reads only Python and system libraries, writes only its directory
    Linux, x86-64, arm64   a single process, no network, no signals to others: also as root and in containers

A warning, logged once, names the protections that this system lacks. No platform limits the number of files
that a program writes before its timeout, and a program can forge its success, because the process that it
runs in reports it. The sandbox is meant for faulty programs and does not protect from kernel bugs: run
programs of a hostile author in a virtual machine.
"""

import contextlib
import functools
import logging
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import IO

logger = logging.getLogger(__name__)
CHILD = files("nanochat.execution").joinpath("child.py")
OUTPUT_BYTES = 64 << 10
MIN_MEMORY_BYTES = 64 << 20  # the interpreter itself uses about 30 MiB of address space
MAX_MEMORY_BYTES, MAX_SECONDS = 1 << 40, 24 * 3600
# The slice to delete from a buffer in order to keep its start, or its end.
_KEEP_START, _KEEP_END = slice(OUTPUT_BYTES, None), slice(None, -OUTPUT_BYTES)


@dataclass(frozen=True)
class ExecutionResult:
    """The outcome of a program.

    It succeeds if it runs to its last statement; an earlier exit is a failure, even with status 0. stdout and
    stderr hold at most OUTPUT_BYTES each; error is the exception as "Type: text", or how the process ended.
    """

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(
    code: str, timeout: float = 5.0, maximum_memory_bytes: int = 256 * 1024 * 1024
) -> ExecutionResult:
    """Run a program in the sandbox; thread-safe.

    timeout: seconds of wall-clock time, including the start of Python. maximum_memory_bytes: limit on the
    address space (Linux only). Raise ValueError for limits out of range, RuntimeError if the sandbox itself
    does not start.
    """
    if not 0 < timeout <= MAX_SECONDS:
        raise ValueError(f"timeout={timeout} must be above 0 and at most {MAX_SECONDS}; 5 seconds are usual")
    lowest, highest = MIN_MEMORY_BYTES, MAX_MEMORY_BYTES
    if not lowest <= maximum_memory_bytes <= highest or maximum_memory_bytes % 1:
        raise ValueError(
            f"maximum_memory_bytes={maximum_memory_bytes} must be a whole number from {lowest} to {highest}"
        )
    directory = tempfile.mkdtemp(prefix="nanochat_execution_")
    try:
        return _run(code, directory, timeout, int(maximum_memory_bytes))
    finally:
        _remove(directory)


def _run(code: str, directory: str, timeout: float, memory_bytes: int) -> ExecutionResult:
    read_fd, write_fd = os.pipe()
    with (
        as_file(CHILD) as child,
        tempfile.TemporaryFile() as source,
        open(read_fd, "rb") as report,
        open(write_fd, "wb") as child_end,
    ):
        source.write(code.encode("utf-8", "surrogatepass"))
        source.seek(0)
        limits = [str(memory_bytes), str(math.ceil(timeout) + 1)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(child), str(write_fd), *limits],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[write_fd],
            start_new_session=True,
        )
        child_end.close()
        with process:
            try:
                pipes = {process.stdout: _KEEP_START, process.stderr: _KEEP_END, report: _KEEP_START}
                deadline = time.monotonic() + timeout
                (stdout, stderr, outcome), has_timed_out = _collect(process, pipes, deadline)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: for a zombie
                    os.killpg(process.pid, signal.SIGKILL)
    return _result(stdout, stderr, outcome, process.returncode, timeout if has_timed_out else None)


def _collect(
    process: subprocess.Popen, pipes: dict[IO[bytes], slice], deadline: float
) -> tuple[list[str], bool]:
    """Read pipes until the process ends or the deadline passes.

    pipes: for each pipe the slice to delete from its output. Return the texts kept, and whether the process
    timed out.
    """
    kept = {pipe: bytearray() for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ, pipe)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            has_ended = process.poll() is not None  # before select, so that all its output is read
            ready = selector.select(min(left, 0.1))
            if has_ended and not ready:  # a child process of the program keeps the pipes open
                break
            for key, _ in ready:
                pipe = key.data
                if chunk := os.read(key.fd, OUTPUT_BYTES):
                    kept[pipe] += chunk
                    del kept[pipe][pipes[pipe]]
                else:
                    selector.unregister(pipe)
    try:
        process.wait(max(0, deadline - time.monotonic()))  # it may close its output and keep running
    except subprocess.TimeoutExpired:
        return [text.decode("utf-8", "replace") for text in kept.values()], True
    return [text.decode("utf-8", "replace") for text in kept.values()], False


def _result(
    stdout: str, stderr: str, report: str, status: int, exceeded_timeout: float | None
) -> ExecutionResult:
    """Return the outcome, given the child's report and exit status, and the timeout if it was exceeded."""
    missing, has_started, outcome = report.partition("\n")
    if missing:
        _warn_once(f"on this system, model-written programs run without {missing}")
    if exceeded_timeout is not None:
        error = f"TimeoutError: over {exceeded_timeout:g} seconds"
        return ExecutionResult(False, stdout, stderr, error, timeout=True)
    if not has_started:
        raise RuntimeError(f"the sandbox did not start (status {status}): {stderr.strip()}")
    kind, _, error = outcome.partition(" ")
    if kind == "ok" and status == 0:
        return ExecutionResult(True, stdout, stderr)
    if kind not in ("error", "memory"):
        names = {number.value: number.name for number in signal.Signals}  # real-time signals have no name
        ending = f"signal {names.get(-status, -status)}" if status < 0 else f"exit status {status}"
        error = f"ended early by {ending}"
    return ExecutionResult(False, stdout, stderr, error, memory_exceeded=kind == "memory")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _remove(directory: str) -> None:
    """Remove a directory tree of any depth and any modes.

    Entries of subdirectories are moved up into `directory`, since paths of a deep tree would be too long.
    """
    try:
        os.chmod(directory, 0o700)
        while entries := list(os.scandir(directory)):
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry)
                    continue
                os.chmod(entry, 0o700)
                for child in list(os.scandir(entry)):
                    if child.is_dir(follow_symlinks=False):
                        os.chmod(child, 0o700)  # a rename must be able to change its ".." entry
                    os.rename(child, os.path.join(directory, secrets.token_hex()))  # an unused name
                os.rmdir(entry)
        os.rmdir(directory)
    except OSError as error:
        logger.warning(f"cannot remove the directory of a program: {error}; remove {directory} by hand")
