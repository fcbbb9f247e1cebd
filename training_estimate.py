"""What a training step will cost on this machine's CPU, before the first one: its products at the measured speed."""

import statistics
import time
from collections.abc import Sequence

import numpy as np

from augment import resized_shape
from config import Config
from data import padded_size
from model_flops import count_training
from trainers import session_config
from training_plan import TrainingPlan
from utils.tf_v1 import tf

__all__ = [
    "estimate_step", "gpu_advice", "precision_advice", "precisions_to_measure", "product_speed", "typical_pixels",
]  # fmt: skip

_SIDE, _CHANNELS = 64, 256  # of the feature map on which convolutions are timed
# Everything else in a step: a share of the products (measured: 1.07 to 1.10, docs/SPEED.md), and per run of the graph.
_OTHER_SHARE, _OTHER_SECONDS = 1.1, 0.05
_SAMPLE = 256  # images whose sizes are looked at
_WORTH_SAYING = 1.15  # times as fast


def estimate_step(
    cfg: Config, plan: TrainingPlan, sizes: np.ndarray, devices: list[str], precisions: Sequence[str]
) -> dict[str, float]:
    """Seconds of an update of `plan` on the CPU `devices` of this process in each of the `precisions`, estimated in
    about two seconds.

    sizes: int [N, 2], heights and widths of the training images.
    """
    products = count_training(cfg).of_image(typical_pixels(cfg, sizes))
    images = plan.images_per_replica * plan.accumulation * len(devices)
    found = {}
    for precision in precisions:
        speed = product_speed(precision, len(devices))
        of_image = sum(products[large] / speed[large] for large in (False, True))
        found[precision] = images * of_image * _OTHER_SHARE + plan.accumulation * _OTHER_SECONDS
    return found


def precisions_to_measure(precision: str, has_bfloat16: bool) -> list[str]:
    """Those in which a step on the CPU is estimated: the run's own first, and what may be faster. bfloat16 is not
    measured where the CPU lacks it, because it may take a minute there."""
    others = {"float32": ["bfloat16"], "bfloat16": ["float32"], "float16": ["float32", "bfloat16"]}.get(precision, [])
    return [precision, *(p for p in others if (p == "bfloat16") == has_bfloat16)]


def precision_advice(seconds: dict[str, float], has_bfloat16: bool) -> str | None:
    """What to tell about the precision of a run on the CPU; seconds: of a step, the run's own precision first."""
    own, best = next(iter(seconds)), min(seconds, key=lambda p: seconds[p])
    if seconds[own] > _WORTH_SAYING * seconds[best]:
        lacks = "" if has_bfloat16 or own != "bfloat16" else ", which has no bfloat16 instructions"
        factor = seconds[own] / seconds[best]
        return f"TRAIN.PRECISION={best} would be about {factor:.1f} times as fast on this CPU{lacks} (docs/SPEED.md)"
    if own == "float32" and not has_bfloat16:
        return "TRAIN.PRECISION=bfloat16 would be slower: this CPU has neither AMX nor AVX512_BF16 (docs/SPEED.md)"
    return None


def gpu_advice(precision: str, capability: tuple[int, ...]) -> str | None:
    """What to tell about the precision of a run on GPUs of this compute capability; nothing is measured."""
    half = "bfloat16" if capability >= (8,) else "float16" if capability >= (7,) else None
    if precision != "float32" or half is None:
        return None
    name = ".".join(map(str, capability))
    return (
        f"TRAIN.PRECISION={half} is probably faster on this GPU (compute capability {name}, with tensor cores); "
        "--find-batch measures how fast each trains (docs/SPEED.md)"
    )


def typical_pixels(cfg: Config, sizes: np.ndarray) -> float:
    """Pixels of a training image, padded to the largest of its batch, on average over a sample of the data."""
    preproc = cfg.PREPROC
    if preproc.SCALE_JITTER:
        height, width = padded_size([tuple(preproc.CROP_SIZE)], cfg)
        return float(height * width)
    edge = round(sum(preproc.SHORT_EDGE_SIZE) / len(preproc.SHORT_EDGE_SIZE))
    chosen = sizes[np.linspace(0, len(sizes) - 1, min(len(sizes), _SAMPLE)).astype(int)]
    shapes = [resized_shape(height, width, edge, preproc.MAX_SIZE) for height, width in chosen.tolist()]
    shapes.sort(key=lambda shape: shape[0] > shape[1])  # batches have one orientation; the order is kept otherwise
    each = cfg.TRAIN.BATCH_SIZE_PER_GPU
    batches = [padded_size(shapes[i : i + each], cfg) for i in range(0, len(shapes), each)]
    return sum(height * width for height, width in batches) / len(batches)


def product_speed(precision: str, cpu_devices: int = 1) -> dict[bool, float]:
    """Multiply-adds per second of {False: 1 x 1, True: 3 x 3 convolutions} with both gradients, as in training."""
    dtype = tf.as_dtype(precision)
    speed = {}
    with tf.Graph().as_default(), tf.device("/cpu:0"):
        runs = {}
        for large, kernel, side in ((False, 1, 2 * _SIDE), (True, 3, _SIDE)):
            shapes = [1, side, side, _CHANNELS], [kernel, kernel, _CHANNELS, _CHANNELS]
            image, weights = (tf.Variable(tf.ones(shape, dtype)) for shape in shapes)
            out = tf.nn.conv2d(image, weights, strides=1, padding="SAME")
            gradients = tf.gradients(out, [image, weights], grad_ys=tf.Variable(tf.ones(shapes[0], dtype)))
            # Sums, because an operation whose result nobody reads is not computed.
            runs[large] = (
                [tf.reduce_sum(tensor) for tensor in (out, *gradients)],
                3 * side**2 * kernel**2 * _CHANNELS**2,
            )
        with tf.Session(config=session_config(cpu_devices)) as session:
            session.run(tf.global_variables_initializer())
            for large, (run, products) in runs.items():
                session.run(run)  # includes the optimisation of the graph
                speed[large] = products / statistics.median(_seconds(session, run) for _ in range(3))
    return speed


def _seconds(session, run) -> float:
    started = time.perf_counter()
    session.run(run)
    return time.perf_counter() - started
