"""The proof of an export: its files run on images, compared with the Python predictor detection by detection."""

import functools
import re
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from common import UserError, logger
from config import Config
from data import read_image, read_split_image
from dataset import load_validation_splits
from dataset_split import DatasetSplit
from detections import Detections, coco_results
from utils.polygons import decode_mask

__all__ = [
    "AP_TOLERANCE", "LIMITS", "Differences", "Proof", "Sample", "compare", "draw_images", "pick_images", "prove",
    "table", "verdict",
]  # fmt: skip

# Largest differences from the Python predictor that an export of the same precision may have.
LIMITS = {"boxes": 0.05, "scores": 1e-3, "masks": 0.02, "keypoints": 1.0}
UNITS = {"boxes": "px", "scores": "", "masks": "of the object", "keypoints": "px"}
AP_TOLERANCE = {"same": 0.1, "reduced": 1.0}  # points of 100
_PAIRED = 5.0  # pixels: detections farther apart are two different ones
_SMALL_MASK = 100  # pixels: differences of smaller masks are counted as shares of this

Run = Callable[[np.ndarray], Detections]  # uint8 BGR [H, W, 3] -> detections in its frame


class Sample(NamedTuple):
    """Images to compare on; images[i]() gives uint8 BGR pixels. With a split, `indices` are its images, for scores."""

    images: Sequence[Callable[[], np.ndarray]]
    origin: str
    split: DatasetSplit | None = None
    indices: Sequence[int] = ()


class Differences(NamedTuple):
    """The largest differences over some images, and what was only found by one of the two."""

    boxes: float = 0.0
    scores: float = 0.0
    masks: float = 0.0
    keypoints: float = 0.0
    pairs: int = 0
    alone: int = 0  # detections without a partner that neither the threshold nor the limit explains
    excused: int = 0  # those that one of them explains

    def merge(self, other: "Differences") -> "Differences":
        return Differences(
            max(self.boxes, other.boxes), max(self.scores, other.scores), max(self.masks, other.masks),
            max(self.keypoints, other.keypoints), self.pairs + other.pairs, self.alone + other.alone,
            self.excused + other.excused,
        )  # fmt: skip


class Proof(NamedTuple):
    """The comparison of one exported file."""

    differences: Differences
    images: int
    seconds: tuple[float, float]  # median per image: predictor, export
    ap: dict[str, tuple[float, float]]  # score's name -> (predictor, export) in points of 100


# ------------------------------------------------------------------------------------------------------------- images
def pick_images(cfg: Config, given: Sequence[str], count: int) -> Sample:
    """The given image files, else `count` images of DATA.VAL at equal distances, else generated ones."""
    if given:
        return Sample([functools.partial(read_image, f) for f in given], f"{len(given)} given images")
    try:
        splits = load_validation_splits(cfg)
    except UserError as e:
        logger.warning(f"DATA.VAL cannot be read, so the proof uses generated images; --images gives others ({e})")
        splits = []
    if not splits or not len(splits[0]):
        return Sample([image.copy for image in draw_images(count)], f"{count} generated images")
    split = splits[0]
    indices = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int)).tolist()
    images = [functools.partial(read_split_image, split, i) for i in indices]
    return Sample(images, f"{len(indices)} of {len(split)} images of {split.name}", split, indices)


def draw_images(count: int, seed: int = 0) -> list[np.ndarray]:
    """Pictures of ellipses and rectangles on noisy ground, uint8 BGR, in four sizes."""
    rng = np.random.default_rng(seed)
    sizes = [(240, 320), (320, 240), (300, 300), (210, 400)]
    images = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        rows, columns = np.mgrid[:height, :width]
        image = rng.uniform(40, 200, 3) + rng.normal(0, 12, (height, width, 3))
        for shape in range(8):
            y, x = rng.uniform(0, height), rng.uniform(0, width)
            h, w = rng.uniform(8, height / 3), rng.uniform(8, width / 3)
            down, across = np.abs(rows - y) / h, np.abs(columns - x) / w
            inside = down**2 + across**2 < 1 if shape % 2 else np.maximum(down, across) < 1
            image[inside] = rng.uniform(0, 255, 3) + rng.normal(0, 5, (int(inside.sum()), 3))
        images.append(np.clip(image, 0, 255).astype(np.uint8))
    return images


# ---------------------------------------------------------------------------------------------------------- comparison
def compare(wanted: Detections, found: Detections, threshold: float, limit: int) -> Differences:
    """The differences of two lists of detections of one image.

    Detections of one class are paired by their boxes and scores, nearest first. One without a partner is excused if its
    score is within the tolerance of the threshold, or of the last score of a list that is full (`limit` rows)."""
    pairs, taken = _pairs(wanted, found), (set(), set())
    result = Differences()
    for i, j in pairs:
        taken[0].add(i)
        taken[1].add(j)
        keypoints = 0.0
        if wanted.keypoints is not None:
            keypoints = float(np.abs(wanted.keypoints[i, :, :2] - found.keypoints[j, :, :2]).max(initial=0))
        result = result.merge(
            Differences(
                float(np.abs(wanted.boxes[i] - found.boxes[j]).max()),
                float(abs(wanted.scores[i] - found.scores[j])),
                _mask_difference(wanted.masks[i], found.masks[j]) if wanted.masks is not None else 0.0,
                keypoints,
            )
        )
    alone = excused = 0
    near = LIMITS["scores"]
    for detections, used in zip((wanted, found), taken):
        for i in set(range(len(detections.scores))) - used:
            score = detections.scores[i]
            last = min(min(wanted.scores, default=1.0), min(found.scores, default=1.0))
            full = max(len(wanted.scores), len(found.scores)) >= limit
            good = bool(score <= threshold + near or full and score <= last + near)
            alone, excused = alone + (not good), excused + good
    return result._replace(pairs=len(pairs), alone=alone, excused=excused)


