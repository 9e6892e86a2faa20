"""Helpers of the benchmarks: nonzero weights, and timing that waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from nanochat.gpt import GPT


@torch.no_grad()
def fill_zero_weights(model: GPT) -> None:
    """Fill the weights that are initialized to zero with random values: products with zeros run faster."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=parameter.size(-1) ** -0.5)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of an action in seconds; run it once before, to warm up."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times)
