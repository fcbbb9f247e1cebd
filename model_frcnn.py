"""The second stage's box branch (Girshick 2015, Fast R-CNN): RoI sampling, heads, losses, decoding.

RoIs are kept dense per image, [N,R,4] with a validity mask; the heads see them flattened, image outermost.
"""

import numpy as np

from basemodel import conv2d, detector_group_norm, fully_connected, he_fan_out, normal_init
from common import import_function
from config import Config
from model_box import (
    clip_boxes,
    covered_share,
    decode_boxes,
    first_of,
    greedy_nms,
    long_top_k,
    match_boxes,
    nms_in_blocks,
)  # fmt: skip
from model_losses import box_losses, loss_weights, sample_per_image, usable_gt
from utils.tf_v1 import for_gpu, tf

__all__ = [
    "BOX_HEADS", "SampledRois", "covered_by_crowd", "decode_class_boxes", "decode_detections", "fastrcnn_head",
    "fastrcnn_losses", "fastrcnn_outputs", "label_rois", "list_candidates", "sample_rois", "select_detections",
]  # fmt: skip

_SALT_ROI = (21, 22)  # for foreground and background


class SampledRois(dict):
    """boxes [N,R,4], valid bool [N,R], labels int32 [N,R] (0 = background), match int32 [N,R]: index of the ground
    truth matched by a foreground RoI. Foreground RoIs come first, at most `fg_limit` (int) of them."""


def label_rois(boxes, valid, batch, fg_thresh, counted=None):
    """boxes [N,R,4], valid bool [N,R] -> labels int32 [N,R] (0 where IoU < fg_thresh or not valid) and, with usable
    ground truth, match int32 [N,R], IoU [N,R] with it, and of each object the best IoU [N,G] with a RoI of `counted`
    bool [N,R]."""
    gt_boxes = tf.where_v2(usable_gt(batch)[..., None], batch["gt_boxes"], 0.0)
    best, match, best_of_gt, _ = match_boxes(boxes, gt_boxes, counted)
    foreground = tf.logical_and(valid, best >= fg_thresh)
    labels = tf.where_v2(foreground, tf.gather(batch["gt_labels"], match, batch_dims=1), 0)
    return labels, match, best, best_of_gt


def covered_by_crowd(boxes, batch, cfg: Config):
    """boxes [N,R,4] -> bool [N,R]: a crowd region covers more than CROWD_OVERLAP_THRESH of the box."""
    crowd = tf.logical_and(batch["gt_is_crowd"], batch["gt_labels"] > 0)
    crowd_boxes = tf.where_v2(crowd[..., None], batch["gt_boxes"], 0.0)
    return covered_share(boxes, crowd_boxes) > cfg.FRCNN.CROWD_OVERLAP_THRESH


