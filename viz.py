"""Pictures of detections and annotations: translucent masks with outlines, boxes, name tags, COCO's body skeleton.

Images are uint8 BGR, boxes x1 y1 x2 y2 in continuous coordinates of the image. Every function returns a new image.
"""

import functools
import hashlib
import importlib.util
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from common import UserError, atomic_write
from data import read_image
from detections import Detections
from utils import np_box_ops
from utils.polygons import decode_part

__all__ = [
    "CSV_HEADER", "Drawing", "Style", "class_color", "drawable_name", "drawable_text", "contact_sheet", "cut_out",
    "draw_annotations", "draw_detections", "prediction_entry", "prediction_rows", "show_window", "shrunk",
    "side_by_side", "write_prediction",
]  # fmt: skip

Color = tuple[int, int, int]

MASK_OPACITY = 0.5  # of small objects; what fills the picture is drawn half as strong
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
# COCO's 17 body points are nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right.
SKELETON = [
    (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12),
    (11, 12), (11, 13), (13, 15), (12, 14), (14, 16),
]  # fmt: skip
LEFT, RIGHT, MIDDLE = (80, 175, 250), (230, 160, 60), (130, 220, 130)  # sides of a body: orange, blue, green


TONES = (1, 0.55, 1.5, 0.75, 1.25)  # shades of objects of one class that meet


class Style(NamedTuple):
    """How objects are drawn."""

    parts: str = "all"  # "boxes", "masks": these alone; objects without a mask keep their box
    contour: bool = False  # masks as outlines, not filled
    colors: str = "class"  # in several tones where objects of one class meet; "instance": each a colour of its own
    unit: float = 0  # lines and letters as in a square picture of this side; 0: as the picture's own size asks for
    smallest: int = 0  # a picture with a shorter long side is enlarged by a whole number to at least this


class Drawing(NamedTuple):
    """What --predict makes beside its pictures of the usual kind."""

    style: Style = Style(smallest=320)
    truth: str | None = None  # an annotation file in COCO's form: its objects stand on the left of each picture
    cut_outs: bool = False  # each drawn object with a mask as a PNG of its own


class _Item(NamedTuple):
    """One object to draw."""

    box: np.ndarray  # float [4]
    color: Color
    text: str
    # -> bool [h, w] of a part of the image, and its left and top; one is kept at a time
    mask: Callable[[], tuple[np.ndarray, int, int]] | None = None
    keypoints: np.ndarray | None = None  # [K, 3]: x, y, and how visible (0 = do not draw)
    crowd: bool = False


def class_color(label: int) -> Color:
    """BGR of class 1, 2, …: the same in every run and for every model."""
    palette = _palette()
    return palette[(label - 1) % len(palette)]


@functools.cache
def _palette(size: int = 96) -> list[Color]:
    """Strong colours of middle brightness, each as far as can be (in CIE Lab) from all before it."""
    levels = np.linspace(0, 1, 13, dtype=np.float32)
    bgr = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    lab = cv2.cvtColor(bgr, cv2.COLOR_BGR2Lab)[:, 0]
    good = (lab[:, 0] > 45) & (lab[:, 0] < 82) & (np.hypot(lab[:, 1], lab[:, 2]) > 48)
    bgr, lab = bgr[good, 0], lab[good]
    distance = np.hypot(*(lab[:, 1:] - (0, -55)).T)  # begin with a blue
    chosen = [int(np.argmin(distance))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < size:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return [_color(round(255 * c) for c in bgr[i].tolist()) for i in chosen]


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    threshold: float = 0.5,
    style: Style = Style(),  # noqa: B008
    ids: Sequence[int | None] | None = None,
) -> np.ndarray:
    """`image` with the detections of at least `threshold`; ids: numbers of objects in a video, one for each."""
    items = []
    for number, i in enumerate(np.flatnonzero(detections.scores >= threshold).tolist(), 1):
        label = int(detections.labels[i])
        points = None
        if detections.keypoints is not None:
            points = detections.keypoints[i].astype(np.float64)
            points[:, 2] = 2
        mask = None if detections.masks is None else functools.partial(decode_part, detections.masks[i])
        known = None if ids is None else ids[i]
        mark = "" if known is None else f"#{known} "
        text = f"{mark}{drawable_name(_class_name(class_names, label), label)} {detections.scores[i]:.2f}"
        color = class_color((known or number) if style.colors == "instance" else label)
        if known is not None and style.colors == "class":
            color = _shade(color, TONES[known % len(TONES)])  # the same in all frames
        items.append(_Item(detections.boxes[i], color, text, mask, points))
    return _draw(*_enlarged(image, items if ids else _toned(items), style.smallest), style)


