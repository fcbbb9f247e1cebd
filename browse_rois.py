"""What a model's first stage makes of a training batch: its proposals, and the RoIs sampled with their labels."""

from collections.abc import Callable
from typing import Any

import numpy as np

from config import Config
from inference import start_session
from model_frcnn import sample_rois
from model_rcnn import backbone_features
from model_rpn import rpn_anchors, rpn_head, rpn_proposals
from run_start import STRICT, Model, weight_loader
from utils.tf_v1 import tf

__all__ = ["roi_reader"]

_TYPES = {"image": tf.uint8, "image_shape": tf.int32, "image_seed": tf.int32, "gt_boxes": tf.float32,
          "gt_labels": tf.int32, "gt_is_crowd": tf.bool}  # fmt: skip


def roi_reader(model: Model, cfg: Config) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """read(batch of data.make_batch) -> proposals float32 [N, P, 4] by falling score, valid bool [N, P], rois float32
    [N, R, 4] and labels int32 [N, R] (0 background) as training samples them, kept bool [N, R].

    model: loaded with MODE_RPN_ONLY, so that its weights are those of the backbone and the RPN.
    """
    with tf.Graph().as_default() as graph:
        n = cfg.TRAIN.BATCH_SIZE_PER_GPU
        shapes: dict[str, list[int | None]] = {
            "image": [n, None, None, 3], "image_shape": [n, 2], "image_seed": [n], "gt_boxes": [n, None, 4],
            "gt_labels": [n, None], "gt_is_crowd": [n, None],
        }  # fmt: skip
        batch = {key: tf.placeholder(kind, shapes[key], key) for key, kind in _TYPES.items()}
        features = backbone_features(batch["image"], batch["image_shape"], cfg)
        anchors = rpn_anchors(features, cfg)
        logits, deltas = rpn_head(features, cfg)
        proposals, _, valid = rpn_proposals(logits, deltas, anchors, batch["image_shape"], cfg, training=True)
        rois, _ = sample_rois(proposals, valid, batch, cfg)
        outputs = {"proposals": proposals, "valid": valid, "rois": rois["boxes"], "labels": rois["labels"],
                   "kept": rois["valid"]}  # fmt: skip
        session = start_session(graph, weight_loader(model.weights, model.origin, STRICT))

    def read(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        feed: dict[Any, np.ndarray] = {tensor: values[key] for key, tensor in batch.items()}
        return session.run(outputs, feed)

    return read
