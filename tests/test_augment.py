"""augment.py: annotations stay on their pixels through crops, scales, flips and pasting; draws follow their ranges."""

from itertools import islice

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_data import box_annotation, one_batch, same, settings, write_set

import data
from augment import Scene, View, draw_view, jitter_colours, paste_objects, place_objects, resized_shape
from common import UserError
from config import default_config, finalize_config
from data_workers import training_dataflow
from dataset import load_split, load_training_split
from utils import polygons

hypothesis_settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
hypothesis_settings.load_profile("no deadline")

# ---------------------------------------------------------------- images in which every object has its own colour
# The corners of the colour cube: channel k of object o is bright where bit k of o is set. 0 is the background.
COLOURS = np.array([[255 * (o >> k & 1) for k in range(3)] for o in range(8)], np.uint8)


def star(rng, cell):
    """A polygon without needles in the middle of a cell x1 y1 x2 y2."""
    x1, y1, x2, y2 = cell
    count = rng.integers(8, 13)
    angles = (np.arange(count) + rng.uniform(0, 0.5, count)) * (2 * np.pi / count)
    radii = rng.uniform(0.38, 0.48, count)
    return np.stack([(x1 + x2) / 2 + radii * np.cos(angles) * (x2 - x1),
                     (y1 + y2) / 2 + radii * np.sin(angles) * (y2 - y1)], 1)  # fmt: skip


