"""Box branch: labelling and sampling of RoIs, losses, and detections against recordings and references in NumPy."""

from pathlib import Path

import numpy as np
import pytest
from box_reference import decode_boxes, encode_boxes, pairwise_iou

import model_frcnn
from tests.graph import constants, evaluate, make_batch, tiny_config
from tests.test_model_box import reference_giou
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "data" / "golden_unit.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files if key.startswith("matcher/")}


def test_labels_of_rois_equal_the_recording(golden):
    boxes, gt = golden["matcher/anchors"][None], golden["matcher/gt"][:4]
    batch = {
        "gt_boxes": gt[None], "gt_labels": np.array([[3, 1, 2, 1]], np.int32), "gt_is_crowd": np.zeros([1, 4], bool)
    }  # fmt: skip
    labels, match, *_ = evaluate(
        lambda: model_frcnn.label_rois(tf.constant(boxes), tf.ones(boxes.shape[:2], tf.bool), constants(batch), 0.5)
    )
    foreground = golden["matcher/roi_labels"] == 1
    np.testing.assert_array_equal(labels[0] > 0, foreground)
    np.testing.assert_array_equal(match[0][foreground], golden["matcher/roi_matches"][foreground])
    np.testing.assert_array_equal(labels[0][foreground], batch["gt_labels"][0][match[0][foreground]])


# ------------------------------------------------------------------------------------------------------------ sampling
def without_limit(rois):
    """The tensors of SampledRois."""
    return {key: value for key, value in rois.items() if key != "fg_limit"}


def sampled(batch, proposals, valid, cfg):
    def make():
        rois, stats = model_frcnn.sample_rois(tf.constant(proposals), tf.constant(valid), constants(batch), cfg)
        return without_limit(rois), stats

    return evaluate(make)


def jittered(batch, count):
    """Proposals [N,count,4] near the objects."""
    rows = []
    for row, (boxes, labels) in enumerate(zip(batch["gt_boxes"], batch["gt_labels"])):
        random = np.random.RandomState(row)
        source = boxes[labels > 0][random.randint((labels > 0).sum(), size=count)]
        rows.append(source + random.uniform(-25, 25, source.shape))
    return np.stack(rows).astype(np.float32)


def test_sampling_takes_foreground_first_up_to_its_ratio_and_only_valid_rows():
    cfg = tiny_config("FRCNN.BATCH_PER_IM=40", "FRCNN.FG_RATIO=0.25")
    objects = [[(10, 10, 60, 60, 1), (40, 30, 110, 90, 2)], [(20, 20, 70, 90, 3)]]
    batch = make_batch([(128, 128)] * 2, objects, cfg)
    proposals = jittered(batch, 200)
    valid = np.random.RandomState(0).rand(2, 200) < 0.9
    rois, stats = sampled(batch, proposals, valid, cfg)
    for row in range(2):
        usable = batch["gt_labels"][row] > 0
        everything = np.concatenate([proposals[row][valid[row]], batch["gt_boxes"][row][usable]])
        labels = rois["labels"][row]
        count = (labels > 0).sum()
        assert rois["valid"][row].all() and count == 10 and (labels[:10] > 0).all()
        iou = pairwise_iou(rois["boxes"][row], batch["gt_boxes"][row][usable])
        np.testing.assert_array_equal(iou.max(1) >= 0.5, labels > 0)
        np.testing.assert_array_equal(batch["gt_labels"][row][rois["match"][row][:10]], labels[:10])
        assert all((everything == box).all(1).any() for box in rois["boxes"][row])
    assert stats["frcnn/num_foreground"] == 10 and stats["frcnn/num_background"] == 30


