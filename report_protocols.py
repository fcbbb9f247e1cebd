"""Pascal VOC, Open Images and Cityscapes for the evaluation report: their own matching, with bootstrap intervals."""

from typing import Any

import numpy as np

import report_numbers as numbers
from report_numbers import Record, Scene, Summary
from report_read import Problem
from utils import oid_eval
from utils.cityscapes_eval import evaluate_cityscapes
from utils.voc_eval import evaluate_voc

__all__ = ["other_summary"]

_EVERY = slice(None)


def other_summary(
    problem: Problem, scene: Scene, entries: list[dict[str, Any]], weights: np.ndarray
) -> tuple[Summary, list[Record]]:
    """As `report.summary_of`, for the protocols whose matching is not COCO's."""
    if problem.protocol == "cityscapes":
        records = _cityscapes(problem, scene, entries)
        return numbers.summarise({"AP": (records, _EVERY), "AP50": (records, [0])}, {}, weights), records
    records = _columns(problem, scene, entries)
    return numbers.summarise({"mAP": (records, _EVERY)}, {"recall": (records, _EVERY)}, weights), records


def _columns(problem: Problem, scene: Scene, entries: list[dict[str, Any]]) -> list[Record]:
    """Records of the protocols that are scored as `oid_eval` columns."""
    masked = problem.protocol == "oid-challenge-segm"
    truth = oid_eval.truth_from_coco(problem.content, masked)._replace(ancestors=problem.ancestors)
    found = oid_eval.detections_from_coco(entries, problem.content, truth)
    place = {str(i).encode(): n for n, i in enumerate(scene.image_ids)}
    image_of = np.array([place[i] for i in truth.image_ids.tolist()], np.int64)
    kept: dict[int, Record] = {}
    measure = {"voc07": "eleven"}.get(problem.protocol, "area")

    def keep(c: int, scores, hits, images, objects) -> None:
        order = np.lexsort((hits, images, -scores))
        hit = (hits > 0)[None, order]
        count = np.bincount(image_of[objects], minlength=len(scene.image_ids)).astype(np.float64)
        kept[c] = Record(image_of[images[order]], scores[order], hit, np.ones_like(hit), count, measure)

    if problem.protocol.startswith("voc"):
        evaluate_voc(truth, found, problem.protocol == "voc07", on_class=keep)
    else:
        kind = problem.protocol.removeprefix("oid-")
        oid_eval.evaluate(truth, found, kind, problem.expand_detections, keep)
    return [kept[c] for c in problem.category_order]


def _cityscapes(problem: Problem, scene: Scene, entries: list[dict[str, Any]]) -> list[Record]:
    place = {i: n for n, i in enumerate(scene.image_ids)}
    kept: dict[Any, Record] = {}

    def keep(category: Any, image_ids: list, counts: list[int], settled: list) -> None:
        images = np.array([place[i] for i in image_ids], np.int64)
        objects = np.bincount(images, counts, len(place)) if len(images) else np.zeros(len(place))
        # What counts differs by threshold, so each has entries of its own.
        sizes = [len(scores) for scores, _, _ in settled]
        of_threshold = np.repeat(np.arange(len(settled)), sizes)
        scores, right, part = (np.concatenate(column) for column in zip(*settled))
        counted = of_threshold == np.arange(len(settled))[:, None]
        image = images[part] if len(part) else np.zeros(0, np.int64)
        kept[category] = numbers.class_records(image, scores, counted & right, counted, objects, "trapezoid")

    evaluate_cityscapes(problem.content, entries, keep)
    ids = [c["id"] for c in problem.content["categories"]]
    return [kept[ids[c]] for c in problem.category_order]
