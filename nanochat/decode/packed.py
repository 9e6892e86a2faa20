"""The weights of a model as the decoding kernels read them.

They are cast once, and those that share an input are packed into one matrix. Taps and scales stay float32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, Block
from nanochat.slc2 import SLC2


@dataclass
class Layer:
    """Weights of a block; None: this kind of layer, or the model, has none."""

    index: int
    state: int  # its number among the layers of its kind
    mixer_in: Tensor  # q, k, v or x, B, A, alpha, and rows of zeros
    mixer_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor
    conv: Tensor | None = None  # taps of SLC2; None: attention
    k_conv: Tensor | None = None  # taps of the second generation's convolutions (K,C)
    y_conv: Tensor | None = None
    mlp_conv: Tensor | None = None
    value_gate: Tensor | None = None
    value_table: Tensor | None = None  # (V, H_kv*D), with the row stride of all tables
    next_scales: Tensor | None = None  # of stream and embedding, before the next layer (2,)


class PackedWeights:
    """Copies of a model's weights, as tensors that never move."""

    def __init__(self, model: GPT, dtype: torch.dtype):
        self.config, self.device, self.dtype = model.config, model.device, dtype
        self._tensors = _pack(model, dtype)
        self.wte, self.head = self._tensors["wte"], self._tensors["head"]
        self.scales = self._tensors.get("scales")  # of stream and embedding, before each layer (L,2)
        seen = Counter[str]()
        self.layers = []
        for index, kind in enumerate(self.config.layer_kinds):
            self.layers.append(self._layer(index, seen[kind]))
            seen[kind] += 1

    @torch.no_grad()
    def load(self, model: GPT) -> None:
        """Copy the weights of a model of the same shape, in place, so that recorded graphs use them."""
        for name, weight in _pack(model, self.dtype).items():
            self._tensors[name].copy_(weight)

    def _layer(self, index: int, state: int) -> Layer:
        prefix, width = f"{index}.", self.config.n_kv_head * self.config.head_dim
        own = {name.removeprefix(prefix): t for name, t in self._tensors.items() if name.startswith(prefix)}
        if "value_gate" in own:
            own["value_table"] = self._tensors["values"].narrow(1, state * width, width)
        if self.scales is not None and index + 1 < self.config.n_layer:
            own["next_scales"] = self.scales[index + 1]
        return Layer(index, state, **own)


def _pack(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies: wte, head, values, scales and, after a layer's number and a dot, the fields of Layer."""
    transformer = model.transformer
    packed = {"wte": _cast([transformer.wte.weight], dtype), "head": _cast([model.lm_head.weight], dtype)}
    if transformer.value_embeds is not None:
        packed["values"] = _cast([transformer.value_embeds.weight], dtype)
    if transformer.resid_scales is not None and transformer.x0_scales is not None:
        packed["scales"] = torch.stack([transformer.resid_scales, transformer.x0_scales], 1).detach().float()
    for index, block in enumerate(model.blocks):
        packed |= {f"{index}.{name}": weight for name, weight in _pack_block(block, dtype).items()}
    return packed


def _pack_block(block: Block, dtype: torch.dtype) -> dict[str, Tensor]:
    mixer, mlp = block.attn, block.mlp
    if isinstance(mixer, SLC2):
        inputs = [mixer.x_proj, mixer.B_proj, mixer.A_proj, mixer.alpha_proj]
        convs, gate = {}, None
    else:
        inputs = [mixer.c_q, mixer.c_k, mixer.c_v]
        convs, gate = {"k_conv": mixer.k_conv, "y_conv": mixer.y_conv}, mixer.value_gate
    mixer_in = _cast([layer.weight for layer in inputs], dtype)
    packed = {"mixer_in": F.pad(mixer_in, (0, 0, 0, -len(mixer_in) % 64))}  # cuBLAS is slow with odd sizes
    outputs = {"mixer_out": mixer.c_proj, "mlp_in": mlp.c_fc, "mlp_out": mlp.c_proj}
    packed |= {name: _cast([layer.weight], dtype) for name, layer in outputs.items()}
    if isinstance(mixer, SLC2):
        packed["conv"] = _cast([mixer.conv1d.weight], torch.float32)
    for name, conv in {**convs, "mlp_conv": mlp.conv}.items():
        if conv is not None:
            packed[name] = _cast([conv.weight[:, 0].T], torch.float32)
    if gate is not None:
        packed["value_gate"] = _cast([gate.weight], dtype)
    return packed


def _cast(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return one copy of several weights, one below the other."""
    return torch.cat([weight.detach().to(dtype) for weight in weights])
