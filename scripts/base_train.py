"""Pretrain the base model on packed documents.

    python -m scripts.base_train --depth=4 --device-batch-size=8 --max-seq-len=256 --total-batch-size=8192
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20

--depth is the one dial: width, heads and, through the ratio of tokens to parameters, the length of training
follow from it. Checkpoints and metrics.jsonl go to $NANOCHAT_BASE_DIR/base_checkpoints/<model tag>.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from nanochat.common import parse, run, setup_runtime
from nanochat.train.base import BaseTrainConfig, build_model, make_plan, read_bundle, with_rows

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; leaves checkpoints, metrics.jsonl and report/base_train.json."""
    config = parse(BaseTrainConfig, argv, __doc__)

    import torch

    from nanochat.checkpoint_manager import checkpoint_dir
    from nanochat.core_eval import evaluate_core
    from nanochat.dataloader import packed_batches, validation_batches
    from nanochat.dataset import shard_paths
    from nanochat.loss_eval import evaluate_bpb
    from nanochat.optim import build_optimizer
    from nanochat.tokenizer import get_tokenizer
    from nanochat.train.accelerate import accelerate
    from nanochat.train.loop import train
    from nanochat.train.run import begin, report_training, save_progress, start_or_resume
    from nanochat.train.samples import print_samples

    runtime = setup_runtime(config.device_type)
    tokenizer = get_tokenizer()
    model = build_model(config, tokenizer.get_vocab_size(), runtime)
    config = with_rows(config, model, runtime)
    plan = make_plan(config, model, runtime)
    bundle = read_bundle(config, plan)
    optimizer = build_optimizer(model, config.rates, runtime)
    directory = checkpoint_dir("base", config.model_tag or f"d{config.depth}")
    progress = start_or_resume(
        directory, model, tokenizer, optimizer, runtime, resume=config.resume, overwrite=config.overwrite
    )
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
        state=progress.loader_state,
        **sizes,
    )
    log = begin(directory, tokenizer, runtime, config, plan, progress)

    def measure_core() -> None:
        limits = {"max_per_task": config.core_max_per_task, "batch_rows": config.device_batch_size}
        core = evaluate_core(model, tokenizer, bundle, runtime, **limits)["core"]
        log({"step": progress.step, "core": core})
        logger.info(f"step {progress.step:05d} | CORE {core:.4f}")

    is_finished = train(
        model,
        optimizer,
        batches,
        plan,
        config.cadence,
        runtime,
        progress,
        save=partial(save_progress, directory, model, optimizer, runtime, config),
        evaluate=partial(evaluate_bpb, model, val_batches, None, token_bytes),
        sample=partial(print_samples, model, tokenizer, runtime),
        log=log,
        extras=[(config.core_every, measure_core)] if bundle else [],
    )
    log.close()
    if is_finished and runtime.is_main:
        print(report_training("base_train", plan, model, progress, directory, asdict(config)))
    return 0


if __name__ == "__main__":
    run(main)
