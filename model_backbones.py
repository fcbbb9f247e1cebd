"""Backbones besides the ResNets of basemodel.py: EfficientNet-Lite (model_efficientnet.py), the networks of Keras
applications, and your own functions.

BACKBONE.NAME=keras:EfficientNetB0 takes that network's features at the strides 4, 8, 16 and 32. Keras builds it once in
a graph of its own; its operations are then replayed in the detector's graph (`_replay`), reading variables that the
detector owns. So names, replicas, optimisers, checkpoints, precision and SyncBN work as everywhere else.
BACKBONE.NAME=module:function calls your own function (demo/own_backbone.py is an example).
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from basemodel import DEPTHWISE_GRADIENT, grouped_conv, name_seed, normalize_image, preprocess_image, resnet_stages
from common import UserError, describe_error, import_function
from config import Config
from config_check import nearest
from model_efficientnet import efficientnet_stages
from model_syncbn import normalize_batch, wide_type
from utils.checkpoint import load_weights
from utils.efficientnet_lite import NETWORKS, PIXEL_MEAN, PIXEL_STD
from utils.tf_v1 import tf
from utils.weight_files import check_hdf5

__all__ = ["backbone_stages", "check_backbone", "load_backbone_weights"]

STRIDES = (4, 8, 16, 32)
_SCOPE = "backbone"
_PROBE_SIZE = 1024  # side of the image for which feature sizes are computed; large, so that padding changes them little

# Means and deviations of R, G, B on the 0..255 scale, and whether the network reads R, G, B or B, G, R.
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "rgb")
_CAFFE = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0), "bgr")
_MINUS_ONE_TO_ONE = ((127.5,) * 3, (127.5,) * 3, "rgb")
# Families of Keras applications (the first match is used): how their training images were normalised, and which layers
# end a block. The last such layer of each stride is a feature (None: any layer).
_FAMILIES = [
    (r"ResNet\d+V2", _MINUS_ONE_TO_ONE, r".*_preact_relu|post_relu"),
    (r"ResNet\d+", _CAFFE, r"conv\d_block\d+_out"),
    (r"ResNetRS", _IMAGENET, r".*__output_act"),
    (r"VGG", _CAFFE, None),
    (r"MobileNetV3", _MINUS_ONE_TO_ONE, r"expanded_conv(_\d+)?/(Add|project/BatchNorm)"),
    (r"MobileNetV2", _MINUS_ONE_TO_ONE, r"(expanded_conv|block_\d+)_(add|project_BN)"),
    (r"MobileNet", _MINUS_ONE_TO_ONE, r"conv_pw_\d+_relu"),
    (r"EfficientNetV2[SML]", ((128.0,) * 3, (128.0,) * 3, "rgb"), r"block\d[a-z]_(add|project_bn)"),
    (r"EfficientNet", _IMAGENET, r"block\d[a-z]_(add|project_bn)"),
    (r"DenseNet", _IMAGENET, r"(pool\d_)?relu"),
    (r"ConvNeXt", _IMAGENET, None),
    (r"RegNet", ((0.0,) * 3, (255.0,) * 3, "rgb"), r".*_exit_relu"),
    (r"", _MINUS_ONE_TO_ONE, None),
]
# Keras' weight names -> this project's; names ending in W get weight decay.
_LEAVES = {"kernel": "W", "depthwise_kernel": "depthwise/W", "pointwise_kernel": "pointwise/W", "bias": "b",
           "moving_mean": "mean/EMA", "moving_variance": "variance/EMA"}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- interface
def backbone_stages(image, image_shape, cfg: Config):
    """uint8 BGR image [N,H,W,3], H and W multiples of 32, valid sizes [N,2] -> [C2, C3, C4, C5] of strides 4 to 32."""
    kind, _, name = cfg.BACKBONE.NAME.partition(":")
    if kind == "resnet":
        return resnet_stages(preprocess_image(image, image_shape, cfg), cfg, 4)
    with tf.variable_scope(_SCOPE):
        if kind == "keras":
            mean, std, order = _family(name)[0]
            x = normalize_image(image, image_shape, mean, std, tf.as_dtype(cfg.TRAIN.PRECISION))
            return _keras_stages(x[..., ::-1] if order == "rgb" else x, cfg)
        if kind in NETWORKS:
            dtype = tf.as_dtype(cfg.TRAIN.PRECISION)
            x = normalize_image(image, image_shape, (PIXEL_MEAN,) * 3, (PIXEL_STD,) * 3, dtype)
            return efficientnet_stages(x[..., ::-1], cfg)
        return list(_own_function(cfg)(preprocess_image(image, image_shape, cfg), cfg))


def check_backbone(cfg: Config) -> None:
    """Raises UserError, before expensive work, if BACKBONE.NAME or FEATURE_LAYERS name nothing usable."""
    kind, _, name = cfg.BACKBONE.NAME.partition(":")
    if kind == "keras":
        _feature_layers(name, tuple(cfg.BACKBONE.FEATURE_LAYERS))
    elif kind != "resnet" and kind not in NETWORKS:
        _check_own_function(cfg)


def load_backbone_weights(cfg: Config) -> dict[str, np.ndarray]:
    """{variable: array} of the file BACKBONE.WEIGHTS: Keras' .h5 for its networks, else a file that load_weights
    reads."""
    path = os.path.expanduser(cfg.BACKBONE.WEIGHTS)
    kind, _, name = cfg.BACKBONE.NAME.partition(":")
    if kind == "keras" and path.endswith((".h5", ".hdf5")):
        return _keras_weights(path, name, tuple(cfg.BACKBONE.FEATURE_LAYERS))
    return load_weights(path)[0]


# --------------------------------------------------------------------------------------------------- your own function
def _own_function(cfg: Config) -> Callable:
    return import_function(cfg.BACKBONE.NAME, f"BACKBONE.NAME={cfg.BACKBONE.NAME}")


def _check_own_function(cfg: Config) -> None:
    """Builds it for an image of known size and checks the shapes that it returns."""
    side = 256
    function = _own_function(cfg)
    with tf.Graph().as_default(), tf.variable_scope(_SCOPE):
        image = tf.zeros([1, side, side, 3], tf.as_dtype(cfg.TRAIN.PRECISION))
        try:
            features = function(image, cfg)
        except Exception as e:  # a user's function may raise any exception
            raise UserError(f"setting BACKBONE.NAME={cfg.BACKBONE.NAME} raised {describe_error(e)}") from None
    wants = "must return a list of four tensors [N,H/4,W/4,C], [N,H/8,…], [N,H/16,…] and [N,H/32,…]"
    shapes = [f.shape.as_list() for f in features] if isinstance(features, (list, tuple)) else []
    if len(shapes) != 4 or any(
        len(shape) != 4 or shape[1:3] != [side // stride] * 2 or shape[3] is None
        for shape, stride in zip(shapes, STRIDES)
    ):
        raise UserError(
            f"setting BACKBONE.NAME={cfg.BACKBONE.NAME} {wants}; for an image of {side}x{side} it returned {shapes}"
        )


# --------------------------------------------------------------------------------------------------- Keras applications
@dataclass(frozen=True)
class _Network:
    """A Keras application, built in `graph`."""

    graph: Any
    model: Any
    graph_def: Any
    start: str  # tensor after the rescaling and normalisation layers at the start of some networks
    layers: dict[str, str]  # layer -> its output tensor, in order
    variables: dict[str, Any]  # operation name of the Keras variable -> variable

    @functools.cached_property
    def read_types(self) -> dict[str, Any]:
        """{variable: dtype in which the network reads it}; norms read float32 also in half precision."""
        reads = [node for node in self.graph_def.node if node.op == "ReadVariableOp"]
        return {node.input[0]: tf.as_dtype(node.attr["dtype"].type) for node in reads}

    @functools.cached_property
    def nodes(self) -> dict[str, Any]:
        return {node.name: node for node in self.graph_def.node}


def _family(application: str) -> tuple[tuple, str | None]:
    return next((convention, ends) for pattern, convention, ends in _FAMILIES if re.match(pattern, application))


def _keras() -> Any:
    """Keras 2 for graphs, whichever Keras `tf.keras` is in this process."""
    return importlib.import_module("tf_keras.api._v1.keras")


def _applications() -> dict[str, Callable]:
    """The names of the networks in tf_keras.applications."""
    found = inspect.getmembers(_keras().applications, inspect.isfunction)
    return {name: make for name, make in found if "include_top" in inspect.signature(make).parameters}


@functools.cache
def _network(application: str, precision: str) -> _Network:
    """The application without its classifier, built for images of any size, with frozen norm statistics."""
    known = _applications()
    if application not in known:
        near = nearest(application, known, 0.5, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"setting BACKBONE.NAME=keras:{application}: Keras has no such network; {hint}")
    keras = _keras().backend
    before, own = keras.floatx(), "float16" if precision == "bfloat16" else precision
    with tf.Graph().as_default() as graph, _cpu_session_for_keras(graph):
        tf.set_random_seed(1)
        keras.set_learning_phase(0)
        keras.set_floatx(own)
        try:
            model = known[application](weights=None, include_top=False)
        finally:
            keras.set_floatx(before)
    start = model.input.name
    for layer in model.layers:
        if type(layer).__name__ not in ("InputLayer", "Rescaling", "Normalization"):
            break
        start = layer.get_output_at(-1).name
    layers = {layer.name: layer.get_output_at(-1).name for layer in model.layers}
    variables = {v.op.name: v for v in model.weights}
    graph_def = graph.as_graph_def()
    for node in graph_def.node:
        # Device placement and control dependencies may name operations that do not exist later.
        node.ClearField("device")
        node.attr.pop("_class", None)
        # Keras' swish has a gradient defined in Python that refers to tensors of the other graph; use the plain one.
        node.attr.pop("_gradient_op_type", None)
        if node.op == "DepthwiseConv2dNative":
            node.attr["_gradient_op_type"].s = DEPTHWISE_GRADIENT.encode()
        data = [i for i in node.input if not i.startswith("^")]
        del node.input[:]
        node.input.extend(data)
        if precision == "bfloat16":  # Keras 2 does not support it
            _half_to_bfloat16(node)
    return _Network(graph, model, graph_def, start, layers, variables)


def _half_to_bfloat16(node):
    """The same operation for the other 16-bit dtype."""
    half, bfloat16 = tf.float16.as_datatype_enum, tf.bfloat16.as_datatype_enum
    for value in node.attr.values():
        if value.type == half:
            value.type = bfloat16
        if value.HasField("list"):
            value.list.type[:] = [bfloat16 if t == half else t for t in value.list.type]
        if value.HasField("tensor") and value.tensor.dtype == half:
            constant = tf.make_ndarray(value.tensor).astype(tf.bfloat16.as_numpy_dtype)
            value.tensor.CopyFrom(tf.make_tensor_proto(constant))


@contextlib.contextmanager
def _cpu_session_for_keras(graph):
    """Keras evaluates constants of some networks while it builds them; this session does not occupy a GPU's memory."""
    with tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0})) as session:
        _keras().backend.set_session(session)
        try:
            yield session
        finally:
            _keras().backend.set_session(None)