def coloured_image(rng, colours, height, width):
    """An image of one object of each colour (a star, or a frame with a hole), and their annotations."""
    image = np.zeros((height, width, 3), np.uint8)
    annotations = []
    for n, colour in enumerate(colours):
        cell = (width * n / len(colours), 0, width * (n + 1) / len(colours), height)
        ring = star(rng, cell)
        mask = polygons.rasterize(polygons.rings_to_edges([ring]), [0, 0, width, height], (height, width))
        segmentation = [ring.ravel().tolist()]
        if rng.random() < 0.3:  # as RLE with a hole
            middle = (x + (y - x) * np.array([0.45, 0.55]) for x, y in ((0, height), cell[::2]))
            (top, bottom), (left, right) = (m.astype(int) for m in middle)
            mask[top:bottom, left:right] = False
            values = np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])
            runs = np.diff(np.concatenate([[0], np.flatnonzero(np.diff(values.astype(int)))]))
            segmentation = {"size": [height, width], "counts": runs.tolist()}
        image[mask] = COLOURS[colour]
        ys, xs = np.nonzero(mask)
        box = [*ring.min(0), *(ring.max(0) - ring.min(0))]
        if isinstance(segmentation, dict):
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        annotations.append(
            {"category_id": int(colour), "bbox": [float(v) for v in box], "segmentation": segmentation, "id": 1}
        )
    return image, annotations


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Settings of 12 such images; the first six show colours 1 to 3, the others 4 to 7."""
    folder = tmp_path_factory.mktemp("coloured")
    rng = np.random.default_rng(5)
    images, annotations = {}, []
    for n in range(12):
        palette = [1, 2, 3] if n < 6 else [4, 5, 6, 7]
        image, found = coloured_image(
            rng, palette[: rng.integers(1, 5)], int(rng.integers(110, 200)), int(rng.integers(110, 260))
        )
        images[f"{n}.png"] = image
        annotations += [{**a, "image_id": n + 1} for a in found]
    categories = [{"id": c, "name": f"colour {c}"} for c in range(1, 8)]
    return folder, write_set(folder, images, annotations, categories)


def check_objects_are_their_colours(batch):
    """Every object's outline covers the pixels of its colour; returns {colour: pixels}, labels, and how far each
    object's box is from that of its outline.

    Images are stretched, so an outline may lie a little beside the border of its pixels.
    """
    beside = []
    height, width = batch["image_shape"][0]
    colour_of_pixel = (batch["image"][0, :height, :width] > 127) @ [1, 2, 4]
    labels = batch["gt_labels"][0]
    assert len(set(labels[labels > 0])) == (labels > 0).sum()
    for label, edges, box in zip(labels, batch["gt_edges"][0], batch["gt_boxes"][0]):
        if label == 0:
            continue
        pixels = colour_of_pixel == label
        # Vertical edges are left out, and the reference works by rows: exchange x and y.
        mask = polygons.rasterize(edges[:, [1, 0, 3, 2]], [0, 0, height, width], (width, height)).T
        assert (box[:2] >= 0).all() and (box[2:] <= [width, height]).all() and (box[2:] > box[:2]).all()
        union = (mask | pixels).sum()
        border = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3)))
        assert (mask ^ pixels).sum() <= 0.05 * union + 0.2 * border.sum()  # the border is two pixels wide
        assert union < 4000 or (mask & pixels).sum() >= 0.93 * union
        fine = polygons.rasterize(edges[:, [1, 0, 3, 2]], [0, 0, height, width], (width * 4, height * 4)).T
        ys, xs = np.nonzero(fine)
        beside.append(np.abs(box - np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 4).max())
    present = {int(c): int((colour_of_pixel == c).sum()) for c in np.unique(colour_of_pixel) if c}
    return present, set(labels[labels > 0].tolist()), beside


VIEWS = {
    "flip": [],
    "crop": ["PREPROC.RANDOM_CROP=[0.4,1.0]"],
    "jitter": ["PREPROC.SCALE_JITTER=[0.5,2.0]"],
    "crop and jitter": ["PREPROC.RANDOM_CROP=[0.5,1.0]", "PREPROC.SCALE_JITTER=[0.4,2.0]"],
    "paste": ["PREPROC.COPY_PASTE=1.0"],
    "crop and paste": ["PREPROC.COPY_PASTE=1.0", "PREPROC.RANDOM_CROP=[0.5,1.0]"],
    "jitter and paste": ["PREPROC.COPY_PASTE=1.0", "PREPROC.SCALE_JITTER=[0.4,2.0]"],
}


@pytest.mark.parametrize("name", VIEWS)
def test_outlines_and_boxes_are_those_of_the_objects_pixels(coloured, name):
    folder, args = coloured
    cfg = settings(
        folder, *args, "MODE_FPN=True", "PREPROC.SHORT_EDGE_SIZE=[90,160]", "PREPROC.MAX_SIZE=300",
        "TRAIN.EVAL_PERIOD=0", "PREPROC.CROP_SIZE=[200,260]", *VIEWS[name],
    )  # fmt: skip
    split = load_training_split(cfg)
    pasted, beside = [], []

    @hypothesis_settings(max_examples=40, derandomize=True)
    @given(st.integers(0, 5), st.integers(0, 10**6))
    @example(3, 7)
    def check(image, seed):
        batch = data.make_batch(split, [image], [[seed]], cfg, partners=range(6, 12))
        present, labels, distances = check_objects_are_their_colours(dict(zip(data.training_keys(cfg), batch)))
        beside.extend(distances)
        # What has no annotation was left out because little of it is seen.
        full = np.bincount((data.read_split_image(split, image) > 127).reshape(-1, 3) @ [1, 2, 4], minlength=8)
        height, width = batch[1][0]
        for colour in present.keys() - labels:
            assert colour < 4 and full[colour] > 0
            assert present[colour] < 0.35 * height * width
        pasted.append(bool(labels & {4, 5, 6, 7}))

    check()
    # Where an object is partly hidden its outline is smoothed: needles that are left of it end before their box does.
    assert max(beside) < 1.2 if "paste" not in name else np.mean(np.array(beside) < 1.5) > 0.9 and max(beside) < 15
    assert np.mean(pasted) == 0 if "paste" not in name else np.mean(pasted) > 0.9


def test_what_a_view_leaves_out_is_too_little_of_an_object(coloured):
    """Of every object more than MIN_VISIBLE of whose box is shown there is an annotation, and of no other."""
    folder, args = coloured
    cfg = settings(folder, *args, "PREPROC.MIN_VISIBLE=0.3")
    split = load_training_split(cfg)
    rng = np.random.default_rng(0)
    left_out = 0
    for _ in range(200):
        i = int(rng.integers(12))
        height, width = split.image_size(i)
        x, y = int(rng.integers(0, width - 40)), int(rng.integers(0, height - 40))
        view = View(x, y, int(rng.integers(20, width - x)), int(rng.integers(20, height - y)), (100, 100), False)
        scene = place_objects(split.objects(i), (height, width), view, split.keypoint_flip, 0.3, True)
        objects = split.annotations(i)
        for label, box, rings in zip(objects["labels"], objects["boxes"], objects["rings"]):
            shown = polygons.rasterize(
                polygons.rings_to_edges(rings),
                [x, y, x + view.width, y + view.height],
                (view.height * 4, view.width * 4),
            )
            ys, xs = np.nonzero(shown)
            area = (np.ptp(xs) + 1) * (np.ptp(ys) + 1) / 16 if len(xs) else 0
            share = area / ((box[2] - box[0]) * (box[3] - box[1]))
            if abs(share - 0.3) > 0.02:
                assert (label in scene.labels) == (share > 0.3)
                left_out += 0 < share < 0.3
    assert left_out > 10


# ---------------------------------------------------------------- repetition
ALL = [
    "MODE_FPN=True", "PREPROC.SCALE_JITTER=[0.3,1.5]", "PREPROC.CROP_SIZE=[128,160]", "PREPROC.RANDOM_CROP=[0.7,1.0]",
    "PREPROC.COPY_PASTE=0.5", "PREPROC.PHOTOMETRIC=1.0", "TRAIN.BATCH_SIZE_PER_GPU=2", "DATA.PREFETCH=2",
]  # fmt: skip


def test_augmented_batches_do_not_depend_on_workers_nor_on_where_they_start(coloured):
    folder, args = coloured
    cfg = settings(folder, *args, *ALL, "DATA.NUM_WORKERS=0")
    split = load_training_split(cfg)
    expected = list(islice(training_dataflow(split, cfg), 10))
    other_seed = settings(folder, *args, *ALL, "DATA.NUM_WORKERS=0", "TRAIN.SEED=1")
    assert not same(expected[0], next(iter(training_dataflow(split, other_seed))))
    for workers in (1, 2):
        flow = iter(training_dataflow(split, settings(folder, *args, *ALL, f"DATA.NUM_WORKERS={workers}"), 3))
        assert all(same(a, b) for a, b in zip(islice(flow, 7), expected[3:]))
        flow.close()


def test_augmented_images_do_not_depend_on_the_process_that_makes_them(coloured):
    folder, args = coloured
    cfg = settings(folder, *args, *ALL, "DATA.NUM_WORKERS=0")
    split = load_training_split(cfg)
    whole = islice(training_dataflow(split, cfg, batches_per_step=2), 4)
    parts = [islice(training_dataflow(split, cfg, 0, (rank, 2), 1), 2) for rank in range(2)]

    def rows(batches):
        found = set()
        for batch in batches:
            for image, (height, width), seed in zip(*batch[:3]):
                found.add((image[:height, :width].tobytes(), int(seed)))
        return found

    assert rows(whole) == rows(b for p in parts for b in p)


def test_augmentations_that_change_nothing_give_the_batches_of_none(coloured):
    folder, args = coloured
    plain = settings(folder, *args, "MODE_FPN=True", "PREPROC.SHORT_EDGE_SIZE=[100,140]")
    split = load_training_split(plain)
    idle = settings(
        folder, *args, "MODE_FPN=True", "PREPROC.SHORT_EDGE_SIZE=[100,140]",
        "PREPROC.RANDOM_CROP=[1,1]", "PREPROC.COPY_PASTE=1e-9",
    )  # fmt: skip
    seeds = [[3, n] for n in range(12)]
    assert same(
        data.make_batch(split, range(12), seeds, plain), data.make_batch(split, range(12), seeds, idle, partners=[0])
    )


def test_a_batch_names_the_images_pasted_into_it(coloured, monkeypatch):
    folder, args = coloured
    cfg = settings(folder, *args, *ALL, "PREPROC.COPY_PASTE=1.0", "DATA.NUM_WORKERS=0")
    split = load_training_split(cfg)
    read, original = [], data.read_split_image
    monkeypatch.setattr(data, "read_split_image", lambda s, i: read.append(s.image_id(i)) or original(s, i))
    next(iter(training_dataflow(split, cfg, 5)))
    (images,) = data.batch_images(split, cfg, 5, 1)
    named = [i for image in images for i in (image, image["pasted"])]
    assert sorted(read) == sorted(i["id"] for i in named) and len(read) == 4
    assert {split.image_id(i): split.image_file(i) for i in range(len(split))}.items() >= {
        (i["id"], i["file"]) for i in named
    }


# ---------------------------------------------------------------- draws
def views(count, shape, *args, boxes=(), limit=None):
    boxes = np.reshape(boxes, (-1, 4))
    cfg = finalize_config(default_config().update_args(args))
    return [draw_view(shape, boxes, 100, False, np.random.default_rng([1, n]), cfg, limit) for n in range(count)]


def assert_uniform(values, low, high):
    """The empirical distribution is within the 0.1 % quantile of Kolmogorov's statistic of the uniform one."""
    values = np.sort((np.asarray(values) - low) / (high - low))
    expected = (np.arange(len(values)) + 0.5) / len(values)
    assert np.abs(values - expected).max() < 1.95 / np.sqrt(len(values))


