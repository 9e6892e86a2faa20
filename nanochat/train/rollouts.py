"""Rollouts: a model answers the questions of a task many times, and the task rewards its answers.

The questions and the random numbers of a step follow from the step's number, the seed and the rank, so that a
resumed run samples the same as one without interruption. Every epoch has the questions in another order.

Mask 1 marks the tokens that the model has sampled, including the one that ended the answer: without it the
model would never learn when to stop. Tokens that the calculator put into the answer have mask 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from nanochat.chat_format import render_for_completion
from nanochat.common import Runtime
from nanochat.decode.row import Completion
from nanochat.engine import Engine
from nanochat.sampling import SamplingParams
from nanochat.task import Task


@dataclass(frozen=True)
class Sample:
    """A prompt and one answer to it."""

    task: str  # name of the question's task
    ids: list[int]  # prompt, completion, and the token that ended it, if any
    mask: list[int]  # for each id: 1 if it was sampled
    has_ended: bool
    reward: float
    advantage: float


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The questions of a task and the settings for sampling answers to them."""

    task: Task
    engine: Engine
    examples_per_step: int  # questions, over all ranks
    num_samples: int  # answers to each question
    max_new_tokens: int  # of an answer
    batch_size: int  # answers decoded at a time
    temperature: float
    top_k: int
    seed: int

    @property
    def task_names(self) -> list[str]:
        """Return the possible values of Sample.task, in the same order on every rank."""
        return sorted({type(part).__name__ for part in self.task.parts()})

    def sample(self, step: int, first: int, runtime: Runtime) -> list[Sample]:
        """Answer this rank's share of a step's questions, numbered from `first` on.

        Samples of one question are adjacent.
        """
        numbers = range(first + runtime.rank, first + self.examples_per_step, runtime.world_size)
        indices = [shuffled(number, len(self.task), self.seed) for number in numbers]
        conversations = [self.task[index] for index in indices]
        tokenizer = self.engine.tokenizer
        room = self.engine.model.config.sequence_len - self.max_new_tokens
        prompts = [render_for_completion(tokenizer, c, room) for c in conversations]
        completions = self.engine.complete(
            prompts,
            max_tokens=self.max_new_tokens,
            sampling=SamplingParams(
                temperature=self.temperature,
                top_k=self.top_k,
                seed=step_seed(self.seed, step, runtime.rank),
            ),
            num_samples=self.num_samples,
            batch_size=self.batch_size,
        )
        samples = []
        for i, (index, conversation, prompt) in enumerate(zip(indices, conversations, prompts, strict=True)):
            part = self.task.part(index)
            group = completions[i * self.num_samples : (i + 1) * self.num_samples]
            rewards = [part.reward(conversation, tokenizer.decode(c.tokens)) for c in group]
            samples += map(partial(_sample, type(part).__name__, prompt), group, rewards, advantages(rewards))
        return samples


def _sample(task: str, prompt: list[int], completion: Completion, reward: float, advantage: float) -> Sample:
    end = [] if completion.end_token is None else [completion.end_token]
    return Sample(
        task=task,
        ids=[*prompt, *completion.tokens, *end],
        mask=[0] * len(prompt) + completion.mask + [1] * len(end),
        has_ended=bool(end),
        reward=reward,
        advantage=advantage,
    )


def shuffled(number: int, size: int, seed: int) -> int:
    """Return the index of question `number`, counted over epochs in which `size` questions are shuffled."""
    epoch, place = divmod(number, size)
    return int(np.random.default_rng((seed, epoch)).permutation(size)[place])


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the samples that a rank draws in a step."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return each reward minus the mean; exactly 0 where all are equal, whatever the mean rounds to."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]
