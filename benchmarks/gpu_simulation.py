"""Predicts the speed of a training step of R50-FPN Mask R-CNN on GPUs, without one.

  python benchmarks/gpu_simulation.py                 the predictions, from the recorded step in gpu_step.npz
  python benchmarks/gpu_simulation.py --record        runs steps of this version on the CPU and records their operations

A step is the list of its operations in the order of the graph, with the multiply-adds and the bytes of each, found by
running it at 800 x 1344 with one image and with two; other batches are extrapolated. Each kernel takes the larger of
arithmetic and memory traffic at published peak rates times an efficiency (the roofline of Williams et al. 2009). The
host starts kernels one after the other and waits wherever it needs a result of the GPU. The efficiency of arithmetic is
chosen so that two published speeds on a V100 come out; what it is on an H100 nobody has measured with this code, so
that prediction is a range.
"""

import import_path

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

__all__ = ["GPUS", "Gpu", "Prediction", "Step", "calibrated", "read_steps", "simulate"]

RECORD = Path(__file__).resolve().parent / "gpu_step.npz"
SIZE = (800, 1344)
BATCHES = (1, 2, 4, 8)
PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class Gpu:
    """Published peak rates, and what is assumed about reaching them."""

    name: str
    flops: dict[str, float]  # per second, dense, a multiply-add being two, by precision
    bandwidth: float  # bytes/s of its memory
    efficiency: dict[str, float]  # the share of `flops` that convolutions and products reach
    memory_efficiency: float = 0.75
    shortest: float = 2.5e-6  # seconds; no kernel takes less
    launch: float = 6e-6  # seconds from one kernel's start by TensorFlow's executor to the next one's
    wait: float = 20e-6  # seconds from the end of a kernel until the host goes on with its result
    # Operations on the host, seconds for each image: NMS of five levels on a server's cores, copies included.
    on_host: float = 12e-3


# Data sheets: V100 SXM2 (float16 on tensor cores), A100 SXM 80 GB and H100 SXM (float32 as TF32, without sparsity).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", {"float32": 15.7e12, "float16": 125e12}, 0.9e12, {"float32": 0.6, "float16": 0.3}),
        Gpu("A100", {"float32": 156e12, "float16": 312e12}, 2.0e12, {"float32": 0.3, "float16": 0.3}),
        Gpu("H100", {"float32": 495e12, "float16": 989e12}, 3.35e12, {"float32": 0.3, "float16": 0.3}),
    )
}


class Known(NamedTuple):
    """A published speed of one GPU out of eight, images/s."""

    gpu: str
    precision: str
    images: int
    speed: float
    source: str


KNOWN = [
    Known("V100", "float32", 1, 6.3, "tensorpack, 50 images/s on 8"),
    Known("V100", "float16", 4, 19.4, "NVIDIA's Mask R-CNN for TensorFlow 2"),
]


class Step(NamedTuple):
    """The operations of a training step in the order of the graph; arrays [K], and [2,K] for one and two images."""

    types: np.ndarray  # str
    flops: np.ndarray  # a multiply-add is two
    bytes: np.ndarray  # read and written
    kernel: np.ndarray  # bool: runs on the GPU; else on the host
    waits: np.ndarray  # bool: the host waits for the GPU before it

    def work(self, images: int) -> tuple[np.ndarray, np.ndarray]:
        """(flops, bytes) of each operation for so many images."""
        flops, traffic = (v[0] + (v[1] - v[0]) * (images - 1) for v in (self.flops, self.bytes))
        return np.maximum(flops, 0), np.maximum(traffic, 0)


class Prediction(NamedTuple):
    """Seconds of a step: busy is the GPU's computing, by kind of operation; the rest it waits for the host."""

    seconds: float
    busy: float
    by_kind: dict[str, float]
    launches: int
    waits: int
    starved: float  # of the waiting: for kernels that the host has not started yet
    on_host: float  # of the waiting: for operations on the host, and for the host to notice results

    @property
    def bottleneck(self) -> str:
        parts = {**self.by_kind, "starting kernels": self.starved, "the host's operations": self.on_host}
        return max(parts, key=lambda k: parts[k])


# ------------------------------------------------------------------------------------------------------ the simulation
_PRODUCTS = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul", "BatchMatMulV2")


def kind_of(operation: str, short: bool = False) -> str:
    """What an operation counts as; short: its kernel takes the shortest possible time."""
    if operation in _PRODUCTS:
        return "convolutions and products"
    if operation.startswith("CropAndResize"):
        return "RoIAlign"
    if operation in ("TopKV2", "Where", "NonMaxSuppressionV3", "UnsortedSegmentSum", "ScatterNd"):
        return "sorting and scattering"
    return "short kernels" if short else "memory traffic of the rest"


