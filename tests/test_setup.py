"""dev/setup.sh, with a fake uv that records its commands."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UV = """#!/usr/bin/env bash
echo "$1" >> "$PWD/calls"
[ "$1" != venv ] || { mkdir -p .venv/bin; ln -sf "$(command -v bash)" .venv/bin/python; }
"""
TOOLS = ("bash", "env", "dirname", "cat", "rm", "mkdir", "ln")


@pytest.fixture
def setup(tmp_path):
    """Return a function that runs the script with TOOLS and given programs, and returns the calls of uv."""
    for name in ("requirements.lock", "tests/requirements.lock", "pyproject.toml", "rustbpe/Cargo.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "rustbpe" / "src").mkdir()
    for name in ("rustbpe/rustbpe.pyi", "rustbpe/src/lib.rs", "calls"):
        (tmp_path / name).touch()
    (tmp_path / "dev").mkdir()
    shutil.copy(ROOT / "dev" / "setup.sh", tmp_path / "dev")
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))

    def start(*more):
        for tool, text in (("uv", UV), ("cc", "#!/bin/sh\n"), *more):
            (programs / tool).write_text(text)
            (programs / tool).chmod(0o755)
        (tmp_path / "calls").write_text("")
        environment = {"PATH": str(programs), "HOME": str(tmp_path)}
        subprocess.run(["bash", "dev/setup.sh"], cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "calls").read_text().split()

    return start


SHA256SUM = ("sha256sum", "#!/bin/sh\ncat > $HOME/summed; echo one\n")
SHASUM = ("shasum", '#!/bin/sh\n[ "$*" = "-a 256" ] && cat > $HOME/summed && echo other\n')


@pytest.mark.parametrize("checksum", [SHA256SUM, SHASUM])  # older macOS has only the second
def test_second_run_does_nothing(setup, checksum):
    assert setup(checksum) == ["venv", "pip", "pip", "pip"]
    assert setup(checksum) == []


def test_a_dangling_python_is_detected(setup, tmp_path):
    """An update of the system's Python left a dangling link, and setup reported success."""
    assert setup(SHA256SUM) != []
    python = tmp_path / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(tmp_path / "nowhere")
    assert setup(SHA256SUM)[0] == "venv"
