"""Looks for mistakes in data sets before they cost a training run.

    python tools/check_data.py --data train.json train/ --data val.json val/ --json findings.json
    python tools/check_data.py --config DATA.BASEDIR=data/coco --page check/

Every image is decoded completely (unless --quick is given) and every annotation is checked: ids, sizes, boxes,
outlines,
categories, duplicates, and images that two sets share. The exit code is 0 when nothing is wrong, 1 when there are
errors, 2 when a set cannot be read. --fix writes cleaned annotation files and never touches the original; --page
writes a page of pictures with their annotations drawn.
"""

import import_path

import argparse
import html
import itertools
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

import dataset_coco
from common import UserError, atomic_write, check_output_file, check_output_folder, logger, path_argument, write_json
from config import default_config, finalize_config
from config_files import settings_words
from data_check import Finding, ImageFacts, look_at_image
from dataset import load_split
from dataset_build import WITHOUT_OUTLINE
from dataset_split import DatasetSplit
from utils.archives import is_folder
from utils.coco_format import (
    REASONS,
    Annotation,
    ImageEntry,
    Unusable,
    look_like_corners,
    read_annotation,
    read_categories,
    read_document,
    read_id,
    read_image,
    read_number,
)
from utils.image_header import decode_image
from utils.polygons import clip_ring, decode_rle, orient_outer, rle_to_rings, signed_area
from viz import draw_annotations

__all__ = ["DataSource", "check_source", "check_leakage", "fixed_content"]

# Every check: whether it is an error or only a warning, and its meaning.
CHECKS = {
    "image id used twice": "error",
    "image file used twice": "error",
    "image entry incomplete": "error",
    "image missing": "error",
    "image unreadable": "error",
    "image cut off": "error",
    "image size differs": "error",
    "image uses few of its bits": "warning",
    "same image twice": "warning",
    "same image in two sets": "error",
    "similar image in two sets": "warning",
    "category id used twice": "error",
    "category name used twice": "error",
    "category without objects": "warning",
    "annotation id used twice": "warning",
    "annotation of unknown image": "error",
    "annotation of unknown category": "error",
    "box not four finite numbers": "error",
    "box without extent": "error",
    "box outside the image": "error",
    "box partly outside the image": "warning",
    "outline invalid": "error",
    "outline without area": "warning",
    "outline outside the image": "warning",
    "outline and box disagree": "warning",
    "area not positive": "warning",
    "object twice": "warning",
    "object of an absent class": "warning",
    "annotation unusable": "error",
    "boxes look like x1 y1 x2 y2": "error",
    "left out of training": "error",
    "object without an outline": "warning",
    "refused by training": "error",
}
PICTURE_SIDE = 1000  # pixels
TOLERANCE = 1.0  # pixels by which a coordinate may exceed the border due to rounding


class DataSource(NamedTuple):
    """A set in COCO's form: the content of its annotation file and the folder of its images.

    `split`, if given, is the loaded set, whose annotations are drawn because `content` has no outlines. `training`
    lists what training refuses or leaves out.
    """

    name: str
    content: dict[str, Any]
    folder: str
    split: Any = None
    training: Sequence[Finding] = ()


# ------------------------------------------------------------------------------------------------ images
def image_path(source: DataSource, image: ImageEntry) -> str:
    return os.path.join(source.folder, image.file_name)


def read_images(source: DataSource) -> list[tuple[dict[str, Any], ImageEntry | None, str]]:
    """For each entry of "images": (raw entry, typed entry, reason why it cannot be used)."""
    result = []
    for raw in source.content["images"]:
        try:
            result.append((raw, read_image(raw, source.name), ""))
        except UserError as e:
            result.append((raw, None, str(e)))
    return result


def read_annotations(source: DataSource) -> Iterable[tuple[Any, Annotation | None, Unusable | None]]:
    """For each entry of "annotations": (raw entry, entry as read for training, reason why training leaves it out)."""
    for raw in source.content["annotations"]:
        try:
            yield raw, read_annotation(raw), None
        except Unusable as e:
            yield raw, None, e


