"""Data sets in COCO's format (https://cocodataset.org/#format-data): where they are, and reading their json."""

import difflib
import json
import mmap
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import UserError, logger
from config import Config
from dataset_build import (
    IMAGE_UNKNOWN,
    AnnotationCollector,
    build_columns,
    count_keypoints,
    leave_out_missing_images,
    match_classes,
    mirrored_keypoints,
    order_categories,
    report_split,
)
from dataset_split import DatasetSplit, own_path

__all__ = ["COCO_FOLDERS", "find_files_of", "load"]

# COCO's own sets: name -> image folder. The annotation file is annotations/instances_<name>.json.
COCO_FOLDERS = {
    "train2017": "train2017",
    "val2017": "val2017",
    "train2014": "train2014",
    "val2014": "val2014",
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
}


def load(name: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False) -> DatasetSplit:
    """One set in COCO's format; the arguments are those of `dataset.load_split`."""
    started = time.time()
    annotation_file, folder = find_files_of(cfg, name)
    raw = AnnotationCollector(annotation_file, cfg.MODE_KEYPOINT)
    rest = _scan_json(annotation_file, raw.add_image, raw.add_annotation)
    for key in ("images", "categories"):
        if key not in rest:
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: it has no '{key}'")
    for key in ("images", "annotations"):
        if rest.get(key, True) is not True:
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: '{key}' must be a list")
    ids, names = order_categories(annotation_file, rest["categories"])
    category_ids = match_classes(annotation_file, ids, names, class_names) if class_names else ids
    label_of_category = {c: label for label, c in enumerate(category_ids, 1) if c is not None}
    num_keypoints = count_keypoints(cfg, annotation_file, rest["categories"], raw)
    columns, dropped = build_columns(raw, label_of_category, training and cfg.MODE_MASK, num_keypoints)
    num_annotations = len(raw.image) + raw.broken
    if num_annotations and dropped[IMAGE_UNKNOWN] == num_annotations:
        raise UserError(
            f"annotation file {annotation_file}: none of its {num_annotations} annotations has the image id of one of "
            f"its {len(raw.image_ids)} images"
        )
    split = DatasetSplit(
        name, annotation_file, [folder], list(class_names) or names, category_ids, columns, dict(dropped),
        num_annotations, mirrored_keypoints(rest["categories"], num_keypoints),
    )  # fmt: skip
    leave_out_missing_images(cfg, split, folder)
    report_split(split, time.time() - started)
    return split


def find_files_of(cfg: Config, name: str) -> tuple[str, str]:
    """Annotation file and image folder of a registered set."""
    base = Path(cfg.DATA.BASEDIR).expanduser()
    own = cfg.DATA.DATASETS.get(name)
    if own is not None:
        annotation_file, folder = (own_path(base, p) for p in own)
        where = f"DATA.DATASETS: {name}"
    else:
        short = name.removeprefix("coco_")
        plain = base / "annotations" / f"{name}.json", base / name  # annotations/train.json beside train/
        if short not in COCO_FOLDERS and plain[0].is_file():
            return str(plain[0].absolute()), str(plain[1].absolute())
        if short not in COCO_FOLDERS:
            known = list(cfg.DATA.DATASETS) + [f"coco_{n}" for n in COCO_FOLDERS]
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise UserError(
                f"unknown data set '{name}'; {hint} "
                f"(your own: DATA.DATASETS=\"{{'{name}': ['annotations.json', 'image folder']}}\")"
            )
        kind = "person_keypoints" if cfg.MODE_KEYPOINT else "instances"
        annotation_file, folder = base / "annotations" / f"{kind}_{short}.json", base / COCO_FOLDERS[short]
        where = f"data set {name}"
        # The layout of annotations/train.json and train/ is found by DATA.BASEDIR alone.
        part = {"train2017": "train", "val2017": "val"}.get(short)
        plain = base / "annotations" / f"{part}.json", base / str(part)
        if part and not annotation_file.is_file() and plain[0].is_file():
            logger.info(f"{where} is not in {base}, but annotations/{part}.json is: taking that with {part}/")
            annotation_file, folder = plain
        if not base.is_dir():
            raise UserError(
                f"DATA.BASEDIR={cfg.DATA.BASEDIR} is not a directory; set it to the one that holds annotations/ "
                f"and {COCO_FOLDERS[short]}/"
            )
    if not annotation_file.is_file():
        there = sorted(p.name for p in annotation_file.parent.glob("*.json")) if annotation_file.parent.is_dir() else []
        near = difflib.get_close_matches(annotation_file.name, there, 1, 0.5) or there[:3]
        hint = f"{annotation_file.parent} has {', '.join(near)}" if near else "check DATA.BASEDIR and DATA.DATASETS"
        raise UserError(f"{where}: annotation file {annotation_file} does not exist; {hint}")
    if not folder.is_dir():
        other = _near_folder(folder)
        raise UserError(f"{where}: image folder {folder} does not exist{other and f'; did you mean {other}?'}")
    return str(annotation_file.absolute()), str(folder.absolute())


def _near_folder(folder: Path) -> str:
    there = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, 1, 0.5)
    return str(folder.parent / near[0]) if near else ""


def _read_text(path: str) -> str:
    """The file's text, decoded from the page cache so that it is in memory once."""
    try:
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise UserError(f"annotation file {path} is empty")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return str(content, "utf-8-sig")
    except OSError as e:
        raise UserError(f"annotation file {path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"annotation file {path} is not UTF-8 text: {e.reason} at byte {e.start}") from None


def _scan_json(path: str, on_image: Callable[[Any], None], on_annotation: Callable[[Any], None]) -> dict[str, Any]:
    """Reads a COCO json, handing over one image and one annotation at a time; returns the rest of the top level.

    The 860,000 annotations of COCO are 3 GB as Python objects; this way one of them exists at a time.
    """
    text = _read_text(path)
    space = re.compile(r"[ \t\n\r]*").match
    decode = json.JSONDecoder().raw_decode
    streams = {"images": on_image, "annotations": on_annotation}
    rest: dict[str, Any] = {}

    def fail(what: str, at: int) -> None:
        raise json.JSONDecodeError(what, text, at)

    try:
        at = space(text, 0).end()
        if text[at : at + 1] != "{":
            raise UserError(f"annotation file {path} is not in COCO's format: it must be one json object")
        at = space(text, at + 1).end()
        while text[at : at + 1] != "}":
            key, at = decode(text, at)
            at = space(text, at).end()
            if not isinstance(key, str) or text[at : at + 1] != ":":
                fail("Expecting a key and ':'", at)
            at = space(text, at + 1).end()
            if key in streams and text[at : at + 1] == "[":
                rest[key] = True
                handle = streams[key]
                at = space(text, at + 1).end()
                while text[at : at + 1] != "]":
                    entry, at = decode(text, at)
                    handle(entry)
                    at = space(text, at).end()
                    if text[at : at + 1] == ",":
                        at = space(text, at + 1).end()
                    elif text[at : at + 1] != "]":
                        fail("Expecting ',' or ']'", at)
                at += 1
            else:
                rest[key], at = decode(text, at)
            at = space(text, at).end()
            if text[at : at + 1] == ",":
                at = space(text, at + 1).end()
            elif text[at : at + 1] != "}":
                fail("Expecting ',' or '}'", at)
    except json.JSONDecodeError as e:
        raise UserError(f"annotation file {path} is not valid JSON: {e.msg} at byte {e.pos}") from None
    return rest
