"""What the tests of the graph share: running a small graph of its own, small settings, small batches."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from config import Config, default_config, finalize_config
from inference import inference_callable
from tests.tiny import TINY_MODEL
from utils.checkpoint import save_npz
from utils.tf_v1 import tf


def evaluate(make: Callable, variables: dict[str, np.ndarray] | None = None):
    """Runs what make() builds in a graph of its own, variables initialised from seed 0 or as given by name."""
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        fetches = make()
        session.run(tf.global_variables_initializer())
        for variable in tf.global_variables():
            if variables and variable.op.name in variables:
                variable.load(variables[variable.op.name], session)
        return session.run(fetches)


def tiny_config(*settings: str) -> Config:
    return finalize_config(default_config().update_args([*TINY_MODEL, "DATA.NUM_CATEGORY=3", *settings]))


def save_untrained(path: Path, *settings: str) -> Path:
    """An untrained detector of the classes cat, dog and owl, whose low scores pass its threshold."""
    cfg = tiny_config("TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=5", "MODE_MASK=True", *settings)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(3)
        inference_callable(cfg)
        session.run(tf.global_variables_initializer())
        weights = session.run({v.op.name: v for v in tf.global_variables()})
    names = ["cat", "dog", "owl"]
    save_npz(path, weights, {"settings": cfg.to_dict(), "class_names": names, "category_ids": [7, 8, 9]})
    return path


def constants(batch: dict[str, np.ndarray]) -> dict:
    return {key: tf.constant(value) for key, value in batch.items()}


def make_batch(
    shapes: list[tuple[int, int]], objects: list[list], cfg: Config, seed: int = 0, size: tuple[int, int] | None = None
) -> dict[str, np.ndarray]:
    """A training batch of random pixels. objects: per image a list of (x1, y1, x2, y2, label[, is_crowd]); outlines are
    the boxes, keypoints lie at random in them."""
    multiple = 32 if cfg.MODE_FPN else 16
    h, w = size or (-(-max(s[i] for s in shapes) // multiple) * multiple for i in (0, 1))
    n, g = len(shapes), max(1, *(len(o) for o in objects))
    batch = {
        "image": np.zeros([n, h, w, 3], np.uint8),
        "image_shape": np.array(shapes, np.int32),
        "image_seed": np.arange(seed, seed + n, dtype=np.int32),
        "gt_boxes": np.zeros([n, g, 4], np.float32),
        "gt_labels": np.zeros([n, g], np.int32),
        "gt_is_crowd": np.zeros([n, g], bool),
        "gt_edges": np.zeros([n, g, 4, 4], np.float32),
        "gt_keypoints": np.zeros([n, g, cfg.KRCNN.NUM_KEYPOINT, 3], np.float32),
    }
    for row, (shape, entries) in enumerate(zip(shapes, objects)):
        random = np.random.RandomState(seed + row)
        batch["image"][row, : shape[0], : shape[1]] = random.randint(0, 256, (*shape, 3))
        for column, (x1, y1, x2, y2, label, *crowd) in enumerate(entries):
            batch["gt_boxes"][row, column] = x1, y1, x2, y2
            batch["gt_labels"][row, column] = label
            batch["gt_is_crowd"][row, column] = bool(crowd and crowd[0])
            corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
            batch["gt_edges"][row, column] = np.concatenate([corners, np.roll(corners, -1, 0)], 1)
            points = random.uniform([x1, y1], [x2, y2], [cfg.KRCNN.NUM_KEYPOINT, 2])
            batch["gt_keypoints"][row, column] = np.concatenate([points, np.full([len(points), 1], 2.0)], 1)
    if cfg.FRCNN.FEDERATED_LOSS:
        batch["class_verified"] = np.ones([n, cfg.DATA.NUM_CATEGORY + 1], bool)
    if not cfg.MODE_MASK:
        del batch["gt_edges"]
    if not cfg.MODE_KEYPOINT:
        del batch["gt_keypoints"]
    return batch
