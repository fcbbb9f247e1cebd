"""training_incidents.py, training_guard.py: steps with values that are not finite, and what they leave behind."""

import json
import re

import numpy as np
from test_train import COCO_MINI, last_error, train_tiny

import trainers
from utils.checkpoint import newest_checkpoint
from utils.tf_v1 import tf

DIVERGES = ["TRAIN.BASE_LR=100", "TRAIN.WARMUP=0", "TRAIN.GRADIENT_CLIP=None"]


def described(folder):
    return json.loads((folder / "incident.json").read_text())


def test_nan_ends_the_run_with_the_names_of_the_images_and_a_folder(tmp_path, capsys):
    assert train_tiny(tmp_path / "run", *DIVERGES, steps=5) == 3
    message = last_error(capsys)
    (folder,) = (tmp_path / "run").glob("incident-*")
    assert f"recorded in {folder}" in message
    images = {
        i["id"]: i["file_name"]
        for i in json.loads((COCO_MINI / "annotations/instances_train2017.json").read_text())["images"]
    }
    shown = re.search(r"images of the batch: (\d+)", message)[1]
    (part,) = described(folder)["parts"]
    assert [(i["id"], i["file"]) for i in part["images"]] == [
        (int(shown), str(COCO_MINI / "train2017" / images[int(shown)]))
    ]


def test_weights_that_overflow_in_the_last_update_are_not_saved_and_end_the_run(tmp_path, capsys, monkeypatch):
    """Its loss was finite, and there is no other step whose loss would not be."""
    monkeypatch.setattr(trainers, "learning_rate_tensor", lambda plan, step: tf.constant(np.inf, tf.float32))
    assert train_tiny(tmp_path / "run", steps=1) == 3
    assert "weights would become infinite or NaN by the update at step 1" in last_error(capsys)
    assert newest_checkpoint(tmp_path / "run") is None
    found = described(tmp_path / "run/incident-1")
    assert found["learning_rate"] == "inf" and 0 < found["values"]["gradient_norm"] < np.inf
