"""demo/PackRCNN.ipynb: its stored outputs, and that it still gives such."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "demo" / "PackRCNN.ipynb"


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def kinds(cell):
    return [sorted(output.get("data", {"stream": 0})) for output in cell["outputs"]]


def average_precision(cells, when, what):
    """The number behind "star" or "mask AP50:" in the line of `when`."""
    printed = "".join("".join(output.get("text", [])) for cell in cells for output in cell["outputs"])
    (line,) = [line for line in printed.splitlines() if line.startswith(when)]
    return float(re.search(rf"{what} (\d\.\d+|nan)", line)[1])


def check(cells):
    assert average_precision(cells, "before", "star") == 0
    assert average_precision(cells, "after", "star") > 0.3 and average_precision(cells, "after", "mask AP50:") > 0.3


@pytest.mark.quick
def test_the_notebook_is_stored_with_its_outputs_and_small():
    cells = code_cells(NOTEBOOK)
    assert NOTEBOOK.stat().st_size < 300_000
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in kind for cell in cells for kind in kinds(cell)) >= 4
    check(cells)


# A sixth of the steps: what it finds after all of them is in the stored outputs.
SHORTER = {
    "LR_SCHEDULE=[160,210,230]": "LR_SCHEDULE=[30,38,40]",
    "LR_SCHEDULE=[100,120,130]": "LR_SCHEDULE=[20,23,25]",
    "score_threshold=0.3": "score_threshold=0.0",
    "found.filter(score=0.5)": "found.filter(score=0.05)",
    'Path(\\"..\\")': f'Path(\\"{ROOT}\\")',
}


@pytest.mark.slow
def test_the_notebook_runs_without_a_network_and_shows_what_it_did(tmp_path):
    text, short, out = NOTEBOOK.read_text(), tmp_path / "short.ipynb", tmp_path / "out.ipynb"
    for words, others in SHORTER.items():
        assert words in text
        text = text.replace(words, others)
    short.write_text(text)
    environment = os.environ | {"TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "tests.notebook", str(short), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = code_cells(out)
    assert [kinds(cell) for cell in cells] == [kinds(cell) for cell in code_cells(NOTEBOOK)]
    assert [cell["source"] for cell in cells] == [cell["source"] for cell in code_cells(short)]
    assert average_precision(cells, "before", "star") == 0
