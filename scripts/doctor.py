"""Check before a run that it will not fail: GPUs, driver, NCCL, disk, data, memory.

python -m scripts.doctor --depth=20 --device-batch-size=32 --data=hub

The exit status is nonzero if a check fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.common import parse, require_at_least, run
from nanochat.recipes import SAINT_IBERIS, find_recipe


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The settings of the planned run."""

    depth: int = 20
    """number of layers"""
    recipe: str = SAINT_IBERIS.name
    """saint_iberis (published) or saint_iberis_2 (second generation)"""
    max_seq_len: int = 2048
    """context length in tokens"""
    vocab_size: int = 65_536
    """vocabulary size of the tokenizer"""
    device_batch_size: int = 0
    """sequences per forward pass and device; 0: as many as fit its memory, at most 32"""
    ranks: int = 0
    """processes on this machine; 0: one per GPU, or one"""
    data: str = "auto"
    """source of text: auto, hub (the recipe's; or hub:fineweb, hub:climbmix), embedded, or a path of parquet,
    jsonl or txt files"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""

    def __post_init__(self) -> None:
        require_at_least(self, depth=1, max_seq_len=1, vocab_size=1, device_batch_size=0, ranks=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each finding; return 1 if a check failed."""
    config = parse(DoctorConfig, argv)

    from itertools import chain

    import torch

    from nanochat import doctor
    from nanochat.common import setup_runtime
    from nanochat.config import GPTConfig
    from nanochat.dataset import source

    device_type = setup_runtime(config.device_type).device.type
    ranks = config.ranks or max(1, torch.cuda.device_count() if device_type == "cuda" else 1)
    recipe = find_recipe(config.recipe)
    data, parts = source(config.data, recipe.text), recipe.settings.model_fields
    shape = {"vocab_size": config.vocab_size, "sequence_len": config.max_seq_len, **parts}
    model = GPTConfig.from_depth(config.depth, **shape)
    findings = chain(
        doctor.check_devices(device_type, ranks),
        doctor.check_disk(model, data),
        doctor.check_data(model, data),
        doctor.check_collectives(device_type, ranks),
        doctor.check_memory(model, device_type, config.device_batch_size, ranks),
    )
    n_failed = 0
    for finding in findings:
        print(finding, flush=True)
        n_failed += not finding.is_ok
    print(f"doctor: {f'{n_failed} checks failed' if n_failed else 'all checks passed'}")
    return 1 if n_failed else 0


if __name__ == "__main__":
    run(main)
