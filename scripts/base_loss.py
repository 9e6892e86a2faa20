"""Evaluate the bits per byte of the base model on both splits, and sample from it.

python -m scripts.base_loss
torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import tyro

from nanochat.common import DType, parse, require_at_least, run, setup_runtime, write_report


@dataclass(frozen=True, kw_only=True)
class BaseLossConfig:
    """The model, and the amount of text."""

    model_tag: str = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: Annotated[int, tyro.conf.arg(aliases=["--model-step"])] = -1
    """step of the checkpoint; -1: the newest"""
    data: str = "auto"
    """source of text: auto, hub (the model's; or hub:fineweb, hub:climbmix), embedded, or a path of parquet,
    jsonl or txt files"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""
    device_batch_size: int = 4
    """sequences per forward pass and device"""
    split_tokens: int = 20 * 524_288
    """tokens to evaluate of each split, at most all"""

    def __post_init__(self) -> None:
        require_at_least(self, device_batch_size=1, split_tokens=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print samples and write report/base_loss.json."""
    config = parse(BaseLossConfig, argv)

    import torch

    from nanochat.checkpoint_manager import load_for
    from nanochat.dataloader import validation_batches
    from nanochat.dataset import shard_paths, source
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.recipes import trained_text
    from nanochat.train.samples import print_samples

    runtime = setup_runtime(config.device_type, config.dtype)
    model, tokenizer, meta = load_for(runtime, "base", "eval", config.model_tag, config.step)
    config = replace(config, data=source(config.data, trained_text(meta.get("user_config") or {})))
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    bpb = {}
    for split in ("train", "val"):
        batches = validation_batches(
            tokenizer,
            shard_paths(config.data, split),
            runtime,
            batch_size=config.device_batch_size,
            seq_len=model.config.sequence_len,
            n_tokens=config.split_tokens,
        )
        bpb[split] = evaluate_bpb(model, batches, None, token_bytes)
    samples = print_samples(model, tokenizer, runtime)
    if runtime.is_main:
        result = {"settings": asdict(config), "step": meta["step"], "bpb": bpb, "samples": samples}
        write_report("base_loss", result)
        print(f"base_loss: step {meta['step']}, bpb train {bpb['train']:.4f}, validation {bpb['val']:.4f}")
    return 0


if __name__ == "__main__":
    run(main)
