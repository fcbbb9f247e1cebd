"""Keypoint branch against recordings of detectron2, and OpenCV's bicubic resize."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import model_keypoint
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_unit.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files if key.startswith("kp/")}


def test_targets_equal_the_recording(golden):
    cells, valid = evaluate(
        lambda: model_keypoint.keypoint_targets(tf.constant(golden["kp/boxes"]), tf.constant(golden["kp/keypoints"]))
    )
    np.testing.assert_array_equal(valid, golden["kp/valid"].astype(bool))
    np.testing.assert_array_equal(cells, golden["kp/target56"])


def test_a_point_on_the_far_edge_is_in_the_last_cell_and_beyond_it_nowhere():
    keypoints = np.array([[[30, 30, 2], [30.1, 20, 2], [10, 10, 1], [20, 20, 0]]], np.float32)
    cells, valid = evaluate(
        lambda: model_keypoint.keypoint_targets(tf.constant([[10.0, 10, 30, 30]]), tf.constant(keypoints))
    )
    assert valid.tolist() == [[True, False, True, False]]
    assert cells.tolist() == [[56 * 56 - 1, 0, 0, 0]]


def test_decoding_equals_the_recording(golden):
    heat = np.transpose(golden["kp/heatmaps"], [0, 2, 3, 1])
    points = evaluate(lambda: model_keypoint.decode_keypoints(tf.constant(heat), tf.constant(golden["kp/boxes"])))
    np.testing.assert_allclose(points, golden["kp/decoded_xy_logit_score"][..., [0, 1, 3]], atol=1e-4)


@pytest.mark.parametrize("size", [1, 17, 56, 200])
def test_bicubic_weights_equal_opencvs(size):
    source = np.random.RandomState(0).randn(56).astype(np.float32)
    ours = evaluate(lambda: tf.linalg.matvec(model_keypoint._cubic_matrix(size, 56), tf.constant(source)))
    expected = cv2.resize(source[None], (size, 1), interpolation=cv2.INTER_CUBIC)[0]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def losses_of(logits, cells, valid, image_index, num_images, *settings):
    cfg = tiny_config("MODE_KEYPOINT=True", *settings)
    return evaluate(
        lambda: model_keypoint.keypoint_losses(
            tf.constant(logits), tf.constant(cells, tf.int32), tf.constant(valid),
            tf.constant(image_index, tf.int32), num_images, cfg,
        )
    )[0]["krcnn/keypoint_loss"]  # fmt: skip


@pytest.mark.parametrize("per_image", [True, False])
def test_loss_is_the_cross_entropy_per_valid_keypoint(per_image):
    random = np.random.RandomState(0)
    logits = random.randn(3, 4, 4, 2).astype(np.float32)
    cells = random.randint(0, 16, [3, 2])
    valid = np.array([[True, True], [True, False], [False, True]])
    flat = np.transpose(logits, [0, 3, 1, 2]).reshape(3, 2, 16).astype(np.float64)
    each = np.log(np.exp(flat).sum(-1)) - np.take_along_axis(flat, cells[..., None], 2)[..., 0]
    sums = [(each[:2] * valid[:2]).sum(), (each[2:] * valid[2:]).sum(), 0]
    expected = (sums[0] / 3 + sums[1] / 1 + 0) / 3 if per_image else sum(sums) / 4
    loss = losses_of(logits, cells, valid, [0, 0, 1], 3, f"TRAIN.LOSS_PER_IMAGE={per_image}")
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("per_image", [True, False])
def test_loss_without_valid_keypoints_is_zero(per_image):
    setting = f"TRAIN.LOSS_PER_IMAGE={per_image}"
    assert losses_of(np.zeros([0, 4, 4, 2], np.float32), np.zeros([0, 2]), np.zeros([0, 2], bool), [], 2, setting) == 0
