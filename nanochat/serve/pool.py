"""Several workers as one backend: each request goes to the least busy worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanochat.serve.protocol import Closed, End, Handle, QueueFull, Request, Token
from nanochat.serve.worker import Worker


class Pool:
    """A protocol.Backend of workers that have the same model, each on its own device."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = workers
        self.tokenizer, self.context, self.name = workers[0].tokenizer, workers[0].context, workers[0].name

    def submit(self, request: Request, emit: Callable[[Token | End], None]) -> Handle:
        """See protocol.Backend."""
        refusals: list[QueueFull | Closed] = []
        for worker in sorted(self.workers, key=lambda worker: worker.load):
            try:
                return worker.submit(request, emit)
            except (QueueFull, Closed) as error:
                refusals.append(error)
        raise refusals[-1]

    @property
    def is_broken(self) -> bool:
        """Return True if all workers are broken."""
        return all(worker.is_broken for worker in self.workers)

    def stats(self) -> dict[str, Any]:
        """See protocol.Backend."""
        stats = [worker.stats() for worker in self.workers]
        return {name: sum(s[name] for s in stats) if name != "model" else self.name for name in stats[0]}

    def start(self) -> None:
        """See protocol.Backend."""
        for worker in self.workers:
            worker.start()

    def close(self, drain: bool) -> None:
        """See protocol.Backend."""
        for worker in self.workers:
            worker.stop_taking(drain)
        for worker in self.workers:
            worker.close(drain)
