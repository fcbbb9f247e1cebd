"""replay.py: recorded steps happen again to the bit, and their causes are named."""

import json

import numpy as np
import pytest
from test_train import run, train_tiny

import training_incidents
from utils.checkpoint import load_weights

DIVERGES = ["TRAIN.BASE_LR=100", "TRAIN.WARMUP=0", "TRAIN.GRADIENT_CLIP=None"]


def test_a_step_that_is_left_out_changes_nothing_but_the_count_and_the_next_ends_the_run(tmp_path, capsys):
    logdir = tmp_path / "run"
    kept = ["BACKBONE.NORM=SyncBN", "TRAIN.EMA_DECAY=0.9", "TRAIN.SKIP_BAD_STEPS=1", "TRAIN.PERIOD_STEPS=1"]
    assert train_tiny(logdir, *DIVERGES, *kept, steps=9) == 3
    told = capsys.readouterr().err
    first, second = sorted(int(p.name.split("-")[1]) for p in logdir.glob("incident-*"))
    assert f"at step {first}; images" in told and "Its update is left out (1 of at most 1)" in told
    assert f"at step {second}; images" in told and "the updates of 1 bad steps before it were left out" in told
    before, after = (load_weights(logdir / f"model-{n}") for n in (first - 1, first))
    changed = [name for name, value in before[0].items() if not np.array_equal(value, after[0][name])]
    assert changed == ["global_step"]
    assert any("/bn/mean/EMA" in name for name in before[0]) and any(name.startswith("EMA/") for name in before[0])
    assert not before[1]["incidents"]["skipped"]
    assert [entry["step"] for entry in after[1]["incidents"]["skipped"]] == [first]


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
