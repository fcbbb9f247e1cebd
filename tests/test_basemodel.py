"""Layers against recordings and NumPy: padding, frozen and group norm, grouped and transposed convolutions."""

from pathlib import Path

import numpy as np
import pytest

import basemodel
from common import UserError
from model_fpn import upsample_nearest_2x
from model_rcnn import build_inference
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_unit.npz", allow_pickle=False) as content:
        return {k: content[k] for k in content.files if k.split("/")[0][:4] in ("deco", "bili", "near", "stem")}


def nhwc(x):
    return np.ascontiguousarray(np.transpose(x, [0, 2, 3, 1]))


def nchw(x):
    return np.transpose(x, [0, 3, 1, 2])


def test_stem_and_pooling_equal_the_recording(golden):
    weights = {"conv0/W": np.transpose(golden["stem/w"], [2, 3, 1, 0])}

    def make():
        x = tf.constant(nhwc(golden["stem/x"]))
        y = basemodel.conv2d("conv0", x, 4, 7, 2, bias=False, tf_padding=False)
        padded = tf.pad(tf.nn.relu(y), [[0, 0], [1, 1], [1, 1], [0, 0]])
        return y, tf.nn.relu(y), tf.nn.max_pool2d(padded, 3, 2, "VALID")

    conv, _, pooled = evaluate(make, weights)
    np.testing.assert_allclose(nchw(conv), golden["stem/conv7s2p3"], atol=1e-4)
    # The recording pools the convolution itself; after the ReLU that is the same, cut at zero.
    np.testing.assert_allclose(nchw(pooled), np.maximum(golden["stem/maxpool3s2p1"], 0), atol=1e-4)


@pytest.mark.parametrize("kernel", [2, 4])
def test_transposed_convolution_equals_the_recording(golden, kernel):
    weight, bias = golden[f"deconv{kernel}/w"], golden[f"deconv{kernel}/b"]
    values = {"up/W": np.transpose(weight, [2, 3, 1, 0]), "up/b": bias}
    y = evaluate(
        lambda: basemodel.deconv2d("up", tf.constant(nhwc(golden[f"deconv{kernel}/x"])), len(bias), kernel, 2), values
    )
    np.testing.assert_allclose(nchw(y), golden[f"deconv{kernel}/y"], atol=1e-5)


