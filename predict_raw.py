"""--predict … --raw: what a model sees before its decisions: proposals with their scores, and of each detected object
the scores of several classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common import UserError, atomic_write, logger, write_json
from config import inference_precision
from data import read_image, resize_for_test, stack_images
from detections import Detections
from inference import start_session
from model_frcnn import decode_detections
from model_rcnn import backbone_features, detect_boxes, make_roi_pooler, propose
from run_start import Fitting, Model, weight_loader, with_classes
from utils.tf_v1 import tf
from viz import Style, draw_detections, side_by_side

__all__ = ["RawReader", "classes_of_detections", "predict_raw"]

MOST_PROPOSALS = 50  # drawn
MOST_CLASSES = 3  # named beside an object


class RawReader:
    """read(pixels) -> {proposals [P,4], objectness [P], boxes [D,4], labels [D], scores [D], class_scores [D,C]} in the
    frame of the image, by falling score."""

    def __init__(self, model: Model, fitting: Fitting):
        self.cfg = with_classes(model.cfg, model.weights)
        if self.cfg.MODE_RPN_ONLY:
            raise UserError("--raw needs a model with a box head; --predict alone draws the proposals of MODE_RPN_ONLY")
        self.class_names: list[str] = self.cfg.DATA.CLASS_NAMES
        cfg = inference_precision(self.cfg)
        with tf.Graph().as_default() as graph:
            image = tf.placeholder(tf.uint8, [1, None, None, 3])
            shape = tf.placeholder(tf.int32, [1, 2])
            features = backbone_features(image, shape, cfg)
            pool = make_roi_pooler(features, cfg)
            boxes, scores, valid = detect_boxes(features, pool, shape, cfg)
            found = decode_detections(boxes, scores, valid, shape, cfg)
            with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                proposals, logits, there = propose(features, shape, cfg)
            outputs = {
                "proposals": proposals, "objectness": tf.sigmoid(logits), "there": there, "candidates": boxes,
                "candidate_scores": scores, "boxes": found[0], "scores": found[1], "labels": found[2],
                "count": found[3],
            }  # fmt: skip
            session = start_session(graph, weight_loader(model.weights, model.origin, fitting))
            self._call = session.make_callable(outputs, [image, shape])

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        batch, shapes = stack_images([resize_for_test(pixels, self.cfg)], self.cfg)
        out = {k: v[0] for k, v in self._call(batch, shapes).items()}
        scale = np.tile(np.divide(pixels.shape[1::-1], shapes[0][::-1]), 2)
        count, there = int(out["count"]), out["there"]
        boxes, labels = out["boxes"][:count], out["labels"][:count]
        classes = classes_of_detections(boxes, labels, out["candidates"], out["candidate_scores"])
        return {
            "proposals": out["proposals"][there] * scale, "objectness": out["objectness"][there],
            "boxes": boxes * scale, "labels": labels, "scores": out["scores"][:count], "class_scores": classes,
        }  # fmt: skip


def classes_of_detections(
    boxes: np.ndarray, labels: np.ndarray, candidates: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """[D,C]: the scores of all classes that the RoI of each detection got.

    boxes [D,4], labels [D] from 1; candidates [R,B,4], B = 1 or C, and scores [R,C] before any threshold or NMS. A
    detection's box is the candidate of its class that is nearest; of equal boxes the one with the best score is taken.
    """
    found = np.zeros((len(boxes), scores.shape[1]), np.float32)
    for i, (box, label) in enumerate(zip(boxes, labels.tolist())):
        own = candidates[:, 0 if candidates.shape[1] == 1 else label - 1]
        distance = np.abs(own - box).max(1)
        near = np.flatnonzero(distance <= distance.min())
        found[i] = scores[near[np.argmax(scores[near, label - 1])]]
    return found


def predict_raw(reader: RawReader, files: Sequence[str], output: str) -> None:
    """Writes <output>/raw_<number>_<name>.jpg for each file: its proposals on the left, its objects with their class
    scores on the right; and all numbers to <output>/raw.json."""
    entries: list[dict[str, Any]] = []
    names, unreadable = reader.class_names, []
    threshold = reader.cfg.TEST.RESULT_SCORE_THRESH_VIS
    for number, file in enumerate(files, 1):
        try:
            pixels = read_image(file)
        except UserError as e:
            logger.warning(f"{e}; this image is left out")
            unreadable.append(file)
            continue
        raw = reader(pixels)
        picture = _picture(pixels, raw, names, threshold)
        path = Path(output) / f"raw_{number:04}_{Path(file).stem}.jpg"
        with atomic_write(path, "wb", durable=False) as f:
            f.write(cv2.imencode(".jpg", picture)[1].tobytes())
        best = np.argsort(-raw["class_scores"], axis=1, kind="stable")[:, :MOST_CLASSES]
        entries.append({
            "file": file, "height": pixels.shape[0], "width": pixels.shape[1],
            "proposals": [
                {"box": np.round(b, 2).tolist(), "score": round(float(s), 5)}
                for b, s in zip(raw["proposals"], raw["objectness"])
            ],
            "objects": [
                {"box": np.round(b, 2).tolist(), "class": names[label - 1], "score": round(float(s), 5),
                 "classes": {names[c]: round(float(scores[c]), 5) for c in order.tolist()}}
                for b, label, s, scores, order in zip(
                    raw["boxes"], raw["labels"].tolist(), raw["scores"], raw["class_scores"], best
                )
            ],
        })  # fmt: skip
        logger.info(f"{number}/{len(files)} {path}: {len(raw['proposals'])} proposals, {len(raw['boxes'])} objects")
    write_json(Path(output) / "raw.json", entries)
    logger.info(f"all numbers are in {Path(output) / 'raw.json'}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(files)} images could not be read, e.g. {unreadable[0]}")


def _picture(pixels: np.ndarray, raw: dict[str, np.ndarray], names: Sequence[str], threshold: float) -> np.ndarray:
    boxes, scores = raw["proposals"][:MOST_PROPOSALS], raw["objectness"][:MOST_PROPOSALS]
    style = Style(parts="boxes", smallest=320)
    proposals = Detections(boxes, scores, np.ones(len(boxes), np.int32))
    left = draw_detections(pixels, proposals, [""], 0.0, style)
    shown = np.flatnonzero(raw["scores"] >= threshold)
    texts = []
    for i in shown.tolist():
        order = np.argsort(-raw["class_scores"][i], kind="stable")[:MOST_CLASSES].tolist()
        others = [f"{names[c]} {raw['class_scores'][i, c]:.2f}" for c in order if c != raw["labels"][i] - 1]
        texts.append(" | ".join([*others[: MOST_CLASSES - 1], names[raw["labels"][i] - 1]]))
    objects = Detections(raw["boxes"][shown], raw["scores"][shown], np.arange(1, len(shown) + 1))
    right = draw_detections(pixels, objects, texts, 0.0, style)
    return side_by_side(left, right, (f"the {len(boxes)} best proposals", "objects and what else they may be"))
