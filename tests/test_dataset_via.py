"""dataset_via.py: VIA's json as a data set, and the balloon set by its name."""

import json
import shutil

import cv2
import numpy as np
import pytest
from tiny import TINY_TRAINING

from common import UserError
from config import default_config, finalize_config
from data import BatchMaker
from dataset import load_split, load_training_split

pytestmark = pytest.mark.quick


@pytest.fixture
def balloon(tmp_path):
    """Two pictures in the form of balloon_dataset.zip: VIA 1, regions by number, no attributes."""
    for part in ("train", "val"):
        (tmp_path / "balloon" / part).mkdir(parents=True)
        document = {}
        for number in range(2):
            file = f"{number}_b.jpg"
            cv2.imwrite(str(tmp_path / "balloon" / part / file), np.full((60, 80, 3), 90 * number, np.uint8))
            x, y = [10, 40, 40, 10, 10], [10, 10, 50, 50, 10]
            shape = {"name": "polygon", "all_points_x": x, "all_points_y": y}
            regions = {str(n): {"shape_attributes": shape, "region_attributes": {}} for n in range(number + 1)}
            document[f"{file}123"] = {"fileref": "", "size": 123, "filename": file, "base64_img_data": "",
                                      "file_attributes": {}, "regions": regions}  # fmt: skip
        (tmp_path / "balloon" / part / "via_region_data.json").write_text(json.dumps(document))
    return tmp_path


def config(base, *settings):
    return finalize_config(default_config().update_args([*TINY_TRAINING, f"DATA.BASEDIR={base}", *settings]))


def test_the_balloon_set_by_name(balloon):
    shutil.make_archive(str(balloon / "as downloaded/balloon_dataset"), "zip", balloon, "balloon")
    for base in (balloon, balloon / "balloon", balloon / "as downloaded"):
        cfg = config(base, "DATA.TRAIN=balloon_train", "DATA.VAL=balloon_val", "MODE_MASK=True")
        split = load_training_split(cfg)
        assert split.class_names == ["balloon"] and len(split) == 2
        np.testing.assert_array_equal(split.objects(1).boxes, [[10, 10, 40, 50]] * 2)
        batch = BatchMaker(split, finalize_config(cfg), (0, 1), 1).make(0)
        assert batch[0].dtype == np.uint8 and (batch[4] == 1).any()
    val = load_split(cfg, "balloon_val")
    results = [{"image_id": i, "category_id": 1, "bbox": [10, 10, 30, 40], "score": 0.9} for i in (1, 2)]
    assert val.evaluate(results, iou_types=["bbox"], verbose=False)["bbox/AP50"] > 0.6


def test_a_missing_balloon_set_says_where_it_should_be(tmp_path):
    with pytest.raises(UserError, match=r"balloon/train/via_region_data\.json does not exist; set DATA\.BASEDIR"):
        load_training_split(config(tmp_path, "DATA.TRAIN=balloon_train"))


def test_your_own_via_set(balloon):
    folder = balloon / "balloon" / "train"
    document = json.loads((folder / "via_region_data.json").read_text())
    for entry in document.values():
        for number, region in enumerate(entry["regions"].values()):
            region["region_attributes"] = {"kind": ["red", "blue"][number], "note": "x"}
    (folder / "mine.json").write_text(json.dumps({"_via_img_metadata": document}))
    spec = {"mine": ["via", "mine.json", ".", "attribute=kind"]}
    split = load_split(config(folder, f"DATA.DATASETS={spec!r}"), "mine", training=True)
    assert split.class_names == ["blue", "red"] and len(split.columns["labels"]) == 3
    spec["mine"].pop()
    with pytest.raises(UserError, match="which region attribute"):
        load_split(config(folder, f"DATA.DATASETS={spec!r}"), "mine")
