"""One recorded detectron2 model, weights, inputs and results, against the whole graph: what `make parity` checks for
all of them, in small."""

from pathlib import Path

import numpy as np
import pytest

from tools import parity

DATA = Path(__file__).parent / "data" / "golden_mask_r50_fpn.npz.xz"
ONE = {"b0": [0]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    parity.unpack_recording(DATA, folder)
    return folder


@pytest.fixture(scope="module")
def model(directory):
    golden = parity.load_golden(directory, "mask_r50_fpn")
    return golden, parity.convert_weights(golden.weights)


def check(rows, quantities):
    rows = list(rows)
    assert not [row for row in rows if not row.good]
    assert quantities <= {row.quantity for row in rows}


@pytest.fixture(scope="module")
def found(model):
    """(name, images, results) of the recorded batch in float64."""
    (one,) = parity.run_inference(*model, ONE, precision="float64")
    return one


def test_features_proposals_detections_and_masks_equal_the_recording(model, found):
    check(
        parity.inference_rows(model[0], *found, precision="float64"),
        {"features (relative)", "RPN logits (relative)", "RPN deltas (relative)", "anchors (px)",
         "proposals: stable rows missing", "detections: stable rows missing", "detection boxes (px)",
         "detection scores", "mask probabilities", "pasted masks (mean of 1 - IoU)",
         "boxes in the original image (px)"},
    )  # fmt: skip


@pytest.mark.slow
def test_single_precision_gives_the_recorded_detections(model):
    rows = [r for r in parity.compare_inference(*model, ONE) if "mask" not in r.quantity]
    check(rows, {"detections: stable rows missing", "detection boxes (px)", "detection scores"})


@pytest.mark.slow
def test_losses_and_gradients_equal_the_recording(model):
    check(
        parity.compare_training(*model, ONE, precision="float64"),
        {"losses (relative)", "gradients (relative)", "gradient norm of the worst tensor (relative)",
         "anchor labels (differences)", "RoIs: missing", "RoI classes (differences)"},
    )  # fmt: skip


def test_a_wrong_tensor_is_noticed(model, found):
    """RPN logits that are off by a tenth of a per cent, and nothing else."""
    golden, (name, images, result) = model[0], found
    wrong = {**result, "logits": [logits * 1.001 for logits in result["logits"]]}
    rows = list(parity.inference_rows(golden, name, images, wrong, precision="float64"))
    missed = {row.quantity for row in rows if not row.good}
    assert "RPN logits (relative)" in missed and "features (relative)" not in missed


def test_an_absent_or_unknown_directory_is_said_clearly(directory, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(parity.logger, "error", messages.append)
    assert parity.main([str(tmp_path)]) == 2
    assert parity.main([str(directory), "--models", "mask_r50_fpnn"]) == 2
    assert str(tmp_path) in messages[0] and "GOLDEN=DIR" in messages[0]
    assert "mask_r50_fpnn" in messages[1] and "\n" not in messages[0] + messages[1]


def test_gradients_find_their_way_back_through_the_converter(model):
    golden, variables = model
    back = parity.gradients_in_source_layout(variables, golden.weights)
    with np.load(golden.weights) as weights:
        heads = ("box_head.fc1", "mask_head.deconv", "box_predictor.cls_score", "box_predictor.bbox_pred")
        for name in (*(f"roi_heads.{head}.weight" for head in heads), "backbone.fpn_lateral2.bias"):
            np.testing.assert_array_equal(back[name], weights[name].ravel())
