"""Looks for mistakes in data sets before they cost a training run.

    python tools/check_data.py --data train.json train/ --data val.json val/ --json findings.json
    python tools/check_data.py --config DATA.BASEDIR=data/coco --page check/

Every image is opened (all of it, unless --quick) and every annotation looked at: ids, sizes, boxes, outlines,
categories, duplicates, and images that two sets share. The exit code is 0 when nothing is wrong, 1 when there are
errors, 2 when a set cannot be read. --fix writes cleaned annotation files and never touches the original; --page
writes a page of pictures with their annotations drawn.
"""

import import_path

import argparse
import html
import itertools
import math
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
from common import UserError, atomic_write, logger, read_json, write_json
from config import default_config, finalize_config
from data_check import Finding, ImageFacts, look_at_image
from dataset import load_format
from utils.polygons import decode_rle, orient_outer, rle_to_rings, signed_area
from viz import draw_annotations

__all__ = ["DataSource", "check_source", "check_leakage", "fixed_content"]

# Every check, whether it is an error or only worth a look, and what it means.
CHECKS = {
    "image id used twice": "error",
    "image file used twice": "error",
    "image entry incomplete": "error",
    "image missing": "error",
    "image unreadable": "error",
    "image cut off": "error",
    "image size differs": "error",
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
}
PICTURE_SIDE = 1000  # pixels
TOLERANCE = 1.0  # pixels by which rounding may carry a coordinate beyond the border


class DataSource(NamedTuple):
    """A set in COCO's form: what its annotation file holds, and where its images are.

    `split`, if given, is the loaded set, whose annotations are drawn because `content` has no outlines.
    """

    name: str
    content: dict[str, Any]
    folder: str
    split: Any = None


# ------------------------------------------------------------------------------------------------ images
def image_path(source: DataSource, image: dict[str, Any]) -> str:
    name = image.get("file_name") or "/".join(str(image.get("coco_url", "")).split("/")[-2:])
    return os.path.join(source.folder, name)


def look_at_images(source: DataSource) -> dict[Any, ImageFacts]:
    """ImageFacts by image id; images with an incomplete entry are left out."""
    images = [i for i in source.content["images"] if _entry_complete(i)]

    def look(image: dict[str, Any]) -> ImageFacts:
        return look_at_image(image_path(source, image), (int(image["height"]), int(image["width"])))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        bar = tqdm(pool.map(look, images), source.name, len(images), unit="image", disable=not sys.stderr.isatty())
        facts = {image["id"]: fact for image, fact in zip(images, bar)}
    if facts and all(fact.problem == "image missing" for fact in facts.values()):
        first = next(iter(facts.values())).detail
        raise UserError(f"{source.name}: none of its {len(facts)} images exists, e.g. {first}; is the folder right?")
    return facts


def _entry_complete(image: dict[str, Any]) -> bool:
    try:
        named = bool(image.get("file_name") or image.get("coco_url"))
        return named and image["id"] is not None and int(image["height"]) > 0 and int(image["width"]) > 0
    except (AttributeError, KeyError, TypeError, ValueError):
        return False


def _check_images(source: DataSource, facts: dict[Any, ImageFacts]) -> Iterable[Finding]:
    seen: dict[Any, str] = {}
    files: dict[str, Any] = {}
    for image in source.content["images"]:
        if not _entry_complete(image):
            shown = image.get("id") if isinstance(image, dict) else None
            yield Finding("image entry incomplete", source.name, shown, None, f"{image}"[:120])
            continue
        key, path = image["id"], image_path(source, image)
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


