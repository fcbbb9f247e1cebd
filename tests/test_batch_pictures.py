"""Pictures of training batches: what belongs to an image is drawn in its place and colour, the rest is untouched."""

import numpy as np
import pytest
from tiny import COCO_MINI

from batch_pictures import batch_pictures, draw_batch, draw_boxes
from config import default_config, finalize_config
from data import make_batch, training_keys
from dataset import load_split
from viz import LEFT, RIGHT, class_color

pytestmark = pytest.mark.quick

SETTINGS = [f"DATA.BASEDIR={COCO_MINI}", "TRAIN.EVAL_PERIOD=0"]


def configured(*more):
    return finalize_config(default_config().update_args([*SETTINGS, *more]))


@pytest.fixture(scope="module")
def split():
    return load_split(configured(), "coco_train2017")


def test_a_batch_is_drawn_where_its_boxes_are_and_its_padding_is_hatched(split):
    cfg = configured("MODE_MASK=True", "MODE_FPN=True", "PREPROC.SHORT_EDGE_SIZE=[400]", "PREPROC.MAX_SIZE=600")
    batch = dict(zip(training_keys(cfg), make_batch(split, [0, 5], [[1], [2]], cfg)))
    for n in range(2):
        picture = draw_batch(batch, n, split.class_names)
        assert picture.shape == batch["image"][n].shape
        changed = (picture != batch["image"][n]).any(2)
        height, width = batch["image_shape"][n]
        if (height, width) != picture.shape[:2]:
            outside = changed.copy()
            outside[:height, :width] = False
            share = outside.sum() / (changed.size - height * width)
            assert 0.1 < share < 0.25
        for box, label, crowd in zip(batch["gt_boxes"][n], batch["gt_labels"][n], batch["gt_is_crowd"][n]):
            if label > 0 and not crowd:
                x1, y1, x2, y2 = np.clip(np.round(box), 0, [width - 1, height - 1] * 2).astype(int)
                assert changed[y1 : y2 + 1, x1].mean() > 0.9 and changed[y1, x1 : x2 + 1].mean() > 0.9


def test_a_small_batch_is_enlarged_with_all_that_belongs_to_it():
    batch = {"image": np.zeros((1, 40, 60, 3), np.uint8), "image_shape": np.array([[40, 60]]),
             "gt_boxes": np.array([[[10, 20, 50, 35]]], np.float32), "gt_labels": np.array([[1]]),
             "gt_is_crowd": np.array([[False]])}  # fmt: skip
    picture = draw_batch(batch, 0, [""])
    times = picture.shape[0] // 40
    assert times > 1 and picture.shape == (40 * times, 60 * times, 3)
    rows, columns = np.flatnonzero(picture.any((1, 2))), np.flatnonzero(picture.any((0, 2)))
    assert (rows[0], columns[0]) == pytest.approx((20 * times, 10 * times), abs=1)
    assert (rows[-1], columns[-1]) == pytest.approx((35 * times, 50 * times), abs=1)


def one_image(**parts) -> dict[str, np.ndarray]:
    """A grey batch of one image, 400 x 500 in 416 x 512, with one object."""
    batch = {
        "image": np.full((1, 416, 512, 3), (40, 90, 160), np.uint8), "image_shape": np.array([[400, 500]]),
        "gt_boxes": np.array([[[100, 50, 300, 350]]], np.float32), "gt_labels": np.array([[2]]),
        "gt_is_crowd": np.array([[False]]),
    }  # fmt: skip
    return batch | parts


def test_a_mask_of_column_edges_is_filled_inside_alone_and_colours_keep_their_order():
    """A triangle with a hole: vertical edges are missing from a batch, as from a rectangle's outline."""
    ring = [[100, 50], [300, 50], [300, 350], [100, 350]]
    hole = [[150, 100], [150, 300], [250, 300], [250, 100]]
    edges = [[*a, *b] for r in (ring, hole) for a, b in zip(r, [*r[1:], r[0]]) if a[0] != b[0]]
    picture = draw_batch(one_image(gt_edges=np.array([[[*edges, [0, 0, 0, 0]]]], np.float32)[0][None]), 0, ["a", "b"])
    blue, green, red = (round(0.6 * p + 0.4 * c) for p, c in zip((40, 90, 160), class_color(2)))
    assert picture[200, 125].tolist() == pytest.approx([blue, green, red], abs=1)  # in the object
    assert picture[200, 200].tolist() == [40, 90, 160]  # in its hole
    assert picture[200, 400].tolist() == [40, 90, 160]  # beside it


def test_left_and_right_points_of_a_body_have_their_own_colours():
    points = np.zeros((1, 1, 17, 3), np.float32)
    points[0, 0, 5], points[0, 0, 6], points[0, 0, 9] = (200, 200, 2), (160, 200, 1), (240, 60, 0)
    picture = draw_batch(one_image(gt_keypoints=points), 0, ["a", "b"])
    assert tuple(picture[200, 200].tolist()) == LEFT and tuple(picture[200, 160].tolist()) == RIGHT
    assert picture[60, 240].tolist() == [40, 90, 160]  # not visible
    assert picture[200, 180].tolist() == pytest.approx(class_color(2), abs=20)  # the shoulders are joined


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 1e9])
def test_a_broken_batch_can_be_looked_at(value):
    """Where a loss is not finite, boxes, outlines and points may be anything, and labels beyond the classes."""
    boxes = np.array([[[100, value, 300, 350]]], np.float32)
    edges, points = np.full((1, 1, 2, 4), value, np.float32), np.full((1, 1, 3, 3), value, np.float32)
    edges[..., 0] = 7
    broken = one_image(gt_boxes=boxes, gt_labels=np.array([[9]]), gt_edges=edges, gt_keypoints=points)
    (picture,) = batch_pictures(broken, ["\udc80"], most=4)
    assert picture.shape == (416, 512, 3)


def test_foreground_lies_over_background_in_its_class_colour():
    image = np.full((400, 400, 3), 20, np.uint8)
    boxes = np.array([[50, 50, 300, 300], [50, 50, 300, 300]], np.float32)
    picture = draw_boxes(image, boxes, np.array([2, 0]), ["a", "b"])
    assert tuple(picture[300, 200].tolist()) == class_color(2)
