"""model_syncbn.py: replicas together equal one replica with the joined batch, forward and backward."""

import contextlib

import numpy as np
import pytest

import model_syncbn
from model_syncbn import batch_norm, batch_statistics, collective_sum, valid_area
from utils.tf_v1 import graphs_for_gpu, tf

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(1, 2, (4, 8, 10, 6)).astype(np.float32)
GRADIENT = RANDOM.normal(0, 1, X.shape).astype(np.float32)
# Valid cells of the four maps; image sizes are those at stride 4, of which the last cell may show one pixel only.
CELLS = np.array([[4, 5], [8, 7], [6, 10], [3, 5]])
PIXELS = CELLS * 4 - [[3, 0], [0, 1], [2, 3], [3, 3]]
VALID = (np.arange(8)[None, :, None] < CELLS[:, 0, None, None]) & (np.arange(10) < CELLS[:, 1, None, None])


def normalised(x, gradient, total, pixels=None):
    """-> y, dx, [dγ, dβ] of a replica with maps x at stride 4 of images with valid sizes `pixels`; their moving
    averages' updates are in UPDATE_OPS."""
    area = valid_area(pixels.astype(np.int32), np.array(x.shape[1:3]) * 4) if pixels is not None else None
    with area or contextlib.nullcontext(), batch_statistics(total):
        x = tf.constant(x)
        scope = tf.get_variable_scope().name
        y = batch_norm(x, 1e-5, True)
        variables = tf.trainable_variables(f"{scope}/" if scope else None)
        dx, *parameters = tf.gradients(y, [x, *variables], tf.constant(gradient))
    return y, dx, parameters


def run(*replicas):
    """Per replica its outputs and gradients of x; the sums of dγ and dβ; per replica the two moving averages.

    A replica is the arguments of `normalised` but the sum.
    """
    with tf.Graph().as_default():
        built = []
        for i, (x, gradient, *pixels) in enumerate(replicas):
            total = collective_sum(len(replicas)) if len(replicas) > 1 else (lambda t: t)
            with tf.device(f"/cpu:{i}"), tf.variable_scope(f"tower{i}"):
                built.append(normalised(x, gradient, total, *pixels))
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        with tf.Session(config=tf.ConfigProto(device_count={"CPU": len(replicas)})) as sess:
            sess.run(tf.global_variables_initializer())
            built, averages = sess.run([built, updates])
    outputs, inputs, parameters = zip(*built)
    pairs = [averages[2 * i : 2 * i + 2] for i in range(len(replicas))]
    return outputs, inputs, [np.sum(values, 0) for values in zip(*parameters)], pairs


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "parts", [[slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]]
)
def test_replicas_equal_the_joined_batch(parts):
    joined, split = run((X, GRADIENT)), run(*[(X[p], GRADIENT[p]) for p in parts])
    assert_close(np.concatenate(split[0]), joined[0][0])
    assert_close(np.concatenate(split[1]), joined[1][0])
    assert_close(split[2], joined[2])
    for averages in split[3]:
        assert_close(averages, joined[3][0])
        np.testing.assert_array_equal(averages, split[3][0])  # the same to the bit in all replicas


def differently_padded(gradient):
    """The four maps as one padded batch, and as replicas of one and three images that need less padding."""
    crop = (slice(0, 1), slice(0, 4), slice(0, 5))
    rest = (slice(1, 4), slice(0, 8), slice(0, 10))
    joined = (X, gradient, PIXELS)
    return joined, [(X[crop], gradient[crop], PIXELS[:1]), (X[rest], gradient[rest], PIXELS[1:])]


