"""Weights & Biases and MLflow beside a run: their errors and slowness are not the run's; a resumed run continues."""

import importlib
import importlib.util
import json
import math
import struct
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

import training_trackers
from common import UserError
from config import default_config, finalize_config
from log_mlflow import MlflowRun
from log_wandb import WandbRun
from training_trackers import FILE, Trackers, check_trackers, tracking


def settings(*args):
    return finalize_config(default_config().update_args(args))


class Recorder:
    """Stands for a tracker; notes what it gets, and fails or waits where told."""

    def __init__(self, target="t", logdir=None, settings=None, run_id=None):
        self.target, self.settings, self.before, self.run_id = target, settings, run_id, run_id or "new"
        self.place, self.calls, self.fails, self.gate = "here", [], False, None

    def note(self, *call):
        if self.gate is not None:
            self.gate.wait(60)
        if self.fails:
            raise ConnectionError("no route")
        self.calls.append(call)

    def scalars(self, step, values):
        self.note("scalars", step, values)

    def pictures(self, step, files):
        self.note("pictures", step, files)

    def end(self, state):
        self.note("end", state)


@pytest.mark.quick
def test_everything_arrives_in_order_and_a_tracker_that_fails_is_warned_of_once(capsys):
    good, bad = Recorder(), Recorder()
    bad.fails = True
    trackers = Trackers({"TRAIN.WANDB": bad, "TRAIN.MLFLOW": good})
    values = {"loss": 1.0}
    trackers.scalars(20, values)
    values["loss"] = 7.0  # what is logged later is no part of it
    trackers.pictures(20, {"a": Path("a.jpg")})
    trackers.scalars(40, {"loss": 0.5})
    trackers.end("finished")
    assert good.calls == [
        ("scalars", 20, {"loss": 1.0}), ("pictures", 20, {"a": Path("a.jpg")}), ("scalars", 40, {"loss": 0.5}),
        ("end", "finished"),
    ]  # fmt: skip
    warning = capsys.readouterr().err
    assert warning.count("TRAIN.WANDB: ConnectionError: no route") == 1 and "the run goes on" in warning


@pytest.mark.quick
def test_a_server_that_does_not_answer_holds_nothing_up(monkeypatch, capsys):
    monkeypatch.setattr(training_trackers, "MOST_WAITING", 5)
    slow = Recorder()
    slow.gate = threading.Event()
    trackers = Trackers({"TRAIN.MLFLOW": slow}, patience=0.05)
    for step in range(100):  # more than may wait
        trackers.scalars(step, {})
    trackers.end("finished")
    assert "TRAIN.MLFLOW: not everything was sent" in capsys.readouterr().err
    slow.gate.set()


@pytest.mark.quick
@pytest.mark.parametrize(("error", "state"), [(None, "finished"), (KeyError(), "failed"), (OSError(), "stopped")])
def test_a_run_that_goes_on_continues_the_same_one_and_its_end_is_told(monkeypatch, tmp_path, error, state):
    made = []

    def start(*args):
        made.append(Recorder(*args))
        return made[-1]

    monkeypatch.setattr(training_trackers, "TRACKERS", {"TRAIN.WANDB": start, "TRAIN.MLFLOW": start})
    cfg = settings("TRAIN.WANDB=fruit")
    if state == "stopped":
        error.signal_number = 15

    def run(cfg, chief=True):
        try:
            with tracking(cfg, tmp_path, chief):
                if error is not None:
                    raise error
        except (KeyError, OSError) as e:
            assert e is error

    run(cfg)
    assert made[0].target == "fruit" and made[0].before is None and made[0].calls == [("end", state)]
    assert made[0].settings["TRAIN.WANDB"] == "fruit"
    run(cfg)
    assert made[1].before == "new"
    run(settings("TRAIN.WANDB=other"))  # another project has no run to continue
    assert made[2].before is None
    run(cfg, chief=False)  # the other ranks log nothing
    run(settings())
    assert len(made) == 3


@pytest.mark.quick
def test_what_cannot_be_reached_ends_a_new_run_but_not_one_that_goes_on(monkeypatch, tmp_path, capsys):
    def start(*args):
        raise TimeoutError("login first\nsecond line")

    monkeypatch.setattr(training_trackers, "TRACKERS", {"TRAIN.WANDB": start})
    cfg = settings("TRAIN.WANDB=fruit")
    message = r"^setting TRAIN.WANDB=fruit: TimeoutError: login first \(.*\)$"
    with pytest.raises(UserError, match=message), tracking(cfg, tmp_path, True):
        pass
    (tmp_path / FILE).write_text(json.dumps({"TRAIN.WANDB": {"target": "fruit", "run": "x1"}}))
    with tracking(cfg, tmp_path, True) as trackers:
        trackers.scalars(1, {})
    assert "login first" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(("key", "value", "package"), [("WANDB", "p", "wandb"), ("MLFLOW", "http://x/y", "mlflow")])
