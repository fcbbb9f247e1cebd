"""Region proposal network (Ren et al. 2015): head, anchor matching and sampling, losses, proposals.

Anchors of all levels are concatenated, A of them; a level of H x W cells contributes H·W·ratios·sizes of them, the
cell's row and column outermost.
"""

from basemodel import conv2d, normal_init
from config import Config
from model_box import (
    anchors_of_level,
    batched_nms,
    cell_anchors,
    clip_boxes,
    covered_share,
    decode_boxes,
    first_of,
    long_top_k,
    match_boxes,
)  # fmt: skip
from model_losses import box_losses, sample_per_image, usable_gt
from utils.tf_v1 import detached, tf

__all__ = ["best_of_batch", "match_anchors", "rpn_anchors", "rpn_head", "rpn_losses", "rpn_proposals"]

_SALT_RPN = (11, 12)  # for foreground and background


def rpn_head(features, cfg: Config):
    """[[N,H,W,C] per level] -> logits [[N,H·W·a]], deltas [[N,H·W·a,4]] float32, a anchors per cell, shared weights:
    RPN.NUM_CONVS convolutions of 3x3, then one of 1x1 for each result."""
    fpn_mode = cfg.MODE_FPN
    ratios = len(cfg.RPN.ANCHOR_RATIOS)
    num_anchors = ratios if fpn_mode else ratios * len(cfg.RPN.ANCHOR_SIZES)
    hidden = cfg.FPN.NUM_CHANNEL if fpn_mode else cfg.RPN.HEAD_DIM
    init = normal_init(0.01)
    logits, deltas = [], []
    for index, feature in enumerate(features):
        with tf.variable_scope("rpn", reuse=tf.AUTO_REUSE if index else None):
            x = feature
            for depth in range(cfg.RPN.NUM_CONVS):
                x = conv2d(f"conv{depth}", x, hidden, 3, relu=True, init=init)
            batch = tf.shape(x)[0]
            level_logits = conv2d("class", x, num_anchors, 1, init=init)
            level_deltas = conv2d("box", x, num_anchors * 4, 1, init=init)
        logits.append(tf.cast(tf.reshape(level_logits, [batch, -1]), tf.float32))
        deltas.append(tf.cast(tf.reshape(level_deltas, [batch, -1, 4]), tf.float32))
    return logits, deltas


