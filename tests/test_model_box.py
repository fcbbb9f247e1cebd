"""The graph's box mathematics against recordings of detectron2 and float64 references in NumPy."""

import functools
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

import model_box
from tests.graph import evaluate
from utils.polygons import orient_outer, rasterize, rings_to_edges
from utils.tf_v1 import tf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_unit.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


def nhwc(x):
    return np.ascontiguousarray(np.transpose(x, [0, 2, 3, 1]))


def nchw(x):
    return np.transpose(x, [0, 3, 1, 2])


# ------------------------------------------------------------------------------------------------------------ RoIAlign
def reference_roi_align(features, rois, index, scale, resolution, samples, aligned=True):
    """Float64 RoIAlign of one channel set: features [N,H,W,C], rois [R,4] -> [R,M,M,C], and the function that carries
    a gradient of that shape back to the features. samples=0: as many as a bin has cells, rounded up."""
    _, h, w, _ = features.shape
    taps = []  # of each output cell: image, y, x, weight
    for r, (box, image) in enumerate(zip(np.asarray(rois, np.float64) * scale - 0.5 * aligned, index)):
        sides = box[2:] - box[:2]
        bin_w, bin_h = (sides if aligned else np.maximum(sides, 1.0)) / resolution
        across, down = (samples, samples) if samples else (max(math.ceil(b), 0) for b in (bin_w, bin_h))
        for i in range(resolution):
            for j in range(resolution):
                for a in range(down):
                    for b in range(across):
                        y = box[1] + i * bin_h + (a + 0.5) * bin_h / down
                        x = box[0] + j * bin_w + (b + 0.5) * bin_w / across
                        if not (-1 <= y <= h and -1 <= x <= w):
                            continue
                        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                        y0, x0 = min(int(y), h - 2), min(int(x), w - 2)
                        fy, fx = y - y0, x - x0
                        for dy, dx, weight in (
                            (0, 0, (1 - fy) * (1 - fx)), (0, 1, (1 - fy) * fx), (1, 0, fy * (1 - fx)), (1, 1, fy * fx)
                        ):  # fmt: skip
                            taps.append((r, i, j, image, y0 + dy, x0 + dx, weight / (across * down)))
    r, i, j, n, y, x, weight = (np.array(t) for t in zip(*taps))
    out = np.zeros([len(rois), resolution, resolution, features.shape[3]])
    np.add.at(out, (r, i, j), weight[:, None] * features[n, y, x].astype(np.float64))

    def backward(gradient):
        result = np.zeros(features.shape)
        np.add.at(result, (n, y, x), weight[:, None] * gradient[r, i, j])
        return result

    return out, backward


def roi_align_with_gradient(features, rois, index, scale, resolution, samples, weight, aligned=True, fixed=False):
    def make():
        x = tf.constant(features)
        boxes, images = tf.constant(rois, tf.float32), tf.constant(index, tf.int32)
        padded = model_box.pad_for_roi_align(x)
        out = model_box.roi_align(padded, boxes, images, scale, resolution, samples, aligned, fixed)
        return out, tf.gradients(tf.reduce_sum(out * weight), x)[0]

    return evaluate(make)


def test_roi_align_and_its_gradient_equal_the_recording_on_inverted_empty_outside_and_huge_boxes(golden):
    resolution = 7
    rois = golden["roialign/rois_bxyxy"]
    sizes = rois[:, 3:] - rois[:, 1:3]
    assert (sizes < 0).any() and (sizes == 0).any() and (rois[:, 1:] < -20).any() and (sizes > 100).any()
    out, gradient = roi_align_with_gradient(
        nhwc(golden["roialign/input"]), rois[:, 1:], rois[:, 0], float(golden["roialign/spatial_scale"]), resolution, 2,
        nhwc(golden[f"roialign/grad_weight_o{resolution}"]),
    )  # fmt: skip
    np.testing.assert_allclose(nchw(out), golden[f"roialign/out_o{resolution}_s2"], atol=1e-4)
    np.testing.assert_allclose(nchw(gradient), golden[f"roialign/grad_o{resolution}_s2"], atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_roi_align_with_one_to_four_samples_equals_the_float64_reference(golden, samples, aligned):
    features = nhwc(golden["roialign/input"])
    rois, scale = golden["roialign/rois_bxyxy"], 0.25
    index = rois[:, 0].astype(int)
    expected, backward = reference_roi_align(features, rois[:, 1:], index, scale, 5, samples, aligned)
    weight = np.random.RandomState(samples).randn(*expected.shape).astype(np.float32)
    out, gradient = roi_align_with_gradient(features, rois[:, 1:], index, scale, 5, samples, weight, aligned)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, backward(weight), atol=1e-4)


def test_roi_align_with_adaptive_samples_equals_the_recording(golden):
    resolution = 7
    rois = golden["roialign/rois_bxyxy"]
    index = rois[:, 0].astype(np.int32)

    def make():
        padded = model_box.pad_for_roi_align(tf.constant(nhwc(golden["roialign/input"])))
        return model_box.roi_align(padded, tf.constant(rois[:, 1:]), tf.constant(index), 0.25, resolution, 0)

    expected = golden[f"roialign/out_o{resolution}_s0"]
    out = nchw(evaluate(make))
    ordinary = np.abs(rois[:, 1:]).max(1) < 500
    assert ordinary.sum() >= 38 and not ordinary.all()
    np.testing.assert_allclose(out[ordinary], expected[ordinary], atol=1e-4)
    # A box of 5000 pixels takes 179 x 125 samples a bin, of which the last inside the image may fall out.
    np.testing.assert_allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("budget", [1 << 16, 40])
