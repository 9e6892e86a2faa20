"""CORE of models of Transformers: an exported one has the numbers of our own path, others can be scored."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nanochat.common import Runtime
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import evaluate_core, score_prompts
from nanochat.core_protocol import DCLM, NANOCHAT, PROTOCOLS, draw_shots, evaluated_rows, make_prompts
from nanochat.hub.core_model import load_transformers
from nanochat.hub.hf_tokenizer import save_hf_tokenizer
from scripts import base_eval
from tests.helpers.core_bundles import write_bundle
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer

pytestmark = pytest.mark.slow
pytest_plugins = "tests.helpers.exported"
both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def bundle_folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def llama(tmp_path):
    """A folder with a Llama of random weights and our tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, max_position_embeddings=32, initializer_range=0.3, eos_token_id=0, **shape
    )
    return saved(LlamaForCausalLM(config), tmp_path / "llama")


@pytest.fixture
def gpt2(tmp_path):
    """The same of a GPT-2, which has a table of 32 positions."""
    torch.manual_seed(0)
    shape = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return saved(GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **shape)), tmp_path / "gpt2")


def saved(model, folder):
    model.save_pretrained(folder)
    save_hf_tokenizer(train_tokenizer(), folder, 32)
    return folder


def set_tokens(folder, **tokens):
    """Set entries of tokenizer_config.json; None removes one."""
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), **tokens}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def prompts_of(bundle, tokenizer, protocol=NANOCHAT):
    return [
        prompt
        for task in bundle.tasks
        for prompt in make_prompts(
            tokenizer, task, draw_shots(task, evaluated_rows(task), protocol), protocol
        )
    ]


@both_protocols
@pytest.mark.parametrize("which", ["exported", "exported_second"])
def test_an_exported_model_scores_as_ours(which, protocol, bundle_folder, base_dir, request):
    """Also with prompts beyond the context of 32: never cut by one protocol, cut by the other."""
    exported, bundle = request.getfixturevalue(which), load_bundle(bundle_folder)
    ours = evaluate_core(exported.model, exported.tokenizer, bundle, Runtime.cpu(), protocol=protocol)
    flags = [f"--bundle={bundle_folder}", "--device-type=cpu", f"--protocol={protocol.name}"]
    assert base_eval.main([*flags, f"--hf-path={exported.folder}"]) == 0
    report = json.loads((base_dir / "report" / "base_eval_hf.json").read_text())
    assert {name: report[name] for name in ours} == ours
    _, tokenizer = load_transformers(str(exported.folder), CPU)
    prompts = prompts_of(bundle, exported.tokenizer, protocol)
    for (ids, start), (their_ids, their_start) in zip(
        prompts, prompts_of(bundle, tokenizer, protocol), strict=True
    ):
        assert (ids.tolist(), start) == (their_ids.tolist(), their_start)
    assert max(len(ids) for ids, _ in prompts) > 64


@both_protocols
def test_a_llama_equals_a_slow_evaluation(llama, bundle_folder, protocol, capsys):
    """Batched, padded and float32 against one prompt at a time in float64."""
    model, tokenizer = load_transformers(str(llama), CPU)
    bundle = load_bundle(bundle_folder)
    prompts = prompts_of(bundle, tokenizer, protocol)
    losses, _ = score_prompts(model, prompts, 300)
    double = LlamaForCausalLM.from_pretrained(llama).double().eval()
    for (ids, start), loss in zip(prompts, losses, strict=True):
        with torch.no_grad():
            log_probs = double(torch.from_numpy(ids[None, :-1]).long()).logits[0].log_softmax(-1)
        expected = -log_probs[np.arange(start - 1, len(ids) - 1), ids[start:]].mean()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
    flags = [f"--bundle={bundle_folder}", "--device-type=cpu", f"--protocol={protocol.name}"]
    assert base_eval.main([*flags, f"--hf-path={llama}"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"base_eval_hf: {llama}, CORE ")
    assert last.endswith(" s")


def test_a_table_of_positions_bounds_the_prompt(gpt2, llama, bundle_folder, caplog):
    """GPT-2 has no position 33: nanochat's protocol, which never cuts, would index beyond its table."""
    bundle = load_bundle(bundle_folder)
    cut = "examples exceed the context of 32 tokens and were cropped"
    for folder, protocol, is_cut in (
        (llama, NANOCHAT, False),
        (llama, DCLM, True),
        (gpt2, NANOCHAT, True),
        (gpt2, DCLM, True),
    ):
        caplog.clear()
        model, tokenizer = load_transformers(str(folder), CPU)
        assert model.sequence_len == 32
        evaluate_core(model, tokenizer, bundle, Runtime.cpu(), protocol=protocol)
        assert (cut in caplog.text) == is_cut


def test_prompts_begin_with_bos_once(llama):
    """The bos token, else the eos token; a tokenizer with neither is refused."""
    bos, end = (train_tokenizer().encode_special(name) for name in ("<|bos|>", "<|assistant_end|>"))
    text = "the <|bos|> river"
    ids = train_tokenizer().encode(text)  # a special token in a text is text
    for tokens, first in (({}, bos), ({"bos_token": None}, end)):
        set_tokens(llama, **tokens)
        tokenizer = load_transformers(str(llama), CPU)[1]
        assert tokenizer.get_bos_token_id() == first
        assert tokenizer.encode([text, ""], prepend=first) == [[first, *ids], [first]]
    set_tokens(llama, bos_token=None, eos_token=None)
    with pytest.raises(ValueError, match=r"neither a bos nor an eos token .*; set bos_token"):
        load_transformers(str(llama), CPU)


def test_a_repository_of_the_hub(model_hub, llama, bundle_folder, base_dir):
    """Its files come from the hub that HF_ENDPOINT names, which transformers reads on import."""
    model_hub.repo = "me/llama"
    model_hub.files = {path.name: path.read_bytes() for path in llama.iterdir()}
    flags = [f"--bundle={bundle_folder}", "--device-type=cpu", "--hf-path"]
    assert base_eval.main([*flags, str(llama)]) == 0
    expected = json.loads((base_dir / "report" / "base_eval_hf.json").read_text())["tasks"]
    (base_dir / "report" / "base_eval_hf.json").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.base_eval", *flags, "me/llama"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((base_dir / "report" / "base_eval_hf.json").read_text())["tasks"] == expected


def test_what_cannot_be_loaded(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OSError, match=f"cannot load hf_path='{empty}' with transformers: ") as error:
        load_transformers(str(empty), CPU)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs transformers, which is not installed: uv pip install"):
        load_transformers("gpt2", CPU)
