"""Data sets in other formats than COCO's, as `DatasetSplit`s: Open Images, Pascal VOC, LVIS, Cityscapes, csv files of
boxes, and formats of one's own.

A set is registered in the settings by a list whose first entry names the format, e.g.
DATA.DATASETS="{'oid_train': ['openimages', 'open_images', 'train']}", with options as 'key=value' at its end:

| list | files | options |
|---|---|---|
| ['openimages', dir, split] | the published csv and json files | group_of, expand, images (see `load_openimages`) |
| ['voc', dir, split] | Annotations/*.xml, ImageSets/Main/<split>.txt ('' = all), SegmentationObject/ | difficult |
| ['lvis', json, image folder] | LVIS v1 json | |
| ['cityscapes', dir, split] | gtFine/<split>/*/*_gtFine_(instanceIds.png or polygons.json), leftImg8bit/<split> | |
| ['csv', file, image folder] | one row per box, see `read_csv_content` | classes |
| ['module:function', …] | whatever the function reads, see `load_format` | its keyword arguments |
"""

import ast
import csv
import functools
import hashlib
import importlib
import json
import os
import shutil
import struct
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from tqdm import tqdm

import dataset
from common import UserError, logger, read_json, write_json
from dataset import DatasetSplit
from utils import oid_eval, polygons
from utils.cityscapes_eval import INSTANCE_IDS, LABEL_IDS, VOID_IDS, evaluate_cityscapes
from utils.oid_format import find_files, read_ancestors, read_classes, read_columns

__all__ = [
    "FormatSplit",
    "OpenImagesSplit",
    "class_aware_images",
    "image_header_size",
    "load_format",
    "load_openimages",
    "read_cityscapes_content",
    "read_csv_content",
    "read_voc_content",
    "read_voc_detections",
    "repeat_factors",
    "split_from_coco",
]

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
CITYSCAPES_CLASSES = list(INSTANCE_IDS)


# ------------------------------------------------------------------------------------------------ the entry point
def load_format(
    spec: Sequence[str], cfg: Any, name: str = "", class_names: Sequence[str] = (), training: bool = False
) -> DatasetSplit:
    """The set that a DATA.DATASETS entry with a format name describes.

    Args:
        spec: see the table above; paths are relative to DATA.BASEDIR or absolute.
        class_names, training: as for `dataset.load_split`.

    A 'module:function' is imported and called as function(name, *paths and words, cfg=cfg, class_names=class_names,
    training=training, **options); it returns a DatasetSplit, most simply by `split_from_coco`.
    """
    form, words, options = _parse_spec(spec, name)
    common = {"cfg": cfg, "class_names": class_names, "training": training}
    if ":" in form:
        module, _, function = form.partition(":")
        try:
            loader = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as e:
            raise UserError(f"DATA.DATASETS: {name}: cannot import {form}: {e}") from None
        return loader(name, *words, **common, **options)
    loaders = {"voc": _load_voc, "lvis": _load_lvis, "cityscapes": _load_cityscapes, "csv": _load_csv}
    loaders["openimages"] = _load_openimages
    if form not in loaders:
        raise UserError(f"DATA.DATASETS: {name}: unknown format '{form}'; known are {', '.join(sorted(loaders))}")
    if len(words) != 2:
        raise UserError(f"DATA.DATASETS: {name}: ['{form}', …] takes two more entries and options, not {len(words)}")
    path = dataset._own_path(Path(cfg.DATA.BASEDIR).expanduser(), words[0])
    if not path.exists():
        raise UserError(f"DATA.DATASETS: {name}: {path} does not exist")
    try:
        return loaders[form](name, path, words[1], **common, **options)
    except TypeError as e:
        if "unexpected keyword argument" not in str(e):
            raise
        raise UserError(f"DATA.DATASETS: {name}: format '{form}' has no option {str(e).split()[-1]}") from None


def _parse_spec(spec: Sequence[str], name: str) -> tuple[str, list[str], dict[str, Any]]:
    if not spec or not all(isinstance(s, str) for s in spec):
        raise UserError(f"DATA.DATASETS: {name}: must be a list of strings that starts with a format name")
    options = {}
    words = list(spec[1:])
    while words and "=" in words[-1] and not os.path.exists(words[-1]):
        key, _, text = words.pop().partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return spec[0], words, options


# ------------------------------------------------------------------------------------------------ COCO-like content
class FormatSplit(DatasetSplit):
    """A split whose ground truth is no COCO json on disk: `content()` gives it in COCO's form, for scoring.

    Attributes:
        read_content: picklable function without arguments that reads the ground truth again.
        protocol: which scores `evaluate` adds to COCO's: "coco" (none), "voc", "cityscapes" or "lvis" (instead).
    """

    read_content: Callable[[], dict[str, Any]]
    protocol: str = "coco"

    def content(self) -> dict[str, Any]:
        return self.read_content()

    def evaluate(self, results: list[dict], **options: Any) -> dict[str, float]:
        """COCO's scores; for VOC also "voc07/mAP", "voc12/mAP" and their "AP_per_class/<name>", for Cityscapes with
        masks "cityscapes/AP", "cityscapes/AP50" and by class; for LVIS its own.

        Options are those of eval.evaluate_coco.
        """
        content = self.content()
        ids = [self.image_id(i) for i in range(len(self))]
        results = [r for r in results if r["category_id"] is not None]
        if self.protocol == "lvis":
            return _lvis_scores(content, results, ids, **options)
        from eval import evaluate_coco

        metrics = evaluate_coco(content, results, **{"image_ids": ids, **options})
        if self.protocol == "voc":
            metrics |= _voc_scores(_only_images(content, ids), results)
        if self.protocol == "cityscapes" and all(r.get("segmentation") for r in results):
            scores = evaluate_cityscapes(_only_images(content, ids), results)
            metrics |= {f"cityscapes/{k}": v for k, v in scores.items()}
        return metrics


def _only_images(content: dict[str, Any], ids: Iterable) -> dict[str, Any]:
    wanted = set(ids)
    if len(wanted) == len(content["images"]):
        return content
    images = [image for image in content["images"] if image["id"] in wanted]
    return {**content, "images": images, "annotations": [a for a in content["annotations"] if a["image_id"] in wanted]}


def _voc_scores(content: dict[str, Any], results: list[dict]) -> dict[str, float]:
    from utils.voc_eval import evaluate_voc

    truth = oid_eval.truth_from_coco(content)
    detections = oid_eval.detections_from_coco(results, content, truth)
    metrics = {}
    for mark, eleven in (("voc07", True), ("voc12", False)):
        scores = evaluate_voc(truth, detections, eleven)
        metrics |= _named_scores(mark, scores, truth.class_ids, truth.class_names)
    return metrics


def _named_scores(mark: str, scores: dict[str, Any], ids: Sequence, names: Sequence[str]) -> dict[str, float]:
    nan = float("nan")
    per_class = {f"{mark}/AP_per_class/{n}": scores["per_class_AP"][i] for i, n in zip(ids, names)}
    return {k: nan if v is None else v for k, v in {f"{mark}/mAP": scores["mAP"], **per_class}.items()}


def _lvis_scores(content, results, ids, iou_types=None, image_ids=None, verbose=True) -> dict[str, float]:
    from tabulate import tabulate

    from utils.lvis_eval import evaluate_lvis

    content = _only_images(content, image_ids or ids)
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


