#!/usr/bin/env python3
"""Suggests RPN.ANCHOR_SIZES and RPN.ANCHOR_RATIOS for the objects of a training set.

    tools/anchors.py --config MODE_FPN=True DATA.BASEDIR=~/data/mine PREPROC.SHORT_EDGE_SIZE=[240,352]

Give it the settings of the run: objects are measured as the network sees them, after the resizing of PREPROC. A table
compares the settings' anchors with the suggestion by the overlap (IoU) of each object with its best anchor. Anchors of
a level lie one stride apart, so an object is a quarter of the stride away from the nearest one on average, in x and
in y; that is counted. Objects below RPN.POSITIVE_ANCHOR_THRESH are seldom learnt from.
"""

import import_path

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from tabulate import tabulate

from common import errors_in_one_line, logger
from config import Config, default_config, finalize_config
from config_files import settings_words
from dataset import load_training_split
from dataset_split import DatasetSplit

__all__ = ["best_overlaps", "object_sides", "suggest"]

_MOST_OBJECTS = 5_000  # that are looked at, drawn with a fixed seed
_SIZES, _RATIOS = (2, 16000), (0.05, 20)  # what is suggested at most
_LEAST_GAIN = 0.01  # of the mean overlap; below that, the settings are as good


def object_sides(split: DatasetSplit, cfg: Config) -> np.ndarray:
    """float64 [n, 2] widths and heights of the objects, crowds left out, in images resized to the middle of
    PREPROC.SHORT_EDGE_SIZE and to at most PREPROC.MAX_SIZE."""
    columns = split.columns
    owners = np.repeat(np.arange(len(split)), np.diff(columns["first_object"]))
    keep = ~np.asarray(columns["crowd"], bool)
    boxes, sizes = columns["boxes"][keep].astype(np.float64), split.image_sizes()[owners[keep]].astype(np.float64)
    scale = np.mean(cfg.PREPROC.SHORT_EDGE_SIZE) / sizes.min(1)
    scale = np.minimum(scale, cfg.PREPROC.MAX_SIZE / sizes.max(1))
    sides = (boxes[:, 2:] - boxes[:, :2]) * scale[:, None]
    if len(sides) > _MOST_OBJECTS:
        sides = sides[np.random.default_rng(0).choice(len(sides), _MOST_OBJECTS, replace=False)]
    return sides


def best_overlaps(
    sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]
) -> np.ndarray:
    """[n] IoU of objects of `sides` [n, 2] with their best anchor a quarter of its stride away in x and y. A size has
    the stride of the same index; ratios are heights divided by widths."""
    size = np.repeat(np.asarray(sizes, float), len(ratios))  # [A]
    stretch = np.sqrt(np.tile(np.asarray(ratios, float), len(sizes)))
    apart = np.repeat(np.asarray(strides, float), len(ratios)) / 4
    overlap = np.ones([len(sides), len(size)])
    for side, anchor in ((sides[:, :1], size / stretch), (sides[:, 1:], size * stretch)):
        overlap *= np.maximum(np.minimum(np.minimum(side, anchor), (side + anchor) / 2 - apart), 0)
    return (overlap / (sides.prod(1)[:, None] + size**2 - overlap)).max(1)


