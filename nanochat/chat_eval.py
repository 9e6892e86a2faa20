"""Chat evaluation: the share of a task's conversations that the model answers correctly.

Categorical tasks take one forward for each batch of prompts, which are sorted by length and padded on the
right. Only the hidden state of each prompt's last token is multiplied by the head, and only by the rows of
the letters. The engine decodes generative tasks greedily, many rows at a time. Each rank evaluates every
world_size-th conversation.

ChatCORE is the mean over tasks of (accuracy - chance) / (1 - chance): 0 for guessing, 1 for perfect answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.chat_format import render_for_completion
from nanochat.common import Runtime
from nanochat.decode import DecoderKind
from nanochat.engine import Engine
from nanochat.gpt import GPT, head_logits
from nanochat.sampling import GREEDY
from nanochat.task import Conversation, Task
from nanochat.tokenizer import RustBPETokenizer

JUDGES = 8  # threads that judge answers: running a program may take seconds


def of_like_length(prompts: Sequence[Sequence[int]], n: int) -> Iterator[list[int]]:
    """Yield the indices of all prompts in batches of at most n, from short to long."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    yield from (order[i : i + n] for i in range(0, len(order), n))


def pad_right(prompts: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return prompts as one tensor, (len(prompts), length of the longest) int64, on the CPU."""
    idx = torch.full((len(prompts), max(map(len, prompts))), fill)
    for row, prompt in enumerate(prompts):
        idx[row, : len(prompt)] = torch.as_tensor(prompt)
    return idx


def evaluate_task(
    task: Task,
    model: GPT,
    tokenizer: RustBPETokenizer,
    runtime: Runtime,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_problems: int = -1,
    name: str = "",
    decoder: DecoderKind = "best",
) -> dict[str, Any]:
    """Answer the first max_problems conversations of a task (-1: all) and return its figures.

    Keys: accuracy, standard_error (binomial), n, chance (of guessing; 0 without letters), seconds.
    """
    began = time.perf_counter()
    n = len(task) if max_problems == -1 else min(max_problems, len(task))
    if n == 0:
        raise ValueError(f"{name or type(task).__name__} has no conversations to evaluate")
    conversations = [task[i] for i in range(runtime.rank, n, runtime.world_size)]
    with tqdm(total=len(conversations), desc=name, disable=not runtime.is_main, leave=False) as progress:
        if task.eval_type == "categorical":
            replies = _choose_letters(conversations, model, tokenizer, batch_size, progress)
        else:
            engine = Engine(model, tokenizer, decoder)
            replies = _write_replies(conversations, engine, batch_size, max_new_tokens, progress)
    with ThreadPoolExecutor(JUDGES) as judges:
        n_right = sum(judges.map(task.evaluate, conversations, replies))
    guesses = sum(1 / len(c["letters"]) if "letters" in c else 0.0 for c in conversations)
    sums = torch.tensor([float(n_right), guesses], device=runtime.device)
    n_right, guesses = runtime.sum_(sums).tolist()
    accuracy = n_right / n
    return {
        "accuracy": accuracy,
        "standard_error": (accuracy * (1 - accuracy) / n) ** 0.5,
        "n": n,
        "chance": guesses / n,
        "seconds": time.perf_counter() - began,
    }


def chatcore(tasks: dict[str, dict[str, Any]], without: Sequence[str] = ()) -> float | None:
    """Return the mean centred accuracy of tasks except those named in `without`; None if none is left."""
    kept = [t for name, t in tasks.items() if name not in without]
    centred = [(t["accuracy"] - t["chance"]) / (1 - t["chance"]) for t in kept]
    return sum(centred) / len(centred) if centred else None


@torch.inference_mode()
def _choose_letters(
    conversations: Sequence[Conversation],
    model: GPT,
    tokenizer: RustBPETokenizer,
    batch_size: int,
    progress: tqdm,
) -> list[str]:
    prompts = [render_for_completion(tokenizer, c, model.config.sequence_len) for c in conversations]
    chosen = [""] * len(conversations)
    for batch in of_like_length(prompts, batch_size):
        idx = pad_right([prompts[i] for i in batch], tokenizer.get_bos_token_id())
        rows = torch.arange(len(batch), device=model.device)
        last = torch.tensor([len(prompts[i]) - 1 for i in batch], device=model.device)
        hidden = model.hidden(idx.to(model.device))[rows, last]
        letters = sorted({letter for i in batch for letter in conversations[i]["letters"]})
        ids = [letter_id(tokenizer, letter) for letter in letters]
        # in float32: rounding to bfloat16 would make different logits equal, and the first letter would win
        logits = head_logits(hidden.float(), model.lm_head.weight[ids]).tolist()
        for i, row in zip(batch, logits, strict=True):
            of_letter = dict(zip(letters, row, strict=True))
            chosen[i] = max(conversations[i]["letters"], key=of_letter.__getitem__)
        progress.update(len(batch))
    return chosen


def letter_id(tokenizer: RustBPETokenizer, letter: str) -> int:
    """Return the token of a letter at the start of a reply; ValueError if it is not one token."""
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the letter {letter!r} is {len(ids)} tokens; a choice must be named by one")
    return ids[0]


def _write_replies(
    conversations: Sequence[Conversation],
    engine: Engine,
    batch_size: int,
    max_new_tokens: int,
    progress: tqdm,
) -> list[str]:
    room = engine.model.config.sequence_len - max_new_tokens
    prompts = [render_for_completion(engine.tokenizer, c, room) for c in conversations]
    completions = engine.complete(
        prompts,
        max_tokens=max_new_tokens,
        sampling=GREEDY,
        batch_size=batch_size,
        on_done=progress.update,
    )
    return [engine.tokenizer.decode(completion.tokens) for completion in completions]
