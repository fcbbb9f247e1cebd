"""Imported first by the programs in tools/, benchmarks/, demo/ and scripts/, which have links to this file: lets them
import the repository's modules wherever they are started, and says in one line which package is missing."""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent


def _one_line_if_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not isinstance(error, ModuleNotFoundError):
        return sys.__excepthook__(kind, error, trace)
    program = Path(sys.argv[0]).name
    print(
        f"{program}: the Python package {error.name} is missing here; run `make venv`, then `. .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(2)


sys.excepthook = _one_line_if_missing
# Found through a link: Python has put the program's folder first on the path. The repository takes its place, as if the
# program had been started with `python -m` from there.
if Path(__file__).is_symlink():
    sys.path[0] = str(ROOT)