def sample_rois(proposals, valid, batch, cfg: Config):
    """Adds the ground truth to the proposals and samples BATCH_PER_IM of them: at most a share FG_RATIO of foreground,
    the rest background with BG_THRESH_LO <= IoU < BG_THRESH_HI.

    proposals [N,P,4], valid bool [N,P] -> SampledRois and stats. No gradients.
    """
    frcnn = cfg.FRCNN
    usable = usable_gt(batch)
    gt_boxes = tf.where_v2(usable[..., None], batch["gt_boxes"], 0.0)
    boxes = tf.stop_gradient(tf.concat([proposals, gt_boxes], 1))  # [N, P+G, 4]
    # The recall of objects is measured without the added ground truth, since it describes the RPN.
    proposed = tf.concat([valid, tf.zeros_like(usable)], 1)
    valid = tf.concat([valid, usable], 1)
    threshold = cfg.CASCADE.IOUS[0] if cfg.FPN.CASCADE else frcnn.FG_THRESH
    labels, match, best, best_of_gt = label_rois(boxes, valid, batch, threshold, proposed)
    foreground = tf.cast(labels, tf.int64) > 0
    background = tf.logical_and(valid, tf.logical_not(foreground))
    if frcnn.BG_THRESH_HI is not None:
        background = tf.logical_and(background, best < frcnn.BG_THRESH_HI)
    if frcnn.BG_THRESH_LO > 0:
        background = tf.logical_and(background, best >= frcnn.BG_THRESH_LO)
    if frcnn.CROWD_OVERLAP_THRESH < 1:
        background = tf.logical_and(background, tf.logical_not(covered_by_crowd(boxes, batch, cfg)))
    fg_limit = int(frcnn.BATCH_PER_IM * frcnn.FG_RATIO)
    fg_index, fg_valid = sample_per_image(foreground, fg_limit, batch["image_seed"], _SALT_ROI[0])
    num_fg = tf.reduce_sum(tf.cast(fg_valid, tf.float32), 1)  # [N]
    bg_index, bg_valid = sample_per_image(background, frcnn.BATCH_PER_IM, batch["image_seed"], _SALT_ROI[1])
    bg_valid = tf.logical_and(bg_valid, first_of(frcnn.BATCH_PER_IM - num_fg, tf.shape(bg_valid)[1]))
    # Foreground first, then background, then invalid rows; a stable sort moves these to the end.
    index = tf.concat([fg_index, bg_index], 1)
    kept = tf.concat([fg_valid, bg_valid], 1)
    size = tf.minimum(frcnn.BATCH_PER_IM, tf.shape(index)[1])
    order = tf.argsort(tf.cast(tf.logical_not(kept), tf.float32), axis=1, stable=True)
    order = tf.cast(order, tf.int64)[:, :size]
    index = tf.gather(index, order, batch_dims=1)
    kept = tf.gather(kept, order, batch_dims=1)

    def pick(values):
        return tf.gather(values, index, batch_dims=1)

    rois = SampledRois(
        boxes=pick(boxes), valid=kept, labels=tf.where_v2(kept, pick(labels), 0), match=pick(match), fg_limit=fg_limit
    )
    num_gt = tf.reduce_sum(tf.cast(usable, tf.float32))
    stats = {
        "frcnn/num_foreground": tf.reduce_mean(num_fg),
        "frcnn/num_background": tf.reduce_mean(tf.reduce_sum(tf.cast(bg_valid, tf.float32), 1)),
    }
    for threshold in (0.3, 0.5, 0.7):
        found = tf.logical_and(best_of_gt >= threshold, usable)
        stats[f"rpn/recall_iou{threshold}"] = tf.math.divide_no_nan(tf.reduce_sum(tf.cast(found, tf.float32)), num_gt)
    return rois, stats


# --------------------------------------------------------------------------------------------------------------- heads
def fastrcnn_head(features, cfg: Config):
    """RoI features [R,7,7,C] -> [R,D] by the head FPN.FRCNN_HEAD_FUNC: one of BOX_HEADS, or your own module:function
    with the same arguments and result (demo/own_head.py)."""
    name = cfg.FPN.FRCNN_HEAD_FUNC
    head = BOX_HEADS[name] if name in BOX_HEADS else import_function(name, f"FPN.FRCNN_HEAD_FUNC={name}")
    return head(features, cfg)


def _flatten(x):
    """[R,H,W,C] -> [R,C·H·W]: the public checkpoints flatten channels first."""
    size = int(np.prod(x.shape[1:].as_list()))
    return tf.reshape(tf.transpose(x, [0, 3, 1, 2]), [-1, size])


def _two_layers(features, cfg: Config):
    """Two fully connected layers (Lin et al. 2017, FPN, section 4.2)."""
    dim = cfg.FPN.FRCNN_FC_HEAD_DIM
    x = fully_connected("fc6", _flatten(features), dim, relu=True)
    return fully_connected("fc7", x, dim, relu=True)


def _four_convolutions(features, cfg: Config, norm=None):
    """Four convolutions and a fully connected layer (Wu & He 2018, section 4.2)."""
    x = features
    for index in range(4):
        x = conv2d(f"conv{index}", x, cfg.FPN.FRCNN_CONV_HEAD_DIM, 3, norm=norm, relu=True, init=he_fan_out)
    return fully_connected("fc", _flatten(x), cfg.FPN.FRCNN_FC_HEAD_DIM, relu=True)


def _four_normalised_convolutions(features, cfg: Config):
    return _four_convolutions(features, cfg, detector_group_norm(cfg))


