"""Cascade R-CNN's box branch (Cai & Vasconcelos 2018): three heads, each trained and run on the boxes of the one
before."""

from config import Config
from model_box import clip_boxes, decode_boxes
from model_frcnn import SampledRois, covered_by_crowd, fastrcnn_head, fastrcnn_losses, fastrcnn_outputs, label_rois
from utils.tf_v1 import detached, tf

__all__ = ["cascade_inference", "cascade_losses"]


@tf.custom_gradient
def _scale_gradient_by_stages(x):
    """Identity; the gradient is divided by the three stages that share the features."""
    return x, lambda dy: dy * (1.0 / 3)


def _run_stage(stage, pool, boxes, cfg: Config, training):
    """boxes [N,R,4] -> logits [N·R,C+1], deltas [N·R,1,4] of the head numbered `stage` (from 0)."""
    features = pool(boxes)
    if training:
        features = _scale_gradient_by_stages(features)
    with tf.variable_scope(f"cascade_rcnn_stage{stage + 1}"):
        with tf.variable_scope("head"):
            hidden = fastrcnn_head(features, cfg)
        with tf.variable_scope("outputs"):
            return fastrcnn_outputs(hidden, cfg.DATA.NUM_CATEGORY, class_agnostic=True)


def _refine(boxes, deltas, image_shape, reg_weights):
    """boxes [N,R,4], deltas [N·R,1,4] -> clipped boxes [N,R,4] without gradient."""
    deltas = tf.reshape(deltas, tf.shape(boxes))
    return detached(clip_boxes(decode_boxes(deltas, boxes, reg_weights), image_shape))


def cascade_losses(pool, rois, batch, cfg: Config):
    """pool: boxes [N,R,4] -> RoI features [N·R,7,7,C]; rois: SampledRois of the first stage -> losses, stats.

    Later stages label the refined boxes at their own IoU, without sampling; boxes that became empty are left out.
    """
    losses, stats = {}, {}
    stages = list(zip(cfg.CASCADE.IOUS, cfg.CASCADE.BBOX_REG_WEIGHTS))
    for stage, (_, reg_weights) in enumerate(stages):
        logits, deltas = _run_stage(stage, pool, rois["boxes"], cfg, training=True)
        prefix = f"cascade_rcnn_stage{stage + 1}"
        stage_losses, stage_stats = fastrcnn_losses(logits, deltas, rois, batch, reg_weights, cfg, prefix)
        losses.update(stage_losses)
        stats.update(stage_stats)
        if stage + 1 < len(stages):
            boxes = _refine(rois["boxes"], deltas, batch["image_shape"], reg_weights)
            sides = boxes[..., 2:] - boxes[..., :2]
            valid = tf.logical_and(rois["valid"], tf.reduce_all(sides > 0, -1))
            labels, match, *_ = label_rois(boxes, valid, batch, stages[stage + 1][0])
            if cfg.FRCNN.CROWD_OVERLAP_THRESH < 1:
                ignored = tf.logical_and(tf.equal(tf.cast(labels, tf.int64), 0), covered_by_crowd(boxes, batch, cfg))
                valid = tf.logical_and(valid, tf.logical_not(ignored))
            rois = SampledRois(boxes=boxes, valid=valid, labels=labels, match=match, fg_limit=None)
    return losses, stats


def cascade_inference(pool, boxes, image_shape, cfg: Config):
    """Proposals [N,R,4] -> boxes [N,R,1,4] of the last stage, scores [N,R,C]: the mean of the stages' probabilities."""
    total = 0.0
    for stage, reg_weights in enumerate(cfg.CASCADE.BBOX_REG_WEIGHTS):
        logits, deltas = _run_stage(stage, pool, boxes, cfg, training=False)
        total += tf.nn.softmax(logits)
        boxes = _refine(boxes, deltas, image_shape, reg_weights)
    shape = tf.shape(boxes)
    scores = tf.reshape(total * (1.0 / len(cfg.CASCADE.IOUS)), [shape[0], shape[1], -1])
    return boxes[:, :, None, :], scores[:, :, 1:]
