"""Files of other systems become this project's variables, tensor by tensor (tools/convert.py).

No file of most of these systems is at hand, so the tests write them: full sets of tensors under the systems'
documented names and shapes (narrow ResNets), with values from a seeded generator. A model drawn for the graph's own
variables is exported by the functions below, which state each system's conventions a second time, and must come back
unchanged. Files recorded from detectron2 itself are used where present (GOLDEN, default ../shared/golden).
"""

import os
import pickle
import re
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch_files import Tensor, save_pickled_tensors, save_stream, save_zip, tensors

from common import UserError
from config import default_config, finalize_config
from tools.convert import convert, expected_shapes, legacy_cell_anchors, main
from utils.checkpoint import load_weights

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).resolve().parent.parent / "../shared/golden"))
NARROW = ["BACKBONE.STEM_CHANNELS=16", "BACKBONE.WIDTH_PER_GROUP=16", "FPN.NUM_CHANNEL=32", "FPN.FRCNN_FC_HEAD_DIM=24",
          "FPN.FRCNN_CONV_HEAD_DIM=32", "MRCNN.HEAD_DIM=32", "KRCNN.HEAD_DIM=20", "RPN.HEAD_DIM=28"]  # fmt: skip
MODELS = {
    "fpn": ["MODE_FPN=True"],
    "faster": ["MODE_FPN=True", "MODE_MASK=False"],
    "c4": [],
    "cascade": ["MODE_FPN=True", "FPN.CASCADE=True"],
    "agnostic": ["MODE_FPN=True", "FRCNN.CLASS_AGNOSTIC=True", "MODE_MASK=False"],
    "agnostic_masks": ["MODE_FPN=True", "MRCNN.CLASS_AGNOSTIC=True"],
    "gn": ["MODE_FPN=True", "BACKBONE.NORM=GN", "FPN.NORM=GN", "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head",
           "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head", "BACKBONE.STEM_CHANNELS=32", "BACKBONE.WIDTH_PER_GROUP=32"],
    "tensorpack_gn": ["MODE_FPN=True", "BACKBONE.NORM=GN", "FPN.NORM=GN", "FPN.GN_AFTER_RELU=True",
                      "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head",
                      "FPN.CASCADE=True", "BACKBONE.STEM_CHANNELS=32", "BACKBONE.WIDTH_PER_GROUP=32"],
    "keypoint": ["MODE_FPN=True", "MODE_KEYPOINT=True", "MODE_MASK=False"],
    "basic": ["MODE_FPN=True", "BACKBONE.BLOCK=basic", "BACKBONE.RESNET_NUM_BLOCK=[2,2,2,2]",
              "BACKBONE.WIDTH_PER_GROUP=64"],
    "basic_c4": ["BACKBONE.BLOCK=basic", "BACKBONE.WIDTH_PER_GROUP=64"],
    "rpn": ["MODE_FPN=True", "MODE_RPN_ONLY=True"],
    "rpn_c4": ["MODE_RPN_ONLY=True"],
    "two_convolutions": ["MODE_FPN=True", "MODE_MASK=False", "RPN.NUM_CONVS=2"],
    "resnext": ["MODE_FPN=True", "BACKBONE.NUM_GROUPS=4", "BACKBONE.WIDTH_PER_GROUP=3"],
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- models of this project
@cache
def graph_shapes(settings):
    """{variable: shape} of the inference graph under a tuple of KEY=VAL strings."""
    from model_rcnn import build_inference
    from utils.tf_v1 import tf

    cfg = finalize_config(default_config().update_args(settings))
    with tf.Graph().as_default():
        build_inference(tf.placeholder(tf.uint8, [None, None, None, 3]), tf.placeholder(tf.int32, [None, 2]), cfg)
        return {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}


def settings_of(kind, classes=6):
    return default_config().update_args([*NARROW, *MODELS[kind], f"DATA.NUM_CATEGORY={classes}"])


@cache
def model(kind, classes):
    """A model of MODELS with random variables; a class-specific box of the background is zero, as nothing reads it."""
    rng = np.random.default_rng(len(kind) + classes)
    variables = {}
    for name, shape in sorted(graph_shapes((*NARROW, *MODELS[kind], "DATA.NUM_CATEGORY=6")).items()):
        # Other numbers of classes than the graph's 6: only the last axis of these differs.
        if re.search(r"/class/[Wb]$", name) and "rpn" not in name:
            shape = (*shape[:-1], classes + 1)
        elif re.search(r"fastrcnn/.*box/[Wb]$", name) and shape[-1] == 28:
            shape = (*shape[:-1], 4 * (classes + 1))
        elif name.startswith("maskrcnn/conv/") and shape[-1] > 1:
            shape = (*shape[:-1], classes)
        value = rng.standard_normal(shape).astype(np.float32)
        variables[name] = np.abs(value) + 0.1 if name.endswith("variance/EMA") else value
        if re.search(r"/box/[Wb]$", name) and name.startswith("fastrcnn") and shape[-1] > 4:
            variables[name][..., :4] = 0
    return variables


def same_variables(got, want, **tolerance):
    assert sorted(got) == sorted(want)
    for name in want:
        assert got[name].dtype == np.float32 and got[name].flags.c_contiguous
        np.testing.assert_allclose(got[name], want[name], err_msg=name, **(tolerance or {"rtol": 0, "atol": 0}))


def check(path, kind, classes, count):
    """Converts, and checks variables, that every tensor was used once, and that the settings are those of the graph."""
    variables, settings, report = convert(path)
    same_variables(variables, model(kind, classes))
    assert not report.unused and not report.missing
    assert len(report.mapped) + len(report.ignored) == count
    graph = settings_of(kind, classes)
    for key, value in settings.items():
        if not re.match(r"PREPROC|BACKBONE\.(STRIDE|BN_EPS)|RPN\.(CELL|STRIDE|MIN)|FRCNN\.ROI", key):
            assert value == graph.get(key), key
    untold = {k for k, v in graph.items() if v != default_config().get(k)} - set(settings)
    # What no variable of this model depends on is not derived.
    untold -= {"DATA.NUM_CATEGORY"} if kind.startswith("rpn") else set()
    assert untold <= {"RPN.HEAD_DIM", "KRCNN.HEAD_DIM", "MRCNN.HEAD_DIM", "FPN.FRCNN_CONV_HEAD_DIM", "FPN.NUM_CHANNEL",
                      "FPN.FRCNN_FC_HEAD_DIM"}  # fmt: skip
    return settings, report


# ---------------------------------------------------------------------------------------------------------- exporters
def torch_layout(value):
    return np.ascontiguousarray(
        value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
    )


def split(name):
    """group0/block1/conv2/bn/mean/EMA -> (group0/block1/conv2, bn, mean/EMA)."""
    scope, kind, leaf = re.fullmatch(r"(.*?)/(?:(bn|gn)/)?(W|b|gamma|beta|mean/EMA|variance/EMA)", name).groups()
    return scope, kind, leaf


TORCH_LEAF = {"W": "weight", "b": "bias", "gamma": "weight", "beta": "bias", "mean/EMA": "running_mean",
              "variance/EMA": "running_var"}  # fmt: skip


def background_last(name, value, classes):
    """Classifier columns with the background moved behind; box columns without the background's."""
    if re.search(r"/class/[Wb]$", name):
        return np.concatenate([value[..., 1:], value[..., :1]], -1)
    if re.search(r"/box/[Wb]$", name) and value.shape[-1] == 4 * (classes + 1):
        return value[..., 4:]
    return value


def to_detectron2(variables, classes):
    fpn = "fpn/lateral_1x1_c2/W" in variables
    body = "backbone.bottom_up." if fpn else "backbone."
    out = {}
    for name, value in variables.items():
        scope, kind, leaf = split(name)
        if m := re.fullmatch(r"group(\d)/block(\d+)/(\w+)", scope):
            top = "roi_heads." if m[1] == "3" and not fpn else body
            module = f"{top}res{int(m[1]) + 2}.{m[2]}.{m[3].replace('convshortcut', 'shortcut')}"
        elif m := re.fullmatch(r"fpn/(lateral_1x1_c|posthoc_3x3_p)(\d)", scope):
            module = f"backbone.fpn_{'lateral' if m[1][0] == 'l' else 'output'}{m[2]}"
        elif m := re.fullmatch(r"rpn/(\w+)", scope):
            several = "rpn/conv1/W" in variables
            conv = f"conv.{m[1]}" if several else "conv"
            part = {"class": "objectness_logits", "box": "anchor_deltas"}.get(m[1], conv)
            module = f"proposal_generator.rpn_head.{part}"
        elif m := re.fullmatch(r"(?:fastrcnn|cascade_rcnn_stage(\d))/(?:outputs/)?(class|box)", scope):
            stage = f".{int(m[1]) - 1}" if m[1] else ""
            module = f"roi_heads.box_predictor{stage}.{'cls_score' if m[2] == 'class' else 'bbox_pred'}"
            value = background_last(name, value, classes)
        elif m := re.fullmatch(r"(?:fastrcnn|cascade_rcnn_stage(\d)/head)/(conv|fc)(\d?)", scope):
            stage = f".{int(m[1]) - 1}" if m[1] else ""
            number = int(m[3]) + 1 if m[2] == "conv" else int(m[3]) - 5 if m[3] else 1
            module = f"roi_heads.box_head{stage}.{m[2]}{number}"
        elif m := re.fullmatch(r"maskrcnn/fcn(\d)", scope):
            module = f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}"
        elif m := re.fullmatch(r"keypointrcnn/conv(\d)", scope):
            module = f"roi_heads.keypoint_head.conv_fcn{int(m[1]) + 1}"
        else:
            module = {"conv0": body + "stem.conv1", "maskrcnn/deconv": "roi_heads.mask_head.deconv",
                      "maskrcnn/conv": "roi_heads.mask_head.predictor",
                      "keypointrcnn/deconv": "roi_heads.keypoint_head.score_lowres"}[scope]  # fmt: skip
        out[f"{module}{'.norm' if kind else ''}.{TORCH_LEAF[leaf]}"] = torch_layout(value)
    return out


