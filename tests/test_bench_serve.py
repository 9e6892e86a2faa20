"""A small load test: answers are right, slots are freed, and failures are detected."""

import json
from pathlib import Path

import pytest

from nanochat.serve.protocol import End
from nanochat.serve.worker import Worker
from scripts import bench_serve
from tests.helpers.echo_model import echo_config, echo_model, save_echo
from tests.helpers.fake_backend import FakeBackend, Pause, serve
from tests.helpers.models import random_model, small_config
from tests.helpers.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOKENIZER = train_tokenizer()


@pytest.fixture
def run(capsys):
    """Return a function that runs the load test on a server and returns status and result."""

    def run(client, *flags):
        status = bench_serve.main([f"--url={client.url}", *flags])
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def expectations():
    """Return a file of questions with the answers of the echo model."""
    return save_echo()


def echo_worker(**settings):
    return Worker(echo_model(echo_config(TOKENIZER.get_vocab_size())), TOKENIZER, "echo", **settings)


def test_answers_under_load_are_those_given_alone(run):
    """With random weights, answers depend on the whole decode state; a fifth of the clients disconnects."""
    config = small_config(vocab_size=TOKENIZER.get_vocab_size(), sequence_len=512)
    worker = Worker(random_model(config).eval(), TOKENIZER, "random", slots=8)
    with serve(worker) as client:
        status, result = run(client, "--clients=24", "--seconds=4", "--max-tokens=30", "--check")
        stats = client.get("/stats").json()
    assert result["first_problems"] == []
    assert status == 0
    assert result["compared"]
    assert result["complete"] + result["left"] >= 24  # each client asks at least once
    assert result["left"] > 0
    assert stats["requests_cancelled"] > 0
    assert (stats["running"], stats["waiting"], stats["requests_failed"]) == (0, 0, 0)
    assert result["health_s"]["median"] < result["first_token_s"]["median"] / 2  # it does not wait for a slot


def test_no_answer_depends_on_other_rows(run, expectations):
    with serve(echo_worker(slots=4, prefill_chunk=32)) as client:
        status, result = run(client, "--clients=12", "--seconds=1", f"--expect={expectations}")
    assert result["first_problems"] == []
    assert status == 0
    assert result["complete"] + result["left"] >= 12
    assert result["complete"] > 0


def test_a_wrong_answer_is_detected(run, expectations):
    lines = [json.loads(line) for line in expectations.read_text().splitlines()]
    for line in lines[::2]:
        line["answer"] = line["answer"][:-1] + "!"
    expectations.write_text("\n".join(map(json.dumps, lines)))
    with serve(echo_worker()) as client:
        status, result = run(client, "--clients=8", "--seconds=0.5", f"--expect={expectations}")
    assert status == 1
    assert 0 < result["problems"] < result["complete"]
    assert "wrong: " in result["first_problems"][0]


def test_failures_are_detected(run, monkeypatch):
    monkeypatch.setattr(bench_serve, "RETRY_S", 0.01)
    backend = FakeBackend(TOKENIZER)
    backend.scripts = [["the", End(0, "error", "CUDA error")], ValueError("no"), ["the river"]]
    with serve(backend) as client:
        status, result = run(client, "--clients=1", "--seconds=1", "--disconnect=0")
    assert status == 1
    assert result["problems"] == 2
    assert "the model failed" in result["first_problems"][0]
    assert "status 400" in result["first_problems"][1]


def test_a_slot_that_is_not_freed_is_detected(run, monkeypatch):
    monkeypatch.setattr(bench_serve, "DRAIN_S", 0.3)
    backend, pause = FakeBackend(TOKENIZER), Pause()
    submit = backend.submit

    def submit_uncancellable(request, emit):
        handle = submit(request, emit)
        handle.cancel = lambda: None
        return handle

    monkeypatch.setattr(backend, "submit", submit_uncancellable)
    backend.scripts = [["river"] * 40 + [pause]]
    with serve(backend) as client:
        status, result = run(client, "--clients=1", "--seconds=0.5", "--disconnect=1")
        pause.end()
    assert status == 1
    assert "leaked: 1 run and 0 wait" in str(result["first_problems"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url=127.0.0.1:8000"], "must be like http://"),
        (["--clients=0"], "clients=0"),
        (["--disconnect=1.5"], "disconnect=1.5"),
        (["--check", "--expect=x"], "exclude each other"),
        (["--expect=x"], "No such file"),
        (["--url=http://127.0.0.1:9"], "Connect call failed"),
    ],
)
def test_invalid_settings(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        bench_serve.main(flags)
