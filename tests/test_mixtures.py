"""The tasks of the stages with small copies of the hub's data sets: names, columns, splits."""

import pytest

from nanochat.chat_format import render_conversation
from tasks import mixtures
from tasks.spellingbee import SimpleSpelling
from tests.helpers.hub_data import write_hub_data
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture
def hub(base_dir, monkeypatch):
    write_hub_data(base_dir, monkeypatch)
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
