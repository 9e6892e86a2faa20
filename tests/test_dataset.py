import json
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import base_dir
from nanochat.data import own_text
from nanochat.data.shards import write_parquet
from nanochat.dataset import (
    CLIMBMIX,
    FINEWEB,
    HUB_TEXTS,
    hub_text,
    parquets_iter_batched,
    resolve,
    shard_paths,
    source,
)

VAL_SHARD = FINEWEB.val_shard
SHARD = "shard_00000.parquet"


def texts(paths):
    return [text for path in paths for text in pq.read_table(path)["text"].to_pylist()]


# ---------------------------------------------------------------------------------------------------------
# Sources and splits


def make_shards(directory, *names, n_documents=10):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_parquet(directory / name, [f"{name} {i}" for i in range(n_documents)], rows_per_group=4)


def test_the_validation_shard_of_the_hub_is_pinned(base_dir):
    """It was "the last file on disk", which changed with the number of shards and during a download."""
    make_shards(base_dir / "base_data", SHARD, "shard_00001.parquet")
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match=VAL_SHARD):
            shard_paths("hub", split)
    make_shards(base_dir / "base_data", VAL_SHARD)
    assert [path.name for path in shard_paths("hub", "val")] == [VAL_SHARD]
    make_shards(base_dir / "base_data", "shard_00002.parquet")
    assert [path.name for path in shard_paths("hub", "val")] == [VAL_SHARD]
    assert VAL_SHARD not in [path.name for path in shard_paths("hub", "train")]


def test_auto_uses_the_hub_only_after_a_download(base_dir, monkeypatch):
    monkeypatch.setattr(
        "nanochat.dataset.write_shards", lambda path: make_shards(path, SHARD, "shard_00001.parquet")
    )
    assert resolve("auto") == base_dir / "embedded_data"
    make_shards(base_dir / "base_data", VAL_SHARD)
    assert resolve("auto") == base_dir / "embedded_data"
    make_shards(base_dir / "base_data", SHARD)
    assert resolve("auto") == base_dir / "base_data"


def test_auto_looks_for_the_text_of_the_recipe(base_dir):
    """The other one, even if it has been downloaded, is not read in its place."""
    assert source("auto", FINEWEB) == source("auto", CLIMBMIX) == "embedded"
    make_shards(base_dir / "base_data", SHARD, VAL_SHARD)
    assert (source("auto", FINEWEB), source("auto", CLIMBMIX)) == ("hub:fineweb", "embedded")
    make_shards(base_dir / "base_data_climbmix", SHARD, "shard_06542.parquet")
    assert (source("auto", FINEWEB), source("auto", CLIMBMIX)) == ("hub:fineweb", "hub:climbmix")
    (base_dir / "base_data" / SHARD).unlink()
    assert (source("auto", FINEWEB), source("auto", CLIMBMIX)) == ("embedded", "hub:climbmix")


def test_names_of_texts():
    assert source("hub") == "hub:fineweb"
    assert source("hub", CLIMBMIX) == "hub:climbmix"
    for text in HUB_TEXTS:
        for other in HUB_TEXTS:
            assert source(text.data, other) == text.data
        assert hub_text(text.data) is text
    assert hub_text("hub") is FINEWEB
    for data in ("embedded", "auto", "climbmix", "/my/hub:text"):
        assert hub_text(data) is None
    for data in ("hub:", "hub:pile", "hub:Climbmix"):
        with pytest.raises(
            ValueError, match=f"data='{data}' is no data set of the hub; choose hub:fineweb or"
        ):
            shard_paths(data, "train")


def test_no_two_texts_share_a_folder(base_dir):
    assert {text.directory for text in HUB_TEXTS} == {
        base_dir / "base_data",
        base_dir / "base_data_climbmix",
    }
    assert [text.val_shard for text in HUB_TEXTS] == ["shard_01822.parquet", "shard_06542.parquet"]


