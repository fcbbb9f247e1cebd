"""Splits read from COCO-format files: layouts, ids, masks, what is left out, and what users are told."""

import json
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from format_sets import DATA, annotations_as_results
from format_sets import settings as format_settings

import dataset
import dataset_split
from common import UserError, logger
from config import default_config, finalize_config
from dataset_build import mirrored_keypoints
from utils import polygons

MINI = Path(__file__).parent / "data" / "coco_mini"
SQUARE = [[10, 10, 30, 10, 30, 30, 10, 30]]


def settings(basedir, *args):
    return finalize_config(default_config().update_args([f"DATA.BASEDIR={basedir}", *args]))


def annotation(number=1, image_id=1, category_id=1, **more):
    entry = {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": [10, 10, 20, 20],
        "segmentation": SQUARE, "area": 400, "iscrowd": 0,
    }  # fmt: skip
    return {k: v for k, v in {**entry, **more}.items() if v is not ...}


def write_set(folder, annotations, categories=None, images=None, name="set"):
    """A data set in `folder`: <name>.json and <name>/ with its images; returns the settings that register it."""
    images = images or [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}]
    categories = categories or [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for image in images:
        file = folder / name / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.zeros((image["height"], image["width"], 3), np.uint8))
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return f"DATA.DATASETS={{'{name}': ['{name}.json', '{name}']}}"


def load(folder, annotations, *args, training=False, **parts):
    registered = write_set(folder, annotations, **parts)
    return dataset.load_split(settings(folder, registered, *args), "set", training=training)


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logger, "propagate", True)
    return caplog


# ---------------------------------------------------------------- against the json, plainly read
@pytest.mark.quick
@pytest.mark.parametrize("name", ["train2017", "val2017"])
def test_bundled_coco_equals_its_json(name):
    split = dataset.load_split(settings(MINI), f"coco_{name}")
    content = json.loads((MINI / "annotations" / f"instances_{name}.json").read_text())
    assert split.class_names == [c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])]
    assert len(split) == len(content["images"]) and split.dropped == {}
    for i, image in enumerate(content["images"]):
        assert split.image_id(i) == image["id"]
        assert split.image_size(i) == (image["height"], image["width"])
        assert split.image_file(i) == str(MINI / name / image["file_name"])
        expected = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        found = split.annotations(i)
        assert [split.label_to_category_id(v) for v in found["labels"]] == [a["category_id"] for a in expected]
        assert found["is_crowd"].tolist() == [bool(a["iscrowd"]) for a in expected]
        for a, box, rings, crowd in zip(expected, found["boxes"], found["rings"], found["is_crowd"]):
            x, y, w, h = a["bbox"]
            wanted = np.clip([x, y, x + w, y + h], 0, [image["width"], image["height"]] * 2)
            np.testing.assert_allclose(box, wanted, atol=1e-3)
            if not crowd:
                assert len(rings) == len(a["segmentation"])
                for ring, given in zip(rings, a["segmentation"]):
                    assert polygons.signed_area(ring) > 0
                    assert sorted(ring.ravel().tolist()) == sorted(np.float32(given).tolist())


@pytest.mark.quick
def test_dtypes_are_those_promised():
    split = dataset.load_split(settings(MINI), "coco_train2017")
    found = split.annotations(0)
    assert found["boxes"].dtype == np.float32 and found["labels"].dtype == np.int32
    assert found["is_crowd"].dtype == bool and found["keypoints"] is None
    assert all(r.dtype == np.float32 and r.shape[1] == 2 for rings in found["rings"] for r in rings)


@pytest.mark.quick
def test_a_split_is_arrays_that_pickle_without_copies():
    split = dataset.load_split(settings(MINI), "coco_train2017")
    buffers = []
    rest = pickle.dumps(split, 5, buffer_callback=buffers.append)
    assert len(rest) < 5000  # class names and the like: nothing that grows with the annotations
    again = pickle.loads(rest, buffers=buffers)
    np.testing.assert_array_equal(again.annotations(3)["boxes"], split.annotations(3)["boxes"])
    assert again.image_file(3) == split.image_file(3)


# ---------------------------------------------------------------- categories
@pytest.mark.quick
@pytest.mark.parametrize("ids", [range(1, 14), range(0, 30), range(1, 81), [*range(3, 400, 5)], [7]])
def test_category_ids_are_mapped_by_the_json_alone(tmp_path, ids):
    """A known system takes 80 categories for COCO's, and merges the classes of others silently."""
    ids = list(ids)
    shuffled = np.random.default_rng(0).permutation(ids).tolist()
    categories = [{"id": i, "name": f"thing {i}"} for i in shuffled]
    split = load(tmp_path, [annotation(n, category_id=i) for n, i in enumerate(ids)], categories=categories)
    assert split.class_names == [f"thing {i}" for i in ids]
    labels = split.annotations(0)["labels"].tolist()
    assert labels == list(range(1, len(ids) + 1))
    assert [split.label_to_category_id(v) for v in labels] == ids


@pytest.mark.quick
def test_a_category_with_two_names_or_a_name_with_two_categories_is_an_error(tmp_path):
    with pytest.raises(UserError, match="category id 1 stands for both 'a' and 'b'"):
        load(tmp_path, [], categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])
    with pytest.raises(UserError, match="categories 1 and 2 are both named 'a'"):
        load(tmp_path, [], categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}])


