"""Pretrain the base model on packed documents.

    python -m scripts.base_train --depth=4 --device-batch-size=8 --max-seq-len=256 --total-batch-size=8192
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20

--depth is the one dial: width, heads and, through the ratio of tokens to parameters, the length of training
follow from it. --recipe chooses the generation of the model and the defaults of what belongs to it
(nanochat/recipes.py). Checkpoints and metrics.jsonl go to $NANOCHAT_BASE_DIR/base_checkpoints/<model tag>.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from nanochat.common import parse, setup_runtime
from nanochat.common import run as run_script
from nanochat.train.base import (
    BaseTrainConfig,
    build_model,
    make_plan,
    read_bundle,
    with_recipe,
    with_rows,
    with_text,
)

if TYPE_CHECKING:
    from nanochat.core_bundle import Bundle
    from nanochat.train.run import Run

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/base_train.json."""
    config = with_text(parse(BaseTrainConfig, argv, __doc__, with_recipe(BaseTrainConfig, argv)))

    import torch

    from nanochat.dataloader import packed_batches, validation_batches
    from nanochat.dataset import shard_paths
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.optim.muon_adamw import build_optimizer
    from nanochat.tokenizer import get_tokenizer
    from nanochat.train.accelerate import accelerate
    from nanochat.train.loop import train
    from nanochat.train.repeats import settle_value_embeds
    from nanochat.train.results import report_training
    from nanochat.train.run import Run
    from nanochat.train.samples import print_samples

    runtime = setup_runtime(config.device_type, config.dtype, trains=True)
    tokenizer = get_tokenizer()
    config = settle_value_embeds(config, tokenizer)
    model = build_model(config, tokenizer.get_vocab_size(), runtime)
    config = with_rows(config, model, runtime)
    plan = make_plan(config, model, runtime)
    bundle = read_bundle(config, plan)
    optimizer = build_optimizer(model, config.optimizer, runtime)
    tag = config.model_tag or f"d{config.depth}"
    run = Run.open("base", tag, model, tokenizer, optimizer, runtime, config)
    accelerate(model, compile=runtime.compiles(config.compile), fused=config.fused, fp8=config.fp8)

    sizes = {"batch_size": config.device_batch_size, "seq_len": config.max_seq_len}
    val_shards, token_bytes = shard_paths(config.data, "val"), torch.from_numpy(tokenizer.token_bytes())
    val_batches = validation_batches(tokenizer, val_shards, runtime, n_tokens=config.eval_tokens, **sizes)
    batches = packed_batches(
        tokenizer,
        shard_paths(config.data, "train"),
        streams=plan.accumulation * runtime.world_size,
        device=runtime.device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.seed,
        state=run.progress.loader_state,
        **sizes,
    )
    run.begin(plan)
    is_finished = train(
        run,
        batches,
        plan,
        evaluate=partial(evaluate_bpb, model, val_batches, None, token_bytes),
        sample=partial(print_samples, model, tokenizer, runtime),
        extras=[(config.core_every, partial(measure_core, run, bundle))] if bundle else [],
    )
    run.close()
    if is_finished and runtime.is_main:
        print(report_training(run, plan))
    return 0


def measure_core(run: Run[BaseTrainConfig], bundle: Bundle) -> None:
    """Evaluate CORE by nanochat's protocol and log it."""
    from nanochat.core_eval import evaluate_core

    sizes = run.config.core_max_per_task, run.config.device_batch_size
    core = evaluate_core(run.model, run.tokenizer, bundle, run.runtime, *sizes)["core"]
    run.log({"step": run.progress.step, "core": core})
    logger.info(f"step {run.progress.step:05d} | CORE {core:.4f}")


if __name__ == "__main__":
    run_script(main)
