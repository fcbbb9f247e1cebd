"""Keypoint branch (He et al. 2017, Mask R-CNN, section 5): one softmax over the cells of a 56 x 56 map per keypoint."""

import contextlib

from basemodel import conv2d, deconv2d, he_fan_out, normal_init
from config import Config
from utils.tf_v1 import for_gpu, tf

__all__ = ["decode_keypoints", "keypoint_head", "keypoint_losses", "keypoint_resolution", "keypoint_targets"]

_NUM_CONVS = 8


def keypoint_resolution(cfg: Config):
    """Side of the maps of keypoints."""
    return 4 * cfg.KRCNN.ROI_SIZE


def keypoint_head(features, cfg: Config):
    """RoI features [F,14,14,C] -> logits [F,56,56,K] float32: eight convolutions, a transposed one, a bilinear x2."""
    x = features
    for index in range(_NUM_CONVS):
        x = conv2d(f"conv{index}", x, cfg.KRCNN.HEAD_DIM, 3, relu=True, init=he_fan_out)
    x = deconv2d("deconv", x, cfg.KRCNN.NUM_KEYPOINT, 4, 2, init=normal_init(0.001))
    return tf.image.resize_bilinear(tf.cast(x, tf.float32), [keypoint_resolution(cfg)] * 2, half_pixel_centers=True)


def keypoint_targets(boxes, keypoints, resolution=56):
    """The cell of each keypoint in the grid over its RoI.

    boxes [F,4], keypoints [F,K,3] as x, y, visibility -> cell int32 [F,K] = row · resolution + column, valid bool
    [F,K]: labelled (v > 0) and inside the box, including its right and bottom edges. Cells of the others are 0.
    """
    corner, size = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2])[:, None]
    points = keypoints[..., :2]
    cell = tf.floor((points - corner) * (float(resolution) / tf.maximum(size, 1e-6)))  # [F, K, 2]
    cell = tf.where_v2(tf.equal(points, boxes[:, None, 2:]), float(resolution - 1), cell)
    inside = tf.reduce_all(tf.logical_and(cell >= 0, cell < resolution), -1)
    valid = tf.logical_and(inside, keypoints[..., 2] > 0)
    cell = tf.where_v2(valid[..., None], cell, 0.0)
    return tf.stop_gradient(tf.cast(cell[..., 1] * resolution + cell[..., 0], tf.int32)), valid


def keypoint_losses(logits, cells, valid, image_index, num_images, cfg: Config):
    """Cross entropy over the cells, per valid keypoint.

    logits [F,56,56,K], cells int32 [F,K], valid bool [F,K], image_index int32 [F] -> losses {krcnn/keypoint_loss},
    stats. The divisor is the number of valid keypoints of the batch, or with TRAIN.LOSS_PER_IMAGE the mean of the
    images' means, where an image without valid keypoints has mean 0.
    """
    shape = tf.shape(logits)
    flat = tf.reshape(tf.transpose(logits, [0, 3, 1, 2]), [-1, shape[1] * shape[2]])  # [F·K, 56·56]
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.reshape(cells, [-1]), logits=flat)
    weights = tf.cast(valid, tf.float32)  # [F, K]
    losses = tf.reshape(losses, tf.shape(cells)) * weights
    if cfg.TRAIN.LOSS_PER_IMAGE:
        sums = tf.math.unsorted_segment_sum(tf.reduce_sum(losses, 1), image_index, num_images)
        counts = tf.math.unsorted_segment_sum(tf.reduce_sum(weights, 1), image_index, num_images)
        loss = tf.reduce_mean(tf.math.divide_no_nan(sums, counts))
    else:
        loss = tf.math.divide_no_nan(tf.reduce_sum(losses), tf.reduce_sum(weights))
    right = tf.equal(tf.argmax(flat, 1), tf.reshape(tf.cast(cells, tf.int64), [-1]))
    right = tf.reshape(tf.cast(right, tf.float32), tf.shape(cells)) * weights
    stats = {
        "krcnn/num_keypoints": tf.reduce_sum(weights),
        "krcnn/accuracy": tf.math.divide_no_nan(tf.reduce_sum(right), tf.reduce_sum(weights)),
    }
    return {"krcnn/keypoint_loss": cfg.KRCNN.LOSS_WEIGHT * loss}, stats


# ------------------------------------------------------------------------------------------------------------ decoding
_CUBIC_A = -0.75  # parameter of Keys' kernel, as in OpenCV and PyTorch


def _cubic_matrix(size, source):
    """Weights [size, source] float32 that resize a row of `source` values to `size` (an int tensor) bicubically:
    pixel centres at half integers, the border repeated."""
    position = (tf.cast(tf.range(size), tf.float32) + 0.5) * (source / tf.cast(size, tf.float32)) - 0.5
    base = tf.floor(position)
    t = position - base  # [size]
    weights = 0.0
    for tap, distance in zip((-1, 0, 1, 2), (t + 1, t, 1 - t, 2 - t)):
        if tap in (0, 1):
            value = ((_CUBIC_A + 2) * distance - (_CUBIC_A + 3)) * distance * distance + 1
        else:
            value = ((_CUBIC_A * distance - 5 * _CUBIC_A) * distance + 8 * _CUBIC_A) * distance - 4 * _CUBIC_A
        index = tf.clip_by_value(tf.cast(base, tf.int32) + tap, 0, source - 1)
        weights += tf.one_hot(index, source) * value[:, None]
    return weights


def decode_keypoints(logits, boxes):
    """Logits [D,M,M,K] and boxes [D,4] -> [D,K,3] float32 x, y, score: the best pixel of the map resized bicubically to
    the box's size in pixels, rounded up. The score is that pixel's probability relative to the M x M softmax."""
    source = int(logits.shape[1])
    num_keypoints = int(logits.shape[3])

    def decode_one(heat, box):  # [K, M, M], [4]
        size = tf.maximum(box[2:] - box[:2], 1.0)
        whole = tf.math.ceil(size)
        width, height = tf.cast(whole[0], tf.int32), tf.cast(whole[1], tf.int32)
        rows = tf.tensordot(heat, _cubic_matrix(width, source), [[2], [1]])  # [K, M, w]
        rows = tf.reshape(tf.transpose(rows, [1, 0, 2]), [source, -1])
        fine = tf.reshape(tf.matmul(_cubic_matrix(height, source), rows), [height, num_keypoints, width])
        fine = tf.reshape(tf.transpose(fine, [1, 0, 2]), [num_keypoints, -1])  # [K, h·w]
        best = tf.argmax(fine, 1, output_type=tf.int32)
        peak = tf.reduce_max(fine, 1)
        cell = tf.cast(tf.stack([best % width, best // width], 1), tf.float32) + 0.5  # [K, 2]
        point = box[None, :2] + cell * (size / whole)
        score = 1.0 / tf.reduce_sum(tf.exp(heat - peak[:, None, None]), [1, 2])
        return tf.concat([point, score[:, None]], 1)

    # Small products of a size of their own for each box: a GPU would spend its time on starting them, and round them.
    with tf.device("/cpu:0") if for_gpu() else contextlib.nullcontext():
        heat = tf.transpose(logits, [0, 3, 1, 2])
        return tf.while_loop(
            lambda row, _: row < tf.shape(heat)[0],
            lambda row, points: (row + 1, tf.concat([points, decode_one(heat[row], boxes[row])[None]], 0)),
            [0, tf.zeros([0, num_keypoints, 3])],
            shape_invariants=[tf.TensorShape([]), tf.TensorShape([None, num_keypoints, 3])],
            parallel_iterations=4,
            back_prop=False,
        )[1]
