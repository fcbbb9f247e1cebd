#!/usr/bin/env python3
"""What a GPU will not compute itself, and where it and the host wait for each other, from the graphs alone.

    tools/gpu_audit.py --config MODE_FPN=True

No GPU is needed: TensorFlow's package lists its kernels for GPUs everywhere. A line per graph, then
- operations that have no GPU kernel for their types: they run on the CPU, with their inputs and results copied;
- crossings: tensors that depend on pixels, annotations or weights and that one side makes and the other needs. Kernels
  for GPUs take small integers from host memory and leave them there. Each of these that goes to the host lets the GPU
  run empty while the host waits; in a loop it does so once per pass. Shapes and constants are not counted: the host
  knows them beforehand.
The graph optimiser, which moves small integer operations to the host, is not considered.
"""

import import_path

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tabulate import tabulate

from common import errors_in_one_line
from config import Config, default_config, finalize_config
from config_files import settings_words
from config_recipes import recipe_settings
from data import training_keys
from model_rcnn import build_inference
from trainers import DetectionModel
from training_plan import make_plan
from utils.tensorpack_import import TowerContext
from utils.tf_v1 import graphs_for_gpu, registered_kernels, tf

__all__ = ["Audit", "audit", "inference_graph", "training_graph"]


class Crossing(NamedTuple):
    """A tensor that is made on one side and used on the other."""

    made_by: str  # type of the operation
    used_by: str
    dtype: str
    name: str  # of the operation that uses it


class Audit(NamedTuple):
    operations: int
    without_kernel: Counter[str]  # types of operations that no GPU kernel computes, with their number
    to_host: list[Crossing]
    from_host: list[Crossing]


# Results that are known when the graph starts, or that the host computes without the values of their inputs.
_KNOWN = {"Const", "Shape", "ShapeN", "Size", "Rank", "VarHandleOp", "NoOp"}
# Their GPU kernels wait for the number of results, with which the output is allocated.
_WAIT_FOR_COUNT = {"Where", "Unique", "UniqueV2", "DynamicPartition", "NonMaxSuppressionV3", "NonMaxSuppressionV4"}
# Where a function is called, only the call would be seen. Graphs of this project have none.
_CALLS = {"PartitionedCall", "StatefulPartitionedCall", "If", "StatelessIf", "While", "StatelessWhile", "Case"}


# ------------------------------------------------------------------------------------------------------------- kernels
def _kernel(op: Any, kernels: dict[str, list[Any]]) -> Any:
    """The kernel that a GPU runs for an operation of these types: its own, or one that serves every device. None
    without one."""
    if op.type not in kernels:
        kernels[op.type] = registered_kernels(op.type)
    fitting = [k for k in kernels[op.type] if not k.label and all(_allows(c, op) for c in k.constraint)]
    for device in ("GPU", "DEFAULT"):
        of_device = [k for k in fitting if k.device_type == device]
        if of_device:
            return max(of_device, key=lambda k: k.priority)
    return None


def _allows(constraint: Any, op: Any) -> bool:
    """Whether the types that a kernel is registered for include the operation's."""
    allowed = constraint.allowed_values.list.type
    if not allowed:
        return True
    try:
        value = op.get_attr(constraint.name)
    except ValueError:  # the operation has no such attribute
        return False
    values = value if isinstance(value, (list, tuple)) else [value]
    return all(tf.as_dtype(v).as_datatype_enum in allowed for v in values)


def _in_host_memory(args: Iterable[Any], op: Any, names: set[str]) -> list[bool]:
    """For each tensor of an operation's inputs or outputs (`args` of its definition): the kernel has it on the host."""
    result: list[bool] = []
    for arg in args:
        number = 1
        if arg.number_attr:
            number = op.get_attr(arg.number_attr)
        elif arg.type_list_attr:
            number = len(op.get_attr(arg.type_list_attr))
        result += [arg.name in names] * number
    return result


