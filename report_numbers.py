"""The numbers of an evaluation report: which detection found which object, average precision, and how sure it is.

Everything works on columns (`Scene`), one image after the other, and needs neither images nor TensorFlow. Matching and
average precision are COCO's (https://cocodataset.org/#detection-eval); intervals are percentiles of a bootstrap over
images (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

__all__ = [
    "AREAS", "IOU_THRESHOLDS", "RECALLS", "Matches", "Record", "Scene", "Summary",
    "average_precision", "best_f1", "bootstrap", "calibration", "class_mean", "class_records", "coco_records",
    "interval", "match_scene", "overlaps", "pooled", "precision_recall", "resample", "score_counts", "summarise",
    "threshold_table",
]  # fmt: skip

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}  # as COCOeval, ends included
# Falloffs of COCO's 17 body points (https://cocodataset.org/#keypoints-eval), twice the published sigmas.
KEYPOINT_FALLOFFS = 2 * np.array(
    [26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]
) / 1000  # fmt: skip
_CELLS = 1 << 21  # cells of a bootstrap table that are in memory at a time


class Scene(NamedTuple):
    """N images of C classes with G annotated objects and D detections.

    Objects are sorted by image, detections by image and then by falling score. Boxes are x1 y1 x2 y2 in pixels of the
    image. Labels count from 0.
    """

    image_ids: list
    image_files: list[str]
    sizes: np.ndarray  # int32 [N, 2] height, width; 0 where not known
    class_names: list[str]
    gt_image: np.ndarray  # int32 [G]
    gt_label: np.ndarray  # int32 [G]
    gt_box: np.ndarray  # float64 [G, 4]
    gt_area: np.ndarray  # float64 [G]
    gt_crowd: np.ndarray  # bool [G], regions in which several detections of the class are neither right nor wrong
    gt_ignore: np.ndarray  # bool [G], objects (crowds among them) that need not be found
    gt_masks: list | None  # RLEs
    gt_points: np.ndarray | None  # float64 [G, K, 3]
    dt_image: np.ndarray  # int32 [D]
    dt_label: np.ndarray  # int32 [D]
    dt_score: np.ndarray  # float64 [D]
    dt_box: np.ndarray  # float64 [D, 4]
    dt_area: np.ndarray  # float64 [D]
    dt_masks: list | None
    dt_points: np.ndarray | None
    dt_entry: np.ndarray  # int64 [D], place in the results file
    forgiven: np.ndarray  # bool [D], not wrong where it finds nothing (LVIS: class not exhaustively annotated)
    judged: np.ndarray  # bool [D], False: a class that nobody looked for in the image (Open Images, LVIS)
    iou_type: str = "bbox"
    falloffs: np.ndarray | None = (
        None  # float64 [K] of keypoints, twice their sigmas; COCO's, or their mean, if not given
    )

    def first_object(self) -> np.ndarray:
        """int64 [N + 1]: objects of image n are first_object[n] to first_object[n + 1]."""
        return np.searchsorted(self.gt_image, np.arange(len(self.image_ids) + 1))

    def keypoint_falloffs(self) -> np.ndarray:
        count = self.gt_points.shape[1]
        if self.falloffs is not None:
            return self.falloffs
        return KEYPOINT_FALLOFFS if count == 17 else np.full(count, KEYPOINT_FALLOFFS.mean())

    def first_detection(self) -> np.ndarray:
        return np.searchsorted(self.dt_image, np.arange(len(self.image_ids) + 1))


class Matches(NamedTuple):
    """COCO's matching for A size ranges and T IoU thresholds."""

    hit: np.ndarray  # bool [A, T, D], matched to something
    ignored: np.ndarray  # bool [A, T, D], neither right nor wrong
    rank: np.ndarray  # int32 [D], place among the detections of its image and class
    counts: np.ndarray  # bool [A, G], objects to be found


