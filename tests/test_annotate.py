"""tools/annotate.py and tools/convert_data.py: from a model's predictions to files to correct, and back to a json."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from graph import tiny_config
from test_predict_tiles import Squares, config, drawn
from tiny import COCO_MINI

from common import UserError
from dataset import load_split
from tools import annotate, convert_data
from utils.checkpoint import save_npz
from utils.polygons import encode_mask

quick = pytest.mark.quick


def entry(file, *detections):
    return {"file": str(file), "height": 10, "width": 20, "detections": list(detections)}


def detection(name, category, score, **more):
    return {"class": name, "category_id": category, "score": score, "box": [1.0, 2.0, 5.5, 8.0], **more}


@quick
def test_predictions_above_their_thresholds_become_annotations(tmp_path):
    mask = np.zeros((10, 20), bool)
    mask[2:8, 1:5] = True
    entries = [
        entry(tmp_path / "a.jpg", detection("cat", 7, 0.9, mask=encode_mask(mask)), detection("cat", 7, 0.4)),
        entry(tmp_path / "sub/b.jpg", detection("owl", 9, 0.4, keypoints=[[3.5, 4.0, 0.2], [1.0, 1.5, 9]])),
    ]
    content = annotate.content_of_predictions(entries, (0.5, {"owl": 0.3}), None, "p.json")
    assert [i["file_name"] for i in content["images"]] == ["a.jpg", "sub/b.jpg"]
    cat, owl = content["annotations"]
    assert (cat["category_id"], cat["bbox"], cat["segmentation"]) == (7, [1, 2, 4.5, 6], encode_mask(mask))
    assert owl["image_id"] == 2 and owl["keypoints"] == [3.0, 3.5, 2, 0.5, 1.0, 2]  # COCO counts pixels
    assert [(c["id"], c["name"]) for c in content["categories"]] == [(7, "cat"), (9, "owl")]
    content = annotate.content_of_predictions(entries, (0.95, {}), None, "p", {"dog": 1, "cat": 7, "owl": 9})
    assert not content["annotations"] and [c["name"] for c in content["categories"]] == ["dog", "cat", "owl"]


@quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"detections": 3}, "not predictions.json"),
        ({"file": None}, "file_name must be a text"),
        ({"height": 1.5}, "height and width"),
        ({"detections": [detection("cat", 1, float("nan"))]}, "detection 1 cannot be used"),
        ({"detections": [detection("cat", 1, 0.9, box=[1, 2])]}, "box must be"),
        ({"detections": [detection("cat", 1, 0.9, mask={"counts": "999", "size": [10, 20]})]}, "run lengths"),
        ({"detections": [detection("cat", 1, 0.9, mask=5)]}, "must be an RLE"),
        ({"detections": [detection("cat", 1, 0.9, keypoints=[5])]}, "cannot be used"),
        ({"detections": [detection("cat", 1, 0.9), detection("owl", 1, 0.9)]}, "same category_id"),
        ({"detections": [detection("cat", 1, 0.9), detection("cat", 2, 0.9)]}, "has the ids 1 and 2"),
    ],
)
def test_broken_predictions_are_one_line(change, message):
    with pytest.raises(UserError, match=message):
        annotate.content_of_predictions([entry("a.jpg") | change], (0.5, {}), None, "p.json")


@quick
def test_thresholds():
    assert annotate.read_thresholds(["0.7", "a=b=0.2", "cat=1"]) == (0.7, {"a=b": 0.2, "cat": 1})
    for word in ("x", "cat=", "2", "cat=nan"):
        with pytest.raises(UserError, match="--threshold"):
            annotate.read_thresholds([word])
    with pytest.raises(UserError, match="no such class; known are cat"):
        annotate.content_of_predictions([entry("a.jpg", detection("cat", 1, 0.5))], (0.5, {"dog": 1}), None, "p")


@quick
def test_results_with_their_annotation_file(tmp_path, capsys):
    truth = COCO_MINI / "annotations/instances_val2017.json"
    some = [a for a in json.loads(truth.read_text())["annotations"] if not a["iscrowd"]][:5]
    keys = ("image_id", "category_id", "bbox")
    results = [{**{k: a[k] for k in keys}, "score": 0.9 - 0.1 * n} for n, a in enumerate(some)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    words = [str(path), "--output", str(tmp_path / "out"), "--format", "yolo", "--threshold", "0.65"]
    assert annotate.main(words) == 2 and "--annotations" in capsys.readouterr().err
    assert annotate.main([*words, "--annotations", str(truth)]) == 0
    lines = [line for p in (tmp_path / "out/labels").glob("*.txt") for line in p.read_text().splitlines()]
    assert len(lines) == 3
    assert annotate.main([*words, "--annotations", str(truth)]) == 2  # there may be corrections in them
    assert "--overwrite" in capsys.readouterr().err


def test_a_models_predictions_come_back_as_a_set_to_train_on(tmp_path, capsys):
    from inference import inference_callable
    from utils.tf_v1 import tf

    model = ["TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=5", "MODE_MASK=True"]
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(3)
        inference_callable(tiny_config(*model))
        session.run(tf.global_variables_initializer())
        weights = session.run({v.op.name: v for v in tf.global_variables()})
    meta = {"settings": tiny_config(*model).to_dict(), "class_names": ["cat", "dog", "owl"], "category_ids": [7, 8, 9]}
    save_npz(tmp_path / "model.npz", weights, meta)
    images = tmp_path / "images"
    images.mkdir()
    for source in sorted((COCO_MINI / "val2017").glob("*.jpg"))[:2]:
        (images / source.name).write_bytes(source.read_bytes())
    out = tmp_path / "out"
    words = ["--load", str(tmp_path / "model.npz"), "--images", str(images), "--output", str(out), "--format", "cvat"]
    assert annotate.main([*words, "--threshold", "0.2"]) == 0
    assert convert_data.main([str(out / "annotations.xml"), str(out / "back.json"), "--images", str(images)]) == 0
    said = capsys.readouterr().err
    assert "after the corrections: python tools/convert_data.py" in said and "to go on: ./train.py" in said
    spec = ["back.json", str(images)]
    cfg = tiny_config(f"DATA.BASEDIR={out}", f"DATA.DATASETS={{'mine': {spec!r}}}", "MODE_MASK=True")
    split = load_split(cfg, "mine", training=True)
    assert split.class_names == ["cat", "dog", "owl"] and len(split) == 2
    assert 0 < len(split.columns["labels"]) <= 10


@quick
def test_large_images_are_seen_in_tiles_and_become_one_outline_each(tmp_path, monkeypatch):
    """Objects across tiles, in which nothing is found where the image is seen whole."""
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "field.png"), drawn(300, 400, [(60, 60, 60, 90, 1), (240, 150, 90, 30, 2)]))

    class Predictor:
        class_names, category_ids = ["cat", "dog", "owl"], [7, 8, 9]

        def __init__(self, load, settings, trusted, all_devices):
            self.cfg = config(*settings)
            self.predictors = [Squares(smallest=1000), Squares(smallest=1000)] if all_devices else []

    monkeypatch.setattr("predict.load_predictor", Predictor)
    words = ["--load", "run", "--images", str(images), "--threshold", "0.3", "--config", "TEST.TILE_WHOLE=True"]
    for tile, count in ((100, 2), (0, 0)):
        out = str(tmp_path / f"out{tile}")
        assert annotate.main([*words, f"TEST.TILE={tile}", "--output", out]) == 0
        content = json.loads((tmp_path / f"out{tile}/annotations.json").read_text())
        assert len(content["annotations"]) == count
        if tile:
            boxes = sorted((a["category_id"], *np.round(a["bbox"])) for a in content["annotations"])
            np.testing.assert_allclose(boxes, [(7, 60, 60, 60, 90), (8, 240, 150, 90, 30)], atol=1)
            assert [len(a["segmentation"]) for a in content["annotations"]] == [1, 1]


@quick
@pytest.mark.parametrize("to", ["coco", "cvat", "labelme", "yolo"])
def test_a_set_is_converted_and_back(to, tmp_path):
    truth = COCO_MINI / "annotations/instances_val2017.json"
    target = tmp_path / ("a.json" if to == "coco" else "out")
    images = COCO_MINI / "val2017"
    words = [str(truth), str(target), "--to", to, "--images", str(images)]
    assert convert_data.main(words) == 0
    source = target / "annotations.xml" if to == "cvat" else target
    assert convert_data.main([str(source), str(tmp_path / "back.json"), "--images", str(images)]) == 0
    before, after = (json.loads(Path(p).read_text()) for p in (truth, tmp_path / "back.json"))
    assert {i["file_name"] for i in after["images"]} == {i["file_name"] for i in before["images"]}
    objects = [a for a in before["annotations"] if not a["iscrowd"] or to in ("coco", "labelme")]
    assert len(after["annotations"]) == len(objects)
    assert convert_data.main([str(truth), str(target), "--to", to]) == 2  # nothing is replaced unasked
