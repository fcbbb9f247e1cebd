"""Prediction on several devices of one process, --predict's --benchmark and --raw."""

import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from graph import tiny_config
from tiny import COCO_MINI

import predict_benchmark
import train
from common import UserError
from inference import inference_callable
from predict_devices import inference_devices, predict_in_turn
from predict_raw import classes_of_detections
from utils.checkpoint import save_npz
from utils.tf_v1 import tf

IMAGES = COCO_MINI / "val2017"
SETTINGS = ["TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=5", "MODE_MASK=True",
            "TEST.RESULT_SCORE_THRESH_VIS=0.0"]  # fmt: skip


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """An untrained detector with COCO's classes of the photographs in tests/data."""
    names = [
        c["name"] for c in json.loads((COCO_MINI / "annotations/instances_val2017.json").read_text())["categories"]
    ]
    cfg = tiny_config(*SETTINGS, f"DATA.NUM_CATEGORY={len(names)}")
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(3)
        inference_callable(cfg)
        session.run(tf.global_variables_initializer())
        weights = session.run({v.op.name: v for v in tf.global_variables()})
    path = tmp_path_factory.mktemp("model") / "model.npz"
    save_npz(path, weights, {"settings": cfg.to_dict(), "class_names": names})
    return path


def run(*words) -> int:
    return train.main([str(w) for w in words])


def test_two_devices_of_a_process_and_batches_give_the_results_of_one_image_at_a_time(model_file, tmp_path, capsys):
    written = {}
    for replicas, batch in ((1, 1), (2, 1), (1, 3)):
        out = tmp_path / f"{replicas}-{batch}"
        config = ["--load", model_file, "--config", f"TRAIN.CPU_REPLICAS={replicas}", f"DATA.BASEDIR={COCO_MINI}"]
        config.append(f"TEST.BATCH_SIZE={batch}")
        assert run("--evaluate", out / "r.json", *config) == 0
        assert run("--predict", IMAGES, "--output", out / "p", "--no-window", *config) == 0
        said = capsys.readouterr().err
        assert ("predicting on 2 logical CPU devices" in said) == (replicas == 2)
        files = ("r.json", "r.metrics.json", "p/predictions.json", "p/predictions.csv")
        written[replicas, batch] = {name: (out / name).read_text() for name in files}
    assert written[1, 1] == written[2, 1] and len(json.loads(written[1, 1]["r.json"])) > 5
    for name in ("r.json", "p/predictions.json"):  # with the same padding only the last bits differ, if any
        one, many = (json.loads(written[1, batch][name]) for batch in (1, 3))
        assert [e.get("file") for e in one] == [e.get("file") for e in many]
        one, many = ([o for e in entries for o in e.get("detections", [e])] for entries in (one, many))
        assert [o["category_id"] for o in one] == [o["category_id"] for o in many]
        np.testing.assert_allclose([o["score"] for o in one], [o["score"] for o in many], atol=1e-5)
        boxes = [[o.get("box") or o["bbox"] for o in objects] for objects in (one, many)]
        np.testing.assert_allclose(*boxes, atol=0.02)


@pytest.mark.quick
def test_devices_of_a_process():
    assert inference_devices(tiny_config()) == [None]
    assert inference_devices(tiny_config("TRAIN.CPU_REPLICAS=3")) == ["/cpu:0", "/cpu:1", "/cpu:2"]
    assert inference_devices(tiny_config("TRAIN.CPU_REPLICAS=3"), processes=2) == [None]


@pytest.mark.quick
def test_batches_are_dealt_in_turn_and_come_back_in_order():
    calls = [[], []]

    def predictor(k):
        def predict(image, shape):
            calls[k].append(int(image[0]))
            return {"twice": 2 * image}

        return predict

    batches = [{"image": np.array([i]), "image_shape": None} for i in range(7)]
    found = list(predict_in_turn([predictor(0), predictor(1)], batches))
    assert [int(out["twice"][0]) for _, out in found] == [0, 2, 4, 6, 8, 10, 12]
    assert calls == [[0, 2, 4, 6], [1, 3, 5]]

    def fails(image, shape):
        raise UserError("diverged")

    with pytest.raises(UserError, match="diverged"):
        list(predict_in_turn([predictor(0), fails], batches))