def test_adaptive_roi_align_and_its_gradient_equal_the_float64_reference(golden, aligned, budget, monkeypatch):
    """On ordinary, empty, inverted and outside RoIs, however many samples are spread at a time (40: parts of a RoI)."""
    monkeypatch.setattr(model_box, "_ADAPTIVE_BUDGET", budget)
    features = nhwc(golden["roialign/input"])
    rois = golden["roialign/rois_bxyxy"]
    rois = rois[np.abs(rois[:, 1:]).max(1) < 300] + [0, 0.013, 0.017, 0.013, 0.017]  # no sample exactly a pixel outside
    sizes = rois[:, 3:] - rois[:, 1:3]
    assert (sizes <= 0).any() and sizes.max() > 100
    index = rois[:, 0].astype(int)
    expected, backward = reference_roi_align(features, rois[:, 1:], index, 0.25, 5, 0, aligned)
    weight = np.random.RandomState(1).randn(*expected.shape).astype(np.float32)
    out, gradient = roi_align_with_gradient(features, rois[:, 1:], index, 0.25, 5, 0, weight, aligned)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, backward(weight), atol=1e-4)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 2])
def test_the_deterministic_gradient_of_roi_align_equals_the_ordinary_one_and_the_float64_reference(
    golden, samples, aligned
):
    features = nhwc(golden["roialign/input"])
    rois = golden["roialign/rois_bxyxy"]
    rois = rois[np.abs(rois[:, 1:]).max(1) < 300] + [0, 0.013, 0.017, 0.013, 0.017]
    index = rois[:, 0].astype(int)
    expected, backward = reference_roi_align(features, rois[:, 1:], index, 0.25, 5, samples, aligned)
    weight = np.random.RandomState(1).randn(*expected.shape).astype(np.float32)
    arguments = features, rois[:, 1:], index, 0.25, 5, samples, weight, aligned
    (out, gradient), (fixed_out, fixed) = (roi_align_with_gradient(*arguments, fixed) for fixed in (False, True))
    np.testing.assert_array_equal(out, fixed_out)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(fixed, gradient, atol=1e-6 * scale)
    np.testing.assert_allclose(fixed, backward(weight), atol=1e-4)


def test_the_deterministic_gradient_of_crop_and_resize_equals_tensorflows(golden):
    features, rois = nhwc(golden["roialign/input"]), golden["roialign/rois_bxyxy"].astype(np.float32)
    weight = np.random.RandomState(2).randn(len(rois), 7, 7, features.shape[3]).astype(np.float32)

    def gradient(fixed):
        x = tf.constant(features)
        index = tf.constant(rois[:, 0], tf.int32)
        out = model_box.roi_crop_and_resize(x, tf.constant(rois[:, 1:]), index, 0.25, 7, 2, fixed)
        return tf.gradients(tf.reduce_sum(out * weight), x)[0]

    ordinary, fixed = evaluate(lambda: [gradient(False), gradient(True)])
    assert np.abs(ordinary).max() > 1
    np.testing.assert_allclose(fixed, ordinary, atol=1e-6 * np.abs(ordinary).max())


def test_no_rois_give_no_adaptive_gradient(golden):
    features = nhwc(golden["roialign/input"])
    none, weight = np.zeros([0, 4], np.float32), np.zeros([0, 5, 5, features.shape[3]], np.float32)
    out, gradient = roi_align_with_gradient(features, none, np.zeros(0, np.int32), 0.25, 5, 0, weight)
    assert out.shape == weight.shape and gradient.shape == features.shape and not gradient.any()


def test_adaptive_samples_of_many_rois_equal_those_of_each_alone(golden, monkeypatch):
    """Whatever the order in which RoIs of equal sample counts are pooled together, and in how many steps."""
    monkeypatch.setattr(model_box, "_ADAPTIVE_BUDGET", 500)
    rois = golden["roialign/rois_bxyxy"][:20]
    index = rois[:, 0].astype(np.int32)

    def make():
        padded = model_box.pad_for_roi_align(tf.constant(nhwc(golden["roialign/input"])))
        parts = [slice(0, 20), *(slice(i, i + 1) for i in range(20))]
        together, *alone = (
            model_box.roi_align(padded, tf.constant(rois[p, 1:]), tf.constant(index[p]), 0.25, 7, 0) for p in parts
        )
        none = model_box.roi_align(padded, tf.zeros([0, 4]), tf.zeros([0], tf.int32), 0.25, 7, 0)
        return together, tf.concat(alone, 0), none

    together, alone, none = evaluate(make)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert none.shape == (0, 7, 7, 4)


GRADIENT_PROGRAM = """
import numpy as np
from tests.test_model_box import crowded_gradient_error
print("error", crowded_gradient_error(500))
"""


