"""Draws the demo's data set: seeded pictures of overlapping shapes with annotations in COCO's instance format.

    python -m demo.make_shapes --output demo/data

Five classes with gaps in their category ids; polygons for instances in one or more pieces, RLE for instances with
holes and for crowd regions, which are clusters of tiny shapes of one class. Hidden parts of a shape are not part of its
annotation.
"""

import import_path

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from common import logger, read_json, write_json

__all__ = ["CATEGORY_IDS", "draw_image", "make_dataset", "make_split"]

CATEGORY_IDS = {"disc": 1, "rectangle": 2, "triangle": 4, "star": 7, "ring": 9}
# Things have typical colours: the hue of a shape, in degrees, is normally distributed around its class's.
HUES = {"disc": 0, "rectangle": 210, "triangle": 120, "star": 50, "ring": 285}
HUE_DEVIATION = 18
SPLITS = ("train", "val")  # annotations/instances_{split}.json and the image folder {split}/
SIDES = (160, 224)  # of a picture, pixels
DIAMETERS = (26, 110)  # of a shape's circumscribed circle, log-uniform
MIN_VISIBLE = 0.6  # a shape with a smaller visible share is left out
CROWD_PROBABILITY = 0.1
SUBPIXELS = 4  # masks are drawn this much finer than the picture


class Shape(NamedTuple):
    kind: str
    rings: list[np.ndarray]  # float64 [k, 2] x y in pixels; a second ring is a hole
    mask: np.ndarray  # bool [H * SUBPIXELS, W * SUBPIXELS], hidden parts included


