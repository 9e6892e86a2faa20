"""Pull models from a hub on 127.0.0.1 and push them: a pulled model answers like the pushed one."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nanochat.checkpoint_manager import checkpoint_dir, load_model, load_tensors, model_path, save_checkpoint
from nanochat.common import write_json
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import JSON_FILE, PICKLE_FILE, RustBPETokenizer
from scripts import chat_cli, hub
from tests.helpers import chats
from tests.helpers.echo_model import echo, echo_config, echo_model
from tests.helpers.hub_server import kill_at
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer, training_texts

REPO = "RikkaBotan/nanochat_d20_saint_iberis"
TAG = "nanochat_d20_saint_iberis"
QUESTION = "the river B"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def published(model, tokenizer, tmp_path, state=None):
    """The three files as published: prefixed keys, a bf16 embedding, no layer plan, a pickled tokenizer."""
    state = {f"_orig_mod.{key}": value for key, value in (state or model.state_dict()).items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    config = {k: v for k, v in vars(model.config).items() if k not in ("n_kernel", "slc_rate")}
    torch.save(state, tmp_path / "published.pt")
    return {
        "model_000700.pt": (tmp_path / "published.pt").read_bytes(),
        "meta_000700.json": json.dumps({"step": 700, "val_loss": 1.0657, "model_config": config}).encode(),
        "tokenizer.pkl": pickle.dumps(tokenizer.enc),
    }


def in_folders(files):
    return {("tokenizer/" if "tok" in name else "model/") + name: data for name, data in files.items()}


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


def ask(capsys, *flags):
    capsys.readouterr()
    assert chat_cli.main(["-p", QUESTION, "-t", "0", "-m", "12", "--device-type=cpu", *flags]) == 0
    return capsys.readouterr().out.strip()


def expected(tokenizer):
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": QUESTION}]})
    return echo(tokenizer, prompt, 12)


# ---------------------------------------------------------------------------------------------------------
# Pull


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


# ---------------------------------------------------------------------------------------------------------
# Push

MINE = "me/iberis-d2"


def trained(base_dir, tokenizer, **changes):
    """Save an SFT model with the report of its run."""
    model = echo_model(echo_config(tokenizer.get_vocab_size(), n_kernel=3))
    directory = checkpoint_dir("sft", "d2")
    save_checkpoint(directory, 12, model, {"state": {}}, {"user_config": {"data": "embedded"}})
    tokenizer.save(directory / "tokenizer")
    run = {
        "settings": {"data": "embedded"},
        "steps": 12,
        "tokens": 34567,
        "val_bpb": 0.4321,
        "metrics": str(directory / "metrics.jsonl"),
        **changes,
    }
    write_json(base_dir / "report" / "chat_sft.json", run)
    scores = {"Arithmetic": {"accuracy": 0.987, "standard_error": 0.006, "n": 500, "chance": 0.0}}
    write_json(base_dir / "report" / "chat_eval_sft.json", {"tasks": scores, "chatcore": 0.987})
    (base_dir / "report" / "report.md").write_text("# report")
    (base_dir / "report" / "notes.txt").write_text("mine")
    return model


@pytest.fixture
def allowed(model_hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", model_hub.token)
    return model_hub


def test_a_pushed_model_is_pulled_unchanged(allowed, base_dir, tokenizer, capsys, caplog):
    trained(base_dir, tokenizer)
    with caplog.at_level(logging.DEBUG):
        assert hub.main(["push", MINE, "-g", "d2"]) == 0
    assert capsys.readouterr().out == f"pushed: {allowed.endpoint}/{MINE}/commit/{'1' * 40}\n"
    assert allowed.token not in caplog.text
    assert sorted(allowed.files) == [
        "README.md",
        "model/meta_000012.json",
        "model/model_000012.pt",
        "report/chat_eval_sft.json",
        "report/chat_sft.json",
        "report/report.md",
        f"tokenizer/{PICKLE_FILE}",
        f"tokenizer/{JSON_FILE}",
    ]
    assert sum(call.endswith("/commit/main") for call in allowed.calls) == 1, (
        "an incomplete upload was visible"
    )
    assert hub.main(["pull", MINE, "--tag=back"]) == 0
    pushed, pulled = (load_tensors(model_path(checkpoint_dir("sft", tag), 12), CPU) for tag in ("d2", "back"))
    assert list(pushed) == list(pulled)
    assert all(torch.equal(pushed[key], pulled[key]) for key in pushed)
    assert ask(capsys, "-g", "back") == expected(tokenizer)


def test_the_card(allowed, base_dir, tokenizer):
    trained(base_dir, tokenizer)
    hub.main(["push", MINE, "-g", "d2", "--license=apache-2.0"])
    card = allowed.files["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "text-generation")
    assert text.startswith("\n# iberis-d2\n\nA language model of 0.5 M parameters (finetuned, step 12)")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| layers | 2: 1 SLC2, 1 attention (1) |" in lines
    assert "| parameters: total | 483,328 |" in lines
    row = "| chat_sft | documentation of Python and synthetic tasks | 12 | 34,567 | - | 0.4321 |"
    assert row in lines
    assert "| Arithmetic | 0.0000 | 500 | - | - | 0.9870 +- 0.0060 | - |" in lines
    assert f"python -m scripts.hub pull {MINE} -i sft" in lines
    assert str(base_dir) not in card


def test_the_card_names_data_of_the_hub_but_no_path(allowed, base_dir, tokenizer):
    trained(base_dir, tokenizer, settings={"data": "hub", "add": "/home/me/secret.jsonl"})
    hub.main(["push", MINE, "-g", "d2"])
    card = allowed.files["README.md"].decode()
    assert "openai/gsm8k" in yaml.safe_load(card.split("---\n")[1])["datasets"]
    assert "conversations of the author's own" in card
    assert "secret" not in card


@pytest.mark.parametrize("other", [{"steps": 11}, {"metrics": "/x/chatsft_checkpoints/d4/metrics.jsonl"}])
def test_the_report_of_another_run_is_not_uploaded(allowed, base_dir, tokenizer, other):
    trained(base_dir, tokenizer, **other)
    hub.main(["push", MINE, "-g", "d2"])
    assert not [name for name in allowed.files if name.startswith("report/")]
    assert "No evaluation came with these weights" in allowed.files["README.md"].decode()
    assert "0.987" not in allowed.files["README.md"].decode()


def test_a_dry_run_needs_no_hub(base_dir, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    trained(base_dir, tokenizer)
    assert hub.main(["push", MINE, "-g", "d2", "--dry-run"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in listed][:2] == ["README.md", "model/model_000012.pt"]
    assert int(listed[1].split()[0].replace(",", "")) > 483_328 * 4
    card = checkpoint_dir("sft", "d2") / "README.md"
    assert str(card) in last
    card.write_text("my own words")
    hub.main(["push", MINE, "-g", "d2", "--dry-run"])
    assert card.read_text() == "my own words", "an edited card was overwritten"


def test_a_card_of_the_user(allowed, base_dir, tokenizer, tmp_path):
    trained(base_dir, tokenizer)
    (tmp_path / "card.md").write_text("my own words")
    hub.main(["push", MINE, "-g", "d2", f"--card={tmp_path / 'card.md'}"])
    assert allowed.files["README.md"] == b"my own words"


def test_a_repository_with_files_is_changed_only_with_overwrite(allowed, base_dir, tokenizer):
    trained(base_dir, tokenizer)
    allowed.repo, allowed.files = MINE, {".gitattributes": b"", "README.md": b"old", "other.txt": b"old"}
    with pytest.raises(ValueError, match=r"holds 2 file\(s\) already.*same names \(README.md\)"):
        hub.main(["push", MINE, "-g", "d2"])
    assert len(allowed.files) == 3
    hub.main(["push", MINE, "-g", "d2", "--overwrite"])
    assert allowed.files["other.txt"] == b"old"
    assert allowed.files["README.md"] != b"old"


def test_a_private_push_makes_no_public_repository(allowed, base_dir, tokenizer):
    trained(base_dir, tokenizer)
    hub.main(["push", MINE, "-g", "d2", "--private"])
    assert allowed.is_private
    allowed.is_private, allowed.files = False, {}
    with pytest.raises(ValueError, match="exists already and is public"):
        hub.main(["push", MINE, "-g", "d2", "--private"])
    assert allowed.files == {}
    with pytest.raises(ValueError, match="repo='iberis' must be the name of an owner and of a repository"):
        hub.main(["push", "iberis", "-g", "d2"])


@pytest.mark.parametrize("token", ["", " \n", "hf_one hf_two", "hf_\u00e9"])
def test_a_missing_or_invalid_token(model_hub, base_dir, tokenizer, monkeypatch, token):
    """The error of the HTTP library contains a header that cannot be sent."""
    trained(base_dir, tokenizer)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match="needs a token with write access") as error:
        hub.main(["push", MINE, "-g", "d2"])
    assert "hf_" not in str(error.value)
    assert not model_hub.calls


def test_a_refused_push_reports_the_reason_without_the_token(
    allowed, base_dir, tokenizer, monkeypatch, caplog
):
    trained(base_dir, tokenizer)
    allowed.refusal = "quota of TOKEN exceeded"
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(OSError, match=r"quota of Bearer \*\*\* exceeded") as error,
    ):
        hub.main(["push", MINE, "-g", "d2"])
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(OSError, match=f"cannot push to {MINE}: Invalid user token") as error,
    ):
        hub.main(["push", MINE, "-g", "d2"])
    assert "hf_wrong" not in str(error.value)
    assert "hf_wrong" not in caplog.text
    assert allowed.token not in caplog.text
    assert allowed.files == {}


def test_the_card_of_a_d20(tmp_path):
    """The half a billion parameters are counted, not allocated."""
    from nanochat.hub.model_card import model_card

    config = GPTConfig.from_depth(20, vocab_size=65536)
    card = model_card("me/d20", "sft", {"step": 700, "pulled_from": {"repo": REPO}}, config, {}, "mit")
    assert "542.0 M parameters" in card
    assert "20: 13 SLC2, 7 attention (1, 4, 7, 10, 13, 16, 19)" in card
    assert "These weights were pulled from RikkaBotan/" in card
