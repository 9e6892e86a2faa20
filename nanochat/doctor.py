"""The checks of scripts/doctor.py: detect within a minute problems that would fail a run after hours.

Each check yields findings; one that is not ok says what to change.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanochat.common import Runtime, atomic_write, base_dir, run, setup_runtime
from nanochat.config import GPTConfig
from nanochat.dataset import HubText, hub_text, shard_paths, source
from nanochat.gpt import GPT
from nanochat.optim.muon_adamw import build_optimizer
from nanochat.optim.schedule import OptimizerConfig
from nanochat.train.accelerate import accelerate
from nanochat.train.memory import MAX_ROWS, choose_rows

GIB = 2**30
SHARD_BYTES, SHARD_TOKENS = 100e6, 50e6  # approximate size of the hub's shards
TOKENS_PER_PARAMETER = 20
N_CHECKPOINTS = 4 * 2 + 1  # two of each stage, and one being written
COLLECTIVE_TIMEOUT_S = 120
N_FLOATS, REPEATS = 2**24, 10  # the all-reduce: 64 MiB, ten times


@dataclass(frozen=True)
class Finding:
    """The result of a check, printed as one line."""

    is_ok: bool
    what: str
    text: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.is_ok else 'FAILS'} {self.what}: {self.text}"


def check_devices(device_type: str, n_ranks: int) -> Iterator[Finding]:
    """Check that the driver fits torch, that each rank has a GPU, and that their memory is free."""
    if device_type != "cuda":
        yield Finding(True, "device", f"{device_type}, torch {torch.__version__}, {os.cpu_count()} cores")
        driver = _driver_version()
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            text = f"torch for CUDA {torch.version.cuda} cannot use driver {driver}; update the driver"
            yield Finding(False, "driver", f"{text}, or set CUDA_VISIBLE_DEVICES= to run on the CPU")
        return
    n_gpus = torch.cuda.device_count()
    if n_gpus < n_ranks:
        yield Finding(False, "device", f"{n_ranks} ranks but {n_gpus} GPU(s); lower --ranks")
    for index in range(min(n_ranks, n_gpus)):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # the driver is too old, or the card does not respond
            yield Finding(False, f"GPU {index}", f"unusable: {error}")
            continue
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, capability {major}.{minor}"
        precision = "" if major >= 8 else "; no bfloat16, so training is in float32 and slow"
        yield Finding(True, f"GPU {index}", name + precision)
        if free < 0.9 * total:
            used = f"{(total - free) / GIB:.0f} GiB are in use by other processes"
            yield Finding(False, f"GPU {index}", f"{used}; end them (nvidia-smi lists them)")
    yield Finding(
        True,
        "driver",
        f"{_driver_version() or 'unknown'}; torch {torch.__version__}, CUDA {torch.version.cuda}",
    )


def _driver_version() -> str:
    """Return the version of NVIDIA's driver, or "" without one."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    process = subprocess.run(command, capture_output=True, text=True)
    return process.stdout.strip() if process.returncode == 0 else ""


