"""utils/class_tensors.py: which tensors have entries for classes, and keeping those of classes of the same name."""

import numpy as np
import pytest

from common import UserError
from utils.class_tensors import depends_on_classes, has_shared_masks, keep_classes

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("fastrcnn/outputs/class/W", (32, 4), True),
        ("fastrcnn/outputs/box/b", (16,), True),
        ("fastrcnn/outputs/box/b", (4,), False),  # the same deltas for every class
        ("fastrcnn/class/b", (4,), True),  # C4
        ("cascade_rcnn_stage2/outputs/class/W", (32, 4), True),
        ("cascade_rcnn_stage2/outputs/box/W", (32, 4), False),
        ("maskrcnn/conv/W", (1, 1, 16, 3), True),
        ("keypointrcnn/deconv/W", (4, 4, 17, 16), False),
        ("rpn/class/W", (1, 1, 16, 3), False),
        ("fastrcnn/fc6/W", (32, 4), False),
        ("fastrcnn/outputs/class/W/Momentum", (32, 4), False),
    ],
)
def test_tensors_with_entries_for_each_class_are_known(name, shape, expected):
    assert depends_on_classes(name, shape) is expected


@pytest.mark.parametrize(
    ("scores", "masks", "expected"), [(81, 1, True), (81, 80, False), (2, 1, False), (81, None, False)]
)
def test_one_mask_for_several_classes_is_known_by_the_shapes(scores, masks, expected):
    shapes = {"fastrcnn/outputs/class/W": (32, scores), "rpn/class/W": (1, 1, 16, 3)}
    shapes |= {"maskrcnn/conv/W": (1, 1, 16, masks)} if masks else {}
    assert has_shared_masks(shapes) is expected


OLD, NEW = ["cat", "dog", "owl"], ["owl", "fox", "cat", "emu"]


@pytest.mark.parametrize(
    ("name", "width", "background"),
    [("fastrcnn/outputs/class/W", 1, 1), ("fastrcnn/outputs/box/W", 4, 1), ("maskrcnn/conv/W", 1, 0)],
)
def test_entries_of_classes_of_the_same_name_move_to_their_new_places(name, width, background):
    """Entry c of a tensor holds its class's number; initial values are negative."""

    def entries(classes):
        return np.repeat(np.arange(classes + background, dtype=np.float32), width)[None] + 1 - background

    stored, initial = np.tile(entries(3), (5, 1)), np.tile(-entries(4) - 10, (5, 1))
    kept = keep_classes(name, stored, initial, OLD, NEW)
    wanted = ([0] if background else []) + [3, initial[0, (1 + background) * width], 1, initial[0, -1]]
    np.testing.assert_array_equal(kept, np.tile(np.repeat(np.float32(wanted), width), (5, 1)))


def test_weights_of_another_number_of_classes_than_their_names_are_refused():
    with pytest.raises(
        UserError, match=r"fastrcnn/outputs/class/b has shape \[7\], which does not fit its 3 class names"
    ):
        keep_classes("fastrcnn/outputs/class/b", np.zeros(7), np.zeros(5), OLD, NEW)
