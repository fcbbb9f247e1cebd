"""predict.py: predictors from Python, and a data set's results, whoever computes its parts."""

import csv
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from graph import save_untrained, tiny_config
from small_videos import read_video, write_video
from test_predict_tiles import Squares, drawn
from test_predict_tiles import config as tiles_config
from tiny import COCO_MINI

import eval as scoring
import predict
import train
from common import UserError
from config import default_config, finalize_config
from data import inference_batches, list_images
from dataset import load_split
from detections import Detections, to_original_frame
from predict import evaluate_split, keypoint_flip, load_predictor, merge_shards, predict_files, write_cut_outs
from utils.polygons import encode_mask
from viz import Drawing, Style


# ------------------------------------------------------------------------------------------ predictors
@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """An untrained detector of three classes, with low scores that pass its threshold."""
    return save_untrained(tmp_path_factory.mktemp("model") / "model.npz")


def test_a_loaded_predictor_finds_in_a_photograph_what_the_batches_of_a_data_set_find(model_file):
    predictor = load_predictor(model_file, ["TEST.RESULTS_PER_IM=4"])
    assert (predictor.class_names, predictor.category_ids) == (["cat", "dog", "owl"], [7, 8, 9])
    file = str(sorted((COCO_MINI / "val2017").glob("*.jpg"))[0])
    found = predictor(file)
    (batch,) = inference_batches([file], predictor.cfg)
    outputs = predictor.predict_batch(batch["image"], batch["image_shape"])
    wanted = to_original_frame(
        {k: v[0] for k, v in outputs.items()}, batch["image_shape"][0], batch["original_shapes"][0]
    )
    assert len(found.boxes) == 4 and found.masks == wanted.masks
    for key in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))
    of_pixels = predictor(cv2.imread(file))
    np.testing.assert_array_equal(of_pixels.boxes, found.boxes)
    assert of_pixels.masks[0]["size"] == list(cv2.imread(file).shape[:2])


@pytest.mark.quick
def test_sides_of_keypoints_come_with_the_weights_or_are_cocos_or_are_asked_for():
    model = ["MODE_KEYPOINT=True", "TEST.AUG_SHORT_EDGES=[64]"]
    persons, other = tiny_config(*model), tiny_config(*model, "KRCNN.NUM_KEYPOINT=3")
    assert keypoint_flip(persons, None) == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    assert keypoint_flip(other, {"keypoint_flip": [0, 2, 1]}) == [0, 2, 1]
    with pytest.raises(UserError, match="TEST.AUG_FLIP=False"):
        keypoint_flip(other, {"settings": {}})
    unflipped = tiny_config(*model, "KRCNN.NUM_KEYPOINT=3", "TEST.AUG_FLIP=False")
    assert keypoint_flip(unflipped, None) == []


def test_a_video_from_the_command_line_has_the_detections_of_its_frames(model_file, tmp_path):
    video = write_video(tmp_path / "walk.avi", 5)
    settings = ["TEST.BATCH_SIZE=2", "TEST.RESULT_SCORE_THRESH_VIS=0"]
    words = ["--predict", str(video), "--load", str(model_file), "--output", str(tmp_path / "out"), "--track"]
    assert train.main([*words, "--every", "2", "--config", *settings]) == 0
    entries = [json.loads(line) for line in (tmp_path / "out/walk.jsonl").read_text().splitlines()]
    assert [e["frame"] for e in entries] == [0, 2, 4]
    predictor = load_predictor(model_file, settings)
    for entry, pixels in zip(entries, read_video(video)[::2]):
        found = predictor(pixels)
        assert len(found.scores) == len(entry["detections"]) > 0
        for d, box, mask in zip(entry["detections"], found.boxes, found.masks):
            np.testing.assert_allclose(d["box"], box, atol=0.02)
            assert d["mask"]["size"] == mask["size"] and "track" in d
    assert len(read_video(tmp_path / "out/walk.avi")) == 3