# FPN.FRCNN_HEAD_FUNC -> head(RoI features [R,7,7,C], cfg) -> [R,D].
BOX_HEADS = {
    "fastrcnn_2fc_head": _two_layers,
    "fastrcnn_4conv1fc_head": _four_convolutions,
    "fastrcnn_4conv1fc_gn_head": _four_normalised_convolutions,
}


def fastrcnn_outputs(feature, num_classes, class_agnostic):
    """[R,D] -> class logits [R,num_classes+1] and deltas [R,B,4] float32; B = 1 if class-agnostic, else
    num_classes + 1, background being 0."""
    num_boxes = 1 if class_agnostic else num_classes + 1
    logits = fully_connected("class", feature, num_classes + 1, init=normal_init(0.01))
    deltas = fully_connected("box", feature, num_boxes * 4, init=normal_init(0.001))
    deltas = tf.reshape(tf.cast(deltas, tf.float32), [-1, num_boxes, 4])
    return tf.cast(logits, tf.float32), deltas


# -------------------------------------------------------------------------------------------------------------- losses
def labels_of_rois(rois, batch, num_classes):
    """bool [N,R,C+1]: the classes of each RoI. A foreground RoI has the classes of all boxes equal to its matched
    box."""
    one_hot = tf.one_hot(batch["gt_labels"], num_classes + 1)  # [N, G, C+1]
    equal = tf.reduce_all(tf.equal(batch["gt_boxes"][:, :, None], batch["gt_boxes"][:, None]), -1)  # [N, G, G]
    equal = tf.logical_and(equal, usable_gt(batch)[:, None])
    classes = tf.matmul(tf.cast(equal, tf.float32), one_hot) > 0
    background = tf.one_hot(0, num_classes + 1, True, False, dtype=tf.bool)
    return tf.where_v2(
        tf.cast(rois["labels"], tf.int64)[..., None] > 0, tf.gather(classes, rois["match"], batch_dims=1), background
    )


def federated_class_losses(logits, own, verified):
    """Cross entropy for images that are annotated for some classes only and RoIs that may have several classes.

    logits [N,R,C+1], own bool [N,R,C+1] (see `labels_of_rois`), verified bool [N,C+1] -> [N,R]: the mean over a RoI's
    classes i of -log(e^z_i / (e^z_i + sum of e^z_j over verified classes j not its own)), which is the usual cross
    entropy if all classes are verified and the RoI has one class. A logit that is not in the sum has no gradient. (Peng
    et al. 2020,
    "Large-Scale Object Detection in the Wild from Imbalanced Multi-Labels", do so with the classes of one box.)
    """
    others = tf.logical_and(verified[:, None], tf.logical_not(own))
    rest = tf.reduce_logsumexp(tf.where_v2(others, logits, -1e9), -1, keepdims=True)
    losses = tf.where_v2(own, tf.nn.softplus(rest - logits), 0.0)
    return tf.reduce_sum(losses, -1) / tf.reduce_sum(tf.cast(own, logits.dtype), -1)


