import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.gpt import GPT
from tests.helpers.models import random_model, small_config

ROOT = Path(__file__).parent.parent


def test_save_and_load(tmp_path):
    model = random_model(small_config(n_kernel=4, slc_rate=2))
    cm.save_checkpoint(tmp_path, 7, model, {"state": torch.ones(2)}, {"extra": [1, 2]})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "meta_000007.json",
        "model_000007.pt",
        "optim_000007_rank0.pt",
    ]
    meta = cm.read_meta(tmp_path, 7)
    assert (meta["step"], meta["format_version"], meta["extra"]) == (7, 1, [1, 2])
    assert cm.model_config(meta) == model.config  # including n_kernel and slc_rate
    other = GPT(cm.model_config(meta))
    cm.load_weights(other, cm.load_tensors(cm.model_path(tmp_path, 7), "cpu"))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert cm.load_optimizer_shards(tmp_path, 7)[0]["state"].tolist() == [1, 1]


def test_steps_are_numbers_and_a_backup_is_no_checkpoint(tmp_path):
    """Steps were compared as strings, and model_000200_backup.pt crashed the search."""
    model = random_model(small_config())
    for step in (9, 1_000_000, 200):
        cm.save_checkpoint(tmp_path, step, model, None, {})
    (tmp_path / "model_000200_backup.pt").touch()
    (tmp_path / "meta_000300_old.json").touch()
    (tmp_path / "model_000500.pt").touch()  # killed before its meta file was written
    assert cm.complete_steps(tmp_path) == [9, 200, 1_000_000]
    assert cm.newest_step(tmp_path) == 1_000_000


def test_keep_last(tmp_path):
    model = random_model(small_config())
    for step in (1, 2, 3):
        cm.save_checkpoint(tmp_path, step, model, {}, {}, keep_last=2)
    assert cm.complete_steps(tmp_path) == [2, 3]
    assert len(list(tmp_path.iterdir())) == 6
    cm.save_checkpoint(tmp_path, 4, model, {}, {}, keep_last=5)
    assert cm.complete_steps(tmp_path) == [2, 3, 4]
    cm.save_checkpoint(tmp_path, 3, model, {}, {}, keep_last=1)  # as if 4 were damaged and 3 resumed
    assert cm.complete_steps(tmp_path) == [3, 4]


@pytest.mark.slow
def test_full_disk_keeps_the_older_checkpoint_intact(tmp_path):
    """With files limited to 64 KiB the second model cannot be written; the first stays intact."""
    code = f"""
import resource
from nanochat import checkpoint_manager as cm
from nanochat.common import run
from tests.helpers.models import random_model, small_config
from pathlib import Path
def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    large = random_model(small_config(n_embd=96))
    cm.save_checkpoint(Path({str(tmp_path)!r}), 2, large, {{}}, {{}}, keep_last=1)
run(main)
"""
    small = random_model(small_config(n_layer=1, n_embd=8, vocab_size=16))
    cm.save_checkpoint(tmp_path, 1, small, {}, {}, keep_last=1)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert cm.complete_steps(tmp_path) == [1]
    assert not list(tmp_path.glob(".*"))
    cm.load_weights(small, cm.load_tensors(cm.model_path(tmp_path, 1), "cpu"))


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_truncated_checkpoint(tmp_path, keep):
    cm.save_checkpoint(tmp_path, 1, random_model(small_config()), None, {})
    path = cm.model_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model_000001.pt is damaged"):
        cm.load_tensors(path, "cpu")


def test_checkpoint_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"x": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        cm.load_tensors(tmp_path / "model.pt", "cpu")
    assert not (tmp_path / "pwned").exists()


