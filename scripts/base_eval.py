"""Evaluate CORE: how well the base model continues the texts of 22 tasks.

python -m scripts.base_eval                         # the bundle of tasks is downloaded once
python -m scripts.base_eval --hf-path=gpt2          # any causal model of Transformers, for calibration
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --model-tag=d20 --max-per-task=500
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nanochat.common import (
    DType,
    Runtime,
    parse,
    require_at_least,
    require_counts,
    run,
    setup_runtime,
    write_report,
)

if TYPE_CHECKING:
    import torch

    from nanochat.core_eval import CoreModel
    from nanochat.core_protocol import CoreTokenizer
    from nanochat.gpt import GPT
    from nanochat.tokenizer import RustBPETokenizer


@dataclass(frozen=True, kw_only=True)
class BaseEvalConfig:
    """The model, the bundle, the protocol and the number of examples."""

    source: str = "base"
    """stage of the model: base, mid, sft or rl"""
    model_tag: str = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: int = -1
    """step of the checkpoint; -1: the newest"""
    hf_path: str = ""
    """a causal model of Transformers instead: a folder, whose own code is run, or a repository of the hub"""
    protocol: str = "nanochat"
    """nanochat (that of the published figures) or dclm: nanochat/core_protocol.py has their rules"""
    bundle: str = ""
    """folder of the CORE bundle; empty: eval_bundle in the base directory, downloaded if it is not there"""
    bundle_url: str = ""
    """address of a zip of the bundle, empty: the published one; an existing eval_bundle must come from it"""
    bundle_sha256: str = ""
    """SHA-256 of that zip, in hex; empty: not checked"""
    max_per_task: int = -1
    """examples of each task, a fixed random subset; -1: all"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""
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
        if self.hf_path and (self.source, self.model_tag, self.step, self.dtype) != ("base", "", -1, "auto"):
            raise ValueError(
                f"hf_path={self.hf_path!r} is a model of its own, run in float32: leave out source, "
                "model_tag, step and dtype"
            )
        from nanochat.core_protocol import find_protocol  # not above: it imports NumPy

        find_protocol(self.protocol)
        require_counts(self, "max_per_task")
        require_at_least(self, device_batch_size=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and write report/base_eval.json; for other stages and hf report/base_eval_<stage>.json."""
    config = parse(BaseEvalConfig, argv)

    from nanochat.core_bundle import N_CORE_TASKS, find_bundle, load_bundle
    from nanochat.core_eval import evaluate_core
    from nanochat.core_protocol import find_protocol

    runtime = setup_runtime(config.device_type, config.dtype)
    try:
        folder = find_bundle(runtime, config.bundle, config.bundle_url, config.bundle_sha256)
    except OSError as error:
        if config.bundle_url:
            raise
        if runtime.is_main:
            print(f"base_eval: CORE is skipped: {error}; run again to retry, or name a folder with --bundle")
        return 0
    bundle = load_bundle(folder)
    model, tokenizer, origin = _load(config, runtime)
    start = time.monotonic()
    sizes, protocol = (config.max_per_task, config.device_batch_size), find_protocol(config.protocol)
    result = evaluate_core(model, tokenizer, bundle, runtime, *sizes, protocol)
    seconds = time.monotonic() - start
    if runtime.is_main:
        n_examples = sum(task["n"] for task in result["tasks"].values())
        speed = {"seconds": seconds, "examples_per_second": n_examples / seconds}
        stage = "base_eval" if origin["source"] == "base" else f"base_eval_{origin['source']}"
        write_report(stage, {"settings": asdict(config), **origin, **result, **speed})
        for label, task in result["tasks"].items():
            accuracy, centered = task["accuracy"], task["centered"]
            print(f"{label:<34} accuracy {accuracy:.4f}  centered {centered:+.4f}  n {task['n']}")
        name = config.hf_path or f"step {origin['step']}"
        n_tasks, missing = len(result["tasks"]), ", ".join(result["missing_tasks"])
        print(
            f"{stage}: {name}, CORE {result['core']:.4f} over {n_tasks} of {N_CORE_TASKS} tasks"
            f"{f' (missing: {missing})' if missing else ''}, protocol {protocol.name}, {seconds:.1f} s"
        )
    return 0


def _load(config: BaseEvalConfig, runtime: Runtime) -> tuple[GPT | CoreModel, CoreTokenizer, dict[str, Any]]:
    """Return the model, its tokenizer, and the stage and step that the report names."""
    if config.hf_path:
        from nanochat.hub.core_model import load_transformers

        return *load_transformers(config.hf_path, runtime.device), {"source": "hf"}
    from nanochat.checkpoint_manager import load_for

    model, tokenizer, meta = load_for(runtime, config.source, "eval", config.model_tag, config.step)
    return model, tokenizer, {"source": config.source, "step": meta["step"]}


def evaluate_model(
    model: GPT, tokenizer: RustBPETokenizer, device: torch.device | str, max_per_task: int = -1
) -> dict[str, Any]:
    """Evaluate CORE by nanochat's protocol, with the bundle in the base directory, downloaded if missing.

    Return "results" (task -> accuracy), "centered_results" (task -> centered accuracy) and "core_metric".
    """
    import torch

    from nanochat.core_bundle import find_bundle, load_bundle
    from nanochat.core_eval import evaluate_core

    runtime = setup_runtime(torch.device(device).type)
    core = evaluate_core(model, tokenizer, load_bundle(find_bundle(runtime)), runtime, max_per_task)
    return {
        "results": {label: task["accuracy"] for label, task in core["tasks"].items()},
        "centered_results": {label: task["centered"] for label, task in core["tasks"].items()},
        "core_metric": core["core"],
    }


if __name__ == "__main__":
    run(main)
