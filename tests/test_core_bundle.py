import hashlib
import io
import json
import logging
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from nanochat import core_bundle
from nanochat.common import Runtime
from nanochat.core_bundle import ORIGIN, Example, _unpack, download_bundle, find_bundle, load_bundle
from tests.helpers.core_bundles import write_bundle
from tests.helpers.hub_server import HubServer, kill_at

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


# ---------------------------------------------------------------------------------------------------------
# Reading


def test_three_kinds_of_task_become_one_kind_of_example(folder, caplog):
    lines = {
        "reading/pick": {"query": "Q: one?\n", "choices": ["a ", "b"], "gold": 1},
        "language/who": {"context_options": [" x", "y"], "continuation": " ran.", "gold": 0},
        "world/recall": {"context": "2 + 2 = ", "continuation": "4", "category": "sums"},
    }
    for name, row in lines.items():
        (folder / "eval_data" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    bundle = load_bundle(folder)
    assert [task.examples for task in bundle.tasks] == [
        (Example((("Q: one?\n", "a "), ("Q: one?\n", "b")), 1),),
        (Example(((" x", " ran."), ("y", " ran.")), 0),),
        (Example((("2 + 2 = ", "4"),), 0, "sums"),),
    ]
    pick, who, recall = bundle.tasks
    assert (pick.label, pick.icl_task_type, pick.num_fewshot) == ("pick", "multiple_choice", 2)
    assert (pick.continuation_delimiter, who.continuation_delimiter) == ("\nAnswer: ", " ")
    assert [task.random_baseline for task in bundle.tasks] == [25, 50, 0]
    assert (pick.has_categories, recall.has_categories) == (False, True)


def test_a_task_without_rows_is_named(folder, caplog):
    assert load_bundle(folder).missing_tasks == ["lost"]
    assert "lost; CORE goes without" in caplog.text


def test_a_bundle_without_rows_is_an_error(folder):
    shutil.rmtree(folder / "eval_data")
    with pytest.raises(FileNotFoundError, match="none of the tasks"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_fewshot: [2]", "num_fewshot: [2]\n  prompt_string: hello", "prompt_string"),
        ("num_fewshot: [2]", "num_fewshot: [2, 5]", "too many values"),
        ("schema", "essay", "unknown icl_task_type 'essay'"),
        ("label: who", "label: pick", "two tasks have the same label"),
        ("label: who", "label: nobody", "no random baseline of task 'nobody'"),
        ("icl_tasks", "tasks", "icl_tasks"),
        ("label: pick", "label: [", "not a list of CORE tasks"),
        ("label: pick", "label: 7", "label=7 of task 7 must be a text"),
        (
            "num_fewshot: [2]",
            "num_fewshot: ['2']",
            r"num_fewshot=\['2'\] of task 'pick' must be a whole",
        ),
        ("num_fewshot: [2]", "num_fewshot: [2.0]", r"num_fewshot=\[2.0\] of task 'pick' must be a whole"),
        ("num_fewshot: [2]", "num_fewshot: [true]", r"num_fewshot=\[True\] of task 'pick' must be a whole"),
        ("num_fewshot: [2]", "num_fewshot: [-1]", r"num_fewshot=\[-1\] of task 'pick' must be a whole"),
        ("num_fewshot: [2]", "num_fewshot: 2", "not a list of CORE tasks"),
        ("has_categories: true", "has_categories: 'yes'", "has_categories='yes' of 'recall' must be true or"),
        ("reading/pick.jsonl", "../../rows.jsonl", "'../../rows.jsonl' of task 'pick' must be a path within"),
        ("reading/pick.jsonl", "/etc/passwd", "'/etc/passwd' of task 'pick' must be a path within eval_data"),
        ("reading/pick.jsonl", "c:\\rows.jsonl", "of task 'pick' must be a path within eval_data"),
        ("reading/pick.jsonl", "5", "dataset_uri=5 of task 'pick' must be a text"),
    ],
)
def test_errors_in_the_yaml(folder, old, new, message):
    path = folder / "core.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("baseline", ["100", "-1", "chance", ""])
