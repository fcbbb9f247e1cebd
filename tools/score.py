"""Scores a results file by a published protocol, without a model.

    python tools/score.py --protocol coco --gt instances_val2017.json --detections results.json --json scores.json
    python tools/score.py --protocol oid-challenge --gt open_images/ --detections detections.csv --json scores.json

What --gt and --detections may be:
    coco, lvis      COCO or LVIS v1 json; COCO results json
    voc07, voc12    a VOC folder (Annotations/*.xml) or COCO json; COCO results json or a folder of VOC's *_<class>.txt
    cityscapes      the folder that holds gtFine/, or COCO json; COCO results json with masks, or a folder of the
                    benchmark's submission form (a .txt per image that names mask images)
    oid-*           the folder of published csv files, and a csv (a row per detection, or the challenge server's form);
                    or a COCO json and a COCO results json

The json written holds mAP, per_class_AP by class name (null: the class has no ground truth) and the protocol's other
numbers, as fractions.
"""

import import_path

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from common import UserError, logger, read_json, write_json
from dataset_cityscapes import read_cityscapes_content
from dataset_voc import read_voc_content, read_voc_detections
from eval import evaluate_coco, read_results
from utils import oid_eval
from utils.cityscapes_eval import evaluate_cityscapes, read_cityscapes_detections
from utils.lvis_eval import evaluate_lvis
from utils.oid_eval import detections_from_coco, truth_from_coco
from utils.oid_format import read_ancestors
from utils.voc_eval import evaluate_voc

PROTOCOLS = ["coco", "oid-v2", "oid-challenge", "oid-challenge-segm", "voc07", "voc12", "lvis", "cityscapes"]


# Which protocols a flag is for, by the beginnings of their names.
_FLAGS = {
    "iou_type": ("coco", "lvis"), "split": ("oid", "voc", "cityscapes"), "classes": ("oid",), "hierarchy": ("oid",),
    "masks": ("oid",), "expand_detections": ("oid-challenge",),
}  # fmt: skip


def read_content(path: str, needs: str = "") -> dict[str, Any]:
    """A COCO-format annotation file whose images have ids.

    needs: "bbox" or "segmentation": every annotation must have it, a known image and category, and the images a size.
    """
    content = read_json(path, "annotation file")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"annotation file {path} has no list '{key}': it is not in COCO's format")
    for key in ("images", "categories"):
        for number, entry in enumerate(content[key]):
            if not (isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))):
                raise UserError(f"annotation file {path}: entry {number} of '{key}' has no id")
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    if needs == "segmentation":
        for image in content["images"]:
            if not all(type(image.get(k)) is int and image[k] > 0 for k in ("height", "width")):
                raise UserError(f"annotation file {path}: image {image['id']!r} has no height and width")
    for number, a in enumerate(content["annotations"] if needs else ()):
        what = f"annotation file {path}: entry {number} of 'annotations'"
        if not isinstance(a, dict) or a.get("image_id") not in images or a.get("category_id") not in categories:
            raise UserError(f"{what} has no image_id and category_id that are in the file")
        if needs == "bbox" and not (isinstance(a.get("bbox"), list) and len(a["bbox"]) == 4):
            raise UserError(f"{what} has no bbox of four numbers")
        if needs == "segmentation" and not isinstance(a.get("segmentation"), (list, dict)):
            raise UserError(f"{what} has no segmentation")
    return content


def by_name(values: dict[str, Any], ids: list[str], names: list[str]) -> dict[str, Any]:
    """`values` by class name; a name that several classes share gets the id added."""
    return {n if names.count(n) == 1 else f"{n} ({i})": values[i] for i, n in zip(ids, names)}


def from_columns(result: dict[str, Any], truth) -> dict[str, Any]:
    counts = {
        key: by_name(result[key], truth.class_ids, truth.class_names)
        for key in ("per_class_AP", "num_gt", "num_scored_detections", "num_true_positives")
        if key in result
    }
    return {"mAP": result["mAP"], **counts}


def from_metrics(metrics: dict[str, float], prefix: str = "") -> dict[str, Any]:
    """COCO-like numbers: the AP averaged over IoU 0.5 to 0.95 and everything else under "metrics"."""
    mark = f"{prefix}AP_per_class/"
    plain = {k: None if math.isnan(v) else v for k, v in metrics.items()}
    per_class = {k[len(mark) :]: v for k, v in plain.items() if k.startswith(mark)}
    others = {k: v for k, v in plain.items() if "_per_class/" not in k}
    return {"mAP": plain[f"{prefix}AP"], "per_class_AP": per_class, "metrics": others}


def score_coco(args: argparse.Namespace) -> dict[str, Any]:
    if Path(args.gt).is_dir():
        raise UserError(f"--gt {args.gt}: the coco protocol needs an annotation json, not a folder")
    content = read_content(args.gt)
    results = read_results(args.detections, content)
    types = [args.iou_type] if args.iou_type else None
    metrics = evaluate_coco(content, results, types, verbose=False)
    kind = args.iou_type or next((t for t in ("bbox", "segm", "keypoints") if f"{t}/AP" in metrics), "bbox")
    return from_metrics(metrics, f"{kind}/")


