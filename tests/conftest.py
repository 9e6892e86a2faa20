"""Every test gets a base directory of its own; none may touch the home directory or the network."""

import os

import pytest

# models in tests are tiny: threads would only wait for one another. Also for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return path
