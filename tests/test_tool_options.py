"""Options of tools/*.py that name files: "~", empty values, outputs that cannot be written."""

import json
import os
from pathlib import Path

import pytest

from common import UserError, check_output_file, check_output_folder, path_argument
from tools import (
    annotate,
    check_data,
    convert,
    convert_data,
    curves,
    download,
    flops,
    parity,
    report,
    score,
    split,
    subset,
    tile_data,
)

pytestmark = pytest.mark.quick
# Programs, their arguments before the output, and the output: a file's name, or "folder". The inputs do not exist: an
# output that cannot be written is found before they are looked at.
OUTPUTS = {
    "annotate": (annotate.main, ["missing.json", "--output"], "folder"),
    "convert_data": (convert_data.main, ["missing.xml"], "file.json"),
    "download": (download.main, ["balloon", "--output"], "folder"),
    "convert": (convert.main, ["missing.pth"], "file.npz"),
    "curves": (curves.main, ["missing", "--out"], "file.png"),
    "flops": (flops.main, ["--json"], "file.json"),
    "parity json": (parity.main, ["missing", "--json"], "file.json"),
    "parity table": (parity.main, ["missing", "--markdown"], "file.md"),
    "report": (report.main, ["--gt", "missing", "--detections", "missing", "--out"], "folder"),
    "score": (score.main, ["--protocol", "coco", "--gt", "missing", "--detections", "missing", "--json"], "file.json"),
    "split": (split.main, ["missing.json", "--output"], "folder"),
    "tile_data cut": (tile_data.main, ["cut", "missing.json", "x", "--output"], "folder"),
    "tile_data join": (tile_data.main, ["join", "missing.json", "--output"], "file.json"),
    "subset": (subset.main, ["missing.json"], "file.json"),
    "check_data json": (check_data.main, ["--data", "missing.json", "x", "--json"], "file.json"),
    "check_data fix": (check_data.main, ["--data", "missing.json", "x", "--fix"], "folder"),
    "check_data page": (check_data.main, ["--data", "missing.json", "x", "--page"], "folder"),
}


def run(monkeypatch, capsys, program, *arguments) -> str:
    """What a program says that must end with exit code 2."""
    monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
    try:
        code = program()
    except SystemExit as e:
        code = e.code
    assert code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_outputs_that_cannot_be_written_are_said_before_the_work(name, tmp_path, monkeypatch, capsys):
    program, arguments, output = OUTPUTS[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").touch()
    error = run(monkeypatch, capsys, program, *arguments, tmp_path / "plain" / output)
    assert "plain is a file, not a folder" in error and "Traceback" not in error
    if output != "folder":
        (tmp_path / output).mkdir()
        assert "is a folder; give the name of a file in it" in run(monkeypatch, capsys, program, *arguments, output)
    assert "must not be empty" in run(monkeypatch, capsys, program, *arguments, "")
    assert sorted(os.listdir(tmp_path)) == sorted({"plain", output} - {"folder"})


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_a_tilde_is_the_home_directory(name, tmp_path, monkeypatch, capsys):
    program, arguments, output = OUTPUTS[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "plain").touch()
    assert f"{tmp_path}/plain is a file" in run(monkeypatch, capsys, program, *arguments, f"~/plain/{output}")


def test_path_argument(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_argument("~/a") == "/home/me/a" and path_argument("a~b") == "a~b"


def test_output_checks_leave_nothing_behind(tmp_path):
    check_output_folder(tmp_path / "new" / "folder", "--out")
    check_output_file(tmp_path / "new.json", "--json")
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="--json .* is a folder"):
        check_output_file(tmp_path, "--json")


@pytest.mark.parametrize(
    "content", [[], {"categories": 3}, {"categories": [3]}, {"categories": [{"id": 1}]}, {"categories": []},
                {"categories": [{"id": 1, "name": 5}]},
                 {"categories": [{"id": "a", "name": "x"}, {"id": 1, "name": ""}]}]
)  # fmt: skip
def test_class_names_from_annotations_of_another_form(content, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.json").write_text(json.dumps(content))
    path = Path(tmp_path / "a.json")
    assert "--class-names" in run(monkeypatch, capsys, convert.main, "missing.pth", "--class-names", path)
