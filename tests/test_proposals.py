"""The RPN alone: recall of proposals against pycocotools and another definition, and whole runs by the command line."""

import contextlib
import copy
import io
import json
import re

import numpy as np
import pytest
from box_reference import pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import COCO_MINI, TINY_TRAINING

import eval as scoring
import model_rcnn
import train
from tests.graph import constants, evaluate, make_batch, tiny_config
from utils.checkpoint import load_weights, save_npz
from utils.tf_v1 import tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
LIMITS = (100, 1000)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}


# -------------------------------------------------------------------------------------------------------------- recall
def random_case(seed, images=8, proposals=1200):
    """Crowded images with objects of all sizes, crowd regions, duplicates, and more proposals than count."""
    random = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": c, "name": f"class {c}"} for c in (3, 7)]}
    results = []
    for number in range(images):
        image_id = 50 - number
        truth["images"].append({"id": image_id, "height": 400, "width": 500})
        count = int(random.integers(0, 15)) if number else 0  # the first has none
        corner = random.uniform(0, 300, [count, 2])
        boxes = np.concatenate([corner, np.exp(random.uniform(np.log(5), np.log(200), [count, 2]))], 1).round(1)
        for row, box in enumerate(boxes.tolist()):
            truth["annotations"].append({
                "id": len(truth["annotations"]) + 1, "image_id": image_id, "category_id": 3 + 4 * (row % 2),
                "bbox": box, "area": round(box[2] * box[3] * random.uniform(0.5, 1), 1),
                "iscrowd": int(random.random() < 0.15),
            })  # fmt: skip
        many = proposals if number == 1 else int(random.integers(0, 150))
        if count:
            noise = random.normal(0, 0.12, [many, 4])
            source = boxes[random.integers(0, count, many)]
            found = source + noise * source[:, [2, 3, 2, 3]]
            found[:, 2:] = np.maximum(found[:, 2:], 1)
        else:
            found = random.uniform(1, 200, [many, 4])
        for box in found.round(2).tolist():
            score = round(float(random.random()), 2)  # ties on purpose
            results.append({"image_id": image_id, "category_id": 3, "bbox": box, "score": score})
    return truth, results


def coco_recall(truth, results):
    """pycocotools' own: AR and recall at single IoUs, without classes."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        scorer = COCOeval(coco, coco.loadRes(copy.deepcopy(results)), "bbox")
        scorer.params.useCats = 0
        scorer.params.maxDets = [1, *LIMITS]
        scorer.evaluate()
        scorer.accumulate()
    recall = scorer.eval["recall"][:, 0]  # [T, A, M]
    numbers = {}
    for m, limit in enumerate(LIMITS, 1):
        for a, area in enumerate(AREAS):
            numbers[f"proposals/AR{area}@{limit}"] = recall[:, a, m].mean()
        numbers[f"proposals/R50@{limit}"], numbers[f"proposals/R75@{limit}"] = recall[0, 0, m], recall[5, 0, m]
    return numbers


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(4))
def test_recall_equals_pycocotools_to_the_digit(seed):
    truth, results = random_case(seed)
    metrics = scoring.evaluate_proposals(truth, results, verbose=False)
    expected = coco_recall(truth, results)
    assert metrics.keys() == expected.keys() and 0.1 < metrics["proposals/AR@100"] < 0.95
    assert metrics["proposals/AR@1000"] > metrics["proposals/AR@100"]
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, abs=1e-12), key


SMALL_BOXES = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 20)] * 2).map(list)


@pytest.mark.quick
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(SMALL_BOXES, st.booleans(), st.sampled_from([100, 1024, 9216, 9217])), min_size=1, max_size=6),
    st.lists(st.tuples(SMALL_BOXES, st.sampled_from([0.1, 0.5, 0.9])), max_size=8),
)  # fmt: skip
def test_recall_equals_pycocotools_among_ties_crowds_and_areas_on_the_limits(objects, proposals):
    truth = {
        "images": [{"id": 1, "height": 40, "width": 40}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for i, (box, crowd, area) in enumerate(objects, 1)
        ],
    }
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in proposals]
    metrics = scoring.evaluate_proposals(truth, results, verbose=False)
    expected = coco_recall(truth, results or [{"image_id": 1, "category_id": 1, "bbox": [90, 90, 1, 1], "score": 1}])
    for key, value in expected.items():
        if value == -1:
            assert np.isnan(metrics[key]), key
        else:
            assert metrics[key] == pytest.approx(value, abs=1e-12), key


def pairs_by_overlap(truth, results, limit):
    """AR as detectron2 defines it: of an image's best proposals and objects, pairs are made by decreasing IoU."""
    best = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        found = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])[:limit]
        iou = np.zeros((len(found), len(own)))
        if found and own:
            boxes, objects = (np.array([e["bbox"] for e in entries], float) for entries in (found, own))
            boxes[:, 2:] += boxes[:, :2]
            objects[:, 2:] += objects[:, :2]
            iou = pairwise_iou(boxes, objects)
        for _ in range(len(own)):
            best.append(iou.max(initial=0))
            if iou.size:
                row, column = np.unravel_index(iou.argmax(), iou.shape)
                iou[row] = iou[:, column] = 0
    return np.mean([(np.array(best) >= t).mean() for t in np.linspace(0.5, 0.95, 10)])


