"""A backend with scripted answers, and a server for it on a free port."""

import itertools
import threading
import time
from contextlib import contextmanager

import httpx2
import uvicorn

from nanochat.serve.protocol import End, Token
from nanochat.serve.server import Settings, create_app

PATIENCE_S = 60


class Pause:
    """In a script: wait until the test calls `end`."""

    def __init__(self):
        self.is_over = threading.Event()
        self.end = self.is_over.set


class FakeHandle:
    """A running request."""

    gpu = 0

    def __init__(self):
        self.cancelled = threading.Event()
        self.cancel = self.cancelled.set
        self.stopped = []  # samples
        self.stop = self.stopped.append


class FakeBackend:
    """Answers each request by a script, in a thread of its own; without a script the answer is "the river".

    A script is a list of texts, names of special tokens, ids, Tokens, Ends and Pauses. Every sample emits the
    texts and ids, except for those given as (sample, text). A sample without an End in the script ends with
    "stop", or with "length" at max_tokens. If the script is an exception, submit raises it.
    """

    name = "d2-fake"
    is_broken = False

    def __init__(self, tokenizer, context=200):
        self.tokenizer, self.context = tokenizer, context
        self.scripts, self.requests, self.handles, self.threads = [], [], [], []
        self.closed_with = None  # the argument of close
        self.tokens_generated = 0

    def prepare(self, *scripts):
        """Clear the record and set the scripts of the next requests."""
        self.scripts, self.requests, self.handles = list(scripts), [], []

    def submit(self, request, emit):
        self.requests.append(request)
        script = self.scripts.pop(0) if self.scripts else ["the river"]
        if isinstance(script, Exception):
            raise script
        handle = FakeHandle()
        self.handles.append(handle)
        thread = threading.Thread(target=self._play, args=(script, request, emit, handle), daemon=True)
        self.threads.append(thread)
        thread.start()
        return handle

    def _play(self, script, request, emit, handle):
        running = dict.fromkeys(range(request.n), 0)  # tokens that each sample has emitted

        def end(sample, reason, message=""):
            if running.pop(sample, None) is not None:
                emit(End(sample, reason, message))

        for event in self._events(script, request.n, handle):
            if handle.cancelled.is_set():
                break
            if isinstance(event, End):
                end(event.sample, event.reason, event.message)
            elif event.sample in running:
                self.tokens_generated += 1
                running[event.sample] += 1
                emit(event)
                if running[event.sample] == request.max_tokens:
                    end(event.sample, "length")
        for sample in list(running):
            end(sample, "cancelled" if handle.cancelled.is_set() else "stop")

    def _events(self, script, n, handle):
        for piece in script:
            samples = range(n)
            if isinstance(piece, tuple):
                samples, piece = [piece[0]], piece[1]
            if isinstance(piece, Pause):
                while not piece.is_over.wait(0.01) and not handle.cancelled.is_set():
                    pass
            elif isinstance(piece, (Token, End)):
                yield piece
            else:
                for id, sample in itertools.product(self.ids(piece), samples):
                    yield Token(sample, id)

    def ids(self, piece):
        if isinstance(piece, int):
            return [piece]
        if piece in self.tokenizer.get_special_tokens():
            return [self.tokenizer.encode_special(piece)]
        return self.tokenizer.encode(piece)

    def prompts(self):
        return [self.tokenizer.decode(request.tokens) for request in self.requests]

    def stats(self):
        running = sum(thread.is_alive() for thread in self.threads)
        return {
            "running": running,
            "waiting": 0,
            "slots": 4,
            "tokens_generated": self.tokens_generated,
            "requests_finished": len(self.threads) - running,
            "requests_cancelled": 0,
        }

    def start(self):
        pass

    def close(self, drain):
        self.closed_with = drain
        for thread in self.threads:
            thread.join(PATIENCE_S)


@contextmanager
def serve(backend, **settings):
    """Serve a backend and yield a client; its attribute `server` is the uvicorn server."""
    app = create_app(backend, Settings(**settings))
    config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=PATIENCE_S)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        url = f"http://{host}:{port}"
        with httpx2.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            client.url, client.server = url, server
            yield client
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def wait_for(condition):
    """Wait until a condition is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)
