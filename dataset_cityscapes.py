"""Cityscapes (Cordts et al., CVPR 2016): gtFine/<split>/<city>/*_gtFine_(instanceIds.png or polygons.json)."""

import functools
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common import UserError, read_json
from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit
from utils.archives import find_folder, is_file, is_folder, list_folder, read_file
from utils.cityscapes_eval import INSTANCE_IDS, LABEL_IDS, VOID_IDS
from utils.image_header import decode_image
from utils.polygons import encode_part

__all__ = ["CITYSCAPES_CLASSES", "cityscapes_images", "load", "read_cityscapes_content"]

CITYSCAPES_CLASSES = list(INSTANCE_IDS)


def load(
    name: str, path: Path, split: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False
) -> DatasetSplit:
    """See `read_cityscapes_content`."""
    read = functools.partial(read_cityscapes_content, path, split)
    return split_from_coco(
        name, read, cityscapes_images(path, split), cfg, class_names, training, f"Cityscapes data {path} {split}",
        ["coco", "cityscapes"],
    )  # fmt: skip


def cityscapes_images(directory: Path, split: str) -> Path:
    """The folder leftImg8bit/<split>, which may lie in leftImg8bit_trainvaltest.zip."""
    place = f"leftImg8bit/{split}"
    return find_folder(directory, [place], ["leftImg8bit_trainvaltest"]) or directory / place


def read_cityscapes_content(directory: str | Path, split: str) -> dict[str, Any]:
    """Cityscapes' instances in COCO's form; image ids are <city>_<sequence>_<frame>, masks as run lengths.

    Masks come from the instance images (gtFine_instanceIds.png) where these exist; otherwise polygons are painted in
    the file's order, so that later objects cover earlier ones. Groups become crowd regions of their class. Objects
    without a visible pixel are left out. An image's "void" is the mask of regions that the benchmark does not score.
    gtFine/ may lie in a zip or tar, as it is published (gtFine_trainvaltest.zip).
    """
    directory = Path(directory)
    ends = ("_gtFine_instanceIds.png", "_gtFine_polygons.json")
    place = f"gtFine/{split}"
    folder = find_folder(directory, [place], ["gtFine_trainvaltest"]) or directory / place
    cities = [folder / name for name in list_folder(folder)] if is_folder(folder) else []
    names = [str(city / name) for city in cities if is_folder(city) for name in list_folder(city)]
    stems = sorted({name.removesuffix(end) for end in ends for name in names if name.endswith(end)})
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
    if is_file(drawn):
        ids = decode_image(drawn, cv2.IMREAD_UNCHANGED, f"Cityscapes annotation {drawn}")
        if ids.ndim != 2:
            raise UserError(f"Cityscapes annotation {drawn} is not a readable image of one channel")
        ids = ids.astype(np.int32)
    else:
        ids = _paint_cityscapes(f"{path}_gtFine_polygons.json")
    height, width = ids.shape
    city, stem = path.split(os.sep)[-2:]
    image = {
        "id": stem, "file_name": f"{city}/{stem}_leftImg8bit.png", "height": height, "width": width,
        "void": encode_part(np.isin(ids, VOID_IDS, kind="table"), 0, 0, height, width),
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
            "area": int(visible.sum()), "segmentation": encode_part(visible, left, top, height, width),
        })  # fmt: skip
    return image, annotations


def _paint_cityscapes(path: str) -> np.ndarray:
    """int32 [H, W] painted from polygons: label number * 1000 + instance number; groups and stuff have the label number
    only."""
    content = read_json(path, "Cityscapes annotation", read_file)
    try:
        height, width = int(content["imgHeight"]), int(content["imgWidth"])
        objects = [(str(o["label"]), np.array(o["polygon"], np.float64).reshape(-1, 2)) for o in content["objects"]
                   if not o.get("deleted")]  # fmt: skip
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as e:
        raise UserError(
            f"Cityscapes annotation {path}: no imgHeight, imgWidth, or objects' label and polygon: {e}"
        ) from None
    if not (height > 0 and width > 0 and height * width <= 2**26):
        raise UserError(f"Cityscapes annotation {path}: no image has imgWidth x imgHeight {width} x {height}")
    bad = next((label for label, polygon in objects if not np.all(np.abs(polygon) < 1e6)), None)
    if bad is not None:
        raise UserError(f"Cityscapes annotation {path}: the polygon of a '{bad}' lies far outside the image")
    ids = np.zeros((height, width), np.int32)
    numbers: Counter = Counter()
    for label, polygon in objects:
        if label == "license plate" or len(polygon) < 3:  # licence plates are parts of cars, not objects
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
