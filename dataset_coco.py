"""Finds and reads data sets in COCO's format (https://cocodataset.org/#format-data)."""

import difflib
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, logger
from config import Config
from dataset_build import AnnotationCollector, make_split, split_from_coco
from dataset_split import DatasetSplit, own_path
from utils.archives import find_folder, is_folder
from utils.coco_format import check_lists, in_pixels, read_document, scan_document

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


def load(
    name: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False, normalised: bool = False
) -> DatasetSplit:
    """One set in COCO's format; the arguments are those of `dataset.load_split`.

    normalised: its coordinates are fractions of the image's width and height.
    """
    started = time.time()
    annotation_file, folder = find_files_of(cfg, name)
    if normalised:
        read = functools.partial(_read_in_pixels, annotation_file)
        return split_from_coco(name, read, folder, cfg, class_names, training, f"annotation file {annotation_file}")
    what = f"annotation file {annotation_file}"
    raw = AnnotationCollector(what, cfg.MODE_KEYPOINT)
    streams = {"images": raw.add_image, "annotations": raw.add_annotation}
    rest = scan_document(annotation_file, "annotation file", streams)
    check_lists(rest, what)
    return make_split(
        name, annotation_file, raw, rest["categories"], folder, cfg, class_names, training, started
    )  # fmt: skip


def _read_in_pixels(path: str) -> dict[str, Any]:
    return in_pixels(read_document(path), f"annotation file {path}")


def find_files_of(cfg: Config, name: str) -> tuple[str, str]:
    """Annotation file and image folder of a registered set."""
    base = Path(cfg.DATA.BASEDIR).expanduser()
    own = cfg.DATA.DATASETS.get(name)
    if own is not None:
        annotation_file, folder = (own_path(base, p) for p in own[:2])
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
        # annotations/train.json beside train/ is found without an entry in DATA.DATASETS.
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
    folder = find_folder(folder.parent, [folder.name]) or folder  # else the archives as they are downloaded
    if not is_folder(folder):
        other = _near_folder(folder)
        raise UserError(f"{where}: image folder {folder} does not exist{other and f'; did you mean {other}?'}")
    return str(annotation_file.absolute()), str(folder.absolute())


def _near_folder(folder: Path) -> str:
    there = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, 1, 0.5)
    return str(folder.parent / near[0]) if near else ""
