"""model_syncbn.py: replicas together equal one replica with the joined batch, forward and backward."""

import numpy as np
import pytest

from model_syncbn import batch_norm, batch_statistics, collective_sum
from utils.tf_v1 import tf

X = np.random.default_rng(0).normal(1, 2, (4, 5, 6, 8)).astype(np.float32)
GRADIENT = np.random.default_rng(1).normal(0, 1, X.shape).astype(np.float32)


def run(parts):
    """Outputs, gradients of x, of gamma and beta summed over replicas, and the moving averages' new values."""
    with tf.Graph().as_default():
        outputs, inputs, shared = [], [], []
        for i, part in enumerate(parts):
            total = collective_sum(len(parts)) if len(parts) > 1 else (lambda t: t)
            with tf.device(f"/cpu:{i}"), tf.variable_scope(f"tower{i}"), batch_statistics(total):
                x = tf.constant(X[part])
                y = batch_norm(x, 1e-5, True)
                dx, *parameters = tf.gradients(
                    y, [x, *tf.trainable_variables(f"tower{i}/")], tf.constant(GRADIENT[part])
                )
            outputs.append(y)
            inputs.append(dx)
            shared.append(parameters)
        updates = tf.get_collection(tf.GraphKeys.UPDATE_OPS)
        with tf.Session(config=tf.ConfigProto(device_count={"CPU": len(parts)})) as sess:
            sess.run(tf.global_variables_initializer())
            outputs, inputs, shared, averages = sess.run([outputs, inputs, shared, updates])
    summed = [np.sum(values, 0) for values in zip(*shared)]
    return np.concatenate(outputs), np.concatenate(inputs), *summed, averages


@pytest.mark.parametrize(
    "parts", [[slice(0, 2), slice(2, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]]
)
def test_replicas_equal_the_joined_batch(parts):
    joined, split = run([slice(0, 4)]), run(parts)
    for one, many in zip(joined[:4], split[:4]):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-5)
    for replica in range(len(parts)):
        for one, many in zip(joined[4], split[4][2 * replica : 2 * replica + 2]):
            np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_formula():
    """Against automatic differentiation of the plain definition."""
    _, dx, d_gamma, d_beta, (mean, variance) = run([slice(0, 4)])
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.constant(X, tf.float64)
        m, v = tf.nn.moments(x, [0, 1, 2])
        gamma, beta = tf.ones([8], tf.float64), tf.zeros([8], tf.float64)
        y = (x - m) * tf.rsqrt(v + 1e-5) * gamma + beta
        want = sess.run([*tf.gradients(y, [x, gamma, beta], tf.constant(GRADIENT, tf.float64)), m, v])
    for got, reference in zip((dx, d_gamma, d_beta), want):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, 0.1 * want[3], rtol=1e-5)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * want[4], rtol=1e-5)


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