def fastrcnn_losses(logits, deltas, rois, batch, reg_weights, cfg: Config, prefix="frcnn"):
    """Cross entropy over the valid RoIs and FRCNN.BBOX_LOSS over the foreground ones, both per valid RoI.

    logits [N·R,C+1], deltas [N·R,B,4] -> losses {prefix/class_loss, prefix/box_loss}, stats.
    """
    # int64, because GPUs leave arithmetic on int32 to the host.
    labels, match, valid = tf.cast(rois["labels"], tf.int64), tf.cast(rois["match"], tf.int64), rois["valid"]  # [N, R]
    shape = tf.shape(labels)
    weights = loss_weights(valid, cfg.TRAIN.LOSS_PER_IMAGE)
    flat_labels = tf.reshape(labels, [-1])
    if cfg.FRCNN.FEDERATED_LOSS:
        num_classes = int(logits.shape[1]) - 1
        own = labels_of_rois(rois, batch, num_classes)
        class_losses = federated_class_losses(
            tf.reshape(logits, [shape[0], shape[1], num_classes + 1]), own, batch["class_verified"]
        )
    else:
        class_losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=flat_labels, logits=logits)
    class_losses = tf.where_v2(valid, tf.reshape(class_losses, shape), 0.0)

    # Only foreground RoIs have a box target; they come first, so the background is never computed.
    num_fg = tf.minimum(rois["fg_limit"], shape[1]) if rois["fg_limit"] is not None else shape[1]
    fg_labels = labels[:, :num_fg]
    is_fg = fg_labels > 0  # [N, F]
    matched = tf.gather(batch["gt_boxes"], match[:, :num_fg], batch_dims=1)
    num_boxes = int(deltas.shape[1])
    fg_deltas = tf.reshape(deltas, [shape[0], shape[1], num_boxes, 4])[:, :num_fg]
    if num_boxes == 1:
        fg_deltas = fg_deltas[:, :, 0]
    else:
        fg_deltas = tf.gather(fg_deltas, fg_labels, batch_dims=2)
    fg_losses = box_losses(
        fg_deltas, rois["boxes"][:, :num_fg], matched, cfg.FRCNN.BBOX_LOSS, cfg.FRCNN.SMOOTH_L1_BETA, reg_weights
    )
    fg_losses = tf.where_v2(is_fg, tf.reduce_sum(fg_losses, -1), 0.0)
    losses = {
        f"{prefix}/class_loss": tf.reduce_sum(class_losses * weights),
        f"{prefix}/box_loss": cfg.FRCNN.BBOX_LOSS_WEIGHT * tf.reduce_sum(fg_losses * weights[:, :num_fg]),
    }
    correct = tf.equal(tf.argmax(logits, 1), flat_labels)
    correct = tf.logical_and(tf.reshape(correct, shape), valid)

    def share(hits, of):
        return tf.math.divide_no_nan(tf.reduce_sum(tf.cast(hits, tf.float32)), tf.reduce_sum(tf.cast(of, tf.float32)))

    foreground = labels > 0
    stats = {
        f"{prefix}/accuracy": share(correct, valid),
        f"{prefix}/foreground_accuracy": share(tf.logical_and(correct, foreground), foreground),
    }
    return losses, stats


# ----------------------------------------------------------------------------------------------------------- inference
def decode_detections(boxes, scores, valid, image_shape, cfg: Config):
    """Score threshold, NMS (TEST.NMS, TEST.NMS_CLASS_AGNOSTIC) and the best RESULTS_PER_IM of each image.

    boxes [N,R,B,4], B = 1 (shared by the classes) or C; scores [N,R,C] probabilities without background; valid [N,R]
    -> boxes [N,D,4], scores [N,D] decreasing, labels int32 [N,D] (1..C), count int32 [N]; rows >= count are 0.
    """
    test = cfg.TEST
    if test.NMS != "hard" or test.NMS_CLASS_AGNOSTIC or for_gpu():
        boxes, scores, labels = list_candidates(boxes, scores, valid, image_shape, cfg)
        return select_detections(boxes, scores, labels, cfg)
    boxes, scores = _usable(boxes, scores, valid, image_shape)
    limit = test.RESULTS_PER_IM
    boxes, scores, classes, count = tf.image.combined_non_max_suppression(
        boxes, scores, limit, limit, test.FRCNN_NMS_THRESH, test.RESULT_SCORE_THRESH, clip_boxes=False
    )
    present = first_of(count, limit)
    labels = tf.where_v2(present, tf.cast(classes, tf.int32) + 1, 0)
    return boxes, scores, labels, count


def _usable(boxes, scores, valid, image_shape):
    """Boxes [N,R,B,4] clipped to the image and scores [N,R,C]. Rows that are not `valid` or contain a NaN box, and NaN
    scores, become 0, because comparisons with NaN are always False."""
    boxes = clip_boxes(boxes, image_shape)
    good = tf.logical_and(tf.reduce_all(tf.math.is_finite(boxes), [2, 3]), valid)
    scores = tf.where_v2(tf.logical_and(good[..., None], tf.math.is_finite(scores)), scores, 0.0)
    return tf.where_v2(good[..., None, None], boxes, 0.0), scores


