"""Builds the columns of a `DatasetSplit` from annotations in COCO's form. Every format is loaded through here."""

import json
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from common import UserError, logger
from config import Config
from dataset_split import MIN_SIDE, DatasetSplit, pack_texts, select_images, to_offsets, unpack_texts
from utils import polygons
from utils.archives import list_folder
from utils.coco_format import (
    REASONS,
    Unusable,
    look_like_corners,
    read_annotation,
    read_categories,
    read_image,
    refuse_normalised,
)
from utils.image_header import meant_file

__all__ = [
    "COCO_KEYPOINTS",
    "AnnotationCollector",
    "build_columns",
    "count_keypoints",
    "leave_out_missing_images",
    "make_split",
    "match_classes",
    "mirrored_keypoints",
    "order_categories",
    "report_split",
    "some_names",
    "split_from_coco",
    "verified_columns",
]

COCO_KEYPOINTS = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
    "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
    "right_ankle",
]  # fmt: skip

# Reasons to leave out an annotation that could be read (index = code in the columns), in the order of the checks.
_KEPT, _IMAGE, _CATEGORY, _NO_PLACE, _EMPTY, _NO_OUTLINE = range(6)
_REASONS = [
    "", REASONS["unknown image"], "category is unknown or not trained", REASONS["place"],
    "box has no area inside the image", "no outline (MODE_MASK trains masks)",
]  # fmt: skip
IMAGE_UNKNOWN, CLASS_UNKNOWN, WITHOUT_OUTLINE = (_REASONS[_IMAGE], _REASONS[_CATEGORY], _REASONS[_NO_OUTLINE])


