"""The training losses on the validation sets (TRAIN.VAL_LOSS): whole images at the size of evaluation, no augmentation.

Each image is a batch of its own, whose random samples of anchors and RoIs follow from its place in the set alone. So
its losses depend on the weights only, and the means over a set's images neither on the step nor on how images are
spread over replicas and processes.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from common import UserError, logger
from config import Config
from data import make_batch, training_keys
from dataset import load_split
from dataset_split import DatasetSplit
from inference import shared_variables
from model_rcnn import INPUT_TYPES, build_training
from utils.tf_v1 import tf

__all__ = ["images_with_losses", "loss_batch", "loss_callable", "still_settings", "validation_losses"]

_SEED = 7  # of the random choices, together with an image's number in its set

# (number of the image in its split, its losses or the reason why it cannot be read)
ImageLosses = tuple[int, dict[str, float] | str]
LossFunction = Callable[[Sequence[np.ndarray]], dict[str, float]]


def still_settings(cfg: Config) -> Config:
    """The settings with which a training batch shows the images of evaluation: whole, at their size, unchanged."""
    cfg = cfg.copy()
    cfg.PREPROC.SHORT_EDGE_SIZE = [cfg.PREPROC.TEST_SHORT_EDGE_SIZE] * 2
    cfg.PREPROC.FLIP = False
    cfg.PREPROC.RANDOM_CROP, cfg.PREPROC.SCALE_JITTER = [], []
    cfg.PREPROC.COPY_PASTE, cfg.PREPROC.PHOTOMETRIC = 0.0, 0.0
    return cfg.freeze()


def images_with_losses(cfg: Config, split: DatasetSplit) -> tuple[DatasetSplit, np.ndarray]:
    """The split as training would use it, and the numbers of its images whose losses are computed: as in training,
    DATA.FILTER_EMPTY leaves out those without a usable object, and MODE_MASK objects without an outline."""
    columns = split.columns
    if cfg.MODE_MASK and (~columns["crowd"] & (np.diff(columns["first_ring"]) == 0)).any():
        split = load_split(still_settings(cfg), split.name, split.class_names, training=True)
    images = split.nonempty_images() if cfg.DATA.FILTER_EMPTY else np.arange(len(split))
    if len(images) == 0:
        raise UserError(
            f"setting TRAIN.VAL_LOSS=True: {split.name} has no image with an object to compute losses from; set "
            "DATA.FILTER_EMPTY=False or TRAIN.VAL_LOSS=False"
        )
    return split, images


def loss_batch(cfg: Config, split: DatasetSplit, i: int) -> list[np.ndarray]:
    """Image i of the split as a batch of one, in the order of `training_keys`; cfg: those of `still_settings`."""
    return make_batch(split, [i], [[_SEED, i]], cfg)


def loss_callable(cfg: Config, device: str | None = None, scope: str = "", averages: bool = False) -> Callable:
    """Adds the losses of a batch of one image to the graph, which must have the model's variables in this scope;
    returns attach(sess) -> losses(batch) -> {name: number}, with the names that training gives them.

    averages: use the moving averages of the weights (TRAIN.EMA_DECAY) where the graph has them. Layers with batch
    statistics use the moving averages of these, as in evaluation, and nothing is updated.
    """
    keys = training_keys(cfg)
    with tf.name_scope("validation"):
        inputs = [tf.placeholder(INPUT_TYPES[k][0], [1, *INPUT_TYPES[k][1]], k) for k in keys]
    with shared_variables(scope, device, averages):
        losses, _ = build_training(dict(zip(keys, inputs)), cfg)

    def attach(sess: Any) -> LossFunction:
        call = sess.make_callable([losses, []], feed_list=inputs)

        def compute(batch: Sequence[np.ndarray]) -> dict[str, float]:
            found = {k: float(v) for k, v in call(*batch)[0].items()}
            return {**found, "total_loss": math.fsum(found.values())}

        return compute

    return attach


def validation_losses(
    functions: Sequence[LossFunction],
    cfg: Config,
    sets: Sequence[tuple[DatasetSplit, np.ndarray]],
    shard: tuple[int, int] = (0, 1),
    gather: Callable[[Any], list] | None = None,
    should_stop: Callable[[], bool] | None = None,
    stopped: type[Exception] = InterruptedError,
) -> dict[str, float]:
    """{val/<loss>: mean over the images of all sets}; with several sets also <set>/val/<loss>. Images that cannot be
    read are left out.

    Args:
        functions: one for each device of this process.
        sets: those of `images_with_losses`.
        shard, gather, should_stop: as for `predict.evaluate_split`; if it stops, `stopped` is raised.
    """
    cfg = still_settings(cfg)
    metrics: dict[str, float] = {}
    every: list[dict[str, float]] = []
    for split, images in sets:
        found = _losses_of_set(functions, cfg, split, images, shard, gather, should_stop, stopped)
        bad = [f"{reason}" for _, reason in found if isinstance(reason, str)]
        if bad:
            logger.warning(f"{len(bad)} of {len(images)} images of {split.name} have no validation loss: {bad[0]}")
        losses = [values for _, values in found if not isinstance(values, str)]
        every += losses
        if len(sets) > 1:
            metrics |= {f"{split.name}/val/{k}": v for k, v in _means(losses).items()}
    return {f"val/{k}": v for k, v in _means(every).items()} | metrics


def _means(losses: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: math.fsum(one[k] for one in losses) / len(losses) for k in losses[0]} if losses else {}


def _losses_of_set(
    functions: Sequence[LossFunction],
    cfg: Config,
    split: DatasetSplit,
    images: np.ndarray,
    shard: tuple[int, int],
    gather: Callable[[Any], list] | None,
    should_stop: Callable[[], bool] | None,
    stopped: type[Exception],
) -> list[ImageLosses]:
    """The losses of all images, by their numbers; this process computes those of its devices."""
    rank, size = shard
    failed = threading.Event()

    def run(device: int) -> list[ImageLosses]:
        mine = images[rank * len(functions) + device :: size * len(functions)]
        losses: list[ImageLosses] = []
        for i, batch in _read_ahead(cfg, split, mine.tolist()):
            if failed.is_set() or (should_stop is not None and should_stop()):
                raise stopped
            losses.append((i, batch if isinstance(batch, str) else functions[device](batch)))
        return losses

    with ThreadPoolExecutor(len(functions)) as pool:
        try:
            parts = list(pool.map(run, range(len(functions))))
        except BaseException:
            failed.set()
            raise
    if gather is not None:
        parts = [part for process in gather(parts) for part in process]
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry[0])


def _read_ahead(
    cfg: Config, split: DatasetSplit, images: Sequence[int]
) -> Iterator[tuple[int, list[np.ndarray] | str]]:
    """(number, batch or the reason why it cannot be read) of each image; the next ones are read meanwhile."""

    def read(i: int) -> list[np.ndarray] | str:
        try:
            return loss_batch(cfg, split, i)
        except UserError as e:
            return str(e)

    waiting: deque = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for i in images:
                waiting.append((i, pool.submit(read, i)))
                if len(waiting) > 3:
                    number, job = waiting.popleft()
                    yield number, job.result()
            while waiting:
                number, job = waiting.popleft()
                yield number, job.result()
        finally:
            for _, job in waiting:
                job.cancel()
