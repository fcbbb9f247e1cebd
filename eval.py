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
from detections import Rle

__all__ = [
    "check_results",
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
    """Writes a COCO results file, one entry a line, without ever holding its whole text.

    Entries of category_id None, a class that the annotations do not have, are counted and left out.
    """
    unknown = 0
    with atomic_write(path) as f:
        separator = "[\n"
        for entry in results:
            if entry["category_id"] is None:
                unknown += 1
                continue
            f.write(separator + json.dumps(entry, ensure_ascii=False))
            separator = ",\n"
        f.write("\n]\n" if separator != "[\n" else "[]\n")
    if unknown:
        logger.warning(f"{path}: without {unknown} detections of classes that the annotations do not have")


def read_results(path: str | os.PathLike, ground_truth: Any) -> list[dict[str, Any]]:
    """A COCO results file whose every entry was checked against the ground truth's images and classes."""
    results = read_json(path, "results file")
    content, _ = _read_ground_truth(ground_truth)
    check_results(results, content, f"results file {path}")
    return results


def check_results(results: Any, ground_truth: dict[str, Any], origin: str) -> None:
    """UserError naming `origin` and the first entry that is not a valid COCO result for the ground truth."""
    if not isinstance(results, list):
        raise UserError(f"{origin}: must hold a list of detections, not {type(results).__name__}")
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    for i, entry in enumerate(results):
        problem = _entry_problem(entry, sizes, categories)
        if problem:
            raise UserError(f"{origin}: entry {i}: {problem}")


def _entry_problem(entry: Any, sizes: dict, categories: set) -> str | None:
    if not isinstance(entry, dict):
        return f"must be an object, not {type(entry).__name__}"
    for key in ("image_id", "category_id", "score"):
        if key not in entry:
            return f"has no {key}"
    for key, known in (("image_id", sizes), ("category_id", categories)):
        if isinstance(entry[key], (list, dict)) or entry[key] not in known:
            return f"{key} {entry[key]!r} is not in the annotation file"
    if not _numbers([entry["score"]]):
        return f"score {entry['score']!r} is not a finite number"
    if not any(key in entry for key in RESULT_KEY.values()):
        return "has none of bbox, segmentation, keypoints"
    if "bbox" in entry:
        box = entry["bbox"]
        if not (_numbers(box) and len(box) == 4 and box[2] >= 0 and box[3] >= 0):
            return f"bbox {box!r} must be four finite numbers x, y, width, height"
    if "keypoints" in entry:
        points = entry["keypoints"]
        if not (_numbers(points) and points and len(points) % 3 == 0):
            return "keypoints must be finite numbers x, y, v for each point"
    if "segmentation" in entry:
        return _segmentation_problem(entry["segmentation"], sizes[entry["image_id"]])
    return None


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )


def _segmentation_problem(segmentation: Any, image_hw: tuple[int | None, int | None]) -> str | None:
    """Why a user's mask is unusable; pycocotools itself would read or write out of bounds, or give IoU -1."""
    if isinstance(segmentation, list):
        good = segmentation and all(_numbers(part) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation)
        return None if good else "segmentation: a polygon needs three or more points as a list x1, y1, x2, y2, …"
    if not (isinstance(segmentation, dict) and _numbers(segmentation.get("size")) and len(segmentation["size"]) == 2):
        return "segmentation must be an RLE object with size [height, width] and counts, or a list of polygons"
    size = tuple(segmentation["size"])
    if None not in image_hw and size != image_hw:
        return f"segmentation has size {list(size)}, the image has height and width {list(image_hw)}"
    counts = segmentation.get("counts")
    counts = np.array(counts, np.float64) if _numbers(counts) else _decode_counts(counts)
    if counts is None or (counts < 0).any() or (counts % 1).any() or counts.sum() != size[0] * size[1]:
        return "segmentation: its RLE counts are broken or do not add up to height x width"
    return None


