#!/usr/bin/env python3
"""Runs a notebook's cells in order in this process, without Jupyter, and keeps what they show.

    python -m tests.notebook demo/PackRCNN.ipynb              # stores the outputs in it
    python -m tests.notebook demo/PackRCNN.ipynb other.ipynb  # stores them elsewhere

What a cell shows is what it prints, and the value of its last line: an image of PIL as PNG, another value as text.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["run"]


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of all its cells, which run in its folder; an error of a cell is raised."""
    notebook = json.loads(path.read_text())
    values: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    with _chdir(path.parent):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                cell["execution_count"], cell["outputs"] = count, _outputs("".join(cell["source"]), values, count)
    return notebook


@contextlib.contextmanager
def _chdir(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _outputs(source: str, values: dict[str, Any], count: int) -> list[dict[str, Any]]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), values)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), values)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append(
            {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
        )
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_png_"):
            data = {"image/png": base64.b64encode(value._repr_png_()).decode() + "\n", "text/plain": ["an image"]}
        outputs.append({"data": data, "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main() -> int:
    path = Path(sys.argv[1])
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else path
    text = json.dumps(run(path), indent=1, ensure_ascii=False) + "\n"
    target.write_text(text)
    print(f"{target} has its outputs, {len(text) // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
