"""From the graph's outputs to the frame of the image file: pasted masks, boxes, keypoints."""

import os
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import detections
from common import UserError
from utils import polygons

HERE = Path(__file__).parent
SHARED = Path(os.environ.get("PACKRCNN_SHARED", HERE.parent.parent / "shared"))


def dense_paste(mask, box, height, width, threshold=0.5):
    """Every pixel's bilinear probability in float64; returns (inside, too close to the threshold to call)."""
    rows, cols = mask.shape
    x1, y1, x2, y2 = np.asarray(box, np.float64)

    def weights(size, low, high, cells):
        u = (np.arange(size) + 0.5 - low) / (high - low) * cells - 0.5
        return np.maximum(0, 1 - np.abs(u[:, None] - np.arange(cells)))

    soft = weights(height, y1, y2, rows) @ mask.astype(np.float64) @ weights(width, x1, x2, cols).T
    return soft >= threshold, np.abs(soft - threshold) < 1e-5


@pytest.mark.quick
def test_pasted_masks_equal_the_recorded_reference():
    golden = np.load(HERE / "data" / "golden_paste.npz")
    height, width = golden["image_hw"].tolist()

    def unpack(name):
        return np.unpackbits(golden[name], axis=1)[:, : height * width].reshape(-1, height, width).astype(bool)

    wanted, close = unpack("inside_packed"), unpack("close_packed")
    rles = detections.paste_masks(golden["masks"], golden["boxes"], height, width)
    got = np.stack([polygons.decode_mask(r) for r in rles])
    assert not ((got != wanted) & ~close).any()
    iou = (got & wanted).sum((1, 2)) / np.maximum(1, (got | wanted).sum((1, 2)))
    assert iou[wanted.any((1, 2))].min() >= 0.99


@pytest.mark.quick
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cells=st.sampled_from([1, 2, 7, 14, 28]),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    box=st.tuples(*[st.floats(-30, 70, width=16)] * 2, *[st.floats(0.0625, 100, width=16)] * 2),
    kind=st.sampled_from(["noise", "saturated", "smooth"]),
)
def test_pasting_equals_resampling_every_pixel(seed, cells, height, width, box, kind):
    rng = np.random.default_rng(seed)
    mask = rng.random((cells, cells)).astype(np.float32)
    if kind == "saturated":
        mask = np.round(mask)
    elif kind == "smooth":
        grid = np.arange(cells) / cells
        mask = (0.5 + 0.5 * np.sin(5 * grid[:, None] + 3 * grid + mask[0, 0])).astype(np.float32)
    x, y, w, h = box
    box = np.array([x, y, x + w, y + h])
    wanted, close = dense_paste(mask, box, height, width)
    (rle,) = detections.paste_masks(mask[None], box[None], height, width)
    differs = (polygons.decode_mask(rle) != wanted) & ~close
    assert not differs.any()


@pytest.mark.quick
def test_pasted_counts_are_canonical_run_lengths():
    rng = np.random.default_rng(0)
    masks = rng.random((30, 28, 28)).astype(np.float32)
    corner = rng.uniform(-20, 80, (30, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0.5, 100, (30, 2))], 1)
    for rle in detections.paste_masks(masks, boxes, 70, 90):
        again = coco_mask.encode(np.asfortranarray(polygons.decode_mask(rle).astype(np.uint8)))
        assert rle == {"size": [70, 90], "counts": again["counts"].decode()}


@pytest.mark.quick
@pytest.mark.parametrize("box", [[5, 5, 5, 9], [5, 9, 8, 5], [200, 5, 220, 9], [-50, -50, -10, -10], [0, 0, 0, 0]])
def test_masks_of_degenerate_or_far_boxes_are_empty(box):
    (rle,) = detections.paste_masks(np.ones((1, 28, 28), np.float32), np.array([box]), 40, 30)
    assert polygons.decode_mask(rle).shape == (40, 30)
    assert coco_mask.area(rle) == 0


