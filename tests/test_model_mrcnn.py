"""Mask head, its targets and its loss."""

import numpy as np
import pytest

import model_mrcnn
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


def loss_of(logits, labels, targets, members, *settings):
    cfg = tiny_config(*settings)
    return evaluate(
        lambda: model_mrcnn.mask_losses(
            tf.constant(logits), tf.constant(labels, tf.int32), tf.constant(targets), tf.constant(members), cfg
        )
    )


@pytest.mark.parametrize("per_image", [True, False])
def test_loss_equals_the_mean_cross_entropy_of_the_own_class(per_image):
    random = np.random.RandomState(0)
    members = np.array([[True, False, True], [False, True, False]])
    logits = random.randn(3, 6, 6, 4).astype(np.float32) * 3
    labels, targets = np.array([1, 4, 2]), random.randint(0, 2, [3, 6, 6]).astype(np.float32)
    own = logits[np.arange(3), :, :, labels - 1].astype(np.float64)
    each = (np.log1p(np.exp(own)) - targets * own).mean((1, 2))
    expected = (each[:2].mean() + each[2]) / 2 if per_image else each.mean()
    losses, stats = loss_of(logits, labels, targets, members, f"TRAIN.LOSS_PER_IMAGE={per_image}")
    assert losses["mrcnn/mask_loss"] == pytest.approx(expected, rel=1e-5)
    assert stats["mrcnn/accuracy"] == pytest.approx(((own > 0) == (targets > 0.5)).mean())


@pytest.mark.parametrize("per_image", [True, False])
def test_class_agnostic_masks_are_those_of_every_class(per_image):
    """One channel has the loss and the probabilities of as many equal channels as there are classes."""
    random = np.random.RandomState(0)
    members = np.array([[True, False, True], [False, True, False]])
    one = random.randn(3, 6, 6, 1).astype(np.float32) * 3
    labels, targets = np.array([1, 4, 2]), random.randint(0, 2, [3, 6, 6]).astype(np.float32)
    (loss, stats), (wanted, wanted_stats) = (
        loss_of(logits, labels, targets, members, f"TRAIN.LOSS_PER_IMAGE={per_image}")
        for logits in (one, np.repeat(one, 4, 3))
    )
    assert loss["mrcnn/mask_loss"] == pytest.approx(wanted["mrcnn/mask_loss"], rel=1e-6) and stats == wanted_stats
    probabilities = evaluate(lambda: model_mrcnn.mask_probabilities(tf.constant(one), tf.constant([1, 4, 2])))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-one[..., 0])), rtol=1e-5)


def test_loss_without_foreground_is_zero():
    empty = np.zeros([0, 6, 6], np.float32)
    losses, stats = loss_of(np.zeros([0, 6, 6, 3], np.float32), np.zeros(0), empty, np.zeros([2, 5], bool))
    assert losses["mrcnn/mask_loss"] == 0 and all(np.isfinite(v) for v in stats.values())


def test_probabilities_are_those_of_the_predicted_class():
    logits = np.random.RandomState(0).randn(2, 3, 3, 5).astype(np.float32)
    probabilities = evaluate(lambda: model_mrcnn.mask_probabilities(tf.constant(logits), tf.constant([2, 5])))
    expected = 1 / (1 + np.exp(-np.stack([logits[0, ..., 1], logits[1, ..., 4]])))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


@pytest.mark.parametrize("settings, size", [(["MODE_FPN=True"], 14), (["MODE_FPN=False"], 7)])
def test_head_doubles_the_resolution_and_has_the_public_names(settings, size):
    def make():
        with tf.variable_scope("maskrcnn"):
            logits = model_mrcnn.mask_head(tf.zeros([2, size, size, 16]), 3, tiny_config(*settings))
        return logits, tf.constant([v.op.name for v in tf.global_variables()])

    logits, names = evaluate(make)
    assert logits.shape == (2, 2 * size, 2 * size, 3)
    convs = [f"fcn{i}" for i in range(4)] if size == 14 else []
    expected = [f"maskrcnn/{layer}/{part}" for layer in [*convs, "deconv", "conv"] for part in "Wb"]
    assert [n.decode() for n in names] == expected


def test_targets_pass_no_gradient():
    def make():
        boxes = tf.constant([[0.0, 0, 8, 8]])
        edges = tf.constant([[[0.0, 4, 4, 4], [4, 0, 0, 0]]])  # the vertical sides say nothing
        targets = model_mrcnn.mask_targets(boxes, edges, 8)
        assert tf.gradients(targets, [boxes, edges]) == [None, None]
        return targets

    assert evaluate(make)[0, :4, :4].all()
