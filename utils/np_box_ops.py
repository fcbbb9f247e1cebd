"""Box mathematics in NumPy: the only place outside the graph that computes with boxes (coding: Fast R-CNN, eq. 1–2).

Boxes are [..., 4] arrays x1 y1 x2 y2 in absolute continuous coordinates: a pixel i covers [i, i+1), so a box's width is
x2 - x1. Every function keeps the floating type of its first argument; float64 in, float64 out.
"""

import math

import numpy as np

__all__ = [
    "MAX_LOG_SCALE",
    "area",
    "clip_boxes",
    "decode_boxes",
    "encode_boxes",
    "flip_boxes",
    "pairwise_ioa",
    "pairwise_intersection",
    "pairwise_iou",
    "scale_boxes",
]

MAX_LOG_SCALE = math.log(1000.0 / 16)  # Detectron: a box grows at most from 16 to 1000 pixels in one step


def area(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]; a box with x2 < x1 or y2 < y1 has area 0."""
    return np.maximum(boxes[..., 2] - boxes[..., 0], 0) * np.maximum(boxes[..., 3] - boxes[..., 1], 0)


def pairwise_intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] -> areas of the intersections [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] -> intersection over union [n, m]; 0 where both boxes are empty."""
    common = pairwise_intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def pairwise_ioa(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] -> the share of each `a` covered by each `b` [n, m]: COCO's overlap with crowd regions `b`."""
    common = pairwise_intersection(a, b)
    own = np.broadcast_to(area(a)[:, None], common.shape)
    return np.divide(common, own, out=np.zeros_like(common), where=own > 0)


def clip_boxes(boxes: np.ndarray, height: float, width: float) -> np.ndarray:
    """Boxes [..., 4] clipped to [0, width] x [0, height]; a box wholly outside becomes an empty box on the border."""
    limit = np.array([width, height, width, height], boxes.dtype)
    return np.minimum(np.maximum(boxes, 0), limit)


def flip_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes [..., 4] in the horizontally mirrored image of this width."""
    flipped = boxes.copy()
    flipped[..., 0] = width - boxes[..., 2]
    flipped[..., 2] = width - boxes[..., 0]
    return flipped


def scale_boxes(boxes: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Boxes [..., 4] in the image stretched by these factors."""
    return boxes * np.array([scale_x, scale_y, scale_x, scale_y], boxes.dtype)


def encode_boxes(boxes: np.ndarray, anchors: np.ndarray, weights: tuple = (1.0, 1.0, 1.0, 1.0)) -> np.ndarray:
    """Deltas dx dy dw dh [..., 4] that turn `anchors` into `boxes`; sides of both must be positive."""
    boxes, anchors = np.broadcast_arrays(boxes, anchors)
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) / 2 / anchor_size
    deltas = np.concatenate([shift, np.log(size / anchor_size)], axis=-1)
    return deltas * np.asarray(weights, deltas.dtype)


def decode_boxes(deltas: np.ndarray, anchors: np.ndarray, weights: tuple = (1.0, 1.0, 1.0, 1.0)) -> np.ndarray:
    """Boxes [..., 4] from deltas; dw and dh have only an upper limit, so a box may shrink to nothing."""
    deltas = deltas / np.asarray(weights, deltas.dtype)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_size + (anchors[..., :2] + anchors[..., 2:]) / 2
    half = np.exp(np.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size / 2
    return np.concatenate([centre - half, centre + half], axis=-1)
