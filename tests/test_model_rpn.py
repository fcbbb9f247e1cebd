"""Region proposals: matching, sampling, losses and proposals against recordings and references in NumPy."""

from pathlib import Path

import numpy as np
import pytest
from box_reference import decode_boxes as numpy_decode
from box_reference import pairwise_iou as numpy_iou

import model_rpn
from tests.graph import constants, evaluate, make_batch, tiny_config
from tests.test_model_box import reference_giou
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_unit.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files if key.startswith("matcher/")}


def match(anchors, gt_boxes, usable, cfg):
    def make():
        return model_rpn.match_anchors(tf.constant(anchors), tf.constant(gt_boxes), tf.constant(usable), cfg)

    return evaluate(make)


def test_matching_equals_the_recording(golden):
    cfg = tiny_config()
    gt_boxes = golden["matcher/gt"][None, :4]
    foreground, background, index = match(golden["matcher/anchors"], gt_boxes, np.ones([1, 4], bool), cfg)
    labels = np.where(foreground[0], 1, np.where(background[0], 0, -1))
    np.testing.assert_array_equal(labels, golden["matcher/rpn_labels"])
    np.testing.assert_array_equal(index[0][labels == 1], golden["matcher/rpn_matches"][labels == 1])


def test_an_object_that_overlaps_no_anchor_makes_none_foreground(golden):
    """detectron2 makes every anchor foreground that overlaps it as little as the best does: all that have IoU 0."""
    far = golden["matcher/gt"][None, 4:]
    foreground, background, _ = match(golden["matcher/anchors"], far, np.ones([1, 1], bool), tiny_config())
    assert not foreground.any() and background.all()


def test_padding_and_crowd_regions_match_nothing():
    anchors = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    foreground, background, _ = match(anchors, anchors[None], np.array([[True, False]]), tiny_config())
    assert foreground.tolist() == [[True, False]] and background.tolist() == [[False, True]]


# ------------------------------------------------------------------------------------------------------------- losses
def toy_anchors():
    y, x = np.mgrid[0:96:8, 0:96:8].reshape(2, -1)
    return np.concatenate([np.stack([x - s, y - s, x + s, y + s], 1) for s in (8, 20)]).astype(np.float32)


def reference_losses(logits, deltas, anchors, batch, cfg, on_padding=True):
    """All anchors sampled, float64."""
    class_loss = box_loss = 0.0
    for row in range(len(logits)):
        usable = (batch["gt_labels"][row] > 0) & ~batch["gt_is_crowd"][row]
        boxes = batch["gt_boxes"][row][usable].astype(np.float64)
        iou = numpy_iou(anchors.astype(np.float64), boxes) if len(boxes) else np.zeros([len(anchors), 1])
        best = iou.max(1)
        positive = (best >= 0.7) | ((iou == iou.max(0)) & (iou > 0)).any(1)
        negative = (best < 0.3) & ~positive
        if not on_padding:
            h, w = batch["image_shape"][row]
            negative &= ((anchors[:, :2] + anchors[:, 2:]) / 2 < [w, h]).all(1)
        z = logits[row].astype(np.float64)
        class_loss += np.log1p(np.exp(-z))[positive].sum() + np.log1p(np.exp(z))[negative].sum()
        if len(boxes):
            a, b = anchors[positive].astype(np.float64), boxes[iou.argmax(1)[positive]]
            size_a, size_b = a[:, 2:] - a[:, :2], b[:, 2:] - b[:, :2]
            shift = ((b[:, 2:] + b[:, :2]) - (a[:, 2:] + a[:, :2])) / 2 / size_a
            if cfg.RPN.BBOX_LOSS == "giou":
                decoded = numpy_decode(deltas[row][positive].astype(np.float64), a)
                box_loss += sum(1 - reference_giou(x, y) for x, y in zip(decoded, b))
                continue
            error = np.abs(deltas[row][positive] - np.concatenate([shift, np.log(size_b / size_a)], 1))
            beta = cfg.RPN.SMOOTH_L1_BETA
            box_loss += np.where(error < beta, 0.5 * error**2 / beta, error - 0.5 * beta).sum()
    scale = cfg.RPN.BATCH_PER_IM * len(logits)
    return class_loss / scale, cfg.RPN.BBOX_LOSS_WEIGHT * box_loss / scale