class Record(NamedTuple):
    """What average precision of one class is computed from: S detections by falling score, at T thresholds.

    measure: how area under the curve is taken: "101" (COCO), "area" (VOC 2010, Open Images), "eleven" (VOC 2007),
    "trapezoid" (Cityscapes).
    """

    image: np.ndarray  # int32 [S]
    score: np.ndarray  # float64 [S]
    hit: np.ndarray  # bool [T, S]
    counted: np.ndarray  # bool [T, S]: False = neither right nor wrong
    objects: np.ndarray  # float64 [N], objects to be found in each image
    measure: str = "101"


# ------------------------------------------------------------------------------------------------ overlaps and matching
def overlaps(scene: Scene) -> Iterator[tuple[int, slice, slice, np.ndarray]]:
    """For each image with objects and detections: number, detections, objects, and IoU (or OKS) float64 [d, g].

    With a crowd region it is the share of the detection that lies inside, as COCO has it.
    """
    first_gt, first_dt = scene.first_object(), scene.first_detection()
    for n in np.flatnonzero((np.diff(first_gt) > 0) & (np.diff(first_dt) > 0)).tolist():
        d, g = slice(first_dt[n], first_dt[n + 1]), slice(first_gt[n], first_gt[n + 1])
        yield n, d, g, _overlap(scene, d, g)


def _overlap(scene: Scene, d: slice, g: slice, crowd: bool = True) -> np.ndarray:
    if scene.iou_type == "keypoints":
        falloffs = scene.keypoint_falloffs()
        return keypoint_similarity(scene.dt_points[d], scene.gt_points[g], scene.gt_box[g], scene.gt_area[g], falloffs)
    crowds = (scene.gt_crowd[g] if crowd else np.zeros(g.stop - g.start)).astype(np.uint8)
    if scene.iou_type == "segm":
        return np.asarray(mask_utils.iou(scene.dt_masks[d], scene.gt_masks[g], crowds), np.float64)
    found, truth = scene.dt_box[d].copy(), scene.gt_box[g].copy()
    found[:, 2:] -= found[:, :2]
    truth[:, 2:] -= truth[:, :2]
    return np.asarray(mask_utils.iou(found, truth, crowds), np.float64)


def keypoint_similarity(
    found: np.ndarray, truth: np.ndarray, boxes: np.ndarray, areas: np.ndarray, falloff: np.ndarray
) -> np.ndarray:
    """COCO's object keypoint similarity, float64 [D, G]: mean of exp(-d^2 / (2 s^2 k^2)) over the annotated points.

    found [D, K, 3], truth [G, K, 3], boxes [G, 4], areas [G], falloff [K]. An object without annotated points is
    compared with its box, doubled.
    """
    visible = truth[:, :, 2] > 0  # [G, K]
    delta = found[:, None, :, :2] - truth[None, :, :, :2]  # [D, G, K, 2]
    size = boxes[:, 2:] - boxes[:, :2]
    low, high = boxes[:, :2] - size, boxes[:, 2:] + size
    outside = np.maximum(low[:, None] - found[:, None, :, :2], 0) + np.maximum(found[:, None, :, :2] - high[:, None], 0)
    none = ~visible.any(1)
    delta = np.where(none[None, :, None, None], outside, delta)
    error = (delta**2).sum(-1) / falloff**2 / (areas[None, :, None] + np.spacing(1)) / 2
    weight = np.where(none[:, None], True, visible)[None]
    return (np.exp(-error) * weight).sum(-1) / weight.sum(-1)


