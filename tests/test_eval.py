"""Results files, and scores against plain pycocotools."""

import contextlib
import copy
import io
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detections
import eval as scoring
from common import UserError
from utils import polygons

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("PACKRCNN_SHARED", HERE.parent.parent / "shared"))


@pytest.fixture
def logged():
    """What the project's logger writes during the test."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    scoring.logger.addHandler(handler)
    yield stream
    scoring.logger.removeHandler(handler)


# ------------------------------------------------------------------------------------------ pasting
GOOD_RLE = {"size": [10, 12], "counts": [50, 20, 50]}


@pytest.mark.quick
@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_id": 7}, "image_id 7 is not in the annotation file"),
        ({"image_id": [1]}, "image_id"),
        ({"category_id": "cat"}, "category_id 'cat'"),
        ({"score": None}, "score None is not a finite number"),
        ({"score": float("nan")}, "score nan"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": [1, 2, -3, 4]}, "bbox"),
        ({"bbox": [1, 2, "three", 4]}, "bbox"),
        ({"bbox": {"x": 1}}, "bbox"),
        ({"keypoints": [1, 2]}, "keypoints"),
        ({"segmentation": [[1, 2, 3, 4]]}, "polygon"),
        ({"segmentation": {"size": [12, 10], "counts": [50, 20, 50]}}, "size"),
        ({"segmentation": {"size": [10, 12], "counts": [50, 20, 51]}}, "do not add up"),
        ({"segmentation": {"size": [10, 12], "counts": [50, 90, -20]}}, "counts"),
        ({"segmentation": {"size": [10, 12], "counts": "b1d0"}}, "do not add up"),
        ({"segmentation": {"size": [10, 12], "counts": "b1d0P"}}, "broken"),
        ({"segmentation": {"size": [10, 12], "counts": "\u00e9"}}, "broken"),
        ({"segmentation": {"size": [10, 12]}}, "size [height, width] and counts"),
        ({"segmentation": "b1d0"}, "segmentation must be"),
    ],
)
def test_an_invalid_results_entry_is_named(tmp_path, change, message):
    good = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [1, 2, 3, 4], "segmentation": GOOD_RLE}
    truth = {"images": [{"id": 1, "height": 10, "width": 12}], "categories": [{"id": 3}]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([good, {**good, **change}]))
    with pytest.raises(UserError, match="mine.json: entry 1: ") as error:
        scoring.read_results(path, truth)
    assert message in str(error.value) and "\n" not in str(error.value)
    path.write_text(json.dumps([good]))
    assert scoring.read_results(path, truth) == [good]


@pytest.mark.quick
@pytest.mark.parametrize(
    "content, message", [("{}", "list"), ("[1]", "entry 0"), ("[{}]", "no image_id"), ("[", "JSON")]
)
def test_a_file_that_holds_no_results_is_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"mine.json.*{message}"):
        scoring.read_results(path, {"images": [], "categories": []})


# ------------------------------------------------------------------------------------------ scores
def polygon(rng, cx, cy, radius):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    r = radius * rng.uniform(0.6, 1, 9)
    return np.stack([cx + r * np.cos(angles), cy + r * np.sin(angles)], 1).clip(0, 200).ravel().round(2).tolist()


def make_dataset(seed=0, category_ids=(1, 2, 3, 5, 8), images=12):
    """Random polygons of all sizes, some crowds, and noisy detections of most of them with class confusion."""
    rng = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 100 + i, "height": 200, "width": 200} for i in range(images)],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [],
    }
    results = []
    for image in truth["images"]:
        for _ in range(rng.integers(1, 12)):
            cx, cy, radius = *rng.uniform(20, 180, 2), np.exp(rng.uniform(np.log(6), np.log(100)))
            parts = [polygon(rng, cx, cy, radius)] + [polygon(rng, cx + 9, cy, radius / 2)] * int(rng.integers(2))
            rle = coco_mask.merge(coco_mask.frPyObjects(parts, 200, 200))
            crowd = int(rng.random() < 0.1)
            if crowd:
                runs = polygons.decode_runs(rle["counts"].decode())
                parts = {"size": [200, 200], "counts": runs.tolist()}
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids)),
                    "segmentation": parts,
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "area": float(coco_mask.area(rle)),
                    "iscrowd": crowd,
                }
            )
            for _ in range(int(rng.integers(0, 4))):
                shift, grow = rng.normal(0, radius / 8, 2), np.exp(rng.normal(0, 0.1))
                found = coco_mask.frPyObjects([polygon(rng, *(np.array([cx, cy]) + shift), radius * grow)], 200, 200)[0]
                found["counts"] = found["counts"].decode()
                category = truth["annotations"][-1]["category_id"]
                results.append(
                    {
                        "image_id": image["id"],
                        "category_id": category if rng.random() < 0.8 else int(rng.choice(category_ids)),
                        "bbox": coco_mask.toBbox(found).tolist(),
                        "segmentation": found,
                        "score": round(rng.random(), 2),  # ties on purpose
                    }
                )
    return truth, results


def plain_scores(truth, results, iou_type):
    """pycocotools as its own demo uses it."""
    results = copy.deepcopy(results)
    if iou_type == "segm":
        for entry in results:
            del entry["bbox"]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(results), iou_type)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer


def same(metrics, plain, iou_type, names=scoring.SUMMARY):
    got = np.array([metrics[f"{iou_type}/{name}"] for name in names])
    np.testing.assert_array_equal(np.where(np.isnan(got), -1, got), plain.stats)


@pytest.mark.quick
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_plain_pycocotools_to_the_digit(seed, capfd):
    truth, results = make_dataset(seed)
    untouched = copy.deepcopy((truth, results))
    metrics = scoring.evaluate_coco(truth, results, verbose=False)
    assert (truth, results) == untouched
    for iou_type in ("bbox", "segm"):
        plain = plain_scores(truth, results, iou_type)
        same(metrics, plain, iou_type)
        for k, category in enumerate(truth["categories"]):
            precision = plain.eval["precision"][:, :, k, 0, -1]
            assert metrics[f"{iou_type}/AP_per_class/{category['name']}"] == np.mean(precision)
            assert metrics[f"{iou_type}/AP50_per_class/{category['name']}"] == np.mean(precision[0])
    assert 0.05 < metrics["segm/AP"] < metrics["bbox/AP50"] < 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.quick
@pytest.mark.parametrize("category_ids", [range(13), range(30), range(1, 81), range(80), [0, 7, 90, 3000]])
def test_any_category_ids_give_the_same_scores_under_their_own_names(category_ids):
    category_ids = list(category_ids)
    truth, results = make_dataset(3, category_ids, images=8)
    for category in truth["categories"]:
        category["name"] = f"kind {category['id']} of {len(category_ids)}"
    metrics = scoring.evaluate_coco(truth, results, ["bbox"], verbose=False)
    plain = plain_scores(truth, results, "bbox")
    same(metrics, plain, "bbox")
    for k, category in enumerate(category_ids):
        precision = plain.eval["precision"][:, :, k, 0, -1]
        got = metrics[f"bbox/AP_per_class/kind {category} of {len(category_ids)}"]
        assert got == np.mean(precision) if (precision > -1).all() else math.isnan(got)


@pytest.mark.quick
def test_ids_of_any_kind_give_the_same_scores():
    truth, results = make_dataset(4)
    wanted = scoring.evaluate_coco(truth, results, verbose=False)
    for rename in (lambda i: i - 100, str, lambda i: f"{i}.jpg"):
        renamed, found = copy.deepcopy((truth, results))
        for n, annotation in enumerate(renamed["annotations"]):
            annotation["id"] = n // 2  # from 0, and every id twice
        for entry in renamed["annotations"] + found:
            entry["image_id"] = rename(entry["image_id"])
        for image in renamed["images"]:
            image["id"] = rename(image["id"])
        assert scoring.evaluate_coco(renamed, found, verbose=False) == wanted


@pytest.mark.quick
def test_area_crowd_flag_and_box_are_filled_in():
    truth, results = make_dataset(5)
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    wanted = scoring.evaluate_coco(truth, results, verbose=False)
    for key in ("area", "iscrowd", "bbox"):
        for annotation in truth["annotations"]:
            del annotation[key]
        assert scoring.evaluate_coco(truth, results, verbose=False) == wanted


@pytest.mark.quick
def test_boxes_alone_are_scored_by_their_own_area():
    truth, results = make_dataset(6)
    for annotation in truth["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    wanted = plain_scores(truth, results, "bbox")
    for entry in truth["annotations"] + results:
        entry.pop("segmentation")
        entry.pop("area", None)
    metrics = scoring.evaluate_coco(truth, results, verbose=False)
    same(metrics, wanted, "bbox")
    assert not any(key.startswith("segm") for key in metrics)


@pytest.mark.quick
def test_uncompressed_masks_score_like_compressed_ones():
    truth, results = make_dataset(7)
    wanted = scoring.evaluate_coco(truth, results, ["segm"], verbose=False)
    for entry in results:
        entry["segmentation"]["counts"] = polygons.decode_runs(entry["segmentation"]["counts"]).tolist()
    for entry in truth["annotations"]:
        if isinstance(entry["segmentation"], list):
            entry["segmentation"] = coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], 200, 200))
            entry["segmentation"]["counts"] = entry["segmentation"]["counts"].decode()
    assert scoring.evaluate_coco(truth, results, ["segm"], verbose=False) == wanted


@pytest.mark.quick
def test_no_detection_scores_zero_and_a_class_without_objects_is_undefined():
    truth, _ = make_dataset(8)
    truth["categories"].append({"id": 77, "name": "absent"})
    metrics = scoring.evaluate_coco(truth, [], verbose=False)
    for iou_type in ("bbox", "segm"):
        assert [metrics[f"{iou_type}/{name}"] for name in scoring.SUMMARY] == [0.0] * 12
        assert metrics[f"{iou_type}/AP_per_class/class 1"] == 0
        assert math.isnan(metrics[f"{iou_type}/AP_per_class/absent"])


@pytest.mark.quick
def test_without_ground_truth_scores_are_undefined_and_said_to_be(logged):
    truth, results = make_dataset(9)
    del truth["annotations"]
    metrics = scoring.evaluate_coco(truth, results, verbose=False)
    assert all(math.isnan(v) for v in metrics.values())
    assert "no annotated object" in logged.getvalue()


@pytest.mark.quick
def test_a_perfect_result_scores_one():
    truth, _ = make_dataset(10)
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    results = []
    for a in truth["annotations"]:
        entry = {key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")}
        results.append({**entry, "score": 0.5})
    metrics = scoring.evaluate_coco(truth, results, verbose=False)
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(1)


@pytest.mark.quick
def test_scoring_some_images_equals_a_file_of_these_images():
    truth, results = make_dataset(11)
    ids = [image["id"] for image in truth["images"]][2:7]
    metrics = scoring.evaluate_coco(truth, results, image_ids=ids, verbose=False)
    smaller = {**truth, "images": [i for i in truth["images"] if i["id"] in ids]}
    kept = [r for r in results if r["image_id"] in ids]
    smaller["annotations"] = [a for a in truth["annotations"] if a["image_id"] in ids]
    same(metrics, plain_scores(smaller, kept, "bbox"), "bbox")


@pytest.mark.quick
def test_detections_at_objects_without_mask_are_ignored():
    truth, results = make_dataset(12)
    truth["annotations"] = [a for a in truth["annotations"] if not a["iscrowd"]]
    wanted = copy.deepcopy(truth)
    for n in range(0, len(truth["annotations"]), 3):
        truth["annotations"][n]["segmentation"] = []
        x, y, w, h = wanted["annotations"][n]["bbox"]
        wanted["annotations"][n].update(iscrowd=1, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])
    metrics = scoring.evaluate_coco(truth, results, ["segm"], verbose=False)
    assert metrics == scoring.evaluate_coco(wanted, results, ["segm"], verbose=False)


@pytest.mark.quick
def test_broken_annotations_are_counted_and_the_others_scored(logged):
    truth, results = make_dataset(17)
    wanted = scoring.evaluate_coco(truth, results, verbose=False)
    usable = truth["annotations"][0]
    truth["annotations"] += [
        "not an annotation",
        {key: value for key, value in usable.items() if key != "category_id"},
        {**usable, "category_id": 12345},
        {**usable, "bbox": [1, 2, 3]},
        {**usable, "bbox": None, "segmentation": None},
        {**usable, "bbox": None, "segmentation": {"size": [200, 200], "counts": "broken"}},
    ]
    assert scoring.evaluate_coco(truth, results, verbose=False) == wanted
    for reason in (
        "2 × entry is not an object with image_id and category_id", "1 × category id is not in the file",
        "1 × box is not four numbers", "1 × neither a box nor an outline", "1 × outline is neither polygons nor RLE",
    ):  # fmt: skip
        assert reason in logged.getvalue()


@pytest.mark.quick
def test_results_keep_keypoints_in_pixel_numbers_and_leave_unknown_classes_out_of_the_file(tmp_path, logged):
    points = np.array([[[10.5, 20.5, 0.25]], [[1, 2, 3]]], np.float32)
    found = detections.Detections(np.ones((2, 4)), np.float32([0.5, 0.25]), np.int32([1, 2]), None, points)
    entries = detections.coco_results(found, "x", {1: 0, 2: None}.get)
    assert [e["category_id"] for e in entries] == [0, None]
    assert entries[0]["keypoints"] == [10.0, 20.0, 0.25]
    scoring.write_results(tmp_path / "r.json", entries)
    assert json.loads((tmp_path / "r.json").read_text()) == entries[:1]
    assert "without 1 detections" in logged.getvalue()


@pytest.mark.quick
@pytest.mark.parametrize("points", [17, 5])
def test_keypoint_scores_equal_plain_pycocotools(points):
    rng = np.random.default_rng(0)
    truth, _ = make_dataset(13, category_ids=(1,))
    results = []
    for a in truth["annotations"]:
        x, y, w, h = a["bbox"]
        xy = rng.uniform([x, y], [x + w, y + h], (points, 2))
        seen = rng.integers(0, 3, (points, 1)) * (rng.random() > 0.2)
        a["keypoints"] = np.concatenate([xy * (seen > 0), seen], 1).ravel().round(2).tolist()
        a["num_keypoints"] = int((seen > 0).sum())
        for _ in range(2):
            moved = xy + rng.normal(0, 0.06, (points, 2)) * [w, h]
            row = np.concatenate([moved, np.ones((points, 1))], 1).ravel().round(2).tolist()
            results.append({"image_id": a["image_id"], "category_id": 1, "score": rng.random(), "keypoints": row})
    metrics = scoring.evaluate_coco(truth, results, ["keypoints"], verbose=False)
    assert 0 < metrics["keypoints/AP"] < 1
    if points == 17:
        same(metrics, plain_scores(truth, results, "keypoints"), "keypoints", scoring.KEYPOINT_SUMMARY)
    for a in truth["annotations"]:
        del a["num_keypoints"]
    assert scoring.evaluate_coco(truth, results, ["keypoints"], verbose=False) == metrics


@pytest.mark.quick
def test_results_of_unknown_images_or_classes_are_errors():
    truth, results = make_dataset(14)
    with pytest.raises(UserError, match="entry 2: image_id 7 "):
        scoring.evaluate_coco(truth, results[:2] + [{**results[0], "image_id": 7}])
    with pytest.raises(UserError, match="entry 0: category_id 99 "):
        scoring.evaluate_coco(truth, [{**results[0], "category_id": 99}])
    with pytest.raises(UserError, match="entry 1 has no segmentation"):
        scoring.evaluate_coco(truth, [results[0], {k: v for k, v in results[1].items() if k != "segmentation"}])


@pytest.mark.quick
def test_the_summary_is_logged_once_and_shows_every_class(logged):
    truth, results = make_dataset(15)
    truth["categories"] += [{"id": 70, "name": "class 1"}, {"id": 71, "name": "caf\u00e9"}]
    metrics = scoring.evaluate_coco(truth, results)
    assert logged.getvalue().count("AR100") == 1
    for name in ("class 1 (1)", "class 1 (70)", "class 2", "caf\u00e9"):
        assert name in logged.getvalue()
    assert f"{metrics['segm/AP75']:.3f}" in scoring.format_scores(metrics)
    row = next(line for line in logged.getvalue().splitlines() if line.startswith("caf\u00e9"))
    assert row.split()[1:] == ["0"] + ["-"] * 6


@pytest.mark.quick
def test_of_hundreds_of_classes_only_those_with_objects_are_shown(logged):
    truth = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": i, "name": f"thing {i}"} for i in range(1, 102)],
    }
    metrics = scoring.evaluate_coco(truth, [])
    text = logged.getvalue()
    assert "(100 without an object are not shown)" in text and "thing 7 " in text and "thing 8" not in text
    assert math.isnan(metrics["bbox/AP_per_class/thing 8"]) and metrics["bbox/AP_per_class/thing 7"] == 0


@pytest.mark.quick
def test_an_annotation_file_is_read_by_path(tmp_path):
    truth, results = make_dataset(16)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(truth))
    wanted = scoring.evaluate_coco(truth, results, verbose=False)
    assert scoring.evaluate_coco(path, results, verbose=False) == wanted
    path.write_text("[]")
    with pytest.raises(UserError, match="truth.json is not in COCO's format"):
        scoring.evaluate_coco(path, results)
