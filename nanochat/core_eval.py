"""The CORE metric of DCLM (Li et al. 2024, arXiv 2406.11794): 22 tasks of text continuation.

Each example has one or more (context, continuation) options (nanochat/core_bundle.py). It is correct if

    multiple_choice, schema    the gold option has the lowest mean loss over its scored tokens
    language_modeling          greedy decoding would produce the continuation

The accuracy of a task is centered, (accuracy - random) / (1 - random); CORE is the mean over the tasks.

Prompts and their scored tokens follow a protocol (nanochat/core_protocol.py has the table).

For speed, logits are computed for scored tokens only, prompts are sorted by length and batched up to a number
of tokens, and prompts that differ only in their last token (choices "A", "B", "C", "D") share a row of the
batch, because the last token is predicted but is no input.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from nanochat.common import Runtime
from nanochat.core_bundle import Bundle, CoreTask
from nanochat.core_protocol import (
    NANOCHAT,
    CoreProtocol,
    CoreTokenizer,
    Prompt,
    crop,
    draw_shots,
    evaluated_rows,
    groups_of,
    make_prompts,
)
from nanochat.gpt import GPT
from nanochat.ops import head_logits

logger = logging.getLogger(__name__)
CHUNK_EXAMPLES = 256  # examples tokenized and sorted at a time, which limits the memory for ids
WIDTH_STEP = 16  # rows are padded to a multiple, since some backends plan a kernel for each shape
HEAD_POSITIONS = 1024  # positions whose logits are in memory at a time: 256 MiB at a vocabulary of 65,536


class CoreModel(Protocol):
    """What CORE needs of a model that is not a GPT."""

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        ...

    @property
    def sequence_len(self) -> int:
        """Return the context in tokens."""
        ...

    @property
    def is_bounded(self) -> bool:
        """True if the model cannot read more than sequence_len tokens, so that every protocol cuts there."""
        ...

    def batch_tokens(self, n_rows: int) -> int:
        """Return the number of tokens of a forward pass, if n_rows sequences are asked for."""
        ...

    def position_logits(self, idx: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Yield logits (n,V) float32 at positions (N,) of the flattened idx (B,T), n <= HEAD_POSITIONS."""
        ...


@dataclass(frozen=True)
class CoreGPT:
    """A GPT as a CoreModel. Its rotary tables grow, so it reads prompts of any length."""

    model: GPT
    is_bounded: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def sequence_len(self) -> int:
        return self.model.config.sequence_len

    def batch_tokens(self, n_rows: int) -> int:
        return n_rows * self.sequence_len

    def position_logits(self, idx: Tensor, positions: Tensor) -> Iterator[Tensor]:
        hidden = self.model.hidden(idx, None).flatten(0, 1)[positions]
        for x in hidden.split(HEAD_POSITIONS):
            yield head_logits(x.float(), self.model.lm_head.weight)  # bfloat16 would create ties


