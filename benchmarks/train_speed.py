"""Seconds per training step against its convolution floor: the same convolutions and matrix products, forward and
backward, same shapes and types, and nothing else, timed in the same process in alternation with the full step.

  python benchmarks/train_speed.py                       short edge 800 (512 RoIs, FREEZE_AT 2) and 256 (64, 0)
  python benchmarks/train_speed.py --precisions float32 bfloat16   both, in alternation
  python benchmarks/train_speed.py --size 256 --batches 1 2 4   throughput over images per batch
  python benchmarks/train_speed.py --memory --size 800 --config TRAIN.PRECISION=bfloat16   peak memory of one process
  python benchmarks/train_speed.py --start-up            from command to first step, by part
"""

import import_path

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from tabulate import tabulate

from config import default_config, finalize_config
from model_rcnn import build_training
from trainers import DetectionOptimizer
from utils.tf_v1 import needed_by, tf

ROOT = Path(__file__).resolve().parent.parent

PRODUCTS = ("Conv2D", "Conv2DBackpropInput", "Conv2DBackpropFilter", "MatMul", "BatchMatMulV2")
# short edge -> padded image (a 4:3 photograph), its settings
CASES = {
    800: ((800, 1088), ["FRCNN.BATCH_PER_IM=512", "BACKBONE.FREEZE_AT=2"]),
    256: ((256, 352), ["FRCNN.BATCH_PER_IM=64", "BACKBONE.FREEZE_AT=0"]),
}


def synthetic_batch(images: int, height: int, width: int, objects: int = 10, edges: int = 40, seed: int = 0) -> dict:
    """A training batch of noise with `objects` elliptic objects of COCO-like sizes in each image."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.uniform(np.log(0.05), np.log(0.6), (images, objects, 2))) * [width, height]
    center = rng.uniform(0.5 * size, [width, height] - 0.5 * size)
    boxes = np.concatenate([center - size / 2, center + size / 2], -1).astype(np.float32)
    angle = np.linspace(0, 2 * np.pi, edges + 1)
    ring = center[:, :, None] + 0.5 * size[:, :, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return {
        "image": rng.integers(0, 256, (images, height, width, 3), np.uint8),
        "image_shape": np.tile(np.int32([height, width]), (images, 1)),
        "image_seed": np.arange(images, dtype=np.int32),
        "gt_boxes": boxes,
        "gt_labels": rng.integers(1, 81, (images, objects)).astype(np.int32),
        "gt_is_crowd": np.zeros((images, objects), bool),
        "gt_edges": np.concatenate([ring[:, :, :-1], ring[:, :, 1:]], -1).astype(np.float32),
    }


def training_step(settings: list[str], batch: dict) -> tuple[list[tuple], object, dict]:
    """Builds the training step on one constant batch in the present graph -> gradients and their variables, the
    operation that applies them, the model's statistics."""
    cfg = finalize_config(default_config().update_args(["DATA.NUM_CATEGORY=80", *settings]))
    tf.set_random_seed(1)
    images = len(batch["image"])
    inputs = {k: tf.placeholder_with_default(v, [images, *[None] * (v.ndim - 1)], name=k) for k, v in batch.items()}
    inputs["image"].set_shape([images, None, None, 3])
    losses, stats = build_training(inputs, cfg)
    # The decision regions of an untrained model are chaotic; a small rate keeps its shapes stable.
    optimizer = DetectionOptimizer(1e-5, 0.9, 1e-4, None, False)
    pairs = optimizer.compute_gradients(tf.add_n(list(losses.values())))
    pairs = [(g, v) for g, v in pairs if g is not None]
    return pairs, optimizer.apply_gradients(pairs), stats


