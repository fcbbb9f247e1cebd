"""training_incidents.py, training_guard.py: steps with values that are not finite, and what they leave behind."""

import json
import re

import numpy as np
import pytest
from test_train import COCO_MINI, last_error, run, train_tiny
from tiny import RPN_ALONE

import data
import trainers
from utils.checkpoint import load_weights, newest_checkpoint, save_npz
from utils.tf_v1 import tf

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
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
    assert train_tiny(tmp_path / "run", *RPN_ALONE, steps=1) == 3
    assert "weights could become infinite or NaN by the update at step 1" in last_error(capsys)
    assert newest_checkpoint(tmp_path / "run") is None
    found = described(tmp_path / "run/incident-1")
    assert found["learning_rate"] == "inf" and 0 < found["values"]["gradient_norm"] < np.inf


@pytest.mark.parametrize(
    ("settings", "number", "value"),
    [([], 1, np.nan), (["TRAIN.CPU_REPLICAS=2", "TRAIN.ACCUMULATION=2", *RPN_ALONE], 5, np.inf)],
    ids=["alone", "two replicas, two micro-batches"],
)
def test_a_poisoned_annotation_is_found_by_the_replay(tmp_path, capsys, monkeypatch, settings, number, value):
    """The second step's batch `number` has a box that is not finite, as code of a user's own may make one."""
    original, poisoned = data.BatchMaker.make, {}

    def make(self, batch, *args):
        made = original(self, batch, *args)
        if batch == number:
            boxes = data.training_keys(self.cfg).index("gt_boxes")
            made[boxes] = made[boxes].copy()
            made[boxes][0, 0, 2] = value
            poisoned["at"] = made[boxes][0, 0]
        return made

    monkeypatch.setattr(data.BatchMaker, "make", make)
    assert train_tiny(tmp_path / "run", *settings) == 3
    folder = tmp_path / "run/incident-2"
    message = last_error(capsys)
    assert re.match(r"total_loss is (nan|inf) at step 2; images of the batch: \d+;", message)
    bad = [p for p in described(folder)["parts"] if not isinstance(p["losses"]["total_loss"], float)]
    place = divmod(number - len(described(folder)["parts"]), 2 if settings else 1)
    assert [(p["micro_batch"], p["replica"]) for p in bad] == [place]
    monkeypatch.undo()
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert run("--replay", folder) == 0
    told = capsys.readouterr().out
    assert "differ" not in told and told.count("equal to the recorded ones to the bit") == 1 + len(
        described(folder)["parts"]
    )
    assert "the batch itself is not finite: " in told and "first at [0, 0, 2]" in told
    shown = ", ".join(f"{v:.6g}" for v in poisoned["at"])
    assert "without this annotation everything is finite" in told and f"box {shown}" in told
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_an_overflow_of_float16_is_found_by_the_replay(tmp_path, capsys):
    assert train_tiny(tmp_path / "before", *RPN_ALONE, steps=1) == 0
    weights, meta = load_weights(tmp_path / "before")
    weights["group1/block0/conv2/W"] = weights["group1/block0/conv2/W"] * np.float32(1e7)
    save_npz(tmp_path / "large.npz", weights, meta)
    capsys.readouterr()
    settings = [*RPN_ALONE, "TRAIN.PRECISION=float16", "TRAIN.WARMUP=0"]
    assert train_tiny(tmp_path / "run", *settings, flags=["--load", tmp_path / "large.npz"]) == 3
    assert "loss is" in last_error(capsys)
    assert run("--replay", tmp_path / "run/incident-1") == 0
    told = capsys.readouterr().out
    assert "differ" not in told and "equal to the recorded ones to the bit" in told
    assert re.search(r"first operation: \S*group1/block0/conv2\S* .*in the backbone, stage C3, block 0, conv2", told)
    assert "it comes from the weights" in told
