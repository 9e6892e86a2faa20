"""Downloads from a hub and a web server on 127.0.0.1 that break, change files or send wrong bytes."""

import io
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from nanochat import dataset
from nanochat.data import download as module
from nanochat.data.download import download
from nanochat.data.partial_file import PartialFile, open_partial
from nanochat.data.shards import write_parquet
from nanochat.dataset import CLIMBMIX, FINEWEB, main, shard_paths
from tests.helpers.hub_server import HubServer, kill_at

SHARD = "shard_00000.parquet"
VAL_SHARD = FINEWEB.val_shard
SMALL = "about.json"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with three training shards, the validation shard and a small file; HF_ENDPOINT points to it."""
    from huggingface_hub import close_session

    files = {SMALL: b'{"documents": 4000}\n'}
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


def fetch(name, directory, **settings):
    url = module.hub_url(FINEWEB.repo, name, repo_type="dataset")
    download(url, directory / name, is_hub=True, **settings)


def visible(directory):
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------------------
# Breaks


@pytest.mark.parametrize("fault", ["truncate", "truncate 90", "truncate 0", "stall", "reset", "short"])
def test_a_broken_transfer_resumes_where_it_broke(hub, shards, fault):
    hub.faults[SHARD] = [fault]
    progress = []
    timeout_s = 1.5 if "stall" in fault else 20
    fetch(SHARD, shards, on_progress=lambda *state: progress.append(state), timeout_s=timeout_s, backoff_s=0)
    size = len(hub.files[SHARD])
    cut = size * int((fault.split()[1:] or ["50"])[0]) // 100
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.ranges(SHARD) == [(0, cut), (cut, size)]
    assert progress[-1] == (size, size)


@pytest.mark.parametrize("fault", ["503", "corrupt"])
def test_a_refused_or_corrupt_transfer_starts_again(hub, shards, fault):
    """A flipped bit was never noticed: lengths were compared, digests were not."""
    hub.faults[SHARD] = [fault]
    progress = []
    fetch(SHARD, shards, on_progress=lambda *state: progress.append(state), backoff_s=0)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert hub.starts(SHARD) == [0, 0]
    assert progress[-1] == (len(hub.files[SHARD]),) * 2


def test_a_server_without_ranges(hub, shards):
    hub.has_ranges = False
    hub.faults[SHARD] = ["truncate"]
    progress = []
    fetch(SHARD, shards, on_progress=lambda *state: progress.append(state), backoff_s=0)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert progress[-1] == (len(hub.files[SHARD]),) * 2
    assert len(hub.starts(SHARD)) == 2, "the bytes of both transfers were joined"


def test_giving_up_is_bounded_and_leaves_no_shard(hub, shards, monkeypatch):
    hub.faults[SHARD] = ["stall"] * 9
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    started = time.monotonic()
    with pytest.raises(OSError, match=SHARD):
        fetch(SHARD, shards, attempts=4, timeout_s=1)
    assert time.monotonic() - started < 25  # a stall lasts 30 s
    assert waits == [1, 2, 4]
    assert not (shards / SHARD).exists()
    hub.faults.clear()
    fetch(SHARD, shards)
    assert hub.starts(SHARD)[-1] > 0.9 * len(hub.files[SHARD]), "the bytes of failed attempts are lost"


def test_a_missing_file_is_requested_once(hub, shards):
    with pytest.raises(OSError, match=r"shard_00077.parquet: .*404"):
        fetch("shard_00077.parquet", shards)
    assert len(hub.requests) == 1


def test_a_full_disk_is_no_reason_to_try_again(hub, shards, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PartialFile, "append", full_disk)
    with pytest.raises(OSError, match=f"{SHARD}.*No space"):
        fetch(SHARD, shards)
    assert len(hub.starts(SHARD)) == 1


@pytest.mark.parametrize("url", ["ftp://localhost/a.zip", "http://localhost:x/a.zip", "/tmp/a.zip"])
def test_an_address_that_is_none_is_an_error_at_once(tmp_path, monkeypatch, url):
    monkeypatch.setattr(module.time, "sleep", None)
    with pytest.raises(OSError, match=r"^a\.zip: "):
        download(url, tmp_path / "a.zip")


# ---------------------------------------------------------------------------------------------------------
# Versions


def test_small_files_have_the_digest_of_git(hub, shards, caplog):
    hub.faults[SMALL] = ["truncate", "corrupt"]
    fetch(SMALL, shards, backoff_s=0)
    assert (shards / SMALL).read_bytes() == hub.files[SMALL]
    assert "git SHA-1" in caplog.text
    size = len(hub.files[SMALL])
    assert hub.ranges(SMALL) == [(0, size // 2), (size // 2, size), (0, size)]
    assert visible(shards) == [SMALL]


def test_bytes_of_two_versions_are_never_joined(hub, shards):
    hub.faults[SHARD] = ["truncate"]
    with pytest.raises(OSError, match=SHARD):
        fetch(SHARD, shards, attempts=1)
    hub.files[SHARD] = hub.files["shard_00001.parquet"]
    fetch(SHARD, shards, attempts=1)
    assert (shards / SHARD).read_bytes() == hub.files["shard_00001.parquet"]
    assert hub.starts(SHARD) == [0, 0]
    assert visible(shards) == [SHARD]


def test_a_file_is_kept_only_if_it_has_the_digest(hub, shards):
    fetch(SHARD, shards)
    fetch(SHARD, shards)
    assert hub.starts(SHARD) == [0]
    (shards / SHARD).write_bytes(b"x" * len(hub.files[SHARD]))
    fetch(SHARD, shards)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert visible(shards) == [SHARD]


@pytest.mark.parametrize("note", [None, "", '{"tag": "x"', "[]", '{"tag": "' + "0" * 64 + '", "size": 9}'])
def test_a_partial_file_of_an_unknown_version_is_not_used(hub, shards, note):
    (shards / f".{SHARD}.partial").write_bytes(b"123")
    if note is not None:
        (shards / f".{SHARD}.partial.json").write_text(note)
    fetch(SHARD, shards, attempts=1)
    assert (shards / SHARD).read_bytes() == hub.files[SHARD]
    assert visible(shards) == [SHARD]


def test_a_server_that_is_no_hub(hub, shards):
    """The login page of a proxy was taken for a shard."""
    hub.states_hash = False
    for name in (SHARD, SMALL):
        with pytest.raises(OSError, match="check HF_ENDPOINT"):
            fetch(name, shards)


def test_the_token_is_sent_to_the_hub_and_to_no_other_host(hub, shards):
    fetch(SHARD, shards)
    download(hub.address(SMALL), shards / SMALL)
    assert {(host, has_token) for _, host, _, has_token in hub.requests} == {
        ("127.0.0.1", True),
        ("localhost", False),
    }


# ---------------------------------------------------------------------------------------------------------
# Other servers


def interrupted(hub, path, url=None):
    """Let the first half of a shard arrive from the ordinary web server."""
    hub.faults[SHARD] = ["truncate"]
    with pytest.raises(OSError, match=path.name):
        download(url or hub.address(SHARD), path, attempts=1)
    return len(hub.files[SHARD]) // 2


def test_any_address_resumes(hub, shards):
    path, size = shards / "any.zip", len(hub.files[SHARD])
    half = interrupted(hub, path)
    download(hub.address(SHARD), path, attempts=1)
    assert path.read_bytes() == hub.files[SHARD]
    assert hub.ranges(SHARD) == [(0, half), (half, size)]
    assert visible(shards) == ["any.zip"]


def test_redirects_are_followed(hub, shards):
    url, path = module.hub_url(FINEWEB.repo, SHARD, repo_type="dataset"), shards / "any.zip"
    half = interrupted(hub, path, url)
    download(url, path, attempts=1)
    assert path.read_bytes() == hub.files[SHARD]
    assert hub.starts(SHARD) == [0, half]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_has_changed_is_sent_whole(hub, shards, heeds_if_range):
    hub.heeds_if_range = heeds_if_range
    path = shards / "any.zip"
    interrupted(hub, path)
    hub.files[SHARD] = hub.files[VAL_SHARD]
    download(hub.address(SHARD), path, attempts=1 if heeds_if_range else 2, backoff_s=0)
    assert path.read_bytes() == hub.files[VAL_SHARD]


@pytest.mark.parametrize("etag", ["", 'W/"1"'])
def test_without_an_etag_nothing_is_resumed(hub, shards, etag):
    hub.etags[SHARD] = etag
    path = shards / "any.zip"
    interrupted(hub, path)
    hub.files[SHARD] = hub.files[VAL_SHARD]
    download(hub.address(SHARD), path, attempts=1)
    assert path.read_bytes() == hub.files[VAL_SHARD]
    assert hub.starts(SHARD) == [0, 0]


def test_the_same_etag_of_another_address_is_another_file(hub, shards):
    hub.etags = dict.fromkeys((SHARD, VAL_SHARD), '"1"')
    path = shards / "any.zip"
    interrupted(hub, path)
    download(hub.address(VAL_SHARD), path, attempts=1)
    assert path.read_bytes() == hub.files[VAL_SHARD]


def test_a_partial_file_that_is_complete_only_gets_its_name(hub, shards):
    interrupted(hub, shards / "any.zip")
    (shards / ".any.zip.partial").write_bytes(hub.files[SHARD])
    n_requests = len(hub.requests)
    download(hub.address(SHARD), shards / "any.zip")
    assert (shards / "any.zip").read_bytes() == hub.files[SHARD]
    assert len(hub.requests) == n_requests


def test_too_many_bytes_are_dropped(hub, shards):
    interrupted(hub, shards / "any.zip")
    (shards / ".any.zip.partial").write_bytes(hub.files[SHARD] + b"x")
    download(hub.address(SHARD), shards / "any.zip", attempts=2, backoff_s=0)
    assert (shards / "any.zip").read_bytes() == hub.files[SHARD]


# ---------------------------------------------------------------------------------------------------------
# Several processes, and bars


def test_two_processes_do_not_write_to_the_same_file(hub, shards):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(SHARD, shards), range(4)))
    assert hub.starts(SHARD) == [0]
    assert visible(shards) == [SHARD]


def test_a_waiting_process_does_not_write_to_the_published_file(tmp_path):
    """The lock belongs to the file, which the process that held it has renamed."""
    path, moved = tmp_path / "a", tmp_path / "b"

    def write(content):
        with open_partial(path) as arrived:
            arrived.restart()
            arrived.append(content)
            arrived.publish(path)

    with ThreadPoolExecutor(1) as pool:
        with open_partial(path) as arrived:
            later = pool.submit(write, b"second")
            time.sleep(0.1)  # it waits for the lock
            arrived.append(b"first")
            arrived.publish(path)
            path.rename(moved)
        later.result()
    assert (path.read_bytes(), moved.read_bytes()) == (b"second", b"first")


def test_a_bar_with_a_total_on_a_terminal(hub, shards, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    fetch(SHARD, shards)
    size = f"{len(hub.files[SHARD]) / 1000:.0f}k"
    assert f"{SHARD}: 100%" in sys.stderr.getvalue()
    assert f"{size}/{size}" in sys.stderr.getvalue()


# ---------------------------------------------------------------------------------------------------------
# The command


def test_command_downloads_the_first_n_and_the_validation_shard(hub, base_dir):
    assert main(["-n", "2", "-w", "3"]) == 0
    files = {path.name: path.read_bytes() for path in (base_dir / "base_data").iterdir()}
    assert files == {name: hub.files[name] for name in (SHARD, "shard_00001.parquet", VAL_SHARD)}
    assert [path.name for path in shard_paths("hub", "train")] == [SHARD, "shard_00001.parquet"]

    n_requests = len(hub.requests)
    assert main(["--num-shards=2"]) == 0
    assert len(hub.requests) == n_requests, "complete shards are fetched again"


def test_a_killed_download_resumes(hub, shards):
    """Written in place, half a file was trusted; with a new hidden name each time, all bytes were lost."""
    hub.faults[VAL_SHARD] = ["stall"]
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half = len(hub.files[VAL_SHARD]) // 2
    kill_at(process, shards / f".{VAL_SHARD}.partial", half)
    assert not (shards / VAL_SHARD).exists()
    with pytest.raises(FileNotFoundError):
        shard_paths("hub", "val")

    assert main(["-n", "1"]) == 0
    assert hub.ranges(VAL_SHARD) == [(0, half), (half, len(hub.files[VAL_SHARD]))], "a byte was sent twice"
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


def test_a_missing_network_is_reported_for_the_first_shard(hub, base_dir, monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=VAL_SHARD):
        main(["-n", "200"])
    assert [path.name for path in (base_dir / "base_data").iterdir()] == [f".{VAL_SHARD}.partial"]


@pytest.fixture
def climbmix(hub, tmp_path):
    """The files of the other data set, on the same hub."""
    files = {}
    for name in (SHARD, "shard_00001.parquet", CLIMBMIX.val_shard):
        write_parquet(tmp_path / name, [f"climbmix {name} {os.urandom(50).hex()}" for _ in range(2000)])
        files[name] = (tmp_path / name).read_bytes()
    hub.files.update({f"{CLIMBMIX.repo}/{name}": content for name, content in files.items()})
    return files


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_two_data_sets_do_not_mix(hub, climbmix, base_dir):
    """Their shards have the same names, and a file that is there is not fetched again."""
    assert main(["-n", "2"]) == 0
    fineweb = content(base_dir / "base_data")
    assert main(["-n", "2", "--data=hub:climbmix"]) == 0
    assert content(base_dir / "base_data_climbmix") == climbmix
    assert content(base_dir / "base_data") == fineweb
    assert fineweb[SHARD] == hub.files[SHARD] != climbmix[SHARD]
    for data, val_shard in (("hub:fineweb", VAL_SHARD), ("hub:climbmix", CLIMBMIX.val_shard)):
        assert [path.name for path in shard_paths(data, "train")] == [SHARD, "shard_00001.parquet"]
        assert [path.name for path in shard_paths(data, "val")] == [val_shard]
    assert shard_paths("hub", "train") == shard_paths("hub:fineweb", "train")


@pytest.mark.parametrize("flags", [["-n", "-1"], ["--num_files=-1"]])
def test_minus_one_downloads_all(hub, base_dir, monkeypatch, flags):
    monkeypatch.setattr(dataset, "HUB_TEXTS", (replace(FINEWEB, n_train_shards=3),))
    names = [f"shard_0000{i}.parquet" for i in range(4)]
    hub.files[names[3]] = hub.files[VAL_SHARD]  # the last one is for validation
    assert main(flags) == 0
    assert visible(base_dir / "base_data") == names


def test_a_broken_download_resumes_in_its_data_set(hub, climbmix, base_dir):
    name = f"{CLIMBMIX.repo}/{SHARD}"
    half = len(hub.files[name]) // 2
    hub.faults[name] = ["truncate", *6 * ["503"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.time, "sleep", lambda seconds: None)
        assert main(["-n", "1", "--data=hub:climbmix"]) == 1
    assert main(["-n", "1"]) == 0
    assert hub.starts(SHARD) == [0]
    hub.faults.clear()
    assert main(["-n", "1", "--data=hub:climbmix"]) == 0
    assert hub.ranges(name)[-1] == (half, len(hub.files[name]))
    assert content(base_dir / "base_data_climbmix")[SHARD] == climbmix[SHARD]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "0"], "num_shards=0 must be from 1 to 1822, the training shards of hub:fineweb"),
        (["-n", "1823"], "num_shards=1823 must be from 1 to 1822"),
        (
            ["-n", "6543", "--data=hub:climbmix"],
            "must be from 1 to 6542, the training shards of hub:climbmix",
        ),
        (["-n", "1", "-w", "0"], "num_workers=0 must be"),
        (["-n", "1", "--data=hub:pile"], "data='hub:pile' is no data set of the hub; choose hub:fineweb or"),
        (["-n", "1", "--data=embedded"], "data='embedded' is no data set of the hub"),
        (["-n", "1", "--data=auto"], "data='auto' is no data set of the hub"),
    ],
)
def test_command_refuses_what_is_not_there(argv, message):
    with pytest.raises(ValueError, match=message):
        main(argv)