def look_at_images(source: DataSource) -> dict[Any, ImageFacts]:
    """ImageFacts by image id; images with an incomplete entry are left out."""
    images = [image for _, image, _ in read_images(source) if image is not None]

    def look(image: ImageEntry) -> ImageFacts:
        return look_at_image(image_path(source, image), (image.height, image.width))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        bar = tqdm(pool.map(look, images), source.name, len(images), unit="image", disable=not sys.stderr.isatty())
        facts = {image.id: fact for image, fact in zip(images, bar)}
    if facts and all(fact.problem == "image missing" for fact in facts.values()):
        first = next(iter(facts.values())).detail
        raise UserError(f"{source.name}: none of its {len(facts)} images exists, e.g. {first}; is the folder right?")
    return facts


def _check_images(source: DataSource, facts: dict[Any, ImageFacts]) -> Iterable[Finding]:
    seen: dict[Any, str] = {}
    files: dict[str, Any] = {}
    for raw, image, problem in read_images(source):
        if image is None:
            shown = raw.get("id") if isinstance(raw, dict) else None
            yield Finding("image entry incomplete", source.name, _plain(shown), None, problem)
            continue
        key, path = image.id, image_path(source, image)
        if key in seen:
            yield Finding("image id used twice", source.name, key, None, f"{seen[key]} and {path}")
        elif path in files:
            yield Finding("image file used twice", source.name, key, None, f"{path}, also image {files[path]}")
        seen.setdefault(key, path)
        files.setdefault(path, key)
    by_digest: dict[bytes, Any] = {}
    for key, fact in facts.items():
        if fact.problem:
            yield Finding(fact.problem, source.name, key, None, fact.detail)
        if fact.digest:
            first = by_digest.setdefault(fact.digest, key)
            if first != key and seen.get(first) != seen.get(key):
                yield Finding("same image twice", source.name, key, None, f"the content of image {first}")


def _plain(value: Any) -> Any:
    """An id of any type in a form that can be a dictionary key and be printed."""
    return value if isinstance(value, (int, str, float, type(None))) else str(value)[:60]


def check_leakage(
    first: str, facts: dict[Any, ImageFacts], second: str, others: dict[Any, ImageFacts]
) -> list[Finding]:
    """Images of the second set that also occur in the first: equal files, and pictures that look the same.

    Similar means that a 256-bit gradient hash shares one of its sixteen 16-bit parts and the 16 x 16 thumbnails
    differ by less than 3 grey levels on average: copies that were resized or compressed again.
    """
    digests = {f.digest: key for key, f in facts.items() if f.digest}
    findings, rest = [], []
    for key, fact in others.items():
        if fact.digest and fact.digest in digests:
            detail = f"equals image {digests[fact.digest]} of {first}"
            findings.append(Finding("same image in two sets", second, key, None, detail))
        elif fact.thumbnail is not None:
            rest.append(key)
    keys = [key for key, f in facts.items() if f.thumbnail is not None]
    if not keys or not rest:
        return findings
    thumbnails = np.stack([facts[k].thumbnail for k in keys]).astype(np.int16)
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(16)]
    for number, parts in enumerate(_gradient_hashes(thumbnails).tolist()):
        for bucket, part in zip(buckets, parts):
            bucket[part].append(number)
    for key in rest:
        thumbnail = others[key].thumbnail.astype(np.int16)
        parts = _gradient_hashes(thumbnail[None])[0].tolist()
        near = np.array(sorted({n for bucket, part in zip(buckets, parts) for n in bucket.get(part, ())}), np.int64)
        if not len(near):
            continue
        difference = np.abs(thumbnails[near] - thumbnail).mean((1, 2))
        if difference.min() < 3 and thumbnail.std() > 3:  # plain pictures look alike without being copies
            detail = f"looks like image {keys[near[difference.argmin()]]} of {first}"
            findings.append(Finding("similar image in two sets", second, key, None, detail))
    return findings


