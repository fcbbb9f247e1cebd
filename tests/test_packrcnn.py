"""packrcnn.py and predict_found.py: models from Python, the images they take, and what they return."""

import gc
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from graph import save_untrained
from tiny import COCO_MINI, TINY_TRAINING

import viz
from detections import Detections
from packrcnn import Found, FoundObject, UserError, load
from predict import load_predictor  # before `load`: TensorFlow computes in graphs in the tests' process
from utils.checkpoint import keep_best, load_weights, write_checkpoint_meta
from utils.polygons import decode_mask, encode_mask
from utils.tf_v1 import tf

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = sorted(str(p) for p in (COCO_MINI / "val2017").glob("*.jpg"))


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model.npz")


@pytest.fixture(scope="module")
def model(file):
    with load(file) as loaded:
        yield loaded


def same(one: Found, other: Found) -> bool:
    return (
        all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("boxes", "scores", "labels"))
        and one.rles == other.rles
        and one.size == other.size
    )


# -------------------------------------------------------------------------------------------------------------- images
def test_a_file_its_bytes_its_pixels_in_either_order_and_pils_image_give_the_same(model):
    path = PHOTOS[0]
    bgr = cv2.imread(path)
    found = model(path)
    assert len(found) == 5 and found.file == path and found.size == bgr.shape[:2]
    lossless = model(bgr, order="bgr")
    assert same(found, lossless) and lossless.order == "bgr" and lossless.file is None
    alpha = np.dstack([bgr[:, :, ::-1], np.zeros(bgr.shape[:2], np.uint8)])
    rgb = PIL.Image.fromarray(np.ascontiguousarray(bgr[:, :, ::-1]))
    for image, order in (
        (Path(path), None), (Path(path).read_bytes(), None), (bgr[:, :, ::-1], "rgb"), (alpha, "rgb"),
(rgb, None), (rgb.convert("RGBA"), None),
    ):  # fmt: skip
        assert same(model(image, order=order), found), type(image)
    grey = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
    wanted = model(cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR), order="bgr")
    for image in (grey, grey[:, :, None], PIL.Image.fromarray(grey)):
        assert same(model(image), wanted)
    assert not same(model(bgr, order="rgb"), found)


def test_images_of_pil_are_turned_as_their_exif_data_says(model, tmp_path):
    image = PIL.Image.open(PHOTOS[0])
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)  # lossless: JPEG decoders differ by a level
    turned = model(tmp_path / "turned.png")
    assert turned.size == image.size and same(model(PIL.Image.open(tmp_path / "turned.png")), turned)


WRONG = {
    "say in which order the colours": np.zeros((4, 4, 3), np.uint8),
    "uint8, not float64; of values from 0 to 1": np.zeros((4, 4)),
    "uint8, not int64$": np.zeros((4, 4), np.int64),
    r"\[H,W,3\], \[H,W,4\] or \[H,W\], not \[4, 4, 2\]": np.zeros((4, 4, 2), np.uint8),
    r"not \[0, 4, 3\]": np.zeros((0, 4, 3), np.uint8),
    "tests is a folder": str(ROOT / "tests"),
    "cannot be read: No such file": "missing.jpg",
    "given as bytes is not an image": b"no image",
    "not of the type int": 3,
    "mode I;16 has no range": PIL.Image.new("I;16", (4, 4)),
    "image 1: say in which order": [PHOTOS[0], np.zeros((4, 4, 3), np.uint8)],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_image_is_refused_in_one_line(model, message):
    with pytest.raises(UserError, match=message) as error:
        model(WRONG[message])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [{"order": "BGR"}, {"batch_size": 0}, {"batch_size": 1.5}])
def test_wrong_arguments_of_a_call_are_refused(model, key):
    with pytest.raises(UserError, match=f"{next(iter(key))}="):
        model(PHOTOS[0], **key)


