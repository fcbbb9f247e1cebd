"""VOC and LVIS scores against the published definition written as loops, and against the lvis package's numbers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from utils.lvis_eval import evaluate_lvis
from utils.oid_eval import DetectionTable, Truth
from utils.voc_eval import evaluate_voc

LVIS = Path(__file__).parent / "data/lvis_mini"


def devkit_ap(boxes, image, difficult, det_boxes, det_image, scores, eleven_points) -> float | None:
    """The development kit's procedure on inclusive pixels: detections by confidence, each against its best object."""
    taken = np.zeros(len(boxes), bool)
    true, false = [], []
    for d in np.argsort(-scores):
        best, at = -np.inf, -1
        for g in np.flatnonzero(image == det_image[d]):
            x1, y1 = np.maximum(det_boxes[d, :2], boxes[g, :2])
            x2, y2 = np.minimum(det_boxes[d, 2:], boxes[g, 2:])
            if x2 - x1 + 1 > 0 and y2 - y1 + 1 > 0:
                areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (det_boxes[d], boxes[g])]
                inter = (x2 - x1 + 1) * (y2 - y1 + 1)
                if inter / (sum(areas) - inter) > best:
                    best, at = inter / (sum(areas) - inter), g
        hit = miss = 0
        if best >= 0.5:
            if not difficult[at]:
                hit, miss = (0, 1) if taken[at] else (1, 0)
                taken[at] = True
        else:
            miss = 1
        true.append(hit)
        false.append(miss)
    number = (~difficult).sum()
    if not number:
        return None
    true, false = np.cumsum(true), np.cumsum(false)
    recall, precision = true / number, true / np.maximum(true + false, 1e-12)
    if eleven_points:
        levels = np.arange(0, 1.1, 0.1)
        return float(np.mean([max(precision[recall >= t], default=0.0) for t in levels]))
    recall, precision = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return float(sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall))))


@pytest.mark.quick
@pytest.mark.parametrize("eleven_points", [False, True])
def test_voc_scores_equal_the_development_kit_on_random_sets(eleven_points):
    rng = np.random.default_rng(1)
    for _ in range(30):
        number, count, images = int(rng.integers(1, 40)), int(rng.integers(1, 80)), 8

        def pixels(n):
            corner = rng.integers(1, 12, (n, 2))
            return np.concatenate([corner, corner + rng.integers(3, 9, (n, 2))], 1).astype(float)

        boxes, det_boxes = pixels(number), pixels(count)
        image, det_image = rng.integers(0, images, number), rng.integers(0, images, count)
        difficult, scores = rng.random(number) < 0.2, rng.permutation(count) / count
        zero = np.zeros(0, np.int32)
        continuous = np.array([-1, -1, 0, 0])
        truth = Truth(
            ["a"], ["A"], np.array([b"%d" % i for i in range(images)]), image.astype(np.int32),
            np.zeros(number, np.int32), boxes + continuous, difficult, zero, zero, np.zeros(0, bool),
        )  # fmt: skip
        found = evaluate_voc(
            truth,
            DetectionTable(det_image.astype(np.int32), np.zeros(count, np.int32), scores, det_boxes + continuous),
            eleven_points,
        )["per_class_AP"]["a"]
        expected = devkit_ap(boxes, image, difficult, det_boxes, det_image, scores, eleven_points)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def lvis_files() -> tuple[dict, list, dict]:
    return tuple(json.loads((LVIS / f"{n}.json").read_text()) for n in ("lvis_v1_mini", "results", "expected"))


@pytest.mark.quick
@pytest.mark.parametrize("metric", ["bbox-300", "bbox-12", "segm-300", "segm-12"])
def test_lvis_scores_equal_the_lvis_package(metric):
    content, results, expected = lvis_files()
    kind, limit = metric.split("-")
    scores = evaluate_lvis(content, results, kind, int(limit))
    per_class = expected[metric].pop("per_class")
    for name, value in {**expected[metric], **{f"AP_per_class/{n}": v for n, v in per_class.items()}}.items():
        if value == -1:
            assert math.isnan(scores[name])
        else:
            assert scores[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.quick
def test_lvis_needs_its_image_keys():
    content, results, _ = lvis_files()
    del content["images"][3]["neg_category_ids"]
    with pytest.raises(UserError, match="image 103 has no neg_category_ids"):
        evaluate_lvis(content, results)


@pytest.mark.quick
def test_lvis_without_detections_scores_zero():
    content, _, _ = lvis_files()
    scores = evaluate_lvis(content, [])
    assert scores["AP"] == 0.0 and scores["AR"] == 0.0 and math.isnan(scores["APl"])
