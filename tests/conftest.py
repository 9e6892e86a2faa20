"""Fixtures of all tests. Each test has its own base directory and uses neither home directory nor network."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache

import pytest
import torch

from nanochat.data import embedded

pytest.register_assert_rewrite("tests.helpers.sandboxes")  # its fixtures assert; before its first import

# The models of the tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes; torch has read it in this one

# Without bytecode files every child process would compile the same libraries again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The cache of transformers and datasets, which read this variable on import.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nanochat-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def interpret_kernels():
    """Run Triton's kernels on the CPU, by its interpreter with a fix for indices in one-element tensors."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # int() of (1,) is an error

    interpreter._patch_lang_tensor = patch_lang_tensor


if not torch.cuda.is_available():
    interpret_kernels()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark the tests that take the `browser` fixture; all of them are slow."""
    for item in items:
        if "browser" in item.fixturenames:
            item.add_marker("browser")
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return path


@pytest.fixture(autouse=True)
def exact_products():
    """Disable TF32, which scripts run by an earlier test have enabled."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def library_is_parsed_once():
    """Parse Python's own library once for all tests that derive text or tasks from it."""
    parse = embedded._source_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "_source_modules", cache(lambda: [list(entries) for entries in parse()]))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a kernel test: interpreted on a CPU, compiled on a GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU: -m gpu tests the compiled kernels")
    torch.manual_seed(0)
    return request.param


# The interpreter truncates to bfloat16 instead of rounding.
@pytest.fixture(
    params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["float32", "bfloat16"]
)
def dtype(request):
    """The dtype of a kernel test."""
    return request.param


@pytest.fixture
def model_hub(tmp_path, monkeypatch):
    """A hub without repositories, used by huggingface_hub in this process and in child processes."""
    from huggingface_hub import close_session, constants

    from tests.helpers.model_hub import ModelHub

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it would bypass the plain HTTP of this hub
    settings = {"NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    with ModelHub() as server:
        for name, value in {**settings, "HF_ENDPOINT": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield server
        close_session()


@pytest.fixture(params=[False, True], ids=["synchronous", "overlapping"])
def make_worker(request, monkeypatch):
    """Return a function that makes workers, which collect a launch before or after the next one."""
    from nanochat.decode.decoder import PlainDecoder
    from nanochat.serve.worker import Worker
    from tests.helpers.workers import TOKENIZER, small_model

    monkeypatch.setattr(PlainDecoder, "overlaps", request.param)
    workers = []

    def make(model=None, start=True, **settings):
        worker = Worker(model or small_model(), TOKENIZER, "small", **settings)
        workers.append(worker)
        if start:
            worker.start()
        return worker

    yield make
    for worker in workers:
        if worker._thread.is_alive():
            worker.close(drain=False)


@pytest.fixture(scope="module")
def backend():
    """Return a backend with scripted answers."""
    from tests.helpers.fake_backend import FakeBackend
    from tests.helpers.vocabulary import train_tokenizer

    return FakeBackend(train_tokenizer())


@pytest.fixture(scope="module")
def server(backend):
    """Return a client of a chat server with the scripted backend."""
    from tests.helpers.fake_backend import serve

    with serve(backend) as client:
        yield client
