"""Parameters and multiply-adds of a detector, counted in its graph without running it.

Counted are convolutions and matrix products. A multiplication with its addition is 1, as in detectron2's tables
(fvcore). Not counted, as there: norms and activations, RoIAlign, non-maximum suppression.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from config import Config
from model_rcnn import build_inference
from utils.tf_v1 import graphs_for_gpu, tf

__all__ = ["Training", "count", "count_training"]

# Scopes of variables and operations -> the part they belong to; stage 5 is a head in C4, else the backbone's.
_PARTS = [
    (r"conv0|group[0-2]|backbone", "backbone"),
    (r"fpn", "FPN"),
    (r"rpn", "RPN"),
    (r"fastrcnn|cascade_rcnn_stage\d|group3", "box head"),
    (r"maskrcnn", "mask head"),
    (r"keypointrcnn", "keypoint head"),
]
_HEADS = ("box head", "mask head", "keypoint head")  # these see RoIs, as many rows as there are
_STATISTICS = re.compile(r"/(mean|variance)/EMA$")


def count(cfg: Config, height: int, width: int, proposals: int = 1000, detections: int = 100) -> dict[str, Any]:
    """{parameters, trainable, macs, parts: {part: the same three}, size: [height, width] after padding, proposals,
    detections} for an image of height x width; settings without classes use COCO's 80."""
    height, width = (-(-side // 32) * 32 for side in (height, width))
    with graphs_for_gpu(True):  # where a grouped convolution is one operation; some CPUs have none with a gradient
        graph, labels, trained, variables = _graph(cfg, height, width)
    parts = {part: {"parameters": 0, "trainable": 0, "macs": 0} for part in dict(_PARTS).values()}
    for name, size in variables.items():
        if not _STATISTICS.search(name):
            numbers = parts[_part(name, cfg)]
            numbers["parameters"] += size
            numbers["trainable"] += size if name in trained else 0
    after_detection = _consumers(labels.op)
    for op in graph.get_operations():
        part = _part(op.name, cfg)
        if op.type not in _MULTIPLY_ADDS or part is None:
            continue
        rows, macs = _MULTIPLY_ADDS[op.type](op)
        if rows is None and part in _HEADS:
            if op in after_detection:
                # C4 shares stage 5 with the box head.
                part, rows = ("mask head" if part == "box head" else part), detections
            else:
                rows = proposals
        if rows is None or macs is None:
            raise RuntimeError(f"the graph does not say what shape {op.name} has")
        parts[part]["macs"] += rows * macs
    parts = {part: numbers for part, numbers in parts.items() if any(numbers.values())}
    total = {key: sum(numbers[key] for numbers in parts.values()) for key in ("parameters", "trainable", "macs")}
    return {**total, "parts": parts, "size": [height, width], "proposals": proposals, "detections": detections}


class Training(NamedTuple):
    """Multiply-adds of a training step's image, forward and backward."""

    of_pixel: dict[bool, float]  # whether the kernel is larger than 1 x 1 -> multiply-adds per pixel
    of_rois: dict[bool, float]  # the same of the heads on the image's sampled RoIs

    def of_image(self, pixels: float) -> dict[bool, float]:
        return {large: self.of_pixel[large] * pixels + self.of_rois[large] for large in (False, True)}


def count_training(cfg: Config, side: int = 256) -> Training:
    """The multiply-adds of training on an image: heads see FRCNN.BATCH_PER_IM RoIs, masks and keypoints their
    foreground.

    A product whose kernel is trained is computed three times, forward and for two gradients. What comes before the
    first trained kernel has no gradients; a frozen kernel after it has one.
    """
    graph, labels, trained, _ = _graph(cfg, side, side)
    foreground = int(cfg.FRCNN.BATCH_PER_IM * cfg.FRCNN.FG_RATIO)
    after_detection = _consumers(labels.op)
    counted = {pixel: dict.fromkeys((False, True), 0.0) for pixel in (False, True)}
    begun = False
    for op in graph.get_operations():
        part = _part(op.name, cfg)
        if op.type not in _MULTIPLY_ADDS or part is None:
            continue
        if op in after_detection and part == "box head":  # C4: training has the features of all RoIs already
            continue
        rows, macs = _MULTIPLY_ADDS[op.type](op)
        if rows is None:
            rows = foreground if op in after_detection else cfg.FRCNN.BATCH_PER_IM
        learns = bool(_variables_of(op) & trained)
        times = 1 + learns + begun
        begun = begun or learns
        kernel = op.inputs[1].shape.as_list()
        large = "Conv" in op.type and max(kernel[:2]) > 1
        counted[part not in _HEADS][large] += times * rows * macs
    pixels = side * side
    return Training({large: n / pixels for large, n in counted[True].items()}, counted[False])


def _graph(cfg: Config, height: int, width: int) -> tuple[Any, Any, set[str], dict[str, int]]:
    """(graph of a prediction, its tensor of labels, names of trained variables, {name: size of every variable}).
    Settings without classes get COCO's 80."""
    if not cfg.DATA.NUM_CATEGORY:
        cfg = cfg.copy()
        cfg.DATA.NUM_CATEGORY = 80
        cfg.freeze()
    with tf.Graph().as_default() as graph:
        image = tf.placeholder(tf.uint8, [1, height, width, 3])
        outputs = build_inference(image, tf.constant([[height, width]]), cfg)
        trained = {v.op.name for v in tf.trainable_variables()}
        variables = {v.op.name: int(np.prod(v.shape.as_list())) for v in tf.global_variables()}
    if cfg.TRAIN.FREEZE_PATTERN:
        trained = {name for name in trained if not re.search(cfg.TRAIN.FREEZE_PATTERN, name)}
    return graph, outputs["labels"], trained, variables


def _variables_of(op: Any) -> set[str]:
    """Names of what the kernel of this product is computed from: its variable, and those of a norm folded into it."""
    todo, found = [op.inputs[1].op], set()
    while todo:
        source = todo.pop()
        if source.name not in found:
            found.add(source.name)
            todo += [tensor.op for tensor in source.inputs]
    return found


def _part(name: str, cfg: Config) -> str | None:
    """The part of the model to which a variable or operation belongs; None for others, e.g. post-processing."""
    if cfg.MODE_FPN and name.startswith("group3"):
        return "backbone"
    return next((part for pattern, part in _PARTS if re.match(rf"({pattern})(_\d+)?/", name)), None)


def _consumers(op: Any) -> set[Any]:
    """All operations that depend on `op`, directly or indirectly."""
    todo, found = [op], set()
    while todo:
        for output in todo.pop().outputs:
            new = [consumer for consumer in output.consumers() if consumer not in found]
            found.update(new)
            todo += new
    return found


# ------------------------------------------------------------------------------ (rows, multiply-adds of a row) of an op
def _product(*numbers: int | None) -> int | None:
    return None if None in numbers else math.prod(numbers)


def _convolution(op: Any) -> tuple[int | None, int | None]:
    """Each output is a sum over the kernel and the channels of a group."""
    rows, *out = op.outputs[0].shape.as_list()
    return rows, _product(*out, *op.inputs[1].shape.as_list()[:3])


def _depthwise(op: Any) -> tuple[int | None, int | None]:
    rows, *out = op.outputs[0].shape.as_list()
    return rows, _product(*out, *op.inputs[1].shape.as_list()[:2])


def _transposed(op: Any) -> tuple[int | None, int | None]:
    """Each input is multiplied with the whole kernel."""
    rows, height, width, _ = op.inputs[2].shape.as_list()
    return rows, _product(height, width, *op.inputs[1].shape.as_list())


def _matmul(op: Any) -> tuple[int | None, int | None]:
    a, out = op.inputs[0].shape.as_list(), op.outputs[0].shape.as_list()
    return out[0], _product(*out[1:], a[-2] if _transposes_first(op) else a[-1])


def _transposes_first(op: Any) -> bool:
    return op.get_attr("transpose_a") if op.type == "MatMul" else op.get_attr("adj_x")


_MULTIPLY_ADDS = {
    "Conv2D": _convolution,
    "DepthwiseConv2dNative": _depthwise,
    "Conv2DBackpropInput": _transposed,
    "MatMul": _matmul,
    "BatchMatMulV2": _matmul,
}
