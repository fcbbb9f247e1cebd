"""What kind each mistake is, and what it costs: at one IoU threshold, from the columns of a `Scene`.

The kinds are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV
2020), with its order of tests and its numbers. Boundary IoU is that of Cheng et al. (CVPR 2021), the kinds of keypoint
errors those of Ronchi and Perona ("Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation", ICCV 2017).
"""

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from report_numbers import IOU_THRESHOLDS, Record, Scene, average_precision, overlaps

__all__ = [
    "KINDS", "Verdicts", "boundary_iou", "confusion_matrix", "cost_of_mistakes", "judge", "keypoint_errors",
    "lost_by_image", "mask_quality", "split_errors",
]  # fmt: skip

# Of a detection; the first three are no mistakes. "missed" is the kind of an object that nothing found.
KINDS = ["right", "ignored", "not judged", "class", "localisation", "both", "duplicate", "background"]
RIGHT, IGNORED, UNJUDGED, CLASS, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(8)
_FOREGROUND, _BACKGROUND = 0.5, 0.1  # IoU of a find, and below which a detection shows nothing at all


class Verdicts(NamedTuple):
    """What became of each detection and object at IoU 0.5, by TIDE's rules."""

    kind: np.ndarray  # int8 [D], index of KINDS
    reason: np.ndarray  # int8 [D], as `kind`, but of ignored detections the kind that they would have
    object: np.ndarray  # int64 [D], the object that was found, or that the mistake is about; -1 without one
    overlap: np.ndarray  # float64 [D], IoU with it
    found_by: np.ndarray  # int64 [G], the detection that found it; -1 missed
    missed: np.ndarray  # bool [G], to be found, and neither found nor nearly found (class or localisation)


def judge(scene: Scene, limit: int = 100) -> Verdicts:
    """Goes through the detections of each image by falling score; only the first `limit` of an image take part."""
    count = len(scene.dt_image)
    kind, target = np.full(count, BACKGROUND, np.int8), np.full(count, -1)
    overlap, found_by = np.zeros(count), np.full(len(scene.gt_image), -1)
    usable = np.zeros(len(scene.gt_image), bool)
    excused = np.zeros(count, bool)
    for _, ds, gs, iou in overlaps(scene):
        ds = slice(ds.start, min(ds.stop, ds.start + limit))
        _judge_image(scene, ds, gs, iou[: ds.stop - ds.start], kind, target, overlap, found_by, excused)
        wrong = np.arange(ds.start, ds.stop)[np.isin(kind[ds], (CLASS, LOCALISATION))]
        about = target[wrong]
        usable[about[found_by[about] < 0]] = True
    excused |= scene.forgiven & (kind != RIGHT)
    reason = kind.copy()
    kind[excused] = IGNORED
    kind[~scene.judged] = UNJUDGED
    place = np.arange(count) - scene.first_detection()[scene.dt_image]
    kind[place >= limit] = UNJUDGED
    return Verdicts(kind, reason, target, overlap, found_by, (found_by < 0) & ~usable & ~scene.gt_ignore)


def _judge_image(scene, ds, gs, iou, kind, target, overlap, found_by, excused) -> None:
    ignored = scene.gt_ignore[gs]
    real, aside = np.flatnonzero(~ignored), np.flatnonzero(ignored)
    labels, classes = scene.dt_label[ds], scene.gt_label[gs]
    right = np.zeros(len(labels), bool)
    if len(real):
        near = iou[:, real]
        same = labels[:, None] == classes[real]
        own = near * same
        free = own.copy()
        taken = np.zeros(len(real), bool)
        for d in np.flatnonzero(own.max(1) >= _FOREGROUND):
            g = int(free[d].argmax())
            if free[d, g] >= _FOREGROUND:
                right[d] = taken[g] = True
                free[:, g] = 0
                target[ds.start + d], overlap[ds.start + d] = gs.start + real[g], near[d, g]
                found_by[gs.start + real[g]] = ds.start + d
        rows = np.arange(len(labels))
        best = own.argmax(1)
        other = (near * ~same).argmax(1)
        again = (own * taken).argmax(1)
        in_place = own[rows, best]
        tests = (
            (LOCALISATION, (in_place >= _BACKGROUND) & (in_place <= _FOREGROUND), best),
            (CLASS, (near * ~same)[rows, other] >= _FOREGROUND, other),
            (DUPLICATE, (own * taken)[rows, again] >= _FOREGROUND, again),
            (BACKGROUND, near.max(1) <= _BACKGROUND, None),
            (BOTH, np.ones(len(rows), bool), near.argmax(1)),
        )
        open_ = ~right
        kind[ds][right] = RIGHT
        for name, holds, which in tests:
            now = np.flatnonzero(open_ & holds)
            kind[ds.start + now] = name
            if which is not None:
                target[ds.start + now] = gs.start + real[which[now]]
                overlap[ds.start + now] = near[now, which[now]]
            open_[now] = False
    if len(aside):
        inside = (iou[:, aside] > _FOREGROUND) & (labels[:, None] == classes[aside])
        excused[ds] = inside.any(1) & ~right


