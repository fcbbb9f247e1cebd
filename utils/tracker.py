"""Ids of objects over the frames of a video, from boxes alone.

As SORT (Bewley et al. 2016), with a constant velocity of the centre in place of a Kalman filter: each object's box is
moved to where it should be now, and the boxes found are assigned to these by the Hungarian method with IoU. Boxes with
low scores continue objects but start none, as in ByteTrack (Zhang et al. 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils import np_box_ops

__all__ = ["Tracker"]

SMALLEST_IOU = 0.3  # SORT's; boxes that overlap less are not the same object


@dataclass
class _Track:
    """An object that was seen."""

    id: int
    label: int
    box: np.ndarray  # float64 [4], where it was seen last
    velocity: np.ndarray  # float64 [2], pixels per frame
    frame: int  # in which it was seen last
    missed: int = 0  # updates since then

    def expected(self, frame: int) -> np.ndarray:
        return self.box + np.tile(self.velocity * (frame - self.frame), 2)

    def see(self, box: np.ndarray, frame: int) -> None:
        step = (_centre(box) - _centre(self.box)) / max(frame - self.frame, 1)
        # Half of what was known before: boxes tremble by a pixel.
        self.velocity = step if not self.velocity.any() else (self.velocity + step) / 2
        self.box, self.frame, self.missed = box, frame, 0


class Tracker:
    """Gives each object of a video an id, 1, 2, …, that it keeps while it is hidden for at most `max_age` updates."""

    def __init__(self, start_score: float, max_age: int = 30):
        """start_score: a box of a lower score continues an object that is known, but starts no new one."""
        self.start_score, self.max_age = start_score, max_age
        self._tracks: list[_Track] = []
        self._count = 0

    def update(self, frame: int, boxes: np.ndarray, labels: Sequence[int], scores: Sequence[float]) -> list[int | None]:
        """The id of each box [D, 4] of a frame; None for a box that belongs to no object.

        frame: the frame's number in the video, larger than that of the update before.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        labels, high = np.asarray(labels, int), np.asarray(scores, np.float64) >= self.start_score
        ids: list[int | None] = [None] * len(boxes)
        free = list(self._tracks)
        for group in (np.flatnonzero(high), np.flatnonzero(~high)):
            expected = np.array([t.expected(frame) for t in free]).reshape(-1, 4)
            same = np.array([t.label for t in free], int)[:, None] == labels[group]
            for row, column in _assign(expected, boxes[group], same):
                track, i = free[row], int(group[column])
                track.see(boxes[i], frame)
                ids[i] = track.id
            free = [t for t in free if t.frame != frame]
        for track in free:
            track.missed += 1
        self._tracks = [t for t in self._tracks if t.missed <= self.max_age]
        for i in np.flatnonzero(high).tolist():
            if ids[i] is None:
                self._count += 1
                ids[i] = self._count
                self._tracks.append(_Track(self._count, int(labels[i]), boxes[i], np.zeros(2), frame))
        return ids


def _centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


def _assign(tracks: np.ndarray, boxes: np.ndarray, allowed: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (track, box) with the largest sum of IoUs, each pair `allowed` [T, D] and overlapping enough."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second

    shared = np_box_ops.pairwise_intersection(tracks, boxes)
    union = np_box_ops.area(tracks)[:, None] + np_box_ops.area(boxes) - shared
    iou = np.where(allowed, shared / np.maximum(union, 1e-12), 0)
    iou[iou < SMALLEST_IOU] = 0
    rows, columns = linear_sum_assignment(-iou)
    return [(r, c) for r, c in zip(rows.tolist(), columns.tolist()) if iou[r, c] > 0]
