"""Open Images metrics against the reference evaluator's numbers (tests/data/golden_oid) and against plain loops."""

import json
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from utils import oid_eval
from utils.oid_eval import DetectionTable, Truth, evaluate, read_detections, read_truth
from utils.oid_format import decode_mask, encode_mask, find_files, read_ancestors, read_classes, read_columns

GOLDEN = Path(__file__).parent / "data/golden_oid"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())

METRICS = {
    "v2_detection": ("v2", "detections.csv", False),
    "challenge_detection": ("challenge", "detections.csv", True),
    "challenge_detection_raw_detections": ("challenge", "detections.csv", False),
    "challenge_segmentation": ("challenge-segm", "detections_segm.csv", True),
    "challenge_segmentation_raw_detections": ("challenge-segm", "detections_segm.csv", False),
}


@pytest.fixture(scope="module")
def truth() -> Truth:
    return read_truth(GOLDEN, "validation", with_masks=True)


def take(detections: DetectionTable, rows: np.ndarray) -> DetectionTable:
    masks = detections.masks
    if masks is not None:
        masks = oid_eval.Masks([masks.counts[i] for i in rows], masks.sizes[rows])
    return DetectionTable(*(column[rows] for column in detections[:4]), masks)


@pytest.mark.quick
@pytest.mark.parametrize("metric", METRICS)
def test_every_class_equals_the_reference_evaluator(truth, metric):
    protocol, file, expand = METRICS[metric]
    result = evaluate(truth, read_detections(GOLDEN / file, truth), protocol, expand)
    expected = EXPECTED["results"][metric]
    assert result["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
    assert result["per_class_AP"].keys() == expected["per_class_AP"].keys()
    for label, ap in expected["per_class_AP"].items():
        assert result["per_class_AP"][label] == (None if ap is None else pytest.approx(ap, abs=1e-9)), label
    for count in ("num_gt", "num_scored_detections", "num_true_positives"):
        assert result[count] == expected[count]


@pytest.mark.quick
def test_expanded_detections_file_equals_expansion_by_the_evaluator(truth):
    by_file = evaluate(truth, read_detections(GOLDEN / "expected/detections_expanded.csv", truth), "challenge")
    by_option = evaluate(truth, read_detections(GOLDEN / "detections.csv", truth), "challenge", True)
    assert by_file == by_option


@pytest.mark.quick
@pytest.mark.parametrize("metric", [*METRICS, "ties"])
def test_order_of_detections_does_not_change_the_result(truth, metric):
    protocol, file, expand = METRICS.get(metric, ("challenge", "detections_ties.csv", True))
    detections = read_detections(GOLDEN / file, truth)
    shuffled = take(detections, np.random.default_rng(3).permutation(len(detections.image)))
    assert evaluate(truth, shuffled, protocol, expand) == evaluate(truth, detections, protocol, expand)


@pytest.mark.quick
@pytest.mark.parametrize("metric", ["v2_detection", "challenge_detection"])
def test_tied_scores_give_a_result_the_reference_can_give(truth, metric):
    protocol, _, expand = METRICS[metric]
    result = evaluate(truth, read_detections(GOLDEN / "detections_ties.csv", truth), protocol, expand)
    expected = EXPECTED["ties"]["results"][metric]
    low, high = expected["mAP_range_over_orders"]
    assert low <= result["mAP"] <= high
    for label, bounds in expected["per_class_AP_range_over_orders"].items():
        if bounds is not None:
            assert bounds[0] - 1e-9 <= result["per_class_AP"][label] <= bounds[1] + 1e-9, label


@pytest.mark.quick
def test_ancestors_follow_subcategories_of_every_parent_and_no_parts():
    labels, names = read_classes(GOLDEN / "class-descriptions-boxable.csv")
    assert dict(zip(labels, names)) == EXPECTED["classes"]
    ancestors = read_ancestors(GOLDEN / "bbox_labels_hierarchy.json", labels)
    found = {label: sorted(np.array(labels)[row]) for label, row in zip(labels, ancestors)}
    assert found == {label: sorted(above) for label, above in EXPECTED["ancestors"].items()}


@pytest.mark.quick
def test_class_list_may_have_a_header(tmp_path):
    text = (GOLDEN / "class-descriptions-boxable.csv").read_text()
    (tmp_path / "classes.csv").write_text("LabelName,DisplayName\n" + text)
    assert read_classes(tmp_path / "classes.csv") == read_classes(GOLDEN / "class-descriptions-boxable.csv")


@pytest.mark.quick
def test_class_missing_in_the_hierarchy_is_an_error():
    with pytest.raises(UserError, match="1 of the classes are missing from class hierarchy .*, e.g. /m/zzz"):
        read_ancestors(GOLDEN / "bbox_labels_hierarchy.json", ["/m/0jbk", "/m/zzz"])


def one_class(boxes, group, det_boxes, scores) -> dict:
    """V2 and challenge weights on one image and one class whose detections and objects are given in pixels."""
    number, count = len(boxes), len(det_boxes)
    zero = np.zeros(0, np.int32)
    truth = Truth(
        ["a"], ["A"], np.array([b"x"]), np.zeros(number, np.int32), np.zeros(number, np.int32),
        np.array(boxes, float).reshape(-1, 4), np.array(group, bool), zero, zero, np.zeros(0, bool),
        None, np.zeros((1, 1), bool),
    )  # fmt: skip
    detections = DetectionTable(
        np.zeros(count, np.int32), np.zeros(count, np.int32), np.array(scores, float), np.array(det_boxes, float)
    )
    return {p: evaluate(truth, detections, p)["per_class_AP"]["a"] for p in ("v2", "challenge")}


@pytest.mark.quick
def test_detections_inside_a_group_are_one_hit_or_none():
    group = [0, 0, 100, 100]
    inside = [[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]]
    assert one_class([group], [True], inside, [0.9, 0.8, 0.7]) == {"v2": None, "challenge": 1.0}
    # With a false positive of a higher score the group's hit has the score of its best detection.
    outside = [200, 200, 210, 210]
    assert one_class([group], [True], [*inside, outside], [0.9, 0.8, 0.7, 0.85])["challenge"] == 1.0
    assert one_class([group], [True], [*inside, outside], [0.9, 0.8, 0.7, 0.95])["challenge"] == 0.5


@pytest.mark.quick
def test_taken_object_is_not_replaced_by_the_second_best():
    objects = [[0, 0, 10, 10], [0, 0, 10, 11]]
    # Both detections overlap most with the first object; the second one does not fall back to the other.
    assert one_class(objects, [False, False], [[0, 0, 10, 10], [0, 0, 10, 10.1]], [0.9, 0.8])["v2"] == 0.5


def naive_ap(boxes, image, group, det_boxes, det_image, scores, weight) -> float | None:
    """The rules, one detection at a time."""

    def overlap(d, g, over_detection):
        w = min(d[2], g[2]) - max(d[0], g[0])
        h = min(d[3], g[3]) - max(d[1], g[1])
        inter = max(w, 0) * max(h, 0)
        area = (d[2] - d[0]) * (d[3] - d[1])
        return inter / (area if over_detection else area + (g[2] - g[0]) * (g[3] - g[1]) - inter)

    taken, absorbed, entries = set(), {}, []
    for d in np.argsort(-scores):
        mine = [g for g in range(len(boxes)) if image[g] == det_image[d]]
        hit = False
        singles = [(overlap(det_boxes[d], boxes[g], False), -g) for g in mine if not group[g]]
        if singles:
            best, g = max(singles)
            hit = best >= 0.5 and -g not in taken
            if hit:
                taken.add(-g)
        groups = [(overlap(det_boxes[d], boxes[g], True), -g) for g in mine if group[g]]
        if not hit and groups and max(groups)[0] >= 0.5:
            absorbed.setdefault(-max(groups)[1], scores[d])
        else:
            entries.append((scores[d], 1.0 if hit else 0.0))
    if weight:
        entries += [(s, weight) for s in absorbed.values()]
    number = (~group).sum() + weight * group.sum()
    if not number:
        return None
    hits = np.array([hit for _, hit in sorted(entries, reverse=True)])
    true = np.cumsum(hits)
    precision = true / (true + np.cumsum(hits == 0))
    return sum(hits[i] / number * precision[i:].max() for i in range(len(hits)))


@pytest.mark.quick
def test_random_sets_equal_the_rules_written_as_loops():
    rng = np.random.default_rng(0)
    for _ in range(30):
        images, number, count = 6, int(rng.integers(0, 30)), int(rng.integers(1, 60))

        def boxes(n):
            corner = rng.uniform(0, 6, (n, 2))
            return np.concatenate([corner, corner + rng.uniform(2, 6, (n, 2))], 1)

        image, group = rng.integers(0, images, number), rng.random(number) < 0.2
        gt, det, det_image, scores = boxes(number), boxes(count), rng.integers(0, images, count), rng.random(count)
        zero = np.zeros(0, np.int32)
        truth = Truth(
            ["a"], ["A"], np.array([b"%d" % i for i in range(images)]), image.astype(np.int32),
            np.zeros(number, np.int32), gt, group, zero, zero, np.zeros(0, bool), None, np.zeros((1, 1), bool),
        )  # fmt: skip
        detections = DetectionTable(det_image.astype(np.int32), np.zeros(count, np.int32), scores, det)
        found = evaluate(truth, detections, "v2")["per_class_AP"]["a"]
        expected = naive_ap(gt, image, group, det, det_image, scores, 0.0)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))
        # In the challenge, only images where the class is verified (here: by a box) are looked at.
        seen = np.isin(det_image, image)
        found = evaluate(truth, detections, "challenge")["per_class_AP"]["a"]
        expected = naive_ap(gt, image, group, det[seen], det_image[seen], scores[seen], 1.0)
        assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