@pytest.mark.quick
def test_original_frame_scales_each_axis_clips_and_drops_empty_boxes():
    outputs = {
        "boxes": np.array([[10, 20, 50, 60], [-5, -5, 300, 300], [200, 10, 210, 20], [1, 1, 2, 2]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        "labels": np.array([1, 2, 3, 4], np.int32),
        "masks": np.ones((4, 14, 14), np.float32),
        "keypoints": np.tile(np.array([[[10, 20, 0.5]]], np.float32), (4, 3, 1)),
        "count": np.int32(3),
    }
    found = detections.to_original_frame(outputs, (100, 200), (50, 400))
    np.testing.assert_allclose(found.boxes, [[20, 10, 100, 30], [0, 0, 400, 50]])
    np.testing.assert_allclose(found.scores, [0.9, 0.8])
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.dtype == found.scores.dtype == np.float32 and found.labels.dtype == np.int32
    np.testing.assert_allclose(found.keypoints[1, 2], [20, 10, 0.5])
    assert [coco_mask.toBbox(m).tolist() for m in found.masks] == [[20, 10, 80, 20], [0, 0, 400, 50]]
    assert outputs["keypoints"][0, 0, 0] == 10


@pytest.mark.quick
def test_no_detection_gives_empty_arrays():
    outputs = {
        "boxes": np.zeros((0, 4), np.float32),
        "scores": np.zeros(0, np.float32),
        "labels": np.zeros(0, np.int32),
        "masks": np.zeros((0, 28, 28), np.float32),
        "keypoints": np.zeros((0, 17, 3), np.float32),
    }
    found = detections.to_original_frame(outputs, (10, 10), (20, 20))
    assert found.boxes.shape == (0, 4) and found.masks == [] and found.keypoints.shape == (0, 17, 3)
    assert detections.coco_results(found, 1, lambda label: label) == []


@pytest.mark.quick
def test_diverged_weights_are_named_as_the_cause():
    outputs = {
        "boxes": np.full((1, 4), np.nan, np.float32),
        "scores": np.ones(1, np.float32),
        "labels": np.ones(1, np.int32),
    }
    with pytest.raises(UserError, match="diverged"):
        detections.to_original_frame(outputs, (10, 10), (20, 20))


@pytest.mark.parametrize("model", ["mask_r50_fpn", "mask_r50_c4", "cascade_mask_r50_fpn", "keypoint_r50_fpn"])
def test_recorded_predictions_become_the_recorded_boxes_and_masks(model):
    path = SHARED / "golden" / f"{model}.golden.npz"
    if not path.exists():
        pytest.skip(f"no recorded vectors at {path} (PACKRCNN_SHARED names their folder)")
    golden = np.load(path)
    for image in ("inf/b0/img0/", "inf/b1/img0/"):
        size = golden[f"data/{image[5]}/image_bgr"].shape[:2]
        outputs = {"boxes": golden[image + "det_boxes"], "scores": golden[image + "det_scores"]}
        outputs["labels"] = golden[image + "det_classes"].astype(np.int32) + 1
        if image + "det_mask_probs" in golden.files:
            outputs["masks"] = golden[image + "det_mask_probs"]
        if image + "det_keypoints" in golden.files:
            outputs["keypoints"] = golden[image + "det_keypoints"]
        found = detections.to_original_frame(outputs, size, size)
        np.testing.assert_allclose(found.boxes, golden[image + "post_boxes"], atol=1e-3)
        np.testing.assert_array_equal(found.labels - 1, golden[image + "post_classes"])
        if found.keypoints is not None:
            np.testing.assert_allclose(found.keypoints, golden[image + "post_keypoints"], atol=1e-3, rtol=1e-5)
        if found.masks is not None:
            wanted = np.unpackbits(golden[image + "post_masks_packed"], axis=1)[:, : size[0] * size[1]].astype(bool)
            for rle, mask in zip(found.masks, wanted.reshape(-1, *size)):
                got = polygons.decode_mask(rle)
                # The probabilities are recorded as float16, so a few pixels on the outline may differ.
                assert (got & mask).sum() >= 0.99 * (got | mask).sum()