def torch_resnet(scope, kind, stem, body):
    if scope == "conv0":
        return f"{stem}bn1" if kind else f"{stem}conv1"
    m = re.fullmatch(r"group(\d)/block(\d+)/conv(\w+)", scope)
    if m is None:
        return None
    part = f"downsample.{1 if kind else 0}" if m[3] == "shortcut" else f"{'bn' if kind else 'conv'}{m[3]}"
    return f"{body}layer{int(m[1]) + 1}.{m[2]}.{part}"


def with_mask_background(name, value):
    """The mask predictor with a channel for the background, which the converter drops."""
    if name in ("maskrcnn/conv/W", "maskrcnn/conv/b"):
        return np.concatenate([np.full_like(value[..., :1], 7), value], -1)
    return value


def ratio_major(name, value):
    """RPN channels in the order (ratio, size) from (size, ratio)."""
    if re.fullmatch(r"rpn/(class|box)/[Wb]", name):
        per_anchor = 4 if "box" in name else 1
        count = value.shape[-1] // per_anchor
        order = [size * 3 + ratio for ratio in range(3) for size in range(count // 3)]
        return value[..., [a * per_anchor + k for a in order for k in range(per_anchor)]]
    return value


def to_maskrcnn_benchmark(variables):
    fpn = "fpn/lateral_1x1_c2/W" in variables
    gn_head = "fastrcnn/conv0/gn/gamma" in variables
    out = {}
    for name, value in variables.items():
        scope, kind, leaf = split(name)
        value = torch_layout(ratio_major(name, with_mask_background(name, value)))
        copies = []
        shared = scope.startswith("group3") and not fpn
        top = "roi_heads.box.feature_extractor.head." if shared else "backbone.body."
        module = torch_resnet(scope, kind, "backbone.body.stem.", top)
        if shared:
            copies = [module.replace("roi_heads.box", "roi_heads.mask")]
        if m := re.fullmatch(r"fpn/(lateral_1x1_c|posthoc_3x3_p)(\d)", scope):
            position = (".1" if kind else ".0") if f"{scope}/gn/gamma" in variables else ""
            module = f"backbone.fpn.fpn_{'inner' if m[1][0] == 'l' else 'layer'}{int(m[2]) - 1}{position}"
        elif m := re.fullmatch(r"rpn/(\w+)", scope):
            module = "rpn.head." + {"conv0": "conv", "class": "cls_logits", "box": "bbox_pred"}[m[1]]
        elif m := re.fullmatch(r"fastrcnn/(?:outputs/)?(class|box)", scope):
            module = f"roi_heads.box.predictor.{'cls_score' if m[1] == 'class' else 'bbox_pred'}"
        elif m := re.fullmatch(r"fastrcnn/conv(\d)", scope):
            step = 3 if gn_head else 2
            module = f"roi_heads.box.feature_extractor.xconvs.{int(m[1]) * step + (1 if kind else 0)}"
        elif m := re.fullmatch(r"fastrcnn/fc(\d?)", scope):
            module = f"roi_heads.box.feature_extractor.fc{m[1] or 6}"
        elif m := re.fullmatch(r"maskrcnn/fcn(\d)", scope):
            position = (".1" if kind else ".0") if f"{scope}/gn/gamma" in variables else ""
            module = f"roi_heads.mask.feature_extractor.mask_fcn{int(m[1]) + 1}{position}"
        elif scope == "maskrcnn/deconv":
            module = "roi_heads.mask.predictor.conv5_mask"
        elif scope == "maskrcnn/conv":
            module = "roi_heads.mask.predictor.mask_fcn_logits"
        elif m := re.fullmatch(r"keypointrcnn/conv(\d)", scope):
            module = f"roi_heads.keypoint.feature_extractor.conv_fcn{int(m[1]) + 1}"
        elif scope == "keypointrcnn/deconv":
            module = "roi_heads.keypoint.predictor.kps_score_lowres"
        for target in [module, *copies]:
            out[f"module.{target}.{TORCH_LEAF[leaf]}"] = value
    for level in range(5 if fpn else 1):
        out[f"module.rpn.anchor_generator.cell_anchors.{level}"] = np.array([[-8, -8, 8, 8]] * 3, np.float32)
    return out


def to_torchvision(variables, new_names):
    out = {}
    for name, value in variables.items():
        scope, kind, leaf = split(name)
        value = value[:, :, ::-1] if name == "conv0/W" else value
        value = torch_layout(with_mask_background(name, value))
        module = torch_resnet(scope, kind, "backbone.body.", "backbone.body.")
        if m := re.fullmatch(r"fpn/(lateral_1x1_c|posthoc_3x3_p)(\d)", scope):
            module = f"backbone.fpn.{'inner' if m[1][0] == 'l' else 'layer'}_blocks.{int(m[2]) - 2}{'.0' * new_names}"
        elif scope == "rpn/conv0":
            module = f"rpn.head.conv{'.0.0' * new_names}"
        elif m := re.fullmatch(r"maskrcnn/fcn(\d)", scope):
            module = f"roi_heads.mask_head.{m[1]}.0" if new_names else f"roi_heads.mask_head.mask_fcn{int(m[1]) + 1}"
        elif m := re.fullmatch(r"keypointrcnn/conv(\d)", scope):
            module = f"roi_heads.keypoint_head.{2 * int(m[1])}"
        elif module is None:
            module = {"rpn/class": "rpn.head.cls_logits", "rpn/box": "rpn.head.bbox_pred",
                      "fastrcnn/fc6": "roi_heads.box_head.fc6", "fastrcnn/fc7": "roi_heads.box_head.fc7",
                      "fastrcnn/outputs/class": "roi_heads.box_predictor.cls_score",
                      "fastrcnn/outputs/box": "roi_heads.box_predictor.bbox_pred",
                      "maskrcnn/deconv": "roi_heads.mask_predictor.conv5_mask",
                      "maskrcnn/conv": "roi_heads.mask_predictor.mask_fcn_logits",
                      "keypointrcnn/deconv": "roi_heads.keypoint_predictor.kps_score_lowres"}[scope]  # fmt: skip
        out[f"{module}.{TORCH_LEAF[leaf]}"] = value
    return out


def to_mmdetection(variables, classes):
    """Names of mmdetection 2 and 3; images stay BGR."""
    out = {}
    for name, value in variables.items():
        scope, kind, leaf = split(name)
        value = torch_layout(value if name.startswith("rpn") else background_last(name, value, classes))
        module = torch_resnet(scope, kind, "backbone.", "backbone.")
        if module:
            module = module.replace("bn", "gn") if kind == "gn" else module
        elif m := re.fullmatch(r"fpn/(lateral_1x1_c|posthoc_3x3_p)(\d)", scope):
            module = f"neck.{'lateral' if m[1][0] == 'l' else 'fpn'}_convs.{int(m[2]) - 2}.{kind or 'conv'}"
        elif m := re.fullmatch(r"rpn/(\w+)", scope):
            conv = f"conv.{m[1][-1]}.conv" if "rpn/conv1/W" in variables else "conv"
            module = f"rpn_head.rpn_{({'class': 'cls', 'box': 'reg'}).get(m[1], conv)}"
        elif m := re.fullmatch(
            r"(?:fastrcnn|cascade_rcnn_stage(\d))/(?:outputs|head)?/?(class|box|conv|fc)(\d?)", scope
        ):
            stage = f"{int(m[1]) - 1}." if m[1] else ""
            number = int(m[3] or 6) - 6 if m[2] == "fc" else m[3]
            part = {"class": "fc_cls", "box": "fc_reg", "conv": f"shared_convs.{number}.{kind or 'conv'}",
                    "fc": f"shared_fcs.{number}"}[m[2]]  # fmt: skip
            module = f"roi_head.bbox_head.{stage}{part}"
        elif m := re.fullmatch(r"maskrcnn/fcn(\d)", scope):
            module = f"roi_head.mask_head.convs.{m[1]}.{kind or 'conv'}"
        else:
            module = {"maskrcnn/deconv": "roi_head.mask_head.upsample",
                      "maskrcnn/conv": "roi_head.mask_head.conv_logits"}[scope]  # fmt: skip
        out[f"{module}.{TORCH_LEAF[leaf]}"] = value
    return out


def to_caffe2(variables):
    """Blobs of Detectron's model_final.pkl; batch norms as scale and shift."""
    fpn = "fpn/lateral_1x1_c2/W" in variables
    last = {"2": 2, "3": 3, "4": 5, "5": 2}  # ResNet-50's last block of each stage
    branches = {"1": "branch2a", "2": "branch2b", "3": "branch2c", "shortcut": "branch1"}
    out = {}
    for name, value in variables.items():
        scope, kind, leaf = split(name)
        if leaf in ("mean/EMA", "variance/EMA"):
            continue
        value = torch_layout(ratio_major(name, with_mask_background(name, value)))
        if kind == "bn":
            scale = variables[f"{scope}/bn/gamma"] / np.sqrt(variables[f"{scope}/bn/variance/EMA"] + np.float32(1e-5))
            value = scale if leaf == "gamma" else value - variables[f"{scope}/bn/mean/EMA"] * scale
        if m := re.fullmatch(r"group(\d)/block(\d+)/conv(\w+)", scope):
            blob = f"res{int(m[1]) + 2}_{m[2]}_{branches[m[3]]}"
        elif scope == "conv0":
            blob = "res_conv1" if kind == "bn" else "conv1"
        elif m := re.fullmatch(r"fpn/(lateral_1x1_c|posthoc_3x3_p)(\d)", scope):
            stage = f"res{m[2]}_{last[m[2]]}_sum"
            blob = f"fpn_{stage}" if m[1][0] == "p" else f"fpn_inner_{stage}{'' if m[2] == '5' else '_lateral'}"
        elif m := re.fullmatch(r"rpn/(\w+)", scope):
            blob = {"conv0": "conv_rpn", "class": "rpn_cls_logits", "box": "rpn_bbox_pred"}[m[1]] + "_fpn2" * fpn
        elif m := re.fullmatch(r"fastrcnn/(?:outputs/)?(class|box)", scope):
            blob = "cls_score" if m[1] == "class" else "bbox_pred"
        elif m := re.fullmatch(r"fastrcnn/(conv|fc)(\d?)", scope):
            blob = f"head_conv{int(m[2]) + 1}" if m[1] == "conv" else f"fc{m[2] or 6}"
        elif m := re.fullmatch(r"maskrcnn/fcn(\d)", scope):
            blob = f"_[mask]_fcn{int(m[1]) + 1}"
        elif m := re.fullmatch(r"keypointrcnn/conv(\d)", scope):
            blob = f"conv_fcn{int(m[1]) + 1}"
        else:
            blob = {"maskrcnn/deconv": "conv5_mask", "maskrcnn/conv": "mask_fcn_logits",
                    "keypointrcnn/deconv": "kps_score_lowres"}[scope]  # fmt: skip
        suffix = {"W": "w", "b": "b", "gamma": f"{kind}_s", "beta": f"{kind}_b"}[leaf]
        out[f"{blob}_{suffix}"] = value
    return out


def backbone_of(variables):
    return {name: value for name, value in variables.items() if name.startswith(("conv0/", "group"))}


def affine(variables):
    """Batch norms replaced by what they do: {scope: (scale, shift)} in float64 and the other variables."""
    rest, norms = {}, {}
    for name, value in variables.items():
        scope, kind, _ = split(name)
        if kind != "bn":
            rest[name] = value
            continue
        v = {leaf: variables[f"{scope}/bn/{leaf}"].astype(np.float64) for leaf in ("gamma", "beta", "mean/EMA")}
        scale = v["gamma"] / np.sqrt(variables[f"{scope}/bn/variance/EMA"].astype(np.float64) + 1e-5)
        norms[scope] = scale, v["beta"] - v["mean/EMA"] * scale
    return rest, norms


# ------------------------------------------------------------------------------------------------------------ systems
@pytest.mark.parametrize("kind", list(MODELS))
def test_expected_shapes_are_those_of_the_graphs_variables(kind):
    expected, optional = expected_shapes(settings_of(kind).to_dict())
    assert expected == graph_shapes((*NARROW, *MODELS[kind], "DATA.NUM_CATEGORY=6")) and not optional


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_other_anchors_than_the_settings_describe_are_refused_until_they_are_given(tmp_path, kind):
    """Else the result would be a file that no graph takes."""
    variables = dict(model(kind, 6))
    for name in ("class", "box"):
        for leaf in ("W", "b"):
            value = variables[f"rpn/{name}/{leaf}"]
            variables[f"rpn/{name}/{leaf}"] = np.concatenate([value, value[..., : value.shape[-1] // 3]], -1)
    save_zip(tmp_path / "a.pth", {"model": tensors(to_detectron2(variables, 6))})
    with pytest.raises(UserError, match=r"rpn/class/W .* RPN.ANCHOR_RATIOS.*not supported"):
        convert(tmp_path / "a.pth")
    got, settings, _ = convert(tmp_path / "a.pth", ["RPN.ANCHOR_RATIOS=[0.5,1.0,2.0,3.0]"])
    assert settings["RPN.ANCHOR_RATIOS"] == [0.5, 1.0, 2.0, 3.0] and got["rpn/class/b"].size in (4, 20)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "tensorpack_gn"])
@pytest.mark.parametrize("classes", [1, 6])
def test_detectron2_comes_back_unchanged(tmp_path, kind, classes):
    if kind.startswith("agnostic") and classes == 1:
        pytest.skip("with one class both kinds of box and mask look alike and are taken for the class-specific ones")
    want = model(kind, classes)
    state = to_detectron2(want, classes)
    cells = [[-8, -8, 8, 8]] * (15 if kind.endswith("c4") else 3)
    state["proposal_generator.anchor_generator.cell_anchors.0"] = np.array(cells, np.float32)
    save_zip(tmp_path / "a.pth", {"model": tensors(state), "iteration": 9})
    settings, report = check(tmp_path / "a.pth", kind, classes, len(state))
    caffe_like = kind not in ("gn", "resnext")
    assert settings["BACKBONE.STRIDE_1X1"] is (caffe_like and not kind.startswith("basic"))
    assert settings["PREPROC.PIXEL_STD"] == ([1.0, 1.0, 1.0] if caffe_like else [58.395, 57.12, 57.375])
    assert settings.get("FRCNN.CLASS_AGNOSTIC", False) is (kind == "agnostic")


@pytest.mark.parametrize("stored", [[], ["pixel_mean"], ["pixel_mean", "pixel_std"]])
def test_a_normalisation_that_is_guessed_is_called_a_guess(tmp_path, stored):
    state = {**to_detectron2(model("fpn", 6), 6), **{name: np.full([3, 1, 1], 50, np.float32) for name in stored}}
    save_zip(tmp_path / "a.pth", tensors(state))
    settings, report = check(tmp_path / "a.pth", "fpn", 6, len(state))
    guesses = [note for note in report.notes if note.startswith("a guess: ")]
    assert len(guesses) == (len(stored) < 2)
    for name in ("pixel_mean", "pixel_std"):
        assert any(f"PREPROC.{name.upper()}=" in note for note in guesses) == (name not in stored)
    assert (settings["PREPROC.PIXEL_STD"] == [50, 50, 50]) == (len(stored) == 2)


def test_detectron2_pickle_states_its_normalisation(tmp_path):
    want = model("fpn", 6)
    state = to_detectron2(want, 6)
    state["pixel_mean"] = np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1)
    state["pixel_std"] = np.array([57.375, 57.12, 58.395], np.float32).reshape(3, 1, 1)
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "third party"}))
    save_pickled_tensors(tmp_path / "tensors.pkl", {"model": tensors(state)})
    for file in ("arrays.pkl", "tensors.pkl"):
        settings, _ = check(tmp_path / file, "fpn", 6, len(state))
        assert settings["PREPROC.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
        assert settings["PREPROC.PIXEL_STD"] == [58.395, 57.12, 57.375]
        assert settings["BACKBONE.STRIDE_1X1"] is False
    assert convert(tmp_path / "arrays.pkl", ["BACKBONE.STRIDE_1X1=True"])[1]["BACKBONE.STRIDE_1X1"] is True


def test_detectron2_imagenet_backbone_from_torchvision_has_its_channels_turned(tmp_path):
    want = backbone_of(model("fpn", 6))
    state = {
        re.sub(r"^(backbone|roi_heads)\.(bottom_up\.)?", "", name): value
        for name, value in to_detectron2(want, 6).items()
    }
    state["stem.conv1.weight"] = state["stem.conv1.weight"][:, ::-1]
    state["linear.weight"], state["linear.bias"] = np.ones((10, 512), np.float32), np.ones(10, np.float32)
    content = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    variables, settings, report = convert(tmp_path / "R-50.pkl")
    assert variables.pop("linear/W").shape == (512, 10) and variables.pop("linear/b").size == 10
    same_variables(variables, want)
    assert settings["BACKBONE.STRIDE_1X1"] is False and not report.missing and "MODE_FPN" not in settings


@pytest.mark.parametrize("kind", ["fpn", "c4", "gn", "keypoint", "faster"])
def test_maskrcnn_benchmark_comes_back_unchanged(tmp_path, kind):
    want = model(kind, 6)
    state = to_maskrcnn_benchmark(want)
    save_stream(
        tmp_path / "model.pth", {"model": tensors(state), "optimizer": {"state": {}, "lr": 0.02}, "iteration": 5}
    )
    settings, _ = check(tmp_path / "model.pth", kind, 6, len(state))
    assert settings["BACKBONE.STRIDE_1X1"] is (kind != "gn")
    assert settings["BACKBONE.BN_EPSILON"] == 0.0
    assert settings["PREPROC.PIXEL_MEAN"] == [122.7717, 115.9465, 102.9801]
    assert settings["FRCNN.ROI_ALIGNED"] is False and settings["FRCNN.ROI_TO_LAST_PIXEL"] is True
    assert [len(level) for level in settings["RPN.CELL_ANCHORS"]] == ([15] if kind == "c4" else [3] * 5)
    assert settings.get("FRCNN.ROI_SAMPLES") == (0 if kind == "c4" else None)


@pytest.mark.parametrize("kind", ["fpn", "faster", "keypoint", "basic"])
@pytest.mark.parametrize("new_names", [False, True])
def test_torchvision_detection_comes_back_unchanged(tmp_path, kind, new_names):
    classes = 1 if kind == "keypoint" else 6
    state = to_torchvision(model(kind, classes), new_names)
    (save_zip if new_names else save_stream)(tmp_path / "a.pth", tensors(state))
    settings, _ = check(tmp_path / "a.pth", kind, classes, len(state))
    assert settings["BACKBONE.STRIDE_1X1"] is False
    assert settings["PREPROC.PIXEL_STD"] == [58.395, 57.12, 57.375]
    # Published keypoint weights have two classes.
    assert settings["BACKBONE.BN_EPSILON"] == (0.0 if kind == "keypoint" else 1e-5)


MMDETECTION = """
img_norm_cfg = dict(
    mean=[{mean}], std=[{std}], to_rgb={rgb})
model = dict(type='CascadeRCNN', backbone=dict(type='ResNet', norm_eval=True, style='{style}'),
    rpn_head=dict(bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0])),
    roi_head=dict(bbox_head=[dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])),
        dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1])),
        dict(bbox_coder=dict(target_stds=[0.04, 0.04, 0.08, 0.08]))]))
"""
RGB = {"mean": "123.675, 116.28, 103.53", "std": "58.395, 57.12, 57.375", "rgb": True, "style": "pytorch"}
BGR = {"mean": "103.53, 116.28, 123.675", "std": "1.0, 1.0, 1.0", "rgb": False, "style": "caffe"}


def cascade_without_masks():
    return {name: value for name, value in model("cascade", 6).items() if not name.startswith("maskrcnn")}


@pytest.mark.parametrize("style", [RGB, BGR], ids=["pytorch", "caffe"])
@pytest.mark.parametrize("kind", ["fpn", "faster", "gn", "basic", "agnostic", "two_convolutions", "rpn"])
def test_mmdetection_comes_back_unchanged(tmp_path, kind, style):
    state = to_mmdetection(model(kind, 6), 6)
    if style["rgb"]:
        state["backbone.conv1.weight"] = state["backbone.conv1.weight"][:, ::-1]
    meta = {"config": MMDETECTION.format(**style), "CLASSES": tuple("abcdef"), "epoch": 12}
    save_zip(tmp_path / "a.pth", {"meta": meta, "state_dict": tensors(state), "optimizer": {"lr": 0.02}})
    settings, report = check(tmp_path / "a.pth", kind, 6, len(state))
    assert settings["PREPROC.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert settings["PREPROC.PIXEL_STD"] == ([58.395, 57.12, 57.375] if style["rgb"] else [1.0, 1.0, 1.0])
    assert settings["BACKBONE.STRIDE_1X1"] is (not style["rgb"] and kind != "basic")
    assert settings["FRCNN.ROI_SAMPLES"] == 0 and settings.get("FRCNN.ROI_ALIGNED", True)
    assert kind == "rpn" or report.class_names == list("abcdef")


@pytest.mark.parametrize("with_config", [True, False])
def test_mmdetection_cascade_has_its_own_box_coding(tmp_path, with_config):
    want = cascade_without_masks()
    content = {"state_dict": tensors(to_mmdetection(want, 6))}
    if with_config:
        content["meta"] = {"cfg": MMDETECTION.format(**BGR), "dataset_meta": {"classes": list("abcdef")}}
    save_zip(tmp_path / "a.pth", content)
    variables, settings, report = convert(tmp_path / "a.pth", ["BACKBONE.STRIDE_1X1=False"])
    assert not report.unused and not report.missing
    last = [25.0, 25.0, 12.5, 12.5] if with_config else [30.303, 30.303, 14.9254, 14.9254]
    assert settings["CASCADE.BBOX_REG_WEIGHTS"] == [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], last]
    assert settings["FPN.CASCADE"] is True and settings["MODE_MASK"] is False
    assert report.class_names == (list("abcdef") if with_config else [])


@pytest.mark.parametrize("style", [RGB, BGR], ids=["pytorch", "caffe"])
def test_mmdetection_style_is_guessed_from_the_stem_without_a_configuration(tmp_path, style):
    """The variance of a stem's output, per kernel energy, is that of its inputs: 1, or 57^2 where images keep the scale
    of pixels."""
    state = to_mmdetection(model("faster", 6), 6)
    energy = np.square(state["backbone.conv1.weight"]).sum((1, 2, 3))
    state["backbone.bn1.running_var"] = energy * (0.5 if style["rgb"] else 0.5 * 57**2)
    save_zip(tmp_path / "a.pth", {"state_dict": tensors(state)})
    variables, settings, report = convert(tmp_path / "a.pth")
    assert settings["PREPROC.PIXEL_STD"] == ([58.395, 57.12, 57.375] if style["rgb"] else [1.0, 1.0, 1.0])
    assert settings["BACKBONE.STRIDE_1X1"] is not style["rgb"]
    turn = slice(None, None, -1 if style["rgb"] else 1)
    np.testing.assert_array_equal(variables["conv0/W"], model("faster", 6)["conv0/W"][:, :, turn])
    assert any(note.startswith("a guess") for note in report.notes)


def test_torchvision_coco_ids_and_their_reduction(tmp_path):
    want = model("fpn", 90)
    save_zip(tmp_path / "a.pth", tensors(to_torchvision(want, True)))
    settings, report = check(tmp_path / "a.pth", "fpn", 90, len(to_torchvision(want, True)))
    assert settings["BACKBONE.BN_EPSILON"] == 0.0
    assert report.class_names[0] == "person" and report.class_names[89] == "toothbrush"
    assert report.class_names[11] == "unused 12" and report.class_names[12] == "stop sign"
    variables, settings, report = convert(tmp_path / "a.pth", drop_unused_classes=True)
    assert settings["DATA.NUM_CATEGORY"] == 80 and len(report.class_names) == len(report.category_ids) == 80
    assert dict(zip(report.class_names, report.category_ids))["toothbrush"] == 90
    stop_sign = report.class_names.index("stop sign")
    for name, per_class, shift in (("class", 1, 1), ("box", 4, 1)):
        got, all_ids = variables[f"fastrcnn/outputs/{name}/b"], want[f"fastrcnn/outputs/{name}/b"]
        assert got.size == 81 * per_class
        np.testing.assert_array_equal(got.reshape(81, per_class)[stop_sign + shift], all_ids.reshape(91, per_class)[13])
    np.testing.assert_array_equal(variables["maskrcnn/conv/W"][..., stop_sign], want["maskrcnn/conv/W"][..., 12])


def test_rgb_network_computes_the_same_on_bgr_images(tmp_path):
    want = backbone_of(model("resnext", 6))
    rng = np.random.default_rng(3)
    state = {}
    for name, value in want.items():
        scope, kind, leaf = split(name)
        state[f"{torch_resnet(scope, kind, '', '')}.{TORCH_LEAF[leaf]}"] = torch_layout(value)
        if leaf == "mean/EMA":
            state[f"{torch_resnet(scope, kind, '', '')}.num_batches_tracked"] = np.array(7)
    state["fc.weight"], state["fc.bias"] = np.ones((1000, 8), np.float32), np.ones(1000, np.float32)
    save_stream(tmp_path / "resnext.pth", tensors(state))
    variables, settings, report = convert(tmp_path / "resnext.pth")
    assert set(variables) == set(want) | {"linear/W", "linear/b"} and not report.unused and not report.missing
    assert settings["BACKBONE.NUM_GROUPS"] == 4 and settings["BACKBONE.RESNET_NUM_BLOCK"] == [3, 4, 6, 3]
    bgr = rng.integers(0, 256, (7, 7, 3)).astype(np.float64)
    theirs = (bgr[..., ::-1] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    ours = (bgr - settings["PREPROC.PIXEL_MEAN"][::-1]) / settings["PREPROC.PIXEL_STD"][::-1]
    np.testing.assert_allclose(
        np.einsum("hwc,hwco->o", ours, variables["conv0/W"]), np.einsum("hwc,ochw->o", theirs, state["conv1.weight"]),
        rtol=1e-4, atol=1e-3,
    )  # fmt: skip


RECORDED_CFG = """
FAST_RCNN:
  ROI_XFORM_SAMPLING_RATIO: 2
RESNETS:
  STRIDE_1X1: false
"""


@pytest.mark.parametrize("kind", ["fpn", "c4", "gn", "keypoint", "faster"])
def test_detectron_comes_back_with_equal_arithmetic(tmp_path, kind):
    want = model(kind, 6)
    blobs = to_caffe2(want)
    extra = {"conv1_w_momentum": blobs["conv1_w"], "kps_score_w": np.ones((17, 17, 4, 4), np.float32)}
    if kind != "gn":
        extra["conv1_b"] = np.zeros(16, np.float32)
    content = {"blobs": {**blobs, **extra}, "cfg": RECORDED_CFG}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content, protocol=2))
    variables, settings, report = convert(tmp_path / "model_final.pkl")
    assert not report.unused and not report.missing and sorted(n for n, _ in report.ignored) == sorted(extra)
    assert sorted(variables) == sorted(want) and sorted(report.mapped) == sorted(blobs)
    (got_rest, got_norms), (want_rest, want_norms) = affine(variables), affine(want)
    same_variables(got_rest, want_rest)
    for scope, (scale, shift) in want_norms.items():
        np.testing.assert_allclose(got_norms[scope][0], scale, rtol=1e-5)
        np.testing.assert_allclose(got_norms[scope][1], shift, rtol=1e-4, atol=1e-5)
        # In float32, as the graph computes it, the stand-in for "no normalisation" is exact.
        variance = variables[f"{scope}/bn/variance/EMA"]
        assert (variance + np.float32(1e-5) == 1).all()
    assert settings["BACKBONE.STRIDE_1X1"] is False and settings["FRCNN.ROI_SAMPLES"] == 2
    del content["cfg"]
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(content))
    settings = convert(tmp_path / "b.pkl")[1]
    assert settings["BACKBONE.STRIDE_1X1"] is (kind != "gn")
    assert settings.get("FRCNN.ROI_SAMPLES") == (0 if kind == "c4" else None)


