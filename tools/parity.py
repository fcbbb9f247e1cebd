#!/usr/bin/env python3
"""Compares the detector, tensor by tensor, with recordings of detectron2 ("golden" files) and prints what differs.

A directory holds `<model>.json` (settings), `<model>.weights.npz` (state dict) and `<model>.golden.npz` (inputs and
outputs) per model. The settings are derived from the json, the weights come through `tools/convert.py`, the same uint8
images go in. `make parity` runs it on ../shared/golden, `make parity GOLDEN=DIR` on another directory. The files are
not part of this repository; docs/FIDELITY.md says what they hold. The exit code is 1 when a tolerance is missed and 2
when there is nothing to compare.
"""

import import_path

import argparse
import functools
import io
import json
import lzma
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from common import UserError, atomic_write, check_output_file, logger, path_argument, read_json
from config import Config, default_config, finalize_config
from detections import paste_masks, to_original_frame
from tools.convert import convert
from utils.polygons import decode_mask, orient_outer, rings_to_edges
from utils.weight_files import read_npz

__all__ = [
    "Golden", "compare_inference", "compare_training", "convert_weights", "load_golden", "settings_from_golden",
    "unpack_recording",
]  # fmt: skip

DEFAULT_DIRECTORY = "../shared/golden"
BATCHES = {"b0": [0], "b1": [1], "b01": [0, 1]}

# The tolerance of each quantity. Relative errors are ||a - b|| / ||b||.
TOLERANCES = {
    "features (relative)": 2e-4,
    "RPN logits (relative)": 2e-4,
    "RPN deltas (relative)": 2e-4,
    "anchors (px)": 1e-4,
    "proposals: stable rows missing": 0,
    "proposals: others missing (per 1000)": 2,
    "proposal boxes (px)": 0.05,
    "box head logits (relative)": 1e-3,
    "box head deltas (relative)": 1e-3,
    "detections: stable rows missing": 0,
    "detections: others missing": 2,
    "detection boxes (px)": 0.05,
    "detection scores": 1e-3,
    "mask probabilities": 4e-3,
    "pasted masks (mean of 1 - IoU)": 0.01,
    "pasted masks (worst 1 - IoU of sure pixels)": 0.01,
    "keypoints (px)": 0.5,
    "keypoints: jumped (per 1000)": 2,
    "boxes in the original image (px)": 0.05,
    "masks in the original image (mean of 1 - IoU)": 0.01,
    "masks in the original image (worst 1 - IoU of sure pixels)": 0.01,
    "keypoints in the original image (px)": 0.5,
    "keypoints in the original image: jumped (per 1000)": 2,
    "anchor labels (differences)": 0,
    "RoIs: missing": 2,
    "RoI classes (differences)": 0,
    "losses (relative)": 5e-3,
    "gradients (relative)": 2e-2,
    "gradient of the worst tensor (relative)": 5e-2,
    "gradient norm of the worst tensor (relative)": 2e-2,
}


