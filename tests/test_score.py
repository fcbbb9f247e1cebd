"""The scoring tool's command line: every protocol, its json, and its refusals."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import score

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden_oid"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def run(tmp_path, *args: str) -> dict:
    out = tmp_path / "scores.json"
    assert score.main([*map(str, args), "--json", str(out)]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "metric, args",
    [
        ("v2_detection", ["oid-v2", "detections.csv"]),
        ("challenge_detection", ["oid-challenge", "expected/detections_expanded.csv"]),
        ("challenge_detection", ["oid-challenge", "detections.csv", "--expand-detections"]),
        ("challenge_detection_raw_detections", ["oid-challenge", "detections.csv"]),
        ("challenge_segmentation_raw_detections", ["oid-challenge-segm", "detections_segm.csv"]),
        ("challenge_segmentation", ["oid-challenge-segm", "detections_segm.csv", "--expand-detections"]),
    ],
)
def test_open_images_protocols_give_the_reference_numbers_by_class_name(tmp_path, metric, args):
    protocol, file, *more = args
    result = run(tmp_path, "--protocol", protocol, "--gt", GOLDEN, "--detections", GOLDEN / file, *more)
    expected = EXPECTED["results"][metric]
    assert result["protocol"] == protocol
    assert result["mAP"] == pytest.approx(expected["mAP"], abs=1e-9)
    assert len(result["per_class_AP"]) == len(expected["per_class_AP"])
    for label, ap in expected["per_class_AP"].items():
        assert result["per_class_AP"][EXPECTED["classes"][label]] == (
            None if ap is None else pytest.approx(ap, abs=1e-9)
        )


def open_images_as_coco() -> tuple[dict, list]:
    """The golden validation set and its detections as a COCO json (100 x 100 pixels) and COCO results."""

    def rows(name: str) -> list[dict]:
        with open(GOLDEN / name, newline="") as f:
            return list(csv.DictReader(f))

    def box(r: dict) -> list[float]:
        x1, x2, y1, y2 = (100 * float(r[k]) for k in ("XMin", "XMax", "YMin", "YMax"))
        return [x1, y1, x2 - x1, y2 - y1]

    classes = {label: i for i, label in enumerate(EXPECTED["classes"], 1)}
    annotated = rows("validation-annotations-bbox.csv")
    labels = rows("validation-annotations-human-imagelabels-boxable.csv")
    images = {}
    for r in annotated + labels:
        keys = ("pos_category_ids", "neg_category_ids")
        image = {"id": r["ImageID"], "height": 100, "width": 100, "file_name": r["ImageID"] + ".jpg"}
        images.setdefault(r["ImageID"], image | {k: [] for k in keys})
    for r in labels:
        key = "pos_category_ids" if r["Confidence"] == "1" else "neg_category_ids"
        images[r["ImageID"]][key].append(classes[r["LabelName"]])
    annotations = [
        {"id": i, "image_id": r["ImageID"], "category_id": classes[r["LabelName"]], "bbox": box(r), "area": 1,
         "iscrowd": int(r["IsGroupOf"] == "1")}
        for i, r in enumerate(annotated, 1)
    ]  # fmt: skip
    results = [
        {"image_id": r["ImageID"], "category_id": classes[r["LabelName"]], "bbox": box(r), "score": float(r["Score"])}
        for r in rows("detections.csv")
        if r["ImageID"] in images and float(r["XMin"]) < float(r["XMax"]) and float(r["YMin"]) < float(r["YMax"])
    ]
    categories = [{"id": i, "name": EXPECTED["classes"][label], "freebase_id": label} for label, i in classes.items()]
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize(
    "metric, args",
    [
        ("v2_detection", ["oid-v2"]),
        (
            "challenge_detection",
            ["oid-challenge", "--expand-detections", "--hierarchy", GOLDEN / "bbox_labels_hierarchy.json"],
        ),
    ],
)
def test_open_images_in_coco_format_gives_the_same_numbers(tmp_path, metric, args):
    content, results = open_images_as_coco()
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    result = run(tmp_path, "--protocol", *args, "--gt", tmp_path / "gt.json", "--detections", tmp_path / "results.json")
    assert result["mAP"] == pytest.approx(EXPECTED["results"][metric]["mAP"], abs=1e-6)


def test_coco_protocol_reports_the_ap_of_pycocotools(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    gt, results = DATA / "lvis_mini/lvis_v1_mini.json", DATA / "lvis_mini/results.json"
    content = json.loads(gt.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    (tmp_path / "gt.json").write_text(json.dumps(content))
    coco = COCO(str(tmp_path / "gt.json"))
    reference = COCOeval(coco, coco.loadRes(str(results)), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    result = run(tmp_path, "--protocol", "coco", "--gt", tmp_path / "gt.json", "--detections", results)
    assert result["mAP"] == pytest.approx(reference.stats[0], abs=1e-9)
    per_class = reference.eval["precision"][:, :, 4, 0, 2].mean()
    assert result["per_class_AP"]["thing_4"] == pytest.approx(per_class, abs=1e-9)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_lvis_protocol_gives_the_numbers_of_the_lvis_package(tmp_path, kind):
    folder = DATA / "lvis_mini"
    expected = json.loads((folder / "expected.json").read_text())[f"{kind}-300"]
    args = ("--gt", folder / "lvis_v1_mini.json", "--detections", folder / "results.json", "--iou-type", kind)
    result = run(tmp_path, "--protocol", "lvis", *args)
    assert result["mAP"] == pytest.approx(expected["AP"], abs=1e-9)
    assert result["metrics"]["APr"] == pytest.approx(expected["APr"], abs=1e-9)
    assert result["per_class_AP"] == pytest.approx(expected["per_class"], abs=1e-9)
    assert result["metrics"]["APl"] is None


def test_voc_files_and_json_results_give_the_same_scores(tmp_path):
    voc = tmp_path / "voc"
    voc.mkdir()
    (voc / "comp4_det_test_dog.txt").write_text("000001 0.9 5 4 30 30\n000002 0.8 1 1 50 50\n000002 0.7 10 10 20 20\n")
    (voc / "comp4_det_test_person.txt").write_text(
        "000001 0.6 30 2 60 40\n000003 0.9 1 1 10 10\n000003 0.5 3 5 20 47\n"
    )
    # dog: both found, the difficult one is ignored. person: 1 right at 0.6 and 0.5 after a wrong one, of 3.
    area = {"dog": 1.0, "person": 2 / 3 * 2 / 3, "cat": 0.0}
    eleven = {"dog": 1.0, "person": 7 * (2 / 3) / 11, "cat": 0.0}
    categories = {n: i for i, n in enumerate(("cat", "dog", "person"))}
    results = []
    from dataset_voc import VOC_CLASSES

    for name in ("dog", "person"):
        for line in (voc / f"comp4_det_test_{name}.txt").read_text().splitlines():
            image, score_, x1, y1, x2, y2 = line.split()
            box = [float(x1) - 1, float(y1) - 1, float(x2) - float(x1) + 1, float(y2) - float(y1) + 1]
            category = VOC_CLASSES.index(name) + 1
            results.append({"image_id": image, "category_id": category, "bbox": box, "score": float(score_)})
    (tmp_path / "results.json").write_text(json.dumps(results))
    for protocol, expected in (("voc12", area), ("voc07", eleven)):
        for detections in (voc, tmp_path / "results.json"):
            result = run(tmp_path, "--protocol", protocol, "--gt", DATA / "voc_mini", "--detections", detections)
            assert {n: result["per_class_AP"][n] for n in categories} == pytest.approx(expected)
            assert result["per_class_AP"]["bird"] is None
            assert result["mAP"] == pytest.approx(sum(expected.values()) / 3)


def test_command_line_ends_with_2_and_one_line(tmp_path):
    call = [
        sys.executable,
        ROOT / "tools/score.py",
        "--protocol",
        "oid-v2",
        "--gt",
        tmp_path,
        "--detections",
        "nowhere",
    ]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --detections nowhere does not exist\n"


def test_json_detections_for_a_folder_are_refused_with_the_way_out(tmp_path, capsys):
    (tmp_path / "d.json").write_text("[]")
    assert score.main(["--protocol", "oid-v2", "--gt", str(GOLDEN), "--detections", str(tmp_path / "d.json")]) == 2
    assert "give the csv that --evaluate writes" in capsys.readouterr().err


def test_cityscapes_protocol_gives_the_numbers_of_the_official_tool(tmp_path):
    from dataset_cityscapes import read_cityscapes_content
    from utils.cityscapes_eval import read_cityscapes_detections

    folder = DATA / "cityscapes_eval"
    expected = json.loads((folder / "expected.json").read_text())
    content = read_cityscapes_content(folder, "val")
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(read_cityscapes_detections(folder / "predictions", content)))
    for gt in (folder, tmp_path / "gt.json"):
        for detections in (folder / "predictions", tmp_path / "results.json"):
            result = run(tmp_path, "--protocol", "cityscapes", "--gt", gt, "--detections", detections)
            assert result["mAP"] == pytest.approx(expected["AP"], abs=1e-9)
            assert result["metrics"]["AP50"] == pytest.approx(expected["AP50"], abs=1e-9)
            assert result["per_class_AP"] == pytest.approx({n: s["AP"] for n, s in expected["per_class"].items()})


BOX = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 1, 5, 5]}
SQUARE = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}


def write_truth(path: Path, **changes) -> None:
    annotation = {"id": 1, **BOX, **SQUARE, "area": 25, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "height": 20, "width": 20, "file_name": "a.jpg", "neg_category_ids": [],
                    "not_exhaustive_category_ids": []}],
        "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}],
    }  # fmt: skip
    for key, change in changes.items():
        if isinstance(change, dict):
            content[key][0] = {k: v for k, v in {**content[key][0], **change}.items() if v is not None}
        else:
            content[key] = change
    path.write_text(json.dumps(content))


WITH_BOXES = ["lvis", "voc07", "oid-v2", "oid-challenge-segm"]


@pytest.mark.parametrize("protocols, truth, results, message", [
    (score.PROTOCOLS, {"images": {"id": None}}, [], "needs an id, file_name, height and width"),
    (score.PROTOCOLS, {"categories": [3]}, [], "'categories' must be a list of objects with id and name"),
    (score.PROTOCOLS, {"annotations": 3}, [], "'annotations' must be a list"),
    (score.PROTOCOLS, {}, {}, "must hold a list of detections"),
    (score.PROTOCOLS, {}, [{**BOX, "category_id": 9}], "entry 0: category_id 9 is not in the annotation file"),
    (score.PROTOCOLS, {}, [{**BOX, "image_id": 9}], "entry 0: image_id 9 is not in the annotation file"),
    (score.PROTOCOLS, {}, [{**BOX, "score": None}], "entry 0: score None is not a finite number"),
    (["oid-challenge-segm", "cityscapes"], {"annotations": {"segmentation": None}}, [], "has no segmentation"),
    (["oid-challenge-segm", "cityscapes"], {"images": {"width": None}}, [], "needs an id, file_name, height and width"),
    (["oid-challenge-segm", "cityscapes"], {}, [BOX], "has no segmentation"),
    (["voc12", "oid-v2"], {}, [SQUARE], "has no bbox"),
])  # fmt: skip
def test_wrong_files_are_one_line_and_exit_code_2(tmp_path, capsys, protocols, truth, results, message):
    write_truth(tmp_path / "gt.json", **truth)
    (tmp_path / "r.json").write_text(json.dumps(results))
    for protocol in protocols:
        args = ["--protocol", protocol, "--gt", str(tmp_path / "gt.json"), "--detections", str(tmp_path / "r.json")]
        assert score.main(args) == 2, protocol
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1, (protocol, error)


@pytest.mark.parametrize("protocol", score.PROTOCOLS)
@pytest.mark.parametrize("broken, message", [
    ({"category_id": 9}, "category id is not in the file (e.g. entry 1: 9)"),
    ({"category_id": [1, 2]}, "image id or category id is not a number or a text (e.g. entry 1: [1, 2])"),
    ({"image_id": 9}, "image id is not in the file (e.g. entry 1: 9)"),
    ({"image_id": "1"}, "(e.g. entry 1: '1'; 1 is: use the same type in both files)"),
    (5, "entry is not an object with image_id and category_id (e.g. entry 1: 5)"),
    ({"bbox": [1, 2]}, "box is not four numbers x, y, width, height (e.g. entry 1: [1, 2])"),
    ({"bbox": [1, 2, 3, None]}, "a coordinate is not a finite number"),
    ({"iscrowd": [0]}, "iscrowd or ignore is neither 0 nor 1 (e.g. entry 1: [0])"),
])  # fmt: skip
def test_an_annotation_that_training_leaves_out_is_left_out_and_named(tmp_path, capsys, protocol, broken, message):
    good = {"id": 1, **BOX, **SQUARE, "area": 25, "iscrowd": 0}
    bad = {**good, "id": 2, **broken} if isinstance(broken, dict) else broken
    (tmp_path / "r.json").write_text(json.dumps([{**BOX, **SQUARE}]))
    scores = []
    for annotations in ([good], [good, bad]):
        write_truth(tmp_path / "gt.json", annotations=annotations)
        args = ["--protocol", protocol, "--gt", tmp_path / "gt.json", "--detections", tmp_path / "r.json"]
        scores.append(run(tmp_path, *args))
    assert scores[0] == scores[1]
    error = capsys.readouterr().err
    assert "1 × " in error and message in error, error


def test_every_protocol_names_map_and_classes(tmp_path):
    write_truth(tmp_path / "gt.json")
    (tmp_path / "r.json").write_text(json.dumps([{**BOX, **SQUARE}]))
    for protocol in score.PROTOCOLS:
        result = run(
            tmp_path, "--protocol", protocol, "--gt", tmp_path / "gt.json", "--detections", tmp_path / "r.json"
        )
        assert set(result["per_class_AP"]) == {"cat"} and result["protocol"] == protocol
        if protocol == "cityscapes":  # 64 pixels are too few for an object that counts
            assert result["mAP"] is None is result["per_class_AP"]["cat"]
        else:
            assert result["mAP"] == pytest.approx(1) and result["per_class_AP"]["cat"] == pytest.approx(1)


def test_flags_without_a_meaning_and_places_that_cannot_be_written_are_refused(tmp_path, capsys):
    write_truth(tmp_path / "gt.json")
    (tmp_path / "r.json").write_text("[]")
    base = ["--gt", str(tmp_path / "gt.json"), "--detections", str(tmp_path / "r.json")]
    (tmp_path / "file").write_text("")
    (tmp_path / "tree.json").write_text("[]")
    for args, message in (
        (["--protocol", "coco", "--split", "val"], "--split has no meaning for the coco protocol"),
        (["--protocol", "oid-v2", "--expand-detections"], "--expand-detections has no meaning"),
        (["--protocol", "voc07", "--iou-type", "segm"], "--iou-type has no meaning"),
        (["--protocol", "lvis", "--iou-type", "keypoints"], "LVIS scores bbox or segm"),
        (["--protocol", "oid-challenge", "--hierarchy", str(tmp_path / "tree.json")], "is not a tree of objects"),
        (["--protocol", "coco", "--json", str(tmp_path / "file/o.json")], "file is a file, not a folder"),
    ):
        assert score.main([*args, *base]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.quick
def test_lvis_ids_may_be_numbers_and_texts(tmp_path):
    folder = DATA / "lvis_mini"
    plain = run(
        tmp_path, "--protocol", "lvis", "--gt", folder / "lvis_v1_mini.json", "--detections", folder / "results.json"
    )
    truth, results = (json.loads((folder / name).read_text()) for name in ("lvis_v1_mini.json", "results.json"))
    named = {truth["images"][-1]["id"]: "last"}  # an order of numbers and texts is not defined
    for entry in truth["images"]:
        entry["id"] = named.get(entry["id"], entry["id"])
    for entry in [*truth["annotations"], *results]:
        entry["image_id"] = named.get(entry["image_id"], entry["image_id"])
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    mixed = run(tmp_path, "--protocol", "lvis", "--gt", tmp_path / "gt.json", "--detections", tmp_path / "results.json")
    assert mixed == plain
