r"""Measure the compression of the tokenizer, in bytes of text per token, and compare it with GPT-2 and GPT-4.

More bytes per token mean more text for the same context length and compute. The comparison is fair only
between vocabularies of similar size: GPT-2 has 50,257 tokens, GPT-4 has 100,277. tiktoken reads both from
TIKTOKEN_CACHE_DIR or downloads them; an unavailable one is skipped. Write report/tok_eval.json.

    python -m scripts.tok_eval
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING

from nanochat.common import parse, require_at_least, run, write_report

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer

PRETRAINED = ("gpt2", "cl100k_base")

NEWS = """
The harbour authority said on Tuesday that the night ferry would return to service in June, eight months after
a storm tore the old landing stage from its piles. Repairs have cost 4.2 million pounds, a third more than the
council had set aside, and the difference will be met by a levy of 35 pence on each ticket. "People on the
islands have waited long enough," said the chairwoman, Ellen Marsh. "They can't plan a hospital visit around
the tides." Fishing crews, who lost eleven days of work in October, weren't consulted, their union complained.
"""

CODE = '''
def running_median(values: Iterable[float], width: int = 5) -> Iterator[float]:
    """Yield the median of each window of `width` values."""
    window: list[float] = []
    for i, value in enumerate(values):
        bisect.insort(window, value)
        if len(window) > width:
            del window[bisect.bisect_left(window, values[i - width])]
        if len(window) == width:
            yield window[width // 2] if width % 2 else 0.5 * (window[width // 2 - 1] + window[width // 2])

for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }  // dot product
'''

# About the Korean alphabet, which children learn with a song.
KOREAN = (
    "\ud55c\uae00\uc740 \uc138\uc885\ub300\uc655\uc774 1443\ub144\uc5d0 \ub9cc\ub4e0 \uae00\uc790\uc774"
    "\ub2e4. \uc18c\ub9ac\ub97c \ub0b4\ub294 \uc785\uacfc \ud600\uc758 \ubaa8\uc591\uc744 \ubcf8\ub5a0 "
    "\ub9cc\ub4e4\uc5b4, \ub204\uad6c\ub098 \uc27d\uac8c \ubc30\uc6b8 \uc218 \uc788\ub2e4. \uc624\ub298"
    "\ub3c4 \uc544\uc774\ub4e4\uc740 \uac00\ub098\ub2e4\ub97c \ub178\ub798\ud558\uba70 \uc77d\uace0 \uc4f0"
    "\uae30\ub97c \uc775\ud78c\ub2e4."
)

# About spring in a village: snow melts, rice is planted, frogs call at night.
JAPANESE = (
    "\u6625\u306b\u306a\u308b\u3068\u3001\u5c71\u306e\u96ea\u304c\u6eb6\u3051\u3066\u5ddd\u306e\u6c34\u304c"
    "\u5897\u3048\u308b\u3002\u6751\u306e\u4eba\u3005\u306f\u7530\u306b\u6c34\u3092\u5f15\u304d\u3001\u82d7"
    "\u3092\u690d\u3048\u308b\u6e96\u5099\u3092\u59cb\u3081\u308b\u3002\u30ab\u30a8\u30eb\u306e\u58f0\u304c"
    "\u805e\u3053\u3048\u308b\u591c\u306b\u306f\u3001\u3082\u3046\u590f\u304c\u8fd1\u3044\u3053\u3068\u3092"
    "\u8ab0\u3082\u304c\u77e5\u3063\u3066\u3044\u308b\u3002"
)

MATHS = r"""
Let $f : [0, 1] \to \mathbb{R}$ be continuous with $f(0) = f(1)$. For every integer $n \ge 1$ there is an $x$
with $f(x) = f(x + 1/n)$. Indeed, put $g(x) = f(x + 1/n) - f(x)$ for $0 \le x \le 1 - 1/n$. Then
\begin{align*}
  \sum_{k=0}^{n-1} g(k/n) = f(1) - f(0) = 0,
