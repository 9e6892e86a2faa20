"""Requests that the chat server refuses, and the messages that it gives."""

import json
import time

import pytest

from nanochat.serve.protocol import QueueFull
from tests.helpers.chat_client import HELLO, chat, error_message, reply_text, user

pytestmark = pytest.mark.slow

ERRORS = [{}] * 170_000


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "the last message must be the user's"),
        ({"messages": [user("one"), {"role": "assistant", "content": "two"}]}, "the last message must be"),
        ({"messages": [user("one"), user("two")]}, "message 1 has role 'user' and must have 'assistant': "),
        ({"messages": [{"role": "robot", "content": "one"}]}, "messages.0.role: "),
        ({"messages": [user("")]}, "message 0 is empty"),
        ({"messages": [user(7)]}, "messages.0.content: "),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [user("one")] * 501}, "501 messages are more than 500"),
        ({"messages": [user("a" * 8001)]}, "message 0 has 8001 characters; 8000 is the most"),
        ({"messages": [user("a" * 7000)] * 5}, "35000 characters of messages are more than 32000"),
        ({"temperature": -0.1}, "temperature: "),
        ({"temperature": 2.1}, "temperature: "),
        ({"temperature": "hot"}, "temperature: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_k": 201}, "top_k: "),
        ({"top_k": "7"}, "top_k: "),
        ({"top_k": True}, "top_k: "),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 4097}, "max_tokens: "),
        ({"max_tokens": 1.5}, "max_tokens: "),
        ({"seed": 2**63}, "seed: "),
        ({"colour": "red"}, "colour: "),
    ],
)
def test_bad_requests(server, backend, fields, message):
    assert error_message(chat(server, **fields), 400).startswith(message)
    assert not backend.requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "top_k": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}',
    ],
)
def test_bodies_that_are_not_requests(server, body):
    headers = {"content-type": "application/json"}
    assert error_message(server.post("/chat/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", None])
def test_a_body_without_content_type(server, content_type):
    """For the type that curl -d sends, and for an empty body, the message was misleading."""
    headers = {"content-type": content_type} if content_type else {}
    for path in ("/chat/completions", "/v1/completions"):
        for body in (b"[]", b"") if content_type == "application/json" else (json.dumps(HELLO).encode(), b""):
            response = server.post(path, content=body, headers=headers)
            message = error_message(response, 400)
            assert message == "the body must be a JSON object, sent with Content-Type: application/json"
            assert response.json()["error"]["param"] is None


def test_a_body_that_is_not_json(server):
    """The message was "1: JSON decode error", with 1 as the parameter."""
    headers = {"content-type": "application/json"}
    response = server.post("/chat/completions", content=b"{", headers=headers)
    assert error_message(response, 400).startswith("the body is not JSON: Expecting property name ")
    assert error_message(response, 400).endswith(", at character 1")
    assert response.json()["error"]["param"] is None


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        (
            {"temperature": 2.1},
            "temperature: Input should be less than or equal to 2, not 2.1",
            "temperature",
        ),
        ({"colour": "red"}, "colour: Extra inputs are not permitted", "colour"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required", "messages.0.content"),
        ({"messages": [7]}, "messages.0: ", "messages.0"),
        ({"messages": {"str": 1}}, "messages: Input should be a valid list, not {'str': 1}", "messages"),
        ({"top_k": "7" * 999}, f"top_k: Input should be a valid integer, not '{'7' * 12}...", "top_k"),
    ],
)
def test_messages_have_field_and_value(server, fields, message, param):
    response = chat(server, **fields)
    assert error_message(response, 400).startswith(message)
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 300


def test_half_a_character(server, backend):
    """Half of a surrogate pair, as left by cutting an emoji, is not valid UTF-8."""
    body = b'{"messages": [{"role": "user", "content": "a\\ud83d"}]}'
    response = server.post("/chat/completions", content=body, headers={"content-type": "application/json"})
    assert reply_text(response) == "the river"
    assert "a\ufffd<|user_end|>" in backend.prompts()[0]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/chat/completions", {"messages": ERRORS}),
        ("/v1/chat/completions", {"messages": ERRORS}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ERRORS}]}),
        ("/v1/completions", {"prompt": ERRORS}),
    ],
    ids=["messages", "openai", "parts", "prompt"],
)
def test_a_body_full_of_errors_does_not_block_the_server(server, path, fields):
    """Collecting all errors blocked the server for two seconds."""
    start = time.process_time()  # CPU time of this process
    response = server.post(path, json=fields)
    assert time.process_time() - start < 1
    assert error_message(response, 400)
    assert len(response.text) < 1000


def test_a_form_of_another_site_is_not_a_request(server, backend):
    """Web pages may post text/plain to any address without a preflight request."""
    body = json.dumps(HELLO)
    assert error_message(
        server.post("/chat/completions", content=body, headers={"content-type": "text/plain"}), 400
    )
    assert not backend.requests


def test_requests_that_the_backend_refuses(server, backend):
    backend.prepare(ValueError("n=9 must be at most 4"), QueueFull("full"))
    assert error_message(chat(server), 400) == "n=9 must be at most 4"
    response = chat(server)
    assert "try again later" in error_message(response, 429)
    assert int(response.headers["retry-after"]) > 0


def test_internal_errors_show_no_details(server, backend):
    backend.prepare(KeyError("secret"))
    response = chat(server)
    assert "secret" not in error_message(response, 500)
    assert response.headers["connection"] == "close"  # the next request on the connection was lost


def test_unknown_paths_and_methods(server):
    message = error_message(server.get("/nothing"), 404)
    assert message.startswith("unknown path /nothing; there are /v1/models, ")
    assert "/chat/completions" in message
    assert error_message(server.get("/chat/completions"), 405) == "/chat/completions is for POST, not GET"


def test_head(server):
    """Some load balancers send HEAD requests, which were refused."""
    for path in ("/", "/health"):
        response = server.head(path)
        assert (response.status_code, response.text) == (200, "")


def test_large_bodies(server, backend):
    large = json.dumps({"messages": [user("a" * (1 << 20))]}).encode()
    headers = {"content-type": "application/json"}
    assert error_message(server.post("/chat/completions", content=large, headers=headers), 413)

    def in_parts():  # without content-length
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    assert error_message(server.post("/chat/completions", content=in_parts(), headers=headers), 413)
    assert not backend.requests
    # the longest allowed text is not too large in any escaping
    longest = "\U0001f680" * 8000
    assert chat(server, messages=[user(longest)]).status_code == 200
