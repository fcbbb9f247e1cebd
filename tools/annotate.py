#!/usr/bin/env python3
"""Writes a model's predictions as annotations, so that a person corrects them instead of drawing them.

    tools/annotate.py --load train_log/run --images photos --output to_correct --format cvat
    tools/annotate.py predictions/predictions.json --images photos --output to_correct --format labelme
    tools/annotate.py results.json --annotations val.json --output to_correct --format yolo --threshold 0.7 cat=0.4

The input is a model (--load), the predictions.json that ./train.py --predict writes, or COCO results with their
annotation file. docs/ANNOTATE.md tells how to open the files and how to bring the corrections back.
"""

import import_path

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import UserError, check_output_folder, errors_in_one_line, logger, path_argument, read_json
from data import list_images
from labels_write import WRITERS, Outlines, write_labels
from tools.convert_data import report_lost
from utils.coco_format import Unusable, as_results, read_file_name, read_id, read_number, read_truth
from utils.polygons import rle_runs
from viz import prediction_entry

__all__ = ["content_of_predictions", "content_of_results", "read_thresholds"]


# ------------------------------------------------------------------------------------------------ input
def read_thresholds(words: Sequence[str]) -> tuple[float, dict[str, float]]:
    """(the threshold of all classes, {class: its own}) of words like 0.5 and name=0.7."""
    general, own = 0.5, {}
    for word in words:
        name, _, number = word.rpartition("=")
        try:
            value = read_number(number)
        except Unusable:
            value = -1.0
        if not 0 <= value <= 1:
            raise UserError(f"--threshold {word}: a number from 0 to 1, or CLASS=NUMBER")
        if name:
            own[name] = value
        else:
            general = value
    return general, own


