"""Training and inference batches: what is in them (data.py)."""

import json
import shutil
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import data
from augment import resized_shape
from common import UserError
from config import default_config, finalize_config
from data_workers import training_dataflow
from dataset import load_split, load_training_split
from utils import polygons

hypothesis_settings.register_profile("no deadline", deadline=None)  # a busy machine is not a failure
hypothesis_settings.load_profile("no deadline")
ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "tests" / "data" / "coco_mini"
SMALL = [
    "MODE_FPN=True",
    "PREPROC.SHORT_EDGE_SIZE=[96,128]",
    "PREPROC.MAX_SIZE=200",
    "PREPROC.TEST_SHORT_EDGE_SIZE=100",
]


def settings(basedir, *args):
    return finalize_config(default_config().update_args([f"DATA.BASEDIR={basedir}", "TRAIN.EVAL_PERIOD=0", *args]))


def write_set(folder, images, annotations, categories=None):
    """images: {file name: uint8 array}, ids are their positions from 1; returns the settings that train on them."""
    (folder / "set").mkdir(exist_ok=True)
    entries = []
    for n, (name, pixels) in enumerate(images.items(), 1):
        cv2.imwrite(str(folder / "set" / name), pixels)
        entries.append({"id": n, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
    categories = categories or [{"id": 1, "name": "thing"}]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    (folder / "set.json").write_text(json.dumps(content))
    return ["DATA.DATASETS={'set': ['set.json', 'set']}", "DATA.TRAIN=set"]


def box_annotation(x, y, w, h, image_id=1, **more):
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return {"image_id": image_id, "category_id": 1, "bbox": [x, y, w, h], "segmentation": corners, "id": 1, **more}


def one_batch(split, cfg, images=(0,), seeds=None):
    seeds = seeds or [[0, n] for n in range(len(images))]
    return dict(zip(data.training_keys(cfg), data.make_batch(split, images, seeds, cfg)))


def mini(*args):
    cfg = settings(MINI, *SMALL, *args)
    return load_training_split(cfg), cfg


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


# ---------------------------------------------------------------- sizes
@pytest.mark.quick
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(16, 1000), st.integers(1000, 2000))
def test_resized_shape_reaches_the_short_edge_or_the_largest_size(height, width, short_edge, max_size):
    new_height, new_width = resized_shape(height, width, short_edge, max_size)
    assert min(new_height, new_width) >= 1 and max(new_height, new_width) <= max_size
    assert min(new_height, new_width) == short_edge or max(new_height, new_width) == max_size
    if max(height, width) < 4 * min(height, width):
        assert abs(new_height / new_width / (height / width) - 1) < 0.6 / min(new_height, new_width) * 2


@pytest.mark.quick
def test_resized_shape_of_a_line_of_pixels_is_never_zero():
    assert resized_shape(1, 1000, 800, 1333) == (1, 1333)
    assert resized_shape(5000, 1, 800, 1333) == (1333, 1)
    assert resized_shape(480, 640, 800, 1333) == (800, 1067)


# ---------------------------------------------------------------- the batch's contract
@pytest.mark.parametrize("args, stride", [((), 32), (("MODE_FPN=False",), 1)])
def test_a_batch_has_the_promised_types_shapes_and_padding(args, stride):
    split, cfg = mini(*args)
    counts = [len(split.annotations(i)["labels"]) for i in range(3)]
    batch = one_batch(split, cfg, range(3))
    objects = max(counts)
    edges = batch["gt_edges"].shape[2]
    types = {
        "image": (np.uint8, (3, *batch["image"].shape[1:3], 3)),
        "image_shape": (np.int32, (3, 2)),
        "image_seed": (np.int32, (3,)),
        "gt_boxes": (np.float32, (3, objects, 4)),
        "gt_labels": (np.int32, (3, objects)),
        "gt_is_crowd": (np.bool_, (3, objects)),
        "gt_edges": (np.float32, (3, objects, edges, 4)),
    }
    assert {k: (v.dtype, v.shape) for k, v in batch.items()} == {k: (np.dtype(t), s) for k, (t, s) in types.items()}
    largest = batch["image_shape"].max(0)
    assert batch["image"].shape[1:3] == tuple(-(-largest // stride) * stride)
    for n, (height, width) in enumerate(batch["image_shape"]):
        assert batch["image"][n, :height, :width].any()
        assert not batch["image"][n, height:].any() and not batch["image"][n, :, width:].any()
        assert (batch["gt_labels"][n] > 0).sum() == counts[n]
        assert not batch["gt_boxes"][n, counts[n] :].any() and not batch["gt_edges"][n, counts[n] :].any()
        boxes = batch["gt_boxes"][n, : counts[n]]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_verified_classes_are_shipped_when_the_loss_wants_them(tmp_path):
    content = json.loads((MINI / "annotations/instances_train2017.json").read_text())
    ids = sorted(c["id"] for c in content["categories"])
    for image, absent in zip(content["images"], ids):
        image["neg_category_ids"] = [absent]
    (tmp_path / "train.json").write_text(json.dumps(content))
    cfg = settings(MINI, *SMALL, f"DATA.DATASETS={{'f':['{tmp_path}/train.json','train2017']}}", "DATA.TRAIN=f",
                   "FRCNN.FEDERATED_LOSS=True")  # fmt: skip
    split = load_training_split(cfg)
    batch = one_batch(split, cfg, [2, 0])
    assert data.training_keys(cfg)[-1] == "class_verified" and batch["class_verified"].shape == (2, 81)
    for row, i in enumerate((2, 0)):
        there = {ids[label - 1] for label in split.annotations(i)["labels"]}
        absent = ids[[im["id"] for im in content["images"]].index(split.image_id(i))]
        found = {ids[label - 1] for label in np.flatnonzero(batch["class_verified"][row]) if label}
        assert batch["class_verified"][row, 0] and found == there | {absent}


def test_edges_of_crowds_are_not_shipped():
    crowds = 0
    for name in ("coco_train2017", "coco_val2017"):
        cfg = settings(MINI, *SMALL)
        split = load_split(cfg, name)
        for i in range(len(split)):
            batch = one_batch(split, cfg, [i])
            crowd = batch["gt_is_crowd"][0]
            crowds += crowd.sum()
            assert not batch["gt_edges"][0, crowd].any()
            assert batch["gt_edges"][0, ~crowd].any(axis=(1, 2)).all()
    assert crowds == 2


def test_masks_and_keypoints_are_shipped_when_asked_for(tmp_path):
    assert data.training_keys(settings(MINI, "MODE_MASK=False"))[-1] == "gt_is_crowd"
    args = write_set(
        tmp_path, {"a.png": np.full((40, 60, 3), 9, np.uint8)},
        [box_annotation(10, 10, 20, 20, keypoints=[10, 20, 2, 30, 15, 1, 0, 0, 0])],
        [{"id": 1, "name": "person", "keypoints": ["nose", "left_eye", "right_eye"]}],
    )  # fmt: skip
    cfg = settings(tmp_path, *args, *SMALL, "MODE_KEYPOINT=True", "KRCNN.NUM_KEYPOINT=3", "MODE_MASK=False")
    batch = one_batch(load_training_split(cfg), cfg)
    assert list(batch)[-1] == "gt_keypoints" and batch["gt_keypoints"].shape == (1, 1, 3, 3)


def test_bytes_shipped_are_at_most_a_tenth_more_than_the_image():
    cfg = settings(MINI, "MODE_FPN=True")
    split = load_training_split(cfg)
    for i in range(len(split)):
        batch = one_batch(split, cfg, [i])
        assert sum(v.nbytes for v in batch.values()) <= 1.1 * batch["image"].nbytes


# ---------------------------------------------------------------- geometry follows the pixels
def drawn_set(folder, height=90, width=130):
    """A picture whose white pixels are exactly the annotated object: a polygon with a hole as RLE, and a square."""
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.array([[20, 12], [70, 20], [60, 75], [30, 60]])], 1)
    mask[30:45, 38:52] = 0
    runs = np.diff(np.flatnonzero(np.diff(np.pad(mask.T.ravel().astype(int), 1, constant_values=-1)))).tolist()
    other = np.zeros_like(mask)
    other[10:40, 90:125] = 1
    image = np.repeat((np.maximum(mask, other) * 255)[..., None], 3, axis=2)
    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": {"size": [height, width], "counts": runs}, "id": 1},
        box_annotation(90, 10, 35, 30),
    ]
    return write_set(folder, {"a.png": image}, annotations)


