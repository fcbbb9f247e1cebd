"""The processes ("ranks") that train together under Horovod: who they are, and what they tell each other by itself.

Sums over ranks inside the training graph are the trainer's and SyncBN's; here are objects, outside of it.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

from common import UserError, logger

__all__ = [
    "LostRank", "from_first", "gather", "horovod", "lost_rank_in_one_line", "start", "use_own_gpu",
]  # fmt: skip


# What a reduction fails with when another rank is gone: of Horovod itself, its gloo on CPUs, and NCCL.
_LOST = re.compile(
    r"Horovod has been shut down|gloo/transport|remote process exited|(nccl|NCCL).*unhandled system error"
)


class LostRank(Exception):
    """Another rank of the job has ended, so that this one cannot go on."""


def start() -> tuple[int, int]:
    """(rank, number of ranks) of this process, after connecting to the others; (0, 1) when no launcher started it.

    Ranks other than the first keep what is not a warning to themselves.
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
        import horovod.tensorflow as hvd
    except ImportError:
        raise UserError("TRAINER=horovod: horovod is missing in this environment; run `make horovod`") from None
    return hvd


def use_own_gpu(config: Any) -> None:
    """Gives the sessions of a tf.ConfigProto the GPU of this rank among those of its machine."""
    from utils.tf_v1 import gpu_count  # whoever has a ConfigProto has TensorFlow

    if gpu_count() and "HOROVOD_LOCAL_RANK" in os.environ:
        config.gpu_options.visible_device_list = os.environ["HOROVOD_LOCAL_RANK"]


def from_first(value: Any) -> Any:
    """Rank 0's value, in every rank; all must call it."""
    with _session() as (hvd, session):
        return hvd.broadcast_object(value, session=session, name="value")


def gather(value: Any) -> list[Any]:
    """Every rank's value, in every rank; all must call it."""
    with _session() as (hvd, session):
        return hvd.allgather_object(value, session=session, name="values")


@contextlib.contextmanager
def lost_rank_in_one_line(size: int) -> Iterator[None]:
    """Turns what TensorFlow raises when a reduction finds one of `size` ranks gone into LostRank."""
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
    """Horovod and a session on the CPU, with a graph of its own since that of the training is finished."""
    from utils.tf_v1 import tf

    with tf.Graph().as_default(), tf.Session(config=tf.ConfigProto(device_count={"GPU": 0})) as session:
        yield horovod(), session