@pytest.mark.parametrize("kind, weight", [("smooth_l1", 1.0), ("smooth_l1", 0.5), ("giou", 1.0), ("giou", 10.0)])
@pytest.mark.parametrize("on_padding", [True, False])
def test_losses_equal_the_float64_reference_when_everything_is_sampled(on_padding, kind, weight):
    cfg = tiny_config(
        "RPN.BATCH_PER_IM=1000", "RPN.FG_RATIO=1.0", f"RPN.TRAIN_ON_PADDING={on_padding}",
        f"RPN.BBOX_LOSS={kind}", f"RPN.BBOX_LOSS_WEIGHT={weight}",
    )  # fmt: skip
    objects = [[(10, 12, 30, 28, 1), (50, 40, 90, 76, 2)], [(5, 5, 60, 50, 3), (20, 20, 40, 40, 1, True)]]
    batch = make_batch([(96, 96), (64, 80)], objects, cfg)
    random = np.random.RandomState(0)
    anchors = toy_anchors()
    logits = random.randn(2, len(anchors)).astype(np.float32)
    deltas = random.randn(2, len(anchors), 4).astype(np.float32)

    def make():
        return model_rpn.rpn_losses(
            tf.constant(logits), tf.constant(deltas), tf.constant(anchors), constants(batch), cfg
        )[0]  # fmt: skip

    losses = evaluate(make)
    expected = reference_losses(logits, deltas, anchors, batch, cfg, on_padding)
    assert losses["rpn/class_loss"] == pytest.approx(expected[0], rel=1e-5)
    assert losses["rpn/box_loss"] == pytest.approx(expected[1], rel=1e-5)


def test_losses_touch_the_sampled_anchors_only():
    cfg = tiny_config("RPN.BATCH_PER_IM=16")
    batch = make_batch([(96, 96)], [[(10, 12, 30, 28, 1)]], cfg)
    anchors = toy_anchors()

    def make():
        logits, deltas = tf.ones([1, len(anchors)]), tf.ones([1, len(anchors), 4])
        losses, stats = model_rpn.rpn_losses(logits, deltas, tf.constant(anchors), constants(batch), cfg)
        return *tf.gradients(tf.add_n(list(losses.values())), [logits, deltas]), stats

    by_logits, by_deltas, stats = evaluate(make)
    assert np.count_nonzero(by_logits) == 16 == stats["rpn/num_sampled"]
    assert np.count_nonzero(by_deltas.any(-1)) == stats["rpn/num_positive"] >= 1


@pytest.mark.parametrize("batch_size, ratio, positives", [(16, 0.25, 4), (16, 0.5, 8), (60, 1.0, None)])
def test_the_sample_has_its_size_and_at_most_its_share_of_foreground(batch_size, ratio, positives):
    """As many background anchors as the foreground leaves room for."""
    cfg = tiny_config(f"RPN.BATCH_PER_IM={batch_size}", f"RPN.FG_RATIO={ratio}", "RPN.POSITIVE_ANCHOR_THRESH=0.3")
    batch = make_batch([(96, 96)], [[(10, 12, 50, 48, 1), (40, 40, 80, 84, 2), (70, 4, 90, 26, 1)]], cfg)
    anchors = toy_anchors()
    foreground, background, _ = match(anchors, batch["gt_boxes"], batch["gt_labels"] > 0, cfg)
    assert 8 < foreground.sum() < 60 < background.sum()

    def make():
        logits = tf.zeros([1, len(anchors)])
        losses, stats = model_rpn.rpn_losses(
            logits, tf.zeros([1, len(anchors), 4]), tf.constant(anchors), constants(batch), cfg
        )
        return stats, tf.gradients(losses["rpn/class_loss"], logits)[0]

    stats, gradient = evaluate(make)
    positives = positives or foreground.sum()
    assert stats["rpn/num_positive"] == positives and stats["rpn/num_sampled"] == batch_size
    # With logits 0 the gradient's sign tells the target.
    assert (gradient < 0).sum() == positives and (gradient > 0).sum() == batch_size - positives
    assert foreground[gradient < 0].all() and background[gradient > 0].all()


def test_anchors_in_crowd_regions_are_no_background_when_asked():
    anchors = np.array([[0, 0, 10, 10], [40, 40, 50, 50], [80, 80, 90, 90]], np.float32)
    counts = []
    for threshold in (9.99, 0.5):
        cfg = tiny_config(f"RPN.CROWD_OVERLAP_THRESH={threshold}")
        batch = make_batch([(96, 96)], [[(0, 0, 10, 10, 1), (35, 35, 60, 60, 1, True)]], cfg)
        counts.append(
            evaluate(
                lambda b=batch, c=cfg: model_rpn.rpn_losses(
                    tf.zeros([1, 3]), tf.zeros([1, 3, 4]), tf.constant(anchors), constants(b), c
                )[1]["rpn/num_sampled"]
            )
        )
    assert counts == [3, 2]


# ----------------------------------------------------------------------------------------------------------- proposals
def reference_proposals(logits, deltas, anchors, shape, before, after, threshold):
    """Per level top-k, decode, clip, drop empty, greedy NMS; the best of all levels. One image, float64."""
    kept = []
    for z, d, a in zip(logits, deltas, anchors):
        order = np.argsort(-z, kind="stable")[:before]
        a, d = a[order].astype(np.float64), d[order].astype(np.float64)
        size = a[:, 2:] - a[:, :2]
        center = (a[:, :2] + a[:, 2:]) / 2 + d[:, :2] * size
        half = np.exp(np.minimum(d[:, 2:], np.log(1000 / 16))) * size / 2
        boxes = np.concatenate([center - half, center + half], 1)
        boxes = np.clip(boxes, 0, [shape[1], shape[0]] * 2)
        good = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores = boxes[good], z[order][good]
        alive = np.ones(len(boxes), bool)
        for i in range(len(boxes)):
            if alive[i]:
                kept.append((scores[i], boxes[i]))
                alive[i + 1 :] &= numpy_iou(boxes[i : i + 1], boxes[i + 1 :])[0] <= threshold
    kept.sort(key=lambda pair: -pair[0])
    return np.array([b for _, b in kept[:after]]), np.array([s for s, _ in kept[:after]])