def test_a_missing_package_is_named_with_its_installation(monkeypatch, tmp_path, key, value, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else real(n))
    with pytest.raises(UserError, match=rf"^setting TRAIN.{key}={value}: run `pip install {package}`"):
        check_trackers(settings(f"TRAIN.{key}={value}"))
    # W&B leaves a folder of its name where it was used, which Python takes for a package without content.
    monkeypatch.setattr(importlib.util, "find_spec", real)
    (tmp_path / package).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if real(package).origin is None:
        with pytest.raises(UserError, match="pip install"):
            check_trackers(settings(f"TRAIN.{key}={value}"))
    check_trackers(settings())


@pytest.mark.quick
@pytest.mark.parametrize("value", ["apples", "/apples", "http://host/"])
def test_mlflow_needs_an_address_and_an_experiment(monkeypatch, value):
    monkeypatch.setattr(training_trackers, "_installed", lambda package: True)
    with pytest.raises(UserError, match="must be URI/experiment"):
        check_trackers(settings(f"TRAIN.MLFLOW={value}"))


# ------------------------------------------------------------------------------------- with the packages, if installed
def needs(package: str):
    found = importlib.util.find_spec(package)
    reason = f"{package} is not installed; docs/DEPENDENCIES.md has the version that was tested"
    return pytest.mark.skipif(found is None or found.origin is None, reason=reason)


def picture(folder: Path) -> Path:
    path = folder / "val-x-1-step0000020.jpg"
    cv2.imwrite(str(path), np.full((40, 60, 3), 90, np.uint8))
    return path


def log_twice(kind, target, tmp_path, flush=lambda: None):
    """Two starts of a run: step 40 comes again after the resumption."""
    logdir = tmp_path / "mine"
    logdir.mkdir()
    first = kind(target, logdir, {"TRAIN.BASE_LR": 0.01, "DATA.TRAIN": ["a"]}, None)
    first.scalars(20, {"total_loss": 2.0, "bbox/AP_per_class/hair drier": 0.25, "bbox/APl": math.nan})
    first.pictures(20, {"val-x-1": picture(tmp_path)})
    first.scalars(40, {"total_loss": 1.5})
    first.end("stopped")
    flush()
    second = kind(target, logdir, {"TRAIN.BASE_LR": 0.02}, first.run_id)
    assert second.run_id == first.run_id
    second.scalars(40, {"total_loss": 1.5})
    second.scalars(60, {"total_loss": 1.0, "bbox/AP_per_class/gâteau: 1": 0.5})
    second.end("finished")
    flush()
    return logdir, first.run_id


def records_of(content: bytes):
    """The records of an offline run's file: LevelDB's log format, blocks of 32 KB after a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


@needs("wandb")
def test_weights_and_biases_keeps_scalars_settings_and_pictures_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb
    from wandb.proto import wandb_internal_pb2

    logdir, run_id = log_twice(WandbRun, "fruit", tmp_path, wandb.teardown)
    history, config = [], {}
    for path in sorted((logdir / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")):
        for content in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.HasField("history"):
                items = record.history.item
                history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            if record.HasField("run"):
                assert record.run.run_id == run_id and record.run.project == "fruit"
                config |= {c.key: json.loads(c.value_json) for c in record.run.config.update}
    losses = [(h["step"], h["total_loss"]) for h in history if "total_loss" in h]
    assert losses == [(20, 2.0), (40, 1.5), (40, 1.5), (60, 1.0)]
    assert history[0]["bbox/AP_per_class/hair drier"] == 0.25 and "bbox/APl" not in history[0]
    assert any("pictures/val-x-1" in key for h in history for key in h)
    assert config["TRAIN.BASE_LR"] in (0.01, 0.02)
    assert list((logdir / "wandb").glob("offline-run-*/files/media/images/pictures/*.jpg"))


@needs("mlflow")
def test_mlflow_keeps_scalars_settings_and_pictures_in_its_own_store(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    if importlib.util.find_spec("sqlalchemy"):
        uri = f"sqlite:///{tmp_path}/ml.db"
    else:  # mlflow-skinny
        uri = f"file://{tmp_path}/mlruns"
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _, run_id = log_twice(MlflowRun, f"{uri}/apples", tmp_path)
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert client.get_experiment(run.info.experiment_id).name == "apples"
    assert run.info.status == "FINISHED" and run.info.run_name == "mine"
    assert run.data.params["TRAIN.BASE_LR"] == "0.01" and run.data.params["DATA.TRAIN"] == "['a']"
    losses = {(m.step, m.value) for m in client.get_metric_history(run_id, "total_loss")}
    assert losses == {(20, 2.0), (40, 1.5), (60, 1.0)}
    assert run.data.metrics["bbox/AP_per_class/hair drier"] == 0.25
    assert run.data.metrics["bbox/AP_per_class/g_e2teau_3a 1"] == 0.5
    assert [f.path for f in client.list_artifacts(run_id, "pictures")] == ["pictures/val-x-1-step0000020.jpg"]