def suggest(
    sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float], strides: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Sizes, one for each stride, not decreasing, and as many ratios as given, for objects of `sides` [n, 2].

    Steps of a few per cent, one number at a time, while the mean of `best_overlaps` rises: once from the given sizes
    and ratios, once from clusters of the objects' own. So the result is never worse than what is given.
    """
    roots, shapes = np.log(sides.prod(1)) / 2, np.log(sides[:, 1] / sides[:, 0])
    starts = [(sizes, ratios), (np.exp(_clusters(roots, len(sizes))), np.exp(_clusters(shapes, len(ratios))))]
    found = [_climb(sides, np.array([*first, *np.clip(second, *_RATIOS)]), strides) for first, second in starts]
    _, numbers = max(found, key=lambda entry: entry[0])
    rounded = [*np.round(numbers[: len(sizes)]).tolist(), *(float(f"{r:.2g}") for r in numbers[len(sizes) :])]
    given = float(best_overlaps(sides, sizes, ratios, strides).mean())
    if best_overlaps(sides, rounded[: len(sizes)], rounded[len(sizes) :], strides).mean() < given:
        return [float(s) for s in sizes], [float(r) for r in ratios]
    return rounded[: len(sizes)], rounded[len(sizes) :]


def _climb(sides: np.ndarray, numbers: np.ndarray, strides: Sequence[float]) -> tuple[float, np.ndarray]:
    """(mean best overlap, sizes and ratios) after steps that raise it."""
    count = len(strides)

    def mean(numbers: np.ndarray) -> float:
        return float(best_overlaps(sides, numbers[:count], numbers[count:], strides).mean())

    best = mean(numbers)
    for step in (1.3, 1.1, 1.04):
        improved = True
        while improved:
            improved = False
            for index in range(len(numbers)):
                for factor in (step, 1 / step):
                    trial = numbers.copy()
                    trial[index] *= factor
                    if (np.diff(trial[:count]) < 0).any() or not _SIZES[0] <= trial[0] <= trial[count - 1] <= _SIZES[1]:
                        continue
                    if not _RATIOS[0] <= trial[count:].min() <= trial[count:].max() <= _RATIOS[1]:
                        continue
                    if (value := mean(trial)) > best + 1e-4:
                        best, numbers, improved = value, trial, True
    return best, numbers


def _clusters(values: np.ndarray, count: int) -> np.ndarray:
    """Increasing means of `count` clusters (Lloyd's algorithm), starting from quantiles."""
    means = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(100):
        nearest = np.abs(values[:, None] - means).argmin(1)
        moved = np.array([values[nearest == k].mean() if (nearest == k).any() else means[k] for k in range(count)])
        if np.allclose(moved, means, rtol=0, atol=1e-6):
            break
        means = moved
    return np.sort(means)


# ------------------------------------------------------------------------------------------------------ command line
def _row(name: str, sides: np.ndarray, sizes: Sequence[float], ratios: Sequence[float], cfg: Config) -> list:
    overlaps = best_overlaps(sides, sizes, ratios, _strides(cfg))
    missed = (overlaps < cfg.RPN.POSITIVE_ANCHOR_THRESH).mean()
    return [name, _shown(sizes), _shown(ratios), round(overlaps.mean(), 3), f"{100 * missed:.1f} %"]


def _strides(cfg: Config) -> list[float]:
    return list(cfg.FPN.ANCHOR_STRIDES) if cfg.MODE_FPN else [cfg.RPN.ANCHOR_STRIDE] * len(cfg.RPN.ANCHOR_SIZES)


def _shown(values: Sequence[float]) -> str:
    return f"[{','.join(f'{v:g}' for v in values)}]"


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings as for train.py")
    parser.add_argument("--recipe", metavar="NAME", help="settings of docs/RECIPES.md, before those of --config")
    args = parser.parse_args(argv)
    cfg = finalize_config(default_config().update_args(settings_words(args.config, recipe=args.recipe)))
    sides = object_sides(load_training_split(cfg), cfg)
    now = cfg.RPN.ANCHOR_SIZES, cfg.RPN.ANCHOR_RATIOS
    found = suggest(sides, *now, _strides(cfg))
    threshold = cfg.RPN.POSITIVE_ANCHOR_THRESH
    headers = [f"{len(sides)} objects", "sizes", "ratios", "mean best IoU", f"below {threshold:g}"]
    rows = [_row("settings", sides, *now, cfg), _row("suggestion", sides, *found, cfg)]
    print(tabulate(rows, headers, "simple"))
    if rows[1][3] < rows[0][3] + _LEAST_GAIN:
        logger.info("the settings' anchors fit these objects as well; keep them")
    else:
        print(f"RPN.ANCHOR_SIZES={_shown(found[0])} RPN.ANCHOR_RATIOS={_shown(found[1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
