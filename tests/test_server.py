"""The chat server: nanochat's API, the page, monitoring, and random requests."""

import json
import time
from importlib.resources import files

import pytest
import schemathesis
from hypothesis import HealthCheck, given, strategies
from hypothesis import settings as hypothesis_settings
from schemathesis.checks import not_a_server_error

from nanochat.sampling import SamplingParams
from nanochat.serve.protocol import End
from nanochat.serve.worker import Worker
from tests.helpers.chat_client import DONE, HELLO, chat, lines, text_of
from tests.helpers.fake_backend import serve
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROCKET = "\U0001f680"


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


def test_events(server, backend):
    backend.prepare(["the", " river"])
    response = chat(server)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    tokens = [backend.tokenizer.decode([id]) for id in (*backend.ids("the"), *backend.ids(" river"))]
    assert lines(response) == [f'data: {{"token": "{token}", "gpu": 0}}' for token in tokens] + [DONE]


def test_characters_come_whole(server, backend):
    backend.prepare([backend.tokenizer.enc.encode_single_token(bytes([b])) for b in ROCKET.encode()])
    assert lines(chat(server)) == [f'data: {{"token": "{ROCKET}", "gpu": 0}}', DONE]


def test_an_incomplete_character_is_shown_at_the_end(server, backend):
    backend.prepare([backend.tokenizer.enc.encode_single_token(ROCKET.encode()[:1])])
    assert lines(chat(server)) == ['data: {"token": "\ufffd", "gpu": 0}', DONE]


@pytest.mark.parametrize(
    ("output", "result"),
    [(["<|output_start|>", "84", "<|output_end|>"], '"84"'), ([], "null")],  # null: no result
)
def test_calculator(server, backend, output, result):
    backend.prepare(["the", "<|python_start|>", "12*7", "<|python_end|>", *output, "of"])
    tool = f'data: {{"tool": {{"expression": "12*7", "result": {result}}}}}'
    found = lines(chat(server))
    assert tool in found[1:-2]
    assert text_of(found) == "theof"


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
    """7.0 is an integer in JSON, and in the app's schema."""
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
    """A system message and an empty reply are allowed."""
    turns = [("system", "light"), ("user", "one"), ("assistant", ""), ("user", "two")]
    chat(server, messages=[{"role": role, "content": text} for role, text in turns])
    assert backend.prompts() == [
        "<|bos|><|user_start|>light\n\none<|user_end|><|assistant_start|><|assistant_end|>"
        "<|user_start|>two<|user_end|><|assistant_start|>"
    ]


def test_the_oldest_exchanges_are_dropped(server, backend):
    """The length of prompt and reply together was not limited to the context."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} and the river " * 5} for i in range(9)]
    response = chat(server, messages=turns, max_tokens=4096)
    assert lines(response)[-1] == DONE
    (request,) = backend.requests
    assert request.max_tokens == 100
    assert len(request.tokens) <= 100
    assert "8 and" in backend.prompts()[0]
    assert "0 and" not in backend.prompts()[0]


def test_failure_of_the_model(server, backend, caplog):
    """The text before a failure is sent, and the error shows no details."""
    backend.prepare(["the", End(0, "error", "CUDA error in slot 3")], [End(0, "cancelled")])
    found = lines(chat(server))
    assert text_of(found[:-1]) == "the"
    error = json.loads(found[-1][6:])["error"]
    assert error["type"] == "server_error"
    assert "CUDA" not in str(error)
    assert "CUDA error in slot 3" in caplog.text
    assert "shutting down" in lines(chat(server))[-1]


# ---------------------------------------------------------------------------------------------------------
# The page, monitoring, and random requests


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
    """Random requests generated from the app's schema, to a server with a model.

    They rarely meet the rules that a schema cannot express. So half of them are repaired: a valid request
    with one field of the generated one.
    """
    tokenizer = train_tokenizer()
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=64)).eval()
    needed = {**HELLO, "prompt": "the river"}
    answered = set()
    with serve(Worker(model, tokenizer, "random", slots=8)) as client:
        schema = schemathesis.openapi.from_url(f"{client.url}/openapi.json")
        for operation in [result.ok() for result in schema.get_all_operations()]:

            @given(case=operation.as_strategy(), is_repaired=strategies.booleans(), pick=strategies.randoms())
            @hypothesis_settings(
                max_examples=25,
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            def check(case, is_repaired, pick):
                if is_repaired and isinstance(case.body, dict):
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