class Golden(NamedTuple):
    """One recorded model: `meta` the json, `arrays` the recorded tensors, `weights` the path of its state dict."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    weights: Path


class Row(NamedTuple):
    """One measured difference; `quantity` is a key of TOLERANCES."""

    model: str
    batch: str
    quantity: str
    error: float
    tolerance: float
    detail: str

    @property
    def good(self) -> bool:
        return bool(self.error <= self.tolerance)  # NaN is an error


def make_row(golden: Golden, batch: str, quantity: str, error: float, detail: str) -> Row:
    """The tolerance of gradients is wider with a mask branch, and at least twice the recorded system's difference from
    itself: a single ReLU input that rounding moves across zero changes gradients by 2e-2 (docs/FIDELITY.md).
    """
    tolerance = TOLERANCES[quantity]
    if quantity.startswith("gradient"):
        noise = golden.meta.get("kernel_noise", {})
        tolerance = max([tolerance, *(2 * v for k, v in noise.items() if k.endswith("grad_norm_rel_max"))])
        if golden.meta["config"]["mask_head"] is not None:
            tolerance = max(tolerance, 5e-2)
    return Row(golden.name, batch, quantity, error, tolerance, detail)


# ------------------------------------------------------------------------------------------------------------- reading
def golden_names(directory: str | os.PathLike) -> list[str]:
    """The sorted names of models with all three files."""
    directory = Path(directory)
    names = [p.name.removesuffix(".weights.npz") for p in sorted(directory.glob("*.weights.npz"))]
    return [n for n in names if (directory / f"{n}.json").exists() and (directory / f"{n}.golden.npz").exists()]


def load_golden(directory: str | os.PathLike, name: str) -> Golden:
    directory = Path(directory)
    with np.load(directory / f"{name}.golden.npz", allow_pickle=False) as content:
        arrays = {key: content[key] for key in content.files}
    weights = directory / f"{name}.weights.npz"
    return Golden(name, read_json(directory / f"{name}.json", "settings of the recording"), arrays, weights)


def unpack_recording(path: Path, folder: Path) -> None:
    """Writes the three files of a golden directory from one packed file (tests/data), in which weights of few bits are
    stored as the upper half of float32."""
    name = path.name.removeprefix("golden_").partition(".")[0]
    with lzma.open(path) as packed, np.load(io.BytesIO(packed.read()), allow_pickle=False) as content:
        weights, golden = {}, {}
        for key in content.files:
            kind, _, rest = key.partition("/")
            if kind == "weights":
                weights[rest] = content[key]
            elif kind == "upper16":
                weights[rest] = (content[key].astype(np.uint32) << 16).view(np.float32)
            elif kind == "golden":
                golden[rest] = content[key]
        np.savez(folder / f"{name}.weights.npz", **weights)
        np.savez(folder / f"{name}.golden.npz", **golden)
        (folder / f"{name}.json").write_bytes(content["json"].tobytes())


def settings_from_golden(meta: dict[str, Any]) -> list[str]:
    """KEY=VAL settings with which the graph equals the recorded model."""
    config = meta["config"]
    backbone, rpn, heads, box = config["backbone"], config["rpn"], config["roi_heads"], config["box_head"]
    fpn, anchors, mask, keypoint = config["fpn"], config["anchors"], config["mask_head"], config["keypoint_head"]
    cascade = config["cascade"]
    norm = {"FrozenBN": "FreezeBN", "GN": "GN", "SyncBN": "SyncBN", "": None}
    blocks = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[backbone["depth"]]
    values = {
        "MODE_FPN": fpn is not None,
        "MODE_MASK": mask is not None,
        "MODE_KEYPOINT": keypoint is not None,
        "DATA.NUM_CATEGORY": heads["num_classes"],
        "PREPROC.PIXEL_MEAN": config["input"]["pixel_mean"][::-1],
        "PREPROC.PIXEL_STD": config["input"]["pixel_std"][::-1],
        "BACKBONE.RESNET_NUM_BLOCK": blocks,
        "BACKBONE.NORM": norm[backbone["norm"]],
        "BACKBONE.FREEZE_AT": backbone["freeze_at"],
        "BACKBONE.STRIDE_1X1": backbone["stride_in_1x1"],
        "BACKBONE.STEM_CHANNELS": backbone["stem_out"],
        "BACKBONE.NUM_GROUPS": backbone["num_groups"],
        "BACKBONE.WIDTH_PER_GROUP": backbone["width_per_group"],
        "BACKBONE.BN_EPSILON": backbone["frozen_bn_eps"],
        "TRAIN.LOSS_PER_IMAGE": False,
        "RPN.ANCHOR_RATIOS": anchors["aspect_ratios"][0],
        "RPN.NEGATIVE_ANCHOR_THRESH": rpn["iou_thresholds"][0],
        "RPN.POSITIVE_ANCHOR_THRESH": rpn["iou_thresholds"][1],
        "RPN.BATCH_PER_IM": rpn["batch_size_per_image"],
        "RPN.FG_RATIO": rpn["positive_fraction"],
        "RPN.SMOOTH_L1_BETA": rpn["smooth_l1_beta"],
        "RPN.PROPOSAL_NMS_THRESH": rpn["nms_thresh"],
        "RPN.MIN_SIZE": rpn["min_size"],
        "RPN.TRAIN_ON_PADDING": True,
        "FRCNN.BATCH_PER_IM": heads["batch_size_per_image"],
        "FRCNN.FG_THRESH": heads["iou_thresholds"][0],
        "FRCNN.FG_RATIO": heads["positive_fraction"],
        "FRCNN.BBOX_REG_WEIGHTS": box["bbox_reg_weights"],
        "FRCNN.SMOOTH_L1_BETA": box["smooth_l1_beta"],
        "FRCNN.CLASS_AGNOSTIC": box["cls_agnostic_bbox_reg"],
        "FRCNN.ROI_SAMPLES": box["pooler_sampling_ratio"],
        "TEST.RESULT_SCORE_THRESH": heads["score_thresh_test"],
        "TEST.FRCNN_NMS_THRESH": heads["nms_thresh_test"],
        "TEST.RESULTS_PER_IM": heads["detections_per_image"],
    }
    before = [rpn["pre_nms_topk_train"], rpn["pre_nms_topk_test"]]
    after = [rpn["post_nms_topk_train"], rpn["post_nms_topk_test"]]
    if fpn is None:
        values |= {
            "RPN.ANCHOR_SIZES": anchors["sizes"][0],
            "RPN.ANCHOR_STRIDE": anchors["strides"][0],
            "RPN.HEAD_DIM": meta["weights"]["proposal_generator.rpn_head.conv.weight"][0],
            "RPN.TRAIN_PRE_NMS_TOPK": before[0],
            "RPN.TEST_PRE_NMS_TOPK": before[1],
            "RPN.TRAIN_POST_NMS_TOPK": after[0],
            "RPN.TEST_POST_NMS_TOPK": after[1],
        }
    else:
        head = "fastrcnn_2fc_head" if box["num_conv"] == 0 else "fastrcnn_4conv1fc_head"
        values |= {
            "RPN.ANCHOR_SIZES": [sizes[0] for sizes in anchors["sizes"]],
            "RPN.TRAIN_PER_LEVEL_NMS_TOPK": before[0],
            "RPN.TEST_PER_LEVEL_NMS_TOPK": before[1],
            "RPN.TRAIN_FPN_NMS_TOPK": after[0],
            "RPN.TEST_FPN_NMS_TOPK": after[1],
            "FPN.ANCHOR_STRIDES": anchors["strides"],
            "FPN.NUM_CHANNEL": fpn["out_channels"],
            "FPN.NORM": norm[fpn["norm"]],
            "FPN.FRCNN_HEAD_FUNC": head.replace("fc_head", "fc_gn_head") if box["norm"] == "GN" else head,
            "FPN.FRCNN_CONV_HEAD_DIM": box["conv_dim"],
            "FPN.FRCNN_FC_HEAD_DIM": box["fc_dim"],
            "FPN.CASCADE": cascade is not None,
        }
    if mask is not None:
        values["MRCNN.HEAD_DIM"] = mask["conv_dim"]
        if fpn is not None and mask["norm"] == "GN":
            values["FPN.MRCNN_HEAD_FUNC"] = "maskrcnn_up4conv_gn_head"
    if cascade is not None:
        values |= {"CASCADE.IOUS": cascade["ious"], "CASCADE.BBOX_REG_WEIGHTS": cascade["bbox_reg_weights"]}
    if keypoint is not None:
        values |= {
            "KRCNN.NUM_KEYPOINT": keypoint["num_keypoints"],
            "KRCNN.HEAD_DIM": keypoint["conv_dims"][0],
            "KRCNN.LOSS_WEIGHT": keypoint["loss_weight"],
        }
    return [f"{key}={value!r}" for key, value in values.items()]


def golden_config(golden: Golden, precision: str = "float32") -> Config:
    settings = [*settings_from_golden(golden.meta), f"TRAIN.PRECISION={precision}"]
    return finalize_config(default_config().update_args(settings, golden.name))


def polygons_of(golden: Golden, image: int) -> list[list[np.ndarray]]:
    """The polygons of each object, float64 [k,2] each."""
    prefix = f"data/{image}/"
    lengths, owners = golden.arrays[prefix + "poly_len"], golden.arrays[prefix + "poly_owner"]
    parts = np.split(golden.arrays[prefix + "poly_xy"], np.cumsum(lengths)[:-1])
    return [
        [part.reshape(-1, 2) for part, owner in zip(parts, owners) if owner == index]
        for index in range(len(golden.arrays[prefix + "gt_boxes"]))
    ]


def make_batch(golden: Golden, images: list[int], cfg: Config) -> dict[str, np.ndarray]:
    """The recorded images and objects as a training batch (the tensors of data.training_keys, and image_seed)."""
    data = [{k: golden.arrays[f"data/{i}/{k}"] for k in ("image_bgr", "gt_boxes", "gt_classes")} for i in images]
    shapes = np.array([d["image_bgr"].shape[:2] for d in data], np.int32)
    multiple = 32 if cfg.MODE_FPN else 1
    height, width = -(-shapes.max(0) // multiple) * multiple
    n, g = len(images), max(len(d["gt_boxes"]) for d in data)
    batch = {
        "image": np.zeros([n, height, width, 3], np.uint8),
        "image_shape": shapes,
        "image_seed": np.arange(n, dtype=np.int32),
        "gt_boxes": np.zeros([n, g, 4], np.float32),
        "gt_labels": np.zeros([n, g], np.int32),
        "gt_is_crowd": np.zeros([n, g], bool),
    }
    for row, entry in enumerate(data):
        h, w = shapes[row]
        batch["image"][row, :h, :w] = entry["image_bgr"]
        batch["gt_boxes"][row, : len(entry["gt_boxes"])] = entry["gt_boxes"]
        batch["gt_labels"][row, : len(entry["gt_boxes"])] = entry["gt_classes"] + 1
    if cfg.MODE_MASK:
        edges = [[rings_to_edges([orient_outer(p) for p in o]) for o in polygons_of(golden, i)] for i in images]
        batch["gt_edges"] = np.zeros([n, g, max(len(e) for image in edges for e in image), 4], np.float32)
        for row, image in enumerate(edges):
            for column, e in enumerate(image):
                batch["gt_edges"][row, column, : len(e)] = e
    if cfg.MODE_KEYPOINT:
        points = [golden.arrays[f"data/{i}/gt_keypoints"] for i in images]
        batch["gt_keypoints"] = np.zeros([n, g, *points[0].shape[1:]], np.float32)
        for row, entry in enumerate(points):
            batch["gt_keypoints"][row, : len(entry)] = entry
    return batch


# ------------------------------------------------------------------------------------------------------------- weights
def convert_weights(path: Path) -> dict[str, np.ndarray]:
    return convert(path)[0]


@functools.lru_cache(maxsize=1)
def element_map(weights: Path) -> tuple[dict[str, np.ndarray], dict[str, tuple]]:
    """The destination of every element in the conversion: {native name: int array, 0 or 1 + number of the source
    element}, and
    {source name: (first number, shape)}. Found by converting numbers instead of weights, so that gradients can be
    carried back without knowing the converter's rules."""
    spans, numbers, start = {}, {}, 0
    for key, value in read_npz(weights)[0].items():
        numbers[key] = np.arange(start + 1, start + value.size + 1, dtype=np.float32).reshape(value.shape)
        spans[key] = (start, value.shape)
        start += value.size
    if start >= 2**24:
        raise UserError(f"{weights}: {start} values are too many to number in float32")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / weights.name
        np.savez(path, **numbers)
        placed = convert_weights(path)
    return {k: np.rint(v).astype(np.int64) for k, v in placed.items()}, spans


