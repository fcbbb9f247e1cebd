"""Soft-NMS and NMS across classes against the paper's algorithm in float64, and against TensorFlow's hard NMS."""

import numpy as np
import pytest
from box_reference import pairwise_iou
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import model_box
import model_frcnn
from common import UserError
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick

CLASSES = 3
METHODS = ["hard", "soft_linear", "soft_gaussian"]
_built = {}


def decoder(*options):
    """decode(boxes [N,R,B,4], scores [N,R,C], valid [N,R]) of 100 x 100 images, by these settings."""
    key = tuple(options)
    if key not in _built:
        cfg = tiny_config(*options)
        graph = tf.Graph()
        with graph.as_default():
            for num_boxes in (1, CLASSES):
                shapes = [None, None, num_boxes, 4], [None, None, None], [None, None]
                inputs = [tf.placeholder(t, s) for t, s in zip((tf.float32, tf.float32, tf.bool), shapes)]
                image_shape = tf.fill([tf.shape(inputs[0])[0], 2], 100)
                outputs = model_frcnn.decode_detections(*inputs, image_shape, cfg)
                _built[(*key, num_boxes)] = inputs, outputs
            _built[key] = cfg, tf.Session()
    cfg, session = _built[key]

    def decode(*arrays):
        inputs, outputs = _built[(*key, arrays[0].shape[2])]
        return session.run(outputs, dict(zip(inputs, arrays)))

    return cfg, decode


@pytest.fixture(scope="module", autouse=True)
def close_sessions():
    yield
    for entry in _built.values():
        if isinstance(entry[1], tf.Session):
            entry[1].close()
    _built.clear()


def make_problem(seed, kind, num_boxes, rows=14):
    rng = np.random.default_rng(seed)
    if kind == "grid":  # overlaps that are simple fractions, hence exactly at thresholds, and equal boxes
        corner = rng.integers(0, 4, (rows, num_boxes, 2)) * 10
        size = rng.integers(0, 4, corner.shape) * 10
    else:  # clusters of much overlap
        centre = rng.uniform(10, 60, (2, 1, 2))[rng.integers(0, 2, rows)]
        corner = centre + rng.normal(0, 4, (rows, num_boxes, 2))
        size = 25 + rng.normal(0, 4, corner.shape)
    boxes = np.clip(np.concatenate([corner, corner + size], -1), 0, 100).astype(np.float32)
    scores = rng.random((rows, CLASSES)).astype(np.float32)
    return boxes, scores * (rng.random(scores.shape) < 0.7)


def reference(boxes, scores, labels, cfg):
    """Soft-NMS as the paper lists it (figure 2) on each group of labels, float64, then the best of all groups.

    Boxes [K,4], scores [K], labels [K] -> [(score, label, box)] and how close the closest decision was."""
    test = cfg.TEST
    margin, found = 1.0, []
    least = test.RESULT_SCORE_THRESH if test.NMS == "hard" else min(test.RESULT_SCORE_THRESH, test.SOFT_NMS_MIN_SCORE)
    groups = [labels == labels] if test.NMS_CLASS_AGNOSTIC else [labels == c for c in np.unique(labels)]
    for group in groups:
        candidates = np.flatnonzero(group & (scores > test.RESULT_SCORE_THRESH)).tolist()
        current = {i: float(scores[i]) for i in candidates}
        while candidates:
            m = max(candidates, key=current.get)
            rest = [current[i] for i in candidates if i != m]
            margin = min([margin, abs(current[m] - least), *(abs(current[m] - r) for r in rest if current[m] > least)])
            candidates.remove(m)
            if current[m] <= least:
                break
            found.append((current[m], labels[m], boxes[m]))
            for i in candidates:
                iou = pairwise_iou(boxes[m : m + 1].astype(np.float64), boxes[i : i + 1].astype(np.float64))[0, 0]
                if test.NMS == "soft_gaussian":
                    current[i] *= np.exp(-(iou**2) / test.SOFT_NMS_SIGMA)
                elif iou > test.FRCNN_NMS_THRESH:
                    current[i] *= 0.0 if test.NMS == "hard" else 1 - iou
    found.sort(key=lambda d: -d[0])
    close = [a[0] - b[0] for a, b in zip(found, found[1:])]
    return found[: test.RESULTS_PER_IM], min([margin, *close])


def candidates_of(boxes, scores):
    """[R,B,4], [R,C] -> boxes [R·C,4], scores [R·C], labels [R·C]."""
    rows, classes = (g.ravel() for g in np.indices(scores.shape))
    return boxes[rows, classes % boxes.shape[1]], scores.ravel(), classes + 1


