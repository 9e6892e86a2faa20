"""The rows that are being decoded, step by step, and what the next step is to begin with.

Where the decoder works on its own, on a GPU, the next step is launched before the tokens of the last are
looked at: what a row does with a token does not keep the GPU waiting. A row that turns out to have ended
has then taken part in one step too many, which nobody sees.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

from nanochat.decode.decoder import Decoder, PlainDecoder
from nanochat.decode.row import Row
from nanochat.gpt import GPT

logger = logging.getLogger(__name__)


def decoder_for(model: GPT, slots: int, context: int | None = None) -> Decoder:
    """The fastest decoder there is for a model, on its device; context None: the model's sequence_len."""
    if model.device.type == "cuda":
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
    launches: int = 0  # whose tokens the row has not seen
    is_free: bool = False  # its row has left

    def next_input(self) -> int | None:
        """What the next launch appends: the last token, if it is known; None: what will have been drawn."""
        if not self.launches:
            return self.last
        return self.row.forced[0] if self.row.forced else None


class Running:
    """The seats of a decoder."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.seats: list[Seat] = []
        self._flight: list[Seat] = []  # those in the launch that is not yet collected

    def __bool__(self) -> bool:
        return bool(self.seats or self._flight)

    def step(self, in_step: bool = False) -> list[tuple[int, Seat]]:
        """Let rows take a token each; return them with their places in the decoder's logits.

        in_step: nothing is launched ahead, so that the logits are still those of the tokens. Whoever has
        ended must be removed before the next step.
        """
        flight = self._flight
        if in_step or not self.decoder.overlaps:
            if not flight:
                flight = self._launch()
            self._flight = []
        else:
            self._flight = self._launch()
        return self._land(flight)

    def remove(self, seat: Seat) -> None:
        """Free a seat's slot; if that fails, the seat is still there to be told of it."""
        seat.is_free = True
        self.decoder.close(seat.slot)
        self.seats.remove(seat)

    def clear(self) -> None:
        """Free all slots, whatever has become of the last step, or of the device."""
        self._flight = []
        with suppress(Exception):  # nothing is left, or it failed with the step
            while True:
                self.decoder.collect()
        while self.seats:
            with suppress(Exception):  # a lost device has no slots to free
                self.decoder.close(self.seats.pop().slot)

    def _launch(self) -> list[Seat]:
        if self.seats:
            self.decoder.launch({seat.slot: seat.next_input() for seat in self.seats})
        for seat in self.seats:
            seat.launches += 1
        return [*self.seats]

    def _land(self, flight: list[Seat]) -> list[tuple[int, Seat]]:
        taken = []
        for place, (seat, token) in enumerate(
            zip(flight, self.decoder.collect() if flight else (), strict=True)
        ):
            seat.launches -= 1
            if not seat.is_free:  # since the launch
                seat.row.append(token)
                seat.last = seat.row.last[0]
                taken.append((place, seat))
        return taken
