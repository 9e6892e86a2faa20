"""The text of the report: results of stages in, Markdown out; nothing is read or written."""

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
    "throughput.png": "Tokens a second by stage",
    "core.png": "CORE over the steps of pretraining",
    "reward.png": "Reward over the steps of RL",
}

count, share, percent = "{:,}".format, "{:.4f}".format, "{:.1%}".format
rounded, tenths, hundredths = "{:,.0f}".format, "{:,.1f}".format, "{:.2f}".format

# label, path of keys and format of a stage's key figures; the order of stages is that of a run
TRAINING = (
    ("hardware", "hardware.device", str),
    ("layers", "model.n_layer", count),
    ("width", "model.n_embd", count),
    ("parameters", "parameters.total", count),
    ("steps", "steps", count),
    ("tokens", "tokens", count),
    ("time of training", "train_seconds", duration),
    ("tokens a second (median)", "median_tokens_per_second", rounded),
    ("MFU (median)", "median_mfu", percent),
    ("peak memory of a device", "peak_memory_bytes", gib),
    ("training loss, smoothed (nats a token)", "train_loss", share),
    ("validation bits per byte, step 0", "first_val_bpb", share),
    ("validation bits per byte, lowest", "min_val_bpb", share),
    ("validation bits per byte, last", "val_bpb", share),
)
CHATCORES = (
    ("ChatCORE", "chatcore"),
    ("ChatCORE without SpellingBee", "chatcore_without_spellingbee"),
)
CHAT_EVAL = (
    ("source", "source", str),
    ("step", "step", count),
    *((label, key, share) for label, key in CHATCORES),
    ("time", "seconds", duration),
    ("examples a second", "examples_per_second", tenths),
)
FIGURES: dict[str, Sequence[tuple[str, str, Callable[[Any], str]]]] = {
    "tok_train": (
        ("vocabulary", "vocab_size", count),
        ("characters read", "characters", count),
        ("documents read", "documents", count),
        ("time", "seconds", duration),
        ("bytes of a token, mean", "token_bytes.mean", hundredths),
        ("bytes of a token, standard deviation", "token_bytes.std", hundredths),
        ("bytes of a token, least", "token_bytes.min", count),
        ("bytes of a token, most", "token_bytes.max", count),
    ),
    "tok_eval": (),
    "base_train": TRAINING,
    "base_loss": (
        ("step", "step", count),
        ("bits per byte, training text", "bpb.train", share),
        ("bits per byte, validation text", "bpb.val", share),
    ),
    "base_eval": (("CORE", "core", share), ("time", "seconds", duration)),
    "mid_train": TRAINING,
    "chat_eval_mid": CHAT_EVAL,
    "chat_sft": TRAINING,
    "chat_eval_sft": CHAT_EVAL,
    "chat_rl": (
        ("steps", "steps", count),
        ("time", "seconds", duration),
        ("reward, first tenth of the steps", "first_reward", share),
        ("reward, last tenth of the steps", "last_reward", share),
        ("greedy accuracy, before", "first_accuracy", share),
        ("greedy accuracy, after", "accuracy", share),
    ),
    "chat_eval_rl": CHAT_EVAL,
}
STAGES = tuple(FIGURES)


def render(
    results: dict[str, dict], problems: dict[str, str], pictures: Sequence[str], dollars_per_hour: float
) -> str:
    """Return report.md.

    results: what each stage left, and "start"; problems: why there is nothing of a stage ("not run");
    pictures: those of PICTURES that lie beside the report.
    """
    figures = {name: f"![{PICTURES[name]}]({name})" for name in pictures}
    parts = [
        "# Saint Iberis: report",
        "## Summary",
        summary(results),
        "Accuracy +- its standard error; n is the number of items.",
        figures.pop("chat_tasks.png", ""),
        "## Environment",
        environment(results["start"]) if "start" in results else f"reset: {problems['start']}",
        "## Wall clock and cost",
        wall_clock(results, problems, dollars_per_hour),
        "Of a stage that was cut off and resumed, what came after its last save is not counted.",
        elapsed(results, dollars_per_hour),
        *(["## Curves", *figures.values()] if figures else []),
        *(section(stage, results[stage]) for stage in STAGES if stage in results),
    ]
    return printable("\n\n".join(filter(None, parts)) + "\n")


def card(results: dict[str, dict], problems: dict[str, str]) -> str:
    """Return the summary and the names of the stages without results, for a terminal."""
    gaps = [f"{stage}: {problems[stage]}" for stage in STAGES if stage in problems]
    return printable("\n".join([summary(results), *gaps]))


def task_names(results: dict[str, dict]) -> list[str]:
    """Return the chat tasks that any stage was evaluated on, in the order of their first mention."""
    return list(
        dict.fromkeys(task for stage in CHAT_EVALS.values() for task in entries(results, stage, "tasks"))
    )