@pytest.mark.quick
def test_validation_classes_follow_the_training_classes_by_name(tmp_path, log):
    registered = write_set(
        tmp_path, [annotation(1, category_id=5), annotation(2, category_id=9)],
        categories=[{"id": 9, "name": "dog"}, {"id": 5, "name": "zebra"}],
    )  # fmt: skip
    cfg = settings(tmp_path, registered, "DATA.VAL=set", "DATA.CLASS_NAMES=['cat', 'dog', 'zebra']")
    (split,) = dataset.load_validation_splits(cfg)
    assert split.class_names == ["cat", "dog", "zebra"]
    assert split.annotations(0)["labels"].tolist() == [3, 2]
    assert [split.label_to_category_id(v) for v in (1, 2, 3)] == [None, 9, 5]
    assert "set has no category cat" in log.text


@pytest.mark.quick
def test_validation_without_any_of_the_classes_is_an_error(tmp_path):
    cfg = settings(tmp_path, write_set(tmp_path, []), "DATA.VAL=set", "DATA.CLASS_NAMES=['a', 'b']")
    with pytest.raises(UserError, match="none of the model's classes: it has cat, dog, the model a, b"):
        dataset.load_validation_splits(cfg)


@pytest.mark.quick
def test_class_names_choose_and_order_the_training_classes(tmp_path):
    registered = write_set(tmp_path, [annotation(1, category_id=1), annotation(2, category_id=2)])
    args = [registered, "DATA.TRAIN=set"]
    split = dataset.load_training_split(settings(tmp_path, *args, "DATA.CLASS_NAMES=['dog']"))
    assert split.annotations(0)["labels"].tolist() == [1] and split.label_to_category_id(1) == 2
    assert split.dropped == {"category is unknown or not trained": 1}
    with pytest.raises(UserError, match="no category 'horse'"):
        dataset.load_training_split(settings(tmp_path, *args, "DATA.CLASS_NAMES=['dog', 'horse']"))


# ---------------------------------------------------------------- several sets
@pytest.mark.quick
def test_concatenated_sets_hold_the_images_of_both_and_map_labels_by_name(tmp_path):
    write_set(tmp_path, [annotation(), annotation(image_id=2, category_id=2)], name="a", images=[
        {"id": 1, "file_name": "1.png", "height": 40, "width": 60},
        {"id": 2, "file_name": "sub/2.png", "height": 50, "width": 60},
    ])  # fmt: skip
    swapped = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    write_set(tmp_path, [annotation(image_id="x", bbox=[1, 2, 3, 4])], swapped, name="b", images=[
        {"id": "x", "file_name": "x.png", "height": 30, "width": 35},
    ])  # fmt: skip
    cfg = settings(tmp_path, "DATA.DATASETS={'a': ['a.json', 'a'], 'b': ['b.json', 'b']}", "DATA.TRAIN=['a', 'b']")
    split = dataset.load_training_split(cfg)
    assert split.name == "a+b" and split.class_names == ["cat", "dog"]
    assert [split.image_id(i) for i in range(3)] == [1, 2, "x"]
    assert [split.image_file(i) for i in range(3)] == [str(tmp_path / f) for f in ("a/1.png", "a/sub/2.png", "b/x.png")]
    assert [split.annotations(i)["labels"].tolist() for i in range(3)] == [[1], [2], [2]]
    assert [len(split.annotations(i)["rings"][0][0]) for i in range(3)] == [4, 4, 4]
    np.testing.assert_allclose(split.annotations(2)["boxes"], [[1, 2, 4, 6]])


CLASSES = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": "x", "name": "cow"}, {"id": "y", "name": "ox"}]


def federated_images(**more):
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60, "neg_category_ids": []} for i in (1, 2, 3)]
    images[0] |= {"pos_category_ids": [7], "neg_category_ids": ["y"]}
    images[1] |= {"not_exhaustive_category_ids": [9], "neg_category_ids": [7, 123]}
    return images


@pytest.mark.quick
def test_verified_classes_are_those_looked_for_or_annotated_in_full(tmp_path):
    annotations = [annotation(category_id="x"), annotation(image_id=2, category_id=9), annotation(2, 2, 7)]
    split = load(tmp_path, annotations, categories=CLASSES, images=federated_images())
    assert split.is_federated() and split.class_names == ["cat", "dog", "cow", "ox"]
    expected = [[0, 1, 3, 4], [0, 1], [0]]
    assert [np.flatnonzero(split.verified_classes(i)).tolist() for i in range(3)] == expected
    # An object that cannot be trained on leaves its class open in that image.
    annotations[0] = annotation(category_id="x", segmentation=[])
    split = load(tmp_path, annotations, categories=CLASSES, images=federated_images(), training=True)
    assert np.flatnonzero(split.verified_classes(0)).tolist() == [0, 1, 4]
    plain = load(tmp_path, [annotation()])
    assert not plain.is_federated() and plain.verified_classes(0).tolist() == [True] * 3


