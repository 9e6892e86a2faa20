"""Write a checkpoint as a folder that Hugging Face's transformers loads.

    python -m scripts.export_hf -o saint_iberis                     # the deepest SFT model
    python -m scripts.export_hf -i base -g d20 -s 21400 -o saint_iberis_base

    model = AutoModelForCausalLM.from_pretrained("saint_iberis", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("saint_iberis", trust_remote_code=True)
    lm_eval --model hf --model_args pretrained=saint_iberis,trust_remote_code=True,add_bos_token=True ...

The way back is scripts.import_hf.
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
    """What to export, and where to."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """folder to write to; made if needed"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: sft, mid, rl or base"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest there is"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """which checkpoint; -1: the newest"""


def main(argv: Sequence[str] | None = None) -> int:
    """Export."""
    config = parse(ExportConfig, argv)

    from nanochat.hub.export import export_checkpoint

    tag, step = export_checkpoint(config.source, config.model_tag, config.step, config.out)
    print(f"export_hf: {config.source} {tag}, step {step}, is in {config.out}")
    return 0


if __name__ == "__main__":
    run(main)
