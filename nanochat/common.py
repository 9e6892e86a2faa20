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

import atexit
import io
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Config = TypeVar("Config")
_STARTED = time.monotonic()


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
    """Make a config from command-line arguments: `--depth=4`, `--device_batch_size 8` or with dashes.

    The help text is the docstring of the module that defines the config. Bad arguments raise ValueError.
    """
    import tyro

    description = sys.modules[config_class.__module__].__doc__
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(
                config_class, args=argv, description=description, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
    message = re.search("\u2502(.*?)\u2502 \u2500", box.getvalue(), re.DOTALL)  # in the box, above its rule
    text = message[1] if message else box.getvalue()
    raise ValueError(" ".join(text.replace("\u2502", " ").split()) + " (see --help)")


def require_at_least(config: Any, **least: int) -> None:
    """Raise ValueError if a setting is below its least value."""
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {minimum}")


def require_counts(config: Any, *names: str) -> None:
    """Raise ValueError if a setting is neither a number of things nor -1, which leaves it open."""
    for name in names:
        if getattr(config, name) < 1 and getattr(config, name) != -1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1, or -1")


def run(main: Callable[[], int]) -> None:
    """Run a script's main and exit; an error that the user can mend is one line on stderr and status 1."""
    is_main_rank = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main_rank else logging.ERROR, format="%(message)s", stream=sys.stdout
    )
    for library in ("httpx", "httpx2", "httpcore", "urllib3"):
        logging.getLogger(library).setLevel(logging.WARNING)
    mendable = () if os.environ.get("NANOCHAT_DEBUG") else (ValueError, OSError, FloatingPointError)
    status: int | str
    try:
        status = main()
        if _process_group() is not None:
            _process_group().barrier()
    except mendable as error:
        status = f"error: {error}"
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:
        if _process_group() is None:
            raise
        if _is_lost_rank(error):
            status = f"error: rank {_process_group().get_rank()} lost contact with another: {error}"
        else:
            traceback.print_exc()
            status = 1
    if _process_group() is not None:
        _leave_group(status)
    sys.exit(status)


def _process_group() -> ModuleType | None:
    """Return torch.distributed if this process is one of a group."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def _is_lost_rank(error: Exception) -> bool:
    """Whether a collective failed since another rank has ended or, for NANOCHAT_TIMEOUT_S, not answered."""
    by_gloo = any(words in str(error) for words in ("/gloo/", "pair closure"))  # it has no class for them
    return by_gloo or isinstance(error, _process_group().DistError)


def _leave_group(status: int | str) -> NoReturn:
    """End a rank with what an exit does, but without finalising the interpreter.

    A thread of the collectives' library that wants Python's lock while the interpreter finalises, to drop a
    tensor say, is killed in the middle of C++ code. That aborts the process, though all its work is done.
    """
    if isinstance(status, str):
        sys.stderr.write(status + "\n")
        status = 1
    if status == 0:  # all ranks are past a barrier; if not, others may be stuck and are not waited for
        _process_group().destroy_process_group()
        threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock of the name of path, which need not exist: one process at a time, on this machine at least.

    For what is made once: whoever gets the lock later finds it there.
    """
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, indented for people, into a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def process_seconds() -> float:
    """Return for how long this process has run."""
    return time.monotonic() - _STARTED


def write_report(stage: str, result: dict[str, Any], earlier_seconds: float = 0.0) -> Path:
    """Write what a stage found to report/<stage>.json, with the time and the seconds that it took.

    earlier_seconds were those of processes that it was begun in. Returns the path.
    """
    stamps = {"finished_at": time.time(), "wall_seconds": earlier_seconds + process_seconds()}
    path = base_dir() / "report" / f"{stage}.json"
    write_json(path, {**result, **stamps})
    return path


# ---------------------------------------------------------------------------------------------------------
# Device and ranks


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how one process computes. Built once in main and passed down; no module reads a global."""

    device: torch.device
    compute_dtype: torch.dtype  # of activations; parameters and optimizer state stay float32
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of this machine

    @property
    def is_main(self) -> bool:
        """Whether this process does the writing and the talking."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what is done once on each machine, such as downloading."""
        return self.local_rank == 0

    def compiles(self, setting: bool | None) -> bool:
        """Whether to use torch.compile, given a setting that leaves it to the device if it is None."""
        return self.device.type == "cuda" if setting is None else setting

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Collect a small picklable value of every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something on every rank: none goes on before all are done, and what fails on one fails on all.

        Otherwise the others would wait in their next collective for a rank that has ended.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as found:
            error = found
        for found in self.gather(error):
            if found is not None:
                raise found

    @classmethod
    def cpu(cls) -> Runtime:
        """One float32 process on the CPU."""
        import torch

        return cls(device=torch.device("cpu"), compute_dtype=torch.float32)


def setup_runtime(device_type: str = "") -> Runtime:
    """Find the device ("" picks cuda, then mps, then cpu), the compute dtype and the rank of this process.

    bfloat16 on CUDA cards that have it (compute capability 8.0 and up), float32 everywhere else. Under
    torchrun the ranks are joined in a process group: NCCL on CUDA, gloo on the CPU. A rank that waits for
    another for more than $NANOCHAT_TIMEOUT_S seconds (default 600) ends with an error, and torchrun ends the
    rest.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = device_type or next(name for name, found in available.items() if found)
    if not available.get(device_type):
        found = ", ".join(name for name, is_there in available.items() if is_there)
        raise ValueError(f"device_type={device_type!r} is not available here; choose from: {found}")

    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    torch.set_float32_matmul_precision("high")
    device, compute_dtype = torch.device(device_type), torch.float32
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device) >= (8, 0):
            compute_dtype = torch.bfloat16
    if world_size > 1:
        _join_group(device)
    return Runtime(
        device=device,
        compute_dtype=compute_dtype,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
    )


def _join_group(device: torch.device) -> None:
    import torch.distributed as dist

    setting = os.environ.get("NANOCHAT_TIMEOUT_S") or "600"
    try:
        timeout = timedelta(seconds=float(setting))
    except ValueError:
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise ValueError(f"NANOCHAT_TIMEOUT_S={setting!r} must be a number of seconds above 0")
    if not dist.is_initialized():
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
