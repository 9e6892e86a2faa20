"""Compare every layer of a GraphDecoder with the plain model: see nanochat/layer_check.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from nanochat.decode.graph_decoder import GraphDecoder
from nanochat.decode.graph_model import Batch, KernelModel
from nanochat.gpt import ANY_LENGTH, GPT
from nanochat.layer_check import BOUNDS, noise, noise_for_zeros, require_same
from nanochat.layers import norm
from nanochat.ops import PLAIN, embed, join

PREFIX = 16  # tokens of the prefill
SCALE = 2.0**-6  # of the residual stream: rounding the sum must not hide what a layer adds to it


@torch.no_grad()
def check_decoder(decoder: GraphDecoder, model: GPT) -> None:
    """Raise ValueError for the first layer whose decoding kernels differ from the plain layer.

    A prefill, the next token of one sequence and the next tokens of two take different kernels: all are
    compared. For a decoder that serves no sequence yet; its state is scratch memory here.
    """
    with noise_for_zeros(model) as has_noise, sdpa_kernel(ANY_LENGTH):
        if has_noise:
            decoder.load(model)
        _check_layers(decoder.model, model)
    if has_noise:
        decoder.load(model)


def _check_layers(kernels: KernelModel, model: GPT) -> None:
    c = model.config
    T = max(2, min(PREFIX + 1, len(kernels.slots.rotary[0])))
    rotary = tuple(table[:T] for table in kernels.slots.rotary)
    x, x0 = SCALE * noise(model, T, c.n_embd), noise(model, T, c.n_embd, seed=1)
    tokens = torch.arange(T, dtype=torch.int32, device=model.device) * 7 % c.vocab_size

    def check(name: str, plain: Tensor, x: Tensor, add: Callable[..., object]) -> None:
        fast = _decoded(kernels, add, x, x0, tokens)
        expected = [plain[:-1], plain[-1:], plain[[-1, -1]]]
        bound = BOUNDS[x.dtype]
        require_same(name, fast, expected, bound, "the decoding kernels", "decode with --decoder=plain")

    no_states = [None] * c.n_layer
    embedding = embed(tokens[None], model.transformer.wte.weight, x.dtype)
    first, _ = join(embedding, torch.zeros_like(embedding), model.links(embedding, no_states)[0])
    check("the embedding", first[0], torch.zeros_like(x), lambda x, batch: x.copy_(kernels.embed(batch)))
    links = model.links(x0[None], no_states)[1:]
    for i, (block, layer, link) in enumerate(zip(model.blocks, kernels.layers, links, strict=True)):
        mixed = _plain_mixer(model, i, x, tokens, rotary)
        check(f"layer {i} ({c.layer_kinds[i]})", mixed, x, partial(kernels.add_mixer, layer=layer))
        joined, _ = join(x[None], block.mlp(norm(x)[None]), link)
        check(f"layer {i} (MLP)", joined[0] - x, x, partial(kernels.add_mlp, layer=layer))


def _plain_mixer(model: GPT, i: int, x: Tensor, tokens: Tensor, rotary: tuple[Tensor, ...]) -> Tensor:
    """Return what the mixer of layer i adds to x (T,E)."""
    h, mixer = norm(x)[None], model.blocks[i].attn
    if model.config.layer_kinds[i] != "attention":
        return mixer(h)[0]
    return mixer(h, *rotary, model.value_embeds(tokens[None], PLAIN)[i])[0]


def _decoded(
    kernels: KernelModel, add: Callable[..., object], x: Tensor, x0: Tensor, tokens: Tensor
) -> list[Tensor]:
    """Return what is added to x[:-1] in a prefill, to x[-1] after it, and to x[-1] in two sequences."""
    state = kernels.slots
    first, second = 0, len(state.latest) - 1  # the second is the one that batches are padded with
    P = len(x) - 1

    def run(rows: slice | list[int], slots: list[int], position: int, count: int, tails=None) -> Tensor:
        total, n = x[rows].clone(), len(slots)
        inputs = torch.tensor([slots, [position] * n, [count] * n], dtype=torch.int32, device=x.device)
        add(total, batch=Batch(tokens[rows], inputs[0], inputs[1], inputs[2], tails, x0[rows]))
        return total - x[rows]

    def prefill(slot: int) -> Tensor:
        state.reset(slot)
        tails = state.new_tails() if P > 1 else None
        added = run(slice(P), [slot], 0, P, tails)
        if tails is not None:
            state.store(torch.tensor([slot], device=x.device), tails)
        return added

    prefilled = prefill(first)
    one = run([-1], [first], P, 1)
    for slot in (first, second):
        prefill(slot)
    two = run([-1, -1], [first, second], P, 1)
    for slot in (first, second):
        state.reset(slot)
    return [prefilled, one, two]
