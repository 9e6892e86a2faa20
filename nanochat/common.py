"""What every stage needs: the base directory, the Runtime, command lines, logging and atomic writes.

Nothing here runs at import time and nothing imports torch before a Runtime is asked for, so that
`python -m scripts.anything --help` answers at once. A script is

    def main(argv: Sequence[str] | None = None) -> int:
        config = parse(Config, argv)      # a frozen dataclass; tyro makes the command line of it
        runtime = setup_runtime(config.device_type)
        ...

    if __name__ == "__main__":
        run(main)
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
Config = TypeVar("Config")


def base_dir() -> Path:
    """Return $NANOCHAT_BASE_DIR (default ~/.cache/nanochat), the home of all data, weights and reports."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the base directory {path} ({error}); set NANOCHAT_BASE_DIR"
        ) from error
    return path


# ---------------------------------------------------------------------------------------------------------
# Command lines


def parse(config_class: type[Config], argv: Sequence[str] | None) -> Config:
    """Make a config from command-line arguments: `--depth=4`, `--device_batch_size 8` or with dashes."""
    import tyro

    return tyro.cli(
        config_class, args=argv, description=_description(config_class), config=(tyro.conf.OmitArgPrefixes,)
    )


def _description(config_class: type) -> str:
    """A command's help text is the docstring of the module that defines its config."""
    return sys.modules[config_class.__module__].__doc__ or ""


def run(main: Callable[[], int]) -> None:
    """Run a script's main and exit; what the user can mend is one line on stderr and status 1, no traceback."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    for library in ("httpx", "httpcore", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        status = main()
    except (ValueError, OSError) as error:
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file that appears under its name only when whole and on disk; a failure leaves the old one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, indented for people."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


# ---------------------------------------------------------------------------------------------------------
# Device and ranks


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how one process computes. Built once in main and passed down; no module reads a global."""

    device: torch.device
    compute_dtype: torch.dtype  # of activations; parameters and optimizer state stay float32
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process does the writing and the talking."""
        return self.rank == 0

    @classmethod
    def cpu(cls) -> Runtime:
        """One float32 process on the CPU."""
        import torch

        return cls(device=torch.device("cpu"), compute_dtype=torch.float32)


def setup_runtime(device_type: str = "") -> Runtime:
    """Find the device ("" picks cuda, then mps, then cpu) and the compute dtype of this process.

    bfloat16 on CUDA cards that have it (compute capability 8.0 and up), float32 everywhere else.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = device_type or next(name for name, found in available.items() if found)
    if not available.get(device_type):
        found = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"device_type={device_type!r} is not available here; choose from: {found}")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != 1:
        raise ValueError(
            f"WORLD_SIZE={world_size}: training on several ranks is not built yet; start one process"
        )

    torch.set_float32_matmul_precision("high")
    if device_type != "cuda":
        return Runtime(device=torch.device(device_type), compute_dtype=torch.float32)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return Runtime(device=device, compute_dtype=torch.bfloat16 if has_bf16 else torch.float32)
