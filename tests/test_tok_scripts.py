"""scripts.tok_train and scripts.tok_eval, run by their main functions on a small corpus."""

import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer
from scripts import tok_eval, tok_train

TRAIN = [
    f"Chapter {i}. The river rises in the hills, and runs {i} miles to the sea. \u00c9t\u00e9!\n"
    * (i % 7 + 1)
    for i in range(200)
]
VAL = ["The sea is cold in the winter, and the river is not.\n" * 5] * 10


@pytest.fixture
def corpus(tmp_path):
    """A folder with two training shards and a validation shard."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, texts in enumerate([TRAIN[:120], TRAIN[120:], VAL]):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{number:05d}.parquet", row_group_size=50)
    return folder


def report(base_dir, name):
    return json.loads((base_dir / "report" / name).read_text())


def test_tok_train(corpus, base_dir, capsys):
    assert tok_train.main([f"--data={corpus}", "--vocab_size=300", "--doc-cap=200"]) == 0
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == 300
    saved = torch.load(base_dir / "tokenizer" / "token_bytes.pt")
    assert saved.dtype == torch.int32
    assert saved.tolist() == get_token_bytes().tolist() == tokenizer.token_bytes().tolist()
    results = report(base_dir, "tok_train.json")
    assert results["characters"] == sum(min(len(text), 200) for text in TRAIN)
    assert results["documents"] == len(TRAIN)
    assert results["vocab_size"] == 300
    lengths = tokenizer.token_bytes()[:-9]
    assert results["token_bytes"]["mean"] == pytest.approx(lengths.mean())
    assert (results["token_bytes"]["min"], results["token_bytes"]["max"]) == (1, lengths.max())
    assert results["config"] == {
        "data": str(corpus),
        "max_chars": 2_000_000_000,
        "doc_cap": 200,
        "vocab_size": 300,
    }
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("tokenizer: 300 tokens of ")
    assert f"learned from {results['characters']:,} characters of 200 documents" in last_line


def test_tok_train_reads_the_training_split_up_to_max_chars(corpus, base_dir):
    assert tok_train.main([f"--data={corpus}", "--vocab_size=300", "--max_chars=1000"]) == 0
    results = report(base_dir, "tok_train.json")
    assert results["characters"] == 1000
    expected = RustBPETokenizer.train_from_iterator(["".join(TRAIN)[:1000]], 300)
    assert get_tokenizer().get_vocab_size() == expected.get_vocab_size()
    assert results["documents"] < len(TRAIN)


@pytest.mark.parametrize("flag", ["--vocab_size=264", "--max_chars=0", "--doc_cap=-1"])
def test_invalid_settings_keep_the_old_tokenizer(corpus, capsys, flag):
    tok_train.main([f"--data={corpus}", "--vocab_size=300"])
    with pytest.raises((ValueError, SystemExit)) as error:
        tok_train.main([f"--data={corpus}", flag])
    assert f"{flag[2:]} must be at least" in str(error.value) + capsys.readouterr().err
    assert get_tokenizer().get_vocab_size() == 300


def test_a_lossy_tokenizer_is_not_saved(corpus, base_dir, monkeypatch):
    """Regression: this was an assert, without a message and not checked by python -O."""
    tok_train.main([f"--data={corpus}", "--vocab_size=300"])
    monkeypatch.setattr(RustBPETokenizer, "decode", lambda self, ids: "lost")
    with pytest.raises(ValueError, match=r"the tokenizer is not saved, .* it decodes .* as 'lost'"):
        tok_train.main([f"--data={corpus}", "--vocab_size=310"])
    assert get_tokenizer().get_vocab_size() == 300


@pytest.mark.parametrize("flag", ["max_chars=0", "download_timeout=0", "download_timeout=nan"])
def test_invalid_settings_of_tok_eval(flag):
    """Regression: a division by zero, or no vocabulary of tiktoken was measured."""
    with pytest.raises(ValueError, match=f"{flag}(.0)? must be"):
        tok_eval.main([f"--{flag}"])


def test_tok_eval(corpus, base_dir, capsys, monkeypatch):
    tok_train.main([f"--data={corpus}", "--vocab_size=300"])
    pretrained = RustBPETokenizer.train_from_iterator(TRAIN, 265)  # one token per byte

    def from_pretrained(name):
        if name == "gpt2":
            return pretrained
        raise ConnectionError("no network")

    monkeypatch.setattr(RustBPETokenizer, "from_pretrained", from_pretrained)
    assert tok_eval.main([f"--data={corpus}", "--max_chars=1000"]) == 0

    results = report(base_dir, "tok_eval.json")
    assert results["vocab_size"] == {"ours": 300, "gpt2": 265}
    assert list(results["texts"]) == [
        "news",
        "code",
        "Korean",
        "Japanese",
        "maths",
        "science",
        "train",
        "val",
    ]
    val = results["texts"]["val"]
    assert val["bytes"] == 1000
    n_tokens = sum(
        len(ids) for ids in get_tokenizer().encode([*[VAL[0]] * 3, VAL[0][: 1000 - 3 * len(VAL[0])]])
    )
    assert val["bytes_per_token"] == {"ours": pytest.approx(1000 / n_tokens), "gpt2": 1.0}

    lines = capsys.readouterr().out.splitlines()
    reason = "not in TIKTOKEN_CACHE_DIR, and the download failed (ConnectionError)"
    assert f"skipped cl100k_base: {reason}" in lines
    row = next(line for line in lines if line.startswith("val"))
    assert row.split() == ["val", "1,000", f"{1000 / n_tokens:.2f}", "1.00", f"({n_tokens / 1000 - 1:.1%})"]
    assert lines[-1] == f"bytes per token on the validation text: ours {1000 / n_tokens:.2f}, gpt2 1.00"


def test_tok_eval_does_not_wait_for_an_unresponsive_network(monkeypatch):
    """tiktoken downloads without a time limit."""
    response, downloads = threading.Event(), []
    monkeypatch.setattr(RustBPETokenizer, "from_pretrained", lambda name: downloads.append(response.wait(60)))
    with pytest.raises(TimeoutError, match=r"no download within 0\.1 s"):
        tok_eval.load_pretrained("gpt2", timeout=0.1)
    assert downloads == []  # it is still waiting
    response.set()


def test_tok_eval_without_tokenizer(corpus):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*python -m scripts\.tok_train"):
        tok_eval.main([f"--data={corpus}"])