# ------------------------------------------------------------------------------------------------ TIDE's numbers
ERRORS = {"class": CLASS, "localisation": LOCALISATION, "both": BOTH, "duplicate": DUPLICATE, "background": BACKGROUND}


def split_errors(scene: Scene, verdicts: Verdicts) -> dict[str, Any]:
    """AP at IoU 0.5 and how much each kind of error costs: what AP would be without it, less what it is.

    As in the tidecv package, the mean goes over all classes with an object or a detection, and a kind's cost is never
    below 0. Also "false positive" and "false negative": the AP won if all wrong detections came last, or if no object
    were missed.
    """
    kept = np.flatnonzero(verdicts.kind != UNJUDGED)
    in_ap = verdicts.kind[kept] != IGNORED
    correct = verdicts.kind[kept] == RIGHT
    label, score, reason = scene.dt_label[kept], scene.dt_score[kept], verdicts.reason[kept]
    about = verdicts.object[kept]
    fixable = np.isin(reason, (CLASS, LOCALISATION)) & ~correct
    fixable[fixable] &= verdicts.found_by[about[fixable]] < 0
    # Of several detections that could be corrected to find the same object, the first of the highest score does.
    best = np.zeros(len(kept), bool)
    rows = np.flatnonzero(fixable)
    rows = rows[np.lexsort((rows, -score[rows], about[rows]))]
    best[rows[np.diff(about[rows], prepend=-1) != 0]] = True
    classes = len(scene.class_names)
    numbers = np.bincount(scene.gt_label[~scene.gt_ignore], minlength=classes)

    levels = np.arange(101) / 100  # without the rounding of COCOeval's

    def mean_ap(keep, good, labels, scores, number, ties=correct) -> float:
        # At equal scores tidecv keeps the order of images for AP itself, and has the wrong ones first for the costs.
        rows = np.flatnonzero(keep)
        rows = rows[np.lexsort((ties[rows], -scores[rows], labels[rows]))]
        ends = np.searchsorted(labels[rows], np.arange(classes + 1))
        aps = []
        for c in range(classes):
            mine = rows[ends[c] : ends[c + 1]]
            if len(mine) or number[c]:
                hit, number_c = good[None, mine], np.array([number[c]], np.float64)
                record = Record(np.zeros(len(mine), np.int32), scores[mine], hit, np.ones_like(hit), number_c)
                aps.append(float(average_precision(record, levels)[0]) if number[c] else 0.0)
        return float(np.mean(aps)) if aps else math.nan

    base = mean_ap(in_ap, correct, label, score, numbers, np.zeros(len(kept)))
    result: dict[str, Any] = {"ap50": base, "cost": {}, "count": {}}
    wrong = ~correct
    for name, code in ERRORS.items():
        these = wrong & (reason == code)
        keep, good, labels = in_ap & ~these, correct.copy(), label.copy()
        if code in (CLASS, LOCALISATION):
            mended = these & best
            keep |= mended
            good |= mended
            labels[mended] = scene.gt_label[about[mended]]
        result["cost"][name] = max(0.0, mean_ap(keep, good, labels, score, numbers) - base)
        result["count"][name] = int(these.sum())
    fewer = numbers - np.bincount(scene.gt_label[verdicts.missed], minlength=classes)
    result["cost"]["missed"] = max(0.0, mean_ap(in_ap, correct, label, score, fewer) - base)
    result["count"]["missed"] = int(verdicts.missed.sum())
    result["cost"]["false positive"] = mean_ap(in_ap, correct, label, np.where(correct, 1.0, 0.0), numbers) - base
    unfound = (verdicts.found_by < 0) & ~scene.gt_ignore
    all_found = numbers - np.bincount(scene.gt_label[unfound], minlength=classes)
    result["cost"]["false negative"] = mean_ap(in_ap, correct, label, score, all_found) - base
    result["count"]["false positive"] = int((wrong & in_ap).sum())
    result["count"]["false negative"] = int(unfound.sum())
    return result


