"""Kinds of mistakes and their costs: tidecv's recorded numbers, and definitions written out."""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_utils
from synthetic import coco_case

import report_errors as errors
from report_read import problem_of, scene_from_coco

DATA = Path(__file__).parent / "data"
REFERENCES = json.loads(gzip.decompress((DATA / "report/references.json.gz").read_bytes()))
NAMES = {"Cls": "class", "Loc": "localisation", "Both": "both", "Dupe": "duplicate", "Bkg": "background",
         "Miss": "missed"}  # fmt: skip


@pytest.mark.parametrize("case", list(REFERENCES["cases"]))
def test_counts_and_costs_equal_tidecv(case):
    given = REFERENCES["cases"][case]
    kind = "segm" if given["mode"] == "mask" else "bbox"
    scene = scene_from_coco(given["truth"], given["results"], kind)
    found, expected = errors.split_errors(scene, errors.judge(scene)), REFERENCES["tidecv"][case]
    assert 100 * found["ap50"] == pytest.approx(expected["ap"])
    for theirs, ours in NAMES.items():
        assert 100 * found["cost"][ours] == pytest.approx(expected["main"][theirs]), ours
        assert found["count"][ours] == expected["count"][theirs], ours
    assert 100 * found["cost"]["false positive"] == pytest.approx(expected["special"]["FalsePos"])
    assert 100 * found["cost"]["false negative"] == pytest.approx(expected["special"]["FalseNeg"])


def small_scene(objects, detections, **more):
    """Objects (label, box x1 y1 x2 y2, crowd), detections (label, box, score) in one image of 100 x 100."""

    def wide(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    content = {
        "images": [{"id": 1, "height": 100, "width": 100, "file_name": "a.jpg"}],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(3)],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": c, "bbox": wide(b), "iscrowd": int(crowd), **more}
            for n, (c, b, crowd) in enumerate(objects)
        ],
    }
    results = [{"image_id": 1, "category_id": c, "bbox": wide(b), "score": s} for c, b, s in detections]
    return scene_from_coco(content, results, "bbox")


def test_each_kind_of_mistake_is_named():
    a, b, crowd = [0, 0, 20, 20], [50, 50, 80, 80], [0, 60, 40, 100]
    scene = small_scene(
        [(0, a, False), (1, b, False), (2, crowd, True)],
        [(0, a, 0.9), (0, [0, 0, 20, 19], 0.8), (1, [50, 50, 60, 80], 0.7), (2, b, 0.6), (2, [50, 50, 60, 80], 0.5),
         (0, [30, 0, 45, 10], 0.4), (2, [10, 70, 20, 90], 0.3)],
    )  # fmt: skip
    verdicts = errors.judge(scene)
    kinds = [errors.KINDS[k] for k in verdicts.kind]
    assert kinds == ["right", "duplicate", "localisation", "class", "both", "background", "ignored"]
    assert verdicts.found_by.tolist() == [0, -1, -1]
    assert verdicts.missed.tolist() == [False, False, False]  # b is nearly found, the crowd need not be


def test_the_cost_of_a_wrong_detection_is_what_its_removal_wins():
    content, results = coco_case(11, images=12, classes=3, crowd=0)
    scene = scene_from_coco(content, results, "bbox")
    verdicts = errors.judge(scene)
    of_detection, of_object = errors.cost_of_mistakes(scene, verdicts)
    numbers = np.bincount(scene.gt_label, minlength=len(scene.class_names))
    there = (numbers > 0).sum()

    def area(keep):
        """Sum of precision at the finds / objects: AP without an envelope, mean over classes."""
        total = 0.0
        for c in np.flatnonzero(numbers):
            rows = np.flatnonzero((scene.dt_label == c) & keep)
            rows = rows[np.argsort(-scene.dt_score[rows], kind="stable")]
            right = verdicts.kind[rows] == errors.RIGHT
            total += (np.cumsum(right) / np.arange(1, len(rows) + 1))[right].sum() / numbers[c]
        return total / there

    everything = np.ones(len(scene.dt_image), bool)
    base = area(everything)
    wrong = np.flatnonzero(verdicts.kind >= errors.CLASS)
    assert len(wrong) > 20
    for d in wrong:
        keep = everything.copy()
        keep[d] = False
        assert of_detection[d] == pytest.approx(area(keep) - base, abs=1e-12)
    assert (of_detection[verdicts.kind == errors.RIGHT] == 0).all()
    missed = verdicts.found_by < 0
    assert of_object[missed] == pytest.approx(1 / numbers[scene.gt_label[missed]] / there)
    assert errors.lost_by_image(scene, (of_detection, of_object)).sum() == pytest.approx(
        of_detection.sum() + of_object.sum()
    )


