"""What a training run says of itself beside its losses: speed, waiting for data, memory, and the time left."""

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

__all__ = ["InputClock", "Meter", "cores", "device_memory", "format_seconds", "host_memory", "input_advice", "smoothed"]

KEPT = 0.95  # share of a smoothed value that a step keeps
GB = 1e9
# When waiting for data is worth a warning, and how often it is repeated.
SLOW_SHARE = 0.2
JUDGED_STEPS, JUDGED_SECONDS = 50, 60.0
REPEAT_SECONDS = 3600.0


def smoothed(before: float | None, value: float) -> float | None:
    """The exponential mean after another value; one that is not finite, as of a step that is skipped, changes
    nothing."""
    if not math.isfinite(value):
        return before
    return value if before is None else KEPT * before + (1 - KEPT) * value


class InputClock:
    """How long a process waits for its batches: from the begin of a run of the graph to the arrival in the queue of
    the last batch that it takes. Two threads use it: one trains, one fills the queue."""

    def __init__(self, replicas: int):
        """replicas: of this process; a run of the graph takes a batch for each."""
        self._replicas = replicas
        self._begins: deque[float] = deque()
        self._arrivals: deque[float] = deque()

    def batch_arrives(self) -> None:
        """Called when a batch is in the queue. Batches are taken in the order in which they arrive."""
        self._arrivals.append(time.monotonic())

    def run_begins(self) -> None:
        """Called before a run of the graph."""
        self._begins.append(time.monotonic())

    def waited(self) -> float:
        """Seconds that the runs since the last call have waited. A run whose batches are not noted yet, because the
        filling thread had no time, is left to the next call."""
        total = 0.0
        while self._begins and len(self._arrivals) >= self._replicas:
            begin = self._begins.popleft()
            last = [self._arrivals.popleft() for _ in range(self._replicas)][-1]
            total += max(0.0, last - begin)
        return total


class Meter:
    """The speed of a run, the share of its time in which it waited for data, and its memory, as smoothed as losses."""

    def __init__(
        self,
        total_batch: int,
        total_steps: int,
        workers: int,
        worker_pids: Callable[[], Sequence[int]] = tuple,
        gpus: int = 0,
    ):
        """workers: DATA.NUM_WORKERS; worker_pids: the processes they are now; gpus: number of this process's GPUs."""
        self._total_batch, self._total_steps = total_batch, total_steps
        self._workers, self._worker_pids, self._gpus = workers, worker_pids, gpus
        self._process = psutil.Process()
        self.step_seconds: float | None = None
        self._wait_seconds: float | None = None
        self._steps, self._paused = 0, 0.0
        # Since the last judgement of the input: steps, their time, and the time they waited.
        self._judged = (0, 0.0, 0.0)
        self._quiet_until = -math.inf

    def add_step(self, seconds: float, waited: float) -> None:
        """A step took so many seconds, of which it waited for data."""
        waited = min(max(waited, 0.0), seconds)
        self.step_seconds = smoothed(self.step_seconds, seconds)
        self._wait_seconds = smoothed(self._wait_seconds, waited)
        self._steps += 1
        steps, time, waits = self._judged
        self._judged = (steps + 1, time + seconds, waits + waited)

    def add_pause(self, seconds: float) -> None:
        """An evaluation took so many seconds between two steps."""
        self._paused += seconds

    def time_left(self, step: int) -> float | None:
        """Seconds to the end of the run, with evaluations as often as up to now; None before the first steps."""
        if self.step_seconds is None:
            return None
        return (self._total_steps - step) * (self.step_seconds + self._paused / self._steps)

    def speed(self, step: int) -> dict[str, float]:
        """Values for the logs after a step; empty before the first steps."""
        if self.step_seconds is None or self._wait_seconds is None:
            return {}
        seconds = max(self.step_seconds, 1e-9)
        return {
            "speed/step_s": seconds,
            "speed/images_per_s": self._total_batch / seconds,
            "speed/data_wait": self._wait_seconds / seconds,
            "speed/eta_s": self.time_left(step) or 0.0,
        }

    def words(self, step: int, beside_bar: bool = False) -> list[str]:
        """The same for the printed line: "0.52 s/step", …; beside_bar: without what a progress bar says itself."""
        speed = self.speed(step)
        if not speed:
            return []
        memory = self.memory()
        device = f", GPU {memory['memory/device_gb']:.1f} GB" if "memory/device_gb" in memory else ""
        pace = f"{speed['speed/step_s']:.2f} s/step", f"ETA {format_seconds(speed['speed/eta_s'])}"
        return [
            *(() if beside_bar else pace),
            f"{speed['speed/images_per_s']:.3g} images/s",
            f"{100 * speed['speed/data_wait']:.0f} % waiting for data",
            f"memory {memory['memory/host_gb']:.1f} GB{device}",
        ]

    def memory(self) -> dict[str, float]:
        values = {"memory/host_gb": host_memory(self._process, self._worker_pids()) / GB}
        if (device := device_memory(self._gpus)) is not None:
            values["memory/device_gb"] = device / GB
        return values

    def advice(self, now: float) -> str | None:
        """A warning if the steps since the last judgement waited much for data; at most once an hour."""
        steps, seconds, waited = self._judged
        if steps < JUDGED_STEPS or seconds < JUDGED_SECONDS:
            return None
        self._judged = (0, 0.0, 0.0)
        if waited < SLOW_SHARE * seconds or now < self._quiet_until:
            return None
        self._quiet_until = now + REPEAT_SECONDS
        return input_advice(waited / seconds, self._workers, cores(), _local_ranks())


