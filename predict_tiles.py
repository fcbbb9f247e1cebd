"""Large images as overlapping tiles: reading them in parts, predicting every tile, and merging what was found.

A detection that reaches the inner border of its tile is probably cut. It gives way to one that shows the whole object;
pieces that continue each other across tiles become one object. Masks are kept as run lengths of the whole image; no
mask and, where the file allows it, no image of that size is ever in memory.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from augment import resized_shape
from common import UserError
from config import Config
from data import read_image, read_split_image, resize_for_test, stack_images
from dataset_split import DatasetSplit
from detections import Detections, Rle, paste_masks
from predict_devices import Predict, predict_in_turn
from utils import np_box_ops
from utils.polygons import reduce_rle, unite_rles
from utils.tiff_parts import TiffParts, open_tiff

__all__ = [
    "Found", "ImageParts", "View", "detect_tiled", "in_tiles", "merge_views", "open_parts", "reduced",
    "reduced_detections", "tile_views", "tiled_images",
]  # fmt: skip

# Images of up to this many pixels are decoded whole, and seen whole exactly as without tiles.
SMALL = 1 << 26
# A box that ends within this share of the tile's side, at least 2 pixels, of an inner border is taken to be cut by it.
NEAR_BORDER = 0.015
SAME = 0.5  # IoU of the parts that two tiles share, above which pieces belong to one object
_PAIRS = 1 << 18  # of boxes that are compared at a time
_PIECE = 1 << 26  # bytes of a band of an image that is reduced


class View(NamedTuple):
    """A rectangle of an image, in its pixels."""

    x: int
    y: int
    width: int
    height: int

    @property
    def box(self) -> list[int]:
        return [self.x, self.y, self.x + self.width, self.y + self.height]


class Found(NamedTuple):
    """Detections of one view, in the frame of the image."""

    view: View
    boxes: np.ndarray  # float64 [D, 4]
    scores: np.ndarray  # float32 [D]
    labels: np.ndarray  # int32 [D]
    masks: list[Rle] | None = None  # of the whole image
    keypoints: np.ndarray | None = None  # float32 [D, K, 3]


class Damaged(UserError):
    """A part of an image cannot be read."""


class ImageParts(NamedTuple):
    """An image that is read in parts."""

    height: int
    width: int
    read: Callable[[int, int, int, int], np.ndarray]  # (x, y, width, height) -> uint8 BGR [height, width, 3]


def in_tiles(cfg: Config | None) -> bool:
    return cfg is not None and bool(cfg.TEST.TILE)


# ------------------------------------------------------------------------------------------------------------ reading
def open_parts(image: str | os.PathLike | np.ndarray) -> ImageParts:
    """An image file, or pixels uint8 BGR [H, W, 3]. Large TIFF files are read in parts, all others decoded whole."""
    if not isinstance(image, np.ndarray):
        tiff = open_tiff(image)
        if tiff is not None and tiff.height * tiff.width > SMALL:
            return _of_tiff(tiff)
        image = read_image(image)
    return _of_pixels(image)


def _of_pixels(pixels: np.ndarray) -> ImageParts:
    height, width = pixels.shape[:2]
    return ImageParts(height, width, lambda x, y, w, h: pixels[y : y + h, x : x + w])


def _of_tiff(tiff: TiffParts) -> ImageParts:
    def read(x: int, y: int, width: int, height: int) -> np.ndarray:
        try:
            return tiff.read(x, y, width, height)
        except (ValueError, OSError) as e:
            raise Damaged(f"image {tiff.path} is damaged: {e}") from None

    return ImageParts(tiff.height, tiff.width, read)


def _of_split(split: DatasetSplit, i: int) -> ImageParts:
    """Image i in the orientation of its annotations."""
    height, width = split.image_size(i)
    if height * width > SMALL:
        tiff = open_tiff(split.image_file(i))
        if tiff is not None and (tiff.height, tiff.width) == (height, width):
            return _of_tiff(tiff)
    return _of_pixels(read_split_image(split, i))


def reduced(parts: ImageParts, times: int) -> np.ndarray:
    """The whole image, smaller by a whole number, rounded up: means of times x times pixels, band by band."""
    if times == 1:
        return np.ascontiguousarray(parts.read(0, 0, parts.width, parts.height))
    height, width = -(-parts.height // times), -(-parts.width // times)
    small = np.empty((height, width, 3), np.uint8)
    rows = max(1, _PIECE // (parts.width * times * 3))
    for top in range(0, height, rows):
        y, count = top * times, min(rows, height - top)
        band = parts.read(0, y, parts.width, min(count * times, parts.height - y))
        below, beside = count * times - band.shape[0], width * times - band.shape[1]
        if below or beside:  # the last pixels once more
            band = cv2.copyMakeBorder(band, 0, below, 0, beside, cv2.BORDER_REPLICATE)
        small[top : top + count] = cv2.resize(band, (width, count), interpolation=cv2.INTER_AREA)
    return small


def reduced_detections(detections: Detections, times: int) -> Detections:
    """Detections in the frame of the image that `reduced` gives."""
    masks = keypoints = None
    if detections.masks is not None:
        masks = [reduce_rle(m, times) for m in detections.masks]
    if detections.keypoints is not None:
        keypoints = detections.keypoints / np.float32([times, times, 1])
    return detections._replace(boxes=detections.boxes / np.float32(times), masks=masks, keypoints=keypoints)


# ------------------------------------------------------------------------------------------------------------- views
def tile_views(height: int, width: int, tile: int, overlap: float) -> list[View]:
    """Tiles of equal size that cover the image and overlap by at least this share, row by row."""
    columns, rows = (_starts(side, tile, overlap) for side in (width, height))
    return [View(x, y, min(tile, width), min(tile, height)) for y in rows for x in columns]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    if side <= tile:
        return [0]
    step = max(1, math.floor(tile * (1 - overlap)))
    count = -(-(side - tile) // step)
    return [round(i * (side - tile) / count) for i in range(count + 1)]


def _whole(parts: ImageParts, cfg: Config) -> tuple[View, np.ndarray]:
    """The whole image in about the size that the network sees. Its view may reach beyond the image by a few pixels."""
    times = 1
    if parts.height * parts.width > SMALL:
        if cfg.TEST.AUG_SHORT_EDGES:
            times = max(parts.height, parts.width) // cfg.TEST.AUG_MAX_SIZE
        else:
            edge = resized_shape(parts.height, parts.width, cfg.PREPROC.TEST_SHORT_EDGE_SIZE, cfg.PREPROC.MAX_SIZE)
            times = min(parts.height // edge[0], parts.width // edge[1])
    pixels = reduced(parts, max(1, times))
    scale = max(1, times)
    return View(0, 0, pixels.shape[1] * scale, pixels.shape[0] * scale), pixels


def _batches(parts: ImageParts, views: Sequence[View], cfg: Config) -> Iterator[list[tuple[View, np.ndarray]]]:
    """The views with their pixels in the size that the network sees, a batch read while the one before is predicted."""

    def read(part: Sequence[View]) -> list[tuple[View, np.ndarray]]:
        pixels = (np.ascontiguousarray(parts.read(v.x, v.y, v.width, v.height)) for v in part)
        return [(v, resize_for_test(p, cfg)) for v, p in zip(part, pixels)]

    def whole() -> list[tuple[View, np.ndarray]]:
        view, pixels = _whole(parts, cfg)
        return [(view, resize_for_test(pixels, cfg))]

    size = cfg.TEST.BATCH_SIZE
    jobs: list[Callable[[], list]] = [whole] if cfg.TEST.TILE_WHOLE or len(views) == 1 else []
    if len(views) > 1:
        jobs += [functools.partial(read, views[i : i + size]) for i in range(0, len(views), size)]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(jobs[0])
        for job in [*jobs[1:], None]:
            batch = ahead.result()
            if job is not None:
                ahead = pool.submit(job)
            yield batch


def detect_tiled(predict: Predict | Sequence[Predict], image: ImageParts, cfg: Config) -> Detections:
    """The detections of an image, seen as TEST.TILE and its settings say; predict: the graph's predictor, or one for
    each device, to which the tiles are dealt in turn."""
    views = tile_views(image.height, image.width, cfg.TEST.TILE, cfg.TEST.TILE_OVERLAP)
    predictors = [predict] if callable(predict) else list(predict)

    def batches() -> Iterator[dict[str, Any]]:
        for batch in _batches(image, views, cfg):
            pixels, shapes = stack_images([p for _, p in batch], cfg)
            yield {"image": pixels, "image_shape": shapes, "views": [view for view, _ in batch]}

    with ThreadPoolExecutor(1) as pool:
        jobs = []
        for batch, outputs in predict_in_turn(predictors, batches()):
            for n, view in enumerate(batch["views"]):
                one = {k: v[n] for k, v in outputs.items()}
                jobs.append(pool.submit(_in_frame, one, view, batch["image_shape"][n], image.height, image.width))
        found = [job.result() for job in jobs]
    limit = cfg.TEST.TILE_RESULTS_PER_IM if len(views) > 1 else cfg.TEST.RESULTS_PER_IM
    return merge_views(found, image.height, image.width, cfg.TEST.FRCNN_NMS_THRESH, cfg.TEST.NMS_CLASS_AGNOSTIC, limit)


def _in_frame(outputs: dict[str, np.ndarray], view: View, shape: Sequence[int], height: int, width: int) -> Found:
    """As `detections.to_original_frame`, for an image that is a part of a larger one."""
    count = int(outputs.get("count", len(outputs["boxes"])))
    scale = np.array([view.width / shape[1], view.height / shape[0]])
    boxes = outputs["boxes"][:count].astype(np.float64) * np.tile(scale, 2)
    scores = outputs["scores"][:count].astype(np.float32)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise UserError("the model predicts NaN or infinite boxes: its weights have diverged; load an older checkpoint")
    boxes = np.clip(boxes + np.tile([view.x, view.y], 2), 0, [width, height, width, height])
    keep = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    boxes = boxes[keep]
    masks = keypoints = None
    if "masks" in outputs:
        masks = paste_masks(outputs["masks"][:count][keep], boxes, height, width)
    if "keypoints" in outputs:
        keypoints = outputs["keypoints"][:count][keep].astype(np.float32)
        keypoints[:, :, :2] = keypoints[:, :, :2] * scale + [view.x, view.y]
    labels = outputs["labels"][:count][keep].astype(np.int32)
    return Found(view, boxes, scores[keep], labels, masks, keypoints)


def tiled_images(
    predict: Predict | Sequence[Predict],
    images: DatasetSplit | Sequence[str],
    cfg: Config,
    shard: tuple[int, int],
    unreadable: Callable[[int, UserError], None],
) -> Iterator[tuple[int, ImageParts, Detections]]:
    """(index, image, detections) of every size-th image from the rank-th on; `unreadable` as for
    `data.inference_batches`."""
    for i in range(shard[0], len(images), shard[1]):
        try:
            parts = _of_split(images, i) if isinstance(images, DatasetSplit) else open_parts(images[i])
        except UserError as e:
            unreadable(i, e)
            continue
        try:
            found = detect_tiled(predict, parts, cfg)
        except Damaged as e:
            unreadable(i, e)
            continue
        yield i, parts, found


# ----------------------------------------------------------------------------------------------------------- merging
def merge_views(
    found: Sequence[Found], height: int, width: int, threshold: float, class_agnostic: bool, limit: int
) -> Detections:
    """One list of detections of several views of an image, by descending score, `limit` at most.

    threshold: IoU above which the better of two detections of different views stays; class_agnostic: also of different
    classes.
    """
    count = np.array([len(f.boxes) for f in found])
    views = np.array([f.view.box for f in found], np.float64).reshape(-1, 4)
    if len(found) == 1:  # nothing to merge: exactly what the predictor gave
        order = np.arange(count[0])[:limit]
        return _taken(found, order, [[i] for i in order], found[0].boxes, found[0].scores, views)
    boxes = np.concatenate([f.boxes for f in found])
    scores = np.concatenate([f.scores for f in found])
    labels = np.concatenate([f.labels for f in found])
    view = np.repeat(np.arange(len(found)), count)
    cut = _cut_sides(boxes, views[view], height, width)
    is_cut = cut.any(1)
    near = np.maximum(2, NEAR_BORDER * (views[:, 2:] - views[:, :2]).max(1, initial=0))[view]
    explained, joined = np.zeros(len(boxes), bool), [np.zeros((0, 2), int)]
    for a, b in _meeting(_grown(boxes, near)):
        fits = (view[a] != view[b]) & (class_agnostic | (labels[a] == labels[b]))
        a, b = a[fits], b[fits]
        explained[_explained(a, b, boxes, scores, views[view], is_cut)] = True
        pieces = is_cut[a] & is_cut[b] & (labels[a] == labels[b])
        joined.append(_continuing(a[pieces], b[pieces], boxes, views[view], cut, threshold))
    groups = _groups(np.concatenate(joined), explained)
    alive = np.flatnonzero(~explained)
    # Each group is represented by its best member and bounded by all of them.
    members: dict[int, list[int]] = {}
    for i in alive.tolist():
        members.setdefault(int(groups[i]), []).append(i)
    lead = {g: max(m, key=lambda i: (scores[i], -i)) for g, m in members.items()}
    hull = boxes.copy()
    source = view.copy()
    for g, m in members.items():
        if len(m) > 1:
            hull[lead[g]] = [*boxes[m, :2].min(0), *boxes[m, 2:].max(0)]
            source[lead[g]] = len(found) + lead[g]  # of several views, so of none of them
    kept = np.array(sorted(lead.values(), key=lambda i: (-scores[i], i)), int)
    kept = kept[_suppress(hull[kept], labels[kept], source[kept], threshold, class_agnostic)][:limit]
    return _taken(found, kept, [members[int(groups[i])] for i in kept], hull, scores, views)


def _grown(boxes: np.ndarray, by: np.ndarray) -> np.ndarray:
    return boxes + np.stack([-by, -by, by, by], 1) / 2


def _cut_sides(boxes: np.ndarray, views: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool [D, 4]: which sides (left, top, right, bottom) of a box lie at a border of its view inside the image."""
    near = np.maximum(2, NEAR_BORDER * (views[:, 2:] - views[:, :2]).max(1, initial=0))[:, None]
    inner = np.concatenate([views[:, :2] > 0, views[:, 2:] < [width, height]], 1)
    return inner & (np.abs(boxes - views) <= near)


