"""Compare the speed of rustbpe: training with the published wheel of that name, encoding with tiktoken.

Both train on the same text, alternately, each time in a new process that reads the text before the timer
starts; the medians are printed. The wheel is installed in a separate environment,
$NANOCHAT_BASE_DIR/bench_venv.

    python -m scripts.bench_tokenizer                          # the embedded text, repeated
    python -m scripts.bench_tokenizer --data=PATH --vocab_size=65536

"growth" is the increase of peak resident memory during training, after the text has been loaded.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from nanochat.common import base_dir, parse, run

WHEEL = "rustbpe==0.1.0"

# Runs in both environments. Arguments: file of texts, file for the ranks, vocabulary size, pattern.
TRAINING = """
import json, resource, sys, time
import rustbpe
def peak_kb():
    try:  # on Linux a process inherits the ru_maxrss of its parent
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except FileNotFoundError:  # macOS, where the unit is bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with open(sys.argv[1], encoding="utf-8") as file:
    texts = [json.loads(line) for line in file]
tokenizer = rustbpe.Tokenizer()
peak_before, start = peak_kb(), time.perf_counter()
tokenizer.train_from_iterator(iter(texts), int(sys.argv[3]), pattern=sys.argv[4])
seconds, peak = time.perf_counter() - start, peak_kb()
with open(sys.argv[2], "w") as file:
    json.dump([[token.hex(), rank] for token, rank in tokenizer.get_mergeable_ranks()], file)
print(json.dumps({"seconds": seconds, "peak_kb": peak, "growth_kb": peak - peak_before}))
"""


@dataclass(frozen=True, kw_only=True)
class BenchTokenizerConfig:
    """The text, the vocabulary and the number of runs."""

    data: str = "embedded"
    """source of text: auto, hub (FineWeb-EDU, as hub:fineweb), hub:climbmix, embedded, or a path of parquet,
    jsonl or txt files"""
    max_chars: int = 100_000_000
    """number of characters to train on; shorter text is repeated"""
    vocab_size: int = 32_768
    """number of tokens to train, including the 256 bytes"""
    encode_chars: int = 20_000_000
    """number of characters to encode, from the end of the text"""
    repeats: int = 3
    """number of runs; the median is printed"""

    def __post_init__(self) -> None:
        for name in ("max_chars", "encode_chars", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def read_texts(data: str, max_chars: int) -> list[str]:
    """Return documents of `max_chars` characters in total; shorter text is repeated."""
    from nanochat.dataset import parquets_iter_batched

    texts: list[str] = []
    n_chars = 0
    while n_chars < max_chars:
        for document in chain.from_iterable(parquets_iter_batched("train", data=data)):
            texts.append(document[: max_chars - n_chars])
            n_chars += len(texts[-1])
            if n_chars == max_chars:
                break
        if n_chars == 0:
            raise ValueError(f"data={data!r} has no text; give files with text")
    return texts


def wheel_python() -> Path:
    """Return the Python of an environment with the published wheel, which is created on first use."""
    environment = base_dir() / "bench_venv"
    python = environment / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([python, "-c", "import rustbpe"], capture_output=True).returncode == 0
    ):
        return python
    if shutil.which("uv"):
        commands = [
            ["uv", "venv", "--clear", "--python", sys.executable, environment],
            ["uv", "pip", "install", "--python", python, WHEEL],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", "--clear", environment],
            [python, "-m", "pip", "install", WHEEL],
        ]
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, text=True)
    return python


def train(python: Path, texts: Path, ranks: Path, config: BenchTokenizerConfig) -> dict[str, float]:
    """Train once in a new process and write the ranks; return seconds, peak_kb and growth_kb."""
    from nanochat.tokenizer import SPLIT_PATTERN

    command = [python, "-c", TRAINING, texts, ranks, str(config.vocab_size), SPLIT_PATTERN]
    result = subprocess.run(command, capture_output=True, text=True, cwd=texts.parent)
    if result.returncode:
        raise ValueError(f"training with {python} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout)


def bench_training(texts: list[str], config: BenchTokenizerConfig) -> None:
    """Print a row for rustbpe and one for the wheel; raise ValueError if their merges differ."""
    pythons = {"rustbpe": Path(sys.executable)}
    try:
        pythons["wheel"] = wheel_python()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        print(f"the published wheel is left out, as it cannot be installed: {reason}")

    results: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        text_file = Path(folder) / "texts.jsonl"
        text_file.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
        for _ in range(config.repeats):
            for name, python in pythons.items():
                results[name].append(train(python, text_file, Path(folder) / f"{name}.json", config))
        ranks = [(Path(folder) / f"{name}.json").read_text() for name in pythons]

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    medians = {
        name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in results.items()
    }
    print(f"training   {megabytes:.1f} MB, {len(json.loads(ranks[0])):,} tokens, median of {config.repeats}")
    print(f"{'':10} {'seconds':>9} {'MB/s':>9} {'peak MB':>9} {'growth MB':>9} {'time ratio':>11}")
    for name, row in medians.items():
        seconds, peak, growth = row["seconds"], row["peak_kb"] / 1024, row["growth_kb"] / 1024
        ratio = seconds / medians["rustbpe"]["seconds"]
        print(f"{name:10} {seconds:9.2f} {megabytes / seconds:9.1f} {peak:9.0f} {growth:9.0f} {ratio:11.2f}")
    if len(ranks) == 2:
        if ranks[0] != ranks[1]:
            raise ValueError("rustbpe and the wheel learned different merges")
        print("merges     identical")


def bench_encoding(texts: list[str], config: BenchTokenizerConfig) -> None:
    """Print the encoding speed of rustbpe and of tiktoken; raise ValueError if their tokens differ."""
    import tiktoken

    import rustbpe
    from nanochat.tokenizer import SPLIT_PATTERN

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), config.vocab_size, pattern=SPLIT_PATTERN)
    ranks = dict(tokenizer.get_mergeable_ranks())
    encoding = tiktoken.Encoding("bench", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    encoded, n_chars = [], 0
    for text in reversed(texts):
        if n_chars >= config.encode_chars:
            break
        encoded.append(text[: config.encode_chars - n_chars])
        n_chars += len(encoded[-1])

    encoders: dict[str, Callable[[], Any]] = {
        "rustbpe.encode": lambda: [tokenizer.encode(text) for text in encoded],
        "rustbpe.batch_encode": lambda: tokenizer.batch_encode(encoded),
        "tiktoken.encode_ordinary_batch": lambda: encoding.encode_ordinary_batch(encoded),
    }
    megabytes = sum(len(text.encode()) for text in encoded) / 1e6
    print(f"encoding   {megabytes:.1f} MB, median of {config.repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    outputs = {}
    for _ in range(config.repeats):
        for name, encode in encoders.items():
            start = time.perf_counter()
            outputs[name] = encode()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(f"{name:32} {megabytes / median(times):6.1f} MB/s")
    if any(output != outputs["rustbpe.encode"] for output in outputs.values()):
        raise ValueError("rustbpe and tiktoken encoded differently")
    print("tokens     identical")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure training, then encoding."""
    config = parse(BenchTokenizerConfig, argv)
    texts = read_texts(config.data, config.max_chars)
    bench_training(texts, config)
    bench_encoding(texts, config)
    return 0


if __name__ == "__main__":
    run(main)
