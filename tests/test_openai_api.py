"""OpenAI's API, through OpenAI's own client and by plain requests: chats and completions."""

import json

import openai
import pytest

from nanochat.sampling import SamplingParams
from nanochat.serve.protocol import End, QueueFull, Token
from tests.helpers.chat_client import MESSAGES
from tests.helpers.fake_backend import Pause, wait_for

pytest_plugins = "tests.helpers.openai_client"

ROCKET = "\U0001f680"
CALL = ["<|python_start|>", "12*7", "<|python_end|>", "<|output_start|>", "84", "<|output_end|>"]


@pytest.fixture(autouse=True)
def clear_scripts(backend):
    backend.prepare()


def byte_ids(backend, text):
    return [backend.tokenizer.enc.encode_single_token(bytes([byte])) for byte in text.encode()]


# ---------------------------------------------------------------------------------------------------------
# Chat


def test_chat(ask, backend):
    backend.prepare([f"the {ROCKET}"])
    answer = ask()
    (choice,) = answer.choices
    assert (answer.object, answer.model) == ("chat.completion", "d2-fake")
    assert answer.id.startswith("chatcmpl-")
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert choice.message.content == f"the {ROCKET}"
    assert choice.logprobs is None
    (request,) = backend.requests
    assert backend.prompts() == ["<|bos|><|user_start|>the river<|user_end|><|assistant_start|>"]
    num_new = len(backend.ids(f"the {ROCKET}"))
    assert answer.usage.prompt_tokens == len(request.tokens)
    assert answer.usage.completion_tokens == num_new
    assert answer.usage.total_tokens == len(request.tokens) + num_new
    assert request.sampling == SamplingParams(temperature=0.8, top_k=50, seed=None)
    assert (request.max_tokens, request.n, request.logprobs) == (100, 1, None)


