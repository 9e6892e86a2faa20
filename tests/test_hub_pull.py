"""Pull models from a hub on 127.0.0.1: checks, refusals and interrupted downloads."""

import json
import logging
import pickle
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from nanochat.config import N_PUBLISHED, GPTConfig
from nanochat.tokenizer import JSON_FILE, RustBPETokenizer
from scripts import hub
from tests.helpers import chats
from tests.helpers.echo_model import echo_config, echo_model
from tests.helpers.hub_models import CPU, REPO, TAG, ask, expected, in_folders, published
from tests.helpers.hub_server import kill_at
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer, training_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def echo_files(tokenizer, tmp_path):
    return published(echo_model(echo_config(tokenizer.get_vocab_size())), tokenizer, tmp_path)


@pytest.fixture
def served(model_hub, echo_files):
    model_hub.repo, model_hub.files = REPO, in_folders(echo_files)
    return model_hub


def own_model(base_dir, tag="d4"):
    """Save a model of the user's own, with another tokenizer of the same size as the published one."""
    texts = [text.upper() for text in training_texts()]
    tokenizer = RustBPETokenizer.train_from_iterator(texts, VOCAB_SIZE)
    tokenizer.save(base_dir / "tokenizer")
    save_checkpoint(checkpoint_dir("sft", tag), 5, random_model(small_config(vocab_size=350)), None, {})
    return tokenizer


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("lay_out", [in_folders, dict], ids=["folders", "flat"])
def test_the_published_model_is_pulled_and_answers(served, echo_files, lay_out, tokenizer, base_dir, capsys):
    """A model of the user's with the same vocabulary size keeps its tokenizer, and uses it."""
    own = own_model(base_dir)
    served.files = {**lay_out(echo_files), "README.md": b"card", "report/report.md": b"report"}
    before = contents(base_dir)
    assert hub.main(["pull", REPO]) == 0
    assert f"scripts.chat_cli -i sft -g {TAG}" in capsys.readouterr().out
    assert {path: data for path, data in contents(base_dir).items() if path in before} == before
    assert ask(capsys, "-g", TAG) == expected(tokenizer)
    assert load_model("sft", CPU, "eval", "d4")[1].is_same_as(own)
    directory = checkpoint_dir("sft", TAG)
    assert sorted(p.name for p in directory.iterdir()) == ["meta_000700.json", "model_000700.pt", "tokenizer"]
    assert [path.name for path in directory.parent.iterdir() if path.name[0] == "."] == []
    meta = load_model("sft", CPU, "eval", TAG)[2]
    assert (meta["step"], meta["val_loss"], meta["model_config"]["slc_rate"]) == (700, 1.0657, 3)
    assert list(meta["model_config"]) == [field.name for field in fields(GPTConfig)[:N_PUBLISHED]]
    assert meta["pulled_from"]["repo"] == REPO


def test_zero_convolutions_are_reported_in_one_line(served, tokenizer, tmp_path, caplog):
    """The published weights probably have them: the code that trained them did not initialise the taps."""
    model = random_model(small_config(vocab_size=VOCAB_SIZE))
    state = {k: torch.zeros_like(v) if "conv1d" in k else v for k, v in model.state_dict().items()}
    served.files = published(model, tokenizer, tmp_path, state)
    with caplog.at_level(logging.WARNING):
        assert hub.main(["pull", REPO]) == 0
    assert [r.message for r in caplog.records] == [
        "warning: every convolution weight is zero: the SLC2 layers of this model add nothing"
    ]


