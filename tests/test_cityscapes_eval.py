"""Cityscapes' metric against numbers of the official tool (tests/data/cityscapes_eval) and its rules by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from common import UserError
from dataset_cityscapes import read_cityscapes_content
from utils.cityscapes_eval import evaluate_cityscapes, read_cityscapes_detections
from utils.polygons import encode_part

pytestmark = pytest.mark.quick
FOLDER = Path(__file__).parent / "data/cityscapes_eval"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def test_scores_equal_the_official_tool():
    content = read_cityscapes_content(FOLDER, "val")
    metrics = evaluate_cityscapes(content, read_cityscapes_detections(FOLDER / "predictions", content))
    assert metrics["AP"] == pytest.approx(EXPECTED["AP"], abs=1e-9) and 0.2 < EXPECTED["AP"] < 0.8
    assert metrics["AP50"] == pytest.approx(EXPECTED["AP50"], abs=1e-9)
    for name, scores in EXPECTED["per_class"].items():
        for key, value in scores.items():
            value = np.nan if value is None else value
            assert metrics[f"{key}_per_class/{name}"] == pytest.approx(value, abs=1e-9, nan_ok=True)


# ---------------------------------------------------------------- the rules, one by one
def mask(x1, y1, x2, y2):
    bitmap = np.zeros((60, 200), np.uint8, order="F")
    bitmap[y1:y2, x1:x2] = 1
    run = mask_utils.encode(bitmap)
    return {"size": run["size"], "counts": run["counts"].decode()}


def score(objects, results, void=None):
    """objects: (mask, is group); results: (mask, score), all of one class -> AP, AP50."""
    content = {
        "images": [{"id": "a", "height": 60, "width": 200, **({"void": void} if void else {})}],
        "annotations": [
            {"image_id": "a", "category_id": 1, "iscrowd": int(group), "segmentation": m} for m, group in objects
        ],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
    }
    found = [{"image_id": "a", "category_id": 1, "score": s, "segmentation": m} for m, s in results]
    metrics = evaluate_cityscapes(content, found)
    assert np.isnan(metrics["AP_per_class/bus"])  # has no object and counts for nothing
    assert metrics["AP"] == pytest.approx(metrics["AP_per_class/car"], nan_ok=True)
    return metrics["AP"], metrics["AP50"]


CAR, OTHER = mask(0, 0, 20, 20), mask(100, 0, 120, 20)


def test_perfect_masks_score_one_and_none_zero():
    assert score([(CAR, False), (OTHER, False)], [(CAR, 0.9), (OTHER, 0.1)]) == (1, 1)
    assert score([(CAR, False)], []) == (0, 0)
    assert np.isnan(score([], [(CAR, 0.9)])).all()


def test_an_overlap_must_be_above_the_threshold():
    # 200 of 400 pixels: IoU 0.5 is not above 0.5; 220 of 400 is, and not above 0.55.
    assert score([(CAR, False)], [(mask(0, 0, 20, 10), 0.9)]) == (0, 0)
    assert score([(CAR, False)], [(mask(0, 0, 20, 11), 0.9)])[1] == 1
    assert score([(CAR, False)], [(mask(0, 0, 20, 11), 0.9)])[0] == pytest.approx(0.1)


def test_of_several_detections_of_an_object_the_best_counts_and_the_others_are_wrong():
    # By score: right, wrong. The line through (recall, precision) = (0, 1), (1, 1), (1, 1/2) encloses 1.
    assert score([(CAR, False)], [(CAR, 0.9), (CAR, 0.8)])[1] == 1
    # Wrong before right: (0, 1), (0, 0), (1, 1/2).
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.8)])[1] == pytest.approx(0.25)
    # Equal scores are one point: (0, 1), (1, 1/2).
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.9)])[1] == pytest.approx(0.75)


def test_what_lies_on_groups_void_or_small_objects_is_not_wrong():
    wrong = pytest.approx(0.25)
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.8)])[1] == wrong
    assert score([(CAR, False), (OTHER, True)], [(OTHER, 0.9), (CAR, 0.8)]) == (1, 1)
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.8)], void=OTHER) == (1, 1)
    small = mask(100, 0, 109, 11)  # 99 pixels
    assert score([(CAR, False), (small, False)], [(small, 0.9), (CAR, 0.8)]) == (1, 1)
    assert score([(CAR, False), (mask(100, 0, 110, 10), False)], [(CAR, 0.8)])[1] == pytest.approx(0.5)  # 100 count
    # The ignored share must be above the threshold: 60 % is so at 0.5 and 0.55 alone.
    void = mask(100, 0, 120, 12)
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.8)], void=void)[1] == 1
    assert score([(CAR, False)], [(OTHER, 0.9), (CAR, 0.8)], void=void)[0] == pytest.approx((2 * 1 + 8 * 0.25) / 10)
    # A group does not ask to be found, whoever finds it.
    assert np.isnan(score([(OTHER, True)], [(OTHER, 0.9)])).all()


def test_masks_are_needed_and_files_are_named(tmp_path):
    content = read_cityscapes_content(FOLDER, "val")
    image = content["images"][0]["id"]
    with pytest.raises(UserError, match=f"image {image}: a result has no segmentation"):
        evaluate_cityscapes(content, [{"image_id": image, "category_id": 1, "score": 1, "bbox": [0, 0, 5, 5]}])
    with pytest.raises(UserError, match=f"0 files {image}"):
        read_cityscapes_detections(tmp_path, content)
    for entry in content["images"]:
        (tmp_path / f"{entry['id']}_pred.txt").write_text("")
    (tmp_path / f"{image}_pred.txt").write_text("mask.png car 0.5\n")
    with pytest.raises(UserError, match=f"{image}_pred.txt, line 1: not 'mask.png label score'"):
        read_cityscapes_detections(tmp_path, content)
    (tmp_path / f"{image}_pred.txt").write_text("mask.png 26 0.5\n")
    with pytest.raises(UserError, match="mask.png cannot be read"):
        read_cityscapes_detections(tmp_path, content)


@pytest.mark.parametrize("side", ["objects", "results"])
def test_an_image_may_hold_more_than_255_masks_of_a_class(side):
    many = [mask(x, y, x + 10, y + 11) for y in range(0, 60, 12) for x in range(0, 200, 11)][:90] * 3
    assert len(many) > 255
    if side == "objects":  # copies on one place: a single detection finds its three
        ap, _ = score([(m, False) for m in many], [(many[0], 0.9)])
        assert 0 < ap < 0.1
    else:
        assert score([(many[0], False)], [(m, 0.9 - 0.001 * k) for k, m in enumerate(many)]) == (1, 1)


def test_run_lengths_of_a_part_equal_those_of_the_whole_image():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 12, 2)
        top, left = rng.integers(0, height), rng.integers(0, width)
        part = rng.random((rng.integers(1, height - top + 1), rng.integers(1, width - left + 1))) < 0.7
        whole = np.zeros((height, width), np.uint8, order="F")
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        expected = mask_utils.encode(whole)
        assert encode_part(part, left, top, height, width)["counts"] == expected["counts"].decode()
