"""The routes of OpenAI's API: chat completions, completions, models.

They have the features of a text model: streams, several samples, stop strings, seeds, log probabilities and
usage, and also top_k and repetition_penalty. Other fields are errors (see openai_schema). For several prompts
of /v1/completions, the choices come prompt by prompt, n of each.

Three things differ from OpenAI's own API. Calls of the calculator and their results are not in the content,
though usage counts their tokens. max_tokens has the server's default (--max-tokens), and in a chat it is at
most half of the context. If a chat is longer than the rest of the context, its oldest exchanges are dropped;
usage.prompt_tokens counts the tokens that the model has read.

    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=..., ...)
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from starlette.types import Receive, Scope, Send

from nanochat.serve.api_errors import ApiError
from nanochat.serve.chat_request import Settings, chat_prompt, check_length
from nanochat.serve.delivery import Generation, Generations, WhileConnected, event, event_stream
from nanochat.serve.openai_schema import ChatCompleting, Completing, TextCompleting
from nanochat.serve.protocol import Backend, Request
from nanochat.serve.reply import Delta, Output
from nanochat.tokenizer import RustBPETokenizer

Choice = Callable[[int, Output], dict[str, Any]]  # makes JSON of a sample's number and output


def openai_routes(generations: Generations, settings: Settings) -> APIRouter:
    """Return the routes below /v1."""
    router = APIRouter(prefix="/v1")
    backend = generations.backend
    tokenizer = backend.tokenizer
    model = {"id": backend.name, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}

    def answer(kind: str, body: Completing, requests: list[Request], choice: Choice) -> Response:
        num_tokens = sum(len(request.tokens) for request in requests)
        generation = generations.start(*requests, stops=body.stops)
        return _Answer(kind, backend.name, body, generation, num_tokens, choice).response()

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(backend, name)
        return model

    @router.post("/chat/completions")
    async def chat_completions(body: ChatCompleting) -> Response:
        _check_model(backend, body.model)
        max_tokens = _chat_limit(body, settings, backend.context)
        messages = [message.plain() for message in body.messages]
        tokens = chat_prompt(tokenizer, settings, messages, backend.context - max_tokens)
        request = body.to_request(settings, tokens, max_tokens, n=body.n, logprobs=body.num_alternatives)
        choice = partial(_chat_choice, tokenizer, body.logprobs)
        return answer("chat.completion", body, [request], choice)

    @router.post("/completions")
    async def completions(body: TextCompleting) -> Response:
        _check_model(backend, body.model)
        requests = []
        for prompt in body.prompts:
            tokens = _text_prompt(tokenizer, settings, prompt)
            max_tokens = _text_limit(body, settings, backend.context, len(tokens))
            requests.append(body.to_request(settings, tokens, max_tokens, n=body.n, logprobs=body.logprobs))
        choice = partial(_text_choice, tokenizer, body.logprobs is not None)
        return answer("text_completion", body, requests, choice)

    return router


@dataclass
class _Answer:
    """The response to a request for completions, whole or as a stream."""

    kind: str
    model: str
    body: Completing
    generation: Generation
    num_prompt_tokens: int
    choice: Choice

    def __post_init__(self) -> None:
        self.head = {
            "id": f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": self.model,
        }

    def response(self) -> Response:
        """Return a stream or a whole response, as the client wants it."""
        response = event_stream(self._chunks()) if self.body.stream else self._whole
        return WhileConnected(self.generation, response)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self.generation.deltas():
            pass
        choices = [self.choice(i, sample) for i, sample in enumerate(self.generation.samples)]
        full = {**self.head, "choices": choices, "usage": self._usage()}
        await Response(json.dumps(full), media_type="application/json")(scope, receive, send)

    async def _chunks(self) -> AsyncIterator[str]:
        is_chat = self.kind == "chat.completion"
        has_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        head = {**self.head, "object": "chat.completion.chunk" if is_chat else self.kind}
        usage = {"usage": None} if has_usage else {}
        for index in range(self.body.n if is_chat else 0):
            start = {**self.choice(index, Delta()), "delta": {"role": "assistant", "content": ""}}
            yield event({**head, "choices": [start], **usage})
        async for deltas in self.generation.deltas():
            yield "".join(
                event({**head, "choices": [self.choice(delta.sample, delta)], **usage})
                for delta in deltas
                if delta.text or delta.finish
            )
        if has_usage:
            yield event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        num_new = sum(sample.num_tokens for sample in self.generation.samples)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_new,
            "total_tokens": self.num_prompt_tokens + num_new,
        }


def _check_model(backend: Backend, name: str | None) -> None:
    if name not in (None, backend.name):
        message = f"there is no model {name!r}, only {backend.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _chat_limit(body: ChatCompleting, settings: Settings, context: int) -> int:
    asked = body.max_tokens or body.max_completion_tokens
    limit = settings.chat_tokens(asked, context)
    if asked and asked > limit:
        name = "max_tokens" if body.max_tokens else "max_completion_tokens"
        message = f"{name}={asked} is more than {limit}, half of the context"
        raise ApiError(400, message, param=name, code="context_length_exceeded")
    return limit


def _text_limit(body: TextCompleting, settings: Settings, context: int, num_prompt_tokens: int) -> int:
    room = context - num_prompt_tokens
    if room < (body.max_tokens or 1):
        message = (
            f"{num_prompt_tokens} tokens of prompt and {body.max_tokens or 1} to come are more than the "
            f"context of {context}"
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return body.max_tokens or min(settings.max_tokens, room)


def _text_prompt(tokenizer: RustBPETokenizer, settings: Settings, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, list):
        size = tokenizer.get_vocab_size()
        if max(prompt) >= size:
            raise ApiError(400, f"there is no token {max(prompt)}, only {size} of them", param="prompt")
        return prompt
    check_length(settings, len(prompt), "prompt")
    return tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())


def _chat_choice(
    tokenizer: RustBPETokenizer, has_logprobs: bool, index: int, output: Output
) -> dict[str, Any]:
    def scored(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.enc.decode_single_token_bytes(token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    content = [
        {**scored(token.token, token.logprob), "top_logprobs": [scored(*pair) for pair in token.alternatives]}
        for _, token in output.scored
    ]
    if isinstance(output, Delta):
        message = {"delta": {"content": output.text} if output.text else {}}
    else:
        message = {"message": {"role": "assistant", "content": output.text, "refusal": None}}
    return {
        "index": index,
        **message,
        "logprobs": {"content": content, "refusal": None} if has_logprobs else None,
        "finish_reason": output.finish,
    }


def _text_choice(
    tokenizer: RustBPETokenizer, has_logprobs: bool, index: int, output: Output
) -> dict[str, Any]:
    def name(token: int) -> str:
        raw = tokenizer.enc.decode_single_token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:  # part of a character
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    scores = {
        "tokens": [name(token.token) for _, token in output.scored],
        "token_logprobs": [token.logprob for _, token in output.scored],
        "top_logprobs": [
            {name(t): p for t, p in (*token.alternatives, (token.token, token.logprob))}
            for _, token in output.scored
        ],
        "text_offset": [start for start, _ in output.scored],
    }
    return {
        "index": index,
        "text": output.text,
        "logprobs": scores if has_logprobs else None,
        "finish_reason": output.finish,
    }