def crowded_gradient_error(runs: int) -> float:
    """Error of the features' gradient, relative to its largest value, where hundreds of RoIs on several threads add to
    the same pixels: the first error above 1 %, or the worst of `runs` runs."""
    random = np.random.RandomState(0)
    channels, count = 128, 200
    features = np.zeros([1, 8, 8, channels], np.float32)
    corner = random.uniform(4, 16, [count, 2])
    rois = np.concatenate([corner, corner + random.uniform(4, 12, [count, 2])], 1).astype(np.float32)
    index = np.zeros(count, np.int32)
    weight = random.rand(count, 7, 7, 1).astype(np.float32)  # the same for every channel
    _, backward = reference_roi_align(features[..., :1], rois, index, 0.25, 7, 2)
    expected = backward(weight)
    worst = 0.0
    with tf.Graph().as_default():
        x = tf.constant(features)
        fed = tf.placeholder(tf.float32, weight.shape)  # a constant would be folded: the gradient computed only once
        out = model_box.roi_align(model_box.pad_for_roi_align(x), tf.constant(rois), tf.constant(index), 0.25, 7)
        gradient = tf.gradients(tf.reduce_sum(out * fed), x)[0]
        with tf.Session(config=tf.ConfigProto(intra_op_parallelism_threads=4)) as session:
            for _ in range(runs):
                error = np.abs(session.run(gradient, {fed: weight}) - expected).max() / np.abs(expected).max()
                worst = max(worst, error)
                if worst > 0.01:
                    break
    return worst


def test_gradient_of_roi_align_is_exact_on_several_threads():
    assert crowded_gradient_error(20) < 1e-4


@pytest.mark.slow
def test_gradient_of_roi_align_would_be_wrong_without_the_setting_of_tf_v1():
    """Shows that the test above guards something. The race needs threads that really run at the same time,
    so it may take many runs on a busy machine."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two processor cores")
    environment = os.environ | {"TF_DETERMINISTIC_OPS": "0", "CUDA_VISIBLE_DEVICES": "-1"}
    result = subprocess.run(
        [sys.executable, "-c", GRADIENT_PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert float(result.stdout.split()[-1]) > 0.01


# ------------------------------------------------------------------------------------------------ older RoI features
def round_half_away(value):
    return int(np.sign(value)) * int(np.floor(abs(float(value)) + 0.5))


def reference_roi_pool(features, rois, index, scale, resolution):
    """Fast R-CNN's definition, cell by cell -> [R,M,M,C] and the function that carries a gradient of that shape back
    to the features; a bin's first largest cell takes it."""
    _, height, width, channels = features.shape
    out = np.zeros([len(rois), resolution, resolution, channels])
    sources = []
    for r, (box, image) in enumerate(zip(rois, index)):
        x1, y1, x2, y2 = (round_half_away(v * scale) for v in box)
        bin_w = Fraction(max(x2 - x1 + 1, 1), resolution)
        bin_h = Fraction(max(y2 - y1 + 1, 1), resolution)
        for i in range(resolution):
            top = min(max(int(np.floor(i * bin_h)) + y1, 0), height)
            bottom = min(max(int(np.ceil((i + 1) * bin_h)) + y1, 0), height)
            for j in range(resolution):
                left = min(max(int(np.floor(j * bin_w)) + x1, 0), width)
                right = min(max(int(np.ceil((j + 1) * bin_w)) + x1, 0), width)
                cells = features[image, top:bottom, left:right]
                if cells.size:
                    best = cells.reshape(-1, channels).argmax(0)
                    y, x = top + best // (right - left), left + best % (right - left)
                    out[r, i, j] = features[image, y, x, np.arange(channels)]
                    sources.append((r, i, j, image, y, x))

    def backward(gradient):
        result = np.zeros(features.shape)
        for r, i, j, image, y, x in sources:
            np.add.at(result, (image, y, x, np.arange(channels)), gradient[r, i, j])
        return result

    return out, backward


def pooled_with_gradient(operation, features, rois, index, weight, **options):
    def make():
        x = tf.constant(features)
        out = operation(x, tf.constant(rois, tf.float32), tf.constant(index, tf.int32), **options)
        return out, tf.gradients(tf.reduce_sum(out * weight), x)[0]

    return evaluate(make)


def hard_rois():
    """Boxes of half cells, inside, across and outside of two maps of 24 x 36 cells at stride 4, inverted and huge."""
    random = np.random.RandomState(5)
    corner = random.randint(-40, 300, [60, 2]) / 2.0
    rois = np.concatenate([corner, corner + random.randint(0, 200, [60, 2]) / 2.0], 1)
    special = [[0, 0, 143, 95], [0, 0, 144, 96], [10, 10, 10, 10], [20, 20, 12, 8], [-500, -500, -400, -400],
               [140, 90, 400, 400], [1e8, 1e8, 2e8, 2e8], [-1e8, -1e8, 1e8, 1e8], [3, 40, 140, 42], [70, 0, 71, 96],
               [2, 2, 6, 6], [-2, -2, -2, -2], [np.nan, 0, 5, 5]]  # fmt: skip
    return np.concatenate([rois, special]).astype(np.float32), random.randint(0, 2, 60 + len(special)).astype(np.int32)


@pytest.mark.parametrize("budget", [1 << 25, 300])
@pytest.mark.parametrize("resolution", [7, 14])
def test_roi_pool_and_its_gradient_equal_the_definition(resolution, budget, monkeypatch):
    monkeypatch.setattr(model_box, "_POOL_BUDGET", budget)  # the small one: steps of few bins, a bin too large for one
    features = np.random.RandomState(0).randn(2, 24, 36, 3).astype(np.float32)
    rois, index = hard_rois()
    usual = np.isfinite(rois).all(1)
    weight = np.random.RandomState(1).randn(len(rois), resolution, resolution, 3).astype(np.float32)
    weight[~usual] = 0
    out, gradient = pooled_with_gradient(
        model_box.roi_pool, features, rois, index, weight, spatial_scale=0.25, resolution=resolution
    )
    assert np.isfinite(out).all()
    expected, backward = reference_roi_pool(features, rois[usual], index[usual], 0.25, resolution)
    np.testing.assert_array_equal(out[usual], expected.astype(np.float32))
    np.testing.assert_allclose(gradient, backward(weight[usual]), atol=1e-4)


