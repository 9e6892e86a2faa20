"""Export a checkpoint to a folder that Hugging Face's transformers loads.

    python -m scripts.export_hf -o saint_iberis                     # the deepest SFT model
    python -m scripts.export_hf -i base -g d20 -s 21400 -o saint_iberis_base

    model = AutoModelForCausalLM.from_pretrained("saint_iberis", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("saint_iberis", trust_remote_code=True)
    lm_eval --model hf --model_args pretrained=saint_iberis,trust_remote_code=True,add_bos_token=True ...

scripts.import_hf converts such a folder back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat.common import parse, run


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The checkpoint to export, and the folder to write."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """folder to write to; created if needed"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: sft, mid, rl or base"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: the newest"""


def main(argv: Sequence[str] | None = None) -> int:
    """Export the checkpoint."""
    config = parse(ExportConfig, argv)

    from nanochat.hub.export import export_checkpoint

    tag, step = export_checkpoint(config.source, config.model_tag, config.step, config.out)
    print(f"export_hf: wrote {config.source} {tag}, step {step}, to {config.out}")
    return 0


if __name__ == "__main__":
    run(main)
