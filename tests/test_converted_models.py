"""Converted weights compute in this project's graph what the system they come from computes.

The expectations in tests/data/golden_converted_*.npz were recorded from those systems (tests/data/README.md);
the weights behind them are drawn again here, from each tensor's name and shape alone (`seeded_tensor`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from torch_files import save_zip, tensors

from basemodel import GN_EPSILON, GN_GROUPS, preprocess_image, resnet_stages
from config import default_config, finalize_config
from detections import paste_masks
from model_fpn import fpn
from model_frcnn import fastrcnn_head
from model_mrcnn import mask_head
from model_rcnn import backbone_features, build_inference
from model_rpn import rpn_anchors, rpn_head, rpn_proposals
from tests.graph import tiny_config
from tests.seeded_weights import seeded_image, seeded_tensor
from tools.convert import convert
from utils.checkpoint import assign_weights
from utils.polygons import decode_mask
from utils.tf_v1 import tf

DATA = Path(__file__).parent / "data"


def recorded(name):
    with np.load(DATA / f"golden_converted_{name}.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def convert_seeded(golden, path, overrides=()):
    """The converter's answer to a file at `path` whose tensors have the recorded names and shapes."""
    np.savez(path, **{name: seeded_tensor(name, tuple(s)) for name, s in json.loads(str(golden["shapes"])).items()})
    variables, settings, report = convert(path, overrides)
    assert not report.unused and not report.missing
    return variables, settings


