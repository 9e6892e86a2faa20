"""Small copies of the hub's data sets for chat: folders in the layout of their repositories."""

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.data.shards import write_parquet
from nanochat.dataset import HUB_TEXTS
from tasks.hub import _load_files

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
ARC = {
    "question": "Why?",
    "choices": {"text": ["so", "thus", "no"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
MMLU = {"question": "Which?", "subject": "", "choices": ["a", "b", "c", "d"], "answer": 3}
GSM8K = {"question": "1+1?", "answer": "It is 1+1=<<1+1=2>>2.\n#### 2"}
HUMANEVAL = {"prompt": "def f():\n", "canonical_solution": "    pass\n", "test": "", "entry_point": "f"}
# (repository, subset, splits that are used, row), as on the hub
DATASETS = [
    ("HuggingFaceTB/smol-smoltalk", "data", ["train", "test"], {"messages": TALK, "source": "x"}),
    ("cais/mmlu", "all", ["auxiliary_train", "test"], MMLU),
    ("openai/gsm8k", "main", ["train", "test"], GSM8K),
    ("allenai/ai2_arc", "ARC-Easy", ["train", "test"], {"id": "1", **ARC}),
    ("allenai/ai2_arc", "ARC-Challenge", ["train", "test"], {"id": "1", **ARC}),
    ("openai/openai_humaneval", "openai_humaneval", ["test"], {"task_id": "0", **HUMANEVAL}),
]


def write_hub_data(base_dir, monkeypatch):
    """Write all data sets of the mixtures and the words to spell; the folders stand in for the hub."""
    monkeypatch.setattr(
        "tasks.hub._load_from_hub",
        lambda repo, subset, split: _load_files(base_dir / repo, subset or "data", split),
    )
    for text in HUB_TEXTS:
        text.directory.mkdir(parents=True)
        for name in ("shard_00000.parquet", text.val_shard):
            write_parquet(text.directory / name, ["words"] * 8)
    (base_dir / "words_alpha.txt").write_text("\n".join(f"{a}n{b}" for a in "abcdefgh" for b in "stuvwxyz"))
    for repo, subset, splits, row in DATASETS:
        for split in splits:
            folder = base_dir / repo / subset
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([row] * 3), folder / f"{split}-00000-of-00001.parquet")
