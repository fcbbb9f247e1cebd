"""Detections of one image: converts the graph's outputs to the frame of the image file and to COCO results.

Masks are pasted as in Mask R-CNN (He et al., 2017): the M x M probabilities are resampled bilinearly over the box and
thresholded. Masks of whole images are COCO's compressed run-length encoding (RLE), see utils/polygons.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from common import UserError
from utils.polygons import encode_runs

__all__ = [
    "Detections",
    "Rle",
    "coco_results",
    "paste_counts",
    "paste_masks",
    "to_original_frame",
]

Rle = dict[str, Any]  # {"size": [height, width], "counts": str}


class Detections(NamedTuple):
    """The detections of one image, in the frame of the image file, by descending score."""

    boxes: np.ndarray  # float32 [D, 4], x1 y1 x2 y2 inside the image
    scores: np.ndarray  # float32 [D]
    labels: np.ndarray  # int32 [D], 1..C
    masks: list[Rle] | None = None  # D masks of the whole image
    keypoints: np.ndarray | None = None  # float32 [D, K, 3], x y score


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5) -> list[Rle]:
    """RLEs of the pixels whose centre has a probability of at least `threshold`.

    Args:
        masks: [D, M, M] probabilities; cell (i, j) is the value at the centre of its cell of the box, values between
            centres are bilinear, and outside of the box they fall to 0 within half a cell.
        boxes: [D, 4] in the frame of the height x width image; they may reach beyond it.
    """
    return [encode_runs(c, height, width) for c in paste_counts(masks, boxes, height, width, threshold)]


def paste_counts(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5
) -> list[np.ndarray]:
    """The first half of `paste_masks`: uncompressed RLE counts, uint32 [number of runs], of every mask.

    No image-sized array is made. Along a pixel column a pasted mask is piecewise linear with a knot at each of the M
    cell centres, so runs end where a piece crosses the threshold. Evaluating M + 1 pieces per column gives the same
    result as evaluating every pixel.
    """
    cells = np.zeros((len(masks), masks.shape[2] + 2, masks.shape[1] + 2), np.float32)  # [D, x, y], a rim of zeros
    cells[:, 1:-1, 1:-1] = np.swapaxes(masks, 1, 2)
    return [_counts(c, b, height, width, threshold) for c, b in zip(cells, np.asarray(boxes, np.float64).tolist())]


def _counts(cells: np.ndarray, box: list[float], height: int, width: int, threshold: float) -> np.ndarray:
    x1, y1, x2, y2 = box
    empty = np.array([height * width], np.uint32)
    if not (x2 > x1 and y2 > y1):
        return empty
    cell_w, cell_h = (x2 - x1) / (cells.shape[0] - 2), (y2 - y1) / (cells.shape[1] - 2)
    first = max(0, math.floor(x1 - 0.5 * cell_w - 0.5))
    last = min(width, math.ceil(x2 + 0.5 * cell_w + 0.5))
    if last <= first:
        return empty
    # Values at the knots of each pixel column: cells[i] is centred at x1 + (i - 0.5) * cell_w.
    position = np.clip((np.arange(first, last) + (0.5 - x1)) / cell_w + 0.5, 0, cells.shape[0] - 1)
    left = np.minimum(position.astype(np.int64), cells.shape[0] - 2)
    values = np.diff(cells, axis=0)[left]
    values *= (position - left).astype(np.float32)[:, None]
    values += cells[left]  # [columns, M + 2]
    inside = values >= threshold
    # Pieces in which a run begins or ends; the rim is below the threshold, so their number in a column is even.
    pieces = cells.shape[1] - 1
    column, knot = np.divmod(np.flatnonzero(inside[:, 1:] != inside[:, :-1]), pieces)
    before, after = values[column, knot].astype(np.float64), values[column, knot + 1].astype(np.float64)
    crossing = y1 + cell_h * (knot - 0.5 + (threshold - before) / (after - before)) - 0.5  # in pixel centres
    row = np.where(after > before, np.ceil(crossing), np.floor(crossing) + 1)
    starts = (column + first) * height + np.clip(row, 0, height).astype(np.int64)
    # Two changes at the same pixel cancel: runs that fall between two centres, and runs that continue in the next
    # column.
    groups = np.flatnonzero(np.diff(starts, prepend=-1))
    odd = np.diff(groups, append=len(starts)) % 2 == 1
    counts = np.diff(starts[groups[odd]], prepend=0, append=height * width)
    return (counts if counts[-1] > 0 or len(counts) == 1 else counts[:-1]).astype(np.uint32)


def to_original_frame(
    outputs: dict[str, np.ndarray], resized_hw: tuple[int, int], original_hw: tuple[int, int], threshold: float = 0.5
) -> Detections:
    """Moves the predictor's outputs for one image into the frame of its file.

    Args:
        outputs: boxes [D, 4], scores [D], labels [D] and, where the model has them, masks [D, M, M] and keypoints
            [D, K, 3]; an entry `count` gives the number of rows that are detections.
        resized_hw: valid height and width of the image that the predictor saw, without padding.
        original_hw: height and width of the image file.

    Boxes are scaled along each axis and clipped to the image; boxes left without area are dropped. Masks are sampled in
    the original frame, so their outline has the resolution of the file.
    """
    count = int(outputs.get("count", len(outputs["boxes"])))
    height, width = int(original_hw[0]), int(original_hw[1])
    scale = np.array([width / resized_hw[1], height / resized_hw[0]])
    boxes = outputs["boxes"][:count].astype(np.float64) * np.tile(scale, 2)
    scores = outputs["scores"][:count].astype(np.float32)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise UserError("the model predicts NaN or infinite boxes: its weights have diverged; load an older checkpoint")
    boxes = np.clip(boxes, 0, [width, height, width, height])
    keep = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    boxes = boxes[keep]
    masks = keypoints = None
    if "masks" in outputs:
        masks = paste_masks(outputs["masks"][:count][keep], boxes, height, width, threshold)
    if "keypoints" in outputs:
        keypoints = outputs["keypoints"][:count][keep].astype(np.float32)
        keypoints[:, :, :2] *= scale
    return Detections(
        boxes.astype(np.float32), scores[keep], outputs["labels"][:count][keep].astype(np.int32), masks, keypoints
    )


def coco_results(
    detections: Detections, image_id: int | str, label_to_category_id: Callable[[int], int | str | None]
) -> list[dict[str, Any]]:
    """One image's detections as entries of a COCO results file.

    Scores are rounded to float32 precision and boxes to 1e-4 pixel, so the written file gives the same scores as these
    entries.
    Keypoints count pixels as COCO does: the centre of the first one is 0, not 0.5. A class missing from the
    annotations has category_id None.
    """
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    entries = []
    for i, (box, score, label) in enumerate(zip(boxes, detections.scores, detections.labels)):
        entry: dict[str, Any] = {
            "image_id": image_id,
            "category_id": label_to_category_id(int(label)),
            "bbox": [round(v, 4) for v in box.tolist()],
            "score": float(str(score)),
        }
        if detections.masks is not None:
            entry["segmentation"] = detections.masks[i]
        if detections.keypoints is not None:
            points = detections.keypoints[i].astype(np.float64) - (0.5, 0.5, 0)
            entry["keypoints"] = [round(v, 4) for v in points.ravel().tolist()]
        entries.append(entry)
    return entries
