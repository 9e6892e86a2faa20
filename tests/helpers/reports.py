"""The results of an unfinished run, and functions to write results and metrics and to read the report."""

import json

from nanochat.report.__main__ import main

TASKS = {
    "ARC-Easy": {"accuracy": 0.38, "standard_error": 0.01, "n": 2376, "chance": 0.25},
    "GSM8K": {"accuracy": 0.0341, "standard_error": 0.005, "n": 1319, "chance": 0},
}
RESULTS = {
    "tok_train": {"config": {"vocab_size": 65536}, "vocab_size": 65536, "token_bytes": {"mean": 6.625}},
    "tok_eval": {
        "vocab_size": {"ours": 65536, "gpt2": 50257},
        "texts": {"news": {"bytes": 1819, "bytes_per_token": {"ours": 4.0, "gpt2": 4.5}}},
    },
    "base_train": {
        "settings": {"depth": 20},
        "parameters": {"total": 542_035_200},
        "train_seconds": 9000.0,
        "median_mfu": None,
        "peak_memory_bytes": 3 << 29,
        "val_bpb": 0.8287,
        "wall_seconds": 9300.0,
        "finished_at": 10_000.0,
    },
    "base_loss": {"bpb": {"train": 0.81, "val": 0.8287}, "samples": ["The capital of France is Paris."]},
    "base_eval": {
        "core": 0.1796,
        "tasks": {"squad": {"accuracy": 0.4, "centered": 0.2, "n": 500, "random_baseline": 25.0}},
        "missing_tasks": ["coqa", "lambada"],
        "wall_seconds": 300,
    },
    "chat_eval_mid": {"tasks": TASKS, "chatcore": 0.2348, "chatcore_without_spellingbee": 0.11},
    "chat_eval_sft": {"tasks": {"ARC-Easy": {"accuracy": 0.3864, "n": 400}}, "wall_seconds": 2100},
}


def write_results(folder):
    """Write RESULTS to a new folder and return it."""
    folder.mkdir(parents=True)
    for stage, result in RESULTS.items():
        (folder / f"{stage}.json").write_text(json.dumps(result))
    return folder


def generate(folder, *flags):
    """Generate the report of a folder and return its text."""
    assert main(["generate", *(flags or ["--dollars-per-hour=24"])]) == 0
    return (folder / "report.md").read_text(encoding="utf-8")


def unpadded_lines(text):
    """Return the lines of a text without the padding of tables."""
    return [" ".join(line.split()) for line in text.splitlines()]


def write_metrics(path, n_steps=40, evals=(0, 20, 40)):
    """Write a metrics.jsonl of training steps and evaluations; return its path as text."""
    steps = [
        {"step": i, "loss": 5.0, "smooth_loss": 9 / (i + 1), "tokens_per_second": 900 + i, "train_seconds": i}
        for i in range(n_steps)
    ]
    evals = [{"step": i, "val_bpb": 2 - i / 99, "train_seconds": float(i)} for i in evals]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in steps + evals))
    return str(path)
