"""training_guard.py: verdicts of steps, and what an update that is refused leaves as it was."""

import numpy as np
import pytest

from model_syncbn import STATISTICS
from trainers import DetectionOptimizer
from training_guard import (
    BAD_GRADIENT,
    BAD_LOSS,
    BAD_WEIGHT,
    GOOD,
    LARGE_GRADIENT,
    OVERFLOW,
    StepGuard,
)
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick
INF = float("inf")


class Step:
    """One weight, its gradient and a loss as inputs, a learning rate of 0.5, momentum 0.9, one statistic."""

    def __init__(self, scale=None, clip=None):
        self.gradient, self.loss = tf.placeholder(tf.float32, [2]), tf.placeholder(tf.float32, [])
        self.rate, self.batch_mean = tf.placeholder_with_default(0.5, []), tf.placeholder_with_default(1.0, [])
        self.weight = tf.get_variable("layer/W", [2], tf.float32, tf.ones_initializer())
        self.statistic = tf.get_variable("layer/EMA", [], tf.float32, tf.zeros_initializer(), trainable=False)
        update = self.statistic.assign_add(self.batch_mean)
        tf.add_to_collection(STATISTICS, self.statistic)
        with tf.control_dependencies([update]):
            total = tf.identity(self.loss)
        self.guard = StepGuard()
        self.guard.add_replica({}, {"total_loss": total})
        self.guard.replicas[0].gradients = [(self.gradient, self.weight)]
        optimizer = DetectionOptimizer(self.rate, 0.9, 0.0, clip, False, None, self.guard)
        if scale is not None:
            optimizer._scale_before = {"loss_scale": tf.constant(scale)}
        self.op = tf.group(optimizer.apply_gradients([(self.gradient, self.weight)]), self.guard.settle)
        self.sess = tf.Session()
        self.sess.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        self.sess.run(self.guard.remember)

    def run(self, gradient, loss=1.0, limit=INF, bounds=(4.0, 5.0), rate=0.5, batch_mean=1.0):
        fed = {
            self.gradient: gradient, self.loss: loss, self.guard.limit: limit, self.guard.bounds: bounds,
            self.rate: rate, self.batch_mean: batch_mean,
        }  # fmt: skip
        verdict, norm, _ = self.sess.run([self.guard.verdict, self.guard.norm, self.op], fed)
        return verdict, norm, self.sess.run([v.read_value() for v in tf.global_variables()])


@pytest.mark.parametrize(
    ("changed", "scale", "verdict"),
    [
        ({}, None, GOOD),
        ({"loss": np.nan}, None, BAD_LOSS),
        ({"loss": -INF, "gradient": [np.nan, 0]}, None, BAD_LOSS),
        ({"gradient": [0, np.nan]}, None, BAD_GRADIENT),
        ({"gradient": [0, INF]}, 2.0**15, OVERFLOW),
        ({"gradient": [0, INF]}, 2.0, OVERFLOW),
        ({"gradient": [0, INF]}, 1.0, BAD_GRADIENT),  # the loss scale has come down to its floor
        ({"gradient": [0, INF], "loss": INF}, 2.0**15, BAD_LOSS),
        ({"limit": 4.9}, None, LARGE_GRADIENT),  # the norm is 5
        ({"limit": 5.0}, None, GOOD),
        ({"rate": INF}, None, BAD_WEIGHT),
        ({"rate": 3e38}, None, BAD_WEIGHT),
        ({"rate": 3e37}, None, GOOD),  # momentum 7.6, a weight of -2.28e38, which float32 knows
        ({"bounds": (1.0, 0.0)}, None, GOOD),
        ({"bounds": (1.0, 0.0), "rate": 3e38}, None, BAD_WEIGHT),
        ({"batch_mean": INF}, None, BAD_WEIGHT),
    ],
)
def test_the_verdict_and_what_a_refused_update_leaves(changed, scale, verdict):
    with tf.Graph().as_default():
        step = Step(scale)
        first = step.run([3.0, 4.0])
        assert first[:2] == (GOOD, 5.0) and first[2][1] == 1.0
        found, norm, after = step.run(**{"gradient": [3.0, 4.0], **changed})
        assert found == verdict
        same = [np.array_equal(a, b) for a, b in zip(after, first[2])]
        # Gradients that overflow do not make the statistics of the forward pass wrong.
        assert same == {GOOD: [False] * 3, OVERFLOW: [True, False, True]}.get(verdict, [True] * 3)
        assert step.run([3.0, 4.0])[0] == GOOD


def test_the_bounds_decide_clipped_or_not():
    """An update that can take no weight beyond float32 is applied, any other one refused, wherever the weights are."""
    with tf.Graph().as_default():
        step = Step(clip=1.0)
        assert step.run([3e18, 4e18], bounds=(2e38, 1.0), rate=7e37)[0] == GOOD  # clipped to 0.6, 0.8: at most 3.33e38
        assert step.run([3e18, 4e18], bounds=(2e38, 1.0), rate=8e37)[0] == BAD_WEIGHT
        assert step.run([3.0, 4.0], bounds=(1.0, 3.5e38), rate=1.0)[0] == GOOD  # 0.9 of it is left
        assert step.run([3.0, 4.0], bounds=(1.0, INF), rate=1.0)[0] == BAD_WEIGHT
