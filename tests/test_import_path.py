"""Programs outside the root find the repository's modules, and say in one line which package is missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tools", "benchmarks", "demo", "scripts")
PROGRAMS = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py") if "__main__" in p.read_text())
OWN = {p.stem for p in ROOT.glob("*.py")} | {"utils", *FOLDERS}


def imported_modules(path):
    """Top-level names of what the file imports at its top, in order."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (name.split(".")[0] for name in names)


def test_each_folder_has_a_link_to_the_one_file():
    for folder in FOLDERS:
        link = ROOT / folder / "import_path.py"
        assert link.is_symlink() and link.resolve() == ROOT / "import_path.py"


def test_programs_outside_the_root_import_it_first_and_nothing_else_changes_the_path():
    assert len(PROGRAMS) > 12
    for path in PROGRAMS:
        modules = list(imported_modules(path))
        if OWN & set(modules):
            assert modules[0] == "import_path", path
        assert "sys.path" not in path.read_text(), path


@pytest.mark.parametrize("path", [p for p in PROGRAMS if "import_path" in imported_modules(p)], ids=lambda p: p.stem)
def test_a_missing_package_is_one_line(path, tmp_path):
    """-S: Python without its site-packages."""
    done = subprocess.run([sys.executable, "-S", str(path), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{path.name}: the Python package ") and "`make venv`" in line


@pytest.mark.parametrize("name", ["tools/subset.py", "tools/score.py", "demo/make_shapes.py"])
def test_programs_run_from_any_folder(name, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / name), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:"), done.stderr