def gradients_in_source_layout(gradients: dict[str, np.ndarray], weights: Path) -> dict[str, np.ndarray]:
    """{native name: gradient} -> {source name: flat gradient in the source's layout}."""
    placed, spans = element_map(weights)
    total = max(start + int(np.prod(shape)) for start, shape in spans.values())
    flat = np.zeros(total + 1)
    for name, gradient in gradients.items():
        flat[placed[name].ravel()] = gradient.ravel()
    return {key: flat[start + 1 : start + 1 + int(np.prod(shape))] for key, (start, shape) in spans.items()}


# ------------------------------------------------------------------------------------------------------------ measures
def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    if ours.shape != reference.shape:
        return float("inf")
    reference = reference.astype(np.float64)
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(ours - reference) / norm) if norm else float(np.abs(ours).max(initial=0))


def largest(ours: np.ndarray, reference: np.ndarray) -> float:
    if ours.shape != reference.shape:
        return float("inf")
    return float(np.abs(ours.astype(np.float64) - reference).max(initial=0.0))


def match_rows(boxes: np.ndarray, values: np.ndarray, to_boxes: np.ndarray, to_values: np.ndarray, classes=None):
    """For each reference row the index of an unused row of ours with the same class, within 0.05 px and 1e-3 of the
    value (relative to values above 1), else -1. `classes`: (ours, reference)."""
    found = np.full(len(to_boxes), -1)
    free = np.ones(len(boxes), bool)
    for row in range(len(to_boxes)):
        distance = np.abs(boxes - to_boxes[row]).max(1)
        good = free & (distance <= 0.05) & (np.abs(values - to_values[row]) <= 1e-3 * max(1, abs(to_values[row])))
        if classes is not None:
            good &= classes[0] == classes[1][row]
        if good.any():
            best = np.flatnonzero(good)[np.argmin(distance[good])]
            found[row], free[best] = best, False
    return found


