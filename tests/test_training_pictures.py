"""Pictures of a training run: which images, what stands in them, their files, and that their errors end no run."""

import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from tiny import COCO_MINI

import training_pictures
from config import default_config, finalize_config
from data import read_split_image
from dataset import load_split
from training_pictures import (
    chosen_images,
    drop_pictures_after,
    evaluation_pictures,
    pictures_of_step,
    show_batches,
)
from viz import class_color

pytestmark = pytest.mark.quick


def configured(*more):
    return finalize_config(default_config().update_args([f"DATA.BASEDIR={COCO_MINI}", "TRAIN.EVAL_PERIOD=0", *more]))


@pytest.fixture(scope="module")
def split():
    return load_split(configured(), "coco_train2017")


def truth_as_results(split) -> list[dict]:
    """The annotations as perfect results of score 0.9."""
    content = json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())
    sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
    results = []
    for a in content["annotations"]:
        if not a["iscrowd"]:
            rle = coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], *sizes[a["image_id"]]))
            rle["counts"] = rle["counts"].decode()
            results.append({k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9, "segmentation": rle})
    return results


def test_the_same_images_are_chosen_each_time_spread_over_those_with_objects(split):
    nonempty = split.nonempty_images().tolist()
    assert chosen_images(split, 100) == nonempty
    assert chosen_images(split, 2) == [nonempty[0], nonempty[-1]]
    assert chosen_images(split, 3) == chosen_images(split, 3) and len(set(chosen_images(split, 3))) == 3
    assert chosen_images(split, 0) == []


def halves(path):
    """The left and right picture of a file, without its head and the gap."""
    picture = cv2.imread(str(path)).astype(int)
    width = (picture.shape[1] - 1) // 2
    return picture[40:, : width - 8], picture[40:, -(width - 8) :]


def test_perfect_predictions_look_like_their_annotations_and_missing_ones_do_not(split, tmp_path):
    cfg = configured("TRAIN.PICTURES=1")
    i = chosen_images(split, 1)[0]
    image_id = split.image_id(i)
    results = truth_as_results(split)
    evaluation_pictures(tmp_path, 20, cfg)(split, results)
    evaluation_pictures(tmp_path, 40, cfg)(split, [r | {"score": 0.2} for r in results])  # below the threshold
    (found,) = pictures_of_step(tmp_path, 20).items()
    assert found[0] == f"val-coco_train2017-{image_id}"
    later = pictures_of_step(tmp_path, 40)
    assert later[found[0]].name == f"{found[0]}-step0000040.jpg"
    photo = read_split_image(split, i)
    assert np.ptp(photo, axis=2).max() < 10  # in shades of grey: what is coloured was drawn
    shares = [[(np.ptp(half, axis=2) > 40).mean() for half in halves(p)] for p in (found[1], later[found[0]])]
    assert shares[0][1] == pytest.approx(shares[0][0], rel=0.2) and shares[0][0] > 0.2
    assert shares[1][1] < 0.01 and shares[1][0] == shares[0][0]


def test_objects_have_the_colours_of_their_classes_on_both_sides(split, tmp_path):
    cfg = configured("TRAIN.PICTURES=6")
    results = truth_as_results(split)
    evaluation_pictures(tmp_path, 20, cfg)(split, results)
    kinds = {split.category_ids.index(r["category_id"]) + 1 for r in results}
    seen = np.concatenate(
        [half.reshape(-1, 3) for p in pictures_of_step(tmp_path, 20).values() for half in halves(p)[1:]]
    )
    for label in kinds:
        assert (np.abs(seen - class_color(label)).max(1) < 40).sum() > 20, split.class_names[label - 1]


