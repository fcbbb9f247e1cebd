"""Annotations of labelling programs in COCO's form: CVAT, LabelMe, YOLO, VIA, Supervisely, and COCO itself.

Every reader returns the content of a COCO json and a count of what it left out, by reason. Coordinates are continuous
pixels, as in COCO. An outline with holes becomes one ring that runs to each hole and back; masks become RLE. Parts that
the labelling program groups (CVAT's group_id, LabelMe's group_id) become one object.
"""

import base64
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from common import UserError, read_json, read_text
from utils.archives import is_file, is_folder, read_file, walk_files
from utils.coco_format import Unusable, as_truth, read_document, read_file_name, read_flag, read_number
from utils.image_header import IMAGE_SUFFIXES, decode_bytes, header_sizes
from utils.plain_xml import read_xml
from utils.polygons import encode_part, encode_segmentation, join_rings, signed_area

__all__ = ["LEFT_OUT", "READERS", "Labels", "detect_format", "read_labels", "read_via"]

LEFT_OUT = {
    "label": "object without a class name",
    "class": "class number that has no name",
    "shape": "shape that is neither a box nor an outline",
    "number": "a coordinate is not a finite number",
    "points": "outline of fewer than three points",
    "mask": "mask that cannot be read or does not fit its image",
    "attributes": "region without exactly one class",
    "entry": "object that is not in the form of this format",
    "image": "annotations without an image",
    "size": "image whose size is not known: its file is missing or broken",
    "category": "class that only groups the others",
}
MOST_MASK_PIXELS = 1 << 26  # of one object's box


class Labels(NamedTuple):
    """What was read."""

    content: dict[str, Any]  # images, annotations, categories
    left_out: Counter  # {key of LEFT_OUT: how many}
    examples: dict[str, str]  # {key of LEFT_OUT: where the first was}


class _Skip(ValueError):
    """An object that must be left out; the arguments are the key of LEFT_OUT and what was found."""


class _Image(NamedTuple):
    id: int
    height: int
    width: int
    name: str


class _Collector:
    """Builds COCO content from images and objects with class names."""

    def __init__(self, what: str, names: Sequence[str] = ()):
        """names: the classes in the order of their ids; others that occur follow in the order of their names."""
        self.what, self.names = what, list(dict.fromkeys(names))
        self.images: dict[str, dict[str, Any]] = {}
        self.objects: list[tuple[str, dict[str, Any]]] = []
        self.left_out: Counter = Counter()
        self.examples: dict[str, str] = {}

    def add_image(self, name: Any, height: Any, width: Any) -> _Image:
        name = read_file_name(name, self.what)
        sides = []
        for side in (height, width):
            try:
                number = read_number(side)
            except Unusable:
                number = 0.0
            if number < 1 or number % 1 or number > 1 << 31:
                raise UserError(f"{self.what}: image {name!r}: height and width must be whole numbers, not {side!r}")
            sides.append(int(number))
        if name in self.images:
            raise UserError(f"{self.what}: image {name!r} is listed twice")
        number = len(self.images) + 1
        self.images[name] = {"id": number, "file_name": name, "height": sides[0], "width": sides[1]}
        return _Image(number, sides[0], sides[1], name)

    def leave_out(self, reason: str, where: str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, where[:200])

    def read(self, image: _Image, one: Callable[[], None], place: Any) -> None:
        """Runs one(), which adds an object; an object that cannot be used is counted instead."""
        try:
            one()
        except _Skip as e:
            self.leave_out(str(e.args[0]), f"{image.name}, object {place}: {e.args[1]}")
        except Unusable as e:
            self.leave_out("number", f"{image.name}, object {place}: {e.detail}")

    def add(
        self, image: _Image, label: str, box: Sequence[float] | None = None, rings: Sequence[np.ndarray] = (),
        masks: Sequence[dict[str, Any]] = (), crowd: bool = False,
    ) -> None:  # fmt: skip
        """box: x1 y1 x2 y2; rings: outer outlines float [k, 2]; masks: RLEs of the whole image."""
        entry: dict[str, Any] = {"image_id": image.id, "iscrowd": int(crowd)}
        if masks:
            parts = [ring.ravel().tolist() for ring in rings] + list(masks)
            rle = encode_segmentation(parts, image.height, image.width) if len(parts) > 1 else parts[0]
            counts = rle["counts"]
            text = counts.decode() if isinstance(counts, bytes) else counts
            entry["segmentation"] = {"size": [image.height, image.width], "counts": text}
            entry["bbox"], entry["area"] = coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))
        elif rings:
            points = np.concatenate(rings)
            (x1, y1), (x2, y2) = points.min(0).tolist(), points.max(0).tolist()
            entry["segmentation"] = [ring.ravel().tolist() for ring in rings]
            entry["bbox"], entry["area"] = [x1, y1, x2 - x1, y2 - y1], sum(abs(signed_area(r)) for r in rings)
        else:
            x1, y1, x2, y2 = box
            x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
            entry["bbox"], entry["area"] = [x1, y1, x2 - x1, y2 - y1], (x2 - x1) * (y2 - y1)
        self.objects.append((label, entry))

    def labels(self) -> Labels:
        found = {label for label, _ in self.objects}
        names = [*self.names, *sorted(found - set(self.names))]
        ids = {name: i for i, name in enumerate(names, 1)}
        annotations = [{"id": n, "category_id": ids[label], **e} for n, (label, e) in enumerate(self.objects, 1)]
        content = {
            "images": list(self.images.values()), "annotations": annotations,
            "categories": [{"id": i, "name": name} for name, i in ids.items()],
        }  # fmt: skip
        return Labels(content, self.left_out, self.examples)


