"""NumPy boxes against formulas written out for one box at a time, and against pycocotools."""

import math

import box_reference
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils import np_box_ops as ops

pytestmark = pytest.mark.quick
settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
settings.load_profile("no deadline")

SIDES = st.floats(0.5, 500)
PLACES = st.floats(-200, 500)


@st.composite
def some_boxes(draw, count=None):
    n = count or draw(st.integers(1, 6))
    corners = draw(arrays(np.float64, (n, 2), elements=PLACES))
    return np.concatenate([corners, corners + draw(arrays(np.float64, (n, 2), elements=SIDES))], axis=1)


def xywh(boxes):
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@given(some_boxes(), some_boxes())
def test_iou_equals_pycocotools(a, b):
    expected = coco_mask.iou(xywh(a), xywh(b), [0] * len(b))
    np.testing.assert_allclose(box_reference.pairwise_iou(a, b), expected, atol=1e-9)


def test_empty_boxes_have_zero_area_and_overlap():
    boxes = np.array([[5, 5, 5, 9], [7, 7, 3, 3], [0, 0, 10, 10]], np.float32)
    assert ops.area(boxes).tolist() == [0, 0, 100]
    assert box_reference.pairwise_iou(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_no_boxes_give_empty_matrices():
    none, one = np.zeros((0, 4), np.float32), np.ones((1, 4), np.float32)
    assert box_reference.pairwise_iou(none, one).shape == (0, 1)
    assert box_reference.pairwise_iou(one, none).shape == (1, 0)


@given(some_boxes(), st.floats(1, 1000))
def test_flip_is_an_involution_and_keeps_sides(boxes, width):
    flipped = ops.flip_boxes(boxes, width)
    np.testing.assert_allclose(ops.flip_boxes(flipped, width), boxes, atol=1e-9)
    np.testing.assert_allclose(xywh(flipped)[:, 2:], xywh(boxes)[:, 2:], atol=1e-9)


@given(some_boxes())
def test_clipped_boxes_lie_inside_and_those_inside_are_untouched(boxes):
    clipped = ops.clip_boxes(boxes, 300, 400)
    assert (clipped >= 0).all() and (clipped <= [400, 300, 400, 300]).all()
    np.testing.assert_allclose(
        ops.area(clipped), ops.pairwise_intersection(boxes, np.array([[0.0, 0, 400, 300]]))[:, 0], atol=1e-6
    )


@given(some_boxes(4), some_boxes(4))
def test_decoding_inverts_encoding(boxes, anchors):
    grows_too_much = np.log(xywh(boxes)[:, 2:] / xywh(anchors)[:, 2:]).max(1) > box_reference.MAX_LOG_SCALE
    weights = (10, 10, 5, 5)
    back = box_reference.decode_boxes(box_reference.encode_boxes(boxes, anchors, weights), anchors, weights)
    np.testing.assert_allclose(back[~grows_too_much], boxes[~grows_too_much], atol=1e-6)


def test_encoding_is_that_of_fast_r_cnn():
    anchor, box = np.array([10.0, 20, 30, 60]), np.array([15.0, 10, 45, 30])
    # centre 20,40 size 20x40 -> centre 30,20 size 30x20
    expected = [10 * 10 / 20, 10 * -20 / 40, 5 * math.log(30 / 20), 5 * math.log(20 / 40)]
    np.testing.assert_allclose(box_reference.encode_boxes(box, anchor, (10, 10, 5, 5)), expected)


def test_decoding_limits_growth_but_not_shrinking():
    anchor = np.array([[0.0, 0, 16, 16]])
    grown = box_reference.decode_boxes(np.array([[0, 0, 50.0, 50.0]]), anchor)
    np.testing.assert_allclose(ops.area(grown), 1000.0**2)
    shrunk = box_reference.decode_boxes(np.array([[0, 0, -20.0, -20.0]]), anchor)
    np.testing.assert_allclose(xywh(shrunk)[0, 2:], 16 * math.exp(-20), rtol=1e-6)


def test_float32_stays_float32():
    boxes = np.array([[0, 0, 10, 10]], np.float32)
    for result in (
        ops.clip_boxes(boxes, 5, 5), ops.flip_boxes(boxes, 20), ops.scale_boxes(boxes, 1.5, 2.5),
        box_reference.pairwise_iou(boxes, boxes), box_reference.encode_boxes(boxes, boxes, (10, 10, 5, 5)),
        box_reference.decode_boxes(boxes, boxes, (10, 10, 5, 5)),
    ):  # fmt: skip
        assert result.dtype == np.float32
