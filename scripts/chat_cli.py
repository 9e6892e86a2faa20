"""Talk to a model in the terminal.

    python -m scripts.chat_cli                              # the deepest SFT model
    python -m scripts.chat_cli -i rl -t 0
    python -m scripts.chat_cli -p "Why is the sky blue?"    # one answer on stdout, nothing else
    python -m scripts.chat_cli < questions.txt              # one line is one turn

/clear (or /new) forgets the conversation; /quit, exit, quit or Ctrl-D leave. Ctrl-C stops an answer; the part
that was printed stays in the conversation. The calculator shows as [12*7 = 84]. When the context is full, the
oldest turns are dropped, and a message that is too long by itself loses its start.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import tyro

from nanochat.chat_format import limit_reply, render_for_completion
from nanochat.common import DType, parse, run, setup_runtime
from nanochat.decode import DecoderKind
from nanochat.decode.parts import Part, PartDelta, ReplyParser

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from nanochat.sampling import SamplingParams

FORGET = ("/clear", "/new")
LEAVE = ("/quit", "/exit", "exit", "quit")
# A reply must not move the cursor or set colours: no ESC, no carriage return, no 8-bit CSI.
CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - set(b"\n\t"))


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """The model and its sampling settings."""

    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: sft, mid, rl or base"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: the newest"""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """answer this message and exit"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """of sampling; 0: always the likeliest token"""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """sample from the likeliest k tokens only; 0: from all"""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """most tokens of an answer; at most half of the context"""
    seed: int | None = None
    """the same seed gives the same answers; None: a fresh one for each answer"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; leave --prompt out to be asked for one")


class Display:
    """Makes terminal text of a reply: the calculator in brackets, and nothing that controls the terminal."""

    def __init__(self, is_dim: bool):
        self._part: Part = {"type": "text", "text": ""}  # the part that was shown last
        self._brackets = ("\033[2m[", "]\033[0m") if is_dim else ("[", "]")

    def show(self, delta: PartDelta) -> str:
        """Return what to print for an addition to a part."""
        part, before = delta.part, self._part
        marks = ""
        if delta.text and part is not before:  # only now is it known whether the call before had a result
            opening, closing = self._brackets
            if before["type"] == "python" and part["type"] == "python_output":
                marks = " = "
            else:
                marks = closing * (before["type"] != "text") + opening * (part["type"] != "text")
            self._part = part
        return marks + delta.text.translate(CONTROLS)

    def close(self) -> str:
        """Return what to print at the end: the bracket that is still open, if there is one."""
        return "" if self._part["type"] == "text" else self._brackets[1]


class Chat:
    """A conversation with the model of an engine."""

    def __init__(self, engine: Engine, max_tokens: int, sampling: SamplingParams):
        context = engine.model.config.sequence_len
        self.engine, self.sampling = engine, sampling
        self.max_tokens = limit_reply(max_tokens, context, warn=partial(print, file=sys.stderr))
        self.room = context - self.max_tokens
        self.history: list[dict[str, Any]] = []

    def answer(self, text: str) -> None:
        """Print the reply to a message as it comes; even if that is interrupted, remember what came."""
        self.history.append({"role": "user", "content": text})
        reply, display = ReplyParser(self.engine.tokenizer), Display(is_dim=sys.stdout.isatty())
        try:
            prompt = render_for_completion(self.engine.tokenizer, {"messages": self.history}, self.room)
            columns = self.engine.stream(prompt, max_tokens=self.max_tokens, sampling=self.sampling)
            for (token,), _ in columns:
                if token in reply.ends:
                    break
                print(display.show(reply.feed(token)), end="", flush=True)
        finally:
            # first: another Ctrl-C may interrupt the print
            self.history.append({"role": "assistant", "content": reply.parts})
            print(display.show(reply.flush()) + display.close(), flush=True)


def replace_unknown_characters(stream: TextIO) -> None:
    """Let a standard stream replace characters that its encoding does not have, instead of failing."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="replace")


def converse(chat: Chat, greeting: str) -> None:
    """Take turns, one line each, until the user leaves or the input ends; a pipe gets only the answers."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):  # Windows has no readline
            import readline  # noqa: F401  # gives input() its line editing and history
        print(greeting)
    else:
        replace_unknown_characters(sys.stdin)
    while True:
        try:
            text = input("\n> " if is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if text in LEAVE:
            return
        if text in FORGET:
            chat.history.clear()
        elif text:
            try:
                chat.answer(text)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
    if is_terminal:
        print()  # so that the shell's prompt starts a line


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the prompt, or the lines of stdin."""
    config = parse(ChatConfig, argv)

    from nanochat.checkpoint_manager import load_for
    from nanochat.engine import Engine
    from nanochat.sampling import SamplingParams

    sampling = SamplingParams(temperature=config.temperature, top_k=config.top_k, seed=config.seed)
    runtime = setup_runtime(config.device_type, config.dtype)
    model, tokenizer, meta = load_for(runtime, config.source, "eval", config.model_tag, config.step)
    chat = Chat(Engine(model, tokenizer, config.decoder), config.max_tokens, sampling)
    replace_unknown_characters(sys.stdout)
    if config.prompt is not None:
        chat.answer(config.prompt)
    else:
        model_name = f"{config.source}, step {meta['step']}, on {runtime.device}"
        converse(chat, f"{model_name}; /clear forgets, /quit leaves")
    return 0


if __name__ == "__main__":
    # before run configures it for stdout, which must have nothing but answers
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    run(main)
