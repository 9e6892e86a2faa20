"""The engine: token ids in, sampled token ids out, many rows at a time, with the calculator in the loop.

A prompt is run once through the model and its decode state copied to each of its samples; each of them draws
its own first token. From then on one forward a step serves all rows, of whatever lengths. What a row does
with a token, nanochat/row.py says. Once half of the rows have ended, the others go on in a smaller batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat.cache import HybridCache
from nanochat.gpt import GPT
from nanochat.row import Completion, Row, special_ids
from nanochat.sampling import check_sampling, sample
from nanochat.tokenizer import RustBPETokenizer


def of_like_length(prompts: Sequence[Sequence[int]], n: int) -> Iterator[list[int]]:
    """Yield the indices of all prompts, n at most at a time, from short to long."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    yield from (order[i : i + n] for i in range(0, len(order), n))


def pad_right(prompts: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Lay prompts side by side: (len(prompts), length of the longest) int64, on the CPU."""
    idx = torch.full((len(prompts), max(map(len, prompts))), fill)
    for row, prompt in enumerate(prompts):
        idx[row, : len(prompt)] = torch.as_tensor(prompt)
    return idx


class Engine:
    """Decodes with one model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer):
        self.model, self.tokenizer, self.special = model, tokenizer, special_ids(tokenizer)

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt num_samples times; yield a token of each sample and its mask, step by step.

        A sample that has ended repeats its end token, with mask 0. max_tokens defaults to what the context
        has left. The same seed gives the same tokens; None draws a fresh one.
        """
        rows = self._rows(num_samples)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        for running in self._steps(
            [tokens], rows, self._room(tokens, max_tokens), self._generator(seed), settings
        ):
            yield [row.last[0] for row in rows], [row.last[1] * (i in running) for i, row in enumerate(rows)]

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        seed: int | None = None,
        **settings,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Like generate, all at once: prompt with completion of each sample, and masks, 0 on the prompt."""
        found = self.complete(
            [tokens],
            max_tokens=self._room(tokens, max_tokens),
            num_samples=num_samples,
            batch_size=num_samples,
            seed=seed,
            **settings,
        )
        return [[*tokens, *row.tokens] for row in found], [[0] * len(tokens) + row.mask for row in found]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        num_samples: int = 1,
        batch_size: int = 64,
        seed: int | None = None,
        on_done: Callable[[int], object] = lambda n: None,
        **settings,
    ) -> list[Completion]:
        """Complete every prompt num_samples times (sample j of prompt i is number i * num_samples + j).

        At most batch_size rows run at a time, prompts of like length together; on_done is told how many
        ended. The settings are generate's.
        """
        if not 1 <= num_samples <= batch_size:
            raise ValueError(
                f"num_samples={num_samples} must be at least 1 and fit into batch_size={batch_size}"
            )
        completions: list[Completion] = [Completion()] * (len(prompts) * num_samples)
        generator = self._generator(seed)
        for chunk in of_like_length(prompts, batch_size // num_samples):
            rows = self._rows(len(chunk) * num_samples)
            for _ in self._steps([prompts[i] for i in chunk], rows, max_tokens, generator, settings):
                pass
            for place, i in enumerate(chunk):
                for j in range(num_samples):
                    completions[i * num_samples + j] = rows[place * num_samples + j].completion
            on_done(len(rows))
        return completions

    def _rows(self, n: int) -> list[Row]:
        return [Row(self.tokenizer, self.special) for _ in range(n)]

    def _room(self, tokens: Sequence[int], max_tokens: int | None) -> int:
        return max(1, self.model.config.sequence_len - len(tokens)) if max_tokens is None else max_tokens

    def _generator(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.model.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        return generator

    @torch.inference_mode()
    def _prefill(
        self, prompts: Sequence[Sequence[int]], num_rows: int, max_tokens: int
    ) -> tuple[Tensor, HybridCache]:
        """Run the prompts; return logits (num_rows,V) of the first new token and the rows' decode state."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        idx = pad_right(prompts, self.special["<|bos|>"])
        cache = self.model.new_cache(len(prompts), longest + max_tokens)
        device = self.model.device
        is_even = min(lengths) == longest
        logits = self.model.next_logits(idx.to(device), cache, None if is_even else lengths)
        if num_rows > len(prompts):
            copies = torch.arange(num_rows) // (num_rows // len(prompts))
            logits, cache = logits[copies.to(device)], cache.select(copies.tolist())
        return logits, cache

    @torch.inference_mode()  # around the forward alone: the mode is a thread's, and a generator may change it
    def _decode(self, tokens: list[int], cache: HybridCache) -> Tensor:
        return self.model.next_logits(torch.tensor(tokens, device=self.model.device)[:, None], cache)

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[Row],
        max_tokens: int,
        generator: torch.Generator,
        settings: dict[str, Any],
    ) -> Iterator[set[int]]:
        """Advance all rows token by token until they end; yield after each step which of them it advanced."""
        check_sampling(settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p"), 1.0)
        if max_tokens < 1 or not rows or not all(map(len, prompts)):
            raise ValueError(
                f"max_tokens={max_tokens}, num_samples={len(rows) // len(prompts)} and the length of a "
                "prompt must be at least 1"
            )
        running = list(range(len(rows)))  # which row each row of the cache is
        logits, cache = self._prefill(prompts, len(rows), max_tokens)
        for left in reversed(range(max_tokens)):
            sampled = sample(logits, generator=generator, **settings)[:, 0].tolist()
            advanced = {i for i in running if not rows[i].has_ended}
            for i, token in zip(running, sampled, strict=True):
                if i in advanced:
                    rows[i].take(token)
            yield advanced
            alive = [place for place, i in enumerate(running) if not rows[i].has_ended]
            if not alive or not left:
                return
            if 2 * len(alive) <= len(running):
                cache, running = cache.select(alive), [running[place] for place in alive]
            logits = self._decode([rows[i].last[0] for i in running], cache)
