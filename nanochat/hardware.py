"""Properties of the hardware: peak performance for MFU, a description for results, limits of kernels."""

import logging
import os
import platform
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger(__name__)

# bytes of shared memory per block for the kernels' large tiles; Hopper and data-centre Blackwell have 227 KB
SHARED_MEMORY = 226 * 1024

# dense bf16 peak in FLOP/s by part of the GPU's name; the first match counts (vendors' data sheets)
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 4080 SUPER": 104e12,
    "RTX 4080": 97e12,
    "RTX 4070 Ti SUPER": 88e12,
    "RTX 4070 Ti": 80e12,
    "RTX 4070 SUPER": 71e12,
    "RTX 4070": 58e12,
    "RTX 3090": 71e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s, None on a CPU; warn and return None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    if "Laptop" in name:  # a smaller GPU with the same name
        peak = None
    if peak is None:
        logger.warning(f"warning: no bf16 peak known for {name!r}, so no MFU is shown")
    return peak


def describe(device: torch.device) -> dict[str, str | int]:
    """Return the hardware and versions that a measurement depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": f"{device.type} {name}".strip(),
        "cpu_cores": os.cpu_count() or 0,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def has_large_tiles(device: torch.device) -> bool:
    """Return True if kernels with large tiles can run: enough shared memory, or the CPU interpreter."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED_MEMORY


@cache
def compiled(function: Callable) -> Callable:
    """Return the function compiled for fixed shapes, the same object in every call."""
    return torch.compile(function, dynamic=False)
