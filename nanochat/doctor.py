"""What would fail hours into a run, found out in a minute before it: the checks of scripts/doctor.py.

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
from nanochat.dataset import N_TRAIN_SHARDS, REPO_ID, VAL_SHARD, shard_paths, source
from nanochat.gpt import GPT
from nanochat.optim import build_optimizer
from nanochat.optim.schedule import LearningRates
from nanochat.train.accelerate import accelerate
from nanochat.train.memory import MAX_ROWS, choose_rows

GIB = 2**30
SHARD_BYTES, SHARD_TOKENS = 100e6, 50e6  # of the hub's shards, about
TOKENS_A_PARAMETER = 20
N_CHECKPOINTS = 4 * 2 + 1  # two of each stage, and one that is being written
COLLECTIVE_TIMEOUT_S = 120
N_FLOATS, REPEATS = 2**24, 10  # 64 MiB, that the ranks add up


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    is_ok: bool
    what: str
    text: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.is_ok else 'FAILS'} {self.what}: {self.text}"


def check_devices(device_type: str, n_ranks: int) -> Iterator[Finding]:
    """GPUs: a driver that this torch can use, one for each rank, and nobody else's memory on them."""
    if device_type != "cuda":
        yield Finding(True, "device", f"{device_type}, torch {torch.__version__}, {os.cpu_count()} cores")
        driver = _driver_version()
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            text = (
                f"{driver} is there, but torch for CUDA {torch.version.cuda} cannot use it; update it, or set"
            )
            yield Finding(False, "driver", f"{text} CUDA_VISIBLE_DEVICES= to do without")
        return
    n_gpus = torch.cuda.device_count()
    if n_gpus < n_ranks:
        yield Finding(False, "device", f"{n_ranks} ranks but {n_gpus} GPU(s); lower --ranks")
    for index in range(min(n_ranks, n_gpus)):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:  # a driver that is too old, a card that has fallen off the bus
            yield Finding(False, f"GPU {index}", f"cannot be used: {error}")
            continue
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, {total / GIB:.0f} GiB, capability {major}.{minor}"
        precision = "" if major >= 8 else "; no bfloat16, so all is float32 and slow"
        yield Finding(True, f"GPU {index}", name + precision)
        if free < 0.9 * total:
            used = f"{(total - free) / GIB:.0f} GiB are in use by others; end them (nvidia-smi shows them)"
            yield Finding(False, f"GPU {index}", used)
    yield Finding(
        True,
        "driver",
        f"{_driver_version() or 'unknown'}; torch {torch.__version__}, CUDA {torch.version.cuda}",
    )