def test_a_bad_baseline_is_named(folder, baseline):
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\npick,{baseline}\n")
    with pytest.raises(ValueError, match=r"eval_meta_data\.csv"):
        load_bundle(folder)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"query": "q", "choices": ["a", "b"]}',
        '{"query": "q", "choices": ["a", "b"], "gold": 2}',
        '{"query": "q", "choices": ["a", "b"], "gold": "1"}',
        '{"query": "q", "choices": ["a", " "], "gold": 0}',
        '{"query": null, "choices": ["a", "b"], "gold": 0}',
    ],
)
def test_a_bad_row_is_named(folder, line):
    path = folder / "eval_data" / "reading" / "pick.jsonl"
    path.write_text('{"query": "q", "choices": ["a", "b"], "gold": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"pick\.jsonl, line 2"):
        load_bundle(folder)


# ---------------------------------------------------------------------------------------------------------
# Location and download


def zipped(folder, prefix=""):
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, prefix + str(path.relative_to(folder)))
    return box.getvalue()


@pytest.fixture
def server(folder, monkeypatch):
    from huggingface_hub import close_session

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    close_session()
    with HubServer({"bundle.zip": zipped(folder), "nested.zip": zipped(folder, "eval_bundle/")}) as server:
        server.url = server.address("bundle.zip")
        yield server
    close_session()


def content(folder):
    paths = [path for path in folder.rglob("*.*") if path.name != ORIGIN]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def files_of(base_dir):
    return [path.name for path in base_dir.iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["bundle.zip", "nested.zip"])
def test_download_once(server, folder, base_dir, name):
    url = server.url.replace("bundle.zip", name)
    sha256 = hashlib.sha256(server.files[name]).hexdigest().upper()
    found = find_bundle(Runtime.cpu(), "", url, sha256)
    assert found == base_dir / "eval_bundle"
    assert content(found) == content(folder)
    assert files_of(base_dir) == ["eval_bundle"]  # no archive, no temporary folder
    assert find_bundle(Runtime.cpu(), "", url, sha256) == found
    assert len(server.starts(name)) == 1


def test_a_folder_that_is_named_takes_precedence(folder, base_dir):
    write_bundle(base_dir / "eval_bundle")
    assert find_bundle(Runtime.cpu(), str(folder)) == folder
    assert find_bundle(Runtime.cpu()) == base_dir / "eval_bundle"


def test_the_published_bundle_is_the_default(server, base_dir, monkeypatch):
    """Without a bundle and an address there was no CORE."""
    assert core_bundle.EVAL_BUNDLE_URL.startswith("https://karpathy-public.s3.us-west-2.amazonaws.com/")
    monkeypatch.setattr(core_bundle, "EVAL_BUNDLE_URL", server.url)
    assert find_bundle(Runtime.cpu()) == base_dir / "eval_bundle"
    assert json.loads((base_dir / "eval_bundle" / ORIGIN).read_text())["url"] == server.url
    assert find_bundle(Runtime.cpu()) == base_dir / "eval_bundle"
    assert len(server.starts("bundle.zip")) == 1


def test_a_folder_without_a_bundle():
    with pytest.raises(FileNotFoundError, match=r"it has no core\.yaml"):
        load_bundle(find_bundle(Runtime.cpu(), "/nowhere"))


@pytest.mark.parametrize("fault", ["short", "corrupt"])
def test_a_bad_zip_leaves_nothing(server, base_dir, fault):
    base_dir.mkdir()
    server.faults["bundle.zip"] = [fault]
    with pytest.raises(ValueError, match=server.url):
        download_bundle(server.url, "", base_dir / "eval_bundle")
    assert list(base_dir.iterdir()) == []
    download_bundle(server.url, "", base_dir / "eval_bundle")
    assert load_bundle(base_dir / "eval_bundle").tasks
    assert files_of(base_dir) == ["eval_bundle"]


