from typing import get_args

import pytest
import torch

from nanochat.common import Runtime
from scripts import bench_kernels

pytestmark = pytest.mark.slow


@pytest.fixture
def timed(monkeypatch):
    """Run without a GPU; return the ops that were timed."""
    monkeypatch.setattr(bench_kernels, "setup_runtime", lambda device_type: Runtime.cpu())
    ops = []
    for op in get_args(bench_kernels.Op):
        name = f"time_{op}"
        monkeypatch.setattr(
            bench_kernels, name, lambda config, shape, op=op: ops.append(op) or [{"forward_ms": 1}]
        )
    return ops


def test_no_speed_for_an_op_whose_tests_fail(timed, monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "passes_tests", lambda op: op != "mlp")
    with pytest.raises(ValueError, match="tests of mlp fail"):
        bench_kernels.main([])
    assert timed == [op for op in get_args(bench_kernels.Op) if op != "mlp"]
    assert '"op": "mlp"' not in capsys.readouterr().out


def test_the_tests_are_run(tmp_path, monkeypatch):
    """By pytest, those with the op in their name; an op without tests counts as failing."""
    path = tmp_path / "tests" / "test_ops.py"
    path.parent.mkdir()
    path.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_slc2(): pass\ndef test_mlp(): assert False\n"
    )  # fmt: skip
    monkeypatch.setattr(bench_kernels, "TESTS", [path])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # these need none
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    assert bench_kernels.passes_tests("slc2")
    assert not bench_kernels.passes_tests("mlp")
    assert not bench_kernels.passes_tests("head_loss")


def test_outside_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="root of the checkout"):
        bench_kernels.passes_tests("slc2")


def test_each_op_has_tests():
    tests = "".join(path.read_text() for path in bench_kernels.TESTS)
    assert all(f"def test_{op}(" in tests for op in get_args(bench_kernels.Op) if op != "products")


def test_bad_settings():
    with pytest.raises(ValueError, match="tokens=100"):
        bench_kernels.main(["--tokens=100"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda"):
            bench_kernels.main([])


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(bench_kernels, "passes_tests", lambda op: True)
    assert bench_kernels.main(["--depth=4", "--vocab-size=1024", "--tokens=4096"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum('"by": "kernel"' in line for line in lines) == 9
    assert sum('"op": "products"' in line for line in lines) == 6
