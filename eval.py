"""COCO's scores (https://cocodataset.org/#detection-eval, by pycocotools' COCOeval), result files, recall of proposals.

Results are entries of COCO's results format: boxes as x y width height, masks as compressed RLE or polygons.
"""

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from common import UserError, atomic_write, logger, read_json
from utils.coco_format import as_results, as_truth, read_truth
from utils.polygons import encode_segmentation

__all__ = [
    "evaluate_coco",
    "evaluate_proposals",
    "format_class_table",
    "format_scores",
    "read_results",
    "write_results",
]

# Names of COCOeval's summary: 12 numbers for boxes and masks, 10 for keypoints (which have no small objects).
SUMMARY = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]

KEYPOINT_SUMMARY = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]

TITLES = {"bbox": "box", "segm": "mask", "keypoints": "keypoints"}

RESULT_KEY = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def write_results(path: str | os.PathLike, results: Iterable[dict[str, Any]]) -> None:
    """Writes a COCO results file, one entry per line, without holding the whole text in memory.

    Entries of category_id None (a class missing from the annotations) are counted and left out.
    """
    unknown = 0
    with atomic_write(path) as f:
        separator = "[\n"
        for entry in results:
            if entry["category_id"] is None:
                unknown += 1
                continue
            f.write(separator + json.dumps(entry))
            separator = ",\n"
        f.write("\n]\n" if separator != "[\n" else "[]\n")
    if unknown:
        logger.warning(f"{path}: without {unknown} detections of classes that the annotations do not have")


def read_results(path: str | os.PathLike, ground_truth: Any) -> list[dict[str, Any]]:
    """The entries of a COCO results file, checked against the ground truth's images and classes."""
    return as_results(read_json(path, "results file"), _read_ground_truth(ground_truth)[0], f"results file {path}")


def evaluate_coco(
    ground_truth: Any,
    results: list[dict[str, Any]],
    iou_types: Sequence[str] | None = None,
    image_ids: Sequence[int | str] | None = None,
    verbose: bool = True,
) -> dict[str, float]:
    """Scores by COCO's protocol, as fractions (not percent).

    Args:
        ground_truth: a `DatasetSplit` (its images are scored), the path of a COCO annotation file, or its content.
        results: entries of a COCO results file.
        iou_types: of "bbox", "segm", "keypoints"; those that the results hold if not given.
        image_ids: score these images alone.
        verbose: log the summary and the per-class table.

    Returns {"bbox/AP": …, "bbox/AP50": …, "bbox/AP_per_class/<class name>": …, "segm/AP": …, …}. A number that has no
    ground truth to be computed from is nan; without any detection it is 0.

    Ids in the file may be any distinct values: categories, images and annotations get new numbers. The ids of
    annotations are ignored, because COCOeval treats a match with annotation 0 as no match and merges annotations with
    equal ids.
    Missing `area` (of the mask, else of the box), `iscrowd` and `bbox` are filled in.
    """
    content, split_ids = _read_ground_truth(ground_truth)
    if image_ids is None:
        image_ids = split_ids
    if iou_types is None:
        sources = results or content["annotations"]
        keys = {key for key in RESULT_KEY.values() if any(e.get(key) for e in sources)}
        if not (results and keys):
            keys.add("bbox")
        iou_types = [t for t, key in RESULT_KEY.items() if key in keys]
    classes, images = _renumber(content, image_ids)
    annotations = _prepare_annotations(content["annotations"], images, classes, iou_types)
    detections = _prepare_results(results, images, classes, {a["id"] for a in content["images"]})
    if not any(not a["iscrowd"] for a in annotations):
        logger.warning(f"the {len(images)} images to score have no annotated object: their AP is undefined (nan)")
    names = _distinct_names(content["categories"])
    sigmas = content.get("oks_sigmas") or ()
    metrics: dict[str, float] = {}
    for iou_type in iou_types:
        metrics.update(_score(iou_type, annotations, detections, images, classes, names, sigmas))
    if verbose:
        counts = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
        shown = {names[c]: counts[i] for c, i in classes.items() if counts[i] or len(classes) <= 100}
        hidden = len(classes) - len(shown)
        what = f" ({hidden} without an object are not shown)" if hidden else ""
        logger.info(f"scores by class{what}\n{format_class_table(metrics, shown)}")
        logger.info(f"COCO scores of {len(images)} images\n{format_scores(metrics)}")
    return metrics