# --------------------------------------------------------------------------------------------------------------- audit
def audit(graph: Any) -> Audit:
    """Looks up every operation of a graph as if it had been placed on a GPU, but for those that are on the CPU by
    choice."""
    operations = graph.get_operations()
    kernels: dict[str, list[Any]] = {}
    without: Counter[str] = Counter()
    inputs_on_host, outputs_on_host = {}, {}
    for op in operations:
        if op.type in _CALLS:
            raise NotImplementedError(f"{op.name} is a {op.type}, whose function would have to be looked into")
        kernel = _kernel(op, kernels)
        chosen = "CPU" in op.device.upper()
        if kernel is None or chosen:
            if not chosen:
                without[op.type] += 1
            inputs_on_host[op], outputs_on_host[op] = [True] * len(op.inputs), [True] * len(op.outputs)
        else:
            names = set(kernel.host_memory_arg)
            inputs_on_host[op] = _in_host_memory(op.op_def.input_arg, op, names)
            outputs_on_host[op] = _in_host_memory(op.op_def.output_arg, op, names)
    dependent = _depend_on_data(operations)
    crossings: dict[tuple[str, bool], Crossing] = {}  # by tensor and direction: it is copied once for all users
    for op in operations:
        for tensor, wanted_on_host in zip(op.inputs, inputs_on_host[op]):
            maker = tensor.op
            on_host = outputs_on_host[maker][tensor.value_index]
            if maker in dependent and not maker.type.startswith("Placeholder") and on_host != wanted_on_host:
                crossing = Crossing(maker.type, op.type, tensor.dtype.base_dtype.name, op.name)
                crossings.setdefault((tensor.name, wanted_on_host), crossing)
        if op.type in _WAIT_FOR_COUNT and op in dependent:
            crossings[op.name, True] = Crossing(op.type, "its result's size", "int32", op.name)
    return Audit(
        len(operations), without,
        [c for (_, to_host), c in crossings.items() if to_host],
        [c for (_, to_host), c in crossings.items() if not to_host],
    )  # fmt: skip


def _depend_on_data(operations: Sequence[Any]) -> set[Any]:
    """The operations whose results depend on what is fed or on variables; sizes of tensors do not count as results."""
    todo = [op for op in operations if op.type.startswith("Placeholder") or op.type in ("ReadVariableOp", "Where")]
    found: set[Any] = set()
    while todo:
        op = todo.pop()
        if op not in found and op.type not in _KNOWN:
            found.add(op)
            todo += [user for tensor in op.outputs for user in tensor.consumers()]
    return found


# -------------------------------------------------------------------------------------------------------------- graphs
def training_graph(cfg: Config) -> Any:
    """The graph of a training step on one GPU: losses, gradients and the optimiser's update."""
    keys = training_keys(cfg)
    with tf.Graph().as_default() as graph, graphs_for_gpu(True):
        model = DetectionModel(cfg, make_plan(cfg, 1, cfg.TRAIN.BATCH_SIZE_PER_GPU), keys)
        inputs = [tf.placeholder(spec.dtype, spec.shape, spec.name) for spec in model.inputs()]
        with TowerContext("", is_training=True):
            cost = model.build_graph(*inputs)
            optimizer = model.optimizer()
            pairs = [(g, v) for g, v in optimizer.compute_gradients(cost) if g is not None]
            optimizer.apply_gradients(pairs)
    return graph


def inference_graph(cfg: Config) -> Any:
    """The graph of a prediction, for any number of images."""
    with tf.Graph().as_default() as graph, graphs_for_gpu(True):
        image = tf.placeholder(tf.uint8, [None, None, None, 3], "image")
        build_inference(image, tf.placeholder(tf.int32, [None, 2], "image_shape"), cfg)
    return graph


# -------------------------------------------------------------------------------------------------------- command line
def summary(name: str, found: Audit, places: bool) -> str:
    """What `audit` found, as text; places: the names of the operations too."""
    lines = [
        f"{name}: {found.operations} operations; crossings: {len(found.to_host)} to the host, "
        f"{len(found.from_host)} from it"
    ]
    missing = ", ".join(f"{kind} ({count})" for kind, count in found.without_kernel.most_common())
    lines.append(f"without a GPU kernel: {missing or 'none'}")
    for title, crossings in (("to the host", found.to_host), ("from the host", found.from_host)):
        if places:
            rows = [[c.made_by, c.used_by, c.dtype, c.name] for c in crossings]
            headers = [title, "used by", "type", "place"]
        else:
            counted = Counter((c.made_by, c.used_by, c.dtype) for c in crossings).most_common()
            rows = [[count, *kind] for kind, count in counted]
            headers = ["number", title, "used by", "type"]
        lines.append(tabulate(rows, headers, "simple"))
    return "\n\n".join(lines)


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", metavar="NAME", help="settings of a recipe (train.py --recipe list)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings as for train.py")
    parser.add_argument("--places", action="store_true", help="each crossing's place in the graph")
    args = parser.parse_args(argv)
    words = [*(recipe_settings(args.recipe) if args.recipe else []), *settings_words(args.config)]
    settings = ["DATA.NUM_CATEGORY=80", "TRAIN.LR_SCALING=none", "TRAIN.LR_SCHEDULE=2x", *words]
    cfg = finalize_config(default_config().update_args(settings))
    print(summary("a training step", audit(training_graph(cfg)), args.places))
    print()
    print(summary("a prediction", audit(inference_graph(cfg)), args.places))
    return 0


if __name__ == "__main__":
    sys.exit(main())