# ------------------------------------------------------------------------------------------------ values
def _name(value: Any) -> str:
    if type(value) is int or type(value) is float:
        value = str(value)
    if type(value) is not str or not value:
        raise _Skip("label", repr(value)[:60])
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Skip("label", repr(value)[:60]) from None
    return value


def _ring(points: Any) -> np.ndarray:
    """float64 [k, 2] of [[x, y], …]."""
    if type(points) is not list or not all(type(p) is list and len(p) == 2 for p in points):
        raise _Skip("entry", repr(points)[:60])
    if len(points) < 3:
        raise _Skip("points", f"{len(points)} points")
    return np.array([[read_number(v) for v in p] for p in points], np.float64)


def _ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> np.ndarray:
    """A polygon at most a quarter of a pixel off; `angle` in radians, clockwise on the screen."""
    largest = max(rx, ry)
    if min(rx, ry) <= 0:
        raise _Skip("points", f"radii {rx:g} and {ry:g}")
    count = min(360, max(12, math.ceil(math.pi / math.acos(max(-1.0, 1 - 0.25 / max(largest, 0.25))))))
    t = np.arange(count) * (2 * math.pi / count)
    across, down = rx * np.cos(t), ry * np.sin(t)
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.stack([x + across * cosine - down * sine, y + across * sine + down * cosine], 1)


def _turned(x1: float, y1: float, x2: float, y2: float, degrees: float) -> np.ndarray:
    """The corners of a box turned clockwise around its centre."""
    centre = np.array([x1 + x2, y1 + y2]) / 2
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]]) - centre
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return corners @ np.array([[cosine, sine], [-sine, cosine]]) + centre


def _placed(mask: np.ndarray, left: int, top: int, image: _Image) -> dict[str, Any]:
    """The RLE of a mask whose corner is at (left, top); what reaches beyond the image is cut off."""
    y1, x1 = max(0, -top), max(0, -left)
    mask = mask[y1 : max(y1, image.height - top), x1 : max(x1, image.width - left)]
    if not mask.any():
        raise _Skip("mask", "no pixel inside the image")
    return encode_part(mask, left + x1, top + y1, image.height, image.width)


def _png_mask(data: Any, packed: bool) -> np.ndarray:
    """bool [h, w] of a PNG in base64; packed: compressed by zlib before that."""
    if type(data) is not str:
        raise _Skip("mask", repr(data)[:60])
    try:
        content = base64.b64decode(data, validate=True)
        if packed:
            # A PNG hardly shrinks, so one that grows much is not a mask.
            limit = 64 * len(content) + (1 << 20)
            inflater = zlib.decompressobj()
            content = inflater.decompress(content, limit)
            if inflater.unconsumed_tail:
                raise _Skip("mask", "its compressed PNG expands too far")
        header = content[16:24]
        width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
        if not content.startswith(b"\x89PNG\r\n\x1a\n") or not 0 < width * height <= MOST_MASK_PIXELS:
            raise _Skip("mask", f"not a PNG of at most {MOST_MASK_PIXELS} pixels")
        image = decode_bytes(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED, "mask")
    except (ValueError, zlib.error, UserError) as e:
        if isinstance(e, _Skip):
            raise
        raise _Skip("mask", str(e)) from None
    if image.ndim == 3:
        image = image[:, :, 3] if image.shape[2] == 4 else image.any(2)
    return image > 0