def test_images_of_a_list_are_predicted_together_with_the_results_of_each_alone(model):
    """Images of one padded size share a batch; a batch's convolutions may differ in the last bits."""
    rng = np.random.default_rng(0)
    sizes = [(96, 128), (128, 96), (96, 128), (97, 131), (50, 200), (96, 128), (90, 120)]
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    alone = [model(image, order="rgb") for image in images]
    calls = []
    predict = model._predictor.predictors[0]
    model._predictor.predictors[0] = lambda *batch: calls.append(len(batch[0])) or predict(*batch)
    try:
        together = model(images, order="rgb", batch_size=3)
        assert sorted(calls, reverse=True)[0] == 3 and sum(calls) == len(images)
        streamed = list(model.each(iter(images), order="rgb", batch_size=2))
        stacked = model(np.stack([images[0], images[2]]), order="rgb")
    finally:
        model._predictor.predictors[0] = predict
    for results in (together, streamed):
        for one, other, image in zip(alone, results, images):
            assert other.size == image.shape[:2] and list(one.labels) == list(other.labels)
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    assert [f.size for f in stacked] == [(96, 128)] * 2 and same(stacked[1], alone[2])
    assert model([]) == []


def test_large_images_are_seen_in_tiles_where_the_settings_say_so(file):
    """The tiles of each image are dealt to all devices."""
    calls = []
    with load(file, order="bgr", device="all", settings={"TEST.TILE": 128, "TRAIN.CPU_REPLICAS": 2}) as model:
        held = model._predictor.predictors
        model._predictor.predictors = [counted(predict, calls, n) for n, predict in enumerate(held)]
        ours = model([PHOTOS[0], cv2.imread(PHOTOS[0])])
        model._predictor.predictors = held
    assert len(calls) > 4 and abs(calls.count(0) - calls.count(1)) <= 2
    theirs = load_predictor(file, ["TEST.TILE=128"])(PHOTOS[0])
    for found in ours:
        assert found.size == cv2.imread(PHOTOS[0]).shape[:2] and found.rles == theirs.masks
        np.testing.assert_array_equal(found.boxes, theirs.boxes)


def counted(predict, calls, number):
    return lambda *batch: calls.append(number) or predict(*batch)


def test_images_of_a_list_are_dealt_to_all_devices(file, model):
    calls, photos = [], (2 * PHOTOS)[:4]
    with load(file, device="all", settings={"TRAIN.CPU_REPLICAS": 2}) as two:
        held = two._predictor.predictors
        two._predictor.predictors = [counted(predict, calls, n) for n, predict in enumerate(held)]
        found = two(photos)
        two._predictor.predictors = held
    assert sorted(calls) == [0, 0, 1, 1]
    for photo, result in zip(photos, found, strict=True):
        assert same(result, model(photo))


def test_results_of_each_come_while_later_images_are_not_read_yet(model):
    def images():
        yield PHOTOS[0]
        yield PHOTOS[1]
        raise AssertionError("read too early")

    results = model.each(images())
    assert [next(results).file, next(results).file] == PHOTOS[:2]


# ------------------------------------------------------------------------------------------------------------- results
@pytest.fixture
def found() -> Found:
    masks = np.zeros((3, 20, 30), bool)
    for n in range(3):
        masks[n, 2 * n : 10, n : 12 + n] = True
    detections = Detections(
        np.array([[0, 0, 12, 10], [1, 2, 13, 10], [2, 4, 14, 10]], np.float32),
        np.array([0.9, 0.6, 0.2], np.float32),
        np.array([2, 1, 2], np.int32),
        [encode_mask(mask) for mask in masks],
        np.arange(18, dtype=np.float32).reshape(3, 2, 3),
    )
    return Found(detections, ["cat", "dog", "owl"], (20, 30), [7, 8, 9])


