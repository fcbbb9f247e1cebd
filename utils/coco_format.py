"""COCO's annotation and results files (https://cocodataset.org/#format-data), read and typed in one place.

Training, tools/check_data.py and scoring all read these files through this module, so they treat a file the same way:
ids, numbers, outlines, names and flags are converted in one place. A value that cannot be used raises `Unusable` with a
reason from REASONS, which the caller counts, reports or refuses.

Also accepted: numbers and polygons given as text ("12.5", "[[1, 2, …]]"), ids like 3.0, polygons as
[x, y] pairs, RLEs in a list, flags as 0, 1, true, false or such text. `ignore: 1` means what `iscrowd: 1` does: a
region in which detections are neither right nor wrong and which is not trained on. (pycocotools reads only iscrowd and
would score it as an object.)
"""

import contextlib
import json
import mmap
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as coco_mask

from common import UserError, decode_text, logger
from utils.polygons import decode_runs, encode_segmentation, rle_runs

__all__ = [
    "REASONS", "Annotation", "ImageEntry", "Unusable", "as_results", "as_truth", "check_entries", "check_lists",
    "file_name_of", "in_pixels", "look_like_corners", "read_annotation", "read_categories", "read_document",
    "read_flag", "read_id", "read_image", "read_name", "read_number", "read_truth", "refuse_normalised",
    "scan_document",
]  # fmt: skip

# Why an annotation, or a part of its outline, is left out.
REASONS = {
    "unknown image": "image id is not in the file",
    "unknown category": "category id is not in the file",
    "entry": "entry is not an object with image_id and category_id",
    "id": "image id or category id is not a number or a text",
    "number": "a coordinate is not a finite number",
    "box": "box is not four numbers x, y, width, height",
    "place": "neither a box nor an outline",
    "flag": "iscrowd or ignore is neither 0 nor 1",
    "outline": "outline is neither polygons nor RLE",
    "keypoints": "keypoints are not numbers x, y, visibility for each point",
    "part size": "polygon part with fewer than 3 points or an odd number of coordinates",
    "part number": "polygon part with a coordinate that is not a finite number",
    "rle": "RLE mask that does not fit its image",
}
LARGEST = 1e30  # larger numbers are not accepted as coordinates


