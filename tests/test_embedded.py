import builtins
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.data import embedded
from nanochat.dataset import parquets_iter_batched, resolve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts():
    return embedded.documents()


def test_the_corpus_is_megabytes_of_documents_of_moderate_length(texts):
    lengths = sorted(map(len, texts))
    assert 2e6 < sum(lengths) < 5e6
    assert lengths[0] >= embedded.MIN_CHARS
    assert lengths[int(0.99 * len(lengths))] <= embedded.MAX_CHARS + 100
    assert lengths[len(lengths) // 2] > 1500


def test_the_corpus_contains_documentation_in_english(texts):
    corpus = "\n".join(texts)
    for passage in (
        "json.dumps(obj, *, skipkeys=False",  # a function of the library
        "Serialize ``obj`` to a JSON formatted ``str``.",
        "class argparse.ArgumentParser(",
        "math.log2(x, /)",  # a module written in C
        "Return a copy of the string converted to uppercase.",  # a method of a builtin type
        'The "assert" statement' if "pydoc_data" in sys.modules else "",  # the language reference
    ):
        assert passage in corpus
    words = re.findall(r"[a-z]+", corpus.lower())
    n_english = sum(word in {"the", "a", "is", "of", "to", "in", "and", "for"} for word in words)
    assert n_english > 0.13 * len(words)


def test_a_docstring_occurs_in_one_document_only(texts):
    """`bytes` and `bytearray` share docstrings, as do C and Python modules: none is in both splits."""
    docstring = " ".join(builtins.bytearray.partition.__doc__.split()[:30])
    assert sum(docstring in " ".join(text.split()) for text in texts) <= 1
    is_val = [index % embedded.VAL_EVERY == 0 for index in range(len(texts))]
    paragraphs = {False: set(), True: set()}
    for text, split in zip(texts, is_val, strict=True):
        paragraphs[split] |= {" ".join(p.split()) for p in text.split("\n\n") if len(p.split()) > 12}
    both = paragraphs[True] & paragraphs[False]
    assert len(both) < 0.005 * len(paragraphs[True])


def test_repetitions_and_trivial_docstrings_are_dropped():
    paragraph = "This paragraph is so long that a second occurrence of it can only be a copy of it."
    entries = [
        ("f()", "Return the answer\n    to everything."),
        ("g()", "return the *answer* to everything"),
        ("h()", "Return it."),
        ("t()", "Title here\n==========\n\nAnd text."),
        ("u()", f"Do one thing.\n\n{paragraph}\n\nExample:"),
        ("v()", f"Do another thing.\n\n{paragraph}\n\nExample:"),
    ]
    seen = set()
    assert list(embedded._new_entries(entries, seen)) == [
        "f()\n\nReturn the answer\nto everything.",
        "t()\n\nTitle here\n\nAnd text.",
        f"u()\n\nDo one thing.\n\n{paragraph}\n\nExample:",
        "v()\n\nDo another thing.\n\nExample:",
    ]
    assert list(embedded._new_entries(entries, seen)) == []


def test_entries_of_a_source():
    source = '''
"""The module."""
if True:
    def f(x, *, y=1):
        """Do f."""
        def local():
            """Not documentation."""
class A(B):
    """The class."""
    async def g(self):
        """Do g."""
'''
    assert list(embedded._source_entries(embedded.ast.parse(source), "m")) == [
        ("m", "The module."),
        ("m.f(x, *, y=1)", "Do f."),
        ("class m.A(B)", "The class."),
        ("m.A.g(self)", "Do g."),
    ]


def compiled_entries_hash():
    seen = set()
    entries = [list(embedded._new_entries(module, seen)) for module in embedded._compiled_modules()]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def test_compiled_modules_give_the_same_entries_in_every_process():
    """Although pytest replaces hooks of sys at run time. The imports print nothing."""
    command = "from tests.test_embedded import compiled_entries_hash; print(compiled_entries_hash())"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", command],
        cwd=Path(__file__).parents[1],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == compiled_entries_hash()
    assert run.stderr == ""


def test_without_the_language_reference(monkeypatch):
    """Debian's python3-minimal has no pydoc_data."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(embedded._topics()) == []


def test_shards_are_made_on_first_use(texts, base_dir, monkeypatch):
    monkeypatch.setattr(embedded, "documents", lambda: texts)
    directory = resolve("embedded")
    assert directory == base_dir / "embedded_data"
    assert sorted(path.name for path in directory.iterdir()) == [
        "about.json",
        "shard_00000.parquet",
        "shard_00001.parquet",
    ]
    train, val = (
        [t for batch in parquets_iter_batched(s, data="embedded") for t in batch] for s in ("train", "val")
    )
    assert sorted(train + val) == sorted(texts)
    assert len(val) == pytest.approx(len(texts) / embedded.VAL_EVERY, abs=1)
    assert pq.ParquetFile(directory / "shard_00000.parquet").metadata.row_group(0).num_rows == 64
    about = json.loads((directory / "about.json").read_text())
    assert about["val"] == {"documents": len(val), "characters": sum(map(len, val))}

    monkeypatch.setattr(embedded, "documents", None)
    assert resolve("embedded") == directory
