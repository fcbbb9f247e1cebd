"""The guard of each step, in the graph: whether its update may be applied, and what there is to say if it may not.

The update of a step with a value that is not finite changes nothing: weights, momentum and averages stay as they were
before the step, so that the step can be repeated (training_incidents.py records it, replay.py repeats it).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model_syncbn import STATISTICS
from utils.tf_v1 import tf

__all__ = ["BAD_GRADIENT", "BAD_LOSS", "BAD_WEIGHT", "GOOD", "LARGE_GRADIENT", "OVERFLOW", "StepGuard"]

# Verdicts. OVERFLOW: gradients of float16 that are not finite, for which the loss scale is lowered.
GOOD, BAD_LOSS, BAD_GRADIENT, LARGE_GRADIENT, BAD_WEIGHT, OVERFLOW = range(6)
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass
class Replica:
    """The graph of one replica: its tensors for one micro-batch."""

    inputs: dict[str, Any]
    losses: dict[str, Any]  # total_loss among them
    loss_of_step: Any  # the sum of total_loss over the micro-batches of a step
    gradients: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)  # (gradient, variable)
    norms: Any = None  # of the gradients, in their order


class StepGuard:
    """Collects the tensors of a step while its graph is built; `judge` then makes the verdict from them.

    Tensors, after `judge`: verdict (int32), good (bool: apply the update), norm (of the step's mean gradients with
    weight decay, before clipping), norms (of each of these gradients, in the order of `names`). Fed with every step:
    limit (the largest norm that is allowed; without it any) and bounds (upper bounds of the norms of weights and
    momentum; without them 0).
    Operations: settle (part of a step), remember and restore (statistics of batch norms). try_out() -> bool [names]:
    whether each weight would be finite after the update.

    One operation for each variable costs a second of a run's start, so there are few of them.
    """

    def __init__(self) -> None:
        self.replicas: list[Replica] = []
        self.any_rank: Callable[[Any], Any] = tf.identity  # the maximum of a float scalar over all processes
        self.verdict: Any = None

    def add_replica(self, inputs: dict[str, Any], losses: dict[str, Any]) -> None:
        self.replicas.append(Replica(inputs, losses, losses["total_loss"]))

    def judge(
        self, gradients: Sequence[tuple[Any, Any]], momenta: Sequence[Any], momentum: float, rate: Any,
        clip_norm: float, scale: dict[str, Any],
    ) -> None:  # fmt: skip
        """gradients: [(mean gradient with weight decay, variable)] of the first replica; momenta: their slots; rate:
        the learning rate; clip_norm: the largest norm of an update's gradients, 0 for any; scale: {loss_scale,
        loss_scale_good} of float16 before the update, else {}."""
        self.scale = scale
        self.names = [v.op.name for _, v in gradients]
        self.momentum_names = [m.op.name for m in momenta]
        tensors = [tf.convert_to_tensor(g) for g, _ in gradients]
        halves = _half_squares(tensors)
        self.norm = tf.sqrt(2.0 * tf.reduce_sum(halves))
        self.norms = tf.sqrt(2.0 * halves)
        for replica in self.replicas:
            replica.norms = tf.sqrt(2.0 * _half_squares([g for g, _ in replica.gradients]))
        self.factor = clip_norm / tf.maximum(self.norm, clip_norm) if clip_norm else None
        statistics = self._watch_statistics()
        with tf.name_scope("step_guard"), tf.device("/cpu:0"):
            self.limit = tf.placeholder_with_default(tf.constant(float("inf"), tf.float64), [], "limit")
            self.bounds = tf.placeholder_with_default(tf.constant([0.0] * 2, tf.float64), [2], "bounds")
            bad = [tf.cast(tf.logical_not(tf.math.is_finite(r.loss_of_step)), tf.float32) for r in self.replicas]
            bad_loss = self.any_rank(tf.add_n(bad or [tf.constant(0.0)])) > 0
            norm = tf.cast(self.norm, tf.float64)
            self.finite_gradient = tf.math.is_finite(norm)

            # No weight can exceed these bounds by this update.
            grown = momentum * self.bounds[1] + (tf.minimum(norm, clip_norm) if clip_norm else norm)
            weight = self.bounds[0] + tf.abs(tf.cast(rate, tf.float64)) * grown
            finite_weights = tf.logical_and(tf.logical_and(grown < _LARGEST, weight < _LARGEST), statistics)

        def try_out():
            finite = [
                tf.reduce_all(tf.math.is_finite(v.read_value() - tf.cast(rate, g.dtype) * (momentum * m + g)))
                for g, m, (_, v) in zip(self.clipped(tensors), momenta, gradients)
            ]
            return tf.stack(finite)

        self.try_out = try_out
        with tf.name_scope("step_guard"), tf.device("/cpu:0"):
            scaled = scale["loss_scale"] > 1.0 if scale else tf.constant(False)
            cases = [
                (bad_loss, BAD_LOSS),
                (tf.logical_and(tf.logical_not(self.finite_gradient), scaled), OVERFLOW),
                (tf.logical_not(self.finite_gradient), BAD_GRADIENT),
                (norm > self.limit, LARGE_GRADIENT),
                (tf.logical_not(finite_weights), BAD_WEIGHT),
            ]
            verdict = tf.constant(GOOD)
            for applies, code in reversed(cases):
                verdict = tf.where_v2(applies, code, verdict)
            self.verdict = verdict
            self.good = tf.equal(verdict, GOOD)
            overflow = tf.logical_and(tf.equal(verdict, OVERFLOW), statistics)
            self.settle = self._settle(tf.logical_or(self.good, overflow))

    def clipped(self, gradients: Sequence[Any]) -> Sequence[Any]:
        """The gradients, scaled down if their common norm is above TRAIN.GRADIENT_CLIP."""
        return gradients if self.factor is None else [g * tf.cast(self.factor, g.dtype) for g in gradients]

    def _watch_statistics(self):
        """bool: the statistics of batch norms are finite. A step updates them before its verdict is known, so there is
        a copy from which they can be restored."""
        self._statistics = tf.get_collection(STATISTICS)
        if not self._statistics:
            self._copies, self._seen = [], []
            self.remember = self.restore = tf.no_op()
            return tf.constant(True)
        with tf.name_scope("step_guard"):
            self._copies = [
                tf.Variable(
                    tf.zeros(v.shape, v.dtype.base_dtype),
                    trainable=False,
                    collections=[tf.GraphKeys.LOCAL_VARIABLES],
                    name="statistics",
                )  # fmt: skip
                for v in self._statistics
            ]
            self.remember = tf.group(*[c.assign(v.read_value()) for c, v in zip(self._copies, self._statistics)])
            self.restore = tf.group(*[v.assign(c.read_value()) for c, v in zip(self._copies, self._statistics)])
            with tf.control_dependencies([r.losses["total_loss"] for r in self.replicas]):  # follow their updates
                self._seen = [v.read_value() for v in self._statistics]
            return tf.reduce_all(tf.math.is_finite(tf.concat([tf.reshape(s, [-1]) for s in self._seen], 0)))

    def _settle(self, keep):
        if not self._statistics:
            return tf.no_op()

        def accept():
            return tf.group(*[c.assign(s) for c, s in zip(self._copies, self._seen)])

        def take_back():
            return tf.group(*[v.assign(c.read_value()) for c, v in zip(self._copies, self._statistics)])

        return tf.cond(keep, accept, take_back)


def _half_squares(tensors):
    """[len(tensors)]: half the squared Euclidean norm of each."""
    return tf.stack([tf.nn.l2_loss(t) for t in tensors])
