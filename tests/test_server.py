"""The chat server: nanochat's API, limits, and whom it serves when; no model and no fixed port."""

import asyncio
import http.client
import json
import logging
import socket
import threading
import time
from importlib.resources import files

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error
from starlette.testclient import TestClient

from nanochat.sampling import SamplingParams
from nanochat.serve.protocol import Closed, End, QueueFull
from nanochat.serve.server import Settings, create_app
from nanochat.serve.worker import Worker
from tests.helpers.fake_backend import FakeBackend, Pause, serve, wait_for
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

ROCKET = "\U0001f680"
HELLO = {"messages": [{"role": "user", "content": "the river"}]}
DONE = 'data: {"done": true}'
MISTAKES = [{}] * 170_000


@pytest.fixture(scope="module")
def backend():
    return FakeBackend(train_tokenizer())


@pytest.fixture(scope="module")
def server(backend):
    with serve(backend) as client:
        yield client


@pytest.fixture(autouse=True)
def forget(backend):
    backend.prepare()


def chat(client, **fields):
    return client.post("/chat/completions", json={**HELLO, **fields})


def lines(response):
    """The events of a stream, which are lines with an empty one after each."""
    assert response.status_code == 200
    assert response.text.endswith("\n\n")
    return response.text.removesuffix("\n\n").split("\n\n")


def said(response):
    return "".join(json.loads(line[6:]).get("token", "") for line in lines(response))


def refusal(response, status):
    """The message of an error, which has its one shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]["message"]


# ---------------------------------------------------------------------------------------------------------
# nanochat's API


def test_events(server, backend):
    backend.prepare(["the", " river"])
    response = chat(server)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    tokens = [backend.tokenizer.decode([id]) for id in (*backend.ids("the"), *backend.ids(" river"))]
    assert lines(response) == [f'data: {{"token": "{token}", "gpu": 0}}' for token in tokens] + [DONE]


def test_characters_come_whole(server, backend):
    backend.prepare([backend.tokenizer.enc.encode_single_token(bytes([b])) for b in ROCKET.encode()])
    assert lines(chat(server)) == [f'data: {{"token": "{ROCKET}", "gpu": 0}}', DONE]


def test_a_broken_character_shows_at_the_end(server, backend):
    backend.prepare([backend.tokenizer.enc.encode_single_token(ROCKET.encode()[:1])])
    assert lines(chat(server)) == ['data: {"token": "\ufffd", "gpu": 0}', DONE]


@pytest.mark.parametrize(
    ("output", "result"),
    [(["<|output_start|>", "84", "<|output_end|>"], '"84"'), ([], "null")],  # null: it refused
)
def test_calculator(server, backend, output, result):
    backend.prepare(["the", "<|python_start|>", "12*7", "<|python_end|>", *output, "of"])
    tool = f'data: {{"tool": {{"expression": "12*7", "result": {result}}}}}'
    found = lines(chat(server))
    assert tool in found[1:-2]
    assert said_by(found) == "theof"


def said_by(found):
    return "".join(json.loads(line[6:]).get("token", "") for line in found)


def test_settings_of_a_request(server, backend):
    chat(server, temperature=0, top_k=0, max_tokens=7, top_p=0.5, repetition_penalty=1.5, seed=3)
    chat(server)
    asked, default = backend.requests
    assert asked.sampling == SamplingParams(
        temperature=0.0, top_k=0, top_p=0.5, repetition_penalty=1.5, seed=3
    )
    assert default.sampling == SamplingParams(
        temperature=0.8, top_k=50, top_p=1.0, repetition_penalty=1.0, seed=None
    )
    assert (asked.max_tokens, default.max_tokens) == (7, 100)  # half of the context
    assert (default.n, default.logprobs) == (1, None)


def test_whole_numbers(server, backend):
    """7.0 is an integer in JSON, and in the app's own description."""
    chat(server, top_k=7.0, max_tokens=1e1, seed=-3.0)
    (request,) = backend.requests
    assert repr((request.sampling.top_k, request.max_tokens, request.sampling.seed)) == "(7, 10, -3)"


