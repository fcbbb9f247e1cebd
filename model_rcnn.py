"""The whole detector, from a batch of images to losses or detections: backbone, RPN, box, mask (and cascade) branches.

Both functions are pure: they use only their tensors, the settings, and the variables of the current scope.
"""

import functools
from typing import Any

import numpy as np

from basemodel import c4_backbone, c5_on_rois, preprocess_image
from common import UserError, describe_error
from config import Config
from model_backbones import backbone_stages, check_backbone
from model_box import clip_boxes, pad_for_roi_align, pool_from_levels, roi_align, roi_crop_and_resize, roi_pool
from model_cascade import cascade_inference, cascade_losses
from model_fpn import fpn
from model_frcnn import (
    decode_class_boxes,
    decode_detections,
    fastrcnn_head,
    fastrcnn_losses,
    fastrcnn_outputs,
    sample_rois,
)  # fmt: skip
from model_keypoint import decode_keypoints, keypoint_head, keypoint_losses, keypoint_resolution, keypoint_targets
from model_mrcnn import mask_head, mask_losses, mask_probabilities, mask_targets
from model_rpn import rpn_anchors, rpn_head, rpn_losses, rpn_proposals
from model_syncbn import valid_area
from utils.tf_v1 import for_gpu, tf

__all__ = [
    "INPUT_TYPES", "backbone_features", "build_inference", "build_training", "check_own_parts", "describe_boxes",
    "detect_boxes", "make_roi_pooler",
]  # fmt: skip


# Type and shape of each tensor of a training batch, for one image.
INPUT_TYPES: dict[str, tuple[Any, list[int | None]]] = {
    "image": (tf.uint8, [None, None, 3]),
    "image_shape": (tf.int32, [2]),
    "image_seed": (tf.int32, []),
    "gt_boxes": (tf.float32, [None, 4]),
    "gt_labels": (tf.int32, [None]),
    "gt_is_crowd": (tf.bool, [None]),
    "gt_edges": (tf.float32, [None, None, 4]),
    "gt_keypoints": (tf.float32, [None, None, 3]),
    "class_verified": (tf.bool, [None]),
}


def backbone_features(image, image_shape, cfg: Config):
    """uint8 image [N,H,W,3] -> the maps the RPN works on, finest first: [P2..P6], or [C4]."""
    with valid_area(image_shape, tf.shape(image)[1:3]):
        if cfg.MODE_FPN:
            return fpn(backbone_stages(image, image_shape, cfg), cfg)
        return [c4_backbone(preprocess_image(image, image_shape, cfg), cfg)]


def make_roi_pooler(features, cfg: Config):
    """-> pool(boxes [R,4], image_index [R], resolution) -> [R,resolution,resolution,C] by FRCNN.ROI_OP.
    RoIAlign pads each level only once. A box that is not finite, as diverged weights give, is pooled as one at the
    image's corner."""
    frcnn, deterministic = cfg.FRCNN, cfg.TRAIN.DETERMINISTIC
    if cfg.MODE_FPN:
        levels, strides = features[:4], cfg.FPN.ANCHOR_STRIDES[:4]
    else:
        levels, strides = features, [cfg.RPN.ANCHOR_STRIDE]
    if frcnn.ROI_OP == "align":
        levels = [pad_for_roi_align(f) for f in levels]

    def pool_level(level, boxes, image_index, scale, resolution):
        if frcnn.ROI_OP == "pool":
            return roi_pool(level, boxes, image_index, scale, resolution)
        if frcnn.ROI_OP == "crop_and_resize":
            return roi_crop_and_resize(level, boxes, image_index, scale, resolution, frcnn.ROI_SAMPLES, deterministic)
        return roi_align(
            level, boxes, image_index, scale, resolution, frcnn.ROI_SAMPLES, frcnn.ROI_ALIGNED, deterministic
        )

    def pool(boxes, image_index, resolution):
        boxes = tf.where_v2(tf.math.is_finite(boxes), boxes, tf.zeros_like(boxes))
        operation = functools.partial(pool_level, resolution=resolution)
        return pool_from_levels(levels, strides, boxes, image_index, operation, frcnn.ROI_TO_LAST_PIXEL)

    return pool


