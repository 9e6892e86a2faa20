"""Serve a model: a page to talk to it, nanochat's API and OpenAI's.

    python -m scripts.chat_web                             # the deepest SFT model, at http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -p 8080
    NANOCHAT_API_KEY=secret python -m scripts.chat_web --host 0.0.0.0     # for others, who need the key

Without a key, the server at this machine's own address is for this machine: it is addressed as localhost or
127.0.0.1. Pages of others may ask only if --allowed-origins names them.

Each GPU (-n) decodes up to --slots replies at a time; up to --max-waiting more requests wait for it, and
any more are told to come back later. Nothing that is said is logged, unless --log-chats. Ctrl-C or SIGTERM
lets the replies that run finish, for half a minute at most; a second Ctrl-C does not.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from nanochat.common import parse, run, setup_runtime
from nanochat.decode import DecoderKind

if TYPE_CHECKING:
    import torch

GRACE_S = 30
BACKLOG = 2048  # connections that wait to be accepted, uvicorn's default
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Which model to serve, to whom, and how it answers where a request does not say."""

    num_gpus: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """GPUs to serve with, each with a copy of the model"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: sft, mid, rl or base"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest there is"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """which checkpoint; -1: the newest"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    """0: always the likeliest token"""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """sample from the likeliest k tokens only; 0: from all"""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """tokens of a reply, at most; half of the context at most"""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000
    """0: any that is free"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0: all of this machine's"""
    api_key: str = ""
    """what clients must know; empty: $NANOCHAT_API_KEY, and without that nothing"""
    allowed_origins: tuple[str, ...] = ()
    """web pages of others that may ask, say https://example.org; * is all"""
    slots: int = 32
    """replies that are decoded at a time"""
    max_waiting: int = 256
    """requests that wait for a slot; more are turned away"""
    log_chats: bool = False
    """write what is said to the log"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus={self.num_gpus} must be at least 1")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port={self.port} must be 0 to 65535")


def devices(first: torch.device, n: int) -> list[torch.device]:
    """Return n devices to serve with; ValueError if there are not as many."""
    import torch

    available = torch.cuda.device_count() if first.type == "cuda" else 1
    if n > available:
        raise ValueError(f"num_gpus={n}, but there is {available} device ({first.type}) to serve with")
    return [first] if n == 1 else [torch.device("cuda", i) for i in range(n)]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address; OSError if that is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen at {host}, port {port} ({error}); choose others: --host, -p") from error
    return sock


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    config = parse(ServerConfig, argv)

    import uvicorn

    from nanochat.checkpoint_manager import load_model
    from nanochat.serve.pool import Pool
    from nanochat.serve.server import Settings, create_app
    from nanochat.serve.worker import Worker

    api_key = config.api_key or os.environ.get("NANOCHAT_API_KEY", "")
    settings = Settings(
        temperature=config.temperature,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        api_key=api_key,
        allowed_hosts=() if api_key or config.host not in LOOPBACK else LOOPBACK,
        allowed_origins=config.allowed_origins,
        log_chats=config.log_chats,
    )
    sock = listen(config.host, config.port)  # before the model is loaded, which takes a while
    runtime = setup_runtime(config.device_type)
    workers = []
    for gpu, device in enumerate(devices(runtime.device, config.num_gpus)):
        model, tokenizer, meta = load_model(config.source, device, "eval", config.model_tag, config.step)
        model.compute_dtype = runtime.compute_dtype
        name = f"{config.model_tag or f'd{model.config.n_layer}'}-{config.source}"
        workers.append(
            Worker(
                model,
                tokenizer,
                name,
                slots=config.slots,
                max_waiting=config.max_waiting,
                gpu=gpu,
                decoder=config.decoder,
            )
        )
    pool = Pool(workers)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(pool, settings),
            log_config=None,  # ours
            access_log=False,  # /metrics counts requests, and an address may hold what was said
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    if config.host not in LOOPBACK and not api_key:
        print("warning: whoever can reach this machine can use the server; see --api-key", file=sys.stderr)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{sock.getsockname()[1]}"
    sock.listen(BACKLOG)
    print(f"{name}, step {meta['step']}, on {runtime.device}: {address}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles both, and raises them again after its end
    gc.collect()
    gc.freeze()  # or a collection would look through all that torch consists of while everyone waits
    server.run(sockets=[sock])
    pool.close(drain=False)  # it is closed, unless a second Ctrl-C came
    stats = pool.stats()
    print(f"served {stats['requests_finished']} requests, {stats['tokens_generated']} tokens")
    return 0


if __name__ == "__main__":
    run(main)
