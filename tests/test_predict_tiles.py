"""predict_tiles.py: tiles that cover an image, and detections of tiles that become those of the whole image."""

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import predict_tiles
from benchmarks.tiles import make_mosaics, write_tiled_tiff
from common import UserError
from config import default_config, finalize_config
from data import read_image
from demo.make_shapes import draw_image
from detections import Detections
from predict_tiles import (
    Found,
    View,
    detect_tiled,
    merge_views,
    open_parts,
    reduced,
    reduced_detections,
    tile_views,
    tiled_images,
)
from tests.tiny import TINY_MODEL
from utils.coco_format import read_truth
from utils.polygons import decode_mask, encode_mask, encode_segmentation

pytestmark = pytest.mark.quick


def config(*changes):
    given = [*TINY_MODEL, "DATA.NUM_CATEGORY=3", "MODE_MASK=True", "PREPROC.TEST_SHORT_EDGE_SIZE=100"]
    given += ["PREPROC.MAX_SIZE=100", "TEST.TILE=100", "TEST.TILE_OVERLAP=0.3", "TEST.BATCH_SIZE=3", *changes]
    return finalize_config(default_config().update_args(given), training=False)


class Squares:
    """A predictor that finds every connected area of a class's grey value in what it is shown, with its mask; areas of
    fewer than `smallest` pixels are not seen."""

    def __init__(self, smallest=1, keypoints=False):
        self.smallest, self.keypoints, self.seen = smallest, keypoints, []

    def __call__(self, image, image_shape):
        self.seen += [tuple(s) for s in image_shape.tolist()]
        outputs = [self._one(pixels[: s[0], : s[1], 0]) for pixels, s in zip(image, image_shape)]
        most = max(len(o) for o in outputs)
        batch = {
            "boxes": np.zeros((len(image), most, 4), np.float32), "scores": np.zeros((len(image), most), np.float32),
            "labels": np.zeros((len(image), most), np.int32), "masks": np.zeros((len(image), most, 28, 28), np.float32),
            "count": np.array([len(o) for o in outputs], np.int32),
        }  # fmt: skip
        if self.keypoints:
            batch["keypoints"] = np.zeros((len(image), most, 2, 3), np.float32)
        for n, found in enumerate(outputs):
            for k, (box, label, score, mask, points) in enumerate(found):
                batch["boxes"][n, k], batch["labels"][n, k], batch["scores"][n, k] = box, label, score
                batch["masks"][n, k] = mask
                if self.keypoints:
                    batch["keypoints"][n, k] = points
        return batch

    def _one(self, grey):
        found = []
        for label, value in enumerate((100, 150, 200), 1):
            count, areas, stats, _ = cv2.connectedComponentsWithStats((grey == value).astype(np.uint8))
            for k in range(1, count):
                x, y, w, h, area = stats[k].tolist()
                if area < self.smallest:
                    continue
                part = (areas[y : y + h, x : x + w] == k).astype(np.float32)
                mask = cv2.resize(part, (28, 28), interpolation=cv2.INTER_AREA)
                score = min(0.99, 0.5 + area / 20000)
                # Keypoints: the left and the right end, of which a piece is sure only where it sees them.
                right = x + w < grey.shape[1] - 1
                points = [[x, y + h / 2, 1 if x > 1 else 0.1], [x + w, y + h / 2, 1 if right else 0.1]]
                found.append(([x, y, x + w, y + h], label, score, mask, points))
        return sorted(found, key=lambda f: -f[2])


def drawn(height, width, objects):
    image = np.full((height, width, 3), 30, np.uint8)
    for x, y, w, h, label in objects:
        image[y : y + h, x : x + w] = 50 + 50 * label
    return image


def found_in(image, cfg, predict=None):
    return detect_tiled(predict or Squares(), open_parts(image), cfg)


def same(found, objects, tolerance=1.0):
    """Each object is found once, with its box and, within its rim, its mask."""
    expected = sorted(([x, y, x + w, y + h], label) for x, y, w, h, label in objects)
    got = sorted((b, int(n)) for b, n in zip(found.boxes.round(3).tolist(), found.labels))
    assert len(got) == len(expected), (got, expected)
    for (box, label), (wanted, name) in zip(got, expected):
        assert label == name and np.abs(np.subtract(box, wanted)).max() <= tolerance
    for box, rle in zip(found.boxes, found.masks):
        mask = decode_mask(rle)
        x1, y1, x2, y2 = box.round().astype(int)
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = True
        assert (mask & inside).sum() / max((mask | inside).sum(), 1) > 0.9