def _read_ground_truth(ground_truth: Any) -> tuple[dict[str, Any], list | None]:
    """The typed content of the annotation file and, for a split, the ids of its images."""
    if isinstance(ground_truth, dict):
        return as_truth(ground_truth), None
    if isinstance(ground_truth, (str, os.PathLike)):
        return read_truth(ground_truth), None
    ids = [ground_truth.image_id(i) for i in range(len(ground_truth))]
    return as_truth(ground_truth.content(), ground_truth.annotation_file), ids


def _renumber(content: dict[str, Any], image_ids: Sequence | None) -> tuple[dict, dict]:
    """{category id: 1..C} and {image id: {"id": 1..N, "height", "width"}}, both in the order of the old ids.

    COCOeval uses this order too; it decides ties between equal scores.
    """

    def order(ids: Iterable) -> list:
        return sorted(set(ids), key=lambda i: (isinstance(i, str), i))

    classes = {c: n for n, c in enumerate(order(c["id"] for c in content["categories"]), 1)}
    known = {image["id"]: image for image in content["images"]}
    unknown = [i for i in image_ids or () if i not in known]
    if unknown:
        raise UserError(f"image id {unknown[0]!r} is not in the annotation file")
    images = {}
    for n, image_id in enumerate(order(known if image_ids is None else image_ids), 1):
        image = known[image_id]
        images[image_id] = {"id": n, "height": image.get("height"), "width": image.get("width")}
    return classes, images


def _distinct_names(categories: list[dict[str, Any]]) -> dict[Any, str]:
    """{category id: name}, with the id added to names that occur more than once."""
    names = {c["id"]: str(c.get("name", c["id"])) for c in categories}
    often = Counter(names.values())
    return {i: name if often[name] == 1 else f"{name} ({i})" for i, name in names.items()}


def _prepare_annotations(
    annotations: list[dict[str, Any]], images: dict, classes: dict, iou_types: Sequence[str]
) -> list[dict[str, Any]]:
    """Copies of the annotations of `images` with new ids and every field that COCOeval reads."""
    prepared = []
    maskless = 0
    for a in annotations:
        image = images.get(a["image_id"])
        if image is None:
            continue
        mask = None
        if "segm" in iou_types:
            mask = _mask(a["segmentation"], image) if a["segmentation"] else None
            maskless += mask is None
        prepared.append({
            **{key: a[key] for key in ("bbox", "area", "iscrowd", "keypoints", "num_keypoints")},
            "id": len(prepared) + 1, "image_id": image["id"], "category_id": classes[a["category_id"]],
            "segmentation": mask, "_image": image,
        })  # fmt: skip
    if maskless:
        logger.warning(f"{maskless} annotations have no mask: mask scores ignore detections inside their boxes")
    return prepared


def _mask(segmentation: Any, image: dict[str, Any]) -> dict[str, Any]:
    """One compressed RLE of a typed segmentation."""
    height, width = image["height"], image["width"]
    if height is None or width is None:
        parts = [segmentation] if isinstance(segmentation, dict) else segmentation
        sizes = [part["size"] for part in parts if isinstance(part, dict)]
        if len(sizes) < len(parts) or not sizes:
            raise UserError("annotation file: scoring masks given as polygons needs height and width of every image")
        height, width = sizes[0]
    return encode_segmentation(segmentation, height, width)


