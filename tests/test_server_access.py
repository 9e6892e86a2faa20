"""Access to the chat server: keys, hosts, origins, and what it logs."""

import http.client
import logging

import pytest
from starlette.testclient import TestClient

from nanochat.serve.server import Settings, create_app
from tests.helpers.chat_client import HELLO, chat, error_message, reply_text, user
from tests.helpers.fake_backend import serve

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


def test_key(backend):
    with serve(backend, api_key="secret") as client:
        for path in ("/", "/health"):
            assert client.get(path).status_code == 200
        for header in ("", "Bearer", "Bearer wrong", "Bearer secret2", "secret"):
            client.headers["authorization"] = header
            for response in (chat(client), client.get("/stats"), client.get("/metrics"), client.get("/x")):
                assert "needs its key" in error_message(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
        assert not backend.requests
        for scheme in ("Bearer", "bearer", "BEARER"):  # schemes are case-insensitive
            client.headers["authorization"] = f"{scheme} secret"
            assert reply_text(chat(client)) == "the river"
        assert client.get("/stats").status_code == 200
        # hmac.compare_digest compares bytes, but only ASCII strings
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        connection.request("GET", "/stats", headers={"Authorization": "Bearer \u00e9"})
        assert connection.getresponse().status == 401
        connection.close()


@pytest.mark.parametrize("key", ["secret\n", " secret", "two words", "schl\u00fcssel", "tab\t"])
def test_keys_that_clients_cannot_send(key):
    """With the line end of a file in the key, every client was refused."""
    with pytest.raises(ValueError, match="api_key must be ASCII without spaces or line ends") as error:
        Settings(api_key=key)
    assert "schl" not in str(error.value)


LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:80", "[::1]"]
)
def test_names_of_this_machine(backend, host):
    with TestClient(create_app(backend, Settings(allowed_hosts=LOOPBACK))) as client:
        assert client.get("/health", headers={"host": host}).status_code == 200
        assert reply_text(client.post("/chat/completions", json=HELLO, headers={"host": host})) == "the river"


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "[::1", "", "127.0.0.1.example.org:80"]
)
def test_names_of_other_sites(backend, host):
    """A web page could bind its name to 127.0.0.1 (DNS rebinding) and use its visitor's server."""
    with TestClient(create_app(backend, Settings(allowed_hosts=LOOPBACK))) as client:
        for path in ("/", "/health", "/stats"):
            message = error_message(client.get(path, headers={"host": host}), 403)
            assert message.startswith("this server is 127.0.0.1 or ::1 or localhost, not ")
            assert "--api-key" in message
        error_message(client.post("/chat/completions", json=HELLO, headers={"host": host}), 403)
    assert not backend.requests


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://a b", ""])
def test_invalid_origins(origin):
    with pytest.raises(ValueError, match="must be like https:"):
        Settings(allowed_origins=(origin,))


def preflight(client, origin):
    names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # of OpenAI's client
    headers = {"origin": origin, "access-control-request-method": "POST"}
    headers["access-control-request-headers"] = names
    return client.options("/chat/completions", headers=headers)


def test_allowed_origins(server, backend):
    origin = "https://example.org"
    assert "access-control-allow-origin" not in chat(server).headers
    assert "access-control-allow-origin" not in preflight(server, origin).headers
    with serve(backend, allowed_origins=(origin,), api_key="key") as client:
        assert preflight(client, origin).status_code == 200
        assert preflight(client, origin).headers["access-control-allow-origin"] == origin
        assert "x-stainless-lang" in preflight(client, origin).headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in preflight(client, origin).headers
        assert preflight(client, "https://example.com").status_code == 400


@pytest.mark.parametrize("log_chats", [False, True])
def test_chats_are_logged_only_on_request(backend, caplog, log_chats):
    caplog.set_level(logging.DEBUG)
    backend.prepare(["under!"])
    with serve(backend, log_chats=log_chats) as client:
        chat(client)
        chat(client, messages=[user("the river")] * 2)  # an error
    assert ("the river" in caplog.text) == log_chats
    assert ("under!" in caplog.text) == log_chats
