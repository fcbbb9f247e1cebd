"""All box mathematics of the graph: IoU, box coding, anchors, RoI features and mask rasterisation.

Boxes are float32 x1 y1 x2 y2 in absolute, continuous image coordinates (a pixel i covers [i, i+1)), never +1.
"""

import math

import numpy as np

from utils.tf_v1 import detached, for_gpu, tf

__all__ = [
    "BOX_SCALE_CLAMP", "anchors_of_level", "area", "batched_nms", "cell_anchors", "clip_boxes", "covered_share",
    "decode_boxes", "encode_boxes", "first_of", "generalized_iou", "greedy_nms", "long_top_k", "match_boxes",
    "nms_in_blocks", "pad_for_roi_align", "pairwise_iou", "pool_from_levels", "rasterize_edges", "roi_align",
    "roi_crop_and_resize", "roi_pool",
]  # fmt: skip

BOX_SCALE_CLAMP = math.log(1000.0 / 16)  # largest dw, dh: a box grows 62.5-fold at most (Detectron)


def area(boxes):
    """[..., 4] -> [...]; a box with x2 < x1 or y2 < y1 has area 0."""
    x1, y1, x2, y2 = tf.unstack(boxes, 4, -1)
    return tf.maximum(x2 - x1, 0.0) * tf.maximum(y2 - y1, 0.0)


def _pairwise_intersection(a, b):
    """[..., A, 4], [..., B, 4] -> [..., A, B]."""
    ax1, ay1, ax2, ay2 = tf.unstack(tf.expand_dims(a, -2), 4, -1)  # [..., A, 1]
    bx1, by1, bx2, by2 = tf.unstack(tf.expand_dims(b, -3), 4, -1)  # [..., 1, B]
    width = tf.minimum(ax2, bx2) - tf.maximum(ax1, bx1)
    height = tf.minimum(ay2, by2) - tf.maximum(ay1, by1)
    return tf.maximum(width, 0.0) * tf.maximum(height, 0.0)


def pairwise_iou(a, b):
    """Intersection over union: [..., A, 4], [..., B, 4] -> [..., A, B]; 0 where both areas are 0."""
    intersection = _pairwise_intersection(a, b)
    union = tf.expand_dims(area(a), -1) + tf.expand_dims(area(b), -2) - intersection
    return tf.math.divide_no_nan(intersection, union)


_PAIR_BUDGET = 1 << 23  # pairs of a box and a target that are computed together: 32 MB for each float of a pair