def _driver_version() -> str:
    """The version of NVIDIA's driver, empty if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def check_collectives(device_type: str, n_ranks: int) -> Iterator[Finding]:
    """NCCL or gloo: start as many ranks as the run will have and let them add something up."""
    if n_ranks == 1:
        return
    what = "gloo"
    if device_type == "cuda":
        what = "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
    command += ["-m", "nanochat.doctor", device_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COLLECTIVE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        yield Finding(False, what, f"{n_ranks} ranks cannot reach each other in {COLLECTIVE_TIMEOUT_S} s")
        return
    if done.returncode == 0:
        yield Finding(True, what, done.stdout.strip())
    else:
        reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [
            "no reason given"
        ]
        yield Finding(False, what, f"{n_ranks} ranks cannot add up: {reasons[0].strip()}")


def model_sizes(config: GPTConfig) -> tuple[int, int]:
    """Bytes of a model's float32 weights and of its optimizer's state."""
    with torch.device("meta"):
        counts = GPT(config).num_parameters()
    by_adamw = counts["wte"] + counts["lm_head"]  # two means each, Muon's matrices have one
    return 4 * counts["total"], 4 * (counts["total"] + by_adamw)


def check_disk(config: GPTConfig, data: str) -> Iterator[Finding]:
    """The base directory: that it can be written, and has room for checkpoints and downloads."""
    try:
        folder = base_dir()
        with atomic_write(folder / "doctor", "w") as file:
            file.write("can be written")
        (folder / "doctor").unlink()
    except (ValueError, OSError) as error:
        yield Finding(False, "disk", str(error))
        return
    weights, state = model_sizes(config)
    checkpoints = N_CHECKPOINTS * (weights + state)
    download = SHARD_BYTES * missing_shards(config, data)
    free = shutil.disk_usage(folder).free
    wanted = f"{checkpoints / GIB:.1f} GiB for checkpoints and {download / GIB:.1f} for text"
    text = f"{free / GIB:.1f} GiB free in {folder}, {wanted}"
    if checkpoints + download > free:
        yield Finding(False, "disk", f"{text}; free some, set NANOCHAT_BASE_DIR or lower --depth")
    else:
        yield Finding(True, "disk", text)


def wanted_shards(config: GPTConfig) -> int:
    """Shards of the hub that a whole training of the base model reads."""
    tokens = TOKENS_A_PARAMETER * model_sizes(config)[0] / 4
    return min(N_TRAIN_SHARDS, -int(-tokens // SHARD_TOKENS))


def missing_shards(config: GPTConfig, data: str) -> int:
    """Shards that are still to be downloaded, the validation shard among them."""
    if source(data) != "hub":
        return 0
    there = [path.name for path in (base_dir() / "base_data").glob("*.parquet")]
    return max(0, wanted_shards(config) - len(there)) + (VAL_SHARD not in there)


def check_data(config: GPTConfig, data: str) -> Iterator[Finding]:
    """Text: that it is there and can be read, or can be had from the hub."""
    n_missing = missing_shards(config, data)
    if n_missing:
        yield from _check_hub(n_missing)
    else:
        try:
            n_shards = len(shard_paths(data, "train")) + len(shard_paths(data, "val"))
            yield Finding(True, "data", f"{source(data)}, {n_shards} shards")
        except (ValueError, OSError) as error:
            yield Finding(False, "data", str(error))


def _check_hub(n_missing: int) -> Iterator[Finding]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import httpx

    endpoint = os.environ.get("HF_ENDPOINT") or None
    url = hf_hub_url(REPO_ID, VAL_SHARD, repo_type="dataset", endpoint=endpoint)
    try:
        get_hf_file_metadata(url, timeout=10)
        yield Finding(True, "data", f"{n_missing} shards to be downloaded; the hub answers")
    except (httpx.HTTPError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Finding(
            False,
            "data",
            f"{n_missing} shards are missing and the hub does not answer ({reason}); set HF_ENDPOINT or a "
            "proxy, or choose --data=embedded or texts of your own",
        )


def check_memory(config: GPTConfig, device_type: str, batch_size: int, n_ranks: int) -> Iterator[Finding]:
    """Memory: on a GPU by a forward and backward of the real size, on a CPU by weights and state alone."""
    weights, state = model_sizes(config)
    if device_type != "cuda":
        needed = n_ranks * 2 * weights + state  # weights and gradients on each, the state shared out
        there = _available_bytes()
        text = f"{needed / GIB:.1f} GiB for weights, gradients and state; {there / GIB:.1f} available"
        yield Finding(needed < there, "memory", text)
        return
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    alone = Runtime(device=device, compute_dtype=torch.bfloat16)
    try:
        with device:
            model = GPT(config)
        model.init_weights()
        batch_size = choose_rows(batch_size, model, MAX_ROWS, alone, fused=None)
        build_optimizer(model, LearningRates(), replace(alone, world_size=n_ranks))
        accelerate(model, compile=True, fused=None)
        idx = torch.zeros((batch_size, config.sequence_len), dtype=torch.int64, device=device)
        model(idx, idx, loss_reduction="sum").backward()
        peak = torch.cuda.max_memory_allocated(device) + weights // 2  # gradients of the last backward
    except torch.cuda.OutOfMemoryError:
        peak = total
    except ValueError as error:  # not even one row fits
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
    except OSError:  # no Linux
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main() -> int:
    """Sum over all ranks and print the speed: the process that check_collectives starts for each rank.

    Raise ValueError unless the sum is right.
    """
    runtime = setup_runtime(sys.argv[1])
    value = torch.ones(N_FLOATS, device=runtime.device)
    runtime.sum_(value)
    if not (value == runtime.world_size).all():
        raise ValueError(f"the sum of ones over {runtime.world_size} ranks is {value.min()} to {value.max()}")
    runtime.gather(None)
    began = time.perf_counter()
    for _ in range(REPEATS):
        runtime.sum_(value.fill_(1))
    value[0].item()
    seconds = (time.perf_counter() - began) / REPEATS
    if runtime.is_main:
        n_bytes = 2 * (runtime.world_size - 1) / runtime.world_size * 4 * N_FLOATS  # that each rank sends
        sys.stdout.write(f"{runtime.world_size} ranks, all-reduce at {n_bytes / seconds / 1e9:.1f} GB/s\n")
    return 0


if __name__ == "__main__":
    run(main)
