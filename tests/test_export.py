"""tools/export.py and its parts: every family of models finds what the Python predictor finds."""

import base64
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
from graph import tiny_config

from data import resize_for_test
from detections import Detections
from export_model import found_in, freeze
from export_onnx import convert, onnx_runner, write_onnx, write_paste_masks
from export_proof import Differences, Proof, Sample, compare, draw_images, prove, table, verdict
from inference import inference_callable
from model_fpn import upsample_nearest_2x
from model_rcnn import mask_resolution
from predict import LoadedPredictor, load_predictor
from run_start import STRICT, Model, weight_loader
from tools import export
from utils.checkpoint import save_npz
from utils.polygons import encode_mask
from utils.tf_v1 import tf

RESULTS = ["TEST.RESULT_SCORE_THRESH=0.3", "TEST.RESULTS_PER_IM=12"]
FAMILIES = {
    "C4 masks, soft NMS": ["MODE_FPN=False", "MODE_MASK=True", "RPN.HEAD_DIM=16", "RPN.TEST_PRE_NMS_TOPK=200",
                           "RPN.TEST_POST_NMS_TOPK=40", "TEST.NMS=soft_gaussian"],
    "cascade, masks, group norm": [
        "MODE_MASK=True", "FPN.CASCADE=True", "BACKBONE.NORM=GN", "FPN.NORM=GN", "BACKBONE.STEM_CHANNELS=32",
        "FPN.NUM_CHANNEL=32", "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.FRCNN_CONV_HEAD_DIM=32",
        "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head", "MRCNN.HEAD_DIM=32"],
    "keypoints, adaptive RoIAlign": ["MODE_MASK=False", "MODE_KEYPOINT=True", "KRCNN.NUM_KEYPOINT=3",
                                     "KRCNN.HEAD_DIM=8", "FRCNN.ROI_SAMPLES=0", "FRCNN.ROI_ALIGNED=False"],
    "keras, one NMS for all classes": [
        "MODE_MASK=False", "BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.RESNET_NUM_BLOCK=[3,4,6,3]",
        "BACKBONE.STEM_CHANNELS=64", "FRCNN.CLASS_AGNOSTIC=True", "TEST.NMS_CLASS_AGNOSTIC=True",
        "FPN.PROPOSAL_MODE=Joint", "TEST.RESULT_SCORE_THRESH=0.1"],
    "own backbone and heads": [
        "MODE_MASK=True", "BACKBONE.NAME=demo.own_backbone:stages", "FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head",
        "FPN.MRCNN_HEAD_FUNC=demo.own_head:mask_head", "TEST.RESULT_SCORE_THRESH=0.1"],
    "proposals": ["MODE_MASK=False", "MODE_RPN_ONLY=True"],
    "ResNeXt, RoI pooling": ["MODE_MASK=False", "BACKBONE.NUM_GROUPS=4", "BACKBONE.WIDTH_PER_GROUP=4",
                             "FRCNN.ROI_OP=pool"],
    "crop_and_resize, linear soft NMS": ["MODE_MASK=False", "FRCNN.ROI_OP=crop_and_resize", "TEST.NMS=soft_linear"],
}  # fmt: skip


def random_model(*settings: str) -> Model:
    """A detector of three classes with initial weights, those of the last layers enlarged so that scores differ."""
    cfg = tiny_config(*RESULTS, *settings)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(3)
        inference_callable(cfg)
        session.run(tf.global_variables_initializer())
        weights = session.run({v.op.name: v for v in tf.global_variables()})
    random = np.random.default_rng(0)
    for name, value in weights.items():
        if name.endswith(("class/W", "box/W")):
            value *= 10 if "rpn" in name else 25
        elif name.endswith("/b"):
            value += random.normal(0, 0.1, value.shape).astype(np.float32)
    return Model(cfg, weights, {"settings": cfg.to_dict(), "class_names": ["cat", "dog", "owl"]}, "random")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_finds_as_saved_graph_and_as_onnx_what_the_python_predictor_finds(family, tmp_path):
    model = random_model(*FAMILIES[family])
    predictor = LoadedPredictor(model)
    cfg = predictor.cfg
    frozen = freeze(cfg, weight_loader(model.weights, "random", STRICT), ["images"])
    assert not [n for n in frozen.graph_def.node if "Variable" in n.op or n.op in ("VarHandleOp", "PyFunc")]
    write_onnx(tmp_path / "model.onnx", frozen, cfg)
    paste = None
    if cfg.MODE_MASK and not cfg.MODE_RPN_ONLY:
        paste = tmp_path / "paste_masks.onnx"
        write_paste_masks(paste, mask_resolution(cfg))
    with tf.Graph().as_default(), tf.Session() as session:
        tf.import_graph_def(frozen.graph_def, name="")
        call = session.make_callable(frozen.outputs["images"], ["images:0"])

        def by_graph(image):
            return found_in(call(image[None, :, :, ::-1]), *image.shape[:2])

        sample = Sample([lambda i=i: i for i in draw_images(2)], "drawn")
        for run in (by_graph, onnx_runner(tmp_path / "model.onnx", paste)):
            proof = prove(predictor, run, sample, cfg.TEST.RESULT_SCORE_THRESH, cfg.TEST.RESULTS_PER_IM)
            assert not verdict(proof, True) and proof.differences.pairs > 0, (verdict(proof, True), proof)
            assert proof.differences.boxes < 1e-2 and not proof.differences.excused