class Unusable(ValueError):
    """An entry that cannot be used; `reason` is a key of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{REASONS[reason]}: {detail}")
        self.reason, self.detail = reason, detail


class ImageEntry(NamedTuple):
    """One entry of "images"."""

    id: int | str
    file_name: str  # "" where none is needed
    height: int  # 0 where none is needed
    width: int
    present: list  # category ids that people found in the image
    absent: list  # that people looked for and did not find
    incomplete: list  # not all objects of these are annotated
    is_federated: bool  # the entry lists the categories that people looked for


class Annotation(NamedTuple):
    """One entry of "annotations"."""

    image_id: int | str
    category_id: int | str
    box: tuple[float, float, float, float] | None  # x y width height
    is_crowd: bool
    rings: list[list[float]]  # flat polygons x1 y1 x2 y2 …, each of three points or more
    masks: list[dict[str, Any]]  # RLEs, not yet checked against the image's size
    keypoints: list[float]
    left_out: list[tuple[str, str]]  # (reason, detail) of the parts of the outline that cannot be used


# ------------------------------------------------------------------------------------------------ single values
def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read_id(value: Any) -> int | str:
    """An id: a whole number (3.0 is 3) or a text."""
    if type(value) is int or type(value) is str:
        return value
    if type(value) is float and value.is_integer() and abs(value) < 1 << 53:
        return int(value)
    raise Unusable("id", _shown(value))


def read_number(value: Any, reason: str = "number") -> float:
    """A finite number, also one that is written as text."""
    if type(value) is str:
        try:
            value = float(value)
        except ValueError:
            raise Unusable(reason, _shown(value)) from None
    if (type(value) is int or type(value) is float) and -LARGEST <= value <= LARGEST:
        return float(value)
    raise Unusable(reason, _shown(value))


def read_flag(value: Any) -> bool:
    """0, 1, true or false, also as text; nothing means 0."""
    if value is None or type(value) is bool or (type(value) is int and 0 <= value <= 1):
        return bool(value)
    if type(value) is str:
        value = {"": 0, "false": 0, "no": 0, "true": 1, "yes": 1}.get(value.strip().lower(), value)
    try:
        number = read_number(value, "flag")
    except Unusable:
        raise Unusable("flag", _shown(value)) from None
    if number not in (0, 1):
        raise Unusable("flag", _shown(value))
    return bool(number)


def read_name(value: Any, where: str) -> str:
    """A class name: a text; a number is taken as its digits."""
    if type(value) is int or type(value) is float:
        value = str(value)
    if type(value) is not str:
        raise UserError(f"{where} must be a text, not {_shown(value)}")
    return value


def read_file_name(value: Any, where: str) -> str:
    """A path that the system can open: bytes that are not UTF-8 become surrogates, as in os.fsdecode."""
    if type(value) is not str or not value:
        raise UserError(f"{where}: file_name must be a text, not {_shown(value)}")
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise UserError(f"{where}: file_name {ascii(value)} has characters that no file name can have") from None
    if "\0" in value:
        raise UserError(f"{where}: file_name {ascii(value)} has a character that no file name can have")
    return value


# ------------------------------------------------------------------------------------------------ entries
def file_name_of(image: dict[str, Any]) -> Any:
    """file_name, or the last two parts of coco_url if there is none (LVIS)."""
    name, url = image.get("file_name"), image.get("coco_url")
    return "/".join(url.split("/")[-2:]) if not name and type(url) is str else name


def read_image(entry: Any, origin: str, need_file: bool = True, need_size: bool = True) -> ImageEntry:
    """An entry of "images"; raises UserError, naming `origin` and the image, if it cannot be used."""
    if type(entry) is not dict:
        raise UserError(f"{origin}: an image is not an object with id, file_name, height and width: {_shown(entry)}")
    if entry.get("id") is None:
        raise _incomplete(f"{origin}: image {_shown(entry)}")
    try:
        image_id = read_id(entry.get("id"))
    except Unusable:
        raise UserError(f"{origin}: image id {_shown(entry.get('id'))} must be a whole number or a text") from None
    where = f"{origin}: image {_shown(image_id)}"
    name = file_name_of(entry)
    if need_file and not name:
        raise _incomplete(where)
    if need_file:
        name = read_file_name(name, where)
    height, width = (_read_side(entry.get(key), where, need_size) for key in ("height", "width"))
    ids: list[list[int | str]] = []
    try:
        for key in ("pos_category_ids", "neg_category_ids", "not_exhaustive_category_ids"):
            given = entry.get(key) or []
            if type(given) is not list:
                raise Unusable("id", _shown(given))
            ids.append([read_id(v) for v in given])
    except Unusable as e:
        raise UserError(f"{where}: {key} must be a list of category ids, not {e.detail}") from None
    present, absent, incomplete = ids
    federated = "neg_category_ids" in entry
    return ImageEntry(image_id, name or "", height, width, present, absent, incomplete, federated)


def _incomplete(where: str) -> UserError:
    return UserError(f"{where} needs an id, file_name, height and width")


def _read_side(value: Any, where: str, needed: bool) -> int:
    if value is None and not needed:
        return 0
    try:
        side = read_number(value)
    except Unusable:
        side = 0.0
    if side < 1 or side % 1 or side > 1 << 31:
        if value is None:
            raise _incomplete(where)
        raise UserError(f"{where}: height and width must be whole numbers of pixels, not {_shown(value)}")
    return int(side)


def read_annotation(entry: Any, with_keypoints: bool = True) -> Annotation:
    """An entry of "annotations"; raises Unusable if it must be left out."""
    if type(entry) is not dict or "image_id" not in entry or "category_id" not in entry:
        raise Unusable("entry", _shown(entry))
    image_id, category_id = read_id(entry["image_id"]), read_id(entry["category_id"])
    box = read_box(entry.get("bbox"))
    is_crowd = read_flag(entry.get("iscrowd")) or read_flag(entry.get("ignore"))
    outline = entry.get("segmentation")
    rings, masks, left_out = read_outline(outline) if outline else ([], [], [])
    points = read_keypoints(entry.get("keypoints")) if with_keypoints else []
    return Annotation(image_id, category_id, box, is_crowd, rings, masks, points, left_out)


def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """Four numbers; None for none."""
    if value is None or value == [] or value == "":
        return None
    if type(value) is not list or len(value) != 4:
        raise Unusable("box", _shown(value))
    try:
        x, y, width, height = value if _all_numbers(value) else map(read_number, value)
    except Unusable:
        raise Unusable("number", f"bbox {_shown(value)}") from None
    return x, y, width, height


def read_keypoints(value: Any) -> list[float]:
    if not value:
        return []
    if type(value) is not list or len(value) % 3:
        raise Unusable("keypoints", _shown(value))
    try:
        return [read_number(v, "keypoints") for v in value]
    except Unusable:
        raise Unusable("keypoints", _shown(value)) from None


def read_outline(value: Any) -> tuple[list[list[float]], list[dict[str, Any]], list[tuple[str, str]]]:
    """(polygons, RLEs, [(reason, detail) of each part left out]) of a segmentation."""
    if type(value) is str and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable("outline", _shown(value)) from None
    if type(value) is dict:
        return [], [_read_rle(value)], []
    if type(value) is not list:
        raise Unusable("outline", _shown(value))
    if value and type(value[0]) in (int, float, str):
        value = [value]  # one polygon that is not in a list of its own
    elif value and all(type(v) is list and len(v) == 2 and type(v[0]) is not list for v in value):
        value = [value]  # one polygon as [x, y] pairs
    rings, masks, left_out = [], [], []
    for part in value:
        if type(part) is dict:
            masks.append(_read_rle(part))
            continue
        if type(part) is not list:
            raise Unusable("outline", _shown(part))
        if part and all(type(p) is list and len(p) == 2 for p in part):
            part = [v for pair in part for v in pair]
        if len(part) < 6 or len(part) % 2:
            left_out.append(("part size", f"{len(part)} coordinates"))
            continue
        try:
            rings.append(_read_ring(part))
        except Unusable as e:
            left_out.append(("part number", e.detail))
    return rings, masks, left_out


def _read_ring(part: list) -> list[float]:
    return part if _all_numbers(part) else [read_number(v) for v in part]


def _all_numbers(values: list) -> bool:
    """Whether all are finite numbers, in one pass in C. (Huge ones may cancel out, and are clipped later.)"""
    try:
        return abs(sum(values)) <= LARGEST
    except (TypeError, OverflowError):
        return False


def _read_rle(value: dict) -> dict[str, Any]:
    """The RLE with a list or text of counts; whether they fit the image is checked where its size is known."""
    size, counts = value.get("size"), value.get("counts")
    try:
        if size is not None:
            if type(size) is not list or len(size) != 2:
                raise Unusable("outline", "")
            size = [int(read_number(v)) for v in size]
        if type(counts) is list:
            counts = [read_number(v) for v in counts]
            if any(v % 1 for v in counts):
                raise Unusable("outline", "")
            counts = [int(v) for v in counts]
        elif type(counts) is str:
            decode_runs(counts)
        else:
            raise Unusable("outline", "")
    except ValueError:  # also Unusable
        raise Unusable("outline", f"RLE {_shown(value)}") from None
    return {"size": size, "counts": counts}


def read_categories(entries: Any, origin: str) -> dict[int | str, str]:
    """{category id: name} in the order of the ids, which is the order of the labels."""
    if type(entries) is not list or not all(type(c) is dict and "id" in c for c in entries):
        raise UserError(f"{origin} is not in COCO's format: 'categories' must be a list of objects with id and name")
    names: dict[int | str, str] = {}
    for entry in entries:
        try:
            key = read_id(entry["id"])
        except Unusable:
            shown = f"{_shown(entry['id'])} of {_shown(entry.get('name'))}"
            raise UserError(f"{origin}: category id {shown} must be a whole number or a text") from None
        name = key if entry.get("name") is None else entry["name"]
        name = read_name(name, f"{origin}: name of category {key!r}")
        if names.setdefault(key, name) != name:
            raise UserError(f"{origin}: category id {key!r} stands for both '{names[key]}' and '{name}'")
    return {key: names[key] for key in sorted(names, key=lambda i: (isinstance(i, str), i))}


# ------------------------------------------------------------------------------------------------ whole files
def _read_text(path: str | os.PathLike, what: str) -> str:
    """The file's text, decoded from the page cache so that it is in memory once."""
    try:
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size == 0:
                raise UserError(f"{what} {path} is empty")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return decode_text(content, f"{what} {path}")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except OSError as e:
        raise UserError(f"{what} {path} cannot be read: {e.strerror}") from None


