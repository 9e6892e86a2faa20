"""The protocols of CORE: what a prompt holds and which of its tokens are scored.

Both read the same rows (nanochat/core_bundle.py). nanochat's is that of the published figures; DCLM's is that
of the metric's paper (Li et al. 2024, arXiv 2406.11794). A CORE of one is not comparable with one of the
other.

                        nanochat                                      dclm
    white space         kept around texts; only the contexts of       stripped from contexts and continuations
                        language modelling are stripped
    long prompts        never cut                                     cut on the left to the model's context
    scored tokens       multiple choice: from the first in which      the whole continuation
                        the options differ; schema: the common end
                        of the options; language modelling: the
                        whole continuation
    solved examples     Random(1234 + i) draws them for row i of      one generator a task draws them from the
                        the evaluated list, from its other rows       other rows of the category
    after each of them  a blank line                                  one line end
    accuracy            over all rows                                 mean over the categories (of jeopardy)

The evaluated list is the file shuffled by Random(1337) and cut to max_per_task. In both, an option of
multiple choice or schema wins by the lowest mean loss over its scored tokens, and language modelling is
correct if each token of the continuation is the most likely one. The draws of dclm follow its rule, but are
not those of its own program.

A prompt is <|bos|>, solved examples, the context, the delimiter and the continuation. A whole continuation
starts at the first token in which the prompt differs from its context, since a token may span both ("Answer:"
+ " 7").
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from nanochat.core_bundle import CoreTask

SUBSET_SEED = 1337
SHOTS_SEED = 1234

Prompt = tuple[np.ndarray, int]  # token ids (L,) int32 with L >= 2; start of the scored tokens, in [1, L)


class CoreTokenizer(Protocol):
    """What CORE needs of a tokenizer."""

    def get_bos_token_id(self) -> int:
        """Return the id of the token that begins a prompt."""
        ...

    def encode(self, text: Sequence[str], prepend: int) -> list[list[int]]:
        """Return the ids of each text, after the id `prepend`."""
        ...


@dataclass(frozen=True, kw_only=True)
class CoreProtocol:
    """The rules in which the protocols differ: the rows of the table above."""

    name: str
    strips_texts: bool
    """strip contexts and continuations; False: only the contexts of language modelling"""
    cuts_prompts: bool
    """cut prompts on the left to the model's context"""
    scores_differences: bool
    """score the tokens from where the options differ, or their common end; False: the whole continuation"""
    by_category: bool
    """draw solved examples by one generator a task, from the category, and average over the categories"""
    separator: str
    """text after each solved example"""


NANOCHAT = CoreProtocol(
    name="nanochat",
    strips_texts=False,
    cuts_prompts=False,
    scores_differences=True,
    by_category=False,
    separator="\n\n",
)
DCLM = CoreProtocol(
    name="dclm",
    strips_texts=True,
    cuts_prompts=True,
    scores_differences=False,
    by_category=True,
    separator="\n",
)
PROTOCOLS = (NANOCHAT, DCLM)


def find_protocol(name: str) -> CoreProtocol:
    """Return the protocol of a name; ValueError for an unknown one."""
    for protocol in PROTOCOLS:
        if protocol.name == name:
            return protocol
    raise ValueError(f"protocol={name!r} is not one of {', '.join(protocol.name for protocol in PROTOCOLS)}")


def evaluated_rows(task: CoreTask, max_per_task: int = -1) -> list[int]:
    """Return the rows to evaluate, at most max_per_task (-1: all), shuffled, since files may be sorted."""
    rows = list(range(len(task.examples)))
    random.Random(SUBSET_SEED).shuffle(rows)
    return rows if max_per_task == -1 else rows[:max_per_task]


def groups_of(task: CoreTask, rows: Sequence[int], protocol: CoreProtocol) -> list[list[int]]:
    """Split rows into the groups whose accuracies are averaged."""
    if not protocol.by_category:
        return [list(rows)]
    groups = ([row for row in rows if task.examples[row].category == name] for name in task.pools)
    return [group for group in groups if group]


def draw_shots(task: CoreTask, rows: Sequence[int], protocol: CoreProtocol) -> dict[int, list[int]]:
    """Return for each evaluated row those of its solved examples: num_fewshot, or all others if fewer.

    They do not depend on which rank evaluates a row.
    """
    k = task.num_fewshot
    if not protocol.by_category:
        return {
            row: _draw_others(rows, i, k, random.Random(SHOTS_SEED + i)) if k else []
            for i, row in enumerate(rows)
        }
    rng = random.Random(SHOTS_SEED)
    return {row: _draw_others(pool, i, k, rng) for pool in task.pools.values() for i, row in enumerate(pool)}