def check(found, row, expected):
    boxes, scores, labels, count = (x[row] for x in found)
    assert count == len(expected)
    np.testing.assert_allclose(scores[:count], [e[0] for e in expected], rtol=1e-4)
    assert labels[:count].tolist() == [e[1] for e in expected]
    np.testing.assert_array_equal(boxes[:count], np.reshape([e[2] for e in expected], [-1, 4]))
    assert not (boxes[count:].any() or scores[count:].any() or labels[count:].any())


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["grid", "clusters"]),
    num_boxes=st.sampled_from([1, CLASSES]),
    limit=st.sampled_from([1, 7, 300]),
)
@example(seed=0, kind="clusters", num_boxes=1, limit=300)
@example(seed=1, kind="grid", num_boxes=CLASSES, limit=300)
def test_detections_equal_the_papers_algorithm(method, agnostic, seed, kind, num_boxes, limit):
    """With boxes of each class and with shared ones, for two images with different numbers of candidates."""
    cfg, decode = decoder(
        f"TEST.NMS={method}", f"TEST.NMS_CLASS_AGNOSTIC={agnostic}", f"TEST.RESULTS_PER_IM={limit}",
        "TEST.RESULT_SCORE_THRESH=0.25", "TEST.SOFT_NMS_MIN_SCORE=0.01", "TEST.SOFT_NMS_SIGMA=0.4",
    )  # fmt: skip
    problems = [make_problem(seed, kind, num_boxes), make_problem(seed + 1, kind, num_boxes)]
    boxes, scores = (np.stack(x) for x in zip(*problems))
    valid = np.arange(boxes.shape[1]) < np.array([[boxes.shape[1]], [5]])
    expected = [reference(*candidates_of(b, s * v[:, None]), cfg) for b, s, v in zip(boxes, scores, valid)]
    # Scores of equal boxes are equally lowered: only what float32 can tell apart is compared.
    assume(min(margin for _, margin in expected) > 1e-5)
    found = decode(boxes, scores, valid)
    for row in range(2):
        check(found, row, expected[row][0])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["grid", "clusters"]), num_boxes=st.sampled_from([1, 3]))
def test_taking_boxes_one_by_one_equals_tensorflows_hard_nms_to_the_bit(seed, kind, num_boxes):
    cfg, decode = decoder("TEST.RESULTS_PER_IM=30")
    boxes, scores = (x[None] for x in make_problem(seed, kind, num_boxes, rows=25))
    wanted = decode(boxes, scores, np.ones([1, 25], bool))
    if "select" not in _built:
        with tf.Graph().as_default():
            inputs = [
                tf.placeholder(*a) for a in ((tf.float32, [1, None, 4]), (tf.float32, [1, None]), (tf.int32, [1, None]))
            ]
            _built["select"] = (inputs, model_frcnn.select_detections(*inputs, cfg)), tf.Session()
    (inputs, outputs), session = _built["select"]
    found = session.run(outputs, {i: x[None] for i, x in zip(inputs, candidates_of(boxes[0], scores[0]))})
    for a, b in zip(found, wanted):
        np.testing.assert_array_equal(a, b)


def one_image(method, boxes, scores, *options):
    """decode of boxes [R,4] that the classes share and scores [R] of class 1."""
    _, decode = decoder(f"TEST.NMS={method}", *options)
    padded = np.zeros([1, len(scores), CLASSES], np.float32)
    padded[0, :, 0] = scores
    return decode(np.float32(boxes)[None, :, None], padded, np.ones([1, len(scores)], bool))


