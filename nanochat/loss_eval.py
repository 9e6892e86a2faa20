"""Bits per byte: a loss that does not depend on the tokenizer's vocabulary.

The total loss of the target tokens in nats, divided by ln 2 and by the number of bytes that these tokens
encode. Special tokens, which encode no text, and ignored targets (-1) do not count.
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
    """Return the bits per byte of the first `steps` batches (None: all), over all ranks.

    batches: tuples that start with inputs and targets, (B,T) int64 each, on any device. token_bytes (V,): the
    length of each token in bytes, 0 for special tokens. Raise ValueError if no target counts.
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
        raise ValueError(
            "no text to evaluate: the batches contain only ignored targets and special tokens; use more text"
        )
    return nats / math.log(2) / n_bytes
