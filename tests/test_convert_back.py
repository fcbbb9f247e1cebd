"""The way back to other systems (tools/convert_back.py): equal to the bit, or refused by name."""

import re
from functools import cache

import numpy as np
import pytest
from test_convert import GOLDEN, MODELS, settings_of, to_detectron2, to_torchvision

from tools.convert import convert, expected_shapes, main
from tools.convert_back import modules_by_scope, write_torch
from utils.checkpoint import load_weights, save_npz
from utils.safe_pickle import read_pickle


@cache
def model(kind, classes):
    """Random variables of a model of MODELS, without building its graph; the box of the background is zero."""
    rng = np.random.default_rng(len(kind) + classes)
    variables = {}
    for name, shape in sorted(expected_shapes(settings_of(kind, classes).to_dict())[0].items()):
        value = rng.standard_normal(shape).astype(np.float32)
        if re.fullmatch(r"fastrcnn/(outputs/)?box/[Wb]", name) and shape[-1] > 4:
            value[..., :4] = 0
        variables[name] = np.abs(value) + 0.1 if name.endswith("variance/EMA") else value
    return variables


def native(tmp_path, kind, *settings, classes=6):
    """A model of MODELS in a file, and its variables."""
    cfg = settings_of(kind, classes).update_args(settings)
    save_npz(tmp_path / "native.npz", model(kind, classes), {"settings": cfg.to_dict(), "class_names": [], "step": 0})
    return tmp_path / "native.npz", model(kind, classes)


