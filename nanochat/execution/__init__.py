"""Running Python that a model wrote, in a process of its own that can do little else.

    execute_code(code) -> fresh `python -I` -> child.py gives up its rights -> the program

The program gets no environment to speak of, an empty stdin and an empty directory, which is removed
afterwards. It is killed, with its process group, when its time is over and again after it has ended. All its
output is read, but only OUTPUT_BYTES are kept (the start of stdout, the end of stderr), so that endless
output neither blocks nor fills memory.

What is guaranteed, and where:

    POSIX                  time, CPU time, size and number of open files; no secrets in the environment
    POSIX, not as root     one process
    Linux                  a limit on memory
    Linux 5.13             reads only Python and system libraries, writes only its directory
    Linux, x86-64, arm64   one process, no network, no signal to others: as root and in containers too

One warning names what this system lacks. Nowhere is the number of files bounded that a program may write in
its time, nor can one be kept from forging its success, which is reported from the process that it runs in.
Nor is this a wall against bugs of the kernel: it is meant for programs that are mistaken. Give those of a
hostile author a virtual machine.
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
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
CHILD = Path(__file__).with_name("child.py")
OUTPUT_BYTES = 64 << 10
LEAST_MEMORY_BYTES = 64 << 20  # the interpreter itself takes some 30 MiB of addresses
MOST_MEMORY_BYTES, MOST_SECONDS = 1 << 40, 24 * 3600
_START, _END = (
    slice(OUTPUT_BYTES, None),
    slice(None, -OUTPUT_BYTES),
)  # what to drop to keep the start, the end


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended. Success is to run to its end: an exit on the way is none, even with status 0."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None  # "ValueError: the message"
    timeout: bool = False
    memory_exceeded: bool = False


def execute_code(
    code: str, timeout: float = 5.0, maximum_memory_bytes: int = 256 * 1024 * 1024
) -> ExecutionResult:
    """Run a program; timeout is in seconds of wall clock, with the start of Python. Any thread may call.

    Raises ValueError for limits that nothing could run in, RuntimeError if the sandbox itself does not start.
    """
    if not 0 < timeout <= MOST_SECONDS:
        raise ValueError(f"timeout={timeout} must be above 0 and at most {MOST_SECONDS}; 5 seconds are usual")
    least, most = LEAST_MEMORY_BYTES, MOST_MEMORY_BYTES
    if not least <= maximum_memory_bytes <= most or maximum_memory_bytes % 1:
        raise ValueError(
            f"maximum_memory_bytes={maximum_memory_bytes} must be a whole number from {least} to {most}"
        )
    directory = tempfile.mkdtemp(prefix="nanochat_execution_")
    try:
        return _run(code, directory, timeout, int(maximum_memory_bytes))
    finally:
        _remove(directory)


def _run(code: str, directory: str, timeout: float, memory_bytes: int) -> ExecutionResult:
    read_fd, write_fd = os.pipe()
    with tempfile.TemporaryFile() as source, open(read_fd, "rb") as report, open(write_fd, "wb") as far_end:
        source.write(code.encode("utf-8", "surrogatepass"))
        source.seek(0)
        limits = [str(memory_bytes), str(math.ceil(timeout) + 1)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(CHILD), str(write_fd), *limits],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env={"HOME": directory, "TMPDIR": directory, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[write_fd],
            start_new_session=True,
        )
        far_end.close()
        with process:
            try:
                pipes = {process.stdout: _START, process.stderr: _END, report: _START}
                texts, is_over_time = _collect(process, pipes, time.monotonic() + timeout)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: only a zombie is left
                    os.killpg(process.pid, signal.SIGKILL)
    return _result(*texts, process.returncode, timeout if is_over_time else None)


def _collect(
    process: subprocess.Popen, pipes: dict[IO[bytes], slice], deadline: float
) -> tuple[list[str], bool]:
    """Read pipes until the process ends or its time does. Return what is kept of each, and which it was."""
    kept = {pipe: bytearray() for pipe in pipes}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            has_ended = process.poll() is not None  # asked before, so that all it wrote is seen
            ready = selector.select(min(left, 0.1))
            if has_ended and not ready:  # something that it left behind holds the pipes
                break
            for key, _ in ready:
                pipe = key.fileobj
                if chunk := os.read(key.fd, OUTPUT_BYTES):
                    kept[pipe] += chunk
                    del kept[pipe][pipes[pipe]]
                else:
                    selector.unregister(pipe)
    try:
        process.wait(max(0, deadline - time.monotonic()))  # it may live on after closing its output
    except subprocess.TimeoutExpired:
        return [text.decode("utf-8", "replace") for text in kept.values()], True
    return [text.decode("utf-8", "replace") for text in kept.values()], False


def _result(stdout: str, stderr: str, report: str, status: int, timed_out: float | None) -> ExecutionResult:
    missing, has_started, outcome = report.partition("\n")
    if missing:
        _warn_once(f"programs of the model run here without {missing}")
    if timed_out is not None:
        return ExecutionResult(
            False, stdout, stderr, f"TimeoutError: over {timed_out:g} seconds", timeout=True
        )
    if not has_started:
        raise RuntimeError(f"the sandbox did not start (status {status}): {stderr.strip()}")
    kind, _, error = outcome.partition(" ")
    if kind == "ok" and status == 0:
        return ExecutionResult(True, stdout, stderr)
    if kind not in ("error", "memory"):
        names = {number.value: number.name for number in signal.Signals}  # real-time ones have none
        ending = f"signal {names.get(-status, -status)}" if status < 0 else f"exit status {status}"
        error = f"ended early by {ending}"
    return ExecutionResult(False, stdout, stderr, error, memory_exceeded=kind == "memory")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _remove(directory: str) -> None:
    """Remove a directory of any modes and depth: its folders are unpacked into it until none is left."""
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
                        os.chmod(child, 0o700)  # else it cannot change its parent
                    os.rename(child, os.path.join(directory, secrets.token_hex()))  # a name that is free
                os.rmdir(entry)
        os.rmdir(directory)
    except OSError as error:
        logger.warning(f"cannot remove what a program left behind: {error}")
