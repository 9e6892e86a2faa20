"""Make a checkpoint of a folder that scripts.export_hf wrote.

    python -m scripts.import_hf saint_iberis                  # under the stage, name and step that it had
    python -m scripts.import_hf saint_iberis -i sft -g tuned  # after finetuning in transformers

The tokenizer comes with it and stays beside it.
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
    """What to import, and under which name."""

    folder: tyro.conf.Positional[Path]
    """what scripts.export_hf, or save_pretrained on its model and tokenizer, wrote"""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = ""
    """stage of the model: sft, mid, rl or base; empty: the one that was exported"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the one that was exported"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: the one that was exported"""


def main(argv: Sequence[str] | None = None) -> int:
    """Import."""
    config = parse(ImportConfig, argv)

    from nanochat.hub.export import import_checkpoint

    source, tag, step = import_checkpoint(config.folder, config.source, config.model_tag, config.step)
    print(f"import_hf: {source} {tag}, step {step}, can be used")
    return 0


if __name__ == "__main__":
    run(main)
