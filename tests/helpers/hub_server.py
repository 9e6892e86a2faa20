"""A substitute for the Hugging Face hub on 127.0.0.1, with injected faults.

All repositories have the same files, but one named "{repo}/{name}" is in that repository only.

Like the hub, it answers /datasets/{repo}/resolve/{revision}/{name} for a large file with its size, its
SHA-256 and a redirect to another host, here `localhost`; it sends a small file itself, with the SHA-1 of its
git blob. `localhost` is also an ordinary web server of all files, with ETags.

`faults[name]` lists the faults of the next transfers of a file. N is the percentage of the bytes that are
sent first, 50 by default:

    503          an error
    truncate N   the connection is closed
    stall N      nothing more is sent
    reset N      the connection is reset
    short        half the bytes, declared to be the whole file
    corrupt      one bit flipped

/api/datasets/{repo}/tree/{revision}/{folder} lists a folder, including `listed_only`: files that do not
exist. /api/datasets/{repo} and /api/datasets/{repo}/revision/{revision} tell the commit, always the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40
LARGE_SUFFIXES = (".parquet", ".pkl", ".png", ".pt")  # of the files that the hub keeps outside git


def is_large(name: str) -> bool:
    return name.endswith(LARGE_SUFFIXES)


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def kill_at(process: subprocess.Popen, path: Path, n_bytes: int) -> None:
    """Kill a process, as kill -9 does, when its file has this length."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size == n_bytes) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert path.stat().st_size == n_bytes


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if match := re.match("/api/datasets/[^/]+/[^/]+(/[^/]+)?(?:/[^/?]+)?/?([^?]*)", self.path):
            self._list(match[2]) if match[1] == "/tree" else self._json({"id": "a/b", "sha": COMMIT})
            return
        host, name = self.headers["Host"].split(":")[0], re.sub("^.*/resolve/[^/]+/|^/", "", self.path)
        in_repo = re.sub("^/datasets/|/resolve/[^/]+(?=/)", "", self.path)
        name = in_repo if in_repo in self.server.files else name
        self.server.requests.append((self.command, host, name, "Authorization" in self.headers))
        content = self.server.files.get(name)
        if content is None:
            self._headers(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        elif host == "localhost":
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            self._transfer(name, content, self.server.etags.get(name, etag))
        else:
            self._resolve(name, content)

    def _resolve(self, name: str, content: bytes) -> None:
        digest = hashlib.sha256(content).hexdigest() if is_large(name) else git_sha1(content)
        etag = f'"{digest}"' if self.server.states_hash else ""
        if is_large(name):
            headers = {
                "Location": f"http://localhost:{self.server.server_port}/{name}",
                "X-Linked-Size": str(len(content)),
                "X-Linked-Etag": etag,
                "X-Repo-Commit": COMMIT,
                "Content-Length": "0",
            }
            self._headers(302, headers)
        elif self.command == "HEAD":
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
            self._headers(200, headers)
        else:
            self._transfer(name, content, etag)

    def _list(self, folder: str) -> None:
        files = {**self.server.files, **self.server.listed_only}
        start = f"{folder}/" if folder else ""
        below = [name[len(start) :] for name in files if name.startswith(start)]
        folders = {name.split("/")[0] for name in below if "/" in name}
        entries: list[dict] = [{"type": "directory", "path": start + name, "oid": COMMIT} for name in folders]
        entries += [
            {
                "type": "file",
                "path": name,
                "oid": COMMIT,
                "size": len(content),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100},
            }
            for name, content in files.items()
            if name.startswith(start) and "/" not in name[len(start) :]
        ]
        if not entries:
            self._headers(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
            return
        self._json(entries)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        self._headers(status, headers)
        self.wfile.write(body)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.end_headers()

    def _transfer(self, name: str, content: bytes, etag: str) -> None:
        """Send a file, or the rest of it from the first byte that the client asks for."""
        faults = self.server.faults.get(name, [])
        fault, _, percent = (faults.pop(0) if faults else "").partition(" ")
        start, status, place = 0, 200, {}
        if self.server.has_ranges and "Range" in self.headers and self._is_same_version(etag):
            start, status = int(self.headers["Range"][len("bytes=") : -1]), 206
            place = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        if fault == "503" or start >= len(content) > 0:
            self.server.transfers.append((name, start, start))
            self._headers(503 if fault == "503" else 416, {"Content-Length": "0"})
            return
        body = content[start:]
        some = body[: len(body) * int(percent or 50) // 100]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault == "short":
            body = some
        is_cut = fault in ("truncate", "stall", "reset")
        self.server.transfers.append((name, start, start + len(some if is_cut else body)))
        self._headers(status, {"Content-Length": str(len(body)), "ETag": etag, **place})
        if not is_cut:
            self.wfile.write(body)
            return
        self.wfile.write(some)
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait(30)
        elif fault == "reset":
            self.server.closing.wait(0.05)  # else the bytes that are under way are lost too
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def _is_same_version(self, etag: str) -> bool:
        return self.headers.get("If-Range", etag) == etag or not self.server.heeds_if_range


class HubServer(ThreadingHTTPServer):
    """Serves `files`; `requests` lists (method, host, name, has a token).

    `transfers` lists (name, first byte, end) of what was sent. `etags` replaces those of `localhost`.
    """

    daemon_threads = True
    handler = Handler

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), self.handler)
        self.files = files
        self.listed_only: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.etags: dict[str, str] = {}
        self.has_ranges = True
        self.heeds_if_range = True
        self.states_hash = True
        self.requests: list[tuple[str, str, str, bool]] = []
        self.transfers: list[tuple[str, int, int]] = []
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def address(self, name: str) -> str:
        """Return the address of a file on the ordinary web server."""
        return f"http://localhost:{self.server_port}/{name}"

    def starts(self, name: str) -> list[int]:
        """Return the first byte of each transfer of a file so far."""
        return [start for start, _ in self.ranges(name)]

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """Return the bytes (first, end) of each transfer of a file so far."""
        return [(start, end) for n, start, end in self.transfers if n == name]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
