"""Prediction on all devices of one process: its GPUs, or the logical CPU devices that stand in for them in tests."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from common import logger
from config import Config

__all__ = ["Predict", "inference_devices", "predict_in_turn"]

Predict = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


def inference_devices(cfg: Config, processes: int = 1) -> list[str | None]:
    """The devices that this process predicts on: all of its GPUs, or TRAIN.CPU_REPLICAS logical CPU devices; with
    several processes one each. None stands for the only device."""
    from utils.tf_v1 import gpu_count

    count = gpu_count()
    kind = "gpu" if count else "cpu"
    count = 1 if processes > 1 else count or cfg.TRAIN.CPU_REPLICAS
    if count == 1:
        return [None]
    logger.info(f"predicting on {count} {'GPUs' if kind == 'gpu' else 'logical CPU devices'}")
    return [f"/{kind}:{i}" for i in range(count)]


def predict_in_turn(
    predictors: Sequence[Predict], batches: Iterable[dict[str, Any]], ahead: bool = True
) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """(batch, its outputs) in the order of the batches, which are dealt to the predictors in turn.

    The next batches are predicted while the caller works on an outcome; ahead=False: a single predictor begins with a
    batch when its outcome is asked for, which no later frame of a video then delays.
    """
    if len(predictors) == 1 and not ahead:
        for batch in batches:
            yield batch, predictors[0](batch["image"], batch["image_shape"])
        return
    waiting: deque[tuple[dict[str, Any], Future]] = deque()
    pools = [ThreadPoolExecutor(1) for _ in predictors]
    try:
        for number, batch in enumerate(batches):
            which = number % len(predictors)
            waiting.append((batch, pools[which].submit(predictors[which], batch["image"], batch["image_shape"])))
            if len(waiting) > len(predictors):  # one batch waits while each device works
                first, job = waiting.popleft()
                yield first, job.result()
        while waiting:
            first, job = waiting.popleft()
            yield first, job.result()
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
