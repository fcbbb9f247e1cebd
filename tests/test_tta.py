"""Test-time augmentation: one plain view is a plain prediction, mirrored images give mirrored results, and merging
against a twin in NumPy."""

import zlib

import cv2
import numpy as np
import pytest
from box_reference import pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st

import model_rcnn
import tta
from augment import resized_shape
from common import UserError
from data import stack_images
from inference import Predictor, start_session
from model_keypoint import decode_keypoints
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
KEYPOINT_FLIP = [0, 2, 1]
KINDS = {
    "fpn": ["MODE_KEYPOINT=True", "KRCNN.HEAD_DIM=8", "KRCNN.NUM_KEYPOINT=3"],
    "cascade": ["FPN.CASCADE=True"],
    "c4": ["MODE_FPN=False", "RPN.HEAD_DIM=16", "RPN.ANCHOR_SIZES=[16,32]", "RPN.TEST_PRE_NMS_TOPK=60",
           "RPN.TEST_POST_NMS_TOPK=50"],
    "soft": ["TEST.NMS=soft_gaussian", "TEST.NMS_CLASS_AGNOSTIC=True"],
}  # fmt: skip
COMMON = ["TEST.RESULTS_PER_IM=60", "TEST.RESULT_SCORE_THRESH=0.2", "TEST.AUG_MAX_SIZE=192"]
SHAPE = (75, 100)


def load_seeded(sess):
    """Weights drawn from the variables' names, such that the tiny detector is sure of some boxes."""
    with sess.graph.as_default():
        variables = tf.global_variables()
    for variable in variables:
        name, shape = variable.op.name, variable.shape.as_list()
        random = np.random.RandomState(zlib.crc32(name.removeprefix("tower/").encode()))
        value = random.standard_normal(shape)
        if len(shape) > 1:
            gain = 0.2 if "class/W" in name else 0.15 if "maskrcnn/conv" in name or "keypointrcnn/deconv" in name else 1
            value *= gain * np.sqrt(2 / np.prod(shape[:-1]))
            value *= 0.03 if "box/W" in name else 1
        elif name.endswith(("gamma", "variance/EMA")):
            value = 1 + 0.1 * np.abs(value)
        else:
            value *= 0.1
        variable.load(value.astype(np.float32), sess)


def photograph(shape, seed=0):
    """uint8 [h, w, 3] with blobs of all sizes."""
    random = np.random.RandomState(seed)
    image = np.full([*shape, 3], 90, np.uint8)
    for _ in range(12):
        centre, axes = random.randint(0, shape[::-1]), random.randint(4, 30, 2)
        cv2.ellipse(
            image, centre.tolist(), axes.tolist(), random.randint(180), 0, 360, random.randint(0, 256, 3).tolist(), -1
        )
    return image


_predictors = {}


def predictor(cls, kind, *options):
    key = cls, kind, options
    if key not in _predictors:
        cfg = tiny_config(*KINDS[kind], *COMMON, *options)
        more = [KEYPOINT_FLIP] if cls is tta.AugmentedPredictor else []
        _predictors[key] = cls(cfg, load_seeded, *more)
    return _predictors[key]


@pytest.fixture(scope="module", autouse=True)
def forget_predictors():
    yield
    _predictors.clear()


def augmented(kind, edges, flip, *options):
    return predictor(tta.AugmentedPredictor, kind, f"TEST.AUG_SHORT_EDGES={edges}", f"TEST.AUG_FLIP={flip}", *options)


def scaled(outputs, row, factor):
    """One image's detections [D, ...] with boxes and keypoints times factor [2]."""
    one = {key: value[row][: outputs["count"][row]] for key, value in outputs.items() if key != "count"}
    one["boxes"] = one["boxes"] * np.tile(factor, 2)
    if "keypoints" in one:
        one["keypoints"] = one["keypoints"] * np.append(factor, 1)
    return one


def assert_same(found, wanted, pixels=2e-3, probability=1e-4, score=1e-5):
    assert len(wanted["scores"]) > 3 and len(np.unique(wanted["labels"])) > 1
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found["labels"], wanted["labels"])
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=score)
    np.testing.assert_allclose(found["boxes"], wanted["boxes"], atol=pixels)
    for key, atol in (("masks", probability), ("keypoints", pixels)):
        if key in wanted:
            np.testing.assert_allclose(found[key], wanted[key], atol=atol, rtol=1e-4, err_msg=key)


# ------------------------------------------------------------------------------------------------------------ frames
@pytest.mark.quick
@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(17, 700), st.integers(17, 700)),
    edge=st.integers(16, 400),
    limit=st.integers(400, 500),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_boxes_go_to_a_view_and_back_at_any_rounded_size(shape, edge, limit, flip, seed):
    h, w = shape
    size = resized_shape(h, w, edge, limit)
    shapes, sizes = np.array([shape]), np.array([size])
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.uniform(0, [w, h], (2, 20, 2)), 0)
    boxes = np.concatenate([[[0, 0, w, h]], np.concatenate([low, high], 1)]).astype(np.float32)[None]
    there = tta.move_boxes(boxes, shapes, sizes, flip)
    np.testing.assert_array_equal(there[0, 0], [0, 0, size[1], size[0]])
    left = w - boxes[..., 2] if flip else boxes[..., 0]
    np.testing.assert_allclose(there[..., 0], left * size[1] / w, atol=1e-3)
    np.testing.assert_allclose(there[..., 3], boxes[..., 3] * size[0] / h, atol=1e-3)
    back = tta.move_boxes(there, sizes, shapes, flip)
    np.testing.assert_allclose(back, boxes, atol=2e-3)
    assert (back >= 0).all() and (back <= [w, h, w, h]).all() and back.dtype == there.dtype == np.float32


