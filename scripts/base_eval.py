"""Evaluate CORE: how well the base model continues the texts of 22 tasks.

python -m scripts.base_eval --bundle-url=https://HOST/PATH.zip        # the bundle is downloaded once
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20 --max-per-task=500
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nanochat.common import parse, require_at_least, require_counts, run, setup_runtime, write_report


@dataclass(frozen=True, kw_only=True)
class BaseEvalConfig:
    """The model, the bundle and the number of examples."""

    source: str = "base"
    """stage of the model: base, mid, sft or rl"""
    model_tag: str = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: int = -1
    """step of the checkpoint; -1: the newest"""
    bundle: str = ""
    """folder of the CORE bundle; empty: eval_bundle in the base directory"""
    bundle_url: str = ""
    """address of a zip of the bundle to download; an existing eval_bundle must come from it"""
    bundle_sha256: str = ""
    """SHA-256 of that zip, in hex; empty: not checked"""
    max_per_task: int = -1
    """examples of each task, a fixed random subset; -1: all"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    device_batch_size: int = 32
    """size of a forward pass in full sequences: it has at most as many tokens as these"""

    def __post_init__(self) -> None:
        if self.bundle and self.bundle_url:
            raise ValueError(
                f"bundle={self.bundle!r} and bundle_url={self.bundle_url!r} exclude each other: "
                "give a folder or the address of a zip"
            )
        if self.bundle_sha256 and not self.bundle_url:
            raise ValueError(
                f"bundle_sha256={self.bundle_sha256!r} is the digest of a download: it needs bundle_url"
            )
        require_counts(self, "max_per_task")
        require_at_least(self, device_batch_size=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and write report/base_eval.json, or for other stages report/base_eval_<stage>.json."""
    config = parse(BaseEvalConfig, argv)

    from nanochat.checkpoint_manager import load_for
    from nanochat.core_bundle import N_CORE_TASKS, find_bundle, load_bundle
    from nanochat.core_eval import evaluate_core

    runtime = setup_runtime(config.device_type)
    bundle = load_bundle(find_bundle(runtime, config.bundle, config.bundle_url, config.bundle_sha256))
    model, tokenizer, meta = load_for(runtime, config.source, "eval", config.model_tag, config.step)
    start = time.monotonic()
    result = evaluate_core(model, tokenizer, bundle, runtime, config.max_per_task, config.device_batch_size)
    seconds = time.monotonic() - start
    if runtime.is_main:
        n_examples = sum(task["n"] for task in result["tasks"].values())
        settings = {"settings": asdict(config), "source": config.source, "step": meta["step"]}
        speed = {"seconds": seconds, "examples_per_second": n_examples / seconds}
        stage = "base_eval" if config.source == "base" else f"base_eval_{config.source}"
        write_report(stage, {**settings, **result, **speed})
        for label, task in result["tasks"].items():
            accuracy, centered = task["accuracy"], task["centered"]
            print(f"{label:<34} accuracy {accuracy:.4f}  centered {centered:+.4f}  n {task['n']}")
        n_tasks, missing = len(result["tasks"]), ", ".join(result["missing_tasks"])
        print(
            f"{stage}: step {meta['step']}, CORE {result['core']:.4f} over {n_tasks} of {N_CORE_TASKS} tasks"
            f"{f' (missing: {missing})' if missing else ''}, {seconds:.1f} s"
        )
    return 0


if __name__ == "__main__":
    run(main)