def check_collectives(device_type: str, n_ranks: int) -> Iterator[Finding]:
    """Check NCCL or gloo: start the ranks of the run and let them perform an all-reduce."""
    if n_ranks == 1:
        return
    library = "gloo"
    if device_type == "cuda":
        from torch.cuda import nccl

        library = "NCCL " + ".".join(map(str, nccl.version()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command += ["-m", "nanochat.doctor", device_type]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=COLLECTIVE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Finding(False, library, f"{n_ranks} ranks cannot connect within {COLLECTIVE_TIMEOUT_S} s")
        return
    if process.returncode == 0:
        yield Finding(True, library, process.stdout.strip())
    else:
        errors = [line for line in process.stderr.splitlines() if "error" in line.lower()]
        reason = errors[0].strip() if errors else "no reason given"
        yield Finding(False, library, f"{n_ranks} ranks cannot perform an all-reduce: {reason}")


def model_sizes(config: GPTConfig) -> tuple[int, int]:
    """Return the bytes of a model's float32 weights and of its optimizer state."""
    with torch.device("meta"):
        counts = GPT(config).num_parameters()
    # AdamW, for tables, keeps two moments, Muon one
    by_adamw = counts["wte"] + counts["lm_head"] + counts.get("value_embeds", 0)
    return 4 * counts["total"], 4 * (counts["total"] + by_adamw)


def check_disk(config: GPTConfig, data: str) -> Iterator[Finding]:
    """Check that the base directory is writable and has space for checkpoints and downloads."""
    try:
        folder = base_dir()
        with atomic_write(folder / "doctor", "w") as file:
            file.write("writable")
        (folder / "doctor").unlink()
    except (ValueError, OSError) as error:
        yield Finding(False, "disk", str(error))
        return
    weights, state = model_sizes(config)
    checkpoints = N_CHECKPOINTS * (weights + state)
    download = SHARD_BYTES * missing_shards(config, data)
    free = shutil.disk_usage(folder).free
    needed = f"needed: {checkpoints / GIB:.1f} GiB for checkpoints and {download / GIB:.1f} for text"
    text = f"{free / GIB:.1f} GiB free in {folder}, {needed}"
    if checkpoints + download > free:
        yield Finding(False, "disk", f"{text}; free some space, set NANOCHAT_BASE_DIR or lower --depth")
    else:
        yield Finding(True, "disk", text)


def required_shards(config: GPTConfig, text: HubText) -> int:
    """Return the number of the hub's shards that pretraining reads."""
    with torch.device("meta"):
        tokens = TOKENS_PER_PARAMETER * GPT(config).num_scaling_parameters()
    return min(text.n_train_shards, -int(-tokens // SHARD_TOKENS))


def missing_shards(config: GPTConfig, data: str) -> int:
    """Return the number of shards still to be downloaded, including the validation shard."""
    text = hub_text(data)
    if text is None:
        return 0
    present = [path.name for path in text.shards]
    return max(0, required_shards(config, text) - len(present)) + (text.val_shard not in present)


def check_data(config: GPTConfig, data: str) -> Iterator[Finding]:
    """Check that the training text is readable, or that the hub responds."""
    n_missing, text = missing_shards(config, data), hub_text(data)
    if n_missing and text:
        yield from _check_hub(n_missing, text)
    else:
        try:
            n_shards = len(shard_paths(data, "train")) + len(shard_paths(data, "val"))
            yield Finding(True, "data", f"{source(data)}, {n_shards} shards")
        except (ValueError, OSError) as error:
            yield Finding(False, "data", str(error))


def _check_hub(n_missing: int, text: HubText) -> Iterator[Finding]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import httpx

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(text.repo, text.val_shard, repo_type="dataset", endpoint=endpoint)
    try:
        get_hf_file_metadata(url, timeout=10)
        yield Finding(True, "data", f"{n_missing} shards of {text.data} to download; the hub responds")
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Finding(
            False,
            "data",
            f"{n_missing} shards of {text.data} are missing and the hub does not respond ({reason}); "
            "set HF_ENDPOINT or a proxy, or use --data=embedded or your own text",
        )


def check_memory(config: GPTConfig, device_type: str, batch_size: int, n_ranks: int) -> Iterator[Finding]:
    """Check memory: on a GPU with a full-size forward and backward pass, on a CPU by the sizes alone."""
    weights, state = model_sizes(config)
    if device_type != "cuda":
        needed = n_ranks * 2 * weights + state  # weights and gradients on each rank, sharded state
        available = _available_bytes()
        text = f"{needed / GIB:.1f} GiB for weights, gradients and state; {available / GIB:.1f} available"
        yield Finding(needed < available, "memory", text)
        return
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    single_rank = Runtime(device=device, compute_dtype=torch.bfloat16)
    try:
        with device:
            model = GPT(config)
        model.init_weights()
        batch_size = choose_rows(batch_size, model, MAX_ROWS, single_rank, fused=None)
        build_optimizer(model, OptimizerConfig(), replace(single_rank, world_size=n_ranks))
        accelerate(model, compile=True, fused=None)
        idx = torch.zeros((batch_size, config.sequence_len), dtype=torch.int64, device=device)
        model(idx, idx, loss_reduction="sum").backward()
        gradients = weights // 2  # those of the previous backward pass
        peak = torch.cuda.max_memory_allocated(device) + gradients
    except torch.cuda.OutOfMemoryError:
        peak = total
    except ValueError as error:  # one row does not fit
        yield Finding(False, "memory", str(error))
        return
    text = f"device_batch_size={batch_size} takes {peak / GIB:.0f} of {total / GIB:.0f} GiB"
    if peak < 0.97 * total:
        yield Finding(True, "memory", text)
    else:
        yield Finding(False, "memory", f"{text} or more; try --device-batch-size={max(1, batch_size // 2)}")


def _available_bytes() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main() -> int:
    """Perform an all-reduce and print its speed; check_collectives starts this for each rank.

    Raise ValueError if the sum is wrong.
    """
    runtime = setup_runtime(sys.argv[1])
    value = torch.ones(N_FLOATS, device=runtime.device)
    runtime.sum_(value)
    if not (value == runtime.world_size).all():
        raise ValueError(f"the sum of ones over {runtime.world_size} ranks is {value.min()} to {value.max()}")
    runtime.gather(None)
    start = time.perf_counter()
    for _ in range(REPEATS):
        runtime.sum_(value.fill_(1))
    value[0].item()
    seconds = (time.perf_counter() - start) / REPEATS
    if runtime.is_main:
        n_bytes = 2 * (runtime.world_size - 1) / runtime.world_size * 4 * N_FLOATS  # sent by each rank
        sys.stdout.write(f"{runtime.world_size} ranks, all-reduce at {n_bytes / seconds / 1e9:.1f} GB/s\n")
    return 0


if __name__ == "__main__":
    run(main)