def _meeting(boxes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs i, j of boxes that overlap, found along x, in parts of limited size."""
    order = np.argsort(boxes[:, 0], kind="stable")
    x1, x2 = boxes[order, 0], boxes[order, 2]
    count = np.maximum(np.searchsorted(x1, x2, "left") - np.arange(len(boxes)) - 1, 0)
    parts = (np.cumsum(count) // _PAIRS).tolist()
    limits = [0, *(k for k in range(1, len(parts)) if parts[k] != parts[k - 1]), len(boxes)]
    for start, end in zip(limits, limits[1:]):
        n = count[start:end]
        i = np.repeat(np.arange(start, end), n)
        j = i + 1 + np.arange(len(i)) - np.repeat(np.cumsum(n) - n, n)
        i, j = order[i], order[j]
        meet = (boxes[i, 1] < boxes[j, 3]) & (boxes[j, 1] < boxes[i, 3])
        yield i[meet], j[meet]


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [n, 4] -> IoU of each pair, 0 for boxes without area."""
    low, high = np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])
    shared = np.maximum(high - low, 0).prod(1)
    union = np_box_ops.area(a) + np_box_ops.area(b) - shared
    return shared / np.maximum(union, 1e-9)


def _clip(boxes: np.ndarray, views: np.ndarray) -> np.ndarray:
    return np.concatenate([np.maximum(boxes[:, :2], views[:, :2]), np.minimum(boxes[:, 2:], views[:, 2:])], 1)