def pyramid_of_predictions():
    """Logits, deltas and anchors of two levels for two images, and the images' shapes."""
    random = np.random.RandomState(1)
    anchors = [random.uniform(0, 80, [n, 2]) for n in (150, 30)]
    anchors = [np.concatenate([a, a + random.uniform(8, 40, a.shape)], 1).astype(np.float32) for a in anchors]
    logits = [random.randn(2, len(a)).astype(np.float32) for a in anchors]
    deltas = [0.3 * random.randn(2, len(a), 4).astype(np.float32) for a in anchors]
    return (logits, deltas, anchors), np.array([[100, 90], [64, 70]], np.int32)


def proposals_in_graph(predictions, shapes, cfg, training=False):
    def make():
        tensors = ([tf.constant(x) for x in group] for group in predictions)
        return model_rpn.rpn_proposals(*tensors, tf.constant(shapes), cfg, training)

    return evaluate(make)


def check_proposals(found, expected_of_image):
    boxes, scores, valid = found
    for row in range(len(boxes)):
        expected, expected_scores = expected_of_image(row)
        assert valid[row].sum() == len(expected)
        np.testing.assert_allclose(scores[row][valid[row]], expected_scores, rtol=1e-6)
        np.testing.assert_allclose(boxes[row][valid[row]], expected, atol=1e-3)


def test_proposals_equal_the_float64_reference():
    cfg = tiny_config("RPN.TEST_PER_LEVEL_NMS_TOPK=60", "RPN.TEST_FPN_NMS_TOPK=40")
    (logits, deltas, anchors), shapes = pyramid_of_predictions()
    found = proposals_in_graph((logits, deltas, anchors), shapes, cfg)
    assert found[0].shape == (2, 40, 4)
    check_proposals(
        found,
        lambda row: reference_proposals(
            [z[row] for z in logits], [d[row] for d in deltas], anchors, shapes[row], 60, 40, 0.7
        ),
    )


@pytest.mark.parametrize("phase", ["TRAIN", "TEST"])
def test_joint_proposals_equal_the_float64_reference_with_one_top_k_and_one_nms(phase):
    other = {"TRAIN": "TEST", "TEST": "TRAIN"}[phase]
    cfg = tiny_config(
        "FPN.PROPOSAL_MODE=Joint", "RPN.PROPOSAL_NMS_THRESH=0.4",
        f"RPN.{phase}_PRE_NMS_TOPK=70", f"RPN.{phase}_POST_NMS_TOPK=30",
        f"RPN.{other}_PRE_NMS_TOPK=9", f"RPN.{other}_POST_NMS_TOPK=5",
    )  # fmt: skip
    (logits, deltas, anchors), shapes = pyramid_of_predictions()
    found = proposals_in_graph((logits, deltas, anchors), shapes, cfg, phase == "TRAIN")
    assert found[0].shape == (2, 30, 4)
    check_proposals(
        found,
        lambda row: reference_proposals(
            [np.concatenate([z[row] for z in logits])], [np.concatenate([d[row] for d in deltas])],
            [np.concatenate(anchors)], shapes[row], 70, 30, 0.4,
        ),
    )  # fmt: skip


def test_a_box_that_two_levels_propose_is_kept_once_by_joint_proposals_alone():
    anchor = np.array([[10, 10, 40, 40]], np.float32)
    predictions = [
        [np.array([[z]], np.float32) for z in (2.0, 1.0)],
        [np.zeros([1, 1, 4], np.float32)] * 2,
        [anchor] * 2,
    ]
    counts = []
    for mode in ("Level", "Joint"):
        found = proposals_in_graph(predictions, np.array([[64, 64]]), tiny_config(f"FPN.PROPOSAL_MODE={mode}"))
        counts.append(found[2].sum())
    assert counts == [2, 1]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_proposals_without_a_finite_score_are_absent(poison):
    cfg = tiny_config()
    anchors = toy_anchors()

    def make():
        logits, deltas = tf.fill([2, len(anchors)], poison), tf.zeros([2, len(anchors), 4])
        shape = tf.constant([[96, 96]] * 2)
        return model_rpn.rpn_proposals([logits], [deltas], [tf.constant(anchors)], shape, cfg, training=True)

    boxes, _, valid = evaluate(make)
    assert not valid.any() and np.isfinite(boxes).all()
