"""Sample text from a model, for people to read beside the loss."""

import logging

import torch

from nanochat.chat_format import limit_reply, render_for_completion
from nanochat.common import Runtime
from nanochat.decode import DecoderKind
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.sampling import GREEDY
from nanochat.task import Task
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
N_REPLIES = 6
PROMPTS = (
    "",
    "The capital of France is",
    "The opposite of hot is",
    "To open a file and read its lines,",
    "Return a list of all",
    "If yesterday was Friday, then tomorrow will be",
)


def complete(
    model: GPT,
    tokenizer: RustBPETokenizer,
    prompt: str,
    *,
    max_tokens: int = 48,
    temperature: float = 0.7,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """Return prompt, as the start of a document, with the model's continuation."""
    ids = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
    inputs = torch.tensor([ids], device=model.device)
    return prompt + tokenizer.decode(list(model.generate(inputs, max_tokens, temperature, top_k, seed=seed)))


def print_samples(model: GPT, tokenizer: RustBPETokenizer, runtime: Runtime) -> list[str]:
    """Complete every prompt of PROMPTS, log the texts and return them; only the main rank samples."""
    texts = [complete(model, tokenizer, prompt) for prompt in PROMPTS] if runtime.is_main else []
    for text in texts:
        logger.info(f"sample | {text!r}")
    return texts


def print_replies(
    model: GPT,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    task: Task,
    max_tokens: int = 64,
    decoder: DecoderKind = "best",
) -> None:
    """Log greedy replies to the first N_REPLIES conversations of a task; only the main rank samples.

    A reply has at most max_tokens tokens, and at most half of the context.
    """
    if not runtime.is_main:
        return
    max_tokens = limit_reply(max_tokens, model.config.sequence_len)
    room = model.config.sequence_len - max_tokens
    prompts = [render_for_completion(tokenizer, task[i], room) for i in range(min(N_REPLIES, len(task)))]
    engine = Engine(model, tokenizer, decoder)
    completions = engine.complete(prompts, max_tokens=max_tokens, sampling=GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        logger.info(f"sample | {tokenizer.decode(prompt)!r} -> {tokenizer.decode(completion.tokens)!r}")