def test_roi_pool_shares_its_gradient_between_equal_cells():
    """The features of a map after its ReLU are equal, 0, in many places."""
    weight = np.random.RandomState(1).rand(1, 2, 2, 2).astype(np.float32)
    features = np.zeros([1, 8, 8, 2], np.float32)
    out, gradient = pooled_with_gradient(
        model_box.roi_pool, features, [[0, 0, 7, 7]], [0], weight, spatial_scale=1.0, resolution=2
    )
    assert not out.any()
    np.testing.assert_allclose(gradient[0], weight[0].repeat(4, 0).repeat(4, 1) / 16, rtol=1e-6)


@pytest.mark.parametrize("operation", [model_box.roi_pool, model_box.roi_crop_and_resize])
def test_features_of_no_rois_are_empty(operation):
    def make():
        x = tf.ones([1, 8, 8, 2])
        none = tf.where(tf.random.stateless_uniform([3], [1, 1]) > 2)[:, :1]  # known only when it runs
        out = operation(x, tf.tile(tf.cast(none, tf.float32), [1, 4]), tf.cast(none[:, 0], tf.int32), 1.0, 7)
        return out, tf.gradients(out, x)[0]

    out, gradient = evaluate(make)
    assert out.shape == (0, 7, 7, 2) and not gradient.any()


def reference_crops(features, rois, index, scale, resolution, samples):
    """Float64: samples on a grid over the box whose outermost ones lie on its edges, then maxima -> [R,M,M,C] and the
    function that carries a gradient back."""
    _, height, width, channels = features.shape
    n = resolution * samples
    taps = np.zeros([len(rois), n, n, height, width])
    for r, box in enumerate(np.asarray(rois, np.float64) * scale):
        for i, y in enumerate(np.linspace(box[1], box[3], n)):
            for j, x in enumerate(np.linspace(box[0], box[2], n)):
                if 0 <= y <= height - 1 and 0 <= x <= width - 1:
                    y0, x0 = int(y), int(x)
                    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
                    for yy, wy in ((y0, 1 - (y - y0)), (y1, y - y0)):
                        for xx, wx in ((x0, 1 - (x - x0)), (x1, x - x0)):
                            taps[r, i, j, yy, xx] += wy * wx
    values = np.einsum("rijyx,ryxc->rijc", taps, features[index].astype(np.float64))
    values = values.reshape(-1, resolution, samples, resolution, samples, channels)
    values = values.transpose(0, 1, 3, 5, 2, 4).reshape(-1, resolution, resolution, channels, samples**2)
    best = np.eye(samples**2)[values.argmax(-1)]  # [R, M, M, C, samples^2]

    def backward(gradient):
        spread = (best * gradient[..., None]).reshape(-1, resolution, resolution, channels, samples, samples)
        spread = spread.transpose(0, 1, 4, 2, 5, 3).reshape(-1, n, n, channels)
        result = np.zeros(features.shape)
        np.add.at(result, index, np.einsum("rijc,rijyx->ryxc", spread, taps))
        return result

    return values.max(-1), backward


@pytest.mark.parametrize("samples", [1, 2])
def test_crop_and_resize_and_its_gradient_equal_the_float64_reference(samples):
    features = np.random.RandomState(0).randn(2, 6, 9, 2).astype(np.float32)
    random = np.random.RandomState(2)
    corner = random.uniform(-10, 30, [20, 2])
    rois = np.concatenate([corner, corner + random.uniform(0, 25, [20, 2])], 1)
    rois = np.concatenate([rois, [[0, 0, 31.9, 19.9], [8, 8, 8, 8], [100, 100, 120, 120]]]).astype(np.float32)
    index = random.randint(0, 2, len(rois)).astype(np.int32)
    weight = random.randn(len(rois), 5, 5, 2).astype(np.float32)
    options = {"spatial_scale": 0.25, "resolution": 5, "samples": samples}
    out, gradient = pooled_with_gradient(model_box.roi_crop_and_resize, features, rois, index, weight, **options)
    expected, backward = reference_crops(features, rois, index, 0.25, 5, samples)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, backward(weight), atol=1e-4)


def test_crop_and_resize_of_a_map_of_one_cell_is_that_cell():
    features = np.array([[[[3.0, -1.0]]]], np.float32)
    out, gradient = pooled_with_gradient(
        model_box.roi_crop_and_resize, features, [[0, 0, 16, 16]], [0], 1.0, spatial_scale=1 / 32, resolution=2
    )
    np.testing.assert_array_equal(out[0, 0, 0], features[0, 0, 0])
    np.testing.assert_allclose(gradient, 4.0)


# --------------------------------------------------------------------------------------------------------- FPN pooling
def test_pooling_the_last_level_of_each_box_equals_pooling_the_boxes_of_each_level():
    random = np.random.RandomState(0)
    features = [random.randn(2, 64 >> k, 96 >> k, 3).astype(np.float32) for k in range(4)]
    boxes = np.array([[5, 5, 40, 30], [0, 0, 150, 140], [3, 100, 380, 250], [10, 8, 300, 250]], np.float32)
    boxes = np.concatenate([boxes, boxes + 1.5])
    index = np.array([0, 1, 0, 1, 1, 0, 1, 0], np.int32)
    pool = functools.partial(model_box.roi_pool, resolution=7)

    def make(last_pixel):
        levels = [tf.constant(f) for f in features]
        return model_box.pool_from_levels(
            levels, [4, 8, 16, 32], tf.constant(boxes), tf.constant(index), pool, last_pixel
        )  # fmt: skip

    level = evaluate(lambda: model_box.fpn_level_of(tf.constant(boxes), 4))
    assert set(level) == {0, 1, 2}
    for last_pixel in (False, True):
        pooled = evaluate(lambda flag=last_pixel: make(flag))
        for r in range(8):
            box = boxes[r] - np.array([0, 0, 1, 1]) * last_pixel
            expected = reference_roi_pool(features[level[r]], box[None], index[r : r + 1], 0.25 / 2 ** level[r], 7)[0]
            np.testing.assert_array_equal(pooled[r], expected[0].astype(np.float32))


