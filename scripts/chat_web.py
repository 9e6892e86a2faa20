"""Serve a model: a chat page, nanochat's API and OpenAI's API.

    python -m scripts.chat_web                             # the deepest SFT model, at http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -p 8080
    NANOCHAT_API_KEY=secret python -m scripts.chat_web --host 0.0.0.0     # for other machines, with a key

Without a key, a server on a loopback address only answers requests to localhost or 127.0.0.1. Web pages of
other sites may use it only if --allowed-origins names them.

Each GPU (-n) decodes up to --slots replies at a time; up to --max-waiting more requests wait for it, and
further ones are refused. Chats are logged only with --log-chats. After Ctrl-C or SIGTERM, running replies may
finish within half a minute; a second Ctrl-C stops at once.
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

from nanochat.common import DType, parse, run, setup_runtime
from nanochat.decode import DecoderKind

if TYPE_CHECKING:
    import torch

GRACE_S = 30
BACKLOG = 2048  # connections that wait to be accepted; uvicorn's default
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The model, the address and access, and the default sampling settings of requests."""

    num_gpus: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """GPUs to serve with, each with a copy of the model"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: sft, mid, rl or base"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: the newest"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    """of sampling; 0: always the likeliest token"""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """sample from the likeliest k tokens only; 0: from all"""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """most tokens of a reply; at most half of the context"""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000
    """port to listen on; 0: any free one"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0: all addresses of this machine"""
    api_key: str = ""
    """key that clients must send; empty: $NANOCHAT_API_KEY, or no key"""
    allowed_origins: tuple[str, ...] = ()
    """other web pages that may use the server, for example https://example.org; * is all"""
    slots: int = 32
    """replies that a GPU decodes at a time"""
    max_waiting: int = 256
    """requests that wait for a slot; further ones are refused"""
    log_chats: bool = False
    """write prompts and replies to the log"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus={self.num_gpus} must be at least 1")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"port={self.port} must be 0 to 65535")


def devices(first: torch.device, n: int) -> list[torch.device]:
    """Return n devices to serve with; ValueError if there are fewer."""
    import torch

    available = torch.cuda.device_count() if first.type == "cuda" else 1
    if n > available:
        raise ValueError(f"num_gpus={n} must be at most {available}, the number of {first.type} devices")
    return [first] if n == 1 else [torch.device("cuda", i) for i in range(n)]


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; OSError if it is not available."""
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
    sock = listen(config.host, config.port)  # first: loading the model takes a while
    runtime = setup_runtime(config.device_type, config.dtype)
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
            log_config=None,  # scripts configure logging in run
            access_log=False,  # /metrics counts requests, and an address may contain private text
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    if config.host not in LOOPBACK and not api_key:
        print("warning: anyone who can reach this machine can use the server; see --api-key", file=sys.stderr)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"http://{host}:{sock.getsockname()[1]}"
    sock.listen(BACKLOG)
    print(f"{name}, step {meta['step']}, on {runtime.device}: {address}", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # uvicorn handles both, and raises them again when it ends
    gc.collect()
    gc.freeze()  # else collections would traverse all of torch's objects while requests wait
    server.run(sockets=[sock])
    pool.close(drain=False)  # it is closed already, unless there was a second Ctrl-C
    stats = pool.stats()
    print(f"served {stats['requests_finished']} requests, {stats['tokens_generated']} tokens")
    return 0


if __name__ == "__main__":
    run(main)
