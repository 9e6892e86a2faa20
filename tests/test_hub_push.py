"""Push models to a hub on 127.0.0.1: card, report and refusals; a pull returns the same model."""

import json
import logging

import pytest
import torch
import yaml

from nanochat.checkpoint_manager import checkpoint_dir, load_model, load_tensors, model_path, save_checkpoint
from nanochat.common import write_json
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import JSON_FILE, PICKLE_FILE
from scripts import hub
from tests.helpers.echo_model import echo_config, echo_model
from tests.helpers.hub_models import CPU, REPO, ask, expected
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

MINE = "me/iberis-d2"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


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


def test_a_pushed_model_of_the_second_generation_is_pulled_unchanged(allowed, base_dir, tokenizer):
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), slc_rate=2, **SECOND))
    directory = checkpoint_dir("base", "d4")
    save_checkpoint(directory, 5, model, None, {})
    tokenizer.save(directory / "tokenizer")
    assert hub.main(["push", MINE, "-i", "base", "-g", "d4"]) == 0
    assert hub.main(["pull", MINE, "-i", "base", "--tag=back"]) == 0
    pulled, _, meta = load_model("base", CPU, "eval", "back")
    assert pulled.config == model.config
    assert meta["model_config"] == json.loads(allowed.files["model/meta_000005.json"])["model_config"]
    assert meta["model_config"].items() >= SECOND.items()
    pushed, state = model.state_dict(), pulled.state_dict()
    assert list(pushed) == list(state)
    assert all(torch.equal(state[key], pushed[key]) for key in pushed)
    card = " ".join(allowed.files["README.md"].decode().split())
    assert "Second generation. It has, besides the layers as published: convolutions of 3 taps" in card
    assert "Primer, So et al. 2021; Canon layers, Allen-Zhu 2025" in card
    assert "Zhou et al. 2024" in card
    assert "| parameters: value_embeds | 16,800 |" in card
    assert "scores of attention times 1.44" in card


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


@pytest.mark.parametrize(
    ("data", "repo"),
    [
        ("hub", "karpathy/fineweb-edu-100b-shuffle"),  # as reports said before there were two
        ("hub:fineweb", "karpathy/fineweb-edu-100b-shuffle"),
        ("hub:climbmix", "karpathy/climbmix-400b-shuffle"),
    ],
)
def test_the_card_names_the_text_of_pretraining(data, repo, allowed, base_dir, tokenizer):
    trained(base_dir, tokenizer, settings={"data": data})
    write_json(base_dir / "report" / "base_train.json", {"settings": {"data": data}})
    hub.main(["push", MINE, "-g", "d2"])
    card = allowed.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["datasets"][0] == repo
    rows = [" ".join(line.split()) for line in card.splitlines()]
    assert f"| base_train | {repo} | - | - | - | - |" in rows


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
    assert "First generation: the layers as published." in card


def test_the_card_names_only_the_parts_that_a_model_has():
    from nanochat.hub.model_card import model_card

    config = GPTConfig.from_depth(20, vocab_size=65536, value_embeds=True, x0_mix=True)
    card = model_card("me/d20", "sft", {"step": 700}, config, {}, "mit")
    assert "value embeddings, 587.2 M of the parameters" in card
    assert "the embedding mixed into the stream before each layer" in card
    assert "taps, added" not in card
    assert "scores of attention" not in card