def test_defaults_of_the_server(backend):
    with serve(backend, temperature=0.1, top_k=3, max_tokens=5) as client:
        chat(client)
    (request,) = backend.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.1, 3, 5)
    with pytest.raises(ValueError, match="temperature"):
        serve(backend, temperature=3).__enter__()


def test_prompt(server, backend):
    """The system message is allowed, and a reply that was empty may be sent back."""
    turns = [("system", "light"), ("user", "one"), ("assistant", ""), ("user", "two")]
    chat(server, messages=[{"role": role, "content": text} for role, text in turns])
    assert backend.prompts() == [
        "<|bos|><|user_start|>light\n\none<|user_end|><|assistant_start|><|assistant_end|>"
        "<|user_start|>two<|user_end|><|assistant_start|>"
    ]


def test_the_oldest_exchanges_fall_away(server, backend):
    """Prompt and new tokens did not have to fit the context."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} and the river " * 5} for i in range(9)]
    response = chat(server, messages=turns, max_tokens=4096)
    assert lines(response)[-1] == DONE
    (request,) = backend.requests
    assert request.max_tokens == 100
    assert len(request.tokens) <= 100
    assert "8 and" in backend.prompts()[0]
    assert "0 and" not in backend.prompts()[0]


def test_failure_of_the_model(server, backend, caplog):
    """What was said before is not lost, and the client is told no more than that it failed."""
    backend.prepare(["the", End(0, "error", "CUDA error in slot 3")], [End(0, "cancelled")])
    found = lines(chat(server))
    assert said_by(found[:-1]) == "the"
    error = json.loads(found[-1][6:])["error"]
    assert error["type"] == "server_error"
    assert "CUDA" not in str(error)
    assert "CUDA error in slot 3" in caplog.text
    assert "shutting down" in lines(chat(server))[-1]


# ---------------------------------------------------------------------------------------------------------
# Bad requests


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "the last message must be the user's"),
        ({"messages": [user("one"), {"role": "assistant", "content": "two"}]}, "the last message must be"),
        ({"messages": [user("one"), user("two")]}, "message 1 has role 'user' where 'assistant' is due: "),
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
    assert refusal(chat(server, **fields), 400).startswith(message)
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
def test_bodies_that_are_no_request(server, body):
    headers = {"content-type": "application/json"}
    assert refusal(server.post("/chat/completions", content=body, headers=headers), 400)


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", None])
def test_a_body_without_its_type(server, content_type):
    """What curl -d sends was told that it is no dictionary, and an empty body "Field required"."""
    headers = {"content-type": content_type} if content_type else {}
    for path in ("/chat/completions", "/v1/completions"):
        for body in (b"[]", b"") if content_type == "application/json" else (json.dumps(HELLO).encode(), b""):
            response = server.post(path, content=body, headers=headers)
            message = refusal(response, 400)
            assert message == "the body must be a JSON object, sent with Content-Type: application/json"
            assert response.json()["error"]["param"] is None


def test_a_body_that_is_no_json(server):
    """It was told "1: JSON decode error", of a parameter of that name."""
    headers = {"content-type": "application/json"}
    response = server.post("/chat/completions", content=b"{", headers=headers)
    assert refusal(response, 400).startswith("the body is no JSON: Expecting property name ")
    assert refusal(response, 400).endswith(", at character 1")
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
def test_a_mistake_is_told_with_its_place_and_value(server, fields, message, param):
    response = chat(server, **fields)
    assert refusal(response, 400).startswith(message)
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 300


def test_half_a_character(server, backend):
    """Half a surrogate pair, which a careless cut leaves of an emoji, is no UTF-8."""
    body = b'{"messages": [{"role": "user", "content": "a\\ud83d"}]}'
    response = server.post("/chat/completions", content=body, headers={"content-type": "application/json"})
    assert said(response) == "the river"
    assert "a\ufffd<|user_end|>" in backend.prompts()[0]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/chat/completions", {"messages": MISTAKES}),
        ("/v1/chat/completions", {"messages": MISTAKES}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": MISTAKES}]}),
        ("/v1/completions", {"prompt": MISTAKES}),
    ],
    ids=["messages", "openai", "parts", "prompt"],
)
def test_a_body_full_of_mistakes_holds_up_nobody(server, path, fields):
    """A list of them all took two seconds, in which nobody else was served."""
    start = time.process_time()  # which does not go on while others compute
    response = server.post(path, json=fields)
    assert time.process_time() - start < 1
    assert refusal(response, 400)
    assert len(response.text) < 1000


def test_a_form_of_another_page_is_no_request(server, backend):
    """A page may post text/plain to any address without asking; it would talk to the server of its reader."""
    body = json.dumps(HELLO)
    assert refusal(
        server.post("/chat/completions", content=body, headers={"content-type": "text/plain"}), 400
    )
    assert not backend.requests


def test_what_the_worker_will_not_serve(server, backend):
    backend.prepare(ValueError("n=9 must be at most 4"), QueueFull("full"))
    assert refusal(chat(server), 400) == "n=9 must be at most 4"
    response = chat(server)
    assert "try again later" in refusal(response, 429)
    assert int(response.headers["retry-after"]) > 0


def test_a_mistake_of_ours_says_nothing(server, backend):
    backend.prepare(KeyError("secret"))
    response = chat(server)
    assert "secret" not in refusal(response, 500)
    assert response.headers["connection"] == "close"  # the next request on it was lost


def test_paths_and_methods_that_are_not(server):
    message = refusal(server.get("/nothing"), 404)
    assert message.startswith("there is no /nothing here, but /v1/models, ")
    assert "/chat/completions" in message
    assert refusal(server.get("/chat/completions"), 405) == "/chat/completions is for POST, not GET"


def test_head(server):
    """It was refused, and with it the probes of some balancers."""
    for path in ("/", "/health"):
        response = server.head(path)
        assert (response.status_code, response.text) == (200, "")


def test_large_bodies(server, backend):
    large = json.dumps({"messages": [user("a" * (1 << 20))]}).encode()
    headers = {"content-type": "application/json"}
    assert refusal(server.post("/chat/completions", content=large, headers=headers), 413)

    def in_parts():  # there is no content-length then
        for start in range(0, len(large), 1 << 16):
            yield large[start : start + (1 << 16)]

    assert refusal(server.post("/chat/completions", content=in_parts(), headers=headers), 413)
    assert not backend.requests
    # The longest that is allowed is not too large, however it is escaped.
    longest = "\U0001f680" * 8000
    assert chat(server, messages=[user(longest)]).status_code == 200


# ---------------------------------------------------------------------------------------------------------
# Who may ask


def test_key(backend):
    with serve(backend, api_key="secret") as client:
        for path in ("/", "/health"):
            assert client.get(path).status_code == 200
        for header in ("", "Bearer", "Bearer wrong", "Bearer secret2", "secret"):
            client.headers["authorization"] = header
            for response in (chat(client), client.get("/stats"), client.get("/metrics"), client.get("/x")):
                assert "needs its key" in refusal(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
        assert not backend.requests
        for scheme in ("Bearer", "bearer", "BEARER"):  # the case of a scheme says nothing
            client.headers["authorization"] = f"{scheme} secret"
            assert said(chat(client)) == "the river"
        assert client.get("/stats").status_code == 200
        # Two strings cannot be compared in constant time unless they are ASCII; bytes can.
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
        connection.request("GET", "/stats", headers={"Authorization": "Bearer \u00e9"})
        assert connection.getresponse().status == 401
        connection.close()


@pytest.mark.parametrize("key", ["secret\n", " secret", "two words", "schl\u00fcssel", "tab\t"])
def test_a_key_that_no_client_can_send(key):
    """A file's line end became part of the key, and everyone was turned away."""
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
        assert said(client.post("/chat/completions", json=HELLO, headers={"host": host})) == "the river"


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "[::1", "", "127.0.0.1.example.org:80"]
)
def test_a_page_whose_name_has_this_machine_s_address(backend, host):
    """Any page could bind its name to 127.0.0.1 (DNS rebinding), and then use the model of its reader."""
    with TestClient(create_app(backend, Settings(allowed_hosts=LOOPBACK))) as client:
        for path in ("/", "/health", "/stats"):
            message = refusal(client.get(path, headers={"host": host}), 403)
            assert message.startswith("this server is 127.0.0.1 or ::1 or localhost, not ")
            assert "--api-key" in message
        refusal(client.post("/chat/completions", json=HELLO, headers={"host": host}), 403)
    assert not backend.requests


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/", "https://a b", ""])
def test_an_origin_that_no_page_has(origin):
    with pytest.raises(ValueError, match="must be like https:"):
        Settings(allowed_origins=(origin,))


