"""Outlines against pycocotools' masks, and against geometry that must hold for any outline."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from utils import polygons

settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
settings.load_profile("no deadline")
COCO = Path(__file__).parent / "data" / "coco_mini" / "annotations" / "instances_train2017.json"

masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda shape: arrays(bool, shape))
rings = st.integers(3, 10).flatmap(
    lambda n: arrays(np.float64, (n, 2), elements=st.floats(0, 60).map(lambda v: round(v, 3)))
)


def real_polygons():
    """(image size, rings) of every object of the bundled COCO images that is not a crowd."""
    content = json.loads(COCO.read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    for a in content["annotations"]:
        if not a["iscrowd"]:
            yield sizes[a["image_id"]], [np.array(p).reshape(-1, 2) for p in a["segmentation"]]


def coco_raster(object_rings, box, size):
    """pycocotools' mask of the part inside the box at size x size, from polygons scaled into it."""
    x1, y1, x2, y2 = box
    scaled = [((r - [x1, y1]) * [size / (x2 - x1), size / (y2 - y1)]).ravel().tolist() for r in object_rings]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(scaled, size, size))).astype(bool)


def oriented_edges(object_rings):
    return polygons.rings_to_edges([polygons.orient_outer(r) for r in object_rings])


# ---------------------------------------------------------------- masks to rings
@pytest.mark.quick
@given(masks)
@settings(max_examples=300)
def test_tracing_a_mask_and_filling_it_gives_the_mask_back(mask):
    traced = polygons.mask_to_rings(mask)
    filled = polygons.rasterize(polygons.rings_to_edges(traced), [0, 0, mask.shape[1], mask.shape[0]], mask.shape)
    np.testing.assert_array_equal(filled, mask)


@pytest.mark.quick
@given(masks)
@settings(max_examples=200)
def test_traced_rings_enclose_exactly_the_area_of_the_mask(mask):
    assert sum(polygons.signed_area(r) for r in polygons.mask_to_rings(mask)) == mask.sum()


@pytest.mark.quick
def test_a_hole_is_a_ring_of_the_other_orientation():
    mask = np.ones((5, 6), bool)
    mask[2, 2:4] = False
    areas = sorted(polygons.signed_area(r) for r in polygons.mask_to_rings(mask))
    assert areas == [-2, 30]


@pytest.mark.quick
def test_pixels_that_touch_at_a_corner_are_two_rings():
    for mask in (np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1]):
        assert [polygons.signed_area(r) for r in polygons.mask_to_rings(mask)] == [1, 1]


@pytest.mark.quick
def test_traced_vertices_are_corners_of_pixels():
    mask = np.zeros((8, 9), bool)
    mask[2:5, 3:7] = True
    (ring,) = polygons.mask_to_rings(mask)
    assert sorted(map(tuple, ring.tolist())) == [(3, 2), (3, 5), (7, 2), (7, 5)]
    assert polygons.mask_to_rings(np.zeros((4, 4), bool)) == []


@pytest.mark.quick
@given(masks)
def test_rle_decoding_equals_pycocotools(mask):
    compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    height, width = mask.shape
    np.testing.assert_array_equal(polygons.decode_rle(compressed, height, width), mask)
    as_text = {"size": [height, width], "counts": compressed["counts"].decode()}
    np.testing.assert_array_equal(polygons.decode_rle(as_text, height, width), mask)


def test_compressed_rle_of_large_runs_equals_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0.0, 1e-5, 1e-3, 0.5, 1.0):
        mask = rng.random((700, 900)) < density
        compressed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        np.testing.assert_array_equal(polygons.decode_rle(compressed, 700, 900), mask)


@pytest.mark.quick
def test_uncompressed_rle_starts_with_background():
    rle = {"size": [2, 3], "counts": [1, 2, 3]}
    assert polygons.decode_rle(rle, 2, 3).T.ravel().tolist() == [False, True, True, False, False, False]


