"""From annotations in COCO's form to the columns of a `DatasetSplit`: the way that every format takes."""

import json
import os
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
from eval import evaluate_coco
from eval_protocols import lvis_scores, only_images, voc_scores
from utils import polygons
from utils.cityscapes_eval import evaluate_cityscapes

__all__ = [
    "COCO_KEYPOINTS",
    "REASONS",
    "AnnotationCollector",
    "FormatSplit",
    "build_columns",
    "count_keypoints",
    "leave_out_missing_images",
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

# Why an annotation is left out (index = code in the columns), in the order in which the reasons are looked for.
_KEPT, _BROKEN, _IMAGE, _CATEGORY, _NUMBER, _NO_PLACE, _EMPTY, _NO_OUTLINE = range(8)

REASONS = [
    "", "entry is not in COCO's format", "image id is not in the file", "category is unknown or not trained",
    "a coordinate is not a finite number", "neither a box nor an outline", "box is empty inside the image",
    "no outline (MODE_MASK trains masks)",
]  # fmt: skip
IMAGE_UNKNOWN, CLASS_UNKNOWN, WITHOUT_OUTLINE = REASONS[_IMAGE], REASONS[_CATEGORY], REASONS[_NO_OUTLINE]


class AnnotationCollector:
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


def order_categories(path: str, categories: Any) -> tuple[list, list[str]]:
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


def match_classes(path: str, ids: list, names: list[str], class_names: Sequence[str]) -> list:
    """The category id of each of the wanted classes, None for those that this file does not have."""
    by_name = dict(zip(names, ids))
    matched = [by_name.get(n) for n in class_names]
    if not any(n in by_name for n in class_names):
        raise UserError(
            f"annotation file {path} has none of the model's classes: it has {some_names(names)}, "
            f"the model {some_names(class_names)}"
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
                    f"annotation file {raw.path}: image id {raw.image_ids[entry]!r} stands for both "
                    f"{raw.image_entries[original][0]} and {raw.image_entries[entry][0]}"
                )
        logger.warning(f"{raw.path}: {len(numbers) - len(kept)} images are listed more than once; used once")
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


def build_columns(
    raw: AnnotationCollector, label_of_category: dict, mask_required: bool, num_keypoints: int
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
        given, lacking = (np.asarray(pairs, np.int64).reshape(-1, 2) for pairs in (raw.verified, raw.incomplete))
        lost = np.flatnonzero(reason == _NO_OUTLINE)
        columns |= verified_columns(
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


def verified_columns(
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
    return {"first_verified": to_offsets(counts), "verified": (found % size).astype(np.int32)}


def _keypoint_column(raw: AnnotationCollector, place: np.ndarray, count: int, num_keypoints: int) -> np.ndarray:
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


def mirrored_keypoints(categories: list[dict], num_keypoints: int) -> np.ndarray:
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


def count_keypoints(cfg: Config, path: str, categories: list[dict], raw: AnnotationCollector) -> int:
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


def leave_out_missing_images(cfg: Config, split: DatasetSplit, folder: str) -> None:
    """Leaves out the images that are missing on disk if that is allowed, else names one."""
    files = unpack_texts(split.columns["file"])
    missing = np.flatnonzero(_missing_images(folder, files))
    if len(missing) == 0:
        return
    first = os.path.join(folder, files[missing[0]])
    what = f"{split.name}: {len(missing)} of {len(files)} images are missing, e.g. {first}"
    if not cfg.DATA.KEEP_MISSING_IMAGES or len(missing) == len(files):
        raise UserError(f"{what}; DATA.KEEP_MISSING_IMAGES=True goes on without them")
    logger.warning(f"{what}: going on without them")
    split.columns = select_images(split.columns, np.setdiff1d(np.arange(len(files)), missing))


def report_split(split: DatasetSplit, seconds: float) -> None:
    logger.info(
        f"{split.name}: {len(split)} images, {len(split.columns['labels'])} objects of {len(split.class_names)} "
        f"classes ({seconds:.1f} s)"
    )
    if split.dropped:
        rows = sorted(split.dropped.items(), key=lambda r: -r[1])
        table = tabulate(rows, ["left out", "count"], tablefmt="pipe")
        logger.warning(f"{split.name}: not everything among its {split.num_annotations} annotations is used\n{table}")


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
            return lvis_scores(content, results, ids, **options)
        metrics = evaluate_coco(content, results, **{"image_ids": ids, **options})
        if self.protocol == "voc":
            metrics |= voc_scores(only_images(content, ids), results)
        if self.protocol == "cityscapes" and all(r.get("segmentation") for r in results):
            scores = evaluate_cityscapes(only_images(content, ids), results)
            metrics |= {f"cityscapes/{k}": v for k, v in scores.items()}
        return metrics


def split_from_coco(
    name: str,
    read_content: Callable[[], dict[str, Any]],
    folder: str | Path,
    cfg: Config,
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
    raw = AnnotationCollector(origin, cfg.MODE_KEYPOINT)
    for image in content["images"]:
        raw.add_image(image)
    for annotation in content["annotations"]:
        raw.add_annotation(annotation)
    ids, names = order_categories(origin, content["categories"])
    category_ids = match_classes(origin, ids, names, class_names) if class_names else ids
    label_of_category = {c: label for label, c in enumerate(category_ids, 1) if c is not None}
    num_keypoints = count_keypoints(cfg, origin, content["categories"], raw)
    columns, dropped = build_columns(raw, label_of_category, training and cfg.MODE_MASK, num_keypoints)
    split = FormatSplit(
        name, origin, [str(Path(folder).absolute())], list(class_names) or names, category_ids, columns, dict(dropped),
        len(content["annotations"]), mirrored_keypoints(content["categories"], num_keypoints),
    )  # fmt: skip
    split.read_content, split.protocol = read_content, protocol
    leave_out_missing_images(cfg, split, str(folder))
    report_split(split, time.time() - started)
    return split