def _listed(value: Any, what: str) -> list:
    if type(value) is not list:
        raise UserError(f"{what} must be a list, not {repr(value)[:60]}")
    return value


def _object(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise UserError(f"{what} must be an object, not {repr(value)[:60]}")
    return value


def _image_files(folder: Path) -> list[str]:
    """Names of the images in a folder and its subfolders, relative to it, sorted."""
    return sorted(n for n in walk_files(folder) if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES)


def _sizes(folder: Path | None, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (height, width)} of the images that can be read."""

    def one(name: str) -> list[tuple[int, int]]:
        try:
            return header_sizes([os.path.join(folder, name)]).tolist()
        except UserError:
            return []

    try:
        files = [os.path.join(folder, n) for n in names] if folder else []
        return {n: (h, w) for n, (h, w) in zip(names, header_sizes(files).tolist())}
    except UserError:  # one of them is missing or broken
        return {n: (size[0][0], size[0][1]) for n in names if (size := one(n))}


# ------------------------------------------------------------------------------------------------ the formats
def read_cvat(path: Path, images: Path | None = None, names: Sequence[str] = ()) -> Labels:
    """CVAT for images 1.1: boxes (also turned), polygons, ellipses and masks; its other shapes are left out."""
    what = f"CVAT annotations {path}"
    root = read_xml(path, "CVAT annotations")
    if root.tag != "annotations":
        raise UserError(f"{what}: not CVAT's format: its first element is <{root.tag[:60]}>, not <annotations>")
    if root.find("track") is not None:
        raise UserError(f"{what}: tracks are CVAT for video; export it again as 'CVAT for images 1.1'")
    listed = [e.text or "" for e in root.findall("meta//labels/label/name")]
    out = _Collector(what, names or [n for n in listed if n])
    for element in root.findall("image"):
        image = out.add_image(element.get("name"), element.get("height"), element.get("width"))
        groups: dict[tuple[str, str], list[tuple]] = {}
        for place, shape in enumerate(element, 1):

            def one(shape: Element = shape, place: int = place, image: _Image = image, groups: dict = groups) -> None:
                label = _name(shape.get("label"))
                found = _cvat_shape(shape, image)
                group = shape.get("group_id") or "0"
                key = (group, label) if group != "0" and found[0] is None else ("", str(place))
                groups.setdefault(key, []).append((label, found))

            if shape.tag != "tag":  # a tag is of the whole image
                out.read(image, one, place)
        for members in groups.values():
            boxes, rings, masks = zip(*(found for _, found in members))
            out.add(image, members[0][0], boxes[0], sum(rings, []), sum(masks, []))
    return out.labels()


def _cvat_shape(shape: Element, image: _Image) -> tuple[list[float] | None, list[np.ndarray], list[dict]]:
    """(box, rings, masks) of an element; only one of them is not empty."""

    def numbers(*keys: str) -> list[float]:
        return [read_number(shape.get(k)) for k in keys]

    turn = read_number(shape.get("rotation") or 0)
    if shape.tag == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        return (None, [_turned(left, top, right, bottom, turn)], []) if turn else ([left, top, right, bottom], [], [])
    if shape.tag == "polygon":
        points = [p.split(",") for p in (shape.get("points") or "").split(";")]
        return None, [_ring(points)], []
    if shape.tag == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        return None, [_ellipse(x, y, rx, ry, math.radians(turn))], []
    if shape.tag == "mask":
        left, top, width, height = (int(v) for v in numbers("left", "top", "width", "height"))
        try:
            runs = np.array([int(v) for v in (shape.get("rle") or "").split(",")], np.int64)
        except (ValueError, OverflowError):
            raise _Skip("mask", "its run lengths are not whole numbers") from None
        most = min(width, image.width) * min(height, image.height)
        if not 0 < width * height == most <= MOST_MASK_PIXELS or (runs < 0).any() or (runs > most).any():
            raise _Skip("mask", f"{width}x{height} pixels in an image of {image.width}x{image.height}")
        if runs.sum() != most:
            raise _Skip("mask", "its run lengths do not fill its box")
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
        return None, [], [_placed(mask, left, top, image)]
    raise _Skip("shape", shape.tag[:60])


def read_labelme(path: Path, images: Path | None = None, names: Sequence[str] = ()) -> Labels:
    """LabelMe: a folder with a json for each image: polygons, rectangles, circles and masks."""
    what = f"LabelMe annotations {path}"
    files = sorted(p for p in path.rglob("*.json")) if path.is_dir() else [path]
    folder, root = images or (path if path.is_dir() else path.parent), path if path.is_dir() else path.parent
    out = _Collector(what, names)
    read: list[tuple[Path, dict[str, Any], str]] = []
    for file in files:
        content = read_json(file, "LabelMe file")
        if type(content) is not dict or "shapes" not in content:
            if path.is_dir():
                out.leave_out("entry", f"{file}: not a LabelMe file")
                continue
            raise UserError(f"LabelMe file {file}: not in LabelMe's format: it has no 'shapes'")
        read.append((file, content, _labelme_image(content.get("imagePath"), file, root, folder)))
    unsized = [name for _, c, name in read if not (c.get("imageHeight") and c.get("imageWidth"))]
    sizes = _sizes(folder, unsized)
    for file, content, name in read:
        size = content.get("imageHeight"), content.get("imageWidth")
        if not all(size):
            if name not in sizes:
                out.leave_out("size", str(file))
                continue
            size = sizes[name]
        image = out.add_image(name, *size)
        groups: dict[Any, list[tuple]] = {}
        for place, shape in enumerate(_listed(content["shapes"], f"LabelMe file {file}: 'shapes'"), 1):

            def one(shape: Any = shape, place: int = place, image: _Image = image, groups: dict = groups) -> None:
                if type(shape) is not dict:
                    raise _Skip("entry", repr(shape)[:60])
                label = _name(shape.get("label"))
                found = _labelme_shape(shape, image)
                group = shape.get("group_id")
                flags = shape.get("flags")
                crowd = read_flag(flags.get("iscrowd")) if type(flags) is dict else False
                grouped = type(group) in (int, str) and found[0] is None
                groups.setdefault((group, label) if grouped else place, []).append((label, found, crowd))

            out.read(image, one, place)
        for members in groups.values():
            boxes, rings, masks = zip(*(found for _, found, _ in members))
            out.add(image, members[0][0], boxes[0], sum(rings, []), sum(masks, []), any(c for *_, c in members))
    return out.labels()


def _labelme_image(given: Any, file: Path, root: Path, folder: Path) -> str:
    """The image's name relative to `folder`: where imagePath says, else beside the json, by its last part."""
    plain = given.replace("\\", "/") if type(given) is str else ""
    last = os.path.basename(plain) or f"{file.stem}.jpg"
    beside = os.path.relpath(file.parent, root)
    for candidate in (file.parent / plain, folder / beside / last, folder / last):
        relative = os.path.relpath(candidate, folder)
        if plain and "\0" not in plain and not relative.startswith("..") and is_file(candidate):
            return relative
    return os.path.normpath(os.path.join(beside, last))


def _labelme_shape(shape: dict, image: _Image) -> tuple[list[float] | None, list[np.ndarray], list[dict]]:
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind == "polygon":
        return None, [_ring(points)], []
    if kind not in ("rectangle", "circle", "mask"):
        raise _Skip("shape", repr(kind)[:60])
    if type(points) is not list or len(points) != 2 or not all(type(p) is list and len(p) == 2 for p in points):
        raise _Skip("entry", f"{kind} with points {repr(points)[:60]}")
    (x1, y1), (x2, y2) = ([read_number(v) for v in p] for p in points)
    if kind == "rectangle":
        return [x1, y1, x2, y2], [], []
    if kind == "circle":
        radius = math.hypot(x2 - x1, y2 - y1)
        return None, [_ellipse(x1, y1, radius, radius)], []
    if max(abs(x1), abs(y1)) > 1 << 31:
        raise _Skip("mask", f"at {x1:g}, {y1:g}")
    return None, [], [_placed(_png_mask(shape.get("mask"), packed=False), round(x1), round(y1), image)]


def read_yolo(path: Path, images: Path | None = None, names: Sequence[str] = ()) -> Labels:
    """YOLO: labels/**/*.txt beside images/**, and class names in data.yaml or classes.txt; boxes and segments.

    path: the folder that holds both, or the folder of the label files with `images` given.
    """
    what = f"YOLO labels {path}"
    if not path.is_dir():
        raise UserError(f"{what}: give the folder that holds labels/ and images/")
    labels = path / "labels" if (path / "labels").is_dir() else path
    folder = images or (path / "images" if (path / "images").is_dir() else path)
    names = list(names) or _yolo_names(path)
    files = _image_files(folder)
    sizes = _sizes(folder, files)
    texts = {os.path.relpath(p, labels) for p in labels.rglob("*.txt")}
    texts -= {n for n in texts if os.path.basename(n) in ("classes.txt", "obj.names", "train.txt", "val.txt")}
    out = _Collector(what, names)
    for name in files:
        text = os.path.splitext(name)[0] + ".txt"
        if name not in sizes:
            out.leave_out("size", name)
            texts.discard(text)
            continue
        image = out.add_image(name, *sizes[name])
        if text not in texts:
            continue
        texts.discard(text)
        for number, line in enumerate(read_text(labels / text, "YOLO labels").splitlines(), 1):

            def one(line: str = line, image: _Image = image) -> None:
                words = line.split()
                which = read_number(words[0])
                if which % 1 or not 0 <= which < len(names):
                    raise _Skip("class", words[0][:60])
                numbers = [read_number(w) for w in words[1:]]
                scale = [image.width, image.height]
                if len(numbers) in (4, 5):  # the fifth is a score
                    x, y, w, h = (v * s for v, s in zip(numbers, scale * 2))
                    out.add(image, names[int(which)], [x - w / 2, y - h / 2, x + w / 2, y + h / 2])
                elif len(numbers) < 6 or len(numbers) % 2:
                    raise _Skip("points", f"{len(numbers)} numbers")
                else:
                    out.add(image, names[int(which)], rings=[np.reshape(numbers, (-1, 2)) * scale])

            if line.strip():
                out.read(image, one, number)
    for text in sorted(texts):
        out.leave_out("image", text)
    return out.labels()


def _yolo_names(path: Path) -> list[str]:
    """The class names of data.yaml (or another .yaml with names), classes.txt or obj.names, here or one folder up."""
    for folder in (path, path.resolve().parent):
        for file in [folder / "data.yaml", *sorted(folder.glob("*.yaml")), *sorted(folder.glob("*.yml"))]:
            if file.is_file() and (names := _yaml_names(read_text(file, "YOLO classes"), str(file))):
                return names
        for file in (folder / "classes.txt", folder / "obj.names", path / "labels" / "classes.txt"):
            if file.is_file():
                lines = read_text(file, "YOLO classes").splitlines()
                return [line.strip() for line in lines if line.strip()]
    raise UserError(f"YOLO labels {path}: no class names: neither data.yaml nor classes.txt; give a file by --classes")


def _yaml_names(text: str, origin: str) -> list[str]:
    """The entry `names` of a data.yaml: a list in one line, a list of lines, or lines 'number: name'. [] for none.

    This reads what YOLO's tools write, not all of YAML.
    """
    match = re.search(r"^names[ \t]*:[ \t]*(.*(?:\n(?:[ \t#-].*)?)*)", text, re.M)
    if not match:
        return []
    first, *lines = match[1].split("\n")
    inline = re.match(r"\[.*?\][ \t]*(#.*)?$", "\n".join([first, *lines]).strip(), re.S)
    try:
        if first.strip().startswith(("[", "{")):
            if not inline:
                raise ValueError(first[:60])
            return [_yaml_text(v) for v in _yaml_items(inline[0][1 : inline[0].rindex("]")])]
        names: dict[int, str] = {}
        for line in lines:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            listed = re.match(r"[ \t]*-[ \t]+(.*)", line)
            numbered = re.match(r"[ \t]+['\"]?(\d{1,9})['\"]?[ \t]*:[ \t]+(.*)", line)
            if listed:
                names[len(names)] = _yaml_text(listed[1])
            elif numbered:
                names[int(numbered[1])] = _yaml_text(numbered[2])
            else:
                raise ValueError(line[:60])
        if sorted(names) != list(range(len(names))):
            raise ValueError("the numbers are not 0, 1, 2, …")
    except ValueError as e:
        raise UserError(f"YOLO classes {origin}: 'names' cannot be read: {e}; give a file by --classes") from None
    return [names[i] for i in range(len(names))]


def _yaml_items(text: str) -> list[str]:
    """The entries of a list in one line; commas inside of quotes belong to an entry."""
    items = re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^,'"\[\]{}]*[^,\s'"\[\]{}])\s*(?:,|$)""", text)
    if not items and text.strip():
        raise ValueError(text[:60])
    return items


