"""The processes that make training batches.

A worker is a fresh Python interpreter, not a fork: the training process has TensorFlow's threads (and NCCL's, MPI's,
gRPC's), and a child forked from it can wait for ever for a lock that one of them held; multiprocessing's own spawn and
forkserver would import the main script, hence TensorFlow, into every worker. The annotations are mapped read-only from
one anonymous file, so a worker costs what Python, NumPy and OpenCV cost; images come back through shared memory.
"""

import contextlib
import math
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common import UserError
from config import Config
from data import BatchMaker, padded_size
from dataset_split import DatasetSplit

__all__ = ["TrainingFlow", "training_dataflow"]


def training_dataflow(
    split: DatasetSplit, cfg: Config, start_batch: int = 0, shard: tuple[int, int] = (0, 1), batches_per_step: int = 1
) -> "TrainingFlow":
    """The endless sequence of this process's training batches, each a list in the order of `training_keys`.

    Args:
        start_batch: number of the first batch, counted from the beginning of the run.
        shard: (rank, number of processes) that train together; all must be given the same split and settings.
        batches_per_step: batches of this process that make one update (its devices times accumulation). The images of
            an update are those of one big batch, wherever its parts are computed: process r takes every size-th.
    """
    flow = TrainingFlow(split, cfg, start_batch, shard, batches_per_step)
    tensorpack = sys.modules.get("tensorpack.dataflow")
    if tensorpack is not None:  # importing it imports TensorFlow, so only where that has happened anyway
        tensorpack.DataFlow.register(TrainingFlow)
    return flow


class TrainingFlow:
    """A tensorpack DataFlow (by its methods) of training batches, made by DATA.NUM_WORKERS processes in turn.

    Worker w makes batches w, w + W, …; an error in a worker is raised here with its message, and a worker that dies is
    an error too. Iterating again starts over at the first batch.
    """

    def __init__(
        self, split: DatasetSplit, cfg: Config, start_batch: int, shard: tuple[int, int], batches_per_step: int
    ):
        self._maker = BatchMaker(split, cfg, shard, batches_per_step)
        self._start = start_batch
        self._workers: list[_Worker] = []
        self._fresh = False
        self.images_per_epoch = len(self._maker.images)

    def __len__(self) -> int:
        """Batches an epoch, rounded up."""
        return math.ceil(self.images_per_epoch / (self._maker.plan.batch / self._maker.batches_per_step))

    def reset_state(self) -> None:
        """Starts the workers, so that they read ahead while the graph is built."""
        self.stop()
        cfg, maker = self._maker.cfg, self._maker
        if cfg.DATA.NUM_WORKERS == 0:
            return
        shared = _share((maker, self._start, cfg.DATA.NUM_WORKERS))
        try:
            maker.split.move_columns(_load_shared(shared)[0].split)
            largest = padded_size(
                [cfg.PREPROC.CROP_SIZE if cfg.PREPROC.SCALE_JITTER else (cfg.PREPROC.MAX_SIZE,) * 2], cfg
            )
            slot_bytes = cfg.TRAIN.BATCH_SIZE_PER_GPU * largest[0] * largest[1] * 3
            slots = min(max(cfg.DATA.PREFETCH, 1), 255)
            self._workers = [_Worker(w, shared, slot_bytes, slots) for w in range(cfg.DATA.NUM_WORKERS)]
        finally:
            os.close(shared)
        self._fresh = True

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        batch = self._start
        if self._maker.cfg.DATA.NUM_WORKERS == 0:
            while True:
                yield self._maker.make(batch)
                batch += 1
        if not self._fresh:
            self.reset_state()
        self._fresh = False
        workers = self._workers
        try:
            while True:
                yield workers[(batch - self._start) % len(workers)].receive(batch)
                batch += 1
        finally:
            if workers is self._workers:
                self.stop()

    def stop(self) -> None:
        """Ends the worker processes."""
        for worker in self._workers:
            worker.stop()
        self._workers, self._fresh = [], False

    @property
    def worker_pids(self) -> list[int]:
        return [w.process.pid for w in self._workers]


# ------------------------------------------------------------------------------------------------ worker processes
# A message is a length and a pickled tuple (kind, content...). From a worker: ("batch", slot, image shape, other
# arrays) or ("error", is the user's, text). To a worker: the number of a slot that may be written again, as one byte.
_LENGTH = struct.Struct("<Q")
_WORKER_CODE = (
    "import sys; sys.path[:] = {path!r}; import data_workers; "
    "data_workers._work({memory}, {shared}, {socket}, {slots}, {w}, {parent})"
)
_PARENT_CHECK_SECONDS = 5.0