# ------------------------------------------------------------------------------------------ tiles
@given(
    st.integers(1, 400), st.integers(1, 400), st.integers(64, 150), st.floats(0, 0.9, allow_nan=False),
)  # fmt: skip
def test_tiles_cover_the_image_and_overlap(height, width, tile, overlap):
    views = tile_views(height, width, tile, overlap)
    seen = np.zeros((height, width), int)
    for v in views:
        assert v.width == min(tile, width) and v.height == min(tile, height) and v.x >= 0 and v.y >= 0
        seen[v.y : v.y + v.height, v.x : v.x + v.width] += 1
    assert seen.min() == 1 or seen.min() > 0
    for axis, side in ((0, width), (1, height)):
        starts = sorted({v[axis] for v in views})
        assert starts[-1] + min(tile, side) == side
        assert all(a + tile - b >= np.floor(tile * overlap) - 1 for a, b in zip(starts, starts[1:]))


def test_an_image_that_fits_is_seen_whole_and_found_exactly_as_without_tiles():
    image = drawn(80, 100, [(10, 10, 30, 20, 1), (50, 40, 9, 31, 2)])
    predict = Squares()
    found = found_in(image, config(), predict)
    assert predict.seen == [(80, 100)]
    same(found, [(10, 10, 30, 20, 1), (50, 40, 9, 31, 2)])


# ------------------------------------------------------------------------------------------ merging
@pytest.mark.parametrize("whole", [True, False])
def test_objects_in_overlaps_at_borders_and_across_tiles_are_found_once(whole):
    objects = [
        (5, 5, 20, 20, 1),  # in one tile
        (72, 10, 25, 20, 2),  # in the overlap of two
        (60, 100, 50, 18, 1),  # cut by one tile, whole in the next
        (20, 150, 210, 25, 3),  # across all tiles of a row
        (250, 20, 22, 190, 2),  # across all rows
        (120, 40, 95, 80, 1),  # across four tiles
        (280, 180, 20, 20, 3),  # in the corner
    ]
    cfg = config(f"TEST.TILE_WHOLE={whole}")
    image = drawn(200 + 10, 300, objects)
    # Without the whole image, or where that shows only the large ones.
    found = found_in(image, cfg, Squares(smallest=1 if not whole else 60))
    same(found, objects)


def test_a_cut_detection_gives_way_to_the_whole_one_even_with_a_better_score():
    tiles = [View(0, 0, 100, 100), View(70, 0, 100, 100)]
    cut = Found(tiles[0], np.array([[62.0, 20, 100, 60]]), np.float32([0.95]), np.int32([1]))
    whole = Found(tiles[1], np.array([[76.0, 20, 130, 60]]), np.float32([0.6]), np.int32([1]))
    found = merge_views([cut, whole], 100, 170, 0.5, False, 100)
    assert found.boxes.tolist() == [[76, 20, 130, 60]] and found.scores == np.float32(0.6)
    # One that is hardly believed in explains nothing: both stay.
    found = merge_views([cut, whole._replace(scores=np.float32([0.2]))], 100, 170, 0.5, False, 100)
    assert len(found.boxes) == 2
    # Of another class, both stay, unless classes suppress each other.
    other = whole._replace(labels=np.int32([2]))
    assert len(merge_views([cut, other], 100, 170, 0.5, False, 100).boxes) == 2
    assert len(merge_views([cut, other], 100, 170, 0.5, True, 100).boxes) == 1


def test_neighbours_that_only_touch_at_a_border_are_not_united():
    """Two objects of a class, one ending and one beginning at the border between tiles, at other heights."""
    tiles = [View(0, 0, 100, 100), View(70, 0, 100, 100)]
    left = Found(tiles[0], np.array([[40.0, 5, 100, 30]]), np.float32([0.9]), np.int32([1]))
    right = Found(tiles[1], np.array([[70.0, 60, 140, 95]]), np.float32([0.8]), np.int32([1]))
    assert len(merge_views([left, right], 100, 170, 0.5, False, 100).boxes) == 2
    right = right._replace(boxes=np.array([[70.0, 6, 140, 32]]))
    found = merge_views([left, right], 100, 170, 0.5, False, 100)
    assert found.boxes.tolist() == [[40, 5, 140, 32]] and found.scores == np.float32(0.9)