def test_detectron_agnostic_boxes_keep_the_foreground_group(tmp_path):
    want = model("agnostic", 6)
    blobs = to_caffe2(want)
    for name in ("bbox_pred_w", "bbox_pred_b"):
        blobs[name] = np.concatenate([np.full_like(blobs[name], 5), blobs[name]])
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    variables, settings, _ = convert(tmp_path / "a.pkl")
    assert settings["FRCNN.CLASS_AGNOSTIC"] is True
    np.testing.assert_array_equal(variables["fastrcnn/outputs/box/W"], want["fastrcnn/outputs/box/W"])


def test_keras_resnet_has_equal_arithmetic(tmp_path):
    h5py = pytest.importorskip("h5py")
    want = backbone_of(model("fpn", 6))
    rng = np.random.default_rng(5)
    biases = {}
    with h5py.File(tmp_path / "resnet50_notop.h5", "w") as f:
        for name, value in want.items():
            scope, kind, leaf = split(name)
            m = re.fullmatch(r"group(\d)/block(\d+)/conv(\w+)", scope)
            number = {"shortcut": 0}.get(m[3], m[3]) if m else ""
            layer = f"conv{int(m[1]) + 2}_block{int(m[2]) + 1}_{number}" if m else "conv1"
            layer += "_bn" if kind else "_conv"
            weight = {"W": "kernel", "mean/EMA": "moving_mean", "variance/EMA": "moving_variance"}.get(leaf, leaf)
            f[f"{layer}/{layer}/{weight}:0"] = value
            if leaf == "W":
                biases[scope] = rng.standard_normal(value.shape[3]).astype(np.float32)
                f[f"{layer}/{layer}/bias:0"] = biases[scope]
    variables, settings, report = convert(tmp_path / "resnet50_notop.h5")
    assert sorted(variables) == sorted(want) and not report.unused and not report.missing
    assert len(report.mapped) == len(want) + len(biases)
    assert settings["BACKBONE.STRIDE_1X1"] is True and settings["PREPROC.PIXEL_STD"] == [1.0, 1.0, 1.0]
    assert settings["PREPROC.PIXEL_MEAN"] == [123.68, 116.779, 103.939]
    _, norms = affine(variables)
    for scope, bias in biases.items():
        v = {k: want[f"{scope}/bn/{k}"].astype(np.float64) for k in ("gamma", "beta", "mean/EMA", "variance/EMA")}
        scale = v["gamma"] / np.sqrt(v["variance/EMA"] + 1.001e-5)
        np.testing.assert_allclose(norms[scope][0], scale, rtol=1e-6)
        np.testing.assert_allclose(norms[scope][1], v["beta"] + (bias - v["mean/EMA"]) * scale, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(variables[f"{scope}/W"], want[f"{scope}/W"])


@pytest.mark.parametrize("kind", ["fpn", "c4", "cascade", "basic", "basic_c4"])
@pytest.mark.parametrize("suffix", ["", ":0"])
def test_tensorpack_models_pass_through(tmp_path, kind, suffix):
    want = model(kind, 6)
    stored = {f"{name}{suffix}": value for name, value in want.items()}
    stored[f"global_step{suffix}"] = np.array(9)
    stored[f"conv0/W/Momentum{suffix}"] = want["conv0/W"]
    np.savez(tmp_path / "COCO-R50.npz", **stored)
    settings, report = check(tmp_path / "COCO-R50.npz", kind, 6, len(stored))
    assert [why for _, why in report.ignored] == ["state of a training run"] * 2
    assert settings["BACKBONE.STRIDE_1X1"] is False and settings["BACKBONE.TF_PAD_MODE"] is False


@pytest.mark.parametrize("name, tf_padding", [("ImageNet-R50-AlignPadding.npz", False), ("ImageNet-R50-Pad.npz", True)])
def test_tensorpack_imagenet_padding_is_told_by_the_file_name(tmp_path, name, tf_padding):
    want = backbone_of(model("fpn", 6))
    np.savez(tmp_path / name, **want, **{"linear/W": np.ones((8, 10)), "linear/b": np.ones(10)})
    variables, settings, report = convert(tmp_path / name)
    assert settings["BACKBONE.TF_PAD_MODE"] is tf_padding and not report.unused and not report.missing
    same_variables({k: v for k, v in variables.items() if "linear" not in k}, want)


@pytest.mark.parametrize("kind", ["gn", "tensorpack_gn"])
def test_tensorpack_group_norm_models_pass_through_with_their_order_of_bias_relu_and_norm(tmp_path, kind):
    want = model(kind, 6)
    stored = {}
    for name, value in want.items():
        name = re.sub(
            r"^fpn/lateral_1x1_c(\d)/gn/", r"fpn/gn_c\1/", re.sub(r"^fpn/posthoc_3x3_p(\d)/gn", r"fpn/gn_p\1", name)
        )
        name = re.sub(r"^(fastrcnn|maskrcnn|cascade_rcnn_stage\d/head)/(?:conv|fcn)(\d)/gn/", r"\1/gn\2/", name)
        stored[name] = value
    assert sum("/gn/" in name for name in stored) == sum("/gn/" in name for name in backbone_of(want))
    np.savez(tmp_path / "gn.npz", **stored)
    settings, _ = check(tmp_path / "gn.npz", kind, 6, len(stored))
    assert settings["FPN.GN_AFTER_RELU"] is (kind == "tensorpack_gn")


@pytest.mark.quick
def test_legacy_anchors_equal_the_published_table():
    # Faster R-CNN's nine anchors (inclusive last pixel), ratios outermost
    table = [[-84, -40, 99, 55], [-176, -88, 191, 103], [-360, -184, 375, 199], [-56, -56, 71, 71],
             [-120, -120, 135, 135], [-248, -248, 263, 263], [-36, -80, 51, 95], [-80, -168, 95, 183],
             [-168, -344, 183, 359]]  # fmt: skip
    want = (np.array(table).reshape(3, 3, 4) + [0, 0, 1, 1]).swapaxes(0, 1).reshape(-1, 4)
    np.testing.assert_array_equal(legacy_cell_anchors(16, [128, 256, 512]), want)


# -------------------------------------------------------------------------------------------------- what goes wrong
def test_half_precision_weights_become_float32(tmp_path):
    want = {name: value.astype(np.float16) for name, value in model("faster", 6).items()}
    state = OrderedDict((k, Tensor(v)) for k, v in to_detectron2(want, 6).items())
    save_zip(tmp_path / "half.pth", state)
    same_variables(convert(tmp_path / "half.pth")[0], {k: v.astype(np.float32) for k, v in want.items()})


def test_unused_and_missing_tensors_stop_the_command_unless_allowed(tmp_path, capsys):
    state = to_detectron2(model("faster", 6), 6)
    state["backbone.bottom_up.res3.0.conv4.weight"] = np.ones((18, 8, 3, 3), np.float32)
    del state["roi_heads.box_head.fc2.bias"]
    save_zip(tmp_path / "a.pth", {"model": tensors(state)})
    command = [str(tmp_path / "a.pth"), str(tmp_path / "out.npz")]
    assert main(command) == 3
    printed = capsys.readouterr()
    assert "res3.0.conv4" in printed.out and "fastrcnn/fc7/b" in printed.out
    # The result would be another model, so the message does not lead there.
    assert "another model" in printed.err and "--allow" not in printed.out + printed.err
    assert main([*command, "--allow-unused"]) == 3 and main([*command, "--allow-missing"]) == 3
    assert not (tmp_path / "out.npz").exists()
    assert main([*command, "--allow-unused", "--allow-missing"]) == 0
    assert (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    "name, what",
    [
        ("head.classification_head.cls_logits.weight", "one-stage"),  # torchvision's RetinaNet
        ("backbone.body.0.0.weight", "MobileNet"),
        ("backbone.bottom_up.res3.0.conv2_offset.weight", "deformable"),
        ("backbone.net.blocks.0.attn.qkv.weight", "transformer"),
        ("roi_heads.mask_head.point_head.fc1.weight", "PointRend"),
        ("neck.pafpn_convs.0.conv.weight", "PAFPN"),
        ("roi_head.shared_head.layer4.0.conv1.weight", "C4 model"),
        ("roi_head.mask_head.0.convs.0.conv.weight", "mask head for each stage"),
        ("bbox_head.fc_cls.weight", "mmdetection 1"),
    ],
)
def test_models_that_are_not_supported_are_named(tmp_path, name, what):
    state = {"backbone.body.conv1.weight": np.ones((64, 3, 7, 7), np.float32), name: np.ones((1, 1), np.float32)}
    save_zip(tmp_path / "a.pth", tensors(state))
    with pytest.raises(UserError, match=f"{what}.*not supported"):
        convert(tmp_path / "a.pth")


def test_detectron2_models_of_a_dilated_last_stage_are_named(tmp_path):
    state = {n: v for n, v in to_detectron2(model("faster", 6), 6).items() if "fpn_" not in n}
    save_zip(tmp_path / "a.pth", tensors(state))
    with pytest.raises(UserError, match="DC5"):
        convert(tmp_path / "a.pth")


def test_batch_norms_of_pyramid_and_heads_are_folded_into_their_convolutions(tmp_path):
    """Also detectron2 has such models, those trained from scratch with large-scale jitter."""
    want = dict(model("two_convolutions", 6))
    rng = np.random.default_rng(1)
    state = to_detectron2(want, 6)
    norms = {}
    for scope, module in [
        ("fpn/lateral_1x1_c3", "backbone.fpn_lateral3"),
        ("fpn/posthoc_3x3_p2", "backbone.fpn_output2"),
    ]:
        del state[f"{module}.bias"]
        gamma, beta, mean, variance = rng.uniform(0.5, 2, (4, 32)).astype(np.float32)
        norms |= dict(zip([f"{module}.norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")],
                          (gamma, beta, mean, variance)))  # fmt: skip
        factor = gamma / np.sqrt(variance + np.float64(1e-5))
        want[f"{scope}/W"] = want[f"{scope}/W"] * factor
        want[f"{scope}/b"] = beta - mean * factor
    state |= norms
    save_zip(tmp_path / "a.pth", {"model": tensors(state)})
    variables, settings, report = convert(tmp_path / "a.pth")
    same_variables(variables, want, rtol=1e-6, atol=0)
    assert not report.unused and not report.missing and len(report.mapped) == len(state)
    assert settings["RPN.NUM_CONVS"] == 2 and settings["FPN.NORM"] is None
    # A norm without its variance cannot be folded.
    del state["backbone.fpn_lateral3.norm.running_var"]
    save_zip(tmp_path / "b.pth", {"model": tensors(state)})
    report = convert(tmp_path / "b.pth")[2]
    assert "backbone.fpn_lateral3.norm.weight" in report.unused and "fpn/lateral_1x1_c3/b" in report.missing


