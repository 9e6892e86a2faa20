"""Compare every layer of a GraphDecoder with the plain model: see nanochat/layer_check.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from nanochat.attention import rotary_tables
from nanochat.decode.graph_decoder import GraphDecoder
from nanochat.decode.graph_model import KernelModel, Layer
from nanochat.gpt import ANY_LENGTH, GPT, Block
from nanochat.layer_check import BOUNDS, noise, noise_for_zeros, require_same
from nanochat.layers import norm

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
    T = max(2, min(PREFIX + 1, kernels.context))
    x = SCALE * noise(model, T, c.n_embd)
    cos, sin = (table[:T] for table in rotary_tables(kernels.context, c.head_dim, model.device))
    for i, (block, layer) in enumerate(zip(model.blocks, kernels.layers, strict=True)):
        name, plain = f"layer {i} ({c.layer_kinds[i]})", _plain_mixer(block, x, cos, sin)
        _require(name, _decoded_mixer(kernels, layer, x), [plain[:-1], plain[-1:], plain[[-1, -1]]])
        plain = block.mlp(norm(x))
        _require(
            f"layer {i} (MLP)",
            [_mlp(kernels, layer, x[-n:]) for n in (T, 1, 2)],
            [plain, plain[-1:], plain[-2:]],
        )


def _plain_mixer(block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    h = norm(x)[None]
    return (block.attn(h, cos, sin) if block.is_attention else block.attn(h))[0]


def _mlp(kernels: KernelModel, layer: Layer, x: Tensor) -> Tensor:
    total = x.clone()
    kernels.add_mlp(total, layer)
    return total - x


def _decoded_mixer(kernels: KernelModel, layer: Layer, x: Tensor) -> list[Tensor]:
    """Return what the mixer adds to x[:-1] in a prefill, to x[-1] after it, and to x[-1] in two sequences."""
    first, second = 0, len(kernels.latest) - 1  # the second is the one that batches are padded with
    P = len(x) - 1

    def add(x: Tensor, slots: list[int], position: int, count: int, tails: Tensor | None = None) -> Tensor:
        total, n = x.clone(), len(slots)
        inputs = torch.tensor([slots, [position] * n, [count] * n], dtype=torch.int32, device=x.device)
        kernels.add_mixer(total, layer, inputs[0], inputs[1], inputs[2], tails)
        return total - x

    def prefill(slot: int) -> Tensor:
        kernels.windows[:, slot] = 0
        tails = torch.zeros_like(kernels.windows[:, :1])
        added = add(x[:P], [slot], 0, P, tails)
        kernels.windows[:, slot] = tails[:, 0]
        return added

    prefilled = prefill(first)
    one = add(x[-1:], [first], P, 1)
    for slot in (first, second):
        prefill(slot)
    two = add(x[[-1, -1]], [first, second], P, 1)
    kernels.windows.zero_()
    return [prefilled, one, two]


def _require(layer: str, fast: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    bound = BOUNDS[plain[0].dtype]
    require_same(layer, fast, plain, bound, "the decoding kernels", "decode with --decoder=plain")
