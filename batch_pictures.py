"""Pictures of training batches exactly as the network gets them: pixels after augmentation, resizing and padding, with
the boxes, outlines, keypoints and ignored regions that the losses see.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from utils.polygons import rasterize
from viz import LEFT, MIDDLE, RIGHT, SKELETON, class_color, drawable_name, drawable_text

__all__ = ["batch_pictures", "draw_batch", "draw_boxes"]

SIDE = 360  # pictures with a shorter long side are enlarged
MASK_OPACITY = 0.4
IGNORED = (150, 150, 150)  # colour of regions that are no objects
HATCHED = (90, 90, 90)  # lines across the padding
MOST_NAMED = 24  # foreground RoIs that are named in a picture


def batch_pictures(
    batch: dict[str, np.ndarray], class_names: Sequence[str], most: int | None = None
) -> list[np.ndarray]:
    """uint8 BGR pictures of the first `most` images of a batch, by default of all, see `draw_batch`.

    batch: {name: array} of `data.training_keys` as `data.make_batch` gives them, or the values of the graph's inputs.
    """
    return [draw_batch(batch, n, class_names) for n in range(len(batch["image"]))[:most]]


def draw_batch(batch: dict[str, np.ndarray], n: int, class_names: Sequence[str]) -> np.ndarray:
    """Image n of a training batch, see `data.make_batch`, with what belongs to it; padding is hatched, ignored regions
    are dashed. Left points of a body are orange, right ones blue."""
    canvas, times = _enlarged(batch["image"][n])
    height, width = (times * batch["image_shape"][n]).tolist()
    y, x = np.ogrid[: canvas.shape[0], : canvas.shape[1]]
    outside = (y >= height) | (x >= width)
    canvas[outside & ((x + y) % 12 < 2)] = HATCHED
    line = max(1, round(max(height, width) / 500))
    objects = np.flatnonzero(batch["gt_labels"][n] > 0).tolist()
    edges, points = batch.get("gt_edges"), batch.get("gt_keypoints")
    boxes = [_drawable(times * batch["gt_boxes"][n, k]) for k in objects]
    colors = [IGNORED if batch["gt_is_crowd"][n, k] else class_color(int(batch["gt_labels"][n, k])) for k in objects]
    for k, box, color in zip(objects, boxes, colors) if edges is not None else ():
        _draw_outline(canvas, times * edges[n, k], box, color, line + 1)
    for k, box, color in zip(objects, boxes, colors):
        x1, y1, x2, y2 = (round(v) for v in box)
        if not batch["gt_is_crowd"][n, k]:
            cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)
            continue
        for corner, other in (
            ((x1, y1), (x2, y1)),
            ((x1, y2), (x2, y2)),
            ((x1, y1), (x1, y2)),
            ((x2, y1), (x2, y2)),
        ):
            steps = np.linspace(corner, other, 2 * max(2, round(np.hypot(*np.subtract(other, corner)) / 12)))
            for a, b in zip(steps[::2], steps[1::2]):
                cv2.line(canvas, np.round(a).astype(int), np.round(b).astype(int), color, line)
    for k, color in zip(objects, colors) if points is not None else ():
        _draw_points(canvas, points[n, k] * (times, times, 1), color, line)
    for k, box in zip(objects, boxes):
        ignored = " (ignored)" if batch["gt_is_crowd"][n, k] else ""
        _put_name(canvas, _name(class_names, int(batch["gt_labels"][n, k])) + ignored, box, (255, 255, 255))
    return canvas


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """A copy, a whole number of times larger where names would cover it, and that number."""
    times = max(1, -(-SIDE // max(image.shape[:2])))
    return cv2.resize(image, None, fx=times, fy=times, interpolation=cv2.INTER_NEAREST), times


def _drawable(coordinates: np.ndarray) -> list[float]:
    """Coordinates within what OpenCV can draw; those of a broken batch may be huge or not finite."""
    return np.nan_to_num(np.clip(coordinates, -1e4, 2e4), nan=0.0).tolist()


def _name(class_names: Sequence[str], label: int) -> str:
    return drawable_name(str(class_names[label - 1]), label) if label <= len(class_names) else f"class {label}"


def _draw_outline(canvas: np.ndarray, edges: np.ndarray, box: list[float], color: tuple, line: int) -> None:
    """The object of directed edges [E, 4], of which vertical ones are missing: translucent inside its box, with its
    edges."""
    height, width = canvas.shape[:2]
    left, top = max(0, int(box[0])), max(0, int(box[1]))
    right, bottom = min(width, int(np.ceil(box[2]))), min(height, int(np.ceil(box[3])))
    edges = np.reshape(_drawable(edges), (-1, 4))
    edges = edges[(edges[:, :2] != edges[:, 2:]).any(1)]
    if not len(edges):
        return
    if right > left and bottom > top:
        # The reference rasteriser goes through rows, the batch's edges are made to be crossed by columns.
        corners, size = (top, left, bottom, right), (right - left, bottom - top)
        inside = rasterize(edges[:, [1, 0, 3, 2]], np.array(corners), size).T
        region = canvas[top:bottom, left:right]
        region[inside] = (region[inside] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)
    for x1, y1, x2, y2 in edges.tolist():
        cv2.line(canvas, (round(x1), round(y1)), (round(x2), round(y2)), color, line, cv2.LINE_AA)


def _draw_points(canvas: np.ndarray, points: np.ndarray, color: tuple, line: int) -> None:
    """Keypoints [K, 3] of which those with a visibility above 0 are used; COCO's 17 with the skeleton."""
    body = len(points) == len(BODY)
    places = [(round(x), round(y)) for x, y in np.reshape(_drawable(points[:, :2]), (-1, 2)).tolist()]
    shown = points[:, 2] > 0
    for a, b in SKELETON if body else ():
        if shown[a] and shown[b]:
            cv2.line(canvas, places[a], places[b], color, line, cv2.LINE_AA)
    for k in np.flatnonzero(shown):
        cv2.circle(canvas, places[k], 2 * line + 1, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(canvas, places[k], 2 * line, BODY[k] if body else color, -1, cv2.LINE_AA)


BODY = [MIDDLE] + 8 * [LEFT, RIGHT]  # COCO's points: the nose, then left before right


def _put_name(canvas: np.ndarray, name: str, box: list[float], color: tuple) -> None:
    size = max(14, round(max(canvas.shape[:2]) / 45))
    left, top = max(0, round(box[0])), max(0, round(box[1])) + size
    text, font = drawable_text(name), cv2.FontFace("sans")
    cv2.putText(canvas, text, (left + 2, top), (0, 0, 0), font, size, 800)
    cv2.putText(canvas, text, (left + 1, top - 1), color, font, size, 600)


def draw_boxes(image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Boxes [B, 4] with labels [B]: foreground in the colour of its class and named, background (0) thin and white with
    a dark rim, which is seen on any ground."""
    canvas, times = _enlarged(image)
    named = (labels > 0).sum() <= MOST_NAMED
    for box, label in sorted(zip((times * boxes).tolist(), labels.tolist()), key=lambda item: item[1] > 0):
        x1, y1, x2, y2 = (round(v) for v in box)
        rim, color, line = ((0, 0, 0), class_color(label), 2) if label else (HATCHED, (255, 255, 255), 1)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), rim, line + 2)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)
        if label and named:
            _put_name(canvas, _name(class_names, label), box, (255, 255, 255))
    return canvas
