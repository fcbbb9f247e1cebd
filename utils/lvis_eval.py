"""LVIS v1 scores of COCO-format results: the federated protocol of Gupta et al., "LVIS", CVPR 2019, section 3.2.

Every image is annotated for some categories only. A detection is scored when its category has an object in the image or
is known to be absent (`neg_category_ids`); one that matches nothing is forgiven when the category is not exhaustively
annotated there (`not_exhaustive_category_ids`). Up to 300 detections per image are scored, and AP is split by how many
training
images a category has: rare (1-10), common (11-100), frequent (> 100).

Written here because the `lvis` package (0.5.3, 2020) uses names that NumPy 1.24 removed and needs the OpenCV wheel
that links to libGL.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from common import UserError
from utils.polygons import encode_segmentation

__all__ = ["evaluate_lvis", "MAX_DETECTIONS"]

MAX_DETECTIONS = 300
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
FREQUENCIES = ("r", "c", "f")


def evaluate_lvis(
    content: dict[str, Any],
    results: Sequence[dict[str, Any]],
    iou_type: str = "bbox",
    max_detections: int = MAX_DETECTIONS,
) -> dict[str, float]:
    """Scores `results` against an LVIS annotation file's `content`; `iou_type` is "bbox" or "segm".

    Returns fractions by the protocol's names (AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl) and
    "AP_per_class/<name>"; nan where there is no ground truth.
    """
    images = {image["id"]: image for image in content["images"]}
    categories = sorted(content["categories"], key=lambda c: _place(c["id"]))
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        incomplete = next((i for i, image in images.items() if key not in image), None)
        if incomplete is not None:
            raise UserError(f"annotations: image {incomplete} has no {key}; the LVIS protocol needs it")
    objects: dict[tuple, list] = defaultdict(list)
    for a in content["annotations"]:
        objects[a["category_id"], a["image_id"]].append(a)
    found = _group_results(results, images, categories, objects, max_detections)
    shape = (len(AREAS), len(IOU_THRESHOLDS), len(categories))
    precision, recall = np.full((*shape, len(RECALLS)), np.nan), np.full(shape, np.nan)
    keys = defaultdict(list)
    for category, image in sorted({*objects, *found}, key=lambda key: (_place(key[0]), _place(key[1]))):
        keys[category].append((category, image))
    boxed = bool(results) and all("bbox" in r for r in results)
    for number, category in enumerate(categories):
        parts = [
            _match(objects.get(key, []), found.get(key, []), images[key[1]], iou_type, boxed)
            for key in keys[category["id"]]
        ]
        if parts:
            _accumulate(parts, precision[:, :, number], recall[:, :, number])
    return _summary(precision, recall, categories)


def _place(identity: int | str) -> tuple[bool, int | str]:
    """Numbers in their order, then texts."""
    return isinstance(identity, str), identity


def _group_results(results, images, categories, objects, max_detections) -> dict[tuple, list]:
    """The scored results of each (category, image), by descending score."""
    known = {c["id"] for c in categories}
    per_image = defaultdict(list)
    for r in results:
        if r["image_id"] not in images or r["category_id"] not in known:
            raise UserError(f"results: image {r['image_id']} or category {r['category_id']} is not in the annotations")
        per_image[r["image_id"]].append(r)
    absent = {i: set(image["neg_category_ids"]) for i, image in images.items()}
    found: dict[tuple, list] = defaultdict(list)
    for image_id, entries in per_image.items():
        for r in sorted(entries, key=lambda r: -r["score"])[:max_detections]:
            key = r["category_id"], image_id
            if r["category_id"] in absent[image_id] or key in objects:
                found[key].append(r)
    return found


def _run_lengths(entry: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    segmentation = entry.get("segmentation")
    if not segmentation:
        raise UserError(f"image {image['id']}: an object or a result has no segmentation, but masks are to be scored")
    return encode_segmentation(segmentation, image["height"], image["width"])


def _box(entry: dict[str, Any]) -> list[float]:
    if entry.get("bbox") is None:
        raise UserError(f"image {entry['image_id']}: a result has no bbox, but boxes are to be scored")
    return entry["bbox"]


def _match(objects: list[dict], found: list[dict], image: dict, iou_type: str, boxed: bool) -> tuple:
    """Matches one category in one image for all area ranges A and IoU thresholds T.

    Returns scores [D], matched bool [A, T, D], ignored bool [A, T, D], and the number of objects that count [A].
    """
    if iou_type == "segm":
        gt_shapes: list = [_run_lengths(a, image) for a in objects]
        dt_shapes: list = [_run_lengths(r, image) for r in found]
    else:
        gt_shapes, dt_shapes = [a["bbox"] for a in objects], [_box(r) for r in found]
    gt_area = np.array([a["area"] for a in objects], float)
    # As in the protocol, a detection's area is that of its box if the results have boxes, else that of its mask.
    dt_area = [r["bbox"][2] * r["bbox"][3] if boxed else float(mask_utils.area(_run_lengths(r, image))) for r in found]
    low, high = np.array(list(AREAS.values()), float).T[:, :, None]
    gt_outside = (gt_area < low) | (gt_area > high) | np.array([bool(a.get("ignore")) for a in objects], bool)  # [A, G]
    dt_outside = (np.array(dt_area) < low) | (np.array(dt_area) > high)  # [A, D]
    forgiven = bool(found) and found[0]["category_id"] in image["not_exhaustive_category_ids"]
    shape = (len(AREAS), len(IOU_THRESHOLDS))
    matched, ignored = np.zeros((*shape, len(found)), bool), np.zeros((*shape, len(found)), bool)
    if objects and found:
        ious = np.asarray(mask_utils.iou(dt_shapes, gt_shapes, [0] * len(objects)))
        enough = ious[:, None] >= np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]  # [D, T, G]
        free = np.ones((*shape, len(objects)), bool)
        outside = np.broadcast_to(gt_outside[:, None], free.shape)
        for d in np.flatnonzero(enough.any((1, 2))):
            possible = enough[d] & free
            # An object inside the area range is preferred whatever its overlap; of equal overlaps the last is taken.
            inside = possible & ~outside
            candidates = np.where(inside.any(2, keepdims=True), inside, possible)
            value = np.where(candidates, ious[d], -1.0)[..., ::-1]
            g = len(objects) - 1 - value.argmax(2)  # [A, T]
            hit = candidates.any(2)
            a, t = np.nonzero(hit)
            free[a, t, g[a, t]] = False
            matched[:, :, d] = hit
            ignored[a, t, d] = gt_outside[a, g[a, t]]
    ignored |= ~matched & (dt_outside[:, None] | forgiven)
    return np.array([r["score"] for r in found], float), matched, ignored, (~gt_outside).sum(1)


def _accumulate(parts: list[tuple], precision: np.ndarray, recall: np.ndarray) -> None:
    """Fills one category's precision [A, T, R] and recall [A, T] from its images' matches."""
    scores = np.concatenate([p[0] for p in parts])
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([p[1] for p in parts], 2)[:, :, order]
    counted = ~np.concatenate([p[2] for p in parts], 2)[:, :, order]
    number = sum(p[3] for p in parts)  # [A]
    true, false = np.cumsum(matched & counted, 2), np.cumsum(~matched & counted, 2)
    for a in np.flatnonzero(number):
        for t in range(len(IOU_THRESHOLDS)):
            tp, fp = true[a, t], false[a, t]
            reached = tp / number[a]
            recall[a, t] = reached[-1] if len(tp) else 0.0
            best = np.maximum.accumulate((tp / (tp + fp + np.spacing(1)))[::-1])[::-1]
            at = np.searchsorted(reached, RECALLS, side="left")
            precision[a, t] = np.where(at < len(best), np.append(best, 0.0)[np.minimum(at, len(best))], 0.0)


def _summary(precision: np.ndarray, recall: np.ndarray, categories: list[dict]) -> dict[str, float]:
    """The protocol's numbers from precision [A, T, C, R] and recall [A, T, C]."""

    def mean(values: np.ndarray) -> float:
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")

    metrics = {"AP": mean(precision[0]), "AP50": mean(precision[0, 0]), "AP75": mean(precision[0, 5])}
    metrics |= {f"AP{name}": mean(precision[a]) for a, name in enumerate(AREAS) if name}
    for name in FREQUENCIES:
        members = np.array([c.get("frequency") == name for c in categories], bool)
        metrics[f"AP{name}"] = mean(precision[0][:, members])
    metrics |= {f"AR{name}": mean(recall[a]) for a, name in enumerate(AREAS)}
    return metrics | {f"AP_per_class/{c['name']}": mean(precision[0, :, i]) for i, c in enumerate(categories)}