def rpn_anchors(features, cfg: Config):
    """[[N,H,W,C] per level] -> anchors [[H·W·a,4]] float32 of each level."""
    rpn = cfg.RPN
    if cfg.MODE_FPN:
        strides, sizes = cfg.FPN.ANCHOR_STRIDES, [[s] for s in rpn.ANCHOR_SIZES]
    else:
        strides, sizes = [rpn.ANCHOR_STRIDE], [rpn.ANCHOR_SIZES]
    cells = rpn.CELL_ANCHORS or [cell_anchors(s, rpn.ANCHOR_RATIOS) for s in sizes]
    shapes = [tf.shape(f)[1:3] for f in features]
    if rpn.STRIDE_FROM_SIZE:
        image = shapes[0] * strides[0]
        strides = [image // shape for shape in shapes]
    return [anchors_of_level(shape, stride, level) for shape, stride, level in zip(shapes, strides, cells)]


def rpn_proposals(logits, deltas, anchors, image_shape, cfg: Config, training):
    """Per level top-k, decoding, clipping to the valid area, NMS; then the best of all levels of an image.
    With FPN.PROPOSAL_MODE=Joint all levels are treated as one, as in C4.

    logits [[N,A_l]], deltas [[N,A_l,4]], anchors [[A_l,4]], image_shape int32 [N,2]
    -> boxes [N,P,4], scores [N,P] (logits, decreasing, -inf where absent), valid bool [N,P]. No gradients.
    """
    rpn = cfg.RPN
    phase = "TRAIN" if training else "TEST"
    if cfg.FPN.PROPOSAL_MODE == "Joint":
        logits, deltas, anchors = [tf.concat(logits, 1)], [tf.concat(deltas, 1)], [tf.concat(anchors, 0)]
    if cfg.MODE_FPN and cfg.FPN.PROPOSAL_MODE == "Level":
        before, after = rpn.get(f"{phase}_PER_LEVEL_NMS_TOPK"), rpn.get(f"{phase}_FPN_NMS_TOPK")
    else:
        before, after = rpn.get(f"{phase}_PRE_NMS_TOPK"), rpn.get(f"{phase}_POST_NMS_TOPK")
    absent = float("-inf")
    best = []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors):
        level_logits, level_deltas = detached(level_logits), detached(level_deltas)
        k = tf.minimum(before, tf.shape(level_logits)[1])
        scores, order = long_top_k(level_logits, k)  # [N, k]
        pad = [[0, 0], [0, before - k]]
        best.append((
            tf.pad(scores, pad, constant_values=absent),
            tf.pad(tf.gather(level_deltas, order, batch_dims=1), [*pad, [0, 0]]),
            tf.pad(tf.gather(level_anchors, order), [*pad, [0, 0]]),
        ))  # fmt: skip
    levels = len(best)
    scores, deltas, anchors = (tf.stack(values, 1) for values in zip(*best))  # [N, L, K], [N, L, K, 4] twice
    boxes = clip_boxes(decode_boxes(deltas, anchors), image_shape)
    first, last = tf.split(boxes, 2, -1)
    good = tf.logical_and(
        tf.reduce_all(last - first > rpn.MIN_SIZE, -1),
        tf.logical_and(tf.math.is_finite(scores), tf.reduce_all(tf.math.is_finite(boxes), -1)),
    )
    boxes = tf.reshape(tf.where_v2(good[..., None], boxes, 0.0), [-1, before, 4])  # [N·L, K, 4]
    scores = tf.reshape(tf.where_v2(good, scores, absent), [-1, before])
    boxes, scores, count = batched_nms(boxes, scores, rpn.PROPOSAL_NMS_THRESH, after)  # [N·L, T, …]
    scores = tf.where_v2(first_of(count, after), scores, absent)
    boxes = tf.reshape(boxes, [-1, levels * after, 4])
    scores, order = tf.nn.top_k(tf.reshape(scores, [-1, levels * after]), after)  # [N, P]
    boxes = tf.gather(boxes, order, batch_dims=1)
    if training and rpn.TRAIN_TOPK_OF_BATCH:
        scores = tf.where_v2(best_of_batch(scores, after), scores, absent)
    return boxes, scores, tf.math.is_finite(scores)


def best_of_batch(scores, limit):
    """scores [N,P], -inf where absent -> bool [N,P]: the `limit` best of all images together; of equal ones the first.

    Images with confident proposals get more of them (Detectron's collect_and_distribute_fpn_rpn_proposals).
    """
    flat = tf.reshape(scores, [-1])
    best, index = tf.nn.top_k(flat, tf.minimum(limit, tf.size(flat)))
    chosen = tf.scatter_nd(index[:, None], tf.cast(tf.math.is_finite(best), tf.int32), tf.shape(flat))
    return tf.reshape(chosen > 0, tf.shape(scores))


# ------------------------------------------------------------------------------------------------ matching, sampling
def match_anchors(anchors, gt_boxes, gt_usable, cfg: Config):
    """Labels anchors as foreground or background and finds the best ground truth of each.

    anchors [A,4], gt_boxes [N,G,4], gt_usable bool [N,G] -> foreground, background bool [N,A], match int32 [N,A].
    Foreground: IoU >= POSITIVE_ANCHOR_THRESH with some box, or the best anchor of a box (ties included) if it overlaps
    it at all. Background: IoU < NEGATIVE_ANCHOR_THRESH with every box.
    """
    best, match, _, is_best = match_boxes(anchors[None], tf.where_v2(gt_usable[..., None], gt_boxes, 0.0))
    foreground = tf.logical_or(best >= cfg.RPN.POSITIVE_ANCHOR_THRESH, is_best)
    background = tf.logical_and(best < cfg.RPN.NEGATIVE_ANCHOR_THRESH, tf.logical_not(is_best))
    return foreground, background, match


