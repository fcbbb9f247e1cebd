"""The numbers of a report: matching and AP against COCOeval, the bootstrap against its definition, curves against
scikit-learn's recorded numbers."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import coco_case

import report_numbers as numbers
from eval import evaluate_coco
from report import summary_of
from report_numbers import Record
from report_read import problem_of, scene_from_coco, scenes_of

DATA = Path(__file__).parent / "data"
REFERENCES = json.loads(gzip.decompress((DATA / "report/references.json.gz").read_bytes()))


def summary(content, results, kind):
    problem = problem_of("coco", "truth", content)
    weights = numbers.resample(len(content["images"]), 2)
    return summary_of(problem, scenes_of(problem, results, [kind])[kind], results, weights)[0]


@pytest.mark.parametrize("seed, ties, crowd", [(0, False, 0.05), (1, True, 0.05), (2, False, 0.4)])
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_the_summary_and_every_class_equal_cocoeval(kind, seed, ties, crowd):
    content, results = coco_case(
        seed, ties=ties, crowd=crowd, masks=kind == "segm", keypoints=17 * (kind == "keypoints")
    )
    expected = evaluate_coco(content, results, [kind], verbose=False)
    found = summary(content, results, kind)
    for name, value in found.values.items():
        assert value == pytest.approx(expected[f"{kind}/{name}"], abs=1e-12), name
    for c, category in enumerate(content["categories"]):
        ap = found.class_values["AP"][c]
        assert ap == pytest.approx(expected[f"{kind}/AP_per_class/{category['name']}"], abs=1e-12, nan_ok=True)


def test_other_numbers_of_keypoints_use_the_mean_falloff_as_the_scores_do():
    content, results = coco_case(5, keypoints=4)
    expected = evaluate_coco(content, results, ["keypoints"], verbose=False)
    assert summary(content, results, "keypoints").values["AP"] == pytest.approx(expected["keypoints/AP"], abs=1e-12)


def test_annotations_without_a_mask_are_ignored_regions_as_in_the_scores():
    content, results = coco_case(6, masks=True)
    for a in content["annotations"][::3]:
        del a["segmentation"]
    expected = evaluate_coco(content, results, ["segm"], verbose=False)
    assert summary(content, results, "segm").values["AP"] == pytest.approx(expected["segm/AP"], abs=1e-12)


def test_no_detection_is_zero_and_no_object_is_undefined():
    content, results = coco_case()
    assert summary(content, [], "bbox").values["AP"] == 0
    empty = summary({**content, "annotations": []}, results, "bbox")
    assert math.isnan(empty.values["AP"])
    assert numbers.interval(empty.values["AP"], empty.samples["AP"]) == pytest.approx((math.nan, math.nan), nan_ok=True)


# ------------------------------------------------------------------------------------------------ the bootstrap
def records_of(content, results):
    scene = scene_from_coco(content, results, "bbox")
    return scene, numbers.coco_records(scene, numbers.match_scene(scene))


def drawn(record: Record, chosen: np.ndarray) -> Record:
    """The record of a set that consists of the images `chosen`, repeated ones included."""
    rows = np.concatenate([np.flatnonzero(record.image == n) for n in chosen])
    rows = rows[np.argsort(-record.score[rows], kind="stable")]
    number = np.array([record.objects[chosen].sum()])
    hit, counted = record.hit[:, rows], record.counted[:, rows]
    return Record(np.zeros(len(rows), int), record.score[rows], hit, counted, number)


def test_a_resample_has_the_ap_of_the_set_that_it_stands_for():
    scene, records = records_of(*coco_case(7, crowd=0.3))
    weights = numbers.resample(len(scene.image_ids), 5, seed=3)
    assert (weights.sum(0) == len(scene.image_ids)).all()
    for record in records:
        found = numbers.bootstrap(record, weights)
        for b in range(5):
            chosen = np.repeat(np.arange(len(weights)), weights[:, b].astype(int))
            expected = numbers.average_precision(drawn(record, chosen))
            # Recall levels of COCOeval carry rounding, those of samples do not: 1 of 101 levels at most.
            assert found[:, b] == pytest.approx(expected, abs=1 / 101, nan_ok=True)
            assert found[:, b].mean() == pytest.approx(expected.mean(), abs=2e-3, nan_ok=True)


@pytest.mark.parametrize("measure", ["101", "area", "eleven", "trapezoid"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_images_drawn_once_each_give_the_ap_itself_and_doubling_all_changes_nothing(measure, seed):
    rng = np.random.default_rng(seed)
    count, images = int(rng.integers(1, 40)), 6
    score = np.sort(rng.random(count))[::-1]
    hit = rng.random((3, count)) < 0.5
    record = Record(rng.integers(0, images, count), score, hit, hit | (rng.random((3, count)) < 0.9),
                    np.full(images, float(count)), measure)  # fmt: skip
    once = numbers.bootstrap(record, np.ones((images, 1), np.float32))[:, 0]
    assert once == pytest.approx(numbers.average_precision(record), abs=1e-6 if measure != "101" else 1 / 101)
    twice = numbers.bootstrap(record, np.full((images, 1), 2, np.float32))[:, 0]
    assert (np.abs(twice - once) <= once * 1e-6 + 1e-6).all() or measure != "area"


def test_area_and_eleven_points_equal_the_functions_of_the_protocols():
    from utils.oid_eval import average_precision
    from utils.voc_eval import eleven_point_precision

    rng = np.random.default_rng(4)
    for _ in range(50):
        count = int(rng.integers(1, 30))
        score, hit = np.sort(rng.random(count))[::-1], rng.random(count) < 0.4
        record = Record(np.zeros(count, int), score, hit[None], np.ones((1, count), bool), np.array([10.0]))
        for measure, function in (("area", average_precision), ("eleven", eleven_point_precision)):
            expected = function(score, hit.astype(float), 10, np.zeros(count))
            assert numbers.average_precision(record._replace(measure=measure))[0] == pytest.approx(expected, abs=1e-6)


def test_the_interval_holds_the_value_and_narrows_with_more_images():
    widths = []
    for images in (30, 240):
        scene, records = records_of(*coco_case(8, images=images))
        weights = numbers.resample(images, 300)
        found = numbers.summarise({"AP": (records, slice(None))}, {}, weights)
        low, high = numbers.interval(found.values["AP"], found.samples["AP"])
        assert low < found.values["AP"] < high
        widths.append(high - low)
    assert widths[1] < 0.6 * widths[0]


def test_equal_seeds_draw_equal_samples():
    assert (numbers.resample(20, 4, 1) == numbers.resample(20, 4, 1)).all()
    assert (numbers.resample(20, 4, 1) != numbers.resample(20, 4, 2)).any()


# ------------------------------------------------------------------------------------------------ curves
def reference_record() -> Record:
    reference = REFERENCES["sklearn"]
    score, hit = np.array(reference["score"]), np.array(reference["hit"], bool)
    order = np.argsort(-score, kind="stable")
    return Record(np.zeros(len(order), int), score[order], hit[None, order], np.ones((1, len(order)), bool),
                  np.array([float(hit.sum())]))  # fmt: skip


def test_precision_and_recall_equal_scikit_learn():
    precision, recall, score = numbers.precision_recall(reference_record())
    reference = REFERENCES["sklearn"]
    assert score[::-1] == pytest.approx(reference["thresholds"])
    assert precision[::-1] == pytest.approx(reference["precision"][:-1])
    assert recall[::-1] == pytest.approx(reference["recall"][:-1])


def test_calibration_equals_scikit_learn():
    found = numbers.calibration(reference_record())
    filled = [b for b in found["bins"] if b["count"]]
    assert [b["score"] for b in filled] == pytest.approx(REFERENCES["sklearn"]["mean_score"])
    assert [b["right"] for b in filled] == pytest.approx(REFERENCES["sklearn"]["right"])
    gaps = [abs(b["score"] - b["right"]) * b["count"] for b in filled]
    assert found["error"] == pytest.approx(sum(gaps) / 400)


def test_the_best_f1_is_the_best_of_all_thresholds():
    record = reference_record()
    best = numbers.best_f1(record)
    table = numbers.threshold_table(record, np.unique(record.score))
    assert best["f1"] == pytest.approx(max(row["f1"] for row in table))
    row = next(r for r in table if r["threshold"] == best["threshold"])
    assert (row["precision"], row["recall"]) == pytest.approx((best["precision"], best["recall"]))


def test_score_counts_are_those_of_counting():
    record = reference_record()
    right, wrong = numbers.score_counts(record, np.array([0.0, 0.25, 0.9, 1.0]))
    for level, r, w in zip([0.0, 0.25, 0.9, 1.0], right, wrong):
        above = record.score >= level
        assert (r, w) == ((record.hit[0] & above).sum(), (~record.hit[0] & above).sum())
