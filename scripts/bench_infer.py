"""Time prefill and decoding on this machine: one JSON line for each batch size and context.

    python -m scripts.bench_infer                                 # d20, random weights
    python -m scripts.bench_infer --depth=12 --batch-sizes 1 8 --decoder=plain

Every sequence of a batch has `context` tokens after the last step. `prefill_ms` is the forward over a prompt
of that length, `first_token_ms` the time from a prompt to its first new token. `floor_share` is the time in
which the card copies as many bytes as a step must read (measured here, too), divided by the time of a step.
All times are medians, measured as the server decodes: every token reaches the host, after the next step was
launched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from nanochat.common import DType, parse, run, setup_runtime
from nanochat.decode import DecoderKind
from nanochat.recipes import SAINT_IBERIS, find_recipe

if TYPE_CHECKING:
    import torch

    from nanochat.decode.decoder import Decoder
    from nanochat.gpt import GPT, GPTConfig


UNTIMED = 3  # steps to record a graph and warm up


@dataclass(frozen=True, kw_only=True)
class BenchInferConfig:
    depth: int = 20
    """Size of the model, which has random weights."""
    vocab_size: int = 65_536
    """Number of tokens."""
    slc_rate: int = 3
    """Layer i is attention if i % slc_rate == 1 or if it is the last; 0: all layers are."""
    recipe: str = SAINT_IBERIS.name
    """saint_iberis (published) or saint_iberis_2 (second generation): what the model is made of."""
    batch_sizes: tuple[int, ...] = (1, 8, 32, 128)
    """Sequences decoded at once."""
    contexts: tuple[int, ...] = (512, 2048)
    """Tokens of a sequence after the last step."""
    steps: int = 64
    """Steps to time for each batch size and context."""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Sample from the likeliest k tokens only; 0: from all."""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available."""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""

    def __post_init__(self) -> None:
        find_recipe(self.recipe)
        for name in ("depth", "steps", *(("batch_sizes", "contexts"))):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if min(self.contexts) <= self.steps + UNTIMED:
            raise ValueError(
                f"contexts={self.contexts} must be more than {self.steps + UNTIMED} tokens each: steps="
                f"{self.steps} and {UNTIMED} more that are not timed, after a prompt"
            )


def random_model(config: GPTConfig, device: torch.device) -> GPT:
    """Return a model in eval mode without zero weights."""
    import torch

    from nanochat.benchmark import fill_zero_weights
    from nanochat.gpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    fill_zero_weights(model)
    return model.eval()


def copy_bandwidth(device: torch.device) -> float:
    """Return how many bytes a second a large copy reads and writes."""
    import torch

    from nanochat.benchmark import seconds

    source = torch.empty(1 << (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 20)


def step_bytes(model: GPT, batch_size: int, context: int) -> int:
    """Return the bytes that a step must read: weights without tables by token, state of each sequence."""
    from nanochat.cache import state_bytes

    state = state_bytes(model.config, model.activation_dtype)
    weights = model.num_scaling_parameters() - model.transformer.wte.weight.numel()
    return weights * model.activation_dtype.itemsize + batch_size * (
        context * state["per_token"] + state["per_sequence"]
    )


def measure(decoder: Decoder, config: BenchInferConfig, batch_size: int, context: int) -> dict[str, float]:
    """Return prefill and decode times in milliseconds."""
    import torch

    from nanochat.benchmark import seconds
    from nanochat.sampling import SamplingParams

    device, vocab_size = decoder.device, config.vocab_size
    params = SamplingParams(temperature=config.temperature, top_k=config.top_k, seed=0)
    prompt = torch.randint(0, vocab_size, (context,)).tolist()

    def prefill() -> None:
        slot = decoder.open(params)
        decoder.feed(slot, prompt)
        decoder.close(slot)

    def first_token() -> None:
        slot = decoder.open(params)
        decoder.feed(slot, prompt[:-1])
        decoder.step({slot: prompt[-1]})
        decoder.close(slot)

    times = {}
    for name, action in (("prefill_ms", prefill), ("first_token_ms", first_token)):
        action()
        times[name] = 1e3 * seconds(action, device, 10)

    slots = [decoder.open(params)]
    decoder.feed(slots[0], prompt[: context - config.steps - UNTIMED])
    slots += [decoder.fork(slots[0], params) for _ in range(batch_size - 1)]
    decoder.launch({slot: i % vocab_size for i, slot in enumerate(slots)})
    taken = []
    for _ in range(config.steps + UNTIMED - 1):
        start = time.perf_counter()
        decoder.launch(dict.fromkeys(slots))
        decoder.collect()
        taken.append(time.perf_counter() - start)
    decoder.collect()
    for slot in slots:
        decoder.close(slot)
    return {**times, "step_ms": 1e3 * median(taken[UNTIMED - 1 :])}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    config = parse(BenchInferConfig, argv)
    runtime = setup_runtime(config.device_type, config.dtype)
    import torch

    from nanochat.config import GPTConfig
    from nanochat.decode.running import decoder_for
    from nanochat.hardware import describe

    shape = GPTConfig.from_depth(
        config.depth,
        vocab_size=config.vocab_size,
        slc_rate=config.slc_rate,
        sequence_len=max(config.contexts),
        **find_recipe(config.recipe).settings.model_fields,
    )
    model = random_model(shape, runtime.device)
    model.compute_dtype = runtime.compute_dtype
    bandwidth = copy_bandwidth(runtime.device)
    for batch_size in config.batch_sizes:
        for context in config.contexts:
            decoder = decoder_for(model, batch_size, kind=config.decoder)
            times = measure(decoder, config, batch_size, context)
            name = type(decoder).__name__
            del decoder
            floor_ms = 1e3 * step_bytes(model, batch_size, context) / bandwidth
            result = {
                "batch_size": batch_size,
                "context": context,
                "tokens_per_second": round(1e3 * batch_size / times["step_ms"], 1),
                **{name: round(value, 4) for name, value in times.items()},
                "floor_share": round(floor_ms / times["step_ms"], 3),
                "copy_gb_per_second": round(bandwidth / 1e9),
                "decoder": name,
                "temperature": config.temperature,
                "top_k": config.top_k,
                "depth": config.depth,
                "slc_rate": config.slc_rate,
                "recipe": config.recipe,
                **describe(runtime.device),
            }
            if runtime.device.type == "cuda":
                result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                torch.cuda.reset_peak_memory_stats()
            print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    run(main)
