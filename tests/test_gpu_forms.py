"""Where a graph has a form for GPUs, that form, computed on the CPU, gives what the other one gives."""

import numpy as np
import pytest

import model_box
import model_frcnn
import model_keypoint
from tests.graph import evaluate, tiny_config
from utils.tf_v1 import graphs_for_gpu, tf

pytestmark = pytest.mark.quick


def both_forms(make):
    """What make() builds, computed in the form for CPUs and in that for GPUs."""
    results = []
    for gpu in (False, True):
        with graphs_for_gpu(gpu):
            results.append(evaluate(make))
    return results


def assert_equal(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def overlapping(rng, shape):
    """Boxes [*shape, 4]: clusters, boxes on a grid whose overlaps are simple fractions, equal and empty ones."""
    corner, size = rng.integers(0, 4, (*shape, 2)) * 10.0, rng.integers(0, 4, (*shape, 2)) * 10.0
    loose = rng.random((*shape, 1)) < 0.6
    corner = np.where(loose, rng.choice([10.0, 55.0], (*shape, 1)) + rng.normal(0, 4, corner.shape), corner)
    size = np.where(loose, 25 + rng.normal(0, 4, size.shape), size)
    return np.concatenate([corner, corner + size], -1).clip(0, 100).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------- NMS
@pytest.mark.parametrize(("threshold", "limit"), [(0.5, 9), (0.7, 200), (1 / 3, 300)])
@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_nms_of_proposals_is_the_same(threshold, limit, block, monkeypatch):
    monkeypatch.setattr(model_box, "_NMS_BLOCK", block)
    rng = np.random.default_rng(block)
    boxes = overlapping(rng, (6, 200))
    scores = rng.normal(0, 3, (6, 200)).round(1).astype(np.float32)  # many are equal
    scores[1, rng.random(200) < 0.7] = -np.inf
    scores[2] = -np.inf
    scores[3, 1:] = -np.inf
    boxes[4] = 10, 10, 50, 50  # all the same
    boxes[5] = np.arange(200, dtype=np.float32)[:, None] * 10 + [0, 0, 5, 5]  # none overlaps
    first, second = both_forms(lambda: model_box.batched_nms(tf.constant(boxes), tf.constant(scores), threshold, limit))
    assert_equal(first, second)
    assert first[2].tolist()[2:5] == [0, 1, 1] and first[2][5] == min(limit, 200)


def test_nms_of_a_long_chain_of_boxes_takes_every_other_one():
    """Each suppresses the next one alone: as many rounds as there are boxes."""
    left = np.arange(100, dtype=np.float32)[:, None] * 3
    boxes = np.concatenate([left, 0 * left, left + 10, 0 * left + 10], 1)[None]
    with graphs_for_gpu(True):
        _, scores, count = evaluate(
            lambda: model_box.batched_nms(tf.constant(boxes), tf.range(100.0, 0, -1)[None], 0.5, 100)
        )
    assert count.tolist() == [50]
    np.testing.assert_array_equal(scores[0, :50], np.arange(100, 0, -2))


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("boxes_per_row", [1, 4])
@pytest.mark.parametrize("block", [5, 1024])
def test_nms_of_detections_is_the_same(agnostic, boxes_per_row, block, monkeypatch):
    monkeypatch.setattr(model_box, "_NMS_BLOCK", block)
    cfg = tiny_config(f"TEST.NMS_CLASS_AGNOSTIC={agnostic}", "TEST.RESULTS_PER_IM=40")
    rng = np.random.default_rng(boxes_per_row)
    boxes = overlapping(rng, (4, 60, boxes_per_row))
    scores = rng.permutation(4 * 60 * 4).reshape(4, 60, 4).astype(np.float32) / 1000  # all different
    scores[:, 20:30] = scores[:, 10:20]  # equal ones within a class
    boxes[2, 5:9], scores[1, 7] = np.nan, np.nan
    valid = np.ones([4, 60], bool)
    valid[0, 40:], valid[3] = False, False

    def make():
        given = [tf.constant(v) for v in (boxes, scores, valid)]
        return model_frcnn.decode_detections(*given, tf.fill([4, 2], 100), cfg)

    first, second = both_forms(make)
    assert first[3][3] == 0 and (first[3][:3] > 10).all()
    for found in (first, second):  # of equal scores of different classes, either may be the first
        rows = np.concatenate([found[1][..., None], found[2][..., None], found[0]], -1)
        for n, row in enumerate(rows):
            found[0][n], found[1][n] = row[order := np.lexsort(row.T[::-1])][:, 2:], row[order][:, 0]
            found[2][n] = found[2][n][order]
    assert_equal(first, second)


# ----------------------------------------------------------------------------------------------------------- long rows
@pytest.mark.parametrize(("length", "count"), [(1, 1), (16, 16), (50, 3), (50, 16), (50, 41), (64, 64), (1000, 100)])
def test_the_best_of_a_long_row_are_the_same_in_the_same_order(length, count, monkeypatch):
    monkeypatch.setattr(model_box, "_TOP_K_PART", 16)
    values = np.random.default_rng(length).integers(-2, 3, (3, length)).astype(np.float32)
    values[values == 2] = -np.inf
    values[1] = -np.inf
    assert_equal(*both_forms(lambda: model_box.long_top_k(tf.constant(values), count)))


# ------------------------------------------------------------------------------------------------------------- pooling
@pytest.mark.parametrize("rois", [0, 1, 70])
def test_rois_pooled_from_a_pyramid_and_the_gradient_are_the_same(rois):
    rng = np.random.default_rng(rois)
    maps = [rng.normal(0, 1, (2, 66 >> i, 66 >> i, 3)).astype(np.float32) for i in range(4)]
    corner, side = rng.uniform(0, 200, (rois, 2)), np.exp(rng.uniform(1, 6.5, (rois, 2)))
    boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
    weight = rng.normal(0, 1, (rois, 7, 7, 3)).astype(np.float32)

    def make():
        levels = [tf.constant(m) for m in maps]
        image = tf.constant(np.arange(rois) % 2, tf.int32)
        pooled = model_box.pool_from_levels(
            levels, [4, 8, 16, 32], tf.constant(boxes), image,
            lambda level, some, index, scale: model_box.roi_align(level, some, index, scale, 7),
        )  # fmt: skip
        return pooled, *tf.gradients(pooled, levels, tf.constant(weight))

    first, second = both_forms(make)
    assert_equal(first[:1], second[:1])
    for a, b in zip(first[1:], second[1:]):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # sums in another order


def test_keypoints_are_decoded_on_the_host():
    with tf.Graph().as_default() as graph, graphs_for_gpu(True), tf.device("/gpu:0"):
        heat, boxes = tf.placeholder(tf.float32, [None, 56, 56, 3]), tf.placeholder(tf.float32, [None, 4])
        points = model_keypoint.decode_keypoints(heat, boxes)
    devices = {op.device for op in graph.get_operations() if op.type in ("MatMul", "BatchMatMulV2", "ArgMax")}
    assert devices == {"/device:CPU:0"} and points.op.device == "/device:CPU:0"