def _share(content: Any) -> int:
    """File descriptor of anonymous memory that holds the content, its arrays such that they can be mapped."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(content, 5, buffer_callback=buffers.append)
    views = [b.raw() for b in buffers]
    places, end = [], 0
    for view in views:
        places.append((end, view.nbytes))
        end += -(-view.nbytes // 64) * 64
    head = pickle.dumps((head, places))
    start = -(-(_LENGTH.size + len(head)) // 64) * 64
    descriptor = os.memfd_create("packrcnn-annotations")
    os.truncate(descriptor, start + end + 1)
    with mmap.mmap(descriptor, start + end + 1) as memory:
        memory[: _LENGTH.size + len(head)] = _LENGTH.pack(len(head)) + head
        for view, (place, size) in zip(views, places):
            memory[start + place : start + place + size] = view
    return descriptor


def _load_shared(descriptor: int) -> Any:
    """The content, its arrays being read-only views of the shared memory."""
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    length = _LENGTH.unpack_from(memory)[0]
    head, places = pickle.loads(memory[_LENGTH.size : _LENGTH.size + length])
    start = -(-(_LENGTH.size + length) // 64) * 64
    view = memoryview(memory)
    return pickle.loads(head, buffers=[view[start + p : start + p + size] for p, size in places])


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, number: int, shared: int, slot_bytes: int, slots: int):
        """shared: descriptor of what `_work` needs; slots: batches it may be ahead, slot_bytes: of a largest image."""
        self.number = number
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = os.memfd_create(f"packrcnn-batches-{number}")
        self._socket, theirs = socket.socketpair()
        try:
            os.truncate(memory, self._slot_bytes * slots)  # sparse: a page takes memory once it is written
            self._memory = mmap.mmap(memory, 0)
            code = _WORKER_CODE.format(
                path=[str(Path(__file__).parent), *sys.path], memory=memory, shared=shared, socket=theirs.fileno(),
                slots=slots, w=number, parent=os.getpid(),
            )  # fmt: skip
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                pass_fds=(memory, shared, theirs.fileno()),
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C in the terminal is the training process's business
            )
        finally:
            theirs.close()
            os.close(memory)
        self._input = self._socket.makefile("rb")

    def receive(self, batch: int) -> list[np.ndarray]:
        """The worker's next batch, which should have this number."""
        try:
            head = self._input.read(_LENGTH.size)
            message = self._input.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
        except ConnectionError:
            message = b""
        try:
            kind, *content = pickle.loads(message)
        except (EOFError, pickle.UnpicklingError):
            raise RuntimeError(self._last_words(batch)) from None
        if kind == "error":
            is_users, text = content
            raise UserError(text) if is_users else RuntimeError(f"data worker {self.number} failed:\n{text}")
        slot, shape, others = content
        image = _array_in(self._memory, slot * self._slot_bytes, shape).copy()
        with contextlib.suppress(ConnectionError):  # it has died since: its next batch will say so
            self._socket.sendall(bytes([slot]))
        return [image, *others]

    def _last_words(self, batch: int) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return f"data worker {self.number} closed its connection"
        who = f"data worker {self.number} (process {self.process.pid})"
        if code >= 0:
            return f"{who} ended with code {code} before batch {batch}"
        hint = ""
        if code == -signal.SIGKILL:
            hint = "; if the machine is out of memory, fewer DATA.NUM_WORKERS or DATA.PREFETCH need less"
        return f"{who} was killed by {signal.Signals(-code).name} before batch {batch}{hint}"

    def stop(self) -> None:
        # In this order: a thread that waits in `receive` holds the input until the process is gone.
        self.process.kill()
        self.process.wait()
        self._input.close()
        self._socket.close()


def _array_in(memory: mmap.mmap, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)


def _work(memory: int, shared: int, connection: int, slots: int, number: int, parent: int) -> None:
    """The life of a worker: batch after batch into free slots, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(0)
    pipe = socket.socket(fileno=connection)
    pipe.settimeout(_PARENT_CHECK_SECONDS)

    def patiently(action: Callable[..., Any], *args: Any) -> Any:
        """Repeats a socket action until it is done; the worker ends when its parent has."""
        while True:
            try:
                return action(*args)
            except TimeoutError:
                # A forked child of the parent may hold the socket open, so its end is not enough of a sign.
                if os.getppid() != parent:
                    os._exit(0)
            except ConnectionError:
                os._exit(0)

    def send(message: tuple) -> None:
        content = pickle.dumps(message, 5)
        rest = memoryview(_LENGTH.pack(len(content)) + content)
        while rest:
            rest = rest[patiently(pipe.send, rest) :]

    try:
        slot_memory = mmap.mmap(memory, 0)
        slot_bytes = len(slot_memory) // slots
        maker, batch, step = _load_shared(shared)
        batch += number
        free = deque(range(slots))
        while True:
            if not free:
                freed = patiently(pipe.recv, slots)
                if not freed:
                    os._exit(0)
                free.extend(freed)
            slot = free.popleft()
            image, *others = maker.make(batch, partial(_array_in, slot_memory, slot * slot_bytes))
            send(("batch", slot, image.shape, others))
            batch += step
    except UserError as e:
        send(("error", True, str(e)))
    except BaseException:
        send(("error", False, traceback.format_exc()))