@pytest.mark.quick
def test_scales_of_the_jitter_are_uniform_and_never_exceed_the_crop():
    drawn = views(2000, (600, 800), "PREPROC.SCALE_JITTER=[0.1,2.0]", "PREPROC.CROP_SIZE=[1024,1024]")
    scales = []
    for v in drawn:
        assert v.size[0] <= 1024 and v.size[1] <= 1024 and v.y + v.height <= 600 and v.x + v.width <= 800
        scale = v.size[0] / v.height / (1024 / 800)
        assert v.size[1] / v.width / (1024 / 800) == pytest.approx(scale, rel=0.01)  # the shape is kept
        if scale * 768 > 1025:
            assert v.size == (1024, 1024)
        elif scale > 1.01:
            assert v.size[1] == 1024 and v.height == 600
        elif scale < 0.99:
            assert (v.x, v.y, v.width, v.height) == (0, 0, 800, 600)
        scales.append(scale)
    assert_uniform(scales, 0.1, 2.0)
    assert_uniform([v.x / (800 - v.width) for v in drawn if v.width < 600], 0, 1)


@pytest.mark.quick
def test_sides_and_places_of_crops_are_uniform_and_independent():
    drawn = views(2000, (400, 600), "PREPROC.RANDOM_CROP=[0.4,0.9]")
    assert_uniform([v.height / 400 for v in drawn], 0.4, 0.9)
    assert_uniform([v.width / 600 for v in drawn], 0.4, 0.9)
    assert_uniform([v.x / (600 - v.width) for v in drawn], 0, 1)
    assert abs(np.corrcoef([v.height for v in drawn], [v.width for v in drawn])[0, 1]) < 0.1
    assert all(v.size == resized_shape(v.height, v.width, 100, 1333) for v in drawn)


