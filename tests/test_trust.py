"""Settings that come from loaded files make nothing run unless --config or --trust-code say so (trust.py)."""

import json
import sys

import cv2
import numpy as np
import pytest

from common import UserError
from config import SETTINGS, default_config
from run_start import Request, begin, inference_settings, load_model, training_settings
from train import main
from trust import named_code, trust_options
from utils.checkpoint import save_npz

pytestmark = pytest.mark.quick
CODE = {
    "BACKBONE.NAME": "hostile:build",
    "FPN.FRCNN_HEAD_FUNC": "hostile:build",
    "FPN.MRCNN_HEAD_FUNC": "hostile:build",
    "DATA.DATASETS": {"mine": ["hostile:build", "path"], "plain": ["a.json", "images"]},
}
MODEL_KEYS = [key for key in CODE if key != "DATA.DATASETS"]


@pytest.fixture(autouse=True)
def witness(tmp_path, monkeypatch):
    """A module that can be imported and leaves a trace when it is."""
    (tmp_path / "hostile.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\nbuild = print\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    yield tmp_path / "ran"
    sys.modules.pop("hostile", None)
    assert not (tmp_path / "ran").exists()


def stored(*keys):
    settings = {"MODE_FPN": True, "DATA.VAL": ["mine"], "DATA.TRAIN": ["mine"], "BACKBONE.FREEZE_AT": 0}
    return {"settings": settings | {key: CODE[key] for key in keys}, "class_names": ["cat"]}


def test_every_setting_that_takes_a_function_is_marked():
    for key, setting in SETTINGS.items():
        for value in ("hostile:build", {"mine": ["hostile:build", "path"]}):
            try:
                read = setting.allowed.read(value)
            except ValueError:
                continue
            says = f"{setting.allowed.says} {setting.about}"
            assert setting.names_code == ("function" in says or isinstance(read, dict)), key


@pytest.mark.parametrize("key", MODEL_KEYS)
@pytest.mark.parametrize("settings_of", [inference_settings, training_settings])
def test_stored_code_is_refused_and_the_message_names_module_and_option(key, settings_of):
    with pytest.raises(UserError, match=f"theirs.npz asks for code of the module hostile .*{key}: hostile:build") as e:
        settings_of([], stored(key), "theirs.npz")
    assert str(e.value).endswith("add --trust-code hostile") and "\n" not in str(e.value)
    # Another module's trust is no help, nor is another setting in --config.
    with pytest.raises(UserError, match="--trust-code hostile"):
        settings_of(["MODE_MASK=True"], stored(key), "theirs.npz", ["hostile2", "host", "build"])


def test_all_modules_are_named_at_once():
    meta = stored(*MODEL_KEYS)
    meta["settings"]["FPN.MRCNN_HEAD_FUNC"] = "other.module:build"
    with pytest.raises(UserError, match="add --trust-code hostile --trust-code other.module$"):
        inference_settings([], meta, "theirs.npz")


@pytest.mark.parametrize("settings_of", [inference_settings, training_settings])
def test_given_by_config_or_trusted_it_is_used(settings_of):
    key, mine = "FPN.FRCNN_HEAD_FUNC", "demo.own_head:box_head"
    meta = {"settings": {"MODE_FPN": True, key: mine}}
    assert settings_of([], meta, "mine.npz", ["demo.own_head"]).get(key) == mine
    assert settings_of([f"{key}={mine}"], meta, "mine.npz").get(key) == mine
    # --config may also put the file's code out of effect.
    plain = "fastrcnn_2fc_head"
    assert settings_of([f"{key}={plain}"], stored(key), "theirs.npz").get(key) == plain


def test_code_of_data_sets_matters_only_where_they_are_loaded():
    meta = stored("DATA.DATASETS")
    with pytest.raises(UserError, match="DATA.DATASETS: hostile:build.*--trust-code hostile"):
        inference_settings([], meta, "theirs", uses_data=True)
    # Nothing can import what is no longer there.
    assert inference_settings([], meta, "theirs").DATA.DATASETS == {"plain": ["a.json", "images"]}
    other = inference_settings(["DATA.VAL=plain"], meta, "theirs", uses_data=True)
    assert other.DATA.DATASETS == {"plain": ["a.json", "images"]}
    trusting = inference_settings([], meta, "mine", ["hostile"], uses_data=True)
    assert CODE["DATA.DATASETS"] == trusting.DATA.DATASETS
    # A training run takes no data sets from the file it starts from.
    assert training_settings([], meta, "theirs").DATA.DATASETS == {}


def test_weights_of_a_backbone_do_not_choose_its_code(tmp_path):
    save_npz(tmp_path / "R50.npz", {"conv0/W": np.ones(3)}, stored("BACKBONE.NAME"))
    with pytest.raises(UserError, match=r"R50.npz asks for code.*--trust-code hostile"):
        training_settings([f"BACKBONE.WEIGHTS={tmp_path / 'R50.npz'}", "MODE_FPN=True"])


@pytest.mark.parametrize("key", list(CODE))
def test_a_run_directory_is_a_loaded_file_too(tmp_path, key):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(stored(key)))
    with pytest.raises(UserError, match=r"settings.json asks for code.*--trust-code hostile"):
        begin(Request(logdir=str(run), resume=True))


def test_what_does_not_load_a_file_needs_no_trust(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(stored("FPN.FRCNN_HEAD_FUNC")))
    start = begin(Request(logdir=str(run), resume=True, trusted=["hostile"]))
    start.lock.release()
    assert start.cfg.FPN.FRCNN_HEAD_FUNC == "hostile:build"
    assert trust_options(start.cfg) == " --trust-code hostile"


@pytest.mark.parametrize("mode", [["--predict", "a.jpg"], ["--evaluate", "out.json"], ["--print-config"]])
def test_the_command_line_ends_with_2(tmp_path, mode, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cv2.imwrite("a.jpg", np.zeros((32, 32, 3), np.uint8))
    save_npz(tmp_path / "theirs.npz", {"conv0/W": np.ones(3)}, stored("BACKBONE.NAME"))
    assert main([*mode, "--load", "theirs.npz"]) == 2
    assert "theirs.npz asks for code of the module hostile" in capsys.readouterr().err


def test_models_in_python(tmp_path):
    meta = {"settings": {"MODE_FPN": True, "FPN.FRCNN_HEAD_FUNC": "demo.own_head:box_head"}}
    save_npz(tmp_path / "a.npz", {"conv0/W": np.ones(3), "conv0/W/Momentum": np.ones(3)}, meta)
    with pytest.raises(UserError, match="--trust-code demo.own_head"):
        load_model(str(tmp_path / "a.npz"))
    model = load_model(str(tmp_path / "a.npz"), trusted=["demo.own_head"])
    assert list(model.weights) == ["conv0/W"]


def test_named_code():
    cfg = default_config()
    assert named_code(cfg) == [] and trust_options(cfg) == ""
    cfg.BACKBONE.NAME = "keras:MobileNetV2"
    cfg.DATA.DATASETS = {"a": ["C:/a.json", "images"], "b": ["voc", "folder", "train"], "c": ["own:load", "folder"]}
    assert named_code(cfg) == [("DATA.DATASETS", "c", "own:load")]
    cfg.FPN.FRCNN_HEAD_FUNC = "keras:layers"  # a module here
    assert trust_options(cfg) == " --trust-code own --trust-code keras"