def run(make, variables, settings, image):
    """make(image, image_shape, cfg) in a graph with these weights; FPN wants the image padded to multiples of 32."""
    cfg = finalize_config(default_config().update_from_dict(settings, "test"))
    h, w = image.shape[:2]
    multiple = 32 if cfg.MODE_FPN or "MODE_FPN" not in settings else 1
    padded = np.zeros([1, -(-h // multiple) * multiple, -(-w // multiple) * multiple, 3], np.uint8)
    padded[0, :h, :w] = image
    with tf.Graph().as_default(), tf.Session() as session:
        fetches = make(tf.constant(padded), tf.constant([[h, w]], tf.int32), cfg)
        assert assign_weights(session, variables) == len(tf.global_variables())
        return session.run(fetches)


def stages_of_detector(image, image_shape, cfg):
    with tf.variable_scope("", reuse=tf.AUTO_REUSE):
        features = backbone_features(image, image_shape, cfg)
        logits, deltas = rpn_head(features, cfg)
        anchors = rpn_anchors(features, cfg)
        proposals, _, valid = rpn_proposals(logits, deltas, anchors, image_shape, cfg, training=False)
        outputs = build_inference(image, image_shape, cfg)
    return {"features": features, "logits": logits, "deltas": deltas, "anchors": anchors, "proposals": proposals[0],
            "valid": valid[0], **{key: value[0] for key, value in outputs.items()}}  # fmt: skip


def build_one(image, image_shape, cfg):
    return {key: value[0] for key, value in build_inference(image, image_shape, cfg).items()}


def thinned_like(ours, theirs):
    """Every so manieth element of [H,W,C], as many as were recorded."""
    steps = [-(-a // b) for a, b in zip(ours.shape, theirs.shape)]
    return ours[:: steps[0], :: steps[1], :: steps[2]]


def relative_error(ours, theirs):
    ours = thinned_like(ours, theirs).astype(np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def assert_same_detector(got, want):
    """Every recorded stage: maps p2…, rpn_logits_p2…, rpn_deltas_p2… [H,W,C], thinned; proposals; what is found."""
    for index, level in enumerate(range(2, 7)):
        feature = got["features"][index][0]
        assert relative_error(feature, want[f"p{level}"]) < 2e-4
        for key in ("logits", "deltas"):
            ours = got[key][index][0].reshape(*feature.shape[:2], -1)
            assert relative_error(ours, want[f"rpn_{key}_p{level}"]) < 2e-4
    proposals = got["proposals"][got["valid"]]
    assert len(proposals) == len(want["proposals"])
    distance = np.abs(proposals[None] - want["proposals"][:, None]).max(2).min(1)
    assert np.quantile(distance, 0.998) < 0.05
    assert_same_detections(got, want)


def assert_same_detections(got, want):
    count = got["count"]
    assert count == len(want["boxes"])
    np.testing.assert_array_equal(got["labels"][:count], want["labels"])
    np.testing.assert_allclose(got["boxes"][:count], want["boxes"], atol=0.05)
    np.testing.assert_allclose(got["scores"][:count], want["scores"], atol=1e-3)
    np.testing.assert_allclose(got["masks"][:count], want["masks"], atol=4e-3)


# ------------------------------------------------------------------------------------------------------- whole systems
SMALL_TEST = {"RPN.TEST_FPN_NMS_TOPK": 150, "TEST.RESULTS_PER_IM": 20}


def test_torchvision_mask_rcnn_detects_the_same(tmp_path):
    golden = recorded("torchvision")
    variables, settings = convert_seeded(golden, tmp_path / "weights.npz")
    got = run(stages_of_detector, variables, settings | SMALL_TEST, seeded_image(120, 150))
    # P5 has 5 columns, P6 has 3: its anchors are not 64 pixels apart there.
    np.testing.assert_allclose(got["anchors"][4], golden["anchors_p6"], atol=1e-4)
    np.testing.assert_allclose(got["anchors"][1][: len(golden["anchors_p3"])], golden["anchors_p3"], atol=1e-4)
    assert_same_detector(got, golden)


def test_torchvision_keypoint_rcnn_detects_the_same(tmp_path):
    golden = recorded("torchvision_keypoint")
    # A recorded model of its class count would be a published one, trained with another epsilon.
    variables, settings = convert_seeded(golden, tmp_path / "weights.npz", ["BACKBONE.BN_EPSILON=1e-5"])
    got = run(build_one, variables, settings | SMALL_TEST | {"TEST.RESULTS_PER_IM": 10}, seeded_image(120, 150))
    assert got["count"] == len(golden["boxes"])
    np.testing.assert_allclose(got["boxes"], golden["boxes"], atol=0.05)
    np.testing.assert_allclose(got["scores"], golden["scores"], atol=1e-3)
    distance = np.abs(got["keypoints"][..., :2] - golden["keypoints"]).max(2)
    assert np.median(distance) < 0.01
    assert (distance < 0.5).mean() >= 0.98  # where two pixels are equal to rounding, either is right


TORCHVISION = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn",
               "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn_v2"]  # fmt: skip


def boxes_of_torchvisions_pasting(boxes, cells):
    """torchvision pastes a mask and its rim of zeros over a box of whole pixels. This project's rule does the same over
    these boxes."""
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * (cells + 2) / cells
    center = (boxes[:, 2:] + boxes[:, :2]) / 2
    low, high = np.trunc(center - half), np.trunc(center + half) + 1
    rim = (high - low) / (cells + 2)
    return np.concatenate([low + rim, high - rim], 1)


def assert_equals_torchvision(got, golden, key, size):
    """What torchvision_reference.py found in one image, in float64; also the recorded first part of it."""
    want = {name.partition("/")[2]: value for name, value in golden.items() if name.startswith(f"{key}/")}
    count = len(want["boxes"])
    assert got["count"] >= count > 10 and len(set(want["scores"].round(3).tolist())) > 10
    np.testing.assert_array_equal(got["labels"][:count], want["labels"])
    np.testing.assert_allclose(got["boxes"][:count], want["boxes"], atol=0.01)
    np.testing.assert_allclose(got["scores"][:count], want["scores"], atol=1e-4)
    if "masks" in want:
        scale = 65535 if want["masks"].dtype == np.uint16 else 1
        np.testing.assert_allclose(got["masks"][:count], want["masks"] / scale, atol=1e-4)
        theirs = np.unpackbits(want["pasted"], count=count * size[0] * size[1]).reshape(count, *size).astype(bool)
        masks, boxes = got["masks"][:count], got["boxes"][:count].astype(np.float64)
        ours = np.stack([decode_mask(r) for r in paste_masks(masks, boxes_of_torchvisions_pasting(boxes, 28), *size)])
        assert theirs.any((1, 2)).sum() > 10
        common, union = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        assert (common >= 0.999 * union).all()
    if "keypoints" in want:
        distance = np.abs(got["keypoints"][:count, :, :2] - want["keypoints"][..., :2]).max(2)
        assert np.median(distance) < 0.01
        assert (distance < 0.5).mean() >= 0.98  # where two pixels are equal to rounding, either is right


def test_torchvision_v2_mask_rcnn_detects_the_same(tmp_path):
    golden = recorded("torchvision_v2")
    state = {name: seeded_tensor(name, tuple(shape)) for name, shape in json.loads(str(golden["shapes"])).items()}
    state |= {name.partition("/")[2]: value for name, value in golden.items() if name.startswith("weights/")}
    save_zip(tmp_path / "v2.pth", tensors(state))
    variables, settings, report = convert(tmp_path / "v2.pth")
    assert not report.unused and not report.missing and len(report.mapped) + len(report.ignored) == len(state)
    assert settings["RPN.NUM_CONVS"] == 2 and settings["FPN.FRCNN_HEAD_FUNC"] == "fastrcnn_4conv1fc_head"
    limits = {"RPN.TEST_FPN_NMS_TOPK": 300, "TEST.RESULTS_PER_IM": 40, "TRAIN.PRECISION": "float64"}
    got = run(build_one, variables, settings | limits, seeded_image(120, 150))
    assert_equals_torchvision(got, golden, "seeded", (120, 150))


@pytest.mark.skipif("TORCH_PYTHON" not in os.environ, reason="TORCH_PYTHON names no Python with torch and torchvision")
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_itself_predicts_the_same_on_photographs_in_float64(tmp_path, name):
    images = {}
    for path in sorted((DATA / "coco_mini/train2017").glob("*.jpg"))[:2]:
        image = cv2.imread(str(path))
        images[path.stem] = cv2.resize(image, None, fx=(scale := 320 / min(image.shape[:2])), fy=scale)
    np.savez(tmp_path / "images.npz", **images)
    command = [os.environ["TORCH_PYTHON"], str(DATA.parent / "torchvision_reference.py"), name, str(tmp_path)]
    subprocess.run(command, check=True)
    variables, settings, report = convert(tmp_path / f"{name}.pth")
    assert not report.unused and not report.missing
    limits = {"RPN.TEST_FPN_NMS_TOPK": 300, "TEST.RESULTS_PER_IM": 40, "TRAIN.PRECISION": "float64"}
    with np.load(tmp_path / f"{name}.npz") as content:
        want = {key: content[key] for key in content.files}
    for key, image in images.items():
        got = run(build_one, variables, settings | limits, image)
        assert got["count"] == len(want[f"{key}/boxes"])
        assert_equals_torchvision(got, want, key, image.shape[:2])


def test_detectron_mask_rcnn_detects_the_same(tmp_path):
    golden = recorded("caffe2")
    variables, settings = convert_seeded(golden, tmp_path / "weights.npz")
    assert_same_detector(run(stages_of_detector, variables, settings | SMALL_TEST, seeded_image(120, 150)), golden)


def test_detectron_c4_mask_rcnn_detects_the_same(tmp_path):
    golden = recorded("caffe2_c4")
    variables, settings = convert_seeded(golden, tmp_path / "weights.npz")
    small = {"RPN.TEST_POST_NMS_TOPK": 100, "TEST.RESULTS_PER_IM": 20}
    assert_same_detections(run(build_one, variables, settings | small, seeded_image(120, 150)), golden)


def stages_of_backbone(image, image_shape, cfg):
    return resnet_stages(preprocess_image(image, image_shape, cfg), cfg, 4)


def assert_same_stages(variables, settings, image, want):
    variables = {name: value for name, value in variables.items() if not name.startswith("linear/")}
    for index, stage in enumerate(run(stages_of_backbone, variables, settings, image)):
        assert relative_error(stage[0], want[f"c{index + 2}"]) < 2e-4


@pytest.mark.parametrize("architecture", ["resnet50", "resnext50_32x4d"])
def test_torchvision_imagenet_model_has_the_same_features(tmp_path, architecture):
    golden = recorded(f"torchvision_{architecture}")
    variables, settings = convert_seeded(golden, tmp_path / "weights.npz")
    assert_same_stages(variables, settings, seeded_image(64, 96), golden)


def torchvision_basic_stages(state, blocks, image):
    """float64 [C2..C5] [H,W,C] of torchvision's ResNet of basic blocks, from its state_dict and an image uint8 BGR."""
    state = {name: value.astype(np.float64) for name, value in state.items()}

    def conv_bn(x, conv, bn, stride=1):
        weight = state[f"{conv}.weight"].transpose(2, 3, 1, 0)
        pad = len(weight) // 2
        x = np.pad(x, [(pad, pad), (pad, pad), (0, 0)])
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[:2], (0, 1))[::stride, ::stride]
        y = np.einsum("hwcij,ijco->hwo", windows, weight, optimize=True)
        y = (y - state[f"{bn}.running_mean"]) / np.sqrt(state[f"{bn}.running_var"] + 1e-5)
        return y * state[f"{bn}.weight"] + state[f"{bn}.bias"]

    x = (image[..., ::-1] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    x = np.pad(np.maximum(conv_bn(x, "conv1", "bn1", 2), 0), [(1, 1), (1, 1), (0, 0)])
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (0, 1))[::2, ::2].max((3, 4))
    stages = []
    for layer, count in enumerate(blocks, 1):
        for index in range(count):
            scope, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = np.maximum(conv_bn(x, f"{scope}.conv1", f"{scope}.bn1", stride), 0)
            y = conv_bn(y, f"{scope}.conv2", f"{scope}.bn2")
            if f"{scope}.downsample.0.weight" in state:
                x = conv_bn(x, f"{scope}.downsample.0", f"{scope}.downsample.1", stride)
            x = np.maximum(x + y, 0)
        stages.append(x)
    return stages


@pytest.mark.parametrize("blocks", [[2, 2, 2, 2], [3, 4, 6, 3]])
def test_torchvision_resnets_of_basic_blocks_have_the_same_features(tmp_path, blocks):
    shapes = {"conv1.weight": (64, 3, 7, 7), "fc.weight": (1000, 512), "fc.bias": (1000,)}

    def norm(name, channels):
        leaves = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()})

    norm("bn1", 64)
    for layer, count in enumerate(blocks, 1):
        width = 32 * 2**layer
        for index in range(count):
            scope, before = f"layer{layer}.{index}", width // 2 if layer > 1 and index == 0 else width
            shapes[f"{scope}.conv1.weight"], shapes[f"{scope}.conv2.weight"] = (
                (width, before, 3, 3), (width, width, 3, 3)
            )  # fmt: skip
            norm(f"{scope}.bn1", width)
            norm(f"{scope}.bn2", width)
            if before != width:
                shapes[f"{scope}.downsample.0.weight"] = (width, before, 1, 1)
                norm(f"{scope}.downsample.1", width)
    state = {name: seeded_tensor(name, shape) for name, shape in shapes.items()}
    save_zip(tmp_path / "resnet.pth", tensors(state))
    variables, settings, report = convert(tmp_path / "resnet.pth")
    assert not report.unused and not report.missing
    assert settings["BACKBONE.BLOCK"] == "basic" and settings["BACKBONE.RESNET_NUM_BLOCK"] == blocks
    image = seeded_image(64, 96)
    want = torchvision_basic_stages(state, blocks, image)
    assert_same_stages(variables, settings, image, {f"c{k + 2}": stage for k, stage in enumerate(want)})


KERAS = """
import json, sys
import numpy as np
import tf_keras
from tests.seeded_weights import seeded_image, seeded_tensor
model = tf_keras.applications.ResNet50(weights=None, include_top=False)
for layer in model.layers:
    values = []
    for weight in layer.weights:
        shape = tuple(weight.shape)
        if len(shape) == 4:
            values.append(seeded_tensor(weight.name, (shape[3], shape[2], *shape[:2])).transpose(2, 3, 1, 0))
        else:
            values.append(seeded_tensor(weight.name.split(":")[0], shape))
    layer.set_weights(values)
model.save_weights(sys.argv[1] + "/resnet50.h5")
image = seeded_image(64, 96)
x = tf_keras.applications.resnet.preprocess_input(image[None, :, :, ::-1].astype(np.float32))
ends = [model.get_layer(name).output for name in
        ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out", "conv5_block3_out")]
stages = tf_keras.Model(model.input, ends)(x)
np.savez(sys.argv[1] + "/stages.npz", **{f"c{k + 2}": stage[0].numpy() for k, stage in enumerate(stages)})
"""


def test_keras_resnet_has_the_same_features(tmp_path):
    pytest.importorskip("tf_keras")
    # In a process of its own: this project's graphs need another mode of TensorFlow than Keras.
    subprocess.run([sys.executable, "-c", KERAS, str(tmp_path)], cwd=DATA.parent.parent, check=True)
    variables, settings, report = convert(tmp_path / "resnet50.h5")
    assert not report.unused and not report.missing
    with np.load(tmp_path / "stages.npz") as want:
        assert_same_stages(variables, settings, seeded_image(64, 96), want)


# -------------------------------------------------------------------------------------------- tensorpack's group norms
def conv(x, w, b):
    """Stride-1 convolution with zero padding, float64: x [N,H,W,Ci], w [k,k,Ci,Co]."""
    k = w.shape[0]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    rows = [padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ w[i, j] for i in range(k) for j in range(k)]
    return sum(rows) + b


def group_norm(x, gamma, beta):
    n, h, w, c = x.shape
    parts = x.reshape(n, h, w, GN_GROUPS, c // GN_GROUPS)
    mean = parts.mean((1, 2, 4), keepdims=True)
    variance = ((parts - mean) ** 2).mean((1, 2, 4), keepdims=True)
    return ((parts - mean) / np.sqrt(variance + GN_EPSILON)).reshape(x.shape) * gamma + beta


def gn_after_relu(x, v, scope, relu):
    y = conv(x, v[f"{scope}/W"], v[f"{scope}/b"])
    return group_norm(np.maximum(y, 0) if relu else y, v[f"{scope}/gn/gamma"], v[f"{scope}/gn/beta"])


def run_with_random_variables(make):
    """make() in a graph whose variables are random -> (its value, {name: float64 array})."""
    with tf.Graph().as_default(), tf.Session() as session:
        fetch = make()
        random = np.random.RandomState(1)
        variables = {}
        for variable in tf.global_variables():
            shape = variable.shape.as_list()
            value = random.standard_normal(shape) * (1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.5)
            variable.load(value.astype(np.float32), session)
            variables[variable.op.name] = value.astype(np.float32).astype(np.float64)
        return session.run(fetch), variables


TENSORPACK_GN = [
    "FPN.GN_AFTER_RELU=True", "FPN.NORM=GN", "FPN.NUM_CHANNEL=64", "FPN.FRCNN_CONV_HEAD_DIM=32", "MRCNN.HEAD_DIM=32",
    "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head",
]  # fmt: skip


def test_group_norm_heads_of_tensorpack_are_bias_relu_norm():
    cfg = tiny_config(*TENSORPACK_GN)
    x = np.random.RandomState(0).standard_normal([3, 7, 7, 32])
    got, v = run_with_random_variables(lambda: fastrcnn_head(tf.constant(x, tf.float32), cfg))
    y = x
    for k in range(4):
        y = gn_after_relu(y, v, f"conv{k}", relu=True)
    want = np.maximum(y.transpose(0, 3, 1, 2).reshape(3, -1) @ v["fc/W"] + v["fc/b"], 0)
    np.testing.assert_allclose(got, want, atol=1e-4)

    got, v = run_with_random_variables(lambda: mask_head(tf.constant(x, tf.float32), 5, cfg))
    y = x
    for k in range(4):
        y = gn_after_relu(y, v, f"fcn{k}", relu=True)
    up = np.einsum("nhwi,abci->nhawbc", y, v["deconv/W"]).reshape(3, 14, 14, 32) + v["deconv/b"]
    np.testing.assert_allclose(got, conv(np.maximum(up, 0), v["conv/W"], v["conv/b"]), atol=1e-4)


def test_group_norm_pyramid_of_tensorpack_has_biases():
    cfg = tiny_config(*TENSORPACK_GN)
    random = np.random.RandomState(0)
    stages = [random.standard_normal([2, 32 >> k, 32 >> k, 4 << k]) for k in range(4)]
    got, v = run_with_random_variables(lambda: fpn([tf.constant(s, tf.float32) for s in stages], cfg))
    merged = None
    for k in (3, 2, 1, 0):
        lateral = gn_after_relu(stages[k], v, f"fpn/lateral_1x1_c{k + 2}", relu=False)
        merged = lateral if merged is None else lateral + merged.repeat(2, 1).repeat(2, 2)
        want = gn_after_relu(merged, v, f"fpn/posthoc_3x3_p{k + 2}", relu=False)
        np.testing.assert_allclose(got[k], want, atol=1e-4)