def _gradient_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint16 [n, 16]: for each row of a 16 x 16 thumbnail, bits of the pixels that are darker than their right
    neighbour."""
    darker = thumbnails < np.roll(thumbnails, -1, axis=2)
    return np.packbits(darker, axis=2).view(np.uint16)[..., 0]


# ------------------------------------------------------------------------------------------------ annotations
def _outline_problem(
    rings: Sequence[Sequence[float]], masks: Sequence[dict], height: int, width: int
) -> tuple[str, str, list[float] | None]:
    """(check or "", detail, x1 y1 x2 y2 of the outline or None)."""
    corners, area = [], 0.0
    for rle in masks:
        try:
            mask = decode_rle(rle, height, width)
        except ValueError as e:
            return "outline invalid", f"run lengths: {e}", None
        if not mask.any():
            return "outline without area", "run lengths without a pixel", None
        x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        corners += [(x, y), (x + w, y + h)]
        area += 1
    for ring in rings:
        points = np.array(ring).reshape(-1, 2)
        corners += [points.min(0), points.max(0)]
        area += abs(signed_area(points))
    if not corners:
        return "", "", None
    low, high = np.min(corners, 0), np.max(corners, 0)
    extent = [*low.tolist(), *high.tolist()]
    if area <= 0:
        return "outline without area", "polygon of area 0", extent
    if low.min() < -TOLERANCE or high[0] > width + TOLERANCE or high[1] > height + TOLERANCE:
        return "outline outside the image", f"{[round(v, 1) for v in extent]} in {width}x{height}", extent
    return "", "", extent


def _box_problem(box: list[float], height: int, width: int) -> tuple[str, str]:
    x, y, w, h = box
    shown = f"x y w h = {[round(v, 2) for v in box]} in {width}x{height}"
    if w <= 0 or h <= 0:
        return "box without extent", shown
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return "box outside the image", shown
    if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        return "box partly outside the image", shown
    return "", ""


def _check_annotations(source: DataSource) -> Iterable[Finding]:
    images = {image.id: image for _, image, _ in read_images(source) if image is not None}
    categories = _category_names(source)
    absent = {image.id: set(image.absent) for image in images.values() if image.absent}
    used: Counter = Counter()
    ids: set = set()
    objects: dict[int, Any] = {}  # hashes, since millions of tuples take gigabytes
    boxes, sizes = [], []
    for raw, a, unusable in read_annotations(source):
        key = _plain(raw.get("id")) if isinstance(raw, dict) else None
        if unusable is not None:
            image_id = _plain(raw.get("image_id")) if isinstance(raw, dict) else None
            check = "box not four finite numbers" if unusable.reason in ("box", "number") else "annotation unusable"
            if isinstance(raw, dict) and raw.get("category_id", 0) is None:
                check = "annotation of unknown category"
            yield Finding(check, source.name, image_id, key, str(unusable))
            continue

        def found(check: str, detail: str, a=a, key=key) -> Finding:
            return Finding(check, source.name, a.image_id, key, detail)

        if key is not None and key in ids:
            yield found("annotation id used twice", "the second one")
        ids.add(key)
        if a.category_id not in categories:
            yield found("annotation of unknown category", f"category_id {a.category_id!r}")
        else:
            used[a.category_id] += 1
        if a.category_id in absent.get(a.image_id, ()):
            yield found("object of an absent class", f"neg_category_ids of the image has category_id {a.category_id!r}")
        if a.image_id not in images:
            yield found("annotation of unknown image", f"image_id {a.image_id!r}")
            continue
        height, width = images[a.image_id].height, images[a.image_id].width
        for reason, detail in a.left_out:
            yield found("outline invalid", f"{REASONS[reason]}: {detail}")
        check, detail, extent = _outline_problem(a.rings, a.masks, height, width)
        if check:
            yield found(check, detail)
        if a.box is None:
            if extent is None:
                yield found("box not four finite numbers", "neither a box nor an outline")
            continue
        boxes.append(a.box)
        sizes.append((height, width))
        check, detail = _box_problem(a.box, height, width)
        if check:
            yield found(check, detail)
        elif extent is not None and _iou(a.box, extent) < 0.5:
            yield found("outline and box disagree", f"box {[round(v, 1) for v in a.box]}, outline {extent}")
        if raw.get("area") is not None and not _area_of(raw) > 0:
            yield found("area not positive", f"area {raw['area']!r}"[:60])
        place = hash((a.image_id, a.category_id, *(round(v, 2) for v in a.box), a.is_crowd))
        if place in objects:
            yield found("object twice", f"the same category and box as annotation {objects[place]}")
        objects.setdefault(place, key)
    if look_like_corners(boxes, sizes):
        detail = f"e.g. {list(boxes[0])} in {sizes[0][1]}x{sizes[0][0]}; COCO's boxes are x y width height"
        yield Finding("boxes look like x1 y1 x2 y2", source.name, None, None, detail)
    for key, name in categories.items():
        if not used[key]:
            yield Finding("category without objects", source.name, None, None, f"{name} (id {key})")


def _area_of(raw: dict[str, Any]) -> float:
    try:
        return read_number(raw.get("area"))
    except Unusable:
        return 0.0


def _category_names(source: DataSource) -> dict[Any, str]:
    """{id: name} of the categories whose id and name can be used."""
    names = {}
    for entry in source.content["categories"]:
        try:
            names |= read_categories([entry], source.name)
        except UserError:
            continue  # reported by _check_categories
    return names


def _iou(box: list[float], extent: list[float]) -> float:
    x, y, w, h = box
    inter_w = min(x + w, extent[2]) - max(x, extent[0])
    inter_h = min(y + h, extent[3]) - max(y, extent[1])
    inter = max(0.0, inter_w) * max(0.0, inter_h)
    union = w * h + (extent[2] - extent[0]) * (extent[3] - extent[1]) - inter
    return inter / union if union > 0 else 0.0


def _check_categories(source: DataSource) -> Iterable[Finding]:
    entries = [c for c in source.content["categories"] if isinstance(c, dict)]
    for key, check in (("id", "category id used twice"), ("name", "category name used twice")):
        for value, count in Counter(_plain(c.get(key)) for c in entries).items():
            if count > 1:
                yield Finding(check, source.name, None, None, f"{value!r}")


def check_source(source: DataSource, facts: dict[Any, ImageFacts]) -> list[Finding]:
    """All findings in one set; `facts` comes from `look_at_images`, or is {} to check no images."""
    found = [*_check_categories(source), *_check_images(source, facts), *_check_annotations(source)]
    if any(CHECKS[f.check] == "error" for f in found):  # these are more detailed than training's counts
        return [*found, *(f for f in source.training if f.check != "left out of training")]
    return [*found, *source.training]


# ------------------------------------------------------------------------------------------------ repair
def fixed_content(source: DataSource, facts: dict[Any, ImageFacts]) -> tuple[dict[str, Any], Counter]:
    """A cleaned copy of the set's content, and the number of changes of each kind. The original content is not changed.

    Left out: images that are missing, unreadable, cut off or listed again, and annotations of them, of unknown
    categories, without a usable box, and second copies of an object. Corrected: declared sizes (to the file's), boxes
    (clipped to the image, or made from the outline), areas, invalid parts of outlines, repeated annotation ids.
    """
    done: Counter = Counter()
    images: dict[Any, dict] = {}
    files = set()
    for raw, image, _ in read_images(source):
        fact = facts.get(image.id) if image is not None else None
        if image is None:
            done["image entries left out: incomplete"] += 1
        elif image.id in images or image_path(source, image) in files:
            done["image entries left out: listed before"] += 1
        elif fact is not None and fact.problem in ("image missing", "image unreadable", "image cut off"):
            done[f"images left out: {fact.problem.removeprefix('image ')}"] += 1
        else:
            entry = {**raw, "id": image.id, "height": image.height, "width": image.width}
            if fact is not None and fact.problem == "image size differs":
                entry |= {"height": fact.height, "width": fact.width}
                done["image sizes corrected"] += 1
            images[image.id] = entry
            files.add(image_path(source, image))
    known = _category_names(source)
    categories, kept = [], set()
    for category in source.content["categories"]:
        try:
            key = read_id(category["id"])
        except (KeyError, TypeError, Unusable):
            key = None
        if key not in known or key in kept:
            done["categories left out: no id, or used before"] += 1
            continue
        kept.add(key)
        categories.append({**category, "id": key, "name": known[key]})
    annotations: list[dict] = []
    places: set = set()
    ids = {raw["id"] for raw in source.content["annotations"] if isinstance(raw, dict) and type(raw.get("id")) is int}
    free, taken = max(ids, default=0) + 1, set()
    for raw, typed, _ in read_annotations(source):
        if typed is None:
            done["annotations left out: unusable"] += 1
            continue
        if typed.image_id not in images or typed.category_id not in known:
            done["annotations left out: unknown image or category"] += 1
            continue
        a = {**raw, "image_id": typed.image_id, "category_id": typed.category_id, "iscrowd": int(typed.is_crowd)}
        a.pop("ignore", None)
        height, width = (images[typed.image_id][k] for k in ("height", "width"))
        extent = _fix_outline(a, typed, height, width, done)
        box = typed.box and list(typed.box)
        if box is None and extent is not None:
            box = [extent[0], extent[1], extent[2] - extent[0], extent[3] - extent[1]]
            done["boxes made from the outline"] += 1
        x1, y1, x2, y2 = (box[0], box[1], box[0] + box[2], box[1] + box[3]) if box else (0, 0, 0, 0)
        x1, x2, y1, y2 = max(x1, 0), min(x2, width), max(y1, 0), min(y2, height)
        if box is None or x2 <= x1 or y2 <= y1:
            done["annotations left out: no box inside the image"] += 1
            continue
        if _box_problem(box, height, width)[0]:
            box = [x1, y1, x2 - x1, y2 - y1]
            done["boxes clipped to the image"] += 1
        a["bbox"] = box
        if not _area_of(raw) > 0:
            a["area"] = box[2] * box[3]
            done["areas set to the box's"] += 1
        place = (typed.image_id, typed.category_id, *(round(v, 2) for v in box), typed.is_crowd)
        if place in places:
            done["annotations left out: object twice"] += 1
            continue
        places.add(place)
        key = _plain(a.get("id"))
        if key is None or key in taken:
            a["id"] = key = free
            free += 1
            done["annotation ids renewed"] += 1
        taken.add(key)
        annotations.append(a)
    others = {k: v for k, v in source.content.items() if k not in ("images", "annotations", "categories")}
    content = {**others, "images": list(images.values()), "annotations": annotations, "categories": categories}
    return content, done


def _fix_outline(a: dict[str, Any], typed: Annotation, height: int, width: int, done: Counter) -> list[float] | None:
    """Reduces an annotation's segmentation to its usable parts; returns their extent."""
    if not a.get("segmentation"):
        return None
    rings = [r for r in typed.rings if _outline_problem([r], (), height, width)[0] in ("", "outline outside the image")]
    masks = [m for m in typed.masks if not _outline_problem((), [m], height, width)[0]]
    if len(rings) < len(typed.rings) + len(typed.left_out):
        done["polygon parts left out"] += len(typed.rings) + len(typed.left_out) - len(rings)
    if len(masks) < len(typed.masks):
        done["run lengths left out"] += 1
    a["segmentation"] = masks[0] if len(masks) == 1 and not rings else rings
    return _outline_problem(rings, masks, height, width)[2]


# ------------------------------------------------------------------------------------------------ page
def write_page(folder: str | Path, sources: Sequence[DataSource], findings: Sequence[Finding], count: int) -> None:
    """index.html with tables of the sets, findings and classes, and for each set pictures of `count` images with
    findings (of all kinds alike) and `count` random ones: annotations drawn, those with findings in striped frames."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<pre>{html.escape(sets_table(sources, findings))}\n\n{html.escape(summary_table(findings))}</pre>"]
    for source in sources:
        names = _category_names(source)
        labels = {c: i for i, c in enumerate(names, 1)}
        images = {image.id: image for _, image, _ in read_images(source) if image is not None}
        notes = defaultdict(list)
        by_check = defaultdict(list)
        for f in findings:
            if f.data == source.name and f.image_id in images:
                notes[f.image_id].append(f)
                by_check[f.check].append(f.image_id)
        turns = (key for turn in itertools.zip_longest(*by_check.values()) for key in turn if key is not None)
        rest = [i for i in images if i not in notes]
        chosen = [*list(dict.fromkeys(turns))[:count], *random.Random(0).sample(rest, min(count, len(rest)))]
        objects, counts = defaultdict(list), Counter()
        wanted = set(chosen)
        for raw, a, _ in read_annotations(source):
            if a is not None:
                counts[a.category_id] += 1
                if a.image_id in wanted:
                    objects[a.image_id].append((_plain(raw.get("id")), a))
        split_rows = _rows_in_split(source.split, wanted)
        body.append(f"<h2>{html.escape(source.name)}: {len(images)} images</h2>")
        shown = ", ".join(f"{n} {counts[c]}" for c, n in sorted(names.items(), key=lambda c: -counts[c[0]])[:100])
        body.append(f"<p>Objects of each class: {html.escape(shown)}{', …' * (len(names) > 100)}</p><div>")
        for number, key in enumerate(chosen):
            path = image_path(source, images[key])
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            try:
                image = decode_image(path, flags)
            except UserError:
                image = np.full((120, 160, 3), 128, np.uint8)
            if key in split_rows:
                drawable, class_names = source.split.annotations(split_rows[key]), source.split.class_names
            else:
                drawable, class_names = (
                    _drawable([a for _, a in objects[key]], *image.shape[:2], labels),
                    list(names.values()),
                )
            bad = {f.annotation_id for f in notes[key] if f.annotation_id is not None}
            picture = _shrunk(image, drawable, class_names, [a for number, a in objects[key] if number in bad])
            name = f"{''.join(ch if ch.isalnum() else '_' for ch in source.name)}-{number:03d}.png"
            with atomic_write(folder / name, "wb") as f:
                f.write(cv2.imencode(".png", picture)[1].tobytes())
            texts = [f"{key} ({printable(os.path.basename(path))}): {len(objects[key])} objects"]
            texts += [f"{f.check}: {printable(f.detail)}" for f in notes[key][:5]]
            texts += [f"… and {len(notes[key]) - 5} more"] * (len(notes[key]) > 5)
            caption = "<br>".join(map(html.escape, texts))
            mark = ' class="bad"' if notes[key] else ""
            picture = f'<a href="{name}"><img src="{name}" alt=""></a>'
            body.append(f"<figure{mark}>{picture}<figcaption>{caption}</figcaption></figure>")
        body.append("</div>")
    style = (
        "body{font-family:sans-serif;margin:2em}div{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:24em}"
        "img{width:100%}.bad{outline:3px solid #c00}figcaption{font-size:80%;overflow-wrap:anywhere}"
    )
    head = f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>Data check</title><style>{style}</style></head>'
    content = f"{head}<body><h1>Data check</h1>{''.join(body)}</body></html>\n"
    with atomic_write(folder / "index.html", "wb") as f:
        f.write(content.encode(errors="replace"))  # ids and file names may contain incomplete characters
    logger.info(f"pictures: {folder / 'index.html'}")


def _rows_in_split(split: Any, image_ids: set) -> dict[Any, int]:
    return {} if split is None else {i: n for n in range(len(split)) if (i := split.image_id(n)) in image_ids}


def _shrunk(image: np.ndarray, drawable: dict, class_names: Sequence[str], bad: Sequence[Annotation]) -> np.ndarray:
    """The image with sides of at most PICTURE_SIDE pixels and its annotations, those with findings in striped
    frames."""
    height, width = image.shape[:2]
    scale = min(1.0, PICTURE_SIDE / max(height, width))
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    drawable = drawable | {
        "boxes": drawable["boxes"] * np.float32(scale),
        "rings": [[ring * np.float32(scale) for ring in rings] for rings in drawable["rings"]],
    }
    if drawable.get("keypoints") is not None:
        drawable["keypoints"] = drawable["keypoints"] * np.array([scale, scale, 1], np.float32)
    picture = draw_annotations(image, drawable, class_names)
    height, width = picture.shape[:2]
    for a in bad:
        if a.box is not None:
            x, y, w, h = (v * scale for v in a.box)
            corners = np.clip([[x, y], [x + max(w, 0), y + max(h, 0)]], 2, [max(2, width - 3), max(2, height - 3)])
            first, second = (tuple(map(int, corner)) for corner in corners - [[3, 3], [-3, -3]])
            _frame(picture, *first, *second)
    return picture


def _frame(picture: np.ndarray, x1: int, y1: int, x2: int, y2: int) -> None:
    """A frame striped in black and white, colours that no class has."""
    frame = np.zeros(picture.shape[:2], np.uint8)
    cv2.rectangle(frame, (x1, y1), (x2, y2), 1, 5)
    rows, columns = np.nonzero(frame)
    picture[rows, columns] = np.where((rows + columns) % 16 < 8, 255, 0)[:, None]


def _drawable(objects: Sequence[Annotation], height: int, width: int, labels: dict) -> dict[str, Any]:
    """Annotations in the form that viz.draw_annotations takes; those that cannot be drawn are left out."""
    boxes, numbers, crowds, outlines = [], [], [], []
    for a in objects:
        check, _, extent = _outline_problem(a.rings, a.masks, height, width)
        rings = [orient_outer(clip_ring(np.array(r).reshape(-1, 2), height, width)) for r in a.rings]
        rings = [r.astype(np.float32) for r in rings if len(r)]
        if not check:
            rings += [r for rle in a.masks for r in rle_to_rings(rle, height, width)]
        if a.box is None and extent is None:
            continue
        x1, y1, x2, y2 = (a.box[0], a.box[1], a.box[0] + a.box[2], a.box[1] + a.box[3]) if a.box else extent
        boxes.append(np.clip([x1, y1, max(x1, x2), max(y1, y2)], -1e4, 1e5))
        numbers.append(labels.get(a.category_id, 0))
        crowds.append(a.is_crowd)
        outlines.append(rings)
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(numbers, np.int32),
        "is_crowd": np.array(crowds, bool), "rings": outlines,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ command line
def sets_table(sources: Sequence[DataSource], findings: Sequence[Finding]) -> str:
    """A table of the checked sets."""
    kinds = Counter((f.data, CHECKS[f.check]) for f in findings)
    rows = [
        [s.name, *(len(s.content[key]) for key in ("images", "annotations", "categories")),
         kinds[s.name, "error"], kinds[s.name, "warning"]]
        for s in sources
    ]  # fmt: skip
    return tabulate(rows, ["data", "images", "annotations", "classes", "errors", "warnings"])


def summary_table(findings: Sequence[Finding]) -> str:
    """A table with the number of findings of each check and the first one."""
    counts = Counter((f.data, f.check) for f in findings)
    first = {(f.data, f.check): f for f in reversed(findings)}
    order = list(CHECKS)
    rows = []
    for data, check in sorted(counts, key=lambda r: (r[0], order.index(r[1]))):
        f = first[data, check]
        places = [f"image {f.image_id}"] * (f.image_id is not None)
        places += [f"annotation {f.annotation_id}"] * (f.annotation_id is not None)
        example = printable(": ".join([", ".join(places), f.detail]).removeprefix(": "))
        rows.append([data, CHECKS[check], check, counts[data, check], example])
    headers = ["data", "kind", "check", "count", "for example"]
    return tabulate(rows, headers, disable_numparse=True) if rows else "nothing found"


def printable(text: str) -> str:
    """Text that any terminal and page can show: file names may contain bytes that are not text."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_source(name: str, annotation_file: str, folder: str) -> DataSource:
    content = read_document(annotation_file)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content[key], list):
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: no list '{key}' of entries")
    if not is_folder(folder):
        raise UserError(f"image folder {folder} does not exist")
    spec = {name: [os.path.abspath(annotation_file), os.path.abspath(folder)]}
    cfg = finalize_config(default_config().update_args([f"DATA.DATASETS={spec!r}", "MODE_MASK=False", *_ANY_IMAGES]))
    return DataSource(name, content, folder, None, training_findings(cfg, name)[1])