def test_the_confusion_matrix_counts_every_object_once_and_every_shown_detection_once():
    content, results = coco_case(12, crowd=0.1)
    scene = scene_from_coco(content, results, "bbox")
    verdicts = errors.judge(scene)
    matrix = errors.confusion_matrix(scene, verdicts, 0.4)
    real = np.bincount(scene.gt_label[~scene.gt_ignore], minlength=len(scene.class_names))
    assert matrix[:-1].sum(1).tolist() == real.tolist()
    shown = (scene.dt_score >= 0.4) & (verdicts.kind != errors.IGNORED)
    assert matrix[:, :-1].sum(0).tolist() == np.bincount(scene.dt_label[shown], minlength=len(real)).tolist()
    assert matrix[-1, -1] == 0


def test_the_confusion_matrix_of_paired_labels_equals_scikit_learn():
    pairs = REFERENCES["sklearn"]["pairs"]
    content = {
        "images": [{"id": n, "height": 50, "width": 50, "file_name": "x"} for n in range(len(pairs))],
        "categories": [{"id": c, "name": str(c)} for c in range(4)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": a, "bbox": [0, 0, 9, 9]} for n, (a, _) in enumerate(pairs)
        ],
    }
    results = [{"image_id": n, "category_id": b, "bbox": [0, 0, 9, 9], "score": 0.5} for n, (_, b) in enumerate(pairs)]
    scene = scene_from_coco(content, results, "bbox")
    matrix = errors.confusion_matrix(scene, errors.judge(scene), 0.1)
    assert matrix[:4, :4].tolist() == REFERENCES["sklearn"]["confusion"]
    assert matrix[4].sum() == matrix[:, 4].sum() == 0


def test_boundary_iou_is_that_of_the_pixels_near_the_outline():
    rng = np.random.default_rng(0)
    for _ in range(10):
        masks = []
        for _ in range(2):
            mask = np.zeros((90, 120), np.uint8)
            middle = (int(rng.integers(30, 90)), int(rng.integers(20, 70)))
            axes = (int(rng.integers(20, 50)), int(rng.integers(12, 30)))
            cv2.ellipse(mask, middle, axes, int(rng.integers(0, 90)), 0, 360, 1, -1)
            masks.append(mask)
        distance = round(0.02 * np.hypot(90, 120))
        rims = []
        for mask in masks:
            padded = np.pad(mask, distance)
            # Near: a pixel outside of the mask, or of the image, within a square of that half side.
            near = np.zeros(mask.shape, bool)
            for dy in range(-distance, distance + 1):
                for dx in range(-distance, distance + 1):
                    near |= padded[distance + dy : distance + dy + 90, distance + dx : distance + dx + 120] == 0
            rims.append(near & (mask > 0))
        expected = (rims[0] & rims[1]).sum() / (rims[0] | rims[1]).sum()
        runs = [mask_utils.encode(np.asfortranarray(mask)) for mask in masks]
        assert errors.boundary_iou(*runs) == pytest.approx(expected)


def test_mask_quality_of_perfect_masks_is_one_and_of_worse_ones_less():
    content, _ = coco_case(13, masks=True, images=10, crowd=0)
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.9}
               for a in content["annotations"]]  # fmt: skip
    boxes = errors.judge(scene_from_coco(content, results, "bbox"))
    perfect = errors.mask_quality(scene_from_coco(content, results, "segm"), boxes)
    assert perfect["iou"] == perfect["ap"] == perfect["boundary_iou"] == 1
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    for r in results:  # the whole box instead of the shape in it
        x, y, w, h = r["bbox"]
        run = mask_utils.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], *sizes[r["image_id"]])[0]
        r["segmentation"] = {"size": run["size"], "counts": run["counts"].decode()}
    worse = errors.mask_quality(scene_from_coco(content, results, "segm"), boxes)
    assert worse["pairs"] == perfect["pairs"] and worse["boundary_iou"] < worse["iou"] < 0.95 and worse["ap"] < 0.9


def test_points_are_good_jittered_mirrored_swapped_or_missed():
    names = ["left", "right", "middle"]
    content = {
        "images": [{"id": 1, "height": 200, "width": 400, "file_name": "a"}],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": 1, "bbox": [x, 0, 100, 100], "area": 10000, "num_keypoints": 3,
             "keypoints": [x + 10, 10, 2, x + 90, 10, 2, x + 50, 90, 2]} for n, x in enumerate((0, 200))
        ],
    }  # fmt: skip

    def counts(points):
        result = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [0, 0, 100, 100], "keypoints": points}
        problem = problem_of("coco", "x", content)
        scene = scene_from_coco(content, [result], "keypoints")
        verdicts = errors.judge(scene)._replace(kind=np.array([0], np.int8), object=np.array([0]))
        return errors.keypoint_errors(scene, verdicts, problem.flip, problem.point_names)["all"]

    assert counts([10, 10, 1, 90, 10, 1, 50, 90, 1])["good"] == 3
    assert counts([10, 24, 1, 90, 10, 1, 50, 90, 1])["jitter"] == 1
    assert counts([90, 10, 1, 10, 10, 1, 50, 90, 1])["inversion"] == 2
    assert counts([10, 10, 1, 90, 10, 1, 250, 90, 1])["swap"] == 1
    assert counts([10, 10, 1, 90, 10, 1, 150, 190, 1])["miss"] == 1
