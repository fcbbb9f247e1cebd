"""run_start.py: which settings a run starts from, and what is said about them."""

import pytest

from common import UserError
from run_start import inference_settings, training_settings

pytestmark = pytest.mark.quick


def test_settings_of_training_do_not_block_a_prediction():
    small = ["PREPROC.MAX_SIZE=600", "PREPROC.TEST_SHORT_EDGE_SIZE=480"]
    assert inference_settings(small).PREPROC.MAX_SIZE == 600
    with pytest.raises(UserError, match=r"PREPROC\.MAX_SIZE=600 must be at least .*SHORT_EDGE_SIZE"):
        training_settings(small)


def test_doubtful_settings_are_warned_of_at_the_start(capsys):
    training_settings(["PREPROC.PIXEL_STD=[0.229,0.224,0.225]"])
    assert "PREPROC.PIXEL_STD=[0.229, 0.224, 0.225] looks like the scale 0 to 1" in capsys.readouterr().err
