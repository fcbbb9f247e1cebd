"""Random settings of the network that are accepted build a model that computes; tests/random_settings.py tries more."""

import random
import re

import pytest
from random_settings import KEPT, compute, draw_settings

from common import UserError
from config import SETTINGS
from tests.graph import tiny_config

OF_THE_NETWORK = re.compile(r"MODE_|(BACKBONE|RPN|FRCNN|FPN|MRCNN|KRCNN|CASCADE)\.|TEST\.(NMS|SOFT|RESULT)|TRAIN\.LOSS")


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_accepted_settings_computes_losses_gradients_and_detections(seed):
    rng = random.Random(seed)
    left_alone = KEPT | {key for key in SETTINGS if not OF_THE_NETWORK.match(key)}
    while True:
        drawn = draw_settings(rng, most=12, keep=left_alone)
        try:
            cfg = tiny_config(*(f"{key}={value!r}" for key, value in drawn.items()))
        except UserError:
            continue
        if len(drawn) > 4:
            break
    compute(cfg)