@pytest.mark.quick
def test_verified_classes_survive_concatenation_and_the_loss_of_images(tmp_path):
    write_set(tmp_path, [annotation(category_id="x")], CLASSES, federated_images(), name="a")
    write_set(tmp_path, [annotation(category_id=7)], CLASSES, name="b")
    sets = "DATA.DATASETS={'a': ['a.json', 'a'], 'b': ['b.json', 'b']}"
    more = ["DATA.KEEP_MISSING_IMAGES=True", "FRCNN.FEDERATED_LOSS=True", "MODE_MASK=False"]
    (tmp_path / "a/1.png").unlink()
    for order, expected in ((["b", "a"], [[0, 1, 2, 3, 4], [0, 1], [0]]), (["a", "b"], [[0, 1], [0], [0, 1, 2, 3, 4]])):
        split = dataset.load_training_split(settings(tmp_path, sets, f"DATA.TRAIN={order}", *more))
        assert [np.flatnonzero(split.verified_classes(i)).tolist() for i in range(3)] == expected
        with pytest.raises(ValueError, match="scored one by one"):
            split.evaluate([])
    with pytest.raises(UserError, match="FRCNN.FEDERATED_LOSS=True: b does not say which classes"):
        dataset.load_training_split(settings(tmp_path, sets, "DATA.TRAIN=b", *more))


@pytest.mark.quick
def test_sets_with_other_classes_cannot_be_trained_together(tmp_path):
    write_set(tmp_path, [annotation()], name="a")
    sets = "DATA.DATASETS={'a': ['a.json', 'a'], 'b': ['b.json', 'b']}"
    cfg = settings(tmp_path, sets, "DATA.TRAIN=['a', 'b']")
    write_set(tmp_path, [annotation()], [{"id": 1, "name": "cat"}], name="b")
    with pytest.raises(UserError, match="b has no category 'dog', which a has"):
        dataset.load_training_split(cfg)
    more = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cow"}]
    write_set(tmp_path, [annotation(category_id=3)], more, name="b")
    with pytest.raises(UserError, match="b has 1 annotations of categories that a does not have"):
        dataset.load_training_split(cfg)


@pytest.mark.quick
def test_every_validation_set_is_loaded(tmp_path):
    names = ["coco_train2017", "coco_val2017"]
    splits = dataset.load_validation_splits(settings(MINI, f"DATA.VAL={names}"))
    assert [s.name for s in splits] == names and [len(s) for s in splits] == [6, 2]


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, folder", [("train2014", "train2014"), ("minival2014", "val2014"), ("valminusminival2014", "val2014")]
)
def test_2014_layout_finds_its_folders(tmp_path, name, folder):
    image = {"id": 7, "file_name": f"COCO_{folder}_000000000007.jpg", "height": 40, "width": 60}
    (tmp_path / "annotations").mkdir()
    content = {"images": [image], "annotations": [annotation(image_id=7)], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    (tmp_path / folder).mkdir()
    cv2.imwrite(str(tmp_path / folder / image["file_name"]), np.zeros((40, 60, 3), np.uint8))
    split = dataset.load_split(settings(tmp_path), f"coco_{name}")
    assert Path(split.image_file(0)).is_file() and split.annotations(0)["labels"].tolist() == [1]


@pytest.mark.quick
@pytest.mark.parametrize("names", [["train", "val"], ["coco_train2017", "coco_val2017"]])
def test_plain_layout_is_found_by_its_names_and_in_the_place_of_coco(tmp_path, names):
    for part in ("train", "val"):
        write_set(tmp_path, [annotation()], name=part)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"{part}.json").rename(tmp_path / "annotations" / f"{part}.json")
    cfg = settings(tmp_path, f"DATA.TRAIN={names[0]}", f"DATA.VAL={names[1]}")
    assert dataset.load_training_split(cfg).image_file(0) == str(tmp_path / "train/1.png")
    assert dataset.load_validation_splits(cfg)[0].image_file(0) == str(tmp_path / "val/1.png")
    # COCO's own files come first.
    (tmp_path / "train2017").mkdir()
    shutil.copy(tmp_path / "val/1.png", tmp_path / "train2017")
    shutil.copy(tmp_path / "annotations/train.json", tmp_path / "annotations/instances_train2017.json")
    folder = "train2017" if names[0] == "coco_train2017" else "train"
    assert dataset.load_training_split(cfg).image_file(0) == str(tmp_path / folder / "1.png")


@pytest.mark.quick
def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(MINI.parent))
    assert len(dataset.load_split(settings("~/coco_mini"), "coco_val2017")) == 2


@pytest.mark.quick
def test_own_set_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    registered = write_set(tmp_path, [annotation()])
    monkeypatch.chdir(tmp_path)
    assert len(dataset.load_split(settings("elsewhere", registered), "set")) == 1


# ---------------------------------------------------------------- odd but usable annotations
@pytest.mark.quick
def test_area_crowd_flag_and_box_may_be_missing_and_area_may_be_zero(tmp_path):
    split = load(tmp_path, [annotation(area=..., iscrowd=...), annotation(area=0), annotation(bbox=...)])
    found = split.annotations(0)
    np.testing.assert_allclose(found["boxes"], [[10, 10, 30, 30]] * 3)
    assert not found["is_crowd"].any() and split.dropped == {}