@pytest.mark.parametrize("short_edge", [90, 64, 200])
def test_outlines_and_boxes_lie_on_the_pixels_after_resizing_and_flipping(tmp_path, short_edge):
    args = drawn_set(tmp_path)
    cfg = settings(tmp_path, *args, f"PREPROC.SHORT_EDGE_SIZE={short_edge}", "PREPROC.MAX_SIZE=400")
    split = load_training_split(cfg)
    flips = set()
    for seed in range(8):
        batch = one_batch(split, cfg, seeds=[[seed]])
        height, width = batch["image_shape"][0]
        white = batch["image"][0, :, :, 0] > 127
        filled = np.zeros_like(white)
        for edges, box in zip(batch["gt_edges"][0], batch["gt_boxes"][0]):
            # Vertical edges are left out, and the reference works by rows: exchange x and y.
            mask = polygons.rasterize(edges[:, [1, 0, 3, 2]], [0, 0, height, width], (width, height)).T
            filled |= mask
            ys, xs = np.nonzero(mask)
            outer = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            np.testing.assert_allclose(box, outer, atol=0.51)
        assert (filled != white).sum() <= 0.01 * white.sum()
        flips.add(bool(white[:, : width // 4].sum() > white[:, -(width // 4) :].sum()))
    assert flips == {False, True}


def test_flip_is_exact_for_pixels_boxes_outlines_and_keypoints(tmp_path):
    rng = np.random.default_rng(0)
    annotations = [
        box_annotation(3.25, 5.5, 20, 30, keypoints=[5, 6, 2, 20, 8, 1, 0, 0, 0]), box_annotation(40, 1, 9, 9),
    ]  # fmt: skip
    args = write_set(
        tmp_path, {"a.png": rng.integers(0, 255, (64, 80, 3), np.uint8)}, annotations,
        [{"id": 1, "name": "person", "keypoints": ["left_eye", "right_eye", "nose"]}],
    )  # fmt: skip
    args += ["MODE_FPN=True", "MODE_KEYPOINT=True", "KRCNN.NUM_KEYPOINT=3", "PREPROC.SHORT_EDGE_SIZE=128"]
    cfg, plain_cfg = settings(tmp_path, *args), settings(tmp_path, *args, "PREPROC.FLIP=False")
    split = load_training_split(cfg)
    plain = one_batch(split, plain_cfg)
    width = plain["image_shape"][0, 1]
    flipped = next(
        b for b in (one_batch(split, cfg, seeds=[[s]]) for s in range(20))
        if not np.array_equal(b["gt_boxes"], plain["gt_boxes"])
    )  # fmt: skip
    assert width == 160
    np.testing.assert_allclose(flipped["image"][0], plain["image"][0, :, ::-1], atol=1)
    np.testing.assert_array_equal(flipped["gt_boxes"][..., [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0],
                                  plain["gt_boxes"])  # fmt: skip
    np.testing.assert_array_equal(polygons.flip_edges(flipped["gt_edges"], width), plain["gt_edges"])
    # 2x larger, pixel centres; left and right eye change places; the invisible point stays zero.
    np.testing.assert_array_equal(plain["gt_keypoints"][0, 0], [[11, 13, 2], [41, 17, 1], [0, 0, 0]])
    np.testing.assert_array_equal(flipped["gt_keypoints"][0, 0], [[119, 17, 1], [149, 13, 2], [0, 0, 0]])


@pytest.mark.quick
def test_short_edges_are_uniform_in_the_range_or_chosen_from_the_list(tmp_path):
    args = write_set(tmp_path, {"a.png": np.zeros((20, 30, 3), np.uint8)}, [box_annotation(1, 1, 9, 9)])
    for edges, expected in (("[20,24]", {20, 21, 22, 23, 24}), ("[20,30,50]", {20, 30, 50}), ("40", {40})):
        cfg = settings(tmp_path, *args, f"PREPROC.SHORT_EDGE_SIZE={edges}")
        split = load_split(cfg, "set")
        assert {one_batch(split, cfg, seeds=[[s]])["image_shape"][0, 0] for s in range(60)} == expected


# ---------------------------------------------------------------- hard images
def test_hard_images_make_finite_batches(tmp_path):
    many = [box_annotation(5 + n % 25 * 4, 5 + n // 25 * 4, 3, 3, image_id=5) for n in range(500)]
    images = {
        "empty.png": np.full((50, 70, 3), 7, np.uint8), "crowd.png": np.full((50, 70, 3), 7, np.uint8),
        "pixel.png": np.full((50, 70, 3), 7, np.uint8), "line.png": np.full((1, 1000, 3), 7, np.uint8),
        "many.png": np.full((100, 120, 3), 7, np.uint8), "border.png": np.full((50, 70, 3), 7, np.uint8),
    }  # fmt: skip
    annotations = [
        box_annotation(5, 5, 20, 20, image_id=2, iscrowd=1),
        box_annotation(69, 49, 1, 1, image_id=3),
        box_annotation(100, 0, 300, 1, image_id=4),
        *many,
        box_annotation(-10, -10, 500, 500, image_id=6),
        box_annotation(0, 0, 70, 50, image_id=6),
    ]
    cfg = settings(tmp_path, *write_set(tmp_path, images, annotations), *SMALL, "DATA.FILTER_EMPTY=False")
    split = load_training_split(cfg)
    together = one_batch(split, cfg, range(6))
    assert together["gt_labels"].shape == (6, 500)
    assert (together["gt_labels"] > 0).sum(1).tolist() == [0, 1, 1, 1, 500, 2]
    for i in range(6):
        batch = one_batch(split, cfg, [i])
        assert all(np.isfinite(v).all() for v in batch.values())
        assert batch["gt_boxes"].shape[1] >= 1 and batch["gt_edges"].shape[2] >= 1
        boxes = batch["gt_boxes"][0][batch["gt_labels"][0] > 0]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (batch["image_shape"] >= 1).all()
    assert training_dataflow(split, cfg).images_per_epoch == 6
    filtered = settings(tmp_path, *SMALL)
    assert training_dataflow(split, filtered).images_per_epoch == 4


# ---------------------------------------------------------------- files
def jpeg_with_orientation(path, pixels, orientation):
    """A JPEG whose EXIF block says how to turn it."""
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    exif = b"Exif\0\0" + tiff
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])


def test_pixels_are_those_the_annotations_saw_whatever_exif_says(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20, :30] = 255  # a white corner
    args = write_set(tmp_path, {"a.jpg": pixels}, [box_annotation(1, 1, 9, 9)])
    content = json.loads((tmp_path / "set.json").read_text())
    jpeg_with_orientation(tmp_path / "set" / "a.jpg", pixels, 6)  # to be turned by 90 degrees clockwise
    as_stored = data.read_split_image(load_split(settings(tmp_path, *args), "set"), 0)
    assert as_stored.shape == (40, 60, 3) and as_stored[5, 5].min() > 200 and as_stored[5, 55].max() < 50
    content["images"][0].update(height=60, width=40)
    (tmp_path / "set.json").write_text(json.dumps(content))
    turned = data.read_split_image(load_split(settings(tmp_path, *args), "set"), 0)
    assert turned.shape == (60, 40, 3) and turned[5, 35].min() > 200 and turned[5, 5].max() < 50
    np.testing.assert_array_equal(data.read_image(tmp_path / "set" / "a.jpg"), turned)


def test_a_size_that_disagrees_is_an_error_naming_both_sizes(tmp_path):
    args = write_set(tmp_path, {"a.png": np.zeros((40, 60, 3), np.uint8)}, [box_annotation(1, 1, 9, 9)])
    cv2.imwrite(str(tmp_path / "set" / "a.png"), np.zeros((41, 60, 3), np.uint8))
    with pytest.raises(UserError, match=r"set/a.png \(id 1\) is 60x41 pixels but the annotations say 60x40"):
        data.read_split_image(load_split(settings(tmp_path, *args), "set"), 0)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_damaged_image_is_an_error_naming_the_file_and_id(tmp_path, content):
    args = write_set(tmp_path, {"a.png": np.zeros((40, 60, 3), np.uint8)}, [box_annotation(1, 1, 9, 9)])
    file = tmp_path / "set" / "a.png"
    file.write_bytes(file.read_bytes()[:30] if content == "truncated" else content)
    with pytest.raises(UserError, match=r"image .*set/a.png \(id 1\) is not an image .* damaged"):
        data.read_split_image(load_split(settings(tmp_path, *args), "set"), 0)
    with pytest.raises(UserError, match="a.png is not an image"):
        data.read_image(file)


def test_grey_transparent_and_deep_images_become_three_bytes_a_pixel(tmp_path):
    for shape, dtype in (((20, 30), np.uint8), ((20, 30, 4), np.uint8), ((20, 30, 3), np.uint16)):
        cv2.imwrite(str(tmp_path / "a.png"), np.full(shape, np.iinfo(dtype).max, dtype))
        image = data.read_image(tmp_path / "a.png")
        assert image.dtype == np.uint8 and image.shape == (20, 30, 3) and (image == 255).all()


@pytest.mark.quick
def test_images_are_listed_from_files_and_directories(tmp_path):
    for name in ("b.JPG", "a.png", "c.bmp"):
        cv2.imwrite(str(tmp_path / name), np.zeros((2, 2, 3), np.uint8))
    (tmp_path / "notes.txt").touch()
    found = data.list_images([tmp_path / "c.bmp", tmp_path])
    assert [Path(f).name for f in found] == ["c.bmp", "a.png", "b.JPG", "c.bmp"]
    with pytest.raises(UserError, match="notes.txt is not an image"):
        data.list_images([tmp_path / "notes.txt"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="has no image"):
        data.list_images([tmp_path / "none"])
    with pytest.raises(UserError, match="image .*/c.png does not exist"):
        data.list_images([tmp_path / "c.png"])


# ---------------------------------------------------------------- inference
@pytest.mark.parametrize("batch, shards", [(1, 1), (3, 1), (4, 3)])
def test_inference_shards_hold_every_image_once_with_its_own_pixels(batch, shards):
    cfg = settings(MINI, *SMALL, f"TEST.BATCH_SIZE={batch}")
    split = load_split(cfg, "coco_train2017")
    alone = {b["indices"][0]: b for b in data.inference_batches(split, settings(MINI, *SMALL))}
    seen = []
    for rank in range(shards):
        for found in data.inference_batches(split, cfg, (rank, shards)):
            assert len(found["indices"]) <= batch and found["image"].dtype == np.uint8
            assert found["image"].shape[1] % 32 == 0 and found["image"].shape[2] % 32 == 0
            for n, i in enumerate(found["indices"]):
                seen.append(i)
                height, width = found["image_shape"][n]
                assert found["original_shapes"][n] == split.image_size(i)
                assert (height, width) == resized_shape(*split.image_size(i), 100, 200)
                np.testing.assert_array_equal(found["image"][n], alone[i]["image"][0])  # with the same padding
                assert not found["image"][n, height:].any() and not found["image"][n, :, width:].any()
    assert sorted(seen) == list(range(len(split)))


def write_sizes(folder, sizes):
    """Files of one colour each, the number of the file."""
    for n, (height, width) in enumerate(sizes):
        cv2.imwrite(str(folder / f"{n:02}.png"), np.full((height, width, 3), n, np.uint8))
    return data.list_images([folder])


@pytest.mark.quick
def test_images_of_equal_padding_share_batches_and_none_waits_long(tmp_path):
    wide, tall = (60, 80), (80, 60)
    files = write_sizes(tmp_path, [wide, tall, wide, tall, tall, wide, (60, 100), wide])
    cfg = settings(MINI, *SMALL, "TEST.BATCH_SIZE=2")
    batches = list(data.inference_batches(files, cfg))
    assert [b["indices"] for b in batches] == [[0, 2], [1, 3], [5, 7], [4], [6]]
    assert [b["image"][:, 0, 0, 0].tolist() for b in batches] == [b["indices"] for b in batches]
    # An image whose size no other has does not wait for the end.
    rare = tmp_path / "rare"
    rare.mkdir()
    files = write_sizes(rare, [(60, 100), *[wide, tall] * 10, *[(40 + n, 120) for n in range(9)]])
    found = [b["indices"] for b in data.inference_batches(files, settings(MINI, *SMALL, "TEST.BATCH_SIZE=4"))]
    assert sorted(i for batch in found for i in batch) == list(range(30)) and found.index([0]) < len(found) - 1


@pytest.mark.quick
def test_views_of_one_size_share_batches(tmp_path):
    """Test-time augmentation resizes by itself, so only images of exactly one size are padded alike."""
    files = write_sizes(tmp_path, [(60, 80), (61, 80), (60, 80)])
    cfg = settings(MINI, *SMALL, "TEST.BATCH_SIZE=2", "TEST.AUG_SHORT_EDGES=[50]")
    assert [b["indices"] for b in data.inference_batches(files, cfg)] == [[0, 2], [1]]


def test_inference_reads_files_and_names_a_damaged_one(tmp_path):
    cfg = settings(MINI, *SMALL, "TEST.BATCH_SIZE=2")
    files = data.list_images([MINI / "train2017"])
    found = [i for b in data.inference_batches(files, cfg) for i in b["indices"]]
    assert sorted(found) == list(range(6))
    shutil.copy(files[0], tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"damaged")
    shutil.copy(files[1], tmp_path / "c.jpg")
    damaged = data.list_images([tmp_path])
    with pytest.raises(UserError, match="b.jpg is not an image"):
        list(data.inference_batches(damaged, cfg))
    for batch in (1, 2):
        cfg, reasons = settings(MINI, *SMALL, f"TEST.BATCH_SIZE={batch}"), {}
        found = list(data.inference_batches(damaged, cfg, unreadable=reasons.__setitem__))
        assert [b["indices"] for b in found] == [[0], [2]] and all(len(b["image"]) == 1 for b in found)
        assert list(reasons) == [1] and "b.jpg is not an image" in str(reasons[1])
    assert list(data.inference_batches([], cfg)) == []