@pytest.mark.quick
def test_a_crop_looks_for_an_object_and_gives_up_at_last():
    corner = np.array([[0, 0, 20, 20.0]])
    args = ["PREPROC.RANDOM_CROP=[0.5,0.5]"]
    shows = [v.x < 18 and v.y < 18 for v in views(300, (100, 100), *args, boxes=corner)]
    assert np.mean([v.x < 18 and v.y < 18 for v in views(300, (100, 100), *args)]) < 0.25  # without looking for it
    assert 0.6 < np.mean(shows) < 1


def test_an_image_whose_objects_are_all_cropped_away_is_a_batch_without_objects(tmp_path):
    args = write_set(tmp_path, {"a.png": np.full((200, 300, 3), 9, np.uint8)}, [box_annotation(0, 0, 4, 4)])
    cfg = settings(tmp_path, *args, "MODE_FPN=True", "PREPROC.RANDOM_CROP=[0.1,0.1]")
    split = load_training_split(cfg)
    empty = [b for b in (one_batch(split, cfg, seeds=[[s]]) for s in range(10)) if not b["gt_labels"].any()]
    assert empty and all(b["gt_boxes"].shape == (1, 1, 4) and b["gt_edges"].shape[1:] == (1, 1, 4) for b in empty)


# ---------------------------------------------------------------- crops by hand
def test_a_cut_box_bounds_what_is_left_of_the_outline_and_of_a_box_without_outline_its_part(tmp_path):
    ell = [[10, 10, 30, 10, 30, 70, 90, 70, 90, 90, 10, 90]]  # an upright bar and a foot to its right
    annotations = [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 80, 80], "segmentation": ell, "id": 1},
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 80, 80], "id": 2},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 22, 22], "id": 3},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 20.5], "id": 4, "iscrowd": 1},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 100, 10], "id": 5, "iscrowd": 1},
    ]
    args = write_set(tmp_path, {"a.png": np.zeros((100, 100, 3), np.uint8)}, annotations)
    split = load_split(settings(tmp_path, *args, "MODE_MASK=False"), "set")
    # The crop 20..80 x 20..60 sees the bar alone; 4 of the 484 square pixels of the third object; a strip of a crowd.
    for flip in (False, True):
        view = View(20, 20, 60, 40, (80, 120), flip)
        scene = place_objects(split.objects(0), (100, 100), view, split.keypoint_flip, 0.05, False)
        expected = np.array([[0, 0, 20, 80], [0, 0, 120, 80], [0, 0, 120, 1.0]])
        if flip:
            expected = np.stack([120 - expected[:, 2], expected[:, 1], 120 - expected[:, 0], expected[:, 3]], 1)
        np.testing.assert_allclose(scene.boxes, expected, atol=1e-3)
        assert scene.is_crowd.tolist() == [False, False, True]


