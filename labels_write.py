"""Annotations in COCO's form as files of labelling programs: COCO, CVAT for images 1.1, LabelMe and YOLO.

Polygons of these programs have neither holes nor parts: a hole is reached by a bridge without width, parts become
polygons of one group (YOLO: of one line, by bridges as well). `labels_read` reads the files back.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np

from common import UserError, atomic_write
from utils.polygons import (
    encode_segmentation,
    join_rings,
    nest_rings,
    orient_outer,
    rle_to_rings,
    simplify_ring,
)

__all__ = ["LOST", "WRITERS", "Outlines", "simplified", "write_labels"]

# What a format cannot hold.
LOST = {
    "crowd": "crowd region, which this format cannot hold",
    "keypoints": "object whose keypoints this format cannot hold (its box or outline is written)",
    "small": "part of an outline smaller than the tolerance",
    "box": "outline of no area, written as a box",
}


class Outlines(NamedTuple):
    """How outlines are written."""

    tolerance: float = 1.0  # pixels that a polygon may be away from the outline; 0: every vertex
    boxes_only: bool = False


def write_labels(content: dict[str, Any], form: str, output: str | os.PathLike, outlines: Outlines,
                 images: str | os.PathLike = "", overwrite: bool = False) -> tuple[list[Path], Counter]:  # fmt: skip
    """Writes content, as `coco_format.as_truth` gives it, into the folder `output`.

    form: a name in WRITERS. images: the folder that the images' names are relative to. -> files, what was lost
    {key of LOST: number}. Files that exist are never replaced without `overwrite`: a person may have corrected them.
    """
    names = [c["name"] for c in content["categories"]]
    twice = [n for n, count in Counter(names).items() if count > 1]
    if twice and form != "coco":
        raise UserError(f"two classes are named '{twice[0]}', which {form} files cannot tell apart; rename one")
    files, lost = WRITERS[form](content, Path(output), outlines, os.fspath(images))
    if not overwrite:
        there = [path for path, _ in files if path.exists()]
        if there:
            raise UserError(
                f"{there[0]} exists already and may hold corrections; choose another folder, or replace it with "
                "--overwrite"
            )
    for path, text in files:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{path}: a name holds {ascii(e.object[e.start])}, which no text file can hold") from None
        with atomic_write(path, "wb", durable=len(files) < 100) as f:
            f.write(encoded)
    return [path for path, _ in files], lost


# ------------------------------------------------------------------------------------------------ outlines
def _polygons(a: dict[str, Any], image: dict[str, Any], outlines: Outlines, lost: Counter) -> list[np.ndarray]:
    """The object's parts, each one ring [k, 2] with bridges to its holes; [] for a box."""
    if outlines.boxes_only or not a["segmentation"]:
        return []
    height, width = image["height"], image["width"]
    segmentation = a["segmentation"]
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if any(isinstance(p, dict) for p in parts):
        rle = encode_segmentation(segmentation, height, width) if len(parts) > 1 else parts[0]
        rings = rle_to_rings(rle, height, width)
    else:
        rings = [orient_outer(np.reshape(p, (-1, 2)).astype(np.float64)) for p in parts]
    simple = [simplify_ring(ring, outlines.tolerance) for ring in rings]
    lost["small"] += sum(len(ring) == 0 for ring in simple)
    simple = [ring for ring in simple if len(ring)]
    nested = nest_rings(simple) if any(isinstance(p, dict) for p in parts) else [(ring, []) for ring in simple]
    joined = [join_rings(outer, holes) for outer, holes in nested]
    lost["box"] += not joined
    return joined


class _Object(NamedTuple):
    name: str
    box: list[float]  # x y width height
    polygons: list[np.ndarray]
    crowd: bool
    score: float | None


