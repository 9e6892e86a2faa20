"""Compare the modeling file that is exported with the plain model: see nanochat/layer_check.py."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from nanochat.attention import rotary_tables
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.layer_check import BOUNDS, noise, noise_for_zeros, require_same
from nanochat.layers import norm
from nanochat.ops import Link, join

logger = logging.getLogger(__name__)
TOKENS = 8
HEAD_DIM = 16  # the gate of value embeddings reads 12 channels, also of a model with one head
WAY_OUT = "export with the version of this project that trained the model"


def check_exported_code(config: GPTConfig) -> None:
    """Raise ValueError if the exported file computes a layer, the logits or a continuation unlike GPT.

    The code is compared on a narrow model with the layer plan of config; its weights are noise. Where
    transformers is not installed nothing can be compared, and a warning says so.
    """
    if find_spec("transformers") is None:
        logger.warning("warning: transformers is missing: the exported code is not compared with the model")
        return
    from nanochat.hub.transformers_model.configuration_saint_iberis import SaintIberisConfig
    from nanochat.hub.transformers_model.modeling_saint_iberis import SaintIberisForCausalLM, rotary_angles

    narrow = replace(config, n_embd=HEAD_DIM * config.n_head, vocab_size=64, sequence_len=TOKENS)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = GPT(narrow)
        for parameter in plain.parameters():
            parameter.zero_()
        exported = SaintIberisForCausalLM(SaintIberisConfig(**asdict(narrow))).eval()
        with noise_for_zeros(plain):
            exported.load_state_dict(plain.state_dict())
            x, x0 = (noise(plain, 1, TOKENS, narrow.n_embd, seed=seed) for seed in range(2))
            values = noise(plain, 1, TOKENS, narrow.n_kv_head * HEAD_DIM, seed=2)
            h, nothing = norm(x), torch.zeros_like(x)
            tables = rotary_tables(TOKENS, HEAD_DIM, plain.device)
            angles = rotary_angles(torch.arange(TOKENS)[None], HEAD_DIM)
            links = plain.links(x0, [None] * narrow.n_layer)
            pairs = zip(exported.transformer.h, plain.blocks, narrow.layer_kinds, strict=True)
            for i, (theirs, ours, kind) in enumerate(pairs):
                mix, after = links[i].mix, Link(links[i + 1].conv)
                attn, mlp = theirs.get_submodule("attn"), theirs.get_submodule("mlp")
                if ours.is_attention:
                    mixed = attn(h, *angles, values, None, None, None), ours.attn(h, *tables, values)
                else:
                    mixed = attn(h, None, None), ours.attn(h)
                _require(f"layer {i} ({kind})", *mixed)
                _require(f"layer {i} (MLP)", mlp(h, None, None), join(nothing, ours.mlp(h), after)[0])
                scales = None if mix is None else torch.cat(mix[:2])
                whole = theirs(x, x0, scales, values, *angles, None, None)
                stream, delta = ours(x, nothing, Link(mix=mix), tables, values)
                _require(f"layer {i} (residual stream)", whole, join(stream, delta, after)[0])
            ids = torch.arange(TOKENS)[None] * 7 % narrow.vocab_size
            expected = plain(ids)
            _require("the logits", exported(ids).logits, expected)
            _, cache = exported(ids[:, :3], return_dict=False)
            _require("decoding", exported(ids[:, 3:], cache=cache).logits, expected[:, 3:])


def _require(layer: str, exported: Tensor, plain: Tensor) -> None:
    require_same(layer, [exported], [plain], BOUNDS[plain.dtype], "the exported file", WAY_OUT)