def score_lvis(args: argparse.Namespace) -> dict[str, Any]:
    content = read_content(args.gt, "bbox")
    results = read_results(args.detections, content)
    kind = args.iou_type or ("segm" if any(r.get("segmentation") for r in results) else "bbox")
    return from_metrics(evaluate_lvis(content, results, kind)) | {"iou_type": kind}


def score_voc(args: argparse.Namespace) -> dict[str, Any]:

    if Path(args.gt).is_dir():
        content = read_voc_content(args.gt, args.split or "")
    else:
        content = read_content(args.gt, "bbox")
    truth = truth_from_coco(content)
    if Path(args.detections).is_dir():
        results = read_voc_detections(args.detections, content)
    else:
        results = read_results(args.detections, content)
    return from_columns(
        evaluate_voc(truth, detections_from_coco(results, content, truth), args.protocol == "voc07"), truth
    )


def score_cityscapes(args: argparse.Namespace) -> dict[str, Any]:

    if Path(args.gt).is_dir():
        content = read_cityscapes_content(args.gt, args.split or "val")
    else:
        content = read_content(args.gt, "segmentation")
    if Path(args.detections).is_dir():
        results = read_cityscapes_detections(args.detections, content)
    else:
        results = read_results(args.detections, content)
    return from_metrics(evaluate_cityscapes(content, results))


def score_open_images(args: argparse.Namespace) -> dict[str, Any]:
    protocol = args.protocol.removeprefix("oid-")
    masked = protocol == "challenge-segm"
    if Path(args.gt).is_dir():
        if str(args.detections).endswith(".json"):
            raise UserError(
                f"--detections {args.detections}: a json has boxes in pixels and the published csv files have no image "
                "sizes; give the csv that --evaluate writes beside it"
            )
        split = args.split or "validation"
        truth = oid_eval.read_truth(args.gt, split, masked, args.classes, args.hierarchy, args.masks)
        detections = oid_eval.read_detections(args.detections, truth)
    else:
        content = read_content(args.gt, "bbox")
        if masked:
            content = read_content(args.gt, "segmentation")
        truth = oid_eval.truth_from_coco(content, masked)
        if args.hierarchy:
            truth = truth._replace(ancestors=read_ancestors(args.hierarchy, truth.class_ids))
        detections = oid_eval.detections_from_coco(read_results(args.detections, content), content, truth)
    if protocol != "v2" and truth.ancestors is None:
        logger.warning("no class hierarchy was found, so nothing is expanded; give one by --hierarchy")
    result = oid_eval.evaluate(truth, detections, protocol, args.expand_detections)
    return from_columns(result, truth) | {"per_class_AP_by_id": result["per_class_AP"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--protocol", required=True, choices=PROTOCOLS)
    parser.add_argument("--gt", required=True, metavar="DIR_OR_JSON")
    parser.add_argument("--detections", required=True, metavar="FILE")
    parser.add_argument("--json", metavar="OUT", help="where to write the scores")
    parser.add_argument("--iou-type", choices=["bbox", "segm", "keypoints"], help="coco, lvis; default: as the results")
    parser.add_argument(
        "--split",
        help="of a folder; Open Images: validation; Cityscapes: val; VOC: all images, or ImageSets/Main/SPLIT",
    )
    parser.add_argument("--classes", help="Open Images: class description csv, if not the one in the folder")
    parser.add_argument("--hierarchy", help="Open Images: hierarchy json, if not the one in the folder")
    parser.add_argument("--masks", help="Open Images: folder of mask images, if not masks/ in the folder")
    parser.add_argument(
        "--expand-detections", action="store_true",
        help="Open Images challenge: copy each detection to its ancestor classes (the official tool does not)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    scorers = {"coco": score_coco, "lvis": score_lvis, "voc07": score_voc, "voc12": score_voc}
    scorers["cityscapes"] = score_cityscapes
    try:
        for flag in ("gt", "detections"):
            if not Path(getattr(args, flag)).exists():
                raise UserError(f"--{flag} {getattr(args, flag)} does not exist")
        for flag, protocols in _FLAGS.items():
            if getattr(args, flag) and not args.protocol.startswith(protocols):
                raise UserError(f"--{flag.replace('_', '-')} has no meaning for the {args.protocol} protocol")
        if args.protocol == "lvis" and args.iou_type == "keypoints":
            raise UserError("--iou-type keypoints: LVIS scores bbox or segm")
        result = {"protocol": args.protocol, **scorers.get(args.protocol, score_open_images)(args)}
        if args.json:
            try:
                write_json(args.json, result, indent=1)
            except OSError as e:
                raise UserError(f"--json {args.json} cannot be written: {e.strerror}") from None
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    shown = "undefined (no ground truth)" if result["mAP"] is None else f"{result['mAP']:.6f}"
    print(f"{args.protocol} mAP {shown}" + (f", scores by class in {args.json}" if args.json else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
