"""Augmentation: random crops and sizes, colours, and objects pasted from other images.

Large-scale jitter and copy-paste follow Ghiasi et al. 2021 (Simple Copy-Paste, arXiv 2012.07177), the colours Liu et
al. 2016 (SSD, as in its released code). All randomness comes from the generator that is passed in. Pixels, boxes,
outlines and keypoints go through the same map, a `View`.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

from config import Config
from dataset_split import MIN_SIDE, Objects
from utils import np_box_ops, polygons

__all__ = [
    "Layer", "Scene", "View", "draw_view", "jitter_colours", "paste_objects", "place_objects", "resize_into",
    "resized_shape",
]  # fmt: skip

CROP_TRIES = 10  # attempts at a random crop that shows an object


class View(NamedTuple):
    """Which pixels of an image are shown (a rectangle of whole pixels), at which size, mirrored or not."""

    x: int
    y: int
    width: int
    height: int
    size: tuple[int, int]  # height and width to which the rectangle is stretched
    flip: bool


class Scene(NamedTuple):
    """Objects in the coordinates of the view."""

    boxes: np.ndarray  # float64 [n, 4] x1 y1 x2 y2, inside the frame
    labels: np.ndarray  # int32 [n]
    is_crowd: np.ndarray  # bool [n]
    edges: np.ndarray  # float32 [e, 4] directed edges of the outlines, not clipped; crowds have none
    owners: np.ndarray  # int64 [e] non-decreasing: the object of each edge
    keypoints: np.ndarray | None  # float32 [n, K, 3]


class Layer(NamedTuple):
    """A pasted object: where its mask is True, the other image's pixels replace those of the canvas."""

    y: int  # of the mask's corner on the canvas
    x: int
    mask: np.ndarray  # bool [h, w]


