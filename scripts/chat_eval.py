"""Evaluate a chat model: multiple choice by the likeliest letter, other tasks by the replies it writes.

python -m scripts.chat_eval -i sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft -a "ARC-Easy|GSM8K" -b 64
python -m scripts.chat_eval -i sft -a HumanEval -t 0.8 -n 16    # also pass@k, for k up to 16
python -m scripts.chat_eval -i sft --bench     # also answer one at a time, and compare the speeds

Each accuracy is that of the fair judge, which also takes right answers in other forms; strict is that of the
judge of published figures, of which ChatCORE is made.

All tasks together are written to report/chat_eval_<source>.json, with ChatCORE. A part of the tasks (-a) has
no ChatCORE and is written to report/chat_eval_<source>_part.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nanochat.common import DType, parse, require_at_least, require_counts, run, setup_runtime, write_report
from nanochat.decode import DecoderKind

if TYPE_CHECKING:
    from nanochat.engine import Engine
    from nanochat.gpt import GPT
    from nanochat.tokenizer import RustBPETokenizer

SEED = 42  # of sampled replies: two evaluations of a model agree


@dataclass(frozen=True, kw_only=True)
class ChatEvalConfig:
    """The model, the tasks and the limits of their evaluation."""

    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """stage of the model: mid, sft or rl"""
    task_names: Annotated[str, tyro.conf.arg(aliases=["-a", "--task-name"])] = ""
    """tasks to run, separated by |; empty: all of the data"""
    data: str = "auto"
    """source of the tasks: hub, embedded or auto, that of the model's training; hub for a published model"""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """conversations at a time on one device"""
    max_problems: Annotated[int, tyro.conf.arg(aliases=["-x"])] = -1
    """most conversations of a task; -1: all"""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """most tokens of a reply; at most half of the context"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """of sampling written replies; 0: greedy"""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """where temperature is above 0, sample from the k likeliest tokens; 0: from all"""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """written replies to each conversation; with several, pass@k is shown beside their accuracy"""
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""
    """name of the checkpoint folder; empty: the deepest model"""
    step: Annotated[int, tyro.conf.arg(aliases=["-s"])] = -1
    """step of the checkpoint; -1: the newest"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the best available"""
    dtype: DType = "auto"
    """of activations; auto: bfloat16 on CUDA cards that have it, else float32"""
    decoder: DecoderKind = "best"
    """best: CUDA graphs and kernels where model and GPU allow them; plain: PyTorch alone"""
    bench: bool = False
    """answer everything again, one conversation at a time, and print the examples per second of both"""

    def __post_init__(self) -> None:
        require_at_least(self, batch_size=1, max_new_tokens=1, temperature=0, top_k=0, num_samples=1)
        require_counts(self, "max_problems")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} greedy replies would all be the same: give --temperature"
            )
        if self.num_samples > self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} must hold the num_samples={self.num_samples}")


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and write report/chat_eval_<source>.json, or chat_eval_<source>_part.json."""
    config = parse(ChatEvalConfig, argv)

    from nanochat.chat_eval import evaluate_task
    from nanochat.chat_format import limit_reply
    from nanochat.checkpoint_manager import load_for, read_settings
    from nanochat.recipes import chat_data
    from nanochat.sampling import SamplingParams
    from tasks.mixtures import eval_tasks

    saved = read_settings(config.source, config.model_tag, config.step)
    config = replace(config, data=chat_data(config.data, saved))
    known = eval_tasks(config.data)
    names = config.task_names.split("|") if config.task_names else list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown tasks {', '.join(unknown)}; there are {'|'.join(known)}")
    runtime = setup_runtime(config.device_type, config.dtype)
    model, tokenizer, meta = load_for(runtime, config.source, "eval", config.model_tag, config.step)
    warn = print if runtime.is_main else None
    max_new_tokens = limit_reply(config.max_new_tokens, model.config.sequence_len, warn)
    answer = partial(
        evaluate_task,
        model=model,
        tokenizer=tokenizer,
        runtime=runtime,
        max_new_tokens=max_new_tokens,
        max_problems=config.max_problems,
        decoder=config.decoder,
        sampling=SamplingParams(temperature=config.temperature, top_k=config.top_k, seed=SEED),
        num_samples=config.num_samples,
    )
    results = {}
    for name in names:
        task = known[name]()
        result = results[name] = answer(task, batch_size=config.batch_size, name=name)
        if runtime.is_main:
            passed = [f"{key} {100 * result[key]:.1f} %, " for key in result if key.startswith("pass@")]
            print(
                f"{name}: {100 * result['accuracy']:.1f} +- {100 * result['standard_error']:.1f} %, "
                f"strict {100 * result['strict']:.1f} % of {result['n']} "
                f"(chance {100 * result['chance']:.0f} %), {''.join(passed)}"
                f"{result['n'] / result['seconds']:.1f}/s"
            )
        if config.bench:
            alone = answer(task, batch_size=config.num_samples, name=f"{name}, one at a time")
            if runtime.is_main:
                print(
                    f"{name}: {alone['n'] / alone['seconds']:.1f}/s one at a time, batched "
                    f"{alone['seconds'] / result['seconds']:.1f} times that; accuracy {alone['accuracy']:.4f}"
                )
    if runtime.is_main:
        print(report(config, meta["step"], results, len(known)))
    return 0


def run_chat_eval(
    task_name: str,
    model: GPT,
    tokenizer: RustBPETokenizer,
    engine: Engine,
    batch_size: int = 1,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 50,
    max_problems: int | None = None,
) -> float:
    """Return the strict accuracy on a task of the default data, for scripts written for nanochat.

    With several samples a problem counts if one of them is right, by the fair judge.
    """
    from nanochat.chat_eval import evaluate_task
    from nanochat.sampling import SamplingParams
    from tasks.mixtures import eval_tasks

    known = eval_tasks("auto")
    if task_name not in known:
        raise ValueError(f"unknown task {task_name}; there are {', '.join(known)}")
    result = evaluate_task(
        known[task_name](),
        model,
        tokenizer,
        setup_runtime(model.device.type),
        batch_size=max(batch_size, num_samples),
        max_new_tokens=max_new_tokens,
        max_problems=-1 if max_problems is None else max_problems,
        name=task_name,
        decoder=engine.decoder,
        sampling=SamplingParams.from_flat(temperature, top_k, None, seed=SEED),
        num_samples=num_samples,
    )
    return result.get(f"pass@{num_samples}", result["strict"])


def report(config: ChatEvalConfig, step: int, results: dict[str, dict[str, Any]], n_known: int) -> str:
    """Write the results of some of n_known tasks; return a line that sums them up."""
    from nanochat.chat_eval import chatcore
    from nanochat.report.text import CHATCORES

    seconds = sum(result["seconds"] for result in results.values())
    measured = {
        "settings": asdict(config),
        "source": config.source,
        "step": step,
        "tasks": results,
        "seconds": seconds,
        "examples_per_second": sum(result["n"] for result in results.values()) / seconds,
    }
    stage, line = f"chat_eval_{config.source}", f"chat_eval: {config.source} step {step}, "
    if len(results) < n_known:
        path = write_report(f"{stage}_part", measured)
        return f"{line}{len(results)} of {n_known} tasks, which make no ChatCORE, in {path}"
    figures = {
        "chatcore": chatcore(results),
        "chatcore_without_spellingbee": chatcore(results, without=["SpellingBee"]),
    }
    write_report(stage, {**measured, **figures})
    shown = [
        f"{label} {figures[key]:.4f}{published(key, results)}"
        for label, key in CHATCORES
        if figures[key] is not None
    ]
    return f"{line}{', '.join(shown)}, of the strict figures"


def published(key: str, results: dict[str, dict[str, Any]]) -> str:
    """Return the published figures beside one of our own, in brackets; "" for other tasks than theirs."""
    from nanochat.report.text import PUBLISHED, is_comparable

    figures = PUBLISHED[key] if is_comparable(results) else {}
    return f" ({', '.join(f'{who} {figure:.4f}' for who, figure in figures.items())})" if figures else ""


if __name__ == "__main__":
    run(main)