def cost_of_mistakes(scene: Scene, verdicts: Verdicts) -> tuple[np.ndarray, np.ndarray]:
    """AP at IoU 0.5 (the mean over classes) that each detection [D] and each missed object [G] costs, float64.

    A wrong detection lowers precision at every find below it: by its removal, find k of all a_k detections so far
    would gain k / (a_k - 1) - k / a_k. A missed object costs its share of recall. The envelope of precision is left
    out, so these are costs to first order.
    """
    of_detection, of_object = np.zeros(len(scene.dt_image)), np.zeros(len(scene.gt_image))
    to_find = ~scene.gt_ignore
    numbers = np.bincount(scene.gt_label[to_find], minlength=len(scene.class_names))
    there = max(1, int((numbers > 0).sum()))
    rows = np.flatnonzero((verdicts.kind == RIGHT) | (verdicts.kind >= CLASS))
    rows = rows[np.lexsort((-scene.dt_score[rows], scene.dt_label[rows]))]
    ends = np.searchsorted(scene.dt_label[rows], np.arange(len(numbers) + 1))
    for c in np.flatnonzero(numbers):
        mine = rows[ends[c] : ends[c + 1]]
        right = verdicts.kind[mine] == RIGHT
        place = np.arange(1, len(mine) + 1)
        gain = np.where(right & (place > 1), np.cumsum(right) / np.maximum(place * (place - 1.0), 1), 0)
        below = np.cumsum(gain[::-1])[::-1]
        of_detection[mine[~right]] = below[~right] / numbers[c] / there
    missed = to_find & (verdicts.found_by < 0)
    of_object[missed] = 1 / numbers[scene.gt_label[missed]] / there
    return of_detection, of_object


