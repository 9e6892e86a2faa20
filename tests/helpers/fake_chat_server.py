"""A substitute for the chat server on 127.0.0.1: serves the page and gives scripted answers.

Each POST of chat/completions takes the next of `replies`: a Refusal, or a list of steps. A step is a dict
(sent as one event), bytes (sent unchanged), WAIT (until the test calls `resume` or the page disconnects) or
HANG_UP (the server disconnects). "done" is sent at the end, unless the last step is HANG_UP or an event that
ends the answer. Without replies the answer is "Fine.". `requests` and `keys` record the JSON and the
Authorization of each request; `client_left` is set when a page disconnects.
"""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WAIT, HANG_UP = "wait", "hang up"
DONE = {"done": True}
PAGE = Path(__file__).parents[2] / "nanochat" / "serve" / "ui.html"


@dataclass
class Refusal:
    """A response with an error status instead of a stream."""

    status: int
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


def tokens(*texts: str) -> list[dict[str, Any]]:
    """Return one event per text."""
    return [{"token": text, "gpu": 0} for text in texts]


class FakeChatServer(ThreadingHTTPServer):
    """A context manager. `url` has a folder, because the page has to use relative addresses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/chat-page/"
        self.replies: list[Refusal | Sequence[dict | bytes | str]] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.stats = {"model": "d20-sft", "running": 0, "waiting": 0, "slots": 8}
        self.steps_allowed = threading.Semaphore(0)
        self.client_left = threading.Event()

    def resume(self) -> None:
        """End the current or the next WAIT."""
        self.steps_allowed.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that disconnect."""

    def __enter__(self) -> FakeChatServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeChatServer

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path == "/chat-page/":
            headers = {"Content-Security-Policy": "frame-ancestors 'none'"}
            self._send(200, "text/html; charset=utf-8", PAGE.read_bytes(), headers)
        elif self.path == "/chat-page/stats":
            self._send(200, "application/json", json.dumps(self.server.stats).encode())
        else:
            self._send(404, "application/json", b"{}")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/chat-page/chat/completions":
            self._send(404, "application/json", b"{}")
            return
        self.server.requests.append(json.loads(body))
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.pop(0) if self.server.replies else tokens("Fine.")
        if isinstance(reply, Refusal):
            self._send(reply.status, "application/json", json.dumps(reply.body).encode(), reply.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(reply)
        except OSError:
            self.server.client_left.set()
            self.close_connection = True

    def _stream(self, steps: Sequence[dict | bytes | str]) -> None:
        for step in steps:
            if step == WAIT:
                self._wait()
            elif step == HANG_UP:
                self.close_connection = True
                return
            elif isinstance(step, bytes):
                self._chunk(step)
            else:
                self._event(step)
        last = steps[-1] if steps else None
        if not (isinstance(last, dict) and ("done" in last or "error" in last)):
            self._event(DONE)
        self.wfile.write(b"0\r\n\r\n")

    def _wait(self) -> None:
        while not self.server.steps_allowed.acquire(timeout=0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable:  # end of file: a page sends nothing while it waits for an answer
                raise BrokenPipeError

    def _event(self, event: dict) -> None:
        self._chunk(f"data: {json.dumps(event)}\n\n".encode())

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _send(self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