@pytest.mark.quick
@pytest.mark.parametrize(
    "rle",
    [
        {"size": [3, 2], "counts": [6]},
        {"size": [2, 3], "counts": [1, 2]},
        {"size": [2, 3], "counts": [8, -2]},
        {"size": [2, 3], "counts": "~~"},
        {"size": [2, 3], "counts": "\x01"},
        {"size": [2, 3], "counts": ""},
        {"size": [2, 3], "counts": "o" * 40},
        {"size": [2, 3], "counts": "é"},
    ],
)
def test_rle_that_does_not_fit_is_a_value_error(rle):
    with pytest.raises(ValueError):
        polygons.decode_rle(rle, 2, 3)


# ---------------------------------------------------------------- the rasteriser
@pytest.mark.parametrize("size, least_iou", [(28, 0.98), (14, 0.96)])
def test_rasteriser_agrees_with_pycocotools_on_real_polygons(size, least_iou):
    rng = np.random.default_rng(0)
    ious, area, coco_area = [], 0, 0
    for _, object_rings in real_polygons():
        points = np.concatenate(object_rings)
        low, high = points.min(0), points.max(0)
        for _ in range(3):  # a proposal: the object's box with its corners moved by up to a tenth
            box = np.concatenate([low, high]) + rng.uniform(-0.1, 0.1, 4) * np.tile(high - low, 2)
            ours = polygons.rasterize(oriented_edges(object_rings), box, size)
            coco = coco_raster(object_rings, box, size)
            area, coco_area = area + ours.sum(), coco_area + coco.sum()
            if ours.any() or coco.any():
                ious.append((ours & coco).sum() / (ours | coco).sum())
    assert len(ious) > 100
    assert np.mean(ious) >= least_iou
    assert abs(area / coco_area - 1) < 0.01


@pytest.mark.quick
@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_rasteriser_equals_counting_the_winding_of_every_pixel_centre(seed):
    rng = np.random.default_rng(seed)
    object_rings = [rng.uniform(0, 20, (rng.integers(3, 8), 2)) for _ in range(rng.integers(1, 4))]
    box = np.array([*rng.uniform(0, 8, 2), *rng.uniform(10, 20, 2)])
    filled = polygons.rasterize(polygons.rings_to_edges(object_rings), box, 9)
    for row in range(9):
        for column in range(9):
            centre = box[:2] + (np.array([column, row]) + 0.5) * (box[2:] - box[:2]) / 9
            turns = 0.0
            for ring in object_rings:
                angles = np.arctan2(*(ring - centre).T[::-1])
                steps = np.diff(np.append(angles, angles[0]))
                turns += ((steps + np.pi) % (2 * np.pi) - np.pi).sum()
            assert filled[row, column] == (abs(turns) > 1), (row, column)


@pytest.mark.quick
def test_overlapping_parts_unite_and_holes_stay_holes():
    square = np.array([[0.0, 0], [6, 0], [6, 6], [0, 6]])
    united = polygons.rasterize(polygons.rings_to_edges([square, square + 3]), [0, 0, 10, 10], 10)
    assert united.sum() == 36 + 36 - 9
    hole = (square / 3 + 2)[::-1]
    with_hole = polygons.rasterize(polygons.rings_to_edges([square, hole]), [0, 0, 6, 6], 6)
    assert with_hole.sum() == 36 - 4 and not with_hole[2:4, 2:4].any()


@pytest.mark.quick
def test_rasteriser_outside_of_the_outline_and_without_edges_is_empty():
    square = polygons.rings_to_edges([np.array([[0.0, 0], [6, 0], [6, 6], [0, 6]])])
    assert not polygons.rasterize(square, [50, 50, 60, 60], 14).any()
    assert not polygons.rasterize(square, [-30, 0, -20, 6], 14).any()
    assert polygons.rasterize(square, [1, 1, 5, 5], 14).all()
    assert not polygons.rasterize(np.zeros((0, 4)), [0, 0, 5, 5], 14).any()


