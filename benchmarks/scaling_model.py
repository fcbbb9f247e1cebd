"""How long a data-parallel training step takes on R ranks: ring all-reduces, costed as messages of latency alpha and
inverse bandwidth beta (Hockney 1994; Thakur et al. 2005), that run beside the rest of the backward pass and are fused
as Horovod does (Sergeev & Del Balso 2018), and the slowest of R ranks.

Seconds and bytes throughout. A rank is one GPU, or one process on a CPU core.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "Cluster", "Cost", "Link", "coordination_seconds", "expected_slowest", "fit_link", "hierarchical_seconds",
    "reduced_step", "ring_bytes", "ring_seconds", "spread_of_batches", "sync_bn_bytes", "sync_bn_seconds",
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


class Cost(NamedTuple):
    """Of one all-reduce: its seconds, and for how many of them it takes the processor from the computation."""

    seconds: float
    busy: float


def ring_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends (and receives) in a ring all-reduce of `size` bytes: 2 (R-1)/R n, the least that is
    possible (Patarasuk & Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def ring_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """One flat ring through all ranks, machine after machine: 2 (R-1) rounds, paced by the slowest link.

    A chunk on its way around crosses between machines once per machine and goes through inner links otherwise, which
    sets the latency; each round moves n / R bytes through every link at the same time, so the slowest sets the pace.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / cluster.per_node)
    rounds = 2 * (ranks - 1)
    outer_rounds = 2 * nodes if nodes > 1 else 0
    outer_rounds = min(outer_rounds, rounds)
    latency = (rounds - outer_rounds) * cluster.inner.latency + outer_rounds * cluster.outer.latency
    links = [
        link.bandwidth for link, used in ((cluster.inner, cluster.per_node > 1), (cluster.outer, nodes > 1)) if used
    ]
    return latency + ring_bytes(size, ranks) / min(links)


def hierarchical_seconds(size: float, ranks: int, cluster: Cluster) -> float:
    """Reduce-scatter inside each machine, rings across machines for the parts, all-gather inside (Thakur et al. 2005,
    section 4.5, on two levels). The parts of a machine's ranks share its network card."""
    nodes = math.ceil(ranks / cluster.per_node)
    if nodes == 1 or cluster.per_node == 1:
        return ring_seconds(size, ranks, cluster)
    inside = ring_seconds(size, cluster.per_node, cluster)
    across = 2 * (nodes - 1) * cluster.outer.latency + ring_bytes(size, nodes) / cluster.outer.bandwidth
    return inside + across


def coordination_seconds(ranks: int, message_latency: float) -> float:
    """Horovod's agreement on what is ready everywhere, before each fused all-reduce: with the gloo controller a ring
    all-reduce of a few words, 2 (R-1) messages one after the other."""
    return 2 * (ranks - 1) * message_latency


def sync_bn_bytes(channels: Sequence[int], ranks: int) -> float:
    """Bytes that each rank sends per step for synchronised batch norms of so many channels: forward the sum, the sum of
    squares and the number of cells (2 C + 1 floats), backward two sums (2 C), each in an all-reduce of its own."""
    return sum(ring_bytes(4 * (2 * c + 1), ranks) + ring_bytes(4 * 2 * c, ranks) for c in channels)


def sync_bn_seconds(channels: Sequence[int], ranks: int, cluster: Cluster, message_latency: float) -> float:
    """Seconds per step that synchronised batch norms add: nothing else can go on during their 2 all-reduces per norm,
    each of which waits for Horovod's next look (half a period in the mean) and for its agreement."""
    coordination = coordination_seconds(ranks, message_latency)
    wait = max(CYCLE_SECONDS, coordination) / 2 + coordination
    sizes = [4 * n for c in channels for n in (2 * c + 1, 2 * c)]
    return sum(wait + ring_seconds(size, ranks, cluster) for size in sizes)


def fit_link(sizes: Sequence[float], seconds: Sequence[float]) -> Link:
    """The latency and bandwidth, neither negative, that fit measured times best in relative terms."""
    sizes, seconds = np.asarray(sizes, float), np.asarray(seconds, float)
    design = np.stack([np.ones_like(sizes), sizes], 1) / seconds[:, None]
    latency, slope = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)[0]
    if latency < 0:
        latency, slope = 0.0, float((design[:, 1] @ np.ones_like(sizes)) / (design[:, 1] @ design[:, 1]))
    if slope <= 0:
        latency, slope = float((design[:, 0] @ np.ones_like(sizes)) / (design[:, 0] @ design[:, 0])), 0.0
    return Link(float(latency), float(1 / slope) if slope else math.inf)


def reduced_step(
    ready: Sequence[float],
    sizes: Sequence[float],
    tail: float,
    reduce: Callable[[float], Cost],
    coordination: float = 0.0,
    fusion: float = FUSION_BYTES,
    cycle: float = CYCLE_SECONDS,
) -> float:
    """Seconds of a step whose gradient i, of sizes[i] bytes, exists after ready[i] seconds of computation, and whose
    update takes `tail` seconds once all are reduced.

    As Horovod's thread: every `cycle` seconds, or as soon as it is done with the last ones, it takes the gradients that
    are ready, up to `fusion` bytes, agrees on them with the other ranks, which takes `coordination` seconds, and
    reduces them together. The computation goes on meanwhile, at the pace that reduce(bytes).busy leaves it. Where in a
    cycle a step begins is anybody's guess: the mean of eight places.
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
        # Sums of seconds are compared: what misses by a rounding error is ready.
        while last < len(ready) and ready[last] <= done + 1e-9 and (last == first or total + sizes[last] <= fusion):
            total += sizes[last]
            last += 1
        cost = reduce(total)
        rest = max(0.0, period - coordination - cost.seconds) if last < len(ready) else 0.0
        now += coordination + cost.seconds + rest
        done = min(work, done + coordination + cost.seconds - cost.busy + rest)
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
    if images == 1:
        return relative
    return np.random.default_rng(seed).choice(relative, (draws, images)).mean(1)
