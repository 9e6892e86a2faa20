"""The CORE metric of DCLM (Li et al. 2024, arXiv 2406.11794): 22 tasks of text continuation.

Each example has one or more (context, continuation) options (nanochat/core_bundle.py). It is correct if

    multiple_choice, schema    the gold option has the lowest mean loss over the tokens of its continuation
    language_modeling          greedy decoding would produce the continuation

The accuracy of a task is centered, (accuracy - random) / (1 - random); CORE is the mean over the tasks.

A prompt is <|bos|>, num_fewshot solved examples each followed by a blank line, the context, the delimiter and
the continuation. The solved examples are drawn with a seed of (task, row), so they do not depend on which
other examples are evaluated. The continuation starts at the first token in which the prompt differs from its
context, since a token may span both ("Answer:" + " 7"). It is the whole option, as in DCLM's own evaluation;
nanochat leaves out a common prefix of the options. So CORE here is comparable with DCLM's and close to
nanochat's. Prompts longer than the model's context are cropped at the start.

For speed, logits are computed for scored tokens only, prompts are sorted by length and batched up to a number
of tokens, and prompts that differ only in their last token (choices "A", "B", "C", "D") share a row of the
batch, because the last token is predicted but is no input.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanochat.common import Runtime
from nanochat.core_bundle import Bundle, CoreTask
from nanochat.gpt import GPT
from nanochat.ops import head_logits
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
SUBSET_SEED = 1337
CHUNK_EXAMPLES = 256  # examples tokenized and sorted at a time, which limits the memory for ids
WIDTH_STEP = 16  # rows are padded to a multiple, since some backends plan a kernel for each shape
HEAD_POSITIONS = 1024  # positions whose logits are in memory at a time: 256 MiB at a vocabulary of 65,536

Prompt = tuple[np.ndarray, int]  # token ids (L,) int32 with L >= 2; start of the continuation, in [1, L)


def evaluate_core(
    model: GPT,
    tokenizer: RustBPETokenizer,
    bundle: Bundle,
    runtime: Runtime,
    max_per_task: int = -1,
    batch_rows: int = 32,
) -> dict[str, Any]:
    """Evaluate at most max_per_task examples of each task (-1: all); all ranks call this and share the work.

    A forward pass has at most batch_rows * sequence_len tokens. Return "tasks" (label -> accuracy, centered,
    n, random_baseline in percent), "core" and "missing_tasks". Raise FloatingPointError if a loss is not
    finite.
    """
    shares = [_subset(task, max_per_task)[runtime.rank :: runtime.world_size] for task in bundle.tasks]
    counts = torch.zeros(len(bundle.tasks), 4, dtype=torch.int64)
    # prompts have many shapes: do not recompile the blocks for each, in particular not during training
    with (
        torch.compiler.set_stance("force_eager"),
        tqdm(total=sum(map(len, shares)), unit="ex", desc="CORE", disable=not runtime.is_main) as bar,
    ):
        for task, share, task_counts in zip(bundle.tasks, shares, counts, strict=True):
            for start in range(0, len(share), CHUNK_EXAMPLES):
                chunk = share[start : start + CHUNK_EXAMPLES]
                task_counts += _evaluate(model, tokenizer, task, chunk, batch_rows)
                bar.update(len(chunk))
    counts = runtime.sum_(counts.to(runtime.device)).cpu()
    _, n_examples, n_cropped, n_nonfinite = counts.sum(0).tolist()
    if n_nonfinite:
        raise FloatingPointError(
            f"the loss of {n_nonfinite} of {n_examples} examples is not finite; use an earlier checkpoint"
        )
    if n_cropped:
        logger.warning(
            "warning: %d of %d examples exceed sequence_len=%d and were cropped at the start",
            n_cropped,
            n_examples,
            model.config.sequence_len,
        )
    results = {
        task.label: _summarize(task, n_correct, n)
        for task, (n_correct, n, _, _) in zip(bundle.tasks, counts.tolist(), strict=True)
    }
    core = sum(result["centered"] for result in results.values()) / len(results)
    return {"tasks": results, "core": core, "missing_tasks": bundle.missing_tasks}


def _subset(task: CoreTask, max_per_task: int) -> list[int]:
    """Return the rows to evaluate: a fixed random subset, since files may be sorted."""
    indices = list(range(len(task.examples)))
    if max_per_task == -1:
        return indices
    random.Random(SUBSET_SEED).shuffle(indices)
    return indices[:max_per_task]


def _summarize(task: CoreTask, n_correct: int, n: int) -> dict[str, float]:
    accuracy, chance = n_correct / n, task.random_baseline / 100
    return {
        "accuracy": accuracy,
        "centered": (accuracy - chance) / (1 - chance),
        "n": n,
        "random_baseline": task.random_baseline,
    }


def _evaluate(
    model: GPT, tokenizer: RustBPETokenizer, task: CoreTask, indices: Sequence[int], batch_rows: int
) -> Tensor:
    """Return the numbers of correct, of all, of cropped and of non-finite examples, (4,) int64."""
    texts = [option for index in indices for option in prompt_texts(task, index)]
    whole = tokenize_prompts(tokenizer, texts)
    prompts = [crop(prompt, model.config.sequence_len) for prompt in whole]
    losses, is_greedy = score_prompts(model, prompts, batch_rows * model.config.sequence_len)
    counts = torch.zeros(4, dtype=torch.int64)
    ends = [0, *accumulate(len(task.examples[index].options) for index in indices)]
    for index, (start, end) in zip(indices, pairwise(ends), strict=True):
        if task.icl_task_type == "language_modeling":
            is_correct = is_greedy[start]
        else:
            is_correct = losses[start:end].argmin() == task.examples[index].gold
        is_cropped = any(len(whole[i][0]) > len(prompts[i][0]) for i in range(start, end))
        is_nonfinite = not np.isfinite(losses[start:end]).all()
        counts += torch.tensor([is_correct, True, is_cropped, is_nonfinite])
    return counts


# ---------------------------------------------------------------------------------------------------------
# Prompts


def prompt_texts(task: CoreTask, index: int) -> list[tuple[str, str]]:
    """Return (text before the continuation, continuation) for each option of an example."""
    example = task.examples[index]
    pool = task.pools[example.category]
    rng = random.Random(f"{task.label} {index}")
    # one more than needed, in case the example itself is drawn; a small pool yields fewer
    drawn = rng.sample(pool, min(task.num_fewshot + 1, len(pool)))
    solved = [task.examples[i] for i in drawn if i != index][: task.num_fewshot]
    shots = "".join(task.continuation_delimiter.join(shot.options[shot.gold]) + "\n\n" for shot in solved)
    return [
        (shots + context + task.continuation_delimiter, continuation)
        for context, continuation in example.options
    ]


def tokenize_prompts(tokenizer: RustBPETokenizer, texts: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Tokenize (before, continuation) pairs; white space between them belongs to the continuation."""
    pairs = [(before.rstrip(), before + continuation) for before, continuation in texts]
    unique = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = tokenizer.encode(unique, prepend=tokenizer.get_bos_token_id())
    ids = {text: np.array(tokens, dtype=np.int32) for text, tokens in zip(unique, encoded, strict=True)}
    return [(ids[whole], _continuation_start(ids[before], ids[whole])) for before, whole in pairs]


