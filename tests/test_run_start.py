"""run_start.py: which settings a run starts from, and what is said about them."""

import pytest

from augment import resized_shape
from common import UserError
from run_start import inference_settings, training_settings

pytestmark = pytest.mark.quick


def test_settings_of_training_do_not_block_a_prediction():
    small = ["PREPROC.MAX_SIZE=600", "PREPROC.TEST_SHORT_EDGE_SIZE=480"]
    assert inference_settings(small).PREPROC.MAX_SIZE == 600
    with pytest.raises(UserError, match=r"PREPROC\.MAX_SIZE=600 must be at least .*SHORT_EDGE_SIZE"):
        training_settings(small)


def test_the_test_edge_of_a_run_without_evaluations_does_not_block_its_predictions():
    small = ["PREPROC.SHORT_EDGE_SIZE=480", "PREPROC.MAX_SIZE=600", "TRAIN.EVAL_PERIOD=0"]
    stored = training_settings(small).to_dict()
    assert stored["PREPROC.TEST_SHORT_EDGE_SIZE"] == 800
    cfg = inference_settings([], {"settings": stored}, "run")
    assert cfg.PREPROC.TEST_SHORT_EDGE_SIZE == cfg.PREPROC.MAX_SIZE == 600
    for size in [(480, 640), (640, 480), (1000, 1000), (30, 3000)]:
        assert resized_shape(*size, 800, 600) == resized_shape(*size, 600, 600)
    with pytest.raises(UserError, match=r"TEST_SHORT_EDGE_SIZE=700 must be at most PREPROC\.MAX_SIZE \(600\)"):
        inference_settings(["PREPROC.TEST_SHORT_EDGE_SIZE=700"], {"settings": stored}, "run")


def test_doubtful_settings_are_warned_of_at_the_start(capsys):
    training_settings(["PREPROC.PIXEL_STD=[0.229,0.224,0.225]"])
    assert "PREPROC.PIXEL_STD=[0.229, 0.224, 0.225] looks like the scale 0 to 1" in capsys.readouterr().err