@pytest.mark.quick
def test_annotation_ids_do_not_matter(tmp_path):
    same = load(tmp_path, [annotation(0), annotation(5), annotation(5), annotation(...)])
    assert len(same.annotations(0)["labels"]) == 4


@pytest.mark.quick
def test_annotations_before_images_and_categories_after_give_the_same(tmp_path):
    cfg = settings(tmp_path, write_set(tmp_path, [annotation(category_id=2)]))
    content = json.loads((tmp_path / "set.json").read_text())
    order = ["annotations", "images", "info", "categories"]
    content["info"] = {"description": "…"}
    (tmp_path / "set.json").write_text(json.dumps({k: content[k] for k in order}, indent=3, ensure_ascii=False))
    assert dataset.load_split(cfg, "set").annotations(0)["labels"].tolist() == [2]


@pytest.mark.quick
def test_string_image_ids_come_back_as_strings(tmp_path):
    images = [{"id": i, "file_name": f"{n}.png", "height": 40, "width": 60} for n, i in enumerate(["ä/1", "7", 7])]
    split = load(tmp_path, [annotation(image_id="7"), annotation(image_id=7, category_id=2)], images=images)
    assert [split.image_id(i) for i in range(3)] == ["ä/1", "7", 7]
    assert [split.annotations(i)["labels"].tolist() for i in range(3)] == [[], [1], [2]]


def blob(height=40, width=60):
    mask = np.zeros((height, width), bool)
    mask[5:30, 8:50] = True
    mask[10:15, 20:30] = False  # a hole
    mask[33:36, 3:9] = True  # a second part
    return mask


@pytest.mark.quick
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("with_box", [True, False])
def test_rle_masks_become_their_exact_outlines(tmp_path, compressed, with_box):
    mask = blob()
    if compressed:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
    else:
        runs = np.diff(np.flatnonzero(np.diff(np.pad(mask.T.ravel().astype(int), 1, constant_values=-1))))
        rle = {"size": [40, 60], "counts": runs.tolist()}
    box = [3, 5, 47, 31] if with_box else ...
    split = load(tmp_path, [annotation(), annotation(segmentation=rle, bbox=box)], training=True)
    found = split.annotations(0)
    rings = found["rings"][1]
    assert sorted(polygons.signed_area(r) for r in rings) == [-50, 18, 25 * 42]
    np.testing.assert_array_equal(polygons.rasterize(polygons.rings_to_edges(rings), [0, 0, 60, 40], (40, 60)), mask)
    np.testing.assert_allclose(found["boxes"][1], [3, 5, 50, 36])
    assert [len(r) for r in found["rings"][0]] == [4]


@pytest.mark.quick
def test_orientation_of_polygons_does_not_matter(tmp_path):
    backwards = [np.array(SQUARE[0]).reshape(-1, 2)[::-1].ravel().tolist()]
    split = load(tmp_path, [annotation(segmentation=SQUARE + backwards)])
    assert [polygons.signed_area(r) for r in split.annotations(0)["rings"][0]] == [400, 400]


@pytest.mark.quick
def test_boxes_are_clipped_to_the_image_and_small_ones_stay(tmp_path):
    boxes = [[-5, -5, 20, 20], [50, 30, 30, 30], [0, 0, 60, 40], [59, 39, 1, 1], [7.5, 7.5, 0.5, 0.5]]
    split = load(tmp_path, [annotation(bbox=b) for b in boxes])
    expected = [[0, 0, 15, 15], [50, 30, 60, 40], [0, 0, 60, 40], [59, 39, 60, 40], [7.5, 7.5, 8, 8]]
    np.testing.assert_allclose(split.annotations(0)["boxes"], expected)


# ---------------------------------------------------------------- what is left out is counted
@pytest.mark.quick
def test_every_annotation_left_out_is_counted_by_its_reason(tmp_path, log):
    nan = float("nan")
    annotations = [
        annotation(),
        annotation(image_id=99),
        annotation(category_id=77),
        annotation(bbox=[10, 10, 0, 5]),
        annotation(bbox=[70, 10, 5, 5]),
        annotation(bbox=[10, 10, nan, 5]),
        annotation(bbox=[10, 10, 5]),
        annotation(bbox=..., segmentation=...),
        annotation(image_id=...),
        annotation(segmentation={"size": [1, 2]}),
        annotation(segmentation=[[1, 2, 3, 4]]),
        annotation(segmentation=[[1, 2, 3, nan, 5, 6, 7, 8], *SQUARE]),
        annotation(segmentation={"size": [9, 9], "counts": [81]}),
        "nonsense",
    ]
    split = load(tmp_path, annotations)
    assert split.dropped == {
        "image id is not in the file": 1,
        "category is unknown or not trained": 1,
        "box has no area inside the image": 2,
        "a coordinate is not a finite number": 1,
        "neither a box nor an outline": 1,
        "entry is not an object with image_id and category_id": 2,
        "box is not four numbers x, y, width, height": 1,
        "outline is neither polygons nor RLE": 1,
        "polygon part with fewer than 3 points or an odd number of coordinates": 1,
        "polygon part with a coordinate that is not a finite number": 1,
        "RLE mask that does not fit its image": 1,
    }
    assert len(split.annotations(0)["labels"]) == 4  # the whole one and those that lack (part of) an outline
    assert [len(r) for r in split.annotations(0)["rings"]] == [1, 0, 1, 0]
    for reason in split.dropped:
        assert reason in log.text


