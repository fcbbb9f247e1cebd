"""Finds the first operation of a graph whose output is not finite, and what in the batch it comes from.

The search starts at numbers that are not finite (losses, gradients) and goes back through inputs that are not finite
either. Where that ends is an operation that made such a value out of finite ones.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.tf_v1 import tf

__all__ = ["Operation", "Range", "first_bad_operation", "guilty_annotations"]

_PROJECT = Path(__file__).resolve().parent
_FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)

# What the field calls a part of the network, by the scopes of operations and variables.
_TERMS = [
    (r"(?:^|/)conv0(?:/|$)", "the backbone's first convolution"),
    (r"(?:^|/)group(\d)/block(\d+)/(?:(conv\w+)/)?", r"the backbone, stage C{0+2}, block {1}, {2}"),
    (r"(?:^|/)fpn/lateral_1x1_c(\d)", "the feature pyramid, lateral connection of C{0}"),
    (r"(?:^|/)fpn/posthoc_3x3_p(\d)", "the feature pyramid, output convolution of P{0}"),
    (r"(?:^|/)fpn(?:/|$)", "the feature pyramid"),
    (r"(?:^|/)rpn(?:_\d+)?/(\w+)", "the region proposal network, {0}"),
    (r"(?:^|/)cascade_rcnn_stage(\d)", "the cascade's box head {0}"),
    (r"(?:^|/)fastrcnn(?:_\d+)?/(?:(\w+)/)?", "the box head, {0}"),
    (r"(?:^|/)maskrcnn(?:_\d+)?/(?:(\w+)/)?", "the mask head, {0}"),
    (r"(?:^|/)keypointrcnn(?:_\d+)?/(?:(\w+)/)?", "the keypoint head, {0}"),
]
_ROOMS = {
    "basemodel.py": "the backbone", "model_backbones.py": "the backbone", "model_syncbn.py": "a batch norm",
    "model_box.py": "boxes, anchors and RoIs", "model_losses.py": "a loss", "model_fpn.py": "the feature pyramid",
    "model_rpn.py": "the region proposal network", "model_frcnn.py": "the box head", "model_cascade.py": "the cascade",
    "model_mrcnn.py": "the mask head", "model_keypoint.py": "the keypoint head", "model_rcnn.py": "the detector",
    "trainers.py": "the optimiser", "training_guard.py": "the optimiser",
}  # fmt: skip


class Range(NamedTuple):
    """The values of a tensor."""

    name: str
    shape: tuple[int, ...]
    low: float  # of those that are finite; NaN if there are none
    high: float
    nan: int  # how many are NaN
    infinite: int

    def __str__(self) -> str:
        text = f"{self.name} {list(self.shape)}: {self.low:.6g} to {self.high:.6g}"
        if self.nan or self.infinite:
            text += f", and {self.infinite} infinite and {self.nan} NaN of {int(np.prod(self.shape))}"
        return text


class Operation(NamedTuple):
    """An operation that made values that are not finite."""

    name: str
    kind: str  # TensorFlow's type
    layer: str  # in the terms of the field
    source: str  # "model_rpn.py:120 rpn_losses": the line of code that made it, or ""
    inputs: list[Range]
    output: Range
    place: tuple[int, ...]  # of the first such value in its output
    values_there: list[float]  # of inputs of the same shape, and of the output, at this place


def value_range(name: str, value: Any) -> Range:
    array = np.asarray(value)
    numbers = array.astype(np.float64) if array.dtype.kind != "b" else array.astype(np.uint8)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
    return Range(name, array.shape, low, high, int(np.isnan(numbers).sum()), int(np.isinf(numbers).sum()))


# ----------------------------------------------------------------------------------------------- the operation
def first_bad_operation(
    sess: Any, targets: Sequence[Any], feed: Mapping[Any, np.ndarray], companions: Sequence[Any] = ()
) -> Operation | None:
    """The first operation, in the order of computation, that made a value that is not finite and reached one of the
    targets; None if the targets are finite. companions: tensors that must be computed in the same run, because
    replicas exchange sums. Adds operations to the session's graph."""
    fed = {tensor.ref() for tensor in feed}
    order = _ancestors([t.op for t in targets], fed)
    number = {op: i for i, op in enumerate(order)}
    tensors = [t for op in order for t in op.outputs if _can_be_fetched(t) and t.ref() not in fed]
    graph = sess.graph
    with graph.as_default(), tf.control_dependencies(None):
        flags = [tf.reduce_all(tf.math.is_finite(t)) for t in tensors]
    known, _ = sess.run([flags, list(companions)], dict(feed))
    bad = {t.ref() for t, finite in zip(tensors, known) if not finite and t.op.type != "Const"}
    bad |= {t.ref() for t, value in feed.items() if value.dtype.kind == "f" and not np.isfinite(value).all()}

    # Back from the targets. Operations inside conditionals cannot be looked at and are passed through.
    roots, seen, waiting = [], set(), [t.op for t in targets if t.ref() in bad]
    while waiting:
        op = waiting.pop()
        if op in seen:
            continue
        seen.add(op)
        before = [t for t in op.inputs if t.ref() in bad or (_is_hidden(t.op) and t.ref() not in fed)]
        if any(t.ref() in bad for t in op.outputs) and not before:
            roots.append(op)
        for t in before:
            if t.ref() in fed:
                roots.append(t.op)
            else:
                waiting.append(t.op)
    if not roots:
        return None
    # An operation that is given an infinite constant (for what is left out) is a less likely cause than others.
    infinite = {t.op for t, finite in zip(tensors, known) if not finite and t.op.type == "Const"}
    op = min(roots, key=lambda op: (any(t.op in infinite for t in op.inputs), number.get(op, -1)))
    return _describe(sess, op, bad, feed, companions)