# ---------------------------------------------------------------- rings and edges
@pytest.mark.quick
@given(rings)
def test_orient_outer_gives_positive_area_to_both_directions(ring):
    assert polygons.signed_area(polygons.orient_outer(ring)) >= 0
    assert polygons.signed_area(polygons.orient_outer(ring[::-1])) >= 0


@pytest.mark.quick
@given(st.lists(rings, min_size=1, max_size=4))
def test_areas_of_many_rings_equal_those_of_each(several):
    areas = polygons.ring_areas(np.concatenate(several), np.array([len(r) for r in several]))
    np.testing.assert_allclose(areas, [polygons.signed_area(r) for r in several], atol=1e-6)


@pytest.mark.quick
@given(st.lists(rings, min_size=1, max_size=4))
def test_edges_of_every_ring_are_a_closed_walk(several):
    edges = polygons.rings_to_edges(several)
    np.testing.assert_allclose((edges[:, 2:] - edges[:, :2]).sum(0), 0, atol=1e-9)
    np.testing.assert_array_equal(edges[:, :2], np.concatenate(several))


@pytest.mark.quick
@given(rings, st.floats(1, 100).map(lambda v: round(v, 3)))
def test_polygon_flip_is_an_involution_and_keeps_the_orientation(ring, width):
    edges = polygons.rings_to_edges([ring])
    flipped = polygons.flip_edges(edges, width)
    np.testing.assert_allclose(polygons.flip_edges(flipped, width), edges, atol=1e-9)
    area = (edges[:, 0] * edges[:, 3] - edges[:, 2] * edges[:, 1]).sum() / 2
    flipped_area = (flipped[:, 0] * flipped[:, 3] - flipped[:, 2] * flipped[:, 1]).sum() / 2
    np.testing.assert_allclose(flipped_area, area, atol=1e-6)


@pytest.mark.quick
def test_packing_pads_with_zero_length_edges_and_leaves_out_vertical_ones():
    triangle, square = np.array([[0.0, 0], [4, 0], [0, 4]]), np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    edges = np.concatenate([polygons.rings_to_edges([triangle]), polygons.rings_to_edges([square, square + 5])])
    packed = polygons.pack_edges(edges, np.repeat([0, 2], [3, 8]), 3)
    assert packed.shape == (3, 4, 4)
    assert (packed[0, 2:] == 0).all() and (packed[1] == 0).all()
    for n, object_rings in ((0, [triangle]), (2, [square, square + 5])):
        # The reference works by rows: exchange x and y.
        np.testing.assert_array_equal(
            polygons.rasterize(packed[n][:, [1, 0, 3, 2]], [0, 0, 8, 8], 16),
            polygons.rasterize(polygons.rings_to_edges(object_rings)[:, [1, 0, 3, 2]], [0, 0, 8, 8], 16),
        )


@pytest.mark.quick
def test_packing_nothing_gives_one_padding_edge():
    assert polygons.pack_edges(np.zeros((0, 4), np.float32), np.zeros(0, int), 2).shape == (2, 1, 4)
    assert polygons.pack_edges(np.zeros((0, 4), np.float32), np.zeros(0, int), 0).shape == (0, 1, 4)
    assert polygons.vertices_to_edges(np.zeros((0, 2), np.float32), np.zeros(0, int)).shape == (0, 4)


# ---------------------------------------------------------------- windows
def random_outline(rng):
    """Edges of one or two overlapping parts, perhaps with a hole, around the window [0, 40] x [0, 30]."""
    rings = []
    for _ in range(rng.integers(1, 3)):
        centre, size = rng.uniform([-10, -10], [50, 40]), rng.uniform(3, 30)
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        ring = centre + size * np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(0.4, 1, (len(angles), 1))
        ring = np.round(ring) if rng.random() < 0.3 else ring
        rings += [polygons.orient_outer(ring)]
        if rng.random() < 0.5:
            rings += [polygons.orient_outer(ring.mean(0) + (ring - ring.mean(0)) * 0.4)[::-1]]
    return polygons.rings_to_edges(rings).astype(np.float32)