def _yaml_text(text: str) -> str:
    text = text.strip()
    if text.startswith('"'):
        end = re.match(r'"(?:[^"\\]|\\.)*"', text)
        if not end:
            raise ValueError(text[:60])
        return json.loads(end[0], strict=False)
    if text.startswith("'"):
        end = re.match(r"'(?:[^']|'')*'", text)
        if not end:
            raise ValueError(text[:60])
        return end[0][1:-1].replace("''", "'")
    return re.sub(r"(^|\s)#.*", "", text).strip()


def read_via(
    path: Path, images: Path | None = None, names: Sequence[str] = (), attribute: str = "", one_class: str = ""
) -> Labels:
    """VGG Image Annotator, versions 1 and 2: annotations or a project as json; regions are rectangles, polygons,
    circles and ellipses.

    Args:
        images: the folder of the images, whose sizes VIA does not store; the json's own if not given.
        attribute: the region attribute that holds the class; found by its name or because it is the only one, if empty.
        one_class: the class of every region, for sets whose regions have no attributes.
    """
    what = f"VIA annotations {path}"
    content = _object(read_json(path, "VIA annotations", read_file), what)
    entries = _object(content.get("_via_img_metadata", content), what)
    folder = images or path.parent
    used: dict[str, list[Any]] = {}
    for key, entry in entries.items():
        if type(entry) is not dict or "filename" not in entry or "regions" not in entry:
            raise UserError(f"{what}: not VIA's format: entry {key[:60]!r} has no 'filename' and 'regions'")
        regions = entry["regions"]
        regions = list(regions.values()) if type(regions) is dict else regions
        name = read_file_name(entry["filename"], what)
        used.setdefault(name, []).extend(_listed(regions, f"{what}: regions of {key[:60]!r}"))
    attribute = attribute or ("" if one_class else _via_attribute(used, what))
    sizes = _sizes(folder, list(used))
    out = _Collector(what, names or ([one_class] if one_class else []))
    for name, regions in used.items():
        if name not in sizes:
            out.leave_out("size", name)
            continue
        image = out.add_image(name, *sizes[name])
        for place, region in enumerate(regions, 1):

            def one(region: Any = region, image: _Image = image) -> None:
                parts = (
                    (region.get("shape_attributes"), region.get("region_attributes")) if type(region) is dict else ()
                )
                if not parts or type(parts[0]) is not dict:
                    raise _Skip("entry", repr(region)[:60])
                label = one_class or _via_class(parts[1], attribute)
                box, rings = _via_shape(parts[0])
                out.add(image, label, box, rings)

            out.read(image, one, place)
    return out.labels()


