"""Facilities of every stage: the base directory, atomic writes and reports.

The public names of command_line.py (`parse`, `run`) and runtime.py (`Runtime`) are re-exported here. None of
the three modules imports torch before a Runtime is requested.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nanochat.command_line import parse, require_at_least, require_counts, run
from nanochat.runtime import Runtime, setup_runtime

__all__ = [
    "Runtime",
    "atomic_write",
    "base_dir",
    "locked",
    "parse",
    "process_seconds",
    "require_at_least",
    "require_counts",
    "run",
    "setup_runtime",
    "write_json",
    "write_report",
]

_STARTED = time.monotonic()


def base_dir() -> Path:
    """Return $NANOCHAT_BASE_DIR (default ~/.cache/nanochat), the home of all data, weights and reports."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the base directory {path} ({error}); set NANOCHAT_BASE_DIR"
        ) from error
    return path


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when whole and on disk; a failure leaves the old one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock of the name of path, which need not exist: one process at a time, on this machine at least.

    For what is made once: whoever gets the lock later finds it there.
    """
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, indented for people, into a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def process_seconds() -> float:
    """Return for how long this process has run."""
    return time.monotonic() - _STARTED


def write_report(stage: str, result: dict[str, Any], earlier_seconds: float = 0.0) -> Path:
    """Write what a stage found to report/<stage>.json, with the time and the seconds that it took.

    earlier_seconds were those of processes that it was begun in. Returns the path.
    """
    stamps = {"finished_at": time.time(), "wall_seconds": earlier_seconds + process_seconds()}
    path = base_dir() / "report" / f"{stage}.json"
    write_json(path, {**result, **stamps})
    return path
