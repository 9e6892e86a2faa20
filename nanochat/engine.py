"""The engine: token ids in, sampled token ids out, many rows at a time, with the calculator in the loop.

A prompt is run once through the model and its decode state copied to each of its samples; each of them
draws its own first token, by a seed of its own. From then on one step a token serves all rows, of
whatever lengths; when one ends, the next prompt has its place. What a row does with a token,
nanochat/decode/row.py says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from nanochat.decode.decoder import Decoder
from nanochat.decode.row import Completion, Row, special_ids
from nanochat.decode.running import Running, Seat, decoder_for
from nanochat.gpt import GPT
from nanochat.sampling import SamplingParams
from nanochat.tokenizer import RustBPETokenizer


class Engine:
    """Decodes with one model and its tokenizer."""

    def __init__(self, model: GPT, tokenizer: RustBPETokenizer):
        self.model, self.tokenizer, self.special = model, tokenizer, special_ids(tokenizer)
        self._idle: list[Decoder] = []  # their graphs are worth keeping

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
        """Continue one prompt num_samples times; yield a token of each sample and its mask, step by step.

        A sample that has ended repeats its end token, with mask 0. max_tokens defaults to what the context
        has left. The same seed gives the same tokens; None draws a fresh one.
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
                taken = [seat for _, seat in running.step()]
                if not taken:
                    continue
                yield [s.row.last[0] for s in seats], [s.row.last[1] * (s in taken) for s in seats]
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
        """Like generate, all at once: prompt with completion of each sample, and masks, 0 on the prompt."""
        found = self.complete(
            [tokens],
            max_tokens=self._room(tokens, max_tokens),
            sampling=SamplingParams.from_flat(temperature, top_k, top_p, seed=seed),
            num_samples=num_samples,
            batch_size=num_samples,
        )
        return [[*tokens, *row.tokens] for row in found], [[0] * len(tokens) + row.mask for row in found]

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
        sampling, waiting, rows = sampling.seeded(), deque(enumerate(prompts)), []
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
    def _running(self, slots: int, context: int) -> Iterator[Running]:
        """Seats for rows of so many tokens, on a decoder that is not in use and has the model's weights."""
        fitting = [d for d in self._idle if d.slots >= slots and d.context >= context]
        if fitting:
            decoder = fitting[0]
            self._idle.remove(decoder)
            decoder.load(self.model)
        else:
            context = max(context, self.model.config.sequence_len)
            self._idle = [
                d for d in self._idle if d.slots > slots or d.context > context
            ]  # others are of no use
            decoder = decoder_for(self.model, slots, context)
        running = Running(decoder)
        try:
            yield running
        finally:
            running.clear()
            self._idle.append(decoder)

    def _seat(self, running: Running, prompt: Sequence[int], params: Sequence[SamplingParams]) -> list[Seat]:
        """Prefill a prompt without its last token; return the seats of its samples, one for each params."""
        slots = [running.decoder.open(params[0])]
        try:
            if len(prompt) > 1:
                running.decoder.feed(slots[0], prompt[:-1])
            for more in params[1:]:
                slots.append(running.decoder.fork(slots[0], more))
        except BaseException:  # Ctrl-C in a long prompt, for one: no seat has these slots yet
            for slot in slots:
                running.decoder.close(slot)
            raise
        seats = [Seat(slot, Row(self.tokenizer, self.special), prompt[-1]) for slot in slots]
        running.seats += seats
        return seats

    def _remove_ended(self, running: Running, max_tokens: int) -> int:
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