def test_weights_in_the_published_format(caplog):
    """_orig_mod. prefixes, a bfloat16 embedding, a config without n_kernel and slc_rate: all keys load."""
    model = random_model(small_config())
    published = {f"_orig_mod.{key}": value for key, value in model.state_dict().items()}
    published["_orig_mod.transformer.wte.weight"] = published["_orig_mod.transformer.wte.weight"].bfloat16()
    shape = {k: v for k, v in vars(model.config).items() if k not in ("n_kernel", "slc_rate")}
    other = GPT(cm.model_config({"model_config": shape}))
    with caplog.at_level(logging.WARNING):
        cm.load_weights(other, published)
    assert not caplog.records
    assert all(p.dtype == torch.float32 for p in other.parameters())
    torch.testing.assert_close(other.lm_head.weight, model.lm_head.weight)


def test_zero_convolutions_are_reported(caplog):
    model = random_model(small_config())
    state = {k: torch.zeros_like(v) if "conv1d" in k else v for k, v in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        cm.load_weights(model, state)
    assert [r.message for r in caplog.records] == [
        "warning: every convolution weight is zero: the SLC2 layers of this model add nothing"
    ]


def test_weights_that_do_not_fit():
    model = random_model(small_config())
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    with pytest.raises(ValueError, match="do not fit the architecture"):
        cm.load_weights(model, state)
    with pytest.raises(ValueError, match="does not describe"):
        cm.model_config({"model_config": {"n_layers": 3}})


def test_missing_files_are_named(tmp_path, base_dir):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        cm.newest_step(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3"):
        cm.read_meta(tmp_path, 3)
    (tmp_path / "meta_000003.json").write_text('{"step"')
    with pytest.raises(ValueError, match="damaged"):
        cm.read_meta(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match="no model dN"):
        cm.load_model("base", torch.device("cpu"), "eval")
    with pytest.raises(ValueError, match="stage 'bass' is not one of base"):
        cm.load_model("bass", torch.device("cpu"), "eval")


def test_the_deepest_model_is_found_by_number(base_dir):
    stage = base_dir / "base_checkpoints"
    for name in ("d9", "d12", "d100foo", "x20"):
        (stage / name).mkdir(parents=True)
    (stage / "d12" / "meta_000001.json").write_text(json.dumps({}))
    with pytest.raises(FileNotFoundError, match="d12"):
        cm.load_model("base", torch.device("cpu"), "eval")


def test_a_step_left_open_is_the_newest(tmp_path):
    for step in (2, 10):
        cm.save_checkpoint(tmp_path, step, random_model(small_config()), None, {})
    assert [cm.resolve_step(tmp_path, step) for step in (None, -1, 2, 7)] == [10, 10, 2, 7]


def test_a_given_tag_takes_precedence_over_the_deepest_model(base_dir):
    with pytest.raises(FileNotFoundError, match=r"no model dN in .*mid_checkpoints"):
        cm.resolve_tag("mid", None)
    for stage, name in (("base", "d40"), ("mid", "d4"), ("mid", "d12"), ("mid", "mine")):
        cm.checkpoint_dir(stage, name).mkdir(parents=True)
    tags = [cm.resolve_tag("mid", tag) for tag in (None, "", "mine", "d4", "new")]
    assert tags == ["d12", "d12", "mine", "d4", "new"]


def test_the_only_model_needs_no_tag(base_dir):
    """A pulled model is called by its repository, and was not found without a tag."""
    cm.checkpoint_dir("sft", "nanochat_d20_saint_iberis").mkdir(parents=True)
    (cm.checkpoint_dir("sft", "").parent / "chatsft_checkpoints" / ".partial").mkdir()
    assert cm.resolve_tag("sft", None) == "nanochat_d20_saint_iberis"
    cm.checkpoint_dir("sft", "mine").mkdir()
    with pytest.raises(
        FileNotFoundError, match="which has mine, nanochat_d20_saint_iberis; train one first or"
    ):
        cm.resolve_tag("sft", None)


@pytest.mark.parametrize("model_tag", ["../d4", "/tmp/d4", "a/b", ".."])
def test_a_model_tag_must_not_be_a_path(model_tag):
    """Checkpoints were written, and with --overwrite deleted, outside the base directory."""
    with pytest.raises(ValueError, match="model_tag="):
        cm.checkpoint_dir("base", model_tag)