@pytest.mark.parametrize("text", HUB_TEXTS, ids=lambda text: text.name)
def test_a_missing_download_is_reported_with_its_command(text, base_dir):
    command = f"run `python -m nanochat.dataset -n 8 --data={text.data}`"
    with pytest.raises(FileNotFoundError, match=f"{text.val_shard} is missing; {command}"):
        shard_paths(text.data, "train")
    make_shards(text.directory, text.val_shard)
    with pytest.raises(FileNotFoundError, match=f"needs two: .*{command}"):
        shard_paths(text.data, "train")


def test_shards_of_another_text_in_the_folder_are_refused(base_dir):
    """The last file of a folder is its validation set: ClimbMix's shards would hide FineWeb-EDU's."""
    make_shards(base_dir / "base_data", SHARD, VAL_SHARD, "shard_06542.parquet")
    for split in ("train", "val"):
        with pytest.raises(
            ValueError, match=r"shard_06542.* is no shard of hub:fineweb.*shard_01822.*move it"
        ):
            shard_paths("hub", split)


def test_one_shard_is_an_error_in_both_splits(base_dir):
    """With one shard the training split was empty and the loader looped without end."""
    make_shards(base_dir / "base_data", VAL_SHARD)
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match=r"holds 1 parquet shard.*needs two"):
            shard_paths("hub", split)


