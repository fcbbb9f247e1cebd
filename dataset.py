"""Data sets in COCO's format (https://cocodataset.org/#format-data): where they are and what is in them.

A `DatasetSplit` holds a whole annotation file as a few NumPy columns, so that 118,000 images take some hundred
megabytes once, in memory that all data workers share, instead of gigabytes of Python objects in each.
"""

import difflib
import json
import mmap
import os
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from common import UserError, logger
from utils import polygons

__all__ = [
    "DatasetSplit", "Objects", "class_count_table", "concatenate_splits", "load_split", "load_training_split",
    "load_validation_splits",
]  # fmt: skip

# COCO's own sets: name -> image folder. The annotation file is annotations/instances_<name>.json.
COCO_FOLDERS = {
    "train2017": "train2017",
    "val2017": "val2017",
    "train2014": "train2014",
    "val2014": "val2014",
    "minival2014": "val2014",
    "valminusminival2014": "val2014",
}
COCO_KEYPOINTS = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
]  # fmt: skip
_BLOCK = 4096  # images
_EVERY_CLASS = -1  # as a verified label of an image
MIN_SIDE = 0.01  # pixels; a box with a shorter side inside the image has no extent that float32 could regress to

# Why an annotation is left out (index = code in the columns), in the order in which the reasons are looked for.
_KEPT, _BROKEN, _IMAGE, _CATEGORY, _NUMBER, _NO_PLACE, _EMPTY, _NO_OUTLINE = range(8)
REASONS = [
    "", "entry is not in COCO's format", "image id is not in the file", "category is unknown or not trained",
    "a coordinate is not a finite number", "neither a box nor an outline", "box is empty inside the image",
    "no outline (MODE_MASK trains masks)",
]  # fmt: skip


class Objects(NamedTuple):
    """The annotations of one image; the arrays are views that must not be written to.

    Coordinates are continuous, in the frame of the image that the annotation file describes.
    """

    boxes: np.ndarray  # float32 [n, 4] x1 y1 x2 y2, inside the image
    labels: np.ndarray  # int32 [n], 1..C
    is_crowd: np.ndarray  # bool [n]
    vertices: np.ndarray  # float32 [V, 2], all rings of all objects one after the other
    ring_sizes: np.ndarray  # int64 [R], vertices of each ring
    ring_owners: np.ndarray  # int64 [R], non-decreasing: the object of each ring
    keypoints: np.ndarray | None  # float32 [n, K, 3] x y visibility