def check_leakage(
    first: str, facts: dict[Any, ImageFacts], second: str, others: dict[Any, ImageFacts]
) -> list[Finding]:
    """Images of the second set that the first has too: equal files, and pictures that look the same.

    Similar means that a 256-bit gradient hash shares one of its sixteen 16-bit parts and the 16 x 16 thumbnails
    differ by less than 3 grey levels on average: copies that were resized or compressed anew.
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
        if difference.min() < 3 and thumbnail.std() > 3:  # flat pictures are alike without being copies
            detail = f"looks like image {keys[near[difference.argmin()]]} of {first}"
            findings.append(Finding("similar image in two sets", second, key, None, detail))
    return findings


def _gradient_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """uint16 [n, 16]: for each line of a 16 x 16 thumbnail which pixels are darker than their right neighbour."""
    darker = thumbnails < np.roll(thumbnails, -1, axis=2)
    return np.packbits(darker, axis=2).view(np.uint16)[..., 0]


# ------------------------------------------------------------------------------------------------ annotations
def _numbers(values: Any, count: int | None = None) -> list[float] | None:
    """The values as finite floats, None if they are not (`count` of) such."""
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        return None
    good = all(map(math.isfinite, numbers)) and (count is None or len(numbers) == count)
    return numbers if good else None


def _outline_problem(segmentation: Any, height: int, width: int) -> tuple[str, str, list[float] | None]:
    """(check or "", detail, x1 y1 x2 y2 of the outline or None)."""
    if isinstance(segmentation, dict):
        try:
            mask = decode_rle(segmentation, height, width)
        except (ValueError, TypeError, KeyError, OverflowError) as e:
            return "outline invalid", f"run lengths: {e}", None
        if not mask.any():
            return "outline without area", "run lengths without a pixel", None
        x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        return "", "", [x, y, x + w, y + h]
    if not isinstance(segmentation, list):
        return "outline invalid", f"neither polygons nor run lengths: {segmentation!r}"[:120], None
    rings = [segmentation] if segmentation and not isinstance(segmentation[0], (list, tuple)) else segmentation
    corners, area = [], 0.0
    for ring in rings:
        numbers = _numbers(ring)
        if numbers is None or len(numbers) < 6 or len(numbers) % 2:
            shown = "a coordinate is not a finite number" if numbers is None else f"{len(numbers)} coordinates"
            return "outline invalid", f"polygon part: {shown}", None
        points = np.array(numbers).reshape(-1, 2)
        corners += [points.min(0), points.max(0)]
        area += abs(signed_area(points))
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
    sizes = {i["id"]: (int(i["height"]), int(i["width"])) for i in source.content["images"] if _entry_complete(i)}
    categories = {c.get("id") for c in source.content["categories"]}
    absent = {
        i["id"]: set(i["neg_category_ids"])
        for i in source.content["images"]
        if _entry_complete(i) and i.get("neg_category_ids")
    }
    used: Counter = Counter()
    ids: set = set()
    objects: dict[int, Any] = {}  # hashes, since millions of tuples take gigabytes
    for a in source.content["annotations"]:
        key, image_id, category = a.get("id"), a.get("image_id"), a.get("category_id")

        def found(check: str, detail: str, a=a) -> Finding:
            return Finding(check, source.name, a.get("image_id"), a.get("id"), detail)

        if key is not None and key in ids:
            yield found("annotation id used twice", "the second one")
        ids.add(key)
        if category not in categories:
            yield found("annotation of unknown category", f"category_id {category!r}")
        else:
            used[category] += 1
        if category in absent.get(image_id, ()):
            yield found("object of an absent class", f"neg_category_ids of the image has category_id {category!r}")
        if image_id not in sizes:
            yield found("annotation of unknown image", f"image_id {image_id!r}")
            continue
        height, width = sizes[image_id]
        extent = None
        if a.get("segmentation"):
            check, detail, extent = _outline_problem(a["segmentation"], height, width)
            if check:
                yield found(check, detail)
        box = _numbers(a["bbox"], 4) if a.get("bbox") else None
        if box is None:
            if a.get("bbox") or not a.get("segmentation"):
                yield found("box not four finite numbers", f"{a.get('bbox')!r}"[:120])
            continue
        check, detail = _box_problem(box, height, width)
        if check:
            yield found(check, detail)
        elif extent is not None and _iou(box, extent) < 0.5:
            yield found("outline and box disagree", f"box {[round(v, 1) for v in box]}, outline {extent}")
        if "area" in a and (_numbers([a["area"]]) or [0])[0] <= 0:
            yield found("area not positive", f"area {a['area']!r}")
        place = hash((image_id, category, *(round(v, 2) for v in box), bool(a.get("iscrowd"))))
        if place in objects:
            yield found("object twice", f"the same category and box as annotation {objects[place]}")
        objects.setdefault(place, key)
    for c in source.content["categories"]:
        if not used[c.get("id")]:
            detail = f"{c.get('name')} (id {c.get('id')})"
            yield Finding("category without objects", source.name, None, None, detail)


def _iou(box: list[float], extent: list[float]) -> float:
    x, y, w, h = box
    inter_w = min(x + w, extent[2]) - max(x, extent[0])
    inter_h = min(y + h, extent[3]) - max(y, extent[1])
    inter = max(0.0, inter_w) * max(0.0, inter_h)
    union = w * h + (extent[2] - extent[0]) * (extent[3] - extent[1]) - inter
    return inter / union if union > 0 else 0.0


def _check_categories(source: DataSource) -> Iterable[Finding]:
    for key, check in (("id", "category id used twice"), ("name", "category name used twice")):
        for value, count in Counter(c.get(key) for c in source.content["categories"]).items():
            if count > 1:
                yield Finding(check, source.name, None, None, f"{value!r}")


def check_source(source: DataSource, facts: dict[Any, ImageFacts]) -> list[Finding]:
    """Everything that can be said about one set; `facts` from `look_at_images`, or {} to look at no image."""
    return [*_check_categories(source), *_check_images(source, facts), *_check_annotations(source)]


# ------------------------------------------------------------------------------------------------ repair
def fixed_content(source: DataSource, facts: dict[Any, ImageFacts]) -> tuple[dict[str, Any], Counter]:
    """A cleaned copy of the set's content, and how often what was done. The original content is not changed.

    Left out: images that are missing, unreadable, cut off or listed again, and annotations of them, of unknown
    categories, without a usable box, and second copies of an object. Corrected: declared sizes (to the file's), boxes
    (clipped to the image, or made from the outline), areas, invalid parts of outlines, repeated annotation ids.
    """
    done: Counter = Counter()
    images: dict[Any, dict] = {}
    files = set()
    for image in source.content["images"]:
        fact = facts.get(image.get("id")) if isinstance(image, dict) else None
        if not isinstance(image, dict) or not _entry_complete(image):
            done["image entries left out: incomplete"] += 1
        elif image["id"] in images or image_path(source, image) in files:
            done["image entries left out: listed before"] += 1
        elif fact is not None and fact.problem in ("image missing", "image unreadable", "image cut off"):
            done[f"images left out: {fact.problem.removeprefix('image ')}"] += 1
        else:
            if fact is not None and fact.problem == "image size differs":
                image = {**image, "height": fact.height, "width": fact.width}
                done["image sizes corrected"] += 1
            images[image["id"]] = image
            files.add(image_path(source, image))
    known: set = set()
    categories = []
    for category in source.content["categories"]:
        if category.get("id") is None or category["id"] in known:
            done["categories left out: no id, or used before"] += 1
            continue
        known.add(category["id"])
        categories.append(category)
    annotations: list[dict] = []
    places: set = set()
    ids = {a["id"] for a in source.content["annotations"] if type(a.get("id")) is int}
    free, taken = max(ids, default=0) + 1, set()
    for original in source.content["annotations"]:
        a = dict(original)
        if a.get("image_id") not in images or a.get("category_id") not in known:
            done["annotations left out: unknown image or category"] += 1
            continue
        height, width = (int(images[a["image_id"]][k]) for k in ("height", "width"))
        extent = _fix_outline(a, height, width, done)
        box = _numbers(a["bbox"], 4) if a.get("bbox") else None
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
        if (_numbers([a.get("area")]) or [0])[0] <= 0:
            a["area"] = box[2] * box[3]
            done["areas set to the box's"] += 1
        place = (a["image_id"], a["category_id"], *(round(v, 2) for v in box), bool(a.get("iscrowd")))
        if place in places:
            done["annotations left out: object twice"] += 1
            continue
        places.add(place)
        if a.get("id") is None or a["id"] in taken:
            a["id"], free = free, free + 1
            done["annotation ids renewed"] += 1
        taken.add(a["id"])
        annotations.append(a)
    others = {k: v for k, v in source.content.items() if k not in ("images", "annotations", "categories")}
    content = {**others, "images": list(images.values()), "annotations": annotations, "categories": categories}
    return content, done


def _fix_outline(a: dict[str, Any], height: int, width: int, done: Counter) -> list[float] | None:
    """Removes what is invalid from an annotation's segmentation; the extent of what is left."""
    segmentation = a.get("segmentation")
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        rings = [segmentation] if not isinstance(segmentation[0], (list, tuple)) else segmentation
        good = [r for r in rings if _outline_problem([r], height, width)[0] in ("", "outline outside the image")]
        if len(good) < len(rings):
            done["polygon parts left out"] += len(rings) - len(good)
            a["segmentation"] = good
        return _outline_problem(good, height, width)[2] if good else None
    check, _, extent = _outline_problem(segmentation, height, width)
    if check:
        a["segmentation"] = []
        done["run lengths left out"] += 1
    return extent


# ------------------------------------------------------------------------------------------------ page
def write_page(folder: str | Path, sources: Sequence[DataSource], findings: Sequence[Finding], count: int) -> None:
    """index.html with tables of the sets, findings and classes, and for each set pictures of `count` images with
    findings (of all kinds alike) and `count` random ones: annotations drawn, those with findings framed in red."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    body = [f"<pre>{html.escape(sets_table(sources, findings))}\n\n{html.escape(summary_table(findings))}</pre>"]
    for source in sources:
        names = {c["id"]: str(c.get("name", c["id"])) for c in source.content["categories"]}
        labels = {c: i for i, c in enumerate(names, 1)}
        images = {i["id"]: i for i in source.content["images"] if _entry_complete(i)}
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
        for a in source.content["annotations"]:
            counts[a.get("category_id")] += 1
            if a.get("image_id") in wanted:
                objects[a["image_id"]].append(a)
        split_rows = _rows_in_split(source.split, wanted)
        body.append(f"<h2>{html.escape(source.name)}: {len(images)} images</h2>")
        shown = ", ".join(f"{n} {counts[c]}" for c, n in sorted(names.items(), key=lambda c: -counts[c[0]])[:100])
        body.append(f"<p>Objects of each class: {html.escape(shown)}{', …' * (len(names) > 100)}</p><div>")
        for number, key in enumerate(chosen):
            path = image_path(source, images[key])
            flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
            image = cv2.imread(path, flags) if os.path.isfile(path) else None
            if image is None:
                image = np.full((120, 160, 3), 128, np.uint8)
            if key in split_rows:
                drawable, class_names = source.split.annotations(split_rows[key]), source.split.class_names
            else:
                drawable, class_names = _drawable(objects[key], image.shape[:2], labels), list(names.values())
            bad = {f.annotation_id for f in notes[key] if f.annotation_id is not None}
            picture = _shrunk(image, drawable, class_names, [a for a in objects[key] if a.get("id") in bad])
            name = f"{''.join(ch if ch.isalnum() else '_' for ch in source.name)}-{number:03d}.png"
            with atomic_write(folder / name, "wb") as f:
                f.write(cv2.imencode(".png", picture)[1].tobytes())
            texts = [f"{key} ({os.path.basename(path)}): {len(objects[key])} objects"]
            texts += [f"{f.check}: {f.detail}" for f in notes[key][:5]]
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
    with atomic_write(folder / "index.html") as f:
        f.write(f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>Data check</title><style>{style}</style>')
        f.write(f"</head><body><h1>Data check</h1>{''.join(body)}</body></html>\n")
    logger.info(f"pictures: {folder / 'index.html'}")


def _rows_in_split(split: Any, image_ids: set) -> dict[Any, int]:
    return {} if split is None else {i: n for n in range(len(split)) if (i := split.image_id(n)) in image_ids}


def _shrunk(image: np.ndarray, drawable: dict, class_names: Sequence[str], bad: Sequence[dict]) -> np.ndarray:
    """The image at PICTURE_SIDE pixels a side at most, with its annotations, and red frames around the bad ones."""
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
        box = _numbers(a["bbox"], 4) if a.get("bbox") else None
        if box is not None:
            x, y, w, h = (v * scale for v in box)
            corners = np.clip([[x, y], [x + max(w, 0), y + max(h, 0)]], 2, [max(2, width - 3), max(2, height - 3)])
            first, second = (tuple(map(int, corner)) for corner in corners - [[3, 3], [-3, -3]])
            cv2.rectangle(picture, first, second, (255, 255, 255), 5)
            cv2.rectangle(picture, first, second, (0, 0, 220), 3)
    return picture


def _drawable(objects: Sequence[dict], size: tuple[int, int], labels: dict) -> dict[str, Any]:
    """Raw annotations as viz.draw_annotations wants them; what cannot be drawn is left out."""
    boxes, numbers, crowds, outlines = [], [], [], []
    for a in objects:
        box = _numbers(a["bbox"], 4) if a.get("bbox") else None
        extent, rings, segmentation = None, [], a.get("segmentation")
        if segmentation:
            check, _, extent = _outline_problem(segmentation, *size)
            if isinstance(segmentation, dict) and not check:
                rings = rle_to_rings(segmentation, *size)
            elif extent is not None:
                parts = segmentation if isinstance(segmentation[0], (list, tuple)) else [segmentation]
                rings = [orient_outer(np.array(r, np.float32).reshape(-1, 2)) for r in parts]
        if box is None and extent is None:
            continue
        x1, y1, x2, y2 = (box[0], box[1], box[0] + box[2], box[1] + box[3]) if box else extent
        boxes.append(np.clip([x1, y1, max(x1, x2), max(y1, y2)], -1e4, 1e5))
        numbers.append(labels.get(a.get("category_id"), 0))
        crowds.append(bool(a.get("iscrowd")))
        outlines.append(rings)
    return {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4), "labels": np.array(numbers, np.int32),
        "is_crowd": np.array(crowds, bool), "rings": outlines,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ command line
def sets_table(sources: Sequence[DataSource], findings: Sequence[Finding]) -> str:
    """What was looked at."""
    kinds = Counter((f.data, CHECKS[f.check]) for f in findings)
    rows = [
        [s.name, *(len(s.content[key]) for key in ("images", "annotations", "categories")),
         kinds[s.name, "error"], kinds[s.name, "warning"]]
        for s in sources
    ]  # fmt: skip
    return tabulate(rows, ["data", "images", "annotations", "classes", "errors", "warnings"])


def summary_table(findings: Sequence[Finding]) -> str:
    counts = Counter((f.data, f.check) for f in findings)
    order = list(CHECKS)
    rows = [
        [data, CHECKS[check], check, n]
        for (data, check), n in sorted(counts.items(), key=lambda r: (r[0][0], order.index(r[0][1])))
    ]
    return tabulate(rows, ["data", "kind", "check", "count"]) if rows else "nothing found"


def read_source(name: str, annotation_file: str, folder: str) -> DataSource:
    content = read_json(annotation_file, "annotation file")
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or (key != "images" and not all(isinstance(v, dict) for v in value)):
            raise UserError(f"annotation file {annotation_file} is not in COCO's format: no list '{key}' of entries")
    if not Path(folder).is_dir():
        raise UserError(f"image folder {folder} does not exist")
    return DataSource(name, content, folder)


def configured_sources(settings: Sequence[str]) -> list[tuple[DataSource, str]]:
    """The sets of DATA.TRAIN and DATA.VAL, each with its annotation file ("" if it has no json)."""
    # Missing images are findings here.
    cfg = finalize_config(default_config().update_args([*settings, "DATA.KEEP_MISSING_IMAGES=True"]))
    sources = []
    for name in dict.fromkeys([*cfg.DATA.TRAIN, *cfg.DATA.VAL]):
        entry = cfg.DATA.DATASETS.get(name)
        if entry is None or str(entry[0]).endswith(".json"):
            annotation_file, folder = dataset_coco.find_files_of(cfg, name)
            sources.append((read_source(name, annotation_file, folder), annotation_file))
            continue
        split = load_format(entry, cfg, name)
        if not hasattr(split, "content"):
            raise UserError(f"{name}: {entry[0]} gives a set without content(), which could be checked")
        if hasattr(split, "image_root"):
            sources.append((DataSource(name, split.content(), split.image_root(), split), ""))
        else:
            sources.append((DataSource(name, split.content(), split.folders[0]), ""))
    return sources


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--data", nargs=2, action="append", default=[], metavar=("JSON", "IMAGES"), help="a set; repeat"
    )
    parser.add_argument(
        "--config", nargs="+", metavar="KEY=VAL", help="settings; checks the sets of DATA.TRAIN, DATA.VAL"
    )
    parser.add_argument("--json", metavar="OUT", help="where to write the findings")
    parser.add_argument("--fix", metavar="DIR", help="write cleaned annotation files into this folder")
    parser.add_argument("--page", metavar="DIR", help="write a page of pictures into this folder")
    parser.add_argument("--pictures", type=int, default=24, help="random pictures of each set on the page (24)")
    parser.add_argument("--quick", action="store_true", help="do not open the images")
    args = parser.parse_args(argv)
    try:
        if bool(args.data) == bool(args.config):
            raise UserError("give either --data JSON IMAGES or --config with DATA.TRAIN and DATA.VAL")
        stems = Counter(Path(j).stem for j, _ in args.data)
        named = [(j if stems[Path(j).stem] > 1 else Path(j).stem, j, folder) for j, folder in args.data]
        pairs = [(read_source(*n), n[1]) for n in named] if args.data else configured_sources(args.config)
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
    print(f"{sets_table([source for source, _ in pairs], findings)}\n\n{summary_table(findings)}")
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
