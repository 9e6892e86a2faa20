"""A file that is being downloaded: its bytes so far, and a note of the version that they belong to.

    .NAME.partial         the bytes, locked by the process that downloads
    .NAME.partial.json    the version: what the server states of the file

The partial file takes the target's name when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Version:
    """Identity of a file's bytes, as the server states it."""

    tag: str  # SHA-256 or git SHA-1 on the hub, else ETag or Last-Modified; "": unknown, cannot be resumed
    size: int | None  # bytes; None: not stated
    url: str = ""  # the address that the tag belongs to; "" for a digest, which is valid at any address


class PartialFile:
    """The bytes of a file that have arrived, with a note of the version that they belong to."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.path = Path(file.name)
        self.note = self.path.with_name(f"{self.path.name}.json")

    @property
    def n_bytes(self) -> int:
        return self.file.seek(0, os.SEEK_END)

    @property
    def version(self) -> Version | None:
        try:
            return Version(**json.loads(self.note.read_text("utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def append(self, block: bytes) -> None:
        self.file.write(block)
        self.file.flush()  # a kill loses no byte that has arrived

    def restart(self, version: Version | None = None) -> None:
        """Drop all bytes, and only then replace the note.

        A kill in between joins nothing, and half a note is none: the next process starts from the first byte.
        """
        self.file.truncate(0)
        self.note.unlink(missing_ok=True)
        if version is not None:
            self.note.write_text(json.dumps(asdict(version)), "utf-8")

    def publish(self, path: Path) -> None:
        """Give the file its name, once its bytes are on disk."""
        os.fsync(self.file.fileno())
        os.replace(self.path, path)
        self.note.unlink(missing_ok=True)

    def discard(self) -> None:
        self.path.unlink()
        self.note.unlink(missing_ok=True)


@contextmanager
def open_partial(path: Path) -> Iterator[PartialFile]:
    """Open the partial file of a path and hold its lock: one process, or thread, at a time."""
    import fcntl

    name = path.with_name(f".{path.name}.partial")
    while True:
        with open(name, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_same_file(file, name):
                yield PartialFile(file)
                return


def _is_same_file(file: IO[bytes], path: Path) -> bool:
    """Return whether path still names this open file: another process may have published it meanwhile."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
