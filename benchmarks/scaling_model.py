"""How long a data-parallel training step takes on R ranks, predicted from what benchmarks/scaling.py measured here and
from published times of GPUs.

Ring all-reduces, costed as messages of latency alpha and inverse bandwidth beta (Hockney 1994; Thakur et al. 2005), run
beside the rest of the backward pass and are fused as Horovod does (Sergeev & Del Balso 2018); a step waits for the
slowest of R ranks. Seconds and bytes throughout. A rank is one GPU, or one process on a CPU core.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

__all__ = [
    "Cluster", "Link", "arm_step", "expected_slowest", "fit_link", "gpu_step", "predicted_arm", "reduced_step",
    "ring_bytes", "ring_seconds", "spread_of_batches", "tables",
]  # fmt: skip

# Horovod 0.28.1, operations.cc: bytes fused into one all-reduce, and the shortest time from one to the next.
FUSION_BYTES = 128 * 2**20
CYCLE_SECONDS = 1e-3


class Link(NamedTuple):
    """A message of n bytes takes latency + n / bandwidth (Hockney 1994)."""

    latency: float
    bandwidth: float  # bytes/s; of a machine's network card: shared by its ranks


class Cluster(NamedTuple):
    """Machines of `per_node` ranks that are connected by `inner` inside and by `outer` between them."""

    per_node: int
    inner: Link
    outer: Link


# ---------------------------------------------------------------------------------------------------------- the model
def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends (and receives) in a ring all-reduce of `size` bytes: 2 (R-1)/R n, the least that is
    possible (Patarasuk & Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def ring_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """One flat ring through all ranks, machine after machine: 2 (R-1) rounds, paced by the slowest link.

    A chunk on its way around crosses between machines once per machine and goes through inner links otherwise, which
    sets the latency; each round moves n / R bytes through every link at the same time, so the slowest sets the pace.
    """
    nodes = math.ceil(ranks / cluster.per_node)
    rounds = 2 * (ranks - 1)
    outer_rounds = min(2 * nodes, rounds) if nodes > 1 else 0
    latency = (rounds - outer_rounds) * cluster.inner.latency + outer_rounds * cluster.outer.latency
    used = [cluster.inner] * (cluster.per_node > 1) + [cluster.outer] * (nodes > 1)
    return latency + ring_bytes(size, ranks) / min((link.bandwidth for link in used), default=math.inf)


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The latency and bandwidth, neither negative, that fit measured times best in relative terms."""
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    design = np.stack([np.ones_like(sizes), sizes], 1) / seconds[:, None]
    latency, slope = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
    if latency < 0:
        latency, slope = 0.0, design[:, 1].sum() / (design[:, 1] @ design[:, 1])
    if slope <= 0:
        latency, slope = design[:, 0].sum() / (design[:, 0] @ design[:, 0]), 0.0
    return Link(float(latency), float(1 / slope) if slope else math.inf)


def reduced_step(
    ready: Sequence[float],
    sizes: Sequence[float],
    tail: float,
    reduce: Callable[[float], tuple[float, float]],
    coordination: float = 0.0,
    fusion: float = FUSION_BYTES,
    cycle: float = CYCLE_SECONDS,
) -> float:
    """Seconds of a step whose gradient i, of sizes[i] bytes, exists after ready[i] seconds of computation, and whose
    update takes `tail` seconds once all are reduced.

    As Horovod's thread: every `cycle` seconds, or as soon as it is done with the last ones, it takes the gradients that
    are ready, up to `fusion` bytes, agrees on them with the other ranks, which takes `coordination` seconds, and
    reduces them together. reduce(bytes) tells how many seconds that takes, and for how many of them it takes the
    processor from the computation, which goes on meanwhile. Where in a cycle a step begins is unknown: the mean of
    eight places.
    """
    order = np.argsort(ready, kind="stable")
    ready, sizes = np.asarray(ready, float)[order], np.asarray(sizes, float)[order]
    period = max(cycle, coordination)
    phases = (np.arange(8) + 0.5) / 8 * period if period else [0.0]
    return float(np.mean([_reduced_at(p, ready, sizes, reduce, coordination, fusion, period) for p in phases])) + tail