def _images(
    content: dict[str, Any], outlines: Outlines, lost: Counter, crowds: bool
) -> Iterator[tuple[dict[str, Any], list[_Object]]]:
    names = {c["id"]: c["name"] for c in content["categories"]}
    of_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for a in content["annotations"]:
        of_image[a["image_id"]].append(a)
    for image in content["images"]:
        objects = []
        for a in of_image[image["id"]]:
            if a["iscrowd"] and not crowds:
                lost["crowd"] += 1
                continue
            lost["keypoints"] += bool(a.get("keypoints"))
            polygons = _polygons(a, image, outlines, lost)
            objects.append(_Object(names[a["category_id"]], a["bbox"], polygons, bool(a["iscrowd"]), a.get("score")))
        yield image, objects


def _numbers(values: Sequence[float]) -> list[float]:
    return [round(float(v), 4) for v in values]


def _relative(image: dict[str, Any], suffix: str) -> Path:
    """The image's name with another suffix; refuses names that would lead out of the output folder."""
    name = str(image["file_name"])
    path = Path(os.path.normpath(name))
    if path.is_absolute() or path.parts[:1] == ("..",):
        raise UserError(f"image {name!r}: its labels would be written outside of the output folder")
    return path.with_suffix(suffix)


def _refuse_equal(files: Sequence[tuple[Path, str]], content: dict[str, Any]) -> None:
    seen: dict[Path, str] = {}
    for (path, _), image in zip(files, content["images"]):
        other = seen.setdefault(path, image["file_name"])
        if other != image["file_name"]:
            raise UserError(f"the labels of {other} and {image['file_name']} would both be {path}; rename an image")


# ------------------------------------------------------------------------------------------------ the formats
Files = list[tuple[Path, str]]


def simplified(content: dict[str, Any], outlines: Outlines) -> tuple[dict[str, Any], Counter]:
    """COCO content whose outlines, except those of crowds, are polygons within the tolerance; holes are reached by
    bridges."""
    lost: Counter = Counter()
    by_id = {image["id"]: image for image in content["images"]}
    annotations = []
    for number, a in enumerate(content["annotations"], 1):
        entry = {"id": number, **a}
        if not a["iscrowd"]:
            rings = _polygons(a, by_id[a["image_id"]], outlines, lost)
            entry["segmentation"] = [_numbers(ring.ravel()) for ring in rings]
        entry["bbox"] = _numbers(a["bbox"])
        for key in ("segmentation", "keypoints", "num_keypoints"):
            if not entry.get(key):
                entry.pop(key, None)
        annotations.append(entry)
    return {**content, "annotations": annotations}, lost


def _coco(content: dict[str, Any], output: Path, outlines: Outlines, images: str) -> tuple[Files, Counter]:
    """annotations.json, see `simplified`."""
    content, lost = simplified(content, outlines)
    return [(output / "annotations.json", json.dumps(content))], lost