@pytest.mark.quick
def test_objects_by_number_slice_score_and_class(found):
    assert len(found) == 3 and found.names == ["dog", "cat", "dog"] and found.masks.shape == (3, 20, 30)
    first = found[0]
    assert isinstance(first, FoundObject) and (first.name, first.label, first.category_id) == ("dog", 2, 8)
    assert first.score == pytest.approx(0.9) and first.keypoints.tolist() == [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(first.mask, found.masks[0])
    assert found[-1].score == pytest.approx(0.2) and [o.name for o in found] == found.names
    with pytest.raises(IndexError):
        found[3]
    for some in (found[::2], found[[0, 2]], found[found.labels == 2], found.filter(classes="dog")):
        assert some.names == ["dog", "dog"] and some.scores.tolist() == found.scores[[0, 2]].tolist()
        np.testing.assert_array_equal(some.masks, found.masks[[0, 2]])
        np.testing.assert_array_equal(some.keypoints, found.keypoints[[0, 2]])
    assert found.filter(0.6).names == ["dog", "cat"] and found.filter(0.3, ["cat", "owl"]).names == ["cat"]
    assert repr(found) == "<3 objects in an image of 30x20: 2 dog, 1 cat>"
    assert repr(found[:0]) == "<0 objects in an image of 30x20>" and found[:0].masks.shape == (0, 20, 30)
    with pytest.raises(UserError, match="no class 'dgo'; it has cat, dog, owl"):
        found.filter(classes=["dgo"])


@pytest.mark.quick
def test_results_for_others(found, monkeypatch):
    entries = found.to_coco("photo 1")
    assert [e["category_id"] for e in entries] == [8, 7, 8] and entries[1]["bbox"] == [1, 2, 12, 8]
    assert {e["image_id"] for e in entries} == {"photo 1"} and entries[0]["segmentation"] == found.rles[0]
    assert found.to_dict()["detections"][1]["class"] == "cat" and found.to_dict()["width"] == 30
    with pytest.raises(UserError, match="pip install supervision"):
        monkeypatch.setitem(sys.modules, "supervision", None)
        found.to_supervision()
    fake = types.SimpleNamespace(Detections=lambda **values: types.SimpleNamespace(**values))
    monkeypatch.setitem(sys.modules, "supervision", fake)
    theirs = found.to_supervision()
    assert theirs.class_id.tolist() == [1, 0, 1] and theirs.data["class_name"].tolist() == found.names
    assert theirs.xyxy is found.boxes and theirs.mask.dtype == bool and theirs.confidence is found.scores


@pytest.mark.quick
def test_pictures_have_the_order_of_the_image_or_the_one_asked_for(found, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    wanted = viz.draw_detections(image, found.detections, found.class_names, 0.5)
    bgr, rgb = found.draw(image, order="bgr", score=0.5), found.draw(image[:, :, ::-1], order="rgb", score=0.5)
    np.testing.assert_array_equal(bgr, wanted)
    np.testing.assert_array_equal(rgb[:, :, ::-1], wanted)
    np.testing.assert_array_equal(found.draw(PIL.Image.fromarray(image[:, :, ::-1].copy()), score=0.5), rgb)
    for order in ("bgr", "rgb"):
        path = found.save(tmp_path / "x.png", image if order == "bgr" else image[:, :, ::-1], order=order, score=0.5)
        np.testing.assert_array_equal(cv2.imread(str(path)), wanted)
    with pytest.raises(UserError, match="so give the image"):
        found.draw()
    with pytest.raises(UserError, match="of an image of"):
        found.draw(image[:10], order="bgr")
    with pytest.raises(UserError, match=r"must end in \.jpg or \.png"):
        found.save(tmp_path / "x.bmp", image, order="bgr")


def test_a_picture_of_a_file_needs_no_image(model):
    found = model(PHOTOS[0])
    np.testing.assert_array_equal(found.draw(), found.draw(cv2.imread(PHOTOS[0]), order="bgr")[:, :, ::-1])
    np.testing.assert_array_equal(found.masks[1], decode_mask(found.rles[1]))


# ------------------------------------------------------------------------------------------------------------- loading
def test_arguments_become_settings(file):
    names = ["Katze", "Hund", "Eule"]
    with load(
        str(file), score_threshold=0.25, precision="bfloat16", device="cpu", class_names=names, batch_size=2,
        order="bgr", settings={"TEST.RESULTS_PER_IM": 3, "TEST.NMS": "soft_linear"},
    ) as model:  # fmt: skip
        test = model.cfg.TEST
        assert (test.RESULT_SCORE_THRESH, test.BATCH_SIZE, test.RESULTS_PER_IM, test.NMS) == (0.25, 2, 3, "soft_linear")
        assert model.cfg.TEST.PRECISION == "bfloat16" and model.class_names == names
        found = model(cv2.imread(PHOTOS[0]))  # its order was said before
        assert (found.scores > 0.25).all() and set(found.names) <= set(names) and found.order == "bgr"
    assert repr(model).endswith("model.npz: 3 classes, closed>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere"}, "nowhere do not exist"),
        ({"class_names": ["a"]}, "has 3 classes, here are 1 names"),
        ({"device": "gpu:7"}, "device='gpu:7': "),
        ({"device": "tpu"}, "device='tpu': must be"),
        ({"precision": "int8"}, "TEST.PRECISION"),
        ({"score_threshold": 7}, "TEST.RESULT_SCORE_THRESH"),
        ({"order": "bgra"}, "order='bgra'"),
        ({"settings": {"TEST.RESULTS": 1}}, "unknown setting TEST.RESULTS"),
        ({"settings": ["TEST.RESULTS=1"]}, "unknown setting TEST.RESULTS"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(file, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load(**{"path": file, **arguments})
    assert "\n" not in str(error.value)


def test_a_run_gives_its_newest_checkpoint_and_best_the_best_one(file, model, tmp_path):
    weights, meta = load_weights(file)
    with tf.Graph().as_default(), tf.Session() as session:
        variables = {name: tf.get_variable(name, initializer=value) for name, value in weights.items()}
        session.run(tf.global_variables_initializer())
        for step in (10, 20):
            tf.train.Saver(variables).save(session, str(tmp_path / f"model-{step}"), write_meta_graph=False)
            write_checkpoint_meta(str(tmp_path / f"model-{step}"), {**meta, "step": step})
            if step == 10:  # later the model found owls only
                session.run(variables["fastrcnn/outputs/class/b"].assign([0, 0, 0, 9]))
    with pytest.raises(UserError, match=r"has no best checkpoint.*model-20"):
        load(tmp_path / "best")
    keep_best(tmp_path, 10, {"metric": "bbox/AP", "score": 0.5})
    with load(tmp_path / "best") as best, load(str(tmp_path)) as newest:
        assert same(best(PHOTOS[0]), model(PHOTOS[0]))
        assert set(newest(PHOTOS[0]).names) == {"owl"} != set(best(PHOTOS[0]).names)


def test_stored_settings_run_no_code_unless_their_module_is_trusted(tmp_path):
    file = save_untrained(tmp_path / "own.npz", "FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head")
    with pytest.raises(UserError, match="asks for code of the module demo.own_head"):
        load(file)
    with load(file, trust_code="demo.own_head") as model:
        assert len(model(PHOTOS[0])) == 5


def test_a_closed_model_says_so_and_its_graph_and_weights_are_gone(file):
    model = load(file, settings={"TEST.AUG_SHORT_EDGES": [64]})
    assert len(model(PHOTOS[0])) == 5
    predictor = model._predictor.predict_batch
    held = [weakref.ref(predictor._session), weakref.ref(predictor._session.graph)]
    del predictor
    model.close()
    model.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    with pytest.raises(UserError, match="is closed"):
        model(PHOTOS[0])


@pytest.mark.quick
def test_in_the_checkout_modules_have_the_names_of_the_installed_package_too():
    import packrcnn.utils.polygons
    import packrcnn.viz

    assert packrcnn.viz is viz and viz.__spec__.name == "viz" and packrcnn.utils.polygons.decode_mask is decode_mask
    with pytest.raises(ModuleNotFoundError):
        import packrcnn.nothing


# ------------------------------------------------------------------------------------------------ in a user's program
PROGRAM = """
import logging, os, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor

logging.basicConfig(level=logging.INFO, format="ROOT %(name)s %(message)s")
import numpy, cv2, tqdm  # what the interface imports sets variables and filters of its own

def state():
    return list(logging.root.handlers), logging.root.level, logging.getLogger("tensorflow").level

from packrcnn import UserError, load
first, second, photos = {first!r}, {second!r}, {photos!r}
assert "tensorflow" not in sys.modules
before, variables = state(), dict(os.environ)
models = dict(zip("ab", ThreadPoolExecutor(2).map(load, [first, second])))  # loaded in threads
import tensorflow as tf

tf.config.experimental.enable_tensor_float_32_execution(False)
load(first).close()
assert not tf.config.experimental.tensor_float_32_execution_enabled()
assert state() == before
changed = {{k for k in os.environ if os.environ[k] != variables.get(k)}}
assert not {{"TF_USE_LEGACY_KERAS", "TF_CPP_MIN_LOG_LEVEL", "GRPC_VERBOSITY"}} & changed, changed
assert not [f for f in warnings.filters if f[0] == "ignore" and f[3] and "tensorpack" in getattr(f[3], "pattern", "")]
# TensorFlow 2 is as it is by default: eager, with equality by value, functions, random numbers without seeds, Keras 3.
assert tf.executing_eagerly() and (tf.constant([1, 2]) == tf.constant([1, 3])).numpy().tolist() == [True, False]
assert isinstance(tf.zeros([2, 3]).shape[-1], int) and tf.random.normal([2]).shape == (2,)
assert tf.function(lambda x: x + 1)(tf.constant(1)).numpy() == 2
assert tf.keras.layers.Dense(2)(tf.zeros([1, 3])).shape == (1, 2) and tf.keras.__version__.startswith("3.")
assert not tf.compat.v1.get_default_graph().get_operations()

alone = {{(key, photo): model(photo) for key, model in models.items() for photo in photos}}
assert all(len(found) for found in alone.values())
# Calls of both models from several threads at once, beside eager work, give what single calls give.
def work(entry):
    assert tf.executing_eagerly()
    return models[entry[0]](entry[1])
jobs = list(alone) * 6
with ThreadPoolExecutor(6) as pool:
    for entry, found in zip(jobs, pool.map(work, jobs)):
        assert found.rles == alone[entry].rles and (found.boxes == alone[entry].boxes).all(), entry
assert [f.file for f in models["a"](photos, batch_size=2)] == photos
models["a"].close()
assert len(models["b"](photos[0]))
print("GUEST", threading.active_count(), flush=True)

sys.argv[0] = "train.py"
import train  # training in the same process takes TensorFlow over
assert train.main(["--logdir", {logdir!r}, "--config", *{training!r}]) == 0
assert not tf.executing_eagerly()
print("TRAINED")
"""


def test_in_a_program_of_the_user_tensorflow_and_logging_stay_as_they_are(file, tmp_path):
    """Two models of different kinds in one process, loaded and called from threads."""
    second = save_untrained(tmp_path / "c4.npz", "MODE_FPN=False", "MODE_MASK=False", "TEST.AUG_SHORT_EDGES=[64,96]")
    code = PROGRAM.format(
        first=str(file), second=str(second), photos=PHOTOS, logdir=str(tmp_path / "run"),
        training=[*TINY_TRAINING, "TRAIN.MAX_STEPS=1"],
    )  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "GRPC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    guest, _, rest = done.stdout.partition("\n")
    assert guest.startswith("GUEST") and rest == "TRAINED\n"
    assert "ROOT packrcnn" not in done.stderr, "messages of the project reach the root logger"
    assert "finished 1 steps" in done.stderr and "cpu_feature_guard" not in done.stderr


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_examples_of_the_document_run_as_printed(file, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "PYTHON.md").read_text()
    examples = re.findall(r"(?ms)^```python\n(.*?)^```", text)
    (tmp_path / "train_log").mkdir()
    # A model whose scores are above the examples' thresholds.
    shutil.copy(file, tmp_path / "train_log" / "run")
    shutil.copy(PHOTOS[0], tmp_path / "photo.jpg")
    shutil.copy(PHOTOS[1], tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    values: dict = {}
    for number, example in enumerate(examples):
        exec(
            compile(example.replace("score_threshold=0.5", "score_threshold=0.2"), f"example {number}", "exec"), values
        )
    out = capsys.readouterr().out
    assert out.startswith("<5 objects in photo.jpg (640x425): ") and "photo.jpg 5\nother.jpg 5\n" in out
    assert "image missing.jpg cannot be read" in out and out.endswith("5 5\n")
    assert (tmp_path / "found.jpg").exists() and len(values["several"]) == 2
    assert len(values["entries"]) == 5 and values["drawn"].shape == values["frame"].shape
    values["model"].close()
    # The table names all arguments of `load`.
    arguments = set(re.findall(r"(?m)^\| `(\w+)=", text))
    assert arguments == {name for name, p in inspect.signature(load).parameters.items() if p.kind is p.KEYWORD_ONLY}
