"""Clients of the chat server that disconnect or are slow, and its start and end."""

import asyncio
import json
import socket
import threading

import httpx2
import pytest

from nanochat.serve.protocol import Closed
from nanochat.serve.server import create_app
from tests.helpers.chat_client import DONE, HELLO, chat, error_message, lines, reply_text
from tests.helpers.fake_backend import Pause, serve, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


def disconnect_after(client, path, body, action):
    """Send a request, call action(connection), and disconnect."""
    body = json.dumps(body)
    host, port = client.base_url.host, client.base_url.port
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        action(connection)


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/chat/completions", {}), ("/v1/chat/completions", {}), ("/v1/chat/completions", {"stream": True})],
)
def test_a_client_that_disconnects_before_the_first_token(server, backend, path, fields):
    """Its rows were never freed."""
    backend.prepare([Pause()])
    disconnect_after(server, path, {**HELLO, **fields}, lambda _: wait_for(lambda: backend.handles))
    wait_for(lambda: backend.handles[0].cancelled.is_set())
    wait_for(lambda: not backend.stats()["running"])


def test_a_client_that_disconnects_in_the_middle(server, backend):
    backend.prepare(["the", Pause()])

    def read_some(connection):
        read = b""
        while b'"token"' not in read:
            read += connection.recv(1000)
        assert not backend.handles[0].cancelled.is_set()

    disconnect_after(server, "/chat/completions", HELLO, read_some)
    wait_for(lambda: backend.handles[0].cancelled.is_set())


def test_a_lost_gpu(server, backend, monkeypatch):
    """No request was answered any more, but /health returned ok."""
    monkeypatch.setattr(backend, "is_broken", True)
    assert "the GPU has failed" in error_message(server.get("/health"), 503)
    backend.prepare(Closed("the GPU has failed"))
    assert "the GPU has failed" in error_message(chat(server), 503)


def test_a_slow_client_does_not_delay_others(server, backend, monkeypatch):
    """Decoding ran in the event loop, so all clients waited for one another."""
    backend.prepare(["river " * 3000, Pause()])

    def serve_others(connection):
        assert connection.recv(10) == b"HTTP/1.1 2"
        for _ in range(3):
            assert server.get("/health").json() == {"status": "ok", "model": "d2-fake"}
            assert reply_text(chat(server)) == "the river"
        assert not backend.handles[0].cancelled.is_set()

    monkeypatch.setattr(backend, "context", 5000)
    body = {"prompt": "a", "stream": True, "max_tokens": 4096, "n": 4}  # 2 MB, of which it reads 10 bytes
    disconnect_after(server, "/v1/completions", body, serve_others)
    wait_for(lambda: backend.handles[0].cancelled.is_set())


# ---------------------------------------------------------------------------------------------------------
# Start and end


def is_open(client):
    """Return True if the port accepts connections."""
    with socket.socket() as connection:
        return connection.connect_ex((client.base_url.host, client.base_url.port)) == 0


def test_shutdown_lets_running_streams_finish(backend):
    pause = Pause()
    backend.prepare(["the", pause, " river"])
    found = []
    with serve(backend) as client:
        thread = threading.Thread(target=lambda: found.append(chat(client)))
        thread.start()
        wait_for(lambda: backend.tokens_generated and backend.handles)
        client.server.should_exit = True
        wait_for(lambda: not is_open(client))
        assert not found
        pause.end()
        thread.join()
    assert reply_text(found[0]) == "the river"
    assert lines(found[0])[-1] == DONE
    assert backend.closed_with is True


def test_an_endless_stream_is_cut_at_shutdown(backend, caplog):
    """After the time of grace, without a traceback."""
    backend.prepare(["the", Pause()])
    with serve(backend) as client:
        client.server.config.timeout_graceful_shutdown = 0.2
        with client.stream("POST", "/chat/completions", json=HELLO) as response:
            client.server.should_exit = True
            with pytest.raises(httpx2.RemoteProtocolError):
                list(response.iter_bytes())
    assert backend.handles[0].cancelled.is_set()
    assert "Traceback" not in caplog.text


def test_new_requests_are_refused_while_the_worker_finishes(backend):
    async def ask(app, path, **request):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request("POST" if request else "GET", path, **request)

    async def live():
        app = create_app(backend)
        async with app.router.lifespan_context(app):
            assert reply_text(await ask(app, "/chat/completions", json=HELLO)) == "the river"
        assert (await ask(app, "/health")).status_code == 503
        return await ask(app, "/chat/completions", json=HELLO)

    response = asyncio.run(live())
    assert "shutting down" in error_message(response, 503)
    assert "retry-after" in response.headers
    assert len(backend.requests) == 1