class DatasetSplit:
    """One set of images with annotations, as columns. Made by `load_split`; see `Objects` for an image's content.

    Attributes:
        name: as in the settings.
        class_names: foreground classes; label i + 1 is class_names[i].
        annotation_file: the json it was read from (of concatenated sets, the first).
        dropped: {reason: number of annotations left out}.
        num_annotations: how many annotations the file has.
        keypoint_flip: int [K], the keypoint that each becomes in a mirrored image; empty without keypoints.
    """

    def __init__(
        self,
        name: str,
        annotation_file: str,
        folders: list[str],
        class_names: list[str],
        category_ids: list,
        columns: dict[str, Any],
        dropped: dict[str, int],
        num_annotations: int,
        keypoint_flip: np.ndarray,
    ):
        self.name = name
        self.annotation_file = annotation_file
        self.class_names = class_names
        self.dropped = dropped
        self.num_annotations = num_annotations
        self.keypoint_flip = keypoint_flip
        self._folders = folders
        self._category_ids = category_ids
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["sizes"])

    def image_file(self, i: int) -> str:
        """Absolute path of the image."""
        return os.path.join(self._folders[self._columns["folder"][i]], _text(self._columns["file"], i))

    def image_id(self, i: int) -> int | str:
        """As in the json."""
        ids = self._columns["id"]
        return int(ids[i]) if isinstance(ids, np.ndarray) else json.loads(_text(ids, i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width as in the json."""
        height, width = self._columns["sizes"][i].tolist()
        return height, width

    def image_sizes(self) -> np.ndarray:
        """int32 [len, 2] heights and widths."""
        return self._columns["sizes"]

    def objects(self, i: int) -> Objects:
        """The annotations of an image, without copies."""
        c = self._columns
        first, last = c["first_object"][i], c["first_object"][i + 1]
        ring_counts = np.diff(c["first_ring"][first : last + 1])
        ring0, ring1 = c["first_ring"][first], c["first_ring"][last]
        vertex0, vertex1 = c["first_vertex"][ring0], c["first_vertex"][ring1]
        return Objects(
            c["boxes"][first:last],
            c["labels"][first:last],
            c["crowd"][first:last],
            c["vertices"][vertex0:vertex1],
            np.diff(c["first_vertex"][ring0 : ring1 + 1]),
            np.repeat(np.arange(last - first), ring_counts),
            None if c["keypoints"] is None else c["keypoints"][first:last],
        )

    def annotations(self, i: int) -> dict[str, Any]:
        """The annotations of an image as boxes, labels, is_crowd, keypoints (see `Objects`) and `rings`.

        rings: for each object a list of float32 [k, 2] rings in the orientation of utils/polygons.py. Crowd regions
        given as RLE have none.
        """
        o = self.objects(i)
        rings: list[list[np.ndarray]] = [[] for _ in range(len(o.labels))]
        for owner, ring in zip(o.ring_owners, np.split(o.vertices, np.cumsum(o.ring_sizes)[:-1])):
            rings[owner].append(ring)
        return {
            "boxes": o.boxes, "labels": o.labels, "is_crowd": o.is_crowd, "rings": rings, "keypoints": o.keypoints,
        }  # fmt: skip

    def is_federated(self) -> bool:
        """Whether the set says of each image which classes people looked for there (Open Images, LVIS)."""
        return self._columns["first_verified"] is not None

    def verified_classes(self, i: int) -> np.ndarray:
        """bool [C + 1]: the background, and the classes of which image i shows no object beside the annotated ones.

        Of the others nobody knows. A set that is not federated is annotated for all its classes.
        """
        c = self._columns
        verified = np.full(len(self.class_names) + 1, c["first_verified"] is None)
        verified[0] = True
        if c["first_verified"] is not None:
            labels = c["verified"][c["first_verified"][i] : c["first_verified"][i + 1]]
            verified[labels] = True
            verified |= _EVERY_CLASS in labels
        return verified

    def nonempty_images(self) -> np.ndarray:
        """int64 indices of the images with an object that is not a crowd."""
        c = self._columns
        before = np.concatenate([[0], np.cumsum(~c["crowd"])])  # objects before each row
        return np.flatnonzero(np.diff(before[c["first_object"]]))

    def outlined_images(self) -> np.ndarray:
        """int64 indices of the images with an object that has an outline and is not a crowd."""
        c = self._columns
        owners = np.repeat(np.arange(len(self)), np.diff(c["first_object"]))
        return np.unique(owners[~c["crowd"] & (np.diff(c["first_ring"]) > 0)])

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [C] objects that are not crowds, and images that show one, of each class."""
        c = self._columns
        size = len(self.class_names) + 1
        objects, images = np.zeros(size, np.int64), np.zeros(size, np.int64)
        # Blocks of images, so that a table of images and classes fits into the cache; sorting pairs takes far longer.
        for start in range(0, len(self), _BLOCK):
            first = c["first_object"][start : start + _BLOCK + 1]
            solid = ~c["crowd"][first[0] : first[-1]]
            labels = c["labels"][first[0] : first[-1]][solid]
            shown = np.zeros((len(first) - 1, size), bool)
            shown[np.repeat(np.arange(len(first) - 1), np.diff(first))[solid], labels] = True
            images += np.count_nonzero(shown, axis=0)
            objects += np.bincount(labels, minlength=size)
        return objects[1:], images[1:]

    def label_to_category_id(self, label: int) -> int | str | None:
        """The category id of a class label 1..C; None when this set's annotation file does not have the class."""
        return self._category_ids[label - 1]

    def category_id_to_label(self, category_id: int | str) -> int | None:
        """The inverse of `label_to_category_id`; None for a category that is not among the classes."""
        return self._category_ids.index(category_id) + 1 if category_id in self._category_ids else None

    def evaluate(self, results: list[dict], **options: Any) -> dict[str, float]:
        """COCO scores of results in COCO's format; options are those of eval.evaluate_coco."""
        from eval import evaluate_coco

        known = [r for r in results if r["category_id"] is not None]
        if len(known) < len(results):
            logger.warning(
                f"{self.name}: {len(results) - len(known)} detections of classes that its annotations do not have "
                "are not scored"
            )
        return evaluate_coco(self, known, **options)

    def move_columns(self, moved: "DatasetSplit") -> None:
        """Takes the columns of an equal split, e.g. a copy in shared memory, so that its own memory can go."""
        self._columns = moved._columns


# ------------------------------------------------------------------------------------------------ columns of strings
def _pack_texts(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 bytes of all strings and int64 offsets [n + 1]."""
    encoded = [t.encode() for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _text(column: tuple[np.ndarray, np.ndarray], i: int) -> str:
    content, offsets = column
    return content[offsets[i] : offsets[i + 1]].tobytes().decode()


def _texts(column: tuple[np.ndarray, np.ndarray]) -> list[str]:
    content, offsets = column[0].tobytes(), column[1].tolist()
    return [content[a:b].decode() for a, b in zip(offsets, offsets[1:])]


# ------------------------------------------------------------------------------------------------ reading the json
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
    space = json.decoder.WHITESPACE.match
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


class _Collector:
    """Columns that grow while the annotation file is read, in the order of the file."""

    def __init__(self, path: str, with_keypoints: bool):
        self.path = path
        self.with_keypoints = with_keypoints
        self.image_entries: list[tuple[str, int, int]] = []  # file name, height, width
        self.image_ids: list = []
        self.image_of_entry = array("i")  # number of the image id of each image entry
        self.image_numbers: dict = {}  # any image id -> number, in order of appearance
        self.category_numbers: dict = {}
        # Whether images say which classes were looked for there; the image and category numbers of these, flat, and of
        # classes with objects that are not annotated.
        self.is_federated = False
        self.verified, self.incomplete = array("i"), array("i")
        self.broken = 0
        self.image, self.category = array("i"), array("i")  # per annotation
        self.crowd = array("b")
        self.boxes = array("d")  # x y w h; NaN when not given
        self.has_box = array("b")
        self.ring_counts = array("i")
        self.ring_sizes = array("i")
        self.coordinates = array("f")
        self.masks: list[tuple[int, dict]] = []  # annotation, RLE
        self.short_rings = 0
        self.keypoints: list[tuple[int, list]] = []

    def add_image(self, entry: Any) -> None:
        try:
            image_id = entry["id"]
            height, width = int(entry["height"]), int(entry["width"])
            name = entry.get("file_name") or "/".join(entry["coco_url"].split("/")[-2:])
            number = self.image_numbers.setdefault(image_id, len(self.image_numbers))
            self.is_federated |= "neg_category_ids" in entry
            for key in ("pos_category_ids", "neg_category_ids", "not_exhaustive_category_ids"):
                pairs = self.incomplete if key.startswith("not") else self.verified
                for category in entry.get(key) or ():
                    pairs.extend((number, self.category_numbers.setdefault(category, len(self.category_numbers))))
        except (KeyError, TypeError, ValueError, AttributeError):
            shown = entry.get("id", entry) if isinstance(entry, dict) else entry
            raise UserError(
                f"annotation file {self.path}: image {str(shown)[:60]} needs an id, file_name, height and width"
            ) from None
        if not isinstance(image_id, (int, str)) or height < 1 or width < 1:
            raise UserError(f"annotation file {self.path}: image {image_id!r} has id or size {height}x{width} unusable")
        self.image_ids.append(image_id)
        self.image_of_entry.append(number)
        self.image_entries.append((name, height, width))

    def add_annotation(self, entry: Any) -> None:
        number, rings, values, masks = len(self.image), len(self.ring_sizes), len(self.coordinates), len(self.masks)
        try:
            image = self.image_numbers.setdefault(entry["image_id"], len(self.image_numbers))
            category = self.category_numbers.setdefault(entry["category_id"], len(self.category_numbers))
            box = entry.get("bbox")
            if box:
                x, y, width, height = map(float, box)
            crowd = bool(int(entry.get("iscrowd") or 0))
            outline = entry.get("segmentation")
            short = 0
            if isinstance(outline, dict):
                rle = _compact_rle(outline)
                if not crowd or not box:
                    self.masks.append((number, rle))
            elif outline:
                for ring in [outline] if isinstance(outline[0], (int, float)) else outline:
                    if len(ring) < 6:
                        short += 1
                        continue
                    if len(ring) % 2:
                        raise ValueError
                    self.coordinates.extend(ring)
                    self.ring_sizes.append(len(ring) // 2)
            if self.with_keypoints and entry.get("keypoints"):
                points = [float(v) for v in entry["keypoints"]]
                if len(points) % 3:
                    raise ValueError
                self.keypoints.append((number, points))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            self.broken += 1
            del self.ring_sizes[rings:], self.coordinates[values:], self.masks[masks:]
            return
        self.image.append(image)
        self.category.append(category)
        self.crowd.append(crowd)
        self.has_box.append(bool(box))
        self.boxes.extend((x, y, width, height) if box else (0.0, 0.0, 0.0, 0.0))
        self.ring_counts.append(len(self.ring_sizes) - rings)
        self.short_rings += short


def _compact_rle(rle: dict) -> dict:
    counts = rle["counts"]
    return {"size": rle.get("size"), "counts": counts if isinstance(counts, str) else np.asarray(counts, np.int32)}


# ------------------------------------------------------------------------------------------------ columns of a split
def _order_categories(path: str, categories: Any) -> tuple[list, list[str]]:
    """Category ids and names in the order of the ids, which is the order of the labels."""
    if not isinstance(categories, list) or not all(isinstance(c, dict) and "id" in c for c in categories):
        raise UserError(f"annotation file {path} is not in COCO's format: 'categories' must be a list with ids")
    names: dict[Any, str] = {}
    for category in categories:
        key, name = category["id"], str(category.get("name", category["id"]))
        if names.setdefault(key, name) != name:
            raise UserError(f"annotation file {path}: category id {key!r} stands for both '{names[key]}' and '{name}'")
    ids = sorted(names, key=lambda i: (isinstance(i, str), i))
    twice = [n for n, count in Counter(names.values()).items() if count > 1]
    if twice:
        same = " and ".join(repr(i) for i in ids if names[i] == twice[0])
        raise UserError(f"annotation file {path}: categories {same} are both named '{twice[0]}'; rename one")
    if not ids:
        raise UserError(f"annotation file {path} has no categories")
    return ids, [names[i] for i in ids]


def _match_classes(path: str, ids: list, names: list[str], class_names: Sequence[str]) -> list:
    """The category id of each of the wanted classes, None for those that this file does not have."""
    by_name = dict(zip(names, ids))
    matched = [by_name.get(n) for n in class_names]
    if not any(n in by_name for n in class_names):
        raise UserError(
            f"annotation file {path} has none of the model's classes: it has {_some(names)}, "
            f"the model {_some(class_names)}"
        )
    return matched


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")


def _unique_images(raw: _Collector) -> tuple[np.ndarray, np.ndarray]:
    """Entries to keep, and the row of each image number (-1: no such image)."""
    numbers = np.asarray(raw.image_of_entry, np.int64)
    rows = np.full(len(raw.image_numbers), -1, np.int64)
    kept, first = np.unique(numbers, return_index=True)
    if len(kept) < len(numbers):
        for entry in np.setdiff1d(np.arange(len(numbers)), first):
            original = first[np.searchsorted(kept, numbers[entry])]
            if raw.image_entries[entry] != raw.image_entries[original]:
                raise UserError(
                    f"annotation file {raw.path}: image id {raw.image_ids[entry]!r} stands for both "
                    f"{raw.image_entries[original][0]} and {raw.image_entries[entry][0]}"
                )
        logger.warning(f"{raw.path}: {len(numbers) - len(kept)} images are listed more than once; used once")
    first = np.sort(first)
    rows[numbers[first]] = np.arange(len(first))
    return first, rows


def _trace_masks(
    raw: _Collector, image_rows: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Outlines of the RLE masks: vertices [V, 2], ring sizes [R], their annotations [R]; and the unusable ones."""
    vertices, ring_sizes, owners, bad = [np.zeros((0, 2), np.float32)], [], [], []
    for number, rle in raw.masks:
        row = image_rows[raw.image[number]]
        if row < 0:
            continue
        try:
            rings = polygons.rle_to_rings(
                {k: v for k, v in rle.items() if v is not None}, int(sizes[row, 0]), int(sizes[row, 1])
            )
        except (ValueError, TypeError) as e:
            logger.warning(f"{raw.path}: image id {raw.image_ids[row]!r}: RLE mask left out: {e}")
            bad.append(number)
            continue
        vertices += rings
        ring_sizes += [len(r) for r in rings]
        owners += [number] * len(rings)
    return np.concatenate(vertices), np.array(ring_sizes, np.int64), np.array(owners, np.int64), bad


def _gather_ragged(values: np.ndarray, starts: np.ndarray, sizes: np.ndarray, backwards: np.ndarray) -> np.ndarray:
    """Concatenates values[start : start + size], reversed where asked; in blocks, which bounds the index's memory."""
    result = np.empty((int(sizes.sum()), *values.shape[1:]), values.dtype)
    done = 0
    for block in range(0, len(sizes), 1 << 16):
        s, n, back = (a[block : block + (1 << 16)] for a in (starts, sizes, backwards))
        place = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        index = np.repeat(np.where(back, s + n - 1, s), n) + np.where(np.repeat(back, n), -place, place)
        result[done : done + len(index)] = values[index]
        done += len(index)
    return result


def _build_columns(
    raw: _Collector, label_of_category: dict, mask_required: bool, num_keypoints: int
) -> tuple[dict[str, Any], Counter]:
    """Sorts the annotations by image, checks them, orients and clips: the columns, and {reason: left out}."""
    entries, image_rows = _unique_images(raw)
    texts = [raw.image_entries[e] for e in entries]
    sizes = np.array([t[1:] for t in texts], np.int32).reshape(-1, 2)
    ids = [raw.image_ids[e] for e in entries]
    all_ints = all(type(i) is int and abs(i) < 1 << 63 for i in ids)

    # Rings of polygons and of masks, each with its annotation, its place and its orientation.
    vertices = np.frombuffer(raw.coordinates, np.float32).reshape(-1, 2)
    ring_sizes = np.asarray(raw.ring_sizes, np.int64)
    ring_owners = np.repeat(np.arange(len(raw.image)), np.asarray(raw.ring_counts, np.int64))
    inverted = polygons.ring_areas(vertices, ring_sizes) < 0
    finite = np.ones(len(ring_sizes), bool)
    if not np.isfinite(vertices).all():
        finite = np.logical_and.reduceat(np.isfinite(vertices).all(1), np.cumsum(ring_sizes) - ring_sizes)
    traced, traced_sizes, traced_owners, bad_masks = _trace_masks(raw, image_rows, sizes)
    if len(traced_sizes):
        vertices = np.concatenate([vertices, traced])
        ring_sizes = np.concatenate([ring_sizes, traced_sizes])
        ring_owners = np.concatenate([ring_owners, traced_owners])
        inverted = np.concatenate([inverted, np.zeros(len(traced_sizes), bool)])
        finite = np.concatenate([finite, np.ones(len(traced_sizes), bool)])
    ring_starts = np.cumsum(ring_sizes) - ring_sizes

    count = len(raw.image)
    rows = image_rows[np.asarray(raw.image, np.int64)] if count else np.zeros(0, np.int64)
    label_of_number = np.array([label_of_category.get(c, 0) for c in raw.category_numbers] or [0], np.int32)
    labels = label_of_number[np.asarray(raw.category, np.int64)]
    crowd = np.asarray(raw.crowd, np.int8).astype(bool)
    boxes = np.array(raw.boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    has_box = np.asarray(raw.has_box, np.int8).astype(bool)
    has_outline = np.zeros(count, bool)
    has_outline[ring_owners[finite]] = True
    wants = np.flatnonzero(~has_box[ring_owners] & finite)  # rings that must give their annotation a box
    if len(wants):
        points = _gather_ragged(vertices, ring_starts[wants], ring_sizes[wants], np.zeros(len(wants), bool))
        owners = np.repeat(ring_owners[wants], ring_sizes[wants])
        boxless = np.unique(owners)
        boxes[boxless] = [np.inf, np.inf, -np.inf, -np.inf]
        np.minimum.at(boxes, (owners[:, None], [0, 1]), points)
        np.maximum.at(boxes, (owners[:, None], [2, 3]), points)
    on_image = sizes[np.maximum(rows, 0)].astype(np.float64) if len(sizes) else np.zeros((count, 2))
    limits = on_image[:, [1, 0, 1, 0]]
    with np.errstate(invalid="ignore"):
        clipped = np.minimum(np.maximum(boxes, 0), limits).astype(np.float32)
        empty = ((clipped[:, 2:] - clipped[:, :2]) < MIN_SIDE).any(1)

    reason = np.zeros(count, np.int8)
    for code, bad in (
        (_NO_OUTLINE, ~has_outline & ~crowd if mask_required else np.zeros(count, bool)),
        (_EMPTY, empty),
        (_NUMBER, ~np.isfinite(boxes).all(1)),
        (_NO_PLACE, ~has_box & ~has_outline),
        (_CATEGORY, labels == 0),
        (_IMAGE, rows < 0),
    ):
        reason[bad] = code
    dropped = Counter({REASONS[code]: n for code, n in enumerate(np.bincount(reason).tolist()) if code and n})
    if raw.broken:
        dropped[REASONS[_BROKEN]] += raw.broken

    kept = np.flatnonzero(reason == _KEPT)
    kept = kept[np.argsort(rows[kept], kind="stable")]
    place = np.full(count, -1, np.int64)
    place[kept] = np.arange(len(kept))
    rings = np.flatnonzero(finite & (place[ring_owners] >= 0)) if count else np.zeros(0, np.int64)
    rings = rings[np.argsort(place[ring_owners[rings]], kind="stable")]
    columns = {
        "folder": np.zeros(len(sizes), np.int16),
        "file": _pack_texts(t[0] for t in texts),
        "id": np.array(ids, np.int64) if all_ints else _pack_texts(json.dumps(i) for i in ids),
        "sizes": sizes,
        "first_object": _offsets(np.bincount(rows[kept], minlength=len(sizes))),
        "boxes": clipped[kept],
        "labels": labels[kept],
        "crowd": crowd[kept],
        "first_ring": _offsets(np.bincount(place[ring_owners[rings]], minlength=len(kept))),
        "first_vertex": _offsets(ring_sizes[rings]),
        "vertices": _gather_ragged(vertices, ring_starts[rings], ring_sizes[rings], inverted[rings]),
        "keypoints": _keypoint_column(raw, place, len(kept), num_keypoints) if num_keypoints else None,
        "first_verified": None,
        "verified": None,
    }
    if raw.is_federated:
        given, lacking = (np.asarray(pairs, np.int64).reshape(-1, 2) for pairs in (raw.verified, raw.incomplete))
        lost = np.flatnonzero(reason == _NO_OUTLINE)
        columns |= _verified_columns(
            [(image_rows[given[:, 0]], label_of_number[given[:, 1]]), (rows[kept], labels[kept])],
            [(image_rows[lacking[:, 0]], label_of_number[lacking[:, 1]]), (rows[lost], labels[lost])],
            len(sizes),
            max(label_of_category.values(), default=0),
        )  # fmt: skip
    if raw.short_rings:
        dropped["polygon part with fewer than 3 points"] += raw.short_rings
    if not finite.all():
        dropped["polygon part with a coordinate that is not a finite number"] += int((~finite).sum())
    if bad_masks:
        dropped["RLE mask that does not fit its image"] += len(bad_masks)
    return columns, dropped


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _verified_columns(
    known: list[tuple[np.ndarray, np.ndarray]],
    incomplete: list[tuple[np.ndarray, np.ndarray]],
    num_images: int,
    num_classes: int,
) -> dict[str, np.ndarray]:
    """The columns first_verified int64 [num_images + 1] and verified int32: an image's labels that are `known`, but not
    `incomplete`. Both are pairs of images and labels; pairs of no image (-1) or no class (0) do not count."""
    size = np.int64(num_classes + 1)

    def codes(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        images, labels = (np.concatenate([p[side] for p in pairs]) for side in (0, 1))
        good = (images >= 0) & (labels > 0)
        found = np.sort(images[good] * size + labels[good])
        return found[np.diff(found, prepend=-1) > 0]  # numpy.unique takes ten times as long

    found = np.setdiff1d(codes(known), codes(incomplete), assume_unique=True)
    counts = np.bincount(found // size, minlength=num_images)
    return {"first_verified": _offsets(counts), "verified": (found % size).astype(np.int32)}


def _keypoint_column(raw: _Collector, place: np.ndarray, count: int, num_keypoints: int) -> np.ndarray:
    """float32 [count, K, 3]; the json's integer pixels become their centres, points of visibility 0 are all zero."""
    column = np.zeros((count, num_keypoints, 3), np.float32)
    for number, points in raw.keypoints:
        if place[number] < 0:
            continue
        if len(points) != 3 * num_keypoints:
            image_id = list(raw.image_numbers)[raw.image[number]]
            raise UserError(
                f"annotation file {raw.path}: image {image_id!r} has an object of {len(points) // 3} keypoints, "
                f"others have {num_keypoints}"
            )
        column[place[number]] = np.array(points, np.float32).reshape(-1, 3)
    shown = (column[:, :, 2] > 0) & np.isfinite(column).all(2)
    column[:, :, :2] += 0.5
    column[~shown] = 0
    return column


def _keypoint_flip(categories: list[dict], num_keypoints: int) -> np.ndarray:
    """Which keypoint each becomes in the mirrored image, by the names left_x and right_x."""
    names = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    if not names and num_keypoints == len(COCO_KEYPOINTS):
        names = COCO_KEYPOINTS
    number = {name: i for i, name in enumerate(names)}

    def mirrored(name: str) -> str:
        if "left" in name:
            return name.replace("left", "right")
        return name.replace("right", "left")

    return np.array([number.get(mirrored(n), i) for i, n in enumerate(names)] or range(num_keypoints), np.int64)


# ------------------------------------------------------------------------------------------------ files and folders
def _resolve(cfg: Any, name: str) -> tuple[str, str]:
    """Annotation file and image folder of a registered set."""
    base = Path(cfg.DATA.BASEDIR).expanduser()
    own = cfg.DATA.DATASETS.get(name)
    if own is not None:
        annotation_file, folder = (_own_path(base, p) for p in own)
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
        near = _near_folder(folder)
        raise UserError(f"{where}: image folder {folder} does not exist{near and f'; did you mean {near}?'}")
    return str(annotation_file.absolute()), str(folder.absolute())


def _own_path(base: Path, given: str) -> Path:
    """Relative to BASEDIR, or to the working directory when it exists only there."""
    path = Path(given).expanduser()
    return path if path.exists() and not (base / path).exists() else base / path


def _near_folder(folder: Path) -> str:
    there = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, there, 1, 0.5)
    return str(folder.parent / near[0]) if near else ""


def _missing_images(folder: str, files: list[str]) -> np.ndarray:
    """bool [n]: which files are not there; each directory is listed once instead of asking for each file."""
    listed: dict[str, set[str]] = {}
    missing = np.zeros(len(files), bool)
    for i, file in enumerate(files):
        directory, name = os.path.split(file)
        if directory not in listed:
            try:
                with os.scandir(os.path.join(folder, directory)) as entries:
                    listed[directory] = {e.name for e in entries}
            except OSError:
                listed[directory] = set()
        missing[i] = name not in listed[directory]
    return missing


# ------------------------------------------------------------------------------------------------ loading
def load_split(cfg: Any, name: str, class_names: Sequence[str] = (), training: bool = False) -> DatasetSplit:
    """Reads one registered set.

    Args:
        class_names: the classes in the order of their labels, matched to the file's categories by name; those of the
            file in the order of their ids if empty.
        training: with MODE_MASK, objects without an outline are left out, since they cannot be trained on.
    """
    started = time.time()
    own = cfg.DATA.DATASETS.get(name)
    if own is not None and not own[0].endswith(".json"):
        from dataset_formats import load_format  # which builds on this module

        return load_format(own, cfg, name, class_names, training)
    annotation_file, folder = _resolve(cfg, name)
    raw = _Collector(annotation_file, cfg.MODE_KEYPOINT)
    rest = _scan_json(annotation_file, raw.add_image, raw.add_annotation)
    for key in ("images", "categories"):
        if key not in rest:
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: it has no '{key}'")
    for key in ("images", "annotations"):
        if rest.get(key, True) is not True:
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: '{key}' must be a list")
    ids, names = _order_categories(annotation_file, rest["categories"])
    category_ids = _match_classes(annotation_file, ids, names, class_names) if class_names else ids
    label_of_category = {c: label for label, c in enumerate(category_ids, 1) if c is not None}
    num_keypoints = _count_keypoints(cfg, annotation_file, rest["categories"], raw)
    columns, dropped = _build_columns(raw, label_of_category, training and cfg.MODE_MASK, num_keypoints)
    num_annotations = len(raw.image) + raw.broken
    if num_annotations and dropped[REASONS[_IMAGE]] == num_annotations:
        raise UserError(
            f"annotation file {annotation_file}: none of its {num_annotations} annotations has the image id of one of "
            f"its {len(raw.image_ids)} images"
        )
    split = DatasetSplit(
        name, annotation_file, [folder], list(class_names) or names, category_ids, columns, dict(dropped),
        num_annotations, _keypoint_flip(rest["categories"], num_keypoints),
    )  # fmt: skip
    _check_images(cfg, split, folder)
    _report(split, time.time() - started)
    return split


def _count_keypoints(cfg: Any, path: str, categories: list[dict], raw: _Collector) -> int:
    if not cfg.MODE_KEYPOINT:
        return 0
    counts = {len(c["keypoints"]) for c in categories if c.get("keypoints")}
    counts = counts or {len(points) // 3 for _, points in raw.keypoints[:1]}
    if len(counts) != 1:
        raise UserError(
            f"annotation file {path}: its categories have {len(counts) or 'no'} "
            f"{'different numbers of ' if counts else ''}keypoints; MODE_KEYPOINT=True needs one kind of skeleton"
        )
    return counts.pop()


def _check_images(cfg: Any, split: DatasetSplit, folder: str) -> None:
    """Leaves out the images that are missing on disk if that is allowed, else names one."""
    files = _texts(split._columns["file"])
    missing = np.flatnonzero(_missing_images(folder, files))
    if len(missing) == 0:
        return
    first = os.path.join(folder, files[missing[0]])
    what = f"{split.name}: {len(missing)} of {len(files)} images are missing, e.g. {first}"
    if not cfg.DATA.KEEP_MISSING_IMAGES or len(missing) == len(files):
        raise UserError(f"{what}; DATA.KEEP_MISSING_IMAGES=True goes on without them")
    logger.warning(f"{what}: going on without them")
    split._columns = _select_images(split._columns, np.setdiff1d(np.arange(len(files)), missing))


def _select_images(columns: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
    """The columns of these images alone, in this order."""
    c = columns
    objects = _ranges(c["first_object"], images)
    rings = _ranges(c["first_ring"], objects)
    ids, first_verified = c["id"], c["first_verified"]
    return {
        "folder": c["folder"][images],
        "file": _select_texts(c["file"], images),
        "id": ids[images] if isinstance(ids, np.ndarray) else _select_texts(ids, images),
        "sizes": c["sizes"][images],
        "first_object": _offsets(np.diff(c["first_object"])[images]),
        "boxes": c["boxes"][objects],
        "labels": c["labels"][objects],
        "crowd": c["crowd"][objects],
        "first_ring": _offsets(np.diff(c["first_ring"])[objects]),
        "first_vertex": _offsets(np.diff(c["first_vertex"])[rings]),
        "vertices": c["vertices"][_ranges(c["first_vertex"], rings)],
        "keypoints": None if c["keypoints"] is None else c["keypoints"][objects],
        "first_verified": None if first_verified is None else _offsets(np.diff(first_verified)[images]),
        "verified": None if first_verified is None else c["verified"][_ranges(first_verified, images)],
    }


def _select_texts(column: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return column[0][_ranges(column[1], rows)], _offsets(np.diff(column[1])[rows])


def _ranges(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Indices of everything that belongs to the rows: the ranges offsets[r] .. offsets[r + 1], one after the other."""
    sizes = offsets[rows + 1] - offsets[rows]
    return np.arange(int(sizes.sum())) + np.repeat(offsets[rows] - (np.cumsum(sizes) - sizes), sizes)


def _report(split: DatasetSplit, seconds: float) -> None:
    logger.info(
        f"{split.name}: {len(split)} images, {len(split._columns['labels'])} objects of {len(split.class_names)} "
        f"classes ({seconds:.1f} s)"
    )
    if split.dropped:
        rows = sorted(split.dropped.items(), key=lambda r: -r[1])
        table = tabulate(rows, ["left out", "count"], tablefmt="pipe")
        logger.warning(f"{split.name}: not everything among its {split.num_annotations} annotations is used\n{table}")


def load_training_split(cfg: Any) -> DatasetSplit:
    """All sets of DATA.TRAIN as one. DATA.CLASS_NAMES, if set, chooses and orders the classes."""
    if not cfg.DATA.TRAIN:
        raise UserError("DATA.TRAIN names no data set to train on, e.g. --config DATA.TRAIN=coco_train2017")
    wanted = list(cfg.DATA.CLASS_NAMES)
    splits: list[DatasetSplit] = []
    for name in cfg.DATA.TRAIN:
        split = load_split(cfg, name, training=True, class_names=wanted or (splits[0].class_names if splits else ()))
        if splits or wanted:
            _check_same_classes(cfg, split, strict=not wanted)
        splits.append(split)
    split = concatenate_splits(splits)
    if cfg.FRCNN.FEDERATED_LOSS and not split.is_federated():
        raise UserError(
            f"setting FRCNN.FEDERATED_LOSS=True: {', '.join(cfg.DATA.TRAIN)} does not say which classes people "
            "looked for in an image (Open Images' image labels, or neg_category_ids of a json's images)"
        )
    if len(split.nonempty_images()) == 0:
        outlines = split.dropped.get(REASONS[_NO_OUTLINE], 0)
        why = f"none of its {outlines} objects has an outline; set MODE_MASK=False" if outlines else "check its json"
        raise UserError(f"{', '.join(cfg.DATA.TRAIN)}: no image with an object to train on: {why}")
    return split


def _check_same_classes(cfg: Any, split: DatasetSplit, strict: bool) -> None:
    """Every class of the run must be in the set and, if strict, no other."""
    lacking = [n for n, c in zip(split.class_names, split._category_ids) if c is None]
    if lacking:
        raise UserError(
            f"{split.name} has no category '{lacking[0]}', which "
            f"{'DATA.CLASS_NAMES names' if not strict else f'{cfg.DATA.TRAIN[0]} has'}; sets that are trained together "
            "must have the same classes"
        )
    more = split.dropped.get(REASONS[_CATEGORY], 0)
    if strict and more:
        raise UserError(
            f"{split.name} has {more} annotations of categories that {cfg.DATA.TRAIN[0]} does not have; sets that are "
            "trained together must have the same classes (or choose some with DATA.CLASS_NAMES)"
        )


def load_validation_splits(cfg: Any) -> list[DatasetSplit]:
    """The sets of DATA.VAL, labels in the order of DATA.CLASS_NAMES if set, matched by name.

    With MODE_RPN_ONLY each has the classes of its own annotations: proposals are of all of them.
    """
    splits = []
    for name in cfg.DATA.VAL:
        split = load_split(cfg, name, [] if cfg.MODE_RPN_ONLY else cfg.DATA.CLASS_NAMES)
        lacking = [n for n, c in zip(split.class_names, split._category_ids) if c is None]
        if lacking:
            logger.warning(f"{name} has no category {_some(lacking)}: detections of it are not scored there")
        splits.append(split)
    return splits


class ConcatenatedSplit(DatasetSplit):
    """The images of several sets, to train on."""

    def evaluate(self, results: list[dict], **options: Any) -> dict[str, float]:
        raise ValueError(f"{self.name}: sets are scored one by one, each by its own protocol")


def concatenate_splits(splits: Sequence[DatasetSplit]) -> DatasetSplit:
    """One split with the images of all; their class names must be equal."""
    if len(splits) == 1:
        return splits[0]
    if any(s.class_names != splits[0].class_names for s in splits):
        raise ValueError("concatenated splits must have the same classes")
    parts = [s._columns for s in splits]
    folders = [folder for s in splits for folder in s._folders]
    starts = np.cumsum([0] + [len(s._folders) for s in splits])
    columns: dict[str, Any] = {
        key: np.concatenate([p[key] for p in parts])
        for key in ("sizes", "boxes", "labels", "crowd", "vertices")
    }  # fmt: skip
    columns["folder"] = np.concatenate([p["folder"] + np.int16(s) for p, s in zip(parts, starts)])
    columns["file"] = _join_texts([p["file"] for p in parts])
    for key in ("first_object", "first_ring", "first_vertex"):
        columns[key] = _offsets(np.concatenate([np.diff(p[key]) for p in parts]))
    if all(isinstance(p["id"], np.ndarray) for p in parts):
        columns["id"] = np.concatenate([p["id"] for p in parts])
    else:
        columns["id"] = _pack_texts(json.dumps(s.image_id(i)) for s in splits for i in range(len(s)))
    points = [p["keypoints"] for p in parts]
    if len({None if k is None else k.shape[1] for k in points}) > 1:
        raise UserError("sets that are trained together must have the same keypoints")
    columns["keypoints"] = None if points[0] is None else np.concatenate(points)
    columns |= {"first_verified": None, "verified": None}
    if any(s.is_federated() for s in splits):
        every = [np.full(len(p["sizes"]), _EVERY_CLASS, np.int32) for p in parts]
        labels = [p["verified"] if s.is_federated() else e for s, p, e in zip(splits, parts, every)]
        counts = [
            np.diff(p["first_verified"]) if s.is_federated() else np.ones(len(s), np.int64)
            for s, p in zip(splits, parts)
        ]
        columns |= {"first_verified": _offsets(np.concatenate(counts)), "verified": np.concatenate(labels)}
    dropped = Counter()
    for s in splits:
        dropped.update(s.dropped)
    first = splits[0]
    return ConcatenatedSplit(
        "+".join(s.name for s in splits), first.annotation_file, folders, first.class_names, first._category_ids,
        columns, dict(dropped), sum(s.num_annotations for s in splits), first.keypoint_flip,
    )  # fmt: skip


def _join_texts(columns: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([c[0] for c in columns]), _offsets(np.concatenate([np.diff(c[1]) for c in columns]))


def class_count_table(split: DatasetSplit) -> str:
    """Objects of each class and images that show it, in label order, as many columns as keep it under 30 rows."""
    objects, images = split.class_counts()
    rows = [[n, int(o), int(i)] for n, o, i in zip(split.class_names, objects, images)]
    total = ["all", int(objects.sum()), len(split.nonempty_images())]
    groups = max(1, -(-len(rows) // 30))
    height = -(-len(rows) // groups)
    lines = [
        [cell for g in range(groups) for cell in (rows[r + g * height] if r + g * height < len(rows) else [""] * 3)]
        for r in range(height)
    ]
    lines.append(total + [""] * (3 * (groups - 1)))
    return tabulate(lines, ["class", "objects", "images"] * groups, tablefmt="pipe")
