"""export_graph.py: what Python does around the inference graph, in TensorFlow's operations."""

import cv2
import numpy as np
import pytest
from graph import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

import detections
from augment import resized_shape
from export_graph import decode_files, paste_rows, place_images, resize_bilinear, resized_size
from utils.polygons import decode_mask
from utils.tf_v1 import tf


@pytest.fixture(scope="module")
def resize():
    with tf.Graph().as_default(), tf.Session() as session:
        image, size = tf.placeholder(tf.uint8, [None, None, None, 3]), tf.placeholder(tf.int32, [2])
        yield session.make_callable(resize_bilinear(image, size), [image, size])


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 400), st.integers(1, 400), st.integers(0, 99))
def test_resizing_equals_opencv_in_every_pixel(resize, height, width, new_height, new_width, seed):
    images = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), np.uint8)
    resized = resize(images, [new_height, new_width])
    for image, found in zip(images, resized):
        wanted = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("factor", [0.5, 1, 2, 3])
def test_resizing_by_whole_factors_equals_opencv(resize, factor):
    image = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    wanted = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize(image[None], wanted.shape[:2])[0], wanted)


def test_sizes_are_those_of_the_python_predictor():
    cfg = tiny_config("PREPROC.TEST_SHORT_EDGE_SIZE=800", "PREPROC.MAX_SIZE=1333")
    sizes = np.random.default_rng(0).integers(1, 5000, (3000, 2))
    sizes[:8] = [[1, 1], [1, 5000], [5000, 1], [800, 1333], [600, 1000], [480, 640], [3, 2], [799, 1333]]
    with tf.Graph().as_default(), tf.Session() as session:
        found = session.run(resized_size(tf.constant(sizes, tf.int32), cfg))
    np.testing.assert_array_equal(found, [resized_shape(h, w, 800, 1333) for h, w in sizes.tolist()])


def test_files_become_the_batch_that_their_pixels_become():
    cfg = tiny_config()
    rng = np.random.default_rng(0)
    images = [cv2.resize(rng.integers(0, 256, (9, 9, 3), np.uint8), size) for size in ((90, 60), (50, 80))]
    files = [cv2.imencode(".png", images[0])[1].tobytes(), cv2.imencode(".jpg", images[1])[1].tobytes()]
    pixels = [images[0], cv2.imdecode(np.frombuffer(files[1], np.uint8), cv2.IMREAD_COLOR)]
    with tf.Graph().as_default(), tf.Session() as session:
        one = tf.placeholder(tf.uint8, [None, None, None, 3])
        batch, sizes, original = session.run(decode_files(tf.constant(files), cfg))
        alone = [session.run(place_images(one, cfg), {one: p[None, :, :, ::-1]}) for p in pixels]
    assert batch.shape == (2, 160, 160, 3) and original.tolist() == [[60, 90], [80, 50]]
    for n, (wanted, (size,), (file_size,)) in enumerate(alone):
        height, width = size
        np.testing.assert_array_equal(sizes[n], size)
        np.testing.assert_array_equal(original[n], file_size)
        np.testing.assert_array_equal(batch[n, :height, :width], wanted[0, :height, :width])
        assert not batch[n, height:].any() and not batch[n, :, width:].any()


def test_pasted_masks_are_those_of_the_python_predictor():
    rng = np.random.default_rng(0)
    masks = rng.random((40, 14, 14)).astype(np.float32)
    corners = rng.uniform(0, 60, (40, 2))
    boxes = np.concatenate([corners, np.minimum(corners + rng.uniform(0.5, 60, (40, 2)), [70, 64])], 1)
    boxes = boxes.astype(np.float32)
    boxes[0] = 0
    with tf.Graph().as_default(), tf.Session() as session:
        found = session.run(paste_rows(tf.constant(masks), tf.constant(boxes), tf.constant([64, 70])))
    wanted = np.stack([decode_mask(m) for m in detections.paste_masks(masks, boxes, 64, 70)])
    assert found.shape == wanted.shape and not found[0].any()
    assert (found != wanted).sum() <= 5 < wanted.sum() / 1000  # centres where the probability is 0.5 but for rounding
