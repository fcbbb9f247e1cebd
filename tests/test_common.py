"""common.py: atomic writes and the count of GPUs."""

import json

import pytest

import common
from common import UserError, atomic_write, read_json, visible_gpus, without_nan, write_json

pytestmark = pytest.mark.quick


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(path) as f:
        f.write("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, "{", b"\xff\xfe"])
def test_a_missing_or_broken_json_is_named_with_its_role(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"annotation file {path}"):
        read_json(path, "annotation file")


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("0,1,3", 3), ("1, 2", 2), ("0,-1,2", 1), ("0,9,1", 1), ("9", 0),
     ("GPU-7d3a,GPU-11", 2), ("gpu", 0)],
)  # fmt: skip
def test_visible_gpus_are_those_of_the_driver_that_the_environment_leaves(monkeypatch, tmp_path, visible, count):
    monkeypatch.setattr(common, "_NVIDIA_GPUS", tmp_path / "gpus")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == 0
    for index in range(4):
        (tmp_path / "gpus" / f"0000:0{index}:00.0").mkdir(parents=True)
    assert visible_gpus() == count


def test_json_gets_null_for_what_is_not_finite():
    content = {"ap": float("nan"), "rows": [1.5, (float("inf"), None, "nan")], "n": 3}
    assert without_nan(content) == {"ap": None, "rows": [1.5, [None, None, "nan"]], "n": 3}
