"""tools/anchors.py: the anchors that it suggests fit the objects of a data set."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import default_config, finalize_config
from dataset import load_training_split
from tests.tiny import COCO_MINI
from tools.anchors import best_overlaps, main, object_sides, suggest

pytestmark = pytest.mark.quick
STRIDES, SIZES, RATIOS = [4, 8, 16, 32, 64], [32.0, 64.0, 128.0, 256.0, 512.0], [0.5, 1.0, 2.0]


def test_overlaps_are_those_of_boxes_a_quarter_of_a_stride_apart():
    random = np.random.RandomState(0)
    sides = np.exp(random.uniform(1, 5, (50, 2)))
    want = np.zeros(50)
    for size, stride in zip(SIZES, STRIDES):
        for ratio in RATIOS:
            anchor = np.array([size / ratio**0.5, size * ratio**0.5])
            for n, (w, h) in enumerate(sides):
                first, second = np.array([-w, -h, w, h]) / 2, np.concatenate([-anchor, anchor]) / 2 + stride / 4
                common = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
                overlap = np.maximum(common, 0).prod()
                want[n] = max(want[n], overlap / (w * h + anchor.prod() - overlap))
    np.testing.assert_allclose(best_overlaps(sides, SIZES, RATIOS, STRIDES), want, rtol=1e-9)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.tuples(st.floats(4, 600), st.floats(4, 600)), min_size=1, max_size=30),
    st.sampled_from([(SIZES, RATIOS), ([16.0, 20.0, 40.0, 80.0, 81.0], [0.3, 0.9, 3.0])]),
)
def test_a_suggestion_is_never_worse_than_what_is_given_and_has_its_form(objects, given):
    sides = np.array(objects)
    sizes, ratios = suggest(sides, *given, STRIDES)
    assert best_overlaps(sides, sizes, ratios, STRIDES).mean() >= best_overlaps(sides, *given, STRIDES).mean()
    assert len(sizes) == 5 and len(ratios) == 3 and sizes == sorted(sizes)
    cfg = default_config().update_args(["MODE_FPN=True", f"RPN.ANCHOR_SIZES={sizes}", f"RPN.ANCHOR_RATIOS={ratios}"])
    finalize_config(cfg)


def test_objects_of_three_shapes_get_anchors_of_those_shapes():
    kinds = np.array([[20, 60], [100, 100], [300, 100]], float)
    sides = np.repeat(kinds, 50, 0) * np.random.RandomState(0).uniform(0.97, 1.03, (150, 2))
    sizes, ratios = suggest(sides, SIZES, RATIOS, STRIDES)
    assert best_overlaps(sides, sizes, ratios, STRIDES).min() > 0.8
    np.testing.assert_allclose(sorted(ratios), [1 / 3, 1, 3], rtol=0.15)


def test_objects_are_measured_in_resized_images(capsys):
    words = ["MODE_FPN=True", f"DATA.BASEDIR={COCO_MINI}", "PREPROC.SHORT_EDGE_SIZE=[200,300]", "PREPROC.MAX_SIZE=300",
             "TRAIN.EVAL_PERIOD=0"]  # fmt: skip
    cfg = finalize_config(default_config().update_args(words))
    split = load_training_split(cfg)
    want = []
    for i in range(len(split)):
        height, width = split.image_size(i)
        scale = min(250 / min(height, width), 300 / max(height, width))
        objects = split.objects(i)
        want += [((box[2:] - box[:2]) * scale).tolist() for box in objects.boxes[~objects.is_crowd]]
    np.testing.assert_allclose(object_sides(split, cfg), want, rtol=1e-5)
    assert main(["--config", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{len(want)} objects") and lines[-1].startswith("RPN.ANCHOR_SIZES=[")
    # What is suggested is not improved further.
    assert main(["--config", *words, *lines[-1].split()]) == 0
    assert not capsys.readouterr().out.splitlines()[-1].startswith("RPN.")
