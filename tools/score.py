"""Scores a results file by a published protocol, without a model.

    python tools/score.py --protocol coco --gt instances_val2017.json --detections results.json --json scores.json
    python tools/score.py --protocol oid-challenge --gt open_images/ --detections detections.csv --json scores.json

Values of --gt and --detections:
    coco, lvis      COCO or LVIS v1 json; COCO results json
    voc07, voc12    a VOC folder (Annotations/*.xml) or COCO json; COCO results json or a folder of VOC's *_<class>.txt
    cityscapes      the folder that holds gtFine/, or COCO json; COCO results json with masks, or a folder of the
                    benchmark's submission form (a .txt per image that names mask images)
    oid-*           the folder of published csv files, and a csv (a row per detection, or the challenge server's form);
                    or a COCO json and a COCO results json

The json written holds mAP, per_class_AP by class name (null: the class has no ground truth) and the protocol's other
numbers, as fractions. `ignore: 1` of an annotation means the same as `iscrowd: 1`.
"""

import import_path

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from common import UserError, check_output_file, logger, path_argument, write_json
from dataset_cityscapes import read_cityscapes_content
from dataset_voc import read_voc_content, read_voc_detections
from eval import format_scores, read_results
from eval_protocols import PROTOCOLS, named_scores
from utils import oid_eval
from utils.archives import exists, is_folder
from utils.cityscapes_eval import read_cityscapes_detections
from utils.coco_format import as_truth, in_pixels, read_document
from utils.oid_format import read_ancestors

# Flags and the protocols to which they apply, by the first letters of the protocols' names.
_FLAGS = {
    "iou_type": ("coco", "lvis"), "split": ("oid", "voc", "cityscapes"), "classes": ("oid",), "hierarchy": ("oid",),
    "masks": ("oid",), "expand_detections": ("oid-challenge",),
}  # fmt: skip


def read_content(args: argparse.Namespace, need_size: bool = False) -> dict[str, Any]:
    """The annotation json of --gt, every value typed; need_size: its images must have height and width."""
    document = read_document(args.gt)
    if args.normalised:
        document = in_pixels(document, f"annotation file {args.gt}")
    return as_truth(document, f"annotation file {args.gt}", need_size)


def by_protocol(metrics: dict[str, float], mark: str) -> dict[str, Any]:
    """The numbers of VOC's and Open Images' protocols in the form of the json: mAP and values by class."""
    plain = _without_nan(metrics)
    kinds = {"AP_per_class": "per_class_AP", "num_gt": "num_gt", "num_scored_detections": "num_scored_detections",
             "num_true_positives": "num_true_positives"}  # fmt: skip
    result: dict[str, Any] = {"mAP": plain[f"{mark}/mAP"]}
    for key, value in plain.items():
        kind, _, name = key.removeprefix(f"{mark}/").partition("/")
        if kind in kinds:
            result.setdefault(kinds[kind], {})[name] = value
    return result


def from_metrics(metrics: dict[str, float], prefix: str = "") -> dict[str, Any]:
    """COCO-like numbers: the AP averaged over IoU 0.5 to 0.95 and everything else under "metrics"."""
    mark = f"{prefix}AP_per_class/"
    plain = _without_nan(metrics)
    per_class = {k[len(mark) :]: v for k, v in plain.items() if k.startswith(mark)}
    others = {k: v for k, v in plain.items() if "_per_class/" not in k}
    return {"mAP": plain[f"{prefix}AP"], "per_class_AP": per_class, "metrics": others}


def _without_nan(metrics: dict[str, float]) -> dict[str, float | None]:
    return {k: None if math.isnan(v) else v for k, v in metrics.items()}


def score_coco(args: argparse.Namespace) -> dict[str, Any]:
    if is_folder(args.gt):
        raise UserError(f"--gt {args.gt}: the coco protocol needs an annotation json, not a folder")
    content = read_content(args)
    results = read_results(args.detections, content)
    types = [args.iou_type] if args.iou_type else None
    metrics = PROTOCOLS["coco"](content, results, types, verbose=False)
    print(format_scores(metrics))
    kind = args.iou_type or next((t for t in ("bbox", "segm", "keypoints") if f"{t}/AP" in metrics), "bbox")
    return from_metrics(metrics, f"{kind}/")


def score_lvis(args: argparse.Namespace) -> dict[str, Any]:
    content = read_content(args)
    results = read_results(args.detections, content)
    kind = args.iou_type or ("segm" if any(r.get("segmentation") for r in results) else "bbox")
    metrics = PROTOCOLS["lvis"](content, results, [kind], verbose=False)
    return from_metrics({k.removeprefix(f"{kind}/"): v for k, v in metrics.items()}) | {"iou_type": kind}


