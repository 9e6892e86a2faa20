"""chat_web: from the command line to a reply and a clean exit, and invalid settings."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from nanochat.checkpoint_manager import checkpoint_dir, save_checkpoint
from scripts import chat_web
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(base_dir):
    tokenizer = train_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    model = random_model(small_config(vocab_size=tokenizer.get_vocab_size(), sequence_len=64))
    save_checkpoint(checkpoint_dir("sft", "d4"), 3, model, None, {})


def test_from_start_to_end(checkpoint):
    """It prints its address, answers, refuses clients without the key, and exits with 0 after SIGTERM."""
    command = [
        sys.executable,
        "-m",
        "scripts.chat_web",
        "-p",
        "0",
        "--device-type=cpu",
        "-m",
        "9",
        "--slots=2",
        "--allowed-origins",
        "https://example.org",
    ]
    environment = {**os.environ, "NANOCHAT_API_KEY": "secret"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            greeting = process.stdout.readline()
            assert greeting.startswith("d4-sft, step 3, on cpu: http://127.0.0.1:")
            client = httpx2.Client(base_url=greeting.split()[-1], timeout=60, trust_env=False)
            body = {"messages": [{"role": "user", "content": "the river"}]}
            assert client.post("/chat/completions", json=body).status_code == 401
            client.headers["authorization"] = "Bearer secret"
            elsewhere = {"host": "example.com", "origin": "https://example.org"}
            response = client.post("/chat/completions", json=body, headers=elsewhere)
            assert response.headers["access-control-allow-origin"] == "https://example.org"
            assert response.text.endswith('data: {"done": true}\n\n')
            usage = client.post("/v1/chat/completions", json={**body, "n": 2}).json()["usage"]
            assert 0 < usage["completion_tokens"] <= 18
            client.close()
            process.send_signal(signal.SIGTERM)
            out = process.communicate(timeout=60)[0]
        finally:
            process.kill()
    assert process.returncode == 0
    assert out.splitlines()[-1].startswith("served 2 requests, ")
    assert "the river" not in out


def test_a_port_in_use(checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1, port {port} .*choose others"):
            chat_web.main(["--device-type=cpu", "-p", str(port)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "0"], "num_gpus=0 must be at least 1"),
        (["-n", "2", "-p", "0"], r"num_gpus=2 must be at most 1, the number of cpu devices"),
        (["-p", "70000"], "port=70000"),
        (["-t", "3"], "temperature"),
        (["-k", "201"], "top_k"),
        (["-m", "0"], "max_tokens"),
        (["--slots=0", "-p", "0"], "slots=0"),
        (["-p", "0", "-s", "4"], "no checkpoint of step 4"),
        (["--api-key", "two words"], "api_key"),
        (["--allowed-origins", "https://example.org", "example.com"], "'example.com' must be like https"),
    ],
)
def test_invalid_settings(checkpoint, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        chat_web.main(["--device-type=cpu", *flags])


@pytest.mark.parametrize("flags", [[], ["--decoder=plain"]])
def test_decoder(checkpoint, monkeypatch, flags):
    def end(model, slots, kind):
        raise ValueError(f"a {kind} decoder")

    monkeypatch.setattr("nanochat.serve.worker.decoder_for", end)
    with pytest.raises(ValueError, match="a plain decoder" if flags else "a best decoder"):
        chat_web.main(["--device-type=cpu", "-p", "0", *flags])


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ([], chat_web.LOOPBACK),
        (["--host=localhost"], chat_web.LOOPBACK),
        (["--api-key=secret"], ()),
        (["--host=0.0.0.0"], ()),
    ],
)
def test_without_a_key_only_this_machine_is_served(checkpoint, monkeypatch, flags, hosts):
    """A web page whose name has this machine's address could use the model."""
    found = []

    def end(pool, settings):
        found.append(settings.allowed_hosts)
        raise ValueError("enough")

    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    monkeypatch.setattr("nanochat.serve.server.create_app", end)
    with pytest.raises(ValueError, match="enough"):
        chat_web.main(["--device-type=cpu", "-p", "0", *flags])
    assert found == [hosts]
