"""A published model, pulled from a hub on 127.0.0.1, is asked in the forms that it knows, without a flag."""

import re

import pytest

from nanochat import chat_eval as evaluation
from nanochat.train import rollouts
from scripts import chat_cli, chat_eval, chat_rl, hub
from tests.helpers.echo_model import echo_config, echo_model
from tests.helpers.hub_data import write_hub_data
from tests.helpers.hub_models import REPO, in_folders, published
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow
ONLY = "\n\nRespond only with the letter of the correct answer."
FORMS = {
    "ARC-Easy": re.escape(f"Multiple Choice question: Why?\n- so=1\n- thus=2\n- no=3{ONLY}"),
    "ARC-Challenge": re.escape(f"Multiple Choice question: Why?\n- so=1\n- thus=2\n- no=3{ONLY}"),
    "MMLU": re.escape(f"Multiple Choice question: Which?\n- a=A\n- b=B\n- c=C\n- d=D{ONLY}"),
    "GSM8K": re.escape("1+1?"),
    "SpellingBee": r".*\b[a-h]n[s-z]\b.*",
}
SMALL = [
    "--num-steps=1",
    "--examples-per-step=1",
    "--num-samples=2",
    "--max-new-tokens=4",
    "--eval-examples=2",
]


@pytest.fixture
def asked(model_hub, base_dir, monkeypatch, tmp_path):
    """Pull the model; the result collects the text of each prompt from then on."""
    tokenizer = train_tokenizer()
    files = published(echo_model(echo_config(tokenizer.get_vocab_size())), tokenizer, tmp_path)
    model_hub.repo, model_hub.files = REPO, in_folders(files)
    assert hub.main(["pull", REPO]) == 0
    write_hub_data(base_dir, monkeypatch)
    prompts = []
    for module in (evaluation, rollouts, chat_cli):
        render = module.render_for_completion

        def spied(*args, render=render):
            ids = render(*args)
            prompts.append(tokenizer.decode(ids))
            return ids

        monkeypatch.setattr(module, "render_for_completion", spied)
    return prompts


@pytest.mark.parametrize("name", FORMS)
def test_chat_eval(asked, name):
    assert chat_eval.main(["-a", name, "-x", "3", "-m", "4", "--device-type=cpu"]) == 0
    assert len(asked) == 3
    for prompt in asked:
        assert re.fullmatch(
            rf"<\|bos\|><\|user_start\|>{FORMS[name]}<\|user_end\|><\|assistant_start\|>", prompt
        )


def test_chat_rl(asked):
    assert chat_rl.main([*SMALL, "--device-type=cpu"]) == 0
    assert {*asked} == {"<|bos|><|user_start|>1+1?<|user_end|><|assistant_start|>"}


def test_chat_cli(asked):
    assert chat_cli.main(["-p", "Why?", "-m", "4", "--device-type=cpu"]) == 0
    assert asked == ["<|bos|><|user_start|>Why?<|user_end|><|assistant_start|>"]
