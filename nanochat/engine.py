"""The engine: token ids in, sampled token ids out, many rows at a time, with the calculator in the loop.

A prompt is run once through the model and its decode state copied to each of its samples; each of them draws
its own first token. From then on one forward a step serves all rows, of whatever lengths. When a row writes a
calculator call, <|python_start|> expression <|python_end|>, the result is put in its stream as if it had been
sampled: those tokens are forced, and marked 0 in the masks that say what the model itself wrote.

Rows end with <|assistant_end|> or <|bos|>. Once half of them have, the others go on in a smaller batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from nanochat.gpt import GPT
from nanochat.sampling import check_sampling, sample
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tools import calculate


@dataclass
class Completion:
    """What a row's model wrote after the prompt, without the token that ended it."""

    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # 1: sampled, 0: forced, a result of the calculator
    end_token: int | None = None  # what it ended with; None: max_tokens were reached


class _Row:
    """A completion in the making: notices calculator calls and queues their results."""

    def __init__(self, tokenizer: RustBPETokenizer, special: dict[str, int]):
        self.tokenizer, self.special = tokenizer, special
        self.completion = Completion()
        self.forced: deque[int] = deque()
        self.call: list[int] | None = None  # tokens since <|python_start|>

    def take(self, sampled: int) -> tuple[int, int]:
        """Return the row's next token, the sampled one unless one is forced, and its mask."""
        token, mask = (self.forced.popleft(), 0) if self.forced else (sampled, 1)
        special = self.special
        if mask and token in (special["<|assistant_end|>"], special["<|bos|>"]):
            self.completion.end_token = token
            return token, mask
        self.completion.tokens.append(token)
        self.completion.mask.append(mask)
        if token == special["<|python_start|>"]:
            self.call = []
        elif token == special["<|python_end|>"] and self.call is not None:
            result = calculate(self.tokenizer.decode(self.call))
            if result is not None:
                start, end = special["<|output_start|>"], special["<|output_end|>"]
                self.forced.extend([start, *self.tokenizer.encode(result), end])
            self.call = None
        elif self.call is not None:
            self.call.append(token)
        return token, mask


class Engine:
    """Decodes with one model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer):
        self.model, self.tokenizer = model, tokenizer
        names = ("bos", "assistant_end", "python_start", "python_end", "output_start", "output_end")
        self.special = {f"<|{name}|>": tokenizer.encode_special(f"<|{name}|>") for name in names}

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
        if max_tokens is None:
            max_tokens = max(1, self.model.config.sequence_len - len(tokens))
        rows = [_Row(self.tokenizer, self.special) for _ in range(num_samples)]
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        for taken in self._steps([tokens], rows, max_tokens, seed, settings):
            ended = [row.completion.end_token for row in rows]
            yield tuple(map(list, zip(*(taken.get(i, (ended[i], 0)) for i in range(num_samples)), strict=True)))

    def generate_batch(self, tokens: Sequence[int], num_samples: int = 1, **settings) -> tuple[list, list]:
        """Like generate, all at once: (prompt and completion of each sample, their masks; 0 on the prompt)."""
        rows = [_Row(self.tokenizer, self.special) for _ in range(num_samples)]
        max_tokens = settings.pop("max_tokens", None) or max(1, self.model.config.sequence_len - len(tokens))
        for _ in self._steps([tokens], rows, max_tokens, settings.pop("seed", None), settings):
            pass
        results = [[*tokens, *row.completion.tokens] for row in rows]
        return results, [[0] * len(tokens) + row.completion.mask for row in rows]

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

        At most batch_size rows run at a time, prompts of like length together; on_done is told how many ended.
        The settings are generate's.
        """
        if batch_size < num_samples:
            raise ValueError(f"batch_size={batch_size} must hold the num_samples={num_samples} of a prompt")
        completions: list[Completion] = [Completion()] * (len(prompts) * num_samples)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        n = batch_size // num_samples
        for chunk in (order[i : i + n] for i in range(0, len(order), n)):
            rows = [_Row(self.tokenizer, self.special) for _ in range(len(chunk) * num_samples)]
            for _ in self._steps([prompts[i] for i in chunk], rows, max_tokens, seed, settings):
                pass
            for place, i in enumerate(chunk):
                for j in range(num_samples):
                    completions[i * num_samples + j] = rows[place * num_samples + j].completion
            on_done(len(rows))
        return completions

    @torch.inference_mode()
    def _start(self, prompts: Sequence[Sequence[int]], num_rows: int, max_tokens: int):
        """Prefill; return the logits of the first new token and the decode state, one row a sample."""
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if len(prompts) == 0 or lengths.min() < 1:
            raise ValueError("a prompt needs one token at least")
        longest = int(lengths.max())
        idx = torch.full((len(prompts), longest), self.special["<|bos|>"])
        for row, prompt in enumerate(prompts):
            idx[row, : len(prompt)] = torch.as_tensor(prompt)
        cache = self.model.new_cache(len(prompts), longest + max_tokens)
        is_even = bool((lengths == longest).all())
        logits = self.model.next_logits(idx.to(device), cache, None if is_even else lengths.to(device))
        copies = [row for row in range(len(prompts)) for _ in range(num_rows // len(prompts))]
        return (logits, cache) if num_rows == len(prompts) else (logits[copies], cache.select(copies))

    @torch.inference_mode()
    def _step(self, tokens: list[int], cache):
        return self.model.next_logits(torch.tensor(tokens, device=self.model.device)[:, None], cache)

    def _steps(
        self, prompts: Sequence[Sequence[int]], rows: list[_Row], max_tokens: int, seed: int | None, settings: dict
    ) -> Iterator[dict[int, tuple[int, int]]]:
        """Advance all rows token by token until they end; yield {row: (token, mask)} of those still running."""
        check_sampling(settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p"), 1.0)
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        generator = torch.Generator(self.model.device)
        generator.manual_seed(seed) if seed is not None else generator.seed()
        running = list(range(len(rows)))  # which row each row of the cache is
        logits, cache = self._start(prompts, len(rows), max_tokens)
        for step in range(max_tokens):
            sampled = sample(logits, generator=generator, **settings)[:, 0].tolist()
            alive = [i for i in running if rows[i].completion.end_token is None]
            taken = {i: rows[i].take(token) for i, token in zip(running, sampled, strict=True) if i in set(alive)}
            yield taken
            alive = [i for i in alive if rows[i].completion.end_token is None]
            if not alive or step == max_tokens - 1:
                return
            if 2 * len(alive) <= len(running):
                cache = cache.select([running.index(i) for i in alive])
                running = alive
            logits = self._step([taken.get(i, (self.special["<|bos|>"],))[0] for i in running], cache)
