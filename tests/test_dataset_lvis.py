"""LVIS's json loads and scores as its own package does."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from format_sets import DATA, settings

from dataset import load_format


@pytest.mark.quick
def test_lvis_loads_by_url_and_scores_like_the_package(tmp_path):
    content = json.loads((DATA / "lvis_mini/lvis_v1_mini.json").read_text())
    (tmp_path / "val2017").mkdir()
    for image in content["images"]:
        name = image["coco_url"].rsplit("/", 1)[1]
        cv2.imwrite(str(tmp_path / "val2017" / name), np.zeros((image["height"], image["width"], 3), np.uint8))
    shutil.copy(DATA / "lvis_mini/lvis_v1_mini.json", tmp_path)
    split = load_format(["lvis", "lvis_v1_mini.json", "."], settings(tmp_path), "lvis")
    assert len(split) == 14 and len(split.class_names) == 9
    assert Path(split.image_file(3)).is_file()
    results = json.loads((DATA / "lvis_mini/results.json").read_text())
    metrics = split.evaluate(results, verbose=False)
    expected = json.loads((DATA / "lvis_mini/expected.json").read_text())
    for kind in ("bbox", "segm"):
        for name in ("AP", "APr", "APc", "APf", "AR"):
            assert metrics[f"{kind}/{name}"] == pytest.approx(expected[f"{kind}-300"][name], abs=1e-9)