def split_from_coco(
    name: str,
    read_content: Callable[[], dict[str, Any]],
    folder: str | Path,
    cfg: Any,
    class_names: Sequence[str] = (),
    training: bool = False,
    origin: str = "",
    protocol: str = "coco",
) -> FormatSplit:
    """A split from COCO-like content: {"images": […], "annotations": […], "categories": […]}.

    Args:
        read_content: returns that content; it is called again when the set is scored, and must be picklable (a
            function of a module, or functools.partial of one).
        folder: where the images' file_name are found.
        origin: what error messages call the source; `name` if empty.
    """
    started = time.time()
    origin = origin or name
    content = read_content()
    raw = dataset._Collector(origin, cfg.MODE_KEYPOINT)
    for image in content["images"]:
        raw.add_image(image)
    for annotation in content["annotations"]:
        raw.add_annotation(annotation)
    ids, names = dataset._order_categories(origin, content["categories"])
    category_ids = dataset._match_classes(origin, ids, names, class_names) if class_names else ids
    label_of_category = {c: label for label, c in enumerate(category_ids, 1) if c is not None}
    num_keypoints = dataset._count_keypoints(cfg, origin, content["categories"], raw)
    columns, dropped = dataset._build_columns(raw, label_of_category, training and cfg.MODE_MASK, num_keypoints)
    split = FormatSplit(
        name, origin, [str(Path(folder).absolute())], list(class_names) or names, category_ids, columns, dict(dropped),
        len(content["annotations"]), dataset._keypoint_flip(content["categories"], num_keypoints),
    )  # fmt: skip
    split.read_content, split.protocol = read_content, protocol
    dataset._check_images(cfg, split, str(folder))
    dataset._report(split, time.time() - started)
    return split


