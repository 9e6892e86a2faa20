"""base_eval from checkpoint and bundle to report."""

import json
import shutil
import zipfile

import pytest
import torch

from nanochat import core_bundle
from nanochat.checkpoint_manager import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import Runtime
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.core_protocol import find_protocol
from scripts import base_eval
from tests.helpers.core_bundles import write_bundle
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def checkpoint(base_dir):
    """Two base models and an SFT model with the same vocabulary."""
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    config = small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=128)
    for stage, tag, step in (("base", "d2", 5), ("base", "d4", 7), ("sft", "d4", 3)):
        save_checkpoint(checkpoint_dir(stage, tag), step, random_model(config), None, {})


def report(base_dir, name="base_eval"):
    return json.loads((base_dir / "report" / f"{name}.json").read_text())


def test_evaluate_and_report(checkpoint, bundle, base_dir, capsys):
    assert base_eval.main([f"--bundle={bundle}", "--device-type=cpu", "--device_batch_size=2"]) == 0
    result = report(base_dir)
    assert {label: task["n"] for label, task in result["tasks"].items()} == {"pick": 9, "who": 7, "recall": 8}
    pick = result["tasks"]["pick"]
    assert pick["random_baseline"] == 25
    assert pick["centered"] == pytest.approx((pick["accuracy"] - 0.25) / 0.75)
    assert result["core"] == pytest.approx(sum(task["centered"] for task in result["tasks"].values()) / 3)
    assert result["missing_tasks"] == ["lost"]
    assert (result["source"], result["step"], result["settings"]["bundle"]) == ("base", 7, str(bundle))
    assert result["examples_per_second"] == pytest.approx(24 / result["seconds"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"base_eval: step 7, CORE {result['core']:.4f} over 3 of 22 tasks (missing: lost)")


def test_other_models_and_fewer_examples(checkpoint, bundle, base_dir):
    flags = [f"--bundle={bundle}", "--device-type=cpu", "--max-per-task=2"]
    assert base_eval.main([*flags, "--model-tag=d2", "--step=5"]) == 0
    assert report(base_dir)["step"] == 5
    assert [task["n"] for task in report(base_dir)["tasks"].values()] == [2, 2, 2]
    assert base_eval.main([*flags, "--source=sft"]) == 0
    assert report(base_dir, "base_eval_sft")["step"] == 3
    assert report(base_dir)["source"] == "base"  # not overwritten


def test_bundle_from_an_address(checkpoint, bundle, base_dir, tmp_path):
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in bundle.rglob("*.*"):
            file.write(path, path.relative_to(bundle))
    flags = ["--device-type=cpu", "--max-per-task=1"]
    assert base_eval.main([*flags, f"--bundle-url={archive.as_uri()}"]) == 0
    archive.unlink()
    assert base_eval.main(flags) == 0  # from the base directory


@pytest.mark.parametrize("protocol", ["nanochat", "dclm"])
def test_protocols(protocol, checkpoint, bundle, base_dir, capsys):
    flags = [f"--bundle={bundle}", "--device-type=cpu", f"--protocol={protocol}"]
    assert base_eval.main(flags) == 0
    assert f"protocol {protocol}, " in capsys.readouterr().out.splitlines()[-1]
    model, tokenizer, _ = load_model("base", torch.device("cpu"), "eval")
    expected = evaluate_core(
        model, tokenizer, load_bundle(bundle), Runtime.cpu(), protocol=find_protocol(protocol)
    )
    assert report(base_dir)["settings"]["protocol"] == protocol
    assert report(base_dir)["tasks"] == expected["tasks"]


def test_evaluate_model(checkpoint, bundle, base_dir):
    """The function that scripts of users import: three names, and the bundle of the base directory."""
    shutil.copytree(bundle, base_dir / "eval_bundle")
    model, tokenizer, _ = load_model("base", torch.device("cpu"), "eval")
    for device in ("cpu", torch.device("cpu")):
        result = base_eval.evaluate_model(model, tokenizer, device, max_per_task=4)
        expected = evaluate_core(model, tokenizer, load_bundle(bundle), Runtime.cpu(), 4)
        assert result == {
            "results": {label: task["accuracy"] for label, task in expected["tasks"].items()},
            "centered_results": {label: task["centered"] for label, task in expected["tasks"].items()},
            "core_metric": expected["core"],
        }
        assert list(result["results"]) == ["pick", "who", "recall"]


def test_without_network_core_is_skipped(checkpoint, base_dir, monkeypatch, capsys):
    """Without a bundle the command ended in an error, and speedrun.sh with it."""
    monkeypatch.setattr(core_bundle, "EVAL_BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert base_eval.main(["--device-type=cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("base_eval: CORE is skipped: cannot download http://127.0.0.1:9/eval_bundle.zip: ")
    assert line.endswith("; run again to retry, or name a folder with --bundle")
    assert not (base_dir / "report" / "base_eval.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-per-task=0"], "max_per_task=0"),
        (["--max-per-task=-2"], "max_per_task=-2"),
        (["--device-batch-size=0"], "device_batch_size=0"),
        (["--bundle=a", "--bundle-url=b"], "exclude each other"),
        (["--bundle-sha256=abc"], "needs bundle_url"),
        (["--source=big", "--bundle={bundle}"], "'big' is not one of base, mid, sft, rl"),
        (["--model-tag=d9", "--bundle={bundle}"], "train one first"),
        (["--protocol=lm-eval"], "protocol='lm-eval' is not one of nanochat, dclm"),
        (["--bundle-url=file:///nowhere.zip"], "cannot download file:///nowhere.zip"),
        (["--hf-path=gpt2", "--step=5"], "leave out source, model_tag, step and dtype"),
        (["--hf-path=gpt2", "--dtype=bfloat16"], "run in float32"),
    ],
)
def test_invalid_settings(flags, message, bundle, checkpoint):
    flags = [flag.format(bundle=bundle) for flag in flags]
    with pytest.raises((ValueError, OSError), match=message):
        base_eval.main(["--device-type=cpu", *flags])