def draw_annotations(
    image: np.ndarray,
    annotations: dict[str, Any],
    class_names: Sequence[str],
    style: Style = Style(),  # noqa: B008
) -> np.ndarray:
    """`image` with annotations as `DatasetSplit.annotations` gives them; crowd regions are hatched."""
    items = []
    rings, points, crowds = (annotations.get(key) for key in ("rings", "keypoints", "is_crowd"))
    for i, (box, label) in enumerate(zip(annotations["boxes"], annotations["labels"])):
        crowd = crowds is not None and bool(crowds[i])
        text = drawable_name(_class_name(class_names, int(label)), int(label)) + (" (crowd)" if crowd else "")
        filled = rings is not None and len(rings[i])
        mask = functools.partial(_fill, rings[i], image.shape[:2]) if filled else None
        keypoints = None if points is None else points[i]
        color = class_color(i + 1 if style.colors == "instance" else int(label))
        items.append(_Item(box, color, text, mask, keypoints, crowd))
    return _draw(*_enlarged(image, _toned(items), style.smallest), style)


def _toned(items: list[_Item]) -> list[_Item]:
    """Objects of one colour whose boxes meet, in lighter and darker tones of it, so that they do not merge."""
    places: dict[Color, list[int]] = {}
    for i, item in enumerate(items):
        if not item.crowd:
            places.setdefault(item.color, []).append(i)
    toned = list(items)
    for color, group in places.items():
        boxes = np.array([items[i].box for i in group], np.float64)
        tones = np.zeros(len(group), int)
        for k in range(1, len(group)):
            met = tones[:k][np_box_ops.pairwise_intersection(boxes[k : k + 1], boxes[:k])[0] > 0]
            tones[k] = np.bincount(met, minlength=len(TONES)).argmin()  # the rarest, of several the first
        for i, tone in zip(group, tones.tolist()):
            toned[i] = items[i]._replace(color=_shade(color, TONES[tone]))
    return toned


def _enlarged(image: np.ndarray, items: list[_Item], smallest: int) -> tuple[np.ndarray, list[_Item]]:
    """A picture so small that names would cover it, and what is drawn on it, several times larger."""
    times = math.ceil(smallest / max(image.shape[:2]))
    if times <= 1:
        return image, items

    def larger(mask: Callable[[], tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, int, int]:
        part, left, top = mask()
        return np.kron(part, np.ones((times, times), bool)), left * times, top * times

    grown = []
    for item in items:
        mask = None if item.mask is None else functools.partial(larger, item.mask)
        points = None if item.keypoints is None else item.keypoints * (times, times, 1)
        grown.append(item._replace(box=item.box * times, mask=mask, keypoints=points))
    size = image.shape[1] * times, image.shape[0] * times
    return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST), grown


def _class_name(class_names: Sequence[str], label: int) -> str:
    return str(class_names[label - 1]) if 1 <= label <= len(class_names) else f"class {label}"


