"""The drawn data set of demo/make_shapes.py: valid COCO, the same every time, with every kind of annotation."""

import json
from collections import Counter

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
from pycocotools.coco import COCO

from demo import make_shapes
from demo.make_shapes import CATEGORY_IDS, draw_image, make_dataset, make_split

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shapes")
    files = make_dataset(directory, train=40, val=4)
    with open(files["train"]) as f:
        return directory, json.load(f)


def bitmap(segmentation, height, width):
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle).astype(bool)


def test_a_picture_depends_on_seed_split_and_number_alone(dataset, tmp_path):
    directory, content = dataset
    make_split(tmp_path, "train", count=3, seed=7)
    with open(tmp_path / "annotations" / "instances_train.json") as f:
        few = json.load(f)
    last = few["images"][-1]["id"]
    assert few["images"] == content["images"][:3]
    assert few["annotations"] == [a for a in content["annotations"] if a["image_id"] <= last]
    name = few["images"][-1]["file_name"]
    assert (tmp_path / "train" / name).read_bytes() == (directory / "train" / name).read_bytes()


def test_seeds_and_splits_differ():
    pictures = [draw_image(np.random.default_rng([seed, split, 0]))[0] for seed, split in [(7, 0), (8, 0), (7, 1)]]
    assert len({p.tobytes() for p in pictures}) == 3


def test_the_files_are_what_the_annotations_say(dataset):
    directory, content = dataset
    for image in content["images"]:
        picture = cv2.imread(str(directory / "train" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        low, high = make_shapes.SIDES
        assert low <= min(picture.shape[:2]) and max(picture.shape[:2]) <= high


def test_pycocotools_reads_it_and_ids_have_gaps(dataset):
    directory, _ = dataset
    coco = COCO(str(directory / "annotations" / "instances_train.json"))
    assert sorted(coco.getCatIds()) == [1, 2, 4, 7, 9]
    assert {c["name"]: c["id"] for c in coco.loadCats(coco.getCatIds())} == CATEGORY_IDS
    for annotation in coco.loadAnns(coco.getAnnIds()):
        assert coco.annToMask(annotation).any()


def test_boxes_and_areas_are_those_of_the_masks(dataset):
    _, content = dataset
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    for annotation in content["annotations"]:
        mask = bitmap(annotation["segmentation"], *sizes[annotation["image_id"]])
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        outer = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert np.abs(np.array([x, y, x + w, y + h]) - outer).max() <= 3  # tips are thinner than a pixel
        # A polygon's rasterised area differs from its own by at most the pixels along its outline.
        assert abs(annotation["area"] - mask.sum()) <= 2 * (w + h) * (
            0 if "counts" in annotation["segmentation"] else 1
        )


def test_instances_do_not_share_pixels(dataset):
    _, content = dataset
    for image in content["images"]:
        masks = [
            bitmap(a["segmentation"], image["height"], image["width"])
            for a in content["annotations"]
            if a["image_id"] == image["id"]
        ]
        shared = (np.sum(masks, 0) > 1).sum()
        outline_pixels = sum((m & ~cv2.erode(m.astype(np.uint8), np.ones((3, 3))).astype(bool)).sum() for m in masks)
        assert shared <= 0.6 * outline_pixels  # only where rasterised outlines meet


def test_every_kind_of_annotation_occurs(dataset):
    _, content = dataset
    kinds = Counter()
    for annotation in content["annotations"]:
        segmentation = annotation["segmentation"]
        if annotation["iscrowd"]:
            kinds["crowd, list of counts"] += isinstance(segmentation["counts"], list)
        elif isinstance(segmentation, dict):
            kinds["hole, string of counts"] += isinstance(segmentation["counts"], str)
        else:
            kinds["several pieces" if len(segmentation) > 1 else "one piece"] += 1
        side = annotation["area"] ** 0.5
        kinds["small" if side < 32 else "medium" if side < 64 else "large"] += 1
        kinds[annotation["category_id"]] += 1
    expected = ["crowd, list of counts", "hole, string of counts", "several pieces", "one piece"]
    assert all(kinds[kind] for kind in [*expected, "small", "medium", "large", *CATEGORY_IDS.values()]), kinds


def test_a_second_call_keeps_what_is_there_and_other_settings_replace_it(tmp_path):
    path = make_split(tmp_path, "val", count=2, seed=7)
    before = path.stat().st_mtime_ns
    make_split(tmp_path, "val", count=2, seed=7)
    assert path.stat().st_mtime_ns == before
    make_split(tmp_path, "val", count=1, seed=7)
    assert len(json.loads(path.read_text())["images"]) == 1
