"""The graph of an exported model: from images in the size of their files to detections in their frame.

The same arithmetic as `data.py` and `detections.py` do in Python, in TensorFlow's operations: OpenCV's resize to the
bit, padding, the inference graph, boxes and keypoints back in the frame of the file, masks pasted into it.
"""

from typing import Any

import numpy as np

from config import Config
from model_rcnn import build_inference
from utils.tf_v1 import graphs_for_gpu, tf

__all__ = ["decode_files", "detect", "paste_masks", "paste_rows", "place_images", "resize_bilinear", "resized_size"]

_WEIGHT_BITS = 11  # OpenCV's weights are multiples of 1/2048


# ------------------------------------------------------------------------------------------------------------- images
def resized_size(size: Any, cfg: Config) -> Any:
    """int32 [..., 2] height and width of a file -> those that the network sees; `augment.resized_shape`, in float64."""
    size = tf.cast(size, tf.float64)
    short, longest = cfg.PREPROC.TEST_SHORT_EDGE_SIZE, cfg.PREPROC.MAX_SIZE
    scale = tf.minimum(
        short / tf.reduce_min(size, -1, keepdims=True), longest / tf.reduce_max(size, -1, keepdims=True)
    )  # fmt: skip
    return tf.maximum(tf.cast(size * scale + 0.5, tf.int32), 1)


def _taps(source: Any, target: Any, stop_at_border: bool) -> tuple[Any, Any, Any, Any]:
    """The two source cells of each of `target` cells along an axis, and their weights times 2048: int32 [target] each.

    OpenCV gives the border's cell the whole weight along a row. Along a column it clips the two cells instead, so that
    both are the border's; the sum of their rounded products differs by 1 in some cases."""
    scale = 1.0 / (tf.cast(target, tf.float64) / tf.cast(source, tf.float64))
    position = tf.cast((tf.cast(tf.range(target), tf.float64) + 0.5) * scale - 0.5, tf.float32)
    first = tf.floor(position)
    share = position - first
    first = tf.cast(first, tf.int32)
    if stop_at_border:
        share = tf.where_v2(tf.logical_or(first < 0, first >= source - 1), 0.0, share)
    one = float(1 << _WEIGHT_BITS)
    weights = [tf.cast(tf.round(w * one), tf.int32) for w in (1.0 - share, share)]
    return tf.clip_by_value(first, 0, source - 1), tf.clip_by_value(first + 1, 0, source - 1), *weights


def resize_bilinear(image: Any, size: Any) -> Any:
    """uint8 [N,H,W,C] -> uint8 [N,h,w,C], size int32 [2] = h, w: equal to cv2.resize with INTER_LINEAR in every pixel.

    OpenCV computes with integers: rows first, with weights rounded to 1/2048, then columns, with products cut to
    multiples of 4 before they are added."""
    shape = tf.shape(image)
    left, right, a, b = _taps(shape[2], size[1], stop_at_border=True)
    top, bottom, c, d = _taps(shape[1], size[0], stop_at_border=False)
    a, b = a[:, None], b[:, None]  # [w, 1]
    c, d = c[:, None, None], d[:, None, None]  # [h, 1, 1]
    wide = (
        tf.cast(tf.gather(image, left, axis=2), tf.int32) * a + tf.cast(tf.gather(image, right, axis=2), tf.int32) * b
    )
    wide = tf.bitwise.right_shift(wide, 4)  # [N, H, w, C]
    above = tf.bitwise.right_shift(tf.gather(wide, top, axis=1) * c, 16)
    below = tf.bitwise.right_shift(tf.gather(wide, bottom, axis=1) * d, 16)
    return tf.cast(tf.bitwise.right_shift(above + below + 2, 2), tf.uint8)


def place_images(images: Any, cfg: Config) -> tuple[Any, Any, Any]:
    """RGB images uint8 [N,H,W,3] of one size -> the batch that the network sees: BGR uint8 [N,h,w,3] padded at the
    bottom and right, its valid sizes int32 [N,2], and the files' sizes int32 [N,2]."""
    shape = tf.shape(images)
    size = resized_size(shape[1:3], cfg)
    batch = resize_bilinear(images[..., ::-1], size)
    rest = (-size) % (cfg.FPN.ANCHOR_STRIDES[3] if cfg.MODE_FPN else 1)
    batch = tf.pad(batch, [[0, 0], [0, rest[0]], [0, rest[1]], [0, 0]])
    batch.set_shape([None, None, None, 3])
    return batch, tf.tile(size[None], [shape[0], 1]), tf.tile(shape[None, 1:3], [shape[0], 1])


def decode_files(files: Any, cfg: Config) -> tuple[Any, Any, Any]:
    """Contents of JPEG or PNG files, string [N], which may differ in size -> as `place_images`.

    Files are decoded twice, first for their sizes: a loop's results must have one shape."""

    def decode(content: Any) -> Any:
        is_jpeg = tf.equal(tf.strings.substr(content, 0, 2), b"\xff\xd8")
        pixels = tf.cond(
            is_jpeg,
            lambda: tf.io.decode_jpeg(content, 3, dct_method="INTEGER_ACCURATE"),
            lambda: tf.io.decode_png(content, 3),
        )
        pixels.set_shape([None, None, 3])
        return pixels

    original = tf.map_fn(lambda c: tf.shape(decode(c))[:2], files, tf.int32)  # [N, 2]
    sizes = resized_size(original, cfg)
    stride = cfg.FPN.ANCHOR_STRIDES[3] if cfg.MODE_FPN else 1
    largest = tf.reduce_max(sizes, 0)
    largest += (-largest) % stride

    def place(inputs: tuple[Any, Any]) -> Any:
        content, size = inputs
        pixels = resize_bilinear(decode(content)[None, ..., ::-1], size)[0]
        rest = largest - size
        return tf.pad(pixels, [[0, rest[0]], [0, rest[1]], [0, 0]])

    batch = tf.map_fn(place, (files, sizes), tf.uint8)
    batch.set_shape([None, None, None, 3])
    return batch, sizes, original