# ---------------------------------------------------------------------------------------------------- the whole program
PLAIN = """
import base64, json, sys
import numpy as np
import tensorflow as tf

model = tf.saved_model.load(sys.argv[1])
answers = {}
for name, request in json.load(open(sys.argv[2])).items():
    signature = model.signatures[name]
    (alias, spec), = signature.structured_input_signature[1].items()
    rows = request["instances"]
    if spec.dtype == tf.string:
        rows = [base64.b64decode(row["b64"]) for row in rows]
    outputs = signature(**{alias: tf.constant(rows, spec.dtype)})
    assert {len(v) for v in outputs.values()} == {len(rows)}  # the rows of TensorFlow Serving's answer
    answers[name] = [{k: v[i].numpy().tolist() for k, v in outputs.items()} for i in range(len(rows))]
json.dump(answers, open(sys.argv[3], "w"))
assert not [m for m in sys.modules if m in ("predict", "config", "export_model", "tensorpack")]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder of the export, its model file, exit code): a model with averaged weights, exported as both formats."""
    folder = tmp_path_factory.mktemp("export")
    model = random_model("MODE_MASK=True")
    weights = {f"EMA/{k}": v for k, v in model.weights.items() if k.endswith(("/W", "/b"))}
    weights |= {k: v if f"EMA/{k}" not in weights else v * 0.5 for k, v in model.weights.items()}
    save_npz(folder / "model.npz", weights, model.meta)
    for number, image in enumerate(draw_images(2)):
        cv2.imwrite(str(folder / f"{number}.jpg"), image[:60, : 80 - 20 * number])
    arguments = ["--load", folder / "model.npz", "--out", folder / "out", "--format", "savedmodel", "onnx"]
    arguments += ["--config", "TEST.AUG_SHORT_EDGES=[64]", "--images", folder / "0.jpg", folder / "1.jpg"]
    code = export.main([str(a) for a in arguments])
    return folder / "out", folder / "model.npz", code


def test_averaged_weights_are_exported_and_proven_in_servings_layout(exported):
    out, _, code = exported
    assert code == 0
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert files == {"1/saved_model.pb", "1/assets/settings.json", "1/assets/class_names.txt", "settings.json",
                     "class_names.txt", "model.onnx", "paste_masks.onnx", "proof.json"}  # fmt: skip
    proof = json.loads((out / "proof.json").read_text())
    assert all(p["proven"] and p["pairs"] > 4 for p in proof.values()) and set(proof) == {"1", "model.onnx"}
    assert (out / "class_names.txt").read_text() == "cat\ndog\nowl\n"
    settings = json.loads((out / "1" / "assets" / "settings.json").read_text())["settings"]
    assert settings["MODE_MASK"] is True and settings["TEST.AUG_SHORT_EDGES"] == []