def preflight(client, origin):
    names = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"  # OpenAI's client's
    headers = {"origin": origin, "access-control-request-method": "POST"}
    headers["access-control-request-headers"] = names
    return client.options("/chat/completions", headers=headers)


def test_other_pages(server, backend):
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
def test_what_is_said_is_logged_only_if_asked(backend, caplog, log_chats):
    caplog.set_level(logging.DEBUG)
    backend.prepare(["under!"])
    with serve(backend, log_chats=log_chats) as client:
        chat(client)
        chat(client, messages=[user("the river")] * 2)  # an error
    assert ("the river" in caplog.text) == log_chats
    assert ("under!" in caplog.text) == log_chats


# ---------------------------------------------------------------------------------------------------------
# Clients that leave, and slow ones


def hang_up(client, path, body, until):
    """Send a request, and leave once something is the case."""
    body = json.dumps(body)
    host, port = client.base_url.host, client.base_url.port
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, port))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(connection)


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/chat/completions", {}), ("/v1/chat/completions", {}), ("/v1/chat/completions", {"stream": True})],
)
def test_a_client_that_leaves_before_the_first_word(server, backend, path, fields):
    """Its worker was never released."""
    backend.prepare([Pause()])
    hang_up(server, path, {**HELLO, **fields}, lambda _: wait_for(lambda: backend.handles))
    wait_for(lambda: backend.handles[0].cancelled.is_set())
    wait_for(lambda: not backend.stats()["running"])


