"""The processes ("ranks") that train together under Horovod: who they are, and messages between them.

Sums inside the training graph are in trainers.py and model_syncbn.py; here Python objects are exchanged.
"""

import contextlib
import importlib
import logging
import os
import platform
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

from common import UserError, logger

__all__ = [
    "LostRank", "from_first", "gather", "horovod", "lost_rank_in_one_line", "own_gpu", "start",
    "use_own_gpu",
]  # fmt: skip


# Messages of reductions that fail because another rank has ended: from Horovod, gloo (CPUs) and NCCL.
_LOST = re.compile(
    r"Horovod has been shut down|gloo/transport|remote process exited|(nccl|NCCL).*unhandled system error"
)


class LostRank(Exception):
    """Another rank of the job has ended, so this one cannot continue."""


def start() -> tuple[int, int]:
    """(rank, number of ranks) of this process, after connecting to the others; (0, 1) when no launcher started it.

    Ranks other than the first log only warnings and errors.
    """
    if "HOROVOD_RANK" not in os.environ:
        return 0, 1
    hvd = horovod()
    hvd.init()
    if hvd.rank() > 0:
        logger.setLevel(logging.WARNING)
    return hvd.rank(), hvd.size()


def horovod() -> Any:
    """horovod.tensorflow; UserError where it is not installed."""
    from utils.tf_v1 import tf  # noqa: F401  before Horovod, which imports TensorFlow itself

    try:
        with _keras_layer_when_used():
            import horovod.tensorflow as hvd
    except ImportError:
        raise UserError("TRAINER=horovod: horovod is not installed in this environment; run `make horovod`") from None
    return hvd


@contextlib.contextmanager
def _keras_layer_when_used() -> Iterator[None]:
    """Inside, importing Horovod does not import Keras, which takes a second: its one Keras layer comes when it is first
    asked for."""
    if "horovod.tensorflow" in sys.modules:
        yield
        return
    layer, module = "SyncBatchNormalization", "horovod.tensorflow.sync_batch_norm"
    empty = types.ModuleType(module)
    setattr(empty, layer, None)
    sys.modules[module] = empty
    try:
        yield
    finally:
        del sys.modules[module]
    hvd = sys.modules["horovod.tensorflow"]
    delattr(hvd, layer)

    def later(name: str) -> Any:
        if name != layer:
            raise AttributeError(f"module {hvd.__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module), layer)

    hvd.__getattr__ = later  # type: ignore[method-assign]


def use_own_gpu(config: Any) -> None:
    """Assigns this rank's GPU to the sessions of a tf.ConfigProto."""
    if (number := own_gpu()) is not None:
        config.gpu_options.visible_device_list = str(number)


def own_gpu() -> int | None:
    """The number of this rank's GPU among those of its machine, None without GPUs or launcher. UserError if the machine
    has more ranks than GPUs."""
    from utils.tf_v1 import gpu_count

    gpus = gpu_count()
    if not gpus or "HOROVOD_LOCAL_RANK" not in os.environ:
        return None
    number = int(os.environ["HOROVOD_LOCAL_RANK"])
    if number >= gpus:
        raise UserError(
            f"this is rank {number + 1} of {platform.node()}, where TensorFlow sees {gpus} GPU{'s' * (gpus > 1)}: "
            "start one rank for each GPU, and let each see all of them (CUDA_VISIBLE_DEVICES)"
        )
    return number


def from_first(value: Any) -> Any:
    """Returns rank 0's value in every rank; all ranks must call it."""
    with _session() as (hvd, session):
        return hvd.broadcast_object(value, session=session, name="value")


def gather(value: Any) -> list[Any]:
    """Returns all ranks' values in every rank; all ranks must call it."""
    with _session() as (hvd, session):
        return hvd.allgather_object(value, session=session, name="values")


@contextlib.contextmanager
def lost_rank_in_one_line(size: int) -> Iterator[None]:
    """Turns TensorFlow's error for a reduction in which one of `size` ranks is gone into LostRank."""
    if size == 1:
        yield
        return
    from utils.tf_v1 import tf

    try:
        yield
    except tf.errors.OpError as e:
        if not _LOST.search(e.message):
            raise
        raise LostRank("another process of the job has ended, so this one ends too") from None


@contextlib.contextmanager
def _session() -> Iterator[tuple[Any, Any]]:
    """Horovod and a session on the CPU with its own graph, because the training graph is finalized."""
    from utils.tf_v1 import tf

    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
        yield horovod(), session