def test_pooler_assigns_the_recorded_levels_and_pools_the_recorded_values(golden):
    features = [nhwc(golden[f"pooler/feat_p{level}"]) for level in (2, 3, 4, 5)]
    boxes = np.concatenate([golden["pooler/boxes0"], golden["pooler/boxes1"]])
    index = np.repeat([0, 1], [len(golden["pooler/boxes0"]), len(golden["pooler/boxes1"])]).astype(np.int32)

    def make():
        padded = [model_box.pad_for_roi_align(tf.constant(f)) for f in features]
        level = model_box.fpn_level_of(tf.constant(boxes), 4)
        align = functools.partial(model_box.roi_align, resolution=7)
        return level, model_box.pool_from_levels(
            padded, [4, 8, 16, 32], tf.constant(boxes), tf.constant(index), align
        )  # fmt: skip

    level, pooled = evaluate(make)
    np.testing.assert_array_equal(level, golden["pooler/levels"])
    np.testing.assert_allclose(nchw(pooled), golden["pooler/out7_s2"], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------- NMS
def nms_indices(boxes, scores, threshold, problems=None):
    """Kept rows by decreasing score; problems: which independent problem each row belongs to."""
    problems = np.zeros(len(boxes), int) if problems is None else problems
    count = problems.max() + 1
    padded = np.zeros([count, len(boxes), 4], np.float32)
    padded_scores = np.full([count, len(boxes)], -np.inf, np.float32)
    padded[problems, np.arange(len(boxes))] = boxes
    padded_scores[problems, np.arange(len(boxes))] = scores
    kept_boxes, kept_scores, kept = evaluate(
        lambda: model_box.batched_nms(tf.constant(padded), tf.constant(padded_scores), threshold, len(boxes))
    )
    indices = []
    for problem in range(count):
        for box, score in zip(kept_boxes[problem, : kept[problem]], kept_scores[problem]):
            same = (boxes == box).all(1) & (scores == score) & (problems == problem)
            same[indices] = False
            indices.append(int(np.flatnonzero(same)[0]))
    return sorted(indices, key=lambda i: -scores[i])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_nms_keeps_the_recorded_rows_of_one_and_of_many_problems(golden, threshold):
    boxes, scores, classes = golden["nms/boxes"], golden["nms/scores"], golden["nms/classes"]
    assert nms_indices(boxes, scores, threshold) == golden[f"nms/keep_single_{threshold}"].tolist()
    assert nms_indices(boxes, scores, threshold, classes) == golden[f"nms/keep_batched_{threshold}"].tolist()


def test_nms_of_equal_scores_keeps_the_recorded_boxes(golden):
    boxes, keep = golden["nms/tie_boxes"], golden["nms/tie_keep_0.5"]
    ours = nms_indices(boxes, golden["nms/tie_scores"], 0.5)
    assert sorted(map(tuple, boxes[ours])) == sorted(map(tuple, boxes[keep]))


def test_nms_ignores_absent_boxes_and_counts_none():
    boxes, scores, count = evaluate(
        lambda: model_box.batched_nms(tf.zeros([2, 3, 4]), tf.fill([2, 3], float("-inf")), 0.5, 4)
    )
    assert count.tolist() == [0, 0] and not boxes.any() and boxes.shape == (2, 4, 4) and scores.shape == (2, 4)


@pytest.mark.parametrize("lowest", [0.0, -0.9, -5.0, -1e6])
def test_nms_keeps_boxes_of_any_score_in_the_place_of_suppressed_ones(lowest):
    boxes = np.zeros([8, 4], np.float32)
    boxes[:, 0] = [0, 0, 20, 20, 40, 60, 80, 100]  # the second and fourth are suppressed
    boxes[:, 2:] = boxes[:, :2] + 5
    scores = (lowest + np.array([7, 6, 5, 4, 3, 2, 1, 0], np.float32))[[0, 1, 4, 5, 3, 7, 6, 2]]
    kept_boxes, kept_scores, count = evaluate(
        lambda: model_box.batched_nms(tf.constant(boxes[None]), tf.constant(scores[None]), 0.5, 8)
    )
    best = np.array([0, 7, 4, 2, 6, 5])
    assert count.tolist() == [6]
    np.testing.assert_array_equal(kept_boxes[0, :6], boxes[best])
    np.testing.assert_array_equal(kept_scores[0], [*scores[best], 0, 0])


def test_iou_equals_the_recording_and_is_zero_between_empty_boxes(golden):
    boxes = golden["nms/boxes"][:40]
    iou = evaluate(lambda: model_box.pairwise_iou(tf.constant(boxes), tf.constant(boxes)))
    np.testing.assert_allclose(iou, golden["nms/pairwise_iou_first40"], atol=1e-6)
    assert not evaluate(lambda: model_box.pairwise_iou(tf.zeros([2, 4]), tf.ones([3, 4]))).any()


# ---------------------------------------------------------------------------------------------------------- box coding
def crowded(random, count):
    """Boxes [count, 4] of which some are equal and some empty."""
    corner = random.uniform(0, 90, [count, 2])
    boxes = np.concatenate([corner, corner + random.uniform(2, 40, [count, 2])], 1)
    boxes[random.rand(count) < 0.2] = boxes[0]
    boxes[random.rand(count) < 0.1] = 0
    return np.round(boxes).astype(np.float32)


@pytest.mark.parametrize("budget", [1, 300, 1000, 1 << 23])
@pytest.mark.parametrize("objects", [1, 7, 40])
def test_matching_in_blocks_equals_all_pairs_at_once_to_the_bit(budget, objects, monkeypatch):
    monkeypatch.setattr(model_box, "_PAIR_BUDGET", budget)
    random = np.random.RandomState(objects)
    boxes, targets = crowded(random, 100)[None], np.stack([crowded(random, objects) for _ in range(2)])
    counted = random.rand(2, 100) < 0.7

    def make():
        pairs = tf.constant(boxes), tf.constant(targets)
        iou = model_box.pairwise_iou(*pairs)  # [2, 100, G], the definition
        blocks = model_box.match_boxes(*pairs), model_box.match_boxes(*pairs, tf.constant(counted))
        return iou, *blocks, model_box.covered_share(*pairs)

    iou, everything, some, share = evaluate(make)
    for (best, match, best_of_target, is_best), seen in ((everything, np.ones_like(counted)), (some, counted)):
        looked = np.where(seen[..., None], iou, 0)
        top = looked.max(1, keepdims=True)
        np.testing.assert_array_equal(best, iou.max(2))
        np.testing.assert_array_equal(match, iou.argmax(2))
        np.testing.assert_array_equal(best_of_target, top[:, 0])
        np.testing.assert_array_equal(is_best, ((looked == top) & (top > 0)).any(2))
    a, b = boxes[:, :, None].astype(np.float64), targets[:, None].astype(np.float64)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    own = np.prod(a[..., 2:] - a[..., :2], -1)
    wanted = np.divide(sides.prod(-1), own, out=np.zeros(iou.shape), where=own > 0).max(2)
    np.testing.assert_allclose(share, wanted, atol=1e-6)


def test_matching_nothing_finds_nothing():
    def make():
        return model_box.match_boxes(tf.ones([1, 3, 4]), tf.ones([2, 0, 4]))

    best, match, best_of_target, is_best = evaluate(make)
    assert (best < 0).all() and not match.any() and not is_best.any() and best_of_target.shape == (2, 0)


MEMORY_PROGRAM = """
import resource
import numpy as np
import model_box
from utils.tf_v1 import tf
random = np.random.RandomState(0)
corner = random.uniform(0, 800, [100000, 2])
boxes = np.concatenate([corner, corner + random.uniform(8, 200, corner.shape)], 1).astype(np.float32)
edges = random.uniform(0, 100, [128, 6000, 4]).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with tf.Graph().as_default(), tf.Session() as session:
    fed = [tf.placeholder(tf.float32, shape) for shape in ([1, None, 4], [1, None, 4], [None, None, 4])]
    found = model_box.match_boxes(*fed[:2]), model_box.covered_share(*fed[:2])
    masks = model_box.rasterize_edges(fed[2], fed[0][0, :128], 28)
    total = [tf.reduce_max(v) for v in (*found[0][:3], found[1], masks)]
    session.run(total, dict(zip(fed, (boxes[None], boxes[None, :400], edges))))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_of_matching_and_of_mask_targets_is_bounded():
    """100,000 boxes and 400 objects have 160 MB of IoUs alone, 128 outlines of 6,000 edges 86 MB of columns."""
    command = [sys.executable, "-c", MEMORY_PROGRAM]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 450


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_box_coding_equals_the_recording_and_clamps_large_scales(golden, number):
    weights = golden[f"boxcode/w{number}"]
    assert abs(model_box.BOX_SCALE_CLAMP - golden["boxcode/scale_clamp"]) < 1e-9
    source, target = golden["boxcode/src"], golden["boxcode/dst"]
    encoded = evaluate(lambda: model_box.encode_boxes(tf.constant(target), tf.constant(source), weights))
    np.testing.assert_allclose(encoded, golden[f"boxcode/encode_w{number}"], rtol=1e-5, atol=1e-5)
    deltas = golden["boxcode/deltas_k2"].reshape(-1, 2, 4)
    assert (deltas[..., 2:] / weights[2:] > model_box.BOX_SCALE_CLAMP).any() or number > 0
    decoded = evaluate(lambda: model_box.decode_boxes(tf.constant(deltas), tf.constant(source)[:, None], weights))
    np.testing.assert_allclose(decoded.reshape(-1, 8), golden[f"boxcode/decode_k2_w{number}"], rtol=1e-5, atol=1e-5)


def test_clipped_boxes_equal_the_recording(golden):
    boxes = golden["boxcode/decode_k2_w1"].reshape(1, -1, 4)
    shape = golden["boxcode/clip_hw"].astype(np.int32)[None]
    clipped = evaluate(lambda: model_box.clip_boxes(tf.constant(boxes), tf.constant(shape)))[0]
    np.testing.assert_allclose(clipped, golden["boxcode/clipped_w1"], atol=1e-5)
    np.testing.assert_array_equal((clipped[:, 2:] > clipped[:, :2]).all(1), golden["boxcode/nonempty_w1"])


boxes_of_a_million_pixels = st.tuples(*[st.floats(-1000, 1000, width=32)] * 2, *[st.floats(1, 1000, width=32)] * 2)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(boxes_of_a_million_pixels, boxes_of_a_million_pixels), min_size=1, max_size=20))
def test_decoding_inverts_encoding(pairs):
    boxes = np.array(pairs, np.float32)
    boxes[..., 2:] += boxes[..., :2]
    boxes[:, 0, 2:] = np.minimum(boxes[:, 0, 2:], boxes[:, 0, :2] + 60 * (boxes[:, 1, 2:] - boxes[:, 1, :2]))  # clamp

    def make():
        wanted, reference = tf.constant(boxes[:, 0]), tf.constant(boxes[:, 1])
        weights = (10.0, 10.0, 5.0, 5.0)
        return model_box.decode_boxes(model_box.encode_boxes(wanted, reference, weights), reference, weights)

    np.testing.assert_allclose(evaluate(make), boxes[:, 0], atol=0.02)


# ----------------------------------------------------------------------------------------------------- generalised IoU
def reference_giou(a, b):
    """Rezatofighi et al. 2019, algorithm 1, of two boxes in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    common = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return common / union - (hull - union) / hull


def giou_with_gradient(a, b):
    def make():
        x, y = tf.constant(a, tf.float32), tf.constant(b, tf.float32)
        giou = model_box.generalized_iou(x, y)
        return giou, *tf.gradients(giou, [x, y])

    return evaluate(make)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(boxes_of_a_million_pixels, boxes_of_a_million_pixels), min_size=1, max_size=30))
