"""Supervised finetuning: learn to say what the assistant says, one conversation a row.

    python -m scripts.chat_sft --data=embedded
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --model-tag=d20 --run=d20

Only the assistant's tokens are learned, each counting the same wherever it stands. Checkpoints and
metrics.jsonl go to $NANOCHAT_BASE_DIR/chatsft_checkpoints/<model tag>.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from nanochat.common import parse, run, setup_runtime
from nanochat.optim.schedule import lr_multiplier
from nanochat.train.chat import ChatTrainConfig, train_on_conversations


@dataclass(frozen=True, kw_only=True)
class ChatSFTConfig(ChatTrainConfig):
    """Settings of supervised finetuning."""

    source: Literal["mid", "base"] = "mid"
    """stage whose model is finetuned"""
    compile: bool | None = False
    """compile the blocks with torch.compile; off, since micro-batches differ in width"""
    device_batch_size: int = 4
    """conversations of one forward on one device; lower it when memory runs out"""
    conversations_per_step: int = 32
    """conversations of one optimizer step, over all devices"""
    init_lr_frac: float = 0.02
    """factor on all learning rates"""
    warmdown_ratio: float = 1.0
    """last share of training, over which the learning rates fall to 0"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/chat_sft.json."""
    config = parse(ChatSFTConfig, argv)

    from tasks.mixtures import sft_tasks, with_own

    train_task, val_task = with_own(sft_tasks(config.data), config.add)
    result = train_on_conversations(
        config,
        setup_runtime(config.device_type),
        stage="sft",
        source=config.source,
        train_task=train_task,
        val_task=val_task,
        packed=False,
        rows_per_step=lambda seq_len: config.conversations_per_step,
        device_batch_size=config.device_batch_size,
        schedule=partial(lr_multiplier, peak=config.init_lr_frac, warmdown=config.warmdown_ratio),
    )
    if result:
        print(result)
    return 0


if __name__ == "__main__":
    run(main)
