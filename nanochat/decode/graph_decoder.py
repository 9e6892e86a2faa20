"""GraphDecoder: decode as fast as weights and state can be read from memory.

At d20, the memory traffic of a step of one row takes a third of a millisecond, less than Python needs to
launch its kernels. So a step, sampling included, is recorded as a CUDA graph, one for each of a few batch
sizes, and replayed; so is prefill, for a few lengths. Positions, slots and settings are inputs of the graphs,
which therefore serve any sequences. The next step can be launched before the tokens of the last one are known
to the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nanochat.decode.decoder import Decoder
from nanochat.decode.graph_model import Batch, KernelModel
from nanochat.decode.packed import PackedWeights
from nanochat.decode.slots import Slots
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels.decode import sampling
from nanochat.ops import SOFTCAP
from nanochat.sampling import SamplingParams

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of the graphs that decode; other batches are padded
PREFILL_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of the graphs that prefill
# inputs of a step for each row: int32, or the bits of float32; place counts the tokens drawn
INPUTS = ("token", "slot", "position", "place", "seed", "top_k", "top_p", "temperature", "repetition_penalty")
TOKEN, SLOT, POSITION, PLACE = range(4)
FLOATS = ("top_p", "temperature", "repetition_penalty")


def supports(config: GPTConfig, slots: int) -> bool:
    """Return True if there are graphs for so many rows, and kernels for a model of this shape."""
    D, E = config.head_dim, config.n_embd
    has_windows = config.n_kernel > 1 and config.residual_conv != 1
    return slots <= BATCH_SIZES[-1] and D >= 16 and D & (D - 1) == 0 and E % 32 == 0 and has_windows


class GraphDecoder(Decoder):
    """A Decoder for NVIDIA GPUs. On a CPU, for tests, it takes the same steps without graphs."""

    overlaps = True

    def __init__(self, model: GPT, slots: int, context: int | None = None):
        if not 1 <= slots <= BATCH_SIZES[-1]:
            raise ValueError(f"slots={slots} must be from 1 to {BATCH_SIZES[-1]}")
        self.slots, self.context = slots, context or model.config.sequence_len
        self.device = model.device
        places = slots + 1  # the last is for the rows that pad a batch
        self._weights = PackedWeights(model, model.activation_dtype)
        self._state = Slots(model.config, places, self.context, model.device, model.activation_dtype)
        self.model = KernelModel(self._weights, self._state)

        B, vocab_size = size_for(slots), model.config.vocab_size
        self._logits, self._scores = (torch.zeros(B, vocab_size, device=self.device) for _ in range(2))
        self._next = torch.zeros(B, dtype=torch.int32, device=self.device)
        self._ones = torch.ones(B, dtype=torch.int32, device=self.device)
        self.logits = self._logits[:0]
        self._free = list(range(slots))[::-1]
        self._of_slot = np.zeros((len(INPUTS), places), np.int32)
        self._of_slot[SLOT] = range(places)
        self._set_params(slots, SamplingParams(temperature=0.0))
        self._launched: deque[tuple[Tensor, torch.cuda.Event | torch.Event | None]] = deque()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def load(self, model: GPT) -> None:
        """See Decoder."""
        self._weights.load(model)

    @torch.inference_mode()
    def open(self, params: SamplingParams) -> int:
        """See Decoder."""
        slot = self._free.pop()
        self._set_params(slot, params)
        self._state.reset(slot)
        return slot

    @torch.inference_mode()
    def feed(self, slot: int, tokens: Sequence[int]) -> None:
        """See Decoder."""
        start = int(self._of_slot[POSITION, slot])
        if start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens after {start} do not fit a context of {self.context}")
        done = 0
        while done < len(tokens):
            size = _prefill_size(len(tokens) - done)
            piece = tokens[done : done + size]
            inputs = np.zeros(3 + size, np.int32)
            inputs[: 3 + len(piece)] = [slot, start + done, len(piece), *piece]
            self._run(self._prefill, inputs, self._prefill_padding(size))
            done += len(piece)
        self._of_slot[POSITION, slot] += len(tokens)

    @torch.inference_mode()
    def fork(self, slot: int, params: SamplingParams) -> int:
        """See Decoder."""
        copy = self._free.pop()
        self._set_params(copy, params)
        self._of_slot[POSITION, copy] = self._of_slot[POSITION, slot]
        self._state.copy(slot, copy, length=int(self._of_slot[POSITION, slot]))
        return copy

    @torch.inference_mode()
    def launch(self, last: Mapping[int, int | None]) -> None:
        """See Decoder; here a slot may also miss a launch."""
        slots, n = list(last), len(last)
        full = self._of_slot[POSITION, slots] >= self.context
        if full.any():
            raise ValueError(f"{full.sum()} sequences have filled their context of {self.context}")
        self._of_slot[TOKEN, slots] = [-1 if token is None else token for token in last.values()]
        padding = self._step_padding(size_for(n))
        self._run(self._step, np.hstack([self._of_slot[:, slots], padding[:, n:]]), padding)
        self._of_slot[[[POSITION], [PLACE]], slots] += 1
        self.logits = self._logits[:n]
        on_gpu = self.device.type == "cuda"
        tokens = torch.empty(n, dtype=torch.int32, pin_memory=on_gpu).copy_(self._next[:n], non_blocking=True)
        self._launched.append((tokens, torch.cuda.current_stream().record_event() if on_gpu else None))

    def collect(self) -> list[int]:
        """See Decoder."""
        tokens, event = self._launched.popleft()
        if event is not None:
            event.synchronize()
        return tokens.tolist()

    def close(self, slot: int) -> None:
        """See Decoder."""
        self._free.append(slot)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """See Decoder."""
        if self.device.type != "cuda":
            return
        with torch.cuda.device(self.device):
            for size in BATCH_SIZES[: BATCH_SIZES.index(size_for(self.slots)) + 1]:
                self._graph(self._step, self._step_padding(size))
            for size in PREFILL_SIZES:
                if size <= max(self.context, PREFILL_SIZES[0]):
                    self._graph(self._prefill, self._prefill_padding(size))

    def _step_padding(self, B: int) -> np.ndarray:
        return self._of_slot[:, [self.slots] * B]

    def _prefill_padding(self, size: int) -> np.ndarray:
        return np.array([self.slots, 0, 0, *[0] * size], np.int32)

    def _set_params(self, slot: int, params: SamplingParams) -> None:
        for row, name in enumerate(INPUTS):
            value = getattr(params, name, None) or 0
            if name in FLOATS:
                self._of_slot[row, slot] = np.float32(value).view(np.int32)
            elif row != SLOT:
                self._of_slot[row, slot] = np.uint32(value % 2**32).view(np.int32)

    def _run(self, work: Callable[[Tensor], None], inputs: np.ndarray, padding: np.ndarray) -> None:
        """Do the work on inputs, int32, by the graph of their shape, which is recorded with the padding."""
        host = torch.from_numpy(np.ascontiguousarray(inputs))
        if self.device.type != "cuda":
            work(host)
            return
        graph, device_inputs = self._graph(work, padding)
        device_inputs.copy_(host.pin_memory(), non_blocking=True)
        graph.replay()

    def _graph(
        self, work: Callable[[Tensor], None], padding: np.ndarray
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Return the graph for inputs of the shape of padding, and the tensor that it reads them from."""
        if padding.shape not in self._graphs:
            inputs = torch.from_numpy(np.ascontiguousarray(padding)).to(self.device)
            self._graphs[padding.shape] = self._record(work, inputs)
        return self._graphs[padding.shape]

    def _record(self, work: Callable[[Tensor], None], inputs: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work(inputs)  # compiles the kernels
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work(inputs)
        return graph, inputs

    def _step(self, inputs: Tensor) -> None:
        """Append a token to, and draw one for, each column of inputs (len(INPUTS), B)."""
        of = {
            name: row.view(torch.float32) if name in FLOATS else row
            for name, row in zip(INPUTS, inputs, strict=True)
        }
        B, state = inputs.size(1), self._state
        x = self.model.trunk(Batch(of["token"], of["slot"], of["position"], self._ones[:B]))
        logits = self._logits[:B]
        self.model.logits(x, out=logits)
        blocks = -(-logits.size(1) // sampling.BLOCK)
        best = torch.empty(B, blocks, device=self.device)
        buffers = (self._scores, best, torch.empty_like(best, dtype=torch.int32))
        sampling.sample_rows(
            logits, state.seen, of["slot"], of, buffers, state.latest, self._next[:B], SOFTCAP
        )

    def _prefill(self, inputs: Tensor) -> None:
        """Append the tokens inputs[3:] to one sequence: its slot, position and their count come first."""
        self.model.prefill(inputs[3:], inputs[:1], inputs[1:2], inputs[2:3])


def size_for(n: int) -> int:
    """Return the batch size of the graph for n rows."""
    return next(size for size in BATCH_SIZES if size >= n)


def _prefill_size(n: int) -> int:
    """Return the size of the graph for the next of n tokens: the largest up to 4/3 n, or the smallest."""
    fitting = [size for size in PREFILL_SIZES if size <= n + n // 3]
    return max(fitting, default=PREFILL_SIZES[0])