def _pairs(wanted: Detections, found: Detections) -> list[tuple[int, int]]:
    apart = np.abs(wanted.boxes[:, None] - found.boxes[None]).max(-1, initial=0)  # [W, F]
    cost = apart + np.abs(wanted.scores[:, None] - found.scores[None])
    cost[(apart > _PAIRED) | (wanted.labels[:, None] != found.labels[None])] = np.inf
    pairs: list[tuple[int, int]] = []
    while cost.size and np.isfinite(cost.min()):
        i, j = divmod(int(cost.argmin()), cost.shape[1])
        pairs.append((i, j))
        cost[i], cost[:, j] = np.inf, np.inf
    return pairs


def _mask_difference(a: dict, b: dict) -> float:
    one, other = decode_mask(a), decode_mask(b)
    return float(np.sum(one != other) / max(np.sum(one | other), _SMALL_MASK))


def prove(
    reference: Run, exported: Run, sample: Sample, threshold: float, limit: int, proposals: bool = False
) -> Proof:
    """Runs both on every image, in turn. proposals: of an RPN, which have no AP."""
    result, times = Differences(), []
    results: tuple[list, list] = ([], [])
    for number, read in enumerate(sample.images):
        pixels = read()
        if number == 0:  # the first run of each is not timed: memory and kernels are prepared
            reference(pixels), exported(pixels)
        seconds, both = [], []
        for run in (reference, exported):
            started = time.perf_counter()
            both.append(run(pixels))
            seconds.append(time.perf_counter() - started)
        times.append(seconds)
        result = result.merge(compare(both[0], both[1], threshold, limit))
        if sample.split is not None and not proposals:
            image_id = sample.split.image_id(sample.indices[number])
            for kept, detections in zip(results, both):
                kept += coco_results(detections, image_id, sample.split.label_to_category_id)
    ap = {}
    if sample.split is not None and not proposals:
        ids = [sample.split.image_id(i) for i in sample.indices]
        scores = [sample.split.evaluate(r, ids, verbose=False) for r in results]
        names = [name for name in scores[0] if re.fullmatch(r"([^/]+/)?m?AP", name)]
        ap = {
            name: (100 * scores[0][name], 100 * scores[1].get(name, np.nan))
            for name in names if np.isfinite(scores[0][name])
        }  # fmt: skip
    return Proof(result, len(times), tuple(np.median(times, 0).tolist()), ap)


def verdict(proof: Proof, same_precision: bool) -> list[str]:
    """What is beyond the tolerances; [] if nothing is. A reduced precision is judged by AP alone."""
    reasons = []
    if same_precision:
        for name, limit in LIMITS.items():
            value = getattr(proof.differences, name)
            if not value <= limit:
                reasons.append(f"{name} differ by {value:.2g} {UNITS[name]}".rstrip() + f", more than {limit:g}")
        if proof.differences.alone:
            reasons.append(f"{proof.differences.alone} detections are found by only one of the two")
    elif not proof.ap:
        reasons.append("a reduced precision is judged by AP, which needs annotated images: set DATA.VAL")
    most = AP_TOLERANCE["same" if same_precision else "reduced"]
    for name, (wanted, found) in proof.ap.items():
        if not abs(wanted - found) <= most:
            reasons.append(f"{name} is {found:.2f} instead of {wanted:.2f}, more than {most:g} away")
    return reasons


def table(rows: Sequence[tuple[str, float, Proof, list[str]]]) -> str:
    """Rows of (file, megabytes, proof, verdict)."""

    def cells(name: str, size: float, proof: Proof, reasons: list[str]) -> list[str]:
        d = proof.differences
        alone = f"{d.alone}" + (f" (+{d.excused} at the threshold)" if d.excused else "")
        ap = ", ".join(f"{k} {a:.2f} / {b:.2f}" for k, (a, b) in proof.ap.items()) or "-"
        ratio = proof.seconds[1] / max(proof.seconds[0], 1e-9)
        speed = f"{proof.seconds[0]:.3f} / {proof.seconds[1]:.3f} (x {ratio:.2f})"
        numbers = [f"{v:.2g}" for v in d[:4]]
        return [name, f"{size:.1f}", *numbers, f"{d.pairs}", alone, ap, speed, "NOT PROVEN" if reasons else "good"]

    headers = ["file", "MB", "boxes (px)", "scores", "masks", "keypoints (px)", "pairs", "alone",
               "AP: Python / export", "s/image: Python / export", "proof"]  # fmt: skip
    return tabulate([cells(*row) for row in rows], headers, "simple", disable_numparse=True)