def test_a_model_of_nanochat_has_only_attention_layers(served, tokenizer, tmp_path):
    model = random_model(small_config(vocab_size=VOCAB_SIZE, slc_rate=0))
    served.files = published(model, tokenizer, tmp_path)
    assert hub.main(["pull", REPO, "-i", "base", "--tag=karpathy"]) == 0
    pulled, _, _ = load_model("base", CPU, "eval", "karpathy")
    assert pulled.config == model.config
    assert torch.equal(pulled.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("plan", [SECOND, {**SECOND, "slc_rate": 0}, {"residual_conv": 4}], ids=str)
def test_a_model_of_the_second_generation_is_pulled_as_one(served, tokenizer, tmp_path, plan):
    """Without a layer plan in its file it is a hybrid if it has SLC2 layers, as of the first generation."""
    model = random_model(small_config(vocab_size=VOCAB_SIZE, **plan))
    served.files = published(model, tokenizer, tmp_path)
    assert hub.main(["pull", REPO, "-i", "base", "--tag=second"]) == 0
    pulled, _, meta = load_model("base", CPU, "eval", "second")
    assert pulled.config == model.config
    assert meta["model_config"].items() >= plan.items()
    state = {
        key: value.bfloat16().float() if "wte" in key else value for key, value in model.state_dict().items()
    }
    assert list(state) == list(pulled.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in pulled.state_dict().items())


def test_a_file_that_does_not_name_the_parts_of_its_weights_is_refused(served, tokenizer, tmp_path):
    model = random_model(small_config(vocab_size=VOCAB_SIZE, **SECOND))
    served.files = published(model, tokenizer, tmp_path)
    meta = json.loads(served.files["meta_000700.json"])
    del meta["model_config"]["x0_mix"]
    served.files["meta_000700.json"] = json.dumps(meta).encode()
    with pytest.raises(ValueError, match=r"(?s)do not fit the architecture.*x0_scales"):
        hub.main(["pull", REPO])


def test_training_continues_with_the_tokenizer_of_the_pulled_model(served, tokenizer, base_dir, tmp_path):
    """Through two stages, although the user has another tokenizer of the same size."""
    own = own_model(base_dir)
    model = random_model(small_config(vocab_size=VOCAB_SIZE))
    served.files = published(model, tokenizer, tmp_path)
    hub.main(["pull", REPO, "-i", "base", "-g", "x"])
    chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "river"}]
    for name in ("own.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(f"{json.dumps(chat)}\n" * 30)
    flags = ["--model-tag=x", f"--data={tmp_path / 'own.jsonl'}", f"--add={tmp_path / 'more.jsonl'}"]
    assert chats.train("mid", *flags, "--num-iterations=1", "--total-batch-size=128") == 0
    assert chats.train("sft", "--source=mid", *flags, "--num-iterations=1") == 0
    assert load_model("mid", CPU, "eval", "x")[1].is_same_as(tokenizer)
    assert load_model("sft", CPU, "eval", "x")[1].is_same_as(tokenizer)
    assert load_model("sft", CPU, "eval", "d4")[1].is_same_as(own)


def test_an_existing_model_is_replaced_only_with_overwrite(served, base_dir, tokenizer, capsys):
    own_model(base_dir, TAG)
    before = contents(base_dir)
    with pytest.raises(ValueError, match="exists already: choose another --model-tag, or --overwrite"):
        hub.main(["pull", REPO])
    assert contents(base_dir) == before
    assert hub.main(["pull", REPO, "--overwrite"]) == 0
    assert not (checkpoint_dir("sft", TAG) / "model_000005.pt").exists()
    assert ask(capsys, "-g", TAG) == expected(tokenizer)


def test_a_repository_with_several_checkpoints(served, tokenizer, tmp_path):
    files = served.files
    files["model/model_000009.pt"] = files["model/model_000700.pt"]
    files["model/meta_000009.json"] = files["model/meta_000700.json"]
    files["model/model_000800.pt"] = b"without its meta file"
    files["old/model_000001.pt"] = files["model/model_000700.pt"]
    files["old/meta_000001.json"] = files["model/meta_000700.json"]
    with pytest.raises(OSError, match=r"--folder and --step: model/ step 9, model/ step 700, old/ step 1$"):
        hub.main(["pull", REPO])
    hub.main(["pull", REPO, "--folder=model"])
    hub.main(["pull", REPO, "--folder=old/", "-g", "old", "-i", "mid"])
    assert [
        load_model("sft", CPU, "eval", TAG)[2]["step"],
        load_model("mid", CPU, "eval", "old")[2]["step"],
    ] == [
        700,
        1,
    ]
    with pytest.raises(OSError, match="choose one"):
        hub.main(["pull", REPO, "--folder=model", "--step=8", "-g", "eight"])


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def other_size(files, tokenizer):
    files["tokenizer/tokenizer.pkl"] = pickle.dumps(
        RustBPETokenizer.train_from_iterator(training_texts(), 300).enc
    )


def without_specials(files, tokenizer):
    fields = tokenizer.enc.__getstate__()
    names = {
        (token if token == "<|bos|>" else token * 2): id for token, id in fields["special_tokens"].items()
    }
    enc = type(tokenizer.enc)(
        "rustbpe", **{**{k: v for k, v in fields.items() if k != "name"}, "special_tokens": names}
    )
    files["tokenizer/tokenizer.pkl"] = pickle.dumps(enc)


def deeper(files, tokenizer):
    meta = json.loads(files["model/meta_000700.json"])
    meta["model_config"]["n_layer"] = 3
    files["model/meta_000700.json"] = json.dumps(meta).encode()


def put(name, data):
    return lambda files, tokenizer: files.update({name: data})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_size, "vocabulary of 350, the tokenizer one of 300"),
        (without_specials, "not a special token"),
        (deeper, "do not fit the architecture"),
        (put("tokenizer/tokenizer.pkl", pickle.dumps(Evil())), "no usable tokenizer"),
        (put("model/model_000700.pt", pickle.dumps(Evil())), "damaged or no checkpoint"),
        (put("model/meta_000700.json", b'{"step"'), "is damaged"),
        (put("model/meta_000700.json", b"[]"), "not a checkpoint in nanochat's format"),
        (put("model/meta_000700.json", b'{"model_config": {"n_loops": 2}}'), "does not describe"),
        (lambda files, tokenizer: files.pop("tokenizer/tokenizer.pkl"), "neither tokenizer.pkl nor"),
        (
            lambda files, tokenizer: files.pop("model/meta_000700.json"),
            "holds no model_NNNNNN.pt with a meta",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    served, base_dir, tokenizer, damage, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    damage(served.files, tokenizer)
    with pytest.raises((ValueError, OSError), match=message):
        hub.main(["pull", REPO])
    assert contents(base_dir) == {}
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["model/model_000700.pt", "model/meta_000700.json"])
def test_a_pull_that_breaks_at_90_percent_resumes(served, name, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    size, cut = len(served.files[name]), len(served.files[name]) * 90 // 100
    served.faults[name] = ["truncate 90", "503", "503"]
    assert hub.main(["pull", REPO]) == 0
    assert served.ranges(name) == [(0, cut), (cut, cut), (cut, cut), (cut, size)]
    assert ask(capsys, "-g", TAG) == expected(tokenizer)


def test_a_killed_pull_resumes_in_a_new_process(served, tokenizer, capsys):
    """Every pull started from the first byte."""
    name = "model/model_000700.pt"
    size, cut = len(served.files[name]), len(served.files[name]) * 90 // 100
    served.faults[name] = ["stall 90"]
    process = subprocess.Popen([sys.executable, "-m", "scripts.hub", "pull", REPO])
    download = checkpoint_dir("sft", f".{TAG}.pull") / "download"
    kill_at(process, download / ".model_000700.pt.partial", cut)
    assert not checkpoint_dir("sft", TAG).exists()
    assert hub.main(["pull", REPO]) == 0
    assert served.ranges(name) == [(0, cut), (cut, size)]
    assert ask(capsys, "-g", TAG) == expected(tokenizer)


def test_files_of_an_interrupted_pull_are_not_used_for_another_commit(
    served, tokenizer, tmp_path, monkeypatch
):
    """The later commit has other weights, and no JSON tokenizer, which would be preferred."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    other = RustBPETokenizer.train_from_iterator([t.upper() for t in training_texts()], VOCAB_SIZE)
    other.save(tmp_path / "other")
    served.files[f"tokenizer/{JSON_FILE}"] = (tmp_path / "other" / JSON_FILE).read_bytes()
    served.faults["tokenizer/tokenizer.pkl"] = ["truncate"] * 6
    served.files = dict(sorted(served.files.items(), key=lambda item: item[0] == "tokenizer/tokenizer.pkl"))
    with pytest.raises(OSError, match=r"tokenizer\.pkl"):
        hub.main(["pull", REPO])
    model = random_model(small_config(vocab_size=VOCAB_SIZE))
    served.files = in_folders(published(model, tokenizer, tmp_path))
    assert hub.main(["pull", REPO]) == 0
    pulled, pulled_tokenizer, _ = load_model("sft", CPU, "eval", TAG)
    assert torch.equal(pulled.lm_head.weight, model.lm_head.weight)
    assert pulled_tokenizer.is_same_as(tokenizer)


def test_a_file_with_another_digest_is_not_read_and_the_others_are_kept(
    served, tokenizer, capsys, monkeypatch
):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    served.faults["tokenizer/tokenizer.pkl"] = ["corrupt"] * 6
    with pytest.raises(OSError, match=f"cannot pull {REPO}: tokenizer.pkl: .* do not have the SHA-256"):
        hub.main(["pull", REPO])
    assert not checkpoint_dir("sft", TAG).exists()
    assert hub.main(["pull", REPO]) == 0
    assert served.starts("model/model_000700.pt") == [0], "a complete file was downloaded again"
    assert ask(capsys, "-g", TAG) == expected(tokenizer)


def test_no_such_repository_and_no_network(model_hub, monkeypatch):
    with pytest.raises(OSError, match=f"^cannot pull {REPO}: .*404") as error:
        hub.main(["pull", REPO])
    assert "\n" not in str(error.value)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=f"^cannot pull {REPO}: "):
        hub.main(["pull", REPO])
