"""Which images make up each training step."""

import math

import numpy as np

from common import UserError
from config import Config
from dataset_split import DatasetSplit

__all__ = ["StepPlan", "class_aware_images", "repeat_factors", "training_images"]


class StepPlan:
    """The endless sequence of training steps that follows from a seed: which images make up each step.

    Each epoch is a permutation of all images, dealt into steps of `batch` images of one orientation (landscape or
    portrait), which needs little padding. Images of both orientations left over at its end make mixed steps, and the
    last few images go into the first step of the next epoch, so every image is used exactly once per epoch.
    Any step can be computed without computing those before it.
    """

    def __init__(self, portrait: np.ndarray, batch: int, seed: int):
        """portrait: bool [n], the images in a fixed order."""
        self.batch = batch
        self._portrait = portrait
        self._seed = seed
        # A round is one epoch, or several if one epoch does not fill a step.
        self._repeats = max(1, math.ceil(batch / len(portrait)))
        self._round = self._repeats * len(portrait)
        self._cached: dict[int, np.ndarray] = {}

    def images(self, step: int) -> np.ndarray:
        """int64 [batch], numbers of the images of step 0, 1, …"""
        number = ((step + 1) * self.batch - 1) // self._round
        if number not in self._cached:
            self._cached = {number: self._steps(number)}
        return self._cached[number][step - number * self._round // self.batch]

    def _deal(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first images of a round, which complete the step before; its full steps; the images left over."""
        rng = np.random.default_rng([self._seed, 0, number])
        order = np.concatenate([rng.permutation(len(self._portrait)) for _ in range(self._repeats)])
        first = -number * self._round % self.batch
        rest = order[first:]
        portrait = self._portrait[rest]
        groups = [self._split_full(np.flatnonzero(portrait == wanted)) for wanted in (False, True)]
        grouped = np.concatenate([full for full, _ in groups])
        grouped = grouped[np.argsort(grouped[:, -1])]  # a step comes when its last image does
        mixed, left_over = self._split_full(np.sort(np.concatenate([some for _, some in groups])))
        return order[:first], rest[np.concatenate([grouped, mixed])], rest[left_over]

    def _split_full(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All full steps [steps, batch] that can be made from these places, and the places left over."""
        full = len(places) // self.batch * self.batch
        return places[:full].reshape(-1, self.batch), places[full:]

    def _steps(self, number: int) -> np.ndarray:
        first, steps, _ = self._deal(number)
        if len(first) == 0:
            return steps
        left_over = self._deal(number - 1)[2]
        return np.concatenate([np.concatenate([left_over, first])[None], steps])


def training_images(split: DatasetSplit, cfg: Config) -> np.ndarray:
    """Indices of the images of an epoch; with DATA.SAMPLING some occur several times."""
    images = split.nonempty_images() if cfg.DATA.FILTER_EMPTY else np.arange(len(split))
    if len(images) == 0:
        raise UserError(f"{split.name} has no image to train on")
    if cfg.DATA.SAMPLING == "uniform":
        return images
    if cfg.DATA.SAMPLING == "class_aware":
        return class_aware_images(split, len(images), cfg.TRAIN.SEED)
    factors = repeat_factors(split, cfg.DATA.REPEAT_THRESHOLD)[images]
    # The fractional part of a factor is the probability of one more copy, drawn once per run.
    extra = np.random.default_rng([cfg.TRAIN.SEED, 2]).random(len(images)) < factors % 1
    return np.repeat(images, factors.astype(np.int64) + extra)


def repeat_factors(split: DatasetSplit, threshold: float) -> np.ndarray:
    """float32 [len]: how often each image should occur per epoch (Gupta et al., LVIS, CVPR 2019, section 4).

    A class shown by a fraction f of the images has the factor max(1, sqrt(threshold / f)). An image has the largest
    factor of its classes, or 1 without objects. LVIS uses threshold = 0.001.
    """
    c = split.columns
    _, images_with = split.class_counts()
    fraction = np.maximum(images_with, 1) / max(1, len(split))
    per_class = np.maximum(1.0, np.sqrt(threshold / fraction))
    factors = np.ones(len(split), np.float32)
    of_object = np.where(c["crowd"], 1.0, per_class.astype(np.float32)[c["labels"] - 1]).astype(np.float32)
    shown = np.flatnonzero(np.diff(c["first_object"]))
    if len(shown):
        factors[shown] = np.maximum.reduceat(of_object, c["first_object"][shown])
    return factors


def class_aware_images(split: DatasetSplit, number: int, seed: int) -> np.ndarray:
    """int64 [number]: images drawn by choosing a class uniformly among those that occur, then one of its images.

    (Shen et al., "Relay Backpropagation", ECCV 2016, section 4.1.) Equal seeds give equal draws.
    """
    c = split.columns
    solid = ~c["crowd"]
    owners = np.repeat(np.arange(len(split), dtype=np.int32), np.diff(c["first_object"]))[solid]
    labels = c["labels"][solid]
    order = np.argsort(labels.astype(np.uint16 if len(split.class_names) < 1 << 16 else np.int32), kind="stable")
    labels, images = labels[order], owners[order]  # by class, then image
    once = np.concatenate([[True], (labels[1:] != labels[:-1]) | (images[1:] != images[:-1])]) if len(labels) else order
    labels, images = labels[once], images[once]
    first = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])) if len(labels) else labels
    if not len(first):
        raise UserError(f"{split.name}: no image with an object to draw from")
    counts = np.diff(np.append(first, len(labels)))
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(first), number)
    return images[first[chosen] + rng.integers(0, counts[chosen])].astype(np.int64)