def _via_attribute(used: dict[str, list[Any]], what: str) -> str:
    attributes = [r.get("region_attributes") for regions in used.values() for r in regions if type(r) is dict]
    keys = {key for a in attributes if type(a) is dict for key in a}
    usual = [k for k in ("class", "label", "name", "type", "category", "object") if k in keys]
    if len(keys) > 1 and not usual:
        listed = ", ".join(sorted(map(repr, keys))[:5])
        raise UserError(f"{what}: which region attribute holds the class? Name one by --attribute: {listed}")
    if not keys and any(used.values()):
        raise UserError(f"{what}: its regions have no attributes; name the class of all of them by --class")
    return usual[0] if usual else next(iter(keys), "")


def _via_class(attributes: Any, key: str) -> str:
    value = attributes.get(key) if type(attributes) is dict else None
    if type(value) is dict:  # check boxes
        chosen = [name for name, on in value.items() if on is True]
        if len(chosen) != 1:
            raise _Skip("attributes", repr(value)[:60])
        value = chosen[0]
    return _name(value)


def _via_shape(shape: dict) -> tuple[list[float] | None, list[np.ndarray]]:
    def numbers(*keys: str) -> list[float]:
        return [read_number(shape.get(k)) for k in keys]

    kind = shape.get("name")
    if kind == "rect":
        x, y, w, h = numbers("x", "y", "width", "height")
        return [x, y, x + w, y + h], []
    if kind in ("polygon", "polyline"):
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if type(xs) is not list or type(ys) is not list or len(xs) != len(ys):
            raise _Skip("entry", f"{kind} without two lists of points")
        if kind == "polyline" and (len(xs) < 4 or (xs[0], ys[0]) != (xs[-1], ys[-1])):
            raise _Skip("shape", "an open line")
        return None, [_ring([list(p) for p in zip(xs, ys)])]
    if kind == "circle":
        x, y, radius = numbers("cx", "cy", "r")
        return None, [_ellipse(x, y, radius, radius)]
    if kind == "ellipse":
        x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
        return None, [_ellipse(x, y, rx, ry, read_number(shape.get("theta") or 0))]
    raise _Skip("shape", repr(kind)[:60])