def _attribute(value: Any) -> str:
    """A text as an XML attribute in quotes, or as an element's content."""
    text = str(value)
    bad = [c for c in text if (ord(c) < 32 and c not in "\t\n\r") or 0xD800 <= ord(c) < 0xE000 or c in "\ufffe\uffff"]
    if bad:
        raise UserError(f"{ascii(text)} holds the character {ascii(bad[0])}, which XML files cannot hold; rename it")
    return escape(text, {'"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"})


def _cvat(content: dict[str, Any], output: Path, outlines: Outlines, images: str) -> tuple[Files, Counter]:
    """annotations.xml; shapes of one object have the same group_id."""
    lost: Counter = Counter()
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations>", "  <version>1.1</version>", "  <meta>"]
    lines += ["    <task>", f"      <size>{len(content['images'])}</size>", "      <labels>"]
    for c in content["categories"]:
        name = _attribute(c["name"])
        lines.append(f"        <label><name>{name}</name><type>any</type><attributes></attributes></label>")
    lines += ["      </labels>", "    </task>", "  </meta>"]
    for number, (image, objects) in enumerate(_images(content, outlines, lost, crowds=False)):
        name = _attribute(image["file_name"])
        lines.append(f'  <image id="{number}" name="{name}" width="{image["width"]}" height="{image["height"]}">')
        for group, o in enumerate(objects, 1):
            head = f'label="{_attribute(o.name)}" source="auto" occluded="0"'
            if len(o.polygons) > 1:
                head += f' group_id="{group}"'
            for ring in o.polygons:
                points = ";".join(f"{x!r},{y!r}" for x, y in np.round(ring, 4).tolist())
                lines.append(f'    <polygon {head} points="{points}" z_order="0"></polygon>')
            if not o.polygons:
                x, y, w, h = o.box
                x1, y1, x2, y2 = _numbers([x, y, x + w, y + h])
                lines.append(f'    <box {head} xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" z_order="0"></box>')
        lines.append("  </image>")
    lines.append("</annotations>\n")
    return [(output / "annotations.xml", "\n".join(lines))], lost


def _labelme(content: dict[str, Any], output: Path, outlines: Outlines, images: str) -> tuple[Files, Counter]:
    """<image>.json for each image; imagePath leads from there to the image, shapes of one object share a group_id."""
    lost: Counter = Counter()
    files = []
    for image, objects in _images(content, outlines, lost, crowds=True):
        path = output / _relative(image, ".json")
        shapes = []
        for group, o in enumerate(objects, 1):
            common = {
                "label": o.name, "group_id": group if len(o.polygons) > 1 else None,
                "description": "" if o.score is None else f"score {o.score:.3f}",
                "flags": {"iscrowd": True} if o.crowd else {}, "mask": None,
            }  # fmt: skip
            for ring in o.polygons:
                points = [_numbers(p) for p in ring.tolist()]
                shapes.append({**common, "shape_type": "polygon", "points": points})
            if not o.polygons:
                x, y, w, h = o.box
                points = [_numbers([x, y]), _numbers([x + w, y + h])]
                shapes.append({**common, "shape_type": "rectangle", "points": points})
        source = os.path.join(images, image["file_name"]) if images else ""
        entry = {
            "version": "5.5.0", "flags": {}, "shapes": shapes,
            "imagePath": os.path.relpath(source, path.parent) if images else os.path.basename(image["file_name"]),
            "imageData": None, "imageHeight": image["height"], "imageWidth": image["width"],
        }  # fmt: skip
        files.append((path, json.dumps(entry, indent=1)))
    _refuse_equal(files, content)
    return files, lost


def _yolo(content: dict[str, Any], output: Path, outlines: Outlines, images: str) -> tuple[Files, Counter]:
    """labels/<image>.txt for each image and data.yaml; classes are numbered from 0 in the order of their ids."""
    lost: Counter = Counter()
    number = {c["name"]: i for i, c in enumerate(content["categories"])}
    files = []
    for image, objects in _images(content, outlines, lost, crowds=False):
        scale = np.array([image["width"], image["height"]], np.float64)
        lines = []
        for o in objects:
            if o.polygons:
                values = (join_rings(o.polygons[0], o.polygons[1:], holes=False) / scale).ravel()
            else:
                x, y, w, h = o.box
                values = np.array([x + w / 2, y + h / 2, w, h]) / np.tile(scale, 2)
            lines.append(" ".join([str(number[o.name]), *(f"{v:.8g}" for v in values.tolist())]))
        files.append((output / "labels" / _relative(image, ".txt"), "".join(line + "\n" for line in lines)))
    _refuse_equal(files, content)
    yaml = [
        f"path: {json.dumps(os.path.abspath(output), ensure_ascii=False)}",
        "train: images",
        "val: images",
        "names:",
    ]
    yaml += [f"  {i}: {json.dumps(name, ensure_ascii=False)}" for name, i in number.items()]
    files.append((output / "data.yaml", "\n".join(yaml) + "\n"))
    return files, lost


WRITERS: dict[str, Callable[[dict[str, Any], Path, Outlines, str], tuple[Files, Counter]]] = {
    "coco": _coco,
    "cvat": _cvat,
    "labelme": _labelme,
    "yolo": _yolo,
}
