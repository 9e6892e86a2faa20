"""Chat evaluation: the share of a task's conversations that the model answers correctly.

Categorical tasks take one forward for each batch of prompts, which are sorted by length and padded on the
right. Only the hidden state of each prompt's last token is multiplied by the head, and only by the rows of
the letters. The engine decodes generative tasks, many rows at a time, greedily or several samples a problem.
Each rank evaluates every world_size-th conversation.

Two judges look at each reply: the fair one of accuracy and pass@k, and the strict one of published figures.

ChatCORE is the mean over tasks of (strict - chance) / (1 - chance): 0 for guessing, 1 for perfect answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat.chat_format import render_for_completion
from nanochat.common import Runtime
from nanochat.decode import DecoderKind
from nanochat.engine import Engine
from nanochat.gpt import GPT, head_logits
from nanochat.sampling import GREEDY, SamplingParams
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
    sampling: SamplingParams = GREEDY,
    num_samples: int = 1,
) -> dict[str, Any]:
    """Answer the first max_problems conversations of a task (-1: all) and return its figures.

    sampling and num_samples are of written replies; a letter is always the likeliest. Keys: accuracy (of all
    samples), strict (the same by the strict judge), standard_error (of accuracy, over conversations), n,
    chance (of guessing; 0 without letters), seconds; with several samples also pass@k, by the fair judge, for
    powers of two up to their number, and for that number.
    """
    began = time.perf_counter()
    n = len(task) if max_problems == -1 else min(max_problems, len(task))
    if n == 0:
        raise ValueError(f"{name or type(task).__name__} has no conversations to evaluate")
    conversations = [task[i] for i in range(runtime.rank, n, runtime.world_size)]
    with tqdm(total=len(conversations), desc=name, disable=not runtime.is_main, leave=False) as progress:
        if task.eval_type == "categorical":
            num_samples = 1
            replies = _choose_letters(conversations, model, tokenizer, batch_size, progress)
        else:
            engine = Engine(model, tokenizer, decoder)
            settings = {"max_tokens": max_new_tokens, "sampling": sampling, "num_samples": num_samples}
            replies = _write_replies(conversations, engine, batch_size, progress, **settings)
    with ThreadPoolExecutor(JUDGES) as judges:
        asked = [c for c in conversations for _ in range(num_samples)]
        grades = judges.map(
            lambda *reply: (task.evaluate(*reply), task.evaluate_strict(*reply)), asked, replies
        )
        fair, strict = zip(*grades, strict=True) if asked else ((), ())
    n_right = [sum(fair[i : i + num_samples]) for i in range(0, len(fair), num_samples)]
    ks = sorted({num_samples, *(2**i for i in range(num_samples.bit_length()))})
    passed = [sum(pass_at_k(num_samples, right, k) for right in n_right) for k in ks]
    squares = sum((right / num_samples) ** 2 for right in n_right)
    guesses = sum(1 / len(c["letters"]) if "letters" in c else 0.0 for c in conversations)
    sums = torch.tensor(
        [*passed, sum(strict) / num_samples, guesses, squares], device=runtime.device, dtype=torch.float32
    )
    *passed, strict, guesses, squares = runtime.sum_(sums).tolist()
    accuracy = passed[0] / n
    return {
        "accuracy": accuracy,
        "strict": strict / n,
        "standard_error": (max(0.0, squares / n - accuracy**2) / n) ** 0.5,
        "n": n,
        "chance": guesses / n,
        "seconds": time.perf_counter() - began,
        **{f"pass@{k}": total / n for k, total in zip(ks[1:], passed[1:], strict=True)},
    }


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate, without bias, the probability that one of k samples is right, where c of n were.

    1 minus the share of the choices of k among the n samples that are all wrong (Chen et al. 2021).
    """
    return 1 - comb(n - c, k) / comb(n, k)


def chatcore(tasks: dict[str, dict[str, Any]], without: Sequence[str] = ()) -> float | None:
    """Return the mean centred strict figure of tasks except those in `without`; None if none is left."""
    kept = [t for name, t in tasks.items() if name not in without]
    centred = [(t["strict"] - t["chance"]) / (1 - t["chance"]) for t in kept]
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
    progress: tqdm,
    *,
    max_tokens: int,
    sampling: SamplingParams,
    num_samples: int,
) -> list[str]:
    progress.reset(num_samples * len(conversations))
    room = engine.model.config.sequence_len - max_tokens
    prompts = [render_for_completion(engine.tokenizer, c, room) for c in conversations]
    completions = engine.complete(
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        num_samples=num_samples,
        batch_size=batch_size,
        on_done=progress.update,
    )
    return [engine.tokenizer.decode(completion.tokens) for completion in completions]