# ------------------------------------------------------------------------------------------------ views
def resized_shape(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """(height, width), each at least 1, with a short edge of `short_edge`, or a long edge of `max_size` if that is
    smaller."""
    scale = min(short_edge / min(height, width), max_size / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def draw_view(
    shape: tuple[int, int],
    boxes: np.ndarray,
    short_edge: int,
    flip: bool,
    rng: np.random.Generator,
    cfg: Config,
    limit: tuple[int, int] | None = None,
) -> View:
    """The view of an image of this height and width: cropped (PREPROC.RANDOM_CROP), then resized to the short edge, or
    to a random scale (PREPROC.SCALE_JITTER) of which PREPROC.CROP_SIZE is shown.

    Args:
        boxes: [n, 4] objects. Random crops are tried until one shows enough of an object; after some attempts any is
        taken.
        limit: largest height and width of the view; of a larger resized image a random part is taken.
    """
    preproc = cfg.PREPROC
    sides = list(shape)
    if preproc.RANDOM_CROP:
        sides = [max(1, int(side * share + 0.5)) for side, share in zip(shape, rng.uniform(*preproc.RANDOM_CROP, 2))]
    if preproc.SCALE_JITTER:
        limit = limit or tuple(preproc.CROP_SIZE)
        fit = min(target / side for target, side in zip(preproc.CROP_SIZE, sides))
        scales = [rng.uniform(*preproc.SCALE_JITTER) * fit] * 2
        size = [max(1, int(side * scale + 0.5)) for side, scale in zip(sides, scales)]
    else:
        size = list(resized_shape(sides[0], sides[1], short_edge, preproc.MAX_SIZE))
        scales = [new / side for new, side in zip(size, sides)]
    for axis in (0, 1) if limit else ():
        if size[axis] > limit[axis]:
            # The image is cropped at whole pixels before it is resized, so that only visible pixels are computed.
            # Compared with cropping afterwards, the position differs by less than half a pixel of the original.
            sides[axis] = max(1, int(limit[axis] / scales[axis] + 0.5))
            size[axis] = limit[axis]
    y, x = 0, 0
    if tuple(sides) != tuple(shape):
        area = np.maximum(np_box_ops.area(boxes), MIN_SIDE**2)
        for _ in range(CROP_TRIES):
            y, x = (int(rng.integers(0, whole - part, endpoint=True)) for whole, part in zip(shape, sides))
            shown = np_box_ops.clip_boxes(boxes - [x, y, x, y], *sides)
            if len(boxes) == 0 or (np_box_ops.area(shown) / area).max() > preproc.MIN_VISIBLE:
                break
    return View(x, y, sides[1], sides[0], (size[0], size[1]), flip)


def resize_into(target: np.ndarray, image: np.ndarray, flip: bool) -> None:
    """Writes the image, stretched to the target's size and mirrored if asked, into `target` [h, w, 3]."""
    smaller_first = image.size <= target.size
    if flip and smaller_first:
        image = cv2.flip(image, 1)
    if image.shape == target.shape:
        np.copyto(target, image)
    else:
        cv2.resize(image, (target.shape[1], target.shape[0]), dst=target, interpolation=cv2.INTER_LINEAR)
    if flip and not smaller_first:
        np.copyto(target, cv2.flip(target, 1))


def place_objects(
    objects: Objects, shape: tuple[int, int], view: View, keypoint_flip: np.ndarray, min_visible: float, outlines: bool
) -> Scene:
    """The objects of an image of this height and width as the view shows them.

    Where the view crops the image, a box shrinks to the visible part of the object's outline, or of the box if there is
    no outline. Objects with less than `min_visible` of their box in view are left out. Keypoints outside become
    unlabelled. `outlines` says whether the scene contains outlines.
    """
    height, width = view.size
    origin = np.array([view.x, view.y])
    scale = np.array([width / view.width, height / view.height])
    boxes = np_box_ops.scale_boxes(objects.boxes.astype(np.float64) - np.tile(origin, 2), *scale)
    whole = np_box_ops.flip_boxes(boxes, width) if view.flip else boxes
    boxes = np_box_ops.clip_boxes(whole, height, width)
    partial = (view.height, view.width) != tuple(shape)
    edges, owners = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    if outlines or partial:
        vertices = ((objects.vertices - origin) * scale).astype(np.float32)
        edges = polygons.vertices_to_edges(vertices, objects.ring_sizes)
        edges = polygons.flip_edges(edges, width) if view.flip else edges
        owners = np.repeat(objects.ring_owners, objects.ring_sizes)
        useful = ~objects.is_crowd[owners]
        edges, owners = edges[useful], owners[useful]
    points = objects.keypoints
    if points is not None:
        points = (points - np.array([*origin, 0], np.float32)) * np.array([*scale, 1], np.float32)
        if view.flip:
            points = points[:, keypoint_flip]
            points[:, :, 0] = width - points[:, :, 0]
        points = np.where(points[:, :, 2:] > 0, points, 0)
    scene = Scene(boxes, objects.labels, objects.is_crowd, edges, owners, points)
    if not partial:
        return scene
    cut = (whole != boxes).any(1)
    outlined = np.bincount(owners, minlength=len(boxes)) > 0
    inside = polygons.boxes_inside(edges, owners, len(boxes), height, width)
    boxes = np.where((cut & outlined)[:, None], _intersection(boxes, inside), boxes)
    large = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1)
    share = np_box_ops.area(boxes) / np.maximum(np_box_ops.area(whole), MIN_SIDE**2)
    if points is not None:
        seen = ((points[:, :, :2] >= 0) & (points[:, :, :2] <= view.size[::-1])).all(2, keepdims=True)
        points = np.where(seen, points, 0)
    scene = scene._replace(boxes=boxes, keypoints=points)
    return _select(scene, large & ((share >= min_visible) | objects.is_crowd))


def _intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersections [n, 4] of boxes [n, 4]; x2 < x1 or y2 < y1 where two boxes do not meet."""
    return np.concatenate([np.maximum(a[:, :2], b[:, :2]), np.minimum(a[:, 2:], b[:, 2:])], 1)


def _select(scene: Scene, kept: np.ndarray) -> Scene:
    """The scene with only the objects for which `kept` [n] is True."""
    of_kept = kept[scene.owners]
    number = np.cumsum(kept) - 1
    points = scene.keypoints
    return Scene(
        scene.boxes[kept], scene.labels[kept], scene.is_crowd[kept], scene.edges[of_kept],
        number[scene.owners[of_kept]], None if points is None else points[kept],
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ colours
def jitter_colours(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """uint8 BGR image with random brightness, contrast, saturation and hue, each changed with probability 1/2.

    At strength 1 the ranges are SSD's: brightness ±32 levels, contrast and saturation 0.5 to 1.5 times, hue ±18
    degrees; contrast comes before or after the other two.
    """
    changes = rng.uniform(-strength, strength, 4) * (rng.random(4) < 0.5)
    contrast_first = rng.random() < 0.5
    brightness, contrast, saturation, hue = changes * [32, 0.5, 0.5, 18 / 360 * 256]
    levels = np.arange(256.0)
    brighter = np.clip(levels + brightness, 0, 255)
    if not (saturation or hue):
        return _map_levels(image, brighter * (1 + contrast))
    image = _map_levels(image, brighter * (1 + contrast if contrast_first else 1))
    # FULL: hues 0 to 255 instead of OpenCV's usual 0 to 179.
    tables = [np.floor(levels + hue + 0.5) % 256, levels * (1 + saturation), levels]
    image = _map_levels(cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL), np.stack(tables, 1)[None])
    image = cv2.cvtColor(image, cv2.COLOR_HSV2BGR_FULL)
    return image if contrast_first else _map_levels(image, levels * (1 + contrast))


def _map_levels(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The image with each value v replaced by the table's [256] (or, by channel, [1, 256, 3]) entry v, rounded."""
    table = np.clip(np.floor(table + 0.5), 0, 255).astype(np.uint8)
    return image if (table.ravel() == np.arange(256).repeat(table.size // 256)).all() else cv2.LUT(image, table)


# ------------------------------------------------------------------------------------------------ copy-paste
def paste_objects(
    scene: Scene,
    size: tuple[int, int],
    other: Scene,
    other_size: tuple[int, int],
    rng: np.random.Generator,
    min_visible: float,
) -> tuple[Scene, tuple[int, int], tuple[int, int], list[Layer]]:
    """Pastes a random subset of the other scene's outlined objects, one at least, over the scene.

    The parts of other objects that they hide are cut from the outlines and boxes of these, hidden keypoints become
    occluded (visibility 1), and objects with less than `min_visible` of their pixels left are removed.

    Returns:
        The new scene; the canvas size (height, width), enlarged at the right and bottom if pasted objects reach beyond
        `size`; the position (y, x) of the other image's corner on the canvas; and the pixels to copy.
    """
    y, x = (int(rng.integers(0, max(0, own - new), endpoint=True)) for own, new in zip(size, other_size))
    candidates = np.flatnonzero(np.bincount(other.owners, minlength=len(other.labels)) > 0)
    if len(candidates):
        # Equal boxes are one object of several classes.
        objects, of_object = np.unique(other.boxes[candidates], axis=0, return_inverse=True)
        chosen = rng.permutation(len(objects))[: rng.integers(1, len(objects), endpoint=True)]
        candidates = candidates[np.isin(of_object.ravel(), chosen)]
    extents = polygons.boxes_inside(other.edges, other.owners, len(other.labels), *other_size)
    layers, pasted = [], np.zeros(len(other.labels), bool)
    for k in candidates:
        window = _window(extents[k])
        mask = _fill(other.edges[other.owners == k], window)
        if mask.any():
            layers.append(Layer(y + window[1], x + window[0], mask))
            pasted[k] = True
    edges, origin = polygons.clip_edges(other.edges, *other_size)
    other = _select(other._replace(edges=edges, owners=other.owners[origin]), pasted)
    shift = np.array([x, y, x, y], np.float32)
    points = other.keypoints
    if points is not None:
        points = np.where(points[:, :, 2:] > 0, points + np.array([x, y, 0], np.float32), 0)
    other = other._replace(boxes=other.boxes + shift, edges=other.edges + shift, keypoints=points)
    reach = np.ceil(other.boxes[:, 2:].max(0, initial=0)).astype(int)
    canvas = (max(size[0], int(reach[1])), max(size[1], int(reach[0])))
    covered = np.zeros(canvas, bool)
    for layer in layers:
        height, width = layer.mask.shape
        covered[layer.y : layer.y + height, layer.x : layer.x + width] |= layer.mask
    return _join(_occlude(scene, size, covered, min_visible), other), canvas, (y, x), layers


def _window(extent: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the whole pixels that a box x1 y1 x2 y2 touches."""
    left, top, right, bottom = (int(v) for v in (*np.floor(extent[:2]), *np.ceil(extent[2:])))
    return left, top, right, bottom


def _fill(edges: np.ndarray, window: tuple[int, int, int, int], factor: int = 1) -> np.ndarray:
    """Bool [h * factor, w * factor]: an object's mask in a window, with factor x factor subpixels per pixel."""
    left, top, right, bottom = window
    return polygons.rasterize(edges, window, ((bottom - top) * factor, (right - left) * factor))


def _smoothed(rings: list[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    """The outline of a mask, smoothed to remove pixel steps, unless that would lose a thin part of it."""
    smooth = [polygons.smooth_ring(ring) for ring in rings]
    height, width = mask.shape
    drawn = polygons.rasterize(polygons.rings_to_edges(smooth), [0, 0, width, height], mask.shape)
    near = cv2.dilate(drawn.view(np.uint8), np.ones((3, 3), np.uint8))
    return rings if (mask & (near == 0)).any() else smooth


def _occlude(scene: Scene, size: tuple[int, int], covered: np.ndarray, min_visible: float) -> Scene:
    """The scene after the parts of objects under `covered` (bool [canvas height, width]) are removed. Crowd regions
    stay unchanged."""
    count = len(scene.labels)
    extents = polygons.boxes_inside(scene.edges, scene.owners, count, *size)
    outlined = np.bincount(scene.owners, minlength=count) > 0
    extents = np.where(outlined[:, None], extents, scene.boxes)
    kept, boxes = np.ones(count, bool), scene.boxes.copy()
    first = np.searchsorted(scene.owners, np.arange(count + 1))
    edges = [scene.edges[a:b] for a, b in zip(first, first[1:])]
    for i in np.flatnonzero(~scene.is_crowd):
        left, top, right, bottom = window = _window(extents[i])
        hidden = covered[top:bottom, left:right]
        if not hidden.any():
            continue
        # Small objects are drawn with subpixels, because training uses outlines with subpixel precision.
        factor = math.ceil(64 / max(right - left, bottom - top))
        outline = edges[i] if outlined[i] else polygons.rings_to_edges([extents[i][[[0, 1], [2, 1], [2, 3], [0, 3]]]])
        mask = _fill(outline, window, factor)
        visible = mask & ~hidden.repeat(factor, 0).repeat(factor, 1)
        if mask.any() and visible.sum() == mask.sum():
            continue
        kept[i] = visible.any() and visible.sum() >= min_visible * mask.sum()
        if not kept[i]:
            continue
        rings = polygons.mask_to_rings(visible)
        corners = np.concatenate(rings) / factor + [left, top]
        boxes[i] = _intersection(boxes[i][None], np.concatenate([corners.min(0), corners.max(0)])[None])[0]
        kept[i] = (boxes[i, 2:] - boxes[i, :2] >= MIN_SIDE).all()
        if outlined[i]:
            rings = [ring / factor + [left, top] for ring in _smoothed(rings, visible)]
            edges[i] = polygons.rings_to_edges(rings).astype(np.float32)
    points = scene.keypoints
    if points is not None and count:
        at = np.minimum(points[:, :, 1::-1].astype(int), np.array(covered.shape) - 1)
        hidden = covered[at[..., 0], at[..., 1]] & (points[:, :, 2] > 0)
        points = points.copy()
        points[hidden, 2] = 1
    owners = np.repeat(np.arange(count), [len(e) for e in edges])
    edges = np.concatenate(edges) if edges else scene.edges
    return _select(scene._replace(boxes=boxes, edges=edges, owners=owners, keypoints=points), kept)


def _join(a: Scene, b: Scene) -> Scene:
    points = None if a.keypoints is None else np.concatenate([a.keypoints, b.keypoints])
    boxes, labels, is_crowd, edges = (np.concatenate(pair) for pair in zip(a[:4], b[:4]))
    return Scene(boxes, labels, is_crowd, edges, np.concatenate([a.owners, b.owners + len(a.labels)]), points)