class Step:
    """The full training step of R50-FPN Mask R-CNN on one constant batch, in a session of its own."""

    def __init__(self, size: int, images: int, extra: list[str]):
        (height, width), settings = CASES[size]
        self.graph = tf.Graph()
        with self.graph.as_default():
            batch = synthetic_batch(images, height, width)
            _, self.op, self.stats = training_step(["MODE_FPN=True", *settings, *extra], batch)
            self.session = tf.Session()
            self.session.run(tf.global_variables_initializer())

    def product_shapes(self) -> list[tuple]:
        """(type, input shapes, attributes) of each convolution and matrix product of the step as it runs."""
        with self.graph.as_default():
            ops = [op for op in self.graph.get_operations() if op.type in PRODUCTS]
            needed = set(needed_by(self.op))
            ops = [op for op in ops if op in needed]
            shapes = self.session.run([[tf.shape(t) for t in (*op.inputs, *op.outputs)] for op in ops])
        return [(op, [tuple(map(int, s)) for s in found]) for op, found in zip(ops, shapes)]

    def run(self) -> None:
        self.session.run(self.op)

    def profile(self) -> dict[str, float]:
        """Seconds by kind of operation of one step (sum over threads)."""
        meta = tf.RunMetadata()
        self.session.run(self.op, options=tf.RunOptions(trace_level=tf.RunOptions.FULL_TRACE), run_metadata=meta)
        by_type: dict[str, float] = defaultdict(float)
        types = {op.name: op.type for op in self.graph.get_operations()}
        for device in meta.step_stats.dev_stats:
            for node in device.node_stats:
                label = node.timeline_label
                kind = label.split(" = ")[1].split("(")[0] if " = " in label else types.get(node.node_name, "other")
                by_type[kind] += (node.op_end_rel_micros - node.op_start_rel_micros) * 1e-6
        return by_type


class Floor:
    """The products of a step, each on tensors of its own shapes and type, one after the other."""

    def __init__(self, products: list[tuple]):
        self.flops = 0.0
        with tf.Graph().as_default():
            tensors: dict[tuple, object] = {}

            def tensor(shape, dtype):
                if (shape, dtype) not in tensors:
                    with tf.control_dependencies(None):
                        initial = tf.random.stateless_uniform(shape, [len(tensors), 1], -1.0, 1.0)
                        tensors[shape, dtype] = tf.Variable(tf.cast(initial, dtype), trainable=False)
                return tensors[shape, dtype]

            last = []
            for op, shapes in products:
                with tf.control_dependencies(last):
                    result = self._product(op, shapes, tensor)
                last = [result.op]
            self.op = tf.group(*last)
            config = tf.ConfigProto()
            config.graph_options.optimizer_options.opt_level = -1  # equal products must not be merged
            config.graph_options.rewrite_options.disable_meta_optimizer = True
            self.session = tf.Session(config=config)
            self.session.run(tf.global_variables_initializer())

    def _product(self, op, shapes, make):
        def tensor(shape):
            return make(shape, tf.as_dtype(op.get_attr("T")))

        if op.type in ("MatMul", "BatchMatMulV2"):
            adjoint = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
            (*_, r, c), out = shapes[0], shapes[2]
            self.flops += 2.0 * np.prod(out) * (r if op.get_attr(adjoint[0]) else c)
            return tf.matmul(
                tensor(shapes[0]), tensor(shapes[1]), op.get_attr(adjoint[0]), op.get_attr(adjoint[1])
            )  # fmt: skip
        attributes = {"strides": op.get_attr("strides"), "padding": op.get_attr("padding").decode()}
        if op.type == "Conv2D":
            kernel, out = shapes[1], shapes[2]
            result = tf.raw_ops.Conv2D(input=tensor(shapes[0]), filter=tensor(kernel), **attributes)
        elif op.type == "Conv2DBackpropInput":
            kernel, out = shapes[1], shapes[2]
            result = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.constant(shapes[3]), filter=tensor(kernel), out_backprop=tensor(out), **attributes
            )
        else:
            kernel, out = shapes[3], shapes[2]
            result = tf.raw_ops.Conv2DBackpropFilter(
                input=tensor(shapes[0]), filter_sizes=tf.constant(kernel), out_backprop=tensor(out), **attributes
            )
        self.flops += 2.0 * np.prod(kernel[:3]) * np.prod(out)
        return result

    def run(self) -> None:
        self.session.run(self.op)


