"""A stand-in for the Hugging Face hub on 127.0.0.1: one dataset repository that can misbehave.

As the hub does, it answers /datasets/{repo}/resolve/{revision}/{name} with the size and SHA-256 of the file
and a redirect to another host, here `localhost`, which serves ranges of bytes. `faults[name]` lists what
happens to the next transfers of a file: "503", "truncate" (half the bytes, then the end), "stall" (half, then
silence), "reset" (half, then RST), "short" (half, called the whole), "corrupt" (one bit flipped).
/api/datasets/{repo}/tree/main/{folder} lists a folder, with the files of `listed_only`, which cannot be had.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if "/tree/main/" in self.path:
            self._list(self.path.split("/tree/main/")[1].split("?")[0])
            return
        host, name = self.headers["Host"].split(":")[0], re.sub("^.*/resolve/[^/]+/|^/", "", self.path)
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        self.server.requests.append((self.command, host, name, start, "Authorization" in self.headers))
        content = self.server.files.get(name)
        if content is None:
            self._headers(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        elif host == "localhost":
            self._transfer(name, content, start)
        else:
            headers = {
                "Location": f"http://localhost:{self.server.server_port}/{name}",
                "X-Linked-Size": str(len(content)),
                "X-Repo-Commit": "0" * 40,
                "Content-Length": "0",
            }
            if self.server.states_hash:
                headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            self._headers(302, headers)

    def _list(self, folder: str) -> None:
        files = {**self.server.files, **self.server.listed_only}
        entries = [
            {
                "type": "file",
                "path": name,
                "oid": "0" * 40,
                "size": len(content),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100},
            }
            for name, content in files.items()
            if name.startswith(f"{folder}/")
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
            self.send_header(key, value)
        self.end_headers()

    def _transfer(self, name: str, content: bytes, start: int) -> None:
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        if fault == "503":
            self._headers(503, {"Content-Length": "0"})
            return
        start = start if self.server.has_ranges else 0
        body = content[start:]
        half = body[: len(body) // 2]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif fault == "short":
            body = half
        self._headers(206 if self.server.has_ranges else 200, {"Content-Length": str(len(body))})
        if fault not in ("truncate", "stall", "reset"):
            self.wfile.write(body)
            return
        self.wfile.write(half)
        self.wfile.flush()
        if fault == "stall":
            self.server.closing.wait(30)
        elif fault == "reset":
            self.server.closing.wait(0.05)  # else the bytes that are under way are lost too
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True


class HubServer(ThreadingHTTPServer):
    """Serves `files`; `requests` lists (method, host, name, first byte asked for, has a token)."""

    daemon_threads = True
    handler = Handler

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), self.handler)
        self.files = files
        self.listed_only: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.has_ranges = True
        self.states_hash = True
        self.requests: list[tuple[str, str, str, int, bool]] = []
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def starts(self, name: str) -> list[int]:
        """The first byte of every transfer of a file so far."""
        return [
            start
            for method, host, n, start, _ in self.requests
            if (method, host, n) == ("GET", "localhost", name)
        ]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()
