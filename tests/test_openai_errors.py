"""OpenAI's API: models, refused fields, and errors."""

import openai
import pytest

from nanochat.serve.protocol import End, QueueFull
from tests.helpers.chat_client import MESSAGES
from tests.helpers.fake_backend import Pause, serve, wait_for

pytest_plugins = "tests.helpers.openai_client"


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


def test_models(openai_client):
    assert [model.id for model in openai_client.models.list()] == ["d2-fake"]
    assert openai_client.models.retrieve("d2-fake").id == "d2-fake"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-2'"):
        openai_client.models.retrieve("gpt-2")


def test_another_model(openai_client, backend):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-2', only 'd2-fake'") as error:
        openai_client.chat.completions.create(model="gpt-2", messages=MESSAGES)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        openai_client.completions.create(model="gpt-2", prompt="a")
    assert not backend.requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools=[{'type': 'function'}] is not served here"),
        ({"tool_choice": "required"}, "tool_choice='required' is not served here"),
        ({"response_format": {"type": "json_object"}}, "response_format={'type': 'json_object'} is not"),
        ({"frequency_penalty": 0.5}, "frequency_penalty=0.5 is not served here"),
        ({"logit_bias": {"5": 100}}, "logit_bias={'5': 100} is not served here"),
        ({"reasoning_effort": "high"}, "reasoning_effort='high' is not served here"),
        ({"service_tier": "flex"}, "service_tier='flex' is not served here"),
        ({"modalities": ["text", "audio"]}, "modalities=['text', 'audio'] is not served here"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obf"),
        ({"web_search_options": {}}, "web_search_options: Extra inputs"),
        ({"n": 0}, "n: "),
        ({"n": 9}, "n: "),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: must be a string of 1 to 200 characters, or a list of"),
        (
            {"stop": ""},
            "stop: must be a string of 1 to 200 characters, or a list of up to 4 such strings, not ''",
        ),
        ({"stop": ["a", ""]}, "stop: must be a string"),
        ({"temperature": 2.5}, "temperature: "),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs=true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens and max_completion_tokens"),
        ({"max_tokens": 101}, "max_tokens=101 is more than 100, half of the context"),
        ({"max_completion_tokens": 101}, "max_completion_tokens=101 is more than 100, half of the context"),
        ({"stream_options": {"include_usage": True}}, "stream_options need stream=true"),
        ({"messages": []}, "the last message must be the user's"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages.0.name: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            """messages.0.content: must be a string, or a list of {"type": "text", "text": ...}, not [{'""",
        ),
        ({"messages": MESSAGES * 2}, "user and assistant take turns"),
    ],
)
def test_bad_requests(server, backend, fields, message):
    response = server.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] in fields
    assert not backend.requests


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", 5]},
        {"prompt": [[5], "a"]},
        {"prompt": ["a"] * 129},
        {"prompt": {"list[str]": 1}},
        {"prompt": [10**6]},
        {"prompt": [[5], [10**6]]},
        {"prompt": [-1]},
        {"prompt": "a" * 32001},
        {"echo": True},
        {"best_of": 2},
        {"suffix": "a"},
        {"logprobs": 6},
        {},
    ],
)
def test_bad_completions(server, backend, fields):
    body = fields if "prompt" in fields or not fields else {"prompt": "a", **fields}
    response = server.post("/v1/completions", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == next(iter(fields), "prompt")
    if isinstance(fields.get("prompt"), (list, dict)) and "no token" not in error["message"]:
        rule = "a string or a list of token ids, or a list of 1 to 128 of one kind of them"
        assert error["message"].startswith(f"prompt: must be {rule}, not ")
    assert not backend.requests


def test_fields_that_are_off_are_accepted(server, backend):
    """Many clients send every field that they know."""
    body = {
        **{
            "messages": MESSAGES,
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "n": None,
        },
        **{"response_format": {"type": "text"}, "tools": None, "user": "ann", "store": False, "stop": None},
        **{"parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"], "verbosity": None},
        **{"function_call": "none", "prompt_cache_key": "ann", "reasoning_effort": "none"},
        **{"logprobs": False, "top_logprobs": 0, "stream": True},
        **{"stream_options": {"include_usage": False, "include_obfuscation": False}},
    }
    assert server.post("/v1/chat/completions", json=body).status_code == 200
    assert backend.requests[0].n == 1


def test_too_many(ask, backend):
    backend.prepare(QueueFull("full"))
    with pytest.raises(openai.RateLimitError) as error:
        ask()
    assert int(error.value.response.headers["retry-after"]) > 0


def test_failure_of_the_model(ask, backend):
    """The status is 500, or if it has been sent, the client raises the error of an event."""
    backend.prepare([End(0, "error", "CUDA error")], ["the", End(0, "error", "CUDA error")])
    with pytest.raises(openai.InternalServerError) as error:
        ask()
    assert error.value.status_code == 500
    assert "CUDA" not in str(error.value)
    chunks = iter(ask(stream=True))
    num_chunks = 1 + len(backend.ids("the"))
    assert "".join(next(chunks).choices[0].delta.content for _ in range(num_chunks)) == "the"
    with pytest.raises(openai.APIError, match="the model failed"):
        next(chunks)


def test_a_client_that_disconnects(ask, backend):
    backend.prepare(["the", Pause()])
    with ask(stream=True) as stream:
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        assert not backend.handles[0].cancelled.is_set()
    wait_for(lambda: backend.handles[0].cancelled.is_set())


def test_key(backend):
    with serve(backend, api_key="secret") as client:
        url = f"{client.url}/v1"
        stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError), stranger:
            stranger.models.list()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as friend:
            assert [model.id for model in friend.models.list()] == ["d2-fake"]