@pytest.mark.quick
def test_objects_without_an_outline_are_left_out_of_mask_training_alone(tmp_path):
    annotations = [annotation(), annotation(segmentation=...), annotation(segmentation=[])]
    assert load(tmp_path, annotations, training=True).dropped == {"no outline (MODE_MASK trains masks)": 2}
    assert load(tmp_path, annotations, "MODE_MASK=False", training=True).dropped == {}


@pytest.mark.quick
def test_boxes_without_any_outline_cannot_train_masks(tmp_path):
    registered = write_set(tmp_path, [annotation(segmentation=...)])
    with pytest.raises(UserError, match="none of its 1 objects has an outline; set MODE_MASK=False"):
        dataset.load_training_split(settings(tmp_path, registered, "DATA.TRAIN=set"))
    dataset.load_training_split(settings(tmp_path, registered, "DATA.TRAIN=set", "MODE_MASK=False"))


@pytest.mark.quick
def test_a_set_where_nothing_is_left_out_says_so_in_one_line(tmp_path, log):
    load(tmp_path, [annotation()])
    assert len(log.records) == 1 and "set: 1 images, 1 objects of 2 classes" in log.text


@pytest.mark.quick
def test_images_without_objects_and_with_crowds_alone(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2, 3)]
    split = load(tmp_path, [annotation(image_id=2, iscrowd=1), annotation(image_id=3)], images=images)
    assert [len(split.annotations(i)["labels"]) for i in range(3)] == [0, 1, 1]
    assert split.annotations(0)["boxes"].shape == (0, 4) and split.annotations(0)["rings"] == []
    assert split.nonempty_images().tolist() == [2]


@pytest.mark.quick
@pytest.mark.parametrize("block", [1, 3, 4096])
def test_counts_equal_a_plain_loop_however_they_are_blocked(block, monkeypatch):
    monkeypatch.setattr(dataset_split, "_BLOCK", block)
    rng = np.random.default_rng(block)
    per_image = rng.integers(0, 5, 20) * rng.integers(0, 2, 20)
    labels, crowd = rng.integers(1, 5, per_image.sum()).astype(np.int32), rng.random(per_image.sum()) < 0.4
    columns = {"sizes": np.ones((20, 2), np.int32), "labels": labels, "crowd": crowd,
               "first_object": np.concatenate([[0], np.cumsum(per_image)])}  # fmt: skip
    split = dataset_split.DatasetSplit("s", "", [], list("abcd"), [1, 2, 3, 4], columns, {}, 0, np.zeros(0))
    owners = np.repeat(np.arange(20), per_image)
    solid = [(i, label) for i, label, c in zip(owners, labels, crowd) if not c]
    objects, images = split.class_counts()
    assert objects.tolist() == [sum(label == k for _, label in solid) for k in range(1, 5)]
    assert images.tolist() == [len({i for i, label in solid if label == k}) for k in range(1, 5)]
    assert split.nonempty_images().tolist() == sorted({i for i, _ in solid})
    assert owners.size > len(solid) > 0


@pytest.mark.quick
def test_class_counts_leave_out_crowds_and_count_images_once(tmp_path):
    images = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    annotations = [annotation(), annotation(), annotation(image_id=2), annotation(image_id=2, iscrowd=1, category_id=2)]
    split = load(tmp_path, annotations, images=images)
    objects, shown = split.class_counts()
    assert objects.tolist() == [3, 0] and shown.tolist() == [2, 0]
    rows = [line.split()[1:6:2] for line in dataset.class_count_table(split).splitlines()[2:]]
    assert rows == [["cat", "3", "2"], ["dog", "0", "0"], ["all", "3", "2"]]


# ---------------------------------------------------------------- keypoints
def keypoint_category(names=("nose", "left_eye", "right_eye")):
    return [{"id": 1, "name": "person", "keypoints": list(names)}]


@pytest.mark.quick
def test_keypoints_are_pixel_centres_and_invisible_ones_zero(tmp_path):
    points = [10, 20, 2, 0, 0, 0, 30, 15, 1]
    annotations = [annotation(keypoints=points, num_keypoints=2), annotation()]
    keypoints = ["MODE_KEYPOINT=True", "MODE_FPN=True", "KRCNN.NUM_KEYPOINT=3"]
    split = load(tmp_path, annotations, *keypoints, categories=keypoint_category())
    found = split.annotations(0)["keypoints"]
    assert found.dtype == np.float32 and found.shape == (2, 3, 3)
    np.testing.assert_array_equal(found[0], [[10.5, 20.5, 2], [0, 0, 0], [30.5, 15.5, 1]])
    assert not found[1].any()
    assert split.keypoint_flip.tolist() == [0, 2, 1]


@pytest.mark.quick
def test_coco_person_keypoints_swap_left_and_right(tmp_path):
    split = load(
        tmp_path, [annotation(keypoints=[1, 1, 2] * 17)], "MODE_KEYPOINT=True", "MODE_FPN=True",
        categories=[{"id": 1, "name": "person"}],
    )  # fmt: skip
    assert split.keypoint_flip.tolist() == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]


