"""run_start.py: what a run starts from, and what it refuses or says before anything expensive happens."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import COCO_MINI, TINY_MODEL

from augment import resized_shape
from common import UserError, check_output_file, check_output_folder, write_json
from config import default_config, finalize_config
from dataset import load_training_split
from run_start import Fitting, Request, Start, begin, data_fingerprint, inference_settings, training_settings
from utils.checkpoint import make_meta, save_npz
from utils.run_lock import LOCK_NAME

pytestmark = pytest.mark.quick
ROOT = Path(__file__).resolve().parent.parent


def settings(*more):
    return finalize_config(default_config().update_args([*TINY_MODEL, f"DATA.BASEDIR={COCO_MINI}", *more]))


def start_of(request: Request) -> Start:
    start = begin(request)
    start.lock.release()
    return start


def weights(*more: str) -> dict[str, np.ndarray]:
    names = ["conv0/W", "conv0/bn/mean/EMA", "rpn/conv0/W", "fastrcnn/outputs/class/b", *more]
    return {name: np.zeros(4, np.float32) for name in names}


# --------------------------------------------------------------------------------------------------------- settings
def test_settings_of_training_do_not_block_a_prediction():
    small = ["PREPROC.MAX_SIZE=600", "PREPROC.TEST_SHORT_EDGE_SIZE=480"]
    assert inference_settings(small).PREPROC.MAX_SIZE == 600
    with pytest.raises(UserError, match=r"PREPROC\.MAX_SIZE=600 must be at least .*SHORT_EDGE_SIZE"):
        training_settings(small)


def test_the_test_edge_of_a_run_without_evaluations_does_not_block_its_predictions():
    small = ["PREPROC.SHORT_EDGE_SIZE=480", "PREPROC.MAX_SIZE=600", "TRAIN.EVAL_PERIOD=0"]
    stored = training_settings(small).to_dict()
    assert stored["PREPROC.TEST_SHORT_EDGE_SIZE"] == 800
    cfg = inference_settings([], {"settings": stored}, "run")
    assert cfg.PREPROC.TEST_SHORT_EDGE_SIZE == cfg.PREPROC.MAX_SIZE == 600
    for size in [(480, 640), (640, 480), (1000, 1000), (30, 3000)]:
        assert resized_shape(*size, 800, 600) == resized_shape(*size, 600, 600)
    with pytest.raises(UserError, match=r"TEST_SHORT_EDGE_SIZE=700 must be at most PREPROC\.MAX_SIZE \(600\)"):
        inference_settings(["PREPROC.TEST_SHORT_EDGE_SIZE=700"], {"settings": stored}, "run")


def test_doubtful_settings_are_warned_of_at_the_start(capsys):
    training_settings(["PREPROC.PIXEL_STD=[0.229,0.224,0.225]"])
    assert "PREPROC.PIXEL_STD=[0.229, 0.224, 0.225] looks like the scale 0 to 1" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- weights
def test_a_new_run_takes_weights_and_no_momentum_step_or_loss_scale(tmp_path):
    state = ["conv0/W/Momentum", "global_step", "loss_scale", "loss_scale_good", "EMA/QueueInput/queue_size"]
    save_npz(tmp_path / "model.npz", weights(*state), {"class_names": ["cat"], "settings": {}})
    start = start_of(Request(TINY_MODEL, load=str(tmp_path / "model.npz"), logdir=str(tmp_path / "run")))
    assert sorted(start.weights) == sorted(weights())
    assert (start.step, start.class_names) == (0, ["cat"])


def test_a_whole_detector_given_as_backbone_is_pointed_out(tmp_path, capsys):
    save_npz(tmp_path / "model.npz", weights(), None)
    path = tmp_path / "model.npz"
    start = start_of(Request([*TINY_MODEL, f"BACKBONE.WEIGHTS={path}"], logdir=str(tmp_path / "run")))
    assert start.expect == "backbone"
    assert "is a whole detector: only its backbone is used and the heads start" in capsys.readouterr().err
    backbone = {k: v for k, v in weights().items() if k.startswith("conv0")}
    save_npz(tmp_path / "backbone.npz", backbone, None)
    settings = [*TINY_MODEL, f"BACKBONE.WEIGHTS={tmp_path}/backbone.npz"]
    start_of(Request(settings, logdir=str(tmp_path / "run2")))
    assert "whole detector" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("new", "fitting", "said"),
    [
        (["cat", "dog"], Fitting(), ""),
        (["dog", "cat"], Fitting(), r"2 classes \(cat, dog\), this data has 2 \(dog, cat; in another order\): --match"),
        (["cat", "emu", "fox"], Fitting(), r"this data has 3 \(cat, emu, fox; 1 are the same\): --match-classes keeps"),
        (["cat", "emu", "fox"], Fitting(match_classes=True), "1 of 3 classes are kept by their names"),
        (["dog", "cat"], Fitting(trim_heads=True), ""),
    ],
)
def test_weights_of_other_classes_say_so(new, fitting, said, capsys, tmp_path):
    Start(settings(), tmp_path, weights=weights(), origin="m.npz", class_names=["cat", "dog"]).loader(fitting, new)
    err = capsys.readouterr().err
    assert re.search(said, err) if said else not err


def test_matching_needs_the_names_of_the_classes(tmp_path):
    start = Start(settings(), tmp_path, weights=weights(), origin="m.npz")
    with pytest.raises(UserError, match="--match-classes: m.npz does not name its classes"):
        start.loader(Fitting(match_classes=True), ["cat"])


# ------------------------------------------------------------------------------------------------------- run directory
def make_run(folder: Path, *, names=("cat", "dog"), steps=(2, 4), **more) -> None:
    """What a run leaves, without the weights' data."""
    cfg = settings()
    cfg = cfg.copy()
    cfg.TRAIN.SEED, cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = 1, list(names), len(names)
    folder.mkdir(parents=True)
    write_json(folder / "settings.json", {**make_meta(cfg.freeze().to_dict(), names, 0), **more})
    for step in steps:
        (folder / f"model-{step}.index").write_bytes(b"")


