"""Cityscapes' instances are what is visible, from instance images and from polygons."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, annotations_as_results, settings

import dataset_cityscapes
from common import UserError
from dataset import load_format
from utils import polygons


@pytest.mark.quick
def test_cityscapes_instances_are_what_stays_visible():
    cfg = settings(DATA, "MODE_MASK=True")
    split = load_format(["cityscapes", "cityscapes_mini", "val"], cfg, "city")
    assert [split.image_id(i) for i in range(len(split))] == [
        "aachen_000000_000019", "aachen_000001_000019", "bonn_000000_000019",
    ]  # fmt: skip
    assert split.class_names == dataset_cityscapes.CITYSCAPES_CLASSES
    first, second = split.annotations(0), split.annotations(1)
    # A corner of the first car and a strip of it lie behind later objects; the licence plate hides nothing.
    assert first["boxes"].tolist() == [[10, 15, 40, 35], [30, 20, 60, 40], [70, 10, 86, 31]]
    assert first["is_crowd"].tolist() == [False, False, True]
    areas = [sum(polygons.signed_area(r) for r in rings) for rings in first["rings"][:2]]
    assert areas == [30 * 20 - 10 * 15 - 5 * 20, 30 * 20]
    # A person entirely behind a bus is not visible and no instance.
    assert [split.class_names[label - 1] for label in second["labels"]] == ["rider", "bus", "bicycle"]
    assert len(split.annotations(2)["labels"]) == 0
    assert all(Path(split.image_file(i)).is_file() for i in range(3))


@pytest.mark.quick
def test_cityscapes_annotations_as_detections_score_one():
    split = load_format(["cityscapes", "cityscapes_mini", "val"], settings(DATA, "MODE_MASK=True"), "city")
    metrics = split.evaluate(annotations_as_results(split, masks=True), verbose=False)
    assert metrics["bbox/AP"] == pytest.approx(1.0) and metrics["segm/AP"] == pytest.approx(1.0)
    assert metrics["cityscapes/AP"] == pytest.approx(1.0) == metrics["cityscapes/AP50_per_class/bus"]
    assert np.isnan(metrics["cityscapes/AP_per_class/train"])
    plain = load_format(["cityscapes", "cityscapes_mini", "val"], settings(DATA), "city")
    assert not any(k.startswith("cityscapes/") for k in plain.evaluate(annotations_as_results(plain), verbose=False))


@pytest.mark.quick
def test_cityscapes_instance_images_and_polygons_give_the_same(tmp_path):
    folder = tmp_path / "cityscapes_mini"
    shutil.copytree(DATA / "cityscapes_mini", folder)
    painted = dataset_cityscapes.read_cityscapes_content(folder, "val")
    for file in folder.glob("gtFine/val/*/*_polygons.json"):
        ids = dataset_cityscapes._paint_cityscapes(str(file)).astype(np.uint16)
        cv2.imwrite(str(file).replace("polygons.json", "instanceIds.png"), ids)
        file.unlink()
    assert dataset_cityscapes.read_cityscapes_content(folder, "val") == painted
    # Void is what no object covers (0), here the upper part of a picture with a road below.
    void = polygons.decode_rle(painted["images"][0]["void"], 48, 96)
    assert void[:5].all() and not void[40:].any()
    file = folder / "gtFine/val/aachen/aachen_000000_000019_gtFine_polygons.json"
    file.write_text((DATA / "cityscapes_mini/gtFine/val/aachen" / file.name).read_text().replace("persongroup", "cow"))
    file.with_name(file.name.replace("polygons.json", "instanceIds.png")).unlink()
    with pytest.raises(UserError, match="aachen_000000_000019_gtFine_polygons.json: unknown label 'cow'"):
        dataset_cityscapes.read_cityscapes_content(folder, "val")


@pytest.mark.quick
@pytest.mark.parametrize(("changes", "message"), [
    ({"objects": ["car"]}, "no imgHeight, imgWidth, or objects' label and polygon"),
    ({"objects": 3}, "no imgHeight, imgWidth, or objects' label and polygon"),
    ({"imgHeight": float("inf")}, "no imgHeight, imgWidth, or objects' label and polygon"),
    ({"imgHeight": 10**9}, "no image has imgWidth x imgHeight 100 x 1000000000"),
    ({"imgWidth": -3}, "no image has imgWidth x imgHeight -3 x 100"),
    ({"objects": [{"label": "car", "polygon": [[0, 0], [1e30, 0], [5, 5]]}]}, "polygon of a 'car' lies far outside"),
    ({"objects": [{"label": "car", "polygon": [[0, 0], [float("nan"), 0], [5, 5]]}]}, "lies far outside"),
])  # fmt: skip
def test_polygons_that_are_none_are_one_line(tmp_path, changes, message):
    shutil.copytree(DATA / "cityscapes_mini", tmp_path / "city")
    (path,) = list((tmp_path / "city").rglob("*polygons.json"))[:1]
    path.write_text(json.dumps({"imgHeight": 100, "imgWidth": 100, "objects": [], **changes}))
    with pytest.raises(UserError, match=f"{path.name}: .*{message}"):
        load_format(["cityscapes", "city", "val"], settings(tmp_path, "MODE_MASK=True"), "city")