def _draw_others(pool: Sequence[int], i: int, k: int, rng: random.Random) -> list[int]:
    """Return k different entries of pool, or all if there are fewer, without entry i."""
    n_others = len(pool) - 1
    # the draw of indices is that of a list without entry i, which would be a copy for each row
    return [pool[j + (j >= i)] for j in rng.sample(range(n_others), min(k, n_others))]


def prompt_texts(
    task: CoreTask, row: int, shots: Sequence[int], protocol: CoreProtocol
) -> list[tuple[str, str]]:
    """Return (text before the continuation, continuation) for each option of a row; shots: solved rows."""
    delimiter = task.continuation_delimiter
    solved = "".join(
        delimiter.join(_texts(task, shot, protocol)[task.examples[shot].gold]) + protocol.separator
        for shot in shots
    )
    return [
        (solved + context + delimiter, continuation) for context, continuation in _texts(task, row, protocol)
    ]


def _texts(task: CoreTask, row: int, protocol: CoreProtocol) -> list[tuple[str, str]]:
    """Return the options of a row without the white space that the protocol strips."""
    options = task.examples[row].options
    if protocol.strips_texts:
        return [(context.strip(), continuation.strip()) for context, continuation in options]
    if task.icl_task_type == "language_modeling":
        return [(context.strip(), continuation) for context, continuation in options]
    return list(options)


# ---------------------------------------------------------------------------------------------------------
# Tokens


def make_prompts(
    tokenizer: CoreTokenizer, task: CoreTask, shots: dict[int, list[int]], protocol: CoreProtocol
) -> list[Prompt]:
    """Return the prompts of all options of rows, in order. shots: see _evaluate."""
    rows = [prompt_texts(task, row, solved, protocol) for row, solved in shots.items()]
    is_whole = not protocol.scores_differences or task.icl_task_type == "language_modeling"
    if is_whole:
        return tokenize_prompts(tokenizer, list(chain.from_iterable(rows)))
    ids = _encode(tokenizer, [before + continuation for options in rows for before, continuation in options])
    prompts = []
    for options in rows:
        option_ids = [ids[before + continuation] for before, continuation in options]
        prompts += [*zip(option_ids, differing_starts(option_ids, task.icl_task_type), strict=True)]
    return prompts


def tokenize_prompts(tokenizer: CoreTokenizer, texts: Sequence[tuple[str, str]]) -> list[Prompt]:
    """Tokenize (before, continuation) pairs; white space between them belongs to the continuation."""
    pairs = [(before.rstrip(), before + continuation) for before, continuation in texts]
    ids = _encode(tokenizer, [text for pair in pairs for text in pair])
    # less than len(whole), since `whole` is the longer text
    return [(ids[whole], _common_prefix([ids[before], ids[whole]])) for before, whole in pairs]


def differing_starts(options: Sequence[np.ndarray], icl_task_type: str) -> list[int]:
    """Return where the scored tokens of each option (L,) start, in [1, L).

    multiple_choice: the first token in which the options differ. schema: the start of their common end. At
    least the last token is scored, also of an option that is the beginning of another.
    """
    if icl_task_type == "multiple_choice":
        starts = [_common_prefix(options)] * len(options)
    else:
        n_common = _common_prefix([ids[::-1] for ids in options])
        starts = [len(ids) - n_common for ids in options]
    return [min(max(1, start), len(ids) - 1) for start, ids in zip(starts, options, strict=True)]


def _encode(tokenizer: CoreTokenizer, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the ids (L,) int32 of each text, from <|bos|> on."""
    unique = list(dict.fromkeys(texts))
    encoded = tokenizer.encode(unique, prepend=tokenizer.get_bos_token_id())
    return {text: np.array(tokens, dtype=np.int32) for text, tokens in zip(unique, encoded, strict=True)}


def _common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the common prefix of all."""
    n = min(map(len, sequences))
    differs = np.flatnonzero(np.any([ids[:n] != sequences[0][:n] for ids in sequences], axis=0))
    return int(differs[0]) if len(differs) else n


def crop(prompt: Prompt, sequence_len: int) -> Prompt:
    """Crop a prompt at the start to sequence_len input tokens and one more to predict.

    If the scored tokens themselves are too long, only the last sequence_len are scored.
    """
    ids, start = prompt
    n_cropped = max(0, len(ids) - sequence_len - 1)
    return ids[n_cropped:], max(1, start - n_cropped)
