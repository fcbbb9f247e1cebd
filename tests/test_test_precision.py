"""TEST.PRECISION: a model predicts in another precision than the one in which it was trained."""

import sys

import numpy as np
import pytest
from graph import save_untrained, tiny_config
from tiny import COCO_MINI, TINY_TRAINING

import predict
from common import UserError
from config import default_config, finalize_config, inference_precision
from inference import inference_callable
from run_start import STRICT, load_model
from tools.export import with_export_settings
from utils.tf_v1 import tf

PHOTO = str(sorted((COCO_MINI / "val2017").glob("*.jpg"))[0])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_untrained(tmp_path_factory.mktemp("model") / "model.npz")


def types(graph, kind="Conv2D"):
    """The types in which the graph computes convolutions, and those of its variables."""
    return {op.get_attr("T") for op in graph.get_operations() if op.type == kind}, {
        v.dtype.base_dtype for v in graph.get_collection("variables")
    }


@pytest.mark.quick
def test_the_default_is_the_precision_of_training():
    cfg = tiny_config("TRAIN.PRECISION=bfloat16")
    assert inference_precision(cfg) is cfg
    other = inference_precision(tiny_config("TRAIN.PRECISION=bfloat16", "TEST.PRECISION=float32"))
    assert other.TRAIN.PRECISION == "float32"


@pytest.mark.parametrize(
    ("trained", "tested"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16"), ("float64", "float32")],
)
def test_prediction_computes_in_it_and_weights_stay_as_they_are(file, trained, tested):
    predictor = predict.load_predictor(file, [f"TRAIN.PRECISION={trained}", f"TEST.PRECISION={tested}"])
    assert types(predictor.predict_batch._session.graph) == ({tf.as_dtype(tested)}, {tf.float32})
    assert trained == predictor.cfg.TRAIN.PRECISION  # what is stored of the run does not change
    found = predictor(PHOTO)
    predictor.close()
    plain = predict.load_predictor(file, [f"TRAIN.PRECISION={tested}"])
    expected = plain(PHOTO)
    plain.close()
    np.testing.assert_array_equal(found.boxes, expected.boxes)  # nothing else than the precision has changed
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.masks == expected.masks


def test_views_and_raw_pictures_compute_in_it_too(file):
    from predict_raw import RawReader

    model = load_model(str(file), ["TEST.PRECISION=bfloat16", "TEST.AUG_SHORT_EDGES=[64]"])
    views = predict.LoadedPredictor(model)
    assert types(views.predict_batch._session.graph)[0] == {tf.bfloat16}
    views.close()
    graphs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("predict_raw.start_session", lambda graph, load: graphs.append(graph) or tf.Session(graph=graph))
        RawReader(model, STRICT)
    assert types(graphs[0])[0] == {tf.bfloat16}


def test_evaluation_while_training_shares_the_float32_variables():
    """In the graph of training, in another precision than it."""
    cfg = tiny_config("TRAIN.PRECISION=bfloat16", "TEST.PRECISION=float32", "TRAIN.EMA_DECAY=0.9")
    with tf.Graph().as_default() as graph:
        inference_callable(cfg)  # stands for the training graph, which makes the variables
        before = len(tf.global_variables())
        first = types(graph)[0]
        inference_callable(cfg.copy().update_args(["TEST.PRECISION=bfloat16"]).freeze(), reuse=True)
        assert len(tf.global_variables()) == before
        assert first == {tf.float32} and types(graph)[0] == {tf.float32, tf.bfloat16}


@pytest.mark.quick
def test_variables_of_float64_are_not_shared_with_another_precision():
    words = [*TINY_TRAINING, "TRAIN.PRECISION=float64", "TEST.PRECISION=float32", "DATA.VAL=coco_val2017"]
    finalize_config(default_config().update_args(words))  # without evaluations
    with pytest.raises(UserError, match=r"TEST.PRECISION='?float32'? must be None with TRAIN.PRECISION"):
        finalize_config(default_config().update_args([*words, "TRAIN.EVAL_PERIOD=1"]))


def test_exports_are_in_it_unless_another_is_given(file):
    model = load_model(str(file), ["TEST.PRECISION=bfloat16"])
    reference, cfg = with_export_settings(model, None)
    assert (reference.cfg.TEST.PRECISION, cfg.TRAIN.PRECISION, cfg.TEST.PRECISION) == ("bfloat16", "bfloat16", None)
    assert with_export_settings(model, "float16")[1].TRAIN.PRECISION == "float16"
    assert with_export_settings(model, "int8")[1].TRAIN.PRECISION == "bfloat16"


def test_a_model_that_predicts_in_bfloat16_has_no_onnx_file(file, tmp_path, capsys, monkeypatch):
    from tools import export

    monkeypatch.setitem(sys.modules, "onnx", None)  # refused before it would be imported
    words = ["--load", str(file), "--out", str(tmp_path / "out"), "--format", "onnx", "--images", PHOTO]
    assert export.main([*words, "--config", "TEST.PRECISION=bfloat16"]) == 2
    error = capsys.readouterr().err
    assert "the model predicts in bfloat16: ONNX Runtime has no bfloat16 convolutions" in error
    assert "--precision float32 or float16" in error