def test_a_predictor_with_tiles_finds_in_an_image_that_fits_what_it_finds_without(model_file):
    file = str(sorted((COCO_MINI / "val2017").glob("*.jpg"))[0])
    plain = load_predictor(model_file)(file)
    height, width = cv2.imread(file).shape[:2]
    fitting = load_predictor(model_file, [f"TEST.TILE={max(height, width)}"])(file)
    for a, b in zip(plain, fitting):
        np.testing.assert_array_equal(a, b)
    predictor = load_predictor(model_file, ["TEST.TILE=200"])
    found = predictor(file)
    assert len(found.boxes) > len(plain.boxes)  # five of each of several tiles
    assert found.masks[0]["size"] == [height, width] and (found.boxes[:, 2:] <= [width, height]).all()
    assert (np.diff(found.scores) <= 0).all() and found.boxes[:, 2].max() > 200
    # Tiles are square, so one view of the same short edge is what the network sees without augmentation.
    view = ["TEST.AUG_SHORT_EDGES=[96]", "TEST.AUG_FLIP=False", "TEST.TILE_WHOLE=False"]
    augmented = load_predictor(model_file, ["TEST.TILE=200", *view])(file)
    alone = load_predictor(model_file, ["TEST.TILE=200", "TEST.TILE_WHOLE=False"])(file)
    np.testing.assert_allclose(augmented.boxes, alone.boxes, atol=0.01)
    np.testing.assert_array_equal(augmented.labels, alone.labels)