@pytest.mark.quick
def test_data_without_keypoints_cannot_train_them(tmp_path):
    with pytest.raises(UserError, match="its categories have no keypoints"):
        load(tmp_path, [annotation()], "MODE_KEYPOINT=True", "MODE_FPN=True")


@pytest.mark.quick
@pytest.mark.parametrize("categories", [keypoint_category(), [{"id": 1, "name": "person"}]])
def test_a_model_of_another_number_of_keypoints_than_the_data_is_refused(tmp_path, categories):
    annotations = [annotation(keypoints=[10, 20, 2] * 3)]
    with pytest.raises(UserError, match=r"3 keypoints, but KRCNN\.NUM_KEYPOINT is 17; set KRCNN\.NUM_KEYPOINT=3"):
        load(tmp_path, annotations, "MODE_KEYPOINT=True", "MODE_FPN=True", categories=categories)


# ---------------------------------------------------------------- what users are told
@pytest.mark.quick
@pytest.mark.parametrize(
    "args, message",
    [
        (["coco_trian2017"], "unknown data set 'coco_trian2017'; did you mean coco_train2017"),
        (["coco_val2014"], r"instances_val2014.json does not exist; .* has instances_val2017.json"),
        (["zzz"], "unknown data set 'zzz'; known are coco_train2017"),
    ],
)
def test_unknown_sets_are_one_line_with_the_nearest_name(args, message):
    with pytest.raises(UserError, match=message) as e:
        dataset.load_split(settings(MINI), *args)
    assert "\n" not in str(e.value)


@pytest.mark.quick
def test_missing_directories_are_named(tmp_path):
    with pytest.raises(UserError, match=r"DATA.BASEDIR=.*/nowhere is not a directory; .* annotations/ and val2017/"):
        dataset.load_split(settings(tmp_path / "nowhere"), "coco_val2017")
    registered = write_set(tmp_path, [annotation()])
    (tmp_path / "set").rename(tmp_path / "sets")
    with pytest.raises(
        UserError, match=r"DATA.DATASETS: set: image folder .*/set does not exist; did you mean .*/sets"
    ):
        dataset.load_split(settings(tmp_path, registered), "set")


@pytest.mark.quick
def test_missing_images_are_counted_before_training(tmp_path, log):
    images = [{"id": i, "file_name": f"a/{i}.png", "height": 40, "width": 60} for i in (1, 2, 3)]
    annotations = [annotation(image_id=i, segmentation=[[i, 0, 9, 0, 9, 9]]) for i in (1, 1, 2, 3, 3)]
    registered = write_set(tmp_path, annotations, images=images)
    (tmp_path / "set" / "a" / "2.png").unlink()
    with pytest.raises(UserError, match=r"set: 1 of 3 images are missing, e.g. .*/set/a/2.png"):
        dataset.load_split(settings(tmp_path, registered), "set")
    split = dataset.load_split(settings(tmp_path, registered, "DATA.KEEP_MISSING_IMAGES=True"), "set")
    assert "1 of 3 images are missing" in log.text
    assert [split.image_id(i) for i in range(len(split))] == [1, 3]
    assert [split.image_file(i)[-7:] for i in range(len(split))] == ["a/1.png", "a/3.png"]
    assert [len(split.annotations(i)["labels"]) for i in range(2)] == [2, 2]
    assert split.annotations(1)["rings"][1][0][:, 0].min() == 3