def scan_document(path: str | os.PathLike, what: str, streams: Mapping[str, Callable[[Any], None]]) -> dict[str, Any]:
    """Reads a json object, passing on the entries of the lists named in `streams` one at a time; returns the rest.

    The 860,000 annotations of COCO are 3 GB as Python objects; this way one of them exists at a time. As strict as
    json.load: trailing commas and text after the object are errors.
    """
    text = _read_text(path, what)
    space = re.compile(r"[ \t\n\r]*").match
    decode = json.JSONDecoder().raw_decode
    rest: dict[str, Any] = {}

    def fail(expected: str, at: int) -> None:
        raise json.JSONDecodeError(expected, text, at)

    def after_comma(at: int, closing: str) -> int:
        """The place of the next entry, or of the closing bracket."""
        at = space(text, at).end()
        if text[at : at + 1] == ",":
            at = space(text, at + 1).end()
            if text[at : at + 1] == closing:
                fail("a comma stands before the closing bracket", at)
        elif text[at : at + 1] != closing:
            fail(f"Expecting ',' or '{closing}'", at)
        return at

    try:
        at = space(text, 0).end()
        if text[at : at + 1] != "{":
            decode(text, at)
            raise UserError(f"{what} {path} is not in COCO's format: it must be one json object")
        at = space(text, at + 1).end()
        while text[at : at + 1] != "}":
            key, at = decode(text, at)
            at = space(text, at).end()
            if not isinstance(key, str) or text[at : at + 1] != ":":
                fail("Expecting a key and ':'", at)
            if key in rest:
                raise UserError(f"{what} {path}: the key '{key}' occurs twice")
            at = space(text, at + 1).end()
            if key in streams and text[at : at + 1] == "[":
                rest[key] = True
                at = space(text, at + 1).end()
                while text[at : at + 1] != "]":
                    entry, at = decode(text, at)
                    streams[key](entry)
                    at = after_comma(at, "]")
                at += 1
            else:
                rest[key], at = decode(text, at)
            at = after_comma(at, "}")
        at = space(text, at + 1).end()
        if at != len(text):
            fail("Extra data", at)
    except json.JSONDecodeError as e:
        raise UserError(f"{what} {path} is not valid JSON: {e.msg}: line {e.lineno} column {e.colno}") from None
    except RecursionError:
        raise UserError(f"{what} {path} is nested too deeply") from None
    except ValueError as e:  # a number of more digits than Python reads
        raise UserError(f"{what} {path} is not valid JSON: {e}") from None
    return rest