def test_the_box_inside_a_window_bounds_the_part_that_is_drawn_there():
    far = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        edges = [random_outline(rng) for _ in range(2)]
        owners = np.repeat(np.arange(2), [len(e) for e in edges])
        found = polygons.boxes_inside(np.concatenate(edges), owners, 3, 30, 40)
        assert not found[2].any()  # has no edge
        for box, object_edges in zip(found, edges):
            ys, xs = np.nonzero(polygons.rasterize(object_edges, [0, 0, 40, 30], (30 * 16, 40 * 16)))
            if len(ys) == 0:
                far += (box[2:] - box[:2]).min() > 0.1
                continue
            drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 16
            assert (box[:2] <= drawn[:2] + 0.1).all() and (box[2:] >= drawn[2:] - 0.1).all()
            far += np.abs(box - drawn).max() > 0.5
    assert far <= 12  # needles between the samples


@pytest.mark.quick
def test_an_outline_along_the_border_of_the_window_counts_for_the_side_it_is_on():
    outside = np.array([[[-10, 2], [0, 2], [0, 25], [-10, 25]], [[40, 0], [50, 0], [50, 30], [40, 30]]], np.float32)
    inside = np.array([[0, 5], [40, 5], [40, 30], [0, 30]], np.float32)
    around = np.array([[-5, -5], [90, -5], [90, 90], [-5, 90]], np.float32)
    rings = [*outside, inside, around]
    edges = np.concatenate([polygons.rings_to_edges([r]) for r in rings])
    boxes = polygons.boxes_inside(edges, np.repeat(np.arange(4), 4), 4, 30, 40)
    np.testing.assert_allclose(boxes, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 5, 40, 30], [0, 0, 40, 30]], atol=1e-6)


@pytest.mark.quick
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tiny", [0.0, 5e-324, 1e-310, 1e-45, 1e-9])
def test_edges_next_to_upright_or_level_overflow_nothing(tiny):
    ring = np.array([[5 - tiny, -9], [5, 50], [15, 50], [15, 20], [60, 20 + tiny], [60, -tiny], [15, 0], [15, -9]])
    ring[ring == 5] += tiny
    edges = polygons.rings_to_edges([ring])
    box = polygons.boxes_inside(edges, np.zeros(len(edges), int), 1, 30, 40)[0]
    np.testing.assert_allclose(box, [5, 0, 40, 30], atol=2e-3)
    clipped, _ = polygons.clip_edges(edges, 30, 40)
    area = ((clipped[:, 0] + clipped[:, 2]) * (clipped[:, 3] - clipped[:, 1])).sum() / 2
    assert abs(area) == pytest.approx(10 * 30 + 25 * 20, abs=0.01)


@given(st.integers(0, 10**6))
def test_a_clipped_outline_fills_the_same_pixels_inside_the_window_and_none_outside(seed):
    edges = random_outline(np.random.default_rng(seed))
    clipped, origin = polygons.clip_edges(edges, 30, 40)
    assert clipped.dtype == edges.dtype and (np.diff(origin) >= 0).all()
    assert (clipped >= 0).all() and (clipped <= [40, 30, 40, 30]).all()
    whole, size = [-30.013, -30.007, 69.987, 59.993], (90 * 4, 100 * 4)  # no sample on an edge between integers
    before, after = (polygons.rasterize(e, whole, size) for e in (edges, clipped))
    window = np.zeros(size, bool)
    window[30 * 4 : 60 * 4, 30 * 4 : 70 * 4] = True
    assert (after != (before & window)).sum() <= 2  # samples that lie on an edge, to the rounding of float32
    within = ((edges >= 0) & (edges <= [40, 30, 40, 30])).all(1) & (edges[:, :2] != edges[:, 2:]).any(1)
    np.testing.assert_array_equal(clipped[np.isin(origin, np.flatnonzero(within))], edges[within])