def score_voc(args: argparse.Namespace) -> dict[str, Any]:
    if is_folder(args.gt):
        content = as_truth(read_voc_content(args.gt, args.split or ""), f"VOC data {args.gt}")
    else:
        content = read_content(args)
    if Path(args.detections).is_dir():
        results = read_voc_detections(args.detections, content)
    else:
        results = read_results(args.detections, content)
    return by_protocol(PROTOCOLS[args.protocol](content, results), args.protocol)


def score_cityscapes(args: argparse.Namespace) -> dict[str, Any]:
    if is_folder(args.gt):
        content = as_truth(read_cityscapes_content(args.gt, args.split or "val"), f"Cityscapes data {args.gt}")
    else:
        content = read_content(args, need_size=True)
    if Path(args.detections).is_dir():
        results = read_cityscapes_detections(args.detections, content)
    else:
        results = read_results(args.detections, content)
    metrics = PROTOCOLS["cityscapes"](content, results)
    if not metrics:
        raise UserError(
            f"--detections {args.detections}: a result has no segmentation; Cityscapes' metric scores masks"
        )
    return from_metrics({k.removeprefix("cityscapes/"): v for k, v in metrics.items()})


def score_open_images(args: argparse.Namespace) -> dict[str, Any]:
    protocol = args.protocol.removeprefix("oid-")
    masked = protocol == "challenge-segm"
    if is_folder(args.gt):
        if str(args.detections).endswith(".json"):
            raise UserError(
                f"--detections {args.detections}: a json has boxes in pixels and the published csv files have no image "
                "sizes; give the csv that --evaluate writes beside it"
            )
        split = args.split or "validation"
        truth = oid_eval.read_truth(args.gt, split, masked, args.classes, args.hierarchy, args.masks)
        detections = oid_eval.read_detections(args.detections, truth)
    else:
        content = read_content(args, need_size=masked)
        for number, annotation in enumerate(content["annotations"] if masked else ()):
            if not annotation["segmentation"]:
                raise UserError(f"annotation file {args.gt}: entry {number} of 'annotations' has no segmentation")
        truth = oid_eval.truth_from_coco(content, masked)
        if args.hierarchy:
            truth = truth._replace(ancestors=read_ancestors(args.hierarchy, truth.class_ids))
        detections = oid_eval.detections_from_coco(read_results(args.detections, content), content, truth)
    if protocol != "v2" and truth.ancestors is None:
        logger.warning("no class hierarchy was found, so nothing is expanded; give one by --hierarchy")
    result = oid_eval.evaluate(truth, detections, protocol, args.expand_detections)
    metrics = named_scores(args.protocol, result, truth.class_ids, truth.class_names)
    return by_protocol(metrics, args.protocol) | {"per_class_AP_by_id": result["per_class_AP"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--protocol", required=True, choices=list(PROTOCOLS))
    parser.add_argument("--gt", type=path_argument, required=True, metavar="DIR_OR_JSON")
    parser.add_argument("--detections", type=path_argument, required=True, metavar="FILE")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="where to write the scores")
    parser.add_argument("--iou-type", choices=["bbox", "segm", "keypoints"], help="coco, lvis; default: as the results")
    parser.add_argument(
        "--split",
        help="of a folder; Open Images: validation; Cityscapes: val; VOC: all images, or ImageSets/Main/SPLIT",
    )
    parser.add_argument(
        "--normalised", action="store_true", help="--gt is a json whose boxes and outlines are fractions of the image"
    )
    parser.add_argument(
        "--classes", type=path_argument, help="Open Images: class description csv, if not the one in the folder"
    )
    parser.add_argument(
        "--hierarchy", type=path_argument, help="Open Images: hierarchy json, if not the one in the folder"
    )
    parser.add_argument(
        "--masks", type=path_argument, help="Open Images: folder of mask images, if not masks/ in the folder"
    )
    parser.add_argument(
        "--expand-detections", action="store_true",
        help="Open Images challenge: copy each detection to its ancestor classes (the official tool does not)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    scorers = {"coco": score_coco, "lvis": score_lvis, "voc07": score_voc, "voc12": score_voc}
    scorers["cityscapes"] = score_cityscapes
    try:
        if args.json:
            check_output_file(args.json, "--json")
        for flag in ("gt", "detections"):
            if not exists(getattr(args, flag)):
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