def simulate(step: Step, gpu: Gpu, precision: str, images: int) -> Prediction:
    """One step, operation after operation: the host starts kernels, the GPU runs them in that order."""
    flops, traffic = step.work(images)
    arithmetic = flops / (gpu.flops[precision] * gpu.efficiency[precision])
    kernels = np.maximum(np.maximum(arithmetic, traffic / (gpu.bandwidth * gpu.memory_efficiency)), gpu.shortest)
    host = end = starved = on_host = 0.0  # when the host is free, when the GPU is
    by_kind: Counter[str] = Counter()
    for kind, seconds, is_kernel, waits in zip(step.types, kernels.tolist(), step.kernel, step.waits):
        if waits and end + gpu.wait > host:
            host = end + gpu.wait
        if not is_kernel:
            host = max(host, end) + gpu.on_host * images
            on_host += host - end
            end = host
            continue
        host += gpu.launch
        if host > end:
            starved += host - end
            end = host
        end += seconds
        by_kind[kind_of(kind, seconds <= gpu.shortest)] += seconds
    busy = sum(by_kind.values())
    return Prediction(
        max(end, host), busy, dict(by_kind), int(step.kernel.sum()), int(step.waits.sum()), starved, on_host
    )  # fmt: skip


def calibrated(steps: dict[str, Step], gpu: Gpu, known: Sequence[Known]) -> Gpu:
    """The GPU with the efficiency of each precision at which its published speed comes out, 1 at most."""
    found = dict(gpu.efficiency)
    for k in known:
        low, high = 0.01, 1.0
        for _ in range(40):
            middle = (low * high) ** 0.5
            trial = replace(gpu, efficiency={**found, k.precision: middle})
            fast = k.images / simulate(steps[k.precision], trial, k.precision, k.images).seconds > k.speed
            low, high = (low, middle) if fast else (middle, high)
        found[k.precision] = high
    return replace(gpu, efficiency=found)


# --------------------------------------------------------------------------------------------------------- the record
# No kernel of their own, or one that only hands a tensor on.
_FREE = {
    "Const", "Identity", "IdentityN", "NoOp", "Reshape", "Squeeze", "ExpandDims", "Shape", "ShapeN", "Size", "Rank",
    "VarHandleOp", "ReadVariableOp", "Placeholder", "PlaceholderWithDefault", "StopGradient", "Switch", "RefSwitch",
    "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "Bitcast", "PreventGradient", "BroadcastGradientArgs",
    "Assert", "ConcatOffset", "Range", "InvertPermutation",
}  # fmt: skip
# They read about as much as they write, not all of their inputs.
_READ_SOME = {"GatherV2", "GatherNd", "StridedSlice", "Slice", "CropAndResize", "ResourceGather"}


def record(precision: str) -> Step:
    """Runs a step on one image and on two, on the CPU, and lists its operations as a GPU would have them."""
    lists = [_operations(precision, images) for images in (1, 2)]
    second = {name: (flops, traffic) for name, _, flops, traffic, *_ in lists[1]}
    names, types, flops, traffic, kernel, waits = zip(*lists[0])
    pairs = [second.get(n, (2 * f, 2 * b)) for n, f, b in zip(names, flops, traffic)]
    return Step(
        np.array(types), np.array([flops, [p[0] for p in pairs]]), np.array([traffic, [p[1] for p in pairs]]),
        np.array(kernel), np.array(waits),
    )  # fmt: skip


def _operations(precision: str, images: int) -> list[tuple[str, str, float, float, bool, bool]]:
    """(name, type, flops, bytes, runs on the GPU, the host waits before it) of what an update needs."""
    from benchmarks.train_speed import synthetic_batch, training_step
    from tools.gpu_audit import audit  # noqa: PLC0415  imports TensorFlow
    from utils.tf_v1 import graphs_for_gpu, needed_by, tf

    with tf.Graph().as_default() as graph, tf.Session() as session:
        settings = ["MODE_FPN=True", f"TRAIN.PRECISION={precision}"]
        with graphs_for_gpu(True):
            _, update, _ = training_step(settings, synthetic_batch(images, *SIZE))
        audited = audit(graph)
        waiting = {crossing.name for crossing in audited.to_host}
        needed = set(needed_by(update))
        ops = [op for op in graph.get_operations() if op in needed]
        tensors = {t.name: t for op in ops for t in (*op.inputs, *op.outputs)}
        shapes = {name: t.shape.as_list() for name, t in tensors.items() if t.shape.is_fully_defined()}
        # Tensors inside loops and conditionals cannot be fetched; those of the update have known shapes.
        asked = [n for n, t in tensors.items()
                 if n not in shapes and t.op._get_control_flow_context() is None  # noqa: SLF001
                 and t.dtype not in (tf.resource, tf.variant)]  # fmt: skip
        session.run(tf.global_variables_initializer())
        shapes |= dict(zip(asked, (v.tolist() for v in session.run([tf.shape(tensors[n]) for n in asked]))))
    rows = []
    for op in ops:
        on_host = op.type in audited.without_kernel
        if op.type in _FREE or (_small_integers(op, shapes) and not on_host):
            continue
        flops, traffic = _work(op, shapes)
        rows.append((op.name, op.type, flops, traffic, not on_host, op.name in waiting))
    return rows


def _small_integers(op: Any, shapes: dict[str, list[int]]) -> bool:
    """Whether the results are a few integers, which TensorFlow keeps and computes on the host."""
    return bool(op.outputs) and all(
        t.dtype.is_integer and t.name in shapes and np.prod(shapes[t.name]) <= 16 for t in op.outputs
    )


