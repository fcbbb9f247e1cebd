"""--predict … --benchmark: how long each part of a prediction takes, with your own model and images."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from common import UserError, logger, write_json
from data import read_image, resize_for_test, stack_images
from detections import to_original_frame
from predict import LoadedPredictor
from predict_tiles import in_tiles

__all__ = ["benchmark_files", "summary"]

PARTS = ("decode", "resize", "graph", "paste")
LEAST = 30  # measured images, so that percentiles mean something
WARM_UP = 3  # images before them, which allocate memory and choose kernels


def benchmark_files(predictor: LoadedPredictor, files: Sequence[str], output: str) -> dict[str, Any]:
    """Predicts each file, one after the other, and all again until at least LEAST are measured; prints the table of
    `summary` and writes it to <output>/benchmark.json."""
    if in_tiles(predictor.cfg):
        raise UserError("--benchmark measures whole images: set TEST.TILE=0")
    for i in range(WARM_UP):
        _measure(predictor, files[i % len(files)])
    count = len(files) * max(1, -(-LEAST // len(files)))
    logger.info(f"{len(files)} images, {count} measurements after {WARM_UP} to warm up")
    times = np.array([_measure(predictor, files[i % len(files)]) for i in range(count)])
    result = {"images": len(files), "measurements": count, "warm_up": WARM_UP, **summary(times)}
    rows = [[part, *(1000 * result["seconds"][part][k] for k in _COLUMNS)] for part in (*PARTS, "all")]
    print(tabulate(rows, ["ms/image", *_COLUMNS], floatfmt=".2f"))
    print(f"{result['images_per_second']:.3g} images/s, one image at a time")
    write_json(Path(output) / "benchmark.json", result, indent=1)
    logger.info(f"the numbers are in {Path(output) / 'benchmark.json'}")
    return result


_COLUMNS = ("median", "mean", "p5", "p95", "max")


def summary(times: np.ndarray) -> dict[str, Any]:
    """Seconds [n, 4] of the PARTS -> {images_per_second, seconds: {part: {median, mean, p5, p95, max}}}."""
    columns = dict(zip(PARTS, times.T)) | {"all": times.sum(1)}
    seconds = {}
    for part, values in columns.items():
        low, median, high = np.percentile(values, [5, 50, 95]).tolist()
        seconds[part] = {"median": median, "mean": float(values.mean()), "p5": low, "p95": high,
                         "max": float(values.max())}  # fmt: skip
    return {"images_per_second": 1 / seconds["all"]["mean"], "seconds": seconds}


def _measure(predictor: LoadedPredictor, file: str) -> list[float]:
    """Seconds of each of the PARTS."""
    marks = [time.perf_counter()]
    pixels = read_image(file)
    marks.append(time.perf_counter())
    resized = pixels if predictor.cfg.TEST.AUG_SHORT_EDGES else resize_for_test(pixels, predictor.cfg)
    batch, shapes = stack_images([resized], predictor.cfg)
    marks.append(time.perf_counter())
    outputs = predictor.predict_batch(batch, shapes)
    marks.append(time.perf_counter())
    to_original_frame({k: v[0] for k, v in outputs.items()}, shapes[0], pixels.shape[:2])
    marks.append(time.perf_counter())
    return np.diff(marks).tolist()