def test_a_client_that_leaves_in_the_middle(server, backend):
    backend.prepare(["the", Pause()])

    def read_some(connection):
        read = b""
        while b'"token"' not in read:
            read += connection.recv(1000)
        assert not backend.handles[0].cancelled.is_set()

    hang_up(server, "/chat/completions", HELLO, read_some)
    wait_for(lambda: backend.handles[0].cancelled.is_set())


def test_a_lost_gpu(server, backend, monkeypatch):
    """Nothing was answered any more, and /health went on saying ok."""
    monkeypatch.setattr(backend, "is_broken", True)
    assert "the GPU has failed" in refusal(server.get("/health"), 503)
    backend.prepare(Closed("the GPU has failed"))
    assert "the GPU has failed" in refusal(chat(server), 503)


def test_a_slow_client_keeps_nobody_waiting(server, backend, monkeypatch):
    """Decoding ran in the event loop: everyone waited for everyone."""
    backend.prepare(["river " * 3000, Pause()])

    def do_something_else(connection):
        assert connection.recv(10) == b"HTTP/1.1 2"
        for _ in range(3):
            assert server.get("/health").json() == {"status": "ok", "model": "d2-fake"}
            assert said(chat(server)) == "the river"
        assert not backend.handles[0].cancelled.is_set()

    monkeypatch.setattr(backend, "context", 5000)
    body = {"prompt": "a", "stream": True, "max_tokens": 4096, "n": 4}  # 2 MB, of which it reads 10 bytes
    hang_up(server, "/v1/completions", body, do_something_else)
    wait_for(lambda: backend.handles[0].cancelled.is_set())


# ---------------------------------------------------------------------------------------------------------
# Beginning and end


def is_open(client):
    """Whether anybody listens."""
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
    assert said(found[0]) == "the river"
    assert lines(found[0])[-1] == DONE
    assert backend.closed_with is True