def _image_index(boxes):
    """boxes [N,R,4] -> int32 [N·R], the image of each row once flattened."""
    shape = tf.shape(boxes)
    return tf.reshape(tf.tile(tf.range(shape[0])[:, None], [1, shape[1]]), [-1])


def _mean_over_pixels(x):
    return tf.reduce_mean(x, [1, 2])


def box_branch(pool, boxes, cfg: Config):
    """RoIs [N,R,4] -> class logits [N·R,C+1], deltas [N·R,B,4], and in C4 stage 5's features [N·R,7,7,C5], which the
    mask branch shares (None with FPN)."""
    flat, index = tf.reshape(boxes, [-1, 4]), _image_index(boxes)
    if cfg.MODE_FPN:
        with tf.variable_scope("fastrcnn"):
            hidden = fastrcnn_head(pool(flat, index, cfg.FRCNN.ROI_SIZE), cfg)
            with tf.variable_scope("outputs"):
                return *fastrcnn_outputs(hidden, cfg.DATA.NUM_CATEGORY, cfg.FRCNN.CLASS_AGNOSTIC), None
    features = c5_on_rois(pool(flat, index, 2 * cfg.FRCNN.ROI_SIZE), cfg)
    with tf.variable_scope("fastrcnn"):
        outputs = fastrcnn_outputs(_mean_over_pixels(features), cfg.DATA.NUM_CATEGORY, cfg.FRCNN.CLASS_AGNOSTIC)
    return *outputs, features


def _mask_branch(features, cfg: Config):
    """RoI features [F,14,14,C] of FPN, or [F,7,7,C5] of C4 -> mask logits [F,M,M,C] ([F,M,M,1] if they are
    class-agnostic); M = 28 with FPN, 14 in C4."""
    with tf.variable_scope("maskrcnn"):
        return mask_head(features, 1 if cfg.MRCNN.CLASS_AGNOSTIC else cfg.DATA.NUM_CATEGORY, cfg)


def _keypoint_branch(features, cfg: Config):
    """RoI features [F,14,14,C] -> logits [F,56,56,K]."""
    with tf.variable_scope("keypointrcnn"):
        return keypoint_head(features, cfg)


_GPU_ROWS = 32  # cuDNN prepares each convolution anew for every number of rows