def test_a_smoothed_ring_has_few_vertices_half_a_pixel_from_the_outline_that_was_drawn():
    for angle in np.linspace(0, 1.5, 9):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        ring = np.array([[-60, -30], [60, -30], [60, 30], [0, 5], [-60, 30]]) @ turn + 100
        edges = polygons.rings_to_edges([ring])
        (traced,) = polygons.mask_to_rings(polygons.rasterize(edges, [0, 0, 200, 200], 200))
        smooth = polygons.smooth_ring(traced)
        assert len(smooth) <= max(8, 0.25 * len(traced))
        assert polygons.signed_area(smooth) == pytest.approx(polygons.signed_area(ring), rel=0.01)
        fine = [
            polygons.rasterize(polygons.rings_to_edges([r]), [0, 0, 200, 200], 1600) for r in (ring, traced, smooth)
        ]
        errors = [(fine[0] ^ f).sum() / 64 for f in fine[1:]]
        length = np.linalg.norm(np.roll(ring, -1, 0) - ring, axis=1).sum()
        assert errors[1] < 0.35 * length and errors[1] <= 1.1 * errors[0] + 10


@pytest.mark.quick
def test_smoothing_keeps_small_rings_and_straight_outlines_and_never_loses_a_thin_one():
    square = np.array([[3, 3], [90, 3], [90, 50], [3, 50]], np.float32)
    np.testing.assert_array_equal(polygons.smooth_ring(square), square)
    line = polygons.mask_to_rings(np.eye(40, dtype=bool) | np.eye(40, k=1, dtype=bool))
    for ring in line:
        assert polygons.signed_area(polygons.smooth_ring(ring)) > 0


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_part_of_a_mask_is_the_smallest_that_holds_the_object(size, share, seed):
    mask = np.random.RandomState(seed).rand(*size) < share
    part, left, top = polygons.decode_part(polygons.encode_mask(mask))
    whole = np.zeros_like(mask)
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    np.testing.assert_array_equal(whole, mask)
    if mask.any():
        assert part.any(0)[[0, -1]].all() and part.any(1)[[0, -1]].all()
    else:
        assert part.size == 0


@pytest.mark.quick
@settings(max_examples=100, deadline=None)
@given(runs=st.lists(st.integers(1, 3000), min_size=1, max_size=40), first=st.sampled_from([0, 1]))
def test_compressed_counts_are_decoded_exactly(runs, first):
    counts = np.array([0] * first + runs, np.uint32)
    rle = polygons.encode_runs(counts, 1, int(counts.sum()))
    assert polygons.decode_runs(rle["counts"]).tolist() == counts.tolist()


far_rings = st.integers(3, 8).flatmap(
    lambda n: arrays(np.float64, (n, 2), elements=st.one_of(st.floats(0, 60), st.floats(-1e4, 1e4)))
)


@given(ring=far_rings)
def test_a_clipped_ring_fills_the_same_pixels_of_the_image(ring):
    height, width = 40, 50
    ring = ring + np.arange(len(ring))[:, None] * [0.0137, 0.0291]  # no edges that run along pixels' centres
    clipped = polygons.clip_ring(ring, height, width)
    assert (clipped >= 0).all() and (clipped <= [width, height]).all()
    box = [0, 0, width, height]
    wanted = polygons.rasterize(polygons.rings_to_edges([ring]), box, (height, width))
    got = polygons.rasterize(polygons.rings_to_edges([clipped]), box, (height, width))
    assert np.count_nonzero(got != wanted) <= 3  # centres within rounding of an edge