def content_of_predictions(
    entries: Any, threshold: tuple[float, dict[str, float]], images: str | None, origin: str,
    ids: dict[str, int | str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """COCO content of the entries of predictions.json (viz.prediction_entry) with at least the threshold's score.

    images: the folder that the files' names become relative to; their common folder if None. ids: all classes of the
    model with their category ids, in order; without it those that occur.
    """
    if type(entries) is not list or not all(type(e) is dict and type(e.get("detections")) is list for e in entries):
        raise UserError(f"{origin}: not predictions.json, a list of objects with file, height, width and detections")
    files = [os.path.abspath(read_file_name(e.get("file"), origin)) for e in entries]
    folder = os.path.abspath(images) if images else os.path.commonpath([os.path.dirname(f) for f in files] or ["/"])
    ids, (general, own) = dict(ids or {}), threshold
    listed, found = [], []
    for number, (entry, file) in enumerate(zip(entries, files), 1):
        where = f"{origin}: {entry['file']}"
        name = os.path.relpath(file, folder)
        if name.startswith(".."):
            raise UserError(f"{where} is not in the folder {folder}; give the folder of all images by --images")
        height, width = (_side(entry.get(key), where) for key in ("height", "width"))
        listed.append({"id": number, "file_name": name, "height": height, "width": width})
        for place, d in enumerate(entry["detections"], 1):
            try:
                label, category, a = _detection(d, height, width)
            except (ValueError, TypeError) as e:
                raise UserError(f"{where}: detection {place} cannot be used: {e}") from None
            if ids.setdefault(label, category) != category:
                raise UserError(f"{where}: class '{label}' has the ids {ids[label]!r} and {category!r}")
            if a["score"] >= own.get(label, general):
                found.append({"image_id": number, "category_id": category, **a})
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{origin}: two of the classes {', '.join(ids)[:200]} have the same category_id")
    if unknown := [n for n in own if n not in ids]:
        raise UserError(f"--threshold {unknown[0]}=…: there is no such class; known are {', '.join(ids)[:200]}")
    points = max((len(a.get("keypoints", ())) // 3 for a in found), default=0)
    extra = {"keypoints": [f"point {i}" for i in range(1, points + 1)]} if points else {}
    return {
        "images": listed,
        "annotations": found,
        "categories": [{"id": i, "name": n, **extra} for n, i in ids.items()],
    }


def _side(value: Any, where: str) -> int:
    if type(value) is not int or not 0 < value <= 1 << 31:
        raise UserError(f"{where}: height and width must be whole numbers of pixels, not {repr(value)[:60]}")
    return value


def _detection(d: Any, height: int, width: int) -> tuple[str, int | str, dict[str, Any]]:
    """A detection of predictions.json: its class, its category id, and the rest as an annotation."""
    if type(d) is not dict or type(d.get("class")) is not str or not d["class"]:
        raise ValueError("it has no class")
    if type(d.get("box")) is not list or len(d["box"]) != 4:
        raise ValueError("box must be x1, y1, x2, y2")
    x1, y1, x2, y2 = map(read_number, d["box"])
    a = {
        "score": read_number(d.get("score")), "iscrowd": 0, "segmentation": [],
        "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
    }  # fmt: skip
    if d.get("mask"):
        if type(d["mask"]) is not dict:
            raise ValueError("mask must be an RLE")
        rle_runs(d["mask"], height, width)
        a["segmentation"] = d["mask"]
    if d.get("keypoints"):
        # COCO counts pixels: the centre of the first one is 0.
        points = [[read_number(v) for v in p] for p in d["keypoints"]]
        if any(len(p) != 3 for p in points):
            raise ValueError("keypoints must be x, y, score")
        a["keypoints"] = [v for x, y, _ in points for v in (round(x - 0.5, 2), round(y - 0.5, 2), 2)]
        a["num_keypoints"] = len(points)
    return d["class"], read_id(d.get("category_id")), a


def content_of_results(
    results: Any, truth: dict[str, Any], threshold: tuple[float, dict[str, float]], origin: str
) -> dict[str, Any]:
    """COCO content of results in COCO's form, with the images and classes of their annotation file."""
    general, own = threshold
    names = {c["id"]: c["name"] for c in truth["categories"]}
    annotations = []
    for r in as_results(results, truth, origin):
        if r["score"] < own.get(names[r["category_id"]], general):
            continue
        if "bbox" not in r:
            raise UserError(f"{origin}: results of image {r['image_id']!r} have no bbox")
        area = r["bbox"][2] * r["bbox"][3]
        segmentation = r.get("segmentation") or []
        annotations.append({**r, "iscrowd": 0, "area": area, "segmentation": segmentation})
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


def predict_entries(
    load: str, images: str, settings: Sequence[str], trusted: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, int | str]]:
    """(entries as in predictions.json, the model's classes with their ids) for all images of a folder."""
    from predict import found_in_files, load_predictor

    files = list_images([images])
    predictor = load_predictor(load, settings, trusted=trusted, all_devices=True)
    entries: list[dict[str, Any]] = []

    def leave_out(index: int, reason: UserError) -> None:
        logger.warning(f"{reason}; this image is left out")

    with tqdm(total=len(files), unit="image", mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for index, size, found, _ in found_in_files(predictor, files, leave_out):
            entries.append(prediction_entry(files[index], size, found, predictor.class_names, predictor.category_ids))
            bar.update()
    names = predictor.class_names
    return entries, dict(zip(names, predictor.category_ids or range(1, len(names) + 1)))


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="?", type=path_argument, help="predictions.json, or COCO results")
    parser.add_argument("--load", type=path_argument, metavar="PATH", help="a model to run: as ./train.py --load")
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="KEY=VAL", help="its settings")
    parser.add_argument("--trust-code", action="append", default=[], metavar="MODULE", help="as ./train.py's")
    parser.add_argument("--images", type=path_argument, metavar="DIR", help="the folder that holds the images")
    parser.add_argument("--annotations", type=path_argument, metavar="JSON", help="COCO results: their annotation file")
    parser.add_argument("--output", type=path_argument, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--format", choices=list(WRITERS), default="coco", help="what to write (default: %(default)s)")
    parser.add_argument(
        "--threshold", nargs="+", default=[], metavar="SCORE",
        help="lowest score of a written object, and CLASS=SCORE for single classes (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--tolerance", type=float, default=1.0, metavar="PIXELS",
        help="how far a polygon may be from its mask's outline (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--boxes", action="store_true", help="boxes only, no outlines")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist, with their corrections")
    args = parser.parse_args(argv)
    if bool(args.predictions) == bool(args.load):
        parser.error("give either predictions.json or --load")
    if args.load and not args.images:
        parser.error("--load needs --images")
    check_output_folder(args.output, "--output")
    if not 0 <= args.tolerance <= 1000:
        raise UserError(f"--tolerance {args.tolerance:g} must be 0 to 1000 pixels")
    threshold = read_thresholds(args.threshold)
    if args.load:
        lowest = min([threshold[0], *threshold[1].values()])
        settings = [*args.config, f"TEST.RESULT_SCORE_THRESH={min(lowest, 0.999)}"]
        entries, ids = predict_entries(args.load, args.images, settings, args.trust_code)
        content = content_of_predictions(entries, threshold, args.images, args.load, ids)
    elif args.annotations:
        content = read_truth(args.annotations, need_size=True)
        results = read_json(args.predictions, "results file")
        content = content_of_results(results, content, threshold, f"results file {args.predictions}")
    else:
        entries = read_json(args.predictions, "predictions")
        if type(entries) is list and entries and type(entries[0]) is dict and "image_id" in entries[0] and (
            "detections" not in entries[0]
        ):  # fmt: skip
            raise UserError(f"{args.predictions} holds COCO results: give their annotation file by --annotations")
        content = content_of_predictions(entries, threshold, args.images, f"predictions {args.predictions}")
    outlines = Outlines(args.tolerance, args.boxes)
    folder = args.images or ""
    files, lost = write_labels(content, args.format, args.output, outlines, folder, args.overwrite)
    report_lost(lost, args.format)
    counts = Counter(a["category_id"] for a in content["annotations"])
    listed = ", ".join(f"{counts[c['id']]} {c['name']}" for c in content["categories"][:8] if counts[c["id"]])
    logger.info(f"{len(content['annotations'])} objects ({listed}) of {len(content['images'])} images")
    source = Path(args.output) if args.format in ("labelme", "yolo") else files[0]
    back = f"python tools/convert_data.py {source} corrected.json --from {args.format}"
    logger.info(f"{len(files)} files in {args.output}; after the corrections: {back}"
                + (f" --images {folder}" if folder and args.format in ("labelme", "yolo") else ""))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