def refused(capsys, *arguments):
    """The one line with which the command stops."""
    assert main([str(a) for a in arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message
    return message


def same(got, want):
    assert sorted(got) == sorted(want)
    for name in want:
        assert got[name].shape == want[name].shape and got[name].dtype == want[name].dtype, name
        assert got[name].tobytes() == want[name].tobytes(), name


HELD = {
    "detectron2": {"fpn", "faster", "c4", "cascade", "agnostic", "agnostic_masks", "gn", "keypoint", "basic", "rpn",
                   "rpn_c4", "resnext", "two_convolutions"},
    "torchvision": {"fpn", "faster", "keypoint", "basic", "resnext", "gn", "two_convolutions"},
    "tensorpack": {"fpn", "faster", "c4", "cascade", "tensorpack_gn"},
}  # fmt: skip
SETTINGS = {
    "detectron2": ["FRCNN.ROI_SAMPLES=2"],
    "torchvision": ["FRCNN.ROI_ALIGNED=False", "RPN.STRIDE_FROM_SIZE=True", "RPN.MIN_SIZE=0.001"],
    "tensorpack": [],
}


@pytest.fixture(scope="module")
def settings_for(tmp_path_factory):
    """What a model needs so that a system computes the same: torchvision's anchors are rounded to whole pixels."""
    path = tmp_path_factory.mktemp("torchvision") / "a.pth"
    with open(path, "wb") as file:
        write_torch(file, {n: np.ascontiguousarray(v) for n, v in to_torchvision(model("faster", 6), True).items()})
    anchors = convert(path)[1]["RPN.CELL_ANCHORS"]
    return {**SETTINGS, "torchvision": [*SETTINGS["torchvision"], f"RPN.CELL_ANCHORS={anchors}"]}


@pytest.mark.parametrize(("system", "kind"), [(s, k) for s in HELD for k in sorted(HELD[s])])
def test_every_family_that_a_system_holds_comes_back_to_the_bit(tmp_path, capsys, settings_for, system, kind):
    source, want = native(tmp_path, kind, *settings_for[system])
    ending = {"detectron2": "pkl", "torchvision": "pth", "tensorpack": "npz"}[system]
    out = tmp_path / f"out.{ending}"
    assert main([str(source), str(out), "--to", system]) == 0
    assert f"options in {system}: " in capsys.readouterr().out
    got, settings, report = convert(out)
    same(got, want)
    assert not report.unused and not report.missing
    cfg = settings_of(kind).update_args(settings_for[system])
    for key in ("MODE_MASK", "MODE_FPN", "MODE_KEYPOINT", "FPN.CASCADE", "FRCNN.CLASS_AGNOSTIC", "MRCNN.CLASS_AGNOSTIC",
                "BACKBONE.NORM", "BACKBONE.RESNET_NUM_BLOCK", "FPN.GN_AFTER_RELU", "PREPROC.PIXEL_STD"):  # fmt: skip
        assert settings.get(key, cfg.get(key)) == cfg.get(key), key
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native.npz", out.name]


@pytest.mark.parametrize(
    ("system", "kind", "classes"),
    [("detectron2", k, c) for k in sorted(HELD["detectron2"]) for c in (1, 6) if not (k.startswith("agn") and c == 1)]
    + [("torchvision", k, 6) for k in ("fpn", "faster", "keypoint", "basic")],
)  # fmt: skip
def test_names_and_layout_are_those_of_the_system(tmp_path, settings_for, system, kind, classes):
    """The same tensors as the exporters in test_convert.py make, which state each system's conventions on their own."""
    source, want = native(tmp_path, kind, *settings_for[system], classes=classes)
    assert main([str(source), str(tmp_path / "out.pth"), "--to", system]) == 0
    got = {n: v for n, v in read_pickle(tmp_path / "out.pth").items() if not n.startswith("pixel_")}
    theirs = to_detectron2(want, classes) if system == "detectron2" else to_torchvision(want, True)
    background = [n for n in theirs if n.startswith("roi_heads.mask_predictor.mask_fcn_logits")]  # read by nothing
    for name in background:
        np.testing.assert_array_equal(got[name][0], 0)
        got[name], theirs[name] = got[name][1:], theirs[name][1:]
    same(got, {name: np.ascontiguousarray(value) for name, value in theirs.items()})


@pytest.mark.parametrize(("system", "kind"), [(s, k) for s in HELD for k in sorted(set(MODELS) - HELD[s])])
def test_families_that_a_system_does_not_have_are_refused_by_their_setting(
    tmp_path, capsys, settings_for, system, kind
):
    source, _ = native(tmp_path, kind, *settings_for[system])
    out = tmp_path / f"out.{'npz' if system == 'tensorpack' else 'pth'}"
    message = refused(capsys, source, out, "--to", system)
    assert re.search(rf"native\.npz: {system} has no place for its [A-Z_.0-9]+=.*; nothing written", message)
    assert [p.name for p in tmp_path.iterdir()] == ["native.npz"]


@pytest.mark.parametrize(
    ("system", "setting"),
    [
        ("detectron2", "BACKBONE.BN_EPSILON=0"),
        ("detectron2", "BACKBONE.TF_PAD_MODE=True"),
        ("detectron2", "RPN.STRIDE_FROM_SIZE=True"),
        ("detectron2", "FRCNN.ROI_TO_LAST_PIXEL=True"),
        ("detectron2", "FRCNN.ROI_OP=crop_and_resize"),
        ("detectron2", "FPN.PROPOSAL_MODE=Joint"),
        ("detectron2", "RPN.MIN_SIZE=0.001"),
        ("detectron2", "BACKBONE.NAME=keras:ResNet50"),
        ("torchvision", "FRCNN.ROI_ALIGNED=True"),
        ("torchvision", "RPN.CELL_ANCHORS=[]"),
        ("torchvision", "BACKBONE.STRIDE_1X1=True"),
        ("torchvision", "FRCNN.ROI_OP=pool"),
        ("tensorpack", "FRCNN.ROI_SAMPLES=0"),
        ("tensorpack", "FRCNN.ROI_ALIGNED=False"),
        ("tensorpack", "BACKBONE.BN_EPSILON=0"),
        ("tensorpack", "FPN.MRCNN_HEAD_FUNC=demo.own_head:mask_head"),
    ],
)
def test_settings_that_a_system_cannot_compute_are_refused_by_name(tmp_path, capsys, settings_for, system, setting):
    source, _ = native(tmp_path, "fpn", *settings_for[system], setting)
    out = tmp_path / f"out.{'npz' if system == 'tensorpack' else 'pth'}"
    message = refused(capsys, source, out, "--to", system)
    assert f"{system} has no place for its {setting.split('=')[0]}=" in message
    assert [p.name for p in tmp_path.iterdir()] == ["native.npz"]


def test_a_setting_given_on_the_command_line_is_accepted(tmp_path, capsys):
    source, want = native(tmp_path, "c4", "FRCNN.ROI_SAMPLES=0")
    arguments = [str(source), str(tmp_path / "out.npz"), "--to", "tensorpack"]
    assert "FRCNN.ROI_SAMPLES=0" in refused(capsys, *arguments)
    assert main([*arguments, "--config", "FRCNN.ROI_SAMPLES=2"]) == 0
    same(load_weights(tmp_path / "out.npz")[0], want)


def test_imagenet_backbones_go_back_too(tmp_path):
    backbone = {n: v for n, v in model("fpn", 6).items() if n.startswith(("conv0/", "group"))}
    save_npz(
        tmp_path / "native.npz", backbone, {"settings": settings_of("fpn").to_dict(), "class_names": [], "step": 0}
    )
    for system, ending in (("detectron2", "pkl"), ("torchvision", "pth")):
        out = tmp_path / f"{system}.{ending}"
        assert main([str(tmp_path / "native.npz"), str(out), "--to", system]) == 0
        got, settings, _ = convert(out)
        same(got, backbone)
        assert settings["PREPROC.PIXEL_STD"] == [58.395, 57.12, 57.375] and settings["BACKBONE.STRIDE_1X1"] is False


def test_tensors_without_a_place_and_wrong_endings_are_one_line(tmp_path, capsys):
    source, want = native(tmp_path, "faster")
    wrong = refused(capsys, source, tmp_path / "out.npz", "--to", "detectron2")
    assert "out.npz: a file of detectron2 ends in .pkl or .pth" in wrong
    assert "--to tensorpack needs the name of the file to write" in refused(capsys, source, "--to", "tensorpack")
    meta = {"settings": settings_of("faster").to_dict(), "class_names": [], "step": 0}
    save_npz(source, {**want, "fastrcnn/own/W": np.zeros([2, 2], np.float32)}, meta)
    message = refused(capsys, source, tmp_path / "out.pkl", "--to", "detectron2")
    assert "fastrcnn/own/W has no place in detectron2; nothing written" in message


def test_averaged_weights_are_what_is_written(tmp_path):
    source, want = native(tmp_path, "faster")
    meta = {"settings": settings_of("faster").to_dict(), "class_names": [], "step": 0}
    state = {"global_step": np.array(7), "fastrcnn/fc6/W/Momentum": want["fastrcnn/fc6/W"]}
    save_npz(source, {**{n: v + 1 for n, v in want.items()}, **{f"EMA/{n}": v for n, v in want.items()}, **state}, meta)
    assert main([str(source), str(tmp_path / "out.pkl"), "--to", "detectron2"]) == 0
    same(convert(tmp_path / "out.pkl")[0], want)


@pytest.mark.quick
def test_rules_are_read_backwards():
    rules = [
        (r"(?:body\.|)layer([1-2])\.(\d+)\.(conv|bn)(\.x)?", lambda m: f"g{m[1]}/b{m[2]}/{m[3]}{'/n' if m[4] else ''}"),
        (r"head\.(\d*[02])", lambda m: f"h{int(m[1]) // 2}"),
    ]
    found = modules_by_scope(rules, 12)
    assert found["g2/b11/bn/n"] == ["body.layer2.11.bn.x", "layer2.11.bn.x"]
    assert found["h6"] == ["head.12"] and len([s for s in found if s[0] == "g"]) == 2 * 12 * 2 * 2


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no recorded models in {GOLDEN} (set GOLDEN)")
@pytest.mark.parametrize("name", ["mask_r50_fpn", "mask_r50_c4", "cascade_mask_r50_fpn", "mask_r50_fpn_gn",
                                  "keypoint_r50_fpn", "mask_x50_32x4d_fpn"])  # fmt: skip
def test_recorded_models_of_detectron2_return_to_their_own_tensors(tmp_path, name):
    with np.load(GOLDEN / f"{name}.weights.npz", allow_pickle=False) as content:
        theirs = {n: content[n] for n in content.files if not n.startswith("pixel_") and "cell_anchors" not in n}
    with open(tmp_path / "theirs.pth", "wb") as file:
        write_torch(file, {n: np.ascontiguousarray(v, np.float32) for n, v in theirs.items()})
    assert main([str(tmp_path / "theirs.pth"), str(tmp_path / "native.npz")]) == 0
    assert main([str(tmp_path / "native.npz"), str(tmp_path / "back.pth"), "--to", "detectron2"]) == 0
    back = {n: v for n, v in read_pickle(tmp_path / "back.pth").items() if not n.startswith("pixel_")}
    same(
        back, {n: np.ascontiguousarray(v, np.float32) for n, v in theirs.items() if n in back or "num_batches" not in n}
    )