def test_a_stream_that_does_not_end_is_cut(backend, caplog):
    """After the time of grace, and that is no crash."""
    backend.prepare(["the", Pause()])
    with serve(backend) as client:
        client.server.config.timeout_graceful_shutdown = 0.2
        with client.stream("POST", "/chat/completions", json=HELLO) as response:
            client.server.should_exit = True
            with pytest.raises(httpx2.RemoteProtocolError):
                list(response.iter_bytes())
    assert backend.handles[0].cancelled.is_set()
    assert "Traceback" not in caplog.text


def test_new_requests_are_turned_away_while_the_worker_finishes(backend):
    async def ask(app, path, **request):
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request("POST" if request else "GET", path, **request)

    async def live():
        app = create_app(backend)
        async with app.router.lifespan_context(app):
            assert said(await ask(app, "/chat/completions", json=HELLO)) == "the river"
        assert (await ask(app, "/health")).status_code == 503
        return await ask(app, "/chat/completions", json=HELLO)

    response = asyncio.run(live())
    assert "shutting down" in refusal(response, 503)
    assert "retry-after" in response.headers
    assert len(backend.requests) == 1


# ---------------------------------------------------------------------------------------------------------
# What else there is


def test_page(server):
    response = server.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    assert response.text == files("nanochat.serve").joinpath("ui.html").read_text("utf-8")


def test_stats_and_metrics(backend):
    backend.tokens_generated = 0
    with serve(backend, temperature=0.1, top_k=3, max_tokens=500) as client:
        began = time.perf_counter()
        chat(client)
        chat(client, top_k=-1)
        client.get("/secret?question=the+river")
        stats = client.get("/stats").json()
        response = client.get("/metrics")
        seconds = time.perf_counter() - began
    num_tokens = len(backend.ids("the river"))
    sampling = {"temperature": 0.1, "top_k": 3, "max_tokens": 100}  # half of the context at most
    assert stats == {"model": "d2-fake", "context": 200, **sampling, **backend.stats()}
    assert response.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    assert samples['nanochat_requests_total{path="/chat/completions",status="200"}'] == "1"
    assert samples['nanochat_requests_total{path="/chat/completions",status="400"}'] == "1"
    assert samples['nanochat_requests_total{path="other",status="404"}'] == "1"
    assert samples['nanochat_request_seconds_count{path="/chat/completions"}'] == "2"
    assert 0 < float(samples['nanochat_request_seconds_sum{path="/chat/completions"}']) < seconds
    assert samples["nanochat_tokens_total"] == str(num_tokens)
    assert (samples["nanochat_running"], samples["nanochat_waiting"], samples["nanochat_slots"]) == (
        *("0", "0", "4"),
    )
    assert "secret" not in response.text


def test_no_request_breaks_the_server():
    """Requests made up from the app's own description, and what is next to them, and a model to answer.

    What is made up seldom passes the rules that no description can tell; so half of it is mended there: a
    request that can be answered, and one field of what was made up.
    """
    tokenizer = train_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=64)).eval()
    needed = {**HELLO, "prompt": "the river"}
    answered = set()
    with serve(Worker(model, tokenizer, "random", slots=8)) as client:
        schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
        for operation in [result.ok() for result in schema.get_all_operations()]:

            @given(case=operation.as_strategy(), is_mended=strategies.booleans(), pick=strategies.randoms())
            @hypothesis_settings(
                max_examples=25,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            def check(case, is_mended, pick):
                if is_mended and isinstance(case.body, dict):
                    options = sorted(case.body.keys() - needed.keys() - {"model"})
                    kept = {name: case.body[name] for name in pick.sample(options, min(len(options), 1))}
                    case.body = {name: needed[name] for name in needed.keys() & case.body.keys()} | kept
                response = case.call_and_validate(checks=[not_a_server_error])
                if response.status_code == 200:
                    answered.add(case.operation.path)

            check()
        stats = client.get("/stats").json()
    assert answered >= {"/chat/completions", "/v1/chat/completions", "/v1/completions", "/stats"}
    assert (stats["requests_failed"], stats["running"], stats["waiting"]) == (0, 0, 0)
