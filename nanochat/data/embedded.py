"""The embedded corpus: the documentation that every Python installation carries, as parquet shards.

Two or three megabytes of real English that need no network: the language reference behind `help("topic")`,
every docstring of the standard library, and the docstrings of the modules written in C. The library's sources
are parsed, never imported; only compiled modules, which have no source to parse, are imported.

An entry is a heading (`json.dumps(obj, *, skipkeys=False, ...)`) and its docstring. Docstrings, and longer
paragraphs of them, that repeat earlier ones word for word are dropped (`bytes` and `bytearray` share most of
theirs), so that no validation text is also training text. The rest is joined, module by module, into
documents of a few hundred to three thousand characters, and shuffled; one in twenty is held out.

    python -c "import pathlib, nanochat.data.embedded as e; e.write_shards(pathlib.Path('.'))"
"""

from __future__ import annotations

import ast
import importlib
import inspect
import platform
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import ModuleType

from nanochat.common import write_json
from nanochat.data.shards import write_parquet

MIN_CHARS, MAX_CHARS = 300, 3000  # of a document; a shorter rest of a module is dropped
MIN_ENTRY_CHARS = 16  # of a docstring worth keeping
MIN_PARAGRAPH_CHARS = 60  # of a paragraph; the same short one may occur in several entries
RULE = re.compile(r"(?m)^[=*~^+-][=*~^+ -]{3,}\n")  # under titles and in tables
VAL_EVERY = 20
ROWS_PER_GROUP = 64

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
# Importing readline changes the terminal; the others are fixtures of CPython's tests.
SKIPPED_COMPILED = re.compile(r"readline$|_?xx|_test|_ctypes_test")


def write_shards(directory: Path) -> None:
    """Write shard_00000.parquet (training), shard_00001.parquet (validation) and about.json into a folder.

    Deterministic: a Python installation always gives the same texts in the same order.
    """
    texts = documents()
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for index, text in enumerate(texts):
        splits["val" if index % VAL_EVERY == 0 else "train"].append(text)
    for index, split in enumerate(splits.values()):
        write_parquet(directory / f"shard_{index:05d}.parquet", split, ROWS_PER_GROUP)
    counts = {name: {"documents": len(t), "characters": sum(map(len, t))} for name, t in splits.items()}
    write_json(directory / "about.json", {"python": platform.python_version(), **counts})


def documents() -> list[str]:
    """Return all documents of this installation, shuffled with a fixed seed."""
    seen: set[str] = set()
    texts: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the sources, deprecated compiled modules
        for entries in chain(_topics(), _source_modules(), _compiled_modules()):
            texts.extend(_gather(_new_entries(entries, seen)))
    random.Random(0).shuffle(texts)
    return texts


def library_entries() -> Iterator[tuple[str, str]]:
    """Yield (heading, docstring) of all modules, classes and functions; many docstrings are empty."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from chain.from_iterable(chain(_source_modules(), _compiled_modules()))


# ---------------------------------------------------------------------------------------------------------
# Entries: (heading, docstring) pairs, one iterable per module


def _topics() -> Iterator[Iterable[tuple[str, str]]]:
    """Yield the language reference of pydoc, which Debian's minimal Python lacks."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    # Topics quote one another; the longest come first, so that the shorter ones lose the repetition.
    for _, text in sorted(topics.items(), key=lambda topic: (-len(topic[1]), topic[0])):
        yield [("", text)]


def _source_modules() -> Iterator[Iterable[tuple[str, str]]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # the library contains invalid files on purpose, as examples
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        yield _source_entries(tree, name)


def _source_entries(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield the entries of a module or class and of its definitions, in source order."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"{name}({ast.unparse(node.args)})", ast.get_docstring(node) or ""
        return  # local definitions are not part of the documentation
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        yield f"class {name}({bases})", ast.get_docstring(node) or ""
    elif isinstance(node, ast.Module):
        yield name, ast.get_docstring(node) or ""
    for child in ast.iter_child_nodes(node):
        is_definition = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        yield from _source_entries(child, f"{name}.{child.name}" if is_definition else name)


def _compiled_modules() -> Iterator[Iterable[tuple[str, str]]]:
    for name in sorted(sys.stdlib_module_names):
        if SKIPPED_COMPILED.match(name):
            continue
        spec = find_spec(name)
        if spec and str(spec.origin).endswith(("built-in", *EXTENSION_SUFFIXES)):
            try:
                yield _compiled_entries(importlib.import_module(name))
            except ImportError:  # a shared library that it needs is not installed
                continue


def _compiled_entries(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield the entries of a C module, its functions, its classes and their methods and attributes."""
    yield module.__name__, _docstring(module)
    for _, member in sorted(vars(module).items()):
        if inspect.isclass(member):
            owner = f"{member.__module__}.{member.__qualname__}"
            yield f"class {owner}", _docstring(member)
            for attribute, method in vars(member).items():
                if inspect.isroutine(method) or inspect.isdatadescriptor(method):
                    yield f"{owner}.{attribute}{_signature(method)}", _docstring(method)
        elif inspect.isbuiltin(member):  # unlike a replacement made at run time, such as a hook of sys
            yield f"{module.__name__}.{member.__name__}{_signature(member)}", _docstring(member)


def _docstring(member: object) -> str:
    text = member.__doc__
    return text if isinstance(text, str) else ""  # of a class it may be the descriptor for its instances


def _signature(member: object) -> str:
    # The text without $module and $self: inspect.signature would evaluate the defaults.
    signature = getattr(member, "__text_signature__", None) or ""
    return re.sub(r"\(\$module(, /)?(, )?", "(", signature).replace("$", "")


# ---------------------------------------------------------------------------------------------------------
# Documents


def _new_entries(entries: Iterable[tuple[str, str]], seen: set[str]) -> Iterator[str]:
    """Yield cleaned entries, without the docstrings and longer paragraphs in `seen`; add theirs to it."""
    for heading, docstring in entries:
        body = RULE.sub("", inspect.cleandoc(docstring) + "\n").strip()
        if _words(body) in seen:
            continue
        paragraphs = body.split("\n\n")
        new = [p for p in paragraphs if len(p) < MIN_PARAGRAPH_CHARS or _words(p) not in seen]
        seen.update(map(_words, [body, *paragraphs]))
        if len(_words("".join(new))) >= MIN_ENTRY_CHARS:
            yield "\n\n".join([heading, *new]).strip()


def _words(text: str) -> str:
    """Return the words of a text, equal for texts that differ only in case, punctuation and white space."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _gather(entries: Iterable[str]) -> Iterator[str]:
    """Join short entries and cut long ones, between paragraphs, into documents of MIN_CHARS to MAX_CHARS."""
    document = ""
    for entry in entries:
        for paragraph in entry.split("\n\n") if len(entry) > MAX_CHARS else [entry]:
            if len(document) >= MIN_CHARS and len(document) + len(paragraph) > MAX_CHARS:
                yield document
                document = ""
            document = f"{document}\n\n{paragraph}".strip()
    if len(document) >= MIN_CHARS:
        yield document