# Missing images are reported by the check itself.
_ANY_IMAGES = ["DATA.KEEP_MISSING_IMAGES=True"]


def training_findings(cfg: Any, name: str) -> tuple[DatasetSplit | None, list[Finding]]:
    """The set as training loads it, and the reasons and numbers of annotations that training refuses or leaves out."""
    try:
        split = load_split(cfg, name, training=name in cfg.DATA.TRAIN)
    except UserError as e:
        return None, [Finding("refused by training", name, None, None, str(e))]
    return split, left_out_findings(split)


def left_out_findings(split: DatasetSplit) -> list[Finding]:
    return [
        Finding(
            "object without an outline" if reason == WITHOUT_OUTLINE else "left out of training",
            split.name, None, None, f"{count} × {reason}",
        )
        for reason, count in split.dropped.items()
    ]  # fmt: skip


def configured_sources(settings: Sequence[str]) -> list[tuple[DataSource, str]]:
    """The sets of DATA.TRAIN and DATA.VAL, each with its annotation file ("" if it has no json)."""
    cfg = finalize_config(default_config().update_args([*settings, *_ANY_IMAGES]))
    sources = []
    for name in dict.fromkeys([*cfg.DATA.TRAIN, *cfg.DATA.VAL]):
        entry = cfg.DATA.DATASETS.get(name)
        if entry is None or str(entry[0]).endswith(".json"):
            annotation_file, folder = dataset_coco.find_files_of(cfg, name)
            split, training = training_findings(cfg, name)
            content = read_document(annotation_file) if split is None else split.content()
            sources.append((DataSource(name, content, folder, None, training), annotation_file))
            continue
        split = load_split(cfg, name, training=name in cfg.DATA.TRAIN)
        training = left_out_findings(split)
        if hasattr(split, "image_root"):
            sources.append((DataSource(name, split.content(), split.image_root(), split, training), ""))
        else:
            sources.append((DataSource(name, split.content(), split.folders[0], None, training), ""))
    return sources


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data",
        type=path_argument,
        nargs=2,
        action="append",
        default=[],
        metavar=("JSON", "IMAGES"),
        help="a set; repeat",
    )
    parser.add_argument(
        "--config", nargs="+", metavar="KEY=VAL", help="settings; checks the sets of DATA.TRAIN, DATA.VAL"
    )
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="where to write the findings")
    parser.add_argument(
        "--fix", type=path_argument, metavar="DIR", help="write cleaned annotation files into this folder"
    )
    parser.add_argument("--page", type=path_argument, metavar="DIR", help="write a page of pictures into this folder")
    parser.add_argument("--pictures", type=int, default=24, help="random pictures of each set on the page (24)")
    parser.add_argument("--quick", action="store_true", help="do not open the images")
    args = parser.parse_args(argv)
    try:
        if args.json:
            check_output_file(args.json, "--json")
        for flag, folder in (("--fix", args.fix), ("--page", args.page)):
            if folder:
                check_output_folder(folder, flag)
        if bool(args.data) == bool(args.config):
            raise UserError("give either --data JSON IMAGES or --config with DATA.TRAIN and DATA.VAL")
        stems = Counter(Path(j).stem for j, _ in args.data)
        named = [(j if stems[Path(j).stem] > 1 else Path(j).stem, j, folder) for j, folder in args.data]
        pairs = (
            [(read_source(*n), n[1]) for n in named] if args.data else configured_sources(settings_words(args.config))
        )
        findings, facts = _check_all([source for source, _ in pairs], args.quick)
        if args.json:
            _write_findings(args.json, findings)
        if args.fix:
            _write_fixed(Path(args.fix), pairs, facts)
        if args.page:
            write_page(args.page, [source for source, _ in pairs], findings, args.pictures)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(printable(f"{sets_table([source for source, _ in pairs], findings)}\n\n{summary_table(findings)}"))
    return int(any(CHECKS[f.check] == "error" for f in findings))


