"""The whole report: every protocol's numbers, comparison, data facts, pictures, what report.json holds, bad input."""

import contextlib
import io
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import annotations_as_results, copy_sets, settings
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from synthetic import coco_case

import report
import report_numbers as numbers
from common import UserError
from dataset import load_split
from eval import evaluate_proposals
from report import write_report
from report_data import anchor_fit, data_facts
from report_files import problem_of_split
from report_pictures import tag_places
from report_read import image_path, problem_of, scene_from_coco
from tools import report as tool
from tools import score

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


def run(tmp_path, *args, code=0):
    out = tmp_path / "report"
    assert tool.main([*map(str, args), "--out", str(out), "--resamples", "20"]) == code
    return json.loads((out / "report.json").read_text()) if code == 0 else None


def files(tmp_path, content, *results):
    (tmp_path / "gt.json").write_text(json.dumps(content))
    paths = []
    for n, entries in enumerate(results):
        paths.append(tmp_path / f"results{n}.json")
        paths[-1].write_text(json.dumps(entries))
    return tmp_path / "gt.json", *paths


def test_lvis_has_the_official_numbers(tmp_path):
    folder = DATA / "lvis_mini"
    found = run(tmp_path, "--protocol", "lvis", "--gt", folder / "lvis_v1_mini.json", "--detections",
                folder / "results.json")["models"][0]["summary"]  # fmt: skip
    expected = json.loads((folder / "expected.json").read_text())
    for kind in ("bbox", "segm"):
        for name, value in expected[f"{kind}-300"].items():
            if name in found[kind]:
                value = None if value == -1 else pytest.approx(value, abs=1e-9)
                assert found[kind][name]["value"] == value, (kind, name)
        assert {"APr", "APc", "APf"} <= set(found[kind])


@pytest.mark.parametrize(
    "metric, args",
    [
        ("v2_detection", ["oid-v2", "detections.csv"]),
        ("challenge_detection_raw_detections", ["oid-challenge", "detections.csv"]),
        ("challenge_detection", ["oid-challenge", "detections.csv", "--expand-detections"]),
        ("challenge_segmentation_raw_detections", ["oid-challenge-segm", "detections_segm.csv"]),
        ("challenge_segmentation", ["oid-challenge-segm", "detections_segm.csv", "--expand-detections"]),
    ],
)
def test_open_images_has_the_official_numbers(tmp_path, metric, args):
    folder = DATA / "golden_oid"
    protocol, file, *more = args
    found = run(tmp_path, "--protocol", protocol, "--gt", folder, "--detections", folder / file, "--pictures", 0, *more)
    expected = json.loads((folder / "expected.json").read_text())["results"][metric]
    (summary,) = found["models"][0]["summary"].values()
    assert summary["mAP"]["value"] == pytest.approx(expected["mAP"], abs=1e-6)
    assert summary["mAP"]["low"] <= summary["mAP"]["value"] <= summary["mAP"]["high"]
    assert found["models"][0]["errors"]["count"]["background"] > 0


def test_cityscapes_has_the_official_numbers(tmp_path):
    folder = DATA / "cityscapes_eval"
    found = run(tmp_path, "--protocol", "cityscapes", "--gt", folder, "--detections", folder / "predictions")
    expected = json.loads((folder / "expected.json").read_text())
    summary = found["models"][0]["summary"]["segm"]
    assert summary["AP"]["value"] == pytest.approx(expected["AP"], abs=1e-6)
    assert summary["AP50"]["value"] == pytest.approx(expected["AP50"], abs=1e-6)
    for row in found["models"][0]["classes"]:
        if row["name"] in expected["per_class"]:
            ap = expected["per_class"][row["name"]]["AP"]
            assert row["segm"]["AP"] == (None if ap != ap else pytest.approx(ap, abs=1e-6))


@pytest.mark.parametrize("protocol", ["voc07", "voc12"])
def test_voc_has_the_numbers_of_the_scoring_tool(tmp_path, protocol):
    content, results = coco_case(3)
    for a in content["annotations"][::5]:
        a["difficult"] = 1
    gt, found = files(tmp_path, content, results)
    summary = run(tmp_path, "--protocol", protocol, "--gt", gt, "--detections", found)["models"][0]["summary"]["bbox"]
    out = tmp_path / "scores.json"
    assert score.main(["--protocol", protocol, "--gt", str(gt), "--detections", str(found), "--json", str(out)]) == 0
    assert summary["mAP"]["value"] == pytest.approx(json.loads(out.read_text())["mAP"], abs=1e-6)