@pytest.mark.quick
def test_recall_equals_that_of_pairing_by_overlap_unless_proposals_compete():
    for seed in range(4):
        truth, results = random_case(seed)
        metrics = scoring.evaluate_proposals(truth, results, verbose=False)
        for limit in LIMITS:
            assert metrics[f"proposals/AR@{limit}"] == pytest.approx(pairs_by_overlap(truth, results, limit), abs=0.005)
    # The better-scored proposal takes the object that only the other one could find.
    objects, proposals = [[0, 0, 10, 10], [5, 0, 10, 10]], [[2.5, 0, 9.8, 10], [0, 0, 10, 9]]
    truth = {"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}
    truth["annotations"] = [{"image_id": 1, "category_id": 1, "bbox": box} for box in objects]
    results = [{"image_id": 1, "category_id": 1, "bbox": b, "score": s} for b, s in zip(proposals, (0.9, 0.8))]
    metrics = scoring.evaluate_proposals(truth, results, verbose=False)
    assert metrics["proposals/R50@100"] == 0.5
    assert pairs_by_overlap(truth, results, 100) > metrics["proposals/AR@100"]


@pytest.mark.quick
def test_recall_of_no_proposals_is_zero_and_of_no_objects_undefined():
    truth, _ = random_case(0)
    metrics = scoring.evaluate_proposals(truth, [], verbose=False)
    assert set(metrics.values()) == {0.0}
    metrics = scoring.evaluate_proposals({**truth, "annotations": []}, [], verbose=False)
    assert np.isnan(list(metrics.values())).all()


@pytest.mark.quick
def test_recall_of_some_images_is_that_of_a_file_of_these_images():
    truth, results = random_case(1)
    some = [a["id"] for a in truth["images"][1:4]]
    metrics = scoring.evaluate_proposals(truth, results, image_ids=some, verbose=False)
    part = {**truth, "images": truth["images"][1:4]}
    part["annotations"] = [a for a in truth["annotations"] if a["image_id"] in some]
    assert metrics == scoring.evaluate_proposals(part, [r for r in results if r["image_id"] in some], verbose=False)


# --------------------------------------------------------------------------------------------------------------- graph
RPN = "MODE_RPN_ONLY=True"
MANY = ["RPN.TEST_PER_LEVEL_NMS_TOPK=1000", "RPN.TEST_FPN_NMS_TOPK=1000"]


@pytest.mark.quick
def test_the_rpn_alone_switches_the_second_stage_off():
    cfg = tiny_config(RPN, "MODE_MASK=True", "MODE_KEYPOINT=True", "FPN.CASCADE=True")
    assert not (cfg.MODE_MASK or cfg.MODE_KEYPOINT or cfg.FPN.CASCADE)


@pytest.mark.parametrize("mode", ["MODE_FPN=True", "MODE_FPN=False"])
def test_the_rpn_alone_has_the_losses_and_proposals_of_the_whole_detector(mode):
    """With the same weights; and it has no variable beyond them."""
    sizes = ["RPN.HEAD_DIM=16", "RPN.TEST_PRE_NMS_TOPK=60", "RPN.TEST_POST_NMS_TOPK=50", "RPN.TRAIN_PRE_NMS_TOPK=60"]
    whole = tiny_config(mode, "MODE_MASK=False", *sizes)
    alone = tiny_config(mode, RPN, *sizes)
    batch = make_batch([(96, 96), (64, 90)], [[(5, 5, 60, 60, 1)], [(20, 10, 50, 50, 2)]], whole)

    def make(cfg):
        inputs = constants(batch)
        losses, _ = model_rcnn.build_training(inputs, cfg)
        names = [v.op.name for v in tf.global_variables()]
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            features = model_rcnn.backbone_features(inputs["image"], inputs["image_shape"], cfg)
            boxes, logits, valid = model_rcnn.propose(features, inputs["image_shape"], cfg)
            found = model_rcnn.build_inference(inputs["image"], inputs["image_shape"], cfg)
        return losses, {"boxes": boxes, "logits": logits, "valid": valid}, found, names, tf.global_variables()

    names, values = {}, {}

    def remember():
        *fetches, names["whole"], variables = make(whole)
        return fetches, {v.op.name: v for v in variables}

    (losses, proposals, _), values = evaluate(remember)

    def only():
        *fetches, names["alone"], _ = make(alone)
        return fetches

    rpn_losses, again, found = evaluate(only, values)
    assert set(rpn_losses) == {"rpn/class_loss", "rpn/box_loss"}
    for key, value in rpn_losses.items():
        assert value == pytest.approx(losses[key], rel=1e-5)
    assert {name.split("/")[0] for name in names["whole"]} > {name.split("/")[0] for name in names["alone"]}
    assert not [n for n in names["alone"] if n.startswith(("fastrcnn", "group3") if "False" in mode else "fastrcnn")]
    np.testing.assert_allclose(again["boxes"], proposals["boxes"], atol=1e-3)
    for row, count in enumerate(found["count"]):
        assert count == proposals["valid"][row].sum() > 10
        np.testing.assert_allclose(found["boxes"][row, :count], proposals["boxes"][row, :count], atol=1e-3)
        expected = 1 / (1 + np.exp(-proposals["logits"][row, :count]))
        np.testing.assert_allclose(found["scores"][row, :count], expected, atol=1e-5)
        assert (found["labels"][row, :count] == 1).all()
        assert not any(found[key][row, count:].any() for key in ("boxes", "scores", "labels"))


# ------------------------------------------------------------------------------------------------------- command line
def run(*args) -> int:
    return train.main([str(a) for a in args])


def train_tiny(logdir, *settings, steps=2, flags=()) -> int:
    return run("--logdir", logdir, *flags, "--config", *TINY_TRAINING, f"TRAIN.MAX_STEPS={steps}", *settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the RPN alone, evaluated at its end."""
    logdir = tmp_path_factory.mktemp("runs") / "rpn"
    assert train_tiny(logdir, RPN, *MANY, "TRAIN.EVAL_PERIOD=1", steps=3) == 0
    return logdir


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A cascade with masks."""
    logdir = tmp_path_factory.mktemp("runs") / "detector"
    assert train_tiny(logdir, "FPN.CASCADE=True") == 0
    return logdir


def test_training_the_rpn_alone_logs_its_losses_and_recall(trained):
    weights, meta = load_weights(trained)
    assert {name.split("/")[0] for name in weights if "/" in name} <= {
        "conv0", "group0", "group1", "group2", "group3", "fpn", "rpn"
    }  # fmt: skip
    assert meta["settings"]["MODE_RPN_ONLY"] and not meta["settings"]["MODE_MASK"]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics) == {f"proposals/{n}@{k}" for n in ("AR", "ARs", "ARm", "ARl", "R50", "R75") for k in LIMITS}
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert any("proposals/AR@1000" in line for line in lines)
    assert any(line.get("rpn/class_loss", 0) > 0 and "frcnn/class_loss" not in line for line in lines)


def test_evaluating_the_rpn_alone_writes_proposals_and_their_recall(trained, tmp_path, capsys):
    out = tmp_path / "proposals.json"
    assert run("--evaluate", out, "--load", trained) == 0
    results = json.loads(out.read_text())
    truth = json.loads((COCO_MINI / "annotations" / "instances_val2017.json").read_text())
    assert {r["category_id"] for r in results} == {min(c["id"] for c in truth["categories"])}
    assert {r["image_id"] for r in results} <= {i["id"] for i in truth["images"]}
    assert len(results) > 20 * len(truth["images"])
    metrics = json.loads((tmp_path / "proposals.metrics.json").read_text())
    for key, value in coco_recall(truth, results).items():
        assert metrics[key] == (None if value == -1 else pytest.approx(value, abs=1e-12)), key  # no object is large
    assert metrics["proposals/R50@1000"] > 0
    assert metrics == json.loads((trained / "metrics.json").read_text())  # training ended with the same evaluation
    error = capsys.readouterr().err
    assert "AR" in error and "best 1000" in error and "proposals in" in error


def test_predicting_with_the_rpn_alone_draws_proposals(trained, tmp_path):
    image = next((COCO_MINI / "val2017").iterdir())
    assert run("--predict", image, "--load", trained, "--output", tmp_path, "--no-window") == 0
    (entry,) = json.loads((tmp_path / "predictions.json").read_text())
    assert len(entry["detections"]) > 20
    assert {(d["class"], d["category_id"]) for d in entry["detections"]} == {("object", 1)}
    assert (tmp_path / image.name).exists()


def test_the_rpn_of_a_whole_detector_is_evaluated_with_one_setting(detector, tmp_path, capsys):
    out = tmp_path / "proposals.json"
    assert run("--evaluate", out, "--load", detector, "--config", RPN, *MANY) == 0
    error = capsys.readouterr().err
    assert "tensors of the second stage left out" in error and "missing" not in error
    metrics = json.loads((tmp_path / "proposals.metrics.json").read_text())
    assert metrics["proposals/R50@1000"] > 0


def test_a_detector_starts_from_the_rpn_alone_by_partial_loading(trained, tmp_path, capsys):
    assert train_tiny(tmp_path / "stopped", "MODE_RPN_ONLY=False", flags=["--load", trained]) == 2
    assert "--partial-load" in capsys.readouterr().err
    settings = ["MODE_RPN_ONLY=False", "TRAIN.BASE_LR=0.0", "TRAIN.WARMUP_INIT_LR=0.0"]
    assert train_tiny(tmp_path / "started", *settings, flags=["--load", trained, "--partial-load"], steps=1) == 0
    before, after = load_weights(trained)[0], load_weights(tmp_path / "started")[0]
    assert load_weights(tmp_path / "started")[1]["settings"]["MODE_MASK"]  # the default again, not what RPN_ONLY forced
    for name in ("conv0/W", "fpn/lateral_1x1_c5/W", "rpn/conv0/W", "rpn/box/b"):
        np.testing.assert_array_equal(before[name], after[name])
    assert "maskrcnn/conv/W" in after and "fastrcnn/fc6/W" in after


def test_the_rpn_alone_of_c4_needs_no_last_stage_and_a_detector_takes_it_from_the_backbone(tmp_path, capsys):
    shape = {"group3/block0/conv1/W": (1, 1, 128, 64)}
    c4 = ["MODE_FPN=False", "RPN.HEAD_DIM=8", "RPN.ANCHOR_SIZES=[32]", "RPN.TEST_PRE_NMS_TOPK=60",
          "RPN.TRAIN_PRE_NMS_TOPK=60", "RPN.TRAIN_POST_NMS_TOPK=30", "MODE_MASK=False"]  # fmt: skip
    still = ["TRAIN.BASE_LR=0.0", "TRAIN.WARMUP_INIT_LR=0.0"]
    assert train_tiny(tmp_path / "rpn", *c4, RPN, steps=1) == 0
    weights = {k: v for k, v in load_weights(tmp_path / "rpn")[0].items() if k.startswith(("conv0", "group"))}
    assert not any(name.startswith("group3") for name in weights)
    weights |= {name: np.random.RandomState(0).randn(*s).astype(np.float32) for name, s in shape.items()}
    save_npz(tmp_path / "backbone.npz", weights, None)
    backbone = f"BACKBONE.WEIGHTS={tmp_path / 'backbone.npz'}"
    flags = ["--load", tmp_path / "rpn", "--partial-load"]
    assert train_tiny(tmp_path / "detector", *c4, *still, "MODE_RPN_ONLY=False", backbone, flags=flags, steps=1) == 0
    assert re.search(r"backbone tensors missing from .* and loaded from .*: 1\n", capsys.readouterr().err)
    after = load_weights(tmp_path / "detector")[0]
    np.testing.assert_array_equal(after["group3/block0/conv1/W"], weights["group3/block0/conv1/W"])
    # And the other way round: what has a last stage starts an RPN.
    assert train_tiny(tmp_path / "again", *c4, RPN, backbone, steps=1) == 0
    assert "left out because of MODE_RPN_ONLY: 1" in capsys.readouterr().err