@pytest.mark.quick
def test_the_next_batch_is_predicted_while_an_outcome_is_used():
    calls, second = [], threading.Event()

    def predict(image, shape):
        calls.append(image)
        if image == 1:
            second.set()
        return {}

    batches = [{"image": i, "image_shape": None} for i in range(3)]
    outcomes = predict_in_turn([predict], batches)
    assert next(outcomes)[0]["image"] == 0
    assert second.wait(60)  # nobody has asked for its outcome
    assert [b["image"] for b, _ in outcomes] == [1, 2]
    calls.clear()
    assert next(predict_in_turn([predict], batches, ahead=False))[0]["image"] == 0 and calls == [0]


# ------------------------------------------------------------------------------------------------ the benchmark
@pytest.mark.quick
def test_numbers_of_a_benchmark():
    times = np.array([[1, 2, 3, 4]] * 19 + [[11, 2, 3, 4]], float)
    result = predict_benchmark.summary(times)
    assert result["seconds"]["decode"] == {"median": 1, "mean": 1.5, "p5": 1, "p95": pytest.approx(1.5), "max": 11}
    assert result["seconds"]["all"]["median"] == 10 and result["images_per_second"] == pytest.approx(1 / 10.5)


def test_a_benchmark_of_your_own_model_and_images(model_file, tmp_path, capsys, monkeypatch):
    measured = []
    measure = predict_benchmark._measure
    monkeypatch.setattr(predict_benchmark, "_measure", lambda p, f: measured.append(f) or measure(p, f))
    assert run("--predict", IMAGES, "--benchmark", "--load", model_file, "--output", tmp_path) == 0
    result = json.loads((tmp_path / "benchmark.json").read_text())
    assert result["measurements"] >= 30 and len(measured) == result["measurements"] + result["warm_up"]
    assert set(result["seconds"]) == {"decode", "resize", "graph", "paste", "all"}
    assert "images/s" in capsys.readouterr().out and not list(tmp_path.glob("*.jpg"))


# ------------------------------------------------------------------------------------------------ raw
@pytest.mark.quick
def test_class_scores_of_a_detection_are_those_of_its_roi():
    rng = np.random.default_rng(0)
    scores = rng.random((6, 4)).astype(np.float32)
    own = rng.random((6, 4, 4)).astype(np.float32)  # a box for each class
    boxes, labels = np.stack([own[4, 1], own[2, 3]]), np.array([2, 4])
    np.testing.assert_array_equal(classes_of_detections(boxes, labels, own, scores), scores[[4, 2]])
    shared = own[:, :1]
    shared[5] = shared[1]  # equal boxes: the better score
    found = classes_of_detections(shared[[1], 0], np.array([3]), shared, scores)
    np.testing.assert_array_equal(found[0], scores[[1, 5]][np.argmax(scores[[1, 5], 2])])
    assert classes_of_detections(np.zeros((0, 4)), np.zeros(0, int), shared, scores).shape == (0, 4)


def test_raw_pictures_show_proposals_and_classes(model_file, tmp_path):
    assert run("--predict", IMAGES, "--raw", "--load", model_file, "--output", tmp_path, "--no-window") == 0
    entries = json.loads((tmp_path / "raw.json").read_text())
    assert len(entries) == len(list(IMAGES.glob("*.jpg"))) == len(list(tmp_path.glob("raw_*.jpg")))
    for entry in entries:
        assert 0 < len(entry["proposals"]) <= 50 and len(entry["objects"]) == 5
        scores = [p["score"] for p in entry["proposals"]]
        assert scores == sorted(scores, reverse=True)
        for o in entry["objects"]:
            assert len(o["classes"]) == 3 and list(o["classes"].values()) == sorted(o["classes"].values(), reverse=True)
            assert 0 <= o["box"][0] < o["box"][2] <= entry["width"]
            assert o["classes"].get(o["class"], o["score"]) == pytest.approx(o["score"], abs=2e-5)
    picture, image = cv2.imread(str(sorted(tmp_path.glob("raw_*.jpg"))[0])), cv2.imread(entries[0]["file"])
    assert picture.shape[1] > 2 * image.shape[1]