@pytest.mark.quick
@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("[1, 2]", "not in COCO's format: it must be one json object"),
        ('{"images": [', "is not valid JSON: Expecting value: line 1 column 13"),
        ('{"images": [{}', "needs an id, file_name, height and width"),
        ('{"images": [] "categories": []}', "not valid JSON: Expecting ',' or '}': line 1 column 15"),
        ('{"images": []}', "not in COCO's format: it has no 'categories'"),
        ('{"categories": [{"id": 1}]}', "not in COCO's format: it has no 'images'"),
        ('{"images": {}, "categories": [{"id": 1}]}', "'images' must be a list"),
        ('{"images": [], "categories": []}', "has no categories"),
        ('{"images": [], "categories": [3]}', "'categories' must be a list of objects with id and name"),
        (
            '{"images": [{"id": 1, "file_name": "1.png", "height": 0, "width": 5}]}',
            "image 1: height and width must be whole numbers of pixels, not 0",
        ),
        (b"\xc3{}", "is not UTF-8 text"),
    ],
)
def test_broken_annotation_files_are_one_line_naming_the_file(tmp_path, content, message):
    registered = write_set(tmp_path, [annotation()])
    (tmp_path / "set.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as e:
        dataset.load_split(settings(tmp_path, registered), "set")
    assert message in str(e.value) and str(tmp_path / "set.json") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.quick
def test_annotations_whose_image_ids_have_another_type_are_an_error(tmp_path):
    with pytest.raises(UserError, match="none of its 2 annotations has the image id of one of its 1 images"):
        load(tmp_path, [annotation(image_id="1"), annotation(image_id="1")])


@pytest.mark.quick
def test_an_image_id_with_two_files_is_an_error_and_a_repeated_entry_is_not(tmp_path, log):
    one = {"id": 1, "file_name": "1.png", "height": 40, "width": 60}
    with pytest.raises(UserError, match="image id 1 stands for both 1.png and 2.png"):
        load(tmp_path, [annotation()], images=[one, {**one, "file_name": "2.png"}])
    split = load(tmp_path, [annotation(image_id=2)], images=[one, one, {**one, "id": 2, "file_name": "2.png"}])
    assert len(split) == 2 and len(split.annotations(1)["labels"]) == 1
    assert "1 images are listed more than once" in log.text


@pytest.mark.quick
def test_nothing_to_train_on_is_an_error(tmp_path):
    registered = write_set(tmp_path, [annotation(iscrowd=1)])
    with pytest.raises(UserError, match="set: no image with an object to train on"):
        dataset.load_training_split(settings(tmp_path, registered, "DATA.TRAIN=set"))
    with pytest.raises(UserError, match="DATA.TRAIN names no data set"):
        dataset.load_training_split(settings(tmp_path, registered, "DATA.TRAIN=[]"))


# ---------------------------------------------------------------- scores
def perfect_results(split):
    """Each annotation of the split as a result, its category found through the label."""
    results = []
    for i in range(len(split)):
        found = split.annotations(i)
        for box, label in zip(found["boxes"].astype(float), found["labels"]):
            entry = {"image_id": split.image_id(i), "category_id": split.label_to_category_id(label), "score": 0.9}
            results.append({**entry, "bbox": [*box[:2], *(box[2:] - box[:2])]})
    return results


@pytest.mark.parametrize("ids", [range(1, 14), range(0, 30), range(1, 81)])
def test_every_class_of_perfect_results_scores_one_under_its_own_name(tmp_path, ids):
    categories = [{"id": i, "name": f"thing {i}"} for i in ids]
    annotations = [annotation(0, category_id=i, bbox=[i % 9, i % 7, 30, 20]) for i in ids]
    split = load(tmp_path, annotations, categories=categories)
    metrics = split.evaluate(perfect_results(split), verbose=False)
    assert metrics["bbox/AP"] == pytest.approx(1)
    per_class = {k: v for k, v in metrics.items() if k.startswith("bbox/AP_per_class/")}
    assert per_class == {f"bbox/AP_per_class/thing {i}": pytest.approx(1) for i in ids}


def test_detections_of_classes_without_a_category_are_counted_not_scored(tmp_path, log):
    registered = write_set(tmp_path, [annotation(category_id=2)])
    cfg = settings(tmp_path, registered, "DATA.VAL=set", "DATA.CLASS_NAMES=['cow', 'dog']")
    (split,) = dataset.load_validation_splits(cfg)
    results = perfect_results(split)
    results.append({**results[0], "category_id": split.label_to_category_id(1)})
    assert split.evaluate(results, verbose=False)["bbox/AP_per_class/dog"] == pytest.approx(1)
    assert "1 detections of classes that its annotations do not have are not scored" in log.text


@pytest.mark.quick
@pytest.mark.parametrize(
    "spec", [["voc", "voc_mini", "trainval"], ["csv", "csv_mini/boxes.csv", "csv_mini/images"]], ids=lambda s: s[0]
)
def test_splits_survive_pickling_and_can_still_be_scored(spec):
    split = dataset.load_format(spec, format_settings(DATA), "set")
    copy = pickle.loads(pickle.dumps(split))
    results = annotations_as_results(split)
    assert copy.evaluate(results, verbose=False) == pytest.approx(split.evaluate(results, verbose=False), nan_ok=True)


@pytest.mark.quick
def test_unknown_formats_and_modules_are_named():
    with pytest.raises(UserError, match="unknown format 'yolo'; known are cityscapes, csv, lvis, openimages, via, voc"):
        dataset.load_format(["yolo", "a", "b"], format_settings(DATA), "mine")
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        dataset.load_format(["no_such_module:load", "a"], format_settings(DATA), "mine")
    with pytest.raises(UserError, match="'voc_nowhere' does not exist|voc_nowhere does not exist"):
        dataset.load_format(["voc", "voc_nowhere", ""], format_settings(DATA), "mine")


@pytest.mark.quick
def test_documented_example_of_an_own_data_set_loads_and_scores(tmp_path):
    for name, lines in {
        "a": ["2 3 20 25.5 circle", "10 10 40 30 triangle"],
        "b": [],
        "c": ["0 0 50 40 square"],
    }.items():
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), np.zeros((40, 50, 3), np.uint8))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    split = dataset.load_format(["demo.own_dataset:load", str(tmp_path)], format_settings(tmp_path), "mine")
    assert split.class_names == ["circle", "square", "triangle"] and len(split) == 3
    assert split.annotations(0)["boxes"].tolist() == [[2, 3, 20, 25.5], [10, 10, 40, 30]]
    results = annotations_as_results(split)
    assert split.evaluate(results, verbose=False)["bbox/AP"] == pytest.approx(1.0)
    assert split.evaluate(results[1:], verbose=False)["bbox/AP_per_class/circle"] == 0


OWN = """
from dataset_build import split_from_coco

def load(name, folder, colour="red", **options):
    return {}["a"] if colour == "key" else 1 + "b" if colour == "type" else None

def unpicky(name, **options):
    raise TypeError("got an unexpected keyword argument 'size'")
"""