# ------------------------------------------------------------------------------------------------ image headers
def image_header_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a JPEG or PNG from its header; other kinds, and damaged headers, are decoded."""
    try:
        with open(path, "rb") as f:
            start = f.read(26)
            if start.startswith(b"\x89PNG\r\n\x1a\n") and len(start) >= 24:
                width, height = struct.unpack(">II", start[16:24])
                return height, width
            if start.startswith(b"\xff\xd8"):
                size = _jpeg_size(f)
                if size is not None:
                    return size
    except OSError as e:
        raise UserError(f"image {path} cannot be read: {e.strerror}") from None
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise UserError(f"image {path} is not a readable image")
    return image.shape[:2]


def _jpeg_size(f) -> tuple[int, int] | None:
    """Walks the segments to the frame header (SOF0 to SOF15 without the tables DHT, JPG and DAC)."""
    f.seek(2)
    while True:
        head = f.read(4)
        if len(head) < 4 or head[0] != 0xFF:
            return None
        if head[1] == 0xFF:  # fill byte
            f.seek(-3, os.SEEK_CUR)
            continue
        length = struct.unpack(">H", head[2:])[0]
        if 0xC0 <= head[1] <= 0xCF and head[1] not in (0xC4, 0xC8, 0xCC):
            frame = f.read(5)
            return struct.unpack(">HH", frame[1:]) if len(frame) == 5 else None
        f.seek(length - 2, os.SEEK_CUR)


def _header_sizes(files: Sequence[str]) -> np.ndarray:
    """int32 [n, 2] heights and widths; several files at once, since reading them is mostly waiting."""
    return np.array(_in_threads(image_header_size, files, 16, "sizes of images"), np.int32).reshape(-1, 2)


def _in_threads(function: Callable[[Any], Any], items: Sequence, threads: int, what: str) -> list:
    """function(item) of every item, in order. Handed out by the hundred: a task of its own takes longer than many."""
    parts = [items[start : start + 256] for start in range(0, len(items), 256)]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda part: [function(item) for item in part], parts)
        hidden = not sys.stderr.isatty() or len(parts) < 40
        return [result for part in tqdm(found, what, len(parts), disable=hidden, unit="x256") for result in part]


# ------------------------------------------------------------------------------------------------ Pascal VOC
def read_voc_content(
    directory: str | Path,
    split: str = "",
    difficult: str = "ignore",
    image_folder: str | Path | None = None,
    masks: bool = False,
) -> dict[str, Any]:
    """A VOC folder in COCO's form: image ids are the xml files' stems, category ids count from 1.

    Args:
        directory: holds Annotations/, JPEGImages/ and ImageSets/Main/; or one of VOCdevkit's parents of that.
        split: a list of ImageSets/Main, or of another folder of ImageSets by its name, such as "Segmentation/train";
            "" for every annotation.
        difficult: what to do with difficult objects: "ignore" (as regions that are neither right nor wrong), "object".
        masks: give the objects of images with a SegmentationObject/<stem>.png their masks.

    VOC's pixels are 1-based and inclusive, so a box spans [xmin - 1, xmax). Classes are VOC's twenty if these suffice,
    else all names that occur in Annotations/, sorted.
    """
    directory = _voc_directory(Path(directory))
    if difficult not in ("ignore", "object"):
        raise UserError(f"VOC data {directory}: difficult={difficult!r} must be ignore or object")
    stems = sorted(p.stem for p in (directory / "Annotations").glob("*.xml"))
    if not stems:
        raise UserError(f"VOC data {directory}: Annotations/ holds no xml file")
    wanted = stems
    if split:
        listing = directory / "ImageSets" / ("" if "/" in split else "Main") / f"{split}.txt"
        try:
            wanted = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
        except OSError as e:
            raise UserError(f"VOC data: image list {listing} cannot be read: {e.strerror}") from None
        lacking = sorted(set(wanted) - set(stems))
        if lacking:
            raise UserError(f"VOC data {directory}: {listing.name} names {lacking[0]}, which has no xml file")
    roots = {stem: _read_xml(directory / "Annotations" / f"{stem}.xml") for stem in stems}
    names = {o.findtext("name", "").strip() for root in roots.values() for o in root.iter("object")}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    ids = {n: i for i, n in enumerate(classes, 1)}
    folder = Path(image_folder) if image_folder else directory / "JPEGImages"
    images, annotations, maskless = [], [], []
    for stem in wanted:
        file = directory / "Annotations" / f"{stem}.xml"
        root = roots[stem]
        try:
            file_name = (root.findtext("filename") or f"{stem}.jpg").strip()
            if not Path(file_name).suffix:
                file_name += ".jpg"
            height, width = (int(float(root.findtext(f"size/{k}") or 0)) for k in ("height", "width"))
            if height < 1 or width < 1:
                height, width = image_header_size(folder / file_name)
            images.append({"id": stem, "file_name": file_name, "height": height, "width": width})
            drawn = directory / "SegmentationObject" / f"{stem}.png"
            numbers = _read_voc_numbers(drawn, height, width) if masks and drawn.is_file() else None
            for place, o in enumerate(root.iter("object"), 1):
                x1, y1, x2, y2 = (float(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
                hard = int(o.findtext("difficult") or 0) == 1
                annotations.append({
                    "id": len(annotations) + 1, "image_id": stem, "category_id": ids[o.findtext("name", "").strip()],
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "area": (x2 - x1 + 1) * (y2 - y1 + 1),
                    "iscrowd": int(hard and difficult == "ignore"), "difficult": int(hard),
                })  # fmt: skip
                if numbers is not None:
                    mask = _voc_mask(numbers == place, (x1 - 1, y1 - 1, x2, y2))
                    annotations[-1] |= mask
                    maskless += [f"object {place} of {drawn}"] * (not mask)
        except (TypeError, ValueError) as e:
            raise UserError(f"VOC annotation {file}: an object lacks a number in bndbox or difficult: {e}") from None
    if maskless:
        logger.warning(f"VOC data {directory}: {len(maskless)} objects have no mask in their box, e.g. {maskless[0]}")
    categories = [{"id": i, "name": n} for n, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read_voc_numbers(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 [H, W] of a segmentation image: 0 background, 255 border, else the object's place in the xml file.

    The image has VOC's palette, in which the bits of a number are dealt to red, green, blue, red, … from the highest
    bit of the colour on; or one channel, with the number itself.
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None or image.shape[:2] != (height, width):
        raise UserError(f"VOC segmentation {path} is not an image of {width}x{height} pixels, as its xml file says")
    if image.ndim == 2:
        return image
    blue, green, red = (image[..., k] for k in range(3))
    numbers = np.zeros((height, width), np.uint8)
    again = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        channel, shift = (red, green, blue)[bit % 3], 7 - bit // 3
        on = channel >> shift & 1
        numbers |= on << bit
        again[..., 2 - bit % 3] |= on << shift
    if (again != image[..., :3]).any():
        raise UserError(f"VOC segmentation {path} has colours that are not in VOC's palette")
    return numbers


def _voc_mask(inside: np.ndarray, box: Sequence[float]) -> dict[str, Any]:
    """The mask of an object as a part of its annotation; {} when it has no pixel, or most of them outside the box."""
    x1, y1, x2, y2 = (max(0, int(v)) for v in box)
    if not inside.any() or 2 * inside[y1:y2, x1:x2].sum() < inside.sum():
        return {}
    x, y, w, h = cv2.boundingRect(inside.view(np.uint8))
    run = _run_lengths(inside[y : y + h, x : x + w], x, y, *inside.shape)
    return {"segmentation": run, "area": int(inside.sum())}


def _voc_directory(directory: Path) -> Path:
    if (directory / "Annotations").is_dir():
        return directory
    inside = sorted(
        p.parent for pattern in ("*/Annotations", "VOCdevkit/*/Annotations") for p in directory.glob(pattern)
    )
    if len(inside) != 1:
        found = f"several: {', '.join(p.name for p in inside)}; name one" if inside else "no Annotations/ folder"
        raise UserError(f"VOC data {directory}: {found}")
    return inside[0]


def _read_xml(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as e:
        raise UserError(f"VOC annotation {path} cannot be read: {e}") from None


def read_voc_detections(folder: str | Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """VOC result files <anything>_<class>.txt (image id, confidence, xmin, ymin, xmax, ymax a line) as COCO results."""
    results = []
    for category in content["categories"]:
        files = sorted(Path(folder).glob(f"*_{category['name']}.txt")) + sorted(
            Path(folder).glob(f"{category['name']}.txt")
        )
        for path in files:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                words = line.split()
                try:
                    score, x1, y1, x2, y2 = map(float, words[1:])
                except ValueError:
                    raise UserError(f"detections {path}, line {number}: not 'image score x1 y1 x2 y2'") from None
                results.append({
                    "image_id": words[0], "category_id": category["id"], "score": score,
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
                })  # fmt: skip
    if not results:
        raise UserError(f"detections: {folder} holds no file *_<class>.txt with a detection")
    return results


def _load_voc(name, path, split, cfg, difficult="ignore", **common) -> FormatSplit:
    read = functools.partial(read_voc_content, path, split, difficult, masks=cfg.MODE_MASK)
    return split_from_coco(
        name, read, _voc_directory(path) / "JPEGImages", cfg, **common, origin=f"VOC data {path} {split}",
        protocol="voc",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ LVIS
def _load_lvis(name, path, folder, cfg, **common) -> FormatSplit:
    """LVIS's json is COCO's with more keys; images are <folder>/<last two parts of coco_url>, or file_name."""
    folder = dataset._own_path(Path(cfg.DATA.BASEDIR).expanduser(), folder)
    read = functools.partial(read_json, path, "annotation file")
    return split_from_coco(name, read, folder, cfg, **common, origin=str(path), protocol="lvis")


# ------------------------------------------------------------------------------------------------ Cityscapes
def read_cityscapes_content(directory: str | Path, split: str) -> dict[str, Any]:
    """Cityscapes' instances in COCO's form; image ids are <city>_<sequence>_<frame>, masks as run lengths.

    They are those of the instance images (gtFine_instanceIds.png) where these are, else the polygons painted in the
    file's order, so that a later object hides what lies behind it. Groups are crowd regions of their class. Objects
    without a visible pixel do not exist. "void" of an image is the mask of what the benchmark does not score.
    """
    directory = Path(directory)
    ends = ("_gtFine_instanceIds.png", "_gtFine_polygons.json")
    folder = directory / "gtFine" / split
    stems = sorted({str(p).removesuffix(end) for end in ends for p in folder.glob(f"*/*{end}")})
    if not stems:
        raise UserError(f"Cityscapes data: {folder} holds no <city>/*{ends[0]} or <city>/*{ends[1]}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts = list(pool.map(_read_cityscapes_image, stems))
    annotations = [a for _, found in parts for a in found]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = [{"id": i, "name": n} for i, n in enumerate(CITYSCAPES_CLASSES, 1)]
    return {"images": [image for image, _ in parts], "annotations": annotations, "categories": categories}


def _read_cityscapes_image(path: str) -> tuple[dict, list[dict]]:
    drawn = f"{path}_gtFine_instanceIds.png"
    if os.path.isfile(drawn):
        ids = cv2.imread(drawn, cv2.IMREAD_UNCHANGED)
        if ids is None or ids.ndim != 2:
            raise UserError(f"Cityscapes annotation {drawn} is not a readable image of one channel")
        ids = ids.astype(np.int32)
    else:
        ids = _paint_cityscapes(f"{path}_gtFine_polygons.json")
    height, width = ids.shape
    city, stem = path.split(os.sep)[-2:]
    image = {
        "id": stem, "file_name": f"{city}/{stem}_leftImg8bit.png", "height": height, "width": width,
        "void": _run_lengths(np.isin(ids, VOID_IDS, kind="table"), 0, 0, height, width),
    }  # fmt: skip
    classes = {label: CITYSCAPES_CLASSES.index(name) + 1 for name, label in INSTANCE_IDS.items()}
    annotations = []
    for value in sorted(np.flatnonzero(np.bincount(ids.ravel())).tolist(), key=lambda v: (v < 1000, v)):
        category = classes.get(value // 1000 if value >= 1000 else value)
        if category is None:
            continue
        left, top, w, h = cv2.boundingRect((ids == value).view(np.uint8))
        visible = ids[top : top + h, left : left + w] == value
        annotations.append({
            "image_id": stem, "category_id": category, "iscrowd": int(value < 1000), "bbox": [left, top, w, h],
            "area": int(visible.sum()), "segmentation": _run_lengths(visible, left, top, height, width),
        })  # fmt: skip
    return image, annotations


def _paint_cityscapes(path: str) -> np.ndarray:
    """int32 [H, W] of the polygons: label number * 1000 + number of the instance, or the label of groups and stuff."""
    content = read_json(path, "Cityscapes annotation")
    try:
        height, width = int(content["imgHeight"]), int(content["imgWidth"])
        objects = [(str(o["label"]), np.array(o["polygon"], np.float64).reshape(-1, 2)) for o in content["objects"]
                   if not o.get("deleted")]  # fmt: skip
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"Cityscapes annotation {path}: no imgHeight, imgWidth, or objects' label and polygon: {e}"
        ) from None
    ids = np.zeros((height, width), np.int32)
    numbers: Counter = Counter()
    for label, polygon in objects:
        if label == "license plate" or len(polygon) < 3:  # plates lie on cars and are no object of their own
            continue
        kind = label if label in LABEL_IDS else label.removesuffix("group")
        value = LABEL_IDS.get(kind)
        if value is None:
            raise UserError(f"Cityscapes annotation {path}: unknown label '{label}'")
        if kind == label and (kind in INSTANCE_IDS or kind in ("caravan", "trailer")):
            value = 1000 * value + numbers[kind]
            numbers[kind] += 1
        cv2.fillPoly(ids, [np.round(polygon).astype(np.int32)], value)
    return ids


def _run_lengths(mask: np.ndarray, left: int, top: int, height: int, width: int) -> dict[str, Any]:
    """COCO run lengths of a height x width image whose part from (left, top) on is `mask`."""
    columns = np.zeros((mask.shape[1], mask.shape[0] + 2), bool)
    columns[:, 1:-1] = mask.T
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    ends = (column + left) * height + row + top
    # A run that goes on in the next column ends and begins at the same pixel: both go.
    again = np.flatnonzero(ends[1:] == ends[:-1])
    ends = np.delete(ends, np.concatenate([again, again + 1]))
    size = height * width
    counts = np.diff(ends, prepend=0, append=[] if len(ends) and ends[-1] == size else [size])
    run = mask_utils.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": run["counts"].decode()}


def _load_cityscapes(name, path, split, **common) -> FormatSplit:
    read = functools.partial(read_cityscapes_content, path, split)
    return split_from_coco(
        name, read, path / "leftImg8bit" / split, **common, origin=f"Cityscapes data {path} {split}",
        protocol="cityscapes",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ csv of boxes
_CSV_COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "image_path", "path", "imageid", "image_id"),
    "label": ("label", "class", "class_name", "category", "name", "labelname"),
    "x1": ("x1", "xmin", "left"),
    "y1": ("y1", "ymin", "top"),
    "x2": ("x2", "xmax", "right"),
    "y2": ("y2", "ymax", "bottom"),
    "crowd": ("iscrowd", "crowd", "ignore", "isgroupof"),
}
_CSV_HEADLESS = ["image", "x1", "y1", "x2", "y2", "label"]


def read_csv_content(path: str | Path, folder: str | Path, classes: str | Path | None = None) -> dict[str, Any]:
    """A csv of boxes in COCO's form; image ids are the file names, sizes are those of the image files.

    The header names the columns: an image (image, file, filename, path, …), a label (label, class, …), and x1 y1 x2 y2
    (or xmin, left, …) in continuous pixels; iscrowd marks ignored regions. Without a header, the columns are image,
    x1, y1, x2, y2, label. A row with an image alone is an image without objects. `classes` is a file of class names,
    one a line, in the order of their ids; without it they are the labels that occur, sorted.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"csv of boxes {path} cannot be read: {e}") from None
    if not rows:
        raise UserError(f"csv of boxes {path} is empty")
    header = [cell.strip().lower() for cell in rows[0]]
    columns = {key: header.index(n) for key, names in _CSV_COLUMNS.items() for n in names[::-1] if n in header}
    if not columns and len(header) == len(_CSV_HEADLESS):
        columns = {key: i for i, key in enumerate(_CSV_HEADLESS)}
        first = 1
    else:
        first, rows = 2, rows[1:]
    lacking = [key for key in _CSV_HEADLESS if key not in columns]
    if lacking:
        raise UserError(f"csv of boxes {path}: no column for {lacking[0]} in its header {','.join(header)[:80]}")
    boxes: dict[str, list] = {}
    for number, row in enumerate(rows, first):
        cells = {key: row[i].strip() if i < len(row) else "" for key, i in columns.items()}
        objects = boxes.setdefault(cells["image"], [])
        if not any(cells[key] for key in _CSV_HEADLESS[1:]):
            continue
        try:
            x1, y1, x2, y2 = (float(cells[key]) for key in ("x1", "y1", "x2", "y2"))
            crowd = int(float(cells.get("crowd") or 0)) == 1
        except ValueError:
            raise UserError(f"csv of boxes {path}, row {number}: a coordinate is not a number") from None
        if not cells["label"]:
            raise UserError(f"csv of boxes {path}, row {number}: no label")
        objects.append((cells["label"], [x1, y1, x2 - x1, y2 - y1], crowd))
    found = sorted({label for objects in boxes.values() for label, _, _ in objects})
    names = found
    if classes:
        try:
            names = [line.split(",")[0].strip() for line in Path(classes).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"csv of boxes {path}: class list {classes} cannot be read: {e}") from None
    unknown = [n for n in found if n not in names]
    if unknown:
        raise UserError(f"csv of boxes {path}: label '{unknown[0]}' is not in {classes}")
    ids = {n: i for i, n in enumerate(names, 1)}
    there = [n for n in boxes if os.path.exists(os.path.join(folder, n))]
    sizes = dict(zip(there, _header_sizes([os.path.join(folder, n) for n in there]).tolist()))
    # An image that is missing is counted by the caller, for whom its size does not matter.
    images = [{"id": n, "file_name": n, "height": h, "width": w} for n in boxes for h, w in [sizes.get(n, (1, 1))]]
    annotations = [
        {"id": 0, "image_id": n, "category_id": ids[label], "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for n, objects in boxes.items()
        for label, box, crowd in objects
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = [{"id": i, "name": n} for n, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _load_csv(name, path, folder, cfg, classes=None, **common) -> FormatSplit:
    base = Path(cfg.DATA.BASEDIR).expanduser()
    folder = dataset._own_path(base, folder)
    read = functools.partial(read_csv_content, path, folder, classes and dataset._own_path(base, classes))
    return split_from_coco(name, read, folder, cfg, **common, origin=str(path))


# ------------------------------------------------------------------------------------------------ Open Images
class _Entries(Sequence):
    """Entries of a COCO-like list, made one at a time: millions of them at once would fill the memory."""

    def __init__(self, number: int, make: Callable[[int], dict[str, Any]]):
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self._number:
            raise IndexError(i)
        return self._make(i)


class OpenImagesSplit(DatasetSplit):
    """One split of Open Images. Its columns are views of the cache files, shared by all processes of a machine.

    Attributes:
        directory, split: where it was read from.
        missing: how many of its images are not on disk (they are not part of the split).
        expanded: whether its boxes are those of the ancestor classes too.
    """

    directory: str
    split: str
    missing: int
    expanded: bool

    def content(self) -> dict[str, Any]:
        """The published files in COCO's form, unchecked: boxes in pixels, group-of as iscrowd, unknown classes None.

        "images" and "annotations" are sequences that make their entries when asked. File names are relative to
        `image_root`; images that are not on disk are taken to be 1000 x 1000.
        """
        files = find_files(self.directory, self.split)
        class_ids, class_names = read_classes(files.classes)
        ids, rows, labels = _read_open_images(files, class_ids, np.float64)
        image, order = rows["ImageID"], np.argsort(labels["ImageID"], kind="stable")
        labels = {key: column[order] for key, column in labels.items()}
        first_label = np.searchsorted(labels["ImageID"], np.arange(len(ids) + 1))
        place = {self.image_id(i).encode(): i for i in range(len(self))}
        row_of = np.array([place.get(i, -1) for i in ids.tolist()], np.int64)
        root = self.image_root()
        sizes = np.full((len(ids), 2), 1000)
        sizes[row_of >= 0] = self.image_sizes()[row_of[row_of >= 0]]
        boxes = np.stack([rows[n] for n in _SIDES], 1) * sizes[image][:, [1, 0, 1, 0]]

        def make_image(i: int) -> dict[str, Any]:
            path = self.image_file(row_of[i]) if row_of[i] >= 0 else f"{self._folders[0]}/{ids[i].decode()}.jpg"
            said = [
                (class_ids[labels["LabelName"][k]], labels["Confidence"][k] > 0.5)
                for k in range(first_label[i], first_label[i + 1])
                if labels["LabelName"][k] >= 0
            ]
            return {
                "id": ids[i].decode(), "file_name": os.path.relpath(path, root),
                "height": int(sizes[i, 0]), "width": int(sizes[i, 1]),
                "pos_category_ids": [c for c, there in said if there],
                "neg_category_ids": [c for c, there in said if not there],
            }  # fmt: skip

        def make_annotation(k: int) -> dict[str, Any]:
            x1, y1, x2, y2 = boxes[k].tolist()
            label = rows["LabelName"][k]
            return {
                "id": k + 1, "image_id": ids[image[k]].decode(),
                "category_id": class_ids[label] if label >= 0 else None,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": abs((x2 - x1) * (y2 - y1)),
                "iscrowd": int(rows["IsGroupOf"][k] > 0),
            }  # fmt: skip

        categories = [{"id": i, "name": n} for i, n in zip(class_ids, class_names)]
        return {
            "images": _Entries(len(ids), make_image), "annotations": _Entries(len(image), make_annotation),
            "categories": categories,
        }  # fmt: skip

    def image_root(self) -> str:
        """The folder that holds all images, in folders of its own if there are several."""
        return self._folders[0] if len(self._folders) == 1 else os.path.commonpath(self._folders)

    def _result_rows(self, results: Iterable[dict]) -> Iterable[dict]:
        place = {self.image_id(i): self.image_size(i) for i in range(len(self))}
        for r in results:
            height, width = place[r["image_id"]]
            x, y, w, h = r["bbox"]
            row = {"image_id": r["image_id"], "label": r["category_id"], "score": r["score"], "width": width}
            yield row | {"height": height, "box": (x, y, x + w, y + h), "segmentation": r.get("segmentation")}

    def write_submission(self, path: str | Path, results: list[dict]) -> list[str]:
        """Writes COCO-format results beside `path` for the official evaluator and for the challenge server.

        The files are <stem>.csv and <stem>-submission.csv, with masks also <stem>-segm.csv and
        <stem>-segm-submission.csv; their names are returned.
        """
        path = Path(path)
        results = [r for r in results if r["category_id"] is not None]
        images = [(self.image_id(i), *self.image_size(i)) for i in range(len(self))]
        written = []
        for mark in ("", "-segm"):
            rows = list(self._result_rows(r for r in results if not mark or r.get("segmentation")))
            if mark and not rows:
                break
            written += [str(path.with_name(f"{path.stem}{mark}{end}.csv")) for end in ("", "-submission")]
            oid_eval.write_detections_csv(written[-2], rows, bool(mark))
            oid_eval.write_submission_csv(written[-1], rows, images, bool(mark))
        return written

    def evaluate(self, results: list[dict], verbose: bool = True, **_: Any) -> dict[str, float]:
        """The official metrics: oid-v2/mAP and, with a hierarchy, oid-challenge/mAP, with masks oid-challenge-segm/mAP;
        each with AP_per_class/<class name>. Images missing on disk are not scored.

        For the challenges a detection counts for the ancestors of its class too, unless the set was loaded with
        expand=True: a model of such boxes finds the ancestors by itself.
        """
        results = [r for r in results if r["category_id"] is not None]
        masked = (
            any(r.get("segmentation") for r in results) and find_files(self.directory, self.split).masks is not None
        )
        truth = oid_eval.read_truth(self.directory, self.split, masked)
        truth = _only_truth_of(truth, [str(self.image_id(i)).encode() for i in range(len(self))])
        rows = list(self._result_rows(results))
        class_of = {c: i for i, c in enumerate(truth.class_ids)}
        ids = np.array([str(r["image_id"]).encode() for r in rows], truth.image_ids.dtype)
        place = np.searchsorted(truth.image_ids, ids)
        place = np.minimum(place, max(0, len(truth.image_ids) - 1))
        known = truth.image_ids[place] == ids if len(ids) else np.zeros(0, bool)
        rows, place = [r for r, k in zip(rows, known) if k], place[known]
        boxes = np.array([r["box"] for r in rows], np.float64).reshape(-1, 4)
        if rows:
            boxes /= np.array([[r["width"], r["height"], r["width"], r["height"]] for r in rows])
        detections = oid_eval.Detections(
            place.astype(np.int32),
            np.array([class_of[r["label"]] for r in rows], np.int32),
            np.array([r["score"] for r in rows], np.float64),
            boxes,
        )
        protocols = {"v2": detections}
        if truth.ancestors is not None:
            protocols["challenge"] = detections
            if masked:
                protocols["challenge-segm"] = _with_masks(detections, rows)
        metrics: dict[str, float] = {}
        for protocol, found in protocols.items():
            scores = oid_eval.evaluate(truth, found, protocol, protocol != "v2" and not self.expanded)
            metrics |= _named_scores(f"oid-{protocol}", scores, truth.class_ids, truth.class_names)
            if verbose:
                logger.info(f"{self.name}: Open Images {protocol} mAP {metrics[f'oid-{protocol}/mAP']:.4f}")
        return metrics


def _with_masks(detections: oid_eval.Detections, rows: list[dict]) -> oid_eval.Detections:
    keep = np.array([bool(r["segmentation"]) for r in rows], bool)
    rows = [r for r in rows if r["segmentation"]]
    sizes = np.array([r["segmentation"]["size"] for r in rows], np.int32).reshape(-1, 2)
    counts = [oid_eval.coco_run_lengths(r["segmentation"], *r["segmentation"]["size"]) for r in rows]
    boxes = np.array([mask_utils.toBbox({"counts": c, "size": s.tolist()}) for c, s in zip(counts, sizes)]).reshape(
        -1, 4
    )
    boxes[:, 2:] += boxes[:, :2]
    boxes /= sizes[:, [1, 0, 1, 0]]
    columns = (detections.image[keep], detections.label[keep], detections.score[keep])
    return oid_eval.Detections(*columns, boxes, oid_eval.Masks(counts, sizes))


def _only_truth_of(truth: oid_eval.Truth, ids: list[bytes]) -> oid_eval.Truth:
    keep = np.isin(truth.image_ids, np.array(ids, truth.image_ids.dtype))
    if keep.all():
        return truth
    number = np.cumsum(keep) - 1
    box, label = keep[truth.image], keep[truth.label_image]
    masks = truth.masks
    if masks is not None:
        masks = oid_eval.Masks([c for c, k in zip(masks.counts, box) if k], masks.sizes[box])
    return truth._replace(
        image_ids=truth.image_ids[keep],
        image=number[truth.image[box]].astype(np.int32),
        label=truth.label[box],
        boxes=truth.boxes[box],
        group_of=truth.group_of[box],
        label_image=number[truth.label_image[label]].astype(np.int32),
        label_class=truth.label_class[label],
        label_positive=truth.label_positive[label],
        masks=masks,
    )


def _load_openimages(name, path, split, cfg, class_names, training, **options) -> OpenImagesSplit:
    images = options.pop("images", None)
    result = load_openimages(
        name,
        path,
        split,
        class_names,
        masks=cfg.MODE_MASK,
        need_masks=training and cfg.MODE_MASK,
        keep_missing=cfg.DATA.KEEP_MISSING_IMAGES,
        image_folder=images and dataset._own_path(Path(cfg.DATA.BASEDIR).expanduser(), images),
        **options,
    )
    groups = int(result._columns["crowd"].sum())
    off = [k for k in ("RPN", "FRCNN") if cfg.get(f"{k}.CROWD_OVERLAP_THRESH") > 1]
    if training and groups and off:
        logger.warning(
            f"{name}: what lies in its {groups} group-of boxes is background to the model; to ignore it, set "
            + " ".join(f"{k}.CROWD_OVERLAP_THRESH=0.7" for k in off)
        )
    return result


_SIDES = ("XMin", "YMin", "XMax", "YMax")
# Rises when the meaning of the cached columns changes.
_CACHE_VERSION = 3
_OPEN_IMAGES_COLUMNS = (
    "file_bytes", "file_offsets", "id_bytes", "id_offsets", "folder", "sizes", "first_object", "boxes", "labels",
    "crowd", "first_ring", "first_vertex", "vertices", "first_verified", "verified",
)  # fmt: skip


def load_openimages(
    name: str,
    directory: str | Path,
    split: str,
    class_names: Sequence[str] = (),
    *,
    group_of: str = "ignore",
    expand: bool = False,
    masks: bool = False,
    need_masks: bool = False,
    keep_missing: bool = False,
    image_folder: str | Path | None = None,
    check_images: bool = True,
) -> OpenImagesSplit:
    """The published files of one split, through a cache of columns that is made once and then memory-mapped.

    Args:
        directory: holds the csv and json files; images are <ImageID>.jpg in <split>/, images/<split>/ or the folders
            <split>_0 to <split>_f that the archives unpack to, unless `image_folder` is given.
        class_names: display names of the classes wanted, in the order of their labels; all if empty.
        group_of: what a group-of box becomes: "ignore" (a crowd region), "object", or "drop".
        expand: add a box for each ancestor class of the hierarchy, as in the challenges' ground truth; to train on
            with FRCNN.FEDERATED_LOSS, which lets an object have several labels.
        masks: trace the segmentation masks into outlines.
        need_masks: leave out the boxes without a mask that are no crowd region.
        keep_missing: go on without images that are missing on disk, instead of an error.
        check_images: False: do not look for the images; their sizes then come from <split>-image-sizes.csv.

    The cache is in <directory>/.packrcnn-cache (or ~/.cache/packrcnn when that cannot be written). It is made anew
    when a source file's size or time stamp, an image folder's time stamp, or an option changes. An image's size is
    read from its header, unless <split>-image-sizes.csv (ImageID,Width,Height) gives it.
    """
    started = time.time()
    directory = Path(directory).absolute()
    if group_of not in ("ignore", "object", "drop"):
        raise UserError(f"Open Images {directory}: group_of={group_of!r} must be ignore, object or drop")
    files = find_files(directory, split)
    if list(class_names) == read_classes(files.classes)[1]:
        class_names = ()  # a model of all classes shares the cache of its training
    size_file = directory / f"{split}-image-sizes.csv"
    folders = _image_folders(directory, split, image_folder) if check_images else [directory / split]
    sources = [p for p in (*files, size_file if size_file.is_file() else None) if p is not None]
    stamps = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in sources}
    if check_images:
        stamps |= {str(p): [0, p.stat().st_mtime_ns] for p in folders}
    options = {
        "version": _CACHE_VERSION, "split": split, "classes": list(class_names), "group_of": group_of, "expand": expand,
        "masks": masks, "need_masks": need_masks, "check_images": check_images, "folders": [str(f) for f in folders],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    columns, meta = _read_cache(directory, f"{split}-{key}", stamps)
    if columns is None:
        columns, meta = _build_open_images(files, size_file, folders, options)
        cached = _write_cache(directory, f"{split}-{key}", stamps, columns, meta)
        columns = cached or columns
    if meta["missing"]:
        what = f"{name}: {meta['missing']} of {meta['listed']} images are missing, e.g. {meta['first_missing']}"
        if not keep_missing or meta["missing"] == meta["listed"]:
            raise UserError(f"{what}; DATA.KEEP_MISSING_IMAGES=True goes on without them")
        logger.warning(f"{what}: going on without them")
    result = OpenImagesSplit(
        name, str(files.boxes), [str(f) for f in folders], meta["class_names"], meta["class_ids"],
        {
            "folder": columns["folder"], "sizes": columns["sizes"], "first_object": columns["first_object"],
            "boxes": columns["boxes"], "labels": columns["labels"], "crowd": columns["crowd"],
            "first_ring": columns["first_ring"], "first_vertex": columns["first_vertex"],
            "vertices": columns["vertices"], "keypoints": None,
            "file": (columns["file_bytes"], columns["file_offsets"]),
            "id": (columns["id_bytes"], columns["id_offsets"]),
            "first_verified": columns["first_verified"] if files.image_labels else None,
            "verified": columns["verified"],
        },
        meta["dropped"], meta["num_annotations"], np.zeros(0, np.int64),
    )  # fmt: skip
    result.directory, result.split, result.missing, result.expanded = str(directory), split, meta["missing"], expand
    dataset._report(result, time.time() - started)
    return result


def _image_folders(directory: Path, split: str, image_folder: str | Path | None) -> list[Path]:
    if image_folder is not None:
        if not Path(image_folder).is_dir():
            raise UserError(f"Open Images: image folder {image_folder} does not exist")
        return [Path(image_folder).absolute()]
    for folder in (directory / split, directory / "images" / split):
        if folder.is_dir():
            return [folder]
    folders = sorted(p for p in directory.glob(f"{split}_?") if p.is_dir())
    if not folders:
        raise UserError(
            f"Open Images {directory}: no image folder {split}/, images/{split}/ or {split}_0/ … {split}_f/"
        )
    return folders


def _cache_folders(directory: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return [directory / ".packrcnn-cache", home / "packrcnn" / mark]


def _read_cache(directory: Path, entry: str, stamps: dict) -> tuple[dict | None, dict]:
    for parent in _cache_folders(directory):
        folder = parent / entry
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["stamps"] == stamps:
                # Plain views: slicing a numpy.memmap costs several times as much, and pickling one would copy it too.
                names = _OPEN_IMAGES_COLUMNS
                return {n: np.asarray(np.load(folder / f"{n}.npy", mmap_mode="r")) for n in names}, meta
        except (OSError, EOFError, ValueError, KeyError):
            continue  # absent or damaged: made anew
    return None, {}


def _write_cache(directory: Path, entry: str, stamps: dict, columns: dict, meta: dict) -> dict | None:
    """Writes a folder, renames it into place and returns its columns as memory maps; None if nothing can be written."""
    for parent in _cache_folders(directory):
        temporary = parent / f".{entry}.{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            for name in _OPEN_IMAGES_COLUMNS:
                np.save(temporary / f"{name}.npy", columns[name])
            write_json(temporary / "meta.json", {**meta, "stamps": stamps})
            if (parent / entry).exists():
                os.rename(parent / entry, parent / f".{entry}.{os.getpid()}.old")
            os.rename(temporary, parent / entry)
        except OSError as e:
            shutil.rmtree(temporary, ignore_errors=True)
            cached, _ = _read_cache(directory, entry, stamps)  # another process may have been faster
            if cached is not None:
                return cached
            logger.info(f"no cache in {parent}: {e.strerror}")
            continue
        shutil.rmtree(parent / f".{entry}.{os.getpid()}.old", ignore_errors=True)
        logger.info(f"cache of the annotations: {parent / entry}")
        return _read_cache(directory, entry, stamps)[0]
    return None


def _pack(words: np.ndarray, before: bytes, after: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and offsets, as in dataset's columns of strings, of `before` + word + `after` for an array of bytes."""
    words = np.char.add(np.char.add(np.bytes_(before), words), np.bytes_(after)) if len(words) else words.astype("S1")
    table = words.view(np.uint8).reshape(len(words), -1)
    used = table != 0
    return table[used], dataset._offsets(used.sum(1))


def _read_open_images(files, class_ids: Sequence[str], kind: type) -> tuple[np.ndarray, dict, dict]:
    """The sorted image ids, and the columns of the boxes and of the image labels, ImageID being the place in them."""
    known = {"ImageID": None, "LabelName": class_ids}
    boxes = read_columns(
        files.boxes, "box annotations", dict.fromkeys(_SIDES, kind) | {"IsGroupOf": np.int8}, known
    )  # fmt: skip
    ids = boxes.pop("ImageID values")
    labels = {"ImageID": np.zeros(0, np.int32), "LabelName": np.zeros(0, np.int32), "Confidence": np.zeros(0)}
    if files.image_labels:
        labels = read_columns(files.image_labels, "image labels", {"Confidence": np.float32}, known)
        more = labels.pop("ImageID values")
        ids, inverse = np.unique(np.concatenate([ids, more]), return_inverse=True)
        inverse = inverse.astype(np.int32)
        boxes["ImageID"] = inverse[: len(inverse) - len(more)][boxes["ImageID"]]
        labels["ImageID"] = inverse[len(inverse) - len(more) :][labels["ImageID"]]
    return ids, boxes, labels


def _build_open_images(files, size_file: Path, folders: list[Path], options: dict) -> tuple[dict, dict]:
    """The columns of a split from its csv files, and what else is known of it."""
    all_ids, all_names = read_classes(files.classes)
    class_names = options["classes"] or all_names
    if len(set(all_names)) < len(all_names):
        raise UserError(f"{files.classes}: class name '{Counter(all_names).most_common(1)[0][0]}' occurs twice")
    if not set(class_names) & set(all_names):
        raise UserError(f"{files.classes} has none of the model's classes, e.g. {class_names[0]}")
    by_name = dict(zip(all_names, all_ids))
    class_ids = [by_name.get(n) for n in class_names]
    label_of = np.zeros(len(all_ids) + 1, np.int32)  # the last element is for classes outside the list
    for label, class_id in enumerate(class_ids, 1):
        if class_id is not None:
            label_of[all_ids.index(class_id)] = label
    dropped: Counter = Counter()
    ids, rows, labels = _read_open_images(files, all_ids, np.float32)
    image, number = rows.pop("ImageID"), len(rows["LabelName"])
    present, folder, sizes = _open_images_on_disk(ids, size_file, folders, options["check_images"])

    group = rows.pop("IsGroupOf") > 0  # -1 = unknown
    class_index = rows.pop("LabelName")
    boxes = np.stack([rows.pop(n) for n in _SIDES], 1)
    outlines = _open_images_masks(files, ids, all_ids, options["split"], image, class_index, boxes, sizes, present) if (
        options["masks"] and files.masks) else None  # fmt: skip
    source = np.arange(number)
    if options["expand"]:
        if files.hierarchy is None:
            raise UserError(f"{files.boxes.parent}: expand needs the class hierarchy (bbox_labels_hierarchy.json)")
        ancestors = read_ancestors(files.hierarchy, all_ids)
        rows, above = _related_classes(class_index, ancestors)
        source, class_index = np.concatenate([source, rows]), np.concatenate([class_index, above])
        # A class that is there implies its ancestors, one that is not there excludes its descendants.
        labels = _expand_image_labels(labels, ancestors)
    label = label_of[class_index]
    scale = sizes[:, [1, 0, 1, 0]].astype(np.float32)
    boxes *= scale[image]
    np.clip(boxes, 0, scale[image], out=boxes)
    solid = ((boxes[:, 2:] - boxes[:, :2]) >= dataset.MIN_SIDE).all(1)
    crowd = group if options["group_of"] == "ignore" else np.zeros(number, bool)
    bad = [("image is missing on disk", ~present[image]), ("box is empty inside the image", ~solid)]
    if options["group_of"] == "drop":
        bad.append(("group-of box (group_of=drop)", group))
    if options["need_masks"]:
        lacking = np.ones(number, bool)
        if outlines is not None:
            lacking[outlines[0]] = False
        bad.append(("no outline (MODE_MASK trains masks)", lacking & ~crowd))
    keep = label > 0
    if not keep.all():
        dropped["class is unknown or not trained"] = int((~keep).sum())
    for why, which in bad:
        which = which[source]
        if (which & keep).any():
            dropped[why] = int((which & keep).sum())
        keep &= ~which
    unused = np.flatnonzero(~keep)
    unused = image[source[unused]], label[unused]
    source, label = source[keep], label[keep]
    order = image[source]
    if len(order) and (np.diff(order) < 0).any():
        order = np.argsort(order, kind="stable")
        source, label = source[order], label[order]
    number_of = np.cumsum(present) - 1  # the row of each listed image among those that are there
    there = np.flatnonzero(present)
    first_ring, first_vertex, vertices = _outline_columns(outlines, source)
    columns = {
        "folder": folder[there],
        "sizes": sizes[there],
        "first_object": dataset._offsets(np.bincount(number_of[image[source]], minlength=len(there))),
        "boxes": boxes[source],
        "labels": label,
        "crowd": crowd[source],
        "first_ring": first_ring,
        "first_vertex": first_vertex,
        "vertices": vertices,
    }
    columns["file_bytes"], columns["file_offsets"] = _pack(ids[there], b"", b".jpg")
    columns["id_bytes"], columns["id_offsets"] = _pack(ids[there], b'"', b'"')
    row_of = np.where(present, number_of, -1)
    columns |= dataset._verified_columns(
        [(row_of[labels["ImageID"]], label_of[labels["LabelName"]]), (row_of[image[source]], label)],
        [(row_of[unused[0]], unused[1])],
        len(there), len(class_names),
    )  # fmt: skip
    lost = np.flatnonzero(~present)
    return columns, {
        "class_names": list(class_names), "class_ids": class_ids, "dropped": dict(dropped), "num_annotations": number,
        "listed": len(ids), "missing": len(lost),
        "first_missing": str(folders[0] / f"{ids[lost[0]].decode()}.jpg") if len(lost) else "",
    }  # fmt: skip


def _related_classes(classes: np.ndarray, related: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (row of `classes`, class that `related` [C, C] has for its class); a class of -1 has none."""
    rows = np.flatnonzero(classes >= 0)
    found = dataset._ranges(dataset._offsets(related.sum(1)), classes[rows])
    return np.repeat(rows, related.sum(1)[classes[rows]]), np.nonzero(related)[1][found].astype(np.int32)


def _expand_image_labels(labels: dict[str, np.ndarray], ancestors: np.ndarray) -> dict[str, np.ndarray]:
    """The image labels and those they imply."""
    positive = labels["Confidence"] > 0.5
    rows, classes = zip(*(
        (which[row], implied)
        for which, related in ((np.flatnonzero(positive), ancestors), (np.flatnonzero(~positive), ancestors.T))
        for row, implied in [_related_classes(labels["LabelName"][which], related)]
    ))  # fmt: skip
    return {
        "ImageID": np.concatenate([labels["ImageID"], *(labels["ImageID"][r] for r in rows)]),
        "LabelName": np.concatenate([labels["LabelName"], *classes]),
    }


def _open_images_on_disk(
    ids: np.ndarray, size_file: Path, folders: list[Path], check: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image id: bool, whether it is there; int16, in which folder; int32 [n, 2], height and width."""
    present, folder = np.full(len(ids), not check), np.zeros(len(ids), np.int16)
    sizes = np.ones((len(ids), 2), np.int32)
    if check:
        for number, path in enumerate(folders):
            with os.scandir(path) as entries:
                names = [e.name[:-4].encode() for e in entries if e.name.endswith(".jpg")]
            found = np.isin(ids, np.array(names, np.bytes_)) if names else np.zeros(len(ids), bool)
            folder[found & ~present] = number
            present |= found
    known = np.zeros(len(ids), bool)
    if size_file.is_file():
        rows = read_columns(
            size_file, "image sizes", {"Height": np.int32, "Width": np.int32}, {"ImageID": [i.decode() for i in ids]}
        )
        listed = rows["ImageID"] >= 0
        sizes[rows["ImageID"][listed]] = np.stack([rows["Height"], rows["Width"]], 1)[listed]
        known[rows["ImageID"][listed]] = True
    todo = np.flatnonzero(present & ~known)
    if len(todo) and not check:
        raise UserError(f"{size_file} lacks image {ids[todo[0]].decode()}")
    if len(todo):
        sizes[todo] = _header_sizes([f"{folders[folder[i]]}/{ids[i].decode()}.jpg" for i in todo])
    return present, folder, sizes


def _open_images_masks(files, ids, class_ids, split, image, class_index, boxes, sizes, present):
    """Outlines of the boxes with a mask: rows [K] ascending, and for each a list of rings in the image's pixels."""
    rows = read_columns(
        files.masks, "segmentation masks", dict.fromkeys(("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax"), np.float32),
        {"ImageID": [i.decode() for i in ids], "LabelName": class_ids}, ["MaskPath"],
    )  # fmt: skip
    keep = (rows["ImageID"] >= 0) & (rows["LabelName"] >= 0)
    keep[keep] = present[rows["ImageID"][keep]]
    mask_boxes = np.stack([rows[n] for n in ("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax")], 1)
    joined, box_rows, alone = oid_eval.join_by_box(
        rows["ImageID"][keep], rows["LabelName"][keep], mask_boxes[keep], image, class_index, boxes
    )
    if len(alone):
        logger.warning(f"{files.masks}: {len(alone)} masks without a box of the same coordinates are left out")
    names = rows["MaskPath"][keep][joined]
    folders = oid_eval.mask_folders(files.masks.parent, split)

    def trace(k: int) -> list[np.ndarray]:
        height, width = sizes[image[box_rows[k]]]
        bitmap = oid_eval.read_mask_image(names[k].decode(), folders, files.masks)
        stretch = np.array([width / bitmap.shape[1], height / bitmap.shape[0]], np.float32)
        return [_simplified(ring) * stretch for ring in polygons.mask_to_rings(bitmap)]

    if len(names) > 10000:
        logger.info(f"{files.masks}: tracing {len(names)} masks, which is done once")
    rings = _in_threads(trace, range(len(names)), os.cpu_count() or 1, "outlines of masks")
    order = np.argsort(box_rows, kind="stable")
    return box_rows[order], [rings[k] for k in order]


def _simplified(ring: np.ndarray) -> np.ndarray:
    """A ring along pixel borders without the steps of its slanted sides: a sixth of the vertices, at most a pixel (or
    a hundredth of its extent) from the original. Two million masks with every pixel's corner take 12 GB."""
    tolerance = min(1.0, 0.01 * float(np.ptp(ring, axis=0).max()))
    simple = cv2.approxPolyDP(ring[:, None], tolerance, True)[:, 0]
    return simple if len(simple) >= 3 else ring


def _outline_columns(outlines, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """first_ring, first_vertex and vertices for the boxes `source` (rows of the csv, in their final order)."""
    if outlines is None or not len(outlines[0]):
        return np.zeros(len(source) + 1, np.int64), np.zeros(1, np.int64), np.zeros((0, 2), np.float32)
    rows, rings = outlines
    at = np.minimum(np.searchsorted(rows, source), len(rows) - 1)
    chosen = [rings[k] if rows[k] == s else [] for k, s in zip(at, source)]
    flat = [ring for some in chosen for ring in some]
    vertices = np.concatenate(flat) if flat else np.zeros((0, 2), np.float32)
    first_vertex = dataset._offsets(np.array([len(ring) for ring in flat], np.int64))
    return dataset._offsets(np.array([len(some) for some in chosen], np.int64)), first_vertex, vertices


# ------------------------------------------------------------------------------------------------ the long tail
def repeat_factors(split: DatasetSplit, threshold: float) -> np.ndarray:
    """float32 [len]: how often each image should come up per epoch (Gupta et al., LVIS, CVPR 2019, section 4).

    A class shown by a fraction f of the images has the factor max(1, sqrt(threshold / f)), an image the largest factor
    of its classes, 1 if it has none. LVIS uses threshold = 0.001.
    """
    c = split._columns
    _, images_with = split.class_counts()
    fraction = np.maximum(images_with, 1) / max(1, len(split))
    per_class = np.maximum(1.0, np.sqrt(threshold / fraction))
    factors = np.ones(len(split), np.float32)
    of_object = np.where(c["crowd"], 1.0, per_class.astype(np.float32)[c["labels"] - 1]).astype(np.float32)
    shown = np.flatnonzero(np.diff(c["first_object"]))
    if len(shown):
        factors[shown] = np.maximum.reduceat(of_object, c["first_object"][shown])
    return factors


def class_aware_images(split: DatasetSplit, number: int, seed: int) -> np.ndarray:
    """int64 [number]: images drawn by choosing a class uniformly among those that occur, then one of its images.

    (Shen et al., "Relay Backpropagation", ECCV 2016, section 4.1.) Equal seeds give equal draws.
    """
    c = split._columns
    solid = ~c["crowd"]
    owners = np.repeat(np.arange(len(split), dtype=np.int32), np.diff(c["first_object"]))[solid]
    labels = c["labels"][solid]
    order = np.argsort(labels.astype(np.uint16 if len(split.class_names) < 1 << 16 else np.int32), kind="stable")
    labels, images = labels[order], owners[order]  # by class, then image
    once = np.concatenate([[True], (labels[1:] != labels[:-1]) | (images[1:] != images[:-1])]) if len(labels) else order
    labels, images = labels[once], images[once]
    first = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])) if len(labels) else labels
    if not len(first):
        raise UserError(f"{split.name}: no image with an object to draw from")
    counts = np.diff(np.append(first, len(labels)))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(first), number)
    return images[first[chosen] + rng.integers(0, counts[chosen])].astype(np.int64)
