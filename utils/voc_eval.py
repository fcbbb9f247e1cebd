"""Pascal VOC average precision (Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2010, section 4).

VOC2007 interpolates precision at eleven recall levels; since VOC2010 it is the area under the whole curve. VOC's
coordinates are 1-based inclusive pixels; here a box spans [x1 - 1, x2), which gives the devkit's overlap without adding
1 to widths and heights.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from utils.oid_eval import DetectionTable, Truth, average_precision, best_overlaps, box_overlaps, first_per_object

__all__ = ["evaluate_voc", "eleven_point_precision"]


def evaluate_voc(
    truth: Truth,
    detections: DetectionTable,
    eleven_points: bool,
    iou_threshold: float = 0.5,
    on_class: Callable[..., None] | None = None,
) -> dict:
    """Returns mAP and for each class id per_class_AP (None: no object), num_gt and num_true_positives.

    `truth.group_of` marks the difficult objects: they are not scored, and a detection that overlaps one of them most is
    neither right nor wrong. A detection is compared only with the object that it overlaps most. `on_class` is called
    as by utils.oid_eval.evaluate.
    """
    result: dict[str, Any] = {"mAP": None, "per_class_AP": {}, "num_gt": {}, "num_true_positives": {}}
    for c, class_id in enumerate(truth.class_ids):
        gts = np.flatnonzero(truth.label == c)
        gts = gts[np.argsort(truth.image[gts], kind="stable")]
        dets = np.flatnonzero(detections.label == c)
        image, score, boxes = detections.image[dets], detections.score[dets], detections.boxes[dets]
        best, overlap = best_overlaps(
            image,
            truth.image[gts],
            lambda d, g: box_overlaps(boxes[d], truth.boxes[gts[g]]),  # noqa: B023
        )
        difficult = truth.group_of[gts]
        near = np.flatnonzero((best >= 0) & (overlap >= iou_threshold))
        ignored = near[difficult[best[near]]]
        near = near[~difficult[best[near]]]
        hits = np.zeros(len(dets))
        hits[near[first_per_object(best[near], score[near], overlap[near], boxes[near])]] = 1
        counts = np.ones(len(dets), bool)
        counts[ignored] = False
        number = int((~difficult).sum())
        if on_class is not None:
            on_class(c, score[counts], hits[counts], image[counts], truth.image[gts[~difficult]])
        result["num_gt"][class_id] = number
        result["num_true_positives"][class_id] = int(hits.sum())
        measure = eleven_point_precision if eleven_points else average_precision
        ap = measure(score[counts], hits[counts], number, image[counts]) if number else None
        result["per_class_AP"][class_id] = ap
    valid = [ap for ap in result["per_class_AP"].values() if ap is not None]
    result["mAP"] = float(np.mean(valid)) if valid else None
    return result


def eleven_point_precision(scores: np.ndarray, hits: np.ndarray, number: float, images: np.ndarray) -> float:
    """Mean over the recalls 0, 0.1, … 1 of the best precision at that recall or a higher one.

    The recall levels carry the rounding of numpy.arange(0, 1.1, 0.1), as in the implementations whose VOC2007 numbers
    are published: a recall of exactly 3 of 10 stays below the fourth level.
    """
    if not len(scores):
        return 0.0
    hits = hits[np.lexsort((hits, images, -scores))]
    true = np.cumsum(hits)
    precision = np.maximum.accumulate((true / np.arange(1, len(true) + 1))[::-1])[::-1]
    at = np.searchsorted(true / number, np.arange(0.0, 1.1, 0.1), side="left")
    return float(np.append(precision, 0.0)[at].sum() / 11)
