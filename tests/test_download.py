import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from nanochat.data import download
from nanochat.data.shards import write_parquet
from nanochat.dataset import REPO_ID, VAL_SHARD, main, shard_paths
from tests.helpers.hub_server import HubServer

SHARD = "shard_00000.parquet"
fetch = partial(download.download_shard, REPO_ID)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three training shards and the validation shard; clients of this process are sent there."""
    from huggingface_hub import close_session

    files = {}
    for name in (SHARD, "shard_00001.parquet", "shard_00002.parquet", VAL_SHARD):
        write_parquet(tmp_path / name, [f"{name} {os.urandom(50).hex()}" for _ in range(2000)])
        files[name] = (tmp_path / name).read_bytes()
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("NO_PROXY", "*")
        close_session()
        yield server
        close_session()


@pytest.fixture
def shards(base_dir):
    directory = base_dir / "base_data"
    directory.mkdir(parents=True)
    return directory


def test_command_downloads_the_first_n_and_the_validation_shard(hub, base_dir):
    assert main(["-n", "2", "-w", "3"]) == 0
    files = {path.name: path.read_bytes() for path in (base_dir / "base_data").iterdir()}
    assert files == {name: hub.files[name] for name in (SHARD, "shard_00001.parquet", VAL_SHARD)}
    assert [path.name for path in shard_paths("hub", "train")] == [SHARD, "shard_00001.parquet"]

    n_requests = len(hub.requests)
    assert main(["--num-shards=2"]) == 0
    assert len(hub.requests) == n_requests, "complete shards are fetched again"


@pytest.mark.parametrize("fault", ["truncate", "stall", "reset", "short"])
def test_a_cut_transfer_goes_on_where_it_was_cut(hub, shards, fault):
    hub.faults[SHARD] = [fault]
    progress = []
    timeout_s = 1.5 if fault == "stall" else 20
    fetch(SHARD, shards, lambda *told: progress.append(told), timeout_s=timeout_s, backoff_s=0)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    first, second = hub.starts(SHARD)
    assert first == 0
    assert second == len(hub.files[SHARD]) // 2
    assert progress[-1] == (SHARD, 1)


@pytest.mark.parametrize("fault", ["503", "corrupt"])
def test_a_refused_or_corrupt_transfer_starts_again(hub, shards, fault):
    """A flipped bit used to pass for ever: lengths were compared, hashes never."""
    hub.faults[SHARD] = [fault]
    progress = []
    fetch(SHARD, shards, lambda *told: progress.append(told), backoff_s=0)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.starts(SHARD) == [0, 0]
    assert progress[-1] == (SHARD, 1)


def test_a_server_without_ranges(hub, shards):
    hub.has_ranges = False
    hub.faults[SHARD] = ["truncate"]
    progress = []
    fetch(SHARD, shards, lambda *told: progress.append(told), backoff_s=0)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert progress[-1] == (SHARD, 1)
    assert len(hub.starts(SHARD)) == 2, "the bytes of both transfers were joined"


def test_giving_up_is_bounded_and_leaves_no_shard(hub, shards, monkeypatch):
    hub.faults[SHARD] = ["stall"] * 9
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    started = time.monotonic()
    with pytest.raises(OSError, match=SHARD):
        fetch(SHARD, shards, attempts=4, timeout_s=0.2)
    assert time.monotonic() - started < 25  # a stall lasts 30 s
    assert waits == [1, 2, 4]
    assert not (shards / SHARD).exists()
    hub.faults.clear()
    fetch(SHARD, shards)
    assert hub.starts(SHARD)[-1] > 0.9 * len(hub.files[SHARD]), "the bytes of failed attempts are lost"


def test_what_does_not_exist_is_not_asked_for_again(hub, shards):
    with pytest.raises(OSError, match=r"shard_00077.parquet: .*404"):
        fetch("shard_00077.parquet", shards)
    assert len(hub.requests) == 1


def test_a_full_disk_is_no_reason_to_try_again(shards, monkeypatch):
    calls = []

    def full_disk(*args):
        calls.append(args)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "_transfer", full_disk)
    with pytest.raises(OSError, match=f"{SHARD}.*No space"):
        fetch(SHARD, shards)
    assert len(calls) == 1


def test_two_processes_do_not_write_into_one_another(hub, shards):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(SHARD, shards), range(4)))
    assert hub.starts(SHARD) == [0]
    assert [path.name for path in shards.iterdir()] == [SHARD]


def test_a_server_that_is_no_hub(hub, shards):
    """A proxy's login page would pass for a shard."""
    hub.states_hash = False
    with pytest.raises(OSError, match="check HF_ENDPOINT"):
        fetch(SHARD, shards)


def test_a_token_goes_to_the_hub_and_to_no_other_host(hub, shards):
    fetch(SHARD, shards)
    assert {(host, has_token) for _, host, _, _, has_token in hub.requests} == {
        ("127.0.0.1", True),
        ("localhost", False),
    }


def test_a_killed_download_resumes(hub, shards):
    """Written in place, half a file was trusted for ever; with a new hidden name each time, all was lost."""
    hub.faults[VAL_SHARD] = ["stall"]
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half = len(hub.files[VAL_SHARD]) // 2
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in shards.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (shards / VAL_SHARD).exists()
    with pytest.raises(FileNotFoundError):
        shard_paths("hub", "val")

    assert main(["-n", "1"]) == 0
    first, second = hub.starts(VAL_SHARD)
    assert first == 0
    assert 0 < second <= half
    assert (shards / VAL_SHARD).read_bytes() == hub.files[VAL_SHARD]
    assert {path.name for path in shards.iterdir()} == {SHARD, VAL_SHARD}


def test_command_fails_with_a_line_for_each_shard_that_failed(hub, base_dir, caplog):
    """The old command exited 0 when shards had failed."""
    caplog.set_level(logging.INFO)
    assert main(["-n", "5"]) == 1
    lines = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert [line.split(":")[1].strip() for line in sorted(lines)] == [
        "shard_00003.parquet",
        "shard_00004.parquet",
    ]
    assert len(shard_paths("hub", "train")) == 3


def test_no_network_is_told_at_once(hub, base_dir, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=VAL_SHARD):
        main(["-n", "200"])
    assert [path.name for path in (base_dir / "base_data").iterdir()] == [f".{VAL_SHARD}.partial"]


@pytest.mark.parametrize("argv", [["-n", "0"], ["-n", "1823"], ["-n", "1", "-w", "0"]])
def test_command_refuses_numbers_out_of_range(argv):
    with pytest.raises(ValueError, match="must be"):
        main(argv)
