"""Value embeddings and text that repeats, with the hub's two data sets; see also tests/test_base_train.py."""

import logging

import pytest

from nanochat.common import parse
from nanochat.data.shards import write_parquet
from nanochat.dataset import CLIMBMIX, FINEWEB
from nanochat.train.base import BaseTrainConfig, with_recipe, with_text
from nanochat.train.repeats import settle_value_embeds
from tests.helpers.vocabulary import train_tokenizer

SHORT = ["--depth=2", "--max-seq-len=16", "--total-batch-size=64", "--num-iterations=60"]  # 3,840 tokens


@pytest.mark.parametrize(("long", "short"), [(FINEWEB, CLIMBMIX), (CLIMBMIX, FINEWEB)])
def test_the_text_of_the_run_counts(long, short, base_dir, caplog):
    """Not the other one, which may be downloaded too, nor the validation shard."""
    for text, n_documents in ((long, 4000), (short, 4)):
        text.directory.mkdir(parents=True)
        write_parquet(text.directory / "shard_00000.parquet", [f"the river {i}" for i in range(n_documents)])
        write_parquet(text.directory / text.val_shard, [f"a stone {i}" for i in range(4000)])
    tokenizer = train_tokenizer()

    def settled(*flags):
        flags = [*SHORT, "--recipe=saint_iberis_2", *flags]
        config = with_text(parse(BaseTrainConfig, flags, None, with_recipe(BaseTrainConfig, flags)))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found = settle_value_embeds(config, tokenizer)
        return found.data, found.value_embeds, "value embeddings would overfit" in caplog.text

    assert settled(f"--data={long.data}") == (long.data, True, False)
    assert settled(f"--data={short.data}") == (short.data, False, True)
    of_recipe = (CLIMBMIX.data, long is CLIMBMIX, short is CLIMBMIX)
    assert settled("--data=hub") == settled("--data=auto") == of_recipe