def test_broken_shards_are_named(tmp_path):
    make_shards(tmp_path, SHARD, "shard_00001.parquet")
    path, good = tmp_path / SHARD, (tmp_path / SHARD).read_bytes()

    def complaint():
        with pytest.raises(ValueError, match=SHARD) as caught:
            list(parquets_iter_batched("train", data=str(tmp_path)))
        return str(caught.value)

    path.write_bytes(good[: len(good) // 2])
    assert "not a readable parquet file" in complaint()
    path.write_bytes(b"")
    assert "not a readable parquet file" in complaint()
    path.write_bytes(good[:4] + bytes(30) + good[34:])  # the footer is whole, the data are not
    assert "corrupt" in complaint()
    write_parquet(path, [])
    assert "no documents" in complaint()
    pq.write_table(pa.table({"content": ["a"]}), path)
    assert "column 'text'" in complaint()
    pq.write_table(pa.table({"text": [1]}), path)
    assert "column 'text'" in complaint()


def test_iterate_by_row_group(tmp_path):
    make_shards(tmp_path, SHARD, "shard_00001.parquet", "shard_00002.parquet")
    everything = list(parquets_iter_batched("train", data=str(tmp_path)))
    assert [len(batch) for batch in everything] == [4, 4, 2, 4, 4, 2]
    assert list(chain(*everything)) == texts(shard_paths(str(tmp_path), "train"))
    assert list(parquets_iter_batched("train", 1, 4, data=str(tmp_path))) == [everything[1], everything[5]]
    assert len(list(parquets_iter_batched("val", data=str(tmp_path)))) == 3
    for start, step in [(0, 0), (2, 2), (-1, 2)]:
        with pytest.raises(ValueError, match="step"):
            next(parquets_iter_batched("train", start, step, data=str(tmp_path)))
    with pytest.raises(ValueError, match="'test'"):
        next(parquets_iter_batched("test", data=str(tmp_path)))


def test_nulls_are_empty_texts(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    assert list(parquets_iter_batched("train", data=str(tmp_path))) == [["a", ""]]


# ---------------------------------------------------------------------------------------------------------
# The user's own text


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def test_a_folder_of_parquet_files_is_used_in_place(tmp_path):
    make_shards(tmp_path, "b.parquet", "a.parquet", "c.parquet")
    assert shard_paths(str(tmp_path), "train") == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    assert shard_paths(str(tmp_path), "val") == [tmp_path / "c.parquet"]


@pytest.mark.parametrize("n_documents", [2, 19, 20, 100])
def test_one_jsonl_file_is_split_by_document(tmp_path, n_documents):
    documents = [f"document {i}" for i in range(n_documents)]
    write_jsonl(tmp_path / "mine.jsonl", documents)
    data = str(tmp_path / "mine.jsonl")
    train, val = texts(shard_paths(data, "train")), texts(shard_paths(data, "val"))
    assert sorted(train + val) == sorted(documents)
    assert len(val) == max(1, n_documents // 20)


def test_conversion_happens_once_and_again_when_the_files_change(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "mine.jsonl", ["a", "b"])
    first = resolve(str(tmp_path))
    assert first.parent == base_dir()
    with monkeypatch.context() as patch:
        patch.setattr(own_text, "write_parquet", None)
        assert resolve(str(tmp_path / "*.jsonl")) == first
    write_jsonl(tmp_path / "mine.jsonl", ["a", "b", "c"])
    second = resolve(str(tmp_path))
    assert second != first
    assert texts(sorted(second.iterdir())) == ["a", "c", "b"]


def test_a_failed_conversion_leaves_nothing(tmp_path, base_dir, monkeypatch):
    write_jsonl(tmp_path / "mine.jsonl", ["a", "b"])

    def full_disk(path, *args):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(own_text, "write_parquet", full_disk)
        with pytest.raises(OSError, match="No space"):
            resolve(str(tmp_path))
    assert list(base_dir.iterdir()) == []
    assert texts(shard_paths(str(tmp_path), "val")) == ["b"]


def test_txt_is_cut_between_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "Some words of it.\n" * 60 for i in range(40)]
    (tmp_path / "book.txt").write_text("\n".join(paragraphs))
    (tmp_path / "names.txt").write_text("".join(f"name {i}\n" for i in range(4000)))
    documents = texts(shard_paths(str(tmp_path), "train")) + texts(shard_paths(str(tmp_path), "val"))
    assert all(2000 <= len(text) <= 8020 for text in documents if text[-9:] != "name 3999")
    joined = "".join(sorted(documents, key=lambda text: (text[0] != "P", int(text.split()[1].strip(".")))))
    original = "".join(paragraphs) + "".join(f"name {i}\n" for i in range(4000))
    assert "".join(joined.split()) == "".join(original.split())
    assert sum(text.startswith("Paragraph") for text in documents) == 20


def test_all_kinds_in_one_folder(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["from parquet", " "])
    write_jsonl(tmp_path / "b.jsonl", ["from jsonl", "", "more"])
    (tmp_path / "c.txt").write_text("from txt\n")
    (tmp_path / "d.csv").write_text("not read")
    both = texts(shard_paths(str(tmp_path), "train") + shard_paths(str(tmp_path), "val"))
    assert sorted(both) == ["from jsonl", "from parquet", "from txt", "more"]


def test_blank_lines_and_byte_order_marks_are_ignored(tmp_path):
    """A blank line was an error; a byte order mark was an error or part of the first text."""
    (tmp_path / "a [1].jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n\n')
    assert texts(shard_paths(str(tmp_path / "a [1].jsonl"), "val")) == ["two"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    train, val = (texts(shard_paths(str(tmp_path), split)) for split in ("train", "val"))
    assert (train, val) == (["one", "three"], ["two"])


def test_a_glob_of_any_depth(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}" / "deep").mkdir(parents=True)
        (tmp_path / f"{i}" / "deep" / "a.txt").write_text(f"text {i}")
        (tmp_path / f"{i}" / "deep" / "a.md").write_text("not this")
    data = str(tmp_path / "**" / "*.txt")
    assert texts(shard_paths(data, "train") + shard_paths(data, "val")) == ["text 0", "text 2", "text 1"]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"text": "a"', "line 2"),
        ('{"content": "a"}', "line 2"),
        ('{"text": 3}', "line 2"),
        ('["text"]', "line 2"),
        ('{"text": "\\ud800"}', "line 2"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_jsonl_is_named(tmp_path, line, rule):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"mine\.jsonl.*{rule}"):
        resolve(str(tmp_path))


def test_paths_without_text_are_named(tmp_path):
    (tmp_path / "d.csv").write_text("a,b")
    for data in (str(tmp_path), str(tmp_path / "d.csv"), str(tmp_path / "*.txt"), "hubb"):
        with pytest.raises(FileNotFoundError, match="none of auto, hub and embedded"):
            resolve(data)
    (tmp_path / "one.txt").write_text("a single document")
    with pytest.raises(ValueError, match="fewer than two documents"):
        resolve(str(tmp_path))