def _never_empty(branch, *inputs):
    """branch(*inputs) for inputs [F, ...]; if F is 0, the branch gets one row of zeros instead, because oneDNN's
    convolutions return the shape of their input for an empty batch (TensorFlow 2.21). On GPUs, rows of zeros are added
    up to a multiple of 32. -> [F, ...]."""
    count = tf.shape(inputs[0])[0]
    wanted = tf.maximum(count, 1)
    if for_gpu():
        wanted = -(-wanted // _GPU_ROWS) * _GPU_ROWS
    missing = wanted - count
    # GPUs leave the padding of integers to the host.
    wide = [tf.cast(x, tf.float32) if x.dtype.is_integer else x for x in inputs]
    wide = [tf.pad(x, [[0, missing], *[[0, 0]] * (x.shape.ndims - 1)]) for x in wide]
    return branch(*(tf.cast(p, x.dtype) for p, x in zip(wide, inputs)))[:count]


def mask_resolution(cfg: Config):
    """Side of the masks of RoIs."""
    return 2 * (cfg.MRCNN.ROI_SIZE if cfg.MODE_FPN else cfg.FRCNN.ROI_SIZE)


def check_own_parts(cfg: Config) -> None:
    """Raises UserError, before expensive work, if BACKBONE.NAME, FPN.FRCNN_HEAD_FUNC or FPN.MRCNN_HEAD_FUNC name
    nothing usable. Your own heads are run once on two RoIs of zeros."""
    check_backbone(cfg)
    if not cfg.MODE_FPN or cfg.MODE_RPN_ONLY:
        return
    classes = max(cfg.DATA.NUM_CATEGORY, 1)
    _check_head("FPN.FRCNN_HEAD_FUNC", lambda x: fastrcnn_head(x, cfg), cfg.FRCNN.ROI_SIZE, [2, None], cfg)
    if cfg.MODE_MASK:
        m = mask_resolution(cfg)
        classes = 1 if cfg.MRCNN.CLASS_AGNOSTIC else classes
        _check_head("FPN.MRCNN_HEAD_FUNC", lambda x: mask_head(x, classes, cfg), m // 2, [2, m, m, classes], cfg)


def _check_head(key, head, side, wanted, cfg: Config):
    """head(features [R,side,side,C]) must return a tensor of the shape `wanted`, for R = 2; None stands for any
    number."""
    if ":" not in cfg.get(key):
        return
    setting = f"setting {key}={cfg.get(key)}"
    channels = cfg.FPN.NUM_CHANNEL
    no_gpu = tf.ConfigProto(device_count={"GPU": 0})
    with tf.Graph().as_default(), tf.Session(config=no_gpu) as session:
        features = tf.placeholder(tf.as_dtype(cfg.TRAIN.PRECISION), [None, side, side, channels], "features")
        try:
            with tf.variable_scope("head"):
                output = head(features)
            found, good = type(output).__name__, False
            if isinstance(output, tf.Tensor):
                session.run(tf.global_variables_initializer())
                shape = session.run(tf.shape(output), {features: np.zeros([2, side, side, channels])}).tolist()
                fits = len(shape) == len(wanted) and all(w in (None, n) for w, n in zip(wanted, shape))
                good = fits and output.dtype.is_floating and output.shape.as_list()[-1] is not None
                found = f"{output.dtype.name} {shape}"
        except UserError:
            raise
        except Exception as e:  # whatever your own code raises
            raise UserError(f"{setting} raised {describe_error(e)}") from None
    if not good:
        sizes = ",".join("D" if w is None else str(w) for w in wanted[1:])
        raise UserError(
            f"{setting} must return a float tensor [R,{sizes}] for RoI features [R,{side},{side},{channels}], its last "
            f"size known when the graph is built; for 2 RoIs it returned {found}"
        )


def build_training(batch, cfg: Config):
    """Losses of a padded batch (the tensors of data.training_keys, N static) -> losses {name: scalar}, stats."""
    features = backbone_features(batch["image"], batch["image_shape"], cfg)
    anchors = rpn_anchors(features, cfg)
    logits, deltas = rpn_head(features, cfg)
    losses, stats = rpn_losses(tf.concat(logits, 1), tf.concat(deltas, 1), tf.concat(anchors, 0), batch, cfg)
    if cfg.MODE_RPN_ONLY:
        return losses, stats
    proposals, _, valid = rpn_proposals(logits, deltas, anchors, batch["image_shape"], cfg, training=True)
    rois, roi_stats = sample_rois(proposals, valid, batch, cfg)
    stats.update(roi_stats)

    pool = make_roi_pooler(features, cfg)
    if cfg.FPN.CASCADE:

        def pool_boxes(boxes):
            return pool(tf.reshape(boxes, [-1, 4]), _image_index(boxes), cfg.FRCNN.ROI_SIZE)

        box_losses, box_stats = cascade_losses(pool_boxes, rois, batch, cfg)
    else:
        class_logits, box_deltas, c5 = box_branch(pool, rois["boxes"], cfg)
        box_losses, box_stats = fastrcnn_losses(class_logits, box_deltas, rois, batch, cfg.FRCNN.BBOX_REG_WEIGHTS, cfg)
    losses.update(box_losses)
    stats.update(box_stats)

    if cfg.MODE_MASK or cfg.MODE_KEYPOINT:
        # Only actual foreground RoIs go through these branches; most images have far fewer than the limit.
        # int64, because GPUs leave arithmetic on int32 to the host.
        members = tf.cast(rois["labels"], tf.int64)[:, : rois["fg_limit"]] > 0  # [N, F']
        where = tf.where(members)  # [F, 2] image, row
        boxes = tf.gather_nd(rois["boxes"], where)
        image_index = tf.cast(where[:, 0], tf.int32)
        gt_index = tf.stack([where[:, 0], tf.cast(tf.gather_nd(rois["match"], where), tf.int64)], 1)
    if cfg.MODE_MASK:
        labels = tf.gather_nd(rois["labels"], where)
        targets = mask_targets(boxes, tf.gather_nd(batch["gt_edges"], gt_index), mask_resolution(cfg))
        if cfg.MODE_FPN:
            mask_logits = _never_empty(
                lambda b, i: _mask_branch(pool(b, i, cfg.MRCNN.ROI_SIZE), cfg), boxes, image_index
            )
        else:
            row = where[:, 0] * tf.shape(rois["labels"], out_type=tf.int64)[1] + where[:, 1]
            mask_logits = _never_empty(lambda r: _mask_branch(tf.gather(c5, r), cfg), row)
        branch_losses, branch_stats = mask_losses(mask_logits, labels, targets, members, cfg)
        losses.update(branch_losses)
        stats.update(branch_stats)
    if cfg.MODE_KEYPOINT:
        cells, visible = keypoint_targets(
            boxes, tf.gather_nd(batch["gt_keypoints"], gt_index), keypoint_resolution(cfg)
        )
        used = tf.where(tf.reduce_any(visible, 1))[:, 0]  # RoIs without a visible keypoint contribute no loss
        cells, visible, image_index = (tf.gather(x, used) for x in (cells, visible, image_index))
        keypoint_logits = _never_empty(
            lambda b, i: _keypoint_branch(pool(b, i, cfg.KRCNN.ROI_SIZE), cfg), tf.gather(boxes, used), image_index
        )
        num_images = tf.shape(batch["image"])[0]
        branch_losses, branch_stats = keypoint_losses(keypoint_logits, cells, visible, image_index, num_images, cfg)
        losses.update(branch_losses)
        stats.update(branch_stats)
    return losses, stats


def propose(features, image_shape, cfg: Config):
    """features of `backbone_features` -> boxes [N,P,4], scores [N,P] (logits), valid bool [N,P] of `rpn_proposals`."""
    anchors = rpn_anchors(features, cfg)
    logits, deltas = rpn_head(features, cfg)
    return rpn_proposals(logits, deltas, anchors, image_shape, cfg, training=False)


def detect_boxes(features, pool, image_shape, cfg: Config):
    """RPN and box branch, before any score threshold or NMS of detections.

    features: those of `backbone_features`, pool: its `make_roi_pooler`; image_shape int32 [N,2] -> boxes [N,R,B,4] of
    B = 1 (shared by the classes) or C, inside the image, scores [N,R,C] without background, valid bool [N,R].
    """
    proposals, _, valid = propose(features, image_shape, cfg)
    # Drops the last rows if no image has a proposal there.
    most = tf.cast(tf.maximum(tf.reduce_max(tf.reduce_sum(tf.cast(valid, tf.float32), 1)), 1.0), tf.int32)
    proposals, valid = proposals[:, :most], valid[:, :most]
    if cfg.FPN.CASCADE:

        def pool_boxes(boxes):
            return pool(tf.reshape(boxes, [-1, 4]), _image_index(boxes), cfg.FRCNN.ROI_SIZE)

        boxes, scores = cascade_inference(pool_boxes, proposals, image_shape, cfg)
    else:
        class_logits, box_deltas, _ = box_branch(pool, proposals, cfg)
        shape = tf.shape(proposals)
        scores = tf.reshape(tf.nn.softmax(class_logits), [shape[0], shape[1], -1])[:, :, 1:]
        boxes = decode_class_boxes(box_deltas, proposals, cfg.FRCNN.BBOX_REG_WEIGHTS)
        boxes = clip_boxes(boxes, image_shape)
    return boxes, scores, valid


def describe_boxes(pool, boxes, labels, cfg: Config, decode=True):
    """Masks and keypoints of boxes, by the branches that the model has.

    pool: `make_roi_pooler`; boxes [N,D,4], labels int32 [N,D], 0 where absent -> {masks: probabilities [N,D,M,M],
    keypoints: [N,D,K,3]}, zero where absent; with decode=False keypoints are the logits [N,D,56,56,K].
    """
    outputs = {}
    if not (cfg.MODE_MASK or cfg.MODE_KEYPOINT):
        return outputs
    where = tf.where(tf.cast(labels, tf.int64) > 0)  # [F, 2]
    found, found_labels = tf.gather_nd(boxes, where), tf.gather_nd(labels, where)
    image_index = tf.cast(where[:, 0], tf.int32)
    mask_size = cfg.MRCNN.ROI_SIZE if cfg.MODE_FPN else 2 * cfg.FRCNN.ROI_SIZE
    sizes = {mask_size} if cfg.MODE_MASK else set()
    sizes |= {cfg.KRCNN.ROI_SIZE} if cfg.MODE_KEYPOINT else set()
    pooled = {size: pool(found, image_index, size) for size in sorted(sizes)}  # once where both have the same size
    leading = tf.shape(boxes, out_type=tf.int64)[:2]

    def put_back(rows):
        return tf.scatter_nd(where, rows, tf.concat([leading, tf.shape(rows, out_type=tf.int64)[1:]], 0))

    if cfg.MODE_MASK:

        def mask_probabilities_of(roi_features, roi_labels):
            if not cfg.MODE_FPN:
                with tf.variable_scope(tf.get_variable_scope(), reuse=True):
                    roi_features = c5_on_rois(roi_features, cfg)
            return mask_probabilities(_mask_branch(roi_features, cfg), tf.maximum(tf.cast(roi_labels, tf.int64), 1))

        outputs["masks"] = put_back(_never_empty(mask_probabilities_of, pooled[mask_size], found_labels))
    if cfg.MODE_KEYPOINT:

        def keypoints_of(roi_features, roi_boxes):
            logits = _keypoint_branch(roi_features, cfg)
            return decode_keypoints(logits, roi_boxes) if decode else logits

        outputs["keypoints"] = put_back(_never_empty(keypoints_of, pooled[cfg.KRCNN.ROI_SIZE], found))
    return outputs


def build_inference(image, image_shape, cfg: Config):
    """uint8 image [N,H,W,3], image_shape int32 [N,2] -> {boxes [N,D,4], scores [N,D], labels [N,D], count [N]}, plus
    masks [N,D,M,M] in MODE_MASK and keypoints [N,D,K,3] in MODE_KEYPOINT, all in the frame of `image`; rows from count
    on are zero. With MODE_RPN_ONLY these are the proposals: scores are objectness probabilities, labels 1."""
    features = backbone_features(image, image_shape, cfg)
    if cfg.MODE_RPN_ONLY:
        boxes, logits, valid = propose(features, image_shape, cfg)
        labels = tf.cast(valid, tf.int32)
        scores = tf.where_v2(valid, tf.sigmoid(logits), 0.0)
        boxes = tf.where_v2(valid[..., None], boxes, 0.0)
        return {"boxes": boxes, "scores": scores, "labels": labels, "count": tf.reduce_sum(labels, 1)}
    pool = make_roi_pooler(features, cfg)
    boxes, scores, valid = detect_boxes(features, pool, image_shape, cfg)
    boxes, scores, labels, count = decode_detections(boxes, scores, valid, image_shape, cfg)
    outputs = {"boxes": boxes, "scores": scores, "labels": labels, "count": count}
    return outputs | describe_boxes(pool, boxes, labels, cfg)