def _prepare_results(results: list[dict], images: dict, classes: dict, known_images: set) -> list[dict]:
    prepared = []
    for i, entry in enumerate(results):
        if entry["image_id"] not in known_images or entry["category_id"] not in classes:
            key = "category_id" if entry["image_id"] in known_images else "image_id"
            raise UserError(f"results: entry {i}: {key} {entry[key]!r} is not in the annotation file")
        image = images.get(entry["image_id"])
        if image is not None:
            category = classes[entry["category_id"]]
            prepared.append({**entry, "image_id": image["id"], "category_id": category, "_image": image, "_entry": i})
    return prepared


def _score(
    iou_type: str,
    annotations: list[dict],
    detections: list[dict],
    images: dict,
    classes: dict,
    names: dict,
    sigmas: Sequence[float],
) -> dict[str, float]:
    """The summary and the AP of each class for one IoU type."""
    truth = [_truth_entry(a, iou_type) for a in annotations]
    found = [_found_entry(d, iou_type, n) for n, d in enumerate(detections, 1)]
    categories = [{"id": n} for n in classes.values()]
    with contextlib.redirect_stdout(io.StringIO()):
        scorer = COCOeval(
            _coco(truth, images.values(), categories), _coco(found, images.values(), categories), iou_type
        )
        if iou_type == "keypoints":
            points = max((len(a["keypoints"]) // 3 for a in annotations), default=17)
            scorer.params.kpt_oks_sigmas = _falloffs(points, sigmas, scorer.params.kpt_oks_sigmas)
        scorer.evaluate()
        scorer.accumulate()
    precision, recall = scorer.eval["precision"], scorer.eval["recall"]  # [T, R, K, A, M], [T, K, A, M]
    metrics = {f"{iou_type}/{name}": value for name, value in _summary(iou_type, precision, recall, scorer.params)}
    for category, k in classes.items():
        one, found_share = precision[:, :, k - 1, 0, -1], recall[:, k - 1, 0, -1]
        metrics[f"{iou_type}/AP_per_class/{names[category]}"] = _mean(one)
        metrics[f"{iou_type}/AP50_per_class/{names[category]}"] = _mean(one[0])
        metrics[f"{iou_type}/AR_per_class/{names[category]}"] = _mean(found_share)
    return metrics


def _falloffs(points: int, given: Sequence[float], published: np.ndarray) -> np.ndarray:
    """Falloff of the object keypoint similarity (OKS) for each point: COCO publishes those of its 17 body points."""
    if given:
        if len(given) != points:
            raise UserError(f"KRCNN.OKS_SIGMAS has {len(given)} numbers, the annotations have {points} keypoints")
        return np.array(given, np.float64)
    if points == len(published):
        return published
    logger.warning(
        f"keypoint scores of {points} points use a guessed falloff, {published.mean():.3f} for each point: none is "
        "published but for COCO's 17; give yours by KRCNN.OKS_SIGMAS"
    )
    return np.full(points, published.mean())


def _truth_entry(annotation: dict, iou_type: str) -> dict:
    if iou_type == "segm" and annotation["segmentation"] is None:
        # Without a mask it cannot be matched: its box becomes an ignored region, like a crowd.
        x, y, w, h = annotation["bbox"]
        image = annotation["_image"]
        corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        return {**annotation, "iscrowd": 1, "segmentation": _mask(corners, image)}
    return dict(annotation)


def _found_entry(detection: dict, iou_type: str, new_id: int) -> dict:
    """A detection with the area that decides its size range: the area of the mask, box or keypoints that are scored."""
    key = RESULT_KEY[iou_type]
    if iou_type == "bbox" and detection.get("bbox") is None and detection.get("segmentation"):
        # COCO's mask results need no boxes: the mask has one.
        mask = _mask(detection["segmentation"], detection["_image"])
        detection = {**detection, "bbox": coco_mask.toBbox(mask).tolist()}
    if detection.get(key) is None:
        raise UserError(f"results: entry {detection['_entry']} has no {key}, which {iou_type} scores need")
    entry = {"id": new_id, "iscrowd": 0, **{k: detection[k] for k in ("image_id", "category_id", "score", key)}}
    if iou_type == "bbox":
        entry["area"] = detection["bbox"][2] * detection["bbox"][3]
    elif iou_type == "segm":
        entry["segmentation"] = _mask(detection["segmentation"], detection["_image"])
        entry["area"] = int(coco_mask.area(entry["segmentation"]))
    else:
        x, y = detection["keypoints"][0::3], detection["keypoints"][1::3]
        entry["bbox"] = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    return entry


def _coco(annotations: list[dict], images: Iterable[dict], categories: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"images": list(images), "annotations": annotations, "categories": categories}
    coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float:
    """Mean of the valid entries: COCOeval marks entries without ground truth with -1."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else math.nan


def _summary(iou_type: str, precision: np.ndarray, recall: np.ndarray, params: Any) -> list[tuple[str, float]]:
    """COCOeval's summary numbers, as (name, value) in its order."""
    areas = {label[0]: n for n, label in enumerate(params.areaRngLbl)}  # a(ll), s(mall), m(edium), l(arge)
    thresholds = {"50": 0, "75": 5}
    summary = []
    for name in KEYPOINT_SUMMARY if iou_type == "keypoints" else SUMMARY:
        table, what = (precision, name[2:]) if name.startswith("AP") else (recall, name[2:])
        area = areas[what] if what in ("s", "m", "l") else areas["a"]
        limit = -1
        if what in thresholds:
            table = table[thresholds[what]]
        elif what.isdigit():
            limit = params.maxDets.index(int(what))
        summary.append((name, _mean(table[..., area, limit])))
    return summary


def format_scores(metrics: dict[str, float]) -> str:
    """COCO's summary numbers as a table with one row each for boxes, masks and keypoints."""
    lines = []
    for names, iou_types in ((SUMMARY, ("bbox", "segm")), (KEYPOINT_SUMMARY, ("keypoints",))):
        rows = [
            [TITLES[t]] + [_number(metrics[f"{t}/{name}"]) for name in names] for t in iou_types if f"{t}/AP" in metrics
        ]
        if rows:
            lines.append(tabulate(rows, ["", *names], disable_numparse=True, stralign="right"))
    return "\n".join(lines)


def format_class_table(metrics: dict[str, float], counts: dict[str, int]) -> str:
    """AP, AP50 and AR of every class; `counts` maps the class names to their numbers of annotated objects."""
    iou_types = [t for t in TITLES if f"{t}/AP" in metrics]
    headers = ["class", "objects"] + [f"{TITLES[t]} {n}" for t in iou_types for n in ("AP", "AP50", "AR")]
    rows = []
    for name, count in counts.items():
        numbers = [metrics[f"{t}/{n}_per_class/{name}"] for t in iou_types for n in ("AP", "AP50", "AR")]
        rows.append([name, str(count), *map(_number, numbers)])
    return tabulate(rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


PROPOSAL_LIMITS = (100, 1000)  # numbers of proposals per image

PROPOSAL_AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}  # as COCOeval, ends included


def evaluate_proposals(
    ground_truth: Any,
    results: list[dict[str, Any]],
    image_ids: Sequence[int | str] | None = None,
    verbose: bool = True,
) -> dict[str, float]:
    """Average recall of class-agnostic proposals, as fractions: COCOeval's AR with useCats = 0.

    Args:
        ground_truth, image_ids: as for `evaluate_coco`.
        results: entries of a COCO results file; their classes are ignored.
        verbose: log the table.

    Returns {"proposals/AR@100": …, "proposals/ARs@100": …, …}: the share of objects found by the best 100 (1000)
    proposals of their images, averaged over IoU 0.5, 0.55, …, 0.95. s, m and l are for objects below 32^2 pixels, up to
    96^2, and above; "R50" and "R75" are for a single IoU. A proposal finds at most one object. Crowd regions are left
    out. nan if there is no object.

    Proposals are matched in order of score, as detections in COCOeval. detectron2 matches them in order of IoU instead,
    which differs where several proposals compete for the same objects.
    """
    content, split_ids = _read_ground_truth(ground_truth)
    classes, images = _renumber(content, split_ids if image_ids is None else image_ids)
    annotations = [a for a in _prepare_annotations(content["annotations"], images, classes, []) if not a["iscrowd"]]
    known = {a["id"] for a in content["images"]}
    truth: dict[int, list[dict]] = {image["id"]: [] for image in images.values()}
    for annotation in annotations:
        truth[annotation["image_id"]].append(annotation)
    found: dict[int, list[dict]] = {number: [] for number in truth}
    for i, entry in enumerate(results):
        if entry["image_id"] not in known:
            raise UserError(f"results: entry {i}: image_id {entry['image_id']!r} is not in the annotation file")
        if entry["image_id"] in images:
            found[images[entry["image_id"]]["id"]].append(entry)
    thresholds = np.linspace(0.5, 0.95, 10)
    ranks = {area: [np.zeros((10, 0), np.int64)] for area in PROPOSAL_AREAS}
    for number, objects in truth.items():
        if not objects:
            continue
        scores = np.array([entry["score"] for entry in found[number]])
        order = np.argsort(-scores, kind="stable")[: PROPOSAL_LIMITS[-1]]
        boxes = np.array([found[number][i]["bbox"] for i in order], np.float64).reshape(-1, 4)
        iou = np.zeros((0, len(objects)))
        if len(boxes):
            truth_boxes = np.array([a["bbox"] for a in objects], np.float64)
            iou = coco_mask.iou(boxes, truth_boxes, np.zeros(len(objects), np.uint8))
        areas = np.array([a["area"] for a in objects])
        for area, (low, high) in PROPOSAL_AREAS.items():
            ranks[area].append(_finding_ranks(iou[:, (areas >= low) & (areas <= high)], thresholds))
    metrics: dict[str, float] = {}
    for limit in PROPOSAL_LIMITS:
        for area in PROPOSAL_AREAS:
            recall = (np.concatenate(ranks[area], 1) < limit).mean(1) if sum(r.size for r in ranks[area]) else None
            metrics[f"proposals/AR{area}@{limit}"] = math.nan if recall is None else float(recall.mean())
            if area == "":
                for name, place in (("R50", 0), ("R75", 5)):
                    metrics[f"proposals/{name}@{limit}"] = math.nan if recall is None else float(recall[place])
    if verbose:
        logger.info(f"proposals of {len(images)} images, {len(annotations)} objects\n{format_recall(metrics)}")
    return metrics


def _finding_ranks(iou: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """iou [D, G] of one image's proposals, best first -> int64 [T, G]: how many proposals come before the one that
    finds the object at each threshold; the largest integer where none does.

    Each proposal in turn takes the unmatched object with the largest IoU (the last of equal ones), as in COCOeval.
    Crowd regions and objects of other sizes, which COCOeval ignores, never take a proposal away from an object that is
    scored, so they may be left out.
    """
    ranks = np.full((len(thresholds), iou.shape[1]), np.iinfo(np.int64).max)
    if iou.shape[1] == 0:
        return ranks
    rows = np.arange(len(thresholds))
    for proposal in np.flatnonzero(iou.max(1, initial=0) >= thresholds[0]):
        free = np.where(ranks == np.iinfo(np.int64).max, iou[proposal], -1)
        best = iou.shape[1] - 1 - free[:, ::-1].argmax(1)
        good = free[rows, best] >= thresholds
        ranks[rows[good], best[good]] = proposal
    return ranks


def format_recall(metrics: dict[str, float]) -> str:
    """The numbers of `evaluate_proposals` as a table with a row for each number of proposals."""
    names = ["AR", "ARs", "ARm", "ARl", "R50", "R75"]
    rows = [[f"best {n}"] + [_number(metrics[f"proposals/{name}@{n}"]) for name in names] for n in PROPOSAL_LIMITS]
    return tabulate(rows, ["", *names], disable_numparse=True, stralign="right")