def chance(results: dict[str, dict], task: str) -> float | None:
    """Return the accuracy of guessing on a chat task, where a stage states it."""
    stated = (dig(results, stage, "tasks", task, "chance") for stage in CHAT_EVALS.values())
    return next(filter(is_number, stated), None)


def summary(results: dict[str, dict]) -> str:
    """One row a metric, one column a stage of the model."""

    def score(stage: str, task: str) -> str:
        accuracy, error = (dig(results, stage, "tasks", task, key) for key in ("accuracy", "standard_error"))
        return show(accuracy, share) + (f" +- {error:.4f}" if is_number(error) else "")

    rows = [["CORE", "-", "-", show(dig(results, "base_eval", "core"), share), *("-" for _ in CHAT_EVALS)]]
    for task in task_names(results):
        sizes = [show(dig(results, stage, "tasks", task, "n"), count) for stage in CHAT_EVALS.values()]
        sizes = dict.fromkeys(size for size in sizes if size != "-")
        scores = [score(stage, task) for stage in CHAT_EVALS.values()]
        rows.append([task, show(chance(results, task), share), " / ".join(sizes) or "-", "-", *scores])
    for label, key in CHATCORES:
        scores = [show(dig(results, stage, key), share) for stage in CHAT_EVALS.values()]
        rows.append([label, "-", "-", "-", *scores])
    return table(["Metric", "Chance", "n", "BASE", *CHAT_EVALS], rows)


def environment(start: dict[str, Any]) -> str:
    """The machine and the versions at the start of the run."""
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
    """Seconds of all stages together."""
    return sum(filter(is_number, (dig(results, stage, "wall_seconds") for stage in STAGES)))


def cost(seconds: float, dollars_per_hour: float) -> str:
    """Price of the time."""
    return f"${seconds / 3600 * dollars_per_hour:,.2f}"


def wall_clock(results: dict[str, dict], problems: dict[str, str], dollars_per_hour: float) -> str:
    """A row a stage, and their sum."""
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
    """From the start of the report to the last result, pauses included; empty where either is not known."""
    began = dig(results, "start", "started_at")
    ends = list(filter(is_number, (dig(results, stage, "finished_at") for stage in STAGES)))
    if not is_number(began) or not ends or max(ends) < began:
        return ""
    seconds = max(ends) - began
    return (
        f"From the start to the last result: {duration(seconds)}, {cost(seconds, dollars_per_hour)}, "
        "set-up, downloads and pauses included."
    )


def section(stage: str, result: dict[str, Any]) -> str:
    """Key figures of a stage, its own tables, and its settings folded."""
    rows = [(label, show(dig(result, *path.split(".")), form)) for label, path, form in FIGURES[stage]]
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
    """Bytes per token, a row a text and a column a tokenizer, with each one's distance from ours."""
    sizes, texts = entries(result, "vocab_size"), entries(result, "texts")

    def cell(text: str, name: str) -> str:
        ratio, ours = (dig(texts, text, "bytes_per_token", key) for key in (name, "ours"))
        is_known = name != "ours" and is_number(ratio) and is_number(ours) and ours > 0
        return show(ratio, hundredths) + (f" ({ratio / ours - 1:+.1%})" if is_known else "")

    rows = [["vocabulary", "", *(show(size, count) for size in sizes.values())]]
    for text in texts:
        rows.append([text, show(dig(texts, text, "bytes"), count), *(cell(text, name) for name in sizes)])
    return table(["bytes per token", "bytes", *sizes], rows)


def core_table(result: dict[str, Any]) -> str:
    """The tasks of CORE, and which are missing."""
    keys = (("accuracy", share), ("random_baseline", _of_percent), ("centered", share), ("n", count))
    tasks = entries(result, "tasks")
    rows = [(task, *(show(dig(tasks, task, key), form) for key, form in keys)) for task in tasks]
    missing = escape(", ".join(map(str, items(result, "missing_tasks"))))
    note = f"\n\nNot evaluated, so this CORE compares with no other: {missing}." if missing else ""
    return table(("task", "accuracy", "chance", "centered", "n"), rows) + note


def _of_percent(value: float) -> str:
    return share(value / 100)  # as the bundle has it


def samples(result: dict[str, Any]) -> str:
    """What the base model wrote, quoted; long lines are broken."""
    texts = map(str, items(result, "samples"))
    return "\n\n".join(fence("\n".join(map(_wrap, text.split("\n")))) for text in texts)


def _wrap(line: str) -> str:
    return textwrap.fill(line, 100, expand_tabs=False, replace_whitespace=False, drop_whitespace=False)


def rewards_table(result: dict[str, Any]) -> str:
    """A row each task that was practised, if there were several."""
    tasks = entries(result, "rewards")
    rows = [(task, *(show(dig(tasks, task, key), share) for key in ("first", "last"))) for task in tasks]
    return table(("reward", "first tenth of the steps", "last tenth"), rows) if len(rows) > 1 else ""


DETAILS = {
    "tok_eval": tokenizer_table,
    "base_eval": core_table,
    "base_loss": samples,
    "chat_rl": rewards_table,
}