def test_chat_stream(ask, backend):
    backend.prepare([*byte_ids(backend, f"a{ROCKET}")])
    chunks = list(ask(stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert [delta.content for delta in deltas[1:]] == ["a", ROCKET, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_events_of_a_stream(server, backend):
    backend.prepare(["the"])
    response = server.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0][6:])
    backend.prepare(["the"])
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    events = server.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert json.loads(events[0][6:])["usage"] is None


def test_usage_of_a_stream(ask, continue_, backend):
    for complete in (ask, continue_):
        backend.prepare(["the river"])
        *chunks, last = complete(stream=True, stream_options={"include_usage": True})
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
        assert last.choices == []
        assert last.usage.prompt_tokens == len(backend.requests[0].tokens)
        assert last.usage.completion_tokens == len(backend.ids("the river"))


def test_settings(ask, backend):
    ask(temperature=0, top_p=0.5, seed=-3, max_tokens=7, extra_body={"top_k": 3, "repetition_penalty": 1.5})
    ask(max_completion_tokens=8)
    first, second = backend.requests
    assert first.sampling == SamplingParams(
        temperature=0.0, top_k=3, top_p=0.5, repetition_penalty=1.5, seed=-3
    )
    assert (first.max_tokens, second.max_tokens) == (7, 8)


def test_length(ask, continue_, backend):
    backend.prepare(["the river of light"], ["the river of light"])
    for answer in (ask(max_tokens=2), continue_(max_tokens=2)):
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 2


def test_messages(openai_client, backend):
    """A developer message, parts of text, and a reply sent back unchanged."""
    reply = openai_client.chat.completions.create(model="d2-fake", messages=MESSAGES).choices[0].message
    parts = [{"type": "text", "text": "of "}, {"type": "text", "text": "light"}]
    openai_client.chat.completions.create(
        model="d2-fake",
        messages=[
            {"role": "developer", "content": "water"},
            *MESSAGES,
            reply,
            {"role": "user", "content": parts},
        ],
    )
    assert backend.prompts()[1] == (
        "<|bos|><|user_start|>water\n\nthe river<|user_end|><|assistant_start|>the river<|assistant_end|>"
        "<|user_start|>of light<|user_end|><|assistant_start|>"
    )


def test_the_oldest_exchanges_are_dropped(openai_client, backend):
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{i} and the river " * 5} for i in range(9)]
    answer = openai_client.chat.completions.create(model="d2-fake", messages=turns, max_tokens=50)
    assert answer.usage.prompt_tokens <= 150
    assert "8 and" in backend.prompts()[0]
    assert "0 and" not in backend.prompts()[0]


@pytest.mark.parametrize("stream", [False, True])
def test_the_calculator_is_not_in_the_content(ask, backend, stream):
    backend.prepare(["the", *CALL, "river"])
    answer = ask(stream=stream)
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
        assert answer.usage.completion_tokens > len(backend.ids("the") + backend.ids("river")) + 4
    assert text == "theriver"


# ---------------------------------------------------------------------------------------------------------
# Stop strings and samples


@pytest.mark.parametrize("stop", ["END", ["\n\n", "END"], ["END", "x", "y", "z"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop(ask, backend, stop, stream):
    """A stop string may cross tokens, and it ends the row."""
    backend.prepare([*byte_ids(backend, "the ENd END river"), Pause()])
    answer = ask(stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "the ENd "
        finish = chunks[-1].choices[0].finish_reason
    else:
        assert answer.choices[0].message.content == "the ENd "
        assert answer.usage.completion_tokens == len("the ENd END")
        finish = answer.choices[0].finish_reason
    assert finish == "stop"
    wait_for(lambda: not backend.stats()["running"])  # although the script has a pause
    assert backend.handles[0].cancelled.is_set()


def test_samples(ask, backend):
    """Each has its own text, with characters that arrive in parts, and its own end."""
    script = [
        (i % 2, id)
        for pair in zip(byte_ids(backend, ROCKET), byte_ids(backend, "\u00e9t\u00e9"), strict=False)
        for i, id in enumerate(pair)
    ]
    backend.prepare(
        [*script, (1, byte_ids(backend, "\u00e9")[1]), End(1, "length"), (0, "the"), End(0, "stop")]
    )
    answer = ask(n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [f"{ROCKET}the", "\u00e9t\u00e9"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]
    assert backend.requests[0].n == 2
    assert answer.usage.completion_tokens == 9 + len(backend.ids("the"))


def test_samples_of_a_stream(ask, backend):
    backend.prepare([(1, "the"), End(1, "stop"), (0, "river"), End(0, "length")])
    texts, finishes = ["", ""], [None, None]
    for chunk in ask(n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == ["river", "the"]
    assert finishes == ["length", "stop"]


def test_a_sample_that_stops_does_not_stop_the_others(ask, backend):
    backend.prepare([(0, "the\n"), (0, "never"), (1, "river of light"), (1, "\n"), Pause()])
    answer = ask(n=2, stop="\n")
    assert [choice.message.content for choice in answer.choices] == ["the", "river of light"]
    assert backend.handles[0].stopped == [0, 1]
    wait_for(lambda: backend.handles[0].cancelled.is_set())


# ---------------------------------------------------------------------------------------------------------
# Log probabilities


def scored_tokens(backend):
    the, *_ = backend.ids("the")
    first, *rest = byte_ids(backend, ROCKET)
    river, *_ = backend.ids(" river")
    return [
        Token(0, the, logprob=-0.5, alternatives=((the, -0.5), (river, -1.5))),
        Token(0, first, logprob=-0.25, alternatives=((first, -0.25), (the, -2.0))),
        *(Token(0, id, logprob=0.0, alternatives=((id, 0.0), (the, -9.0))) for id in rest),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(ask, backend, stream):
    backend.prepare(scored_tokens(backend))
    answer = ask(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        assert choices[1].delta.content == choices[1].logprobs.content[0].token
        content = [token for choice in choices for token in choice.logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    assert backend.requests[0].logprobs == 2
    the = backend.tokenizer.decode(backend.ids("the")[:1])
    assert [token.token for token in content] == [the] + ["\ufffd"] * 4
    assert bytes(byte for token in content for byte in token.bytes).decode() == the + ROCKET
    assert [token.logprob for token in content] == [-0.5, -0.25, 0, 0, 0]
    assert [(top.token, top.logprob) for top in content[1].top_logprobs] == [("\ufffd", -0.25), (the, -2.0)]


def test_chat_logprobs_without_alternatives(ask, backend):
    ask(logprobs=True)
    ask()
    assert [request.logprobs for request in backend.requests] == [0, None]


def test_text_logprobs(continue_, backend):
    backend.prepare(scored_tokens(backend))
    scores = continue_(logprobs=2).choices[0].logprobs
    the = backend.tokenizer.decode(backend.ids("the")[:1])
    assert scores.tokens == [the] + [f"bytes:\\x{byte:02x}" for byte in ROCKET.encode()]
    assert scores.token_logprobs == [-0.5, -0.25, 0, 0, 0]
    assert scores.top_logprobs[1] == {"bytes:\\xf0": -0.25, the: -2.0}
    assert scores.text_offset == [0] + [len(the)] * 4


def test_parts_of_characters_have_distinct_names(continue_, backend):
    """Two were both called "\ufffd", so that one was lost; a token outside the alternatives was lost, too."""
    first, second, *_ = byte_ids(backend, ROCKET)
    the, *_ = backend.ids("the")
    backend.prepare([Token(0, the, logprob=-3.0, alternatives=((second, -0.5), (first, -1.5)))])
    scores = continue_(logprobs=2).choices[0].logprobs
    name = backend.tokenizer.decode([the])
    assert scores.top_logprobs == [{"bytes:\\x9f": -0.5, "bytes:\\xf0": -1.5, name: -3.0}]


# ---------------------------------------------------------------------------------------------------------
# Completions


@pytest.mark.parametrize("stream", [False, True])
def test_completion(continue_, backend, stream):
    backend.prepare([f"of {ROCKET}"])
    answer = continue_(stream=stream)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == f"of {ROCKET}"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert chunks[0].id.startswith("cmpl-")
    assert backend.prompts() == ["<|bos|>the river"]


def test_prompts(continue_, backend):
    continue_(prompt=["the"])
    continue_(prompt=[5, 6, 7])
    continue_(prompt="")
    bos = backend.tokenizer.get_bos_token_id()
    assert [request.tokens for request in backend.requests] == [[bos, *backend.ids("the")], [5, 6, 7], [bos]]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts(continue_, backend, stream):
    """Choices come prompt by prompt, n of each."""
    backend.prepare([(0, "a"), (1, "b")], [(0, "c"), (1, "d")])
    answer = continue_(prompt=["the", "river"], n=2, stream=stream)
    texts = [""] * 4
    for part in answer if stream else [answer]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts == ["a", "b", "c", "d"]
    assert backend.prompts() == ["<|bos|>the", "<|bos|>river"]
    wait_for(lambda: all(handle.cancelled.is_set() for handle in backend.handles))
    if not stream:
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage.prompt_tokens == sum(len(request.tokens) for request in backend.requests)
        assert answer.usage.completion_tokens == 4


def test_a_stop_string_of_a_later_prompt(continue_, backend):
    """Prompts were read one after the other: later ones ran on until the first had ended."""
    pause = Pause()
    backend.prepare([pause, "the"], ["light river light", Pause()])
    choices = (part.choices[0] for part in continue_(prompt=["a", "b"], stop="river", stream=True))
    while (choice := next(choices)).finish_reason is None:
        assert choice.index == 1
    assert backend.handles[1].stopped == [0]
    pause.end()
    assert "".join(choice.text for choice in choices if choice.index == 0) == "the"


def test_several_prompts_of_tokens(continue_, backend):
    """Evaluation programs send a list of lists even for one prompt."""
    assert len(continue_(prompt=[[5, 6]]).choices) == 1
    assert len(continue_(prompt=[[5], [6, 7]]).choices) == 2
    assert [request.tokens for request in backend.requests] == [[5, 6], [5], [6, 7]]


def test_all_or_none_of_several_prompts_are_submitted(continue_, backend):
    backend.prepare([Pause()], QueueFull("full"))
    with pytest.raises(openai.RateLimitError):
        continue_(prompt=["a", "b"])
    assert backend.handles[0].cancelled.is_set()


def test_completions_may_fill_the_context(continue_, backend):
    continue_(prompt=[5] * 190)
    assert backend.requests[0].max_tokens == 10
    continue_(prompt=[5] * 190, max_tokens=10)
    for fields in ({"prompt": [5] * 190, "max_tokens": 11}, {"prompt": [5] * 200}):
        with pytest.raises(openai.BadRequestError, match="more than the context of 200") as error:
            continue_(**fields)
        assert error.value.code == "context_length_exceeded"
    assert len(backend.requests) == 2