def _explained(
    a: np.ndarray, b: np.ndarray, boxes: np.ndarray, scores: np.ndarray, views: np.ndarray, is_cut: np.ndarray
) -> np.ndarray:
    """Which of a and b are cut, and what their tile sees of an object that another view shows whole: the other one.

    One that is found whole with less than half of the score explains nothing.
    """
    first, second = np.concatenate([a, b]), np.concatenate([b, a])
    use = is_cut[first] & ~is_cut[second]
    piece, whole = first[use], second[use]
    seen = _iou(_clip(boxes[whole], views[piece]), boxes[piece]) >= SAME
    seen &= scores[whole] >= 0.5 * scores[piece]
    return piece[seen]


def _continuing(
    a: np.ndarray, b: np.ndarray, boxes: np.ndarray, views: np.ndarray, cut: np.ndarray, threshold: float
) -> np.ndarray:
    """int [n, 2]: the pairs of a and b, pieces of different tiles, that belong to one object.

    Pieces continue each other where both are cut at the border between their tiles and agree along it. Others are the
    same piece, or a part of it.
    """
    same = _iou(boxes[a], boxes[b]) > threshold
    for first, second in ((a, b), (b, a)):  # `first` is what its tile sees of `second`
        same |= _iou(_clip(boxes[second], views[first]), boxes[first]) >= SAME
    for axis in (0, 1):
        along = 1 - axis
        for first, second in ((a, b), (b, a)):  # `first` lies to the left of or above `second`
            cuts = cut[first, axis + 2] & cut[second, axis]
            cuts &= (views[first, axis] < views[second, axis]) & (views[first, axis + 2] < views[second, axis + 2])
            cuts &= views[first, axis + 2] >= views[second, axis]
            # Only what both tiles see along the border is compared.
            low, high = (
                np.maximum(views[first], views[second])[:, along],
                np.minimum(views[first], views[second])[:, along + 2],
            )
            l1, h1 = np.maximum(boxes[first, along], low), np.minimum(boxes[first, along + 2], high)
            l2, h2 = np.maximum(boxes[second, along], low), np.minimum(boxes[second, along + 2], high)
            shared = np.maximum(np.minimum(h1, h2) - np.maximum(l1, l2), 0)
            total = np.maximum(np.maximum(h1, h2) - np.minimum(l1, l2), 1e-9)
            same |= cuts & (shared / total >= SAME)
    return np.stack([a[same], b[same]], 1)