def _work(op: Any, shapes: dict[str, list[int]]) -> tuple[float, float]:
    """Floating-point operations, and bytes that a kernel reads and writes at least."""

    def size(tensor: Any) -> float:
        has_size = tensor.name in shapes and tensor.dtype.size
        return float(np.prod(shapes[tensor.name])) * tensor.dtype.size if has_size else 0.0

    written = sum(size(t) for t in op.outputs)
    read = sum(size(t) for t in op.inputs)
    flops = 0.0
    known = all(t.name in shapes for t in (*op.inputs, *op.outputs))
    if op.type in _PRODUCTS and known:  # some are small and inside loops
        inputs, out = [shapes[t.name] for t in op.inputs], shapes[op.outputs[0].name]
        if op.type == "Conv2D":
            flops = 2.0 * np.prod(inputs[1][:3]) * np.prod(out)
        elif op.type == "Conv2DBackpropInput":
            flops = 2.0 * np.prod(inputs[1][:3]) * np.prod(inputs[2])
        elif op.type == "Conv2DBackpropFilter":
            flops = 2.0 * np.prod(out[:3]) * np.prod(inputs[2])
        else:
            adjoint = op.get_attr("transpose_a" if op.type == "MatMul" else "adj_x")
            flops = 2.0 * np.prod(out) * inputs[0][-2 if adjoint else -1]
    elif op.type in _READ_SOME:
        read = min(read, written)
    elif op.type == "ResourceApplyMomentum":  # reads and writes weight and momentum, whose handles have no size
        read, written = 3 * size(op.inputs[3]), 2 * size(op.inputs[3])
    return flops, read + written


def write_steps(steps: dict[str, Step], path: Path = RECORD) -> None:
    arrays = {f"{precision}/{k}": v for precision, step in steps.items() for k, v in step._asdict().items()}
    np.savez_compressed(path, **arrays)


def read_steps(path: Path = RECORD) -> dict[str, Step]:
    with np.load(path, allow_pickle=False) as content:
        return {p: Step(*(content[f"{p}/{k}"] for k in Step._fields)) for p in PRECISIONS}


# --------------------------------------------------------------------------------------------------------- the tables
def tables(steps: dict[str, Step]) -> str:
    text = []
    rows = []
    for known in KNOWN:
        plain = known.images / simulate(steps[known.precision], GPUS[known.gpu], known.precision, known.images).seconds
        own = calibrated(steps, GPUS[known.gpu], KNOWN)
        rows.append([known.gpu, known.precision, known.images, known.speed, plain,
                     own.efficiency[known.precision], known.source])  # fmt: skip
    headers = ["GPU", "precision", "batch", "published images/s", "before calibration", "calibrated efficiency", "by"]
    text.append(tabulate(rows, headers, "github", floatfmt=".2f"))
    reached = calibrated(steps, GPUS["V100"], KNOWN).efficiency
    rows = []
    for name, gpu in GPUS.items():
        for precision in PRECISIONS:
            cells = []
            for images in BATCHES:
                speeds = [
                    images / simulate(steps[precision], replace(gpu, efficiency=share), precision, images).seconds
                    for share in _efficiencies(name, reached)
                ]
                cells.append(f"{min(speeds):.1f}" if name == "V100" else f"{min(speeds):.0f} to {max(speeds):.0f}")
            rows.append([name, precision, *cells])
    text.append(tabulate(rows, ["GPU", "images/s", *(f"batch {n}" for n in BATCHES)], "github", disable_numparse=True))
    rows = []
    for name, gpu in GPUS.items():
        for precision in PRECISIONS:
            for images in (1, 8):
                own = replace(gpu, efficiency=_efficiencies(name, reached)[-1])
                p = simulate(steps[precision], own, precision, images)
                rows.append([name, precision, images, p.seconds * 1e3, p.busy / p.seconds, p.starved * 1e3,
                             p.on_host * 1e3, p.launches, p.waits, p.bottleneck])  # fmt: skip
    headers = ["GPU", "precision", "batch", "step ms", "GPU busy", "waits for launches ms", "for the host ms",
               "kernels", "host waits", "most time"]  # fmt: skip
    text.append(tabulate(rows, headers, "github", floatfmt=("", "", "", ".1f", ".0%", ".1f", ".1f", "", "", "")))
    return "\n\n".join(text)


def _efficiencies(name: str, reached: dict[str, float]) -> list[dict[str, float]]:
    """The share of peak rates on a GPU, from the least to the most: the V100's, elsewhere half of its half-precision
    share to all of it, since float32 runs on the same units there."""
    if name == "V100":
        return [reached]
    half = reached["float16"]
    return [dict.fromkeys(PRECISIONS, half / 2), dict.fromkeys(PRECISIONS, half)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run the steps of this version on the CPU first")
    args = parser.parse_args()
    if args.record:
        # bfloat16 has float16's sizes, and CPUs compute it faster.
        write_steps({p: record("bfloat16" if p == "float16" else p) for p in PRECISIONS})
    print(tables(read_steps()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
