"""Limits on the size of files and on the imports of modules; pyproject.toml holds the layers of imports."""

from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
MAX_IMPORTS = 8  # modules of this project that a module imports


def test_no_file_is_long():
    folders = ("nanochat", "scripts", "tasks", "dev", "rustbpe/src")
    paths = [ROOT / "speedrun.sh", *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    code = [path for path in paths if path.suffix in (".py", ".rs", ".sh", ".jinja")]
    assert len(code) > 100
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in code}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_modules_below_the_scripts_import_few_others():
    graph = grimp.build_graph("nanochat", "tasks", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    assert {module: sorted(found) for module, found in imports.items() if len(found) > MAX_IMPORTS} == {}
