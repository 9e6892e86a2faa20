"""Whether a run reads its text more than once, and what follows for value embeddings.

A table of values by token has millions of weights that few gradients reach, and learns by heart what it sees
again: with text that repeats, validation gets worse while the training loss falls. How much text there is
follows from the footers of the shards and the tokens of a few documents (`estimate_tokens`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from nanochat.dataloader import estimate_tokens
from nanochat.dataset import shard_paths
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train.base import Config, count_steps, model_shape

logger = logging.getLogger(__name__)


def settle_value_embeds(config: Config, tokenizer: RustBPETokenizer) -> Config:
    """Return the config with value_embeds decided: as asked, or as in the recipe unless the text repeats.

    If it repeats, and the model would have them, log a line that says so.
    """
    shape = model_shape(config, tokenizer.get_vocab_size())
    if not shape.value_embeds:
        return replace(config, value_embeds=False)
    with torch.device("meta"):
        model = GPT(shape)
    needed = count_steps(config, model) * config.total_batch_size
    present = estimate_tokens(tokenizer, shard_paths(config.data, "train"))
    if needed <= present:
        return replace(config, value_embeds=True)
    is_asked = config.value_embeds is not None
    times = f"{needed / max(1, present):.1f} times, {needed:,} tokens of about {present:,}"
    result = "kept, as asked" if is_asked else "left out; --value-embeds=True keeps them"
    logger.info(f"the run reads its text {times}, which value embeddings would overfit: {result}")
    return replace(config, value_embeds=is_asked)