def _continuation_start(before: np.ndarray, whole: np.ndarray) -> int:
    """Return the length of the common prefix; less than len(whole), since `whole` is the longer text."""
    n = min(len(before), len(whole))
    differs = np.flatnonzero(before[:n] != whole[:n])
    return int(differs[0]) if len(differs) else n


def crop(prompt: Prompt, sequence_len: int) -> Prompt:
    """Crop a prompt at the start to sequence_len input tokens and one more to predict.

    If the continuation itself is too long, only its last sequence_len tokens are scored.
    """
    ids, start = prompt
    n_cropped = max(0, len(ids) - sequence_len - 1)
    return ids[n_cropped:], max(1, start - n_cropped)


# ---------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score_prompts(model: GPT, prompts: Sequence[Prompt], batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each continuation's mean loss, and whether greedy decoding would produce it.

    Losses are (N,) float64 in nats per token, the others (N,) bool. A forward pass has at most batch_tokens
    tokens, but at least one row.
    """
    same_input = defaultdict(list)  # input tokens -> numbers of the prompts
    for number, (ids, _) in enumerate(prompts):
        same_input[ids[:-1].tobytes()].append(number)
    rows = sorted(same_input.values(), key=lambda row: -len(prompts[row[0]][0]))  # longest first
    losses, is_greedy = np.empty(len(prompts)), np.empty(len(prompts), dtype=bool)
    for batch, width in _batches(rows, prompts, batch_tokens):
        idx = np.empty((len(batch), width), dtype=np.int64)
        numbers, positions, targets = [], [], []
        for r, row in enumerate(batch):
            inputs = prompts[row[0]][0][:-1]
            # padding repeats the last token, so that no other embedding enters the batch
            idx[r] = np.pad(inputs, (0, width - len(inputs)), mode="edge")
            for number in row:
                ids, start = prompts[number]
                numbers.append(number)
                positions.append(np.arange(start - 1, len(ids) - 1) + r * width)
                targets.append(ids[start:].astype(np.int64))
        tensors = (torch.from_numpy(a) for a in (idx, np.concatenate(positions), np.concatenate(targets)))
        nats, hits = _token_scores(model, *(tensor.to(model.device) for tensor in tensors))
        sizes = [len(target) for target in targets]
        losses[numbers] = [part.mean().item() for part in nats.split(sizes)]
        is_greedy[numbers] = [part.all().item() for part in hits.split(sizes)]
    return losses, is_greedy


def _batches(
    rows: list[list[int]], prompts: Sequence[Prompt], batch_tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Yield batches of rows, which are sorted from long to short, and their padded width."""
    start = 0
    while start < len(rows):
        length = len(prompts[rows[start][0]][0]) - 1
        width = -(-length // WIDTH_STEP) * WIDTH_STEP
        n_rows = max(1, batch_tokens // width)
        yield rows[start : start + n_rows], width
        start += n_rows


def _token_scores(model: GPT, idx: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) float64 of targets, and whether each is the argmax (N,) bool, on the CPU.

    targets (N,) int64 are predicted at positions (N,) int64 of the flattened idx (B,T) int64.
    """
    hidden = model.hidden(idx, None).flatten(0, 1)[positions]
    nats, hits = [], []
    for x, target in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = head_logits(x.float(), model.lm_head.weight)  # bfloat16 would create ties
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats).cpu().double(), torch.cat(hits).cpu()  # MPS has no float64
