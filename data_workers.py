"""The processes that make training batches.

A worker is a new Python interpreter, not a fork: the training process has threads (TensorFlow, NCCL, MPI, gRPC), and a
forked child may wait for ever for a lock that one of them held. multiprocessing's spawn and forkserver would import the
main script, and thus TensorFlow, into every worker. Workers map the annotations read-only from one anonymous file, so
each needs only the memory of Python, NumPy and OpenCV. Images are returned in shared memory.
"""

import contextlib
import ctypes
import math
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import numpy as np

from common import UserError, logger, new_process_code
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
        batches_per_step: batches of this process per update (its devices times accumulation). The images of an update
            do not depend on where they are computed: process r takes every size-th image of the total batch.
    """
    flow = TrainingFlow(split, cfg, start_batch, shard, batches_per_step)
    tensorpack = sys.modules.get("tensorpack.dataflow")
    if tensorpack is not None:  # imports TensorFlow, so it is imported late
        tensorpack.DataFlow.register(TrainingFlow)
    return flow


class TrainingFlow:
    """Training batches made by DATA.NUM_WORKERS processes in turn; has the methods of a tensorpack DataFlow.

    Worker w makes batches w, w + W, …. An error in a worker is raised here with its message, and so is a worker's
    death. A worker that delivers nothing for DATA.WORKER_TIMEOUT seconds is replaced once; if its replacement does not
    deliver that batch either, an error is raised. Iterating again starts over at the first batch.
    """

    def __init__(
        self, split: DatasetSplit, cfg: Config, start_batch: int, shard: tuple[int, int], batches_per_step: int
    ):
        self._maker = BatchMaker(split, cfg, shard, batches_per_step)
        self._start = start_batch
        self._workers: list[_Worker] = []
        self._fresh = False
        self._shared: int | None = None  # file descriptor of the data that workers start from
        self.images_per_epoch = len(self._maker.images)

    def __len__(self) -> int:
        """Batches per epoch, rounded up."""
        return math.ceil(self.images_per_epoch / (self._maker.plan.batch / self._maker.batches_per_step))

    def reset_state(self) -> None:
        """Starts the workers, so that they read ahead while the graph is built."""
        self.stop()
        cfg, maker = self._maker.cfg, self._maker
        if cfg.DATA.NUM_WORKERS == 0:
            return
        self._shared = _share((maker, cfg.DATA.NUM_WORKERS))
        maker.split.move_columns(_load_shared(self._shared)[0].split)
        self._workers = [self._start_worker(w, self._start + w) for w in range(cfg.DATA.NUM_WORKERS)]
        self._fresh = True

    def _start_worker(self, number: int, first_batch: int) -> "_Worker":
        cfg = self._maker.cfg
        side = cfg.PREPROC.CROP_SIZE if cfg.PREPROC.SCALE_JITTER else (cfg.PREPROC.MAX_SIZE,) * 2
        largest = padded_size([side], cfg)
        slot_bytes = cfg.TRAIN.BATCH_SIZE_PER_GPU * largest[0] * largest[1] * 3
        assert self._shared is not None
        return _Worker(number, first_batch, self._shared, slot_bytes, min(max(cfg.DATA.PREFETCH, 1), 255))

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
                yield self._receive(workers, batch)
                batch += 1
        finally:
            if workers is self._workers:
                self.stop()

    def _receive(self, workers: list["_Worker"], batch: int) -> list[np.ndarray]:
        seconds = self._maker.cfg.DATA.WORKER_TIMEOUT
        number = (batch - self._start) % len(workers)
        try:
            return workers[number].receive(batch, seconds)
        except _NoAnswer as e:
            if workers is not self._workers:  # stopped meanwhile
                raise RuntimeError("the data workers were stopped") from None
            logger.warning(f"{e}; starting another one")
        workers[number].stop()
        workers[number] = self._start_worker(number, batch)
        try:
            return workers[number].receive(batch, seconds)
        except _NoAnswer as e:
            ids = ", ".join(map(str, self._maker.ids(batch)))
            raise UserError(
                f"{e}, as the one before it: look at these images and the disk they are on ({ids}), or raise "
                "DATA.WORKER_TIMEOUT"
            ) from None

    def stop(self) -> None:
        """Ends the worker processes."""
        workers, self._workers, self._fresh = self._workers, [], False
        for worker in workers:
            worker.stop()
        if self._shared is not None:
            os.close(self._shared)
            self._shared = None

    @property
    def worker_pids(self) -> list[int]:
        return [w.process.pid for w in self._workers]


# ------------------------------------------------------------------------------------------------ worker processes
# A message is a length and a pickled tuple (kind, content...). From a worker: ("batch", slot, image shape, other
# arrays) or ("error", is the user's, text). To a worker: the number of a slot that may be written again, as one byte.
_LENGTH = struct.Struct("<Q")
_PARENT_CHECK_SECONDS = 5.0
_POLL_SECONDS = 0.5
START_SECONDS = 60.0  # what a new worker may take beside DATA.WORKER_TIMEOUT for its first batch
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class _NoAnswer(Exception):
    """A worker delivered nothing for as long as it may take."""


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

    def __init__(self, number: int, first_batch: int, shared: int, slot_bytes: int, slots: int):
        """shared: descriptor of what `_work` needs; slots: batches it may be ahead, slot_bytes: of a largest image."""
        self.number = number
        self._slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = os.memfd_create(f"packrcnn-batches-{number}")
        self._socket, theirs = socket.socketpair()
        try:
            os.truncate(memory, self._slot_bytes * slots)  # sparse: a page takes memory once it is written
            self._memory = mmap.mmap(memory, 0)
            numbers = (memory, shared, theirs.fileno(), slots, first_batch, os.getpid())
            code = new_process_code(__name__, f"_work{numbers}")
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
        self._socket.settimeout(_POLL_SECONDS)
        self._is_new = True

    def receive(self, batch: int, seconds: float) -> list[np.ndarray]:
        """The worker's next batch, which should have this number; _NoAnswer if it does not come in so many seconds."""
        seconds += START_SECONDS if self._is_new else 0.0
        try:
            head = self._read(_LENGTH.size, batch, seconds)
            message = self._read(_LENGTH.unpack(head)[0], batch, seconds) if len(head) == _LENGTH.size else b""
        except ConnectionError:
            message = b""
        try:
            kind, *content = pickle.loads(message)
        except (EOFError, pickle.UnpicklingError):
            raise RuntimeError(self._last_words(batch)) from None
        if kind == "error":
            is_users, text = content
            raise UserError(text) if is_users else RuntimeError(f"data worker {self.number} failed:\n{text}")
        self._is_new = False
        slot, shape, others = content
        image = _array_in(self._memory, slot * self._slot_bytes, shape).copy()
        with contextlib.suppress(ConnectionError):  # it has died since: its next batch will say so
            self._socket.sendall(bytes([slot]))
        return [image, *others]

    def _read(self, size: int, batch: int, seconds: float) -> bytes:
        """So many bytes, or fewer if the worker has ended."""
        parts, waited = [], 0.0
        while size:
            before = time.monotonic()
            try:
                part = self._socket.recv(size)
            except TimeoutError:
                # Time in which this process was stopped too, as by a scheduler, is not the worker's.
                waited += min(time.monotonic() - before, 2 * _POLL_SECONDS)
                if waited >= seconds:
                    raise _NoAnswer(
                        f"data worker {self.number} (process {self.process.pid}) delivered nothing for {seconds:g} s "
                        f"before batch {batch}"
                    ) from None
                continue
            if not part:
                break
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

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
        # In this order: a thread that waits in `receive` reads from the socket until the process is gone.
        self.process.kill()
        self.process.wait()
        self._socket.close()


def _array_in(memory: mmap.mmap, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)


def _work(memory: int, shared: int, connection: int, slots: int, batch: int, parent: int) -> None:
    """The life of a worker: batch after batch, from this one on, into free slots, until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Also while it reads a file that does not come, or is stopped, it must not outlive its parent.
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
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
        maker, step = _load_shared(shared)
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
