"""Bits per byte: a loss that does not depend on the tokenizer's vocabulary.

The nats of all target tokens, over ln 2 and over the bytes that those tokens stand for. Special tokens stand
for no text: neither their nats nor any bytes of theirs are counted, nor are ignored targets (-1).
"""

import math
from collections.abc import Iterable
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.gpt import GPT


@torch.no_grad()
def evaluate_bpb(model: GPT, batches: Iterable[tuple], steps: int | None, token_bytes: Tensor) -> float:
    """Bits per byte of the first `steps` batches (None: all), summed over all ranks.

    A batch starts with inputs and targets, (B,T) int64 each, on any device; token_bytes (V,) holds the bytes
    of each token, 0 for special ones. Raises ValueError when nothing was counted.
    """
    token_bytes = token_bytes.to(model.device)
    dtype = torch.float32 if model.device.type == "mps" else torch.float64  # MPS has no float64
    totals = torch.zeros(2, dtype=dtype, device=model.device)  # nats, bytes
    for inputs, targets, *_ in islice(batches, steps):
        inputs, targets = inputs.to(model.device), targets.to(model.device)
        nats = model(inputs, targets, loss_reduction="none")
        n_bytes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0).flatten()
        totals += torch.stack([(nats * (n_bytes > 0)).sum(), n_bytes.sum()])
    if dist.is_initialized():
        dist.all_reduce(totals)
    nats, n_bytes = totals.tolist()
    if n_bytes == 0:
        raise ValueError("no text to evaluate: the batches hold only ignored targets and special tokens")
    return nats / math.log(2) / n_bytes