def test_a_voc_folder_is_read(tmp_path):
    found = run(tmp_path, "--protocol", "voc07", "--gt", DATA / "voc_mini", "--detections", *files(
        tmp_path, {"x": 1}, [])[1:])  # fmt: skip
    assert found["models"][0]["summary"]["bbox"]["mAP"]["value"] == 0 and found["data"]["objects"] > 0


# ------------------------------------------------------------------------------------------------ of a data set
# A set's spec, whether its results have masks, the protocol of its report, and the names of the set's own scores in
# the report's summary.
SPLITS = {
    "coco": (["coco_mini/annotations/instances_val2017.json", "coco_mini/val2017"], True, "coco",
             {"bbox": "bbox", "segm": "segm"}),
    "lvis": (["lvis", "lvis_mini/lvis_v1_mini.json", "lvis_mini"], True, "lvis", {"bbox": "bbox", "segm": "segm"}),
    "voc": (["voc", "voc_mini", "trainval"], False, "voc12", {"bbox": "voc12"}),
    "difficult": (["voc", "voc_mini", "trainval", "difficult=object"], False, "voc12", {"bbox": "voc12"}),
    "cityscapes": (["cityscapes", "cityscapes_mini", "val"], True, "cityscapes", {"segm": "cityscapes"}),
    "cityscapes boxes": (["cityscapes", "cityscapes_mini", "val"], False, "coco", {"bbox": "bbox"}),
    "openimages": (["openimages", "golden_oid", "validation"], False, "oid-v2", {"bbox": "oid-v2"}),
    "openimages masks": (["openimages", "golden_oid", "validation"], True, "oid-v2", {"bbox": "oid-v2"}),
    "expanded": (["openimages", "golden_oid", "validation", "expand=True"], False, "oid-challenge",
                 {"bbox": "oid-challenge"}),
    "csv": (["csv", "csv_mini/boxes.csv", "csv_mini/images"], False, "coco", {"bbox": "bbox"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def every_format(tmp_path_factory):
    return copy_sets(tmp_path_factory.mktemp("sets"))


def split_of(base, kind):
    spec, masks, *_ = SPLITS[kind]
    return load_split(settings(base, f"MODE_MASK={masks}", f"DATA.DATASETS={{'set': {spec}}}"), "set")


@pytest.mark.parametrize("kind", SPLITS)
def test_the_report_of_a_data_set_has_the_scores_of_the_data_set(every_format, tmp_path, kind):
    _, masks, protocol, marks = SPLITS[kind]
    split = split_of(every_format, kind)
    rng = np.random.default_rng(0)
    results = annotations_as_results(split, lambda _: float(rng.random()), masks)
    results = [r | {"bbox": (np.array(r["bbox"]) * (0.8 if k % 3 == 0 else 1)).tolist()}  # some are moved, some missed
               for k, r in enumerate(results) if k % 4]  # fmt: skip
    found = write_report(problem_of_split(split, results), {"x": results}, tmp_path / "report", resamples=10)
    assert found["protocol"] == protocol and found["data"]["images"] == len(split)
    scores, summary = split.evaluate(results, verbose=False), found["models"][0]["summary"]
    assert set(summary) == set(marks)
    for name, mark in marks.items():
        shared = [m for m in summary[name] if f"{mark}/{m}" in scores]
        assert {"AP", "mAP"} & {*shared}
        for metric in shared:
            value = scores[f"{mark}/{metric}"]
            assert summary[name][metric]["value"] == (None if value != value else pytest.approx(value, abs=1e-6))
    assert found["pictures"]["missing"] == 0 and found["pictures"]["worst"][0]


@pytest.mark.parametrize("kind", ["coco", "voc", "cityscapes", "openimages"])
def test_the_report_of_nothing_found_is_of_the_same_protocol(every_format, kind):
    assert problem_of_split(split_of(every_format, kind), []).protocol == SPLITS[kind][2]


def test_pictures_of_one_name_in_several_folders_are_not_mixed_up(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"")
    folders = [tmp_path / "a", tmp_path / "b", tmp_path]
    problem = problem_of("coco", "x", {"images": [], "annotations": [], "categories": []}, folders)
    assert image_path(problem, "b/1.jpg") == tmp_path / "b/1.jpg"
    assert image_path(problem, "c/1.jpg") == tmp_path / "a/1.jpg"  # by the end of its path


def test_keypoints_get_their_errors_and_numbers(tmp_path):
    content, results = coco_case(2, keypoints=17)
    content["categories"][0]["keypoints"] = [f"{'left' if k % 2 else 'right'}_{k // 2}" for k in range(17)]
    gt, found = files(tmp_path, content, results)
    model = run(tmp_path, "--gt", gt, "--detections", found)["models"][0]
    assert set(model["summary"]) == {"bbox", "keypoints"} and "APs" not in model["summary"]["keypoints"]
    assert len(model["keypoints"]["by_point"]) == 17 and model["keypoints"]["all"]["good"] > 100


def test_sizes_are_those_of_the_summary_and_where_a_protocol_has_none_those_of_cocoeval(tmp_path):
    content, results = coco_case(2)
    gt, found = files(tmp_path, content, results)
    model = run(tmp_path, "--gt", gt, "--detections", found)["models"][0]
    assert [s["value"] for s in model["sizes"]] == [model["summary"]["bbox"][f"AP{k}"]["value"] for k in "sml"]
    rows = run(tmp_path, "--protocol", "voc12", "--gt", gt, "--detections", found)["models"][0]["sizes"]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(results), "bbox")
        reference.evaluate()
        reference.accumulate()
    for row, a in zip(rows, (1, 2, 3)):
        precision = reference.eval["precision"][0, :, :, a, 2]
        assert row["metric"] == "AP50" and row["value"] == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
        assert row["low"] <= row["value"] <= row["high"]
    assert sum(r["objects"] for r in rows) == sum(not a["iscrowd"] for a in content["annotations"])


# ------------------------------------------------------------------------------------------------ comparison
def test_a_difference_is_significant_where_its_interval_leaves_out_zero():
    rng = np.random.default_rng(0)
    for value in np.linspace(-0.4, 0.4, 161):
        found = report.difference(float(value), value + 0.1 * rng.gamma(2, size=1000))
        inside = found["low"] <= 0 <= found["high"]
        assert inside == (found["p"] >= 0.05)
    assert found["p"] < 0.01


def test_equal_results_do_not_differ_and_better_ones_do(tmp_path):
    content, results = coco_case(1, images=60)
    perfect = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in content["annotations"]]
    gt, *paths = files(tmp_path, content, results, results, perfect)
    found = run(tmp_path, "--gt", gt, "--detections", *paths)
    same, better = found["comparisons"]
    ap = same["summary"]["bbox"]["AP"]
    assert ap["difference"] == 0 and ap["low"] <= 0 <= ap["high"] and ap["p"] == 1
    assert same["better"] == same["worse"] == 0 and not same["images"]
    ap = better["summary"]["bbox"]["AP"]
    assert ap["difference"] > 0.5 and ap["low"] > 0 and ap["p"] < 0.1
    assert better["better"] > 30 and better["images"][0]["change"] > 0
    changes = [i["change"] for i in better["images"]]
    assert changes == sorted(changes, reverse=True)


def test_a_paired_difference_is_surer_than_two_separate_intervals():
    content, results = coco_case(1, images=80)
    rng = np.random.default_rng(0)
    other = [r for r in results if rng.random() < 0.97]
    problem = problem_of("coco", "x", content)
    weights = numbers.resample(80, 200)
    a, b = (report._analyse(problem, n, r, ["bbox"], "bbox", weights, None) for n, r in (("a", results), ("b", other)))
    entry = report.compare(a, b)["summary"]["bbox"]["AP"]
    separate = sum(np.ptp(np.percentile(m.summaries["bbox"].samples["AP"], [2.5, 97.5])) for m in (a, b))
    assert entry["high"] - entry["low"] < 0.6 * separate


def test_names_of_results_are_the_shortest_that_differ():
    assert report.compared_names(["a/results.json", "b/results.json"]) == ["a/results", "b/results"]
    assert report.compared_names(["x/a.json", "x/b.json"]) == ["a", "b"]
    with pytest.raises(UserError, match="twice"):
        report.compared_names(["a.json", "a.json"])


# ------------------------------------------------------------------------------------------------ data facts
def test_anchors_fit_as_by_trying_every_anchor():
    content, _ = coco_case(4, images=12)
    scene = scene_from_coco(content, [], "bbox")
    settings = {"MODE_FPN": True, "RPN.ANCHOR_SIZES": [16, 32, 64, 128, 256], "RPN.ANCHOR_RATIOS": [0.5, 1.0, 2.0],
                "PREPROC.TEST_SHORT_EDGE_SIZE": 200, "PREPROC.MAX_SIZE": 333}  # fmt: skip
    found = anchor_fit(scene, settings)
    best = []
    for n, (height, width) in enumerate(scene.sizes):
        scale = min(200 / min(height, width), 333 / max(height, width))
        anchors = []
        for stride, size in zip([4, 8, 16, 32, 64], [16, 32, 64, 128, 256]):
            for ratio in (0.5, 1.0, 2.0):
                w = np.sqrt(size * size / ratio)
                for y in range(int(np.ceil(height * scale / stride))):
                    for x in range(int(np.ceil(width * scale / stride))):
                        anchors.append([x * stride - w / 2, y * stride - ratio * w / 2, w, ratio * w])
        boxes = scene.gt_box[(scene.gt_image == n) & ~scene.gt_ignore] * scale
        boxes[:, 2:] -= boxes[:, :2]
        if len(boxes):
            from pycocotools import mask as mask_utils

            best += mask_utils.iou(boxes, np.array(anchors), [0] * len(anchors)).max(1).tolist()
    best = np.array(best)
    assert found["mean_best_iou"] == pytest.approx(best.mean(), abs=0.01)
    assert found["unmatched"] == sum(s["count"] for s in found["unmatched_by_side"]) > 0
    assert found["unmatched"] == (best < 0.3).sum() and found["fit"] == pytest.approx((best >= 0.7).sum(), abs=2)


def test_facts_count_images_objects_and_sizes():
    content, _ = coco_case(4, crowd=0.3)
    facts = data_facts(scene_from_coco(content, [], "bbox"))
    crowds = sum(a["iscrowd"] for a in content["annotations"])
    assert facts["objects"] == len(content["annotations"]) - crowds == sum(s["count"] for s in facts["sides"])
    assert facts["ignored_regions"] == crowds and facts["images"] == 40


def test_proposals_have_the_recall_of_their_own_scores(tmp_path):
    content, results = coco_case(1)
    gt, found = files(tmp_path, content, results)
    model = run(tmp_path, "--gt", gt, "--detections", found, "--proposals", found)["models"][0]
    expected = evaluate_proposals(content, results, verbose=False)
    assert model["proposals"]["proposals/AR@100"] == pytest.approx(expected["proposals/AR@100"])


# ------------------------------------------------------------------------------------------------ pictures and files
@pytest.fixture
def balloons(tmp_path):
    """A small set with images on disk, and a model that misses, invents and confuses."""
    content, results = coco_case(9, images=8, masks=True, crowd=0.1)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        picture = rng.integers(0, 255, (image["height"], image["width"], 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / image["file_name"]), picture)
    return tmp_path, content, results


def test_pictures_are_of_the_worst_images_and_of_every_kind_of_mistake(balloons):
    tmp_path, content, results = balloons
    gt, found = files(tmp_path, content, results)
    content = run(tmp_path, "--gt", gt, "--detections", found, "--images", tmp_path / "images", "--pictures", 5)
    (worst,), (mistakes,) = content["pictures"]["worst"], content["pictures"]["mistakes"]
    assert len(worst) == 5
    lost = [e["lost"] for e in worst]
    assert lost == sorted(lost, reverse=True) and lost[0] > 0
    assert {e["kind"] for e in mistakes} == {"invented", "confused", "misplaced", "missed"}
    for entry in [*worst, *mistakes]:
        picture = cv2.imread(str(tmp_path / "report" / entry["picture"]))
        assert picture is not None
        if "width" in entry:
            assert picture.shape[:2] == (entry["height"], entry["width"])
    for name in ("curves", "calibration", "errors"):
        assert cv2.imread(str(tmp_path / "report/charts" / f"{name}.png")).std() > 10
    page = (tmp_path / "report/index.html").read_text()
    assert page.count("<img loading=lazy") == len(worst) + len(mistakes)
    assert len(list((tmp_path / "report/images").iterdir())) == len(worst) + len(mistakes)
    run(tmp_path, "--gt", gt, "--detections", found, "--images", tmp_path / "images", "--pictures", 0)
    assert not list((tmp_path / "report/images").iterdir())  # those of the earlier report are gone
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_names_of_mistakes_lie_beside_each_other_and_inside_the_picture():
    rng = np.random.default_rng(0)
    boxes = [(*corner, 0, 0) for corner in rng.integers(-20, 420, (14, 2)).tolist()] + [(100, 100, 0, 0)] * 6
    sizes = [(int(w), 17) for w in rng.integers(60, 130, len(boxes))]
    places = tag_places(boxes, sizes, (400, 420))
    assert places[0] == (max(0, min(boxes[0][0], 420 - sizes[0][0])), max(0, min(boxes[0][1] - 18, 400 - 17)))
    rectangles = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(places, sizes)]
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 420 and y2 <= 400 for x1, y1, x2, y2 in rectangles)
    for i, a in enumerate(rectangles):
        for b in rectangles[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    # Where there is no room, the tags lie upon each other, but inside.
    places = tag_places([(5, 5, 0, 0)] * 60, [(90, 17)] * 60, (60, 100))
    assert len(places) == 60 and all(0 <= x <= 10 and 0 <= y <= 43 for x, y in places)


def test_pictures_do_not_wait_for_the_disk(balloons, monkeypatch):
    tmp_path, content, results = balloons
    gt, found = files(tmp_path, content, results)
    calls = []
    monkeypatch.setattr("os.fsync", calls.append)
    content = run(tmp_path, "--gt", gt, "--detections", found, "--images", tmp_path / "images")
    assert len(content["pictures"]["mistakes"][0]) > 20 and 1 <= len(calls) < 10


def test_a_report_without_images_says_so_and_draws_nothing(tmp_path):
    content, results = coco_case()
    gt, found = files(tmp_path, content, results)
    content = run(tmp_path, "--gt", gt, "--detections", found)
    assert content["pictures"]["worst"] == [] and not (tmp_path / "report/images").exists()
    assert "the folder of the images was not given" in (tmp_path / "report/index.html").read_text()


def test_every_key_of_report_json_is_documented(balloons):
    tmp_path, content, results = balloons
    gt, *paths = files(tmp_path, content, results, results[::2])
    content = run(tmp_path, "--gt", gt, "--detections", *paths, "--images", tmp_path / "images", "--pictures", 3)
    documented = set(re.findall(r"`([\w@/]+)`", (ROOT / "docs/REPORT.md").read_text()))

    def keys(value, skip=("settings", "AP", "summary", "kinds", "cost", "count", "mistakes", "share_at")):
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                if key not in skip:
                    yield from keys(inner)
        if isinstance(value, list):
            for inner in value[:3]:
                yield from keys(inner)

    assert not set(keys(content)) - documented


@pytest.mark.parametrize(
    "change, message",
    [
        (["--gt", "nowhere.json"], "--gt nowhere.json does not exist"),
        (["--detections", "nowhere.json"], "--detections nowhere.json does not exist"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        (["--iou-type", "segm"], "--iou-type segm"),
        (["--resamples", "1"], "--resamples 1"),
        (["--threshold", "7"], "--threshold 7"),
        (["--run", "nowhere"], "settings of the run"),
    ],
)
def test_bad_input_is_one_line_that_names_the_flag(tmp_path, capsys, change, message):
    content, results = coco_case()
    gt, found = files(tmp_path, content, results)
    code = tool.main(["--gt", str(gt), "--detections", str(found), "--out", str(tmp_path / "report"), *change])
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and not any("Traceback" in line for line in lines)
    assert not (tmp_path / "report").exists()


def test_a_broken_entry_is_named(tmp_path, capsys):
    content, results = coco_case()
    results[3]["image_id"] = 99999
    gt, found = files(tmp_path, content, results)
    run(tmp_path, "--gt", gt, "--detections", found, code=2)
    assert "entry 3: image_id 99999 is not in the annotation file" in capsys.readouterr().err