def test_upsampling_equals_the_recording(golden):
    x = nhwc(golden["deconv2/x"])
    nearest, bilinear = evaluate(
        lambda: (
            upsample_nearest_2x(tf.constant(x)),
            tf.image.resize_bilinear(tf.constant(x), [8, 10], half_pixel_centers=True),
        )
    )
    np.testing.assert_array_equal(nchw(nearest), golden["nearest2x/y"])
    np.testing.assert_allclose(nchw(bilinear), golden["bilinear2x/y"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- references
def reference_conv(x, weight, stride, padding):
    """Float64 convolution with `padding` = ((top, bottom), (left, right)) and groups as the shapes say."""
    x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
    k, _, per_group, out = weight.shape
    groups = x.shape[3] // per_group
    h, w = ((x.shape[i] - k) // stride + 1 for i in (1, 2))
    y = np.zeros([len(x), h, w, out])
    for g in range(groups):
        source = x[..., g * per_group : (g + 1) * per_group]
        target = slice(g * out // groups, (g + 1) * out // groups)
        for i in range(k):
            for j in range(k):
                patch = source[:, i : i + h * stride : stride, j : j + w * stride : stride]
                y[..., target] += patch @ weight[i, j, :, target]
    return y


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients_equal_the_reference(groups, stride, onednn, monkeypatch):
    if not onednn:
        monkeypatch.setattr(basemodel, "onednn_enabled", lambda: False)
    random = np.random.RandomState(0)
    x = random.randn(2, 9, 8, 16).astype(np.float32)
    weight = random.randn(3, 3, 16 // groups, 24).astype(np.float32)
    expected = reference_conv(x, weight, stride, ((1, 1), (1, 1)))
    dy = random.randn(*expected.shape).astype(np.float32)

    def make():
        source = tf.constant(x)
        y = basemodel.conv2d("c", source, 24, 3, stride, groups=groups, bias=False, tf_padding=False)
        return y, tf.gradients(tf.reduce_sum(y * dy), [source, *tf.global_variables()])

    y, (by_x, by_weight) = evaluate(make, {"c/W": weight})
    np.testing.assert_allclose(y, expected, atol=1e-4)
    # A convolution is linear in both: <dy, conv(x')> must be <x', by_x> for any x', likewise for the weight.
    other = random.randn(*x.shape).astype(np.float32)
    assert np.vdot(by_x, other) == pytest.approx(
        np.vdot(dy, reference_conv(other, weight, stride, ((1, 1), (1, 1)))), rel=1e-4
    )
    other = random.randn(*weight.shape).astype(np.float32)
    assert np.vdot(by_weight, other) == pytest.approx(
        np.vdot(dy, reference_conv(x, other, stride, ((1, 1), (1, 1)))), rel=1e-4
    )


@pytest.mark.parametrize("size", [8, 9])
def test_padding_modes_differ_as_their_names_say(size):
    x = np.random.RandomState(0).randn(1, size, size, 2).astype(np.float32)
    weight = np.random.RandomState(1).randn(3, 3, 2, 3).astype(np.float32)
    outputs = {
        mode: evaluate(
            lambda m=mode: basemodel.conv2d("c", tf.constant(x), 3, 3, 2, bias=False, tf_padding=m), {"c/W": weight}
        )
        for mode in (True, False)
    }
    before = 0 if size % 2 == 0 else 1  # TensorFlow puts the odd pixel at the bottom and right
    np.testing.assert_allclose(outputs[True], reference_conv(x, weight, 2, ((before, 1),) * 2), atol=1e-5)
    np.testing.assert_allclose(outputs[False], reference_conv(x, weight, 2, ((1, 1),) * 2), atol=1e-5)


def test_folded_frozen_norm_equals_the_norm_after_the_convolution_gradients_too():
    random = np.random.RandomState(0)
    x = random.randn(2, 6, 5, 3).astype(np.float32)
    values = {
        "c/W": random.randn(3, 3, 3, 4), "c/bn/gamma": random.rand(4) + 0.5, "c/bn/beta": random.randn(4),
        "c/bn/mean/EMA": random.randn(4), "c/bn/variance/EMA": random.rand(4) + 0.1,
    }  # fmt: skip
    values = {k: v.astype(np.float32) for k, v in values.items()}

    def make(folded):
        source = tf.constant(x)
        if folded:
            y = basemodel.conv2d("c", source, 4, 3, norm="FreezeBN", relu=True)
        else:
            with tf.variable_scope("c"):
                w = tf.get_variable("W", [3, 3, 3, 4], initializer=tf.zeros_initializer())
                with tf.variable_scope("bn"):
                    gamma = tf.get_variable("gamma", [4], initializer=tf.ones_initializer())
                    beta = tf.get_variable("beta", [4], initializer=tf.zeros_initializer())
                    mean = tf.get_variable("mean/EMA", [4], initializer=tf.zeros_initializer(), trainable=False)
                    var = tf.get_variable("variance/EMA", [4], initializer=tf.ones_initializer(), trainable=False)
                y = tf.nn.conv2d(source, w, 1, "SAME")
                y = tf.nn.relu((y - mean) / tf.sqrt(var + 1e-5) * gamma + beta)
        return y, tf.gradients(tf.reduce_sum(tf.square(y)), [source, *tf.trainable_variables()])

    folded, folded_gradients = evaluate(lambda: make(True), values)
    unfolded, unfolded_gradients = evaluate(lambda: make(False), values)
    for ours, expected in zip([folded, *folded_gradients], [unfolded, *unfolded_gradients]):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_group_norm_equals_its_definition_far_from_zero_mean_too():
    random = np.random.RandomState(0)
    x = (random.randn(2, 7, 5, 64) * 3 + 20).astype(np.float32)
    gamma, beta = random.randn(64).astype(np.float32), random.randn(64).astype(np.float32)
    y = evaluate(lambda: basemodel.group_norm(tf.constant(x)), {"gn/gamma": gamma, "gn/beta": beta})
    wide = x.astype(np.float64).reshape(2, 35, 32, 2)
    mean, var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
    expected = ((wide - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * gamma + beta
    np.testing.assert_allclose(y, expected, atol=2e-3)


# --------------------------------------------------------------------------------------------------------- whole nets
def test_padding_is_exactly_zero_after_normalisation():
    cfg = tiny_config()
    image = np.random.RandomState(0).randint(0, 256, [2, 32, 64, 3]).astype(np.uint8)
    shapes = np.array([[20, 50], [32, 64]], np.int32)
    x = evaluate(lambda: basemodel.preprocess_image(tf.constant(image), tf.constant(shapes), cfg))
    assert not x[0, 20:].any() and not x[0, :, 50:].any()
    mean, std = np.array(cfg.PREPROC.PIXEL_MEAN[::-1]), np.array(cfg.PREPROC.PIXEL_STD[::-1])
    np.testing.assert_allclose(x[1], (image[1] - mean) / std, atol=1e-5)


@pytest.mark.parametrize("frozen", range(6))
def test_freezing_leaves_gradients_to_the_later_stages_only(frozen):
    cfg = tiny_config(f"BACKBONE.FREEZE_AT={frozen}")

    def make():
        features = basemodel.resnet_stages(tf.ones([1, 64, 64, 3]), cfg, 4)
        names = {v.op.name for v in tf.trainable_variables()}
        gradients = tf.gradients(tf.add_n([tf.reduce_sum(f) for f in features]), tf.trainable_variables())
        assert all(g is not None for g in gradients)
        return tf.constant(sorted({n.split("/")[0] for n in names}))

    scopes = [name.decode() for name in evaluate(make)] if frozen < 5 else []
    assert scopes == ["conv0", "group0", "group1", "group2", "group3"][frozen:]


def test_basic_blocks_have_the_names_shapes_and_strides_of_resnet_18():
    cfg = tiny_config("BACKBONE.BLOCK=basic", "BACKBONE.RESNET_NUM_BLOCK=[2,2,2,2]", "BACKBONE.STEM_CHANNELS=64")
    with tf.Graph().as_default():
        features = basemodel.resnet_stages(tf.zeros([1, 64, 96, 3]), cfg, 4)
        kernels = {v.op.name[:-2]: v.shape.as_list() for v in tf.global_variables() if v.op.name.endswith("/W")}
    assert [f.shape.as_list()[1:] for f in features] == [[16, 24, 64], [8, 12, 128], [4, 6, 256], [2, 3, 512]]
    expected = {"conv0": [7, 7, 3, 64]}
    for stage, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            before = width // 2 if stage > 0 and block == 0 else width
            expected[f"group{stage}/block{block}/conv1"] = [3, 3, before, width]
            expected[f"group{stage}/block{block}/conv2"] = [3, 3, width, width]
            if before != width:
                expected[f"group{stage}/block{block}/convshortcut"] = [1, 1, before, width]
    assert kernels == expected
    assert sum(np.prod(shape) for shape in kernels.values()) == 11_166_912  # torchvision's resnet18 less fc and norms


@pytest.mark.parametrize("norm", ["FreezeBN", "SyncBN", "GN", "None"])
def test_basic_blocks_train_under_every_norm(norm):
    cfg = tiny_config("BACKBONE.BLOCK=basic", "BACKBONE.STEM_CHANNELS=32", f"BACKBONE.NORM={norm}")

    def make():
        features = basemodel.resnet_stages(tf.random.stateless_normal([1, 64, 64, 3], [1, 2]), cfg, 4)
        return tf.gradients(tf.reduce_sum(features[-1] ** 2), tf.trainable_variables())

    gradients = evaluate(make)
    # conv0 and 4 stages of 2 convolutions, 3 of them with a shortcut: each has two affine parameters, or one bias
    assert len(gradients) == 12 * (2 if norm == "None" else 3)
    assert all(np.abs(g).max() > 0 for g in gradients)


@pytest.mark.parametrize("mask", [True, False])
def test_basic_blocks_as_c4_heads(mask):
    cfg = tiny_config("BACKBONE.BLOCK=basic", "MODE_FPN=False", f"MODE_MASK={mask}", "RPN.TEST_POST_NMS_TOPK=20")
    image = np.random.RandomState(0).randint(0, 256, [1, 64, 64, 3]).astype(np.uint8)

    def make():
        outputs = build_inference(tf.constant(image), tf.constant([[64, 64]]), cfg)
        shapes = {v.op.name: v.shape.as_list() for v in tf.global_variables()}
        assert shapes["group3/block0/conv1/W"] == [3, 3, 32, 64]  # stem 8: C4 has 32 channels, C5 64
        assert shapes["fastrcnn/class/W"] == [64, 4]
        assert not mask or shapes["maskrcnn/deconv/W"][-1] == 64
        return outputs

    outputs = evaluate(make)
    assert outputs["count"][0] > 0 and np.isfinite(outputs["boxes"]).all()


@pytest.mark.parametrize("setting", ["NUM_GROUPS=2", "WIDTH_PER_GROUP=4", "STRIDE_1X1=True"])
def test_settings_of_bottlenecks_are_refused_with_basic_blocks(setting):
    with pytest.raises(UserError, match=rf"BACKBONE\.{setting} must .* BACKBONE.BLOCK=basic"):
        tiny_config("BACKBONE.BLOCK=basic", f"BACKBONE.{setting}")


def test_group_norm_of_a_narrow_stem_is_refused():
    with pytest.raises(UserError, match=r"BACKBONE\.STEM_CHANNELS=48 .*multiple of 32"):
        tiny_config("BACKBONE.NORM=GN", "BACKBONE.STEM_CHANNELS=48")


def test_initial_values_depend_on_seed_and_name_alone():
    def make(order):
        for name in order:
            basemodel.conv2d(name, tf.zeros([1, 4, 4, 3]), 5, 3)
        return {v.op.name: v for v in tf.global_variables()}

    first, second = evaluate(lambda: make("ab")), evaluate(lambda: make("ba"))
    np.testing.assert_array_equal(first["a/W"], second["a/W"])
    assert (first["a/W"] != first["b/W"]).any()


@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-5), ("bfloat16", 4e-2), ("float64", 1e-12)])
def test_gradients_of_depthwise_convolutions_equal_sums_of_shifted_products(precision, tolerance):
    """For filters of every width with and without a kernel of their own in oneDNN, and sides that strides do not
    divide."""
    cases = [(k, s, padding, size) for k in (2, 3, 5, 7) for s in (1, 2, 3) for padding in ("SAME", "VALID")
             for size in ((9, 12), (8, 7))]  # fmt: skip
    random, arrays = np.random.RandomState(0), {}

    def make():
        results = []
        for case, (k, s, padding, (h, w)) in enumerate(cases):
            x, kernel = random.standard_normal([2, h, w, 4]), random.standard_normal([k, k, 1, 4])
            x, kernel = (np.asarray(tf.as_dtype(precision).as_numpy_dtype(v)) for v in (x, kernel))
            a, b = tf.constant(x), tf.constant(kernel)
            y = basemodel.grouped_conv(a, b, s, padding, 4)
            dy = random.standard_normal(y.shape.as_list()).astype(x.dtype)
            arrays[case] = x.astype(float), kernel.astype(float), dy.astype(float)
            results.append([tf.cast(v, tf.float64) for v in (y, *tf.gradients(y, [a, b], tf.constant(dy)))])
        return results

    for case, got in enumerate(evaluate(make)):
        for value, want in zip(got, depthwise(*arrays[case], *cases[case][:3])):
            np.testing.assert_allclose(value, want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=cases[case])


def depthwise(x, kernel, dy, k, stride, padding):
    """y, dx and d_kernel in float64 by definition."""
    n, h, w, c = x.shape
    oh, ow = dy.shape[1:3]
    total = [max((o - 1) * stride + k - side, 0) if padding == "SAME" else 0 for o, side in ((oh, h), (ow, w))]
    top, left = total[0] // 2, total[1] // 2
    padded = np.pad(x, [[0, 0], [top, total[0] - top], [left, total[1] - left], [0, 0]])
    y, d_padded, d_kernel = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(k):
        for j in range(k):
            rows, columns = slice(i, i + (oh - 1) * stride + 1, stride), slice(j, j + (ow - 1) * stride + 1, stride)
            y += padded[:, rows, columns] * kernel[i, j, 0]
            d_padded[:, rows, columns] += dy * kernel[i, j, 0]
            d_kernel[i, j, 0] = (padded[:, rows, columns] * dy).sum((0, 1, 2))
    return y, d_padded[:, top : top + h, left : left + w], d_kernel
