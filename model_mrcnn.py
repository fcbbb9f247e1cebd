"""Mask branch (He et al. 2017, Mask R-CNN)."""

from basemodel import conv2d, deconv2d, detector_group_norm, he_fan_out
from config import Config
from model_box import rasterize_edges
from model_losses import loss_weights
from utils.tf_v1 import tf

__all__ = ["mask_head", "mask_losses", "mask_probabilities", "mask_targets"]


def mask_head(features, num_classes, cfg: Config):
    """RoI features [F,M/2,M/2,C] -> mask logits [F,M,M,num_classes] float32. With FPN four convolutions precede the
    upsampling (MRCNN_HEAD_FUNC); in C4 the features come from stage 5."""
    x = features
    if cfg.MODE_FPN:
        norm = detector_group_norm(cfg) if cfg.FPN.MRCNN_HEAD_FUNC.endswith("_gn_head") else None
        for index in range(4):
            x = conv2d(f"fcn{index}", x, cfg.MRCNN.HEAD_DIM, 3, norm=norm, relu=True, init=he_fan_out)
    x = deconv2d("deconv", x, cfg.MRCNN.HEAD_DIM, relu=True, init=he_fan_out)
    return tf.cast(conv2d("conv", x, num_classes, 1, init=he_fan_out), tf.float32)


def mask_targets(boxes, edges, resolution):
    """boxes [F,4] and the outlines [F,E,4] of their ground truth -> [F,resolution,resolution] in {0, 1}, as COCO's
    rasteriser fills them."""
    return tf.stop_gradient(rasterize_edges(edges, boxes, resolution))


def mask_losses(logits, labels, targets, members, cfg: Config):
    """Mean binary cross entropy on the ground-truth class's mask.

    logits [F,M,M,C], labels int32 [F] (1..C), targets [F,M,M]; members bool [N,R]: which RoIs of which image the F
    rows are, in order -> losses {mrcnn/mask_loss}, stats.
    """
    own = tf.gather(tf.transpose(logits, [0, 3, 1, 2]), labels - 1, batch_dims=1)  # [F, M, M]
    per_roi = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=own), [1, 2])
    weights = tf.boolean_mask(loss_weights(members, cfg.TRAIN.LOSS_PER_IMAGE), members)  # [F]
    right = tf.cast(tf.equal(own > 0, targets > 0.5), tf.float32)
    count = tf.cast(tf.size(right), tf.float32)
    on = tf.reduce_sum(targets)
    stats = {
        "mrcnn/accuracy": tf.math.divide_no_nan(tf.reduce_sum(right), count),
        "mrcnn/positive_recall": tf.math.divide_no_nan(tf.reduce_sum(right * targets), on),
        "mrcnn/positive_share": tf.math.divide_no_nan(on, count),
    }
    return {"mrcnn/mask_loss": cfg.MRCNN.LOSS_WEIGHT * tf.reduce_sum(per_roi * weights)}, stats


def mask_probabilities(logits, labels):
    """logits [F,M,M,C], labels int32 [F] (1..C) -> probabilities [F,M,M] of the predicted class."""
    return tf.sigmoid(tf.gather(tf.transpose(logits, [0, 3, 1, 2]), labels - 1, batch_dims=1))
