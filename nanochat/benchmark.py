"""What the benchmarks share: weights that are not zero, and times that mean something."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from nanochat.gpt import GPT


@torch.no_grad()
def fill_zero_weights(model: GPT) -> None:
    """Give random values to the weights that training starts from zero: products with zeros run faster."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=parameter.size(-1) ** -0.5)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of an action that has run before."""
    taken = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return median(taken)
