"""A csv of boxes loads with and without a header, and its rows are named in errors."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, annotations_as_results, settings

from common import UserError
from dataset import load_format


@pytest.mark.quick
def test_csv_of_boxes_loads_with_and_without_a_header():
    split = load_format(["csv", "csv_mini/boxes.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert [split.image_id(i) for i in range(3)] == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert split.class_names == ["fruit, ripe", "leaf"]
    assert [split.image_size(i) for i in range(3)] == [(40, 50), (30, 30), (25, 45)]
    assert split.annotations(0)["boxes"].tolist() == [[5, 5, 20.5, 30], [25, 3, 48, 36]]
    assert len(split.annotations(1)["labels"]) == 0
    assert split.annotations(2)["is_crowd"].tolist() == [True, False]
    plain = load_format(["csv", "csv_mini/headless.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert plain.class_names == ["fruit", "leaf"] and plain.annotations(0)["boxes"].tolist() == [[5, 5, 20, 30]]


@pytest.mark.quick
def test_csv_annotations_as_detections_score_one():
    split = load_format(["csv", "csv_mini/boxes.csv", "csv_mini/images"], settings(DATA), "boxes")
    assert split.evaluate(annotations_as_results(split), verbose=False)["bbox/AP"] == pytest.approx(1.0)


@pytest.mark.quick
def test_csv_errors_name_the_row(tmp_path):
    shutil.copytree(DATA / "csv_mini", tmp_path / "c")
    spec, cfg = ["csv", "c/boxes.csv", "c/images"], settings(tmp_path)
    text = (tmp_path / "c/boxes.csv").read_text()
    (tmp_path / "c/boxes.csv").write_text(text.replace("20.5", "2O.5"))
    with pytest.raises(UserError, match="row 2: a coordinate is not a number"):
        load_format(spec, cfg, "boxes")
    (tmp_path / "c/boxes.csv").write_text(text.replace("ymax", "bottom edge"))
    with pytest.raises(UserError, match="no column for y2 in its header"):
        load_format(spec, cfg, "boxes")
    (tmp_path / "c/boxes.csv").write_text(text.replace("b.jpg", "gone.jpg"))
    with pytest.raises(UserError, match="1 of 3 images are missing, e.g. .*gone.jpg"):
        load_format(spec, cfg, "boxes")


def write_csv(folder: Path, text: str | bytes) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(folder / name), np.full((50, 100, 3), 128, np.uint8))
    (folder / "b.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["csv", str(folder / "b.csv"), str(folder)]


@pytest.mark.quick
def test_csv_of_normalised_boxes_is_named_and_read_with_an_option(tmp_path):
    spec = write_csv(
        tmp_path / "c", "filename,class,xmin,ymin,xmax,ymax\na.jpg,red,0.1,0.2,0.5,0.6\nb.jpg,red,0,0,1,1\n"
    )
    with pytest.raises(UserError, match="b.csv: its boxes are normalised coordinates .*'normalised=True'"):
        load_format(spec, settings(tmp_path), "set")
    split = load_format([*spec, "normalised=True"], settings(tmp_path), "set")
    assert np.allclose(split.objects(0).boxes, [[10, 10, 50, 30]]) and np.allclose(
        split.objects(1).boxes, [[0, 0, 100, 50]]
    )
    assert split.evaluate(annotations_as_results(split), verbose=False)["bbox/AP"] == pytest.approx(1)


@pytest.mark.quick
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_may_have_a_byte_order_mark(tmp_path, encoding):
    spec = write_csv(tmp_path / "c", "image,x1,y1,x2,y2,label\na.jpg,1,2,30,40,caf\u00e9\n".encode(encoding))
    assert load_format(spec, settings(tmp_path), "set").class_names == ["caf\u00e9"]


@pytest.mark.quick
@pytest.mark.parametrize("row, message", [
    ("a.jpg,nan,2,30,40,red,0", "row 2: a coordinate is not a number: nan"), (",1,2,30,40,red,0", "row 2: no image"),
    ("a.jpg,1,2,30,40,red,maybe", "row 2: the flag is not 0 or 1: 'maybe'"), ("a.jpg,1,2,30,4o,red,0", "'4o'"),
])  # fmt: skip
def test_csv_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    spec = write_csv(tmp_path / "c", f"image,x1,y1,x2,y2,label,iscrowd\n{row}\n")
    with pytest.raises(UserError, match=message):
        load_format(spec, settings(tmp_path), "set")


@pytest.mark.quick
def test_csv_flags_are_those_of_every_format(tmp_path):
    rows = [f"a.jpg,{n},2,{n + 9},40,red,{flag}" for n, flag in enumerate(("1", "true", "0", "false", "", "1.0"))]
    spec = write_csv(tmp_path / "c", "image,x1,y1,x2,y2,label,iscrowd\n" + "\n".join(rows) + "\n")
    assert load_format(spec, settings(tmp_path), "set").objects(0).is_crowd.tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
