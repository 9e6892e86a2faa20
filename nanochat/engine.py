"""The engine: prompts in, completions out, many rows at a time, with the calculator in the loop.

A prompt runs through the model once, and each of its samples starts from a copy of the decode state and draws
its own first token, by its own seed. From then on one step appends a token to all rows, whatever their
lengths. When a row ends, the next prompt gets its place. nanochat/decode/row.py evaluates calculator calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nanochat.decode import DecoderKind
from nanochat.decode.decoder import Decoder
from nanochat.decode.row import Completion, Row, special_ids
from nanochat.decode.running import Running, Seat, decoder_for
from nanochat.gpt import GPT
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer


class Engine:
    """Decodes with one model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer, decoder: DecoderKind = "best"):
        self.model, self.tokenizer, self.special = model, tokenizer, special_ids(tokenizer)
        self.decoder: DecoderKind = decoder
        self._idle: list[Decoder] = []  # to be used again: recording CUDA graphs takes seconds

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        *,
        top_p: float | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt num_samples times; yield one token of each sample and its mask, step by step.

        A sample that has ended repeats its end token, with mask 0. max_tokens defaults to the rest of the
        context. The same seed gives the same tokens; None draws a fresh one.
        """
        max_tokens = self._room(tokens, max_tokens)
        sampling = SamplingParams.from_flat(temperature, top_k, top_p, seed=seed)
        yield from self.stream(tokens, max_tokens=max_tokens, sampling=sampling, num_samples=num_samples)

    def stream(
        self, tokens: Sequence[int], *, max_tokens: int, sampling: SamplingParams, num_samples: int = 1
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Do what generate does, with the settings as one object."""
        sampling = sampling.seeded()
        _check([tokens], max_tokens, num_samples)
        with self._running(num_samples, len(tokens) + max_tokens) as running:
            seats = self._seat(running, tokens, [sampling.for_sample(i) for i in range(num_samples)])
            while running.seats:
                advanced = [seat for _, seat in running.step()]
                if not advanced:
                    continue
                yield [s.row.last[0] for s in seats], [s.row.last[1] * (s in advanced) for s in seats]
                self._remove_ended(running, max_tokens)

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        *,
        top_p: float | None = None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Like generate, all at once: return prompt with completion of each sample, and masks (prompt: 0)."""
        rows = self.complete(
            [tokens],
            max_tokens=self._room(tokens, max_tokens),
            sampling=SamplingParams.from_flat(temperature, top_k, top_p, seed=seed),
            num_samples=num_samples,
            batch_size=num_samples,
        )
        return [[*tokens, *row.tokens] for row in rows], [[0] * len(tokens) + row.mask for row in rows]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: SamplingParams,
        num_samples: int = 1,
        batch_size: int = 64,
        on_done: Callable[[int], object] = lambda n: None,
    ) -> list[Completion]:
        """Complete every prompt num_samples times (sample j of prompt i is number i * num_samples + j).

        At most batch_size rows run at a time, which does not change their tokens. on_done is called with the
        number of rows that have just ended.
        """
        _check(prompts, max_tokens, num_samples)
        if num_samples > batch_size:
            raise ValueError(f"num_samples={num_samples} must fit into batch_size={batch_size}")
        if not prompts:
            return []
        sampling, waiting = sampling.seeded(), deque(enumerate(prompts))
        rows: list[Row] = []
        batch_size = min(batch_size, num_samples * len(prompts))
        with self._running(batch_size, max(map(len, prompts)) + max_tokens) as running:
            while waiting or running.seats:
                while waiting and len(running.seats) + num_samples <= batch_size:
                    i, prompt = waiting.popleft()
                    numbers = range(i * num_samples, (i + 1) * num_samples)
                    params = [sampling.for_sample(number) for number in numbers]
                    rows += [seat.row for seat in self._seat(running, prompt, params)]
                running.step()
                ended = self._remove_ended(running, max_tokens)
                if ended:
                    on_done(ended)
        return [row.completion for row in rows]

    def _room(self, tokens: Sequence[int], max_tokens: int | None) -> int:
        return max(1, self.model.config.sequence_len - len(tokens)) if max_tokens is None else max_tokens

    @contextmanager
    def _running(self, slots: int, context: int) -> Iterator[Running[Seat]]:
        """Lend a decoder with so many slots of so many tokens, which has the weights of the model."""
        fitting = [d for d in self._idle if d.slots >= slots and d.context >= context]
        if fitting:
            decoder = fitting[0]
            self._idle.remove(decoder)
            decoder.load(self.model)
        else:
            context = max(context, self.model.config.sequence_len)
            # those that the new one replaces would only take memory
            self._idle = [d for d in self._idle if d.slots > slots or d.context > context]
            decoder = decoder_for(self.model, slots, context, self.decoder)
        running: Running[Seat] = Running(decoder)
        try:
            yield running
        finally:
            running.clear()
            self._idle.append(decoder)

    def _seat(
        self, running: Running[Seat], prompt: Sequence[int], params: Sequence[SamplingParams]
    ) -> list[Seat]:
        """Prefill a prompt without its last token; return the seats of its samples, one for each params."""
        slots = [running.decoder.open(params[0])]
        try:
            if len(prompt) > 1:
                running.decoder.feed(slots[0], prompt[:-1])
            for more in params[1:]:
                slots.append(running.decoder.fork(slots[0], more))
        except BaseException:  # for example Ctrl-C in a long prompt: no seat has these slots yet
            for slot in slots:
                running.decoder.close(slot)
            raise
        seats = [Seat(slot, Row(self.tokenizer, self.special), prompt[-1]) for slot in slots]
        running.seats += seats
        return seats

    def _remove_ended(self, running: Running[Seat], max_tokens: int) -> int:
        ended = [
            seat
            for seat in running.seats
            if seat.row.has_ended or len(seat.row.completion.tokens) == max_tokens
        ]
        for seat in ended:
            running.remove(seat)
        return len(ended)


def _check(prompts: Sequence[Sequence[int]], max_tokens: int, num_samples: int) -> None:
    if max_tokens < 1 or num_samples < 1 or not all(map(len, prompts)):
        raise ValueError(
            f"max_tokens={max_tokens}, {num_samples=} and the length of a prompt must be at least 1"
        )