def _ranks(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """int32 [D]: how many detections of the same image and class come before."""
    order = np.lexsort((label, image))
    new = np.ones(len(order), bool)
    new[1:] = (image[order][1:] != image[order][:-1]) | (label[order][1:] != label[order][:-1])
    starts = np.flatnonzero(new)
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return ranks


def match_scene(
    scene: Scene, limit: int = 100, thresholds: np.ndarray = IOU_THRESHOLDS, areas: dict = AREAS
) -> Matches:
    """COCO's greedy matching: each detection in turn takes the free object of its class that it overlaps most.

    Objects to be found go before ignored ones whatever the overlap; of equal overlaps the last object counts; a crowd
    region can be taken again and again. Only the first `limit` detections of an image and class take
    part, and none of a class that nobody looked for.
    """
    low, high = np.array(list(areas.values()), np.float64).T[:, :, None]
    set_aside = (scene.gt_area < low) | (scene.gt_area > high) | scene.gt_ignore  # [A, G]
    beyond = (scene.dt_area < low) | (scene.dt_area > high)  # [A, D]
    shape = (len(areas), len(thresholds))
    hit = np.zeros((*shape, len(scene.dt_image)), bool)
    ignored = np.zeros_like(hit)
    rank = _ranks(scene.dt_image, scene.dt_label)
    rank[~scene.judged] = np.iinfo(np.int32).max
    limits = np.minimum(thresholds, 1 - 1e-10)
    for _, ds, gs, iou in overlaps(scene):
        same = scene.dt_label[ds, None] == scene.gt_label[gs]
        same &= rank[ds, None] < limit
        iou = np.where(same, iou, -1.0)
        aside, crowd = set_aside[:, gs], scene.gt_crowd[gs]
        free = np.ones((*shape, iou.shape[1]), bool)
        for d in np.flatnonzero(iou.max(1) >= limits[0]).tolist():
            objects = np.flatnonzero(iou[d] >= limits[0])
            one = iou[d, objects]
            possible = (one >= limits[:, None]) & free[:, :, objects]  # [A, T, g]
            inside = possible & ~aside[:, None, objects]
            candidates = np.where(inside.any(2, keepdims=True), inside, possible)
            taken = candidates.any(2)
            if not taken.any():
                continue
            best = len(objects) - 1 - np.where(candidates, one, -1.0)[..., ::-1].argmax(2)
            a, t = np.nonzero(taken)
            g = objects[best[a, t]]
            hit[a, t, ds.start + d] = True
            ignored[a, t, ds.start + d] = aside[a, g]
            free[a, t, g] = crowd[g]
    ignored |= ~hit & (beyond | scene.forgiven)[:, None]
    return Matches(hit, ignored, rank, ~set_aside)


def coco_records(scene: Scene, matches: Matches, area: int = 0, limit: int = 100, measure: str = "101") -> list[Record]:
    """A record for each class, of size range number `area`, with the first `limit` detections of image and class."""
    images = len(scene.image_ids)
    records = []
    for dets, objects in _rows_by_class(scene, matches.rank < limit, matches.counts[area]):
        dets = dets[np.argsort(-scene.dt_score[dets], kind="stable")]
        records.append(
            Record(
                scene.dt_image[dets],
                scene.dt_score[dets],
                matches.hit[area][:, dets] & ~matches.ignored[area][:, dets],
                ~matches.ignored[area][:, dets],
                np.bincount(scene.gt_image[objects], minlength=images).astype(np.float64),
                measure,
            )
        )
    return records


def _rows_by_class(scene: Scene, dt_keep: np.ndarray, gt_keep: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    count = len(scene.class_names)
    parts = []
    for label, keep in ((scene.dt_label, dt_keep), (scene.gt_label, gt_keep)):
        rows = np.flatnonzero(keep)
        rows = rows[np.argsort(label[rows], kind="stable")]
        parts.append(np.split(rows, np.searchsorted(label[rows], np.arange(1, count))))
    return zip(*parts)


def class_records(image, score, hit, counted, objects, measure) -> Record:
    """A record from rows in any order, sorted by falling score, then image."""
    order = np.lexsort((image, -score))
    return Record(image[order], score[order], hit[:, order], counted[:, order], objects, measure)


# ------------------------------------------------------------------------------------------------ average precision
def average_precision(record: Record, recalls: np.ndarray = RECALLS) -> np.ndarray:
    """float64 [T], nan without an object to be found. COCO's is exact to the last bit of its recall levels."""
    number = record.objects.sum()
    if not number:
        return np.full(len(record.hit), math.nan)
    if record.measure != "101":
        return bootstrap(record, np.ones((len(record.objects), 1), np.float32))[:, 0]
    result = np.zeros(len(record.hit))
    true = np.cumsum(record.hit, 1, dtype=np.float64)
    false = np.cumsum(record.counted & ~record.hit, 1, dtype=np.float64)
    for t, (tp, fp) in enumerate(zip(true, false)):
        precision = np.maximum.accumulate((tp / (tp + fp + np.spacing(1)))[::-1])[::-1]
        at = np.searchsorted(tp / number, recalls, side="left")
        result[t] = np.append(precision, np.zeros(1))[np.minimum(at, len(precision))].mean()
    return result


def resample(images: int, count: int = 1000, seed: int = 0) -> np.ndarray:
    """float32 [N, B]: how often each image is drawn in each of B bootstrap samples of N images with replacement."""
    rng = np.random.default_rng(seed)
    weights = np.zeros((images, count), np.float32)
    for b in range(count if images else 0):
        weights[:, b] = np.bincount(rng.integers(0, images, images), minlength=images)
    return weights


def bootstrap(record: Record, weights: np.ndarray) -> np.ndarray:
    """Average precision float64 [T, B] when image n counts weights[n, b] times; nan where no object is to be found.

    Precision falls between true positives, so its envelope is decided at their places alone: one running sum over all
    detections serves every threshold.
    """
    thresholds, count = len(record.hit), weights.shape[1]
    numbers = record.objects.astype(np.float32) @ weights if len(weights) else np.zeros(count)
    result = np.zeros((thresholds, count))
    used = np.flatnonzero(record.counted.any(0))
    places = np.flatnonzero(record.hit[:, used].any(0))
    if record.measure == "trapezoid":
        places = used
    elif len(places):
        used = used[: places[-1] + 1]
    if len(places):
        record = record._replace(
            image=record.image[used], score=record.score[used], hit=record.hit[:, used],
            counted=record.counted[:, used],
        )  # fmt: skip
        step = max(1, _CELLS // len(places))
        measure = _trapezoids if record.measure == "trapezoid" else _envelopes
        for b in range(0, count, step):
            some = weights[:, b : b + step]
            result[:, b : b + step] = measure(record, some, np.maximum(numbers[b : b + step], 1))
    result[:, numbers == 0] = math.nan
    return result


def _running_sums(weights: np.ndarray, images: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """float32 [K, B]: sums of the rows of `weights` for the first ends[k] of `images`; ends ascend.

    A row at a time: NumPy's own cumulative sums go down one column after the other, ten times slower.
    """
    total = np.zeros(weights.shape[1], np.float32)
    sums = np.empty((len(ends), weights.shape[1]), np.float32)
    images, start = images.tolist(), 0
    for k, end in enumerate(ends.tolist()):
        for i in images[start:end]:
            np.add(total, weights[i], out=total)
        start, sums[k] = end, total
    return sums


def _envelopes(record: Record, weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(record.hit.any(0))
    above = _running_sums(weights, record.image, places + 1)  # detections up to each place
    numbers = numbers.astype(np.float32)
    result = np.zeros((len(record.hit), weights.shape[1]))
    for t, (hit, counted) in enumerate(zip(record.hit, record.counted)):
        mine = np.flatnonzero(hit)
        if not len(mine):
            continue
        everything = above if len(mine) == len(places) else above[np.searchsorted(places, mine)]
        skipped = np.flatnonzero(~counted)
        if len(skipped):
            before = np.searchsorted(skipped, mine)
            everything = everything - _running_sums(weights, record.image[skipped], before)
        true = _running_sums(weights, record.image[mine], np.arange(1, len(mine) + 1))
        precision = np.divide(true, everything, out=np.zeros_like(true), where=everything > 0)
        for k in range(len(mine) - 2, -1, -1):
            np.maximum(precision[k], precision[k + 1], out=precision[k])
        if record.measure == "area":
            reached = true / numbers
        elif record.measure == "eleven":  # levels with the rounding of published VOC2007 numbers, see utils/voc_eval.py
            levels = np.arange(0.0, 1.1, 0.1)
            reached = np.searchsorted(levels, true.astype(np.float64) / numbers, side="right") / np.float32(11)
        else:
            # How many recall levels k / 100 each true positive reaches, in whole numbers.
            true *= np.float32(100)
            true += np.float32(0.25)
            true /= numbers
            reached = np.floor(true, out=true)
            reached += 1
            reached /= np.float32(101)
        precision[:-1] -= precision[1:]  # sum of steps of recall x precision, summed by parts
        result[t] = np.einsum("kb,kb->b", precision, reached)
    return result


def _trapezoids(record: Record, weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Cityscapes' area under the line through precision and recall at every distinct score, from (0, 1) on."""
    result = np.zeros((len(record.hit), weights.shape[1]))
    for t, (hit, counted) in enumerate(zip(record.hit, record.counted)):
        kept = np.flatnonzero(counted)
        last = np.flatnonzero(np.diff(record.score[kept], append=-np.inf)) + 1
        total = _running_sums(weights, record.image[kept], last)
        right = np.cumsum(hit[kept])[last - 1] if len(kept) else last
        true = _running_sums(weights, record.image[kept[hit[kept]]], right)
        precision, recall = (np.full((len(last) + 1, weights.shape[1]), v, np.float64) for v in (1.0, 0.0))
        np.divide(true, total, out=precision[1:], where=total > 0)
        recall[1:] = true / numbers
        result[t] = (np.diff(recall, axis=0) * (precision[1:] + precision[:-1]) / 2).sum(0)
    return result


def interval(value: float, samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Low and high end around `value` from bootstrap samples [B]; nan without any finite sample.

    The percentiles of the samples, moved by the distance of `value` from their mean: average precision of classes with
    few objects is higher in samples, where images repeat, than in the set itself.
    """
    samples = samples[np.isfinite(samples)]
    if not len(samples) or not math.isfinite(value):
        return math.nan, math.nan
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail]) - samples.mean() + value
    return float(max(low, min(0.0, value))), float(min(high, 1.0))


def class_mean(values: list[np.ndarray]) -> np.ndarray:
    """Mean over classes [C, …] that ignores nan; nan where every class is."""
    table = np.array(values, np.float64)
    there = ~np.isnan(table)
    count = there.sum(0)
    return np.where(count, np.where(there, table, 0).sum(0) / np.maximum(count, 1), math.nan)


class Summary(NamedTuple):
    """A protocol's numbers, their bootstrap samples, and the same of each class."""

    values: dict[str, float]
    samples: dict[str, np.ndarray]  # float64 [B]
    class_values: dict[str, np.ndarray]  # name -> float64 [C]
    class_samples: dict[str, np.ndarray]  # name -> float32 [C, B]


def summarise(
    parts: Mapping[str, tuple[list[Record], Sequence[int] | slice]],
    recalls: Mapping[str, tuple[list[Record], Sequence[int] | slice]],
    weights: np.ndarray,
    groups: dict[str, np.ndarray] | None = None,
) -> Summary:
    """Mean AP of each of `parts` and mean recall of each of `recalls`, over classes and thresholds.

    parts, recalls: name -> (records by class, the thresholds to average); AP of the same records is computed once.
    groups: name -> bool [C], means of AP over some classes only (LVIS: rare, common, frequent).
    """
    values, samples, class_values, class_samples = {}, {}, {}, {}
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for name, (records, which) in parts.items():
        if id(records) not in known:
            point = np.array([average_precision(r) for r in records]).reshape(len(records), -1)  # [C, T]
            boot = np.array([bootstrap(r, weights).astype(np.float32) for r in records])  # [C, T, B]
            known[id(records)] = point, boot.reshape(len(records), point.shape[1], weights.shape[1])
        point, boot = known[id(records)]
        class_values[name] = point[:, which].mean(1)
        class_samples[name] = boot[:, which].mean(1)
        values[name] = float(class_mean(class_values[name]))
        samples[name] = class_mean(class_samples[name])
    first = next(iter(parts), None)
    for name, members in (groups or {}).items():
        values[name] = float(class_mean(class_values[first][members])) if members.any() else math.nan
        samples[name] = (
            class_mean(class_samples[first][members]) if members.any() else np.full(weights.shape[1], math.nan)
        )
    for name, (records, which) in recalls.items():
        point, boot = _recall(records, which, weights)
        class_values[name], class_samples[name] = point, boot
        values[name], samples[name] = float(class_mean(point)), class_mean(boot)
    return Summary(values, samples, class_values, class_samples)


def _recall(records: list[Record], which: Sequence[int] | slice, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over thresholds of the share of objects found: float64 [C] and bootstrap samples [C, B]."""
    found = np.array([np.bincount(r.image, r.hit[which].mean(0), len(r.objects)) for r in records])  # [C, N]
    objects = np.array([r.objects for r in records])
    with np.errstate(invalid="ignore", divide="ignore"):
        point = found.sum(1) / objects.sum(1)
        samples = (found.astype(np.float32) @ weights) / (objects.astype(np.float32) @ weights)
    return point, samples


# ------------------------------------------------------------------------------------------------ one IoU threshold
def precision_recall(record: Record, t: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and score at the last detection of every distinct score, by falling score."""
    kept = record.counted[t]
    hit, score = record.hit[t][kept], record.score[kept]
    last = np.flatnonzero(np.diff(score, append=-np.inf)) if len(score) else np.zeros(0, np.int64)
    true = np.cumsum(hit)[last].astype(np.float64)
    number = record.objects.sum()
    recall = true / number if number else np.full(len(last), math.nan)
    return true / (last + 1), recall, score[last]


def best_f1(record: Record, t: int = 0) -> dict[str, float] | None:
    """The score threshold of the largest F1 = 2 P R / (P + R), of equal ones the highest; None without an object."""
    precision, recall, score = precision_recall(record, t)
    if not record.objects.sum():
        return None
    if not len(score):
        return {"threshold": 1.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1))
    return {
        "threshold": float(score[best]), "f1": float(f1[best]), "precision": float(precision[best]),
        "recall": float(recall[best]),
    }  # fmt: skip


def pooled(records: Sequence[Record], t: int = 0) -> Record:
    """All classes as one, for a threshold that they share."""
    filled = list(records)
    image, score = (np.concatenate([getattr(r, k) for r in filled]) for k in ("image", "score"))
    hit, counted = (np.concatenate([getattr(r, k)[t] for r in filled])[None] for k in ("hit", "counted"))
    return class_records(image, score, hit, counted, sum(r.objects for r in filled), filled[0].measure)


def score_counts(record: Record, levels: np.ndarray, t: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong detections with a score of at least each level, int64 [L] each."""
    kept = record.counted[t]
    hit, score = record.hit[t][kept], record.score[kept]
    count = len(score) - np.searchsorted(score[::-1], levels, side="left")
    true = np.concatenate([[0], np.cumsum(hit)]).astype(np.int64)[count]
    return true, count - true


def threshold_table(record: Record, levels: np.ndarray, t: int = 0) -> list[dict[str, float]]:
    """Precision, recall and F1 at each score threshold."""
    number = record.objects.sum()
    rows = []
    for level, true, false in zip(levels, *score_counts(record, levels, t)):
        precision = float(true / (true + false)) if true + false else math.nan
        recall = float(true / number) if number else math.nan
        f1 = float(2 * true / (true + false + number)) if true + false + number else math.nan
        rows.append({
            "threshold": float(level), "precision": precision, "recall": recall, "f1": f1, "right": int(true),
            "wrong": int(false),
        })  # fmt: skip
    return rows


def calibration(record: Record, bins: int = 10, t: int = 0) -> dict[str, Any]:
    """How often detections of a score are right (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

    Bins of equal width over 0 to 1, their upper ends included. `error` is the expected calibration error: the mean
    distance of a bin's share of right detections from its mean score, weighted by its detections.
    """
    kept = record.counted[t]
    hit, score = record.hit[t][kept], record.score[kept]
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], score)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.bincount(place, score, bins) / count
        right = np.bincount(place, hit, bins) / count
    gap = np.abs(np.nan_to_num(mean) - np.nan_to_num(right))
    return {
        "bins": [
            {"from": b / bins, "to": (b + 1) / bins, "count": int(count[b]), "score": float(mean[b]),
             "right": float(right[b])} for b in range(bins)
        ],
        "error": float((gap * count).sum() / count.sum()) if count.sum() else math.nan,
    }  # fmt: skip
