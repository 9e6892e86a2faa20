"""GraphDecoder: decoding at the speed at which weights and state can be read.

A step of one row takes a third of a millisecond of memory traffic at d20, less than Python needs to ask
for it. So: weights are cast and those that share an input laid together once, at load; what a step does,
sampling included, is recorded as a CUDA graph, one for each of a few batch sizes, and replayed; so is
prefill, for a few lengths. Positions, slots and settings are inputs, so that one graph serves whatever
sequences there are, and attention reads what is there and no more. The next step can be launched before
the tokens of this one are known to the host.

RMSNorm without weights commutes with a matrix product, so no norm is ever computed by itself: who uses
the product divides by it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.decode.decoder import Decoder
from nanochat.gpt import GPT, SOFTCAP, GPTConfig, norm, rotary_tables
from nanochat.kernels.decode import sampling
from nanochat.kernels.decode.attention import attend, attend_causal, rope_append
from nanochat.kernels.decode.linear import (
    COUNTERS,
    MAX_ROWS,
    batch_linear_add,
    batch_linear_relu2,
    row_linear,
)
from nanochat.kernels.decode.pointwise import embed, norm_relu2
from nanochat.kernels.decode.slc2 import slc2_mix, slc2_row
from nanochat.sampling import SamplingParams

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of the graphs that decode; other batches are padded
PREFILL_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of the graphs that prefill
ATTENTION_PROGRAMS = 640  # at least, where the batch allows: about five for each multiprocessor
# what the host says of each row before a step, as int32 or the bits of float32
INPUTS = ("token", "slot", "position", "place", "seed", "top_k", "top_p", "temperature", "repetition_penalty")
TOKEN, SLOT, POSITION, PLACE = range(4)
FLOATS = ("top_p", "temperature", "repetition_penalty")


def supports(config: GPTConfig, slots: int) -> bool:
    """Whether there are graphs for so many rows, and the kernels have tiles for a model of this shape."""
    D, E = config.head_dim, config.n_embd
    return slots <= BATCH_SIZES[-1] and D >= 16 and D & (D - 1) == 0 and E % 32 == 0 and config.n_kernel > 1


def packed_weights(model: GPT, dtype: torch.dtype) -> list[Tensor]:
    """Copies of wte, lm_head and, of each layer, mixer in, mixer out, MLP in and out, and for SLC2 the taps.

    What goes into a mixer is laid together: q, k, v or x, B, A, alpha, and zeros. The taps stay float32.
    """

    def pack(*weights: Tensor) -> Tensor:
        return torch.cat([weight.detach().to(dtype) for weight in weights])

    packed = [pack(model.transformer.wte.weight), pack(model.lm_head.weight)]
    for block in model.transformer.h:
        mixer = block.attn
        names = ("c_q", "c_k", "c_v") if block.is_attention else ("x_proj", "B_proj", "A_proj", "alpha_proj")
        mixer_in = pack(*(getattr(mixer, name).weight for name in names))
        packed.append(F.pad(mixer_in, (0, 0, 0, -len(mixer_in) % 64)))  # cuBLAS is slow with odd sizes
        packed += [pack(layer.weight) for layer in (mixer.c_proj, block.mlp.c_fc, block.mlp.c_proj)]
        if not block.is_attention:
            packed.append(mixer.conv1d.weight.detach().float().clone())
    return packed


@dataclass
class Layer:
    """Weights of a block; `state` is its number among the layers of its kind."""

    state: int
    mixer_in: Tensor
    mixer_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    conv: Tensor | None = None  # None: attention


def _layers(config: GPTConfig, weights: list[Tensor]) -> list[Layer]:
    counts, weights = Counter(), iter(weights)
    layers = []
    for kind in config.layer_kinds:
        layers.append(Layer(counts[kind], *islice(weights, 4 if kind == "attention" else 5)))
        counts[kind] += 1
    return layers


class GraphDecoder(Decoder):
    """A Decoder for NVIDIA GPUs. On a CPU it takes the same steps without graphs, for tests."""

    overlaps = True

    def __init__(self, model: GPT, slots: int, context: int | None = None):
        c = self.config = model.config
        if not 1 <= slots <= BATCH_SIZES[-1]:
            raise ValueError(f"slots={slots} must be from 1 to {BATCH_SIZES[-1]}")
        self.slots, self.context = slots, context or c.sequence_len
        self.device, self.dtype = model.device, model.activation_dtype
        self.weights = packed_weights(model, self.dtype)
        self.wte, self.head, *of_layers = self.weights
        self.layers = _layers(c, of_layers)
        self.tables = rotary_tables(self.context, c.head_dim, self.device)
        n_attention, n_slc2 = (c.layer_kinds.count(kind) for kind in ("attention", "slc2"))
        places = slots + 1  # the last is for the rows that a batch is padded with
        kv_shape = (n_attention, places, c.n_kv_head, self.context, c.head_dim)
        self.k, self.v = (torch.empty(kv_shape, dtype=self.dtype, device=self.device) for _ in "kv")
        self.windows = self._zeros(n_slc2, places, c.n_kernel - 1, c.n_embd, dtype=self.dtype)
        self.seen = self._zeros(places, c.vocab_size, dtype=torch.uint8)
        self.latest = self._zeros(places, dtype=torch.int32)

        B = size_for(slots)
        self._logits, self._scores = (self._zeros(B, c.vocab_size) for _ in range(2))
        self._next = self._zeros(B, dtype=torch.int32)
        self._counters = self._zeros(COUNTERS, dtype=torch.int32)
        self._ones = torch.ones(B, dtype=torch.int32, device=self.device)
        self.logits = self._logits[:0]
        self._free = list(range(slots))[::-1]
        self._of_slot = np.zeros((len(INPUTS), places), np.int32)
        self._of_slot[SLOT] = range(places)
        self._set_params(slots, SamplingParams(temperature=0.0))
        self._launched: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.no_grad()
    def load(self, model: GPT) -> None:
        """Take over the weights of a model of the same shape; graphs that are recorded go on with them."""
        for ours, weight in zip(self.weights, packed_weights(model, self.dtype), strict=True):
            ours.copy_(weight)

    # -----------------------------------------------------------------------------------------------------
    # The host's part

    @torch.inference_mode()
    def open(self, params: SamplingParams) -> int:
        """See Decoder."""
        slot = self._free.pop()
        self._set_params(slot, params)
        self.windows[:, slot].zero_()
        self.seen[slot].zero_()
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
        length = self._of_slot[POSITION, copy] = self._of_slot[POSITION, slot]
        for state in (self.k, self.v):
            state[:, copy, :, :length] = state[:, slot, :, :length]
        self.windows[:, copy] = self.windows[:, slot]
        self.seen[copy] = self.seen[slot]
        return copy

    @torch.inference_mode()
    def launch(self, last: Mapping[int, int | None]) -> None:
        """See Decoder; here, slots may also pause."""
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
        """Do the work on inputs, int32, through the graph for their shape; padding does no harm."""
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
        """The graph for inputs of the shape of padding, and where it reads them."""
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

    # -----------------------------------------------------------------------------------------------------
    # The device's part: what graphs record

    def _step(self, inputs: Tensor) -> None:
        """One token for each column of inputs (len(INPUTS), B)."""
        of = {
            name: row.view(torch.float32) if name in FLOATS else row
            for name, row in zip(INPUTS, inputs, strict=True)
        }
        B = inputs.size(1)
        x = self._trunk(of["token"], of["slot"], of["position"], self._ones[:B])
        logits = self._logits[:B]
        if B == 1:
            row_linear(x, self.head, logits, norm=True)
        elif self.dtype == torch.float32:
            torch.mm(norm(x), self.head.T, out=logits)
        else:
            torch.mm(norm(x), self.head.T, torch.float32, out=logits)
        blocks = -(-self.config.vocab_size // sampling.BLOCK)
        best = torch.empty(B, blocks, device=self.device)
        buffers = (self._scores, best, torch.empty_like(best, dtype=torch.int32))
        sampling.sample_rows(logits, self.seen, of["slot"], of, buffers, self.latest, self._next[:B], SOFTCAP)

    def _prefill(self, inputs: Tensor) -> None:
        """The tokens of one sequence, inputs[3:], after its slot, its position and their count."""
        slot = inputs[:1]
        tails = torch.empty_like(self.windows[:, :1])
        self._trunk(inputs[3:], slot, inputs[1:2], inputs[2:3], tails)
        self.windows[:, slot] = tails

    def _trunk(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, counts: Tensor, tails: Tensor | None = None
    ) -> Tensor:
        """Residual stream (R,E) after the last layer, for R/S tokens of each of S sequences.

        tokens (R,); slots, positions of the first tokens, and counts of real ones (S,); all int32. Where
        there are several tokens each, tails (SLC2 layers,S,K-1,E) get the conv state after them.
        """
        c, R = self.config, len(tokens)
        x = torch.empty(R, c.n_embd, dtype=self.dtype, device=self.device)
        embed(tokens, self.wte, slots, counts, self.latest, self.seen, x)
        for layer in self.layers:
            self.add_mixer(x, layer, slots, positions, counts, tails)
            self.add_mlp(x, layer)
        return x

    def add_mixer(
        self,
        x: Tensor,
        layer: Layer,
        slots: Tensor,
        positions: Tensor,
        counts: Tensor,
        tails: Tensor | None = None,
    ) -> None:
        """x += mixer(norm(x)); x (R,E), and the rest as in `_trunk`."""
        c, R, i = self.config, len(x), layer.state
        y = torch.empty_like(x)
        if layer.conv is None:
            q = torch.empty_like(x).view(R, c.n_head, c.head_dim)
            packed = self._product(x, layer.mixer_in)
            rope_append(packed, x, self.tables, slots, positions, q, self.k[i], self.v[i])
            if tails is None:
                splits = max(1, min(32, ATTENTION_PROGRAMS // (R * c.n_kv_head)))
                attend(q, self.k[i], self.v[i], slots, positions, y.view_as(q), splits)
            else:
                attend_causal(q, self.k[i], self.v[i], slots, positions, y.view_as(q))
        elif R == 1:
            slc2_row(x, layer.mixer_in, layer.conv, self.windows[i], slots, y, c.n_head)
        else:
            packed = self._product(x, layer.mixer_in)
            tail = self.windows[i] if tails is None else tails[i]
            slc2_mix(packed, x, layer.conv, self.windows[i], slots, counts, tail, y, c.n_head)
        self._add(x, y, layer.mixer_out)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T, not yet divided by rms(x)."""
        if len(x) > 1:
            return x @ weight.T
        y = x.new_empty(1, len(weight))
        row_linear(x, weight, y)
        return y

    def _add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """x += y W^T."""
        if len(x) == 1:
            row_linear(y, weight, x, add=True)
        elif len(x) <= MAX_ROWS:
            batch_linear_add(y, weight, x, self._counters)
        else:
            x.addmm_(y, weight.T)

    def add_mlp(self, x: Tensor, layer: Layer) -> None:
        """x += MLP(norm(x))."""
        h = x.new_empty(len(x), len(layer.mlp_in))
        if len(x) == 1:
            row_linear(x, layer.mlp_in, h, norm=True, relu2=True)
            row_linear(h, layer.mlp_out, x, add=True)
        elif len(x) <= MAX_ROWS:
            scale = torch.empty(len(x), device=self.device)
            batch_linear_relu2(x, layer.mlp_in, h, scale)
            batch_linear_add(h, layer.mlp_out, x, self._counters, scale)
        else:
            torch.mm(x, layer.mlp_in.T, out=h)
            norm_relu2(h, x)
            x.addmm_(h, layer.mlp_out.T)


def size_for(n: int) -> int:
    """The batch size of the graph that n rows run in."""
    return next(size for size in BATCH_SIZES if size >= n)


def _prefill_size(n: int) -> int:
    """The graph for the next of n tokens: of as many as there are, or a third more, or else of fewer."""
    fitting = [size for size in PREFILL_SIZES if size <= n + n // 3]
    return max(fitting, default=PREFILL_SIZES[0])