def list_candidates(boxes, scores, valid, image_shape, cfg: Config):
    """Every box of every class with a score above RESULT_SCORE_THRESH, before any NMS.

    Arguments as for `decode_detections` -> boxes [N,K,4], scores [N,K] decreasing, labels int32 [N,K] (1..C). All are 0
    in unused rows; K >= 1 is the largest number of candidates of an image.
    """
    boxes, scores = _usable(boxes, scores, valid, image_shape)
    num_images, num_classes = tf.shape(scores)[0], tf.shape(scores)[2]
    flat = tf.reshape(scores, [num_images, -1])  # [N, R·C]
    most = tf.reduce_max(tf.reduce_sum(tf.cast(flat > cfg.TEST.RESULT_SCORE_THRESH, tf.float32), 1))
    scores, index = long_top_k(flat, tf.maximum(tf.cast(most, tf.int32), 1))  # [N, K]
    present = scores > cfg.TEST.RESULT_SCORE_THRESH
    index, num_classes = tf.cast(index, tf.int64), tf.cast(num_classes, tf.int64)
    row = index // num_classes if int(boxes.shape[2]) == 1 else index
    boxes = tf.gather(tf.reshape(boxes, [num_images, -1, 4]), row, batch_dims=1)
    labels = tf.where_v2(present, tf.cast(index % num_classes + 1, tf.int32), 0)
    return tf.where_v2(present[..., None], boxes, 0.0), tf.where_v2(present, scores, 0.0), labels


def select_detections(boxes, scores, labels, cfg: Config):
    """NMS of candidates and the best RESULTS_PER_IM of each image.

    boxes [N,K,4], scores [N,K], labels int32 [N,K], 0 where absent -> as `decode_detections`. Soft-NMS (Bodla et al.
    2017): eq. 2 (linear) or 3 (Gaussian) rescores; hard NMS is a factor of 0 beyond FRCNN_NMS_THRESH.
    """
    test = cfg.TEST

    def rescore(iou):
        if test.NMS == "soft_gaussian":
            return tf.exp(tf.square(iou) * (-1.0 / test.SOFT_NMS_SIGMA))
        return tf.where_v2(iou > test.FRCNN_NMS_THRESH, 1.0 - iou if test.NMS == "soft_linear" else 0.0, 1.0)

    least = test.RESULT_SCORE_THRESH
    groups = None if test.NMS_CLASS_AGNOSTIC else labels
    if test.NMS == "hard" and for_gpu():
        return _select_in_blocks(boxes, scores, labels, groups, cfg)
    if test.NMS != "hard":
        least = min(least, test.SOFT_NMS_MIN_SCORE)
    index, scores, count = greedy_nms(boxes, scores, groups, rescore, test.RESULTS_PER_IM, least)
    present = first_of(count, test.RESULTS_PER_IM)
    boxes = tf.where_v2(present[..., None], tf.gather(boxes, index, batch_dims=1), 0.0)
    return boxes, scores, tf.where_v2(present, tf.gather(labels, index, batch_dims=1), 0), count


def _select_in_blocks(boxes, scores, labels, groups, cfg: Config):
    """`select_detections` by hard NMS in few rounds, for GPUs."""
    limit = cfg.TEST.RESULTS_PER_IM
    scores, order = tf.nn.top_k(tf.stop_gradient(scores), tf.shape(scores)[1])
    boxes, labels = (tf.gather(v, order, batch_dims=1) for v in (tf.stop_gradient(boxes), labels))
    groups = None if groups is None else labels
    index, count = nms_in_blocks(boxes, scores > cfg.TEST.RESULT_SCORE_THRESH, groups, cfg.TEST.FRCNN_NMS_THRESH, limit)
    present = first_of(count, limit)
    boxes = tf.where_v2(present[..., None], tf.gather(boxes, index, batch_dims=1), 0.0)
    scores = tf.where_v2(present, tf.gather(scores, index, batch_dims=1), 0.0)
    return boxes, scores, tf.where_v2(present, tf.gather(labels, index, batch_dims=1), 0), count


def decode_class_boxes(deltas, proposals, reg_weights):
    """deltas [N·R,B,4] (B = 1 or C+1), proposals [N,R,4] -> boxes [N,R,B',4], B' = 1 or C (background dropped)."""
    shape = tf.shape(proposals)
    deltas = tf.reshape(deltas, [shape[0], shape[1], int(deltas.shape[1]), 4])
    if int(deltas.shape[2]) > 1:
        deltas = deltas[:, :, 1:]
    return decode_boxes(deltas, proposals[:, :, None, :], reg_weights)
