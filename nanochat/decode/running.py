"""Rows that are decoded together, step by step, and the input of each row's next step.

A decoder on a GPU runs on its own: the next step is launched before the tokens of the last one are looked at,
so that Python does not keep the GPU waiting. A row that turns out to have ended has then taken part in one
step too many, whose token is dropped.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar, get_args

from nanochat.decode import DecoderKind
from nanochat.decode.decoder import Decoder, PlainDecoder
from nanochat.decode.row import Row
from nanochat.gpt import GPT

logger = logging.getLogger(__name__)


def decoder_for(model: GPT, slots: int, context: int | None = None, kind: DecoderKind = "best") -> Decoder:
    """Return a decoder for a model, on its device; context None is the model's sequence_len.

    The best one has CUDA graphs, where the device and the shape of the model allow it.
    """
    if kind not in get_args(DecoderKind):
        raise ValueError(f"decoder={kind!r} must be one of {', '.join(get_args(DecoderKind))}")
    if kind == "best" and model.device.type == "cuda":
        from nanochat.decode.graph_check import check_decoder
        from nanochat.decode.graph_decoder import GraphDecoder, supports

        if supports(model.config, slots):
            decoder = GraphDecoder(model, slots, context)
            check_decoder(decoder, model)
            return decoder
        logger.warning("warning: no CUDA graphs for %d rows at a time of this model: decoding is slow", slots)
    return PlainDecoder(model, slots, context)


@dataclass(eq=False)
class Seat:
    """A slot of a decoder and the row that has it."""

    slot: int
    row: Row
    last: int  # token
    pending: int = 0  # launches whose tokens the row has not received
    is_free: bool = False  # the row was removed

    def next_input(self) -> int | None:
        """Return the token for the next launch to append; None is the one that the last launch draws."""
        if not self.pending:
            return self.last
        return self.row.forced[0] if self.row.forced else None


AnySeat = TypeVar("AnySeat", bound=Seat)


class Running(Generic[AnySeat]):
    """The seats of a decoder."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.seats: list[AnySeat] = []
        self._launched: list[AnySeat] = []  # seats of the launch that is not yet collected

    def __bool__(self) -> bool:
        return bool(self.seats or self._launched)

    def step(self, overlap: bool = True) -> list[tuple[int, AnySeat]]:
        """Append a token to each row; return the seats, each with its index in the decoder's logits.

        Without overlap no further step is launched, so that the logits are still those of the tokens. Rows
        that have ended must be removed before the next step.
        """
        launched = self._launched
        if overlap and self.decoder.overlaps:
            self._launched = self._launch()
        else:
            if not launched:
                launched = self._launch()
            self._launched = []
        return self._collect(launched)

    def remove(self, seat: AnySeat) -> None:
        """Free a seat's slot; if that fails, the seat stays in the list."""
        seat.is_free = True
        self.decoder.close(seat.slot)
        self.seats.remove(seat)

    def clear(self) -> None:
        """Free all slots, even if the last step or the device has failed."""
        self._launched = []
        with suppress(Exception):  # nothing is left to collect, or collecting fails like the step
            while True:
                self.decoder.collect()
        while self.seats:
            with suppress(Exception):  # a lost device has no slots to free
                self.decoder.close(self.seats.pop().slot)

    def _launch(self) -> list[AnySeat]:
        if self.seats:
            self.decoder.launch({seat.slot: seat.next_input() for seat in self.seats})
        for seat in self.seats:
            seat.pending += 1
        return [*self.seats]

    def _collect(self, launched: list[AnySeat]) -> list[tuple[int, AnySeat]]:
        tokens = self.decoder.collect() if launched else []
        advanced = []
        for index, (seat, token) in enumerate(zip(launched, tokens, strict=True)):
            seat.pending -= 1
            if not seat.is_free:  # since the launch
                seat.row.append(token)
                seat.last = seat.row.last[0]
                advanced.append((index, seat))
        return advanced