def seconds(run, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def matmul_rate(precision: str) -> float:
    """GFLOP/s of a large matrix product."""
    n = 2048
    with tf.Graph().as_default(), tf.Session() as sess:
        a = tf.Variable(tf.cast(tf.random.stateless_uniform([n, n], [1, 2]), precision))
        b = tf.Variable(tf.cast(tf.random.stateless_uniform([n, n], [3, 4]), precision))
        sess.run(tf.global_variables_initializer())
        op = tf.matmul(a, b).op
        sess.run(op)
        return 2.0 * n**3 / seconds(lambda: sess.run(op), 5) * 1e-9


def compare(
    size: int, images: int, rounds: int, precisions: list[str], extra: list[str], show_profile: bool
) -> list[list]:
    """Rows of the table, one for each precision."""
    pairs = []
    for precision in precisions:
        step = Step(size, images, [*extra, f"TRAIN.PRECISION={precision}"])
        for _ in range(2):
            step.run()
        floor = Floor(step.product_shapes())
        floor.run()
        pairs.append((step, floor))
    times = np.zeros([len(pairs), 2, rounds])
    for n in range(rounds):  # in alternation, so that a slow moment of the machine meets all
        for i, pair in enumerate(pairs):
            times[i, :, n] = [seconds(one.run, 1) for one in pair]
    rows = []
    for precision, (step, floor), (full, bare) in zip(precisions, pairs, times):
        if show_profile:
            by_type = step.profile()
            total = sum(by_type.values())
            most = sorted(by_type.items(), key=lambda kv: -kv[1])[:16]
            print(f"\nshort edge {size}, {precision}: where a step's time goes (sum over threads)")
            print(tabulate([[k, f"{v:.3f}", f"{v / total:.1%}"] for k, v in most], headers=["operation", "s", "share"]))
        full_s, bare_s, ratio = np.median(full), np.median(bare), np.median(full / bare)
        to_first = np.median(full / times[0, 0])
        rows.append(
            [size, images, precision, full_s, bare_s, ratio, floor.flops * 1e-9 / bare_s, images / full_s, to_first]
        )  # fmt: skip
    return rows


def memory(size: int, images: int, extra: list[str]) -> None:
    """Prints the peak memory of this process after three steps, and before its first step."""
    step = Step(size, images, extra)
    before = _peak()
    for _ in range(3):
        step.run()
    print(f"short edge {size}, {images} images: {_peak():.0f} MiB at most, {before:.0f} before the first step")


def _peak() -> float:
    """MiB that were resident at once in this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def start_up() -> None:
    """Times `train.py` on a tiny data set until its first step, with R50-FPN and 800-pixel images."""
    data = ROOT / "tests" / "data" / "coco_mini"
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "train.py"), "--logdir", f"{folder}/run", "--config", "MODE_FPN=True",
            f"DATA.BASEDIR={data}", "BACKBONE.NORM=GN", "BACKBONE.FREEZE_AT=0", "TRAIN.MAX_STEPS=1",
            "TRAIN.EVAL_PERIOD=0",
        ]  # fmt: skip
        start = time.time()
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
            for line in process.stderr:
                print(f"{time.time() - start:6.1f} s  {line.rstrip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[800, 256], choices=CASES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", default=None, help="default: that of --config")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory of one size and batch instead of speed")
    parser.add_argument("--start-up", action="store_true")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL")
    args = parser.parse_args()
    if args.start_up:
        start_up()
        return
    if args.memory:
        memory(args.size[0], args.batches[0], args.config)
        return
    precisions = args.precisions or [default_config().update_args(args.config).TRAIN.PRECISION]
    for precision in precisions:
        print(f"matrix product 2048 in {precision}: {matmul_rate(precision):.0f} GFLOP/s")
    rows = []
    for size in args.size:
        for images in args.batches:
            rows += compare(size, images, args.rounds, precisions, args.config, args.profile)
    headers = ["short edge", "images", "precision", "step s", "floor s", "step/floor", "floor GFLOP/s", "images/s",
               f"step / {precisions[0]}"]  # fmt: skip
    print("\n" + tabulate(rows, headers=headers, floatfmt=".3f"))


if __name__ == "__main__":
    main()
