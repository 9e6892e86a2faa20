"""Facilities of every stage: the base directory, atomic writes and reports.

The public names of command_line.py (`parse`, `run`) and runtime.py (`Runtime`) are re-exported here. None of
the three modules imports torch before a Runtime is requested. get_base_dir, print0, get_dist_info and
autodetect_device_type are for scripts written for nanochat.
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
from nanochat.runtime import DType, Runtime, autodetect_device_type, get_dist_info, setup_runtime

__all__ = [
    "DType",
    "Runtime",
    "atomic_write",
    "autodetect_device_type",
    "base_dir",
    "get_base_dir",
    "get_dist_info",
    "locked",
    "parse",
    "print0",
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
    """Return $NANOCHAT_BASE_DIR (default ~/.cache/nanochat), the directory of all data, weights and reports.

    Create it if necessary; raise ValueError if that fails.
    """
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the base directory {path} ({error}); set NANOCHAT_BASE_DIR"
        ) from error
    return path


def get_base_dir() -> str:
    """Return base_dir() as a string."""
    return str(base_dir())


def print0(*values: object, **options: Any) -> None:
    """Print on rank 0 only, with the arguments of print."""
    if get_dist_info()[1] == 0:
        print(*values, **options)  # noqa: T201 - its purpose


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` only once it is complete and on disk; an error keeps the old file."""
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
    """Hold an exclusive lock named after `path`, which need not exist, against other processes.

    The lock is guaranteed on one machine only. For resources that are created once: a process that gets the
    lock later finds the resource complete.
    """
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(path: Path | str, value: object) -> None:
    """Write indented JSON atomically; create the directory if necessary."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def process_seconds() -> float:
    """Return the seconds since this process started."""
    return time.monotonic() - _STARTED


def write_report(stage: str, result: dict[str, Any], earlier_seconds: float = 0.0) -> Path:
    """Write the results of a stage to report/<stage>.json, with its end time and duration; return the path.

    earlier_seconds is the duration of the earlier processes of a resumed run.
    """
    stamps = {"finished_at": time.time(), "wall_seconds": earlier_seconds + process_seconds()}
    path = base_dir() / "report" / f"{stage}.json"
    write_json(path, {**result, **stamps})
    return path
