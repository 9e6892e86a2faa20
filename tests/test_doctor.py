"""Findings of the doctor: small machines, unreachable hubs, ranks that cannot connect."""

import shutil
import subprocess

import pytest

from nanochat import doctor
from nanochat.dataset import CLIMBMIX, FINEWEB
from nanochat.gpt import GPTConfig
from scripts import doctor as script
from tests.helpers.hub_server import HubServer
from tests.helpers.models import SECOND, random_model

pytestmark = pytest.mark.slow

SMALL = ["--device-type=cpu", "--depth=2", "--vocab-size=300", "--max-seq-len=64", "--data=embedded"]


def findings(check):
    return [(finding.is_ok, finding.what, finding.text) for finding in check]


def test_all_checks_pass(capsys):
    assert script.main([*SMALL, "--ranks=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [
        f"ok    {what}" for what in ("device", "disk", "data", "gloo", "memory")
    ]
    assert "2 ranks, all-reduce at " in lines[-3]
    assert lines[-1] == "doctor: all checks passed"


def test_checks_fail(capsys, monkeypatch, base_dir):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 0, 10**7))
    monkeypatch.setattr(doctor, "_available_bytes", lambda: 1e6)
    assert script.main([*SMALL[:-1], "--data=/nowhere"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:-1]] == ["FAILS disk", "FAILS data", "FAILS memory"]
    assert "0.0 GiB free in" in lines[1]
    assert "lower --depth" in lines[1]
    assert lines[-1] == "doctor: 3 checks failed"


def test_base_directory_is_not_writable(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "/proc/iberis")
    ((is_ok, what, text),) = findings(doctor.check_disk(GPTConfig.from_depth(2), "embedded"))
    assert (is_ok, what) == (False, "disk")
    assert "set NANOCHAT_BASE_DIR" in text


def test_model_sizes():
    config = GPTConfig.from_depth(4, vocab_size=500)
    model = random_model(config)
    by_adamw = model.transformer.wte.weight.numel() + model.lm_head.weight.numel()
    n = sum(p.numel() for p in model.parameters())
    assert doctor.model_sizes(config) == (4 * n, 4 * (n + by_adamw))


def test_the_second_generation_needs_more_space_but_no_more_text():
    config = GPTConfig.from_depth(4, vocab_size=500, **SECOND)
    model = random_model(config)
    tables = [model.transformer.wte, model.lm_head, model.transformer.value_embeds]
    by_adamw = sum(table.weight.numel() for table in tables)
    n = sum(p.numel() for p in model.parameters())
    assert doctor.model_sizes(config) == (4 * n, 4 * (n + by_adamw))
    d12, second = (GPTConfig.from_depth(12, vocab_size=65_536, **shape) for shape in ({}, SECOND))
    assert doctor.required_shards(second, CLIMBMIX) == doctor.required_shards(d12, FINEWEB)


@pytest.mark.parametrize("data_set", [FINEWEB, CLIMBMIX], ids=lambda text: text.name)
def test_hub(data_set, monkeypatch):
    """Text is missing, so the hub at HF_ENDPOINT must respond."""
    config = GPTConfig.from_depth(2)
    n_missing = doctor.required_shards(config, data_set) + 1
    missing = f"{n_missing} shards of {data_set.data}"
    with HubServer({f"{data_set.repo}/{data_set.val_shard}": b"x"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        expected = (True, "data", f"{missing} to download; the hub responds")
        assert findings(doctor.check_data(config, data_set.data)) == [expected]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ((is_ok, what, text),) = findings(doctor.check_data(config, data_set.data))
    assert (is_ok, what) == (False, "data")
    assert f"{missing} are missing and the hub does not respond" in text
    d20 = GPTConfig.from_depth(20, vocab_size=65_536)
    assert doctor.required_shards(d20, data_set) == 217  # 542 M x 20 / 50 M


def test_the_text_is_that_of_the_recipe(capsys, monkeypatch, base_dir):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for recipe, data in (("saint_iberis", "hub:fineweb"), ("saint_iberis_2", "hub:climbmix")):
        assert script.main([*SMALL[:-1], "--data=hub", "--depth=4", f"--recipe={recipe}"]) == 1
        assert f"shards of {data} are missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="data='hub:pile' is no data set of the hub"):
        script.main([*SMALL[:-1], "--data=hub:pile"])


@pytest.mark.parametrize("fault", ["status", "hang"])
def test_ranks_cannot_connect(monkeypatch, fault):
    def run(command, **settings):
        if fault == "hang":
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        return subprocess.CompletedProcess(command, 1, "", "some line\nerror: rank 1 lost contact\n")

    monkeypatch.setattr(doctor.subprocess, "run", run)
    ((is_ok, what, text),) = findings(doctor.check_collectives("cpu", 2))
    assert (is_ok, what) == (False, "gloo")
    assert ("rank 1 lost contact" if fault == "status" else "cannot connect") in text


def test_torch_cannot_use_the_driver(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "_driver_version", lambda: "470.1")
    _, (is_ok, what, text) = findings(doctor.check_devices("cpu", 1))
    assert (is_ok, what) == (False, "driver")
    assert "cannot use driver 470.1; update" in text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(findings(doctor.check_devices("cpu", 1))) == 1