def _unit_rings(kind: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Outlines of a shape of `kind` inside the unit circle, turned at random."""

    def on_circle(degrees: np.ndarray, radius: float | np.ndarray = 1.0) -> np.ndarray:
        angle = np.radians(degrees)
        return np.stack([np.cos(angle), np.sin(angle)], 1) * np.reshape(radius, (-1, 1))

    circle = on_circle(np.arange(0, 360, 9))
    if kind == "disc":
        rings = [circle]
    elif kind == "ring":
        rings = [circle, circle * rng.uniform(0.45, 0.6)]
    elif kind == "rectangle":
        half = np.degrees(np.arctan(rng.uniform(0.5, 1.0)))
        rings = [on_circle(np.array([half, 180 - half, 180 + half, 360 - half]))]
    elif kind == "triangle":
        rings = [on_circle(np.array([0, 120, 240]) + rng.uniform(-12, 12, 3))]
    else:
        rings = [on_circle(np.arange(0, 360, 36), np.tile([1.0, rng.uniform(0.4, 0.5)], 5))]
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return [ring @ rotation for ring in rings]


def _fill(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """bool [height * SUBPIXELS, width * SUBPIXELS]; overlapping rings cancel out."""
    mask = np.zeros((height * SUBPIXELS, width * SUBPIXELS), np.uint8)
    # OpenCV's integers are pixel centres, with `shift` fractional bits.
    points = [np.round((ring * SUBPIXELS - 0.5) * 16).astype(np.int32) for ring in rings]
    cv2.fillPoly(mask, points, 1, shift=4)
    return mask > 0


def _coverage(mask: np.ndarray) -> np.ndarray:
    """float32 [H, W]: the part of every pixel that a subpixel mask [H * SUBPIXELS, W * SUBPIXELS] covers."""
    height, width = mask.shape[0] // SUBPIXELS, mask.shape[1] // SUBPIXELS
    return cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)


def _place(kind: str, diameter: float, centre: np.ndarray, height: int, width: int, rng: np.random.Generator) -> Shape:
    rings = [ring * (diameter / 2) + centre for ring in _unit_rings(kind, rng)]
    return Shape(kind, rings, _fill(rings, height, width))


def _arrange(height: int, width: int, rng: np.random.Generator) -> list[Shape]:
    """Shapes from back to front, each with at least MIN_VISIBLE of its whole area inside the picture and in sight."""
    shapes: list[Shape] = []
    for _ in range(rng.integers(2, 8)):
        kind = str(rng.choice(list(CATEGORY_IDS)))
        diameter = np.exp(rng.uniform(*np.log(DIAMETERS)))
        for _ in range(8):  # tries; in a crowded picture the shape is given up
            margin = diameter * 0.3
            centre = rng.uniform([margin, margin], [width - margin, height - margin])
            candidate = [*shapes, _place(kind, diameter, centre, height, width, rng)]
            if _all_seen(candidate):
                shapes = candidate
                break
    return shapes


def _all_seen(shapes: list[Shape]) -> bool:
    in_front = np.zeros_like(shapes[0].mask)
    for shape in reversed(shapes):
        whole = abs(_signed_area(shape.rings[0])) - sum(abs(_signed_area(hole)) for hole in shape.rings[1:])
        if np.count_nonzero(shape.mask & ~in_front) < MIN_VISIBLE * whole * SUBPIXELS**2:
            return False
        in_front |= shape.mask
    return True


def _signed_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


def _arrange_crowd(height: int, width: int, rng: np.random.Generator) -> list[Shape]:
    """A cluster of tiny shapes of one class."""
    kind = str(rng.choice(list(CATEGORY_IDS)))
    centre = rng.uniform([35, 35], [width - 35, height - 35])
    return [
        _place(kind, rng.uniform(9, 13), centre + np.clip(rng.normal(0, 13, 2), -26, 26), height, width, rng)
        for _ in range(rng.integers(14, 24))
    ]


def _colour(
    rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float], hue: float | None = None
) -> np.ndarray:
    """float32 [3] BGR in 0..1, around a hue in degrees or of any."""
    hue = rng.uniform(0, 360) if hue is None else rng.normal(hue, HUE_DEVIATION) % 360
    hsv = np.array([[[hue, rng.uniform(*saturation), rng.uniform(*value)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]


def _clouds(height: int, width: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise float32 [height, width] in about -1..1."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width, 3] in 0..1: two muted colours flowing into each other, clouds, and faint lines."""
    dark = rng.random() < 0.5
    value = (0.15, 0.4) if dark else (0.7, 0.95)
    first, second = (_colour(rng, (0.1, 0.45), value) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * x / width + np.sin(angle) * y / height
    blend = (along - along.min()) / np.ptp(along) + 0.3 * _clouds(height, width, 5, rng)
    blend = np.clip(blend, 0, 1)[..., None]
    picture = first * (1 - blend) + second * blend
    picture += 0.08 * _clouds(height, width, 12, rng)[..., None]
    lines = picture.copy()
    for _ in range(rng.integers(0, 7)):
        start, end = (tuple(int(v) for v in rng.uniform(-20, 244, 2)) for _ in range(2))
        shade = float(rng.uniform(-0.2, 0.2))
        cv2.line(lines, start, end, tuple(float(v) for v in picture.mean((0, 1)) + shade), 1, cv2.LINE_AA)
    return 0.5 * (picture + lines)


def _fill_pattern(height: int, width: int, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 [height, width, 3] in 0..1: a shape's surface, plain, striped, dotted or mottled."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 11)
    u = 2 * np.pi / period * (np.cos(angle) * x + np.sin(angle) * y)
    v = 2 * np.pi / period * (np.cos(angle) * y - np.sin(angle) * x)
    pattern = rng.integers(0, 4)
    if pattern == 0:
        relief = np.zeros_like(x)
    elif pattern == 1:
        relief = np.clip(3 * np.sin(u), -1, 1)
    elif pattern == 2:
        relief = np.clip(4 * (np.sin(u) * np.sin(v) - 0.3), -1, 1)
    else:
        relief = _clouds(height, width, max(4, width // 12), rng)
    return colour + rng.uniform(0.05, 0.12) * relief[..., None]


def _paint(picture: np.ndarray, shapes: list[Shape], rng: np.random.Generator) -> None:
    """Draws `shapes` from back to front into the float32 `picture`: shadow, lit surface, darker rim."""
    height, width = picture.shape[:2]
    for shape in shapes:
        outline = shape.rings[0]
        centre, reach = outline.mean(0), np.ptp(outline, axis=0).max() / 2
        # A window that holds the shape and its shadow.
        x1, y1 = np.maximum(outline.min(0).astype(int) - 8, 0)
        x2, y2 = np.minimum(outline.max(0).astype(int) + 9, [width, height])
        window = picture[y1:y2, x1:x2]
        fine = (slice(y1 * SUBPIXELS, y2 * SUBPIXELS), slice(x1 * SUBPIXELS, x2 * SUBPIXELS))
        coverage = _coverage(shape.mask[fine])

        under = window[coverage > 0.5].mean(0)
        colours = [_colour(rng, (0.45, 0.95), (0.35, 1.0), HUES[shape.kind]) for _ in range(12)]
        # The first one with enough contrast, else the one with the most.
        contrast = [float(np.abs(c - under).sum()) for c in colours]
        colour = colours[next((i for i, c in enumerate(contrast) if c > 0.6), int(np.argmax(contrast)))]
        y, x = np.mgrid[y1:y2, x1:x2].astype(np.float32)
        light = np.clip(0.16 * (centre[0] - x + centre[1] - y) / reach, -0.2, 0.2)
        surface = _fill_pattern(y2 - y1, x2 - x1, colour, rng) + light[..., None]
        surface *= 0.6 + 0.4 * cv2.erode(coverage, np.ones((3, 3), np.uint8))[..., None]

        down_right = np.array([[1, 0, 2], [0, 1, 2]], np.float32)
        shadow = cv2.GaussianBlur(cv2.warpAffine(coverage, down_right, coverage.shape[::-1]), (0, 0), 1.8)
        window *= 1 - 0.35 * shadow[..., None]
        window *= 1 - coverage[..., None]
        window += coverage[..., None] * np.clip(surface, 0, 1)


def _to_annotation(shape: Shape, visible: np.ndarray) -> dict[str, Any]:
    """COCO's segmentation, bbox and area of the `visible` part of a shape.

    The outline itself where all of it is seen, else the contours of what is left; RLE where that has a hole.
    """
    height, width = visible.shape[0] // SUBPIXELS, visible.shape[1] // SUBPIXELS
    if len(shape.rings) == 1 and np.array_equal(visible, shape.mask) and _inside(shape.rings[0], height, width):
        rings = shape.rings
    else:
        contours, hierarchy = cv2.findContours(visible.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        # Slivers of less than 4 pixels say nothing about the shape.
        large = [cv2.contourArea(c) >= 4 * SUBPIXELS**2 for c in contours]
        if any(parent >= 0 and keep for keep, parent in zip(large, hierarchy[0, :, 3])):
            return _rle_annotation(_coverage(visible) >= 0.5)
        simple = [cv2.approxPolyDP(c, 1.0, True)[:, 0] for c, keep in zip(contours, large) if keep]
        rings = [(c + 0.5) / SUBPIXELS for c in simple if len(c) >= 3]
    points = np.concatenate(rings)
    (x1, y1), (x2, y2) = points.min(0), points.max(0)
    return {
        "segmentation": [np.round(ring, 2).ravel().tolist() for ring in rings],
        "bbox": np.round([x1, y1, x2 - x1, y2 - y1], 2).tolist(),
        "area": round(sum(abs(_signed_area(ring)) for ring in rings), 2),
    }


def _inside(ring: np.ndarray, height: int, width: int) -> bool:
    return bool((ring >= 0).all() and (ring <= [width, height]).all())


def _rle_annotation(mask: np.ndarray, compressed: bool = True) -> dict[str, Any]:
    """The annotation of a bool [height, width] mask as run lengths, a string or COCO's list of counts."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    box, area = coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))
    if compressed:
        counts: str | list[int] = rle["counts"].decode("ascii")
    else:
        flat = mask.ravel(order="F")
        changes = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
        counts = [0, *runs] if flat[0] else runs  # the first run counts zeros
    return {"segmentation": {"size": list(mask.shape), "counts": counts}, "bbox": box, "area": area}


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One picture, uint8 BGR [height, width, 3], and its annotations without ids (COCO's keys, boxes x y w h)."""
    height, width = (int(v) for v in rng.integers(SIDES[0], SIDES[1] + 1, 2))
    crowd = _arrange_crowd(height, width, rng) if rng.random() < CROWD_PROBABILITY else []
    shapes = _arrange(height, width, rng)
    picture = _background(height, width, rng)
    _paint(picture, crowd + shapes, rng)
    picture += rng.normal(0, rng.uniform(0.005, 0.03), picture.shape).astype(np.float32)

    annotations = []
    in_front = np.zeros((height * SUBPIXELS, width * SUBPIXELS), bool)
    for shape in reversed(shapes):
        found = _to_annotation(shape, shape.mask & ~in_front)
        annotations.append({"category_id": CATEGORY_IDS[shape.kind], "iscrowd": 0, **found})
        in_front |= shape.mask
    if crowd:
        union = np.any([shape.mask for shape in crowd], axis=0)
        gaps = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (4 * SUBPIXELS + 1,) * 2)
        region = cv2.morphologyEx(union.astype(np.uint8), cv2.MORPH_CLOSE, gaps).astype(bool) & ~in_front
        region = _coverage(region) >= 0.5
        if region.any():
            found = _rle_annotation(region, compressed=False)
            annotations.append({"category_id": CATEGORY_IDS[crowd[0].kind], "iscrowd": 1, **found})
    return np.clip(picture * 255, 0, 255).astype(np.uint8), annotations


def make_split(directory: str | Path, split: str, count: int, seed: int) -> Path:
    """Writes `count` pictures to `directory`/`split` and returns the annotation file.

    A picture depends on the seed, the split and its number alone. An annotation file of the same settings is taken as
    it is: it is written last, so the pictures are there.
    """
    directory = Path(directory)
    annotation_file = directory / "annotations" / f"instances_{split}.json"
    info = {"description": "shapes drawn by demo/make_shapes.py", "version": "3", "seed": seed, "count": count}
    if annotation_file.exists() and read_json(annotation_file, "annotation file").get("info") == info:
        return annotation_file
    (directory / split).mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        picture, found = draw_image(np.random.default_rng([seed, SPLITS.index(split), number]))
        name = f"{number + 1:06d}.jpg"
        if not cv2.imwrite(str(directory / split / name), picture, [cv2.IMWRITE_JPEG_QUALITY, 92]):
            raise OSError(f"{directory / split / name} cannot be written")
        height, width = picture.shape[:2]
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for entry in found:
            annotations.append({"id": len(annotations) + 1, "image_id": number + 1, **entry})
    categories = [{"id": i, "name": name, "supercategory": "shape"} for name, i in CATEGORY_IDS.items()]
    write_json(annotation_file, {"info": info, "images": images, "annotations": annotations, "categories": categories})
    return annotation_file


def make_dataset(directory: str | Path, train: int = 240, val: int = 60, seed: int = 7) -> dict[str, Path]:
    """Both splits under `directory`; the annotation files by split name."""
    return {split: make_split(directory, split, count, seed) for split, count in zip(SPLITS, (train, val))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="demo/data", help="directory to write to (default: %(default)s)")
    parser.add_argument("--train", type=int, default=240, metavar="N", help="training pictures (default: %(default)s)")
    parser.add_argument("--val", type=int, default=60, metavar="N", help="held-out pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="another seed, other pictures (default: %(default)s)")
    args = parser.parse_args()
    for split, path in make_dataset(args.output, args.train, args.val, args.seed).items():
        logger.info(f"{split}: {path}")


if __name__ == "__main__":
    main()