@pytest.mark.parametrize("fault", ["truncate", "503"])
def test_a_failed_transfer_leaves_no_bundle(server, base_dir, fault):
    base_dir.mkdir()
    server.faults["bundle.zip"] = [fault] * 6
    with pytest.raises(OSError, match=f"cannot download {server.url}: "):
        download_bundle(server.url, "", base_dir / "eval_bundle")
    assert files_of(base_dir) == [".eval_bundle.download"]
    download_bundle(server.url, "", base_dir / "eval_bundle")
    assert load_bundle(base_dir / "eval_bundle").tasks
    assert files_of(base_dir) == ["eval_bundle"]


def test_no_such_zip(server, base_dir):
    with pytest.raises(OSError, match=f"cannot download {server.url}x: .*404"):
        find_bundle(Runtime.cpu(), "", f"{server.url}x")
    with pytest.raises(OSError, match=r"cannot download file:///nowhere\.zip: .*No such file"):
        find_bundle(Runtime.cpu(), "", "file:///nowhere.zip")


def test_a_download_resumes_also_after_a_kill(server, base_dir):
    """A zip that was written in place and cut by a kill counted as complete in all later runs."""
    base_dir.mkdir()
    size = len(server.files["bundle.zip"])
    server.faults["bundle.zip"] = ["truncate 30", "stall 90"]
    code = (
        f"from nanochat.core_bundle import *; download_bundle({server.url!r}, '', base_dir() / 'eval_bundle')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    first = size * 30 // 100
    second = first + (size - first) * 90 // 100
    kill_at(process, base_dir / ".eval_bundle.download" / ".bundle.zip.partial", second)
    assert not (base_dir / "eval_bundle").exists()
    assert load_bundle(find_bundle(Runtime.cpu(), "", server.url)).tasks
    assert server.ranges("bundle.zip") == [(0, first), (first, second), (second, size)]


@pytest.mark.parametrize("name", ["bundle.zip", "nested.zip"])
def test_a_zip_that_has_changed_is_downloaded_whole(server, folder, base_dir, name):
    server.faults["bundle.zip"] = ["truncate"] * 6
    with pytest.raises(OSError, match="cannot download"):
        find_bundle(Runtime.cpu(), "", server.url)
    (folder / "more.txt").write_text("changed")
    server.files["bundle.zip"] = zipped(folder)
    assert load_bundle(find_bundle(Runtime.cpu(), "", server.address(name))).tasks
    assert server.starts(name)[-1] == 0
    assert files_of(base_dir) == ["eval_bundle"]


@pytest.mark.slow
def test_a_zip_with_any_byte_flipped_is_an_error(folder, tmp_path):
    """Of the errors of zlib and zipfile only BadZipFile was caught."""
    good, errors = zipped(folder), []
    for place in range(0, len(good), 5):
        bad = bytearray(good)
        bad[place] ^= 0b1011
        (tmp_path / "bad.zip").write_bytes(bad)
        try:
            _unpack(tmp_path / "bad.zip", tmp_path / "unpacked", "ADDRESS")
        except ValueError as error:
            errors.append(error)
    assert all("ADDRESS" in str(error) for error in errors)
    causes = {type(error.__cause__) for error in errors}
    assert {zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError} <= causes


def test_wrong_checksum(server, base_dir):
    with pytest.raises(ValueError, match="has the SHA-256"):
        find_bundle(Runtime.cpu(), "", server.url, "0" * 64)
    assert files_of(base_dir) == []


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "C:\\evil.txt", "..\\evil.txt"]
)
def test_names_outside_the_folder_are_refused(tmp_path, folder, base_dir, name):
    base_dir.mkdir()
    archive = tmp_path / "slip.zip"
    archive.write_bytes(zipped(folder))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, "evil")
    with pytest.raises(ValueError, match="outside its folder"):
        download_bundle(archive.as_uri(), "", base_dir / "eval_bundle")
    assert list(base_dir.iterdir()) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path, folder, base_dir, monkeypatch):
    """A few kilobytes of zip filled the disk."""
    base_dir.mkdir()
    archive = tmp_path / "large.zip"
    archive.write_bytes(zipped(folder))
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(1 << 20))
        n_bytes = sum(member.file_size for member in file.infolist())
    monkeypatch.setattr(core_bundle, "MAX_UNPACKED_BYTES", n_bytes - 1)
    with pytest.raises(ValueError, match=f"unpacks to {n_bytes} bytes; a CORE bundle has at most"):
        download_bundle(archive.as_uri(), "", base_dir / "eval_bundle")
    assert list(base_dir.iterdir()) == []
    monkeypatch.setattr(core_bundle, "MAX_UNPACKED_BYTES", n_bytes)
    download_bundle(archive.as_uri(), "", base_dir / "eval_bundle")