def _groups(pairs: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """int [D]: a number for each detection, equal where pairs connect them; left_out: those that connect nothing."""
    pairs = pairs[~left_out[pairs].any(1)]
    parent = np.arange(len(left_out))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in pairs.tolist():
        i, j = root(i), root(j)
        parent[max(i, j)] = min(i, j)
    return np.array([root(i) for i in range(len(parent))], int)


def _suppress(
    boxes: np.ndarray, labels: np.ndarray, source: np.ndarray, threshold: float, class_agnostic: bool
) -> np.ndarray:
    """Indices of the boxes, listed by descending score, that NMS keeps. Boxes of one view have been through NMS."""
    close = [np.zeros((0, 2), int)]
    for i, j in _meeting(boxes):
        use = (source[i] != source[j]) & (class_agnostic | (labels[i] == labels[j]))
        i, j = i[use], j[use]
        use = _iou(boxes[i], boxes[j]) > threshold
        close.append(np.stack([np.minimum(i, j)[use], np.maximum(i, j)[use]], 1))
    pairs = np.concatenate(close)  # [n, 2]: the better and the worse one
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    gone = np.zeros(len(boxes), bool)
    for k, other in pairs.tolist():
        if not gone[k]:
            gone[other] = True
    return np.flatnonzero(~gone)


def _taken(
    found: Sequence[Found], kept: Iterable[int], groups: Sequence[Sequence[int]], boxes: np.ndarray, scores: np.ndarray,
    views: np.ndarray,
) -> Detections:  # fmt: skip
    """The detections `kept`, numbered through all views; `groups`: of which pieces each is made."""
    kept = np.asarray(kept, int)
    labels = np.concatenate([f.labels for f in found])[kept].astype(np.int32)
    masks = keypoints = None
    if found[0].masks is not None:
        every = [m for f in found for m in f.masks]
        masks = [unite_rles([every[i] for i in group]) for group in groups]
    if found[0].keypoints is not None:
        points = np.concatenate([f.keypoints for f in found])
        view = np.repeat(np.arange(len(found)), [len(f.boxes) for f in found])
        keypoints = np.stack([_best_points(points[g], views[view[g]]) for g in groups]) if len(groups) else points[:0]
    return Detections(boxes[kept].astype(np.float32), scores[kept].astype(np.float32), labels, masks, keypoints)


def _best_points(points: np.ndarray, views: np.ndarray) -> np.ndarray:
    """[M, K, 3] of the M pieces of an object -> [K, 3]: each point from the piece that is surest of it.

    Points that a piece places at the border of its tile are used only where no other piece has them inside.
    """
    if len(points) == 1:
        return points[0]
    near = 1.0
    inside = (points[..., :2] > views[:, None, :2] + near) & (points[..., :2] < views[:, None, 2:] - near)
    rank = np.where(inside.all(-1), points[..., 2], points[..., 2] - 1e6)
    return points[rank.argmax(0), np.arange(points.shape[1])]