@pytest.mark.parametrize(
    ("method", "second"),
    [("hard", None), ("soft_linear", 0.8 * (1 - 2 / 3)), ("soft_gaussian", 0.8 * np.exp(-((2 / 3) ** 2) / 0.5))],
)
def test_a_neighbour_of_two_thirds_overlap_is_rescored_by_the_published_formulas(method, second):
    _, scores, _, count = one_image(method, [[0, 0, 10, 10], [0, 2, 10, 12]], [0.9, 0.8])
    assert count[0] == (1 if second is None else 2)
    np.testing.assert_allclose(scores[0, : count[0]], [0.9, second][: count[0]], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_no_candidate_gives_no_detection(method):
    for agnostic in (False, True):
        boxes, scores, labels, count = one_image(
            method, [[0, 0, 10, 10]], [0.05], f"TEST.NMS_CLASS_AGNOSTIC={agnostic}"
        )
        assert count.tolist() == [0] and boxes.shape == (1, 100, 4) and scores.shape == labels.shape == (1, 100)
        assert not (boxes.any() or scores.any() or labels.any())


def test_soft_nms_keeps_lowered_scores_down_to_its_own_minimum_or_a_lower_threshold():
    boxes = np.tile([0, 0, 10, 10], [6, 1])
    start = np.linspace(0.9, 0.8, 6)
    expected = start * np.exp(-np.arange(6) / 0.5)  # each is lowered by all before it
    for options, least in [
        ([], 0.001),
        (["TEST.SOFT_NMS_MIN_SCORE=0.02"], 0.02),
        (["TEST.SOFT_NMS_MIN_SCORE=0.02", "TEST.RESULT_SCORE_THRESH=0.0001"], 0.0001),
    ]:
        _, scores, _, count = one_image("soft_gaussian", boxes, start, *options)
        wanted = expected[expected > least]
        assert count[0] == len(wanted) and len(wanted) > 0
        np.testing.assert_allclose(scores[0, : count[0]], wanted, rtol=1e-5)


def test_suppression_across_classes_only_when_asked_for():
    boxes = np.float32([[[[0, 0, 10, 10]], [[50, 50, 60, 60]]]])
    scores = np.float32([[[0.9, 0.6, 0.0], [0.0, 0.0, 0.7]]])
    valid = np.ones([1, 2], bool)
    assert decoder("TEST.NMS=hard")[1](boxes, scores, valid)[2][0, :4].tolist() == [1, 3, 2, 0]
    assert decoder("TEST.NMS_CLASS_AGNOSTIC=True")[1](boxes, scores, valid)[2][0, :4].tolist() == [1, 3, 0, 0]
    soft = decoder("TEST.NMS_CLASS_AGNOSTIC=True", "TEST.NMS=soft_gaussian")[1](boxes, scores, valid)
    assert soft[2][0, :4].tolist() == [1, 3, 2, 0]
    np.testing.assert_allclose(soft[1][0, :3], [0.9, 0.7, 0.6 * np.exp(-2)], rtol=1e-6)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_three_hundred_results_of_an_image(method, agnostic):
    """What LVIS is scored on: more than the usual hundred, the best of all classes, down to the limit."""
    corner = np.stack(np.meshgrid(np.arange(12), np.arange(12)), -1).reshape(-1, 2) * 8.0  # 144 boxes apart
    boxes = np.concatenate([corner, corner + 7], 1).astype(np.float32)[None, :, None]
    scores = np.random.default_rng(0).uniform(0.1, 1, (1, 144, CLASSES)).astype(np.float32)
    _, decode = decoder(f"TEST.NMS={method}", f"TEST.NMS_CLASS_AGNOSTIC={agnostic}", "TEST.RESULTS_PER_IM=300")
    _, found, labels, count = decode(boxes, scores, np.ones([1, 144], bool))
    assert labels.shape == (1, 300)
    if agnostic and method == "hard":
        wanted, classes = scores[0].max(1), scores[0].argmax(1) + 1
    else:
        wanted, classes = scores.ravel(), np.tile(np.arange(CLASSES) + 1, 144)
    if not agnostic or method == "hard":
        order = np.argsort(-wanted)[:300]
        assert count[0] == len(order)
        np.testing.assert_array_equal(found[0, : count[0]], wanted[order])
        np.testing.assert_array_equal(labels[0, : count[0]], classes[order])
    else:
        # A box's other classes overlap it fully: nothing is left of them, or exp(-1 / sigma).
        assert count[0] == (144 if method == "soft_linear" else 300) and (np.diff(found[0, : count[0]]) <= 0).all()
        np.testing.assert_array_equal(found[0, :20], np.sort(scores[0].max(1))[::-1][:20])


def test_a_nan_neither_counts_nor_spreads():
    boxes = np.float32([[0, 0, 10, 10], [0, 1, 10, np.nan], [0, 2, 10, 12]])
    found, scores, _, count = one_image("soft_gaussian", boxes, [0.9, 0.95, np.nan])
    assert count.tolist() == [1] and scores[0, 0] == np.float32(0.9)
    np.testing.assert_array_equal(found[0, 0], boxes[0])


def test_greedy_nms_ends_where_nothing_is_left_in_any_image():
    boxes = np.zeros([2, 3, 4], np.float32)
    scores = np.float32([[0.5, 0.0, 0.7], [0.0, 0.0, 0.0]])
    index, taken, count = evaluate(
        lambda: model_box.greedy_nms(tf.constant(boxes), tf.constant(scores), None, lambda iou: 1.0 - iou, 4, 0.0)
    )
    assert count.tolist() == [2, 0] and index.tolist() == [[2, 0, 0, 0], [0] * 4]
    np.testing.assert_array_equal(taken, np.float32([[0.7, 0.5, 0, 0], [0] * 4]))


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("TEST.NMS=soft", "TEST.NMS"),
        ("TEST.SOFT_NMS_SIGMA=0.0", "TEST.SOFT_NMS_SIGMA"),
        ("TEST.RESULT_SCORE_THRESH=-0.1", "TEST.RESULT_SCORE_THRESH"),
        ("TEST.SOFT_NMS_MIN_SCORE=1.0", "TEST.SOFT_NMS_MIN_SCORE"),
        ("TEST.FRCNN_NMS_THRESH=1.5", "TEST.FRCNN_NMS_THRESH"),
        ("TEST.RESULTS_PER_IM=0", "TEST.RESULTS_PER_IM"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(setting, hint):
    with pytest.raises(UserError, match=hint):
        tiny_config(setting)
