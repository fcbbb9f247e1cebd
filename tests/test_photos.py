"""demo/photos.py: the photographs that it ships, and the commands that it gives for them and for your own."""

import json
import shutil

import numpy as np
import pytest

from command_line import parse_args
from common import read_json
from config import default_config, finalize_config
from config_files import settings_words
from dataset import load_split
from demo import photos

pytestmark = pytest.mark.quick


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Runs demo.photos without training -> the settings of its run, and how many images and objects its sets have."""
    seen = {}

    def train_py(*words):
        args = parse_args(list(words))
        if args.predict:
            seen["predicted"] = args.predict
        elif args.evaluate:
            scores = {"bbox/AP": 0.5}
            (tmp_path / "run" / "results.metrics.json").write_text(json.dumps(scores))
        else:
            (tmp_path / "run").mkdir()
            cfg = seen["cfg"] = finalize_config(
                default_config().update_args(settings_words(args.config, recipe=args.recipe))
            )
            for kind, training in ((cfg.DATA.TRAIN[0], True), (cfg.DATA.VAL[0], False)):
                split = load_split(cfg, kind, training=training)
                seen[kind] = len(split), len(split.columns["boxes"])
                assert all(split.image_file(i) for i in range(len(split)))

    monkeypatch.setattr(photos, "train_py", train_py)
    monkeypatch.setattr(photos, "write_sheet", lambda *a: None)

    def run(*words):
        assert photos.main(["--logdir", str(tmp_path / "run"), *words]) == 0
        return seen

    return run


def test_the_photographs_of_the_repository_are_complete(commands):
    seen = commands()
    assert seen["photos_train"] == (13, 121) and seen["photos_val"] == (5, 44)
    assert seen["cfg"].BACKBONE.WEIGHTS == "package" and len(seen["predicted"]) == 5
    for part in ("train", "val"):
        content = read_json(photos.PHOTOS / f"{part}.json", "annotations")
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            outline = np.reshape(annotation["segmentation"][0], [-1, 2])
            np.testing.assert_allclose([*outline.min(0), *outline.max(0)], [x, y, x + w, y + h], atol=1)
    assert "Permission is hereby granted" in (photos.PHOTOS / "LICENSE").read_text()


def test_a_fifth_of_your_own_photographs_is_held_out_unless_others_are_given(commands, tmp_path):
    labels = str(shutil.copy(photos.PHOTOS / "train.json", tmp_path / "mine.json"))
    images = str(photos.PHOTOS / "images")
    seen = commands("--train", labels, images, "--config", "MODE_MASK=False")
    assert seen["photos_train"][0] == 10 and seen["photos_val"][0] == 3
    assert seen["photos_train"][1] + seen["photos_val"][1] == 121
    assert not seen["cfg"].MODE_MASK
    seen = commands("--train", labels, images, "--val", str(photos.PHOTOS / "val.json"), images)
    assert seen["photos_train"] == (13, 121) and seen["photos_val"] == (5, 44)


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, caplog):
    (tmp_path / "list.json").write_text("[]")
    assert photos.main(["--train", str(tmp_path / "list.json"), str(tmp_path)]) == 2
    assert "list.json is not in COCO's format" in caplog.text
    assert photos.main(["--val", "a", "b"]) == 2
