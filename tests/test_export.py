"""Export of checkpoints for transformers, and import: equal bit for bit, or an error that says why not."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    complete_steps,
    load_model,
    load_tensors,
    model_path,
    read_meta,
    save_checkpoint,
    tokenizer_dir,
)
from nanochat.hub.export import export_checkpoint, import_checkpoint
from nanochat.hub.hf_tokenizer import load_hf_tokenizer
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import export_hf, import_hf
from tests.helpers.models import SECOND, random_model, small_config
from tests.helpers.vocabulary import VOCAB_SIZE, train_tokenizer, training_texts


@pytest.fixture
def folder(base_dir, tmp_path):
    """The export of a checkpoint with the state dict layout of the published one."""
    return export(base_dir, tmp_path / "out")


@pytest.fixture
def second_folder(base_dir, tmp_path):
    """The same of the second generation."""
    return export(base_dir, tmp_path / "out", **SECOND)


def export(base_dir, out, **changes):
    train_tokenizer().save(base_dir / "tokenizer")
    model = random_model(small_config(vocab_size=VOCAB_SIZE, n_kernel=4, slc_rate=2, **changes))
    directory = checkpoint_dir("rl", "d9")
    save_checkpoint(directory, 12, model, None, {})
    published = {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}
    for key in published:
        if key.endswith(("wte.weight", "value_embeds.weight")):
            published[key] = published[key].bfloat16()
    torch.save(published, model_path(directory, 12))
    assert export_hf.main(["-i", "rl", "-o", str(out)]) == 0
    return out


def other_tokenizer():
    """Return a tokenizer of the same size, trained on the same words in upper case."""
    texts = [text.upper() for text in training_texts()]
    return RustBPETokenizer.train_from_iterator(texts, VOCAB_SIZE)


def use_empty_base(monkeypatch, tmp_path):
    """Switch to an empty base directory and return it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "empty"))
    return tmp_path / "empty"


@pytest.mark.parametrize("name", ["folder", "second_folder"])
def test_round_trip(name, request, base_dir, tmp_path, monkeypatch, capsys):
    folder = request.getfixturevalue(name)
    before = load_tensors(model_path(checkpoint_dir("rl", "d9"), 12), "cpu")
    meta, fields = read_meta(checkpoint_dir("rl", "d9"), 12), get_tokenizer().fields()
    use_empty_base(monkeypatch, tmp_path)
    assert import_hf.main([str(folder)]) == 0
    assert "import_hf: imported rl d9, step 12" in capsys.readouterr().out
    after = load_tensors(model_path(checkpoint_dir("rl", "d9"), 12), "cpu")
    assert list(after) == [key.removeprefix("_orig_mod.") for key in before]
    for tensor, imported in zip(before.values(), after.values(), strict=True):
        assert tensor.dtype == imported.dtype
        assert torch.equal(tensor, imported)
    assert read_meta(checkpoint_dir("rl", "d9"), 12)["model_config"] == meta["model_config"]
    model, tokenizer, _ = load_model("rl", torch.device("cpu"), "eval")
    assert tokenizer.fields() == fields
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_exported_files(folder):
    assert {path.name for path in folder.iterdir()} == {
        "cache_saint_iberis.py",
        "config.json",
        "configuration_saint_iberis.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_saint_iberis.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~_umask()}
    for path in folder.glob("*.py"):
        assert "import nanochat" not in path.read_text()
        assert "from nanochat" not in path.read_text()
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.wte.weight"].dtype == torch.bfloat16
    assert weights["lm_head.weight"].dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


PUBLISHED_CONFIG = {
    "architectures": ["SaintIberisForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_saint_iberis.SaintIberisConfig",
        "AutoModel": "modeling_saint_iberis.SaintIberisModel",
        "AutoModelForCausalLM": "modeling_saint_iberis.SaintIberisForCausalLM",
    },
    "model_type": "saint_iberis",
    "sequence_len": 32,
    "vocab_size": VOCAB_SIZE,
    "n_layer": 4,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 24,
    "n_kernel": 4,
    "slc_rate": 2,
}
REST = {
    "bos_token_id": 341,
    "eos_token_id": 345,
    "pad_token_id": 341,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "checkpoint": {"source": "rl", "model_tag": "d9", "step": 12},
}


def test_the_config_of_a_published_model_is_the_same_in_every_byte(folder):
    """The fields of the second generation are not in it."""
    expected = json.dumps({**PUBLISHED_CONFIG, **REST}, indent=2)
    assert (folder / "config.json").read_text().rstrip("\n") == expected


def test_the_config_of_the_second_generation_names_its_parts(second_folder):
    config = json.loads((second_folder / "config.json").read_text())
    assert config == {**PUBLISHED_CONFIG, **SECOND, **REST}
    change_config(second_folder, residual_conv=None)
    with pytest.raises(ValueError, match=r"weights do not fit the architecture"):
        import_checkpoint(second_folder, model_tag="other")


def test_the_second_generation_in_transformers(second_folder):
    """Logits, the tokens of greedy decoding and their end."""
    ours, _, _ = load_model("rl", torch.device("cpu"), "eval")
    theirs = AutoModelForCausalLM.from_pretrained(second_folder, trust_remote_code=True)
    prompt = torch.arange(300, 309)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(prompt).logits, ours(prompt), rtol=0, atol=1e-5)
    tokens = theirs.generate(prompt, max_new_tokens=20, do_sample=False)[0, 9:].tolist()
    expected = list(ours.generate(prompt, 20, temperature=0))
    assert len(expected) > 5
    assert tokens[: len(expected)] == expected
    assert tokens[len(expected) :] in ([], [341], [345])


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_import_under_another_name(folder):
    assert import_hf.main([str(folder), "-i", "sft", "-g", "mine", "-s", "0"]) == 0
    model, _, meta = load_model("sft", torch.device("cpu"), "eval", "mine", 0)
    assert meta["step"] == 0
    assert model.config.n_kernel == 4