def test_keypoints_outside_of_a_crop_are_not_labelled(tmp_path):
    args = write_set(
        tmp_path, {"a.png": np.zeros((100, 100, 3), np.uint8)},
        [box_annotation(10, 10, 80, 80, keypoints=[20, 20, 2, 60, 50, 1, 0, 0, 0])],
        [{"id": 1, "name": "person", "keypoints": ["left_eye", "right_eye", "nose"]}],
    )  # fmt: skip
    cfg = settings(tmp_path, *args, "MODE_FPN=True", "MODE_KEYPOINT=True", "KRCNN.NUM_KEYPOINT=3")
    split = load_training_split(cfg)
    for flip, points in ((False, [[0, 0, 0], [41, 21, 1], [0, 0, 0]]), (True, [[79, 21, 1], [0, 0, 0], [0, 0, 0]])):
        view = View(40, 40, 60, 60, (120, 120), flip)
        scene = place_objects(split.objects(0), (100, 100), view, split.keypoint_flip, 0.0, True)
        np.testing.assert_array_equal(scene.keypoints[0], points)


# ---------------------------------------------------------------- pasting by hand
def scene_of(boxes, outlined=True, keypoints=None):
    boxes = np.array(boxes, np.float64)
    corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    edges = np.concatenate([polygons.rings_to_edges([c]) for c in corners]).astype(np.float32)
    owners = np.repeat(np.arange(len(boxes)), 4)
    if not outlined:
        edges, owners = edges[:0], owners[:0]
    labels = np.arange(1, len(boxes) + 1).astype(np.int32)
    return Scene(boxes, labels, np.zeros(len(boxes), bool), edges, owners, keypoints)


def paste(scene, size, other, other_size, min_visible=0.1):
    return paste_objects(scene, size, other, other_size, np.random.default_rng(0), min_visible)


@pytest.mark.quick
@pytest.mark.parametrize("outlined", [True, False])
def test_what_a_pasted_object_hides_is_cut_off_or_removed(outlined):
    below = scene_of([[0, 0, 20, 20], [30, 0, 50.5, 40], [60, 0, 70, 40], [80, 80, 90, 90]], outlined)
    above = scene_of([[0, 0, 66, 25]])
    above.labels[:] = 9
    scene, canvas, corner, layers = paste(below, (100, 100), above, (100, 100))
    assert (canvas, corner, len(layers)) == ((100, 100), (0, 0), 1)
    assert (layers[0].y, layers[0].x, layers[0].mask.shape) == (0, 0, (25, 66)) and layers[0].mask.all()
    assert scene.labels.tolist() == [2, 3, 4, 9]
    # Of the third 4 of 10 columns are left beside, and all below: its box stays.
    np.testing.assert_allclose(scene.boxes, [[30, 25, 50.5, 40], [60, 0, 70, 40], [80, 80, 90, 90], [0, 0, 66, 25]])
    if outlined:
        edges = scene.edges[scene.owners == 1]
        mask = polygons.rasterize(edges, [0, 0, 100, 100], 100)
        expected = np.zeros((100, 100), bool)
        expected[:40, 60:70] = True
        expected[:25, :66] = False
        np.testing.assert_array_equal(mask, expected)
        assert (scene.edges[scene.owners == 2] == below.edges[below.owners == 3]).all()  # untouched: exactly as it was