def _decode_counts(text: Any) -> np.ndarray | None:
    """Uncompressed counts of a compressed RLE's string, None if it is malformed.

    Each count is stored as the difference to the count two places before (from the fourth on), in groups of 5 bits,
    lowest first, with bit 5 set when another group follows, as the character with code 48 + group; the highest bit of
    the last group is the sign.
    """
    if not isinstance(text, str) or not text or not text.isascii():
        return None
    groups = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(groups & 32 == 0)
    if groups.min() < 0 or groups.max() > 63 or len(ends) == 0 or ends[-1] != len(groups) - 1:
        return None
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 8:
        return None
    shift = 5 * (np.arange(len(groups)) - np.repeat(begins, lengths))
    counts = np.add.reduceat((groups & 31) << shift, begins)
    counts -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


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

    The ids in the file only need to tell things apart: categories and images are numbered anew, as are annotations,
    whose ids are ignored (COCOeval takes a match with annotation 0 for no match, and merges annotations of one id).
    Missing `area` (of the mask, else of the box), `iscrowd` and `bbox` are filled in.
    """
    content, split_ids = _read_ground_truth(ground_truth)
    if image_ids is None:
        image_ids = split_ids
    if iou_types is None:
        sources = results or content["annotations"]
        keys = {key for key in RESULT_KEY.values() if any(isinstance(e, dict) and e.get(key) for e in sources)}
        iou_types = [t for t, key in RESULT_KEY.items() if t == "bbox" or key in keys]
    classes, images = _number_anew(content, image_ids)
    annotations = _prepare_annotations(content["annotations"], images, classes, iou_types)
    detections = _prepare_results(results, images, classes, {a["id"] for a in content["images"]})
    if not any(not a["iscrowd"] for a in annotations):
        logger.warning(f"the {len(images)} images to score have no annotated object: their AP is undefined (nan)")
    names = _distinct_names(content["categories"])
    metrics: dict[str, float] = {}
    for iou_type in iou_types:
        metrics.update(_score(iou_type, annotations, detections, images, classes, names))
    if verbose:
        counts = Counter(a["category_id"] for a in annotations if not a["iscrowd"])
        shown = {names[c]: counts[i] for c, i in classes.items() if counts[i] or len(classes) <= 100}
        hidden = len(classes) - len(shown)
        what = f" ({hidden} without an object are not shown)" if hidden else ""
        logger.info(f"scores by class{what}\n{format_class_table(metrics, shown)}")
        logger.info(f"COCO scores of {len(images)} images\n{format_scores(metrics)}")
    return metrics


def _read_ground_truth(ground_truth: Any) -> tuple[dict[str, Any], list | None]:
    """The content of the annotation file and, for a split, the ids of its images."""
    if isinstance(ground_truth, dict):
        return {"annotations": [], **ground_truth}, None
    if isinstance(ground_truth, (str, os.PathLike)):
        path, ids = ground_truth, None
    else:
        path, ids = ground_truth.annotation_file, [ground_truth.image_id(i) for i in range(len(ground_truth))]
        if hasattr(ground_truth, "content"):  # sets that are no COCO json on disk
            return {"annotations": [], **ground_truth.content()}, ids
    content = read_json(path, "annotation file")
    for key in ("images", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"annotation file {path} has no list '{key}': it is not in COCO's format")
    return {"annotations": [], **content}, ids


def _number_anew(content: dict[str, Any], image_ids: Sequence | None) -> tuple[dict, dict]:
    """{category id: 1..C} and {image id: {"id": 1..N, "height", "width"}}, both in the order of the old ids.

    That order is COCOeval's own, which decides ties between equal scores.
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


def _to_rle(segmentation: Any, height: int | None, width: int | None) -> Rle | None:
    """One RLE of polygons, uncompressed or compressed RLE; None for a mask without any usable part."""
    if isinstance(segmentation, dict) and segmentation.get("counts"):
        if isinstance(segmentation["counts"], list):
            counts = {**segmentation, "counts": np.array(segmentation["counts"], np.uint32)}
            return coco_mask.frPyObjects(counts, *segmentation["size"])
        return segmentation
    parts = segmentation if isinstance(segmentation, list) else []
    parts = [parts] if parts and isinstance(parts[0], (int, float)) else parts
    parts = [p for p in parts if len(p) >= 6]
    if not parts:
        return None
    if height is None or width is None:
        raise UserError("annotation file: scoring masks given as polygons needs height and width of every image")
    return coco_mask.merge(coco_mask.frPyObjects(parts, height, width))


def _prepare_annotations(
    annotations: list[dict[str, Any]], images: dict, classes: dict, iou_types: Sequence[str]
) -> list[dict[str, Any]]:
    """The annotations of `images` with new ids and every field that COCOeval reads; the given ones stay untouched."""
    prepared = []
    unusable = maskless = 0
    for a in annotations:
        try:
            if a["category_id"] not in classes:
                raise ValueError
            image = images.get(a["image_id"])
            entry = None if image is None else _prepare_annotation(a, image, "segm" in iou_types)
        except (KeyError, TypeError, ValueError, AttributeError):
            unusable += 1
            continue
        if entry is not None:
            entry.update(id=len(prepared) + 1, category_id=classes[a["category_id"]])
            maskless += "segm" in iou_types and entry["segmentation"] is None
            prepared.append(entry)
    if unusable:
        logger.warning(f"{unusable} annotations of an unknown category, or without box and mask, are not scored")
    if maskless:
        logger.warning(f"{maskless} annotations have no mask: mask scores ignore detections inside their boxes")
    return prepared


