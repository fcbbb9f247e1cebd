"""Batch normalisation (Ioffe & Szegedy 2015) with statistics of the whole batch over all replicas.

Context managers around the construction of a graph (`batch_statistics`, `valid_area`) set whether statistics come from
the batch or the moving averages, how sums over replicas are computed, and which part of the feature maps is image. So
layers need no arguments for these.

Padding is left out: statistics are means over the cells of all replicas that show a part of an image. So they do not
depend on how images are grouped into padded batches, replicas with maps of different sizes get the right weights, and
training matches prediction on images without padding.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

from utils.tf_v1 import for_gpu, tf

__all__ = [
    "STATISTICS",
    "batch_norm",
    "batch_statistics",
    "collective_sum",
    "normalize_batch",
    "valid_area",
    "wide_type",
]

STATISTICS = "batch_statistics"  # collection of the moving averages that a step updates
_TIMEOUT = 1800.0  # seconds
_DECAY = 0.9  # of the moving averages, per update of the weights
# None: use the moving averages. Otherwise sum_over_replicas(tensor) -> tensor, and the averages' decay per batch.
_BATCH: contextvars.ContextVar[tuple[Callable[[Any], Any], float] | None] = contextvars.ContextVar(
    "batch_statistics", default=None
)
# (image_shape [N,2], padded height and width [2]); None: every cell shows a part of an image.
_AREA: contextvars.ContextVar[tuple[Any, Any] | None] = contextvars.ContextVar("valid_area", default=None)


def wide_type(x: Any) -> Any:
    """The dtype of variables and statistics of a layer with input x: float32, or float64 if x is float64."""
    return tf.float64 if x.dtype == tf.float64 else tf.float32


@contextlib.contextmanager
def batch_statistics(sum_over_replicas: Callable[[Any], Any], batches_per_update: int = 1) -> Iterator[None]:
    """Layers built inside normalise with the batch's statistics, and update the moving averages (UPDATE_OPS).

    batches_per_update: number of batches accumulated into one update of the weights. Each batch is normalised
    separately with the decay ** (1 / batches_per_update), so that the averages change per update as without
    accumulation.
    """
    token = _BATCH.set((sum_over_replicas, _DECAY ** (1.0 / batches_per_update)))
    try:
        yield
    finally:
        _BATCH.reset(token)


@contextlib.contextmanager
def valid_area(image_shape: Any, padded_size: Any) -> Iterator[None]:
    """Layers built inside have maps x [N,h,w,C] of N images with valid sizes `image_shape` int32 [N,2], padded to
    `padded_size` int32 [2] (height, width)."""
    token = _AREA.set((image_shape, padded_size))
    try:
        yield
    finally:
        _AREA.reset(token)


def collective_sum(group_size: int, group_key: int = 1) -> Callable[[Any], Any]:
    """Sums tensors over `group_size` replicas of this process, each on its own device: by NCCL on GPUs, else by
    TensorFlow's ring through the host. A sum for which a replica is missing for `_TIMEOUT` is an error.

    Every replica must get its own function and call it in the same order: calls are matched by their number.
    """
    calls = [0]

    def total(x: Any) -> Any:
        calls[0] += 1
        return tf.raw_ops.CollectiveReduce(
            input=x, group_size=group_size, group_key=group_key, instance_key=calls[0], merge_op="Add", final_op="Id",
            subdiv_offsets=[0], communication_hint="nccl" if for_gpu() else "auto", timeout_seconds=_TIMEOUT,
        )  # fmt: skip

    return total


def batch_norm(x, epsilon, trainable):
    """x [N,H,W,C] -> the same shape and dtype; variables bn/{gamma, beta, mean/EMA, variance/EMA}.

    Frozen layers (not trainable) always use the moving averages.
    """
    channels = int(x.shape[-1])
    dtype = wide_type(x)
    with tf.variable_scope("bn"):
        gamma = tf.get_variable("gamma", [channels], dtype, tf.ones_initializer(), trainable=trainable)
        beta = tf.get_variable("beta", [channels], dtype, tf.zeros_initializer(), trainable=trainable)
        mean_ema = tf.get_variable("mean/EMA", [channels], dtype, tf.zeros_initializer(), trainable=False)
        var_ema = tf.get_variable("variance/EMA", [channels], dtype, tf.ones_initializer(), trainable=False)
    return normalize_batch(x, gamma, beta, mean_ema, var_ema, epsilon, trainable)


def normalize_batch(x, gamma, beta, mean_ema, var_ema, epsilon, trainable):
    """`batch_norm` with given variables [C] of `wide_type(x)`; gamma and beta may be any tensors."""
    batch = _BATCH.get()
    if batch is None or not trainable:
        scale = gamma * tf.rsqrt(var_ema + epsilon)
        return x * tf.cast(scale, x.dtype) + tf.cast(beta - mean_ema * scale, x.dtype)
    total, decay = batch
    y, mean, variance = _normalise(x, gamma, beta, epsilon, total, _counted(tf.shape(x)))
    for average, value in ((mean_ema, mean), (var_ema, variance)):
        update = average.assign_sub((1.0 - decay) * (average.read_value() - tf.stop_gradient(value)))
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, update)
        tf.add_to_collection(STATISTICS, average)
    return y


def _counted(shape):
    """bool [N,h,w] of a map of that shape [4]: the cells that show a part of an image."""
    area = _AREA.get()
    if area is None:
        return tf.ones(shape[:3], tf.bool)
    image_shape, padded_size = area
    valid = -(-image_shape * shape[1:3] // padded_size)  # rounded up [N, 2]
    rows = tf.range(shape[1])[None, :] < valid[:, :1]
    columns = tf.range(shape[2])[None, :] < valid[:, 1:]
    return tf.logical_and(rows[:, :, None], columns[:, None, :])


def _normalise(x, gamma, beta, epsilon, total, counted):
    """-> y, and the mean and variance [C] of the counted cells of all replicas' x. The gradient is explicit, because
    that of a collective sum is one too: with x^ the normalised input, M the number of counted cells over all replicas
    and 1 where a cell counts (0 elsewhere),
    dx = γ/σ · (dy − 1·(Σdy/M + x^ · Σ(dy·x^)/M)); γ's and β's gradients are this replica's share. Of a map in half
    precision no copy in float32 is kept for it."""
    channels = int(x.shape[-1])
    dtype = wide_type(x)

    @tf.custom_gradient
    def normalise(x, gamma, beta):
        wide = tf.cast(x, dtype)
        weight = tf.cast(counted, dtype)
        flat = tf.reshape(weight, [1, -1])

        def weighted_sum(values):
            if for_gpu():  # where a product may be of TF32's 10 bits
                return tf.reduce_sum(values * weight[..., None], [0, 1, 2])
            return tf.reshape(tf.matmul(flat, tf.reshape(values, [-1, channels])), [channels])

        sums = tf.concat([weighted_sum(wide), weighted_sum(tf.square(wide)), [tf.reduce_sum(weight)]], 0)
        sums = total(sums)
        cells = tf.maximum(sums[-1], 1.0)
        mean = sums[:channels] / cells
        variance = tf.maximum(sums[channels:-1] / cells - tf.square(mean), 0.0)
        inverse = tf.rsqrt(variance + epsilon)
        scale = tf.cast(gamma, dtype) * inverse
        y = x * tf.cast(scale, x.dtype) + tf.cast(tf.cast(beta, dtype) - mean * scale, x.dtype)

        def gradient(dy, *_):
            dy_wide = tf.cast(dy, dtype)
            with tf.control_dependencies([dy]):  # the graph optimiser would make it one operation with `wide`
                again = tf.cast(x, dtype)
            normalised = (again - mean) * inverse
            d_beta = tf.reduce_sum(dy_wide, [0, 1, 2])
            d_gamma = tf.reduce_sum(dy_wide * normalised, [0, 1, 2])
            means = total(tf.concat([d_beta, d_gamma], 0)) / cells
            shared = means[:channels] + normalised * means[channels:]
            dx = scale * (dy_wide - weight[..., None] * shared)
            return tf.cast(dx, x.dtype), tf.cast(d_gamma, gamma.dtype), tf.cast(d_beta, beta.dtype)

        return (y, mean, variance), gradient

    return normalise(x, gamma, beta)
