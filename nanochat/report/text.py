"""The text of the report: pure functions from the results of stages to Markdown."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nanochat.report.markdown import (
    date,
    dig,
    duration,
    entries,
    escape,
    fence,
    gib,
    is_number,
    items,
    printable,
    show,
    table,
)

CHAT_EVALS = {"MID": "chat_eval_mid", "SFT": "chat_eval_sft", "RL": "chat_eval_rl"}
PICTURES = {
    "chat_tasks.png": "Accuracy on the chat tasks by stage",
    "losses.png": "Training loss and validation bits per byte by stage",
    "throughput.png": "Tokens per second by stage",
    "core.png": "CORE during pretraining",
    "reward.png": "Reward during RL",
}

count, percent = "{:,}".format, "{:.1%}".format
fixed0, fixed1, fixed2, fixed4 = "{:,.0f}".format, "{:,.1f}".format, "{:.2f}".format, "{:.4f}".format

# Key figures of each stage: label, path of keys, formatter. The stages are in the order of a run.
TRAINING = (
    ("hardware", "hardware.device", str),
    ("layers", "model.n_layer", count),
    ("width", "model.n_embd", count),
    ("parameters", "parameters.total", count),
    ("steps", "steps", count),
    ("tokens", "tokens", count),
    ("training time", "train_seconds", duration),
    ("tokens per second (median)", "median_tokens_per_second", fixed0),
    ("MFU (median)", "median_mfu", percent),
    ("peak memory per device", "peak_memory_bytes", gib),
    ("training loss, smoothed (nats per token)", "train_loss", fixed4),
    ("validation bits per byte, step 0", "first_val_bpb", fixed4),
    ("validation bits per byte, lowest", "min_val_bpb", fixed4),
    ("validation bits per byte, last", "val_bpb", fixed4),
)
CHATCORES = (
    ("ChatCORE", "chatcore"),
    ("ChatCORE without SpellingBee", "chatcore_without_spellingbee"),
)
# ChatCORE of the article and of nanochat, by the strict judges, over the six tasks of the hub.
PUBLISHED = {
    "chatcore": {"article": 0.2322},
    "chatcore_without_spellingbee": {"article": 0.0817, "nanochat": 0.0884},
}
PUBLISHED_TASKS = {"ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"}
CHAT_EVAL = (
    ("source", "source", str),
    ("step", "step", count),
    *((label, key, fixed4) for label, key in CHATCORES),
    ("time", "seconds", duration),
    ("examples per second", "examples_per_second", fixed1),
)
FIGURES: dict[str, Sequence[tuple[str, str, Callable[[Any], str]]]] = {
    "tok_train": (
        ("vocabulary", "vocab_size", count),
        ("characters read", "characters", count),
        ("documents read", "documents", count),
        ("time", "seconds", duration),
        ("bytes per token, mean", "token_bytes.mean", fixed2),
        ("bytes per token, standard deviation", "token_bytes.std", fixed2),
        ("bytes per token, minimum", "token_bytes.min", count),
        ("bytes per token, maximum", "token_bytes.max", count),
    ),
    "tok_eval": (),
    "base_train": TRAINING,
    "base_loss": (
        ("step", "step", count),
        ("bits per byte, training text", "bpb.train", fixed4),
        ("bits per byte, validation text", "bpb.val", fixed4),
    ),
    "base_eval": (
        ("CORE", "core", fixed4),
        ("protocol", "settings.protocol", str),
        ("time", "seconds", duration),
    ),
    "mid_train": TRAINING,
    "chat_eval_mid": CHAT_EVAL,
    "chat_sft": TRAINING,
    "chat_eval_sft": CHAT_EVAL,
    "chat_rl": (
        ("steps", "steps", count),
        ("time", "seconds", duration),
        ("reward, first tenth of the steps", "first_reward", fixed4),
        ("reward, last tenth of the steps", "last_reward", fixed4),
        ("share of answers with an advantage", "contrast", fixed4),
        ("greedy accuracy, before", "first_accuracy", fixed4),
        ("greedy accuracy, after", "accuracy", fixed4),
    ),
    "chat_eval_rl": CHAT_EVAL,
}
STAGES = tuple(FIGURES)


def render(
    results: dict[str, dict], problems: dict[str, str], pictures: Sequence[str], dollars_per_hour: float
) -> str:
    """Return report.md.

    results: the JSON of each stage and of "start"; problems: the reason for each missing result ("not run");
    pictures: the names from PICTURES that exist beside the report.
    """
    figures = {name: f"![{PICTURES[name]}]({name})" for name in pictures}
    parts = [
        "# Saint Iberis: report",
        "## Summary",
        summary(results),
        "Accuracy +- its standard error; n is the number of items. ChatCORE, like the published figures, is "
        "of the strict judge (results of older versions: of accuracy).",
        figures.pop("chat_tasks.png", ""),
        "## Environment",
        environment(results["start"]) if "start" in results else f"reset: {problems['start']}",
        "## Wall clock and cost",
        wall_clock(results, problems, dollars_per_hour),
        "If a stage was interrupted and resumed, the time between its last save and the interruption is not "
        "counted.",
        elapsed(results, dollars_per_hour),
        *(["## Curves", *figures.values()] if figures else []),
        *(section(stage, results[stage]) for stage in STAGES if stage in results),
    ]
    return printable("\n\n".join(filter(None, parts)) + "\n")


def card(results: dict[str, dict], problems: dict[str, str]) -> str:
    """Return the summary and a line for each stage without results, for a terminal."""
    missing = [f"{stage}: {problems[stage]}" for stage in STAGES if stage in problems]
    return printable("\n".join([summary(results), *missing]))


def task_names(results: dict[str, dict]) -> list[str]:
    """Return the chat tasks of all evaluated stages, in order of first appearance."""
    return list(
        dict.fromkeys(task for stage in CHAT_EVALS.values() for task in entries(results, stage, "tasks"))
    )


def chance(results: dict[str, dict], task: str) -> float | None:
    """Return the accuracy of guessing on a chat task, or None if no stage reports it."""
    reported = (dig(results, stage, "tasks", task, "chance") for stage in CHAT_EVALS.values())
    return next(filter(is_number, reported), None)


def is_comparable(tasks: Any) -> bool:
    """Return True if tasks are those of the published ChatCORE, judged strictly too."""
    return entries(tasks).keys() == PUBLISHED_TASKS and all(
        is_number(dig(tasks, task, "strict")) for task in PUBLISHED_TASKS
    )


def summary(results: dict[str, dict]) -> str:
    """Return a table with a row for each metric and a column for each stage of the model.

    Beside a ChatCORE of the same tasks are the published ones.
    """

    def score(stage: str, task: str) -> str:
        accuracy, error = (dig(results, stage, "tasks", task, key) for key in ("accuracy", "standard_error"))
        return show(accuracy, fixed4) + (f" +- {error:.4f}" if is_number(error) else "")

    rows = [["CORE", "-", "-", show(dig(results, "base_eval", "core"), fixed4), *("-" for _ in CHAT_EVALS)]]
    for task in task_names(results):
        sizes = [show(dig(results, stage, "tasks", task, "n"), count) for stage in CHAT_EVALS.values()]
        sizes = dict.fromkeys(size for size in sizes if size != "-")
        scores = [score(stage, task) for stage in CHAT_EVALS.values()]
        rows.append([task, show(chance(results, task), fixed4), " / ".join(sizes) or "-", "-", *scores])
    is_published = any(is_comparable(dig(results, stage, "tasks")) for stage in CHAT_EVALS.values())
    others = ("article", "nanochat") if is_published else ()
    rows = [[*row, *("-" for _ in others)] for row in rows]
    for label, key in CHATCORES:
        scores = [show(dig(results, stage, key), fixed4) for stage in CHAT_EVALS.values()]
        rows.append(
            [label, "-", "-", "-", *scores, *(show(PUBLISHED[key].get(who), fixed4) for who in others)]
        )
    return table(["Metric", "Chance", "n", "BASE", *CHAT_EVALS, *others], rows)


def environment(start: dict[str, Any]) -> str:
    """Return a table of the machine and the versions at the start of the run."""
    gpus = Counter(
        f"{show(dig(gpu, 'name'))}, {show(dig(gpu, 'memory_bytes'), gib)}" for gpu in items(start, "gpus")
    )
    rows = (
        ("started", show(dig(start, "started_at"), date)),
        ("commit", show(dig(start, "commit")) + (" with changes" if dig(start, "dirty") else "")),
        ("platform", show(dig(start, "platform"))),
        ("Python", show(dig(start, "python"))),
        ("PyTorch", show(dig(start, "torch"))),
        ("CPU", f"{show(dig(start, 'cpu'))}, {show(dig(start, 'cpu_cores'))} cores"),
        ("memory", show(dig(start, "memory_bytes"), gib)),
        ("GPUs", "; ".join(f"{n} x {gpu}" for gpu, n in gpus.items()) or "none"),
        ("driver, CUDA", f"{show(dig(start, 'driver'))}, {show(dig(start, 'cuda'))}"),
        ("NPROC_PER_NODE", show(dig(start, "nproc_per_node"))),
    )
    return table(("", "at the start"), rows)


def total_seconds(results: dict[str, dict]) -> float:
    """Return the wall-clock seconds of all stages together."""
    return sum(filter(is_number, (dig(results, stage, "wall_seconds") for stage in STAGES)))


def cost(seconds: float, dollars_per_hour: float) -> str:
    """Format the price of a duration."""
    return f"${seconds / 3600 * dollars_per_hour:,.2f}"


def wall_clock(results: dict[str, dict], problems: dict[str, str], dollars_per_hour: float) -> str:
    """Return a table of time and cost with a row for each stage and one for the total."""
    rows = []
    for stage in STAGES:
        seconds = dig(results, stage, "wall_seconds")
        rows.append(
            (
                stage,
                show(dig(results, stage, "finished_at"), date),
                problems.get(stage) or show(seconds, duration),
                cost(seconds, dollars_per_hour) if is_number(seconds) else "-",
            )
        )
    total = total_seconds(results)
    rows.append(("total", "", duration(total), cost(total, dollars_per_hour)))
    return table(("stage", "finished", "wall clock", f"at ${dollars_per_hour:,.2f}/h"), rows)


def elapsed(results: dict[str, dict], dollars_per_hour: float) -> str:
    """Return a sentence on the time from reset to the last result; "" if one of them is unknown."""
    started_at = dig(results, "start", "started_at")
    ends = list(filter(is_number, (dig(results, stage, "finished_at") for stage in STAGES)))
    if not is_number(started_at) or not ends or max(ends) < started_at:
        return ""
    seconds = max(ends) - started_at
    return (
        f"From the start to the last result: {duration(seconds)}, {cost(seconds, dollars_per_hour)}, "
        "including set-up, downloads and pauses."
    )


def section(stage: str, result: dict[str, Any]) -> str:
    """Return the section of a stage: key figures, stage-specific tables, and the settings, folded."""
    rows = [
        (label, show(dig(result, *path.split(".")), formatter)) for label, path, formatter in FIGURES[stage]
    ]
    parts = [f"## {stage}"]
    if rows:
        parts.append(table(("", "value"), rows))
    if stage in DETAILS:
        parts.append(DETAILS[stage](result))
    if settings := entries(result, "settings") or entries(result, "config"):
        folded = fence(json.dumps(settings, indent=2), "json")
        parts.append(f"<details><summary>settings</summary>\n\n{folded}\n\n</details>")
    return "\n\n".join(filter(None, parts))


def tokenizer_table(result: dict[str, Any]) -> str:
    """Return a table of bytes per token: a row for each text, a column for each tokenizer.

    Cells of other tokenizers also show the relative difference from ours.
    """
    sizes, texts = entries(result, "vocab_size"), entries(result, "texts")

    def cell(text: str, name: str) -> str:
        ratio, ours = (dig(texts, text, "bytes_per_token", key) for key in (name, "ours"))
        is_known = name != "ours" and is_number(ratio) and is_number(ours) and ours > 0
        return show(ratio, fixed2) + (f" ({ratio / ours - 1:+.1%})" if is_known else "")

    rows = [["vocabulary", "", *(show(size, count) for size in sizes.values())]]
    for text in texts:
        rows.append([text, show(dig(texts, text, "bytes"), count), *(cell(text, name) for name in sizes)])
    return table(["bytes per token", "bytes", *sizes], rows)


def core_table(result: dict[str, Any]) -> str:
    """Return a table of the CORE tasks, and a note if some are missing."""
    keys = (
        ("accuracy", fixed4),
        ("random_baseline", _percent_to_fraction),
        ("centered", fixed4),
        ("n", count),
    )
    tasks = entries(result, "tasks")
    rows = [(task, *(show(dig(tasks, task, key), formatter) for key, formatter in keys)) for task in tasks]
    missing = escape(", ".join(map(str, items(result, "missing_tasks"))))
    note = f"\n\nNot evaluated, so this CORE is not comparable to others: {missing}." if missing else ""
    return table(("task", "accuracy", "chance", "centered", "n"), rows) + note


def chat_table(result: dict[str, Any]) -> str:
    """Return a table of the chat tasks, with pass@k where several replies were sampled; "" without tasks."""
    tasks = entries(result, "tasks")
    passed = dict.fromkeys(key for task in tasks for key in entries(tasks, task) if key.startswith("pass@"))
    keys = ("accuracy", "strict", "chance", *passed)
    rows = [
        (task, *(show(dig(tasks, task, key), fixed4) for key in keys), show(dig(tasks, task, "n"), count))
        for task in tasks
    ]
    return table(("task", *keys, "n"), rows) if rows else ""


def _percent_to_fraction(value: float) -> str:
    return fixed4(value / 100)  # the CORE bundle gives baselines in percent


def samples(result: dict[str, Any]) -> str:
    """Return the samples of the base model, fenced, with long lines wrapped."""
    texts = map(str, items(result, "samples"))
    return "\n\n".join(fence("\n".join(map(_wrap, text.split("\n")))) for text in texts)


def _wrap(line: str) -> str:
    return textwrap.fill(line, 100, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)


def rewards_table(result: dict[str, Any]) -> str:
    """Return a table with a row for each RL task; "" unless there were several."""
    tasks = entries(result, "rewards")
    rows = [(task, *(show(dig(tasks, task, key), fixed4) for key in ("first", "last"))) for task in tasks]
    return table(("reward", "first tenth of the steps", "last tenth"), rows) if len(rows) > 1 else ""


DETAILS = {
    "tok_eval": tokenizer_table,
    "base_eval": core_table,
    "base_loss": samples,
    "chat_rl": rewards_table,
    **dict.fromkeys(CHAT_EVALS.values(), chat_table),
}
