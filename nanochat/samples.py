"""Sample text from a model, to look at beside its loss."""

import logging

import torch

from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
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
    """Complete every prompt of PROMPTS and show the texts; only the main rank samples."""
    texts = [complete(model, tokenizer, prompt) for prompt in PROMPTS] if runtime.is_main else []
    for text in texts:
        logger.info(f"sample | {text!r}")
    return texts
