"""From the worker's thread to a handler that awaits, and from there to the client.

The worker emits from a thread of its own. To wake the event loop for each token would take the interpreter
from the worker as often, and send each client a packet a token. So the loop takes over what has come at most
once in TICK_S, which is oftener than anyone reads, or less often where so many are served that it would do
little but send.

Whoever asked may leave at any time, even before the first word is sent. WhileConnected watches for that, and
however an answer ends, its rows are freed.
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
to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder each time

RETRY_AFTER_S = 2
CLOSING = "the server is shutting down"
TICK_S = 0.02
SEND_S = 0.00025  # of a tick, for each client: to send takes a tenth to a third of that
_BATCH = 64  # events that are turned into text before others get a turn


class Generations:
    """Starts requests, and brings them what the worker emits."""

    def __init__(self, backend: Backend, log: bool = False):
        self.backend, self.log = backend, log
        self._emitted: deque[tuple[Generation, int, Token | End]] = deque()
        self._is_awake = False  # the loop knows that there is something
        self._next_delivery = 0.0  # at the earliest

    def start(self, *requests: Request, stops: Sequence[str] = ()) -> Generation:
        """Submit the requests of one answer, all of them or none.

        ApiError 400 if one cannot be served, 429 or 503 if it is not taken.
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
                with suppress(RuntimeError):  # the loop is closed: nobody listens any more
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
    """An answer under way. Its samples are those of its requests, one request after the other."""

    def __init__(self, samples: list[Sample], log: bool):
        self.samples, self._log = samples, log
        self.handles: list[tuple[int, Handle]] = []  # of each request, and the number of its first sample
        self.events: deque[tuple[int, Token | End]] = deque()  # and the number of the request
        self.has_events = asyncio.Event()

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is said, as much as has come at a time, until every sample has finished.

        ApiError 500 if the worker fails, 503 if it was stopped.
        """
        while any(sample.finish is None for sample in self.samples):
            await self.has_events.wait()
            deltas: list[Delta] = []
            try:
                while self.events and len(deltas) < _BATCH:
                    deltas.append(self._feed(*self.events.popleft()))
            except ApiError:
                yield deltas  # what was said before the failure
                raise
            if self.events:
                await asyncio.sleep(0)  # so that others get a turn
            else:
                self.has_events.clear()
            yield deltas

    def _feed(self, number: int, event: Token | End) -> Delta:
        first, handle = self.handles[number]
        sample = self.samples[first + event.sample]
        if sample.finish is None and isinstance(event, End):
            if event.reason == "error":
                logger.error("a request failed: %s", event.message)
                raise ApiError(500, "the model failed; the server's log says why")
            if event.reason == "cancelled":
                raise ApiError(503, CLOSING)
        delta = sample.feed(event)
        delta.sample += first
        if delta.finish and isinstance(event, Token):  # a stop string: the model would go on
            handle.stop(event.sample)
        if self._log and delta.finish:
            logger.info("reply: %r", sample.text)
        return delta

    def cancel(self) -> None:
        """Free its rows, if it still has any."""
        for _, handle in self.handles:
            handle.cancel()


class WhileConnected(Response):
    """Sends an answer for as long as the client is there, and cancels the generation however that ends."""

    def __init__(self, generation: Generation, answer: ASGIApp):
        super().__init__()
        self.generation, self.answer = generation, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        answer = asyncio.ensure_future(self.answer(scope, receive, send))
        absence = asyncio.ensure_future(_disconnection(receive))
        try:
            await asyncio.wait({answer, absence}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            self.generation.cancel()
            answer.cancel()
            absence.cancel()
            await asyncio.gather(answer, absence, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {to_json(data)}\n\n"


def event_stream(chunks: AsyncIterator[str]) -> ASGIApp:
    """Return what sends server-sent events as they come. An ApiError among them is the last event."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would keep events back until it has a page of them
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk.encode(), "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return answer