\end{align*}
so either some $g(k/n)$ is zero, or two of them differ in sign and $g$ vanishes in between. $\blacksquare$
"""

SCIENCE = """
Mitochondria keep a small genome of their own, about 16,569 base pairs in humans, which codes for 13 proteins
of the respiratory chain. Electrons from NADH pass through complexes I, III and IV to oxygen, and the protons
pumped on the way return through ATP synthase, which turns at up to 130 revolutions per second. At pH 7.4 and
37 degrees Celsius the hydrolysis of ATP to ADP and phosphate releases roughly 50 kJ/mol inside the cell.
"""

TEXTS = {
    "news": NEWS,
    "code": CODE,
    "Korean": KOREAN,
    "Japanese": JAPANESE,
    "maths": MATHS,
    "science": SCIENCE,
}


@dataclass(frozen=True, kw_only=True)
class TokEvalConfig:
    """The text to encode, and a limit on downloads."""

    data: str = "auto"
    """source of text: auto, hub (FineWeb-EDU, as hub:fineweb), hub:climbmix, embedded, or a path of parquet,
    jsonl or txt files"""
    max_chars: int = 1_000_000
    """number of characters to encode, of the training and of the validation text"""
    download_timeout: float = 15.0
    """seconds to wait for a vocabulary of tiktoken before it is skipped"""

    def __post_init__(self) -> None:
        require_at_least(self, max_chars=1)
        if not 0 < self.download_timeout < math.inf:
            raise ValueError(f"download_timeout={self.download_timeout} must be finite and above 0")


def first_documents(batches: Iterable[list[str]], max_chars: int) -> Iterator[str]:
    """Yield documents of max_chars characters in total; the last one is truncated."""
    for text in chain.from_iterable(batches):
        yield text[:max_chars]
        max_chars -= len(text)
        if max_chars <= 0:
            return


def load_pretrained(name: str, timeout: float) -> RustBPETokenizer:
    """Return an encoding of tiktoken; raise OSError if it is not available within `timeout` seconds.

    tiktoken downloads without a time limit, so this uses a daemon thread, which is abandoned at the timeout.
    """
    from nanochat.tokenizer import RustBPETokenizer

    outcome: Queue[RustBPETokenizer | OSError] = Queue()

    def load() -> None:
        try:
            outcome.put(RustBPETokenizer.from_pretrained(name))
        except OSError as error:  # includes the errors of requests
            outcome.put(error)

    Thread(target=load, daemon=True).start()
    try:
        result = outcome.get(timeout=timeout)
    except Empty:
        raise TimeoutError(f"no download within {timeout:g} s") from None
    if isinstance(result, OSError):
        raise result
    return result


def table(sizes: dict[str, int], texts: dict[str, dict]) -> str:
    """Return a table of bytes per token: a row for each text, a column for each tokenizer.

    Cells of other tokenizers also show the relative difference from ours.
    """
    lines = [f"{'bytes per token':16}{'bytes':>10}" + "".join(f"{name:>20}" for name in sizes)]
    lines.append(f"{'vocabulary':16}{'':10}" + "".join(f"{size:20,}" for size in sizes.values()))
    for kind, row in texts.items():
        ratios = row["bytes_per_token"]
        cells = [f"{ratio:.2f} ({ratio / ratios['ours'] - 1:+6.1%})" for ratio in ratios.values()]
        cells[0] = f"{ratios['ours']:.2f}"
        lines.append(f"{kind:16}{row['bytes']:10,}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Encode the texts, print the table and write report/tok_eval.json."""
    config = parse(TokEvalConfig, argv)
    from nanochat.dataset import parquets_iter_batched, source
    from nanochat.tokenizer import get_tokenizer

    config = replace(config, data=source(config.data))
    tokenizers = {"ours": get_tokenizer()}
    for name in PRETRAINED:
        try:
            tokenizers[name] = load_pretrained(name, config.download_timeout)
        except OSError as error:
            reason = f"not in TIKTOKEN_CACHE_DIR, and the download failed ({type(error).__name__})"
            print(f"skipped {name}: {reason}")

    samples = {kind: [text] for kind, text in TEXTS.items()}
    for split in ("train", "val"):
        batches = parquets_iter_batched(split, data=config.data)
        samples[split] = list(first_documents(batches, config.max_chars))

    texts = {}
    for kind, documents in samples.items():
        n_bytes = sum(len(text.encode()) for text in documents)
        texts[kind] = {
            "bytes": n_bytes,
            "bytes_per_token": {
                name: n_bytes / sum(map(len, tokenizer.encode(documents)))
                for name, tokenizer in tokenizers.items()
            },
        }
    sizes = {name: tokenizer.get_vocab_size() for name, tokenizer in tokenizers.items()}
    print(table(sizes, texts))
    results = {"config": asdict(config), "vocab_size": sizes, "texts": texts}
    write_report("tok_eval", results)
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in texts["val"]["bytes_per_token"].items())
    print(f"bytes per token on the validation text: {ratios}")
    return 0


if __name__ == "__main__":
    run(main)