@pytest.mark.quick
def test_a_thin_part_that_is_left_stays_in_the_outline_as_in_the_box():
    """A triangle covers all of a square but its lower left half and a strip one pixel wide along the diagonal's end."""
    below = scene_of([[0, 0, 60, 60]])
    ring = np.array([[0, 0], [60, 0], [60, 58.6], [30, 28.6], [30, 30]], np.float32)
    above = scene_of([[0, 0, 60, 59]])._replace(edges=polygons.rings_to_edges([ring]), owners=np.zeros(5, np.int64))
    scene = paste(below, (60, 60), above, (60, 60))[0]
    outline = scene.edges[scene.owners == 0]
    covered = polygons.rasterize(above.edges, [0, 0, 60, 60], 60)
    mask = polygons.rasterize(outline, [0, 0, 60, 60], 60)
    assert (mask ^ ~covered).sum() < 0.03 * (~covered).sum()
    np.testing.assert_allclose(scene.boxes[0], [0, 0, 60, 60], atol=1.01)


@pytest.mark.quick
def test_an_object_of_which_too_little_is_left_is_removed():
    below = scene_of([[0, 0, 20, 20], [0, 50, 20, 70]])
    above = scene_of([[0, 0, 17, 100]])
    assert paste(below, (100, 100), above, (100, 100), 0.14)[0].labels.tolist() == [1, 2, 1]
    assert paste(below, (100, 100), above, (100, 100), 0.16)[0].labels.tolist() == [1]


@pytest.mark.quick
def test_crowds_stay_and_hidden_keypoints_are_occluded():
    points = np.array([[[5, 5, 2], [50, 50, 2], [0, 0, 0]], [[30, 30, 1], [10, 90, 1], [99.9, 99.9, 2]]], np.float32)
    below = scene_of([[0, 0, 60, 60], [0, 0, 100, 100]], keypoints=points)._replace(is_crowd=np.array([False, True]))
    below = below._replace(edges=below.edges[:4], owners=below.owners[:4])
    above = scene_of([[0, 0, 40, 40]], keypoints=np.array([[[1, 2, 2], [3, 4, 1], [0, 0, 0]]], np.float32))
    scene = paste(below, (100, 100), above, (100, 100))[0]
    np.testing.assert_array_equal(scene.boxes[1], [0, 0, 100, 100])
    expected = [[[5, 5, 1], [50, 50, 2], [0, 0, 0]], [[30, 30, 1], [10, 90, 1], [99.9, 99.9, 2]]]
    np.testing.assert_array_equal(scene.keypoints, np.array([*expected, above.keypoints[0]], np.float32))


@pytest.mark.quick
def test_the_canvas_grows_to_hold_what_is_pasted_and_small_images_lie_anywhere_inside():
    below, above = scene_of([[0, 0, 20, 20]]), scene_of([[60, 10, 80, 30]])
    scene, canvas, corner, _ = paste(below, (40, 50), above, (100, 100))
    assert (canvas, corner) == ((40, 80), (0, 0))
    corners = {paste_objects(below, (100, 100), above, (98, 90), np.random.default_rng(s), 0.1)[2] for s in range(200)}
    assert corners == {(y, x) for y in range(3) for x in range(11)}


@pytest.mark.quick
def test_any_number_of_objects_is_pasted():
    above = scene_of([[20 * n, 0, 20 * n + 10, 10] for n in range(4)])
    below, generators = scene_of([[0, 50, 9, 59]]), map(np.random.default_rng, range(400))
    scenes = [paste_objects(below, (90, 90), above, (90, 90), rng, 0)[0] for rng in generators]
    subsets = [tuple(scene.labels[1:].tolist()) for scene in scenes]
    assert {len(s) for s in subsets} == {1, 2, 3, 4}
    assert len(set(subsets)) == 15
    assert np.bincount([len(s) for s in subsets])[1:].min() > 70