def read_document(path: str | os.PathLike) -> dict[str, Any]:
    """A whole annotation file as read, with the lists that it must have; their entries are not checked."""
    lists: dict[str, list] = {"images": [], "annotations": []}
    rest = scan_document(path, "annotation file", {key: entries.append for key, entries in lists.items()})
    check_lists(rest, f"annotation file {path}")
    return {"annotations": [], **rest, **{key: lists[key] for key in lists if key in rest}}


def check_entries(content: dict[str, Any], origin: str) -> None:
    """Raises UserError for the first entry of the document that training would refuse or leave out."""
    read_categories(content["categories"], origin)
    for raw in content["images"]:
        read_image(raw, origin)
    for number, raw in enumerate(content["annotations"]):
        try:
            read_annotation(raw)
        except Unusable as e:
            raise UserError(
                f"{origin}: entry {number} of 'annotations': {e}; tools/check_data.py --fix writes a cleaned copy"
            ) from None


def check_lists(rest: dict[str, Any], origin: str) -> None:
    """Raises UserError unless the result of `scan_document` is that of an annotation file."""
    for key in ("images", "categories"):
        if key not in rest:
            raise UserError(f"{origin} is not in COCO's format: it has no '{key}'")
    for key in ("images", "annotations"):
        if rest.get(key, True) is not True:
            raise UserError(f"{origin} is not in COCO's format: '{key}' must be a list")