def _over_blocks(targets, num_pairs, step, initial, shapes):
    """Runs state = step(block of targets [N,B,4], *state) over all targets [N,G,4]. Blocks are as large as the budget
    allows, with `num_pairs` pairs per target number. No gradients. -> the last state."""
    total = tf.shape(targets)[1]
    size = tf.maximum(_PAIR_BUDGET // tf.maximum(num_pairs, 1), 1)

    def body(start, *state):
        end = tf.minimum(start + size, total)
        return end, *step(targets[:, start:end], start, *state)

    shapes = [tf.TensorShape([]), *map(tf.TensorShape, shapes)]
    loop = tf.while_loop(
        lambda start, *_: start < total, body, [0, *initial], shapes, parallel_iterations=1, back_prop=False
    )
    return loop[1:]


def match_boxes(boxes, targets, counted=None):
    """The best target of each box and the best box of each target, by IoU. No gradients.

    boxes [N or 1,A,4], targets [N,G,4] (an empty one has IoU 0 with everything); counted bool [N,A]: the boxes among
    which a target's best is found, None: all. Memory grows with A + G, not with A · G.
    -> IoU [N,A] of a box with its best target, index int32 [N,A] of that target, IoU [N,G] of a target with its best
    box, and bool [N,A]: the box overlaps a target and is its best (ties included).
    """
    images, num_boxes = tf.shape(targets)[0], tf.shape(boxes)[1]

    def step(block, start, best, match, best_of_target, is_best):
        iou = pairwise_iou(block, boxes)  # [N, B, A]
        best_here = tf.reduce_max(iou, 1)
        better = best_here > best  # of equal IoUs the first is kept
        index = tf.cast(tf.argmax(iou, 1, output_type=tf.int32), tf.float32) + tf.cast(start, tf.float32)
        match = tf.where_v2(better, index, match)
        if counted is not None:
            iou = tf.where_v2(counted[:, None], iou, 0.0)
        top = tf.reduce_max(iou, 2, keepdims=True)  # [N, B, 1]
        is_best_here = tf.reduce_any(iou >= tf.where_v2(top > 0, top, 2.0), 1)
        best_of_target = tf.concat([best_of_target, top[..., 0]], 1)
        return (
            tf.maximum(best, best_here),
            match,
            best_of_target,
            tf.maximum(is_best, tf.cast(is_best_here, tf.float32)),
        )

    # The whole state is float32: on GPUs, loops keep int32 and bool variables in host memory.
    shape = [images, num_boxes]
    initial = [tf.fill(shape, -1.0), tf.zeros(shape), tf.zeros([images, 0]), tf.zeros(shape)]
    known = [[targets.shape[0], None]] * 4
    for value in initial:
        value.set_shape(known[0])
    best, match, best_of_target, is_best = _over_blocks(targets, images * num_boxes, step, initial, known)
    return best, tf.cast(match, tf.int32), best_of_target, is_best > 0


def covered_share(boxes, regions):
    """The largest share of a box's area that one region covers: boxes [N or 1,A,4], regions [N,G,4] -> [N,A].
    Memory grows with A + G. No gradients."""
    images, num_boxes = tf.shape(regions)[0], tf.shape(boxes)[1]

    def step(block, _, share):
        inside = tf.math.divide_no_nan(_pairwise_intersection(block, boxes), area(boxes)[:, None])  # [N, B, A]
        return (tf.maximum(share, tf.reduce_max(inside, 1)),)

    known = [regions.shape[0], None]
    initial = tf.zeros([images, num_boxes])
    initial.set_shape(known)
    return _over_blocks(regions, images * num_boxes, step, [initial], [known])[0]


def generalized_iou(a, b):
    """Generalised IoU, row by row (Rezatofighi et al. 2019, algorithm 1): [..., 4], [..., 4] -> [...] in [-1, 1].

    IoU - (hull - union) / hull, where the hull is the smallest box around both. Differentiable in a and b; two empty
    boxes have IoU 0, and no box, however small or far away, makes a value or a gradient that is not finite.
    """
    tiny = 1e-12  # square pixels
    (first_a, last_a), (first_b, last_b) = (tf.split(boxes, 2, -1) for boxes in (a, b))
    sides = tf.maximum(tf.minimum(last_a, last_b) - tf.maximum(first_a, first_b), 0.0)
    intersection = sides[..., 0] * sides[..., 1]
    union = area(a) + area(b) - intersection
    hull = area(tf.concat([tf.minimum(first_a, first_b), tf.maximum(last_a, last_b)], -1))
    return intersection / tf.maximum(union, tiny) - 1.0 + tf.math.divide_no_nan(union, hull)


def clip_boxes(boxes, image_shape):
    """Clips boxes [N, ..., 4] to the valid area; image_shape [N, 2] is height, width."""
    height, width = tf.unstack(image_shape, 2, 1)
    limit = tf.cast(tf.stack([width, height] * 2, axis=1), boxes.dtype)  # [N, 4]
    limit = tf.reshape(limit, [-1] + [1] * (boxes.shape.ndims - 2) + [4])
    return tf.minimum(tf.maximum(boxes, 0.0), limit)


def encode_boxes(boxes, references, weights=(1.0, 1.0, 1.0, 1.0)):
    """Deltas that turn `references` into `boxes` (Girshick et al. 2014, eq. 6-9), times `weights`: [..., 4] each.

    The caller must mask degenerate references and boxes; sizes have a lower limit so that these give no NaN.
    """
    tiny = 1e-6
    (first_r, last_r), (first_b, last_b) = (tf.split(values, 2, -1) for values in (references, boxes))
    wh_r, wh_b = tf.maximum(last_r - first_r, tiny), tf.maximum(last_b - first_b, tiny)
    center_r, center_b = (last_r + first_r) * 0.5, (last_b + first_b) * 0.5
    return tf.concat([(center_b - center_r) / wh_r, tf.math.log(wh_b / wh_r)], -1) * np.asarray(weights, np.float32)


def decode_boxes(deltas, references, weights=(1.0, 1.0, 1.0, 1.0)):
    """The inverse of `encode_boxes`; dw and dh are clamped from above at log(1000/16)."""
    deltas = deltas / np.asarray(weights, np.float32)
    (shift, growth), (first, last) = (tf.split(values, 2, -1) for values in (deltas, references))
    wh = last - first
    center = first + 0.5 * wh
    center = shift * wh + center
    half = 0.5 * tf.exp(tf.minimum(growth, BOX_SCALE_CLAMP)) * wh
    return tf.concat([center - half, center + half], -1)


def cell_anchors(sizes, ratios):
    """Anchors around the origin, float32 [len(sizes)·len(ratios), 4], sizes outermost; ratio = height / width."""
    cells = []
    for size in sizes:
        for ratio in ratios:
            w = math.sqrt(size * size / ratio)
            h = ratio * w
            cells.append([-w / 2, -h / 2, w / 2, h / 2])
    return np.asarray(cells, np.float32)


def anchors_of_level(feature_shape, stride, cells):
    """The anchors `cells` [A, 4] of one cell at every cell of a feature map of shape int32 [2] = (H, W)
    -> float32 [H·W·A, 4], shifted by stride · (x, y); stride is an int or int32 [2], vertical first."""
    height, width = tf.unstack(feature_shape)
    down, right = (stride, stride) if isinstance(stride, int) else tf.unstack(stride)
    ys = tf.reshape(tf.cast(tf.range(height) * down, tf.float32), [-1, 1, 1, 1])
    xs = tf.reshape(tf.cast(tf.range(width) * right, tf.float32), [1, -1, 1, 1])
    # Both sums add 0 to the coordinates of the other axis, which changes no bit.
    across = xs * np.float32([1, 0, 1, 0]) + cells  # [1, W, A, 4]
    return tf.reshape(ys * np.float32([0, 1, 0, 1]) + across, [-1, 4])


# ---------------------------------------------------------------------------------------------------------- RoIAlign
def pad_for_roi_align(features):
    """Replicates the border pixel once: samples up to one pixel outside read it, samples farther away read zero."""
    return tf.pad(features, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")


def roi_align(padded, boxes, image_index, spatial_scale, resolution, samples=2, aligned=True, deterministic=False):
    """RoIAlign (He et al. 2017, with the half-pixel shift of later systems).

    padded: features [N,H+2,W+2,C] of `pad_for_roi_align`; boxes [R,4] in image coordinates; image_index int32 [R].
    Each of resolution^2 bins is the mean of samples^2 bilinear samples; samples=0: the number along each axis is the
    bin's size in feature cells, rounded up. No gradient to the boxes.
    aligned=False is the original operation: pixel i's centre at coordinate i, sides of at least one feature cell.
    deterministic=True: the same, with a gradient that is computed in a fixed order on GPUs too (`_spread_samples`).
    -> [R,resolution,resolution,C] in the features' type.
    """
    # The scope and the names in it say to export_onnx.py what is computed here.
    with tf.name_scope(f"roi_align_{resolution}x{samples}"):
        boxes = detached(boxes) * spatial_scale
        first, last = tf.split(boxes, 2, 1)
        sides = last - first
        if not aligned:
            sides = tf.maximum(sides, 1.0)
        # Pixel i's centre lies at i + 0.5 in continuous coordinates and at index i + 1 of the padded map.
        shift = 0.5 if aligned else 1.0
        padded32 = tf.identity(tf.cast(padded, tf.float32), "padded")
        start = tf.identity(first + (shift - 0.5), "start")  # where pixel i covers [i, i + 1)
        sides = tf.identity(sides, "sides")
        if not for_gpu():  # identities of int32 are on the host
            image_index = tf.identity(image_index, "image_index")
        if samples == 0:
            crops = _adaptive_samples(padded32, start, sides, image_index, resolution, deterministic)
            crops.set_shape([None, resolution, resolution, padded.shape[3]])
        else:
            n = resolution * samples
            crops = _sample_grid(padded32, start, sides, image_index, [n, n], deterministic)
            if samples > 1:
                crops = tf.nn.avg_pool2d(crops, samples, samples, "VALID")
            crops.set_shape([None, resolution, resolution, None])
        return tf.cast(tf.identity(crops, "crops"), padded.dtype)


def _sample_grid(padded, start, sides, image_index, counts, deterministic=False):
    """Bilinear samples in the middle of counts = (y, x) equal cells of each RoI, ints or int32 [2]: start, sides [R,2]
    as x, y in cells of the map without padding -> [R,counts[0],counts[1],C]."""
    size = tf.cast(tf.shape(padded)[1:3], tf.float32)  # [2]
    number = np.asarray(counts[::-1], np.float32) if isinstance(counts, list) else tf.cast(counts[::-1], tf.float32)
    spacing = sides / number  # [R, 2] x, y distance of samples
    first = start + 0.5 * spacing + 0.5  # indices of the padded map
    last = first + spacing * (number - 1.0)
    # crop_and_resize takes y1 x1 y2 x2, where 0 and 1 are the centres of the first and the last pixel.
    corners = tf.concat([tf.reverse(first, [1]), tf.reverse(last, [1])], 1) / (tf.concat([size, size], 0) - 1.0)
    return _crop_and_resize(padded, corners, image_index, counts, deterministic)


def _crop_and_resize(features, corners, image_index, counts, deterministic):
    """TensorFlow's crop_and_resize of features [N,H,W,C]: corners [R,4] = y1 x1 y2 x2, where 0 and 1 are the centres of
    the first and the last cell; counts = (y, x) samples -> [R,counts[0],counts[1],C]. deterministic=True replaces its
    gradient, whose GPU kernel adds in any order; then counts are ints."""
    if not deterministic:
        return tf.image.crop_and_resize(features, corners, image_index, counts)

    @tf.custom_gradient
    def crop(features):
        def gradient(upstream):
            axes = []
            for axis in (0, 1):  # y, x; the operation's own arithmetic
                count, last = counts[axis], tf.cast(tf.shape(features)[1 + axis] - 1, tf.float32)
                first, beyond = corners[:, axis, None], corners[:, axis + 2, None]
                if count > 1:
                    spacing = (beyond - first) * last / (count - 1.0)
                    axes.append(first * last + tf.range(count, dtype=tf.float32) * spacing)  # [R, count]
                else:
                    axes.append(0.5 * (first + beyond) * last)
            points = tf.stack([tf.repeat(axes[0], counts[1], 1), tf.tile(axes[1], [1, counts[0]])], 2)  # [R, S, 2]
            return _spread_samples(
                tf.reshape(upstream, [-1, int(features.shape[3])]), tf.reshape(points, [-1, 2]),
                tf.repeat(tf.cast(image_index, tf.int64), counts[0] * counts[1]), tf.shape(features),
            )  # fmt: skip

        return tf.image.crop_and_resize(features, corners, image_index, counts), gradient

    return crop(features)


def _spread_samples(shares, points, image_index, map_shape):
    """The gradient of bilinear samples to the map that they were taken from: shares [S,C] of samples at points [S,2],
    y and x as indices of the map, in images int32 [S] -> [N,H,W,C] of map_shape int32 [4]. Samples outside the map add
    nothing. Each cell adds in a fixed order where TensorFlow's operations are deterministic."""
    low = tf.floor(points)
    inside = tf.reduce_all((points >= 0) & (points <= tf.cast(map_shape[1:3] - 1, tf.float32)), 1)  # [S]
    fraction = points - low
    # int64, because GPUs leave arithmetic on int32 to the host.
    low = tf.cast(tf.where_v2(inside[:, None], low, 0.0), tf.int64)
    high = low + tf.cast(fraction > 0, tf.int64)  # else the lower cell, with weight 0
    image_index, (_, height, width, _) = tf.cast(image_index, tf.int64), tf.unstack(tf.cast(map_shape, tf.int64))
    total = 0.0
    for y, by_y in ((low[:, 0], 1.0 - fraction[:, 0]), (high[:, 0], fraction[:, 0])):
        for x, by_x in ((low[:, 1], 1.0 - fraction[:, 1]), (high[:, 1], fraction[:, 1])):
            row = (image_index * height + y) * width + x
            row = tf.where_v2(inside, row, tf.constant(-1, tf.int64))  # the sums leave negative numbers out
            total += tf.math.unsorted_segment_sum(shares * (by_y * by_x)[:, None], row, tf.reduce_prod(map_shape[:3]))
    return tf.reshape(total, map_shape)


_ADAPTIVE_BUDGET = 1 << 16  # samples of one step of the loop: 64 MB at 256 channels


def _adaptive_samples(padded, start, sides, image_index, resolution, deterministic=False):
    """Means [R,M,M,C] over ceil(bin size) samples per axis and bin; RoIs with equal counts are pooled together.
    The gradient goes to the map alone."""
    counts = tf.cast(tf.math.ceil(sides / float(resolution)), tf.int32)  # [R, 2] x, y
    empty = tf.reduce_any(counts <= 0, 1)  # no sample, hence 0
    # Samples that far outside are 0 in any case; the limit keeps a diverged box from taking unlimited memory.
    counts = tf.clip_by_value(counts, 1, 1 << 12)

    @tf.custom_gradient
    def pooled(padded):
        def gradient(upstream):
            upstream = tf.where_v2(empty[:, None, None, None], 0.0, upstream)
            return _adaptive_gradient(upstream, tf.shape(padded), start, sides, image_index, counts, deterministic)

        return _adaptive_means(padded, start, sides, image_index, counts, empty, resolution), gradient

    return pooled(padded)


def _adaptive_means(padded, start, sides, image_index, counts, empty, m):
    """The values of `_adaptive_samples` for counts int32 [R,2] of samples (x, y), and 0 where `empty` [R]."""
    channels = padded.shape[3]
    key = counts[:, 1] * (1 << 13) + counts[:, 0]
    order = tf.argsort(key, stable=True)
    start, sides, image_index, counts, key, empty = (
        tf.gather(v, order) for v in (start, sides, image_index, counts, key, empty)
    )
    total = tf.shape(key)[0]

    def pool_some(position, pooled):
        per_bin = counts[position, ::-1]  # [2] y, x
        alike = tf.reduce_sum(tf.cast(tf.equal(key, key[position]), tf.int32))
        alike -= tf.reduce_sum(tf.cast(tf.equal(key[:position], key[position]), tf.int32))
        end = position + tf.minimum(alike, tf.maximum(1, _ADAPTIVE_BUDGET // (m * m * per_bin[0] * per_bin[1])))
        rows = slice(position, end)
        crops = _sample_grid(padded, start[rows], sides[rows], image_index[rows], per_bin * m)
        crops = tf.reshape(crops, [end - position, m, per_bin[0], m, per_bin[1], int(channels)])
        return end, tf.concat([pooled, tf.reduce_mean(crops, [2, 4])], 0)

    _, pooled = tf.while_loop(
        lambda position, _: position < total,
        pool_some,
        [0, tf.zeros([0, m, m, int(channels)])],
        shape_invariants=[tf.TensorShape([]), tf.TensorShape([None, m, m, int(channels)])],
        back_prop=False,
    )
    pooled = tf.where_v2(empty[:, None, None, None], 0.0, pooled)
    return tf.gather(pooled, tf.math.invert_permutation(order))


def _adaptive_gradient(upstream, map_shape, start, sides, image_index, counts, deterministic=False):
    """The gradient [N,H+2,W+2,C] of `_adaptive_means` for the upstream one [R,M,M,C].

    Each sample's share is spread over the four cells around it. Bins are taken some at a time, as many as the budget
    of samples allows.
    """
    m = int(upstream.shape[1])
    size = tf.cast(map_shape[1:3], tf.float32)
    rows = tf.shape(start)[0]
    per_bin = counts[:, 0] * counts[:, 1]  # [R]
    bins = rows * m * m
    # Bins in the order RoI, y, x; those with similar positions in the running sum of samples form a step.
    samples_before = tf.cumsum(tf.repeat(tf.cast(per_bin, tf.int64), m * m))

    def spread_some(position, total):
        done = tf.where_v2(position > 0, samples_before[tf.maximum(position - 1, 0)], tf.constant(0, tf.int64))
        reach = tf.cast(tf.searchsorted(samples_before, [done + _ADAPTIVE_BUDGET], side="right")[0], tf.int32)
        end = tf.minimum(tf.maximum(reach, position + 1), bins)
        here = tf.range(position, end)  # [B] bins
        number = tf.gather(per_bin, here // (m * m))
        of = tf.repeat(here, number)  # [S] the bin of each sample
        inside = tf.range(tf.size(of)) - tf.repeat(tf.cumsum(number, exclusive=True), number)  # its number in the bin
        roi, y, x = of // (m * m), of // m % m, of % m
        count = tf.gather(counts, roi)  # [S, 2] x, y
        cell = tf.stack([x * count[:, 0] + inside % count[:, 0], y * count[:, 1] + inside // count[:, 0]], 1)
        spacing = tf.gather(sides, roi) / tf.cast(count * m, tf.float32)
        point = tf.gather(start, roi) + (tf.cast(cell, tf.float32) + 0.5) * spacing + 0.5  # indices of the padded map
        share = tf.gather_nd(upstream, tf.stack([roi, y, x], 1))  # [S, C]
        share /= tf.cast(count[:, :1] * count[:, 1:], tf.float32)
        if deterministic:
            return end, total + _spread_samples(share, point[:, ::-1], tf.gather(image_index, roi), map_shape)
        point = point[:, ::-1] / (size - 1.0)
        spread = tf.raw_ops.CropAndResizeGradImage(
            grads=share[:, None, None], boxes=tf.concat([point, point], 1), box_ind=tf.gather(image_index, roi),
            image_size=map_shape, T=tf.float32,
        )  # fmt: skip
        return end, total + spread

    initial = tf.zeros(map_shape)
    _, total = tf.while_loop(
        lambda position, _: position < bins, spread_some, [0, initial], parallel_iterations=1, back_prop=False,
        shape_invariants=[tf.TensorShape([]), initial.shape],
    )  # fmt: skip
    return total


# ------------------------------------------------------------------------------------------------ older RoI features
def roi_crop_and_resize(features, boxes, image_index, spatial_scale, resolution, samples=2, deterministic=False):
    """TensorFlow's crop_and_resize and max pooling, as in detectors written in TensorFlow before RoIAlign.

    features [N,H,W,C]; boxes [R,4] in image coordinates; image_index int32 [R]. (resolution · samples)^2 bilinear
    samples lie on a grid that includes the box's edges; coordinate i·stride is the centre of the map's cell i. Samples
    outside the map are 0. The maximum of each samples^2 is taken. No gradient to the boxes. deterministic: as in
    `roi_align`. -> [R,resolution,resolution,C] in the features' type.
    """
    count = tf.shape(boxes)[0]
    # oneDNN's max_pool2d aborts the process when there are no RoIs (TensorFlow 2.21).
    missing = tf.cast(tf.equal(count, 0), tf.int32)
    corners = tf.pad(tf.stop_gradient(boxes)[:, ::-1] * spatial_scale, [[0, missing], [0, 0]])  # y2 x2 y1 x1
    image_index = tf.pad(image_index, [[0, missing]])
    last = tf.maximum(tf.cast(tf.shape(features)[1:3], tf.float32) - 1.0, 1.0)  # [2]
    corners = tf.concat([corners[:, 2:] / last, corners[:, :2] / last], 1)
    counts = [resolution * samples] * 2
    crops = _crop_and_resize(tf.cast(features, tf.float32), corners, image_index, counts, deterministic)
    if samples > 1:
        crops = tf.nn.max_pool2d(crops, samples, samples, "VALID")
    return tf.cast(crops[:count], features.dtype)


_POOL_BUDGET = 1 << 25  # map values gathered in one step of the loops: 128 MB


def roi_pool(features, boxes, image_index, spatial_scale, resolution):
    """RoI max pooling (Girshick 2015, Fast R-CNN, section 2.1).

    features [N,H,W,C]; boxes [R,4] in image coordinates; image_index int32 [R]. A box's scaled corners are rounded to
    the indices of its first and last cell (at least one cell). Edges of the resolution^2 bins are rounded outwards;
    each bin is the maximum over its cells inside the map, or 0 without cells. The gradient goes to the largest cell, in
    equal parts to ties; no gradient to the boxes. -> [R,resolution,resolution,C] in the features' type.
    """
    with tf.name_scope(f"roi_pool_{resolution}"):  # as in `roi_align`
        wide = tf.identity(tf.cast(features, tf.float32), "features")
        boxes = tf.identity(tf.stop_gradient(boxes) * spatial_scale, "boxes")
        if not for_gpu():
            image_index = tf.identity(image_index, "image_index")
        bins = _pooling_bins(boxes, image_index, tf.shape(wide), resolution)
        cells = tf.reshape(wide, [-1, int(features.shape[3])])  # [N·H·W, C]
        pooled = tf.reshape(_max_over_bins(cells, *bins), [-1, resolution, resolution, int(features.shape[3])])
        return tf.cast(tf.identity(pooled, "crops"), features.dtype)


def _pooling_bins(boxes, image_index, map_shape, m):
    """boxes [R,4] in cells of the map -> of each of R·M·M bins: its first cell's row in [N·H·W, C], its width, its
    number of cells (0 if empty), and the rows from one line of the map to the next, all int32."""
    whole = tf.floor(tf.abs(boxes))
    rounded = tf.sign(boxes) * (whole + tf.cast(tf.abs(boxes) - whole >= 0.5, tf.float32))  # halves away from zero
    rounded = tf.cast(tf.clip_by_value(rounded, -1e6, 1e6), tf.int32)
    sides = tf.maximum(rounded[:, 2:] - rounded[:, :2] + 1, 1)[:, :, None]  # [R, 2, 1] x, y
    steps = tf.range(m)
    size = map_shape[2:0:-1, None]  # width, height
    first = tf.clip_by_value(rounded[:, :2, None] + sides * steps // m, 0, size)  # [R, 2, M]
    beyond = tf.clip_by_value(rounded[:, :2, None] + (sides * (steps + 1) + (m - 1)) // m, 0, size)
    extent = tf.maximum(beyond - first, 0)
    corner = (image_index[:, None] * size[1] + first[:, 1]) * size[0]  # [R, M]
    corner = corner[:, :, None] + first[:, 0, None, :]  # [R, M, M]
    width = tf.broadcast_to(extent[:, 0, None, :], tf.shape(corner))
    count = extent[:, 1, :, None] * width
    return (*(tf.reshape(v, [-1]) for v in (corner, width, count)), size[0, 0])


def _cells_of_bins(start, ends, corner, width, count, stride, channels):
    """The bins from number `start` on whose cells fit the budget -> number of the next bin; and for all cells of these
    bins, bin after bin, the bin's number minus `start` and the cell's row in [N·H·W, C]."""
    before = ends[start] - count[start]
    end = tf.searchsorted(ends, [before + max(1, _POOL_BUDGET // channels)], "right")[0]
    end = tf.maximum(end, start + 1)
    own_ends = ends[start:end] - before
    cell = tf.range(own_ends[-1])  # [T]
    owner = tf.searchsorted(own_ends, cell, "right")
    number = cell - tf.gather(own_ends - count[start:end], owner)  # within its bin
    own_width = tf.gather(width[start:end], owner)
    row = tf.gather(corner[start:end], owner) + number // own_width * stride + number % own_width
    return end, owner, row


@tf.custom_gradient
def _max_over_bins(cells, corner, width, count, stride):
    """cells float32 [N·H·W, C] and bins of `_pooling_bins` -> [B, C]. All bins together may have many times the map's
    cells, so they are gathered piece by piece, and again for the gradient."""
    channels = int(cells.shape[1])
    ends = tf.cumsum(count)
    total = tf.size(count)

    def pool_some(start, pooled):
        end, owner, row = _cells_of_bins(start, ends, corner, width, count, stride, channels)
        some = tf.math.unsorted_segment_max(tf.gather(cells, row), owner, end - start)
        some = tf.where_v2(count[start:end, None] > 0, some, 0.0)
        return end, tf.concat([pooled, some], 0)

    def loop(body, initial, shape):
        shapes = [tf.TensorShape([]), tf.TensorShape(shape)]
        return tf.while_loop(lambda start, _: start < total, body, [0, initial], shapes, 1, back_prop=False)[1]

    pooled = loop(pool_some, tf.zeros([0, channels]), [None, channels])

    def gradient(by_pooled):
        def add_some(start, by_cells):
            end, owner, row = _cells_of_bins(start, ends, corner, width, count, stride, channels)
            largest = tf.cast(tf.equal(tf.gather(cells, row), tf.gather(pooled[start:end], owner)), tf.float32)
            ties = tf.math.unsorted_segment_sum(largest, owner, end - start)
            share = tf.math.divide_no_nan(by_pooled[start:end], ties)
            return end, by_cells + tf.math.unsorted_segment_sum(
                largest * tf.gather(share, owner), row, tf.shape(cells)[0]
            )

        return loop(add_some, tf.zeros_like(cells), [None, channels]), None, None, None, None

    return pooled, gradient


# ------------------------------------------------------------------------------------------------- levels of a pyramid
def fpn_level_of(boxes, num_levels):
    """Level index 0..num_levels-1 (0 = P2) int32 [R] of boxes [R,4]: FPN eq. 1, k0 = 4 at 224 pixels."""
    level = tf.floor(4.0 + tf.math.log(tf.sqrt(area(boxes)) / 224.0 + 1e-8) * (1.0 / math.log(2.0)))
    return tf.cast(tf.clip_by_value(level, 2.0, 1.0 + num_levels) - 2.0, tf.int32)


def pool_from_levels(levels, strides, boxes, image_index, pool, to_last_pixel=False):
    """RoI features from the pyramid level that FPN's eq. 1 assigns to each box.

    levels: P2… as [N,H,W,C] each (or padded, as `pool` wants them); boxes [R,4]; image_index [R];
    pool(level, boxes, image_index, spatial_scale) -> [R,M,M,C] is one of the operations above. -> [R,M,M,C].
    to_last_pixel pools x1 y1 x2-1 y2-1, like systems in which x2, y2 are the indices of the last pixel.
    """
    level = fpn_level_of(boxes, len(levels))
    if to_last_pixel:
        boxes -= tf.constant([0.0, 0.0, 1.0, 1.0])
    if len(levels) == 1:
        return pool(levels[0], boxes, image_index, 1.0 / strides[0])
    if for_gpu():
        return _pool_sorted(levels, strides, boxes, image_index, level, pool)
    rows, pooled = [], []
    for index, (features, stride) in enumerate(zip(levels, strides)):
        row = tf.where(tf.equal(level, index))[:, 0]
        rows.append(row)
        pooled.append(pool(features, tf.gather(boxes, row), tf.gather(image_index, row), 1.0 / stride))
    order = tf.math.invert_permutation(tf.cast(tf.concat(rows, 0), tf.int32))
    return tf.gather(tf.concat(pooled, 0), order)


def _pool_sorted(levels, strides, boxes, image_index, level, pool):
    """`pool_from_levels` for boxes of known level [R]: the host waits once, for the number of boxes of each level."""
    level = tf.cast(level, tf.float32)  # GPUs leave arithmetic on int32 to the host
    order = tf.argsort(level, stable=True)
    counts = tf.reduce_sum(tf.cast(tf.equal(level[:, None], np.arange(len(levels), dtype=np.float32)), tf.float32), 0)
    rows = tf.gather(tf.concat([boxes, tf.cast(image_index, tf.float32)[:, None]], 1), order)  # [R, 5]
    pooled = [
        pool(features, some[:, :4], tf.cast(some[:, 4], tf.int32), 1.0 / stride)
        for features, some, stride in zip(levels, tf.split(rows, tf.cast(counts, tf.int32), num=len(levels)), strides)
    ]
    back = tf.argsort(tf.cast(order, tf.float32))

    @tf.custom_gradient
    def put_back(x):  # TensorFlow's gradient of a gather does not know that each row goes to one place
        return tf.gather(x, back), lambda dy: tf.gather(dy, order)

    return put_back(tf.concat(pooled, 0))


# -------------------------------------------------------------------------------------------------------------- NMS
def first_of(count, places):
    """bool [N,places], true in the first `count` [N] of the places. Compared as float32, since GPUs leave arithmetic
    on int32 to the host."""
    return tf.cast(tf.range(places), tf.float32) < tf.cast(count, tf.float32)[:, None]


def batched_nms(boxes, scores, iou_threshold, max_outputs):
    """Greedy NMS of B independent problems in one op.

    boxes [B,K,4]; scores [B,K], -inf marks absent boxes; a box is suppressed by a better one of IoU > iou_threshold.
    -> boxes [B,T,4], scores [B,T] (decreasing, 0 from count on), count int32 [B]; T = max_outputs.

    The operation sees ranks, not scores: TensorFlow's CPU kernel returns empty boxes of score -1 in the place of
    suppressed ones, before all boxes whose scores are below -1 (TensorFlow 2.21).
    """
    boxes, scores = tf.stop_gradient(boxes), tf.stop_gradient(scores)
    size = tf.shape(scores)[1]
    scores, order = tf.nn.top_k(scores, size)
    boxes = tf.gather(boxes, order, batch_dims=1)
    if for_gpu():
        index, count = nms_in_blocks(boxes, tf.math.is_finite(scores), None, iou_threshold, max_outputs)
        present = first_of(count, max_outputs)
        out_boxes = tf.where_v2(present[..., None], tf.gather(boxes, index, batch_dims=1), 0.0)
        return out_boxes, tf.where_v2(present, tf.gather(scores, index, batch_dims=1), 0.0), count
    rank = tf.range(size)
    points = tf.where_v2(tf.math.is_finite(scores), tf.cast(size - rank, tf.float32), 0.0)  # K, K - 1, … 1; 0: absent
    out_boxes, out_points, _, count = tf.image.combined_non_max_suppression(
        boxes[:, :, None, :], points[:, :, None], max_outputs, max_outputs, iou_threshold, score_threshold=0.5,
        clip_boxes=False,
    )  # fmt: skip
    place = tf.clip_by_value(size - tf.cast(out_points, tf.int32), 0, size - 1)
    out_scores = tf.gather(scores, place, batch_dims=1)
    return out_boxes, tf.where_v2(first_of(count, max_outputs), out_scores, 0.0), count


_NMS_BLOCK = 1024  # boxes that are compared with each other at once: 4 MB for each float of a pair, per problem


def nms_in_blocks(boxes, present, groups, iou_threshold, max_outputs):
    """Greedy NMS of B independent problems by operations that GPUs have.

    boxes [B,K,4] by decreasing score; present bool [B,K]; groups [B,K]: only boxes of one group suppress each other,
    None makes all of a problem one -> index int32 [B,T] of kept boxes in K, in order, 0 from count int32 [B] on;
    T = max_outputs.

    Boxes are taken in blocks, until T are kept. A block's boxes are compared with those kept before and with each
    other. Within it, a box stays unless a better one that stays overlaps it: starting from all, this is computed again
    until nothing changes. The first p boxes are right after p rounds at the latest; a handful of rounds is usual.
    """
    problems, total = tf.shape(boxes)[0], tf.shape(boxes)[1]
    places = tf.range(max_outputs, dtype=tf.float32)
    present = tf.cast(present, tf.float32)
    # All of the state is float32: on GPUs, operations on int32 and loops' bool variables are kept in host memory.
    groups = None if groups is None else tf.cast(groups, tf.float32)

    def overlaps(a, b, groups_a, groups_b):  # [B, M, 4], [B, M', 4] -> float32 [B, M, M']
        suppress = pairwise_iou(a, b) > iou_threshold
        if groups is not None:
            suppress = tf.logical_and(suppress, tf.equal(groups_a[:, :, None], groups_b[:, None]))
        return tf.cast(suppress, tf.float32)

    def free_of(kept, overlap):  # [B, M], [B, M, M'] -> float32 [B, M']: 1 where no kept box overlaps
        return tf.cast(tf.matmul(kept[:, None], overlap)[:, 0] < 0.5, tf.float32)

    def take_block(start, kept, count):  # kept [B, T] indices of the first boxes kept, `count` [B, 1] of them
        end = tf.minimum(start + _NMS_BLOCK, total)
        index = tf.cast(kept, tf.int32)
        block, own = boxes[:, start:end], None if groups is None else groups[:, start:end]
        former = None if groups is None else tf.gather(groups, index, batch_dims=1)
        taken = tf.cast(places < count, tf.float32)  # [B, T]
        left = present[:, start:end] * free_of(
            taken, overlaps(tf.gather(boxes, index, batch_dims=1), block, former, own)
        )
        order = tf.cast(tf.range(end - start), tf.float32)
        better = tf.cast(order[:, None] < order, tf.float32)  # [M, M]
        within = overlaps(block, block, own, own) * better

        def again(stays, _):
            now = left * free_of(stays, within)
            return now, tf.reduce_max(tf.abs(now - stays))

        stays, _ = tf.while_loop(lambda _, change: change > 0, again, [left, tf.ones([])], back_prop=False)
        indices = tf.concat([kept, tf.tile(tf.cast(start, tf.float32) + order[None], [problems, 1])], 1)
        _, first = tf.nn.top_k(tf.concat([taken, stays], 1), max_outputs)  # of equal ones the first
        kept = tf.gather(indices, first, batch_dims=1)
        count = tf.minimum(count + tf.reduce_sum(stays, 1, keepdims=True), float(max_outputs))
        return end, kept, count

    _, kept, count = tf.while_loop(
        lambda start, _, count: tf.logical_and(start < total, tf.reduce_min(count) < max_outputs),
        take_block,
        [0, tf.zeros([problems, max_outputs]), tf.zeros([problems, 1])],
        [tf.TensorShape([]), tf.TensorShape([None, max_outputs]), tf.TensorShape([None, 1])],
        parallel_iterations=1,
        back_prop=False,
    )
    return tf.cast(tf.where_v2(places < count, kept, 0.0), tf.int32), tf.cast(count[:, 0], tf.int32)


_TOP_K_PART = 4096


def long_top_k(values, k):
    """tf.nn.top_k of long rows [N,A] for k <= A -> values [N,k], index int32 [N,k]; of equal values the first.

    A GPU sorts each row with one of its many processors. There, rows are cut into parts, and the best of a row are
    found among the best of its parts: the same in the same order.
    """
    if not for_gpu():
        return tf.nn.top_k(values, k)
    shape = tf.shape(values)
    parts = -(-shape[1] // _TOP_K_PART)
    padded = tf.pad(values, [[0, 0], [0, parts * _TOP_K_PART - shape[1]]], constant_values=float("-inf"))
    best, index = tf.nn.top_k(tf.reshape(padded, [-1, _TOP_K_PART]), tf.minimum(k, _TOP_K_PART))
    # int64, because GPUs leave arithmetic on int32 to the host.
    first = tf.tile(tf.range(tf.cast(parts, tf.int64)) * _TOP_K_PART, [shape[0]])  # [N · parts]
    index = tf.reshape(tf.cast(index, tf.int64) + first[:, None], [shape[0], -1])
    best, place = tf.nn.top_k(tf.reshape(best, [shape[0], -1]), k)
    return best, tf.cast(tf.gather(index, place, batch_dims=1), tf.int32)


def greedy_nms(boxes, scores, groups, rescore, max_outputs, min_score):
    """Takes the best box, lowers the scores of those that overlap it, and again: soft-NMS (Bodla et al. 2017, fig. 2).

    boxes [N,K,4]; scores [N,K] >= 0; groups int32 [N,K]: only boxes of one group lower each other's scores, None makes
    all of an image one; rescore(iou [N,K]) -> factors [N,K] in [0, 1]; boxes of scores > min_score >= 0 are taken
    -> index int32 [N,T] into K, and lowered scores [N,T], decreasing; both are 0 from count int32 [N] on; T =
    max_outputs. Each group's result is the same as if it were computed alone.
    """
    boxes, scores = tf.stop_gradient(boxes), tf.stop_gradient(scores)
    num_images, num_boxes = tf.shape(scores)[0], tf.shape(scores)[1]

    def any_left(left, index, taken):
        return tf.logical_and(tf.shape(index)[1] < max_outputs, tf.reduce_any(left > min_score))

    def take_best(left, index, taken):
        best = tf.argmax(left, 1, output_type=tf.int32)[:, None]  # [N, 1]
        factors = rescore(pairwise_iou(tf.gather(boxes, best, batch_dims=1), boxes)[:, 0])  # [N, K]
        if groups is not None:
            factors = tf.where_v2(tf.equal(tf.gather(groups, best, batch_dims=1), groups), factors, 1.0)
        is_best = tf.equal(tf.range(num_boxes), best)
        score = tf.gather(left, best, batch_dims=1)
        return tf.where_v2(is_best, 0.0, left * factors), tf.concat([index, best], 1), tf.concat([taken, score], 1)

    none = [num_images, 0]
    growing = tf.TensorShape([None, None])
    _, index, taken = tf.while_loop(
        any_left,
        take_best,
        [scores, tf.zeros(none, tf.int32), tf.zeros(none)],
        shape_invariants=[growing] * 3,
        back_prop=False,
    )
    present = taken > min_score
    rest = [[0, 0], [0, max_outputs - tf.shape(index)[1]]]
    index = tf.pad(tf.where_v2(present, index, 0), rest)
    taken = tf.pad(tf.where_v2(present, taken, 0.0), rest)
    index.set_shape([None, max_outputs])
    taken.set_shape([None, max_outputs])
    return index, taken, tf.reduce_sum(tf.cast(present, tf.int32), 1)


# ------------------------------------------------------------------------------------------------------ mask targets
_EDGE_BUDGET = 1 << 22  # columns of edges that are rasterised together: 16 MB for each float of a column


def rasterize_edges(edges, boxes, resolution):
    """Binary masks of polygons inside boxes, pixel for pixel those of COCO's rasteriser.

    COCO's rasteriser works on a grid five times as fine: vertices are rounded to grid points and edges become digital
    lines. In a pixel column, the mask changes at the first pixel whose centre is below the lower of the line's two
    points at the column's centre.

    edges [R,E,4]: directed outline edges x1 y1 x2 y2 of one instance each; zero-length edges are padding, and vertical
    edges change nothing and may be left out. boxes [R,4]. A pixel is inside where the winding number is not zero, so
    overlapping parts unite and opposite rings cut holes. No gradients. -> float32 [R,resolution,resolution].
    """
    total = tf.shape(edges)[0]
    size = tf.maximum(_EDGE_BUDGET // tf.maximum(tf.shape(edges)[1] * resolution, 1), 1)

    def rasterize_some(start, masks):
        end = tf.minimum(start + size, total)
        some = _rasterize_block(edges[start:end], boxes[start:end], resolution)
        return end, tf.concat([masks, some], 0)

    return tf.while_loop(
        lambda start, _: start < total,
        rasterize_some,
        [0, tf.zeros([0, resolution, resolution])],
        [tf.TensorShape([]), tf.TensorShape([None, resolution, resolution])],
        parallel_iterations=1,
        back_prop=False,
    )[1]


def _rasterize_block(edges, boxes, m):
    """`rasterize_edges` for a number of RoIs whose edges' columns fit into memory."""
    # Round exact halves up despite float32 error: the offset is far below the distance of any other value from a half.
    nudge = 1e-4
    size = tf.maximum(boxes[:, 2:] - boxes[:, :2], 0.1)
    corner = tf.concat([boxes[:, :2]] * 2, 1)[:, None, :]
    scale = (5.0 * m / tf.concat([size, size], 1))[:, None, :]
    fine = (edges - corner) * scale + 0.5
    fine = tf.where_v2(fine < 0, tf.math.ceil(fine), tf.floor(fine))  # C's conversion to int drops the fraction
    x1, y1, x2, y2 = tf.unstack(fine, axis=-1)  # [R, E] each
    dx, dy = x2 - x1, y2 - y1
    wide = tf.abs(dx) >= tf.abs(dy)
    centre = 5.0 * tf.range(m, dtype=tf.float32) + 2.5  # between the fine columns 2 and 3 of each pixel's five
    x1, x2, rise = (v[..., None] for v in (x1, x2, dy))
    right = tf.logical_and(x1 < centre, centre < x2)  # [R, E, M]
    left = tf.logical_and(x2 < centre, centre < x1)
    direction = tf.cast(right, tf.float32) - tf.cast(left, tf.float32)
    # One fine row for each fine column: the rows at columns centre - 0.5 and centre + 0.5.
    safe_dx = tf.where_v2(tf.equal(dx, 0.0), 1.0, dx)
    at_centre = y1[..., None] + rise * (centre - x1) / safe_dx[..., None]
    half = 0.5 * tf.abs(dy / safe_dx)[..., None]
    row_wide = tf.floor(at_centre - half + (0.5 + nudge))
    # One fine column for each fine row: the last row before the column passes the centre.
    falling = (dx * dy > 0)[..., None]
    row_steep = tf.where_v2(falling, tf.math.ceil(at_centre - nudge) - 1.0, tf.floor(at_centre + nudge))
    row = tf.where_v2(wide[..., None], row_wide, row_steep)
    # int64, because GPUs leave arithmetic on int32 to the host.
    first = tf.cast(tf.clip_by_value(tf.floor((row + 2.1) * 0.2), 0.0, float(m)), tf.int64)  # [R, E, M]
    rows = tf.shape(direction, out_type=tf.int64)[0]
    base = (tf.range(rows)[:, None, None] * (m + 1) + first) * m + tf.range(m, dtype=tf.int64)
    steps = tf.math.unsorted_segment_sum(direction, base, rows * ((m + 1) * m))
    winding = tf.cumsum(tf.reshape(steps, [-1, m + 1, m])[:, :m], axis=1)
    return tf.cast(tf.abs(winding) > 0.5, tf.float32)