@pytest.mark.parametrize(
    "fg, low, high, ratio", [(0.5, 0.0, None, 0.5), (0.7, 0.0, None, 0.25), (0.6, 0.1, 0.5, 0.1), (0.5, 0.3, None, 1.0)]
)
def test_thresholds_and_ratio_decide_what_is_sampled(fg, low, high, ratio):
    cfg = tiny_config(
        "FRCNN.BATCH_PER_IM=60", f"FRCNN.FG_RATIO={ratio}", f"FRCNN.FG_THRESH={fg}",
        f"FRCNN.BG_THRESH_LO={low}", f"FRCNN.BG_THRESH_HI={high}",
    )  # fmt: skip
    batch = make_batch([(128, 128)], [[(10, 10, 60, 60, 1), (40, 30, 110, 90, 2)]], cfg)
    far = np.random.RandomState(9).uniform(0, 100, [1, 100, 2])
    proposals = np.concatenate([jittered(batch, 200), np.concatenate([far, far + 8], -1)], 1).astype(np.float32)
    rois, _ = sampled(batch, proposals, np.ones([1, 300], bool), cfg)
    everything = np.concatenate([proposals[0], batch["gt_boxes"][0]])
    best = pairwise_iou(everything, batch["gt_boxes"][0]).max(1)
    foreground, background = best >= fg, (best >= low) & (best < (high or fg))
    num_fg = min(foreground.sum(), int(60 * ratio))
    num_bg = min(background.sum(), 60 - num_fg)
    assert (rois["labels"][0] > 0).sum() == num_fg and rois["valid"][0].sum() == num_fg + num_bg
    own = pairwise_iou(rois["boxes"][0], batch["gt_boxes"][0]).max(1)[rois["valid"][0]]
    assert (own[:num_fg] >= fg).all()
    assert (own[num_fg:] >= low).all() and (own[num_fg:] < (high or fg)).all()


def test_sampling_leaves_the_rest_invalid_when_there_is_too_little():
    cfg = tiny_config("FRCNN.BATCH_PER_IM=40")
    batch = make_batch([(128, 128)], [[(10, 10, 60, 60, 1)]], cfg)
    proposals = np.zeros([1, 50, 4], np.float32)
    rois, _ = sampled(batch, proposals, np.zeros([1, 50], bool), cfg)
    assert rois["valid"].sum() == 1 and rois["labels"][0, 0] == 1 and not rois["labels"][0, 1:].any()
    np.testing.assert_array_equal(rois["boxes"][0, 0], batch["gt_boxes"][0, 0])


def test_crowd_regions_are_never_rois_nor_positives():
    cfg = tiny_config("FRCNN.BATCH_PER_IM=40")
    batch = make_batch([(128, 128)], [[(10, 10, 60, 60, 1, True)]], cfg)
    rois, _ = sampled(batch, batch["gt_boxes"].repeat(5, 1), np.ones([1, 5], bool), cfg)
    assert rois["valid"].sum() == 5 and not rois["labels"].any()


def test_background_in_crowd_regions_is_left_out_when_asked():
    cfg = tiny_config("FRCNN.BATCH_PER_IM=40", "FRCNN.CROWD_OVERLAP_THRESH=0.7")
    batch = make_batch([(128, 128)] * 2, [[(10, 10, 60, 60, 1, True), (20, 20, 40, 40, 2)], [(70, 70, 90, 90, 1)]], cfg)
    boxes = [
        [20, 20, 41, 40],  # an object, inside the crowd region
        [10, 10, 30, 25],  # inside
        [0, 10, 40, 60],  # three quarters inside
        [0, 10, 20, 60],  # half inside
        [80, 80, 120, 120],
    ]
    proposals = np.array([boxes] * 2, np.float32)
    rois, _ = sampled(batch, proposals, np.ones([2, 5], bool), cfg)
    used = [{tuple(b) for b in rois["boxes"][n][rois["valid"][n]].astype(int).tolist()} for n in range(2)]
    assert used[0] == {(20, 20, 41, 40), (20, 20, 40, 40), (0, 10, 20, 60), (80, 80, 120, 120)}
    assert used[1] == {tuple(b) for b in boxes} | {(70, 70, 90, 90)}
    assert [(row > 0).sum() for row in rois["labels"]] == [2, 1]


