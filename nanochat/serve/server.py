"""The chat server: nanochat's API, OpenAI's API, the chat page, and monitoring.

    POST /chat/completions    server-sent events of one reply:
                              data: {"token": "text", "gpu": 0}
                              data: {"tool": {"expression": "12*7", "result": "84"}}     or null: no result
                              data: {"done": true}                                       or {"error": {...}}
    /v1/...                   see openai_api
    GET /  /health            the page, and the status of the server; both need no key, and have HEAD
    GET /stats                counters of the worker, and the default sampling settings of a chat
    GET /metrics              counters of worker and server, for Prometheus

All models run in the backend's threads. Handlers only await, so that a slow client does not delay others. The
backend starts and closes with the app. While it closes, running requests finish and new ones are refused.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve import chat_request
from nanochat.serve.api_errors import ApiError, install_error_handlers
from nanochat.serve.chat_request import Items, Sampling, Settings, chat_prompt
from nanochat.serve.delivery import (
    CLOSING,
    Generation,
    Generations,
    WhileConnected,
    event,
    event_stream,
    to_json,
)
from nanochat.serve.openai_api import openai_routes
from nanochat.serve.protocol import Backend

OPEN_PATHS = ("/", "/health")
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "an error in the request"},
    "5XX": {"description": "an error of the server"},
}


class ChatRequest(Sampling):
    """The body of POST /chat/completions."""

    messages: Items[chat_request.Message]


class Counters:
    """Requests by path and status, and their seconds by path."""

    def __init__(self) -> None:
        self.is_open = False  # new requests are accepted
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)


def create_app(backend: Backend, settings: Settings | None = None) -> FastAPI:
    """Return the app that serves a backend, and starts and closes it."""
    settings = settings or Settings()
    counters = Counters()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(backend.start)
        counters.is_open = True
        yield
        counters.is_open = False
        await asyncio.to_thread(backend.close, drain=True)

    app = FastAPI(
        title="nanochat",
        lifespan=lifespan,
        docs_url=None,  # its pages would load scripts from other sites
        redoc_url=None,
        responses=ERRORS,
    )
    install_error_handlers(app)
    generations = Generations(backend, settings.log_chats)
    app.include_router(openai_routes(generations, settings))
    _add_chat(app, generations, settings)
    _add_information(app, backend, settings, counters)
    app.add_middleware(Gate, counters=counters, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers adds a dozen headers
        )
    return app


def _add_chat(app: FastAPI, generations: Generations, settings: Settings) -> None:
    backend = generations.backend

    @app.post("/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        max_tokens = settings.chat_tokens(body.max_tokens, backend.context)
        tokens = chat_prompt(backend.tokenizer, settings, body.messages, backend.context - max_tokens)
        request = body.to_request(settings, tokens, max_tokens)
        generation = generations.start(request)
        return WhileConnected(generation, event_stream(_chat_events(generation)))


async def _chat_events(generation: Generation) -> AsyncIterator[str]:
    ((_, handle),) = generation.handles
    async for deltas in generation.deltas():
        events = []
        for delta in deltas:
            if delta.tool:
                events.append(event({"tool": delta.tool}))
            if delta.text:
                # as event({"token": ..., "gpu": ...}), which takes four times as long
                events.append(f'data: {{"token": {to_json(delta.text)}, "gpu": {handle.gpu}}}\n\n')
        if events:
            yield "".join(events)
    yield event({"done": True})


def _add_information(app: FastAPI, backend: Backend, settings: Settings, counters: Counters) -> None:
    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        text = files("nanochat.serve").joinpath("ui.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": "frame-ancestors 'none'"})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not counters.is_open:
            raise ApiError(503, CLOSING)
        if backend.is_broken:
            raise ApiError(503, "the GPU has failed; restart the server")
        return {"status": "ok", "model": backend.name}

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        return {
            "model": backend.name,
            "context": backend.context,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "max_tokens": settings.chat_tokens(None, backend.context),
            **backend.stats(),
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(_metrics(counters, backend.stats()), media_type="text/plain; version=0.0.4")


def _metrics(counters: Counters, stats: dict[str, Any]) -> str:
    """Return the counters in the text format of Prometheus."""
    lines = ["# TYPE nanochat_requests_total counter"]
    paths: Counter[str] = Counter()
    for (path, status), count in sorted(counters.requests.items()):
        lines.append(f'nanochat_requests_total{{path="{path}",status="{status}"}} {count}')
        paths[path] += count
    lines.append("# TYPE nanochat_request_seconds summary")
    for path, count in paths.items():
        lines.append(f'nanochat_request_seconds_sum{{path="{path}"}} {counters.seconds[path]:.6f}')
        lines.append(f'nanochat_request_seconds_count{{path="{path}"}} {count}')
    for name, kind in (("running", "gauge"), ("waiting", "gauge"), ("slots", "gauge")):
        lines += [f"# TYPE nanochat_{name} {kind}", f"nanochat_{name} {stats[name]}"]
    lines += ["# TYPE nanochat_tokens_total counter", f"nanochat_tokens_total {stats['tokens_generated']}"]
    return "\n".join(lines) + "\n"


class Gate:
    """Middleware that checks host, key and size of each request, and counts all requests."""

    def __init__(self, app: ASGIApp, counters: Counters, settings: Settings):
        self.app, self.counters, self.max_body_bytes = app, counters, settings.max_body_bytes
        self.api_key, self.hosts = settings.api_key.encode(), settings.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the app, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # nginx's status for a client that has disconnected
        num_bytes = 0

        async def record_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:
                raise HTTPException(413, self._too_large())
            return message

        refusal = self._refusal(scope)
        try:
            await (refusal.response() if refusal else self.app)(scope, receive_limited, record_status)
        except asyncio.CancelledError:
            pass  # the server's time of grace is over; this is the outermost middleware
        except Exception:
            status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.counters.requests[path, status] += 1
            self.counters.seconds[path] += time.perf_counter() - start

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.hosts and (host := _host(headers)) not in self.hosts:
            # A web page may bind its own name to this machine's address (DNS rebinding) and read responses.
            return ApiError(
                403,
                f"this server is {' or '.join(self.hosts)}, not {host[:100]!r}; to serve by other names, "
                "start it with --api-key, or with --host if others need no key",
            )
        if scope["path"] in OPEN_PATHS:
            return None
        if not self.counters.is_open:
            return ApiError(503, CLOSING, headers={"Retry-After": "30"})
        if self.api_key and not hmac.compare_digest(_bearer(headers), self.api_key):
            return ApiError(
                401,
                "this server needs its key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if int(headers.get(b"content-length", b"0")) > self.max_body_bytes:
            return ApiError(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self.max_body_bytes} bytes"


def _host(headers: dict[bytes, bytes]) -> str:
    """Return the name by which the client addresses the server, without port and brackets."""
    with suppress(ValueError):
        name = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname or ""
        return name.removesuffix(".")
    return ""


def _bearer(headers: dict[bytes, bytes]) -> bytes:
    """Return the key that the client sends."""
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""