def test_replicas_with_other_padding_equal_the_joined_batch():
    gradient = GRADIENT * VALID[..., None]
    one, replicas = differently_padded(gradient)
    joined, split = run(one), run(*replicas)
    for got, want in ((split[0], joined[0][0]), (split[1], joined[1][0])):
        assert_close(got[0][0], want[0, :4, :5])
        assert_close(got[1][VALID[1:]], want[1:][VALID[1:]])
    assert_close(split[2], joined[2])
    for averages in split[3]:
        assert_close(averages, joined[3][0])
        np.testing.assert_array_equal(averages, split[3][0])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("pixels", [None, PIXELS], ids=["unpadded", "padded"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_is_that_of_the_formula(pixels, dtype, gpu):
    """Against automatic differentiation of the plain definition, cells of the padding having gradients too."""
    with graphs_for_gpu(gpu):
        (y,), (dx,), (d_gamma, d_beta), [(mean, variance)] = run((X.astype(dtype), GRADIENT.astype(dtype), pixels))
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.constant(X, tf.float64)
        m, v = tf.nn.moments(tf.boolean_mask(x, VALID if pixels is not None else np.ones_like(VALID)), [0])
        gamma, beta = tf.ones([6], tf.float64), tf.zeros([6], tf.float64)
        want = (x - m) * tf.rsqrt(v + 1e-5) * gamma + beta
        want = sess.run([want, *tf.gradients(want, [x, gamma, beta], tf.constant(GRADIENT, tf.float64)), m, v])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == np.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for got, reference in zip((y, dx), want):
        np.testing.assert_allclose(got, reference, **tolerance)
    for got, reference in zip((d_gamma, d_beta, mean, variance), (*want[2:4], 0.1 * want[4], 0.9 + 0.1 * want[5])):
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


def test_inference_and_frozen_layers_use_the_moving_averages():
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.constant(X)
        y = batch_norm(x, 1e-5, True)
        with tf.variable_scope("frozen"), batch_statistics(lambda t: t):
            frozen = batch_norm(x, 1e-5, False)
        assert not tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        sess.run(tf.global_variables_initializer())
        for value in sess.run([y, frozen]):
            np.testing.assert_allclose(value, X / np.sqrt(1 + 1e-5), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_averages_follow_an_update_of_several_batches_as_fast_as_one_of_one(count):
    with tf.Graph().as_default(), tf.Session() as sess:
        with batch_statistics(lambda t: t, count):
            batch_norm(tf.constant(X), 1e-5, True)
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        sess.run(tf.global_variables_initializer())
        for _ in range(count):
            mean, variance = sess.run(updates)
    np.testing.assert_allclose(mean, 0.1 * X.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * X.var((0, 1, 2)), rtol=1e-4)


def test_no_wide_copy_of_a_map_in_half_precision_is_kept_for_the_gradient():
    with tf.Graph().as_default() as graph:
        with batch_statistics(lambda t: t):
            x = tf.placeholder(tf.bfloat16, [2, 8, 10, 6])
            y = batch_norm(x, 1e-5, True)
        tf.gradients(y, [x, *tf.trainable_variables()])
        backward = [op for op in graph.get_operations() if op.name.startswith("gradients/")]
        kept = [t for op in backward for t in op.inputs if not t.op.name.startswith("gradients/") and t.shape.rank == 4]
        assert kept and {t.dtype for t in kept if t.shape[-1] == 6} == {tf.bfloat16}


def test_replicas_on_gpus_sum_by_nccl_and_wait_no_longer_than_the_timeout(monkeypatch):
    monkeypatch.setattr(model_syncbn, "_TIMEOUT", 1.0)
    with tf.Graph().as_default(), tf.Session() as sess:
        alone = collective_sum(2, group_key=7)(tf.ones([3]))  # the second replica never comes
        with graphs_for_gpu(True):
            on_gpu = collective_sum(2, group_key=8)(tf.ones([3]))
        assert alone.op.get_attr("communication_hint") == b"auto"
        assert on_gpu.op.get_attr("communication_hint") == b"nccl"
        with pytest.raises(tf.errors.DeadlineExceededError):
            sess.run(alone)