def _ancestors(ops: Sequence[Any], fed: set) -> list[Any]:
    """All operations that these need, each after those it needs."""
    order, done, stack = [], set(), [(op, False) for op in ops]
    while stack:
        op, ready = stack.pop()
        if ready:
            order.append(op)
        elif op not in done:
            done.add(op)
            stack.append((op, True))
            if not any(t.ref() in fed for t in op.outputs):
                stack += [(t.op, False) for t in op.inputs]
    return order


def _is_hidden(op: Any) -> bool:
    return op._get_control_flow_context() is not None


def _can_be_fetched(tensor: Any) -> bool:
    return tensor.dtype in _FLOATS and not _is_hidden(tensor.op) and tensor.op.type != "Placeholder"


def _describe(sess: Any, op: Any, bad: set, feed: Mapping[Any, np.ndarray], companions: Sequence[Any]) -> Operation:
    fed = {tensor.ref(): np.asarray(value) for tensor, value in feed.items()}
    numeric = [t for t in op.inputs if (t.dtype.is_floating or t.dtype.is_integer or t.dtype.is_bool)]
    numeric = [t for t in numeric if not _is_hidden(t.op)] if not any(t.ref() in fed for t in op.outputs) else []
    output = next(t for t in op.outputs if t.ref() in bad)
    wanted = [t for t in [*numeric, output] if t.ref() not in fed]
    fetched, _ = sess.run([wanted, list(companions)], dict(feed))
    values = fed | {t.ref(): np.asarray(v) for t, v in zip(wanted, fetched)}
    result = values[output.ref()].astype(np.float64)
    place = tuple(int(i) for i in np.argwhere(~np.isfinite(result))[0]) if result.ndim else ()
    there = [values[t.ref()] for t in numeric if values[t.ref()].shape == result.shape]
    return Operation(
        op.name, op.type, layer_of(op), source_of(op), [value_range(t.name, values[t.ref()]) for t in numeric],
        value_range(output.name, result), place, [float(v[place]) for v in [*there, result]],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- names
def layer_of(op: Any) -> str:
    """The part of the network an operation belongs to, in the terms of the field."""
    backward = (
        "the backward pass of " if op.name.split("/")[0].startswith("gradients") or "/gradients" in op.name else ""
    )
    forward = _forward(op)
    for pattern, term in _TERMS:
        if match := re.search(pattern, forward.name):
            groups = [g or "" for g in match.groups()]
            text = term.replace("{0+2}", str(int(groups[0]) + 2) if "{0+2}" in term else "")
            return backward + text.format(*groups).rstrip(", ")
    file = source_of(op).split(":")[0]
    return backward + _ROOMS.get(file, f"code of {file}" if file else "the graph")


def source_of(op: Any) -> str:
    """The line of this project, or of your own code, that made an operation: "FILE:LINE FUNCTION", or ""."""
    frames = [(f.filename, f.lineno, f.name) for f in _forward(op).traceback]
    own = [f for f in frames if f"{os.sep}site-packages{os.sep}" not in f[0] and not f[0].startswith(os.__file__[:-5])]
    own = [f for f in own if Path(f[0]).name not in ("trainers.py", "training.py", "replay_graph.py")] or own
    if not own:
        return ""
    file, line, function = own[-1]
    path = Path(file)
    shown = path.relative_to(_PROJECT) if path.is_relative_to(_PROJECT) else path
    return f"{shown}:{line} {function}"


def _forward(op: Any) -> Any:
    """The operation of which this one is a gradient, else itself."""
    while getattr(op, "_original_op", None) is not None:
        op = op._original_op
    return op


# ------------------------------------------------------------------------------------------------- the batch
def guilty_annotations(
    batch: dict[str, np.ndarray], is_bad: Callable[[dict[str, np.ndarray]], bool]
) -> tuple[str, int | None, list[int]]:
    """What in a bad batch its badness comes from: (kind, image, annotations).

    "annotations": without these annotations of the image the numbers are finite; "pixels": without any annotation
    they are not, without the pixels too they are; "several": only without those of several images; "weights": not even
    a batch of nothing is finite. is_bad(batch) says whether the numbers of a batch are not finite.
    """
    images = len(batch["image"])

    def left(keep: Callable[[int], np.ndarray], pixels: bool = True) -> dict[str, np.ndarray]:
        """The batch with those annotations that keep(image) chooses; with pixels=False, with a grey picture."""
        changed = {k: v.copy() for k, v in batch.items()}
        for n in range(images):
            out = ~keep(n)
            changed["gt_labels"][n, out] = 0
            changed["gt_is_crowd"][n, out] = False
            for key in ("gt_boxes", "gt_edges", "gt_keypoints"):
                if key in changed:
                    changed[key][n, out] = 0
        if not pixels:
            changed["image"][:] = 128
        return changed

    size = batch["gt_labels"].shape[1]
    everything, nothing = np.ones(size, bool), np.zeros(size, bool)
    if is_bad(left(lambda n: nothing)):
        return ("weights", None, []) if is_bad(left(lambda n: nothing, pixels=False)) else ("pixels", None, [])

    def without(image: int) -> dict[str, np.ndarray]:
        return left(lambda k: nothing if k == image else everything)

    image = next((n for n in range(images) if not is_bad(without(n))), None)
    if image is None:
        return "several", None, []

    def bad_without(out: list[int]) -> bool:
        keep = everything.copy()
        keep[out] = False
        return is_bad(left(lambda k: keep if k == image else everything))

    guilty = np.flatnonzero(batch["gt_labels"][image] > 0).tolist()
    while len(guilty) > 1:
        half = len(guilty) // 2
        smaller = next((part for part in (guilty[:half], guilty[half:]) if not bad_without(part)), None)
        if smaller is None:
            break
        guilty = smaller
    return "annotations", image, guilty
