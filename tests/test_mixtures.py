"""The tasks of the stages with small copies of the hub's data sets: names, columns, splits."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.chat_format import render_conversation
from nanochat.data.shards import write_parquet
from nanochat.dataset import HUB_TEXTS
from tasks import mixtures
from tasks.hub import _load_files
from tasks.spellingbee import SimpleSpelling
from tests.helpers.vocabulary import train_tokenizer

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


@pytest.fixture
def hub(base_dir, monkeypatch):
    """All data sets of the mixtures: folders in the layout of their repositories stand in for the hub."""
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
    return base_dir


def test_datasets_of_the_hub(hub, monkeypatch):
    """Regression: missing data sets were noticed only after pretraining."""
    tokenizer = train_tokenizer()
    for (train, val), n in ((mixtures.mid_tasks("hub"), 280_009), (mixtures.sft_tasks("hub"), 612)):
        assert len(train) == n
        for task in (train, val):
            for index in [*range(0, len(task), 9973), len(task) - 1]:
                assert render_conversation(tokenizer, task[index], 2048)[1][-1] == 1
    assert mixtures.main([]) == 0
    (hub / "allenai/ai2_arc/ARC-Challenge/test-00000-of-00001.parquet").unlink()
    with pytest.raises(OSError, match="ARC-Challenge/test"):
        mixtures.main([])


def test_words_are_english_words(hub):
    """At the hub's scale they are those of the published run; they were words of the text."""
    bee = mixtures.eval_tasks("hub:climbmix")["SpellingBee"]()
    assert {word[1] for word in bee.words} == {"n"}
    for tasks in (mixtures.mid_tasks, mixtures.sft_tasks):
        spelling = [task for task in tasks("hub")[0].tasks if isinstance(task, SimpleSpelling)]
        assert [{word[1] for word in task.words} for task in spelling] == [{"n"}]


def test_help_and_unknown_arguments_start_no_download(monkeypatch, capsys):
    """Regression: both started a download."""
    monkeypatch.setattr(mixtures, "mid_tasks", None)
    with pytest.raises(SystemExit) as end:
        mixtures.main(["--help"])
    assert end.value.code == 0
    assert "download the hub's data sets" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Unrecognized options: --stage=mid"):
        mixtures.main(["--stage=mid"])


@pytest.mark.parametrize("make", [mixtures.rl_tasks, mixtures.eval_tasks])
@pytest.mark.parametrize("data", ["own.jsonl", "/no/such", "nonsense"])
def test_own_conversations_cannot_grade(make, data):
    """Regression: RL used the embedded questions for any path."""
    with pytest.raises(ValueError, match=f"data='{data}' must be hub, embedded or auto"):
        make(data)
