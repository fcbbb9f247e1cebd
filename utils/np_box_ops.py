"""Box mathematics in NumPy: the only place outside the graph that computes with boxes.

Boxes are [..., 4] arrays x1 y1 x2 y2 in absolute continuous coordinates: a pixel i covers [i, i+1), so a box's width is
x2 - x1. Every function keeps the floating type of its first argument; float64 in, float64 out.
"""

import numpy as np

__all__ = ["area", "clip_boxes", "flip_boxes", "pairwise_intersection", "scale_boxes"]


def area(boxes: np.ndarray) -> np.ndarray:
    """[..., 4] -> [...]; a box with x2 < x1 or y2 < y1 has area 0."""
    return np.maximum(boxes[..., 2] - boxes[..., 0], 0) * np.maximum(boxes[..., 3] - boxes[..., 1], 0)


def pairwise_intersection(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] -> areas of the intersections [n, m]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = np.maximum(high - low, 0)
    return sides[..., 0] * sides[..., 1]


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