def test_boxes_of_one_view_stay_as_its_own_nms_left_them():
    """Soft NMS may leave boxes that overlap."""
    boxes = np.array([[10.0, 10, 50, 50], [12, 10, 52, 50]])
    one = Found(View(0, 0, 100, 100), boxes, np.float32([0.9, 0.4]), np.int32([1, 1]))
    none = Found(View(70, 0, 100, 100), boxes[:0], np.float32([]), np.int32([]))
    assert len(merge_views([one, none], 100, 170, 0.5, False, 100).boxes) == 2
    again = Found(View(0, 0, 170, 100), boxes[:1], np.float32([0.95]), np.int32([1]))
    assert merge_views([again, one, none], 100, 170, 0.5, False, 100).scores.tolist() == [np.float32(0.95)]


def test_pieces_of_a_person_give_each_keypoint_where_it_is_seen():
    objects = [(20, 60, 240, 30, 1)]
    predict = Squares(keypoints=True)
    found = found_in(drawn(150, 300, objects), config("TEST.TILE_WHOLE=False"), predict)
    np.testing.assert_allclose(found.keypoints, [[[20, 75, 1], [260, 75, 1]]], atol=1)


def test_the_largest_number_is_that_of_the_image():
    objects = [(x, y, 8, 8, 1) for x in range(5, 290, 20) for y in range(5, 200, 20)]
    image = drawn(210, 300, objects)
    assert len(found_in(image, config()).boxes) == len(objects) == 150
    found = found_in(image, config("TEST.TILE_RESULTS_PER_IM=40"))
    assert len(found.boxes) == 40 and (np.diff(found.scores) <= 0).all()


rectangle = st.tuples(st.integers(0, 380), st.integers(0, 280), st.integers(6, 200), st.integers(6, 200), st.just(1))


@settings(max_examples=20)
@given(
    st.lists(rectangle, min_size=1, max_size=4), st.integers(64, 160), st.sampled_from([0.1, 0.25, 0.5]), st.booleans(),
)  # fmt: skip
def test_separate_rectangles_anywhere_are_found_once_with_any_tiles(objects, tile, overlap, whole):
    placed = []
    for x, y, w, h, label in objects:
        x, y, w, h = x, y, min(w, 400 - x), min(h, 300 - y)
        gaps = [max(x - a - c, a - x - w, y - b - d, b - y - h) for a, b, c, d, _ in placed]
        apart = min(gaps, default=20) >= 20
        if apart and w >= 6 and h >= 6:
            placed.append((x, y, w, h, label))
    cfg = config(f"TEST.TILE={tile}", f"TEST.TILE_OVERLAP={overlap}", f"TEST.TILE_WHOLE={whole}",
                 f"PREPROC.TEST_SHORT_EDGE_SIZE={tile}", f"PREPROC.MAX_SIZE={tile}")  # fmt: skip
    # The whole image is shown at a smaller size, where edges are blurred: it sees nothing of this grey value alone.
    found = found_in(drawn(300, 400, placed), cfg, Squares())
    boxes = {tuple(b) for b in found.boxes.round().astype(int).tolist()}
    for x, y, w, h, _ in placed:
        best = max((_iou(b, (x, y, x + w, y + h)) for b in boxes), default=0)
        assert best > 0.75, ((x, y, w, h), boxes)
    if not whole:
        assert len(found.boxes) == len(placed)


def _iou(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@pytest.fixture(scope="module", autouse=True)
def few_pairs_at_a_time():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_tiles, "_PAIRS", 7)
        yield


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 20)] * 2), max_size=12))
def test_pairs_of_boxes_that_meet_are_all_found(rows):
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in rows], float).reshape(-1, 4)
    expected = {
        (i, j)
        for i in range(len(boxes))
        for j in range(i)
        if _iou(boxes[i], boxes[j]) > 0
    }  # fmt: skip
    found = list(predict_tiles._meeting(boxes))
    pairs = [(max(p), min(p)) for i, j in found for p in zip(i.tolist(), j.tolist())]
    assert set(pairs) == expected and len(pairs) == len(expected)


# ------------------------------------------------------------------------------------------ large images
def test_a_mosaic_has_the_objects_of_its_pictures(tmp_path):
    content = read_truth(make_mosaics(tmp_path, 1, 2), need_size=True)
    (image,) = content["images"]
    pixels = cv2.imread(str(tmp_path / "mosaics" / image["file_name"]))
    assert pixels.shape == (448, 448, 3)
    picture, objects = draw_image(np.random.default_rng([11, 0, 3]))  # the last of four
    height, width = picture.shape[:2]
    np.testing.assert_array_equal(pixels[224 : 224 + height, 224 : 224 + width], picture)
    assert content["annotations"][-1]["bbox"][:2] == [v + 224 for v in objects[-1]["bbox"][:2]]
    own = decode_mask(encode_segmentation(objects[0]["segmentation"], height, width))
    moved = content["annotations"][-len(objects)]["segmentation"]
    whole = decode_mask(encode_segmentation(moved, 448, 448))
    np.testing.assert_array_equal(whole[224 : 224 + height, 224 : 224 + width], own)