def input_advice(share: float, workers: int, available: int, ranks: int = 1) -> str:
    """What to do about an input for which a run waits this share of its time.

    available: cores of this machine that the run may use; ranks: processes of the run on it, each with its workers.
    """
    problem = f"input is the bottleneck: {100 * share:.0f} % of the time waited for data"
    each = f" for each of {ranks} ranks" if ranks > 1 else ""
    if workers * ranks < available:
        return f"{problem}; raise DATA.NUM_WORKERS ({workers}{each} now, {available} cores)"
    return (
        f"{problem}; DATA.NUM_WORKERS={workers}{each} already takes all {available} cores: smaller image files, a "
        "faster disk or more cores help"
    )


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The number of cores that this process may use: those assigned to it, or fewer in a container with a quota."""
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit
        allowed, period = quota.read_text().split()
        count = min(count, max(1, math.ceil(int(allowed) / int(period))))
    return count


def _local_ranks() -> int:
    return int(os.environ.get("HOROVOD_LOCAL_SIZE") or 1)


def host_memory(process: Any, worker_pids: Sequence[int] = ()) -> int:
    """Bytes of main memory of a psutil.Process and of the data workers; what they share is counted once."""
    used = process.memory_info().rss
    for pid in worker_pids:
        with contextlib.suppress(psutil.Error):  # it has ended
            memory = psutil.Process(pid).memory_info()
            used += max(0, memory.rss - memory.shared)
    return used


_NO_DEVICE_MEMORY: list[str] = []  # the reason why TensorFlow does not tell it, once that is known


def device_memory(gpus: int) -> int | None:
    """The most bytes that TensorFlow has taken on one of this process's GPUs up to now; None without GPUs."""
    if not gpus or _NO_DEVICE_MEMORY:
        return None
    from utils.tf_v1 import tensorflow

    try:
        if (rank := os.environ.get("HOROVOD_LOCAL_RANK")) is not None:
            # The session of a rank has one GPU, see ranks.use_own_gpu; TensorFlow refuses to number them differently.
            every = tensorflow.config.list_physical_devices("GPU")
            tensorflow.config.set_visible_devices(every[int(rank)], "GPU")
        told = [tensorflow.config.experimental.get_memory_info(f"GPU:{i}") for i in range(gpus)]
        return max(int(info["peak"]) for info in told)
    except Exception as e:  # whatever allocator it has: numbers for a log end no run
        _NO_DEVICE_MEMORY.append(str(e))
        return None


def format_seconds(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