def test_small_objects_of_a_data_set_are_scored_in_tiles(tmp_path):
    """One pixel of the whole image is four of the file: the areas of one class merge; tiles show each as it is."""
    images, annotations = [], []
    for number in (1, 2):
        objects = [(x + number, y, 6, 6, 1 + (x + y) % 2) for x in range(10, 380, 21) for y in range(10, 280, 19)]
        cv2.imwrite(str(tmp_path / f"{number}.png"), drawn(300, 400, objects))
        images.append({"id": number, "file_name": f"{number}.png", "height": 300, "width": 400})
        annotations += [
            {"image_id": number, "category_id": c, "bbox": [x, y, w, h], "iscrowd": 0, "area": w * h,
             "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            for x, y, w, h, c in objects[:100]
        ]  # fmt: skip
        cv2.imwrite(str(tmp_path / f"{number}.png"), drawn(300, 400, objects[:100]))
    annotations = [{"id": n, **a} for n, a in enumerate(annotations, 1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": n, "name": f"c{n}"} for n in (1, 2)]}
    (tmp_path / "small.json").write_text(json.dumps(content))
    changes = [f"DATA.BASEDIR={tmp_path}", 'DATA.DATASETS={"small": ["small.json", "."]}', "TEST.RESULTS_PER_IM=1000"]
    scores = {}
    for tile in (0, 100):
        cfg = tiles_config(*changes, f"TEST.TILE={tile}", "TEST.TILE_WHOLE=False", "TEST.BATCH_SIZE=2")
        split = load_split(cfg, "small")
        results = evaluate_split([Squares()], split, cfg, progress=False)
        scores[tile] = split.evaluate(results, verbose=False)["bbox/AP"]
        again = evaluate_split([Squares(), Squares()], split, cfg, progress=False)  # on two devices
        assert again == results
    assert scores[100] > 0.95 and scores[0] < 0.3


def test_a_very_large_image_is_drawn_smaller_with_everything_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "LARGEST_PICTURE", 300 * 400 // 9 + 1)
    objects = [(60, 60, 60, 90, 1), (240, 150, 90, 30, 2)]
    cv2.imwrite(str(tmp_path / "a.png"), drawn(300, 400, objects))

    class Predictor:
        cfg, class_names, category_ids = tiles_config("TEST.TILE_WHOLE=False"), ["a", "b", "c"], None
        predictors = [Squares(smallest=100)]

    truth = {"images": [{"id": 4, "file_name": "a.png", "height": 300, "width": 400}],
             "categories": [{"id": 1, "name": "a"}],
             "annotations": [{"id": 1, "image_id": 4, "category_id": 1, "bbox": [60, 60, 60, 90],
                              "segmentation": [[60, 60, 120, 60, 120, 150, 60, 150]]}]}  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    drawing = Drawing(Style(parts="masks"), truth=str(tmp_path / "truth.json"))
    predict_files(Predictor(), [str(tmp_path / "a.png")], str(tmp_path / "out"), False, drawing)
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())
    boxes = sorted(d["box"] for d in entry["detections"])
    np.testing.assert_allclose(boxes, [[60, 60, 120, 150], [240, 150, 330, 180]], atol=1)
    assert (entry["height"], entry["width"]) == (300, 400) and entry["detections"][0]["mask"]["size"] == [300, 400]
    picture = cv2.imread(str(tmp_path / "out/a.png")).astype(int)[-100:]  # below the captions
    assert picture.shape[1] < 300 and picture.shape[0] == 100
    for left in (0, picture.shape[1] - 134):  # annotations, detections
        grey, object_ = picture[90, left + 10], picture[35, left + 30]
        assert np.ptp(grey) < 12 and np.ptp(object_) > 30  # a coloured mask where the object is


# ------------------------------------------------------------------------------------------ data sets
class FakeSplit:
    """Images of known sizes with an annotation dictionary in memory."""

    name = "fake"

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def image_id(self, i):
        return self.images[i]["id"]

    def label_to_category_id(self, label):
        return label * 10


def fake_batches(split, cfg, shard, unreadable=None):
    """Batches of up to two images at half size, as data.inference_batches would give them."""
    indices = list(range(shard[0], len(split), shard[1]))
    for i in [i for i in indices if split.images[i].get("damaged")]:
        unreadable(i, UserError(f"image {i} is damaged"))
        indices.remove(i)
    for start in range(0, len(indices), 2):
        batch = indices[start : start + 2]
        shapes = [(split.images[i]["height"], split.images[i]["width"]) for i in batch]
        yield {
            # The image number travels in the pixels, so that the fake predictor knows what to answer.
            "image": np.stack([np.full((8, 8, 3), i, np.uint8) for i in batch]),
            "image_shape": np.array([(h // 2, w // 2) for h, w in shapes], np.int32),
            "indices": batch,
            "original_shapes": shapes,
        }


def fake_predict(image, image_shape):
    """Image i has i % 3 detections."""
    n = len(image)
    masks = np.random.default_rng(0).random((2, 28, 28)).astype(np.float32)
    boxes = np.tile(np.array([[1, 2, 11, 8], [0, 0, 4, 4]], np.float32), (n, 1, 1))
    return {
        "boxes": boxes + image[:, 0, 0, :1, None] / 100,
        "scores": np.tile(np.array([0.9, 0.4], np.float32), (n, 1)),
        "labels": np.tile(np.array([2, 1], np.int32), (n, 1)),
        "masks": np.tile(masks, (n, 1, 1, 1)),
        "count": image[:, 0, 0, 0].astype(np.int32) % 3,
    }


@pytest.fixture
def fake_split(monkeypatch):
    monkeypatch.setattr(predict, "inference_batches", fake_batches)
    return FakeSplit([{"id": f"image {i}" if i % 2 else i, "height": 40 + i, "width": 50} for i in range(11)])


@pytest.mark.quick
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_devices(fake_split, devices):
    results = evaluate_split([fake_predict] * devices, fake_split, None, progress=False)
    alone = evaluate_split(fake_predict, fake_split, None, progress=False)
    assert results == alone
    assert list(dict.fromkeys(r["image_id"] for r in alone)) == ["image 1", 2, 4, "image 5", "image 7", 8, 10]
    assert len(alone) == sum(i % 3 for i in range(11))
    assert json.loads(json.dumps(alone)) == alone


@pytest.mark.quick
def test_ctrl_c_ends_an_evaluation_before_its_next_batch(fake_split):
    calls = []

    def interrupting(image, image_shape):
        calls.append(len(image))
        os.kill(os.getpid(), signal.SIGTERM)
        while not stopped.is_set():  # until the main thread has seen the signal
            time.sleep(0.01)
        return fake_predict(image, image_shape)

    stopped = threading.Event()

    def handler(number, frame):
        stopped.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate_split(interrupting, fake_split, None, progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) <= 2  # of 6


@pytest.mark.quick
def test_an_evaluation_that_is_asked_to_stop_does(fake_split):
    answers = iter([False, False, True, True])
    with pytest.raises(predict.EvaluationStopped):
        evaluate_split(fake_predict, fake_split, None, progress=False, should_stop=lambda: next(answers))


@pytest.mark.quick
def test_processes_gather_the_results_of_all(fake_split):
    size, barrier, parts = 3, threading.Barrier(3), {}
    outcome = {}

    def process(rank):
        def gather(mine):
            parts[rank] = mine
            barrier.wait(10)
            return [parts[r] for r in range(size)]

        outcome[rank] = evaluate_split([fake_predict] * 2, fake_split, None, (rank, size), gather, False)

    threads = [threading.Thread(target=process, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    alone = evaluate_split(fake_predict, fake_split, None, progress=False)
    assert outcome == {0: alone, 1: alone, 2: alone}
    with pytest.raises(ValueError, match="gather"):
        evaluate_split(fake_predict, fake_split, None, (0, 2), progress=False)


@pytest.mark.quick
@pytest.mark.parametrize("devices", [1, 2])
def test_an_image_that_cannot_be_read_costs_its_own_results_only(fake_split, devices, caplog):
    alone = evaluate_split(fake_predict, fake_split, None, progress=False)
    fake_split.images[4]["damaged"] = fake_split.images[7]["damaged"] = True
    reasons = []
    results = evaluate_split([fake_predict] * devices, fake_split, None, progress=False, unreadable=reasons)
    assert results == [r for r in alone if r["image_id"] not in (4, "image 7")] and len(results) < len(alone)
    assert reasons == ["image 4 is damaged", "image 7 is damaged"]
    for image in fake_split.images:
        image["damaged"] = True
    with pytest.raises(UserError, match="none of the 11 images of fake can be read: image 0 is damaged"):
        evaluate_split(fake_predict, fake_split, None, progress=False)


# ------------------------------------------------------------------------------------------ folders of photographs
class OneBox:
    """A predictor that finds the same box everywhere; `watch` is called with the number of images seen before."""

    cfg = tiny_config("MODE_MASK=False", "TEST.BATCH_SIZE=1")
    class_names, category_ids = ["cat", "dog", "owl"], None

    def __init__(self, watch=lambda seen: None):
        self.seen, self.watch = 0, watch
        self.predictors = [self.predict_batch]

    def predict_batch(self, image, image_shape):
        self.watch(self.seen)
        self.seen += len(image)
        boxes = np.tile(np.array([[[4, 4, 20, 30]]], np.float32), (len(image), 1, 1))
        return {"boxes": boxes, "scores": np.full((len(image), 1), 0.75, np.float32),
                "labels": np.full((len(image), 1), 2, np.int32), "count": np.ones(len(image), np.int32)}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs of all kinds, one with a name that is not UTF-8, and two damaged ones."""
    path = tmp_path / "photos"
    path.mkdir()
    pixels = cv2.resize(cv2.imread(str(next((COCO_MINI / "val2017").glob("*.jpg")))), (80, 60))
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    for name in ("a.jpg", "b.jfif", os.fsdecode(b"caf\xe9.jpg")):
        (path / name).write_bytes(jpeg)
    for name in ("d.avif", "e.webp", "f.TIFF", "g.png", "h.gif"):
        (path / name).write_bytes(cv2.imencode(Path(name).suffix.lower(), pixels)[1].tobytes())
    (path / "b_truncated.jpg").write_bytes(jpeg[:200])
    (path / "z.png").write_bytes(b"")
    (path / "notes.txt").write_text("left out")
    (path / "._a.jpg").write_bytes(b"what macOS leaves")
    return path


@pytest.mark.quick
def test_a_folder_is_predicted_as_far_as_it_can_be_read_and_the_rest_is_named(folder, tmp_path, capfd):
    out = tmp_path / "out"
    files = list_images([folder])
    with pytest.raises(UserError) as error:
        predict_files(OneBox(), files, str(out), False)
    message = str(error.value)
    assert message.startswith(f"2 ({folder}/b_truncated.jpg, {folder}/z.png) of 10 images could not be read")
    good = [f for f in files if "truncated" not in f and "z.png" not in f]
    entries = json.loads((out / "predictions.json").read_text())
    assert [e["file"] for e in entries] == good and len(good) == 8
    assert all([d["class"] for d in e["detections"]] == ["dog"] for e in entries)
    pictures = {p.name for p in out.iterdir()} - {"predictions.json", "predictions.csv"}
    assert len(pictures) == 8 and os.fsdecode(b"caf\xe9.jpg") in pictures and "g.png" in pictures
    shown = capfd.readouterr().err
    assert "WARN:" not in shown and "notes.txt" in shown and "b_truncated.jpg" in shown


@pytest.mark.quick
def test_objects_below_the_score_from_which_they_are_drawn_are_counted(folder, tmp_path, capfd):
    class TwoBoxes(OneBox):
        def predict_batch(self, image, image_shape):
            one = super().predict_batch(image, image_shape)
            two = {key: np.repeat(one[key], 2, axis=1) for key in ("boxes", "labels")} | {"count": 2 * one["count"]}
            return two | {
                "scores": np.tile(np.array([[0.75, 0.3]], np.float32), (len(image), 1)),
                "count": two["count"],
            }

    predict_files(TwoBoxes(), [str(folder / "g.png")], str(tmp_path / "out"), False)
    assert "1 object, 1 more below score 0.5" in capfd.readouterr().err
    (entry,) = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [d["score"] for d in entry["detections"]] == [0.75, 0.3]


@pytest.mark.quick
def test_annotations_stand_beside_what_was_found_and_their_ids_are_in_both_tables(folder, tmp_path):
    content = {
        "images": [{"id": 42, "file_name": "train/g.png", "height": 60, "width": 80}],
        "categories": [{"id": 9, "name": "owl"}, {"id": 5, "name": "something else"}],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 9, "bbox": [10, 10, 30, 30],
             "segmentation": [[10, 10, 40, 10, 40, 40, 10, 40]]},
            {"id": 2, "image_id": 42, "category_id": 5, "bbox": [0, 0, 5, 5]},
        ],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    drawing = Drawing(Style(), truth=str(tmp_path / "truth.json"))
    predict_files(OneBox(), [str(folder / "g.png"), str(folder / "a.jpg")], str(tmp_path / "out"), False, drawing)
    first, second = json.loads((tmp_path / "out/predictions.json").read_text())
    assert first["image_id"] == 42 and "image_id" not in second
    with open(tmp_path / "out/predictions.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(r["image_id"], r["class"], r["category_id"]) for r in rows] == [("42", "dog", "2"), ("", "dog", "2")]
    x1, _, x2, _ = first["detections"][0]["box"]
    assert (float(rows[0]["x"]), float(rows[0]["width"])) == pytest.approx((x1, x2 - x1), abs=0.011)
    beside = cv2.imread(str(tmp_path / "out/g.png"))
    assert beside.shape[1] > 2 * 80 and cv2.imread(str(tmp_path / "out/a.jpg")).shape[1] == 80
    (tmp_path / "other.json").write_text(json.dumps({**content, "categories": content["categories"][1:]}))
    with pytest.raises(UserError, match="none of its classes is one of the model's"):
        predict_files(
            OneBox(), [str(folder / "g.png")], str(tmp_path / "x"), False, Drawing(truth=str(tmp_path / "other.json"))
        )


@pytest.mark.quick
def test_annotations_are_those_of_the_image_in_the_same_folder_with_their_points(tmp_path):
    content = {
        "images": [{"id": n, "file_name": f, "height": 60, "width": 80} for n, f in enumerate(
            ("a/1.png", "b/1.png", "x/2.png", "y/2.png", "3.png"))],
        "categories": [{"id": 9, "name": "owl", "keypoints": ["eye", "beak"]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [10, 10, 30, 30], "num_keypoints": 1,
                         "keypoints": [12, 14, 2, 0, 0, 0]}],
    }  # fmt: skip
    (tmp_path / "truth.json").write_text(json.dumps(content))
    truth = predict.Truth(str(tmp_path / "truth.json"), ["owl"])
    found = [truth.find(f"/data/{f}") for f in ("b/1.png", "a/1.png", "2.png", "c/3.png", "4.png")]
    assert [f and f["id"] for f in found] == [1, 0, None, 4, None]
    points = truth.annotations(found[0])["keypoints"]
    assert points[0, 0].tolist() == [12.5, 14.5, 2] and points[0, 1, 2] == 0
    assert truth.annotations(found[1])["keypoints"] is None


@pytest.mark.quick
def test_every_drawn_object_with_a_mask_is_cut_out(folder, tmp_path):
    mask = np.zeros((60, 80), np.uint8, order="F")
    mask[10:20, 30:50] = 1
    rle = encode_mask(mask)
    found = Detections(np.array([[30, 10, 50, 20]] * 2, np.float32), np.array([0.9, 0.2], np.float32),
                       np.array([1, 1], np.int32), [rle, rle])  # fmt: skip
    write_cut_outs(tmp_path / "cut", "g", str(folder / "g.png"), found, ["a/../b c"], 0.5)
    (path,) = (tmp_path / "cut").iterdir()
    assert path.name == "g_1_a_b_c.png"
    assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape == (10, 20, 4)


@pytest.mark.quick
def test_what_was_found_is_on_disk_while_later_images_are_looked_at(folder, tmp_path):
    out, target = tmp_path / "out", tmp_path / "out" / "predictions.json"
    partial = tmp_path / "out" / "predictions.json.partial"
    files = [f for f in list_images([folder]) if "truncated" not in f and "z.png" not in f]

    def end_at_the_fourth(seen):
        lines = partial.read_text().splitlines()
        # One image waits to be written while the next is looked at, and another may just be written.
        assert [json.loads(line)["file"] for line in lines] == files[: len(lines)] and not target.exists()
        assert len(lines) >= seen - 2
        if seen == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_files(OneBox(end_at_the_fourth), files, str(out), False)
    assert len(partial.read_text().splitlines()) == 3 and not target.exists()
    predict_files(OneBox(), files, str(out), False)
    assert len(json.loads(target.read_text())) == len(files) and not partial.exists()
    assert len((out / "predictions.json.partial.old").read_text().splitlines()) == 3


@pytest.mark.quick
def test_merging_refuses_duplicates_and_losses():
    part = [(0, [{"score": 1}]), (2, [])]
    assert merge_shards([part, [(1, [{"score": 2}])]], 3) == [{"score": 1}, {"score": 2}]
    with pytest.raises(ValueError, match="1 of 3 images were evaluated by no shard, e.g. number 1"):
        merge_shards([part], 3)
    with pytest.raises(ValueError, match="image number 2 was evaluated by two"):
        merge_shards([part, [(1, []), (2, [])]], 3)


@pytest.mark.quick
def test_an_error_of_the_predictor_or_of_pasting_reaches_the_caller(fake_split):
    def broken(image, image_shape):
        return {**fake_predict(image, image_shape), "boxes": np.full((len(image), 2, 4), np.nan, np.float32)}

    with pytest.raises(UserError, match="image image 1: .*diverged"):
        evaluate_split(broken, fake_split, None, progress=False)


@pytest.mark.quick
@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_written_results_file_reads_back_equal(tmp_path, fake_split, count):
    results = evaluate_split(fake_predict, fake_split, None, progress=False)[:count]
    path = tmp_path / "new" / "results.json"
    scoring.write_results(path, iter(results))
    truth = {"images": fake_split.images, "categories": [{"id": 10}, {"id": 20}]}
    assert scoring.read_results(path, truth) == results
    assert os.listdir(path.parent) == ["results.json"]


@pytest.mark.quick
def test_a_predictor_that_knows_the_annotations_scores_near_one_on_real_photographs():
    """The whole way: json, resized and padded batches, boxes and 28x28 masks in the resized frame, results, scores."""
    settings = ["MODE_FPN=True", "TEST.BATCH_SIZE=2", "PREPROC.TEST_SHORT_EDGE_SIZE=333", "PREPROC.MAX_SIZE=480"]
    settings += [f"DATA.BASEDIR={COCO_MINI}", "PREPROC.SHORT_EDGE_SIZE=333"]
    cfg = finalize_config(default_config().update_args(settings))
    split = load_split(cfg, "coco_train2017")
    order = iter([batch["indices"] for batch in inference_batches(split, cfg)])

    def know(image, image_shape):
        indices = next(order)
        found = [split.annotations(i) for i in indices]
        rows = max(len(f["boxes"]) for f in found)
        outputs = {
            "boxes": np.zeros((len(found), rows, 4), np.float32),
            "scores": np.zeros((len(found), rows), np.float32),
            "labels": np.zeros((len(found), rows), np.int32),
            "masks": np.zeros((len(found), rows, 28, 28), np.float32),
            "count": np.zeros(len(found), np.int32),
        }
        for n, (one, shape, i) in enumerate(zip(found, image_shape, indices)):
            height, width = split.image_size(i)
            keep = np.flatnonzero(~one["is_crowd"])
            k = len(keep)
            outputs["count"][n] = k
            outputs["boxes"][n, :k] = one["boxes"][keep] * np.tile(shape[::-1] / [width, height], 2)
            outputs["scores"][n, :k], outputs["labels"][n, :k] = 0.9, one["labels"][keep]
            for row, a in enumerate(keep):
                outputs["masks"][n, row] = cell_coverage(one["rings"][a], one["boxes"][a])
        return outputs

    def cell_coverage(rings, box):
        """Share of each of 28x28 cells that is inside the rings, from 8x8 samples."""
        scaled = [((r - box[:2]) / (box[2:] - box[:2]) * 224).ravel().tolist() for r in rings]
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, 224, 224)))
        return mask.reshape(28, 8, 28, 8).mean((1, 3))

    results = evaluate_split(know, split, cfg, progress=False)
    metrics = split.evaluate(results, verbose=False)
    assert metrics["bbox/AP"] > 0.99
    assert metrics["segm/AP50"] > 0.99 and metrics["segm/AP"] > 0.85
    assert not math.isnan(metrics["segm/AP_per_class/person"])