def read_supervisely(path: Path, images: Path | None = None, names: Sequence[str] = ()) -> Labels:
    """Supervisely: a project (meta.json and data sets), a data set, or its folder ann; polygons with holes, rectangles
    and bitmaps. Images are named as their files in img/, with the data set's name in front if there are several."""
    what = f"Supervisely annotations {path}"
    files = sorted(p for p in path.rglob("*.json") if p.parent.name == "ann" or path.name == "ann")
    if not files:
        raise UserError(f"{what}: no folder ann/ with json files")
    meta = next((m for m in (path / "meta.json", path.parent / "meta.json", path.parent.parent / "meta.json")
                 if m.is_file()), None)  # fmt: skip
    if meta and not names:
        classes = _object(read_json(meta, "Supervisely classes"), f"Supervisely classes {meta}").get("classes")
        names = [c["title"] for c in classes or [] if type(c) is dict and type(c.get("title")) is str and c["title"]]
    several = len({p.parent for p in files}) > 1
    out = _Collector(what, names)
    for file in files:
        content = _object(read_json(file, "Supervisely file"), f"Supervisely file {file}")
        size = _object(content.get("size"), f"Supervisely file {file}: 'size'")
        name = file.name.removesuffix(".json")
        if images is None or not is_file(images / name):
            name = os.path.join(file.parent.parent.name, "img", name) if several else name
        image = out.add_image(name, size.get("height"), size.get("width"))
        for place, entry in enumerate(_listed(content.get("objects"), f"Supervisely file {file}: 'objects'"), 1):

            def one(entry: Any = entry, image: _Image = image) -> None:
                if type(entry) is not dict:
                    raise _Skip("entry", repr(entry)[:60])
                out.add(image, _name(entry.get("classTitle")), *_supervisely_shape(entry, image))

            out.read(image, one, place)
    return out.labels()