def test_giou_equals_its_definition_is_symmetric_and_scale_invariant(pairs):
    boxes = np.round(np.array(pairs, np.float32) * 64) / 64  # no subnormal numbers once scaled
    boxes[..., 2:] += boxes[..., :2]
    a, b = boxes[:, 0], boxes[:, 1]
    # Each pair, the same swapped, each box with itself, and both scaled by powers of two, which rounds nothing.
    first = np.concatenate([a, b, a, a * np.float32(0.25), a * np.float32(64)])
    second = np.concatenate([b, a, a, b * np.float32(0.25), b * np.float32(64)])
    giou, by_first, by_second = giou_with_gradient(first, second)
    assert (giou >= -1).all() and (giou <= 1).all() and np.isfinite(by_first).all() and np.isfinite(by_second).all()
    plain, swapped, same, small, large = np.split(giou, 5)
    np.testing.assert_allclose(plain, [reference_giou(x, y) for x, y in zip(a, b)], atol=1e-4)
    np.testing.assert_allclose(swapped, plain, atol=1e-6)
    np.testing.assert_array_equal(same, 1.0)
    np.testing.assert_allclose([small, large], [plain, plain], atol=1e-6)
    by_a, _, _, by_small, by_large = np.split(by_first, 5)
    np.testing.assert_allclose([by_small * 0.25, by_large * 64], [by_a, by_a], rtol=1e-4, atol=1e-6)


