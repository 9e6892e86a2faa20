"""Time training on this machine: one JSON line.

    python -m scripts.bench_train                        # d20, 8 micro-batches of 32 x 2,048 tokens a step
    python -m scripts.bench_train --depth=12 --fp8 --num-iterations=5
    python -m scripts.bench_train --device-batch-size=4 --memory-gib=24
    python -m scripts.bench_train --recipe=saint_iberis_2

It takes the trainer's settings and runs its loop, on random tokens and weights of which none is zero. Speeds
are medians over steps. `parts` are milliseconds of a micro-batch by kind of kernel, from the profiler, and
`attention` lists the attention kernels; on Hopper they must be cuDNN's, the fastest there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from nanochat.common import Runtime, parse, require_at_least, run, setup_runtime
from nanochat.optim.schedule import Cadence
from nanochat.train.base import BaseTrainConfig, build_model, make_plan, with_recipe, with_rows

if TYPE_CHECKING:
    import torch

    from nanochat.gpt import GPT

PARTS = (  # the first pattern that matches a kernel's name counts
    ("attention", "sdpa|flash|fmha|cudnn::fusion"),
    ("slc2", "^_slc2"),
    ("rope", "^_rope"),
    ("residual_conv", "^_residual_conv"),
    ("join", "^_join|^_share"),
    ("look_up", "^_look_up|^_sum_(tiles|ids)"),
    ("cross_entropy", "cross_entropy|log_softmax|nll_loss"),
    ("mlp_product", "^_linear_relu2"),
    ("transpose", "^_transpose"),
    ("product", "gemm|nvjet|cutlass|xmma|splitK"),
    ("compiled", "^triton_"),
)


@dataclass(frozen=True, kw_only=True)
class BenchTrainConfig(BaseTrainConfig):
    """The trainer's settings, and those of the benchmark."""

    vocab_size: int = 65_536
    """number of tokens"""
    num_iterations: int = 8
    """optimizer steps to time, after two that warm up"""
    memory_gib: float = 0.0
    """memory to use at most, as on a smaller card; 0: all"""
    kernels: int = 0
    """number of the slowest kernels to list"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, vocab_size=1, num_iterations=1)


def random_batches(config: BenchTrainConfig, device: torch.device) -> Iterator[tuple]:
    """Yield random batches in the form of a loader's."""
    import torch

    shape = (config.device_batch_size, config.max_seq_len + 1)
    while True:
        tokens = torch.randint(0, config.vocab_size, shape, device=device)
        yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), {}


def kernel_times(action: Callable[[], object]) -> Counter[str]:
    """Return the milliseconds of each kernel that an action launches on the GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    return Counter({event.key: event.self_device_time_total / 1e3 for event in profiler.key_averages()})


def by_part(kernels: Counter[str]) -> Counter[str]:
    """Sum the times of kernels by kind."""
    parts: Counter[str] = Counter()
    for name, milliseconds in kernels.items():
        part = next((part for part, pattern in PARTS if re.search(pattern, name)), "other")
        parts[part] += milliseconds
    return parts


def profile_on_gpu(
    model: GPT, optimizer: torch.optim.Optimizer, batch: tuple, n_kernels: int
) -> dict[str, Any]:
    """Return times of a micro-batch and an optimizer step; RuntimeError if attention is not the fastest."""
    import torch

    inputs, targets, _ = batch

    def micro_batch() -> None:
        model(inputs, targets, loss_reduction="sum").backward()

    micro_batch()  # the profiled one adds its gradients to those of another, like most of a step
    kernels = kernel_times(micro_batch)
    attention = sorted(name for name in kernels if re.search(dict(PARTS)["attention"], name))
    if torch.cuda.get_device_capability() == (9, 0) and not all("cudnn" in name for name in attention):
        raise RuntimeError(f"attention runs as {attention}, not as cuDNN's, which is faster on this card")
    return {
        "micro_batch_ms": round(kernels.total(), 2),
        "optimizer_ms": round(kernel_times(optimizer.step).total(), 2),
        "parts": {name: round(ms, 2) for name, ms in by_part(kernels).most_common()},
        "attention": attention,
        "kernels": [(name[:90], round(ms, 2)) for name, ms in kernels.most_common(n_kernels)],
    }


def measure(config: BenchTrainConfig, runtime: Runtime) -> dict[str, Any]:
    """Train for some steps; return speeds, memory and, on a GPU, the times of kernels."""
    import torch

    from nanochat.benchmark import fill_zero_weights
    from nanochat.optim.muon_adamw import build_optimizer
    from nanochat.train.accelerate import accelerate, uses_kernels
    from nanochat.train.loop import train
    from nanochat.train.run import DryRun

    model = build_model(config, config.vocab_size, runtime)
    fill_zero_weights(model)
    config = with_rows(config, model, runtime)
    cadence = Cadence(eval_every=0, sample_every=0, save_every=0, log_every=1)
    config = replace(config, num_iterations=config.num_iterations + 2, cadence=cadence)
    plan = make_plan(config, model, runtime)
    optimizer = build_optimizer(model, config.optimizer, runtime)
    accelerate(model, compile=runtime.compiles(config.compile), fused=config.fused, fp8=config.fp8)
    batches = random_batches(config, runtime.device)
    dry_run = DryRun(model=model, optimizer=optimizer, runtime=runtime, config=config)
    train(dry_run, batches, plan, evaluate=lambda: 0.0, sample=lambda: None)
    first, _, *steps = [record for record in dry_run.records if "seconds" in record]
    seconds = median(record["seconds"] for record in steps)
    result = {
        "tokens_per_second": round(plan.tokens_per_step / seconds),
        "mfu": steps[0]["mfu"] and round(median(record["mfu"] for record in steps), 4),
        "step_ms": round(1e3 * seconds, 1),
        "first_step_seconds": round(first["seconds"], 1),
        "device_batch_size": config.device_batch_size,
        "checkpoints_activations": model.checkpoints_activations,
        "fused": uses_kernels(config.fused, model),
        "accumulation": plan.accumulation,
    }
    if runtime.device.type == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        result |= profile_on_gpu(model, optimizer, next(batches), config.kernels)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    config = parse(BenchTrainConfig, argv, None, with_recipe(BenchTrainConfig, argv))
    runtime = setup_runtime(config.device_type, config.dtype, trains=True)
    import torch

    from nanochat.hardware import describe

    if config.memory_gib:
        if runtime.device.type != "cuda":
            raise ValueError(
                f"memory_gib={config.memory_gib} is for CUDA devices, this one is {runtime.device}"
            )
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        torch.cuda.set_per_process_memory_fraction(config.memory_gib * 2**30 / total)
    result = measure(config, runtime)
    names = ("recipe", "depth", "slc_rate", "max_seq_len", "vocab_size", "compile", "fp8")
    settings = {name: getattr(config, name) for name in names}
    print(json.dumps({**result, **settings, **describe(runtime.device)}))
    return 0


if __name__ == "__main__":
    run(main)