# ------------------------------------------------------------------------------------------------ ground truth to score
def read_truth(path: str | os.PathLike, need_size: bool = False) -> dict[str, Any]:
    """An annotation file for scoring, see `as_truth`."""
    return as_truth(read_document(path), f"annotation file {path}", need_size)


def as_truth(content: dict[str, Any], origin: str = "annotations", need_size: bool = False) -> dict[str, Any]:
    """Content in COCO's form with every value typed, for the evaluators.

    images: id, height, width (None where not given), the lists of category ids that are given, and all other keys.
    categories: id, name and all other keys.
    annotations: image_id and category_id that are in the file, bbox (of the outline where not given), iscrowd 0 or 1,
    segmentation (an RLE, or a list of flat polygons and RLEs, which fit the image; [] for none), keypoints, area (of
    the mask, else of the box, where not given), and all other keys.

    An annotation that cannot be used is left out, with a warning; an image that cannot be used is an error.
    """
    names = read_categories(content.get("categories"), origin)
    categories, seen = [], set()
    for entry in content["categories"]:
        key = read_id(entry["id"])
        if key not in seen:
            categories.append({**entry, "id": key, "name": names[key]})
        seen.add(key)
    images: dict[int | str, dict[str, Any]] = {}
    for raw in content["images"]:
        image = read_image(raw, origin, need_file=False, need_size=need_size)
        entry = {**raw, "id": image.id, "height": image.height or None, "width": image.width or None}
        lists = zip(("pos", "neg", "not_exhaustive"), (image.present, image.absent, image.incomplete))
        entry.update({f"{key}_category_ids": ids for key, ids in lists if f"{key}_category_ids" in raw})
        images.setdefault(image.id, entry)
    left_out: dict[str, list[str]] = defaultdict(list)
    annotations = []
    for number, raw in enumerate(content.get("annotations", ())):
        try:
            annotation = read_annotation(raw)
            for key, value, known in (
                ("image", annotation.image_id, images), ("category", annotation.category_id, names)
            ):  # fmt: skip
                if value not in known:
                    raise Unusable(f"unknown {key}", _shown(value) + _other_type(value, known))
            notes = list(annotation.left_out)
            annotations.append(_typed(raw, annotation, images[annotation.image_id], notes))
        except Unusable as e:
            notes = [(e.reason, e.detail)]
        for reason, detail in notes:
            left_out[reason].append(f"entry {number}: {detail}")
    boxes = [a["bbox"] for a in annotations if not a["iscrowd"]]
    sides = [side for image in images.values() for side in (image["height"], image["width"])]
    if sides and None not in sides:
        refuse_normalised(np.array(boxes), min(sides), origin)
    if left_out:
        listed = "; ".join(f"{len(found)} × {REASONS[reason]} (e.g. {found[0]})" for reason, found in left_out.items())
        logger.warning(f"{origin}: some annotations, or parts of them, are not scored: {listed}")
    return {**content, "images": list(images.values()), "annotations": annotations, "categories": categories}


def _typed(raw: dict, a: Annotation, image: dict[str, Any], notes: list[tuple[str, str]]) -> dict[str, Any]:
    """The annotation in the form that `as_truth` describes; parts of its outline left out are added to the notes."""
    height, width = image["height"], image["width"]
    segmentation: Any = list(a.rings)
    for rle in a.masks:
        try:
            size = rle["size"] or [height, width]
            if None in size:
                raise ValueError
            rle_runs(rle, *([height, width] if height and width else size))
            segmentation.append({**rle, "size": size})
        except ValueError as e:
            notes.append(("rle", str(e)))
    box, area = a.box and list(a.box), _number_or_none(raw.get("area"))
    if box is None and not segmentation:
        raise Unusable("place", _shown(raw))
    if segmentation and (box is None or area is None) and height and width:
        rle = encode_segmentation(segmentation, height, width)
        box = coco_mask.toBbox(rle).tolist() if box is None else box
        area = float(coco_mask.area(rle)) if area is None else area
    if box is None:
        raise Unusable("box", "no box, and an outline in an image of unknown height and width")
    if len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    visible = _number_or_none(raw.get("num_keypoints"))
    if visible is None or not a.keypoints:
        visible = sum(v > 0 for v in a.keypoints[2::3])
    return {
        **raw, "image_id": a.image_id, "category_id": a.category_id, "bbox": box, "iscrowd": int(a.is_crowd),
        "segmentation": segmentation, "area": box[2] * box[3] if area is None else area, "keypoints": a.keypoints,
        "num_keypoints": int(visible),
    }  # fmt: skip