def test_gradient_of_giou_equals_finite_differences():
    random = np.random.RandomState(0)
    corner = random.uniform(0, 60, [2, 40, 2])
    a, b = np.concatenate([corner, corner + random.uniform(3, 50, corner.shape)], -1)
    giou, by_a, by_b = giou_with_gradient(a, b)
    assert (giou < 0).any() and (giou > 0).any()
    step = 1e-6
    for row in range(len(a)):
        for k in range(4):
            shift = step * np.eye(4)[k]
            slope = (reference_giou(a[row] + shift, b[row]) - reference_giou(a[row] - shift, b[row])) / (2 * step)
            assert by_a[row, k] == pytest.approx(slope, abs=2e-5)
            slope = (reference_giou(a[row], b[row] + shift) - reference_giou(a[row], b[row] - shift)) / (2 * step)
            assert by_b[row, k] == pytest.approx(slope, abs=2e-5)


def test_giou_and_its_gradient_are_finite_for_empty_tiny_and_distant_boxes():
    special = np.array([
        [5, 5, 5, 5], [5, 5, 5, 30], [0, 0, 10, 10], [7, 7, 7 + 1e-20, 7 + 1e-20], [0, 0, 1e-20, 1e-20],
        [1e18, 1e18, 1e18, 1e18], [-1e18, -1e18, 1e18, 1e18], [1e30, 0, 2e30, 1],
    ], np.float32)  # fmt: skip
    a, b = np.repeat(special, len(special), 0), np.tile(special, [len(special), 1])
    giou, by_a, by_b = giou_with_gradient(a, b)
    assert np.isfinite(giou).all() and np.isfinite(by_a).all() and np.isfinite(by_b).all()
    assert (giou >= -1).all() and (giou <= 1).all()
    # An empty box inside another: the hull is the other box, and a larger box would do better.
    inside, by_inside, _ = giou_with_gradient([[5.0, 5, 5, 8]], [[0.0, 0, 10, 10]])
    assert inside[0] == 0 and by_inside[0, 0] < 0 < by_inside[0, 2]


# ------------------------------------------------------------------------------------------------------------- anchors
@pytest.mark.parametrize(
    "name, stride, sizes, shapes",
    [
        ("p2", 4, [32], [(5, 7), (7, 5)]),
        ("p6", 64, [512], [(2, 3), (3, 2)]),
        ("c4", 16, [32, 64, 128, 256, 512], [(3, 4), (4, 3)]),
    ],
)
def test_anchors_equal_the_recording(golden, name, stride, sizes, shapes):
    expected = golden[f"anchors/{name}"]
    cells = model_box.cell_anchors(sizes, [0.5, 1.0, 2.0])
    found = [evaluate(lambda s=s: model_box.anchors_of_level(tf.constant(s), stride, cells)) for s in shapes]
    errors = [np.abs(f - expected).max() for f in found if f.shape == expected.shape]
    assert min(errors) < 1e-4