class AnnotationCollector:
    """Columns that grow while the annotation file is read, in the order of the file."""

    def __init__(self, origin: str, with_keypoints: bool):
        self.origin = origin
        self.with_keypoints = with_keypoints
        self.image_entries: list[tuple[str, int, int]] = []  # file name, height, width
        self.image_ids: list = []
        self.image_of_entry = array("i")  # number of the image id of each image entry
        self.image_numbers: dict = {}  # any image id -> number, in order of appearance
        self.category_numbers: dict = {}
        # Whether images list the classes that annotators looked for; the flat (image, category) numbers of these, and
        # of classes with some objects not annotated.
        self.is_federated = False
        self.verified, self.incomplete = array("i"), array("i")
        # {key of coco_format.REASONS: how many} annotations, and parts of outlines, that cannot be used.
        self.unusable: Counter = Counter()
        self.parts_left_out: Counter = Counter()
        self.examples: dict[str, str] = {}  # {reason: the first annotation left out for it}
        self.image, self.category = array("i"), array("i")  # per annotation
        self.crowd = array("b")
        self.boxes = array("d")  # x y w h; NaN when not given
        self.has_box = array("b")
        self.ring_counts = array("i")
        self.ring_sizes = array("i")
        self.coordinates = array("f")
        self.masks: list[tuple[int, dict]] = []  # annotation, RLE
        self.keypoints: list[tuple[int, list]] = []

    def add_image(self, entry: Any) -> None:
        image = read_image(entry, self.origin)
        number = self.image_numbers.setdefault(image.id, len(self.image_numbers))
        self.is_federated |= image.is_federated
        for pairs, ids in (
            (self.verified, image.present), (self.verified, image.absent), (self.incomplete, image.incomplete)
        ):  # fmt: skip
            for category in ids:
                pairs.extend((number, self.category_numbers.setdefault(category, len(self.category_numbers))))
        self.image_ids.append(image.id)
        self.image_of_entry.append(number)
        self.image_entries.append((image.file_name, image.height, image.width))

    def add_annotation(self, entry: Any) -> None:
        try:
            a = read_annotation(entry, self.with_keypoints)
        except Unusable as e:
            self.unusable[e.reason] += 1
            self._note(entry, e.reason, e.detail)
            return
        number = len(self.image)
        self.image.append(self.image_numbers.setdefault(a.image_id, len(self.image_numbers)))
        self.category.append(self.category_numbers.setdefault(a.category_id, len(self.category_numbers)))
        self.crowd.append(a.is_crowd)
        self.has_box.append(a.box is not None)
        self.boxes.extend(a.box or (0.0, 0.0, 0.0, 0.0))
        for ring in a.rings:
            self.coordinates.extend(ring)
            self.ring_sizes.append(len(ring) // 2)
        self.ring_counts.append(len(a.rings))
        if a.box is None or not a.is_crowd:
            self.masks.extend((number, _compact_rle(rle)) for rle in a.masks)
        if a.keypoints:
            self.keypoints.append((number, a.keypoints))
        for reason, detail in a.left_out:
            self.parts_left_out[reason] += 1
            self._note(entry, reason, detail)

    def _note(self, entry: Any, reason: str, detail: str) -> None:
        if REASONS[reason] in self.examples:
            return
        keys = {"image": "image_id", "annotation": "id"} if isinstance(entry, dict) else {}
        where = ", ".join(f"{what} {entry[key]!r}"[:60] for what, key in keys.items() if key in entry)
        self.examples[REASONS[reason]] = f"{where}: {detail}" if where else detail


def _compact_rle(rle: dict) -> dict:
    return {**rle, "counts": rle["counts"] if isinstance(rle["counts"], str) else np.asarray(rle["counts"], np.int64)}


# ------------------------------------------------------------------------------------------------ columns of a split
def order_categories(origin: str, categories: Any) -> tuple[list, list[str]]:
    """Category ids and names in the order of the ids, which is the order of the labels."""
    names = read_categories(categories, origin)
    twice = [n for n, count in Counter(names.values()).items() if count > 1]
    if twice:
        same = " and ".join(repr(i) for i in names if names[i] == twice[0])
        raise UserError(f"{origin}: categories {same} are both named '{twice[0]}'; rename one")
    if not names:
        raise UserError(f"{origin} has no categories")
    return list(names), list(names.values())


def match_classes(origin: str, ids: list, names: list[str], class_names: Sequence[str]) -> list:
    """The category id of each wanted class; None for classes missing from this file."""
    by_name = dict(zip(names, ids))
    matched = [by_name.get(n) for n in class_names]
    if not any(n in by_name for n in class_names):
        raise UserError(
            f"{origin} has none of the model's classes: it has {some_names(names)}, the model {some_names(class_names)}"
        )
    return matched


def some_names(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "")


def _unique_images(raw: AnnotationCollector) -> tuple[np.ndarray, np.ndarray]:
    """Entries to keep, and the row of each image number (-1: no such image)."""
    numbers = np.asarray(raw.image_of_entry, np.int64)
    rows = np.full(len(raw.image_numbers), -1, np.int64)
    kept, first = np.unique(numbers, return_index=True)
    if len(kept) < len(numbers):
        for entry in np.setdiff1d(np.arange(len(numbers)), first):
            original = first[np.searchsorted(kept, numbers[entry])]
            if raw.image_entries[entry] != raw.image_entries[original]:
                raise UserError(
                    f"{raw.origin}: image id {raw.image_ids[entry]!r} stands for both "
                    f"{raw.image_entries[original][0]} and {raw.image_entries[entry][0]}"
                )
        logger.warning(f"{raw.origin}: {len(numbers) - len(kept)} images are listed more than once; used once")
    first = np.sort(first)
    rows[numbers[first]] = np.arange(len(first))
    return first, rows


def _trace_masks(
    raw: AnnotationCollector, image_rows: np.ndarray, sizes: np.ndarray
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
            logger.warning(f"{raw.origin}: image id {raw.image_ids[row]!r}: RLE mask left out: {e}")
            bad.append(number)
            continue
        vertices += rings
        ring_sizes += [len(r) for r in rings]
        owners += [number] * len(rings)
    return np.concatenate(vertices), np.array(ring_sizes, np.int64), np.array(owners, np.int64), bad


def _gather_ragged(values: np.ndarray, starts: np.ndarray, sizes: np.ndarray, backwards: np.ndarray) -> np.ndarray:
    """Concatenates values[start : start + size], reversed where `backwards` is True; works in blocks to limit
    memory."""
    result = np.empty((int(sizes.sum()), *values.shape[1:]), values.dtype)
    done = 0
    for block in range(0, len(sizes), 1 << 16):
        s, n, back = (a[block : block + (1 << 16)] for a in (starts, sizes, backwards))
        place = np.arange(int(n.sum())) - np.repeat(np.cumsum(n) - n, n)
        index = np.repeat(np.where(back, s + n - 1, s), n) + np.where(np.repeat(back, n), -place, place)
        result[done : done + len(index)] = values[index]
        done += len(index)
    return result


def _bound_rings(
    vertices: np.ndarray, ring_sizes: np.ndarray, ring_owners: np.ndarray, rows: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clips rings that reach several times the image's size beyond it to the image, because points as far as 1e30
    overflow float32 and cannot be drawn. Other rings stay unchanged."""
    if not len(vertices) or not len(sizes) or np.abs(vertices).max() <= 4 * sizes.min():
        return vertices, ring_sizes, ring_owners
    known = rows[ring_owners] >= 0
    reach = np.maximum.reduceat(np.abs(vertices).max(1), np.cumsum(ring_sizes) - ring_sizes)
    far = known & (reach > 4.0 * sizes[np.maximum(rows[ring_owners], 0)].max(1))
    if not far.any():
        return vertices, ring_sizes, ring_owners
    rings = np.split(vertices, np.cumsum(ring_sizes)[:-1])
    for i in np.flatnonzero(far):
        rings[i] = polygons.clip_ring(rings[i].astype(np.float64), *sizes[rows[ring_owners[i]]].tolist())
    kept = np.array([len(ring) > 0 for ring in rings])
    rings = [ring.astype(np.float32) for ring in rings if len(ring)]
    vertices = np.concatenate(rings) if rings else np.zeros((0, 2), np.float32)
    return vertices, np.array([len(ring) for ring in rings], np.int64), ring_owners[kept]


def _check_coordinates(
    raw: AnnotationCollector, boxes: np.ndarray, used: np.ndarray, sizes: np.ndarray, rows: np.ndarray
) -> None:
    """Raises UserError for boxes normalised to 0..1; warns if boxes look like x1 y1 x2 y2 instead of x y width
    height."""
    given = boxes[used].copy()
    given[:, 2:] -= given[:, :2]
    if not len(given):
        return
    refuse_normalised(given, float(sizes.min()), raw.origin)
    if look_like_corners(given, sizes[rows[used]]):
        logger.warning(
            f"{raw.origin}: its boxes look like x1 y1 x2 y2; COCO's are x y width height, and they are read as such"
        )


def build_columns(
    raw: AnnotationCollector, label_of_category: dict, mask_required: bool, num_keypoints: int
) -> tuple[dict[str, Any], Counter]:
    """Sorts annotations by image, checks them, orients and clips outlines -> the columns, and {reason: number left
    out}."""
    entries, image_rows = _unique_images(raw)
    texts = [raw.image_entries[e] for e in entries]
    sizes = np.array([t[1:] for t in texts], np.int32).reshape(-1, 2)
    ids = [raw.image_ids[e] for e in entries]
    all_ints = all(type(i) is int and abs(i) < 1 << 63 for i in ids)

    # Rings of polygons and of masks, each with its annotation, its place and its orientation.
    vertices = np.frombuffer(raw.coordinates, np.float32).reshape(-1, 2)
    ring_sizes = np.asarray(raw.ring_sizes, np.int64)
    ring_owners = np.repeat(np.arange(len(raw.image)), np.asarray(raw.ring_counts, np.int64))
    rows = image_rows[np.asarray(raw.image, np.int64)] if len(raw.image) else np.zeros(0, np.int64)
    vertices, ring_sizes, ring_owners = _bound_rings(vertices, ring_sizes, ring_owners, rows, sizes)
    inverted = polygons.ring_areas(vertices, ring_sizes) < 0
    traced, traced_sizes, traced_owners, bad_masks = _trace_masks(raw, image_rows, sizes)
    if len(traced_sizes):
        vertices = np.concatenate([vertices, traced])
        ring_sizes = np.concatenate([ring_sizes, traced_sizes])
        ring_owners = np.concatenate([ring_owners, traced_owners])
        inverted = np.concatenate([inverted, np.zeros(len(traced_sizes), bool)])
    ring_starts = np.cumsum(ring_sizes) - ring_sizes

    count = len(raw.image)
    label_of_number = np.array([label_of_category.get(c, 0) for c in raw.category_numbers] or [0], np.int32)
    labels = label_of_number[np.asarray(raw.category, np.int64)]
    crowd = np.asarray(raw.crowd, np.int8).astype(bool)
    boxes = np.array(raw.boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    has_box = np.asarray(raw.has_box, np.int8).astype(bool)
    has_outline = np.zeros(count, bool)
    has_outline[ring_owners] = True
    wants = np.flatnonzero(~has_box[ring_owners])  # rings whose annotation has no box and gets one from them
    if len(wants):
        points = _gather_ragged(vertices, ring_starts[wants], ring_sizes[wants], np.zeros(len(wants), bool))
        owners = np.repeat(ring_owners[wants], ring_sizes[wants])
        boxless = np.unique(owners)
        boxes[boxless] = [np.inf, np.inf, -np.inf, -np.inf]
        np.minimum.at(boxes, (owners[:, None], [0, 1]), points)
        np.maximum.at(boxes, (owners[:, None], [2, 3]), points)
    on_image = sizes[np.maximum(rows, 0)].astype(np.float64) if len(sizes) else np.zeros((count, 2))
    limits = on_image[:, [1, 0, 1, 0]]
    clipped = np.minimum(np.maximum(boxes, 0), limits).astype(np.float32)
    empty = ((clipped[:, 2:] - clipped[:, :2]) < MIN_SIDE).any(1)
    _check_coordinates(raw, boxes, has_box & ~crowd & (rows >= 0), sizes, rows)

    reason = np.zeros(count, np.int8)
    for code, bad in (
        (_NO_OUTLINE, ~has_outline & ~crowd if mask_required else np.zeros(count, bool)),
        (_EMPTY, empty),
        (_NO_PLACE, ~has_box & ~has_outline),
        (_CATEGORY, labels == 0),
        (_IMAGE, rows < 0),
    ):
        reason[bad] = code
    dropped = Counter({_REASONS[code]: n for code, n in enumerate(np.bincount(reason).tolist()) if code and n})
    for key, number in (raw.unusable + raw.parts_left_out).items():
        dropped[REASONS[key]] += number

    kept = np.flatnonzero(reason == _KEPT)
    kept = kept[np.argsort(rows[kept], kind="stable")]
    place = np.full(count, -1, np.int64)
    place[kept] = np.arange(len(kept))
    rings = np.flatnonzero(place[ring_owners] >= 0) if count else np.zeros(0, np.int64)
    rings = rings[np.argsort(place[ring_owners[rings]], kind="stable")]
    columns = {
        "folder": np.zeros(len(sizes), np.int16),
        "file": pack_texts(t[0] for t in texts),
        "id": np.array(ids, np.int64) if all_ints else pack_texts(json.dumps(i) for i in ids),
        "sizes": sizes,
        "first_object": to_offsets(np.bincount(rows[kept], minlength=len(sizes))),
        "boxes": clipped[kept],
        "labels": labels[kept],
        "crowd": crowd[kept],
        "first_ring": to_offsets(np.bincount(place[ring_owners[rings]], minlength=len(kept))),
        "first_vertex": to_offsets(ring_sizes[rings]),
        "vertices": _gather_ragged(vertices, ring_starts[rings], ring_sizes[rings], inverted[rings]),
        "keypoints": _keypoint_column(raw, place, len(kept), num_keypoints) if num_keypoints else None,
        "first_verified": None,
        "verified": None,
    }
    if raw.is_federated:
        given, incomplete = (np.asarray(pairs, np.int64).reshape(-1, 2) for pairs in (raw.verified, raw.incomplete))
        lost = np.flatnonzero(reason == _NO_OUTLINE)
        columns |= verified_columns(
            [(image_rows[given[:, 0]], label_of_number[given[:, 1]]), (rows[kept], labels[kept])],
            [(image_rows[incomplete[:, 0]], label_of_number[incomplete[:, 1]]), (rows[lost], labels[lost])],
            len(sizes),
            max(label_of_category.values(), default=0),
        )  # fmt: skip
    if bad_masks:
        dropped[REASONS["rle"]] += len(bad_masks)
    return columns, dropped


def verified_columns(
    known: list[tuple[np.ndarray, np.ndarray]],
    incomplete: list[tuple[np.ndarray, np.ndarray]],
    num_images: int,
    num_classes: int,
) -> dict[str, np.ndarray]:
    """The columns first_verified int64 [num_images + 1] and verified int32: for each image the labels in `known` but
    not in `incomplete`. Both arguments are arrays of images and labels; pairs without an image (-1) or class (0) are
    ignored."""
    size = np.int64(num_classes + 1)

    def codes(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        images, labels = (np.concatenate([p[side] for p in pairs]) for side in (0, 1))
        good = (images >= 0) & (labels > 0)
        found = np.sort(images[good] * size + labels[good])
        return found[np.diff(found, prepend=-1) > 0]  # numpy.unique takes ten times as long

    found = np.setdiff1d(codes(known), codes(incomplete), assume_unique=True)
    counts = np.bincount(found // size, minlength=num_images)
    return {"first_verified": to_offsets(counts), "verified": (found % size).astype(np.int32)}


def _keypoint_column(raw: AnnotationCollector, place: np.ndarray, count: int, num_keypoints: int) -> np.ndarray:
    """float32 [count, K, 3]. The json's integer pixel numbers become pixel centres; points of visibility 0 become
    zeros."""
    column = np.zeros((count, num_keypoints, 3), np.float32)
    for number, points in raw.keypoints:
        if place[number] < 0:
            continue
        if len(points) != 3 * num_keypoints:
            image_id = list(raw.image_numbers)[raw.image[number]]
            raise UserError(
                f"{raw.origin}: image {image_id!r} has an object of {len(points) // 3} keypoints, "
                f"others have {num_keypoints}"
            )
        column[place[number]] = np.array(points, np.float32).reshape(-1, 3)
    shown = (column[:, :, 2] > 0) & np.isfinite(column).all(2)
    column[:, :, :2] += 0.5
    column[~shown] = 0
    return column


def mirrored_keypoints(
    categories: list[dict], num_keypoints: int, pairs: Sequence[Sequence[str | int]] = ()
) -> np.ndarray:
    """int64 [K]: the number that each keypoint gets in a mirrored image.

    pairs: the left and right ones by name or number from 0 (KRCNN.FLIP_PAIRS); without any they are found by their
    names: left_eye and right_eye, LeftEye, l_eye, eye_L, "left eye" and the like.
    """
    names = next((c["keypoints"] for c in categories if c.get("keypoints")), [])
    if not names and num_keypoints == len(COCO_KEYPOINTS):
        names = COCO_KEYPOINTS
    names = list(names)[:num_keypoints]
    flip = np.arange(num_keypoints)
    if pairs:
        for pair in pairs:
            first, second = (_keypoint_number(k, names, num_keypoints) for k in pair)
            flip[first], flip[second] = second, first
        return flip
    found: dict[tuple, int] = {}
    for i, name in enumerate(names):
        side, rest = _side_of(str(name))
        if side:
            found[side, rest] = i
    for (side, rest), i in found.items():
        flip[i] = found.get(("right" if side == "left" else "left", rest), i)
    return flip


def _keypoint_number(key: str | int, names: Sequence[str], count: int) -> int:
    if isinstance(key, str) and key in names:
        return names.index(key)
    if isinstance(key, int) and 0 <= key < count:
        return key
    raise UserError(f"setting KRCNN.FLIP_PAIRS: {key!r} is not one of the {count} keypoints {', '.join(names)}")


def _side_of(name: str) -> tuple[str, str]:
    """("left", "right" or "", the name without its side)."""
    words = [w.lower() for w in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+|\d+", name)]
    for side, short in (("left", "l"), ("right", "r")):
        for word in (side, short):
            if words.count(word) == 1:
                place = words.index(word)
                return side, "_".join([*words[:place], "*", *words[place + 1 :]])
    for side in ("left", "right"):
        if name.lower().count(side) == 1:
            return side, name.lower().replace(side, "*")
    return "", name


def _check_keypoint_settings(cfg: Config, split: DatasetSplit, training: bool) -> None:
    count = len(split.keypoint_flip)
    if cfg.KRCNN.OKS_SIGMAS and len(cfg.KRCNN.OKS_SIGMAS) != count:
        raise UserError(
            f"setting KRCNN.OKS_SIGMAS has {len(cfg.KRCNN.OKS_SIGMAS)} numbers, {split.name} has {count} keypoints"
        )
    if training and cfg.PREPROC.FLIP and count > 1 and (split.keypoint_flip == np.arange(count)).all():
        logger.warning(
            f"{split.name}: no left and right among its {count} keypoints, so mirrored images keep all of them as "
            "they are; name the pairs by KRCNN.FLIP_PAIRS, or set PREPROC.FLIP=False"
        )


def count_keypoints(cfg: Config, origin: str, categories: list[dict], raw: AnnotationCollector) -> int:
    """The number of keypoints per object; 0 without MODE_KEYPOINT."""
    if not cfg.MODE_KEYPOINT:
        return 0
    listed = [c["keypoints"] for c in categories if c.get("keypoints")]
    if not all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in listed):
        raise UserError(f"{origin}: 'keypoints' of a category must be a list of names")
    counts = {len(names) for names in listed} or {len(points) // 3 for _, points in raw.keypoints[:1]}
    if len(counts) != 1:
        raise UserError(
            f"{origin}: its categories have {len(counts) or 'no'} "
            f"{'different numbers of ' if counts else ''}keypoints; MODE_KEYPOINT=True needs one kind of skeleton"
        )
    count = counts.pop()
    if count != cfg.KRCNN.NUM_KEYPOINT:
        raise UserError(
            f"{origin}: its objects have {count} keypoints, but KRCNN.NUM_KEYPOINT is "
            f"{cfg.KRCNN.NUM_KEYPOINT}; set KRCNN.NUM_KEYPOINT={count} (the model and its data must have as many)"
        )
    return count


def _missing_images(folder: str, files: list[str]) -> np.ndarray:
    """bool [n]: which files are missing. Each directory is listed once, which is faster than checking each file."""
    listed: dict[str, set[str]] = {}
    missing = np.zeros(len(files), bool)
    for i, file in enumerate(files):
        directory, name = os.path.split(file)
        if directory not in listed:
            try:
                listed[directory] = set(list_folder(os.path.join(folder, directory)))
            except OSError:
                listed[directory] = set()
        missing[i] = name not in listed[directory]
    return missing


def leave_out_missing_images(cfg: Config, split: DatasetSplit, folder: str) -> None:
    """Leaves out images that are missing on disk if the settings allow it; otherwise raises UserError."""
    files = unpack_texts(split.columns["file"])
    missing = np.flatnonzero(_missing_images(folder, files))
    if len(missing) == 0:
        return
    first = os.path.join(folder, files[missing[0]])
    hint = meant_file(folder, files[missing[0]])
    what = f"{split.name}: {len(missing)} of {len(files)} images are missing, e.g. {first}{hint}"
    if not cfg.DATA.KEEP_MISSING_IMAGES or len(missing) == len(files):
        raise UserError(f"{what}; DATA.KEEP_MISSING_IMAGES=True goes on without them")
    logger.warning(f"{what}: going on without them")
    split.columns = select_images(split.columns, np.setdiff1d(np.arange(len(files)), missing))


def report_split(split: DatasetSplit, seconds: float, examples: dict[str, str] | None = None) -> None:
    """Logs the size of the split and, by reason, the number of annotations left out."""
    logger.info(
        f"{split.name}: {len(split)} images, {len(split.columns['labels'])} objects of {len(split.class_names)} "
        f"classes ({seconds:.1f} s)"
    )
    if split.dropped:
        rows = [(what, n, (examples or {}).get(what, "")) for what, n in split.dropped.items()]
        rows.sort(key=lambda r: -r[1])
        columns = 3 if any(example for _, _, example in rows) else 2
        head = ["left out", "count", "for example"][:columns]
        table = tabulate([row[:columns] for row in rows], head, tablefmt="pipe", disable_numparse=True)
        logger.warning(
            f"{split.name}: some of its {split.num_annotations} annotations, or parts of them, were left out; "
            f"tools/check_data.py lists them\n{table}"
        )


def split_from_coco(
    name: str,
    read_content: Callable[[], dict[str, Any]],
    folder: str | Path,
    cfg: Config,
    class_names: Sequence[str] = (),
    training: bool = False,
    origin: str = "",
    protocols: Sequence[str] = ("coco",),
) -> DatasetSplit:
    """A split from COCO-like content: {"images": […], "annotations": […], "categories": […]}.

    Args:
        read_content: returns that content; it is called again when the set is scored, and must be picklable (a
            function of a module, or functools.partial of one).
        folder: where the images' file_name are found.
        origin: what error messages call the source; `name` if empty.
        protocols: how it is scored, names of eval_protocols.PROTOCOLS.
    """
    started = time.time()
    content = read_content()
    raw = AnnotationCollector(origin or name, cfg.MODE_KEYPOINT)
    for image in content["images"]:
        raw.add_image(image)
    for annotation in content["annotations"]:
        raw.add_annotation(annotation)
    split = make_split(name, origin or name, raw, content["categories"], folder, cfg, class_names, training, started)
    split.read_content, split.protocols = read_content, protocols
    return split


def make_split(
    name: str,
    annotation_file: str,
    raw: AnnotationCollector,
    categories: Any,
    folder: str | Path,
    cfg: Config,
    class_names: Sequence[str],
    training: bool,
    started: float,
) -> DatasetSplit:
    """The split made from the collected entries; images that are missing on disk are an error, or left out."""
    ids, names = order_categories(raw.origin, categories)
    category_ids = match_classes(raw.origin, ids, names, class_names) if class_names else ids
    label_of_category = {c: label for label, c in enumerate(category_ids, 1) if c is not None}
    num_keypoints = count_keypoints(cfg, raw.origin, categories, raw)
    columns, dropped = build_columns(raw, label_of_category, training and cfg.MODE_MASK, num_keypoints)
    number = len(raw.image) + sum(raw.unusable.values())
    if number and dropped[IMAGE_UNKNOWN] == number:
        raise UserError(
            f"{raw.origin}: none of its {number} annotations has the image id of one of its {len(raw.image_ids)} images"
        )
    split = DatasetSplit(
        name, annotation_file, [str(Path(folder).absolute())], list(class_names) or names, category_ids, columns,
        dict(dropped), number, mirrored_keypoints(categories, num_keypoints, cfg.KRCNN.FLIP_PAIRS),
    )  # fmt: skip
    split.oks_sigmas = list(cfg.KRCNN.OKS_SIGMAS)
    if num_keypoints:
        _check_keypoint_settings(cfg, split, training)
    leave_out_missing_images(cfg, split, str(folder))
    report_split(split, time.time() - started, raw.examples)
    return split