def _reduced_at(phase, ready, sizes, reduce, coordination, fusion, period):
    """When the last gradient is reduced and all computation done, if Horovod's thread looks first at time `phase`."""
    work = ready[-1]  # seconds of computation until the last gradient
    now, done, first = phase, min(work, phase), 0  # the time; seconds of computation done by then
    while first < len(ready):
        missing = ready[first] - done
        if missing > 0:
            wait = math.ceil(missing / period - 1e-9) * period if period else missing
            now, done = now + wait, min(work, done + wait)
        last, total = first, 0.0
        # Sums of seconds are compared: a gradient within rounding error is ready.
        while last < len(ready) and ready[last] <= done + 1e-9 and (last == first or total + sizes[last] <= fusion):
            total += sizes[last]
            last += 1
        seconds, busy = reduce(total)
        rest = max(0.0, period - coordination - seconds) if last < len(ready) else 0.0
        now += coordination + seconds + rest
        done = min(work, done + coordination + seconds - busy + rest)
        first = last
    return now + work - done


def expected_slowest(samples: Sequence[float], ranks: int) -> float:
    """Mean of the largest of `ranks` independent draws from the samples, exactly: of the sorted x_1 … x_n, x_k is the
    largest with probability (k/n)^R - ((k-1)/n)^R. It cannot exceed the largest sample, however many ranks."""
    ordered = np.sort(np.asarray(samples, float))
    share = (np.arange(len(ordered) + 1) / len(ordered)) ** ranks
    return float(ordered @ np.diff(share))


def spread_of_batches(samples: Sequence[float], images: int, draws: int = 5000, seed: int = 0) -> np.ndarray:
    """Samples of one image's time, relative to their mean -> of the mean of `images` independent ones."""
    relative = np.asarray(samples, float) / np.mean(samples)
    return np.random.default_rng(seed).choice(relative, (draws, images)).mean(1) if images > 1 else relative


# ----------------------------------------------------------------------------------------------- ranks on this machine
def arm_step(arm: dict) -> float:
    """Mean seconds per step of an arm; its ranks take steps together, or are separate processes of equal weight."""
    return float(np.mean([_uninterrupted(s).mean() for s in arm["seconds"]]))


def _uninterrupted(seconds: Sequence[float]) -> np.ndarray:
    """Step times but for those over twice the median, in which something else had the processor."""
    times = np.asarray(seconds, float)
    return times[times <= 2 * np.median(times)]


def _stretched(schedule: dict, seconds: float) -> tuple[np.ndarray, float]:
    """The schedule's ready times and tail for a step of so many seconds."""
    factor = seconds / (max(schedule["ready"]) + schedule["tail"])
    return np.array(schedule["ready"]) * factor, schedule["tail"] * factor


def predicted_arm(found: dict, name: str) -> float:
    """Seconds per step of ranks that communicate, from the all-reduce's times and from the steps of as many separate
    processes."""
    ranks, reduction, schedule = found["arms"][name]["ranks"], found["reductions"][name], found["schedules"]["256"]
    separate = found["arms"][f"{ranks} separate processes"]
    compute = expected_slowest(np.concatenate([_uninterrupted(s) for s in separate["seconds"]]), ranks)
    wall, cpu = (fit_link(reduction["sizes"], reduction[k]) for k in ("seconds", "cpu"))

    def reduce(size: float) -> tuple[float, float]:
        seconds = wall.latency + size / wall.bandwidth
        return seconds, min(seconds, cpu.latency + size / cpu.bandwidth)

    ready, tail = _stretched(schedule, compute / (1 - reduction["idle"]))
    return reduced_step(ready, schedule["sizes"], tail, reduce)


# ------------------------------------------------------------------------------------------------- many GPUs, predicted
# Assumptions, with their origin; docs/SCALING.md repeats them.
NVLINK = Link(3.4e-6, 120e9)  # latency of a round: NCCL's tuner; all-reduce bandwidth: 8 V100 of a DGX-1
ROUND_LATENCY = 14e-6  # of a ring through the network: NCCL's tuner
WIRE_SHARE = 0.8  # of a network's nominal bandwidth that all-reduces reach
MESSAGE_LATENCY = 25e-6  # from process to process over TCP, for Horovod's coordination
BUSY = 0.1  # share of an all-reduce's time that it takes from the computation (its kernels use the same GPU)
GIGABITS = (25, 100, 400)
# Training times of 12 and 24 epochs: github.com/aws-samples/mask-rcnn-tensorflow; their differences know no start-up.
# 117,266 images; machines of 8 V100 with 100 Gbit/s.
AWS_STEPS = {n: hours * 3600 / (12 * 117266 / (4 * n)) for n, hours in ((8, 4.69), (16, 2.49), (32, 1.39))}
# Images per GPU, and published seconds per step of 8 GPUs in one machine. 50 images/s with one image each:
# github.com/tensorpack/benchmarks/tree/master/MaskRCNN (TRAINER=horovod).
SINGLE, FOUR = (1, 8 / 50), (4, AWS_STEPS[8])
GPUS = {"V100, float32, 1 image": SINGLE, "V100, float16, 4 images": FOUR}