def _supervisely_shape(entry: dict, image: _Image) -> tuple[list[float] | None, list[np.ndarray], list[dict]]:
    kind, points, bitmap = entry.get("geometryType"), entry.get("points"), entry.get("bitmap")
    if kind is None:  # older exports
        kind = "bitmap" if type(bitmap) is dict else "polygon"
    if kind == "bitmap":
        origin = bitmap.get("origin") if type(bitmap) is dict else None
        if type(origin) is not list or len(origin) != 2:
            raise _Skip("entry", repr(bitmap)[:60])
        left, top = (read_number(v) for v in origin)
        if max(abs(left), abs(top)) > 1 << 31:
            raise _Skip("mask", f"at {left:g}, {top:g}")
        return None, [], [_placed(_png_mask(bitmap.get("data"), packed=True), round(left), round(top), image)]
    if kind not in ("polygon", "rectangle"):
        raise _Skip("shape", repr(kind)[:60])
    exterior = points.get("exterior") if type(points) is dict else None
    if kind == "rectangle":
        corners = exterior if type(exterior) is list and len(exterior) == 2 else []
        if not corners or not all(type(p) is list and len(p) == 2 for p in corners):
            raise _Skip("entry", repr(points)[:60])
        return [read_number(v) for p in corners for v in p], [], []
    outer = _ring(exterior)
    holes = [_ring(hole) for hole in _inner(points.get("interior"))]
    return None, [join_rings(outer, holes)], []


