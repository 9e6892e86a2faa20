"""Load a running chat server with many clients; measure its latency, check answers, and look for leaks.

    python -m scripts.chat_web -p 8000 &
    python -m scripts.bench_serve --url=http://127.0.0.1:8000 --clients=200 --seconds=60 --disconnect=0.2

Each client asks one question after the other and reads the answer as it comes; it disconnects in the middle
of some. Meanwhile /health is requested twice a second. The questions have different lengths, and the answers
are greedy, so that they can be compared:

    --check          with the server's answer to each question alone, before the load; valid if rounding does
                     not depend on the other rows of a batch, as in float32 on a CPU
    --expect=FILE    with known answers: each line of FILE is a request to /chat/completions, as JSON, with
                     its "answer"

Afterwards no slot may be in use. The last line of output is JSON; the exit status is 1 if anything failed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

from nanochat.common import parse, run

PATIENCE_S = 120  # for an answer, including its time in the queue
ARRIVAL_S = 1  # in which the clients start: hundreds in the same millisecond would not be realistic
DRAIN_S = 10
HEALTH_EVERY_S = 0.5
RETRY_S = 0.5
NUM_QUESTIONS = 24
TEXT = "why do rivers of light run under old stone bridges while the moon counts 1887 boats and sings"


@dataclass(frozen=True, kw_only=True)
class BenchServeConfig:
    url: str = "http://127.0.0.1:8000"
    """address of the server"""
    clients: int = 200
    """number of concurrent clients"""
    seconds: float = 60
    """for how long they ask; running requests may then finish"""
    disconnect: float = 0.2
    """fraction of the requests whose client disconnects in the middle of the answer"""
    max_tokens: int = 64
    """most tokens of an answer"""
    check: bool = False
    """compare each answer with the one given before the load"""
    expect: str = ""
    """file of questions with their answers, to ask and compare"""
    api_key: str = ""
    """the server's key; empty: $NANOCHAT_API_KEY"""
    seed: int = 0
    """of the order of questions and the disconnections"""

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme != "http" or not urlsplit(self.url).hostname:
            raise ValueError(f"url={self.url} must be like http://127.0.0.1:8000")
        if self.clients < 1 or self.seconds <= 0 or self.max_tokens < 1:
            raise ValueError(
                f"clients={self.clients} and max_tokens={self.max_tokens} must be 1 at least, "
                f"seconds={self.seconds} more than 0"
            )
        if not 0 <= self.disconnect <= 1:
            raise ValueError(f"disconnect={self.disconnect} must be a fraction, 0 to 1")
        if self.check and self.expect:
            raise ValueError("--check and --expect exclude each other: leave one out")


@dataclass
class Question:
    """The body of a request, and its answer if that is known."""

    body: bytes
    max_tokens: int
    answer: str | None = None


@dataclass
class Tally:
    """Counts and times of requests."""

    complete: int = 0
    left: int = 0  # the client disconnected in the middle
    turned_away: int = 0  # status 429
    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)  # mean of each answer
    longest_gap_s: list[float] = field(default_factory=list)  # of each answer
    health_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class TurnedAway(OSError):
    """The server's queue is full: status 429."""


FAILURES = (OSError, ValueError, EOFError, asyncio.TimeoutError)  # of a request


class Server:
    """The address of a server, and how to send it requests."""

    def __init__(self, url: str, api_key: str):
        parts = urlsplit(url)
        self.host, self.port, self.path = parts.hostname, parts.port or 80, parts.path.rstrip("/")
        self.head = f"Host: {parts.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        if api_key:
            self.head += f"Authorization: Bearer {api_key}\r\n"

    @asynccontextmanager
    async def request(self, path: str, body: bytes = b"") -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """Send a request and yield the status and the body as it comes; leaving the context disconnects."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            method = "POST" if body else "GET"
            head = f"{method} {self.path}{path} HTTP/1.1\r\n{self.head}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            is_chunked = b"transfer-encoding: chunked" in answer
            yield int(answer.split()[1]), _chunks(reader) if is_chunked else _until_end(reader)
        finally:
            writer.transport.abort()

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON at a path; OSError if the status is not 200."""
        async with self.request(path) as (status, chunks):
            return json.loads(await _read(status, chunks))


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while chunk := await reader.read(1 << 16):
        yield chunk


async def _read(status: int, chunks: AsyncIterator[bytes]) -> bytes:
    body = b"".join([chunk async for chunk in chunks])
    if status != 200:
        raise OSError(f"status {status}: {body[:500].decode(errors='replace')}")
    return body


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for chunk in chunks:
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            yield json.loads(event.removeprefix(b"data: "))


async def ask(server: Server, question: Question, tally: Tally, leave_after: float = float("inf")) -> str:
    """Return the answer as far as it was read: the client disconnects after leave_after tokens."""
    start = time.perf_counter()
    text, times = "", []
    async with server.request("/chat/completions", question.body) as (status, chunks):
        if status == 429:
            raise TurnedAway("the server has too many requests")
        if status != 200:
            await _read(status, chunks)
        async for event in _events(chunks):
            if "done" in event:
                tally.complete += 1
                tally.first_token_s += [times[0] - start] if times else []
                if len(times) > 1:
                    tally.between_tokens_s.append((times[-1] - times[0]) / (len(times) - 1))
                    tally.longest_gap_s.append(max(map(sub, times[1:], times)))
                if question.answer not in (None, text):
                    tally.problems.append(f"wrong: {text!r} is not {question.answer!r}")
                return text
            if "error" in event:
                raise OSError(event["error"]["message"])
            times.append(time.perf_counter())
            text += event.get("token", "")
            if len(times) >= leave_after:
                tally.left += 1
                return text
    raise OSError(f"an answer broke off after {time.perf_counter() - start:.1f} s and {len(times)} tokens")