def evaluate_core(
    model: GPT | CoreModel,
    tokenizer: CoreTokenizer,
    bundle: Bundle,
    runtime: Runtime,
    max_per_task: int = -1,
    batch_rows: int = 32,
    protocol: CoreProtocol = NANOCHAT,
) -> dict[str, Any]:
    """Evaluate at most max_per_task examples of each task (-1: all); all ranks call this and share the work.

    A forward pass has at most batch_rows * sequence_len tokens, or one row if that is longer. Return "tasks"
    (label -> accuracy, centered, n, random_baseline in percent), "core" and "missing_tasks". Raise
    FloatingPointError if a loss is not finite.
    """
    reader = CoreGPT(model) if isinstance(model, GPT) else model
    work = []  # (task, rows of each evaluated row's solved examples, this rank's rows of a group)
    for task in bundle.tasks:
        rows = evaluated_rows(task, max_per_task)
        shots = draw_shots(task, rows, protocol)
        for group in groups_of(task, rows, protocol):
            work.append((task, shots, group[runtime.rank :: runtime.world_size]))
    counts = torch.zeros(len(work), 4, dtype=torch.int64)
    # prompts have many shapes: do not recompile the blocks for each, in particular not during training
    with (
        torch.compiler.set_stance("force_eager"),
        tqdm(
            total=sum(len(rows) for *_, rows in work), unit="ex", desc="CORE", disable=not runtime.is_main
        ) as bar,
    ):
        for (task, shots, rows), group_counts in zip(work, counts, strict=True):
            for start in range(0, len(rows), CHUNK_EXAMPLES):
                chunk = {row: shots[row] for row in rows[start : start + CHUNK_EXAMPLES]}
                group_counts += _evaluate(reader, tokenizer, task, chunk, batch_rows, protocol)
                bar.update(len(chunk))
    counts = runtime.sum_(counts.to(runtime.device)).cpu()
    _, n_examples, n_cropped, n_nonfinite = counts.sum(0).tolist()
    if n_nonfinite:
        raise FloatingPointError(
            f"the loss of {n_nonfinite} of {n_examples} examples is not finite; use an earlier checkpoint"
        )
    if n_cropped:
        logger.warning(
            "warning: %d of %d examples exceed the context of %d tokens and were cropped at the start",
            n_cropped,
            n_examples,
            reader.sequence_len,
        )
    of_task = defaultdict(list)
    for (task, *_), (n_correct, n, *_) in zip(work, counts.tolist(), strict=True):
        of_task[task.label].append((n_correct, n))
    results = {task.label: _summarize(task, of_task[task.label]) for task in bundle.tasks}
    core = sum(result["centered"] for result in results.values()) / len(results)
    return {"tasks": results, "core": core, "missing_tasks": bundle.missing_tasks}


def _summarize(task: CoreTask, counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return the figures of a task whose groups have these numbers of correct and of all examples."""
    accuracy, chance = sum(n_correct / n for n_correct, n in counts) / len(counts), task.random_baseline / 100
    return {
        "accuracy": accuracy,
        "centered": (accuracy - chance) / (1 - chance),
        "n": sum(n for _, n in counts),
        "random_baseline": task.random_baseline,
    }


def _evaluate(
    model: CoreModel,
    tokenizer: CoreTokenizer,
    task: CoreTask,
    shots: dict[int, list[int]],
    batch_rows: int,
    protocol: CoreProtocol,
) -> Tensor:
    """Return the numbers of correct, of all, of cropped and of non-finite examples, (4,) int64.

    shots: the rows to evaluate, each with those of its solved examples.
    """
    whole = make_prompts(tokenizer, task, shots, protocol)
    prompts = whole
    if protocol.cuts_prompts or model.is_bounded:
        prompts = [crop(prompt, model.sequence_len) for prompt in whole]
    losses, is_greedy = score_prompts(model, prompts, model.batch_tokens(batch_rows))
    counts = torch.zeros(4, dtype=torch.int64)
    ends = [0, *accumulate(len(task.examples[row].options) for row in shots)]
    for row, (start, end) in zip(shots, pairwise(ends), strict=True):
        if task.icl_task_type == "language_modeling":
            is_correct = is_greedy[start]
        else:
            is_correct = losses[start:end].argmin() == task.examples[row].gold
        is_cropped = any(len(whole[i][0]) > len(prompts[i][0]) for i in range(start, end))
        is_nonfinite = not np.isfinite(losses[start:end]).all()
        counts += torch.tensor([is_correct, True, is_cropped, is_nonfinite])
    return counts


# ---------------------------------------------------------------------------------------------------------
# Scores


@torch.no_grad()
def score_prompts(
    model: CoreModel, prompts: Sequence[Prompt], batch_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss of each prompt's scored tokens, and whether greedy decoding would produce them.

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


def _token_scores(model: CoreModel, idx: Tensor, positions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses (N,) float64 of targets, and whether each is the argmax (N,) bool, on the CPU.

    targets (N,) int64 are predicted at positions (N,) int64 of the flattened idx (B,T) int64.
    """
    nats, hits = [], []
    parts = model.position_logits(idx, positions)
    for logits, target in zip(parts, targets.split(HEAD_POSITIONS), strict=True):
        nats.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    return torch.cat(nats).cpu().double(), torch.cat(hits).cpu()  # MPS has no float64