def test_the_same_command_and_resume_continue_with_the_classes_of_the_run(tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setattr(
        "run_start.load_weights", lambda path, *_: ({"global_step": np.array(4), "path": str(path)}, None)
    )
    words = [*TINY_MODEL, f"DATA.BASEDIR={COCO_MINI}", "TRAIN.SEED=1"]
    again = start_of(Request(words, logdir=str(tmp_path / "run")))
    resumed = start_of(Request((), logdir=str(tmp_path / "run"), resume=True))
    for start in (again, resumed):
        assert list(start.cfg.DATA.CLASS_NAMES) == ["cat", "dog"] and start.cfg.DATA.NUM_CATEGORY == 2
        assert start.weights["path"] == str(tmp_path / "run")
    for request in (
        Request([*words, "DATA.CLASS_NAMES=['dog','cat']"], logdir=str(tmp_path / "run")),
        Request(["DATA.CLASS_NAMES=['emu']"], logdir=str(tmp_path / "run"), resume=True),
    ):
        with pytest.raises(UserError, match=r"a run with other classes \(cat, dog\) than DATA.CLASS_NAMES gives"):
            begin(request)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


@pytest.mark.parametrize("given", ["2", "RUN/model-2", "RUN/model-2.index", "model-2.meta.json"])
def test_a_chosen_checkpoint_is_continued(given, tmp_path, monkeypatch):
    make_run(tmp_path / "run")
    monkeypatch.setattr(
        "run_start.load_weights", lambda path, *_: ({"global_step": np.array(2), "path": str(path)}, None)
    )
    given = given.replace("RUN", str(tmp_path / "run"))
    start = start_of(Request((), logdir=str(tmp_path / "run"), resume=True, checkpoint=given))
    assert start.weights["path"] == str(tmp_path / "run" / "model-2")
    start.prepare_logdir()  # what is continued is the newest from now on
    assert 'model_checkpoint_path: "model-2"' in (tmp_path / "run" / "checkpoint").read_text()
    with pytest.raises(UserError, match=r"--resume 3: .* has no such checkpoint; it has those of steps \[2, 4\]"):
        begin(Request((), logdir=str(tmp_path / "run"), resume=True, checkpoint="3"))


def test_a_log_keeps_each_step_once_and_no_line_of_a_later_or_unfinished_one(tmp_path):
    lines = [{"step": 20, "loss": 1.5}, {"step": 20, "bbox/AP": 0.1}, {"step": 40, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines) + '{"step": 20, "lo')
    Start(settings(), tmp_path, step=30).prepare_logdir()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines[:2]


def test_two_trainings_do_not_share_a_directory(tmp_path):
    first = begin(Request(TINY_MODEL, logdir=str(tmp_path / "run")))
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        begin(Request(TINY_MODEL, logdir=str(tmp_path / "run")))
    first.lock.release()
    assert not (tmp_path / "run").exists()
    start_of(Request(TINY_MODEL, logdir=str(tmp_path / "run")))


@pytest.mark.parametrize("content", ["[]", '{"settings": 3}', "not json"])
def test_settings_of_a_run_of_a_wrong_kind_are_one_line(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    for resume in (True, False):
        with pytest.raises(UserError, match="settings.json"):
            begin(Request(TINY_MODEL, logdir=str(tmp_path), resume=resume))


# ------------------------------------------------------------------------------------------------------------- the data
def test_the_fingerprint_tells_what_of_the_data_has_changed(tmp_path, capsys):
    split = load_training_split(settings())
    before = data_fingerprint(split)
    assert before == data_fingerprint(load_training_split(settings()))
    assert json.loads(json.dumps(before)) == before
    start = Start(settings(), tmp_path, step=5, origin="run at step 5", meta={"data": before})
    capsys.readouterr()
    start.check_data(before)
    Start(settings(), tmp_path, step=5, meta={}).check_data(before)  # of a run that did not note it
    assert capsys.readouterr().err == ""
    changes = {"boxes": "annotations", "labels": "annotations", "sizes": "image sizes", "id": "image ids"}
    for column, said in changes.items():
        other = load_training_split(settings())
        changed = other.columns[column].copy()
        changed.flat[0] += 1
        other.columns[column] = changed
        capsys.readouterr()
        start.check_data(data_fingerprint(other))
        assert f"run at step 5: the training data has changed since ({said};" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- folders
def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    check_output_folder(tmp_path / "new" / "deep", "--output")
    check_output_file(tmp_path / "new" / "o.json", "--evaluate")
    with pytest.raises(UserError, match=r"--logdir .*file: .*file is a file, not a folder"):
        check_output_folder(tmp_path / "file", "--logdir")
    with pytest.raises(UserError, match=r"--output .*file/a/b: .*file is a file, not a folder"):
        check_output_folder(tmp_path / "file" / "a" / "b", "--output")
    with pytest.raises(UserError, match=r"--evaluate .*folder is a folder; give the name of a file in it"):
        check_output_file(tmp_path / "folder", "--evaluate")
    with pytest.raises(UserError, match="--output .*name too long"):
        check_output_folder(tmp_path / ("x" * 300), "--output")
    with pytest.raises(UserError, match="--logdir /proc/new: nothing can be written into /proc"):
        check_output_folder("/proc/new", "--logdir")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flags", [["--logdir"], ["--output"], ["--evaluate"]])
def test_a_file_in_the_place_of_a_folder_is_one_line_before_the_model_is_read(flags, tmp_path, capsys):
    import train

    (tmp_path / "file").write_text("x")
    words = {
        "--logdir": ["--logdir", tmp_path / "file", "--config", *TINY_MODEL],
        "--output": ["--predict", "a.jpg", "--load", "/no", "--output", tmp_path / "file"],
        "--evaluate": ["--load", "/no", "--evaluate", tmp_path / "file" / "o.json"],
    }[flags[0]]
    assert train.main([str(w) for w in words]) == 2
    err = capsys.readouterr().err
    assert f"{flags[0]} {tmp_path}/file" in err and "is a file, not a folder" in err and "Traceback" not in err


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_streams_neither_stop_the_program_nor_end_in_its_files(closed, tmp_path):
    code = (
        "import common, os; common.logger.error('lost'); f = open('out.txt', 'w'); os.write(2, b'noise'); "
        "f.write(str(f.fileno())); f.close()"
    )
    done = subprocess.run(["sh", "-c", f'PYTHONPATH={ROOT} {sys.executable} -c "{code}" {closed}'], cwd=tmp_path)
    assert done.returncode == 0
    assert int((tmp_path / "out.txt").read_text()) > 2