def subsampled(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Channels and pixels of ours [N,C,H,W] that the recording kept: a stride of C // 2, // 4 or // 8 channels, and
    of 1, 2 or 4 pixels."""
    channels = ours.shape[1]
    for part in (channels, 8, 4, 2):
        taken = ours[:, :: max(1, channels // part)]
        for step in (1, 2, 4):
            if taken[:, :, ::step, ::step].shape == reference.shape:
                return taken[:, :, ::step, ::step]
    return ours


def nchw(x: np.ndarray) -> np.ndarray:
    return np.transpose(x, [0, 3, 1, 2])


def mask_errors(masks: np.ndarray, boxes: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Probabilities [D,M,M] and boxes [D,4] pasted into the frame of reference [D,H,W] -> mean of 1 - IoU, and the
    worst of 1 - IoU without the pixels whose probability is within its own tolerance of the threshold."""
    h, w = reference.shape[1:]
    slack = TOLERANCES["mask probabilities"]
    pasted = {
        threshold: [decode_mask(m).astype(bool) for m in paste_masks(masks, boxes, h, w, threshold)]
        for threshold in (0.5 - slack, 0.5, 0.5 + slack)
    }
    plain, sure = [0.0], [0.0]
    for low, ours, high, theirs in zip(*pasted.values(), reference):
        union = max(1, np.logical_or(ours, theirs).sum())
        differs = ours != theirs
        plain.append(differs.sum() / union)
        sure.append((differs & (low == high)).sum() / union)
    return float(np.sum(plain) / max(1, len(reference))), float(max(sure))


def unpack(packed: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.unpackbits(packed, axis=1)[:, : height * width].reshape(-1, height, width).astype(bool)


# ----------------------------------------------------------------------------------------------------------- inference
def inference_graph(cfg: Config) -> tuple[dict, dict]:
    """Placeholders and all compared tensors: outputs and intermediate results."""
    import model_rcnn
    from basemodel import preprocess_image, resnet_stages
    from model_rpn import rpn_anchors, rpn_head, rpn_proposals
    from utils.tf_v1 import tf

    image = tf.placeholder(tf.uint8, [None, None, None, 3])
    image_shape = tf.placeholder(tf.int32, [None, 2])
    fetches = {"outputs": model_rcnn.build_inference(image, image_shape, cfg)}
    with tf.variable_scope(tf.get_variable_scope(), reuse=True):
        stages = resnet_stages(preprocess_image(image, image_shape, cfg), cfg, 4 if cfg.MODE_FPN else 3)
        features = model_rcnn.backbone_features(image, image_shape, cfg)
        fetches["stem"] = next(op for op in tf.get_default_graph().get_operations() if op.type == "MaxPool").outputs[0]
        fetches["stages"], fetches["features"] = stages, features
        anchors = rpn_anchors(features, cfg)
        logits, deltas = rpn_head(features, cfg)
        fetches |= {"anchors": anchors, "logits": logits, "deltas": deltas}
        fetches["proposals"] = rpn_proposals(logits, deltas, anchors, image_shape, cfg, training=False)
        rois = tf.placeholder(tf.float32, [None, None, 4])
        if not cfg.FPN.CASCADE:
            fetches["box_head"] = model_rcnn.box_branch(model_rcnn.make_roi_pooler(features, cfg), rois, cfg)[:2]
    return {"image": image, "image_shape": image_shape, "rois": rois}, fetches


def compare_inference(
    golden: Golden, variables: dict[str, np.ndarray], batches=BATCHES, precision: str = "float32"
) -> Iterator[Row]:
    """Yields the differences of the model's features, proposals and detections from the recorded ones."""
    for name, images, result in run_inference(golden, variables, batches, precision):
        yield from inference_rows(golden, name, images, result, precision)


def run_inference(
    golden: Golden, variables: dict[str, np.ndarray], batches=BATCHES, precision: str = "float32"
) -> Iterator[tuple[str, list[int], dict]]:
    """Yields (name, images, what the model finds) of each recorded batch."""
    from utils.tf_v1 import allow_tf32, tf

    allow_tf32(False)
    cfg = golden_config(golden, precision)
    with tf.Graph().as_default(), tf.Session() as session:
        inputs, fetches = inference_graph(cfg)
        assign(session, variables, golden)
        for name, images in batches.items():
            if not (recorded := _recorded_inference(golden, name)):
                continue
            batch = make_batch(golden, images, cfg)
            rois = np.stack([recorded[f"img{i}/prop_boxes"][:50] for i in range(len(images))])
            feed = {inputs["image"]: batch["image"], inputs["image_shape"]: batch["image_shape"], inputs["rois"]: rois}
            yield name, images, session.run(fetches, feed)


def _recorded_inference(golden: Golden, name: str) -> dict[str, np.ndarray]:
    return {k.split("/", 2)[2]: v for k, v in golden.arrays.items() if k.startswith(f"inf/{name}/")}


def inference_rows(
    golden: Golden, name: str, images: list[int], result: dict, precision: str = "float32"
) -> Iterator[Row]:
    """Yields the differences of what `run_inference` found from the recording."""
    cfg = golden_config(golden, precision)
    batch = make_batch(golden, images, cfg)
    for quantity, error, detail in _inference_rows(result, _recorded_inference(golden, name), batch, cfg):
        yield make_row(golden, name, quantity, error, detail)


def _inference_rows(result: dict, recorded: dict, batch: dict, cfg: Config) -> Iterator[tuple[str, float, str]]:
    n = len(batch["image"])
    features = {"stem": result["stem"]} | {f"res{i + 2}": f for i, f in enumerate(result["stages"])}
    if cfg.MODE_FPN:
        features |= {f"p{i + 2}": f for i, f in enumerate(result["features"])}
    for key, value in features.items():
        reference = recorded.get(f"feat/{key}")
        if reference is not None:
            yield "features (relative)", relative(subsampled(nchw(value), reference), reference), key

    levels = [f"p{i + 2}" for i in range(len(result["logits"]))] if cfg.MODE_FPN else ["res4"]
    for level, feature, logits, deltas, anchors in zip(
        levels, result["features"], result["logits"], result["deltas"], result["anchors"]
    ):
        h, w = feature.shape[1:3]
        reference = {k: recorded.get(f"rpn/{level}/{k}") for k in ("logits", "deltas", "deltas_ds2", "anchors")}
        if reference["logits"] is not None:
            ours = nchw(logits.reshape(n, h, w, -1))
            yield "RPN logits (relative)", relative(ours, reference["logits"]), level
        ours = nchw(deltas.reshape(n, h, w, -1))
        if reference["deltas"] is not None:
            yield "RPN deltas (relative)", relative(ours, reference["deltas"]), level
        if reference["deltas_ds2"] is not None:
            yield "RPN deltas (relative)", relative(ours[:, :, ::2, ::2], reference["deltas_ds2"]), level
        if reference["anchors"] is not None:
            yield "anchors (px)", largest(anchors, reference["anchors"]), level

    if "box_head" in result:
        logits, deltas = result["box_head"][:2]
        reference = recorded["box/logits50"]  # background last
        yield "box head logits (relative)", relative(np.roll(logits, -1, 1), reference), ""
        deltas = deltas[:, 1:] if deltas.shape[1] > 1 else deltas
        yield "box head deltas (relative)", relative(deltas.reshape(len(deltas), -1), recorded["box/deltas50"]), ""

    for image in range(n):
        own = {k.removeprefix(f"img{image}/"): v for k, v in recorded.items() if k.startswith(f"img{image}/")}
        boxes, scores, valid = (p[image] for p in result["proposals"])
        yield from _proposal_rows(boxes[valid], scores[valid], own, f"image {image}")
        outputs = {k: v[image] for k, v in result["outputs"].items()}
        outputs = {k: v if k == "count" else v[: outputs["count"]] for k, v in outputs.items()}
        yield from _detection_rows(outputs, own, tuple(batch["image_shape"][image]), f"image {image}")


def _proposal_rows(boxes, scores, own: dict, detail: str) -> Iterator[tuple[str, float, str]]:
    found = match_rows(boxes, scores, own["prop_boxes"], own["prop_logits"])
    stable = own.get("prop_stable", np.zeros(len(found), bool))
    missing = found < 0
    extra = max(0, len(boxes) - len(found))
    yield "proposals: stable rows missing", int((missing & stable).sum()), detail
    others = 1000 * (int((missing & ~stable).sum()) + extra) / max(1000, len(found))
    yield "proposals: others missing (per 1000)", others, detail
    yield "proposal boxes (px)", largest(boxes[found[~missing]], own["prop_boxes"][~missing]), detail


def _detection_rows(outputs: dict, own: dict, image_hw, detail: str) -> Iterator[tuple[str, float, str]]:
    boxes, scores, labels = outputs["boxes"], outputs["scores"], outputs["labels"]
    classes = labels - 1
    found = match_rows(boxes, scores, own["det_boxes"], own["det_scores"], (classes, own["det_classes"]))
    missing = found < 0
    there = found[~missing]
    extra = max(0, len(boxes) - len(found))
    yield "detections: stable rows missing", int((missing & own["det_stable"]).sum()), detail
    yield "detections: others missing", int((missing & ~own["det_stable"]).sum()) + extra, detail
    yield "detection boxes (px)", largest(boxes[there], own["det_boxes"][~missing]), detail
    yield "detection scores", largest(scores[there], own["det_scores"][~missing]), detail
    recorded = own.get("det_mask_probs", own.get("det_mask_probs_first16"))
    if recorded is not None:
        rows = np.flatnonzero(~missing[: len(recorded)])
        yield "mask probabilities", largest(outputs["masks"][found[rows]], recorded[rows]), detail

    h, w = image_hw
    order = match_rows(boxes, scores, own["post_boxes"], own["post_scores"], (classes, own["post_classes"]))
    rows = np.flatnonzero(order >= 0)
    if "post_masks_packed" in own and "masks" in outputs:
        reference = unpack(own["post_masks_packed"], h, w)[rows]
        mean, worst = mask_errors(outputs["masks"][order[rows]], boxes[order[rows]], reference)
        yield "pasted masks (mean of 1 - IoU)", mean, detail
        yield "pasted masks (worst 1 - IoU of sure pixels)", worst, detail
    if "post_keypoints" in own:
        yield from _keypoint_rows(outputs["keypoints"][order[rows]], own["post_keypoints"][rows], "", detail)
    if "orig_hw" in own:
        # Boxes without area are dropped in any frame: row numbers passed as scores show which are left.
        numbered = outputs | {"scores": np.arange(len(boxes), dtype=np.float32)}
        moved = to_original_frame(numbered, (h, w), tuple(own["orig_hw"]))
        place = {int(number): row for row, number in enumerate(moved.scores)}
        pairs = [(place[order[r]], r) for r in rows if order[r] in place and r < len(own["orig_boxes"])]
        ours, theirs = (np.array(x, np.int64) for x in zip(*pairs)) if pairs else (np.zeros(0, np.int64),) * 2
        yield "boxes in the original image (px)", largest(moved.boxes[ours], own["orig_boxes"][theirs]), detail
        if "orig_masks_packed_first8" in own:
            reference = unpack(own["orig_masks_packed_first8"], *own["orig_hw"])
            first = theirs < len(reference)
            kept = outputs["masks"][order[theirs[first]]]
            mean, worst = mask_errors(kept, moved.boxes[ours[first]], reference[theirs[first]])
            yield "masks in the original image (mean of 1 - IoU)", mean, detail
            yield "masks in the original image (worst 1 - IoU of sure pixels)", worst, detail
        if "orig_keypoints" in own:
            ours, theirs = moved.keypoints[ours], own["orig_keypoints"][theirs]
            yield from _keypoint_rows(ours, theirs, " in the original image", detail)


def _keypoint_rows(ours: np.ndarray, theirs: np.ndarray, where: str, detail: str) -> Iterator[tuple[str, float, str]]:
    """[D,K,3] each. If two cells of a map are equal up to rounding, the point may jump. Points that jumped are counted,
    others measured."""
    distance = np.abs(ours[..., :2].astype(np.float64) - theirs[..., :2]).max(-1)  # [D, K]
    near = distance <= TOLERANCES["keypoints (px)"]
    yield f"keypoints{where} (px)", distance[near].max(initial=0.0), detail
    yield f"keypoints{where}: jumped (per 1000)", 1000 * (~near).sum() / max(1000, near.size), detail


# ------------------------------------------------------------------------------------------------------------ training
def training_graph(cfg: Config, size: int) -> tuple[dict, dict]:
    import model_rcnn
    from model_frcnn import sample_rois
    from model_losses import usable_gt
    from model_rpn import match_anchors, rpn_anchors, rpn_head, rpn_proposals
    from utils.tf_v1 import tf

    kinds = {
        "image": (tf.uint8, [size, None, None, 3]), "image_shape": (tf.int32, [size, 2]),
        "image_seed": (tf.int32, [size]), "gt_boxes": (tf.float32, [size, None, 4]),
        "gt_labels": (tf.int32, [size, None]), "gt_is_crowd": (tf.bool, [size, None]),
    }  # fmt: skip
    if cfg.MODE_MASK:
        kinds["gt_edges"] = (tf.float32, [size, None, None, 4])
    if cfg.MODE_KEYPOINT:
        kinds["gt_keypoints"] = (tf.float32, [size, None, cfg.KRCNN.NUM_KEYPOINT, 3])
    batch = {key: tf.placeholder(kind, shape, name=key) for key, (kind, shape) in kinds.items()}
    losses, _ = model_rcnn.build_training(batch, cfg)
    variables = tf.trainable_variables()
    gradients = tf.gradients(tf.add_n(list(losses.values())), variables)
    fetches = {
        "losses": losses,
        "gradients": {v.op.name: g for v, g in zip(variables, gradients) if g is not None},
    }
    with tf.variable_scope(tf.get_variable_scope(), reuse=True):
        features = model_rcnn.backbone_features(batch["image"], batch["image_shape"], cfg)
        anchors = rpn_anchors(features, cfg)
        logits, deltas = rpn_head(features, cfg)
        proposals, scores, valid = rpn_proposals(logits, deltas, anchors, batch["image_shape"], cfg, training=True)
        fetches["proposals"] = proposals, scores, valid
        rois, _ = sample_rois(proposals, valid, batch, cfg)
        fetches["rois"] = {k: rois[k] for k in ("boxes", "valid", "labels")}
        fetches["anchors"] = match_anchors(tf.concat(anchors, 0), batch["gt_boxes"], usable_gt(batch), cfg)[:2]
    return batch, fetches


def compare_training(
    golden: Golden, variables: dict[str, np.ndarray], batches=BATCHES, precision: str = "float32"
) -> Iterator[Row]:
    """Yields the differences of losses, gradients and intermediate results."""
    from utils.tf_v1 import allow_tf32, tf

    allow_tf32(False)
    cfg = golden_config(golden, precision)
    for size in sorted({len(images) for images in batches.values()}):
        with tf.Graph().as_default(), tf.Session() as session:
            inputs, fetches = training_graph(cfg, size)
            assign(session, variables, golden)
            for name, images in batches.items():
                recorded = {k.split("/", 2)[2]: v for k, v in golden.arrays.items() if k.startswith(f"train/{name}/")}
                if len(images) != size or not recorded:
                    continue
                batch = make_batch(golden, images, cfg)
                result = session.run(fetches, {inputs[key]: batch[key] for key in inputs})
                rows = [*_loss_rows(result, recorded, golden), *_sample_rows(result, recorded, cfg)]
                for quantity, error, detail in rows:
                    yield make_row(golden, name, quantity, error, detail)


LOSS_NAMES = {
    "loss_rpn_cls": "rpn/class_loss",
    "loss_rpn_loc": "rpn/box_loss",
    "loss_cls": "frcnn/class_loss",
    "loss_box_reg": "frcnn/box_loss",
    "loss_mask": "mrcnn/mask_loss",
    "loss_keypoint": "krcnn/keypoint_loss",
} | {
    f"loss_{theirs}_stage{stage}": f"cascade_rcnn_stage{stage + 1}/{ours}"
    for stage in range(3)
    for theirs, ours in (("cls", "class_loss"), ("box_reg", "box_loss"))
}


def _loss_rows(result, recorded, golden: Golden) -> Iterator[tuple[str, float, str]]:
    for key, reference in recorded.items():
        if key.startswith("loss/"):
            ours = result["losses"].get(LOSS_NAMES[key.removeprefix("loss/")], float("nan"))
            yield "losses (relative)", abs(float(ours) / float(reference) - 1), key.removeprefix("loss/")

    flat = gradients_in_source_layout(result["gradients"], golden.weights)
    ours, theirs = {}, {}  # per tensor all recorded values
    for key, reference in recorded.items():
        kind, _, name = key.partition("/")
        if kind in ("grad", "grad_first64", "grad_stride"):
            step = max(1, len(flat[name]) // 509)
            taken = {"grad": flat[name], "grad_first64": flat[name][:64], "grad_stride": flat[name][::step]}[kind]
            ours[name] = np.append(ours.get(name, []), taken)
            theirs[name] = np.append(theirs.get(name, []), reference.ravel())
    if ours:
        together = [np.concatenate(list(x.values())) for x in (ours, theirs)]
        yield "gradients (relative)", relative(*together), ""
        errors = {name: relative(ours[name], theirs[name]) for name in ours}
        worst = max(errors, key=errors.get)
        yield "gradient of the worst tensor (relative)", errors[worst], worst
    norms = recorded.get("grad_norms")
    if norms is not None:
        names = golden.arrays["param_names"]
        known = norms >= 0
        ours = np.array([np.linalg.norm(flat[str(name)]) for name in names[known]])
        # Shifting all logits of a softmax changes nothing, so the gradient of that bias is only rounding error.
        floor = 1e-6 * np.linalg.norm(norms[known])
        errors = np.abs(ours - norms[known]) / np.maximum(norms[known], floor)
        worst = int(np.argmax(errors))
        yield "gradient norm of the worst tensor (relative)", float(errors[worst]), str(names[known][worst])


def _sample_rows(result, recorded, cfg: Config) -> Iterator[tuple[str, float, str]]:
    for image in range(len(result["proposals"][0])):
        own = {k.removeprefix(f"img{image}/"): v for k, v in recorded.items() if k.startswith(f"img{image}/")}
        detail = f"image {image}, training"
        boxes, scores, valid = (p[image] for p in result["proposals"])
        yield from _proposal_rows(boxes[valid], scores[valid], own, detail)
        foreground, background = (a[image] for a in result["anchors"])
        labels = np.where(foreground, 1, np.where(background, 0, -1))
        yield "anchor labels (differences)", int((labels != own["rpn_labels"]).sum()), detail
        valid = result["rois"]["valid"][image]
        boxes, labels = result["rois"]["boxes"][image][valid], result["rois"]["labels"][image][valid]
        theirs = np.where(own["roi_gt_classes"] == cfg.DATA.NUM_CATEGORY, 0, own["roi_gt_classes"] + 1)
        found = match_rows(boxes, np.zeros(len(boxes)), own["roi_boxes"], np.zeros(len(theirs)))
        yield "RoIs: missing", int((found < 0).sum()) + abs(len(boxes) - len(theirs)), detail
        there = found >= 0
        yield "RoI classes (differences)", int((labels[found[there]] != theirs[there]).sum()), detail


# ----------------------------------------------------------------------------------------------------------- reporting
def assign(session: Any, variables: dict[str, np.ndarray], golden: Golden) -> None:
    """Sets every variable of the graph; all of them must be given."""
    from utils.tf_v1 import tf

    for variable in tf.global_variables():
        value = variables.get(variable.op.name)
        if value is None or tuple(value.shape) != tuple(variable.shape.as_list()):
            got = "nothing" if value is None else list(value.shape)
            raise UserError(f"{golden.weights}: {variable.op.name} needs {variable.shape.as_list()}, has {got}")
        variable.load(value, session)


def summarize(rows: list[Row]) -> list[list]:
    """One line per model and quantity with the worst of its errors."""
    worst: dict[tuple, Row] = {}
    for row in rows:
        key = row.model, row.quantity
        if key not in worst or not row.error <= worst[key].error:
            worst[key] = row
    lines = []
    for r in worst.values():
        verdict = "ok" if r.good else "MISSED"
        lines.append([r.model, r.quantity, f"{r.error:.2g}", f"{r.tolerance:g}", verdict, f"{r.batch} {r.detail}"])
    return lines


HEADERS = ["model", "quantity", "worst error", "tolerance", "", "where"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "directory", nargs="?", type=path_argument, default=os.environ.get("GOLDEN") or DEFAULT_DIRECTORY
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models")
    parser.add_argument("--precision", choices=["float32", "float64"], default="float64", help="of convolutions")
    parser.add_argument(
        "--markdown", type=path_argument, metavar="FILE", help="also write the table there, one row per quantity"
    )
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write every single difference there")
    args = parser.parse_args(arguments)
    try:
        for flag, path in (("--markdown", args.markdown), ("--json", args.json)):
            if path:
                check_output_file(path, flag)
        rows = run(args.directory, args.models, args.precision)
    except UserError as error:
        logger.error(str(error))
        return 2
    print(tabulate(summarize(rows), HEADERS, disable_numparse=True))
    if args.markdown:
        with atomic_write(args.markdown) as f:
            f.write(markdown(rows))
    if args.json:
        with atomic_write(args.json) as f:
            json.dump([r._asdict() for r in rows], f, indent=0)
    missed = sum(not r.good for r in rows)
    print(f"parity: {len(rows)} differences measured, {missed} beyond their tolerance")
    return 1 if missed else 0


def run(directory: str, models: list[str] | None = None, precision: str = "float32") -> list[Row]:
    names = golden_names(directory)
    if not names:
        raise UserError(
            f"no recordings in {directory}: they are not part of this repository (see docs/FIDELITY.md); "
            "make parity GOLDEN=DIR names another directory"
        )
    unknown = sorted(set(models or []) - set(names))
    if unknown:
        raise UserError(f"no golden files of {', '.join(unknown)} in {directory}; there are {', '.join(names)}")
    rows = []
    for name in models or names:
        start = time.time()
        golden = load_golden(directory, name)
        variables = convert_weights(golden.weights)
        rows += compare_inference(golden, variables, precision=precision)
        rows += compare_training(golden, variables, precision=precision)
        missed = [r for r in rows if r.model == name and not r.good]
        logger.info(f"{name}: {len(missed)} missed, {time.time() - start:.0f} s")
        for row in missed:
            logger.warning(f"{row.model} {row.batch}: {row.quantity} {row.error:.3g} > {row.tolerance:g}, {row.detail}")
    return rows


def markdown(rows: list[Row]) -> str:
    """A table quantity x model of the worst errors, with "(of T)" where a model has a tolerance T of its own."""
    models = list(dict.fromkeys(r.model for r in rows))
    quantities = list(dict.fromkeys(r.quantity for r in rows))
    table = []
    for quantity in quantities:
        line = [quantity, f"{TOLERANCES[quantity]:g}"]
        for model in models:
            found = [r for r in rows if r.model == model and r.quantity == quantity]
            worst = max(found, key=lambda r: r.error, default=None)
            usual = worst is None or worst.tolerance == TOLERANCES[quantity]
            line.append(f"{worst.error:.2g}{'' if usual else f' (of {worst.tolerance:.2g})'}" if worst else "")
        table.append(line)
    return tabulate(table, ["worst error", "tolerance", *models], tablefmt="github", disable_numparse=True) + "\n"


if __name__ == "__main__":
    sys.exit(main())
