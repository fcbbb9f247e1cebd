#!/usr/bin/env python3
"""Parameters and multiply-adds of the detector that some settings describe, part by part.

    tools/flops.py --config MODE_FPN=True BACKBONE.RESNET_NUM_BLOCK=[3,4,23,3] --size 800 1333

Counted are convolutions and matrix products of one prediction, from the shapes in its graph, without running it: the
image at --size, padded to a multiple of 32; the box head on --proposals; mask and keypoint heads on --detections.
A multiplication with its addition is counted as 1, as in detectron2's tables (fvcore). Not counted, as there: norms and
activations, RoIAlign, non-maximum suppression. Parameters are weights, biases and affine parameters of norms.
"""

import import_path

import argparse
import math
import re
import sys
from typing import Any

import numpy as np
from tabulate import tabulate

from common import UserError, check_output_file, logger, path_argument, write_json
from config import Config, default_config, finalize_config

__all__ = ["count"]

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
    from model_rcnn import build_inference
    from utils.tf_v1 import tf

    if not cfg.DATA.NUM_CATEGORY:
        cfg = cfg.copy()
        cfg.DATA.NUM_CATEGORY = 80
        cfg.freeze()
    height, width = (-(-side // 32) * 32 for side in (height, width))
    with tf.Graph().as_default() as graph:
        image = tf.placeholder(tf.uint8, [1, height, width, 3])
        outputs = build_inference(image, tf.constant([[height, width]]), cfg)
        trained = {v.op.name for v in tf.trainable_variables()}
        variables = {v.op.name: int(np.prod(v.shape.as_list())) for v in tf.global_variables()}
    if cfg.TRAIN.FREEZE_PATTERN:
        trained = {name for name in trained if not re.search(cfg.TRAIN.FREEZE_PATTERN, name)}
    parts = {part: {"parameters": 0, "trainable": 0, "macs": 0} for part in dict(_PARTS).values()}
    for name, size in variables.items():
        if not _STATISTICS.search(name):
            part = parts[_part(name, cfg)]
            part["parameters"] += size
            part["trainable"] += size if name in trained else 0
    after_detection = _consumers(outputs["labels"].op)
    for op in graph.get_operations():
        part = _part(op.name, cfg)
        if op.type not in _MULTIPLY_ADDS or part is None:
            continue
        rows, macs = _MULTIPLY_ADDS[op.type](op)
        if rows is None and part in _HEADS:
            if op in after_detection:
                part, rows = (
                    (part if part != "box head" else "mask head"),
                    detections,
                )  # C4 shares stage 5 with the box head
            else:
                rows = proposals
        if rows is None or macs is None:
            raise RuntimeError(f"the graph does not say what shape {op.name} has")
        parts[part]["macs"] += rows * macs
    parts = {part: numbers for part, numbers in parts.items() if any(numbers.values())}
    total = {key: sum(numbers[key] for numbers in parts.values()) for key in ("parameters", "trainable", "macs")}
    return {**total, "parts": parts, "size": [height, width], "proposals": proposals, "detections": detections}


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


# ------------------------------------------------------------------------------------------------------ command line
def table(counted: dict[str, Any]) -> str:
    def row(name: str, numbers: dict[str, int]) -> list[str]:
        gigas = numbers["macs"] / 1e9
        return [name, *(f"{numbers[key] / 1e6:.2f}" for key in ("parameters", "trainable")), f"{gigas:.2f}",
                f"{2 * gigas:.2f}"]  # fmt: skip

    rows = [row(part, numbers) for part, numbers in counted["parts"].items()] + [row("total", counted)]
    height, width = counted["size"]
    title = (
        f"{height}x{width} image, {counted['proposals']} proposals, {counted['detections']} detections; "
        "a multiply-add is one FLOP, or two in the last column"
    )
    headers = ["part", "parameters (M)", "trained (M)", "GFLOPs", "x 2"]
    return title + "\n" + tabulate(rows, headers, "simple", stralign="right", colalign=("left",))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings as for train.py")
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--proposals", type=int, default=1000, metavar="N", help="RoIs of the box head")
    parser.add_argument("--detections", type=int, default=100, metavar="N", help="RoIs of mask and keypoint heads")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="write the numbers there too")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_output_file(args.json, "--json")
        if min(args.size) < 1 or min(args.proposals, args.detections) < 0:
            raise UserError(f"--size {args.size[0]} {args.size[1]}: height and width in pixels, 1 or more")
        cfg = finalize_config(default_config().update_args(args.config))
        from model_rcnn import check_own_parts

        check_own_parts(cfg)
        counted = count(cfg, *args.size, args.proposals, args.detections)
        print(table(counted))
        if args.json:
            write_json(args.json, counted, indent=1)
    except UserError as e:
        logger.error(str(e))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