def test_plain_tensorflow_answers_servings_requests_without_this_project(exported, tmp_path):
    out, file, _ = exported
    images = [cv2.imread(str(file.parent / f"{i}.jpg")) for i in range(2)]
    encoded = [{"b64": base64.b64encode((file.parent / f"{i}.jpg").read_bytes()).decode()} for i in range(2)]
    requests = {
        "serving_default": {"instances": [images[0][:, :, ::-1].tolist()]},
        "serving_masks": {"instances": [images[1][:, :, ::-1].tolist()]},
        "serving_bytes": {"instances": encoded[:1]},
        "serving_bytes_masks": {"instances": encoded},
    }
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "TF_USE_LEGACY"))}
    words = [sys.executable, "-c", PLAIN, out / "1", tmp_path / "requests.json", tmp_path / "answers.json"]
    done = subprocess.run([str(w) for w in words], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    predictor = load_predictor(file)
    alone = [predictor(image) for image in images]
    # In one request they are padded to the larger one, as when the Python predictor gets them together.
    batched = load_predictor(file, ["TEST.BATCH_SIZE=2"])
    (together,) = batched.detect(
        [([resize_for_test(image, batched.cfg) for image in images[:2]], [i.shape[:2] for i in images[:2]])]
    )
    for name, numbers in (("serving_default", [0]), ("serving_masks", [1]), ("serving_bytes", [0]),
                          ("serving_bytes_masks", [0, 1])):  # fmt: skip
        wanted = together if len(numbers) == 2 else alone
        for answer, number in zip(answers[name], numbers, strict=True):
            arrays = {key: np.array(value)[None] for key, value in answer.items()}
            height, width = images[number].shape[:2]
            if "masks" in arrays:
                assert arrays["masks"].shape[2:] == (60, 80) if "bytes" in name else (height, width)
                assert not arrays["masks"][..., height:, :].any() and not arrays["masks"][..., width:].any()
                arrays["masks"] = arrays["masks"][..., :height, :width]
            found = found_in(arrays, height, width)
            differences = compare(wanted[number], found, 0.3, 12)
            assert differences.pairs == len(wanted[number].scores) > 4 and not differences.alone
            assert max(differences[:3]) < 1e-2, (name, differences)


def test_requests_that_cannot_be_met_are_one_line_before_the_work(exported, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(export.logger, "error", messages.append)
    out, file, _ = exported

    def refused(*arguments: str) -> str:
        assert export.main(["--load", str(file), "--out", str(tmp_path / "new"), *arguments]) == 2
        assert "\n" not in messages[-1]
        return messages[-1]

    assert "CombinedNonMaxSuppression and CropAndResize" in refused("--format", "tflite")
    assert "int8" in refused("--precision", "int8")
    assert "another --version" in refused("--out", str(out))
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "requirements-export.txt" in refused("--format", "onnx", "--images", str(file.parent / "0.jpg"))
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------ the proof
def detections(*rows: tuple[float, float, int]) -> Detections:
    """Rows of (x, score, label), boxes of 10 pixels."""
    x = np.array([r[0] for r in rows], np.float32)
    boxes = np.stack([x, x * 0, x + 10, x * 0 + 10], 1)
    masks = [encode_mask(np.pad(np.ones((10, 10)), [(0, 5), (int(v), 90 - int(v))])) for v in x]
    scores, labels = (np.array([r[i] for r in rows], t) for i, t in ((1, np.float32), (2, np.int32)))
    return Detections(boxes, scores, labels, masks)


@pytest.mark.quick
def test_detections_are_paired_by_class_and_place_and_not_by_their_order():
    a = detections((0, 0.9, 1), (0, 0.9, 2), (30, 0.8, 1))
    same = compare(a, detections((30, 0.8, 1), (0, 0.9, 2), (0, 0.9, 1)), 0.05, 100)
    assert same == Differences(pairs=3)
    moved = compare(a, detections((1, 0.9, 1), (0, 0.7, 2), (30, 0.8, 3)), 0.05, 100)
    assert moved[:2] == pytest.approx((1, 0.2)) and moved.masks == pytest.approx(20 / 110)
    assert (moved.pairs, moved.alone, moved.excused) == (2, 2, 0)


@pytest.mark.quick
def test_what_the_threshold_or_a_full_list_explains_is_excused():
    a = detections((0, 0.9, 1), (30, 0.0504, 1))
    assert compare(a, detections((0, 0.9, 1)), 0.05, 100) == Differences(pairs=1, excused=1)
    full = compare(detections((0, 0.9, 1), (30, 0.5, 1)), detections((0, 0.9, 1), (60, 0.5005, 1)), 0.05, 2)
    assert (full.pairs, full.alone, full.excused) == (1, 0, 2)
    assert compare(a, detections((0, 0.9, 1)), 0.01, 100).alone == 1
    assert compare(detections(), a, 0.01, 100).alone == 2


@pytest.mark.quick
def test_the_verdict_states_what_is_beyond_a_tolerance_and_unproven_files_are_renamed(tmp_path, capsys):
    good = Proof(Differences(pairs=3), 2, (0.1, 0.2), {"bbox/AP": (50.0, 50.09)})
    bad = Proof(Differences(0.06, 0.002, 0.5, 2.0, 3, 1), 2, (0.1, 0.2), {"bbox/AP": (50.0, 49.0)})
    assert not verdict(good, True) and not verdict(good, False) and not verdict(bad, False)
    reasons = verdict(bad, True)
    assert [r.split()[0] for r in reasons] == ["boxes", "scores", "masks", "keypoints", "1", "bbox/AP"]
    assert verdict(bad._replace(differences=Differences(float("nan"))), True)[0].startswith("boxes")
    assert "DATA.VAL" in verdict(good._replace(ap={}), False)[0]
    assert "0.06" in table([("a", 1.0, bad, reasons)]) and "NOT PROVEN" in table([("a", 1.0, bad, reasons)])
    (tmp_path / "1").mkdir()
    (tmp_path / "model.onnx").touch()
    rows = [(tmp_path / "1", bad, reasons), (tmp_path / "model.onnx", good, [])]
    assert export.report(tmp_path, rows, "2 images") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.unproven", "model.onnx", "proof.json"]


# ------------------------------------------------------------------------------------------------------ ONNX, by itself
def test_operations_that_the_families_use_little_or_not_at_all_are_converted_exactly():
    import onnxruntime

    random = np.random.default_rng(0)
    x = random.normal(0, 2, (2, 5, 6, 4)).astype(np.float32)
    with tf.Graph().as_default() as graph, tf.Session() as session:
        given = tf.placeholder(tf.float32, [None, None, None, 4], "x")
        whole = tf.cast(given * 3, tf.int32)
        size = tf.shape(given)
        boxes = tf.constant([[0.1, 0.0, 0.9, 1.0], [-0.5, 0.2, 1.2, 0.7]])
        kernel = x[0, :2, :2, :, None] * np.ones(3, np.float32)
        results = {
            "slice": given[:, 1:-1:2, ::-1, tf.newaxis, size[1] - 3],
            "ellipsis": given[..., 1:], "row": given[-1, ..., 0], "floor": whole // 3, "mod": whole % 3,
            "float_floor": given // 0.7, "float_mod": given % 0.7,
            "safe": tf.math.divide_no_nan(given, tf.nn.relu(given)),
            "crop": tf.image.crop_and_resize(given, boxes, [0, 1], [4, 7]),
            "crop_one": tf.image.crop_and_resize(given, boxes, [1, 0], [1, 2]),
            "average": tf.nn.avg_pool2d(given, 3, 2, "SAME"), "largest": tf.nn.max_pool2d(given, 3, 2, "SAME"),
            "depth": tf.nn.depthwise_conv2d(given, tf.constant(x[0, :3, :3, :, None]), [1, 2, 2, 1], "SAME"),
            "dilated": tf.nn.conv2d(given, tf.constant(kernel), 1, "SAME", dilations=2),
            "transposed": tf.nn.conv2d_transpose(given, tf.constant(x[0, :4, :4, :, None] * np.ones(4, "f")),
                                                 [size[0], size[1] * 2, size[2] * 2, 4], 2, "SAME"),
            "bilinear": tf.image.resize_bilinear(given, [7, 9], half_pixel_centers=True),
            "hot": tf.one_hot(tf.argmax(given, -1), 4, 2.0, -1.0),
            "sums": tf.cumsum(given, 1, exclusive=True, reverse=True),
            "inverse": tf.math.invert_permutation(tf.argsort(given[0, 0, :, 0])),
            "any": tf.reduce_any(given > 3, [1, 2]),
            "gathered": tf.gather(given, tf.constant([[0, 4], [3, 3]]), axis=1, batch_dims=1),
            "stacked": tf.stack(tf.unstack(given, axis=3), 1), "parts": tf.split(given, [1, 3], 3)[1],
            "mirrored": tf.pad(given, [[0, 0], [2, 1], [0, 0], [0, 0]], "REFLECT"), "six": tf.nn.relu6(given),
            "upsampled": upsample_nearest_2x(given, deterministic=True),
        }  # fmt: skip
        outputs = {key: tf.identity(value, f"result_{key}").name for key, value in results.items()}
        wanted = session.run(outputs, {given: x})
    model = convert(graph.as_graph_def(), {"x": "x:0"}, outputs, {})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict(zip(outputs, session.run(list(outputs), {"x": x})))
    for key in outputs:
        assert found[key].dtype == wanted[key].dtype, key
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_documents_program_for_onnx_runtime_prints_what_the_python_predictor_finds(exported, tmp_path):
    out, file, _ = exported
    (tmp_path / "exported").symlink_to(out)
    (tmp_path / "photo.png").write_bytes(cv2.imencode(".png", cv2.imread(str(file.parent / "0.jpg")))[1].tobytes())
    text = (export.import_path.ROOT / "docs" / "EXPORT.md").read_text()
    program = text.partition("In ONNX Runtime")[2].partition("```python\n")[2].partition("```")[0]
    program = program.replace("photo.jpg", "photo.png") + "print(len(masks), masks.shape[1:], masks.dtype)\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    predictor = load_predictor(file)
    wanted = predictor(tmp_path / "photo.png")
    assert last == f"{len(wanted.scores)} (60, 80) uint8"
    assert [line.split()[0] for line in lines] == [predictor.class_names[label - 1] for label in wanted.labels]
    np.testing.assert_allclose([float(line.split()[1]) for line in lines], wanted.scores, atol=1e-4)