def inside_by_parity(ring, height, width):
    """bool [height, width]: pixels whose centre has an odd number of edges to its left, as COCO's rasteriser counts
    them; where a ring overlaps itself this differs from the winding number of `rasterize`."""
    inside = np.zeros((height, width), bool)
    x = np.arange(width) + 0.5
    for row in range(height):
        y = row + 0.5
        for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, 0)):
            if (y1 <= y) != (y2 <= y):
                inside[row] ^= x > x1 + (y - y1) / (y2 - y1) * (x2 - x1)
    return inside


@example(ring=np.array([[14, 0], [0, 14], [14, 14]] * 2, np.float64), scale=1)
@given(ring=far_rings, scale=st.sampled_from([1, 1e5, 1e9, 1e26]))
def test_masks_of_rings_that_reach_any_distance_are_those_of_the_part_inside(ring, scale):
    """At 1e9 and beyond an edge's slope is that of the ring whose points are moved to 1e9."""
    height, width = 40, 50
    ring = np.where(np.abs(ring) > 60, ring * scale, ring)
    got = polygons.decode_mask(polygons.encode_segmentation([ring.ravel().tolist()], height, width))
    wanted = inside_by_parity(np.clip(ring, -1e9, 1e9), height, width)
    # COCO's rasteriser differs from the exact one along the outline.
    moves = [(1, 0), (1, 1), (-1, 0), (-1, 1)]
    border = np.any([wanted != np.roll(wanted, step, axis) for step, axis in moves], 0)
    assert np.count_nonzero((got != wanted) & ~border) <= 0.03 * wanted.size


def test_a_segmentation_is_one_mask_whatever_it_is_made_of():
    square, other = [2, 2, 12, 2, 12, 12, 2, 12], [20, 5, 30, 5, 30, 25, 20, 25]
    runs = polygons.encode_segmentation([square], 40, 50)
    both = polygons.decode_mask(polygons.encode_segmentation([square, other], 40, 50))
    counts = polygons.decode_runs(runs["counts"]).tolist()
    for first in (
        square,
        {"counts": runs["counts"].decode()},
        {"counts": counts},
        {"size": [40, 50], "counts": counts},
    ):
        assert np.array_equal(polygons.decode_mask(polygons.encode_segmentation([first, other], 40, 50)), both)
    assert both.sum() == 100 + 200
    for nothing in (None, [], {}):
        assert not polygons.decode_mask(polygons.encode_segmentation(nothing, 40, 50)).any()


# ---------------------------------------------------------------- masks that are moved, reduced and united
@given(masks, st.integers(-14, 14), st.integers(-14, 14), st.integers(1, 14), st.integers(1, 14))
def test_a_moved_mask_has_the_pixels_that_fall_into_the_new_frame(mask, right, down, height, width):
    expected = np.zeros((height, width), bool)
    rows, columns = np.nonzero(mask)
    rows, columns = rows + down, columns + right
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    expected[rows[inside], columns[inside]] = True
    moved = polygons.move_rle(polygons.encode_mask(mask), right, down, height, width)
    assert moved == polygons.encode_mask(expected)


@given(masks, st.integers(1, 5))
def test_a_reduced_mask_has_the_middle_pixel_of_each_block(mask, times):
    middle = mask[times // 2 :: times, times // 2 :: times]
    expected = np.zeros((-(-mask.shape[0] // times), -(-mask.shape[1] // times)), bool)
    expected[: middle.shape[0], : middle.shape[1]] = middle
    assert polygons.reduce_rle(polygons.encode_mask(mask), times) == polygons.encode_mask(expected)


@given(st.lists(arrays(bool, (5, 7)), min_size=1, max_size=4))
def test_united_masks_have_the_pixels_of_all(several):
    united = polygons.unite_rles([polygons.encode_mask(m) for m in several])
    assert united == polygons.encode_mask(np.any(several, 0))
