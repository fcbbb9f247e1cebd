"""Mask branch (He et al. 2017, Mask R-CNN)."""

from basemodel import conv2d, deconv2d, detector_group_norm, he_fan_out
from common import import_function
from config import Config
from model_box import rasterize_edges
from model_losses import loss_weights
from utils.tf_v1 import tf

__all__ = ["MASK_HEADS", "mask_head", "mask_losses", "mask_probabilities", "mask_targets"]


def mask_head(features, num_classes, cfg: Config):
    """RoI features [F,M/2,M/2,C] -> mask logits [F,M,M,num_classes] float32. With FPN by the head FPN.MRCNN_HEAD_FUNC:
    one of MASK_HEADS, or your own module:function with the same arguments and result (demo/own_head.py). In C4 the
    features come from stage 5 and are upsampled."""
    if not cfg.MODE_FPN:
        return _upsampled_logits(features, num_classes, cfg)
    name = cfg.FPN.MRCNN_HEAD_FUNC
    head = MASK_HEADS[name] if name in MASK_HEADS else import_function(name, f"FPN.MRCNN_HEAD_FUNC={name}")
    return tf.cast(head(features, num_classes, cfg), tf.float32)


def _upsampled_logits(x, num_classes, cfg: Config):
    """[F,M/2,M/2,C] -> float32 [F,M,M,num_classes]: a transposed convolution and one of 1x1."""
    x = deconv2d("deconv", x, cfg.MRCNN.HEAD_DIM, relu=True, init=he_fan_out)
    return tf.cast(conv2d("conv", x, num_classes, 1, init=he_fan_out), tf.float32)


def _four_convolutions(features, num_classes, cfg: Config, norm=None):
    """Four convolutions before the upsampling (He et al. 2017, fig. 4 right)."""
    x = features
    for index in range(4):
        x = conv2d(f"fcn{index}", x, cfg.MRCNN.HEAD_DIM, 3, norm=norm, relu=True, init=he_fan_out)
    return _upsampled_logits(x, num_classes, cfg)


def _four_normalised_convolutions(features, num_classes, cfg: Config):
    return _four_convolutions(features, num_classes, cfg, detector_group_norm(cfg))


# FPN.MRCNN_HEAD_FUNC -> head(RoI features [F,14,14,C], num_classes, cfg) -> mask logits [F,28,28,num_classes].
MASK_HEADS = {
    "maskrcnn_up4conv_head": _four_convolutions,
    "maskrcnn_up4conv_gn_head": _four_normalised_convolutions,
}


def mask_targets(boxes, edges, resolution):
    """boxes [F,4] and the outlines [F,E,4] of their ground truth -> [F,resolution,resolution] in {0, 1}, equal to the
    masks of COCO's rasteriser."""
    return tf.stop_gradient(rasterize_edges(edges, boxes, resolution))


def _of_class(logits, labels):
    """logits [F,M,M,C] of the classes, or [F,M,M,1] for all of them; labels int32 [F] (1..C) -> [F,M,M]."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    return tf.gather(tf.transpose(logits, [0, 3, 1, 2]), tf.cast(labels, tf.int64) - 1, batch_dims=1)


def mask_losses(logits, labels, targets, members, cfg: Config):
    """Mean binary cross entropy on the ground-truth class's mask.

    logits [F,M,M,C or 1], labels int32 [F] (1..C), targets [F,M,M]; members bool [N,R]: the RoIs to which the F rows
    belong, in order -> losses {mrcnn/mask_loss}, stats.
    """
    own = _of_class(logits, labels)  # [F, M, M]
    per_roi = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=own), [1, 2])
    weights = tf.gather_nd(loss_weights(members, cfg.TRAIN.LOSS_PER_IMAGE), tf.where(members))  # [F]
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
    """logits [F,M,M,C or 1], labels int32 [F] (1..C) -> probabilities [F,M,M] of the predicted class."""
    return tf.sigmoid(_of_class(logits, labels))