def _number_or_none(value: Any) -> float | None:
    try:
        return None if value is None else read_number(value)
    except Unusable:
        return None


# ------------------------------------------------------------------------------------------------ results
def as_results(results: Any, truth: dict[str, Any], origin: str) -> list[dict[str, Any]]:
    """A results list with every value typed; raises UserError naming `origin` and the first entry that cannot be used.

    truth: from `as_truth`. An entry has image_id, category_id, score, and of bbox, segmentation (an RLE that
    fits the image, or a list of flat polygons and such RLEs; [] is a mask without a pixel) and keypoints those that it
    was given.
    """
    if not isinstance(results, list):
        raise UserError(f"{origin}: must hold a list of detections, not {_shown(results)}")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    typed = []
    for number, entry in enumerate(results):
        try:
            typed.append(_read_result(entry, sizes, categories))
        except ValueError as e:
            raise UserError(f"{origin}: entry {number}: {e}") from None
    boxed = [(r["bbox"], sizes[r["image_id"]]) for r in typed if "bbox" in r]
    if boxed and look_like_corners(*zip(*boxed)):
        logger.warning(
            f"{origin}: its boxes look like x1 y1 x2 y2; COCO's are x y width height, and they are scored as such"
        )
    return typed


def _read_result(entry: Any, sizes: dict, categories: set) -> dict[str, Any]:
    if type(entry) is not dict:
        raise ValueError(f"must be an object, not {_shown(entry)}")
    result: dict[str, Any] = {}
    for key, known in (("image_id", sizes), ("category_id", categories)):
        if key not in entry:
            raise ValueError(f"has no {key}")
        value = entry[key]
        try:
            result[key] = read_id(value)
        except Unusable:
            raise ValueError(f"{key} {_shown(value)} is not in the annotation file") from None
        if result[key] not in known:
            raise ValueError(f"{key} {_shown(value)} is not in the annotation file{_other_type(value, known)}")
    if "score" not in entry:
        raise ValueError("has no score")
    try:
        result["score"] = read_number(entry["score"])
    except Unusable:
        raise ValueError(f"score {_shown(entry['score'])} is not a finite number") from None
    if not any(key in entry for key in ("bbox", "segmentation", "keypoints")):
        raise ValueError("has none of bbox, segmentation, keypoints")
    if entry.get("bbox") is not None and entry["bbox"] != []:
        try:
            box = read_box(entry["bbox"])
        except Unusable:
            box = None
        if box is None or box[2] < 0 or box[3] < 0:
            raise ValueError(f"bbox {_shown(entry['bbox'])} must be four finite numbers x, y, width, height")
        result["bbox"] = list(box)
    if entry.get("keypoints"):
        try:
            result["keypoints"] = read_keypoints(entry["keypoints"])
        except Unusable:
            raise ValueError("keypoints must be finite numbers x, y, v for each point") from None
    if "segmentation" in entry:
        result["segmentation"] = _read_result_mask(entry["segmentation"], *sizes[result["image_id"]])
    return result


def _other_type(value: Any, known: Iterable) -> str:
    """A hint if the id exists as a text instead of a number, or the reverse."""
    other = str(value) if type(value) is not str else int(value) if value.isascii() and value.isdigit() else None
    return f"; {other!r} is: use the same type in both files" if other in known else ""