# ---------------------------------------------------------------------------------------------------------- detections
def detect(batch: Any, sizes: Any, original: Any, cfg: Config) -> dict[str, Any]:
    """The results of `place_images` or `decode_files` -> detections in the frame of the files, best first:

    boxes float32 [N,D,4] (x1 y1 x2 y2), scores float32 [N,D], classes int32 [N,D] (1 to C), count int32 [N]; with masks
    box_masks float32 [N,D,M,M], probabilities over the box; with keypoints float32 [N,D,K,3] (x y score). Rows from
    count on are 0. Boxes without area in the file's frame are dropped, as `detections.to_original_frame` does."""
    with graphs_for_gpu(False):  # the file is for any machine
        outputs = build_inference(batch, sizes, cfg)
    limit = tf.cast(original, tf.float32)[:, None, ::-1]  # [N, 1, 2] width, height
    scale = limit / tf.cast(sizes, tf.float32)[:, None, ::-1]
    boxes = tf.clip_by_value(outputs["boxes"] * tf.concat([scale] * 2, 2), 0.0, tf.concat([limit] * 2, 2))
    present = tf.logical_and(outputs["labels"] > 0, tf.reduce_all(boxes[..., 2:] > boxes[..., :2], -1))
    found = {"boxes": boxes, "scores": outputs["scores"], "classes": outputs["labels"]}
    if "masks" in outputs:
        found["box_masks"] = outputs["masks"]
    if "keypoints" in outputs:
        points = outputs["keypoints"]
        found["keypoints"] = tf.concat([points[..., :2] * scale[:, :, None], points[..., 2:]], -1)
    # Rows that are kept come first, in their order.
    kept, order = tf.nn.top_k(tf.cast(present, tf.int32), tf.shape(present)[1])

    def arrange(values: Any) -> Any:
        zero = tf.zeros([], values.dtype)
        mask = tf.reshape(kept > 0, tf.concat([tf.shape(kept), [1] * (values.shape.ndims - 2)], 0))
        return tf.where_v2(mask, tf.gather(values, order, batch_dims=1), zero)

    return {key: arrange(values) for key, values in found.items()} | {"count": tf.reduce_sum(kept, 1)}


def _hat_weights(start: Any, end: Any, pixels: int | Any, cells: int) -> Any:
    """Bilinear weights [F,pixels,cells+2] of the cells of a mask, between two rims of zeros, at the centres of pixels;
    start, end [F]: where the box's first cell begins and its last one ends, in pixels."""
    centre = tf.cast(tf.range(pixels), tf.float32) + 0.5
    cell = (end - start) / float(cells)
    position = (centre[None] - start[:, None]) / cell[:, None] + 0.5
    position = tf.clip_by_value(position, 0.0, cells + 1.0)
    return tf.maximum(1.0 - tf.abs(position[:, :, None] - np.arange(cells + 2, dtype=np.float32)), 0.0)


def paste_rows(masks: Any, boxes: Any, size: Any, threshold: float = 0.5) -> Any:
    """Probabilities [F,M,M] over boxes [F,4] -> uint8 [F,H,W], 1 inside, size int32 [2] = H, W; the bilinear rule of
    `detections.paste_masks`. Boxes without area give no mask."""
    cells = int(masks.shape[1])
    present = tf.logical_and(boxes[:, 2] > boxes[:, 0], boxes[:, 3] > boxes[:, 1])  # [F]
    boxes = tf.where_v2(present[:, None], boxes, tf.constant([0.0, 0.0, 1.0, 1.0]))
    rimmed = tf.pad(masks, [[0, 0], [1, 1], [1, 1]])  # [F, M+2, M+2]
    down = _hat_weights(boxes[:, 1], boxes[:, 3], size[0], cells)  # [F, H, M+2]
    across = _hat_weights(boxes[:, 0], boxes[:, 2], size[1], cells)  # [F, W, M+2]
    values = tf.matmul(down, tf.matmul(rimmed, across, transpose_b=True))  # [F, H, W]
    return tf.cast(tf.logical_and(values >= threshold, present[:, None, None]), tf.uint8)


def paste_masks(found: dict[str, Any], original: Any) -> Any:
    """The results of `detect` -> uint8 [N,D,H,W], 1 inside an object, H and W those of the largest file.

    Objects are pasted one after the other, and only those that exist."""
    where = tf.where(found["classes"] > 0)  # [F, 2]
    size = tf.reduce_max(original, 0)
    rows, columns = tf.range(size[0]), tf.range(size[1])

    def paste(inputs: tuple[Any, Any, Any]) -> Any:
        mask, box, own = inputs
        inside = tf.logical_and(rows[:, None] < own[0], columns[None] < own[1])
        return paste_rows(mask[None], box[None], size)[0] * tf.cast(inside, tf.uint8)

    each = (
        tf.gather_nd(found["box_masks"], where),
        tf.gather_nd(found["boxes"], where),
        tf.gather(original, where[:, 0]),
    )
    pasted = tf.map_fn(paste, each, tf.uint8)
    shape = tf.concat([tf.shape(found["classes"]), size], 0)
    return tf.scatter_nd(where, pasted, tf.cast(shape, tf.int64))
