"""replay.py: recorded steps happen again to the bit, and their causes are named."""

import json
import shutil

import numpy as np
import pytest
from test_train import run, train_tiny, weights_of

import data
import training_incidents
from utils.checkpoint import load_weights, save_npz

POISONED = 9  # number of the batch: step 3 of 4 batches each, micro-batch 0, replica 1


def poison(monkeypatch, value):
    """The last object of the first image of one batch gets a box that no reader would let through."""
    make = data.BatchMaker.make

    def poisoned(self, batch, *args):
        arrays = make(self, batch, *args)
        if batch == POISONED:
            labels, boxes = arrays[4], arrays[3]
            boxes[0, np.flatnonzero(labels[0])[-1], 2] = value
        return arrays

    monkeypatch.setattr(data.BatchMaker, "make", poisoned)


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run of 4 steps of 2 replicas and 2 micro-batches; the update of step 3 is left out."""
    logdir = tmp_path_factory.mktemp("runs") / "poisoned"
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, np.nan)
        assert train_tiny(
            logdir, "TRAIN.CPU_REPLICAS=2", "TRAIN.ACCUMULATION=2", "BACKBONE.NORM=SyncBN", "MODE_MASK=False",
            "TRAIN.EMA_DECAY=0.9", "TRAIN.SKIP_BAD_STEPS=1", "TRAIN.PERIOD_STEPS=1", steps=4,
        ) == 0  # fmt: skip
    return logdir


def test_a_step_that_is_left_out_changes_nothing_but_the_count(skipped):
    before, after, last = (load_weights(skipped / f"model-{n}") for n in (2, 3, 4))
    changed = [name for name, value in before[0].items() if not np.array_equal(value, after[0][name])]
    assert changed == ["global_step"]
    assert any("/bn/mean/EMA" in name for name in before[0]) and any(name.startswith("EMA/") for name in before[0])
    assert not np.array_equal(after[0]["conv0/W"], last[0]["conv0/W"])
    assert "incidents" in before[1] and not before[1]["incidents"]["skipped"]
    assert [entry["step"] for entry in last[1]["incidents"]["skipped"]] == [3]


def test_a_resumed_run_counts_on_and_the_next_bad_step_ends_it(skipped, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, np.nan)
    monkeypatch.setitem(globals(), "POISONED", 16)  # step 5
    logdir = tmp_path / "run"
    shutil.copytree(skipped, logdir)
    assert run("--resume", "--logdir", logdir, "--config", "TRAIN.MAX_STEPS=6") == 3
    assert "at step 5; images" in (told := capsys.readouterr().err)
    assert "the updates of 1 bad steps before it were left out" in told
    assert weights_of(logdir)["global_step"] == 4 and (logdir / "incident-5").is_dir()


def test_a_poisoned_annotation_is_found_and_the_numbers_are_the_same_to_the_bit(skipped, capsys):
    folder = skipped / "incident-3"
    before = {p: p.stat().st_mtime_ns for p in skipped.rglob("*")}
    assert run("--replay", folder) == 0
    told = capsys.readouterr().out
    description = json.loads((folder / "incident.json").read_text())
    bad = [p for p in description["parts"] if "nan" in p["losses"].values()]
    assert [(p["micro_batch"], p["replica"]) for p in bad] == [(0, 1)] and len(description["parts"]) == 4
    (image,) = bad[0]["images"]
    assert told.count("equal to the recorded ones to the bit") == 5 and "differ" not in told
    assert f"it comes from image {image['id']} ({image['file']})" in told
    with np.load(folder / "batch.npz") as arrays:
        place = np.flatnonzero(np.isnan(arrays["0/1/gt_boxes"][0]).any(1))[0]
    assert f"number {place} of the batch" in told
    assert "the batch itself is not finite" in told or "first operation: " in told
    assert {p: p.stat().st_mtime_ns for p in skipped.rglob("*")} == before
    assert len(list((folder / "pictures").iterdir())) == 4


def test_a_large_gradient_happens_again_to_the_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_incidents, "_MEDIAN_FROM", 1)
    logdir = tmp_path / "run"
    small = ["MODE_MASK=False", "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]"]
    assert train_tiny(logdir, *small, "TRAIN.INCIDENT_GRAD_FACTOR=1.0", steps=9) == 3
    assert "more than TRAIN.INCIDENT_GRAD_FACTOR=1 times its median" in capsys.readouterr().err
    (folder,) = logdir.glob("incident-*")
    values = json.loads((folder / "incident.json").read_text())["values"]
    assert all(isinstance(v, float) for v in [*values["losses"][0].values(), *values["gradient_norms"].values()])
    assert run("--replay", folder) == 0
    told = capsys.readouterr().out
    assert told.count("equal to the recorded ones to the bit") == 2 and "differ" not in told
    assert "the largest gradients: " in told


def test_an_overflow_of_float16_is_traced_to_its_layer(skipped, tmp_path, capsys):
    weights, meta = load_weights(skipped / "model-2")
    weights = {n: v for n, v in weights.items() if not n.startswith("EMA/")}
    weights["group1/block0/conv2/W"] = weights["group1/block0/conv2/W"] * 1e8
    save_npz(tmp_path / "large.npz", weights, meta)
    settings = ["TRAIN.PRECISION=float16", "MODE_MASK=False", "BACKBONE.NORM=FreezeBN"]
    flags = ["--load", tmp_path / "large.npz"]
    assert train_tiny(tmp_path / "run", *settings, flags=flags, steps=2) == 3
    assert run("--replay", tmp_path / "run/incident-1") == 0
    told = capsys.readouterr().out
    assert "in the backbone, stage C3, block 0, conv2" in told and "it comes from the weights" in told
    assert "differ" not in told
    # With a wider type it does not happen.
    assert run("--replay", tmp_path / "run/incident-1", "--config", "TRAIN.PRECISION=float32") == 1
    assert "it does not happen again" in capsys.readouterr().out


@pytest.mark.quick
@pytest.mark.parametrize("damage", ["no file", "json", "field", "pickle", "code"])
def test_a_folder_that_is_damaged_or_hostile_is_refused_in_one_line(damage, tmp_path, capsys):
    from config import default_config

    settings = default_config().to_dict() | {"MODE_FPN": True}
    if damage == "code":
        settings["FPN.FRCNN_HEAD_FUNC"] = "hostile:build"
    description = {
        "settings": settings, "step": 3, "verdict": 1, "what": "x", "parts": [], "learning_rate": "nan", "plan": {},
        "values": {"gradient_norm": 1.0, "gradient_norms": {}, "losses": []}, "limit": "inf", "bounds": [1.0, 1.0],
    }  # fmt: skip
    if damage == "field":
        del description["values"]
    if damage != "no file":
        (tmp_path / "incident.json").write_text("{" if damage == "json" else json.dumps(description))
    np.savez(tmp_path / "batch.npz", **{"0/0/image": np.array([{}], object)})
    assert run("--replay", tmp_path) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "ERROR" in x]
    words = {
        "no file": "has no incident.json", "json": "incident.json", "field": "copy it again", "pickle": "batch.npz",
        "code": "--trust-code hostile",
    }  # fmt: skip
    assert words[damage] in line
