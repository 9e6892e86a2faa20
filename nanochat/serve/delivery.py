"""Deliver what the worker's thread emits to the handlers of requests, and from there to the clients.

The worker emits from its own thread. Waking the event loop for each token would take the interpreter from the
worker each time, and send each client one packet per token. So the loop collects events once per TICK_S,
faster than anyone reads, and less often if it serves so many clients that it would do little but send.

A client may disconnect at any time, even before the first token is sent. WhileConnected watches for that;
however a response ends, its rows are freed.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from fastapi import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanochat.serve.api_errors import ApiError
from nanochat.serve.protocol import Backend, Closed, End, Handle, QueueFull, Request, Token
from nanochat.serve.reply import Delta, Sample

logger = logging.getLogger(__name__)
to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for each call

RETRY_AFTER_S = 2
CLOSING = "the server is shutting down"
TICK_S = 0.02
SEND_S = 0.00025  # of a tick, for each client; sending takes a tenth to a third of that
_BATCH = 64  # events to process before other tasks get a turn


class Generations:
    """Starts requests and delivers to them what the worker emits."""

    def __init__(self, backend: Backend, log: bool = False):
        self.backend, self.log = backend, log
        self._emitted: deque[tuple[Generation, int, Token | End]] = deque()
        self._is_awake = False  # a delivery is scheduled
        self._next_delivery = 0.0  # earliest time

    def start(self, *requests: Request, stops: Sequence[str] = ()) -> Generation:
        """Submit the requests of one response, all of them or none.

        ApiError 400 if one cannot be served, 429 if the queue is full, 503 if the backend is closed.
        """
        tokenizer = self.backend.tokenizer
        samples = [Sample(tokenizer, stops) for request in requests for _ in range(request.n)]
        generation = Generation(samples, self.log)
        first = 0
        try:
            for request in requests:
                generation.handles.append((first, self._submit(request, generation)))
                first += request.n
        except BaseException:
            generation.cancel()
            raise
        if self.log:
            for request in requests:
                logger.info("prompt: %r", tokenizer.decode(request.tokens))
        return generation

    def _submit(self, request: Request, generation: Generation) -> Handle:
        loop, number = asyncio.get_running_loop(), len(generation.handles)

        def emit(event: Token | End) -> None:
            self._emitted.append((generation, number, event))
            if not self._is_awake:
                self._is_awake = True
                with suppress(RuntimeError):  # the loop is closed, and with it all connections
                    loop.call_soon_threadsafe(self._wake)

        try:
            return self.backend.submit(request, emit)
        except QueueFull as error:
            raise ApiError(
                429, "too many requests wait; try again later", headers={"Retry-After": str(RETRY_AFTER_S)}
            ) from error
        except Closed as error:
            raise ApiError(503, f"no more requests are taken: {error}") from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error

    def _wake(self) -> None:
        asyncio.get_running_loop().call_at(self._next_delivery, self._deliver)

    def _deliver(self) -> None:
        self._is_awake = False  # first: what is emitted from now on wakes the loop again
        receivers = set()
        while self._emitted:
            generation, number, event = self._emitted.popleft()
            generation.events.append((number, event))
            receivers.add(generation)
        for generation in receivers:
            generation.has_events.set()
        tick = max(TICK_S, SEND_S * len(receivers))
        self._next_delivery = asyncio.get_running_loop().time() + tick


class Generation:
    """A response in progress. Its samples are those of its requests, one request after the other."""

    def __init__(self, samples: list[Sample], log: bool):
        self.samples, self._log = samples, log
        self.handles: list[tuple[int, Handle]] = []  # for each request: number of its first sample, handle
        self.events: deque[tuple[int, Token | End]] = deque()  # number of a request, event
        self.has_events = asyncio.Event()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield the deltas that have arrived, until every sample has finished.

        ApiError 500 if the worker fails, 503 if it was stopped.
        """
        while any(sample.finish is None for sample in self.samples):
            await self.has_events.wait()
            deltas: list[Delta] = []
            try:
                while self.events and len(deltas) < _BATCH:
                    deltas.append(self._feed(*self.events.popleft()))
            except ApiError:
                yield deltas  # those before the failure
                raise
            if self.events:
                await asyncio.sleep(0)  # give other tasks a turn
            else:
                self.has_events.clear()
            yield deltas

    def _feed(self, number: int, event: Token | End) -> Delta:
        first, handle = self.handles[number]
        sample = self.samples[first + event.sample]
        if sample.finish is None and isinstance(event, End):
            if event.reason == "error":
                logger.error("a request failed: %s", event.message)
                raise ApiError(500, "the model failed; the server's log has the details")
            if event.reason == "cancelled":
                raise ApiError(503, CLOSING)
        delta = sample.feed(event)
        delta.sample += first
        if delta.finish and isinstance(event, Token):  # a stop string: the model would continue
            handle.stop(event.sample)
        if self._log and delta.finish:
            logger.info("reply: %r", sample.text)
        return delta

    def cancel(self) -> None:
        """Free the rows that still run."""
        for _, handle in self.handles:
            handle.cancel()


class WhileConnected(Response):
    """Sends a response while the client is connected, and then cancels the generation in any case."""

    def __init__(self, generation: Generation, response: ASGIApp):
        super().__init__()
        self.generation, self.response = generation, response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        response = asyncio.ensure_future(self.response(scope, receive, send))
        disconnection = asyncio.ensure_future(_disconnection(receive))
        try:
            await asyncio.wait({response, disconnection}, return_when=asyncio.FIRST_COMPLETED)
            if response.done():
                response.result()
        finally:
            self.generation.cancel()
            response.cancel()
            disconnection.cancel()
            await asyncio.gather(response, disconnection, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> str:
    """Return data as a server-sent event."""
    return f"data: {to_json(data)}\n\n"


def event_stream(chunks: AsyncIterator[str]) -> ASGIApp:
    """Return an app that sends server-sent events as they come; an ApiError among them is the last event."""

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold events back until it has a page of them
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return stream
