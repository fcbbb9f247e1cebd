"""Batch normalisation (Ioffe & Szegedy 2015) whose statistics are those of the whole batch, over all replicas.

Whether statistics come from the batch or from the moving averages, and how sums are taken over replicas, is said once
around the construction of a graph (`batch_statistics`), not in each layer's arguments.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from utils.tf_v1 import tf

__all__ = ["batch_norm", "batch_statistics", "collective_sum", "normalize_batch"]

_DECAY = 0.9  # of the moving averages, per step
# None: use the moving averages. Otherwise sum_over_replicas(tensor) -> tensor.
_SUM: contextvars.ContextVar[Callable[[Any], Any] | None] = contextvars.ContextVar("sum_over_replicas", default=None)


@contextlib.contextmanager
def batch_statistics(sum_over_replicas: Callable[[Any], Any]) -> Iterator[None]:
    """Layers built inside normalise with the batch's statistics, and update the moving averages (UPDATE_OPS)."""
    token = _SUM.set(sum_over_replicas)
    try:
        yield
    finally:
        _SUM.reset(token)


def collective_sum(group_size: int, group_key: int = 1) -> Callable[[Any], Any]:
    """Sums float32 tensors over `group_size` replicas of this process, each on its own device (NCCL, or CPU rings).

    Every replica must get a function of its own and call it in the same order: calls are matched by their number.
    """
    calls = [0]

    def total(x: Any) -> Any:
        calls[0] += 1
        return tf.raw_ops.CollectiveReduce(
            input=x, group_size=group_size, group_key=group_key, instance_key=calls[0], merge_op="Add", final_op="Id",
            subdiv_offsets=[0],
        )  # fmt: skip

    return total


def batch_norm(x, epsilon, trainable):
    """x [N,H,W,C] -> the same shape and type; variables bn/{gamma, beta, mean/EMA, variance/EMA}.

    Frozen layers (not trainable) always use the moving averages.
    """
    channels = int(x.shape[-1])
    with tf.variable_scope("bn"):
        gamma = tf.get_variable("gamma", [channels], tf.float32, tf.ones_initializer(), trainable=trainable)
        beta = tf.get_variable("beta", [channels], tf.float32, tf.zeros_initializer(), trainable=trainable)
        mean_ema = tf.get_variable("mean/EMA", [channels], tf.float32, tf.zeros_initializer(), trainable=False)
        var_ema = tf.get_variable("variance/EMA", [channels], tf.float32, tf.ones_initializer(), trainable=False)
    return normalize_batch(x, gamma, beta, mean_ema, var_ema, epsilon, trainable)


def normalize_batch(x, gamma, beta, mean_ema, var_ema, epsilon, trainable):
    """`batch_norm` with given variables [C] float32; gamma and beta may be any tensors."""
    total = _SUM.get()
    if total is None or not trainable:
        scale = gamma * tf.rsqrt(var_ema + epsilon)
        return x * tf.cast(scale, x.dtype) + tf.cast(beta - mean_ema * scale, x.dtype)
    y, mean, variance = _normalise(x, gamma, beta, epsilon, total)
    for average, value in ((mean_ema, mean), (var_ema, variance)):
        update = average.assign_sub((1.0 - _DECAY) * (average.read_value() - tf.stop_gradient(value)))
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
    return y


def _normalise(x, gamma, beta, epsilon, total):
    """-> y, and the mean and variance [C] of all replicas' x. The gradient is explicit, because that of a collective
    sum is one too: with x^ the normalised input and M the number of positions over all replicas,
    dx = γ/σ · (dy − Σdy/M − x^ · Σ(dy·x^)/M); γ's and β's gradients are this replica's share."""
    channels = int(x.shape[-1])

    @tf.custom_gradient
    def normalise(x, gamma, beta):
        wide = tf.cast(x, tf.float32)
        count = tf.cast(tf.size(x) // channels, tf.float32)
        sums = tf.concat([tf.reduce_sum(wide, [0, 1, 2]), tf.reduce_sum(tf.square(wide), [0, 1, 2]), [count]], 0)
        sums = total(sums)
        positions = tf.maximum(sums[-1], 1.0)
        mean = sums[:channels] / positions
        variance = tf.maximum(sums[channels:-1] / positions - tf.square(mean), 0.0)
        inverse = tf.rsqrt(variance + epsilon)
        scale = gamma * inverse
        y = x * tf.cast(scale, x.dtype) + tf.cast(beta - mean * scale, x.dtype)

        def gradient(dy, *_):
            dy_wide = tf.cast(dy, tf.float32)
            normalised = (wide - mean) * inverse
            d_beta = tf.reduce_sum(dy_wide, [0, 1, 2])
            d_gamma = tf.reduce_sum(dy_wide * normalised, [0, 1, 2])
            means = total(tf.concat([d_beta, d_gamma], 0)) / positions
            dx = scale * (dy_wide - means[:channels] - normalised * means[channels:])
            return tf.cast(dx, x.dtype), d_gamma, d_beta

        return (y, mean, variance), gradient

    return normalise(x, gamma, beta)