@pytest.mark.quick
@pytest.mark.parametrize("spec, message", [
    (["own_set:load", "a", "colour=type"], "raised TypeError: unsupported operand type(s) for +: 'int' and 'str'"),
    (["own_set:load", "a", "colour=key"], "raised KeyError: 'a' (own_set.py:5)"),
    (["own_set:unpicky"], "raised TypeError: got an unexpected keyword argument 'size' (own_set.py:8)"),
    (["own_set:load", "a", "colour=none"], "returns NoneType, not a DatasetSplit"),
    (["own_set:load"], "missing a required argument: 'folder'"),
    (["voc", "voc_mini", "trainval", "colour=red"], "format 'voc' has no option 'colour'"),
    (["openimages", "golden_oid", "validation", "colour=red"], "format 'openimages' has no option 'colour'"),
    (["csv", "csv_mini/boxes.csv", "csv_mini/images", "colour=red"], "format 'csv' has no option 'colour'"),
])  # fmt: skip
def test_errors_of_a_users_function_are_its_own_and_unknown_options_are_named(tmp_path, monkeypatch, spec, message):
    (tmp_path / "own_set.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as e:
        dataset.load_format(spec, format_settings(DATA), "mine")
    assert message in str(e.value) and "\n" not in str(e.value)


KEYPOINTS = {
    "left_eye": "right_eye", "LeftEye": "RightEye", "l_eye": "r_eye", "eye_L": "eye_R", "left eye": "right eye",
    "Left_eye": "Right_eye", "LEFT-EYE": "RIGHT-EYE", "lefteye": "righteye", "eyeLeft": "eyeRight", "L": "R",
    "upper_left_corner": "upper_right_corner", "eye.l": "eye.r", "LEye": "REye", "2_left": "2_right",
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("left", KEYPOINTS)
def test_left_and_right_keypoints_are_found_by_the_usual_names(left):
    names = ["nose", left, KEYPOINTS[left], "label", "tail"]
    assert mirrored_keypoints([{"keypoints": names}], 5).tolist() == [0, 2, 1, 3, 4]


@pytest.mark.quick
def test_keypoint_pairs_of_the_settings(tmp_path, log):
    names = ["nose", "a", "b", "c", "d"]
    pairs = [["a", "b"], [3, 4]]
    assert mirrored_keypoints([{"keypoints": names}], 5, pairs).tolist() == [0, 2, 1, 4, 3]
    with pytest.raises(UserError, match="KRCNN.FLIP_PAIRS: 'x' is not one of the 5 keypoints nose, a"):
        mirrored_keypoints([{"keypoints": names}], 5, [["x", "a"]])
    with pytest.raises(UserError, match="KRCNN.FLIP_PAIRS: 5 is not one of"):
        mirrored_keypoints([{"keypoints": names}], 5, [[5, 0]])
    points = [15, 15, 2, 12, 12, 2, 18, 12, 2]
    categories = [{"id": 1, "name": "cat", "keypoints": ["x", "y", "z"]}]
    args = ("MODE_FPN=True", "MODE_KEYPOINT=True", "MODE_MASK=False", "KRCNN.NUM_KEYPOINT=3")
    load(tmp_path, [annotation(keypoints=points)], *args, categories=categories, training=True)
    assert "no left and right among its 3 keypoints" in log.text and "KRCNN.FLIP_PAIRS" in log.text
    log.clear()
    split = load(
        tmp_path, [annotation(keypoints=points)], *args, "KRCNN.FLIP_PAIRS=[['y', 'z']]", categories=categories,
        training=True,
    )  # fmt: skip
    assert split.keypoint_flip.tolist() == [0, 2, 1] and "no left and right" not in log.text


@pytest.mark.quick
def test_keypoint_falloffs_are_given_or_said_to_be_guessed(tmp_path, log):
    points = [15, 15, 2, 12, 12, 2, 18, 12, 2]
    categories = [{"id": 1, "name": "cat", "keypoints": ["x", "left_y", "right_y"]}]
    args = ("MODE_FPN=True", "MODE_KEYPOINT=True", "MODE_MASK=False", "KRCNN.NUM_KEYPOINT=3")
    with pytest.raises(UserError, match="KRCNN.OKS_SIGMAS has 2 numbers, set has 3 keypoints"):
        load(tmp_path, [annotation(keypoints=points)], *args, "KRCNN.OKS_SIGMAS=[0.1, 0.1]", categories=categories)
    moved = [*points[:6], points[6] + 4, *points[7:]]
    results = [{"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [10, 10, 20, 20], "keypoints": moved}]
    scores = {}
    for sigmas in ("[]", "[0.01, 0.01, 0.01]", "[0.5, 0.5, 0.5]"):
        log.clear()
        split = load(
            tmp_path, [annotation(keypoints=points)], *args, f"KRCNN.OKS_SIGMAS={sigmas}", categories=categories
        )  # fmt: skip
        scores[sigmas] = split.evaluate(results, verbose=False)["keypoints/AP"]
        assert ("guessed falloff" in log.text) == (sigmas == "[]"), log.text
    assert scores["[0.01, 0.01, 0.01]"] < scores["[]"] < scores["[0.5, 0.5, 0.5]"]