def _inner(interior: Any) -> list:
    if interior in (None, []):
        return []
    if type(interior) is not list:
        raise _Skip("entry", repr(interior)[:60])
    return interior


def read_coco(path: Path, images: Path | None = None, names: Sequence[str] = ()) -> Labels:
    """COCO's own format, also as Roboflow exports it, where a class that only groups the others is left out."""
    if path.is_dir():
        path = path / "_annotations.coco.json"
    raw = read_document(path)
    content = as_truth(raw, f"annotation file {path}", need_size=True)
    left_out, examples = Counter(), {}
    if missing := len(raw["annotations"]) - len(content["annotations"]):
        left_out["entry"], examples["entry"] = missing, "see the warning above"
    used = {a["category_id"] for a in content["annotations"]}
    above = {c.get("supercategory") for c in content["categories"]}
    grouping = [
        c for c in content["categories"]
        if c["id"] not in used and c["name"] in above and c.get("supercategory") in (None, "", "none")
    ]  # fmt: skip
    # Roboflow puts one such class in front of all others.
    if len(grouping) == 1 and all(c.get("supercategory") == grouping[0]["name"] or c is grouping[0]
                                  for c in content["categories"]):  # fmt: skip
        left_out["category"], examples["category"] = 1, grouping[0]["name"]
        content["categories"] = [c for c in content["categories"] if c is not grouping[0]]
    return Labels(content, left_out, examples)


READERS: dict[str, Callable[..., Labels]] = {
    "coco": read_coco,
    "cvat": read_cvat,
    "labelme": read_labelme,
    "roboflow": read_coco,
    "supervisely": read_supervisely,
    "via": read_via,
    "yolo": read_yolo,
}


# ------------------------------------------------------------------------------------------------ any of them
def read_labels(
    path: str | os.PathLike, form: str = "", images: str | os.PathLike | None = None, names: Sequence[str] = (),
    **options: str,
) -> Labels:  # fmt: skip
    """Annotations in COCO's form; form: a name of READERS, found by `detect_format` if empty.

    images: the folder with the images, for formats that do not store sizes. options: those of `read_via`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"annotations {path} do not exist")
    form = form or detect_format(path)
    if images is not None and not is_folder(images):
        raise UserError(f"--images {images} is not a folder")
    given = {key: value for key, value in options.items() if value}
    if given and form != "via":
        raise UserError(f"--{next(iter(given)).replace('one_class', 'class')} is an option of VIA annotations only")
    return READERS[form](path, Path(images) if images is not None else None, names, **given)


def detect_format(path: Path) -> str:
    """The name in READERS of the format of a file or folder, by what it holds."""
    if path.is_dir():
        if (path / "_annotations.coco.json").is_file():
            return "roboflow"
        first = next(iter(sorted(path.rglob("*.json"))), None)
        if first is not None and (path.name == "ann" or any(p.parent.name == "ann" for p in path.rglob("*.json"))):
            return "supervisely"
        if next(path.rglob("*.txt"), None) is not None and first is None:
            return "yolo"
        if first is not None:
            return "labelme"
        raise UserError(f"{path}: no annotations found: no json, txt or xml of a known format; name it by --from")
    if path.suffix.lower() == ".xml":
        return "cvat"
    content = read_json(path, "annotations")
    if type(content) is dict:
        if "shapes" in content:
            return "labelme"
        if "images" in content or "annotations" in content:
            return "coco"
        entries = content.get("_via_img_metadata", content)
        if type(entries) is dict and all(type(e) is dict and "filename" in e for e in entries.values()):
            return "via"
    raise UserError(f"{path}: the format is not known; name it by --from: {', '.join(READERS)}")
