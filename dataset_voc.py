"""Pascal VOC (Everingham et al., IJCV 2010): Annotations/*.xml, ImageSets/Main/<split>.txt, SegmentationObject/."""

import functools
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common import UserError, logger, read_text
from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit
from utils.archives import find_folder, is_file, is_folder, list_folder, read_file, split_path
from utils.coco_format import Unusable, read_flag, read_number
from utils.image_header import IMAGE_SUFFIXES, decode_image, image_header_size
from utils.plain_xml import read_xml
from utils.polygons import encode_part

__all__ = ["VOC_CLASSES", "load", "read_voc_content", "read_voc_detections", "voc_images"]

VOC_CLASSES = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


def load(
    name: str, path: Path, split: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False,
    difficult: str = "ignore",
) -> DatasetSplit:  # fmt: skip
    """See `read_voc_content`."""
    read = functools.partial(read_voc_content, path, split, difficult, masks=cfg.MODE_MASK)
    return split_from_coco(
        name, read, voc_images(path), cfg, class_names, training, f"VOC data {path} {split}",
        ["coco", "voc07", "voc12"],
    )  # fmt: skip


def voc_images(directory: Path) -> Path:
    """The folder JPEGImages of a VOC folder or of a parent directory of it; it may lie in an archive."""
    return _part_of(_voc_directory(directory), "JPEGImages")


