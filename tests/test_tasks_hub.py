"""Rows from files and from a hub on 127.0.0.1: order, errors, and broken or simultaneous downloads."""

import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.hub import load_rows
from tests.helpers.hub_server import HubServer

ROOT = Path(__file__).parent.parent
REPO, SUBSET = "somebody/sums", "main"
COLUMNS = ("question", "answer")
SHARDS = [f"{SUBSET}/train-0000{i}-of-00002.parquet" for i in range(2)]
ROWS = [{"question": f"{i}+1", "answer": i + 1} for i in range(10)]
# the order of Dataset.from_list(ROWS).shuffle(seed=42), written down: a new version of the library keeps it
SHUFFLED = [ROWS[i] for i in (5, 6, 0, 7, 3, 2, 4, 9, 1, 8)]


def load(path, split="train"):
    return load_rows(REPO, SUBSET, split, COLUMNS, path)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (lzma.open if path.suffix == ".xz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


# ---------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.jsonl", write_jsonl), ("rows.jsonl.xz", write_jsonl), ("rows.parquet", write_parquet)],
)
def test_rows_keep_the_order_of_earlier_versions(tmp_path, name, write):
    """With another shuffle the first n conversations of a task would not be those of other projects."""
    rows = load(write(tmp_path / name, [{"id": "unused", **row} for row in ROWS]))
    assert len(rows) == 10
    assert list(rows) == SHUFFLED
    assert rows[3] == SHUFFLED[3]


def test_a_folder_in_the_layout_of_the_repository(tmp_path):
    write_parquet(tmp_path / SHARDS[1], ROWS[4:])
    write_parquet(tmp_path / SHARDS[0], ROWS[:4])
    write_jsonl(tmp_path / SUBSET / "test.jsonl", ROWS[:1])
    write_jsonl(tmp_path / SUBSET / "train_of_another_kind.jsonl", ROWS)
    assert list(load(tmp_path)) == SHUFFLED
    assert list(load(tmp_path, "test")) == ROWS[:1]
    with pytest.raises(FileNotFoundError, match="main/dev-"):
        load(tmp_path, "dev")
    write_jsonl(tmp_path / SUBSET / "train-more.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"main/train as \.parquet and \.jsonl; keep one"):
        load(tmp_path)


def test_a_changed_file_is_read_again(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS[:1])
    assert list(load(path)) == ROWS[:1]
    write_jsonl(path, ROWS[:2])
    assert len(load(path)) == 2


@pytest.mark.parametrize(
    "content",
    [
        b'{"question": "1", "answer": 1}\n\n{"question": ',
        b'{"question": "\\ud800", "answer": 1}\n',
        b"\n",
    ],
)
def test_a_broken_file_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read, or holds no rows"):
        load(path)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load(tmp_path / "missing.jsonl")
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(FileNotFoundError, match=r"rows\.csv"):
        load(tmp_path / "rows.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken\.parquet cannot be read"):
        load(tmp_path / "broken.parquet")
    whole = write_jsonl(tmp_path / "whole.jsonl.xz", ROWS).read_bytes()
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.xz cannot be read"):
        load(tmp_path / "cut.jsonl.xz")
    with pytest.raises(ValueError, match="lacks answer; its columns are question"):
        load(write_parquet(tmp_path / "half.parquet", [{"question": "1"}]))


# ---------------------------------------------------------------------------------------------------------
# Download, in processes of their own: the library reads HF_ENDPOINT and HF_HOME when it is imported

CARD = f"""---
configs:
- config_name: {SUBSET}
  data_files:
  - split: train
    path: {SUBSET}/train-*
  - split: test
    path: {SUBSET}/test-*
---
"""
PROGRAM = f"""
import json, sys
from tasks.hub import load_rows
try:
    print(json.dumps(list(load_rows({REPO!r}, sys.argv[1], sys.argv[2], {COLUMNS}))))
except OSError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hub(tmp_path):
    shards = {SHARDS[0]: ROWS[:4], SHARDS[1]: ROWS[4:], f"{SUBSET}/test-00000-of-00001.parquet": ROWS[:1]}
    files = {name: write_parquet(tmp_path / name, rows).read_bytes() for name, rows in shards.items()}
    with HubServer({**files, "README.md": CARD.encode()}) as server:
        yield server


@pytest.fixture
def start(hub, tmp_path):
    """Start a process that loads a split; environment variables as keywords."""

    def start(split="train", subset=SUBSET, **environment):
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, subset, split],
            cwd=ROOT,
            env={**os.environ, **settings, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def rows_of(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def error_of(process):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    return errors


@pytest.mark.slow
def test_download_once_then_offline(hub, start):
    assert rows_of(start()) == SHUFFLED
    assert rows_of(start("test", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")) == ROWS[:1]
    assert [hub.starts(name) for name in SHARDS] == [[0], [0]]
    assert "cannot load the data set somebody/sums main dev" in error_of(start("dev"))
    assert "cannot load the data set somebody/sums nowhere train" in error_of(start(subset="nowhere"))


@pytest.mark.slow
def test_ranks_that_start_together_download_once(hub, start):
    assert [rows_of(process) for process in [start() for _ in range(2)]] == [SHUFFLED] * 2
    assert [hub.starts(name) for name in SHARDS] == [[0], [0]]


@pytest.mark.slow
def test_an_incomplete_download_is_not_used(hub, start):
    """Some of the files would silently be a smaller data set."""
    second = hub.files.pop(SHARDS[1])
    hub.listed_only[SHARDS[1]] = second
    assert "cannot load the data set" in error_of(start())
    assert "cannot load the data set" in error_of(start(HF_HUB_OFFLINE="1"))
    hub.files[SHARDS[1]] = second
    assert rows_of(start()) == SHUFFLED
    assert hub.starts(SHARDS[0]) == [0], "a complete file was downloaded again"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "truncate", "reset"])
def test_a_broken_transfer_is_tried_again(hub, start, fault):
    hub.faults[SHARDS[0]] = [fault]
    assert rows_of(start()) == SHUFFLED
    assert len(hub.starts(SHARDS[0])) == 2
