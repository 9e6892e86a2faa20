"""GraphDecoder: decoding at the speed at which weights and state can be read.

A step of one row takes a third of a millisecond of memory traffic at d20, less than Python needs to ask for it.
So: weights are cast and those that share an input laid together once, at load; what a step does, sampling included,
is recorded as a CUDA graph, one for each of a few batch sizes, and replayed; positions, slots and settings live on
the device, so that one graph serves sequences of all lengths; attention reads what is there and no more.

Prefill runs the same layers over the tokens of one sequence, by way of cuBLAS and flash attention. RMSNorm without
weights commutes with a matrix product, so no norm is ever computed by itself: who uses the product divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nanochat.gpt import ANY_LENGTH, GPT, SOFTCAP, Block, GPTConfig, norm, rotary_tables
from nanochat.kernels import sampling
from nanochat.kernels.attention_decode import attend, rope_append
from nanochat.kernels.pointwise import embed, norm_relu2
from nanochat.kernels.row_linear import row_linear
from nanochat.kernels.slc2_decode import slc2_mix, slc2_rows
from nanochat.sampling import SamplingParams

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # of the graphs; others are padded
FEW_ROWS = 4  # up to here our own kernels read the weights faster than cuBLAS
ATTENTION_PROGRAMS = 640  # at least, where the context is full: about five for each multiprocessor
# what the host says of each row before a step, as int32 or the bits of float32
INPUTS = ("token", "slot", "position", "place", "seed", "top_k", "top_p", "temperature", "repetition_penalty")
FLOATS = ("top_p", "temperature", "repetition_penalty")


def supports(config: GPTConfig) -> bool:
    """Whether the kernels have tiles for a model of this shape."""
    D, E = config.head_dim, config.n_embd
    return D >= 16 and D & (D - 1) == 0 and E % 16 == 0 and config.n_kernel > 1


@dataclass
class _Layer:
    """Weights of a block; `state` numbers the layers of its kind."""

    is_attention: bool
    state: int
    mixer_in: Tensor  # q, k, v; or x, B, A, alpha
    mixer_out: Tensor
    conv: Tensor | None
    mlp_in: Tensor
    mlp_out: Tensor


class GraphDecoder:
    """A Decoder (nanochat/decoder.py) for NVIDIA GPUs. On a CPU it runs the same steps, without graphs, for tests."""

    def __init__(self, model: GPT, slots: int):
        c = self.config = model.config
        if not 1 <= slots <= BATCH_SIZES[-1]:
            raise ValueError(f"slots={slots} must be from 1 to {BATCH_SIZES[-1]}")
        self.slots, self.context = slots, c.sequence_len
        self.device, self.dtype = model.device, model.activation_dtype
        self.load(model)
        self.tables = rotary_tables(self.context, c.head_dim, self.device)
        n_attention, n_slc2 = (c.layer_kinds.count(kind) for kind in ("attention", "slc2"))
        rows = slots + 1  # the last is for the rows that a batch is padded with
        kv_shape = (n_attention, rows, c.n_kv_head, self.context, c.head_dim)
        self.k, self.v = (torch.empty(kv_shape, dtype=self.dtype, device=self.device) for _ in "kv")
        self.windows = self._zeros(n_slc2, rows, c.n_kernel - 1, c.n_embd, dtype=self.dtype)
        self.seen = self._zeros(rows, c.vocab_size, dtype=torch.uint8)
        self._logits, self._scores = (self._zeros(slots_up(slots), c.vocab_size) for _ in range(2))
        self.logits = self._logits[:0]

        self._free = list(range(slots))[::-1]
        self._of_slot = np.zeros((len(INPUTS), rows), np.int32)  # the host's own
        self._of_slot[INPUTS.index("slot")] = range(rows)
        self._inputs = self._zeros(len(INPUTS), slots_up(slots), dtype=torch.int32)
        self._next = self._zeros(slots_up(slots), dtype=torch.int32)
        self._pinned_inputs, self._pinned_next = (
            torch.zeros_like(x, device="cpu", pin_memory=self.device.type == "cuda")
            for x in (self._inputs, self._next)
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._set_params(slots, SamplingParams(temperature=0.0))

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    @torch.no_grad()
    def load(self, model: GPT) -> None:
        """Take over the weights of a model."""
        c, counts = self.config, {"attention": 0, "slc2": 0}

        def take(*weights: Tensor) -> Tensor:
            return torch.cat([weight.detach().to(self.dtype) for weight in weights])

        def layer(block: Block, kind: str) -> _Layer:
            mixer = block.attn
            names = ("c_q", "c_k", "c_v") if kind == "attention" else ("x_proj", "B_proj", "A_proj", "alpha_proj")
            counts[kind] += 1
            return _Layer(
                kind == "attention",
                counts[kind] - 1,
                take(*(getattr(mixer, name).weight for name in names)),
                take(mixer.c_proj.weight),
                None if kind == "attention" else mixer.conv1d.weight.detach().float().clone(),
                take(block.mlp.c_fc.weight),
                take(block.mlp.c_proj.weight),
            )

        self.layers = [layer(*pair) for pair in zip(model.transformer.h, c.layer_kinds, strict=True)]
        self.wte, self.head = take(model.transformer.wte.weight), take(model.lm_head.weight)

    # -----------------------------------------------------------------------------------------------------
    # Decoder

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
        start = self._of_slot[INPUTS.index("position"), slot]
        if start + len(tokens) > self.context:
            raise ValueError(f"{len(tokens)} tokens after {start} do not fit a context of {self.context}")
        inputs = torch.tensor([slot, start, *tokens], dtype=torch.int32).to(self.device, non_blocking=True)
        self._trunk(inputs[2:], inputs[:1], inputs[1:2], int(start) + len(tokens), slot)
        self._of_slot[INPUTS.index("position"), slot] += len(tokens)

    @torch.inference_mode()
    def fork(self, slot: int, params: SamplingParams) -> int:
        """See Decoder."""
        copy = self._free.pop()
        self._set_params(copy, params)
        length = self._of_slot[INPUTS.index("position"), slot]
        self._of_slot[INPUTS.index("position"), copy] = length
        for state in (self.k, self.v):
            state[:, copy, :, :length] = state[:, slot, :, :length]
        self.windows[:, copy] = self.windows[:, slot]
        self.seen[copy] = self.seen[slot]
        return copy

    @torch.inference_mode()
    def step(self, last: Mapping[int, int]) -> list[int]:
        """See Decoder; slots may also pause."""
        slots, n = list(last), len(last)
        self._of_slot[INPUTS.index("token"), slots] = list(last.values())
        full = self._of_slot[INPUTS.index("position"), slots] >= self.context
        if full.any():
            raise ValueError(f"{full.sum()} sequences have filled their context of {self.context}")
        B = slots_up(n)
        self._pinned_inputs.numpy()[:, :B] = self._of_slot[:, slots + [self.slots] * (B - n)]
        self._replay(B)
        self._of_slot[INPUTS.index("position"), slots] += 1
        self._of_slot[INPUTS.index("place"), slots] += 1
        self.logits = self._logits[:n]
        return self._pinned_next[:n].tolist()

    def close(self, slot: int) -> None:
        """See Decoder."""
        self._free.append(slot)

    def _set_params(self, slot: int, params: SamplingParams) -> None:
        for row, name in enumerate(INPUTS):
            if name in FLOATS:
                self._of_slot[row, slot] = np.float32(getattr(params, name)).view(np.int32)
            elif name != "slot":
                self._of_slot[row, slot] = np.uint32(getattr(params, name, 0) % 2**32).view(np.int32)

    # -----------------------------------------------------------------------------------------------------
    # The device's part

    def _replay(self, B: int) -> None:
        if self.device.type != "cuda":
            self._step(B)
            return
        if B not in self._graphs:
            self._graphs[B] = self._record(B)
        self._graphs[B].replay()
        torch.cuda.current_stream().synchronize()

    def _record(self, B: int) -> torch.cuda.CUDAGraph:
        """Run a step on padding, so that all is compiled and allocated, then record one."""
        inputs = self._pinned_inputs.clone()
        self._pinned_inputs.numpy()[:] = self._of_slot[:, -1:]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step(B)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(B)
        self._pinned_inputs.copy_(inputs)
        return graph

    def _step(self, B: int) -> None:
        """One token for the first B rows of the inputs: all that a graph records."""
        self._inputs.copy_(self._pinned_inputs, non_blocking=True)
        of = {
            name: row.view(torch.float32)[:B] if name in FLOATS else row[:B]
            for name, row in zip(INPUTS, self._inputs, strict=True)
        }
        x = self._trunk(of["token"], of["slot"], of["position"])
        logits = self._logits[:B]
        if B <= FEW_ROWS:
            row_linear(x, self.head, logits, norm=True)
        elif self.dtype == torch.float32:
            torch.mm(norm(x), self.head.T, out=logits)
        else:
            torch.mm(norm(x), self.head.T, torch.float32, out=logits)
        blocks = -(-self.config.vocab_size // sampling.BLOCK)
        best, winner = (torch.empty(B, blocks, dtype=d, device=self.device) for d in (torch.float32, torch.int32))
        buffers = (self._scores, best, winner)
        sampling.sample_rows(logits, self.seen, of["slot"], of, buffers, self._next[:B], SOFTCAP)
        self._pinned_next.copy_(self._next, non_blocking=True)

    def _trunk(
        self, tokens: Tensor, slots: Tensor, positions: Tensor, end: int = 0, slot: int | None = None
    ) -> Tensor:
        """Residual stream (R,E) after the last layer: a token of each slot, or, for a prefill, many of one slot.

        tokens (R,), slots and positions (len(slots),) int32; a prefill reaches `end` in `slot`.
        """
        c = self.config
        R, is_prefill = len(tokens), slot is not None
        x = torch.empty(R, c.n_embd, dtype=self.dtype, device=self.device)
        embed(tokens, self.wte, slots, self.seen, x)
        y = torch.empty_like(x)
        for layer in self.layers:
            if not layer.is_attention:
                self._slc2(layer, x, slots, y)
            else:
                k, v = self.k[layer.state], self.v[layer.state]
                q = y.new_empty(R, c.n_head, c.head_dim)
                packed = self._product(x, layer.mixer_in)
                rope_append(packed, x, self.tables, slots, positions, q, k, v)
                if is_prefill:
                    y = _causal_attention(q, k[slot, :, :end], v[slot, :, :end]).reshape(R, -1)
                else:
                    splits = max(1, min(32, ATTENTION_PROGRAMS // (R * c.n_kv_head)))
                    attend(q, k, v, slots, positions, y.view_as(q), splits)
            self._add(x, y, layer.mixer_out)
            self._mlp(layer, x)
        return x

    def _slc2(self, layer: _Layer, x: Tensor, slots: Tensor, y: Tensor) -> None:
        windows = self.windows[layer.state]
        if len(x) <= FEW_ROWS and len(x) == len(slots):
            slc2_rows(x, layer.mixer_in, layer.conv, windows, slots, y)
        else:
            slc2_mix(x @ layer.mixer_in.T, x, layer.conv, windows, slots, y)

    def _mlp(self, layer: _Layer, x: Tensor) -> None:
        if len(x) <= FEW_ROWS:
            h = x.new_empty(len(x), len(layer.mlp_in))
            row_linear(x, layer.mlp_in, h, norm=True, relu2=True)
        else:
            h = x @ layer.mlp_in.T
            norm_relu2(h, x)
        self._add(x, h, layer.mlp_out)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return x @ weight.T
        y = x.new_empty(len(x), len(weight))
        row_linear(x, weight, y)
        return y

    def _add(self, x: Tensor, y: Tensor, weight: Tensor) -> None:
        """x += y W^T, in place."""
        if len(x) <= FEW_ROWS:
            row_linear(y, weight, x, add=True)
        else:
            x.addmm_(y, weight.T)


def slots_up(n: int) -> int:
    """The size of the graph that n rows run in."""
    return next(size for size in BATCH_SIZES if size >= n)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (T,H,D) of the last T of all tokens; q (T,H,D), k and v (H_kv,S,D)."""
    T, S = q.size(0), k.size(1)
    mask = None if T == S else causal_lower_right(T, S)
    with sdpa_kernel(ANY_LENGTH):
        y = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=T == S, enable_gqa=q.size(1) != len(k)
        )
    return y[0].transpose(0, 1)
