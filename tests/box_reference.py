"""Overlap and coding of boxes in NumPy, with which tests compare the graph (coding: Fast R-CNN, eq. 1–2).

tests/test_np_box_ops.py compares these with pycocotools and with numbers worked out by hand.
"""

import math

import numpy as np

from utils.np_box_ops import area, pairwise_intersection

MAX_LOG_SCALE = math.log(1000.0 / 16)  # Detectron: a box grows at most from 16 to 1000 pixels in one step


def pairwise_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] -> intersection over union [n, m]; 0 where both boxes are empty."""
    common = pairwise_intersection(a, b)
    union = area(a)[:, None] + area(b)[None, :] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


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