def test_proposals_are_drawn_without_classes(split, tmp_path, monkeypatch):
    cfg = configured("MODE_RPN_ONLY=True", "TRAIN.PICTURES=1")
    monkeypatch.setattr(split, "category_ids", [None, *split.category_ids[1:]])  # the class of proposals is not there
    image_id = split.image_id(chosen_images(split, 1)[0])
    boxes = [
        {"image_id": image_id, "category_id": None, "bbox": [50, 50, 20 + n, 30], "score": n / 99} for n in range(99)
    ]
    seen = []
    original = training_pictures.draw_boxes
    monkeypatch.setattr(training_pictures, "draw_boxes", lambda i, b, *rest: seen.append(b) or original(i, b, *rest))
    evaluation_pictures(tmp_path, 20, cfg)(split, boxes)
    assert len(pictures_of_step(tmp_path, 20)) == 1
    assert len(seen[0]) >= 10 and seen[0][:3, 2].tolist() == [50 + 20 + 98, 50 + 20 + 97, 50 + 20 + 96]  # the best


def test_keypoints_of_results_stand_where_the_model_found_them(split, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(training_pictures, "draw_detections", lambda image, d, *rest: seen.append(d) or image)
    image_id = split.image_id(chosen_images(split, 1)[0])
    result = {"image_id": image_id, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1, "keypoints": [9, 8, 1] * 17}
    other = result | {"category_id": 12345}  # of a class that the set does not have
    evaluation_pictures(tmp_path, 20, configured("TRAIN.PICTURES=1"))(split, [result, other])
    assert seen[0].boxes.tolist() == [[1, 2, 4, 6]] and seen[0].labels.tolist() == [1]
    assert seen[0].keypoints[0, 16].tolist() == [9.5, 8.5, 1]  # COCO counts pixels from their centres


def batch(images, value):
    """A batch of grey images without objects."""
    return {
        "image": np.full((images, 400, 480, 3), value, np.uint8), "image_shape": np.tile([400, 480], (images, 1)),
        "gt_boxes": np.zeros((images, 1, 4), np.float32), "gt_labels": np.zeros((images, 1), np.int32),
        "gt_is_crowd": np.zeros((images, 1), bool),
    }  # fmt: skip


def test_the_first_images_of_all_batches_of_a_step_are_written_in_their_order(tmp_path):
    cfg = configured("TRAIN.PICTURES=3")
    written = show_batches(tmp_path, 1, [batch(2, (10, 90, 200)), batch(2, (200, 90, 10))], cfg)
    assert list(written) == ["batch-0", "batch-1", "batch-2"]
    middle = [cv2.imread(str(path))[200, 240].tolist() for path in written.values()]
    assert middle == [pytest.approx(c, abs=6) for c in ([10, 90, 200], [10, 90, 200], [200, 90, 10])]  # BGR as fed
    assert show_batches(tmp_path, 1, [batch(1, 0)], configured("TRAIN.PICTURES=0")) == {}


def test_a_run_that_goes_on_from_an_earlier_step_loses_the_pictures_of_later_ones(tmp_path):
    cfg = configured("TRAIN.PICTURES=1")
    for step in (1, 20, 12345678):
        show_batches(tmp_path, step, [batch(1, 9)], cfg)
    (tmp_path / "pictures" / "mine-step-by-step.jpg").write_text("a user's file")
    drop_pictures_after(tmp_path, 20)
    left = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert left == ["batch-0-step0000001.jpg", "batch-0-step0000020.jpg", "mine-step-by-step.jpg"]
    drop_pictures_after(tmp_path / "no run", 1)


def test_errors_in_pictures_are_one_warning(split, tmp_path, capsys):
    (tmp_path / "pictures").write_text("a file where the folder should be")
    cfg = configured("TRAIN.PICTURES=2")
    evaluation_pictures(tmp_path, 7, cfg)(split, [])
    show_batches(tmp_path, 7, [batch(1, 9)], cfg)
    warnings = capsys.readouterr().err.strip().splitlines()
    assert len(warnings) == 2 and all("the pictures of step 7 are incomplete: " in w for w in warnings)
