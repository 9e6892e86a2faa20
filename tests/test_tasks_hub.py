"""Rows from files and from a hub on 127.0.0.1: order, errors, and broken or simultaneous downloads."""

import json
import lzma
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.hub import load_rows
from tests.helpers.hub_server import HubServer

REPO, SUBSET = "somebody/sums", "main"
COLUMNS = ("question", "answer")
SHARDS = [f"{SUBSET}/train-0000{i}-of-00002.parquet" for i in range(2)]
ROWS = [{"question": f"{i}+1", "answer": i + 1} for i in range(10)]
# the order that Dataset.from_list(ROWS).shuffle(seed=42) of the datasets library gave
SHUFFLED = [ROWS[i] for i in (5, 6, 0, 7, 3, 2, 4, 9, 1, 8)]


def load(path=None, split="train"):
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
def test_rows_have_the_order_of_the_datasets_library(tmp_path, name, write):
    """With another shuffle the first n conversations of a task would not be those of other projects."""
    rows = load(write(tmp_path / name, [{"id": "unused", **row} for row in ROWS]))
    assert len(rows) == 10
    assert list(rows) == SHUFFLED
    assert rows[3] == SHUFFLED[3]


def test_leaving_out_rows_keeps_the_order_of_the_others(tmp_path):
    rows = load(write_jsonl(tmp_path / "rows.jsonl", ROWS))
    is_kept = np.array([i not in (0, 9) for i in range(10)])
    assert list(rows.only(is_kept)) == [row for row in SHUFFLED if row not in (ROWS[0], ROWS[9])]


def test_a_folder_in_the_layout_of_the_repository(tmp_path):
    write_parquet(tmp_path / SHARDS[1], ROWS[4:])
    write_parquet(tmp_path / SHARDS[0], ROWS[:4])
    write_jsonl(tmp_path / SUBSET / "test.jsonl", ROWS[:1])
    write_jsonl(tmp_path / SUBSET / "train_of_another_kind.jsonl", ROWS)
    assert list(load(tmp_path)) == SHUFFLED
    assert list(load(tmp_path, "test")) == ROWS[:1]
    with pytest.raises(FileNotFoundError, match="main/dev-"):
        load(tmp_path, "dev")


def test_many_batches_and_later_types(tmp_path, monkeypatch):
    """The first batch of a column may contain only nulls, and a row may list its columns in any order."""
    monkeypatch.setattr("tasks.hub.ROWS_PER_BATCH", 2)
    rows = [{"answer": None, "question": "?"}] * 2 + [{"question": "2020-01-01", "answer": 3}] * 3
    loaded = list(load(write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert sorted(loaded, key=str) == sorted(rows, key=lambda row: str({c: row[c] for c in COLUMNS}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "1", "answer": 1}\n\n{"question": ', "rows.jsonl, line 3: not JSON"),
        (
            '{"question": "1", "answer": 1}\n{"question": "2"}\n',
            "line 2: needs an object with question, answer",
        ),
        ("[1]\n", "line 1: needs an object"),
        ('{"question": "1", "answer": 1}\n{"question": 2, "answer": 1}\n', "invalid or mixed values"),
        ('{"question": "\\ud800", "answer": 1}\n', "invalid or mixed values"),
        ("\n", "holds no rows"),
    ],
)
def test_errors_in_jsonl_name_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load(tmp_path / "missing.jsonl")
    (tmp_path / "rows.csv").write_text("question,answer\n")
    with pytest.raises(FileNotFoundError, match=r"rows\.csv"):
        load(tmp_path / "rows.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a readable parquet"):
        load(tmp_path / "broken.parquet")
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl is corrupt"):
        load(tmp_path / "latin.jsonl")
    whole = write_jsonl(tmp_path / "whole.jsonl.xz", ROWS).read_bytes()
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"cut\.jsonl\.xz is corrupt"):
        load(tmp_path / "cut.jsonl.xz")
    with pytest.raises(ValueError, match="lacks answer; its columns are question"):
        load(write_parquet(tmp_path / "half.parquet", [{"question": "1"}]))


# ---------------------------------------------------------------------------------------------------------
# Download


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import close_session

    shards = {SHARDS[0]: ROWS[:4], SHARDS[1]: ROWS[4:], f"{SUBSET}/test-00000-of-00001.parquet": ROWS[:1]}
    files = {name: write_parquet(tmp_path / name, rows).read_bytes() for name, rows in shards.items()}
    with HubServer(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        close_session()
        yield server
        close_session()


def disconnect(hub, monkeypatch):
    from huggingface_hub import close_session

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    close_session()


def test_download_once_then_offline(hub, monkeypatch):
    assert list(load()) == SHUFFLED
    assert hub.starts(f"{SUBSET}/test-00000-of-00001.parquet") == [], "another split was downloaded too"
    disconnect(hub, monkeypatch)
    assert list(load()) == SHUFFLED
    with pytest.raises(OSError, match=r"cannot download main/test-\*\.parquet of the data set somebody/sums"):
        load(split="test")


def test_ranks_that_start_together_download_once(hub):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: list(load()), range(4)))
    assert results == [SHUFFLED] * 4
    assert [hub.starts(name) for name in SHARDS] == [[0], [0]]


def test_an_incomplete_download_is_not_used(hub, monkeypatch):
    """Some of the files would silently be a smaller data set."""
    second = hub.files.pop(SHARDS[1])
    hub.listed_only[SHARDS[1]] = second
    with pytest.raises(OSError, match="404"):
        load()
    endpoint = hub.endpoint
    disconnect(hub, monkeypatch)
    with pytest.raises(OSError, match="cannot download"):
        load()
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    hub.files[SHARDS[1]] = second
    assert list(load()) == SHUFFLED
    assert hub.starts(SHARDS[0]) == [0], "a complete file was downloaded again"


@pytest.mark.parametrize("fault", ["503", "truncate", "corrupt"])
def test_a_broken_transfer_is_tried_again(hub, fault):
    hub.faults[SHARDS[0]] = [fault]
    assert list(load()) == SHUFFLED
    assert len(hub.starts(SHARDS[0])) == 2


def test_a_file_with_another_digest_is_not_read(hub):
    hub.faults[SHARDS[0]] = ["corrupt"] * 6
    with pytest.raises(OSError, match="SHA-256"):
        load()
    assert list(load()) == SHUFFLED


def test_a_split_that_does_not_exist(hub, base_dir):
    with pytest.raises(OSError, match="no such files"):
        load(split="dev")
    with pytest.raises(OSError, match="cannot download nowhere/train"):
        load_rows(REPO, "nowhere", "train", COLUMNS)
    assert not [path for path in (base_dir / "task_data").iterdir() if path.is_dir() and path.name[0] != "."]
