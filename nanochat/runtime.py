"""The Runtime of a process: device, compute dtype, and rank in the process group.

torch is imported when a Runtime is requested, not when this module is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Device, dtype and rank of one process: created once in main and passed down, never a global."""

    device: torch.device
    compute_dtype: torch.dtype  # of activations; parameters and optimizer state stay float32
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # rank within this machine

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and prints."""
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        """True for the process that does the work needed once per machine, such as downloading."""
        return self.local_rank == 0

    def compiles(self, setting: bool | None) -> bool:
        """Return whether to use torch.compile: the setting, or if that is None, True on CUDA."""
        return self.device.type == "cuda" if setting is None else setting

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return a small picklable value of every rank, in order of rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank, wait for all ranks, and raise on all of them an error of any of them.

        Covers ValueError and OSError. Without this, the other ranks would wait in their next collective for a
        rank that has ended.
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
        """Return the Runtime of a single float32 process on the CPU."""
        import torch

        return cls(device=torch.device("cpu"), compute_dtype=torch.float32)


def get_dist_info() -> tuple[bool, int, int, int]:
    """Return what torchrun has set: whether there are several ranks, rank, local rank, number of ranks."""
    rank, local_rank, world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))
    )
    return world_size > 1, rank, local_rank, world_size


def autodetect_device_type() -> str:
    """Return the best device type available here: cuda, else mps, else cpu."""
    return _available_device_types()[0]


def _available_device_types() -> list[str]:
    import torch

    is_available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name in is_available if is_available[name]]


def setup_runtime(device_type: str = "", dtype: DType = "auto", *, trains: bool = False) -> Runtime:
    """Return the Runtime of this process; device_type "" selects cuda, then mps, then cpu.

    The compute dtype "auto" is bfloat16 on CUDA GPUs of compute capability 8.0 or higher, float32 elsewhere.
    Under torchrun the ranks join a process group: NCCL on CUDA, gloo on the CPU. A rank that waits for
    another for more than $NANOCHAT_TIMEOUT_S seconds (default 600) ends with an error, and torchrun ends the
    others. Raise ValueError if the device is not available, the timeout is invalid or `trains` and float16.
    """
    import torch

    if trains and dtype == "float16":
        raise ValueError(
            "dtype=float16 is for inference: small gradients would become 0, since the loss is not scaled; "
            "train with bfloat16 or float32"
        )
    available = _available_device_types()
    device_type = device_type or available[0]
    if device_type not in available:
        raise ValueError(
            f"device_type={device_type!r} is not available here; choose from: {', '.join(available)}"
        )
    _, rank, local_rank, world_size = get_dist_info()
    torch.set_float32_matmul_precision("high")
    device, compute_dtype = torch.device(device_type), torch.float32
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        if torch.cuda.get_device_capability(device) >= (8, 0):
            compute_dtype = torch.bfloat16
    if dtype != "auto":
        compute_dtype = getattr(torch, dtype)
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