@pytest.mark.quick
@pytest.mark.parametrize("masked", [False, True])
def test_written_files_score_like_the_original(truth, tmp_path, masked):
    protocol, file = ("challenge-segm", "detections_segm.csv") if masked else ("v2", "detections.csv")
    detections = read_detections(GOLDEN / file, truth)
    ids = [i.decode() for i in truth.image_ids]
    width, height = 1024, 768
    rows = []
    for i in range(len(detections.image)):
        row = {"image_id": ids[detections.image[i]], "label": truth.class_ids[detections.label[i]]}
        row |= {"score": detections.score[i], "width": width, "height": height}
        if masked:
            size = detections.masks.sizes[i].tolist()
            row["segmentation"] = {"size": size, "counts": detections.masks.counts[i].decode()}
        else:
            row["box"] = detections.boxes[i] * [width, height, width, height]
        rows.append(row)
    expected = evaluate(truth, detections, protocol)
    assert oid_eval.write_detections_csv(tmp_path / "rows.csv", rows, masked) == len(rows)
    sizes = {r["image_id"]: r["segmentation"]["size"] for r in rows} if masked else {}
    images = [(i, *sizes.get(i, (height, width))) for i in ids]
    assert oid_eval.write_submission_csv(tmp_path / "submission.csv", rows, images, masked) == len(rows)
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == len(ids) + 1
    for name in ("rows.csv", "submission.csv"):
        result = evaluate(truth, read_detections(tmp_path / name, truth), protocol)
        assert result["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
        assert result["num_true_positives"] == expected["num_true_positives"]


@pytest.mark.quick
def test_mask_text_is_reversible():
    counts = b"\\3o0ZZ[1"
    assert decode_mask(encode_mask(counts)) == counts
    with pytest.raises(ValueError, match="base64"):
        decode_mask("not base64!")


@pytest.mark.quick
def test_masks_of_another_size_are_resampled(truth):
    detections = read_detections(GOLDEN / "detections_segm.csv", truth)
    from pycocotools import mask as mask_utils

    counts, sizes = [], detections.masks.sizes * 2
    for text, size in zip(detections.masks.counts, detections.masks.sizes.tolist()):
        bitmap = mask_utils.decode({"counts": text, "size": size})
        counts.append(mask_utils.encode(np.asfortranarray(bitmap.repeat(2, 0).repeat(2, 1)))["counts"])
    doubled = detections._replace(masks=oid_eval.Masks(counts, sizes))
    assert evaluate(truth, doubled, "challenge-segm") == evaluate(truth, detections, "challenge-segm")


@pytest.mark.quick
def test_errors_name_the_file_and_the_column(truth, tmp_path):
    (tmp_path / "d.csv").write_text("ImageID,LabelName,XMin,XMax,YMin,YMax\n")
    with pytest.raises(UserError, match=r"d\.csv has no column Score"):
        read_detections(tmp_path / "d.csv", truth)
    (tmp_path / "d.csv").write_text("ImageID,LabelName,Score,XMin,XMax,YMin,YMax\na,/m/0jbk,high,0,1,0,1\n")
    with pytest.raises(UserError, match=r"d\.csv: .*high"):
        read_detections(tmp_path / "d.csv", truth)
    (tmp_path / "d.csv").write_text("ImageID,PredictionString\na,/m/0jbk 0.5 0 0 1\n")
    with pytest.raises(UserError, match="row 2: PredictionString is not groups of 6 words"):
        read_detections(tmp_path / "d.csv", truth)
    with pytest.raises(UserError, match="no boxes file test-annotations-bbox.csv"):
        find_files(GOLDEN, "test")


@pytest.mark.quick
def test_non_finite_scores_are_refused(truth):
    detections = read_detections(GOLDEN / "detections.csv", truth)
    detections.score[3] = np.nan
    with pytest.raises(UserError, match="1 detections have a score or box that is not a finite number"):
        evaluate(truth, detections, "v2")


@pytest.mark.quick
def test_no_detections_score_zero_and_not_nothing(truth):
    none = read_detections(GOLDEN / "detections.csv", truth)
    result = evaluate(truth, take(none, np.zeros(0, int)), "v2")
    assert result["mAP"] == 0.0
    assert result["per_class_AP"]["/m/0jbk"] == 0.0 and result["per_class_AP"]["/m/09d5_"] is None


@pytest.mark.quick
def test_columns_are_the_same_whatever_the_block_size(monkeypatch):
    path = GOLDEN / "validation-annotations-bbox.csv"
    whole = read_columns(path, "boxes", {"XMin": float}, {"ImageID": None, "LabelName": ["/m/0jbk"]}, ["Source"])
    monkeypatch.setattr("utils.oid_format._BLOCK_BYTES", 1000)
    parts = read_columns(path, "boxes", {"XMin": float}, {"ImageID": None, "LabelName": ["/m/0jbk"]}, ["Source"])
    assert whole.keys() == parts.keys()
    for name in whole:
        assert np.array_equal(whole[name], parts[name]), name


@pytest.mark.quick
@pytest.mark.parametrize("root", [[], 3, {"Subcategory": 3}, {"Subcategory": [3]}, {"Subcategory": [{"LabelName": 1}]}])
def test_a_hierarchy_that_is_no_tree_is_one_line(tmp_path, root):
    (tmp_path / "tree.json").write_text(json.dumps(root))
    with pytest.raises(UserError, match="tree.json is not a tree of objects with LabelName and Subcategory"):
        read_ancestors(tmp_path / "tree.json", ["/m/a"])
