"""Test-time augmentation: each image is predicted in several sizes and mirrored, and the results are merged.

Boxes of all views go through one NMS, in the frame of the image (Detectron's union of candidates). Then the mask branch
predicts the merged boxes in every view and probabilities are averaged. For keypoints the heat maps are averaged.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import numpy as np

from augment import resized_shape
from config import Config, inference_precision
from data import stack_images
from inference import start_session
from model_frcnn import list_candidates, select_detections
from model_keypoint import decode_keypoints
from model_rcnn import backbone_features, describe_boxes, detect_boxes, make_roi_pooler
from utils import np_box_ops
from utils.tf_v1 import tf

__all__ = ["AugmentedPredictor", "View", "make_view", "move_boxes"]


class View(NamedTuple):
    """A batch of images resized, and mirrored if `flip`."""

    image: np.ndarray  # uint8 [N, H', W', 3], padded at the bottom and right
    shape: np.ndarray  # int32 [N, 2], valid heights and widths
    flip: bool


def make_view(image: np.ndarray, image_shape: np.ndarray, short_edge: int, flip: bool, cfg: Config) -> View:
    """image uint8 [N, H, W, 3], image_shape int32 [N, 2] -> both for this short edge; long edges are at most
    AUG_MAX_SIZE."""
    resized = []
    for pixels, (height, width) in zip(image, image_shape.tolist()):
        new_height, new_width = resized_shape(height, width, short_edge, cfg.TEST.AUG_MAX_SIZE)
        one = cv2.resize(pixels[:height, :width], (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        resized.append(cv2.flip(one, 1) if flip else one)
    return View(*stack_images(resized, cfg), flip)


def move_boxes(boxes: np.ndarray, shapes: np.ndarray, new_shapes: np.ndarray, flip: bool) -> np.ndarray:
    """Boxes [N, D, 4] of images of shapes [N, 2] -> float32 boxes for images of other shapes, mirrored if `flip`."""
    moved = np.empty(boxes.shape, np.float32)
    for n, ((height, width), (new_height, new_width)) in enumerate(zip(shapes.tolist(), new_shapes.tolist())):
        one = boxes[n].astype(np.float64)
        one = np_box_ops.flip_boxes(one, width) if flip else one
        one = np_box_ops.scale_boxes(one, new_width / width, new_height / height)
        moved[n] = np_box_ops.clip_boxes(one, new_height, new_width)  # rounding must not move boxes out of the image
    return moved


class AugmentedPredictor:
    """predict(image, image_shape) -> outputs like a `Predictor`'s, for images in the size of their files.

    The backbone runs once per view, for the boxes. The features for RoI pooling are kept in host memory and fed again
    for the masks of the merged boxes.
    """

    def __init__(
        self,
        cfg: Config,
        load: Callable[[Any], None],
        keypoint_flip: Sequence[int] = (),
        device: str | None = None,
    ):
        """load, device: as for `Predictor`; keypoint_flip: each keypoint's number in a mirrored image, needed for
        keypoints with TEST.AUG_FLIP."""
        self.cfg = cfg
        self._keypoint_flip = np.asarray(keypoint_flip, np.int64)
        flips = [False, True] if cfg.TEST.AUG_FLIP else [False]
        cfg = inference_precision(cfg)
        self._views = [(edge, flip) for edge in cfg.TEST.AUG_SHORT_EDGES for flip in flips]
        with tf.Graph().as_default() as graph, tf.device(device):
            image = tf.placeholder(tf.uint8, [None, None, None, 3])
            image_shape = tf.placeholder(tf.int32, [None, 2])
            features = backbone_features(image, image_shape, cfg)
            found = detect_boxes(features, make_roi_pooler(features, cfg), image_shape, cfg)
            candidates = list_candidates(found[0], found[1], found[2], image_shape, cfg)
            has_branches = cfg.MODE_MASK or cfg.MODE_KEYPOINT
            pooled = features[:4] if has_branches else []  # a pyramid's coarsest level is used by the RPN only

            boxes = tf.placeholder(tf.float32, [None, None, 4])
            scores = tf.placeholder(tf.float32, [None, None])
            labels = tf.placeholder(tf.int32, [None, None])
            detections = select_detections(boxes, scores, labels, cfg)

            given = [tf.placeholder(level.dtype, level.shape) for level in pooled]
            branches = {}
            if has_branches:
                branches = describe_boxes(make_roi_pooler(given, cfg), boxes, labels, cfg, decode=False)
            if cfg.MODE_KEYPOINT:
                heat = tf.placeholder(tf.float32, [None, *branches["keypoints"].shape[2:]])
                rows = tf.placeholder(tf.float32, [None, 4])
                points = decode_keypoints(heat, rows)

            session = self._session = start_session(graph, load, device)
            self._find = session.make_callable([list(candidates), pooled], [image, image_shape])
            self._merge = session.make_callable(list(detections), [boxes, scores, labels])
            self._describe = session.make_callable(branches, [*given, boxes, labels])
            self._decode = session.make_callable(points, [heat, rows]) if cfg.MODE_KEYPOINT else None

    def __call__(self, image: np.ndarray, image_shape: np.ndarray) -> dict[str, np.ndarray]:
        views, features, candidates = [], [], []
        with ThreadPoolExecutor(1) as pool:  # resizes the next view while the graph runs
            for view in pool.map(lambda v: make_view(image, image_shape, v[0], v[1], self.cfg), self._views):
                (boxes, scores, labels), levels = self._find(view.image, view.shape)
                candidates.append((move_boxes(boxes, view.shape, image_shape, view.flip), scores, labels))
                features.append(levels)
                views.append(view._replace(image=None))
        boxes, scores, labels, count = self._merge(*(np.concatenate(part, 1) for part in zip(*candidates)))
        outputs = {"boxes": boxes, "scores": scores, "labels": labels, "count": count}
        if self.cfg.MODE_MASK or self.cfg.MODE_KEYPOINT:
            outputs |= self._average(features, views, boxes, labels, image_shape)
        return outputs

    def close(self) -> None:
        """Frees the weights."""
        self._session.close()
        del self._find, self._merge, self._describe, self._decode, self._session

    def _average(
        self, features: list, views: list[View], boxes: np.ndarray, labels: np.ndarray, image_shape: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Masks [N,D,M,M] and keypoints [N,D,K,3] of boxes [N,D,4] in the frame of the images."""
        total: dict[str, Any] = {}
        for view in views:
            levels = features.pop(0)  # each view's features are freed after use
            moved = move_boxes(boxes, image_shape, view.shape, view.flip)
            for key, value in self._describe(*levels, moved, labels).items():
                total[key] = total.get(key, 0) + (self._mirror(key, value) if view.flip else value)
        mean = {key: value / np.float32(len(views)) for key, value in total.items()}
        if "keypoints" in mean:
            present = labels > 0
            points = np.zeros([*labels.shape, mean["keypoints"].shape[-1], 3], np.float32)
            if present.any():
                points[present] = self._decode(mean["keypoints"][present], boxes[present])
            mean["keypoints"] = points
        return mean

    def _mirror(self, key: str, value: np.ndarray) -> np.ndarray:
        """Mirrors masks [N,D,M,M], or keypoint heat maps [N,D,M,M,K], whose left and right keypoints are also
        exchanged."""
        value = value[:, :, :, ::-1]
        return value[..., self._keypoint_flip] if key == "keypoints" else value