@functools.cache
def _feature_layers(application: str, given: tuple[str, ...]) -> list[str]:
    """The layers that give C2 to C5: the given layers after a check, or the last block of each stride."""
    network = _network(application, "float32")
    sizes = _layer_sizes(application)
    setting = f"setting BACKBONE.FEATURE_LAYERS of keras:{application}"
    for layer in given:
        if layer not in network.layers:
            near = difflib.get_close_matches(layer, network.layers, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its last is {list(network.layers)[-1]}"
            raise UserError(f"{setting}: it has no layer {layer}; {hint}")
    ends = re.compile(_family(application)[1] or ".*")
    chosen = []
    for index, stride in enumerate(STRIDES):
        wanted = (_PROBE_SIZE // stride,) * 2
        fitting = [layer for layer in network.layers if sizes[layer] == wanted]
        if given and given[index] not in fitting:
            some = f"; layers of stride {stride} are {', '.join(fitting[-3:])}" if fitting else ""
            raise UserError(
                f"{setting}: {given[index]} gives {_describe(sizes[given[index]])} for an image of {_PROBE_SIZE}x"
                f"{_PROBE_SIZE}, C{index + 2} must be {wanted[0]}x{wanted[1]} (stride {stride}){some}"
            )
        found = [given[index]] if given else [layer for layer in fitting if ends.fullmatch(layer)] or fitting
        if not found:
            raise UserError(
                f"setting BACKBONE.NAME=keras:{application}: no layer is exactly {stride} times smaller than the image "
                "(its convolutions do not pad); choose a network whose convolutions do"
            )
        chosen.append(found[-1])
    return chosen


def _describe(size: tuple) -> str:
    return "no map" if len(size) != 2 else f"{size[0]}x{size[1]}"


@functools.cache
def _layer_sizes(application: str) -> dict[str, tuple]:
    """{layer: (height, width)} of the maps for an image of _PROBE_SIZE; () if the output is not a map."""
    network = _network(application, "float32")
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, [1, _PROBE_SIZE, _PROBE_SIZE, 3])
        values = {name: tf.placeholder(tf.float32, v.shape) for name, v in network.variables.items()}
        later = list(network.layers)[list(network.layers.values()).index(network.start) + 1 :]
        wanted = [network.layers[layer] for layer in later]
        try:
            outputs = _replay(network, x, values, wanted)
        except ValueError:
            raise UserError(
                f"setting BACKBONE.NAME=keras:{application}: this network is for images of one size; choose another"
            ) from None
    shapes = {layer: output.shape.as_list() for layer, output in zip(later, outputs)}
    sizes = {layer: tuple(shape[1:3]) if len(shape) == 4 else () for layer, shape in shapes.items()}
    return {layer: sizes.get(layer, ()) for layer in network.layers}


@functools.cache
def _variable_stages(application: str, given: tuple[str, ...]) -> dict[str, int]:
    """{variable: the first stage that is computed from it}, for the variables of C2 to C5: 1 is the stem, 2 to 5 are
    C2 to C5."""
    network = _network(application, "float32")
    features, sizes = _feature_layers(application, given), _layer_sizes(application)
    # The stem ends with the last map larger than C2 from which C2 is computed, or with the first map if there is none.
    before = _needed(network, [network.layers[features[0]]])
    larger = [
        layer for layer, output in network.layers.items()
        if sizes[layer] and sizes[layer][0] > 1.5 * _PROBE_SIZE // 4 and output.partition(":")[0] in before
    ]  # fmt: skip
    stem = larger[-1] if larger else next(layer for layer in network.layers if sizes[layer])
    stages: dict[str, int] = {}
    for stage, layer in enumerate([stem, *features], 1):
        needed = _needed(network, [network.layers[layer]])
        for name in network.variables:
            if name in needed:
                stages.setdefault(name, stage)
    return stages


def _own_name(keras_name: str) -> str:
    """block1a_se_reduce/kernel -> block1a_se_reduce/W."""
    layer, _, leaf = keras_name.rpartition("/")
    return f"{layer}/{_LEAVES.get(leaf, leaf)}"


def _keras_stages(x, cfg: Config):
    """Normalised image [N,H,W,3] of the compute dtype, channels in the network's order -> [C2, C3, C4, C5]."""
    backbone = cfg.BACKBONE
    application, given = backbone.NAME.partition(":")[2], tuple(backbone.FEATURE_LAYERS)
    network = _network(application, cfg.TRAIN.PRECISION)
    stages = _variable_stages(application, given)
    initial, variables = _initial_values(application, stages), {}
    for name, stage in stages.items():
        of_norm = f"{name.rpartition('/')[0]}/moving_mean" in network.variables
        trained = network.variables[name].trainable and not (of_norm and backbone.FREEZE_AFFINE)
        trained = trained and stage > backbone.FREEZE_AT
        value = tf.cast(initial[name], wide_type(x))
        variables[name] = tf.get_variable(_own_name(name), initializer=value, trainable=trained)
    read = {name: tf.cast(v, network.read_types[name]) for name, v in variables.items()}
    names = {tensor.ref(): name for name, tensor in read.items()}

    def synchronised(node, inputs):
        mean, variance = (names[inputs[k].ref()] for k in (3, 4))
        return normalize_batch(
            *inputs[:3], variables[mean], variables[variance], node.attr["epsilon"].f,
            stages[mean] > backbone.FREEZE_AT,
        )  # fmt: skip

    wanted = [network.layers[layer] for layer in _feature_layers(application, given)]
    return _replay(network, x, read, wanted, synchronised if backbone.NORM == "SyncBN" else None)


def _initial_values(application: str, names: Iterable[str]) -> dict[str, Any]:
    """{variable: float32 tensor} with Keras' initial distribution, seeded only by this graph's seed and the variable's
    name."""
    network = _network(application, "float32")
    starts = {name: network.variables[name].initial_value.name for name in names}
    graph_def = tf.GraphDef(versions=network.graph_def.versions)
    owners = {node: name for name, start in starts.items() for node in _needed(network, [start])}
    for node in network.graph_def.node:
        if node.name in owners:
            copy = graph_def.node.add()
            copy.CopyFrom(node)
            for key, seed in zip(("seed", "seed2"), name_seed(_own_name(owners[node.name]))):
                if key in copy.attr:
                    copy.attr[key].i = seed
    return dict(zip(starts, tf.import_graph_def(graph_def, return_elements=list(starts.values()), name="initial")))


def _keras_weights(path: str, application: str, given: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The variables that the features need, loaded by Keras from its file, under this project's names."""
    network, stages = _network(application, "float32"), _variable_stages(application, given)
    if not os.path.isfile(path):
        raise UserError(f"BACKBONE.WEIGHTS {path} does not exist; Keras publishes its files as …_notop.h5")
    check_hdf5(Path(path))  # Keras does not check sizes that the file declares
    with network.graph.as_default(), _cpu_session_for_keras(network.graph) as session:
        try:
            network.model.load_weights(path)
        except Exception as e:  # for a damaged file Keras may raise any exception
            reason = str(e).splitlines()[0][:160] if str(e) else type(e).__name__
            raise UserError(
                f"BACKBONE.WEIGHTS {path} does not fit keras:{application} without its classifier ({reason}); "
                "use the file named …_notop.h5 of that network"
            ) from None
        values = session.run({name: network.variables[name] for name in stages})
    return {f"{_SCOPE}/{_own_name(name)}": value for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------------ replaying
def _tensor(name: str) -> str:
    """The full tensor name of a node's input."""
    return name if ":" in name else f"{name}:0"


def _needed(network: _Network, tensors: Iterable[str]) -> set[str]:
    """Names of the operations from which the tensors are computed, including variables, back to the start."""
    nodes = network.nodes
    todo, found = [t.partition(":")[0] for t in tensors], set()
    stop = network.start.partition(":")[0]
    while todo:
        name = todo.pop()
        if name not in found and name != stop:
            found.add(name)
            todo += [i.partition(":")[0] for i in nodes[name].input]
    return found


def _replay(
    network: _Network, x, variables: dict[str, Any], wanted: list[str], batch_norm: Callable | None = None
) -> list:
    """The tensors `wanted` of the network, computed in the current graph from the image x and the values of variables.

    batch_norm(node, inputs), if given, replaces norms with frozen statistics.
    """
    needed = _needed(network, wanted)
    values = {network.start: x}
    waiting: list[Any] = []  # nodes that are imported together as soon as an output of them is needed
    nodes = [node for node in network.graph_def.node if node.name in needed]
    used = {*wanted, *(_tensor(i) for node in nodes for i in node.input)}

    def is_grouped(node: Any) -> bool:
        return node.op == "PartitionedCall"

    def is_norm(node: Any) -> bool:
        return batch_norm is not None and node.op == "FusedBatchNormV3" and not node.attr["is_training"].b

    def flush() -> None:
        graph_def = tf.GraphDef(versions=network.graph_def.versions, node=waiting)
        names = {node.name for node in waiting}
        inputs = {i for node in waiting for i in node.input if i.partition(":")[0] not in names}
        outputs = sorted(t for t in used if t.partition(":")[0] in names)
        imported = tf.import_graph_def(
            graph_def, input_map={i: values[_tensor(i)] for i in inputs}, return_elements=outputs
        )
        values.update(zip(outputs, imported))
        waiting.clear()

    for node in nodes:  # in construction order: inputs come first
        if node.op == "VarHandleOp":
            continue
        if node.op == "ReadVariableOp":
            values[f"{node.name}:0"] = variables[node.input[0]]
        elif is_grouped(node) or is_norm(node):
            if waiting:
                flush()
            inputs = [values[_tensor(i)] for i in node.input]
            ours = batch_norm(node, inputs) if is_norm(node) else _grouped_convolution(network, node, *inputs)
            values[f"{node.name}:0"] = ours
        else:
            waiting.append(node)
    if waiting:
        flush()
    return [values[t] for t in wanted]


def _grouped_convolution(network: _Network, node, x, kernel):
    """Keras wraps each grouped convolution in a function compiled with XLA; this project's grouped convolution replaces
    it."""
    function = next(f for f in network.graph_def.library.function if f.signature.name == node.attr["f"].func.name)
    conv = next(n for n in function.node_def if n.op == "Conv2D")
    stride, padding = conv.attr["strides"].list.i[1], conv.attr["padding"].s.decode()
    width = int(kernel.shape[2])
    return grouped_conv(x, kernel, stride, padding, int(x.shape[-1]) // width)
