"""The other published protocols: Pascal VOC, LVIS, Cityscapes and Open Images on content in COCO's form."""

from collections.abc import Iterable, Sequence
from typing import Any

from tabulate import tabulate

from common import logger
from utils import oid_eval
from utils.lvis_eval import evaluate_lvis
from utils.voc_eval import evaluate_voc

__all__ = ["lvis_scores", "named_scores", "only_images", "voc_scores"]


def only_images(content: dict[str, Any], ids: Iterable) -> dict[str, Any]:
    wanted = set(ids)
    if len(wanted) == len(content["images"]):
        return content
    images = [image for image in content["images"] if image["id"] in wanted]
    return {**content, "images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in wanted]}


def voc_scores(content: dict[str, Any], results: list[dict]) -> dict[str, float]:
    truth = oid_eval.truth_from_coco(content)
    detections = oid_eval.detections_from_coco(results, content, truth)
    metrics = {}
    for mark, eleven in (("voc07", True), ("voc12", False)):
        scores = evaluate_voc(truth, detections, eleven)
        metrics |= named_scores(mark, scores, truth.class_ids, truth.class_names)
    return metrics


def named_scores(mark: str, scores: dict[str, Any], ids: Sequence, names: Sequence[str]) -> dict[str, float]:
    nan = float("nan")
    per_class = {f"{mark}/AP_per_class/{n}": scores["per_class_AP"][i] for i, n in zip(ids, names)}
    return {k: nan if v is None else v for k, v in {f"{mark}/mAP": scores["mAP"], **per_class}.items()}


def lvis_scores(content, results, ids, iou_types=None, image_ids=None, verbose=True) -> dict[str, float]:
    content = only_images(content, image_ids or ids)
    metrics: dict[str, float] = {}
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation")):
        if kind in iou_types if iou_types else kind == "bbox" or any(r.get(key) for r in results):
            scores = evaluate_lvis(content, results, kind)
            metrics |= {f"{kind}/{k}": v for k, v in scores.items()}
            if verbose:
                shown = {k: v for k, v in scores.items() if "/" not in k}
                table = tabulate([list(shown.values())], list(shown), floatfmt=".3f")
                logger.info(f"LVIS {kind} scores of {len(content['images'])} images\n{table}")
    return metrics