# -------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("kind, box_weight", [("smooth_l1", 1.0), ("giou", 10.0)])
@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
def test_losses_equal_the_float64_reference(agnostic, per_image, kind, box_weight):
    cfg = tiny_config(
        f"TRAIN.LOSS_PER_IMAGE={per_image}", "FRCNN.BATCH_PER_IM=30",
        f"FRCNN.BBOX_LOSS={kind}", f"FRCNN.BBOX_LOSS_WEIGHT={box_weight}",
    )  # fmt: skip
    batch = make_batch([(128, 128)] * 2, [[(10, 10, 60, 60, 1), (40, 30, 110, 90, 2)], [(20, 20, 70, 90, 3)]], cfg)
    proposals = jittered(batch, 60)
    valid = np.arange(60)[None] < np.array([[60], [12]])
    random = np.random.RandomState(3)
    num_boxes = 1 if agnostic else 4
    logits = random.randn(60, 4).astype(np.float32)
    deltas = random.randn(60, num_boxes, 4).astype(np.float32)
    weights = (10.0, 10.0, 5.0, 5.0)

    def make():
        tensors = constants(batch)
        rois, _ = model_frcnn.sample_rois(tf.constant(proposals), tf.constant(valid), tensors, cfg)
        losses, _ = model_frcnn.fastrcnn_losses(tf.constant(logits), tf.constant(deltas), rois, tensors, weights, cfg)
        return without_limit(rois), losses

    rois, losses = evaluate(make)
    class_loss, box_loss = [], []
    for row in range(2):
        for r in range(30):
            if not rois["valid"][row, r]:
                continue
            z, label = logits[row * 30 + r].astype(np.float64), rois["labels"][row, r]
            class_loss.append((row, np.log(np.exp(z).sum()) - z[label]))
            if label:
                box = batch["gt_boxes"][row][rois["match"][row, r]].astype(np.float64)
                roi, own = rois["boxes"][row, r].astype(np.float64), deltas[row * 30 + r, 0 if agnostic else label]
                if kind == "giou":
                    box_loss.append((row, 1 - reference_giou(decode_boxes(own.astype(np.float64), roi, weights), box)))
                    continue
                error = np.abs(own - encode_boxes(box, roi, weights))
                box_loss.append((row, np.where(error < 1, 0.5 * error**2, error - 0.5).sum()))
    count = rois["valid"].sum(1)
    scale = 1 / (2 * count) if per_image else np.full(2, 1 / count.sum())
    assert len(box_loss) > 5 and count[0] != count[1]
    assert losses["frcnn/class_loss"] == pytest.approx(sum(v * scale[i] for i, v in class_loss), rel=1e-5)
    assert losses["frcnn/box_loss"] == pytest.approx(box_weight * sum(v * scale[i] for i, v in box_loss), rel=1e-5)


def federated_reference(logits, own, verified):
    """One RoI's loss in float64, written as the sentence that defines it."""
    rest = [np.exp(z) for z, mine, known in zip(logits.astype(np.float64), own, verified) if known and not mine]
    terms = [-np.log(np.exp(np.float64(z)) / (np.exp(np.float64(z)) + sum(rest))) for z in logits[own]]
    return np.mean(terms)


def test_federated_loss_equals_its_definition_and_silences_what_nobody_looked_for():
    random = np.random.RandomState(0)
    logits = (random.randn(2, 40, 8) * 3).astype(np.float32)
    own = np.zeros([2, 40, 8], bool)
    own[np.arange(2)[:, None], np.arange(40), random.randint(0, 8, [2, 40])] = True
    own[:, :10, 5] = True  # some have two classes
    verified = random.rand(2, 8) < 0.6
    verified[:, 0] = True

    def make(weight=1.0):
        z = tf.constant(logits)
        losses = model_frcnn.federated_class_losses(z, tf.constant(own), tf.constant(verified))
        return losses, tf.gradients(losses, z)[0]

    losses, gradient = evaluate(make)
    expected = [[federated_reference(logits[n, r], own[n, r], verified[n]) for r in range(40)] for n in range(2)]
    np.testing.assert_allclose(losses, expected, rtol=2e-5, atol=1e-6)
    silent = ~verified[:, None] & ~own
    assert silent.any() and (gradient[silent] == 0).all() and (gradient[~silent] != 0).all()
    # Only a class of its own raises its logit, and the gradients of a RoI cancel.
    assert (gradient[own] < 0).all() and (gradient[~own] >= 0).all()
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


