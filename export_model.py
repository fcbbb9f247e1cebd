"""Writing a trained model as files that run without this project: SavedModel, ONNX, TensorFlow Lite.

One graph is built for all of them (export_graph.py), its weights become constants, and everything that depends on
constants alone is computed once.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError, atomic_write, project_version
from config import Config
from detections import Detections
from detections import paste_masks as paste_on_host
from export_graph import decode_files, detect, paste_masks, place_images
from inference import start_session
from utils.polygons import encode_mask
from utils.tf_v1 import tf

__all__ = [
    "CLASSES_FILE", "SETTINGS_FILE", "Frozen", "fold_constants", "found_in", "freeze", "saved_model_runner",
    "write_assets", "write_saved_model",
]  # fmt: skip

SETTINGS_FILE, CLASSES_FILE = "settings.json", "class_names.txt"


class Frozen(NamedTuple):
    """A graph whose weights are constants. Inputs: `images` uint8 [N,H,W,3] RGB, `image_bytes` string [N] (JPEG or PNG
    files). Outputs: {"images" or "image_bytes": {key: tensor name}}, the keys of `export_graph.detect`, and `masks`
    where the model has them."""

    graph_def: Any
    outputs: dict[str, dict[str, str]]


@contextmanager
def _functional_loops():
    """Loops built inside are functions (While), which every format can hold, and not cycles of the graph."""
    before = tf.control_flow_v2_enabled()
    tf.enable_control_flow_v2()
    try:
        yield
    finally:
        if not before:
            tf.disable_control_flow_v2()


def freeze(cfg: Config, load: Callable[[Any], None], inputs: Sequence[str] = ("images", "image_bytes")) -> Frozen:
    """The serving graph of the model that cfg describes; load(sess) assigns its weights. inputs: those of `Frozen` that
    are wanted."""
    place = {
        "images": (place_images, tf.uint8, [None, None, None, 3]),
        "image_bytes": (decode_files, tf.string, [None]),
    }
    outputs: dict[str, dict[str, str]] = {}
    with tf.Graph().as_default() as graph, _functional_loops():
        for number, name in enumerate(inputs):
            make_batch, dtype, shape = place[name]
            given = tf.placeholder(dtype, shape, name)
            with tf.variable_scope("", reuse=number > 0), tf.name_scope(f"from_{name}/"):
                batch, sizes, original = make_batch(given, cfg)
                found = detect(batch, sizes, original, cfg)
                if "box_masks" in found:
                    found["masks"] = paste_masks(found, original)
                outputs[name] = {key: tf.identity(value, f"out_{key}").name for key, value in found.items()}
        nodes = [tensor.partition(":")[0] for by_key in outputs.values() for tensor in by_key.values()]
        with start_session(graph, load) as session:
            graph_def = tf.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), nodes)
    return Frozen(fold_constants(graph_def, nodes), outputs)


def fold_constants(graph_def: Any, nodes: Iterable[str]) -> Any:
    """The part of graph_def that the named nodes need, in which whatever depends on constants alone is a constant."""
    nodes = list(nodes)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        constant: set[Any] = set()
        for op in graph.get_operations():
            pure = op.type == "Const" or op.inputs and all(i.op in constant for i in op.inputs)
            if pure and not op.control_inputs and not op.op_def.is_stateful:
                constant.add(op)
        wanted = {
            tensor
            for op in graph.get_operations() if op not in constant or op.name in nodes
            for tensor in op.inputs if tensor.op in constant and tensor.op.type != "Const"
        }  # fmt: skip
        tensors = sorted(wanted, key=lambda t: t.name)
        with tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0})) as session:
            values = session.run(tensors) if tensors else []
    folded = tf.GraphDef()
    folded.CopyFrom(graph_def)
    new_names = {}
    for tensor, value in zip(tensors, values):
        index = tensor.name.partition(":")[2]
        name = f"{tensor.op.name}/folded_{index}"
        new_names[tensor.name] = name
        node = folded.node.add(name=name, op="Const")
        node.attr["dtype"].type = tensor.dtype.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, tensor.dtype, value.shape))
    for node in folded.node:
        for i, given in enumerate(node.input):
            if not given.startswith("^"):
                key = given if ":" in given else f"{given}:0"
                node.input[i] = new_names.get(key, given)
        node.device = ""
    return tf.graph_util.extract_sub_graph(folded, nodes)


# ------------------------------------------------------------------------------------------------------------- writing
def write_assets(folder: Path, cfg: Config, category_ids: Sequence[int | str] | None) -> None:
    """settings.json (settings, classes and category ids) and class_names.txt (class 1 in the first line)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "packrcnn": project_version(), "class_names": list(cfg.DATA.CLASS_NAMES),
        "category_ids": list(category_ids or []), "settings": cfg.to_dict(),
    }  # fmt: skip
    with atomic_write(folder / SETTINGS_FILE) as f:
        json.dump(content, f, indent=1)
    with atomic_write(folder / CLASSES_FILE) as f:
        f.write("".join(f"{' '.join(name.split())}\n" for name in cfg.DATA.CLASS_NAMES))


