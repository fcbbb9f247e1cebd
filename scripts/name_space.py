"""The package `packrcnn`: the same files as in the checkout, under one name space.

In the checkout the modules import each other by their own names (`from common import UserError`). Installed, names as
plain as `config` or `data` would get into the way of others, so every import of an own module is rewritten to
`from packrcnn.common import UserError`, and commands in messages to those that the package has. Line numbers stay the
same. scripts/build_package.py writes the rewritten files into the wheel; after `pip install -e .` the checkout's files
are rewritten when they are imported.
"""

import ast
import functools
import importlib.machinery
import re
from collections.abc import Collection
from pathlib import Path
from types import CodeType

__all__ = ["FOLDERS", "NAME", "find", "own_names", "package_files", "rewritten"]

NAME = "packrcnn"
FOLDERS = ("utils", "tools", "demo")  # beside the files of the root
DATA = (".txt", ".json", ".html", ".css", ".js", ".svg", ".ipynb")
# They write into the checkout.
LEFT_OUT = {"setup.py", "tools/recipes.py", "tools/settings_doc.py", "demo/run.py", "demo/photos.py"}

# What messages and docstrings call, as the package has it.
_WORDS = (
    (r"(?:python |\./)?\btrain\.py\b", NAME),
    (r"(?:python |\./)?\btools/(\w+)\.py\b", rf"python -m {NAME}.tools.\1"),
    (r"python demo/(\w+)\.py\b", rf"python -m {NAME}.demo.\1"),
    (r"\bdemo/(\w+)\.py\b", rf"{NAME}.demo.\1"),
    (r"python -m (tools|demo)\.", rf"python -m {NAME}.\1."),
    (r"(?<![\w./])demo\.(own_\w+)", rf"{NAME}.demo.\1"),
    (r"pip install -r requirements-(\w+)\.txt", rf"pip install '{NAME}[\1]'"),
    (r"run `make venv`, then `\. \.venv/bin/activate`", "install it with pip"),
)


@functools.cache
def own_names(root: Path) -> set[str]:
    """The top-level names that the checkout's files import each other by."""
    return {path.stem for path in root.glob("*.py")} - {NAME} | set(FOLDERS)


@functools.cache
def package_files(root: Path) -> dict[str, Path]:
    """{path inside the package: file of the checkout}: every module of the root, FOLDERS, and the data beside them."""
    images = {root / "demo" / "data", root / "demo" / "photos"}  # those that the demo has drawn, and photographs
    inside = [p for folder in FOLDERS for p in sorted((root / folder).rglob("*")) if images.isdisjoint(p.parents)]
    files = [*sorted(root.glob("*.py")), *sorted((root / "scripts").glob("*.txt"))]
    files += [path for path in inside if path.suffix in (".py", *DATA) and not path.is_symlink()]
    found = {path.relative_to(root).as_posix(): path for path in files}
    found["__init__.py"] = found.pop(f"{NAME}.py")
    return {name: path for name, path in found.items() if name not in LEFT_OUT}


def rewritten(source: str, own: Collection[str], origin: str = "") -> str:
    """The source with imports of `own` modules, and commands in its texts, as the package has them."""
    lines = source.encode().split(b"\n")

    def insert(node: ast.stmt, after: str, text: str) -> None:
        row, column = node.lineno - 1, node.col_offset + len(after)
        line = lines[row]
        if line[node.col_offset : column] != after.encode():
            raise ValueError(f"{origin}:{node.lineno}: write the import with single spaces")
        lines[row] = line[:column] + text.encode() + line[column:]

    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in sorted(nodes, key=lambda n: (n.lineno, n.col_offset), reverse=True):
        if isinstance(node, ast.ImportFrom):
            if node.level == 0 and str(node.module).partition(".")[0] in own:
                insert(node, "from ", f"{NAME}.")
            continue
        if not any(alias.name.partition(".")[0] in own for alias in node.names):
            continue
        (first, *others), dotted = node.names, "." in node.names[0].name
        if others or dotted and not first.asname:
            raise ValueError(f"{origin}:{node.lineno}: import own modules one by one, as `from folder import module`")
        if dotted:
            insert(node, "import ", f"{NAME}.")
        else:
            insert(node, "", f"from {NAME} ")
    text = b"\n".join(lines).decode()
    for pattern, words in _WORDS:
        # A whole text in quotes is a file name that the code uses.
        text = re.sub(rf"(?<!/){pattern}(?!/)", lambda m, words=words: _unless_quoted(m, words), text)
    return text


def _unless_quoted(found: re.Match, words: str) -> str:
    around = found.string[max(found.start() - 1, 0) : found.start()] + found.string[found.end() : found.end() + 1]
    return found[0] if around in ("''", '""') else found.expand(words)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a file of the checkout as the package has it. The code is not cached, since the checkout's cache has the
    same name."""

    def __init__(self, fullname: str, path: Path, root: Path):
        super().__init__(fullname, str(path))
        self._own = own_names(root)

    def get_code(self, fullname: str) -> CodeType:
        source = Path(self.path).read_text("utf-8")
        return compile(rewritten(source, self._own, self.path), self.path, "exec", dont_inherit=True)


def find(fullname: str, root: Path) -> importlib.machinery.ModuleSpec | None:
    """The spec of `packrcnn` or one of its modules, made from the files of the checkout `root`.

    Packages get no search path: Python's own finder must not load the files as they are.
    """
    name, *parts = fullname.split(".")
    inside = "/".join(parts)
    files = package_files(root)
    folder = not parts or parts[-1] in FOLDERS and len(parts) == 1
    file = files.get(f"{inside}/__init__.py".lstrip("/") if folder else f"{inside}.py")
    if name != NAME or file is None and not folder:
        return None
    loader = _Loader(fullname, file, root) if file else None
    spec = importlib.machinery.ModuleSpec(fullname, loader, origin=str(file) if file else None, is_package=folder)
    spec.has_location = file is not None
    return spec