def test_command_stores_settings_and_classes_that_a_run_can_apply(tmp_path, capsys):
    want = model("cascade", 6)
    save_zip(tmp_path / "a.pth", {"model": tensors(to_detectron2(want, 6))})
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    arguments = ["--class-names", str(tmp_path / "names.txt"), "--config", "BACKBONE.STRIDE_1X1=False"]
    assert main([str(tmp_path / "a.pth"), str(tmp_path / "out.npz"), *arguments]) == 0
    assert "FPN.CASCADE=True" in capsys.readouterr().out
    variables, meta = load_weights(tmp_path / "out.npz")
    same_variables(variables, want)
    assert meta["class_names"] == list("abcdef") and meta["source"] == {"file": "a.pth", "system": "detectron2"}
    cfg = default_config().update_from_dict(meta["settings"], "test")
    assert cfg.BACKBONE.STRIDE_1X1 is False and cfg.FPN.CASCADE is True and cfg.DATA.NUM_CATEGORY == 6
    # What was converted once is native, and passes through with its settings.
    again, settings, report = convert(tmp_path / "out.npz", class_names=list("abcdef"))
    same_variables(again, want)
    assert settings == meta["settings"] and not report.unused and not report.missing


@pytest.mark.quick
def test_unusable_files_are_one_line_errors(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    def grouped_basic_blocks():
        shapes = {"conv1": (16, 3, 7, 7), "layer1.0.conv1": (16, 16, 3, 3), "layer1.0.conv2": (16, 8, 3, 3)}
        return {f"{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    (tmp_path / "basic.pkl").write_bytes(pickle.dumps(grouped_basic_blocks()))
    (tmp_path / "other.pkl").write_bytes(pickle.dumps({"encoder.weight": np.ones(3)}))
    (tmp_path / "number.pkl").write_bytes(pickle.dumps(3))
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
    cases = {"evil.pkl": "is refused", "basic.pkl": "basic blocks with groups", "other.pkl": "no known system",
             "number.pkl": "no dictionary of tensors", "broken.h5": "HDF5", "absent.pth": "does not exist"}  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as e:
            convert(tmp_path / name)
        assert name in str(e.value) and "\n" not in str(e.value)
        assert main([str(tmp_path / name)]) == 2
    assert not (tmp_path / "executed").exists()


def test_wrong_number_of_class_names_is_an_error(tmp_path):
    save_zip(tmp_path / "a.pth", tensors(to_detectron2(model("faster", 6), 6)))
    with pytest.raises(UserError, match="has 6 classes, --class-names gives 2"):
        convert(tmp_path / "a.pth", class_names=["a", "b"])


# -------------------------------------------------------------------------------------------------------- real files
@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no recorded models in {GOLDEN} (set GOLDEN)")
@pytest.mark.parametrize(
    "name",
    ["frcnn_r50_fpn", "mask_r50_fpn", "mask_r50_c4", "cascade_mask_r50_fpn", "mask_r50_fpn_gn", "keypoint_r50_fpn",
     "mask_x50_32x4d_fpn"],
)  # fmt: skip
def test_recorded_models_use_every_tensor_once_and_lose_nothing(name):
    with np.load(GOLDEN / f"{name}.weights.npz") as recorded:
        state = {key: recorded[key] for key in recorded.files}
    variables, settings, report = convert(GOLDEN / f"{name}.weights.npz")
    assert sorted(report.mapped) == sorted(state) and not report.ignored and not report.unused and not report.missing
    back = to_detectron2(variables, settings["DATA.NUM_CATEGORY"])
    assert sorted(back) == sorted(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no recorded models in {GOLDEN} (set GOLDEN)")
def test_recorded_files_of_all_containers_agree():
    want, _, _ = convert(GOLDEN / "mask_r50_fpn.weights.npz")
    for ending in ("pkl", "pth"):
        variables, _, report = convert(GOLDEN / f"mask_r50_fpn.{ending}")
        same_variables(variables, want)
        assert len(report.mapped) == 307
