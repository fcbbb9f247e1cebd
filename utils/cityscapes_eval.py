"""Cityscapes' instance metric (Cordts et al., "The Cityscapes Dataset", CVPR 2016, section 4.2) and its label numbers.

Average precision over the mask overlaps 0.50, 0.55, … 0.95, class by class. A detection overlaps an object when their
IoU is above the threshold. Of several detections of an object the best is right and the others are wrong. A detection
that overlaps no object is wrong, unless it is ignored: the share of it on void, on groups of its class and on objects
below 100 pixels is above the threshold.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from common import UserError, read_text
from utils.coco_format import read_number
from utils.image_header import decode_image
from utils.polygons import encode_mask, encode_segmentation

__all__ = ["INSTANCE_IDS", "LABEL_IDS", "VOID_IDS", "evaluate_cityscapes", "read_cityscapes_detections"]

_NAMES = (
    "unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground, road, sidewalk, parking, "
    "rail track, building, wall, fence, guard rail, bridge, tunnel, pole, polegroup, traffic light, traffic sign, "
    "vegetation, terrain, sky, person, rider, car, truck, bus, caravan, trailer, train, motorcycle, bicycle"
)
LABEL_IDS = {name: i for i, name in enumerate(_NAMES.split(", "))}
_SCORED_STUFF = ("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
                 "terrain", "sky")  # fmt: skip
# Caravans and trailers have instances too, but the benchmark does not score them.
INSTANCE_IDS = {n: LABEL_IDS[n] for n in ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")}
VOID_IDS = [i for name, i in LABEL_IDS.items() if name not in INSTANCE_IDS and name not in _SCORED_STUFF]

IOU_THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # rounded as in the official tool, since overlaps must be above
MIN_PIXELS = 100


def evaluate_cityscapes(
    content: dict[str, Any], results: Sequence[dict[str, Any]], on_class: Callable[..., None] | None = None
) -> dict[str, float]:
    """Scores COCO-format results with masks.

    content: COCO-like; annotations with iscrowd are groups, an image's "void" is a mask (run lengths) of its void.
    Returns AP, AP50, AP_per_class/<name> and AP50_per_class/<name>; nan for classes without a scored object.
    `on_class(category id, image ids [P], objects to be found in each [P], for each threshold the scores, hits and
    places in the image ids of what AP is computed from)` is called for each class.
    """
    images = {image["id"]: image for image in content["images"]}
    objects, found = defaultdict(list), defaultdict(list)
    for a in content["annotations"]:
        run = _run(a.get("segmentation"), images[a["image_id"]], "an object")
        objects[a["category_id"], a["image_id"]].append((run, bool(a.get("iscrowd"))))
    for r in results:
        run = _run(r.get("segmentation"), images[r["image_id"]], "a result")
        if mask_utils.area(run):  # empty masks are not looked at
            found[r["category_id"], r["image_id"]].append((run, r["score"]))
    metrics, per_class = {}, {}
    for category in sorted(content["categories"], key=lambda c: c["id"]):
        keys = sorted((k for k in {*objects, *found} if k[0] == category["id"]), key=lambda k: str(k[1]))
        parts = [_overlaps(objects.get(k, []), found.get(k, []), images[k[1]].get("void")) for k in keys]
        per_class[category["name"]] = [_average_precision(parts, t) for t in IOU_THRESHOLDS]
        if on_class is not None:
            numbers = [int(counts.sum()) for _, _, counts, _ in parts]
            on_class(category["id"], [k[1] for k in keys], numbers, [_settle(parts, t) for t in IOU_THRESHOLDS])
    table = np.array(list(per_class.values())).reshape(-1, len(IOU_THRESHOLDS))
    valid = table[~np.isnan(table).any(1)]
    metrics["AP"] = float(valid.mean()) if len(valid) else float("nan")
    metrics["AP50"] = float(valid[:, 0].mean()) if len(valid) else float("nan")
    metrics |= {f"AP_per_class/{name}": float(np.mean(aps)) for name, aps in per_class.items()}
    return metrics | {f"AP50_per_class/{name}": float(aps[0]) for name, aps in per_class.items()}


def _run(segmentation: Any, image: dict[str, Any], what: str) -> dict[str, Any]:
    size = [image["height"], image["width"]]
    if not segmentation:
        raise UserError(f"image {image['id']}: {what} has no segmentation; Cityscapes' metric scores masks")
    return encode_segmentation(segmentation, *size)


def _overlaps(objects: list[tuple], found: list[tuple], void: dict | None) -> tuple:
    """One class in one image, D detections and G objects: scores [D], IoU [D, G], counts bool [G] (the objects that are
    scored: no groups, and large enough), and the share of each detection on ignored regions [D]."""
    scores = np.array([score for _, score in found], float)
    group = np.array([is_group for _, is_group in objects], bool)
    gt_runs, runs = [run for run, _ in objects], [run for run, _ in found]
    # One by one: pycocotools' area fails for more than 255 masks at once.
    gt_area, area = (np.array([mask_utils.area(run) for run in r], float) for r in (gt_runs, runs))
    inside = np.zeros((len(runs), len(gt_runs)))
    on_void = np.zeros(len(runs))
    if runs and gt_runs:  # pycocotools divides by the detection's area for crowds
        inside = np.rint(np.asarray(mask_utils.iou(runs, gt_runs, [1] * len(gt_runs))) * area[:, None])
    if runs and void:
        on_void = np.rint(np.asarray(mask_utils.iou(runs, [void], [1]))[:, 0] * area)
    small = gt_area < MIN_PIXELS
    # A small group is counted twice, as in the official tool.
    ignored = on_void + inside @ (group.astype(float) + small)
    iou = inside / np.maximum(area[:, None] + gt_area - inside, 1)
    return scores, iou, ~group & ~small, ignored / np.maximum(area, 1)


def _settle(parts: list[tuple], threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores float64 [S], right bool [S] and part int64 [S] of the scored detections of one class."""
    scores, right, place = [np.zeros(0)], [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    for number, (score, iou, counts, ignored) in enumerate(parts):
        good = iou > threshold
        for of_object in good[:, counts].T:
            scores.append(np.sort(score[of_object])[::-1])
            right.append(np.arange(of_object.sum()) == 0)
        wrong = ~good.any(1) & (ignored <= threshold)
        scores.append(score[wrong])
        right.append(np.zeros(int(wrong.sum()), bool))
        place.append(np.full(int(good[:, counts].sum() + wrong.sum()), number))
    return np.concatenate(scores), np.concatenate(right), np.concatenate(place)


def _average_precision(parts: list[tuple], threshold: float) -> float:
    """Area under the line through precision and recall at every distinct score, from (0, 1) on; nan without objects."""
    number = sum(int(counts.sum()) for _, _, counts, _ in parts)
    if not number:
        return float("nan")
    scores, right, _ = _settle(parts, threshold)
    if not len(scores):
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # equal scores are one point of the curve
    true = np.cumsum(right[order])[last]
    precision, recall = np.append(1.0, true / (last + 1)), np.append(0.0, true / number)
    return float(np.sum(np.diff(recall) * (precision[1:] + precision[:-1]) / 2))


def read_cityscapes_detections(folder: str | Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """A folder in the benchmark's submission form as COCO results: for each image a <image id>*.txt, anywhere below,
    whose lines name a mask image (relative to the file), a label number and a score."""
    names = {i: n for n, i in INSTANCE_IDS.items()}
    category_of = {c["name"]: c["id"] for c in content["categories"]}
    files = sorted(Path(folder).rglob("*.txt"))
    results = []
    for image in content["images"]:
        # The id must end there: a_1 does not match a_10.
        name = str(image["id"])
        matches = [f for f in files if f.name.startswith(name) and not f.name[len(name)].isalnum()]
        if len(matches) != 1:
            raise UserError(f"detections {folder}: {len(matches)} files {image['id']}*.txt; every image needs one")
        for number, line in enumerate(read_text(matches[0], "detections").splitlines(), 1):
            words = line.split()
            try:
                name, label, score = words[0], int(words[1]), read_number(words[2])
            except (IndexError, ValueError):
                raise UserError(f"detections {matches[0]}, line {number}: not 'mask.png label score'") from None
            if names.get(label) not in category_of:
                continue  # the benchmark ignores other classes
            path = matches[0].parent / name
            mask = decode_image(path, cv2.IMREAD_UNCHANGED, f"detections {matches[0]}, line {number}: {path}")
            if mask.shape[:2] != (image["height"], image["width"]):
                raise UserError(f"detections {matches[0]}, line {number}: {path} is no image of the photograph's size")
            inside = mask.reshape(*mask.shape[:2], -1).any(2)
            results.append({
                "image_id": image["id"], "category_id": category_of[names[label]], "score": score,
                "segmentation": encode_mask(inside),
            })  # fmt: skip
    return results
