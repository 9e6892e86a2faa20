"""Train the tokenizer on the training text.

Read documents, each truncated to doc_cap characters, up to max_chars characters in total. Write the tokenizer
and token_bytes.pt, the number of bytes of each token, to $NANOCHAT_BASE_DIR/tokenizer, and its statistics to
report/tok_train.json.

    python -m scripts.tok_train                          # the published recipe: 65,536 tokens
    python -m scripts.tok_train --data=hub:climbmix      # saint_iberis_2
    python -m scripts.tok_train --data=embedded --vocab_size=4096
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from nanochat.common import atomic_write, base_dir, parse, require_at_least, run, write_report

if TYPE_CHECKING:
    from tqdm import tqdm

# Difficult text: contractions, numbers, code, both line endings, CJK, Cyrillic, emoji of several code points,
# a no-break space, spelled-out special tokens, a lone combining mark, trailing spaces.
HARD_TEXT = (
    "I've said: don't!! 1234567 3.14e-10\r\n\tdef f(x):\n        return x**2  # \n\n\n"
    "\ud55c\uad6d\uc5b4 \u65e5\u672c\u8a9e \u4e2d\u6587 \u0440\u0443\u0441 \U0001f469\u200d\U0001f680\u00a0"
    "\U0001f1eb\U0001f1f7 <|bos|><|assistant_end|> \u0301   "
)


@dataclass(frozen=True, kw_only=True)
class TokTrainConfig:
    """The training text and the size of the vocabulary."""

    data: str = "auto"
    """source of text: auto, hub (FineWeb-EDU, as hub:fineweb), hub:climbmix, embedded, or a path of parquet,
    jsonl or txt files"""
    max_chars: int = 2_000_000_000
    """maximum number of characters to read"""
    doc_cap: int = 10_000
    """maximum number of characters to read from one document"""
    vocab_size: int = 65_536
    """number of tokens, including the 256 bytes and the 9 special tokens"""

    def __post_init__(self) -> None:
        require_at_least(self, max_chars=1, doc_cap=1)


def capped(
    texts: Iterable[str], config: TokTrainConfig, progress: tqdm, counts: dict[str, int]
) -> Iterator[str]:
    """Yield documents truncated to doc_cap, up to max_chars in total; add the yielded amounts to `counts`."""
    for text in texts:
        text = text[: min(config.doc_cap, config.max_chars - counts["characters"])]
        counts["characters"] += len(text)
        counts["documents"] += 1
        progress.update(len(text))
        yield text
        if counts["characters"] == config.max_chars:
            break
    progress.total = progress.n
    progress.set_description("learning merges")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, check that the tokenizer is lossless, save it and write report/tok_train.json."""
    config = parse(TokTrainConfig, argv)
    from tqdm import tqdm

    from nanochat.dataset import parquets_iter_batched, source
    from nanochat.tokenizer import RustBPETokenizer

    config = replace(config, data=source(config.data))
    start = time.perf_counter()
    counts = {"characters": 0, "documents": 0}
    texts = chain.from_iterable(parquets_iter_batched("train", data=config.data))
    with tqdm(total=config.max_chars, unit="char", unit_scale=True, desc="reading", disable=None) as progress:
        tokenizer = RustBPETokenizer.train_from_iterator(
            capped(texts, config, progress, counts), config.vocab_size
        )
    seconds = time.perf_counter() - start

    if (decoded := tokenizer.decode(tokenizer.encode(HARD_TEXT))) != HARD_TEXT:
        raise ValueError(
            f"the tokenizer is not saved, since it is not lossless: it decodes {HARD_TEXT!r} as {decoded!r}"
        )
    tokenizer.save(base_dir() / "tokenizer")
    import torch  # not above: learning merges does not need it

    with atomic_write(
        base_dir() / "tokenizer" / "token_bytes.pt"
    ) as file:  # for scripts that read nanochat's
        torch.save(torch.from_numpy(tokenizer.token_bytes()), file)

    lengths = tokenizer.token_bytes()
    lengths = lengths[lengths > 0]
    results = {
        "config": asdict(config),
        "seconds": seconds,
        **counts,
        "vocab_size": tokenizer.get_vocab_size(),
        "token_bytes": {
            "mean": float(lengths.mean()),
            "std": float(lengths.std()),
            "min": int(lengths.min()),
            "max": int(lengths.max()),
        },
    }
    write_report("tok_train", results)
    print(
        f"tokenizer: {results['vocab_size']:,} tokens of {lengths.mean():.1f} bytes on average, learned from "
        f"{counts['characters']:,} characters of {counts['documents']:,} documents in {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    run(main)
