"""Pictures of a training run: some validation images with predictions beside their annotations, and the first batch."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from batch_pictures import batch_pictures, draw_boxes
from common import UserError, atomic_write, describe_error, logger
from config import Config
from data import read_split_image
from dataset_split import DatasetSplit
from detections import Detections
from viz import draw_annotations, draw_detections, shrunk, side_by_side

__all__ = [
    "chosen_images", "compared", "drop_pictures_after", "evaluation_pictures", "pictures_of_step", "show_batches",
]  # fmt: skip

FOLDER = "pictures"  # of the run directory
SIDE = 640  # longest side of an image
QUALITY = 88
LEAST_PROPOSALS = 10  # of an image that are drawn; more where it has more objects


def chosen_images(split: DatasetSplit, count: int) -> list[int]:
    """The images of the set that are shown: always the same, spread over those with an object (if there are any)."""
    images = split.nonempty_images()
    images = images if len(images) else np.arange(len(split))
    return images[np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int))].tolist()


def show_batches(logdir: Path, step: int, batches: Sequence[dict[str, np.ndarray]], cfg: Config) -> dict[str, Path]:
    """Writes pictures of the first TRAIN.PICTURES images of the batches of a step, each {name: array} of
    `data.training_keys`, and returns {name: file}."""
    written: dict[str, Path] = {}
    with _harmless(step):
        for batch in batches:
            for picture in batch_pictures(batch, cfg.DATA.CLASS_NAMES, cfg.TRAIN.PICTURES - len(written)):
                name = f"batch-{len(written)}"
                written[name] = _write(logdir, name, step, picture)
    return written


def evaluation_pictures(
    logdir: Path, step: int, cfg: Config
) -> Callable[[DatasetSplit, Sequence[dict[str, Any]]], None]:
    """show(split, results) writes pictures of TRAIN.PICTURES images of a set, annotations on the left, on the right
    what was found; `pictures_of_step` finds them, also in another process.

    results: COCO results of the set, as `predict.evaluate_split` gives them; with MODE_RPN_ONLY the best proposals are
    drawn. Images that cannot be read are left out.
    """

    def show(split: DatasetSplit, results: Sequence[dict[str, Any]]) -> None:
        with _harmless(step):
            _show_evaluation(logdir, step, split, results, cfg)

    return show


@contextlib.contextmanager
def _harmless(step: int) -> Iterator[None]:
    """No error in pictures ends a run."""
    try:
        yield
    except Exception as e:
        logger.warning(f"the pictures of step {step} are incomplete: {describe_error(e)}")


def _show_evaluation(
    logdir: Path, step: int, split: DatasetSplit, results: Sequence[dict[str, Any]], cfg: Config
) -> None:
    images = {split.image_id(i): i for i in chosen_images(split, cfg.TRAIN.PICTURES)}
    found: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in images}
    for entry in results:
        if entry["image_id"] in found:
            found[entry["image_id"]].append(entry)
    written: set[str] = set()
    for image_id, i in images.items():
        try:
            image = read_split_image(split, i)
        except UserError:  # the evaluation has named it
            continue
        detections = _detections(found[image_id], split, cfg.MODE_RPN_ONLY)
        picture = compared(image, split.annotations(i), detections, split.class_names, cfg)
        name = _file_name(f"val-{split.name}-{image_id}")
        if name in written:  # ids that differ in what a file name does not have
            name = f"{name}_{i}"
        written.add(name)
        _write(logdir, name, step, picture)


def compared(
    image: np.ndarray,
    annotations: dict[str, Any],
    detections: Detections,
    class_names: Sequence[str],
    cfg: Config,
) -> np.ndarray:
    """The image with its annotations, and beside it with what was found."""
    if cfg.MODE_RPN_ONLY:
        best = detections.boxes[: max(LEAST_PROPOSALS, 2 * len(annotations["labels"]))]
        drawn = draw_boxes(image, best, np.ones(len(best), int), [""])
        caption = f"the best {len(best)} of {len(detections.boxes)} proposals"
    else:
        threshold = cfg.TEST.RESULT_SCORE_THRESH_VIS
        drawn = draw_detections(image, detections, class_names, threshold)
        shown = int((detections.scores >= threshold).sum())
        most = f"; the best {detections.scores[0]:.2f}" if len(detections.scores) else ""
        caption = f"{shown} of {len(detections.scores)} predictions (score {threshold:g} or more{most})"
    truth = draw_annotations(image, annotations, class_names)
    return side_by_side(shrunk(truth, SIDE), shrunk(drawn, SIDE), ("annotations", caption))


def _detections(entries: Sequence[dict[str, Any]], split: DatasetSplit, agnostic: bool) -> Detections:
    """Entries of COCO results for one image as detections, by descending score; those of classes that the set does not
    have are left out. agnostic: proposals, which have no class."""
    labels = {c: 1 if agnostic else n for n, c in enumerate(split.category_ids, 1) if c is not None or agnostic}
    entries = sorted((e for e in entries if e["category_id"] in labels), key=lambda e: -e["score"])
    boxes = np.array([e["bbox"] for e in entries], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    points = None
    if entries and all("keypoints" in e for e in entries):
        points = np.array([e["keypoints"] for e in entries], np.float32).reshape(len(entries), -1, 3)
        points[..., :2] += 0.5  # COCO counts pixels, see detections.coco_results
    masks = [e["segmentation"] for e in entries] if all("segmentation" in e for e in entries) else None
    return Detections(
        boxes, np.array([e["score"] for e in entries], np.float32),
        np.array([labels[e["category_id"]] for e in entries], np.int32), masks, points,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- files
def pictures_of_step(logdir: Path, step: int) -> dict[str, Path]:
    """{name: file} of the pictures of an evaluation."""
    return {p.name.rsplit("-step", 1)[0]: p for p in sorted((logdir / FOLDER).glob(f"val-*-step{step:07d}.jpg"))}


def drop_pictures_after(logdir: Path, step: int) -> None:
    """Removes the pictures of later steps, when a run is continued from an earlier one."""
    for path in (logdir / FOLDER).glob("*-step*.jpg"):
        number = path.stem.rsplit("-step", 1)[1]
        if number.isdigit() and int(number) > step:
            os.unlink(path)


def _write(logdir: Path, name: str, step: int, picture: np.ndarray) -> Path:
    """The names are such that the pictures of an image, sorted by name, show its way through the run."""
    path = logdir / FOLDER / f"{name}-step{step:07d}.jpg"
    with atomic_write(path, "wb", durable=False) as f:
        f.write(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes())
    return path


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)[:100]