@pytest.mark.quick
@pytest.mark.parametrize("flip", [False, True])
def test_a_box_holds_the_same_pixels_in_every_view(flip):
    """Of images of two sizes in one padded batch, whose mirror axes differ."""
    cfg = tiny_config(*COMMON)
    boxes = np.array([[[10, 20, 40, 60]], [[5, 8, 17, 30]]], np.float32)
    images = [np.zeros([75, 100, 3], np.uint8), np.zeros([81, 67, 3], np.uint8)]
    for image, (box,) in zip(images, boxes.astype(int)):
        image[box[1] : box[3], box[0] : box[2]] = 255
    batch, shapes = stack_images(images, cfg)
    view = tta.make_view(batch, shapes, 150, flip, cfg)
    moved = tta.move_boxes(boxes, shapes, view.shape, flip)
    for n in range(2):
        h, w = view.shape[n]
        assert (h, w) == resized_shape(*images[n].shape[:2], 150, 192) and max(h, w) <= 192
        assert not view.image[n, h:].any() and not view.image[n, :, w:].any()
        rows, columns = (np.flatnonzero((view.image[n, ..., 0] > 127).any(axis)) for axis in (1, 0))
        inside = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(moved[n, 0], inside, atol=1.01)


# --------------------------------------------------------------------------------------------------------- identities
@pytest.mark.parametrize("kind", KINDS)
def test_one_view_at_the_plain_size_is_a_plain_prediction(kind):
    """Two images of different sizes in a batch, neither in its own size."""
    images = [photograph(SHAPE), photograph((100, 80), 1)]
    found_by = augmented(kind, [96], False)
    cfg = found_by.cfg
    found = found_by(*stack_images(images, cfg))
    resized = [
        cv2.resize(i, resized_shape(*i.shape[:2], 96, 192)[::-1], interpolation=cv2.INTER_LINEAR) for i in images
    ]
    plain = predictor(Predictor, kind)(*stack_images(resized, cfg))
    for row, (image, small) in enumerate(zip(images, resized)):
        factor = np.array(image.shape[1::-1]) / small.shape[1::-1]
        one, wanted = scaled(found, row, [1, 1]), scaled(plain, row, factor)
        for detections in one, wanted:  # found on the pixels of the image here and of its resized copy there
            detections.pop("keypoints", None)
        assert_same(one, wanted)
    if cfg.MODE_KEYPOINT:  # at its own size an image has one grid of pixels
        own = [cv2.resize(photograph(SHAPE), (128, 96))]
        one, wanted = found_by(*stack_images(own, cfg)), predictor(Predictor, kind)(*stack_images(own, cfg))
        assert_same(scaled(one, 0, [1, 1]), scaled(wanted, 0, [1, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mirrored_image_gives_mirrored_results(kind):
    """With flips, in two sizes at which resizing commutes with mirroring; the width is no multiple of the stride."""
    image = photograph(SHAPE, 2)
    find = augmented(kind, [64, 96], True)
    one, other = (scaled(find(*stack_images([i], find.cfg)), 0, [1, 1]) for i in (image, cv2.flip(image, 1)))
    width = SHAPE[1]
    other["boxes"][:, [0, 2]] = width - other["boxes"][:, [2, 0]]
    other["masks"] = other["masks"][:, :, ::-1]
    if "keypoints" in other:
        other["keypoints"] = other["keypoints"][:, KEYPOINT_FLIP]
        other["keypoints"][..., 0] = width - other["keypoints"][..., 0]
    assert_same(one, other)
    # That says something: the mirrored image looks different to the network.
    plain = predictor(Predictor, kind)
    a, b = (plain(*stack_images([i], plain.cfg)) for i in (image, cv2.flip(image, 1)))
    assert not np.allclose(a["scores"], b["scores"], atol=1e-3)


@pytest.mark.parametrize("kind", ["fpn", "soft"])
def test_a_batch_of_two_equals_its_images_one_by_one(kind):
    """Up to rounding: where convolutions are not oneDNN's, those of a batch add in another order."""
    images = [photograph(SHAPE), photograph((84, 110), 1)]  # padded to the same size in every view
    find = augmented(kind, [64, 96], True)
    together = find(*stack_images(images, find.cfg))
    for row, image in enumerate(images):
        assert_same(
            scaled(together, row, [1, 1]), scaled(find(*stack_images([image], find.cfg)), 0, [1, 1]), 1e-2, 1e-3, 1e-4
        )


def test_no_detection_gives_empty_outputs():
    find = augmented("fpn", [64, 96], True, "TEST.RESULT_SCORE_THRESH=0.9999")
    outputs = find(*stack_images([photograph(SHAPE)], find.cfg))
    assert outputs["count"].tolist() == [0]
    assert outputs["masks"].shape == (1, 60, 28, 28) and outputs["keypoints"].shape == (1, 60, 3, 3)
    assert not any(value.any() for value in outputs.values())


# --------------------------------------------------------------------------------------------------------------- twin
class Branches:
    """Masks and logits of keypoints of given boxes in one image, by a graph of its own."""

    def __init__(self, cfg):
        with tf.Graph().as_default() as graph:
            self.inputs = [
                tf.placeholder(tf.uint8, [None, None, None, 3]), tf.placeholder(tf.int32, [None, 2]),
                tf.placeholder(tf.float32, [None, None, 4]), tf.placeholder(tf.int32, [None, None]),
            ]  # fmt: skip
            image, shape, boxes, labels = self.inputs
            features = model_rcnn.backbone_features(image, shape, cfg)
            pool = model_rcnn.make_roi_pooler(features, cfg)
            model_rcnn.detect_boxes(features, pool, shape, cfg)  # C4's branches share variables with it
            self.outputs = model_rcnn.describe_boxes(pool, boxes, labels, cfg, decode=False)
            self.session = start_session(graph, load_seeded)

    def __call__(self, *arrays):
        return self.session.run(self.outputs, dict(zip(self.inputs, arrays)))


@pytest.mark.parametrize("kind", ["fpn", "cascade", "c4"])
def test_merging_equals_a_twin_in_numpy(kind):
    """Candidates of all views by plain predictions without suppression; NMS, un-mirroring and averaging in float64."""
    image, (h, w) = photograph(SHAPE, 3), SHAPE
    find = augmented(kind, [64, 96], True)
    cfg = find.cfg
    found = scaled(find(*stack_images([image], cfg)), 0, [1, 1])
    everything = predictor(Predictor, kind, "TEST.FRCNN_NMS_THRESH=1.0", "TEST.RESULTS_PER_IM=200")
    views, candidates = [], []
    for edge in (64, 96):
        vh, vw = resized_shape(h, w, edge, 192)
        resized = cv2.resize(image, (vw, vh), interpolation=cv2.INTER_LINEAR)
        for flip in (False, True):
            pixels = cv2.flip(resized, 1) if flip else resized
            one = everything(*stack_images([pixels], cfg))
            assert 3 < one["count"][0] < 200  # all of them
            for box, score, label in list(zip(one["boxes"][0], one["scores"][0], one["labels"][0]))[: one["count"][0]]:
                x1, y1, x2, y2 = box.astype(np.float64)
                x1, x2 = (vw - x2, vw - x1) if flip else (x1, x2)
                candidates.append((score, label, np.array([x1 * w / vw, y1 * h / vh, x2 * w / vw, y2 * h / vh])))
            views.append((pixels, vh, vw, flip))
    kept = []
    for score, label, box in sorted(candidates, key=lambda c: -c[0]):
        rivals = [k[2] for k in kept if k[1] == label]
        if not rivals or pairwise_iou(box[None], np.stack(rivals)).max() <= cfg.TEST.FRCNN_NMS_THRESH:
            kept.append((score, label, box))
    kept = kept[: cfg.TEST.RESULTS_PER_IM]
    wanted = dict(zip(("scores", "labels", "boxes"), map(np.array, zip(*kept))))

    describe = Branches(cfg)
    masks, heat = 0, 0
    for pixels, vh, vw, flip in views:
        boxes = wanted["boxes"] * [vw / w, vh / h, vw / w, vh / h]
        if flip:
            boxes[:, [0, 2]] = vw - boxes[:, [2, 0]]
        one = describe(*stack_images([pixels], cfg), boxes[None], wanted["labels"][None])
        masks = masks + (one["masks"][0][:, :, ::-1] if flip else one["masks"][0]) / 4
        if cfg.MODE_KEYPOINT:
            logits = one["keypoints"][0]
            heat = heat + (logits[:, :, ::-1][..., KEYPOINT_FLIP] if flip else logits) / 4
    describe.session.close()
    wanted["masks"] = masks
    if cfg.MODE_KEYPOINT:
        averaged = np.float32(heat), np.float32(wanted["boxes"])
        wanted["keypoints"] = evaluate(lambda: decode_keypoints(*map(tf.constant, averaged)))
    assert_same(found, wanted)


# ------------------------------------------------------------------------------------------------------------ settings
@pytest.mark.quick
@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("TEST.AUG_SHORT_EDGES=[400,'x']", "TEST.AUG_SHORT_EDGES"),
        ("TEST.AUG_SHORT_EDGES=[8]", "TEST.AUG_SHORT_EDGES"),
        ("TEST.AUG_SHORT_EDGES=[5000]", "TEST.AUG_MAX_SIZE"),
        ("TEST.AUG_SHORT_EDGES=[64] MODE_RPN_ONLY=True", "MODE_RPN_ONLY"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting, hint):
    with pytest.raises(UserError, match=hint):
        tiny_config(*setting.split())