def signatures(frozen: Frozen) -> dict[str, tuple[str, str, list[str]]]:
    """{signature: (input, its alias, keys of its outputs)}."""
    names = {"images": "serving_default", "image_bytes": "serving_bytes"}
    found = {}
    for given, outputs in frozen.outputs.items():
        plain = [key for key in outputs if key != "masks"]
        found[names[given]] = (given, given, plain)
        if "masks" in outputs:
            found["serving_masks" if given == "images" else "serving_bytes_masks"] = (given, given, list(outputs))
    return found


def write_saved_model(folder: Path, frozen: Frozen, assets: Sequence[Path]) -> None:
    """A SavedModel with the signatures of `signatures`, and the asset files. The folder must not exist; it appears when
    everything in it is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(frozen.graph_def, name="")
        for path in assets:
            tf.add_to_collection(tf.GraphKeys.ASSET_FILEPATHS, tf.constant(str(path), name=f"asset_{path.stem}"))

        def info(name: str) -> Any:
            return tf.saved_model.build_tensor_info(graph.get_tensor_by_name(name))

        described = {
            signature: tf.saved_model.build_signature_def(
                {alias: info(f"{given}:0")},
                {key: info(frozen.outputs[given][key]) for key in keys},
                tf.saved_model.PREDICT_METHOD_NAME,
            )
            for signature, (given, alias, keys) in signatures(frozen).items()
        }
        builder = tf.saved_model.Builder(str(partial))
        with tf.Session(graph=graph, config=tf.ConfigProto(device_count={"GPU": 0})) as session:
            builder.add_meta_graph_and_variables(
                session, [tf.saved_model.SERVING], described,
                assets_collection=tf.get_collection(tf.GraphKeys.ASSET_FILEPATHS),
            )  # fmt: skip
            builder.save()
    try:
        partial.rename(folder)
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror}") from None


# ------------------------------------------------------------------------------------------------------------- running
def found_in(outputs: dict[str, Any], height: int, width: int) -> Detections:
    """The outputs of an exported model for one image, [1,...] each -> detections as the Python predictor gives them."""
    count = int(outputs["count"][0])
    boxes = outputs["boxes"][0, :count]
    masks = None
    if "masks" in outputs:
        masks = [encode_mask(m) for m in outputs["masks"][0, :count]]
    elif "box_masks" in outputs:
        masks = paste_on_host(outputs["box_masks"][0, :count], boxes, height, width)
    keypoints = outputs["keypoints"][0, :count] if "keypoints" in outputs else None
    return Detections(boxes, outputs["scores"][0, :count], outputs["classes"][0, :count], masks, keypoints)


def saved_model_runner(folder: Path) -> Callable[[Any], Detections]:
    """run(uint8 BGR [H,W,3]) -> detections, by the SavedModel in this folder."""
    graph = tf.Graph()
    session = tf.Session(graph=graph, config=tf.ConfigProto(allow_soft_placement=True))
    with graph.as_default():
        described = tf.saved_model.load(session, [tf.saved_model.SERVING], str(folder)).signature_def
    signature = described.get("serving_masks") or described["serving_default"]
    fetches = {key: info.name for key, info in signature.outputs.items()}
    call = session.make_callable(fetches, [graph.get_tensor_by_name(signature.inputs["images"].name)])
    return lambda image: found_in(call(image[None, :, :, ::-1]), *image.shape[:2])