@pytest.mark.quick
def test_an_object_of_several_classes_is_pasted_with_all_of_them():
    above = scene_of([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10]])
    below, generators = scene_of([[0, 50, 9, 59]]), map(np.random.default_rng, range(50))
    scenes = [paste_objects(below, (90, 90), above, (90, 90), rng, 0)[0] for rng in generators]
    assert {tuple(s.labels[1:].tolist()) for s in scenes} == {(1, 3), (2,), (1, 2, 3)}


def test_pasting_needs_a_set_with_outlines(tmp_path):
    annotation = {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "id": 1}
    args = write_set(tmp_path, {"a.png": np.zeros((40, 60, 3), np.uint8)}, [annotation])
    cfg = settings(tmp_path, *args, "MODE_MASK=False", "PREPROC.COPY_PASTE=0.5")
    with pytest.raises(UserError, match=r"PREPROC.COPY_PASTE=0.5: set has no object with an outline"):
        training_dataflow(load_training_split(cfg), cfg)


def test_boxes_alone_are_those_of_training_with_masks(coloured):
    folder, args = coloured
    views = ["PREPROC.COPY_PASTE=0.5", "PREPROC.SCALE_JITTER=[0.4,2.0]", "PREPROC.CROP_SIZE=[200,200]"]
    batches = []
    for mode in ("True", "False"):
        cfg = settings(folder, *args, *views, f"MODE_MASK={mode}", "DATA.NUM_WORKERS=0", "TRAIN.BATCH_SIZE_PER_GPU=4")
        batches.append(next(iter(training_dataflow(load_training_split(cfg), cfg))))
    assert same(batches[0][:6], batches[1]) and len(batches[0]) == 7


# ---------------------------------------------------------------- colours
def reference_colours(image, strength, rng):
    """SSD's distortions in floating point, with the same draws."""
    changes = rng.uniform(-strength, strength, 4) * (rng.random(4) < 0.5)
    contrast_first = rng.random() < 0.5
    brightness, contrast, saturation, hue = changes * [32, 0.5, 0.5, 18]
    x = np.clip(image.astype(np.float32) + brightness, 0, 255)
    if contrast_first:
        x = np.clip(x * (1 + contrast), 0, 255)
    hsv = cv2.cvtColor((x / 255).astype(np.float32), cv2.COLOR_BGR2HSV)
    hsv[..., 0] = (hsv[..., 0] + hue) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + saturation), 0, 1)
    x = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR) * 255
    return x if contrast_first else np.clip(x * (1 + contrast), 0, 255)


@pytest.mark.quick
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_colours_are_those_of_the_formula_to_the_rounding_of_bytes(strength):
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
    before = image.copy()
    changed = 0
    for seed in range(100):
        found = jitter_colours(image, strength, np.random.default_rng(seed))
        expected = reference_colours(image, strength, np.random.default_rng(seed))
        error = np.abs(found - expected)
        assert found.dtype == np.uint8 and error.mean() < 1.5 and error.max() < 15
        changed += bool((found != image).any())
    np.testing.assert_array_equal(image, before)
    assert 85 < changed < 100  # each of the four with probability 1/2


# ---------------------------------------------------------------- settings
@pytest.mark.quick
@pytest.mark.parametrize(
    "argument",
    [
        "PREPROC.RANDOM_CROP=[0.5,1.5]", "PREPROC.RANDOM_CROP=[0,1]", "PREPROC.RANDOM_CROP=[0.5]",
        "PREPROC.SCALE_JITTER=[2,1]", "PREPROC.CROP_SIZE=[1024]", "PREPROC.COPY_PASTE=1.5", "PREPROC.COPY_PASTE=-0.1",
        "PREPROC.MIN_VISIBLE=1.0", "PREPROC.PHOTOMETRIC=2.0",
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(argument):
    with pytest.raises(UserError, match=argument.partition("=")[0]):
        finalize_config(default_config().update_args([argument]))