def _prepare_annotation(a: dict[str, Any], image: dict[str, Any], with_mask: bool) -> dict[str, Any]:
    rle = None
    box, area, points = a.get("bbox") or None, a.get("area"), a.get("keypoints") or []
    if with_mask or box is None or area is None:
        outline = a.get("segmentation")
        # pycocotools does not check what it decodes.
        if not isinstance(outline, dict) or _segmentation_problem(outline, (image["height"], image["width"])) is None:
            rle = _to_rle(outline, image["height"], image["width"])
    if box is None:
        if rle is None:
            raise ValueError
        box = coco_mask.toBbox(rle).tolist()
    x, y, width, height = (float(v) for v in box)
    if area is None:
        area = float(coco_mask.area(rle)) if rle is not None else width * height
    visible = sum(v > 0 for v in points[2::3])
    return {
        "image_id": image["id"],
        "bbox": [x, y, width, height],
        "area": float(area),
        "iscrowd": int(a.get("iscrowd") or 0),
        "segmentation": rle,
        "keypoints": points,
        "num_keypoints": a.get("num_keypoints", visible) if points else 0,
        "_image": image,
    }


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
    iou_type: str, annotations: list[dict], detections: list[dict], images: dict, classes: dict, names: dict
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
            if points != len(scorer.params.kpt_oks_sigmas):
                # Falloffs are published for COCO's 17 body points alone; others get their mean for every point.
                scorer.params.kpt_oks_sigmas = np.full(points, scorer.params.kpt_oks_sigmas.mean())
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


def _truth_entry(annotation: dict, iou_type: str) -> dict:
    if iou_type == "segm" and annotation["segmentation"] is None:
        # Without a mask nothing can be right or wrong here: its box becomes a region to ignore, like a crowd.
        x, y, w, h = annotation["bbox"]
        image = annotation["_image"]
        corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        return {**annotation, "iscrowd": 1, "segmentation": _to_rle(corners, image["height"], image["width"])}
    return dict(annotation)


def _found_entry(detection: dict, iou_type: str, new_id: int) -> dict:
    """A detection with the area that decides its size range: of what is scored, not of its box in any case."""
    key = RESULT_KEY[iou_type]
    if detection.get(key) is None:
        raise UserError(f"results: entry {detection['_entry']} has no {key}, which {iou_type} scores need")
    entry = {"id": new_id, "iscrowd": 0, **{k: detection[k] for k in ("image_id", "category_id", "score", key)}}
    if iou_type == "bbox":
        entry["area"] = detection["bbox"][2] * detection["bbox"][3]
    elif iou_type == "segm":
        image = detection["_image"]
        entry["segmentation"] = _to_rle(detection["segmentation"], image["height"], image["width"])
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
    """Mean of the entries that exist: COCOeval marks with -1 those without ground truth."""
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
    """COCO's summary numbers as a table with a row for boxes, masks and keypoints each."""
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


PROPOSAL_LIMITS = (100, 1000)  # proposals per image that count

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
        results: entries of a COCO results file, whose classes do not matter.
        verbose: log the table.

    Returns {"proposals/AR@100": …, "proposals/ARs@100": …, …}: the share of all objects that the best 100 (1000)
    proposals of their images find, averaged over IoU 0.5, 0.55, …, 0.95; s, m and l of objects below 32^2 pixels, from
    there to 96^2 and above; "R50" and "R75" at one IoU alone. A proposal finds one object at most. Crowd regions are no
    objects. nan where there is no object.

    Proposals choose by their score, as detections do in COCOeval. detectron2 pairs proposals and objects by decreasing
    IoU instead, which differs where several proposals compete for the same objects.
    """
    content, split_ids = _read_ground_truth(ground_truth)
    classes, images = _number_anew(content, split_ids if image_ids is None else image_ids)
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

    Each proposal in turn takes the object of the largest IoU that is still free (of equal ones the last), as COCOeval
    does it. Crowd regions and objects of other sizes, which COCOeval ignores, never take a proposal from an object
    that counts, so they may be left out.
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
