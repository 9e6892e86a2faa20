"""The CORE metric of DCLM (Li et al. 2024, arXiv 2406.11794): 22 tasks of text continuation.

Each example gives some (context, continuation) options (nanochat/core_bundle.py). The model is right if

    multiple_choice, schema    the gold option has the lowest loss, the mean over its continuation's tokens
    language_modeling          every token of the continuation is the likeliest one

A task's accuracy is centred, (accuracy - random) / (1 - random), and CORE is the mean over the tasks.

A prompt is <|bos|>, num_fewshot solved examples with a blank line after each, the context, the delimiter and
the continuation. Which examples, is drawn from (task, row): it never changes with what else is evaluated. The
continuation begins where the tokens of the prompt part from those of its context, as a token may reach across
the border ("Answer:" + " 7"). It is the whole option, as in DCLM's own evaluation, also where options begin
alike: nanochat leaves out what they begin with, so CORE here is comparable with DCLM's, and nearly with
nanochat's. A prompt that is too long for the model loses its beginning.

What makes it fast: logits are computed only where a token counts; prompts are sorted by length and batched
under a budget of tokens; and prompts that differ in their last token alone (choices "A", "B", "C", "D") are
one row of the batch, because that token is only predicted, never read.
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
from nanochat.gpt import GPT, head_logits
from nanochat.tokenizer import RustBPETokenizer

logger = logging.getLogger(__name__)
SUBSET_SEED = 1337
CHUNK_EXAMPLES = 256  # tokenized and sorted at a time, which bounds the memory for ids
WIDTH_STEP = 16  # rows are padded to a multiple: backends that plan a kernel per shape meet few shapes
HEAD_POSITIONS = 1024  # whose logits are held at a time: 256 MiB at a vocabulary of 65,536

Prompt = tuple[np.ndarray, int]  # token ids (L,) int32 with L >= 2; where the continuation starts, in [1, L)


def evaluate_core(
    model: GPT,
    tokenizer: RustBPETokenizer,
    bundle: Bundle,
    runtime: Runtime,
    max_per_task: int = -1,
    batch_rows: int = 32,
) -> dict[str, Any]:
    """Evaluate on at most max_per_task examples a task (-1: all); all ranks call this and share the work.

    A forward takes batch_rows * sequence_len tokens at most. Returns "tasks" (label -> accuracy, centered, n,
    random_baseline in percent), "core" and "missing_tasks". Raises FloatingPointError if a loss is no number.
    """
    shares = [_subset(task, max_per_task)[runtime.rank :: runtime.world_size] for task in bundle.tasks]
    counts = torch.zeros(len(bundle.tasks), 4, dtype=torch.int64)
    # the shapes here are many: compiled blocks must not be compiled again for each, least of all in training
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
    _, n_examples, n_cropped, n_broken = counts.sum(0).tolist()
    if n_broken:
        raise FloatingPointError(f"the loss of {n_broken} of {n_examples} examples is not a finite number")
    if n_cropped:
        logger.warning(
            "warning: %d of %d examples do not fit sequence_len=%d and lost their beginning",
            n_cropped,
            n_examples,
            model.config.sequence_len,
        )
    results = {
        task.label: _summarize(task, n_right, n)
        for task, (n_right, n, _, _) in zip(bundle.tasks, counts.tolist(), strict=True)
    }
    core = sum(result["centered"] for result in results.values()) / len(results)
    return {"tasks": results, "core": core, "missing_tasks": bundle.missing_tasks}


def _subset(task: CoreTask, max_per_task: int) -> list[int]:
    """Return the rows to evaluate: a random subset, as files may be sorted, and the same one every time."""
    indices = list(range(len(task.examples)))
    if max_per_task == -1:
        return indices
    random.Random(SUBSET_SEED).shuffle(indices)
    return indices[:max_per_task]


def _summarize(task: CoreTask, n_right: int, n: int) -> dict[str, float]:
    accuracy, chance = n_right / n, task.random_baseline / 100
    return {
        "accuracy": accuracy,
        "centered": (accuracy - chance) / (1 - chance),
        "n": n,
        "random_baseline": task.random_baseline,
    }


def _evaluate(
    model: GPT, tokenizer: RustBPETokenizer, task: CoreTask, indices: Sequence[int], batch_rows: int
) -> Tensor:
    """Count the examples that are right, all, cropped, and without a finite loss: (4,) int64."""
    texts = [option for index in indices for option in prompt_texts(task, index)]
    whole = tokenize_prompts(tokenizer, texts)
    prompts = [crop(prompt, model.config.sequence_len) for prompt in whole]
    losses, likeliest = score_prompts(model, prompts, batch_rows * model.config.sequence_len)
    counts = torch.zeros(4, dtype=torch.int64)
    ends = [0, *accumulate(len(task.examples[index].options) for index in indices)]
    for index, (start, end) in zip(indices, pairwise(ends), strict=True):
        if task.icl_task_type == "language_modeling":
            is_right = likeliest[start]
        else:
            is_right = losses[start:end].argmin() == task.examples[index].gold
        is_cropped = any(len(whole[i][0]) > len(prompts[i][0]) for i in range(start, end))
        is_broken = not np.isfinite(losses[start:end]).all()
        counts += torch.tensor([is_right, True, is_cropped, is_broken])
    return counts


# ---------------------------------------------------------------------------------------------------------
# Prompts


def prompt_texts(task: CoreTask, index: int) -> list[tuple[str, str]]:
    """Return (all that comes before, continuation) for each option of an example."""
    example = task.examples[index]
    pool = task.pools[example.category]
    rng = random.Random(f"{task.label} {index}")
    # one more than needed, for the example itself may be among them; a small pool gives what it has
    drawn = rng.sample(pool, min(task.num_fewshot + 1, len(pool)))
    others = [task.examples[i] for i in drawn if i != index][: task.num_fewshot]
    shots = "".join(task.continuation_delimiter.join(other.options[other.gold]) + "\n\n" for other in others)
    return [
        (shots + context + task.continuation_delimiter, continuation)
        for context, continuation in example.options
    ]


def tokenize_prompts(tokenizer: RustBPETokenizer, texts: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Tokenize (before, continuation) pairs; white space at the border belongs to the continuation."""
    pairs = [(before.rstrip(), before + continuation) for before, continuation in texts]
    unique = list(dict.fromkeys(text for pair in pairs for text in pair))
    encoded = tokenizer.encode(unique, prepend=tokenizer.get_bos_token_id())
    ids = {text: np.array(tokens, dtype=np.int32) for text, tokens in zip(unique, encoded, strict=True)}
    return [(ids[whole], _border(ids[before], ids[whole])) for before, whole in pairs]