def rpn_losses(logits, deltas, anchors, batch, cfg: Config):
    """Losses over the sampled anchors alone.

    logits [N,A], deltas [N,A,4], anchors [A,4]; batch: image_shape, gt_boxes, gt_labels, gt_is_crowd, image_seed.
    -> losses {rpn/class_loss, rpn/box_loss}: sums over samples / (BATCH_PER_IM · N), the latter of the loss that
    RPN.BBOX_LOSS names and times its weight, and stats for summaries.
    """
    rpn = cfg.RPN
    crowd = tf.logical_and(batch["gt_is_crowd"], batch["gt_labels"] > 0)
    foreground, background, match = match_anchors(anchors, batch["gt_boxes"], usable_gt(batch), cfg)
    if not rpn.TRAIN_ON_PADDING:
        center = 0.5 * (anchors[:, :2] + anchors[:, 2:])[None]  # [1, A, 2] as x, y
        limit = tf.cast(batch["image_shape"], tf.float32)[:, None, ::-1]  # [N, 1, 2]
        inside = tf.reduce_all(center < limit, -1)
        # An object keeps its best anchor even if the anchor's centre is in the padding.
        background = tf.logical_and(background, inside)
    if rpn.CROWD_OVERLAP_THRESH < 1:
        crowd_boxes = tf.where_v2(crowd[..., None], batch["gt_boxes"], 0.0)
        in_crowd = covered_share(anchors[None], crowd_boxes) > rpn.CROWD_OVERLAP_THRESH
        background = tf.logical_and(background, tf.logical_not(in_crowd))
    fg_limit = int(rpn.BATCH_PER_IM * rpn.FG_RATIO)
    fg_index, fg_valid = sample_per_image(foreground, fg_limit, batch["image_seed"], _SALT_RPN[0])
    bg_index, bg_valid = sample_per_image(background, rpn.BATCH_PER_IM, batch["image_seed"], _SALT_RPN[1])
    num_fg = tf.reduce_sum(tf.cast(fg_valid, tf.float32), 1)  # [N]
    bg_valid = tf.logical_and(bg_valid, first_of(rpn.BATCH_PER_IM - num_fg, tf.shape(bg_valid)[1]))

    index = tf.concat([fg_index, bg_index], 1)  # [N, S]
    valid = tf.concat([fg_valid, bg_valid], 1)
    target = tf.concat([tf.ones_like(fg_valid, tf.float32), tf.zeros_like(bg_valid, tf.float32)], 1)
    sampled_logits = tf.gather(logits, index, batch_dims=1)
    class_losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=target, logits=sampled_logits)  # [N, S]
    matched = tf.gather(batch["gt_boxes"], tf.gather(match, fg_index, batch_dims=1), batch_dims=1)  # [N, F, 4]
    fg_deltas, fg_anchors = tf.gather(deltas, fg_index, batch_dims=1), tf.gather(anchors, fg_index)
    fg_losses = box_losses(fg_deltas, fg_anchors, matched, rpn.BBOX_LOSS, rpn.SMOOTH_L1_BETA)
    # Anchors that are not foreground may match an empty box with meaningless targets, which must not reach the sum.
    fg_losses = tf.where_v2(fg_valid[..., None], fg_losses, 0.0)
    normalizer = 1.0 / tf.cast(rpn.BATCH_PER_IM * tf.shape(logits)[0], tf.float32)
    losses = {
        "rpn/class_loss": tf.reduce_sum(tf.where_v2(valid, class_losses, 0.0)) * normalizer,
        "rpn/box_loss": rpn.BBOX_LOSS_WEIGHT * tf.reduce_sum(fg_losses) * normalizer,
    }
    predicted_fg = tf.logical_and(tf.gather(logits, fg_index, batch_dims=1) > 0, fg_valid)
    stats = {
        "rpn/num_positive": tf.reduce_mean(num_fg),
        "rpn/num_sampled": tf.reduce_mean(tf.reduce_sum(tf.cast(valid, tf.float32), 1)),
        "rpn/positive_recall": tf.math.divide_no_nan(
            tf.reduce_sum(tf.cast(predicted_fg, tf.float32)), tf.reduce_sum(num_fg)
        ),
    }
    return losses, stats
