"""Ranks that add something up and say how fast: what the doctor starts under torchrun."""

import sys
import time

import torch

from nanochat.common import run, setup_runtime

N_FLOATS, REPEATS = 2**24, 10  # 64 MiB


def main() -> int:
    """Sum over all ranks; ValueError unless the sum is right."""
    runtime = setup_runtime(sys.argv[1])
    value = torch.ones(N_FLOATS, device=runtime.device)
    runtime.sum_(value)
    if not (value == runtime.world_size).all():
        raise ValueError(f"the sum of ones over {runtime.world_size} ranks is {value.min()} to {value.max()}")
    runtime.gather(None)
    began = time.perf_counter()
    for _ in range(REPEATS):
        runtime.sum_(value.fill_(1))
    value[0].item()
    seconds = (time.perf_counter() - began) / REPEATS
    if runtime.is_main:
        n_bytes = 2 * (runtime.world_size - 1) / runtime.world_size * 4 * N_FLOATS  # that each rank sends
        sys.stdout.write(f"{runtime.world_size} ranks, all-reduce at {n_bytes / seconds / 1e9:.1f} GB/s\n")
    return 0


if __name__ == "__main__":
    run(main)