def _fill(rings: Sequence[np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Pixels of the image inside the rings by the non-zero winding rule: overlapping parts unite, opposite rings are
    holes."""
    winding = np.zeros(shape, np.int16)
    inside = np.zeros(shape, np.uint8)
    for ring in rings:
        x, y = np.asarray(ring, np.float64).T
        sign = 1 if np.dot(x, np.roll(y, -1)) >= np.dot(y, np.roll(x, -1)) else -1
        inside[:] = 0
        # OpenCV's coordinates are pixel centres, here with 4 fractional bits.
        cv2.fillPoly(inside, [np.round((ring - 0.5) * 16).astype(np.int32)], 1, shift=4)
        (np.add if sign > 0 else np.subtract)(winding, inside, out=winding, casting="unsafe")
    return winding != 0, 0, 0


# -------------------------------------------------------------------------------------------- drawing
def _draw(image: np.ndarray, items: list[_Item], style: Style) -> np.ndarray:
    canvas = image.copy()
    # Large objects first, so that small ones lie on top of them.
    items = sorted(items, key=lambda item: -_area(item.box))
    unit = style.unit or math.sqrt(image.shape[0] * image.shape[1])
    line = max(1, round(unit / 320))
    masked = style.parts != "boxes"
    for item in items:
        if item.mask is not None and masked:
            _draw_mask(canvas, item, max(1, round(unit / 450)), style.contour)
    for item in items:
        if item.mask is None or style.parts != "masks":
            _draw_box(canvas, item, max(1, line // 2) if item.mask is not None and masked else line)
        if item.keypoints is not None:
            _draw_keypoints(canvas, item.keypoints, line)
    _draw_tags(canvas, items, unit / 44)
    return canvas


def _area(box: np.ndarray) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _draw_mask(canvas: np.ndarray, item: _Item, line: int, contour: bool) -> None:
    part, left, top = item.mask()
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    if len(rows) == 0:
        return
    mask = np.ascontiguousarray(part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    left, top = left + int(columns[0]), top + int(rows[0])
    region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    filled = mask
    if item.crowd:
        y, x = (np.arange(n, dtype=np.int32) for n in mask.shape)
        filled = mask & ((x + (y + (top + left))[:, None]) % (8 * line) < 3 * line)
    opacity = MASK_OPACITY * (1 - 0.5 * min(1.0, 2 * mask.sum() / canvas[:, :, 0].size))
    # What each of the 256 values of a channel becomes: nothing larger than the region is made.
    table = np.arange(256)[:, None] * (1 - opacity) + np.array(item.color) * opacity
    if not contour:
        cv2.copyTo(cv2.LUT(region, table.astype(np.uint8)[None]), filled.view(np.uint8), region)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    contours = [cv2.approxPolyDP(contour, 0.7, True) for contour in contours]  # without the steps of pixels
    # A dark rim keeps the outline apart from a background of its own colour.
    cv2.drawContours(canvas, contours, -1, _shade(item.color, 0.45), line + 1, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, _shade(item.color, 1.2), line, cv2.LINE_AA)


def _color(values: Iterable[float]) -> Color:
    blue, green, red = map(int, values)
    return blue, green, red


def _shade(color: Color, factor: float) -> Color:
    """Darker for a factor below 1, nearer to white above."""
    if factor <= 1:
        return _color(c * factor for c in color)
    return _color(c + (255 - c) * (factor - 1) for c in color)


def _draw_box(canvas: np.ndarray, item: _Item, line: int) -> None:
    height, width = canvas.shape[:2]
    half = line / 2
    x1, y1, x2, y2 = item.box
    # Kept inside the picture, so that the sides of a box on its border can be seen.
    first = (round(np.clip(x1, half, width - half) - 0.5), round(np.clip(y1, half, height - half) - 0.5))
    second = (round(np.clip(x2, half, width - half) - 0.5), round(np.clip(y2, half, height - half) - 0.5))
    cv2.rectangle(canvas, first, second, item.color, line, cv2.LINE_8)


def _draw_keypoints(canvas: np.ndarray, points: np.ndarray, line: int) -> None:
    def place(k: int) -> tuple[int, int]:
        return round(points[k, 0] * 16 - 8), round(points[k, 1] * 16 - 8)

    body = len(points) == 17
    shown = points[:, 2] > 0
    for a, b in SKELETON if body else ():
        if shown[a] and shown[b]:
            color = MIDDLE if (a + b) % 2 and a > 0 or a == 0 else LEFT if a % 2 else RIGHT
            cv2.line(canvas, place(a), place(b), INK, line + 2, cv2.LINE_AA, 4)
            cv2.line(canvas, place(a), place(b), color, line, cv2.LINE_AA, 4)
    for k in np.flatnonzero(shown):
        color = MIDDLE if not body or k == 0 else LEFT if k % 2 else RIGHT
        radius = round(1.6 * line * 16)
        cv2.circle(canvas, place(k), radius + 16, INK, -1, cv2.LINE_AA, 4)
        # Annotated points that cannot be seen (v = 1) are drawn hollow.
        cv2.circle(canvas, place(k), radius, color, -1 if points[k, 2] > 1 else 1, cv2.LINE_AA, 4)


# -------------------------------------------------------------------------------------------- text
@functools.cache
def _has_glyph(character: str) -> bool:
    """Whether OpenCV's font has the character; in the place of those missing from it there is a "?"."""
    pictures = []
    for one in (character, "?"):
        pictures.append(np.zeros((40, 60), np.uint8))
        cv2.putText(pictures[-1], drawable_text(one), (4, 30), 255, cv2.FontFace("sans"), 24)
    return character == "?" or bool((pictures[0] != pictures[1]).any())


def drawable_name(name: str, label: int) -> str:
    """The name of class `label` for pictures: its number where the font has no letter of it, as of Hindi or Thai."""
    letters = [ch for ch in name if ch.isalnum()]
    return f"class {label}" if letters and not any(map(_has_glyph, letters)) else name


def drawable_text(text: str) -> str:
    """The text with "?" for halves of characters, on which OpenCV's drawing crashes."""
    return text.encode(errors="replace").decode()


def _text_size(text: str, size: int, weight: int = 500) -> tuple[int, int, int]:
    """Width, height and baseline (from the top) of a line of text; OpenCV 5's own font knows most scripts."""
    font = cv2.FontFace("sans")
    width = cv2.getTextSize((1, 1), drawable_text(text), (0, 0), font, size, weight)[2]
    return width, round(1.2 * size), round(0.92 * size)


def _put_text(canvas: np.ndarray, text: str, left: int, top: int, size: int, color: Color, weight: int = 500) -> None:
    baseline = _text_size(text, size, weight)[2]
    cv2.putText(canvas, drawable_text(text), (left, top + baseline), color, cv2.FontFace("sans"), size, weight)


def _text_color(background: Color) -> Color:
    """Black or white, whichever reads better (WCAG 2 relative luminance)."""
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def _draw_tags(canvas: np.ndarray, items: list[_Item], font_size: float) -> None:
    """Name tags, each where it covers the least of other tags and small objects; the smallest objects choose first."""
    height, width = canvas.shape[:2]
    # Smaller letters where many tags would hide the picture, but never illegible ones.
    letters = sum(len(item.text) + 1 for item in items)
    crowding = letters * 0.7 * font_size**2 / (height * width)
    font_size = round(float(np.clip(font_size * min(1.0, math.sqrt(0.12 / max(crowding, 1e-9))), 11, 110)))
    pad = max(2, font_size // 4)
    sizes = [_text_size(item.text, font_size) for item in items]
    tag_h = sizes[0][1] + pad // 2 if sizes else 0
    boxes = np.array([item.box for item in items]).reshape(-1, 4)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    placed = np.zeros((0, 4))
    tags = []
    for item, (text_width, _, _) in reversed(list(zip(items, sizes))):
        tag_w = text_width + 2 * pad
        places = _tag_places(item.box, tag_w, tag_h, width, height)
        costs = 0.02 * tag_w * tag_h * np.arange(len(places))
        costs += 3 * _covered(places, placed) + 0.3 * _covered(places, boxes[areas < 8 * tag_w * tag_h])
        best = places[int(np.argmin(costs))]
        placed = np.vstack([placed, best])
        tags.append((item, best.tolist()))
    for item, (x1, y1, x2, y2) in reversed(tags):
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), item.color, -1)
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), _shade(item.color, 0.6), 1)
        _put_text(canvas, item.text, x1 + pad, y1 + pad // 4, font_size, _text_color(item.color))


def _tag_places(box: np.ndarray, tag_w: int, tag_h: int, width: int, height: int) -> np.ndarray:
    """Where a tag can go, [P, 4], best first: on the box's top edge, inside it, below it, then along its sides."""
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    left = np.array([x1, x2 - tag_w, (x1 + x2 - tag_w) // 2, x1 - tag_w // 2])
    top = np.array([y1 - tag_h, y1, y2, y2 - tag_h, *range(y1 + tag_h, y2 - 2 * tag_h, tag_h)])
    left = np.tile(np.clip(left, 0, max(0, width - tag_w)), len(top))
    top = np.repeat(np.clip(top, 0, max(0, height - tag_h)), 4)
    return np.stack([left, top, left + tag_w, top + tag_h], 1)


def _covered(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """How many pixels of `boxes` [B, 4] each of `places` [P, 4] covers, [P]."""
    overlap = np.minimum(places[:, None, 2:], boxes[:, 2:]) - np.maximum(places[:, None, :2], boxes[:, :2])
    return overlap.clip(0).prod(2).sum(1)


# -------------------------------------------------------------------------------------------- sheets
def shrunk(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture, made smaller if its longest side has more than `side` pixels."""
    factor = side / max(picture.shape[:2])
    if factor >= 1:
        return picture
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def side_by_side(
    left: np.ndarray, right: np.ndarray, captions: tuple[str, str] = ("annotations", "predictions")
) -> np.ndarray:
    """Two pictures at the same height under their captions."""
    height = max(left.shape[0], right.shape[0])
    gap = max(4, height // 80)
    size = int(np.clip(height / 28, 12, 60))
    columns = []
    for picture, caption in zip((left, right), captions):
        picture = _resize_to_height(picture, height)
        head = np.full((round(1.6 * size), picture.shape[1], 3), BACKGROUND, np.uint8)
        _put_text(head, caption, 0, round(0.15 * size), size, INK)
        columns += [np.vstack([head, picture]), np.full((height + len(head), gap, 3), BACKGROUND, np.uint8)]
    return np.hstack(columns[:-1])


def contact_sheet(images: Sequence[np.ndarray], columns: int = 4, width: int = 1600, gap: int = 8) -> np.ndarray:
    """All pictures in rows of `columns`, each row scaled so that its pictures share one height and fill the width."""
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    rows, height = [], 0
    for start in range(0, len(images), columns):
        row = list(images[start : start + columns])
        inner = width - gap * (len(row) - 1)
        fitting = inner / sum(picture.shape[1] / picture.shape[0] for picture in row)
        # A last row with fewer pictures is not blown up beyond the height of the one above it.
        height = max(1, round(min(fitting, height) if rows and len(row) < columns else fitting))
        line = np.full((height, width, 3), BACKGROUND, np.uint8)
        x = 0.0
        for picture in row:
            small = _resize_to_height(picture, height)
            begin = min(round(x), width)
            small = small[:, : width - begin]
            line[:, begin : begin + small.shape[1]] = small
            x += picture.shape[1] / picture.shape[0] * height + gap
        rows += [line, np.full((gap, width, 3), BACKGROUND, np.uint8)]
    return np.vstack(rows[:-1])


def _resize_to_height(picture: np.ndarray, height: int) -> np.ndarray:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    if picture.shape[:2] == (height, width):
        return picture
    shrink = height < picture.shape[0]
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)


# -------------------------------------------------------------------------------------------- files
def write_prediction(
    out_dir: str | os.PathLike,
    image_path: str | os.PathLike,
    detections: Detections,
    class_names: Sequence[str],
    threshold: float = 0.5,
    style: Style = Style(smallest=320),  # noqa: B008
    annotations: dict[str, Any] | None = None,
    image: np.ndarray | None = None,
) -> Path:
    """Writes the picture of `image_path` with its detections into `out_dir` and returns its path.

    image: the pixels, if they are not those of the file.
    With `annotations`, see `draw_annotations`, they stand on its left. Pictures smaller than 320 pixels are enlarged.
    It is called like the input (PNG stays PNG, everything else becomes JPEG). A file of that name that does not show
    the same input, be it another folder's image or the input itself, is left alone: the name then gets the folder's
    name in front, or a hash behind. Predicting the same input again replaces its picture.
    """
    source = os.path.realpath(image_path)
    stem, folder = Path(source).stem, Path(source).parent.name
    mark = "packrcnn input " + hashlib.sha256(source.encode(errors="surrogateescape")).hexdigest()[:24]
    extension = ".png" if Path(source).suffix.lower() == ".png" else ".jpg"
    candidates = [stem, f"{folder}_{stem}", f"{stem}_{mark[-8:]}", f"{stem}_{mark[-24:]}"]
    paths = [Path(out_dir) / (name + extension) for name in candidates]
    path = next((p for p in paths if not p.exists() or _is_marked(p, mark)), None)
    if path is None:
        raise UserError(f"no free name for the picture of {image_path} in {out_dir}: choose another folder")
    image = read_image(os.fspath(image_path)) if image is None else image
    picture = draw_detections(image, detections, class_names, threshold, style)
    if annotations is not None:
        picture = side_by_side(draw_annotations(image, annotations, class_names, style), picture)
    options = [cv2.IMWRITE_JPEG_QUALITY, 92] if extension == ".jpg" else []
    good, encoded = cv2.imencode(extension, picture, options)
    if not good:
        raise UserError(f"the picture of {image_path} cannot be encoded as {extension}")
    with atomic_write(path, "wb") as f:
        f.write(_with_comment(encoded.tobytes(), mark))
    return path


def cut_out(image: np.ndarray, rle: dict[str, Any]) -> np.ndarray | None:
    """uint8 [h, w, 4] BGRA: the object of a mask on nothing, cut to its extent; None for an empty mask."""
    part, left, top = decode_part(rle)
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    if len(rows) == 0:
        return None
    part = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = top + int(rows[0]), left + int(columns[0])
    pixels = image[top : top + part.shape[0], left : left + part.shape[1]]
    return np.dstack([pixels * part[:, :, None], part.astype(np.uint8) * 255])


def prediction_rows(entry: dict[str, Any]) -> list[list[Any]]:
    """Rows of predictions.csv for a `prediction_entry`: file, image id, category id, class, score, and the box as COCO
    has it, x y width height."""
    rows = []
    for d in entry["detections"]:
        x1, y1, x2, y2 = d["box"]
        box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
        # A file name that is no text, as Linux allows, is written with escapes.
        file = entry["file"].encode(errors="backslashreplace").decode()
        rows.append([file, entry.get("image_id", ""), d["category_id"], d["class"], d["score"], *box])
    return rows


CSV_HEADER = ["file", "image_id", "category_id", "class", "score", "x", "y", "width", "height"]


def _with_comment(encoded: bytes, text: str) -> bytes:
    """A JPEG or PNG file with a comment near its beginning."""
    content = text.encode("ascii")
    if encoded.startswith(b"\xff\xd8"):
        # A COM segment after the first marker; its length counts itself.
        return encoded[:2] + b"\xff\xfe" + struct.pack(">H", len(content) + 2) + content + encoded[2:]
    header = 8 + 25  # signature and IHDR chunk
    chunk = b"tEXt" + b"Comment\0" + content
    text_chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return encoded[:header] + text_chunk + encoded[header:]


def _is_marked(path: Path, mark: str) -> bool:
    with open(path, "rb") as f:
        return mark.encode("ascii") in f.read(256)


def prediction_entry(
    image_path: str | os.PathLike,
    image_hw: tuple[int, int],
    detections: Detections,
    class_names: Sequence[str],
    category_ids: Sequence[int | str] | None = None,
) -> dict[str, Any]:
    """What the machine-readable predictions file says of one image; JSON-serialisable.

    {file, height, width, detections: [{class, category_id, score, box [x1, y1, x2, y2], mask (RLE), keypoints}]} by
    descending score. `category_ids` are the ids of classes 1, 2, … in the training annotations; 1, 2, … if not known.
    """
    found = []
    for i, label in enumerate(detections.labels.tolist()):
        entry = {
            "class": _class_name(class_names, label),
            "category_id": label if category_ids is None else category_ids[label - 1],
            "score": float(str(detections.scores[i])),
            "box": [round(v, 2) for v in detections.boxes[i].tolist()],
        }
        if detections.masks is not None:
            entry["mask"] = detections.masks[i]
        if detections.keypoints is not None:
            entry["keypoints"] = [[round(v, 4) for v in point] for point in detections.keypoints[i].tolist()]
        found.append(entry)
    return {"file": os.fspath(image_path), "height": int(image_hw[0]), "width": int(image_hw[1]), "detections": found}


# A window that any key closes; scaled down to the screen by whole numbers.
WINDOW = """
import sys, tkinter
root = tkinter.Tk()
root.title(sys.argv[2] + " (any key closes)")
picture = tkinter.PhotoImage(data=sys.stdin.buffer.read())
wide = -(-picture.width() // max(1, int(root.winfo_screenwidth() * 0.95)))
high = -(-picture.height() // max(1, int(root.winfo_screenheight() * 0.88)))
picture = picture.subsample(max(wide, high, 1))
tkinter.Label(root, image=picture).pack()
root.bind("<Key>", lambda event: root.destroy())
root.focus_force()
root.mainloop()
"""


def _key_window(path: str | os.PathLike) -> bool:
    """Shows a picture in a window of its own process that any key closes; False where Python has no Tk."""
    if importlib.util.find_spec("_tkinter") is None:
        return False
    image = cv2.imread(os.fspath(path))
    if image is None:
        return False
    command = [sys.executable, "-c", WINDOW, "", Path(path).name]
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process.stdin.write(cv2.imencode(".png", image)[1].tobytes())
        process.stdin.close()
    except BrokenPipeError:  # no window could be opened
        return False
    return True


def show_window(path: str | os.PathLike) -> bool:
    """Opens a picture without waiting for it, in a window that any key closes, or in the desktop's own viewer where
    Python has no Tk; False where there is no display."""
    if sys.platform == "win32":
        os.startfile(path)
        return True
    display = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    viewer = shutil.which("open" if sys.platform == "darwin" else "xdg-open")
    if not display:
        return False
    if _key_window(path):
        return True
    if viewer is None:
        return False
    none = subprocess.DEVNULL
    subprocess.Popen([viewer, os.fspath(path)], start_new_session=True, stdin=none, stdout=none, stderr=none)
    return True