def lost_by_image(scene: Scene, costs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """What the mistakes of each image cost, float64 [N], from `cost_of_mistakes`."""
    count = len(scene.image_ids)
    return np.bincount(scene.dt_image, costs[0], count) + np.bincount(scene.gt_image, costs[1], count)


def confusion_matrix(scene: Scene, verdicts: Verdicts, threshold: float) -> np.ndarray:
    """int64 [C + 1, C + 1]: annotated class (row) by detected class (column); the last row is background that was
    taken for an object (invented), the last column objects that were missed.

    Detections below the score threshold do not take part. Finds of the right class come first; then every remaining
    detection, by falling score, takes the free object that it overlaps most, if by an IoU of 0.5. Ignored detections
    appear nowhere.
    """
    count = len(scene.class_names)
    matrix = np.zeros((count + 1, count + 1), np.int64)
    shown = (scene.dt_score >= threshold) & (verdicts.kind != UNJUDGED) & (verdicts.kind != IGNORED)
    found = np.flatnonzero(shown & (verdicts.kind == RIGHT))
    objects = verdicts.object[found]
    np.add.at(matrix, (scene.gt_label[objects], scene.dt_label[found]), 1)
    free = ~scene.gt_ignore
    free[objects] = False
    rest = shown & (verdicts.kind != RIGHT)
    for _, ds, gs, iou in overlaps(scene):
        rows = np.flatnonzero(rest[ds])
        if not len(rows) or not free[gs].any():
            continue
        near = np.where(free[gs], iou, 0.0)
        for d in rows:
            g = int(near[d].argmax())
            if near[d, g] >= _FOREGROUND:
                matrix[scene.gt_label[gs.start + g], scene.dt_label[ds.start + d]] += 1
                free[gs.start + g] = False
                rest[ds.start + d] = False
                near[:, g] = 0
    np.add.at(matrix, (scene.gt_label[free], count), 1)
    np.add.at(matrix, (count, scene.dt_label[rest]), 1)
    return matrix


# ------------------------------------------------------------------------------------------------ masks
def boundary_iou(first: dict, second: dict, share: float = 0.02) -> float:
    """Boundary IoU of two RLEs of one image: IoU of their pixels within `share` of the image's diagonal of their
    outlines; the image's border belongs to an outline where the mask touches it."""
    height, width = first["size"]
    distance = max(1, round(share * math.hypot(height, width)))
    corners = np.array([mask_utils.toBbox(r) for r in (first, second)])
    corners[:, 2:] += corners[:, :2]
    x1, y1 = np.maximum(np.floor(corners[:, :2].min(0)) - 1, 0).astype(int)
    x2, y2 = np.minimum(np.ceil(corners[:, 2:].max(0)) + 1, (width, height)).astype(int)
    rims = []
    for rle in (first, second):
        mask = cv2.copyMakeBorder(mask_utils.decode(rle)[y1:y2, x1:x2], 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        inner = cv2.erode(mask, np.ones((3, 3), np.uint8), iterations=distance)
        rims.append(mask.astype(bool) & ~inner.astype(bool))
    union = (rims[0] | rims[1]).sum()
    return float((rims[0] & rims[1]).sum() / union) if union else 0.0


def mask_quality(scene: Scene, box_verdicts: Verdicts, most: int = 3000, seed: int = 0) -> dict[str, Any]:
    """How good the masks are where the boxes are right.

    scene: with masks; box_verdicts: `judge` of the same detections by their boxes. The pairs are its finds. "ap" is
    COCO's mask AP of these pairs alone, each detection against its object. Boundary IoU is measured on at most `most`
    pairs, drawn with `seed`; Cheng et al. take the smaller of it and the mask's IoU.
    """
    pairs = np.flatnonzero(box_verdicts.kind == RIGHT)
    pairs = pairs[~scene.gt_ignore[box_verdicts.object[pairs]]]
    objects = box_verdicts.object[pairs]
    iou = np.array([float(mask_utils.iou([scene.dt_masks[d]], [scene.gt_masks[g]], [0])[0, 0]) for d, g in
                    zip(pairs, objects)])  # fmt: skip
    aps = []
    for c in range(len(scene.class_names)):
        rows = np.flatnonzero(scene.dt_label[pairs] == c)
        if len(rows):
            rows = rows[np.argsort(-scene.dt_score[pairs[rows]], kind="stable")]
            hit = iou[rows] >= IOU_THRESHOLDS[:, None]
            number = np.array([float(len(rows))])
            aps.append(average_precision(Record(np.zeros(len(rows), int), scene.dt_score[pairs[rows]], hit,
                                                np.ones_like(hit), number)).mean())  # fmt: skip
    chosen = np.arange(len(pairs))
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(seed).choice(len(chosen), most, replace=False))
    rims = np.array([boundary_iou(scene.dt_masks[pairs[i]], scene.gt_masks[objects[i]]) for i in chosen])
    lower = np.minimum(rims, iou[chosen]) if len(chosen) else rims

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if len(values) else math.nan

    return {
        "pairs": len(pairs), "iou": mean(iou), "ap": mean(np.array(aps)),
        "share_at": {f"{t:.2f}": mean(iou >= t) for t in (0.5, 0.75, 0.9)},
        "boundary_pairs": len(chosen), "boundary_iou": mean(rims), "boundary_min_iou": mean(lower),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ keypoints
def keypoint_errors(
    scene: Scene, verdicts: Verdicts, flip: np.ndarray | None = None, names: list[str] | None = None
) -> dict[str, Any]:
    """What is wrong with the points of found objects, by Ronchi and Perona's kinds.

    Of a point, s = exp(-d^2 / (2 s^2 k^2)) is its similarity with the annotated one. "good": s >= 0.85; "jitter":
    0.5 <= s < 0.85; else "inversion": within 0.5 of the mirrored point of the same object; "swap": within 0.5 of this
    or the mirrored point of another object; else "miss".

    flip: int [K], the mirrored point of each. Returns counts of all points and of each.
    """
    kinds = ["good", "jitter", "inversion", "swap", "miss"]
    points = scene.gt_points.shape[1]
    falloff = scene.keypoint_falloffs()
    flip = np.arange(points) if flip is None or len(flip) != points else np.asarray(flip)
    table = np.zeros((points, len(kinds)), np.int64)
    first = scene.first_object()
    for d in np.flatnonzero(verdicts.kind == RIGHT):
        own = verdicts.object[d]
        image = scene.dt_image[d]
        others = np.arange(first[image], first[image + 1])
        truth = scene.gt_points[others]  # [g, K, 3]
        scale = falloff**2 * 2 * (scene.gt_area[own] + np.spacing(1))
        place = scene.dt_points[d, :, :2]

        def close(which: np.ndarray, place=place, truth=truth, scale=scale) -> np.ndarray:
            """Similarity of each detected point k with point which[k] of every object, [g, K]; 0 if not annotated."""
            distance = ((place - truth[:, which, :2]) ** 2).sum(-1)
            return np.exp(-distance / scale) * (truth[:, which, 2] > 0)

        straight, mirrored = close(np.arange(points)), close(flip)
        mine = others == own
        s = straight[mine][0]
        elsewhere = np.maximum(straight, mirrored)[~mine].max(0, initial=0)
        kind = np.select(
            [s >= 0.85, s >= 0.5, (mirrored[mine][0] >= 0.5) & (flip != np.arange(points)), elsewhere >= 0.5],
            [0, 1, 2, 3], 4,
        )  # fmt: skip
        shown = scene.gt_points[own, :, 2] > 0
        np.add.at(table, (np.flatnonzero(shown), kind[shown]), 1)
    names = names if names and len(names) == points else [f"point {k + 1}" for k in range(points)]
    return {
        "all": dict(zip(kinds, table.sum(0).tolist())),
        "by_point": [{"name": n, **dict(zip(kinds, row))} for n, row in zip(names, table.tolist())],
    }
