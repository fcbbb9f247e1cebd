"""The published evaluation protocols by name, in one dict for data sets, training and tools/score.py.

A protocol is a function (content, results, iou_types=None, verbose=True) -> {name: float}: content as
utils/coco_format.py types it, results in COCO's form. A number that has no ground truth is nan. To add one, write the
function and give it a line in PROTOCOLS.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tabulate import tabulate

from common import logger
from eval import evaluate_coco
from utils import oid_eval
from utils.cityscapes_eval import evaluate_cityscapes
from utils.lvis_eval import evaluate_lvis
from utils.voc_eval import evaluate_voc

__all__ = ["PROTOCOLS", "named_scores", "only_images"]

Scores = dict[str, float]


def coco(content: dict, results: list[dict], iou_types: Sequence[str] | None = None, verbose: bool = True) -> Scores:
    """See `eval.evaluate_coco`."""
    return evaluate_coco(content, results, iou_types, verbose=verbose)


def lvis(content: dict, results: list[dict], iou_types: Sequence[str] | None = None, verbose: bool = True) -> Scores:
    """ "bbox/AP" …, and "segm/AP" … where results have masks; see `evaluate_lvis`."""
    metrics: Scores = {}
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation")):
        if kind in iou_types if iou_types else kind == "bbox" or any(r.get(key) for r in results):
            scores = evaluate_lvis(content, results, kind)
            metrics |= {f"{kind}/{k}": v for k, v in scores.items()}
            if verbose:
                shown = {k: v for k, v in scores.items() if "/" not in k}
                table = tabulate([list(shown.values())], list(shown), floatfmt=".3f")
                logger.info(f"LVIS {kind} scores of {len(content['images'])} images\n{table}")
    return metrics


def voc(mark: str, eleven_points: bool, content: dict, results: list[dict], **_: Any) -> Scores:
    """ "voc07/mAP" or "voc12/mAP" and more, see `named_scores`."""
    truth = oid_eval.truth_from_coco(content)
    detections = oid_eval.detections_from_coco(results, content, truth)
    return named_scores(mark, evaluate_voc(truth, detections, eleven_points), truth.class_ids, truth.class_names)


def cityscapes(content: dict, results: list[dict], **_: Any) -> Scores:
    """ "cityscapes/AP", "cityscapes/AP50" and those of each class; nothing for results without masks."""
    if not all(r.get("segmentation") for r in results):
        return {}
    return {f"cityscapes/{k}": v for k, v in evaluate_cityscapes(content, results).items()}


def open_images(protocol: str, content: dict, results: list[dict], **_: Any) -> Scores:
    """ "oid-v2/mAP" and more, see `named_scores`; without a class hierarchy, so nothing is expanded."""
    truth = oid_eval.truth_from_coco(content, protocol == "challenge-segm")
    detections = oid_eval.detections_from_coco(results, content, truth)
    scores = oid_eval.evaluate(truth, detections, protocol)
    return named_scores(f"oid-{protocol}", scores, truth.class_ids, truth.class_names)


PROTOCOLS: dict[str, Callable[..., Scores]] = {
    "coco": coco,
    "oid-v2": functools.partial(open_images, "v2"),
    "oid-challenge": functools.partial(open_images, "challenge"),
    "oid-challenge-segm": functools.partial(open_images, "challenge-segm"),
    "voc07": functools.partial(voc, "voc07", True),
    "voc12": functools.partial(voc, "voc12", False),
    "lvis": lvis,
    "cityscapes": cityscapes,
}


def named_scores(mark: str, scores: dict[str, Any], ids: Sequence[str], names: Sequence[str]) -> Scores:
    """The results of evaluate_voc or oid_eval.evaluate with class names for ids: <mark>/mAP, and for each class
    <mark>/AP_per_class/<name> and the counts <mark>/num_gt/<name> …. If several classes share a name, the id is
    added."""
    nan = float("nan")
    shown = [n if names.count(n) == 1 else f"{n} ({i})" for i, n in zip(ids, names)]
    metrics = {f"{mark}/mAP": nan if scores["mAP"] is None else scores["mAP"]}
    kinds = {"per_class_AP": "AP_per_class"} | {key: key for key in scores if key.startswith("num_")}
    for key, kind in kinds.items():
        metrics |= {f"{mark}/{kind}/{n}": nan if scores[key][i] is None else scores[key][i] for i, n in zip(ids, shown)}
    return metrics


def only_images(content: dict[str, Any], ids: Iterable) -> dict[str, Any]:
    """The content restricted to these images."""
    wanted = set(ids)
    if len(wanted) == len(content["images"]):
        return content
    images = [image for image in content["images"] if image["id"] in wanted]
    return {**content, "images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in wanted]}
