"""Sizes of RoIs as settings, and proposals chosen over a whole batch."""

import numpy as np
import pytest
from graph import constants, evaluate, make_batch, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from model_rcnn import build_inference, build_training
from model_rpn import best_of_batch
from utils.checkpoint import fit_weights
from utils.tf_v1 import tf

OBJECTS = [[(5, 6, 60, 50, 1), (30, 20, 90, 80, 2)]]
SIZES = ["FRCNN.ROI_SIZE=5", "MRCNN.ROI_SIZE=10", "KRCNN.ROI_SIZE=8"]


def shapes(cfg):
    """{variable: shape} and the outputs' shapes of the inference graph, and the losses of a step."""
    batch = make_batch([(96, 96)], OBJECTS, cfg)
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        losses, _ = build_training(constants(batch), cfg)
        with tf.variable_scope("", reuse=True):
            outputs = build_inference(tf.constant(batch["image"]), tf.constant(batch["image_shape"]), cfg)
        session.run(tf.global_variables_initializer())
        losses, outputs = session.run([losses, outputs])
        variables = {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}
    return variables, {k: v.shape for k, v in outputs.items()}, losses


@pytest.mark.parametrize(
    ("mode", "masks", "maps"),
    [
        (["MODE_FPN=True", "MODE_MASK=True", "MODE_KEYPOINT=True"], 20, True),
        (["MODE_FPN=True", "MODE_MASK=True", "FPN.CASCADE=True"], 20, False),
        (["MODE_FPN=False", "MODE_MASK=True"], 10, False),
    ],
)
def test_rois_of_other_sizes_train_and_predict(mode, masks, maps):
    cfg = tiny_config(*mode, *SIZES, "TEST.RESULT_SCORE_THRESH=0.0", "TEST.RESULTS_PER_IM=3")
    variables, outputs, losses = shapes(cfg)
    assert outputs["masks"] == (1, 3, masks, masks) and all(np.isfinite(v) for v in losses.values())
    assert ("keypoints" in outputs) == maps
    heads = {n: s for n, s in variables.items() if n.endswith("fc6/W")}
    assert all(s[0] == 5 * 5 * 16 for s in heads.values()) and len(heads) == (3 if cfg.FPN.CASCADE else cfg.MODE_FPN)


def test_weights_of_another_size_are_refused_by_the_settings_name():
    ours = {"fastrcnn/fc6/W": (25 * 16, 32), "fastrcnn/fc6/b": (32,), "conv0/W": (7, 7, 3, 8)}
    weights = {n: np.zeros(s, np.float32) for n, s in ours.items()}
    weights["fastrcnn/fc6/W"] = np.zeros((49 * 16, 32), np.float32)
    _, report = fit_weights(weights, ours, origin="r50.npz")
    with pytest.raises(UserError, match=r"r50\.npz: fastrcnn/fc6/W has shape .* set FRCNN\.ROI_SIZE to the size") as e:
        report.check()
    assert "\n" not in str(e.value)


def reference(scores, limit):
    """The `limit` best of all images, one after the other, in float64."""
    order = sorted(np.ndindex(scores.shape), key=lambda at: (-float(scores[at]), at))
    chosen = np.zeros(scores.shape, bool)
    for at in order[:limit]:
        chosen[at] = np.isfinite(scores[at])
    return chosen


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.integers(1, 12))
@settings(max_examples=25)
def test_the_best_proposals_of_a_batch_equal_the_reference(seed, images, places, limit):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-3, 4, (images, places)).astype(np.float32)  # with ties
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    found = evaluate(lambda: best_of_batch(tf.constant(scores), limit))
    np.testing.assert_array_equal(found, reference(scores, limit))


def test_proposals_of_a_batch_are_chosen_together_in_training_alone():
    from model_rpn import rpn_proposals

    rng = np.random.default_rng(0)
    anchors = [np.array([[8 * i, 0, 8 * i + 6, 6] for i in range(12)], np.float32)]
    logits = [np.stack([rng.random(12) + 5, rng.random(12)]).astype(np.float32)]  # the first image is sure of its own
    deltas = [np.zeros((2, 12, 4), np.float32)]
    shape = np.array([[100, 100], [100, 100]], np.int32)
    more = ["RPN.TRAIN_FPN_NMS_TOPK=10", "RPN.TEST_FPN_NMS_TOPK=10"]

    def counts(training, *settings):
        cfg = tiny_config(*more, *settings)
        _, scores, valid = evaluate(lambda: rpn_proposals(
            [tf.constant(v) for v in logits], [tf.constant(v) for v in deltas], [tf.constant(v) for v in anchors],
            tf.constant(shape), cfg, training,
        ))  # fmt: skip
        assert (np.diff(np.where(valid, scores, -1e9), axis=1) <= 0).all()
        return valid.sum(1).tolist()

    assert counts(True) == [10, 10]
    assert counts(True, "RPN.TRAIN_TOPK_OF_BATCH=True") == [10, 0]
    assert counts(False, "RPN.TRAIN_TOPK_OF_BATCH=True") == [10, 10]