def _border(before: np.ndarray, whole: np.ndarray) -> int:
    """Return how many tokens the two begin with in common: not all of the whole, which is the longer text."""
    n = min(len(before), len(whole))
    differs = np.flatnonzero(before[:n] != whole[:n])
    return int(differs[0]) if len(differs) else n


def crop(prompt: Prompt, sequence_len: int) -> Prompt:
    """Cut a prompt on the left to sequence_len tokens to read and one more to predict.

    The continuation stays whole if it fits; if not, what is left of it counts.
    """
    ids, start = prompt
    n_cut = max(0, len(ids) - sequence_len - 1)
    return ids[n_cut:], max(1, start - n_cut)


# ---------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score_prompts(model: GPT, prompts: Sequence[Prompt], batch_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return of each continuation the mean loss, and whether all its tokens are the likeliest.

    Losses are (N,) float64 in nats, the others (N,) bool. A forward takes batch_tokens tokens at most, but
    one row at least.
    """
    same_input = defaultdict(list)  # what is read -> the prompts that read it
    for number, (ids, _) in enumerate(prompts):
        same_input[ids[:-1].tobytes()].append(number)
    rows = sorted(same_input.values(), key=lambda row: -len(prompts[row[0]][0]))  # the longest first
    losses, likeliest = np.empty(len(prompts)), np.empty(len(prompts), dtype=bool)
    for batch, width in _batches(rows, prompts, batch_tokens):
        idx = np.empty((len(batch), width), dtype=np.int64)
        numbers, positions, targets = [], [], []
        for r, row in enumerate(batch):
            read = prompts[row[0]][0][:-1]
            # padding repeats the last token: it brings no number into the batch that was not there
            idx[r] = np.pad(read, (0, width - len(read)), mode="edge")
            for number in row:
                ids, start = prompts[number]
                numbers.append(number)
                positions.append(np.arange(start - 1, len(ids) - 1) + r * width)
                targets.append(ids[start:].astype(np.int64))
        tensors = (torch.from_numpy(a) for a in (idx, np.concatenate(positions), np.concatenate(targets)))
        nats, hits = _token_scores(model, *(tensor.to(model.device) for tensor in tensors))
        sizes = [len(target) for target in targets]
        losses[numbers] = [part.mean().item() for part in nats.split(sizes)]
        likeliest[numbers] = [part.all().item() for part in hits.split(sizes)]
    return losses, likeliest


def _batches(
    rows: list[list[int]], prompts: Sequence[Prompt], batch_tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Yield batches of rows, sorted from long to short, and the width that each is to be padded to."""
    start = 0
    while start < len(rows):
        length = len(prompts[rows[start][0]][0]) - 1
        width = -(-length // WIDTH_STEP) * WIDTH_STEP
        n_rows = max(1, batch_tokens // width)
        yield rows[start : start + n_rows], width
        start += n_rows


def _token_scores(model: GPT, idx: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss (N,) float64 and whether likeliest (N,) bool, on the CPU, of targets (N,) int64.

    They are predicted at positions (N,) of the flattened idx (B,T), int64 each.
    """
    hidden = model.hidden(idx, None).flatten(0, 1)[positions]
    nats, hits = [], []
    for x, target in zip(hidden.split(HEAD_POSITIONS), targets.split(HEAD_POSITIONS), strict=True):
        logits = head_logits(x.float(), model.lm_head.weight)  # bfloat16 would make equals of near ones
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats).cpu().double(), torch.cat(hits).cpu()  # MPS has no float64