def test_a_zip_that_understates_its_size_writes_no_more(tmp_path):
    """The bound counts the sizes that the zip states."""
    archive = tmp_path / "lie.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros", bytes(1 << 20))
    content = archive.read_bytes().replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="cannot unpack ADDRESS"):
        _unpack(archive, tmp_path / "unpacked", "ADDRESS")
    assert (tmp_path / "unpacked" / "zeros").stat().st_size <= 10


def test_a_zip_without_a_bundle(tmp_path, folder, base_dir):
    base_dir.mkdir()
    (folder / "core.yaml").rename(folder / "other.yaml")
    archive = tmp_path / "other.zip"
    archive.write_bytes(zipped(folder))
    with pytest.raises(ValueError, match=r"contains no core\.yaml"):
        download_bundle(archive.as_uri(), "", base_dir / "eval_bundle")
    assert list(base_dir.iterdir()) == []


def rank_1(value_of_rank_0):
    class Rank1(Runtime):
        def gather(self, value):
            return [value_of_rank_0, value]

    cpu = Runtime.cpu()
    return Rank1(device=cpu.device, compute_dtype=cpu.compute_dtype, rank=1, world_size=2, local_rank=1)


def test_one_rank_of_a_machine_downloads_and_all_raise_its_error(server, base_dir):
    assert find_bundle(rank_1(None), "", server.url) == base_dir / "eval_bundle"
    assert server.requests == []
    with pytest.raises(OSError, match="rank 0 has no network"):
        find_bundle(rank_1(OSError("rank 0 has no network")), "", server.url)


def test_a_bundle_of_unknown_origin_is_used_with_a_warning(base_dir, caplog):
    folder = write_bundle(base_dir / "eval_bundle")
    assert find_bundle(Runtime.cpu()) == folder
    assert caplog.text == ""
    assert find_bundle(Runtime.cpu(), "", "http://localhost:9/unused.zip") == folder
    assert "not known; it is used, and http://localhost:9/unused.zip is not" in caplog.text


def test_another_address_or_digest_is_another_bundle(server, base_dir, caplog):
    """The existing bundle was used, whatever --bundle-url and --bundle-sha256 were."""
    digest = hashlib.sha256(server.files["bundle.zip"]).hexdigest()
    folder, other = find_bundle(Runtime.cpu(), "", server.url), server.url.replace("bundle", "nested")
    with caplog.at_level(logging.INFO):
        for url, sha256 in ((server.url, ""), (server.url, digest), (other, digest.upper()), ("", "")):
            assert find_bundle(Runtime.cpu(), "", url, sha256) == folder
    assert caplog.text.count("downloaded before") == 3
    for url, sha256 in ((other, ""), (other, "0" * 64), (server.url, "0" * 64)):
        with pytest.raises(ValueError, match=f"is the bundle of {server.url}, .* not of {url}.* delete it"):
            find_bundle(Runtime.cpu(), "", url, sha256)
    shutil.rmtree(folder)
    assert find_bundle(Runtime.cpu(), "", other) == folder