def test_federated_loss_of_fully_verified_images_is_the_softmax_cross_entropy():
    logits = np.random.RandomState(3).randn(60, 4).astype(np.float32) * 4

    def class_loss(federated):
        cfg = tiny_config("FRCNN.BATCH_PER_IM=30", f"FRCNN.FEDERATED_LOSS={federated}")
        batch = make_batch([(128, 128)] * 2, [[(10, 10, 60, 60, 1), (40, 30, 110, 90, 2)], [(20, 20, 70, 90, 3)]], cfg)
        proposals, tensors, z = jittered(batch, 60), constants(batch), tf.constant(logits)
        rois, _ = model_frcnn.sample_rois(tf.constant(proposals), tf.ones([2, 60], tf.bool), tensors, cfg)
        losses, _ = model_frcnn.fastrcnn_losses(z, tf.zeros([60, 1, 4]), rois, tensors, (1.0, 1.0, 1.0, 1.0), cfg)
        return losses["frcnn/class_loss"], tf.gradients(losses["frcnn/class_loss"], z)[0]

    (plain, gradient), (federated, federated_gradient) = (evaluate(lambda f=f: class_loss(f)) for f in (False, True))
    assert plain > 0 and federated == pytest.approx(plain, rel=1e-6)
    np.testing.assert_allclose(federated_gradient, gradient, rtol=1e-4, atol=1e-8)


def test_rois_have_the_classes_of_all_boxes_equal_to_theirs():
    cfg = tiny_config("FRCNN.FEDERATED_LOSS=True")
    dog_and_animal = [(10, 10, 60, 60, 1), (70, 10, 110, 60, 2), (10, 10, 60, 60, 3)]
    batch = make_batch([(128, 128)] * 2, [dog_and_animal, [(10, 10, 60, 60, 2, True), (10, 10, 60, 60, 1)]], cfg)
    boxes = np.array([[[12, 10, 60, 60], [70, 12, 110, 60], [0, 90, 30, 120]]] * 2, np.float32)

    def make():
        tensors = constants(batch)
        labels, match, *_ = model_frcnn.label_rois(tf.constant(boxes), tf.ones([2, 3], tf.bool), tensors, 0.5)
        return model_frcnn.labels_of_rois({"labels": labels, "match": match}, tensors, 3)

    own = evaluate(make)
    assert [np.flatnonzero(row).tolist() for row in own[0]] == [[1, 3], [2], [0]]
    assert [np.flatnonzero(row).tolist() for row in own[1]] == [[1], [0], [0]]  # a crowd region gives no label


# ---------------------------------------------------------------------------------------------------------- detections
def reference_detections(boxes, scores, cfg):
    """Boxes [R,B,4], scores [R,C] of one image, class by class in float64 -> [(score, label, box)]."""
    found = []
    for label in range(scores.shape[1]):
        own = boxes[:, label if boxes.shape[1] > 1 else 0].astype(np.float64)
        order = np.argsort(-scores[:, label], kind="stable")
        order = order[scores[order, label] > cfg.TEST.RESULT_SCORE_THRESH]
        kept = []
        for i in order:
            if not kept or pairwise_iou(own[i : i + 1], own[kept]).max() <= cfg.TEST.FRCNN_NMS_THRESH:
                kept.append(i)
        found += [(scores[i, label], label + 1, own[i]) for i in kept]
    return sorted(found, key=lambda d: -d[0])[: cfg.TEST.RESULTS_PER_IM]


@pytest.mark.parametrize("num_boxes", [1, 3])
def test_detections_equal_the_class_by_class_reference(num_boxes):
    cfg = tiny_config("TEST.RESULTS_PER_IM=25")
    random = np.random.RandomState(0)
    corner = random.uniform(0, 60, [2, 80, num_boxes, 2])
    boxes = np.concatenate([corner, corner + random.uniform(5, 40, corner.shape)], -1).astype(np.float32)
    scores = (random.rand(2, 80, 3) * 0.5).astype(np.float32)
    valid = np.array([[True] * 80, [True] * 20 + [False] * 60])
    shapes = np.array([[100, 100], [70, 80]], np.int32)

    def make():
        tensors = (tf.constant(x) for x in (boxes, scores, valid, shapes))
        return model_frcnn.decode_detections(*tensors, cfg)

    found_boxes, found_scores, labels, count = evaluate(make)
    for row in range(2):
        h, w = shapes[row]
        own = np.clip(boxes[row][valid[row]], 0, [w, h, w, h])
        expected = reference_detections(own, scores[row][valid[row]], cfg)
        assert count[row] == len(expected)
        np.testing.assert_allclose(found_scores[row][: count[row]], [e[0] for e in expected])
        assert labels[row][: count[row]].tolist() == [e[1] for e in expected]
        np.testing.assert_allclose(found_boxes[row][: count[row]], [e[2] for e in expected], atol=1e-5)
        assert not labels[row][count[row] :].any() and not found_boxes[row][count[row] :].any()