def gpu_cluster(gigabits: float) -> Cluster:
    return Cluster(8, NVLINK, Link(ROUND_LATENCY, WIRE_SHARE * gigabits * 1e9 / 8))


def gpu_step(found: dict, compute: float, images: int, ranks: int, cluster: Cluster) -> tuple[float, float]:
    """Seconds per step, and those of them in which the computation of the slowest rank runs; `compute` is the mean
    computation of a rank, whose images differ in area."""
    slowest = compute * expected_slowest(spread_of_batches(found["areas"], images), ranks)
    ready, tail = _stretched(found["schedules"]["800"], slowest)

    def reduce(size: float) -> tuple[float, float]:
        seconds = ring_seconds(size, ranks, cluster)
        return seconds, BUSY * seconds

    # Agreement on what is ready everywhere: gloo's ring all-reduce of a few words, message after message.
    coordination = 2 * (ranks - 1) * MESSAGE_LATENCY
    return reduced_step(ready, found["schedules"]["800"]["sizes"], tail, reduce, coordination), slowest


def calibrated(found: dict, images: int, published: float) -> float:
    """The mean computation of a rank with which the model gives the published step of 8 GPUs of one machine."""
    compute = published
    for _ in range(20):  # a step grows almost in proportion to its computation
        compute *= published / gpu_step(found, compute, images, 8, gpu_cluster(100))[0]
    return compute


# ---------------------------------------------------------------------------------------------------------- the tables
def tables(found: dict) -> dict[str, str]:
    """{name in the document: table} from the measurements in benchmarks/scaling.json."""
    headers = {
        "measured": "|s/step|images/s|efficiency|all-reduce latency ms|MB/s per rank|predicted s/step|difference",
        "published": "GPUs|published step ms|predicted step ms|difference",
        "predictions": "|GPUs|between machines|step ms|slowest rank ms|communication ms|images/s|efficiency",
    }
    rows = {"measured": _measured_rows, "published": _published_rows, "predictions": _predicted_rows}
    return {
        name: tabulate(list(rows[name](found)), header.split("|"), tablefmt="pipe", disable_numparse=True)
        for name, header in headers.items()
    }


def _measured_rows(found: dict) -> Iterator[list[str]]:
    one = arm_step(found["arms"]["1 process"])
    for name, arm in found["arms"].items():
        step, row = arm_step(arm), ["", "", "", ""]
        if name in found["reductions"]:
            reduction, predicted = found["reductions"][name], predicted_arm(found, name)
            wall = fit_link(reduction["sizes"], reduction["seconds"])
            rate = ring_bytes(1, reduction["ranks"]) * wall.bandwidth
            row = [f"{wall.latency * 1e3:.1f}", f"{rate / 1e6:.0f}", f"{predicted:.2f}", f"{predicted / step - 1:+.0%}"]
        yield [name, f"{step:.2f}", f"{arm['ranks'] / step:.2f}", f"{one / step:.2f}", *row]


def _published_rows(found: dict) -> Iterator[list[str]]:
    compute = calibrated(found, *FOUR)
    for ranks, published in AWS_STEPS.items():
        step, _ = gpu_step(found, compute, 4, ranks, gpu_cluster(100))
        note = "calibrated" if ranks == 8 else f"{step / published - 1:+.0%}"
        yield [str(ranks), f"{published * 1e3:.0f}", f"{step * 1e3:.0f}", note]


def _predicted_rows(found: dict) -> Iterator[list[str]]:
    for name, (images, published) in GPUS.items():
        compute = calibrated(found, images, published)
        for ranks, gigabits in [(8, 100), *((ranks, g) for ranks in (64, 512) for g in GIGABITS)]:
            step, slowest = gpu_step(found, compute, images, ranks, gpu_cluster(gigabits))
            row = [step * 1e3, (slowest - compute) * 1e3, (step - slowest) * 1e3, ranks * images / step]
            network = "NVLink" if ranks == 8 else f"{gigabits} Gbit/s"
            yield [name, str(ranks), network, *(f"{value:,.0f}" for value in row), f"{compute / step:.0%}"]