def test_a_large_tiff_is_never_whole_in_memory(tmp_path, monkeypatch):
    """Scaled down: 2000 x 2000 pixels are "large", of which 12 MB would be decoded."""
    monkeypatch.setattr(predict_tiles, "SMALL", 10**6)
    monkeypatch.setattr(predict_tiles, "_PIECE", 10**6)
    monkeypatch.setattr("utils.tiff_parts._CACHE", 10**6)
    objects = [(x, y, 30, 30, 1 + (x + y) % 3) for x in range(20, 1900, 190) for y in range(25, 1900, 210)]
    image = drawn(2000, 2000, objects)
    write_tiled_tiff(tmp_path / "a.tif", 2000, 2000, [image], 128)
    cfg = config("TEST.TILE=256", "PREPROC.TEST_SHORT_EDGE_SIZE=256", "PREPROC.MAX_SIZE=256", "TEST.TILE_WHOLE=True")
    in_memory = found_in(image, cfg, Squares(smallest=100))
    tracemalloc.start()
    try:
        parts = open_parts(tmp_path / "a.tif")
        found = detect_tiled(Squares(smallest=100), parts, cfg)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < image.nbytes * 0.8
    same(found, objects)
    np.testing.assert_array_equal(found.boxes, in_memory.boxes)
    small = reduced(parts, 7)
    assert small.shape == (286, 286, 3)
    mean = np.pad(image, ((0, 2), (0, 2), (0, 0)), "edge").reshape(286, 7, 286, 7, 3).mean((1, 3))
    assert np.abs(small - mean).max() <= 0.51
    shown = reduced_detections(found, 7)
    assert shown.masks[0]["size"] == [286, 286] and decode_mask(shown.masks[0]).sum() == pytest.approx(18, abs=6)
    np.testing.assert_allclose(shown.boxes * 7, found.boxes, atol=1e-3)


def test_reduced_detections_scale_everything():
    mask = np.zeros((90, 100), bool)
    mask[30:60, 20:80] = True
    points = np.float32([[[20, 30, 0.5]]])
    one = Detections(np.float32([[20, 30, 80, 60]]), np.float32([1]), np.int32([1]), [encode_mask(mask)], points)
    shown = reduced_detections(one, 10)
    assert shown.boxes.tolist() == [[2, 3, 8, 6]] and shown.keypoints.tolist() == [[[2, 3, 0.5]]]
    expected = np.zeros((9, 10), bool)
    expected[3:6, 2:8] = True
    np.testing.assert_array_equal(decode_mask(shown.masks[0]), expected)


def test_tiles_are_dealt_to_all_devices_with_the_results_of_one():
    image = drawn(300, 400, [(60, 60, 60, 90, 1), (240, 150, 90, 30, 2), (10, 210, 300, 70, 3)])
    several = [Squares() for _ in range(3)]
    found, alone = found_in(image, config(), several), found_in(image, config())
    assert [s.seen != [] for s in several] == [True] * 3
    assert np.array_equal(found.boxes, alone.boxes) and found.masks == alone.masks and len(alone.boxes) == 3


def test_files_that_cannot_be_read_are_left_out_and_a_diverged_model_is_not(tmp_path):
    good = drawn(150, 200, [(10, 10, 30, 20, 1)])
    cv2.imwrite(str(tmp_path / "a.png"), good)
    (tmp_path / "b.png").write_bytes(b"no image")
    files, lost = [str(tmp_path / "b.png"), str(tmp_path / "a.png")], []
    results = list(tiled_images(Squares(), files, config(), (0, 1), lambda i, e: lost.append((i, str(e)))))
    assert [r[0] for r in results] == [1] and lost[0][0] == 0 and "b.png" in lost[0][1]
    same(results[0][2], [(10, 10, 30, 20, 1)])
    np.testing.assert_array_equal(read_image(files[1]), good)

    def diverged(image, image_shape):
        return {**Squares()(image, image_shape), "boxes": np.full((len(image), 1, 4), np.nan, np.float32),
                "count": np.ones(len(image), int), "scores": np.ones((len(image), 1), np.float32)}  # fmt: skip

    with pytest.raises(UserError, match="diverged"):
        list(tiled_images(diverged, files[1:], config(), (0, 1), lambda i, e: lost.append(i)))