def test_the_score_threshold_is_strict_and_nan_rows_are_no_detections():
    cfg = tiny_config("TEST.RESULT_SCORE_THRESH=0.5")
    boxes = np.arange(5, dtype=np.float32)[None, :, None, None] * 20 + np.array([0, 0, 10, 10], np.float32)
    boxes[0, 3, 0, 2] = np.nan
    scores = np.array([0.5, 0.50001, np.nan, 0.9, 0.2], np.float32)[None, :, None]

    def make():
        tensors = tf.constant(boxes), tf.constant(scores), tf.ones([1, 5], tf.bool), tf.constant([[200, 200]])
        return model_frcnn.decode_detections(*tensors, cfg)

    found, found_scores, labels, count = evaluate(make)
    assert count.tolist() == [1] and found_scores[0, 0] == np.float32(0.50001) and labels[0, 0] == 1
    np.testing.assert_array_equal(found[0, 0], boxes[0, 1, 0])


def test_class_boxes_leave_the_background_out():
    random = np.random.RandomState(0)
    deltas = random.randn(6, 4, 4).astype(np.float32)
    corner = random.uniform(0, 50, [2, 3, 2])
    proposals = np.concatenate([corner, corner + 20], -1).astype(np.float32)
    weights = (10.0, 10.0, 5.0, 5.0)
    boxes = evaluate(lambda: model_frcnn.decode_class_boxes(tf.constant(deltas), tf.constant(proposals), weights))
    assert boxes.shape == (2, 3, 3, 4)
    expected = decode_boxes(deltas.reshape(2, 3, 4, 4)[1, 2, 3][None], proposals[1, 2][None], weights)
    np.testing.assert_allclose(boxes[1, 2, 2], expected[0], atol=1e-4)


@pytest.mark.parametrize(
    "head, layers",
    [
        ("fastrcnn_2fc_head", ["fc6/W", "fc6/b", "fc7/W", "fc7/b"]),
        ("fastrcnn_4conv1fc_head", [f"conv{i}/{p}" for i in range(4) for p in "Wb"] + ["fc/W", "fc/b"]),
        (
            "fastrcnn_4conv1fc_gn_head",
            [f"conv{i}/{p}" for i in range(4) for p in ("W", "gn/gamma", "gn/beta")] + ["fc/W", "fc/b"],
        ),
    ],
)
def test_heads_have_the_public_names_and_flatten_channels_first(head, layers):
    cfg = tiny_config(f"FPN.FRCNN_HEAD_FUNC={head}", "FPN.FRCNN_CONV_HEAD_DIM=32")
    x = np.random.RandomState(0).randn(2, 7, 7, 16).astype(np.float32)
    weight = np.random.RandomState(1).randn(16 * 49, 32).astype(np.float32)

    def make():
        hidden = model_frcnn.fastrcnn_head(tf.constant(x), cfg)
        first = tf.get_default_graph().get_tensor_by_name("fc6/Relu:0") if head == "fastrcnn_2fc_head" else hidden
        return first, hidden, tf.constant([v.op.name for v in tf.global_variables()])

    first, hidden, names = evaluate(make, {"fc6/W": weight})
    assert [n.decode() for n in names] == layers and hidden.shape == (2, 32)
    if head == "fastrcnn_2fc_head":
        expected = np.maximum(np.transpose(x, [0, 3, 1, 2]).reshape(2, -1) @ weight, 0)
        np.testing.assert_allclose(first, expected, atol=1e-3)
