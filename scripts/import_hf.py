"""Import a folder written by scripts.export_hf as a checkpoint.

    python -m scripts.import_hf saint_iberis                  # under its original stage, name and step
    python -m scripts.import_hf saint_iberis -i sft -g tuned  # after finetuning in transformers

The tokenizer is imported too and saved beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat.common import parse, run


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """The folder to import, and the name of the checkpoint."""

    folder: tyro.conf.Positional[Path]
    """folder written by scripts.export_hf, or by save_pretrained of the exported model and tokenizer"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = ""
    """stage of the model: sft, mid, rl or base; empty: that of the exported checkpoint"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: that of the exported checkpoint"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: that of the exported checkpoint"""


def main(argv: Sequence[str] | None = None) -> int:
    """Import the folder."""
    config = parse(ImportConfig, argv)

    from nanochat.hub.export import import_checkpoint

    source, tag, step = import_checkpoint(config.folder, config.source, config.model_tag, config.step)
    print(f"import_hf: imported {source} {tag}, step {step}")
    return 0


if __name__ == "__main__":
    run(main)
