"""The order of the files that docs/ARCHITECTURE.md states is the one that the imports have."""

import ast
import fnmatch
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"tools", "scripts", "benchmarks", "demo", "tests", "import_path"}


def lines_of_the_table() -> dict[str, list[str]]:
    """{line: patterns of its files}, from the ground up; `utils/` stands for all files in it."""
    table = (ROOT / "docs" / "ARCHITECTURE.md").read_text().partition("## Files, from the ground up")[2]
    rows = re.findall(r"(?m)^\| (\w[\w ]*) \| (.*) \|$", table.partition("\n## ")[0])
    return {line: re.findall(r"`([\w*]+\.py|utils/)`", cell) for line, cell in rows}


def imports_of(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} if node.module != "utils" else {f"utils.{alias.name}" for alias in node.names}
    return {name if name.startswith("utils.") else name.split(".")[0] for name in found}


FILES = {p.stem: p for p in ROOT.glob("*.py") if p.stem != "import_path"}
FILES |= {f"utils.{p.stem}": p for p in (ROOT / "utils").glob("*.py")}
IMPORTS = {name: imports_of(path) for name, path in FILES.items()}


def line_of(name: str) -> int:
    if name.startswith("utils."):
        return 0
    fits = [
        (len(pattern.replace("*", "")), number)
        for number, patterns in enumerate(lines_of_the_table().values())
        for pattern in patterns
        if fnmatch.fnmatch(f"{name}.py", pattern)
    ]
    assert fits, f"{name}.py is missing from the table of files in docs/ARCHITECTURE.md"
    return max(fits)[1]


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_its_own_line_of_the_table_and_those_above(name):
    lines = list(lines_of_the_table())
    own = line_of(name)
    for other in IMPORTS[name] & set(FILES):
        assert line_of(other) <= own, f"{name} imports {other}, which stands below it"
        if lines[own] == "model":
            assert lines[line_of(other)] in ("model", "ground"), f"{name} imports {other}"
    assert not IMPORTS[name] & PROGRAMS, f"{name} imports a program"


@pytest.mark.parametrize(
    ("framework", "place"), [("tensorflow", "utils.tf_v1"), ("tensorpack", "utils.tensorpack_import")]
)
def test_a_framework_is_imported_in_one_file(framework, place):
    assert [name for name in FILES if framework in IMPORTS[name]] == [place]


def test_nothing_imports_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(IMPORTS[name] & set(FILES)):
                visit(other)
            done.add(path.pop())

    for name in FILES:
        visit(name)


def test_every_file_and_line_of_the_table_exists():
    table = lines_of_the_table()
    assert list(table) == ["ground", "results", "data sets", "batches", "model", "reports", "runs", "programs"]
    for patterns in table.values():
        for pattern in set(patterns) - {"report*.py"}:
            assert list(ROOT.glob(pattern)), f"docs/ARCHITECTURE.md names {pattern}"
