"""Every test gets a base directory of its own; none may touch the home directory or the network."""

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache

import pytest
import torch

from nanochat.data import embedded

pytest.register_assert_rewrite(
    "tests.helpers.sandboxes"
)  # whose fixtures assert, and which is imported first

# models in tests are tiny: threads would only wait for one another
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start: torch has read it here

# else each of them would compile the same libraries again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# where transformers and datasets put what they load; read when they are imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="nanochat-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


def interpret_kernels():
    """Let Triton's kernels run on the CPU: its interpreter, with its way to read an index mended."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())  # int() of (1,) is an error

    interpreter._patch_lang_tensor = patch_lang_tensor


if not torch.cuda.is_available():
    interpret_kernels()


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return path


@pytest.fixture(autouse=True)
def exact_products():
    """Scripts that a test has run leave the GPU with products in TF32."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session", autouse=True)
def library_is_parsed_once():
    """Python's own library, for all tests that make text or tasks of it."""
    parse = embedded._source_modules
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "_source_modules", cache(lambda: [list(entries) for entries in parse()]))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a kernel runs: interpreted on a CPU, compiled on a GPU."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled on this machine, and run by -m gpu")
    torch.manual_seed(0)
    return request.param


# the interpreter cuts bfloat16 off instead of rounding it
@pytest.fixture(
    params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["float32", "bfloat16"]
)
def dtype(request):
    """What a kernel computes with."""
    return request.param


@pytest.fixture
def model_hub(tmp_path, monkeypatch):
    """A hub without repositories that huggingface_hub talks to, here and in processes started from here."""
    from huggingface_hub import close_session, constants

    from tests.helpers.model_hub import ModelHub

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # else files go by another protocol
    settings = {"NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    with ModelHub() as server:
        for name, value in {**settings, "HF_ENDPOINT": server.endpoint}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        close_session()
        yield server
        close_session()
