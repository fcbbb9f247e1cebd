"""What losses share: random samples and box losses against references in NumPy."""

import numpy as np
import pytest
from box_reference import decode_boxes as numpy_decode

import model_losses
from tests.graph import evaluate
from tests.test_model_box import reference_giou
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


def sample(candidates, count, seeds, salt=11):
    return evaluate(
        lambda: model_losses.sample_per_image(tf.constant(candidates), count, tf.constant(seeds, tf.int32), salt)
    )


def test_samples_are_distinct_candidates_up_to_the_count():
    candidates = np.random.RandomState(0).rand(3, 200) < np.array([[0.0], [0.05], [0.9]])
    index, valid = sample(candidates, 32, [1, 2, 3])
    for row in range(3):
        chosen = index[row][valid[row]]
        assert len(set(chosen)) == len(chosen) == min(32, candidates[row].sum())
        assert candidates[row, chosen].all()


def test_samples_depend_on_the_image_seed_alone():
    candidates = np.ones([2, 500], bool)
    pair, _ = sample(candidates, 20, [7, 8])
    swapped, _ = sample(candidates, 20, [8, 7])
    alone, _ = sample(candidates[:1], 20, [8])
    np.testing.assert_array_equal(pair[1], swapped[0])
    np.testing.assert_array_equal(pair[1], alone[0])
    assert (pair[0] != pair[1]).any() and (sample(candidates, 20, [7, 8], salt=12)[0] != pair).any()


def test_every_candidate_is_sampled_equally_often():
    candidates = np.tile(np.arange(50) % 2 == 0, [400, 1])
    index, valid = sample(candidates, 5, np.arange(400))
    counts = np.bincount(index[valid], minlength=50)
    assert counts[1::2].sum() == 0 and counts.sum() == 2000
    assert abs(counts[::2] - 80).max() < 45  # five standard deviations


@pytest.mark.parametrize("beta", [0.0, 1.0 / 9, 1.0])
def test_smooth_l1_equals_its_definition(beta):
    x = np.linspace(-3, 3, 61).astype(np.float32)
    ours = evaluate(lambda: model_losses.smooth_l1(tf.constant(x), beta))
    a = np.abs(x)
    expected = np.where(a < beta, 0.5 * x**2 / (beta or 1), a - 0.5 * beta)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_giou_loss_is_that_of_the_decoded_box_and_its_gradient_the_finite_difference(weights):
    """One reference per row, among them deltas beyond the clamp of decoding and boxes far outside any image."""
    random = np.random.RandomState(4)
    corner = random.uniform(-20, 60, [2, 30, 2])
    references, targets = np.concatenate([corner, corner + random.uniform(4, 50, corner.shape)], -1)
    deltas = 0.5 * random.randn(30, 4) * weights
    deltas[0, 2], deltas[1, :2] = 100 * weights[2], 50 * np.array(weights[:2])

    def make():
        x = tf.constant(deltas, tf.float32)
        tensors = (tf.constant(v, tf.float32) for v in (references, targets))
        losses = model_losses.box_losses(x, *tensors, "giou", 0.0, weights)
        return losses, tf.gradients(losses, x)[0]

    losses, gradient = evaluate(make)

    def expected(row, shift):
        decoded = numpy_decode(deltas[row] + shift, references[row], weights)
        return 1 - reference_giou(decoded, targets[row])

    assert losses.shape == (30, 1) and losses.min() >= 0 and losses.max() <= 2
    np.testing.assert_allclose(losses[:, 0], [expected(row, 0) for row in range(30)], atol=1e-5)
    step = 1e-6
    for row in range(30):
        for k in range(4):
            shift = step * np.eye(4)[k]
            slope = (expected(row, shift) - expected(row, -shift)) / (2 * step)
            assert gradient[row, k] == pytest.approx(slope, abs=5e-5)
    assert gradient[0, 2] == 0 and gradient[1, 0] > 0


def test_giou_loss_of_a_box_that_shrank_to_nothing_has_a_finite_gradient():
    def make():
        deltas = tf.constant([[0.0, 0.0, -200.0, -200.0], [0.1, 0.1, -200.0, 0.0], [0.0, 0.0, 1e10, 1e10]])
        references, targets = tf.constant([[10.0, 10, 30, 30]] * 3), tf.constant([[12.0, 8, 30, 33]] * 3)
        losses = model_losses.box_losses(deltas, references, targets, "giou", 0.0)
        return losses, tf.gradients(losses, deltas)[0]

    losses, gradient = evaluate(make)
    assert np.isfinite(losses).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(losses[:2], 1.0, atol=1e-6)