def _read_result_mask(value: Any, height: int | None, width: int | None) -> list | dict:
    if not value:
        return []
    if height and width and type(value) is dict and type(value.get("counts")) is str:
        with contextlib.suppress(ValueError, TypeError):  # the usual form; what is wrong with others is said below
            rle_runs(value, height, width)
            if value.get("size") == [height, width]:
                return {"size": [height, width], "counts": value["counts"]}
    try:
        rings, masks, left_out = read_outline(value)
    except Unusable as e:
        what = "its RLE counts are broken" if isinstance(value, dict) and "counts" in value else e.detail
        raise ValueError(
            f"segmentation must be an RLE object with size [height, width] and counts, or a list of polygons: {what}"
        ) from None
    if left_out:
        reason, detail = left_out[0]
        if reason == "part number":
            raise ValueError(f"segmentation: a polygon's coordinate is not a finite number: {detail}")
        raise ValueError("segmentation: a polygon needs three or more points as a list x1, y1, x2, y2, …")
    for rle in masks:
        size = rle["size"]
        if size is None:
            raise ValueError("segmentation must be an RLE object with size [height, width] and counts")
        if height and width and size != [height, width]:
            raise ValueError(f"segmentation has size {size}, the image has height and width {[height, width]}")
        try:
            rle_runs(rle, *size)
        except ValueError:
            raise ValueError("segmentation: its RLE counts are broken or do not add up to height x width") from None
    return masks[0] if len(masks) == 1 and not rings else [*rings, *masks]


# ------------------------------------------------------------------------------------------------ coordinates
def refuse_normalised(boxes: np.ndarray, smallest_side: float, origin: str) -> None:
    """Raises UserError for boxes [n, 4] (x y width height) that look normalised: all end at 1 or below, in images of
    ten pixels or more, and not all numbers are whole."""
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(1)]
    inside = (boxes[:, :2] >= -1e-3).all() and (boxes[:, :2] + boxes[:, 2:] <= 1.001).all()
    if len(boxes) and smallest_side >= 10 and inside and (boxes % 1).any():
        raise UserError(
            f"{origin}: its boxes are normalised coordinates (all of them lie in 0..1, such as "
            f"{[round(v, 3) for v in boxes[0].tolist()]}), not pixels; read them as such with the option "
            "'normalised=True' at the end of its DATA.DATASETS entry (tools/score.py: --normalised)"
        )


def in_pixels(content: dict[str, Any], origin: str) -> dict[str, Any]:
    """Content whose boxes, polygons and keypoints are fractions of the image's width and height, in pixels.

    An annotation that cannot be used stays unchanged; the reader reports it later.
    """
    sizes = {}
    for raw in content["images"]:
        image = read_image(raw, origin, need_file=False)
        sizes[image.id] = image.width, image.height
    annotations = []
    for raw in content.get("annotations", ()):
        try:
            a = read_annotation(raw)
            scale = sizes[a.image_id]
        except (Unusable, KeyError):
            annotations.append(raw)
            continue
        entry = {key: value for key, value in raw.items() if key not in ("area", "bbox", "segmentation", "keypoints")}
        if a.box:
            entry["bbox"] = [v * s for v, s in zip(a.box, scale * 2)]
        rings = [[v * s for v, s in zip(ring, scale * (len(ring) // 2))] for ring in a.rings]
        if rings or a.masks:
            entry["segmentation"] = [*rings, *a.masks]
        if a.keypoints:
            entry["keypoints"] = [v * s for v, s in zip(a.keypoints, (*scale, 1) * (len(a.keypoints) // 3))]
        annotations.append(entry)
    return {**content, "annotations": annotations}


def look_like_corners(boxes: Sequence[Sequence[float]], sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether boxes that should be x y width height look like x1 y1 x2 y2: read as x1 y1 x2 y2 all lie inside their
    images, but read as x y width height at least a third reach far beyond. sizes: (height, width) of each box's
    image."""
    outside = 0
    for (x, y, w, h), (height, width) in zip(boxes, sizes):
        if not (height and width) or w <= x or h <= y or w > width + 1 or h > height + 1 or x < -1 or y < -1:
            return False
        outside += x + w > 1.05 * width + 2 or y + h > 1.05 * height + 2
    return outside > 0 and 3 * outside >= len(boxes)
