"""Findings of the doctor: small machines, unreachable hubs, ranks that cannot connect."""

import shutil
import subprocess

import pytest

from nanochat import doctor
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
    assert doctor.required_shards(second) == doctor.required_shards(d12)


def test_hub(monkeypatch):
    """Text is missing, so the hub at HF_ENDPOINT must respond."""
    config = GPTConfig.from_depth(2)
    n_missing = doctor.required_shards(config) + 1
    with HubServer({doctor.VAL_SHARD: b"x"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        expected = (True, "data", f"{n_missing} shards to download; the hub responds")
        assert findings(doctor.check_data(config, "hub")) == [expected]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    ((is_ok, what, text),) = findings(doctor.check_data(config, "hub"))
    assert (is_ok, what) == (False, "data")
    assert f"{n_missing} shards are missing and the hub does not respond" in text
    assert doctor.required_shards(GPTConfig.from_depth(20, vocab_size=65_536)) == 217  # 542 M x 20 / 50 M


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