def _check_all(sources: Sequence[DataSource], quick: bool) -> tuple[list[Finding], list[dict[Any, ImageFacts]]]:
    facts = [{} if quick else look_at_images(source) for source in sources]
    findings = [f for source, fact in zip(sources, facts) for f in check_source(source, fact)]
    for i, first in enumerate(sources):
        for j in range(i + 1, len(sources)):
            findings += check_leakage(first.name, facts[i], sources[j].name, facts[j])
    return findings, facts


def _write_findings(path: str, findings: Sequence[Finding]) -> None:
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for (data, check), n in Counter((f.data, f.check) for f in findings).items():
        counts[data][check] = n
    entries = [{**f._asdict(), "kind": CHECKS[f.check]} for f in findings]
    write_json(path, {"counts": counts, "findings": entries}, indent=1)


def _write_fixed(folder: Path, pairs: Sequence[tuple[DataSource, str]], facts: Sequence[dict[Any, ImageFacts]]) -> None:
    for (source, origin), fact in zip(pairs, facts):
        target = folder / (Path(origin).name if origin else f"{source.name}.json")
        if target.exists():
            raise UserError(f"--fix: {target} exists; choose a folder without it")
        content, done = fixed_content(source, fact)
        write_json(target, content)
        table = tabulate(sorted(done.items()), ["changed", "count"]) if done else "nothing to change"
        logger.info(f"{source.name}: cleaned copy {target}\n{table}")


if __name__ == "__main__":
    sys.exit(main())
