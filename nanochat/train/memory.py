"""Estimate the memory of training from shapes, and derive the number of sequences of a forward.

Estimated and measured GiB for 32 x 2,048 tokens: without the training kernels 29.3 and 29.3 at d12, 67.6 and
67.3 at d20 (vocabulary 32,768); with them 16.5 and 16.1, 41.4 and 40.2 (vocabulary 65,536). The second
generation with them: 20.1 and 19.6 at d12 (vocabulary 32,768), 57.6 and 55.4 at d20 (65,536).
"""

from __future__ import annotations

import math

import torch

from nanochat.common import Runtime
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.hardware import has_large_tiles
from nanochat.train.accelerate import uses_kernels
from nanochat.train.chunked_loss import CHUNK_BYTES

MAX_ROWS = 32  # of a forward: more rows do not raise the utilisation of any GPU
SPARE = 0.92  # share of the free memory; allocator, libraries and workspaces need the rest


def training_bytes(
    config: GPTConfig, rows: int, *, checkpointing: bool, fused: bool = True, fused_mlp: bool = True
) -> int:
    """Return the peak bytes of training with `rows` sequences a forward, bfloat16 on CUDA.

    fused: the training kernels are used; fused_mlp: also those of the MLP.
    """
    E, V, tokens = config.n_embd, config.vocab_size, rows * config.sequence_len
    # by layer: weights in float32, gradients, one running mean, bfloat16 copies of weights and gradients
    matrices = {"attention": 12 * E * E, "slc2": 11 * E * E + E * (config.head_dim + config.n_head)}
    weights = sum(matrices[kind] for kind in config.layer_kinds) * 16 + 2 * V * E * 20
    n_attention, width = config.layer_kinds.count("attention"), config.n_kv_head * config.head_dim
    tables = n_attention * width if config.value_embeds else 0  # channels of value embeddings
    weights += V * tables * 18
    # bytes a layer keeps for each token: residual stream, norms, projections, mixer, hidden layer
    kept = {"attention": 20 * E, "slc2": 18 * E + 2 * config.head_dim}
    if config.residual_conv:  # inputs of the convolutions: MLP's output; keys and attention's output
        kept = {"attention": kept["attention"] + 4 * E + 2 * width, "slc2": kept["slc2"] + 2 * E}
    if not fused_mlp:
        kept = {kind: size + 8 * E for kind, size in kept.items()}  # the hidden layer before relu^2
    layers = [(kept[kind] if fused else 33 * E) * tokens for kind in config.layer_kinds]
    activations = max(layers) + len(layers) * 4 * E * tokens if checkpointing else sum(layers)
    # logits: one chunk of them; without the kernels all tokens, twice
    head = min(CHUNK_BYTES["cuda"], 2 * V * tokens) if fused else 4 * V * tokens
    return weights + activations + head + 8 * V * E + (8 * E + 2 * tables) * tokens


def fit(config: GPTConfig, free_bytes: int, **kernels: bool) -> tuple[int, bool]:
    """Return the rows of a forward, a power of two up to 32, and whether to recompute activations.

    Activations are recomputed only if not even one row fits otherwise. Raise ValueError if one row does not
    fit even so. kernels: the keyword arguments of training_bytes.
    """
    for checkpointing in (False, True):
        rows = MAX_ROWS
        while rows:
            if training_bytes(config, rows, checkpointing=checkpointing, **kernels) <= SPARE * free_bytes:
                return rows, checkpointing
            rows //= 2
    needed = training_bytes(config, 1, checkpointing=True, **kernels) / SPARE
    raise ValueError(
        f"training {config.n_layer} layers on sequences of {config.sequence_len} takes about "
        f"{needed / 2**30:.1f} GiB, {free_bytes / 2**30:.1f} GiB are free: "
        "lower depth or max_seq_len, or set device_batch_size to try anyway"
    )


def choose_rows(asked: int, model: GPT, rows_per_step: int, runtime: Runtime, *, fused: bool | None) -> int:
    """Return the rows of a forward: `asked`, or, if that is 0, as many as fit and divide a step evenly.

    Make the model recompute activations (checkpoints_activations) if it must. Without CUDA at most 32 rows.
    fused: whether the kernels will be used; None: where they run.
    """
    if asked:
        return asked
    rows = MAX_ROWS
    if runtime.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runtime.device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(runtime.device)
        free = min(free + torch.cuda.memory_reserved(runtime.device), allowed)
        free *= torch.bfloat16.itemsize / model.activation_dtype.itemsize  # activations are most of it
        kernels = {"fused": uses_kernels(fused, model), "fused_mlp": has_large_tiles(runtime.device)}
        rows, model.checkpoints_activations = fit(model.config, round(free), **kernels)
    return math.gcd(min(runtime.gather(rows)), max(1, rows_per_step // runtime.world_size))
