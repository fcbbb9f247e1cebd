"""From a frozen TensorFlow graph to ONNX (opset 18): the operations of detectors, one function for each kind.

Tensors keep TensorFlow's layout NHWC; a convolution stands between two transpositions, which ONNX Runtime removes where
they meet. RoI features and non-maximum suppression become ONNX's own operations; loops become Loop.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, atomic_write
from config import Config
from detections import Detections
from export_graph import paste_rows
from export_model import Frozen, found_in
from utils.tf_v1 import function_to_graph, tf

__all__ = ["OPERATIONS", "convert", "onnx_module", "onnx_runtime", "onnx_runner", "write_onnx", "write_paste_masks"]

_OPSET, _IR_VERSION = 18, 9  # read by ONNX Runtime from 1.14 on
_MAX = np.iinfo(np.int64).max
# A scope of model_box.py whose content is one operation of ONNX.
_REGION = re.compile(r"(?P<scope>(.*/)?roi_(?P<kind>align|pool)_(?P<size>\d+)(x(?P<samples>\d+))?(_\d+)?)/crops")


def onnx_module() -> Any:
    try:
        import onnx
    except ImportError:
        raise UserError("--format onnx needs the package onnx: pip install -r requirements-export.txt") from None
    return onnx


def onnx_runtime() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UserError("the proof of ONNX needs onnxruntime: pip install -r requirements-export.txt") from None
    return onnxruntime


# ------------------------------------------------------------------------------------------------------ whole models
def write_onnx(path: Path, frozen: Frozen, cfg: Config) -> None:
    """The detector as one file: `images` uint8 [N,H,W,3] RGB -> the outputs of `export_graph.detect`. Class names and
    settings are in its metadata, as JSON."""
    outputs = {key: name for key, name in frozen.outputs["images"].items() if key != "masks"}
    metadata = {"class_names": json.dumps(list(cfg.DATA.CLASS_NAMES)), "settings": json.dumps(cfg.to_dict())}
    model = convert(frozen.graph_def, {"images": "images:0"}, outputs, metadata)
    with atomic_write(path, "wb") as f:
        f.write(model.SerializeToString())


def write_paste_masks(path: Path, cells: int) -> None:
    """A small file that makes masks of an image's size: `box_masks` [F,M,M] and `boxes` [F,4] of the detector, for
    `size` int32 [2] (height and width of the image) -> `masks` uint8 [F,height,width]."""
    with tf.Graph().as_default() as graph:
        masks = tf.placeholder(tf.float32, [None, cells, cells], "box_masks")
        boxes, size = tf.placeholder(tf.float32, [None, 4], "boxes"), tf.placeholder(tf.int32, [2], "size")
        tf.identity(paste_rows(masks, boxes, size), "masks")
    inputs = {name: f"{name}:0" for name in ("box_masks", "boxes", "size")}
    model = convert(graph.as_graph_def(), inputs, {"masks": "masks:0"}, {})
    with atomic_write(path, "wb") as f:
        f.write(model.SerializeToString())


def onnx_runner(path: Path, paste: Path | None) -> Callable[[np.ndarray], Detections]:
    """run(uint8 BGR [H,W,3]) -> detections, by ONNX Runtime on the CPU; paste: the file of `write_paste_masks`."""

    def start(file: Path) -> Any:
        options = onnx_runtime().SessionOptions()
        options.log_severity_level = 3
        return onnx_runtime().InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    session, paster = start(path), start(paste) if paste else None
    names = [output.name for output in session.get_outputs()]

    def run(image: np.ndarray) -> Detections:
        outputs = dict(zip(names, session.run(names, {"images": np.ascontiguousarray(image[None, :, :, ::-1])})))
        if paster:
            count, size = int(outputs["count"][0]), np.array(image.shape[:2], np.int32)
            given = {"box_masks": outputs["box_masks"][0, :count], "boxes": outputs["boxes"][0, :count], "size": size}
            outputs["masks"] = paster.run(["masks"], given)[0][None]
        return found_in(outputs, *image.shape[:2])

    return run


# ------------------------------------------------------------------------------------------------------ the conversion
class Builder:
    """The nodes of an ONNX graph, or of a loop's body, which also sees the values of the graph around it."""

    def __init__(self, around: "Builder | None" = None):
        self.onnx = onnx_module()
        self.nodes: list[Any] = []
        self.values: dict[Any, str] = {}  # TensorFlow's tensor (its `ref`) -> name in ONNX
        self.around = around
        self.root: Builder = around.root if around else self
        if around is None:
            self.initializers: list[Any] = []
            self.constants: dict[Any, str] = {}
            self.count = 0

    def name(self, kind: str) -> str:
        self.root.count += 1
        return f"{kind}_{self.root.count}"

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Appends a node -> the name of its output, or a list of names if `outputs` is not 1."""
        names = [self.name(kind) for _ in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = None) -> str:
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 64 else None
        if key in self.root.constants and key is not None:
            return self.root.constants[key]
        name = self.name("const")
        self.root.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        if key is not None:
            self.root.constants[key] = name
        return name

    def int64(self, *values: int) -> str:
        """A constant vector."""
        return self.constant(np.array(values, np.int64))

    def cast(self, name: str, dtype: Any) -> str:
        return self.add("Cast", name, to=self.type_of(dtype))

    def type_of(self, dtype: Any) -> int:
        dtype = tf.as_dtype(dtype)
        if dtype == tf.bfloat16:
            return self.onnx.TensorProto.BFLOAT16
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype.as_numpy_dtype))

    def shape(self, name: str, *axes: int) -> str:
        """int64 vector: the sizes along these axes, all if none is given."""
        whole = self.add("Shape", name)
        return self.add("Gather", whole, self.int64(*axes)) if axes else whole

    def concat(self, *names: str, axis: int = 0) -> str:
        return self.add("Concat", *names, axis=axis) if len(names) > 1 else names[0]

    def reshape(self, name: str, shape: str | Sequence[int]) -> str:
        return self.add("Reshape", name, shape if isinstance(shape, str) else self.int64(*shape), allowzero=1)

    def transpose(self, name: str, *perm: int) -> str:
        return self.add("Transpose", name, perm=list(perm))

    def squeeze(self, name: str, *axes: int) -> str:
        return self.add("Squeeze", name, self.int64(*axes))

    def unsqueeze(self, name: str, *axes: int) -> str:
        return self.add("Unsqueeze", name, self.int64(*axes))

    def fill(self, shape: str, value: Any, dtype: Any) -> str:
        """A tensor of this shape (int64 vector) of one value."""
        tensor = self.onnx.numpy_helper.from_array(np.array([value], tf.as_dtype(dtype).as_numpy_dtype))
        return self.add("ConstantOfShape", shape, value=tensor)

    def slice(self, name: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.add("Slice", name, *(self.int64(v) for v in (start, end, axis, step)))


def convert(graph_def: Any, inputs: dict[str, str], outputs: dict[str, str], metadata: dict[str, str]) -> Any:
    """The ONNX model of a frozen graph. inputs, outputs: {name in ONNX: name of TensorFlow's tensor}. UserError if an
    operation has no counterpart."""
    builder = Builder()
    onnx = builder.onnx
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        functions = {f.signature.name: f for f in graph_def.library.function}

        def describe(name: str, tensor: Any) -> Any:
            rank = tensor.shape.ndims or 0
            sizes = (
                [s if s is not None else f"{name}_{i}" for i, s in enumerate(tensor.shape.as_list())] if rank else []
            )
            if name == "images":
                sizes = ["N", "H", "W", 3]
            return onnx.helper.make_tensor_value_info(name, builder.type_of(tensor.dtype), sizes)

        given = {name: graph.get_tensor_by_name(tensor) for name, tensor in inputs.items()}
        wanted = {name: graph.get_tensor_by_name(tensor) for name, tensor in outputs.items()}
        for name, tensor in given.items():
            builder.values[tensor.ref()] = name
        _convert_tensors(builder, list(wanted.values()), functions)
        for name, tensor in wanted.items():
            builder.nodes.append(onnx.helper.make_node("Identity", [builder.values[tensor.ref()]], [name]))
        body = onnx.helper.make_graph(
            builder.nodes, "detector", [describe(n, t) for n, t in given.items()],
            [describe(n, t) for n, t in wanted.items()], builder.initializers,
        )  # fmt: skip
    model = onnx.helper.make_model(
        body, opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION, producer_name="packrcnn"
    )  # fmt: skip
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return model


def _convert_tensors(builder: Builder, tensors: Sequence[Any], functions: dict[str, Any]) -> None:
    """Adds the nodes that these tensors need, inputs before what uses them."""
    todo = [t.op for t in reversed(tensors)]
    done: set[Any] = set()
    while todo:
        op = todo[-1]
        if op in done or all(t.ref() in builder.values for t in op.outputs):
            todo.pop()
            continue
        region = _REGION.fullmatch(op.name)
        needed = _region_inputs(op.graph, region) if region else list(op.inputs)
        missing = [t.op for t in needed if t.ref() not in builder.values]
        if missing:
            todo += missing
            continue
        todo.pop()
        done.add(op)
        names = [builder.values[t.ref()] for t in needed]
        results: Any
        if region:
            results = _convert_region(builder, region, needed, names)
        elif op.type in ("While", "StatelessWhile"):
            results = _convert_loop(builder, op, names, functions)
        elif op.type in OPERATIONS:
            results = OPERATIONS[op.type](builder, op, names)
        else:
            raise UserError(f"--format onnx: the operation {op.type} ({op.name}) has no counterpart in export_onnx.py")
        for tensor, name in zip(op.outputs, [results] if isinstance(results, str) else results):
            builder.values[tensor.ref()] = name


# ------------------------------------------------------------------------------------------------------------- regions
def _region_inputs(graph: Any, region: re.Match) -> list[Any]:
    scope = region["scope"]
    names = ("padded", "start", "sides") if region["kind"] == "align" else ("features", "boxes")
    found = [graph.get_tensor_by_name(f"{scope}/{name}:0") for name in (*names, "image_index")]
    if region["kind"] == "align":
        # The map before its border was repeated: RoiAlign repeats it in the same way.
        producer = found[0].op
        while producer.type in ("Identity", "Cast"):
            producer = producer.inputs[0].op
        if producer.type == "MirrorPad":
            found[0] = producer.inputs[0]
    return found


def _convert_region(b: Builder, region: re.Match, tensors: list[Any], names: list[str]) -> str:
    """RoIAlign or RoI pooling of model_box.py -> [R,M,M,C]."""
    size = int(region["size"])
    features, index = names[0], names[-1]
    if tensors[0].dtype != tf.float32:
        features = b.cast(features, tf.float32)
    if region["kind"] == "pool":
        rois = b.concat(b.unsqueeze(b.cast(index, tf.float32), 1), names[1], axis=1)
        crops = b.add("MaxRoiPool", b.transpose(features, 0, 3, 1, 2), rois, pooled_shape=[size, size])
        return b.transpose(crops, 0, 2, 3, 1)
    if tensors[0].op.type != "MirrorPad" and tensors[0].op.name.endswith("/padded"):
        features = b.slice(b.slice(features, 1, -1, 1), 1, -1, 2)
    rois = b.concat(names[1], b.add("Add", names[1], names[2]), axis=1)
    return _roi_align(b, features, rois, index, (size, size), int(region["samples"]))


def _roi_align(b: Builder, features: str, rois: str, index: str, size: tuple[int, int], samples: int) -> str:
    crops = b.add(
        "RoiAlign", b.transpose(features, 0, 3, 1, 2), rois, b.cast(index, tf.int64), mode="avg",
        output_height=size[0], output_width=size[1], sampling_ratio=samples, spatial_scale=1.0,
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    return b.transpose(crops, 0, 2, 3, 1)


def _crop_and_resize(b: Builder, op: Any, x: list[str]) -> str:
    """By RoiAlign with one sample per bin; samples outside the map, where RoiAlign repeats the border, become 0."""
    features, boxes, index = x[:3]
    if op.inputs[0].dtype != tf.float32:
        features = b.cast(features, tf.float32)
    counts = _static(op.inputs[3], op).tolist()
    first, spacing, inside = [], [], []
    for axis, n in enumerate(counts):
        last = b.add("Sub", b.cast(b.shape(features, axis + 1), tf.float32), b.constant(np.float32(1)))  # [1]
        low, high = b.slice(boxes, axis, axis + 1, 1), b.slice(boxes, axis + 2, axis + 3, 1)  # [R, 1]
        if n > 1:
            step = b.add("Div", b.add("Mul", b.add("Sub", high, low), last), b.constant(np.float32(n - 1)))
            start = b.add("Mul", low, last)
        else:
            step = b.add("Mul", low, b.constant(np.float32(0)))
            start = b.add("Mul", b.add("Mul", b.add("Add", low, high), b.constant(np.float32(0.5))), last)
        place = b.add("Add", start, b.add("Mul", step, b.constant(np.arange(n, dtype=np.float32)[None])))  # [R, n]
        good = b.add(
            "And", b.add("GreaterOrEqual", place, b.constant(np.float32(0))), b.add("LessOrEqual", place, last)
        )
        first.append(start)
        spacing.append(step)
        inside.append(b.cast(good, tf.float32))
    low_corner = [
        b.add("Add", b.add("Sub", s, b.add("Mul", d, b.constant(np.float32(0.5)))), b.constant(np.float32(0.5)))
        for s, d in zip(first, spacing)
    ]
    high_corner = [
        b.add("Add", c, b.add("Mul", d, b.constant(np.float32(n)))) for c, d, n in zip(low_corner, spacing, counts)
    ]
    rois = b.concat(*low_corner[::-1], *high_corner[::-1], axis=1)
    crops = _roi_align(b, features, rois, index, tuple(counts), 1)
    mask = b.add("Mul", b.unsqueeze(inside[0], 2, 3), b.unsqueeze(inside[1], 1, 3))
    return b.add("Mul", crops, mask)


def _combined_nms(b: Builder, op: Any, x: list[str]) -> list[str]:
    """boxes [B,K,q,4], scores [B,K,C], q = 1 or C -> the best T of each image after NMS of each class, then zeros."""
    boxes, scores, per_class, total, iou, threshold = x
    shared = op.inputs[0].shape[2] == 1
    limit = int(_static(op.inputs[3], op))
    if op.get_attr("clip_boxes"):
        boxes = b.add("Clip", boxes, b.constant(np.float32(0)), b.constant(np.float32(1)))
    by_class = b.transpose(scores, 0, 2, 1)  # [B, C, K]
    count, classes, rows = (b.shape(by_class, axis) for axis in range(3))  # [1] each
    if shared:
        all_boxes, all_scores = b.squeeze(boxes, 2), by_class
    else:
        all_boxes = b.reshape(b.transpose(boxes, 0, 2, 1, 3), b.concat(b.int64(-1), rows, b.int64(4)))  # [B·C, K, 4]
        all_scores = b.reshape(by_class, b.concat(b.int64(-1), b.int64(1), rows))
    vector = b.int64(1)
    chosen = b.add(
        "NonMaxSuppression",
        all_boxes,
        all_scores,
        b.reshape(b.cast(per_class, tf.int64), vector),
        b.reshape(iou, vector),
        b.reshape(threshold, vector),
    )  # fmt: skip  [n, 3] image, class, row
    image, group, row = (b.squeeze(b.slice(chosen, i, i + 1, 1), 1) for i in range(3))
    if shared:
        group = b.add("Add", b.add("Mul", image, classes), group)
    else:
        group = image
    place = b.add("Add", b.add("Mul", group, rows), row)  # in [B·C·K]
    flat = b.reshape(by_class, [-1])
    nothing = b.fill(b.shape(flat), -np.inf, tf.float32)
    kept = b.add("ScatterElements", nothing, place, b.add("Gather", flat, place), axis=0)
    per_image = b.add("Mul", classes, rows)
    size = b.add("Min", per_image, b.int64(limit))
    values, index = b.add("TopK", b.reshape(kept, b.concat(count, per_image)), size, outputs=2)  # [B, k]
    present = b.add("Greater", values, b.constant(np.float32(-np.inf)))
    if shared:
        found = b.add("GatherND", all_boxes, b.unsqueeze(b.add("Mod", index, rows), 2), batch_dims=1)
    else:
        flat_boxes = b.reshape(all_boxes, b.concat(count, per_image, b.int64(4)))
        found = b.add("GatherND", flat_boxes, b.unsqueeze(index, 2), batch_dims=1)
    zero = b.constant(np.float32(0))
    found = b.add("Where", b.unsqueeze(present, 2), found, zero)
    values = b.add("Where", present, values, zero)
    labels = b.add("Where", present, b.cast(b.add("Div", index, rows), tf.float32), zero)
    rest = b.add("Sub", b.int64(limit), size)
    padding = b.concat(b.int64(0, 0, 0), rest)
    values, labels = (b.add("Pad", v, padding, zero) for v in (values, labels))
    found = b.add("Pad", found, b.concat(b.int64(0, 0, 0, 0), rest, b.int64(0)), zero)
    number = b.add("ReduceSum", b.cast(present, tf.int32), b.int64(1), keepdims=0)
    return [found, values, labels, number]


# --------------------------------------------------------------------------------------------------------------- loops
def _convert_loop(b: Builder, op: Any, x: list[str], functions: dict[str, Any]) -> list[str]:
    """While -> Loop. A loop variable that no pass changes is read from outside."""
    condition, body = (function_to_graph(functions[op.get_attr(key).name]) for key in ("cond", "body"))
    changes = [after is not before for before, after in zip(body.inputs, body.outputs)]
    changes = [c and not _passes_through(a, i) for c, a, i in zip(changes, body.outputs, body.inputs)]

    def run(builder: Builder, graph: Any, given: Sequence[str], results: Sequence[Any]) -> list[str]:
        for tensor, name in zip(graph.inputs, given):
            builder.values[tensor.ref()] = name
        _convert_tensors(builder, results, functions)
        return [builder.values[t.ref()] for t in results]

    (start,) = run(b, condition, x, condition.outputs)
    inner = Builder(b)
    info = inner.onnx.helper.make_tensor_value_info
    state = [inner.name("state") if c else outside for c, outside in zip(changes, x)]
    after = run(inner, body, state, body.outputs)
    # The same condition may be converted twice with other inputs: its tensors are those of another graph object.
    condition = function_to_graph(functions[op.get_attr("cond").name])
    (again,) = run(inner, condition, [a if c else s for a, c, s in zip(after, changes, state)], condition.outputs)
    number, going = inner.name("number"), inner.name("going")
    types = [inner.type_of(t.dtype) for t in body.inputs]
    inputs = [info(number, inner.type_of(tf.int64), []), info(going, inner.type_of(tf.bool), [])]
    inputs += [info(s, t, None) for s, t, c in zip(state, types, changes) if c]
    # Outputs of a body are its own nodes, each once.
    finals = [inner.add("Identity", name) for name in [again, *(a for a, c in zip(after, changes) if c)]]
    results = [info(finals[0], inner.type_of(tf.bool), [])]
    results += [info(n, t, None) for n, t in zip(finals[1:], [t for t, c in zip(types, changes) if c])]
    graph = inner.onnx.helper.make_graph(inner.nodes, b.name("body"), inputs, results)
    outputs = b.add("Loop", "", start, *(v for v, c in zip(x, changes) if c), outputs=sum(changes), body=graph)
    fresh = iter([outputs] if sum(changes) == 1 else outputs)
    return [next(fresh) if c else outside for c, outside in zip(changes, x)]


def _passes_through(after: Any, before: Any) -> bool:
    while after.op.type == "Identity":
        after = after.op.inputs[0]
    return after is before


# --------------------------------------------------------------------------------------------- operations by their kind
def _static(tensor: Any, op: Any) -> np.ndarray:
    value = tf.get_static_value(tensor)
    if value is None:
        raise UserError(f"--format onnx: {op.type} ({op.name}) has an input {tensor.name} that must be a constant")
    return np.asarray(value)


def _simple(kind: str) -> Callable:
    return lambda b, op, x: b.add(kind, *x)


def _negated(kind: str) -> Callable:
    return lambda b, op, x: b.add("Not", b.add(kind, *x))


def _same(b: Builder, op: Any, x: list[str]) -> str:
    return x[0]


def _bitcast(b: Builder, op: Any, x: list[str]) -> str:
    """There and back again, as `utils.tf_v1.detached` does."""
    made = op.inputs[0].op
    back = made.type == "Bitcast" and made.inputs[0].dtype == op.outputs[0].dtype
    if not back and any(c.type != "Bitcast" for c in op.outputs[0].consumers()):
        raise UserError(f"--format onnx: the operation Bitcast ({op.name}) is known only where it changes no value")
    return x[0]


def _number(b: Builder, value: float, op: Any) -> str:
    return b.constant(np.array(value, op.inputs[0].dtype.as_numpy_dtype))


def _constant(b: Builder, op: Any, x: list[str]) -> str:
    tensor = op.get_attr("value")
    if tf.as_dtype(tensor.dtype) == tf.string:
        raise UserError(f"--format onnx: {op.name} is a text")
    return b.constant(tf.make_ndarray(tensor))


def _cast(b: Builder, op: Any, x: list[str]) -> str:
    return x[0] if op.inputs[0].dtype == op.outputs[0].dtype else b.cast(x[0], op.outputs[0].dtype)


def _floor_div(b: Builder, op: Any, x: list[str]) -> str:
    if op.inputs[0].dtype.is_floating:
        return b.add("Floor", b.add("Div", *x))
    return b.add("Div", b.add("Sub", x[0], b.add("Mod", *x)), x[1])


def _floor_mod(b: Builder, op: Any, x: list[str]) -> str:
    if op.inputs[0].dtype.is_floating:
        return b.add("Sub", x[0], b.add("Mul", b.add("Floor", b.add("Div", *x)), x[1]))
    return b.add("Mod", *x)


def _div_no_nan(b: Builder, op: Any, x: list[str]) -> str:
    empty = b.add("Equal", x[1], _number(b, 0, op))
    return b.add("Where", empty, _number(b, 0, op), b.add("Div", x[0], b.add("Where", empty, _number(b, 1, op), x[1])))


def _right_shift(b: Builder, op: Any, x: list[str]) -> str:
    """Of numbers that are not negative, as in `export_graph.resize_bilinear`."""
    return b.add("Div", x[0], b.constant(1 << _static(op.inputs[1], op), op.inputs[0].dtype.as_numpy_dtype))


def _is_finite(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("Not", b.add("Or", b.add("IsInf", x[0]), b.add("IsNaN", x[0])))


def _select(b: Builder, op: Any, x: list[str]) -> str:
    condition, rank = op.inputs[0].shape.ndims, op.inputs[1].shape.ndims
    if op.type == "Select" and condition == 1 and rank > 1:  # the old operation chooses whole rows
        x = [b.unsqueeze(x[0], *range(1, rank)), *x[1:]]
    if op.inputs[1].dtype == tf.bool:  # ONNX Runtime's Where has no bool
        return b.cast(b.add("Where", x[0], *(b.cast(v, tf.int32) for v in x[1:])), tf.bool)
    return b.add("Where", *x)


def _reduction(kind: str) -> Callable:
    def add(b: Builder, op: Any, x: list[str]) -> str:
        axes = np.atleast_1d(_static(op.inputs[1], op)).tolist()
        keep = int(op.get_attr("keep_dims"))
        logical = op.inputs[0].dtype == tf.bool
        value = b.cast(x[0], tf.int32) if logical else x[0]
        if not axes and op.inputs[0].shape.ndims != 0:
            return x[0]
        value = b.add(kind, value, b.int64(*axes), keepdims=keep) if axes else value
        return b.cast(value, tf.bool) if logical else value

    return add


def _arg(kind: str) -> Callable:
    def add(b: Builder, op: Any, x: list[str]) -> str:
        found = b.add(kind, x[0], axis=int(_static(op.inputs[1], op)), keepdims=0)
        return found if op.outputs[0].dtype == tf.int64 else b.cast(found, op.outputs[0].dtype)

    return add


def _from_int64(b: Builder, name: str, dtype: Any) -> str:
    return name if dtype == tf.int64 else b.cast(name, dtype)


def _to_int64(b: Builder, op: Any, x: list[str], i: int) -> str:
    return x[i] if op.inputs[i].dtype == tf.int64 else b.cast(x[i], tf.int64)


def _shape(b: Builder, op: Any, x: list[str]) -> str:
    return _from_int64(b, b.add("Shape", x[0]), op.outputs[0].dtype)


def _size(b: Builder, op: Any, x: list[str]) -> str:
    return _from_int64(b, b.add("Size", x[0]), op.outputs[0].dtype)


def _rank(b: Builder, op: Any, x: list[str]) -> str:
    return b.constant(np.int32(op.inputs[0].shape.ndims))


def _reshape(b: Builder, op: Any, x: list[str]) -> str:
    shape = tf.get_static_value(op.inputs[1])
    return b.reshape(x[0], shape.tolist() if shape is not None else _to_int64(b, op, x, 1))


def _strided_slice(b: Builder, op: Any, x: list[str]) -> str:
    masks = {k: op.get_attr(f"{k}_mask") for k in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")}
    count = op.inputs[1].shape[0].value if hasattr(op.inputs[1].shape[0], "value") else int(op.inputs[1].shape[0])
    rank = op.inputs[0].shape.ndims
    static = [tf.get_static_value(t) for t in op.inputs[1:4]]

    def bit(mask: str, i: int) -> bool:
        return bool(masks[mask] >> i & 1)

    def part(which: int, i: int) -> str:
        """Element i of begin, end or strides as an int64 vector of one."""
        if static[which] is not None:
            return b.int64(int(static[which][i]))
        return _from_any(b, b.slice(x[which + 1], i, i + 1, 0), op.inputs[which + 1].dtype)

    real = sum(not bit("new_axis", i) and not bit("ellipsis", i) for i in range(count))
    axis = 0
    starts, ends, axes, steps, chosen, new, kept = [], [], [], [], [], [], 0
    for i in range(count):
        if bit("ellipsis", i):
            axis, kept = axis + rank - real, kept + rank - real
        elif bit("new_axis", i):
            new.append(kept)
            kept += 1
        elif bit("shrink_axis", i):
            chosen.append((axis, b.squeeze(part(0, i), 0)))
            axis += 1
        else:
            step = int(_static(op.inputs[3], op)[i])
            whole = bit("begin", i) and bit("end", i) and step == 1
            if not whole:
                low, high = (0, _MAX) if step > 0 else (_MAX, -_MAX)
                starts.append(b.int64(low) if bit("begin", i) else part(0, i))
                ends.append(b.int64(high) if bit("end", i) else part(1, i))
                axes.append(axis)
                steps.append(step)
            axis, kept = axis + 1, kept + 1
    value = x[0]
    if axes:
        value = b.add("Slice", value, b.concat(*starts), b.concat(*ends), b.int64(*axes), b.int64(*steps))
    for axis, index in reversed(chosen):
        value = b.add("Gather", value, index, axis=axis)
    return b.unsqueeze(value, *new) if new else value


def _from_any(b: Builder, name: str, dtype: Any) -> str:
    return name if dtype == tf.int64 else b.cast(name, tf.int64)


def _slice(b: Builder, op: Any, x: list[str]) -> str:
    start, size = _to_int64(b, op, x, 1), _to_int64(b, op, x, 2)
    rest = b.add("Less", size, b.int64(0))
    end = b.add("Where", rest, b.int64(_MAX), b.add("Add", start, size))
    return b.add("Slice", x[0], start, end, b.int64(*range(op.inputs[0].shape.ndims)))


def _concat(b: Builder, op: Any, x: list[str]) -> str:
    return b.concat(*x[:-1], axis=int(_static(op.inputs[-1], op)))


def _pack(b: Builder, op: Any, x: list[str]) -> str:
    axis = op.get_attr("axis")
    return b.concat(*(b.unsqueeze(v, axis) for v in x), axis=axis)


def _unpack(b: Builder, op: Any, x: list[str]) -> list[str]:
    axis, count = op.get_attr("axis"), op.get_attr("num")
    return [b.add("Gather", x[0], b.constant(np.int64(i)), axis=axis) for i in range(count)]


def _split(b: Builder, op: Any, x: list[str]) -> Any:
    axis, count = int(_static(op.inputs[0], op)), op.get_attr("num_split")
    return b.add("Split", x[1], axis=axis, num_outputs=count, outputs=count)


def _split_sizes(b: Builder, op: Any, x: list[str]) -> Any:
    axis = int(_static(op.inputs[2], op))
    return b.add("Split", x[0], _to_int64(b, op, x, 1), axis=axis, outputs=op.get_attr("num_split"))


def _transpose(b: Builder, op: Any, x: list[str]) -> str:
    return b.transpose(x[0], *_static(op.inputs[1], op).tolist())


def _expand_dims(b: Builder, op: Any, x: list[str]) -> str:
    return b.unsqueeze(x[0], int(_static(op.inputs[1], op)))


def _squeeze(b: Builder, op: Any, x: list[str]) -> str:
    axes = op.get_attr("squeeze_dims")
    return b.squeeze(x[0], *axes) if axes else b.add("Squeeze", x[0])


def _fill(b: Builder, op: Any, x: list[str]) -> str:
    value = tf.get_static_value(op.inputs[1])
    shape = _to_int64(b, op, x, 0)
    return b.add("Expand", x[1], shape) if value is None else b.fill(shape, value, op.outputs[0].dtype)


def _like(value: int) -> Callable:
    return lambda b, op, x: b.fill(b.add("Shape", x[0]), value, op.outputs[0].dtype)


def _gather(b: Builder, op: Any, x: list[str]) -> str:
    axis = int(_static(op.inputs[2], op)) if len(x) > 2 else 0
    batch = op.get_attr("batch_dims") if op.type == "GatherV2" else 0
    if batch == 0:
        return b.add("Gather", x[0], x[1], axis=axis)
    rank = op.inputs[1].shape.ndims
    if axis % op.inputs[0].shape.ndims != batch:
        raise UserError(f"--format onnx: {op.name} gathers along axis {axis} with {batch} batch dimensions")
    return b.add("GatherND", x[0], b.unsqueeze(_to_int64(b, op, x, 1), rank), batch_dims=batch)


def _gather_nd(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("GatherND", x[0], _to_int64(b, op, x, 1))


def _scatter_nd(b: Builder, op: Any, x: list[str]) -> str:
    nothing = b.fill(_to_int64(b, op, x, 2), 0, op.outputs[0].dtype)
    return b.add("ScatterND", nothing, _to_int64(b, op, x, 0), x[1])


def _where(b: Builder, op: Any, x: list[str]) -> str:
    return b.transpose(b.add("NonZero", x[0]), 1, 0)


def _top_k(b: Builder, op: Any, x: list[str]) -> list[str]:
    k = b.reshape(_to_int64(b, op, x, 1), [1])
    values, index = b.add("TopK", x[0], k, outputs=2)
    return [values, b.cast(index, op.outputs[1].dtype)]


def _one_hot(b: Builder, op: Any, x: list[str]) -> str:
    dtype, axis = op.outputs[0].dtype, op.get_attr("axis")
    off_on = [b.cast(b.reshape(v, [1]), tf.float32) for v in (x[3], x[2])]
    found = b.add("OneHot", _to_int64(b, op, x, 0), _to_int64(b, op, x, 1), b.concat(*off_on), axis=axis)
    return found if dtype == tf.float32 else b.cast(found, dtype)


def _invert_permutation(b: Builder, op: Any, x: list[str]) -> str:
    place = _to_int64(b, op, x, 0)
    size = b.add("Size", place)
    order = b.add("Range", b.constant(np.int64(0)), size, b.constant(np.int64(1)))
    found = b.add("ScatterElements", order, place, order, axis=0)
    return _from_int64(b, found, op.outputs[0].dtype)


def _cumsum(b: Builder, op: Any, x: list[str]) -> str:
    options = {key: int(op.get_attr(key)) for key in ("exclusive", "reverse")}
    return b.add("CumSum", x[0], b.constant(np.int64(_static(op.inputs[1], op))), **options)


def _tile(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("Tile", x[0], _to_int64(b, op, x, 1))


def _broadcast_to(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("Expand", x[0], _to_int64(b, op, x, 1))


def _pad(b: Builder, op: Any, x: list[str]) -> str:
    mode = "constant"
    if op.type == "MirrorPad":
        mode = "reflect" if op.get_attr("mode") == b"REFLECT" else "edge"
        if mode == "edge" and _static(op.inputs[1], op).max() > 1:
            raise UserError(f"--format onnx: {op.name} mirrors more than one row of its border")
    pads = b.reshape(b.transpose(_to_int64(b, op, x, 1), 1, 0), [-1])
    value = [x[2]] if op.type == "PadV2" else []
    return b.add("Pad", x[0], pads, *value, mode=mode)


def _in_nchw(b: Builder, name: str, change: Callable[[str], str]) -> str:
    return b.transpose(change(b.transpose(name, 0, 3, 1, 2)), 0, 2, 3, 1)


def _check_layout(op: Any) -> None:
    if op.get_attr("data_format") != b"NHWC":
        raise UserError(f"--format onnx: {op.name} has the layout {op.get_attr('data_format').decode()}")


def _padding(op: Any, kernel: Sequence[int] = (), dilations: Sequence[int] = (1,)) -> dict[str, Any]:
    kind = op.get_attr("padding").decode()
    if kind == "EXPLICIT":
        pads = op.get_attr("explicit_paddings")
        return {"pads": [pads[2], pads[4], pads[3], pads[5]]}
    if kind == "SAME" and max(dilations) > 1:  # ONNX Runtime has no automatic padding then
        if max(op.get_attr("strides")) > 1:
            raise UserError(f"--format onnx: {op.name} has steps and dilations larger than 1, and SAME padding")
        total = [(k - 1) * d for k, d in zip(kernel, dilations)]
        return {"pads": [t // 2 for t in total] + [t - t // 2 for t in total]}
    return {"auto_pad": "SAME_UPPER"} if kind == "SAME" else {"auto_pad": "VALID"}


def _kernel(b: Builder, tensor: Any, name: str, perm: Sequence[int], shape: Sequence[int] | None = None) -> str:
    """A convolution's kernel in ONNX's order; constants are put in order here."""
    value = tf.get_static_value(tensor)
    if value is not None:
        value = np.transpose(value, perm)
        return b.constant(value if shape is None else value.reshape(shape))
    name = b.transpose(name, *perm)
    return name if shape is None else b.reshape(name, shape)


def _conv(b: Builder, op: Any, x: list[str]) -> str:
    _check_layout(op)
    height, width, inner, outer = op.inputs[1].shape.as_list()
    depthwise = op.type == "DepthwiseConv2dNative"
    known = op.inputs[0].shape.ndims and op.inputs[0].shape.as_list()[-1]
    if depthwise:  # [H, W, C, M] -> [C·M, 1, H, W]
        weight = _kernel(b, op.inputs[1], x[1], (2, 3, 0, 1), [inner * outer, 1, height, width])
    else:
        weight = _kernel(b, op.inputs[1], x[1], (3, 2, 0, 1))
    dilations = op.get_attr("dilations")[1:3]
    options = {
        "strides": op.get_attr("strides")[1:3], "dilations": dilations,
        "group": inner if depthwise else (known or inner) // inner, **_padding(op, (height, width), dilations),
    }  # fmt: skip
    return _in_nchw(b, x[0], lambda v: b.add("Conv", v, weight, **options))


def _transposed_conv(b: Builder, op: Any, x: list[str]) -> str:
    """Outputs of SAME padding are exactly `stride` times as large."""
    _check_layout(op)
    height, width, _, _ = op.inputs[1].shape.as_list()
    strides = list(op.get_attr("strides")[1:3])
    pads = [0, 0, 0, 0]
    if op.get_attr("padding") == b"SAME":
        total = [max(k - s, 0) for k, s in zip((height, width), strides)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    weight = _kernel(b, op.inputs[1], x[1], (3, 2, 0, 1))
    return _in_nchw(b, x[2], lambda v: b.add("ConvTranspose", v, weight, strides=strides, pads=pads))


def _pool(kind: str) -> Callable:
    def add(b: Builder, op: Any, x: list[str]) -> str:
        _check_layout(op)
        options = {"kernel_shape": op.get_attr("ksize")[1:3], "strides": op.get_attr("strides")[1:3], **_padding(op)}
        return _in_nchw(b, x[0], lambda v: b.add(kind, v, **options))

    return add


def _bias_add(b: Builder, op: Any, x: list[str]) -> str:
    _check_layout(op)
    return b.add("Add", *x)


def _batch_norm(b: Builder, op: Any, x: list[str]) -> list[str]:
    """Of moving statistics: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta."""
    _check_layout(op)
    if op.get_attr("is_training"):
        raise UserError(f"--format onnx: {op.name} normalises with the statistics of the batch")
    gamma, beta, mean, variance = (_static(t, op).astype(np.float64) for t in op.inputs[1:5])
    scale = gamma / np.sqrt(variance + op.get_attr("epsilon"))
    dtype = op.inputs[0].dtype.as_numpy_dtype
    y = b.add("Mul", x[0], b.constant(scale.astype(dtype)))
    return [b.add("Add", y, b.constant((beta - mean * scale).astype(dtype)))]


def _resize(mode: str) -> Callable:
    def add(b: Builder, op: Any, x: list[str]) -> str:
        if op.get_attr("align_corners"):
            place = "align_corners"
        else:
            place = "half_pixel" if op.get_attr("half_pixel_centers") else "asymmetric"
        nearest: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
        size = _to_int64(b, op, x, 1)

        def change(v: str) -> str:
            sizes = b.concat(b.shape(v, 0, 1), size)
            return b.add("Resize", v, "", "", sizes, mode=mode, coordinate_transformation_mode=place, **nearest)

        value = x[0] if op.inputs[0].dtype == op.outputs[0].dtype else b.cast(x[0], op.outputs[0].dtype)
        return _in_nchw(b, value, change)

    return add


def _matmul(b: Builder, op: Any, x: list[str]) -> str:
    keys = ("transpose_a", "transpose_b") if op.type == "MatMul" else ("adj_x", "adj_y")
    for i, key in enumerate(keys):
        if op.get_attr(key):
            rank = op.inputs[i].shape.ndims
            x[i] = b.transpose(x[i], *range(rank - 2), rank - 1, rank - 2)
    return b.add("MatMul", *x)


def _einsum(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("Einsum", *x, equation=op.get_attr("equation").decode())


def _clip(b: Builder, op: Any, x: list[str]) -> str:
    return b.add("Min", b.add("Max", x[0], x[1]), x[2])


OPERATIONS: dict[str, Callable[[Builder, Any, list[str]], Any]] = {
    **dict.fromkeys(("Identity", "StopGradient", "PreventGradient", "CheckNumerics", "EnsureShape", "Snapshot"), _same),
    "IdentityN": lambda b, op, x: list(x),  # tf.custom_gradient makes it
    "Bitcast": _bitcast,
    **{
        kind: _simple(other)
        for kind, other in {
            "Add": "Add",
            "AddV2": "Add",
            "AddN": "Sum",
            "Sub": "Sub",
            "Mul": "Mul",
            "RealDiv": "Div",
            "Div": "Div",
            "TruncateDiv": "Div",
            "Maximum": "Max",
            "Minimum": "Min",
            "Pow": "Pow",
            "Exp": "Exp",
            "Log": "Log",
            "Sqrt": "Sqrt",
            "Neg": "Neg",
            "Abs": "Abs",
            "Sign": "Sign",
            "Floor": "Floor",
            "Ceil": "Ceil",
            "Round": "Round",
            "Rint": "Round",
            "Reciprocal": "Reciprocal",
            "Inv": "Reciprocal",
            "Erf": "Erf",
            "Sigmoid": "Sigmoid",
            "Tanh": "Tanh",
            "Relu": "Relu",
            "Elu": "Elu",
            "Selu": "Selu",
            "Softplus": "Softplus",
            "Softsign": "Softsign",
            "LogicalAnd": "And",
            "LogicalOr": "Or",
            "LogicalNot": "Not",
            "Greater": "Greater",
            "Less": "Less",
            "GreaterEqual": "GreaterOrEqual",
            "LessEqual": "LessOrEqual",
            "Equal": "Equal",
            "IsNan": "IsNaN",
            "IsInf": "IsInf",
            "Range": "Range",
        }.items()
    },
    "Const": _constant,
    "Cast": _cast,
    "NotEqual": _negated("Equal"),
    "Rsqrt": lambda b, op, x: b.add("Reciprocal", b.add("Sqrt", x[0])),
    "Square": lambda b, op, x: b.add("Mul", x[0], x[0]),
    "SquaredDifference": lambda b, op, x: b.add("Mul", *[b.add("Sub", *x)] * 2),
    "Relu6": lambda b, op, x: b.add("Min", b.add("Relu", x[0]), _number(b, 6, op)),
    "LeakyRelu": lambda b, op, x: b.add("LeakyRelu", x[0], alpha=op.get_attr("alpha")),
    "ClipByValue": _clip,
    "FloorDiv": _floor_div,
    "FloorMod": _floor_mod,
    "DivNoNan": _div_no_nan,
    "RightShift": _right_shift,
    "IsFinite": _is_finite,
    "Select": _select,
    "SelectV2": _select,
    "Softmax": lambda b, op, x: b.add("Softmax", x[0], axis=-1),
    "LogSoftmax": lambda b, op, x: b.add("LogSoftmax", x[0], axis=-1),
    "Sum": _reduction("ReduceSum"),
    "Mean": _reduction("ReduceMean"),
    "Max": _reduction("ReduceMax"),
    "Min": _reduction("ReduceMin"),
    "Prod": _reduction("ReduceProd"),
    "Any": _reduction("ReduceMax"),
    "All": _reduction("ReduceMin"),
    "ArgMax": _arg("ArgMax"),
    "ArgMin": _arg("ArgMin"),
    "Shape": _shape,
    "Size": _size,
    "Rank": _rank,
    "Reshape": _reshape,
    "StridedSlice": _strided_slice,
    "Slice": _slice,
    "ConcatV2": _concat,
    "Pack": _pack,
    "Unpack": _unpack,
    "Split": _split,
    "SplitV": _split_sizes,
    "Transpose": _transpose,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Fill": _fill,
    "ZerosLike": _like(0),
    "OnesLike": _like(1),
    "Gather": _gather,
    "GatherV2": _gather,
    "GatherNd": _gather_nd,
    "ScatterNd": _scatter_nd,
    "Where": _where,
    "TopKV2": _top_k,
    "OneHot": _one_hot,
    "InvertPermutation": _invert_permutation,
    "Cumsum": _cumsum,
    "Tile": _tile,
    "BroadcastTo": _broadcast_to,
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    **dict.fromkeys(("Conv2D", "DepthwiseConv2dNative"), _conv),
    "Conv2DBackpropInput": _transposed_conv,
    "MaxPool": _pool("MaxPool"),
    "AvgPool": _pool("AveragePool"),
    "BiasAdd": _bias_add,
    **dict.fromkeys(("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3"), _batch_norm),
    "ResizeNearestNeighbor": _resize("nearest"),
    "ResizeBilinear": _resize("linear"),
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2"), _matmul),
    "Einsum": _einsum,
    "CropAndResize": _crop_and_resize,
    "CombinedNonMaxSuppression": _combined_nms,
}


# ------------------------------------------------------------------------------------------------------- quantisation
def quantize(path: Path) -> None:
    """Replaces the weights of matrix products in this file by int8 ones, with one scale for each output."""
    onnx_runtime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, path, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