def read_voc_content(
    directory: str | Path,
    split: str = "",
    difficult: str = "ignore",
    image_folder: str | Path | None = None,
    masks: bool = False,
) -> dict[str, Any]:
    """A VOC folder in COCO's form: image ids are the xml files' stems, category ids count from 1.

    Args:
        directory: holds Annotations/, JPEGImages/ and ImageSets/Main/; or a parent directory of it, such as VOCdevkit/.
            It may be a tar or zip, as it is published; so may any of the folders, as in JPEGImages.zip.
        split: a list of ImageSets/Main, or of another folder of ImageSets by its name, such as "Segmentation/train";
            "" for every annotation.
        difficult: what to do with difficult objects: "ignore" (as regions that are neither right nor wrong), "object".
        masks: give the objects of images with a SegmentationObject/<stem>.png their masks.

    VOC's pixels are 1-based and inclusive, so a box spans [xmin - 1, xmax). Classes are VOC's
    twenty if no other occurs, else all names that occur in Annotations/, sorted.
    """
    directory = _voc_directory(Path(directory))
    if difficult not in ("ignore", "object"):
        raise UserError(f"VOC data {directory}: difficult={difficult!r} must be ignore or object")
    written = _part_of(directory, "Annotations")
    stems = sorted(n.removesuffix(".xml") for n in list_folder(written) if n.endswith(".xml"))
    if not stems:
        raise UserError(f"VOC data {directory}: Annotations/ holds no xml file")
    wanted = _listed_stems(directory, split, set(stems)) if split else stems
    roots = {stem: read_xml(written / f"{stem}.xml", "VOC annotation", read_file) for stem in stems}
    names = {_class_of(o, stem) for stem, root in roots.items() for o in root.iter("object")}
    classes = VOC_CLASSES if names <= set(VOC_CLASSES) else sorted(names)
    ids = {n: i for i, n in enumerate(classes, 1)}
    folder = Path(image_folder) if image_folder else _part_of(directory, "JPEGImages")
    files = _images_by_stem(folder)
    painted = _part_of(directory, "SegmentationObject") if masks else directory
    images, annotations, maskless = [], [], []
    for stem in wanted:
        file = written / f"{stem}.xml"
        root = roots[stem]
        try:
            file_name = _file_of(root.findtext("filename") or "", stem, folder, files)
            height, width = (int(read_number(root.findtext(f"size/{k}") or 0)) for k in ("height", "width"))
            if (height < 1 or width < 1) and is_file(folder / file_name):
                height, width = image_header_size(folder / file_name)
            height, width = max(1, height), max(1, width)  # missing images are counted by the caller
            images.append({"id": stem, "file_name": file_name, "height": height, "width": width})
            drawn = painted / f"{stem}.png"
            numbers = _read_voc_numbers(drawn, height, width) if masks and is_file(drawn) else None
            for place, o in enumerate(root.iter("object"), 1):
                x1, y1, x2, y2 = (read_number(o.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
                hard = read_flag(o.findtext("difficult"))
                annotations.append({
                    "id": len(annotations) + 1, "image_id": stem, "category_id": ids[_class_of(o, stem)],
                    "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "area": (x2 - x1 + 1) * (y2 - y1 + 1),
                    "iscrowd": int(hard and difficult == "ignore"), "difficult": int(hard),
                })  # fmt: skip
                if numbers is not None:
                    mask = _voc_mask(numbers == place, (x1 - 1, y1 - 1, x2, y2))
                    annotations[-1] |= mask
                    maskless += [f"object {place} of {drawn}"] * (not mask)
        except Unusable as e:
            raise UserError(
                f"VOC annotation {file}: a number is missing from size or from an object's bndbox or difficult: "
                f"{e.detail} is not one"
            ) from None
    if maskless:
        logger.warning(f"VOC data {directory}: {len(maskless)} objects have no mask in their box, e.g. {maskless[0]}")
    categories = [{"id": i, "name": n} for n, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _listed_stems(directory: Path, split: str, stems: set[str]) -> list[str]:
    """The xml files' stems that a list of ImageSets names, one a line; lines of a class's list end with 1, -1 or 0."""
    listing = _part_of(directory, "ImageSets") / ("" if "/" in split else "Main") / f"{split}.txt"
    wanted = []
    for line in read_text(listing, "VOC data: image list", read_file).splitlines():
        line = line.strip()
        if not line:
            continue
        # Names may hold spaces, and some lists carry the files' suffixes.
        ways = [line, line.rpartition(" ")[0].strip(), line.split()[0]]
        ways += [os.path.splitext(way)[0] for way in ways]
        found = next((way for way in ways if way in stems), None)
        if found is None:
            raise UserError(f"VOC data {directory}: {listing.name} names '{line}', which has no xml file")
        wanted.append(found)
    return wanted


def _class_of(element: ElementTree.Element, stem: str) -> str:
    name = (element.findtext("name") or "").strip()
    if not name:
        raise UserError(f"VOC annotation {stem}.xml: an object has no name")
    return name


def _images_by_stem(folder: Path) -> dict[str, str]:
    """{stem: file name} of the images in the folder."""
    names = sorted(list_folder(folder), reverse=True) if is_folder(folder) else []
    return {os.path.splitext(n)[0]: n for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES}


def _file_of(given: str, stem: str, folder: Path, files: dict[str, str]) -> str:
    """The image of an xml file: its <filename> or the last part of that, with a suffix added if it has none; else the
    image with the xml file's name."""
    given = given.strip()
    plain = given.replace("\\", "/").rpartition("/")[2]
    for name in (given, plain):
        if name and "\0" not in name and is_file(folder / name):
            return name
    return files.get(plain) or files.get(stem) or plain or f"{stem}.jpg"


def _read_voc_numbers(path: Path, height: int, width: int) -> np.ndarray:
    """uint8 [H, W] of a segmentation image: 0 background, 255 border, else the object's place in the xml file.

    The image has VOC's palette, in which a number's bits go to red, green, blue, red, … in turn, filling each colour
    from its highest bit; or one channel, with the number itself.
    """
    image = decode_image(path, cv2.IMREAD_UNCHANGED, f"VOC segmentation {path}")
    if image.shape[:2] != (height, width):
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


def _part_of(directory: Path, name: str) -> Path:
    """A folder of the VOC folder, which may be an archive beside the others."""
    return find_folder(directory, [name]) or directory / name


def _voc_directory(directory: Path) -> Path:
    """The directory itself, or the only VOC folder in it or in its VOCdevkit/, or else in the archives there."""
    if find_folder(directory, ["Annotations"]):
        return directory

    def within(place: Path) -> list[Path]:
        inside = [f for f in (place, place / "VOCdevkit") if is_folder(f)]
        found = [folder / name for folder in inside for name in sorted(list_folder(folder))]
        # The only folder of an archive may be left out, so that one folder may be found twice.
        return list({str(p).replace("/VOCdevkit/", "/") if split_path(p) else p: p for p in found}.values())

    there = within(directory)
    archives = [p for p in there if split_path(p) == (str(p), "")]
    inside = [p for p in there if p not in archives and is_folder(p / "Annotations")]
    if not inside:
        inside = [p for a in archives for p in (a, *within(a)) if is_folder(p / "Annotations")]
    if len(inside) != 1:
        found = f"several: {', '.join(map(str, inside))}; name one" if inside else "no Annotations/ folder"
        raise UserError(f"VOC data {directory}: {found}")
    return inside[0]


def read_voc_detections(folder: str | Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """VOC result files <anything>_<class>.txt (image id, confidence, xmin, ymin, xmax, ymax a line) as COCO results."""
    names = {str(category["name"]): category["id"] for category in content["categories"]}
    ids = {str(image["id"]): image["id"] for image in content["images"]}
    results = []
    for path in sorted(Path(folder).iterdir()):
        # Of several class names that a file's name ends with, such as "cup" and "big_cup", the longest is meant.
        stem = path.name.removesuffix(".txt")
        fits = [n for n in names if stem == n or stem.endswith(f"_{n}")] if path.name.endswith(".txt") else []
        if not fits or not path.is_file():
            continue
        category_id = names[max(fits, key=len)]
        for number, line in enumerate(read_text(path, "detections").splitlines(), 1):
            if not line.strip():
                continue
            words = line.rsplit(maxsplit=5)
            try:
                score, x1, y1, x2, y2 = map(read_number, words[1:])
            except ValueError:
                raise UserError(f"detections {path}, line {number}: not 'image score x1 y1 x2 y2'") from None
            if words[0] not in ids:
                raise UserError(f"detections {path}, line {number}: image {words[0]} is not among the annotations")
            results.append({
                "image_id": ids[words[0]], "category_id": category_id, "score": score,
                "bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1],
            })  # fmt: skip
    if not results:
        raise UserError(f"detections: {folder} holds no file *_<class>.txt with a detection")
    return results