def test_import_overwrites_nothing(folder, base_dir):
    with pytest.raises(ValueError, match=r"d9 already has step 12; give another model tag or step"):
        import_checkpoint(folder)
    other_tokenizer().save(tokenizer_dir(checkpoint_dir("rl", "d9")))
    with pytest.raises(
        ValueError, match=r"d9 has checkpoints of a different tokenizer; give another model tag"
    ):
        import_checkpoint(folder, step=0)
    assert complete_steps(checkpoint_dir("rl", "d9")) == [12]


def test_export_uses_the_tokenizer_beside_the_model(folder, base_dir, tmp_path):
    """Regression: a model pulled from the hub was exported with the base directory's tokenizer."""
    own, directory = train_tokenizer(), checkpoint_dir("rl", "d9")
    own.save(tokenizer_dir(directory))
    other_tokenizer().save(base_dir / "tokenizer")
    export_checkpoint("rl", "d9", None, tmp_path / "again")
    assert load_hf_tokenizer(tmp_path / "again").is_same_as(own)
    import_checkpoint(tmp_path / "again", "sft", "mine", 0)
    _, tokenizer, _ = load_model("sft", torch.device("cpu"), "eval", "mine")
    assert tokenizer.is_same_as(own)
    assert get_tokenizer().is_same_as(other_tokenizer())


def change_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            FileNotFoundError,
            "give a folder written by scripts.export_hf",
        ),
        (lambda f: (f / "config.json").write_text("[1"), ValueError, r"config\.json is damaged"),
        (lambda f: (f / "config.json").write_text("[1]"), ValueError, r"config\.json is damaged"),
        (lambda f: change_config(f, model_type="llama"), ValueError, "a model of type 'llama'; only"),
        (lambda f: change_config(f, checkpoint=None), ValueError, "give source, model tag and step"),
        (lambda f: change_config(f, n_layer=3), ValueError, "weights do not fit the architecture"),
        (lambda f: change_config(f, n_head=5), ValueError, "must be an even multiple of n_head=5"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"no model\.safetensors in"),
        (lambda f: truncate(f / "model.safetensors"), ValueError, r"model\.safetensors is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, r"tokenizer\.json"),
        (lambda f: truncate(f / "tokenizer.json"), ValueError, r"tokenizer\.json is not the tokenizer"),
    ],
)
def test_import_refuses_invalid_folders(folder, tmp_path, monkeypatch, damage, error, message):
    damage(folder)
    base = use_empty_base(monkeypatch, tmp_path)
    with pytest.raises(error, match=message):
        import_checkpoint(folder)
    assert not any(path.is_file() for path in base.rglob("*"))


def test_export_refuses_invalid_checkpoints(folder, base_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model dN"):
        export_checkpoint("sft", None, None, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        export_checkpoint("rl", "d9", 3, tmp_path / "new")
    RustBPETokenizer.train_from_iterator(["abab " * 9], 266).save(base_dir / "tokenizer")
    with pytest.raises(ValueError, match="not from the same run"):
        export_checkpoint("rl", "d9", None, tmp_path / "new")
    assert not (tmp_path / "new").exists()