# -------------------------------------------------------------------------------------------------------- mask targets
def golden_polygons(golden, image):
    """Edges [E,4] per object."""
    lengths, owners = golden[f"poly/{image}/len"], golden[f"poly/{image}/owner"]
    parts = [p.reshape(-1, 2) for p in np.split(golden[f"poly/{image}/xy"], np.cumsum(lengths)[:-1])]
    return [
        rings_to_edges([orient_outer(p) for p, owner in zip(parts, owners) if owner == index])
        for index in range(len(golden[f"poly/{image}/gt_boxes"]))
    ]


def rasterize_in_graph(edges, boxes, resolution):
    padded = np.zeros([len(edges), max(len(e) for e in edges), 4], np.float32)
    for row, e in enumerate(edges):
        padded[row, : len(e)] = e
    return evaluate(lambda: model_box.rasterize_edges(tf.constant(padded), tf.constant(boxes, tf.float32), resolution))


@pytest.mark.parametrize("resolution", [28, 14])
def test_mask_targets_equal_the_recorded_ones_of_real_polygons(golden, resolution):
    for image in (0, 1):
        objects = golden_polygons(golden, image)
        edges = [objects[owner] for owner in golden[f"poly/{image}/box_owner"]]
        ours = rasterize_in_graph(edges, golden[f"poly/{image}/boxes"], resolution)
        packed = golden[f"poly/{image}/raster{resolution}_packed"]
        expected = np.unpackbits(packed, axis=1)[:, : resolution**2].reshape(ours.shape)
        np.testing.assert_array_equal(ours, expected)


def coco_mask(rings, box, resolution):
    """COCO's rasteriser in the frame of a box, parts united."""
    scale = resolution / np.maximum((box[2:] - box[:2]).astype(np.float64), 0.1)
    parts = [((ring - box[:2].astype(np.float64)) * scale).ravel().tolist() for ring in rings]
    return coco.decode(coco.merge(coco.frPyObjects(parts, resolution, resolution)))


@pytest.mark.parametrize("vertices, parts, budget", [(3, 1, 1 << 22), (3, 4, 1000), (4, 1, 1)])
def test_mask_targets_equal_cocos_rasteriser_on_random_polygons(vertices, parts, budget, monkeypatch):
    monkeypatch.setattr(model_box, "_EDGE_BUDGET", budget)
    random = np.random.RandomState(0)
    count = 300
    rings = random.uniform(-20, 60, [count, parts, vertices, 2]).astype(np.float32)
    # Sorted around their centre, vertices make a polygon that does not cross itself.
    spokes = rings - rings.mean(2, keepdims=True)
    order = np.argsort(np.arctan2(spokes[..., 1], spokes[..., 0]), 2)
    rings = np.take_along_axis(rings, order[..., None], 2)
    corner = random.uniform(-10, 30, [count, 2])
    boxes = np.concatenate([corner, corner + random.uniform(0.5, 40, [count, 2])], 1).astype(np.float32)
    edges = [rings_to_edges([orient_outer(ring) for ring in own]) for own in rings]
    ours = rasterize_in_graph(edges, boxes, 28)
    expected = np.stack([coco_mask(own, box, 28) for own, box in zip(rings, boxes)])
    assert 0.1 < expected.mean() < 0.9
    # float32 against float64: a vertex exactly between two points of the grid may go to the other.
    assert (ours != expected).mean() < 2e-5


coordinates = st.floats(-20, 60, width=32)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.lists(st.tuples(coordinates, coordinates), min_size=3, max_size=8), min_size=1, max_size=3),
    st.tuples(coordinates, coordinates, st.floats(1, 50, width=32), st.floats(1, 50, width=32)),
)
def test_mask_targets_have_the_exact_area_up_to_the_outline(rings, box):
    """Whatever the polygon, also one that crosses itself: pixels differ from the float64 rasteriser at the outline."""
    edges = rings_to_edges([np.array(r, np.float32) for r in rings])
    box = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], np.float32)
    ours = rasterize_in_graph([edges], box[None], 14)[0].astype(bool)
    cell = (box[2:] - box[:2]) / 14
    moved = [rasterize(edges + np.tile(cell * [dx, dy], 2), box, 14) for dx in (-0.5, 0, 0.5) for dy in (-0.5, 0, 0.5)]
    sure = np.all([m == moved[4] for m in moved], axis=0)
    assert (ours == moved[4])[sure].mean() > 0.97


def test_mask_targets_keep_holes_and_unite_overlapping_parts():
    outer = np.array([[0, 0], [10, 0], [10, 10], [0, 10]], np.float32)
    hole = outer[::-1] * 0.4 + 3
    second = outer + 5
    mask = rasterize_in_graph([rings_to_edges([outer, hole, second])], np.array([[0, 0, 15, 15]]), 15)[0]
    expected = np.zeros([15, 15])
    expected[:10, :10] = 1
    expected[3:7, 3:7] = 0
    expected[5:, 5:] = 1
    np.testing.assert_array_equal(mask, expected)


def test_mask_targets_of_padding_and_of_empty_boxes_are_finite():
    edges = np.zeros([2, 3, 4], np.float32)
    mask = evaluate(lambda: model_box.rasterize_edges(tf.constant(edges), tf.zeros([2, 4]), 28))
    assert mask.shape == (2, 28, 28) and not mask.any()