async def client(
    server: Server, questions: Sequence[Question], tally: Tally, config: BenchServeConfig, number: int
) -> None:
    """Ask random questions until config.seconds are over."""
    rng = random.Random(f"{config.seed} {number}")
    end = time.perf_counter() + config.seconds
    await asyncio.sleep(rng.random() * min(ARRIVAL_S, config.seconds / 4))
    while time.perf_counter() < end:
        question = rng.choice(questions)
        leaves = rng.random() < config.disconnect
        leave_after = rng.randint(1, max(1, question.max_tokens // 2)) if leaves else float("inf")
        try:
            await asyncio.wait_for(ask(server, question, tally, leave_after), PATIENCE_S)
        except TurnedAway:
            tally.turned_away += 1
            await asyncio.sleep(RETRY_S)
        except FAILURES as error:
            tally.problems.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(RETRY_S)


def watch_health(url: str) -> None:
    """Request /health until stdin ends; print the seconds of the requests, and problems, as JSON.

    This runs in its own process, so that the clients do not delay it.
    """
    seconds, problems = [], []
    while not select.select([sys.stdin], [], [], HEALTH_EVERY_S)[0]:
        start = time.perf_counter()
        try:
            with urlopen(f"{url.rstrip('/')}/health", timeout=PATIENCE_S) as response:
                response.read()
        except (OSError, ValueError) as error:
            problems.append(f"/health: {type(error).__name__}: {error}")
        seconds.append(time.perf_counter() - start)
    print(json.dumps([seconds, problems]))


async def drained(server: Server) -> dict[str, Any]:
    """Return the server's stats when no request runs or waits any more, at the latest after DRAIN_S."""
    end = time.perf_counter() + DRAIN_S
    while True:
        stats = await server.get("/stats")
        if not (stats["running"] or stats["waiting"]) or time.perf_counter() > end:
            return stats
        await asyncio.sleep(0.05)


def make_questions(config: BenchServeConfig) -> list[Question]:
    """Return the questions; ValueError if lines of --expect lack messages or answer."""
    if not config.expect:
        rng, words = random.Random(0), TEXT.split()
        requests = [
            {
                "messages": [{"role": "user", "content": " ".join(rng.choices(words, k=1 + i * i // 2))}],
                "max_tokens": config.max_tokens,
            }
            for i in range(NUM_QUESTIONS)
        ]
    else:
        lines = Path(config.expect).read_text("utf-8").splitlines()
        requests = [json.loads(line) for line in lines]
        if not requests or not all({"messages", "answer"} <= set(request) for request in requests):
            raise ValueError(f"{config.expect}: each line must be JSON with messages and answer")
    questions = []
    for request in requests:
        answer = request.pop("answer", None)
        body = {"temperature": 0, "top_k": 0, "max_tokens": config.max_tokens, **request}
        questions.append(Question(json.dumps(body).encode(), body["max_tokens"], answer))
    return questions


async def bench(config: BenchServeConfig) -> dict[str, Any]:
    """Run the load and return the result, with the first problems."""
    server = Server(config.url, config.api_key or os.environ.get("NANOCHAT_API_KEY", ""))
    questions = make_questions(config)
    before = await server.get("/stats")
    if config.check:
        for question in questions:
            question.answer = await asyncio.wait_for(ask(server, question, Tally()), PATIENCE_S)
    num_tokens = (await server.get("/stats"))["tokens_generated"]
    tally = Tally()
    program = f"from scripts.bench_serve import watch_health; watch_health({config.url!r})"
    watch = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    start = time.perf_counter()
    await asyncio.gather(*(client(server, questions, tally, config, i) for i in range(config.clients)))
    seconds = time.perf_counter() - start
    tally.health_s, problems = json.loads((await watch.communicate(b""))[0])
    tally.problems += problems
    stats = await drained(server)
    if stats["running"] or stats["waiting"]:
        tally.problems.append(f"leaked: {stats['running']} run and {stats['waiting']} wait without clients")
    if not tally.complete:
        tally.problems.append("no answer was complete")
    return {
        "model": before["model"],
        "slots": before["slots"],
        "clients": config.clients,
        "seconds": round(seconds, 2),
        "complete": tally.complete,
        "left": tally.left,
        "turned_away": tally.turned_away,
        "compared": config.check or bool(config.expect),
        "requests_per_s": round((tally.complete + tally.left) / seconds, 2),
        "tokens_per_s": round((stats["tokens_generated"] - num_tokens) / seconds, 1),
        "first_token_s": spread(tally.first_token_s),
        "between_tokens_s": spread(tally.between_tokens_s),
        "longest_gap_s": spread(tally.longest_gap_s),
        "health_s": spread(tally.health_s),
        "problems": len(tally.problems),
        "first_problems": tally.problems[:5],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 95th percentile and maximum; an empty dict without values."""
    if not values:
        return {}
    ordered = sorted(values)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return {"median": round(median(ordered), 5), "p95": round(p95, 5), "max": round(ordered[-1], 5)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the load test and print its result; return 1 if there were problems."""
    config = parse(BenchServeConfig, argv)
    result = asyncio.run(bench(config))
    for problem in result["first_problems"]:
        print(problem, file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    run(main)
