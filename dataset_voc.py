"""Pascal VOC (Everingham et al., IJCV 2010): Annotations/*.xml, ImageSets/Main/<split>.txt, SegmentationObject/."""

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common import UserError, logger
from dataset_build import FormatSplit, split_from_coco
from utils.image_header import image_header_size
from utils.polygons import encode_part

__all__ = ["VOC_CLASSES", "load", "read_voc_content", "read_voc_detections"]

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


def load(name, path, split, cfg, difficult="ignore", **common) -> FormatSplit:
    read = functools.partial(read_voc_content, path, split, difficult, masks=cfg.MODE_MASK)
    return split_from_coco(
        name, read, _voc_directory(path) / "JPEGImages", cfg, **common, origin=f"VOC data {path} {split}",
        protocol="voc",
    )  # fmt: skip


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
    run = encode_part(inside[y : y + h, x : x + w], x, y, *inside.shape)
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
