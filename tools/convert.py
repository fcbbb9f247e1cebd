"""Converts weights of other detection systems and ImageNet models into this project's .npz.

    python tools/convert.py model_final.pkl weights.npz
    python train.py --predict image.jpg --load weights.npz

The system is recognised by the names inside the file, whatever the file is called: tensorpack (R-CNN and ImageNet
.npz), detectron2 (.pkl, .pth), Detectron/Caffe2 (.pkl), maskrcnn-benchmark and mmdetection (.pth), torchvision
(detection and ImageNet .pth), EfficientNet-Lite (ImageNet .pth of efficientnet_lite_pytorch or timm), Keras
applications (.h5). Every tensor of the file must be used and every tensor of the model must be found; otherwise nothing
is written and the exit code is 3. The settings that the model needs are derived from the tensors, printed, and stored
in the .npz, so that --load applies them. --to is the way back.
"""

import import_path

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from common import UserError, check_output_file, errors_in_one_line, logger, path_argument, read_json, read_text
from config import default_config
from config_files import settings_words
from tools.convert_back import ENDINGS, write_back
from utils.checkpoint import (
    is_tf_checkpoint,
    is_training_state,
    load_npz,
    load_weights,
    make_meta,
    native_names,
    save_npz,
)
from utils.efficientnet_lite import NETWORKS, from_torch, is_torch, variable_shapes
from utils.safe_pickle import read_pickle
from utils.weight_files import check_tensor_name, file_kind, is_number_type, one_line, read_hdf5, refuse_url

__all__ = ["convert", "Report", "expected_shapes", "legacy_cell_anchors"]

_BN_EPSILON = 1e-5  # of this project's batch norms unless BACKBONE.BN_EPSILON is set
_GAPS_IN_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # numbers among 1..90 that are not COCO category ids
# fmt: off
_COCO_NAMES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
]
# fmt: on

_NORM_LEAVES = {"weight": "gamma", "bias": "beta", "running_mean": "mean/EMA", "running_var": "variance/EMA"}


@dataclass
class Report:
    """The result for each tensor of the file."""

    system: str = ""
    mapped: dict[str, str] = field(default_factory=dict)  # name in the file -> name here
    ignored: list[tuple[str, str]] = field(default_factory=list)  # (name in the file, why it carries no weights)
    unused: list[str] = field(default_factory=list)  # names in the file that the model does not use
    missing: list[str] = field(default_factory=list)  # names here that the model needs, missing from the file
    notes: list[str] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)  # of the classes in their data set; [] = not known

    def table(self, verbose: bool = False) -> str:
        rows = [["mapped", len(self.mapped), ""]]
        reasons: dict[str, list[str]] = {}
        for name, why in self.ignored:
            reasons.setdefault(why, []).append(name)
        rows += [["ignored", len(names), f"{why}: {_some(names, 2)}"] for why, names in reasons.items()]
        rows.append(["unused", len(self.unused), _some(self.unused, 8)])
        rows.append(["missing", len(self.missing), _some(self.missing, 8)])
        text = tabulate(rows, headers=[self.system, "tensors", ""], tablefmt="simple")
        if verbose:
            text += "\n" + "\n".join(f"  {old} -> {new}" for old, new in self.mapped.items())
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])


def convert(
    path: str | os.PathLike,
    overrides: Iterable[str] = (),
    class_names: list[str] | None = None,
    drop_unused_classes: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, Any], Report]:
    """Reads a weights file -> (variables under this project's names, float32; flat settings that the model needs;
    report).

    overrides: KEY=VAL strings that win over the derived settings, e.g. for the stride position, which tensors do not
    show. drop_unused_classes: of torchvision's 90 COCO ids keep the 80 that are categories.
    """
    tensors, facts = _read(Path(path))
    report = Report()
    system, translate = _recognise(tensors, facts, Path(path))
    report.system = system
    with one_line(path, f"a model of {system}"):  # tensors with the right names may still have wrong shapes
        variables, settings = translate(tensors, facts, report)
        if settings.get("BACKBONE.NAME") not in NETWORKS:
            _fold_batch_norms(variables, report)
            _check_known_structure(variables, path)
            settings = {**_derive_settings(variables), **settings}
        if sum(settings.get("BACKBONE.RESNET_NUM_BLOCK", ())) > len(variables):
            raise UserError(f"{path}: its settings describe more blocks than it has tensors; leave out its settings")
    if settings.get("BACKBONE.BLOCK") == "basic":  # basic blocks have no 1x1 convolution
        settings["BACKBONE.STRIDE_1X1"] = False
    classes = settings.get("DATA.NUM_CATEGORY", 0)
    stored = report.class_names if len(report.class_names) == classes else []
    names = (stored or _default_class_names(system, classes, report)) if class_names is None else class_names
    as_coco = class_names is None and stored in ([], _COCO_NAMES)
    report.category_ids = _coco_ids(system, classes) if as_coco or drop_unused_classes else []
    if drop_unused_classes:
        report.category_ids = [i for i in report.category_ids if i not in _GAPS_IN_COCO_IDS]
        names = _drop_gaps(variables, settings, names, path)
    if names and len(names) != settings.get("DATA.NUM_CATEGORY", 0):
        raise UserError(
            f"{path} has {settings.get('DATA.NUM_CATEGORY', 0)} classes, --class-names gives {len(names)}; correct it"
        )
    report.class_names = list(names)
    known = _known_settings(settings, overrides, report)
    # Files may store only the settings that differ from the defaults.
    complete = {**default_config().to_dict(), **known} if "MODE_FPN" in settings else settings
    expected, optional = expected_shapes(complete)
    report.missing = sorted(set(expected) - set(variables))
    homeless = set(variables) - set(expected) - optional
    report.unused += [old for old, new in report.mapped.items() if new in homeless]
    report.mapped = {old: new for old, new in report.mapped.items() if new not in homeless}
    variables = {
        name: np.ascontiguousarray(value, np.float32) for name, value in variables.items() if name not in homeless
    }
    if not report.unused and not report.missing:  # else these say more
        _check_shapes(variables, expected, path)
    return variables, known, report


# ---------------------------------------------------------------------------------------------------------- reading
def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(name -> array, facts: the other entries of the file, e.g. a configuration) by the file's content."""
    refuse_url(path)
    if path.is_dir() or is_tf_checkpoint(path):
        tensors, meta = load_weights(path)
        return tensors, {"meta": meta}
    kind = file_kind(path)
    if kind == "hdf5":
        return _read_h5(path), {"is_keras": True}
    if kind == "npz":
        tensors, meta = load_npz(path)
        return tensors, {"meta": meta}
    return _unwrap(read_pickle(path), path)


def _unwrap(content: Any, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The dictionary of arrays, unwrapped from the dictionaries that training programs put around it."""
    facts: dict[str, Any] = {}
    for _ in range(4):  # a dictionary may contain itself
        layers = ("model", "state_dict", "blobs", "model_state")
        inner = next((k for k in layers if isinstance(content, dict) and isinstance(content.get(k), dict)), "")
        if not inner:
            break
        facts.update({k: v for k, v in content.items() if k != inner})
        content = content[inner]
    if not isinstance(content, dict) or not any(isinstance(v, np.ndarray) for v in content.values()):
        raise UserError(f"{path} holds no dictionary of tensors; save the model's state_dict() and convert that")
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    for name, value in tensors.items():
        if not is_number_type(value.dtype):
            raise UserError(f"{path}: {check_tensor_name(name, path)} holds {value.dtype.name}, not numbers")
        check_tensor_name(name, path)
    facts.update({k: v for k, v in content.items() if not isinstance(v, np.ndarray)})
    facts = {k: v for k, v in facts.items() if k in ("__author__", "cfg", "meta")}  # what the translators look at
    if all(name.startswith("module.") for name in tensors):
        tensors = {name[len("module.") :]: value for name, value in tensors.items()}
    return tensors, facts


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    """{"layer/weight": array} of a Keras weights or model file."""
    tensors: dict[str, np.ndarray] = {}
    for name, value in read_hdf5(path, lambda name: not name.startswith("optimizer_weights")).items():
        layer, weight = re.sub(r"^model_weights/", "", name).split("/")[0], name.rsplit("/", 1)[-1]
        tensors[f"{layer}/{weight.split(':')[0]}"] = value
    return tensors


# ------------------------------------------------------------------------------------------------------ recognition
# Parts of other systems' models that this project does not have, by the names of their tensors.
_NOT_SUPPORTED = {
    r"head\.(cls_subnet|bbox_subnet|classification_head|regression_head)\..*|bbox_head\.(cls|reg)_convs\..*":
        "a one-stage detector (RetinaNet, FCOS, SSD or similar)",
    r"backbone\.(body|features)\.\d+\..*": "a MobileNet or VGG backbone",
    r".*\.(conv2_offset|conv2\.conv_offset)\..*": "deformable convolutions",
    r".*\.(attn|self_attn)\..*": "a transformer",
    r".*\.context_block\..*": "global context blocks",
    r"neck\.(downsample_convs|pafpn_convs)\..*": "a path aggregation pyramid (PAFPN)",
    r".*\.(point_head|coarse_head)\..*": "PointRend's mask head",
    r".*\.(mask_iou_head|maskiou)\..*": "Mask Scoring R-CNN",
    r".*semantic_head\..*": "Hybrid Task Cascade",
    r"roi_head\.shared_head\..*": "mmdetection's C4 model",
    r"roi_head\.mask_head\.\d\..*": "a mask head for each stage of the cascade",
    r"bbox_head\.(\d\.)?(shared_fcs|fc_cls)\..*":
        "the names of mmdetection 1, which its tools/upgrade_model_version.py brings up to date",
}  # fmt: skip


def _refuse_unsupported(names: Iterable[str], path: Path) -> None:
    for name in names:
        what = next((what for pattern, what in _NOT_SUPPORTED.items() if re.fullmatch(pattern, name)), None)
        if what:
            raise UserError(f"{path} has {what}, which is not supported ({name}); choose other weights")


def _recognise(tensors: Mapping[str, Any], facts: Mapping[str, Any], path: Path) -> tuple[str, Callable]:
    """(name of the system, its translator) by the tensors' names."""
    names = set(tensors)
    _refuse_unsupported(sorted(names), path)

    def has(*wanted: str) -> bool:
        return all(w in names for w in wanted)

    if facts.get("is_keras"):
        if has("conv1_conv/kernel", "conv2_block1_1_conv/kernel"):
            return "Keras applications ResNet", _from_keras
        raise UserError(
            f"{path}: this HDF5 file is not a Keras applications ResNet50, 101 or 152 (v1); Keras' other networks "
            "need no "
            "conversion: BACKBONE.NAME=keras:NETWORK BACKBONE.WEIGHTS=FILE_notop.h5"
        )
    if "conv0/W" in names or "conv0/W:0" in names:
        return "tensorpack", lambda t, f, r: _from_tensorpack(t, f, r, path)
    if has("conv1_w", "res2_0_branch2a_w"):
        return "Detectron (Caffe2)", _from_caffe2
    if is_torch(tensors):
        return "EfficientNet-Lite", lambda t, f, r: _from_efficientnet_lite(t, r, path)
    if has("backbone.body.stem.conv1.weight"):
        return "maskrcnn-benchmark", _from_maskrcnn_benchmark
    if has("backbone.body.conv1.weight"):
        return "torchvision detection", _from_torchvision_detection
    if "backbone.conv1.weight" in names and any(n.startswith(("rpn_head.", "roi_head.", "bbox_head.")) for n in names):
        return "mmdetection", _from_mmdetection
    if has("conv1.weight", "layer1.0.conv1.weight"):
        return "torchvision ImageNet", _from_torchvision_imagenet
    stems = ("backbone.bottom_up.stem.conv1.weight", "backbone.stem.conv1.weight", "stem.conv1.weight")
    if any(s in names for s in stems):
        if "roi_heads.box_head.fc1.weight" in names and not any("fpn_lateral" in name for name in names):
            raise UserError(f"{path} has a dilated last stage (DC5), which is not supported; choose other weights")
        return "detectron2", _from_detectron2
    raise UserError(
        f"{path}: names like {_some(sorted(names), 2)} belong to no known system; known are tensorpack, detectron2, "
        "Detectron, maskrcnn-benchmark, torchvision, mmdetection and Keras ResNets, EfficientNet-Lite"
    )


# ------------------------------------------------------------------------------------------- PyTorch-based systems
# A rule maps the module of a tensor (its name without .weight etc.) to a scope here. The scope ends in "/norm" for a
# normalisation, which becomes bn or gn according to whether it has running statistics.
Rules = list[tuple[str, Callable[[re.Match], str]]]

_RESNET_MODULE = {"conv1": "conv1", "conv2": "conv2", "conv3": "conv3", "bn1": "conv1/norm", "bn2": "conv2/norm",
                  "bn3": "conv3/norm", "downsample.0": "convshortcut", "downsample.1": "convshortcut/norm"}  # fmt: skip
_RPN_MODULE = {"conv": "conv0", "cls_logits": "class", "bbox_pred": "box",
               "objectness_logits": "class", "anchor_deltas": "box"}  # fmt: skip
_OUTPUT_MODULE = {"cls_score": "class", "bbox_pred": "box"}


def _norm(match: re.Match, group: int) -> str:
    return "/norm" if match.group(group) else ""


def _torch_resnet_rules(stem: str, body: str) -> Rules:
    """layerK.I.{conv,bn,downsample} modules below `body`, conv1 and bn1 below `stem`, as torchvision names them."""
    modules = "|".join(re.escape(m) for m in _RESNET_MODULE)
    return [
        (rf"{stem}conv1", lambda m: "conv0"),
        (rf"{stem}bn1", lambda m: "conv0/norm"),
        (rf"{body}layer([1-4])\.(\d+)\.({modules})",
         lambda m: f"group{int(m[1]) - 1}/block{m[2]}/{_RESNET_MODULE[m[3]]}"),
    ]  # fmt: skip


def _translate(tensors: Mapping[str, np.ndarray], rules: Rules, ignore: Mapping[str, str], report: Report) -> dict:
    """Renames tensors by the rules and converts them to this project's layout; tensors without a rule go to the
    report."""
    compiled = [(re.compile(pattern), rename) for pattern, rename in rules]
    ignored = [(re.compile(pattern), why) for pattern, why in ignore.items()]
    variables: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        reason = next((why for pattern, why in ignored if pattern.fullmatch(name)), None)
        if reason:
            report.ignored.append((name, reason))
            continue
        module, _, leaf = name.rpartition(".")
        scopes = [rename(m) for pattern, rename in compiled if (m := pattern.fullmatch(module))]
        target = ""
        if scopes and scopes[0].endswith("/norm"):
            kind = "bn" if f"{module}.running_mean" in tensors else "gn"
            if leaf in _NORM_LEAVES:
                target = f"{scopes[0][: -len('norm')]}{kind}/{_NORM_LEAVES[leaf]}"
        elif scopes and leaf in ("weight", "bias"):
            target = f"{scopes[0]}/{'W' if leaf == 'weight' else 'b'}"
        if not target:
            report.unused.append(name)
        else:
            _put(variables, target, _to_native_layout(value), name, report)
    return variables


def _put(variables: dict[str, np.ndarray], target: str, value: np.ndarray, source: str, report: Report) -> None:
    if target in variables:
        if not np.array_equal(variables[target], value):
            raise UserError(f"{source} and another tensor both belong to {target} but differ: remove the wrong one")
        report.ignored.append((source, "the same tensor under a second name"))
        return
    variables[target] = value
    report.mapped[source] = target


def _to_native_layout(value: np.ndarray) -> np.ndarray:
    """OIHW -> HWIO (transposed convolutions IOHW -> HWOI by the same permutation), (out,in) -> (in,out)."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def _detectron2_rules(fpn: bool, conv_head: bool) -> Rules:
    def head(match: re.Match) -> str:
        return f"cascade_rcnn_stage{int(match[1]) + 1}/head/" if match[1] else "fastrcnn/"

    def output(match: re.Match) -> str:
        if match[1]:
            return f"cascade_rcnn_stage{int(match[1]) + 1}/outputs/{_OUTPUT_MODULE[match[2]]}"
        return f"fastrcnn/{'outputs/' if fpn else ''}{_OUTPUT_MODULE[match[2]]}"

    bottom = r"(?:backbone\.bottom_up\.|backbone\.|roi_heads\.)?"
    return [
        (bottom + r"stem\.conv1(\.norm)?", lambda m: "conv0" + _norm(m, 1)),
        (bottom + r"res([2-5])\.(\d+)\.(conv[123]|shortcut)(\.norm)?",
         lambda m: f"group{int(m[1]) - 2}/block{m[2]}/{m[3].replace('shortcut', 'convshortcut')}{_norm(m, 4)}"),
        (bottom + r"linear", lambda m: "linear"),
        (r"backbone\.fpn_lateral([2-5])(\.norm)?", lambda m: f"fpn/lateral_1x1_c{m[1]}{_norm(m, 2)}"),
        (r"backbone\.fpn_output([2-5])(\.norm)?", lambda m: f"fpn/posthoc_3x3_p{m[1]}{_norm(m, 2)}"),
        (r"proposal_generator\.rpn_head\.conv\.conv(\d)", lambda m: f"rpn/conv{m[1]}"),
        (r"proposal_generator\.rpn_head\.(conv|objectness_logits|anchor_deltas)", lambda m: f"rpn/{_RPN_MODULE[m[1]]}"),
        (r"roi_heads\.box_head(?:\.(\d))?\.conv(\d)(\.norm)?", lambda m: f"{head(m)}conv{int(m[2]) - 1}{_norm(m, 3)}"),
        (r"roi_heads\.box_head(?:\.(\d))?\.fc(\d)", lambda m: head(m) + ("fc" if conv_head else f"fc{int(m[2]) + 5}")),
        (r"roi_heads\.box_predictor(?:\.(\d))?\.(cls_score|bbox_pred)", output),
        (r"roi_heads\.mask_head\.mask_fcn(\d)(\.norm)?", lambda m: f"maskrcnn/fcn{int(m[1]) - 1}{_norm(m, 2)}"),
        (r"roi_heads\.mask_head\.deconv", lambda m: "maskrcnn/deconv"),
        (r"roi_heads\.mask_head\.predictor", lambda m: "maskrcnn/conv"),
        (r"roi_heads\.keypoint_head\.conv_fcn(\d)", lambda m: f"keypointrcnn/conv{int(m[1]) - 1}"),
        (r"roi_heads\.keypoint_head\.score_lowres", lambda m: "keypointrcnn/deconv"),
    ]  # fmt: skip


def _from_detectron2(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    fpn = any(".fpn_lateral" in name for name in tensors)
    conv_head = any(re.match(r"roi_heads\.box_head(\.\d)?\.conv1\.", name) for name in tensors)
    rules = _detectron2_rules(fpn, conv_head)
    ignore = {
        r"proposal_generator\.anchor_generator\.cell_anchors\.\d+": "anchors, computed here",
        r"pixel_(mean|std)": "normalisation, stored as settings",
        r"sem_seg_head\..*": "semantic segmentation, which detections do not use",
        r".*\.num_batches_tracked": "step counters",
    }
    variables = _translate(tensors, rules, ignore, report)
    _background_first(variables, report)

    groups = _groups(variables)
    plain = groups == 1 and any("/bn/" in name for name in variables)
    mean, std = (tensors[k].reshape(-1).tolist() if k in tensors else None for k in ("pixel_mean", "pixel_std"))
    if facts.get("__author__") == "torchvision":
        # Its ImageNet files with these names keep torchvision's channel order.
        settings = _rgb_settings(variables, report)
    else:
        # The model zoo's plain ResNets come from MSRA: stride in the 1x1 convolution, standard deviations folded into
        # conv1.
        std = std or ([1.0, 1.0, 1.0] if plain else [57.375, 57.12, 58.395])
        mean = mean or [103.53, 116.28, 123.675]
        settings = {
            "BACKBONE.STRIDE_1X1": all(s == 1 for s in std),
            "PREPROC.PIXEL_MEAN": _rounded(mean[::-1]),
            "PREPROC.PIXEL_STD": _rounded(std[::-1]),
        }
        if guessed := [k for k in ("PIXEL_MEAN", "PIXEL_STD") if k.lower() not in tensors]:
            report.notes.append(
                "a guess: "
                + " ".join(f"PREPROC.{k}={settings[f'PREPROC.{k}']}".replace(" ", "") for k in guessed)
                + ", which the file does not hold: those of the model zoo's networks of this kind; the model's yaml "
                "has them as MODEL.PIXEL_MEAN and MODEL.PIXEL_STD (in B, G, R); give others by --config"
            )
        report.notes.append(
            "the stride position is not visible in tensors: "
            f"BACKBONE.STRIDE_1X1={settings['BACKBONE.STRIDE_1X1']} is what the model zoo uses with "
            f"PREPROC.PIXEL_STD={settings['PREPROC.PIXEL_STD']}; the model's yaml has it as RESNETS.STRIDE_IN_1X1"
        )
    if "rpn/conv0/W" in variables:
        settings["FRCNN.ROI_SAMPLES"] = 0
        report.notes.append(
            "FRCNN.ROI_SAMPLES=0: as many RoIAlign samples as a bin has cells, that system's default "
            "(POOLER_SAMPLING_RATIO); 2 is faster and predicts nearly the same. If the model's yaml has POOLER_TYPE: "
            "ROIAlign (not ROIAlignV2), add --config FRCNN.ROI_ALIGNED=False"
        )
    cells = [tensors[k] for k in sorted(tensors) if re.search(r"anchor_generator\.cell_anchors\.\d+$", k)]
    _use_cell_anchors(cells, settings, variables)
    return variables, settings


def _from_maskrcnn_benchmark(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    fpn = any(name.startswith("backbone.fpn.") for name in tensors)
    # The convolutions of the 4conv1fc head are numbered within one sequence, with norms and ReLUs between them.
    in_sequence = sorted(
        int(m[1]) for n, v in tensors.items() if (m := re.fullmatch(r".*\.xconvs\.(\d+)\.weight", n)) and v.ndim == 4
    )

    def xconv(match: re.Match) -> str:
        index = int(match[1])
        before = [i for i in in_sequence if i <= index]
        return f"fastrcnn/conv{len(before) - 1}" + ("" if index in in_sequence else "/norm")

    rules: Rules = [
        *_torch_resnet_rules(
            r"backbone\.body\.stem\.", r"(?:backbone\.body|roi_heads\.(?:box|mask)\.feature_extractor\.head)\."
        ),
        (r"backbone\.fpn\.fpn_(inner|layer)([1-4])(?:\.([01]))?",
         lambda m: f"fpn/{'lateral_1x1_c' if m[1] == 'inner' else 'posthoc_3x3_p'}{int(m[2]) + 1}"
                   + ("/norm" if m[3] == "1" else "")),
        (r"rpn\.head\.(conv|cls_logits|bbox_pred)", lambda m: f"rpn/{_RPN_MODULE[m[1]]}"),
        (r"roi_heads\.box\.feature_extractor\.xconvs\.(\d+)", xconv),
        (r"roi_heads\.box\.feature_extractor\.fc([67])",
         lambda m: "fastrcnn/fc" if in_sequence else f"fastrcnn/fc{m[1]}"),
        (r"roi_heads\.box\.predictor\.(cls_score|bbox_pred)",
         lambda m: f"fastrcnn/{'outputs/' if fpn else ''}{_OUTPUT_MODULE[m[1]]}"),
        (r"roi_heads\.mask\.feature_extractor\.mask_fcn([1-4])(?:\.([01]))?",
         lambda m: f"maskrcnn/fcn{int(m[1]) - 1}" + ("/norm" if m[2] == "1" else "")),
        (r"roi_heads\.mask\.predictor\.conv5_mask", lambda m: "maskrcnn/deconv"),
        (r"roi_heads\.mask\.predictor\.mask_fcn_logits", lambda m: "maskrcnn/conv"),
        (r"roi_heads\.keypoint\.feature_extractor\.conv_fcn(\d)", lambda m: f"keypointrcnn/conv{int(m[1]) - 1}"),
        (r"roi_heads\.keypoint\.predictor\.kps_score_lowres", lambda m: "keypointrcnn/deconv"),
    ]  # fmt: skip
    ignore = {
        r"rpn\.anchor_generator\.cell_anchors\.\d+": "anchors, computed here",
        r".*\.num_batches_tracked": "step counters",
    }
    variables = _translate(tensors, rules, ignore, report)
    _agnostic_columns(variables)
    _without_mask_background(variables, report)
    _ratio_major_anchors(variables)
    caffe_like = _groups(variables) == 1 and any(re.match("group.*/bn/", name) for name in variables)
    settings = {
        "BACKBONE.STRIDE_1X1": caffe_like,
        "BACKBONE.BN_EPSILON": 0.0,
        "PREPROC.PIXEL_MEAN": [122.7717, 115.9465, 102.9801],
        "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
    }
    _use_legacy_boxes(settings, variables)
    report.notes.append(
        "the stride position is not visible in tensors: "
        f"BACKBONE.STRIDE_1X1={caffe_like} is that system's default for such a backbone (MODEL.RESNETS.STRIDE_IN_1X1)"
    )
    report.notes.append(
        "a guess: PREPROC.PIXEL_STD=[1,1,1] is that system's default; the model's yaml has it as INPUT.PIXEL_STD"
    )
    return variables, settings


def _torchvision_rules() -> Rules:
    def second(match: re.Match, group: int) -> str:  # a convolution is followed by its norm
        return "/norm" if match.group(group) == "1" else ""

    return [
        *_torch_resnet_rules(r"backbone\.body\.", r"backbone\.body\."),
        (r"backbone\.fpn\.(inner|layer)_blocks\.([0-3])(?:\.([01]))?",
         lambda m: f"fpn/{'lateral_1x1_c' if m[1] == 'inner' else 'posthoc_3x3_p'}{int(m[2]) + 2}" + second(m, 3)),
        (r"rpn\.head\.conv\.(\d)\.0", lambda m: f"rpn/conv{m[1]}"),
        (r"rpn\.head\.(conv|cls_logits|bbox_pred)", lambda m: f"rpn/{_RPN_MODULE[m[1]]}"),
        (r"roi_heads\.box_head\.(fc[67])", lambda m: f"fastrcnn/{m[1]}"),
        # 4conv1fc: one sequence of four pairs, a flattening and a fully connected layer.
        (r"roi_heads\.box_head\.([0-3])\.([01])", lambda m: f"fastrcnn/conv{m[1]}" + second(m, 2)),
        (r"roi_heads\.box_head\.5", lambda m: "fastrcnn/fc"),
        (r"roi_heads\.box_predictor\.(cls_score|bbox_pred)", lambda m: f"fastrcnn/outputs/{_OUTPUT_MODULE[m[1]]}"),
        (r"roi_heads\.mask_head\.mask_fcn([1-4])", lambda m: f"maskrcnn/fcn{int(m[1]) - 1}"),
        (r"roi_heads\.mask_head\.([0-3])\.([01])", lambda m: f"maskrcnn/fcn{m[1]}" + second(m, 2)),
        (r"roi_heads\.mask_predictor\.conv5_mask", lambda m: "maskrcnn/deconv"),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits", lambda m: "maskrcnn/conv"),
        # Convolutions and ReLUs alternate in one sequence.
        (r"roi_heads\.keypoint_head\.(\d*[02468])", lambda m: f"keypointrcnn/conv{int(m[1]) // 2}"),
        (r"roi_heads\.keypoint_predictor\.kps_score_lowres", lambda m: "keypointrcnn/deconv"),
    ]  # fmt: skip


def _from_torchvision_detection(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    variables = _translate(tensors, _torchvision_rules(), {r".*\.num_batches_tracked": "step counters"}, report)
    settings = _rgb_settings(variables, report)
    _without_mask_background(variables, report)
    classes = variables["fastrcnn/outputs/class/b"].size if "fastrcnn/outputs/class/b" in variables else 0
    # Frozen batch norms count no batches. Models with others, among them all v2, have PyTorch's epsilon.
    frozen = "backbone.body.bn1.num_batches_tracked" not in tensors
    published = frozen and (classes == 91 or (classes == 2 and "keypointrcnn/deconv/W" in variables))
    settings["BACKBONE.BN_EPSILON"] = 0.0 if published else _BN_EPSILON
    if frozen:
        report.notes.append(
            f"BACKBONE.BN_EPSILON={settings['BACKBONE.BN_EPSILON']:g}: torchvision's published COCO weights of the "
            "first version were trained with 0, models trained since version 0.7 have 1e-5; tensors do not show it"
        )
    settings["FRCNN.ROI_ALIGNED"] = False
    # Its cell anchors are rounded to whole pixels.
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    exact = [[(s * math.sqrt(1 / r), s * math.sqrt(r)) for r in ratios] for s in sizes]
    cells = [np.round(np.array([[-w, -h, w, h] for w, h in level]) / 2) for level in exact]
    settings["RPN.CELL_ANCHORS"] = [level.tolist() for level in cells]
    settings["RPN.STRIDE_FROM_SIZE"] = True
    settings["RPN.MIN_SIZE"] = 1e-3
    return variables, settings


def _from_mmdetection(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    """mmdetection 2 and 3. Its configuration, a Python text in the file, is searched and never run."""
    rules: Rules = [
        *_torch_resnet_rules(r"backbone\.", r"backbone\."),
        (r"backbone\.gn1", lambda m: "conv0/norm"),
        (r"backbone\.layer([1-4])\.(\d+)\.gn([123])",
         lambda m: f"group{int(m[1]) - 1}/block{m[2]}/conv{m[3]}/norm"),
        (r"neck\.(lateral|fpn)_convs\.([0-3])\.(conv|bn|gn)",
         lambda m: f"fpn/{'lateral_1x1_c' if m[1] == 'lateral' else 'posthoc_3x3_p'}{int(m[2]) + 2}" + second(m, 3)),
        (r"rpn_head\.rpn_conv(?:\.(\d)\.conv)?", lambda m: f"rpn/conv{m[1] or 0}"),
        (r"rpn_head\.rpn_(cls|reg)", lambda m: f"rpn/{outputs[m[1]]}"),
        (r"roi_head\.bbox_head\.(?:(\d)\.)?shared_convs\.(\d)\.(conv|bn|gn)",
         lambda m: f"{head(m, 'head/')}conv{m[2]}" + second(m, 3)),
        (r"roi_head\.bbox_head\.(?:(\d)\.)?shared_fcs\.(\d)",
         lambda m: head(m, "head/") + ("fc" if conv_head else f"fc{int(m[2]) + 6}")),
        (r"roi_head\.bbox_head\.(?:(\d)\.)?fc_(cls|reg)", lambda m: f"{head(m, '')}outputs/{outputs[m[2]]}"),
        (r"roi_head\.mask_head\.convs\.(\d)\.(conv|bn|gn)", lambda m: f"maskrcnn/fcn{m[1]}" + second(m, 2)),
        (r"roi_head\.mask_head\.upsample", lambda m: "maskrcnn/deconv"),
        (r"roi_head\.mask_head\.conv_logits", lambda m: "maskrcnn/conv"),
    ]  # fmt: skip
    outputs = {"cls": "class", "reg": "box"}
    conv_head = any(".shared_convs." in name for name in tensors)

    def head(match: re.Match, part: str) -> str:
        return f"cascade_rcnn_stage{int(match[1]) + 1}/{part}" if match[1] else "fastrcnn/"

    def second(match: re.Match, group: int) -> str:
        return "" if match.group(group) == "conv" else "/norm"

    variables = _translate(tensors, rules, {r".*\.num_batches_tracked": "step counters"}, report)
    _background_first(variables, report)
    meta = facts.get("meta") if isinstance(facts.get("meta"), dict) else {}
    text = next((meta[k] for k in ("config", "cfg") if isinstance(meta.get(k), str)), "")
    settings = _mmdetection_images(tensors, text, variables, report)
    if "rpn/conv0/W" in variables:
        settings["FRCNN.ROI_SAMPLES"] = 0  # its sampling_ratio=0: as many samples as a bin has cells
    # The factors of box deltas are inverses of standard deviations; the text's first are those of the RPN.
    found = re.findall(r"target_stds=\[([\d.]+), *([\d.]+), *([\d.]+), *([\d.]+)\]", text)[1:]
    stages = [[float(v) for v in spread] for spread in found]
    stages = [_rounded(1 / v for v in spread) for spread in stages if all(v > 0 for v in spread)]
    if any(name.startswith("cascade") for name in variables):
        usual = [[10.0, 10.0, 5.0, 5.0], [20.0, 20.0, 10.0, 10.0], [30.303, 30.303, 14.9254, 14.9254]]
        settings["CASCADE.BBOX_REG_WEIGHTS"] = stages if len(stages) == 3 else usual
    elif stages and stages[0] != [10.0, 10.0, 5.0, 5.0]:
        settings["FRCNN.BBOX_REG_WEIGHTS"] = stages[0]
    of_data = meta.get("dataset_meta")
    for names in [part.get(k) for part in (meta, of_data) if isinstance(part, dict) for k in ("CLASSES", "classes")]:
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names):
            report.class_names = list(names)
    return variables, settings


def _mmdetection_images(tensors: dict, text: str, variables: dict, report: Report) -> dict[str, Any]:
    """Order of colours, normalisation and stride of mmdetection's backbones: by the configuration if the file has it,
    else by how large the stem's outputs are for its kernels."""
    style, order = (re.search(p, text) for p in (r"style=['\"](\w+)['\"]", r"(?:to_rgb|bgr_to_rgb)=(True|False)"))
    mean, std = (re.search(rf"\b{k}=\[([\d.]+), *([\d.]+), *([\d.]+)\]", text) for k in ("mean", "std"))
    if style and order and mean and std:
        rgb, caffe = order[1] == "True", style[1] == "caffe"
        means, stds = ([float(v) for v in m.groups()] for m in (mean, std))
        report.notes.append("colours, normalisation and stride are those of the file's configuration")
    else:
        variance = tensors.get("backbone.bn1.running_var")
        energy = np.square(tensors["backbone.conv1.weight"].astype(np.float64)).sum((1, 2, 3))
        # A stem's inputs are near 1 where images are divided by their standard deviations, else near 57.
        rgb = variance is not None and float(np.median(variance / np.maximum(energy, 1e-12))) < 57
        caffe = not rgb and variance is not None
        means, stds = (
            ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]) if rgb else ([103.53, 116.28, 123.675], [1.0] * 3)
        )
        report.notes.append(
            f"a guess, as the file has no configuration: {'RGB images, pytorch' if rgb else 'BGR images, caffe'} "
            "style; the model's config has it as style and to_rgb"
        )
    settings: dict[str, Any] = {}
    if rgb:
        settings = _rgb_settings(variables, report)
    else:
        means, stds = means[::-1], stds[::-1]
    return settings | {
        "BACKBONE.STRIDE_1X1": caffe, "PREPROC.PIXEL_MEAN": _rounded(means), "PREPROC.PIXEL_STD": _rounded(stds)
    }  # fmt: skip


def _torchvision_imagenet_rules() -> Rules:
    return [*_torch_resnet_rules("", ""), (r"fc", lambda m: "linear")]


def _from_torchvision_imagenet(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    variables = _translate(
        tensors, _torchvision_imagenet_rules(), {r".*\.num_batches_tracked": "step counters"}, report
    )
    return variables, _rgb_settings(variables, report)


def _from_efficientnet_lite(tensors: dict, report: Report, path: Path) -> tuple[dict, dict]:
    name, variables, report.mapped = from_torch(tensors, str(path))
    for old in tensors:
        if old.endswith("num_batches_tracked"):
            report.ignored.append((old, "step counters"))
        elif re.match(r"_?conv_head\.|_bn1\.|bn2\.|_fc\.|classifier\.", old):
            report.ignored.append((old, "the classifier, which no detector uses"))
        elif old not in report.mapped:
            report.unused.append(old)
    return variables, {"BACKBONE.NAME": name, "BACKBONE.NORM": "FreezeBN"}


def _rgb_settings(variables: dict[str, np.ndarray], report: Report) -> dict[str, Any]:
    """Reverses conv0's input channels from R,G,B to B,G,R, and returns torchvision's settings."""
    if "conv0/W" in variables:
        variables["conv0/W"] = variables["conv0/W"][:, :, ::-1]
        report.notes.append("trained on R,G,B images in 0..1: conv0's input channels are reversed to B,G,R")
    return {
        "BACKBONE.STRIDE_1X1": False,
        "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375],
    }


# ------------------------------------------------------------------------------------------------------------ Caffe2
def _from_caffe2(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    fpn = any(name.startswith("fpn_inner_") for name in tensors)
    conv_head = "head_conv1_w" in tensors
    branches = {"branch1": "convshortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
    outputs = "fastrcnn/outputs" if fpn else "fastrcnn"
    rules: Rules = [
        (r"(?:res_)?conv1", lambda m: "conv0"),
        (r"res([2-5])_(\d+)_(branch1|branch2[abc])", lambda m: f"group{int(m[1]) - 2}/block{m[2]}/{branches[m[3]]}"),
        (r"fc1000|pred", lambda m: "linear"),
        (r"fpn_inner_res([2-5])_\d+_sum(?:_lateral)?", lambda m: f"fpn/lateral_1x1_c{m[1]}"),
        (r"fpn_res([2-5])_\d+_sum", lambda m: f"fpn/posthoc_3x3_p{m[1]}"),
        (r"conv_rpn(?:_fpn\d)?", lambda m: "rpn/conv0"),
        (r"rpn_cls_logits(?:_fpn\d)?", lambda m: "rpn/class"),
        (r"rpn_bbox_pred(?:_fpn\d)?", lambda m: "rpn/box"),
        (r"fc([67])", lambda m: "fastrcnn/fc" if conv_head else f"fastrcnn/fc{m[1]}"),
        (r"head_conv(\d)", lambda m: f"fastrcnn/conv{int(m[1]) - 1}"),
        (r"cls_score", lambda m: f"{outputs}/class"),
        (r"bbox_pred", lambda m: f"{outputs}/box"),
        (r"_\[mask\]_fcn(\d)", lambda m: f"maskrcnn/fcn{int(m[1]) - 1}"),
        (r"conv5_mask", lambda m: "maskrcnn/deconv"),
        (r"mask_fcn_logits", lambda m: "maskrcnn/conv"),
        (r"conv_fcn(\d)", lambda m: f"keypointrcnn/conv{int(m[1]) - 1}"),
        (r"kps_score_lowres", lambda m: "keypointrcnn/deconv"),
    ]  # fmt: skip
    leaves = {"w": "W", "b": "b", "bn_s": "bn/gamma", "bn_b": "bn/beta", "bn_rm": "bn/mean/EMA",
              "bn_riv": "bn/variance/EMA", "gn_s": "gn/gamma", "gn_b": "gn/beta"}  # fmt: skip
    compiled = [(re.compile(pattern), rename) for pattern, rename in rules]
    blob_name = re.compile(r"(.+?)_(bn_s|bn_b|bn_rm|bn_riv|gn_s|gn_b|w|b)")

    def scope_of(stem: str) -> str | None:
        return next((rename(m) for pattern, rename in compiled if (m := pattern.fullmatch(stem))), None)

    normalised = {scope_of(name[: -len("_bn_s")]) for name in tensors if name.endswith("_bn_s")}
    variables: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith("_momentum"):
            report.ignored.append((name, "momentum of the solver"))
            continue
        if re.fullmatch(r"kps_score_[wb]", name):
            report.ignored.append((name, "fixed upsampling, done when keypoints are decoded"))
            continue
        split = blob_name.fullmatch(name)
        scope = scope_of(split[1]) if split else None
        if scope is None:
            report.unused.append(name)
        elif split[2] == "b" and scope in normalised:
            # Convolutions before a batch norm have no bias in these networks; some files contain a bias of zeros.
            if np.any(value):
                report.unused.append(name)
            else:
                report.ignored.append((name, "zero bias before a batch norm"))
        else:
            _put(variables, f"{scope}/{leaves[split[2]]}", _to_native_layout(value), name, report)
    # Batch norms are stored as scale and shift, which equals a batch norm with variance 1 - ε and mean 0.
    for scope in [n[: -len("gamma")] for n in list(variables) if n.endswith("/bn/gamma")]:
        size = variables[f"{scope}gamma"].shape
        variables.setdefault(f"{scope}mean/EMA", np.zeros(size, np.float32))
        variables.setdefault(f"{scope}variance/EMA", np.full(size, 1 - _BN_EPSILON, np.float32))
    _agnostic_columns(variables)
    _without_mask_background(variables, report)
    _ratio_major_anchors(variables)

    text = facts.get("cfg") if isinstance(facts.get("cfg"), str) else ""
    recorded = re.search(r"STRIDE_1X1: *(true|false)", text, re.I)
    caffe_like = _groups(variables) == 1 and not any(re.match("group.*/gn/", name) for name in variables)
    stride = recorded[1].lower() == "true" if recorded else caffe_like
    settings = {
        "BACKBONE.STRIDE_1X1": stride,
        "PREPROC.PIXEL_MEAN": [122.7717, 115.9465, 102.9801],
        "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
    }
    if any(name.startswith("rpn/") for name in variables):
        if sampling := re.search(r"ROI_XFORM_SAMPLING_RATIO: *(\d+)", text):
            settings["FRCNN.ROI_SAMPLES"] = int(sampling[1])
        _use_legacy_boxes(settings, variables)
    report.notes.append(
        f"BACKBONE.STRIDE_1X1={stride} "
        + ("as the file's configuration says" if recorded else "is that system's default for such a backbone")
    )
    return variables, settings


# ------------------------------------------------------------------------------------------------- Keras, tensorpack
def _from_keras(tensors: dict, facts: dict, report: Report) -> tuple[dict, dict]:
    """Keras applications ResNet (v1): biases of the convolutions move into the means of their batch norms."""
    bn_leaves = {"gamma": "gamma", "beta": "beta", "moving_mean": "mean/EMA", "moving_variance": "variance/EMA"}
    keras_epsilon = 1.001e-5
    parts = ["convshortcut", "conv1", "conv2", "conv3"]
    variables: dict[str, np.ndarray] = {}
    biases: dict[str, tuple[str, np.ndarray]] = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition("/")
        block = re.fullmatch(r"conv([2-5])_block(\d+)_([0-3])_(conv|bn)", layer)
        stem = re.fullmatch(r"conv1_(conv|bn)", layer)
        if block:
            scope, kind = f"group{int(block[1]) - 2}/block{int(block[2]) - 1}/{parts[int(block[3])]}", block[4]
        elif stem:
            scope, kind = "conv0", stem[1]
        elif layer in ("predictions", "probs"):
            _put(variables, f"linear/{'W' if leaf == 'kernel' else 'b'}", value, name, report)
            continue
        else:
            report.unused.append(name)
            continue
        if kind == "bn" and leaf in bn_leaves:
            _put(variables, f"{scope}/bn/{bn_leaves[leaf]}", value, name, report)
        elif kind == "conv" and leaf == "kernel":
            _put(variables, f"{scope}/W", value, name, report)
        elif kind == "conv" and leaf == "bias":
            biases[scope] = (name, value)
        else:
            report.unused.append(name)
    for scope, (name, bias) in biases.items():
        mean = f"{scope}/bn/mean/EMA"
        if mean in variables:
            variables[mean] = variables[mean] - bias
            report.mapped[name] = mean
        else:
            report.unused.append(name)
    for name in variables:
        if name.endswith("/variance/EMA"):
            variables[name] = variables[name] + (keras_epsilon - _BN_EPSILON)
    report.notes.append("the biases of the convolutions are subtracted from the means of their batch norms")
    return variables, {
        "BACKBONE.STRIDE_1X1": True,
        "PREPROC.PIXEL_MEAN": [123.68, 116.779, 103.939],
        "PREPROC.PIXEL_STD": [1.0, 1.0, 1.0],
    }


def _from_tensorpack(tensors: dict, facts: dict, report: Report, path: Path) -> tuple[dict, dict]:
    """Names and layout are this project's, except for ':0' and the names of group norms."""
    variables = {}
    for old, value in tensors.items():
        name = next(iter(native_names({old: value}, path)))
        if is_training_state(name):
            report.ignored.append((old, "state of a training run"))
        else:
            _put(variables, name, value, old, report)
    stored = ((facts.get("meta") or {}).get("settings")) or {}
    if stored:
        typed = default_config().update_from_dict(stored, f"settings stored in {path}")
        stored = {k: typed.get(k) for k in stored}
        return variables, {k: v for k, v in stored.items() if not k.startswith(("TRAIN", "TEST.", "DATA."))}
    settings: dict[str, Any] = {}
    if not any(name.startswith("rpn/") for name in variables):
        settings["BACKBONE.TF_PAD_MODE"] = "AlignPadding" not in path.name
        report.notes.append(
            f"BACKBONE.TF_PAD_MODE={settings['BACKBONE.TF_PAD_MODE']}: tensorpack marks ImageNet models with symmetric "
            "padding by 'AlignPadding' in the file name; tensors do not show it"
        )
    return variables, settings


# -------------------------------------------------------------------------------------------------------- conventions
def _output_scopes(variables: Mapping[str, Any]) -> list[str]:
    return sorted(n[: -len("class/W")] for n in variables if re.match(r"(fastrcnn|cascade_rcnn_stage\d)/.*class/W$", n))


def _background_first(variables: dict[str, np.ndarray], report: Report) -> None:
    """Classes with the background last -> first; class-specific boxes get a zero group for the background."""
    for scope in _output_scopes(variables):
        for leaf in ("W", "b"):
            name = f"{scope}class/{leaf}"
            if name in variables:
                variables[name] = np.roll(variables[name], 1, -1)
        classes = variables[f"{scope}class/W"].shape[-1] - 1
        cascade = scope.startswith("cascade")
        for leaf in ("W", "b"):
            name = f"{scope}box/{leaf}"
            boxes = variables.get(name)
            if boxes is None or boxes.shape[-1] != 4 * classes or (cascade and classes == 1):
                continue
            # With a single class both kinds of regressor have equal shapes; the class-specific one is the default here.
            variables[name] = np.concatenate([np.zeros_like(boxes[..., :4]), boxes], -1)


def _agnostic_columns(variables: dict[str, np.ndarray]) -> None:
    """Of class-agnostic regressors with two groups (background, foreground) keeps the foreground's."""
    for scope in _output_scopes(variables):
        classes = variables[f"{scope}class/W"].shape[-1]
        for leaf in ("W", "b"):
            name = f"{scope}box/{leaf}"
            if name in variables and variables[name].shape[-1] == 8 and classes > 2:
                variables[name] = variables[name][..., 4:]


def _without_mask_background(variables: dict[str, np.ndarray], report: Report) -> None:
    """Removes the mask logits' channel for the background, which no prediction uses."""
    scopes = _output_scopes(variables)
    classes = variables[f"{scopes[0]}class/W"].shape[-1] if scopes else 0
    if "maskrcnn/conv/W" in variables and variables["maskrcnn/conv/W"].shape[-1] == classes:
        variables["maskrcnn/conv/W"] = variables["maskrcnn/conv/W"][..., 1:]
        if "maskrcnn/conv/b" in variables:
            variables["maskrcnn/conv/b"] = variables["maskrcnn/conv/b"][1:]
        report.notes.append("the mask channel of the background is left out")


def _ratio_major_anchors(variables: dict[str, np.ndarray], ratios: int = 3) -> None:
    """RPN channels in the order (ratio, size) -> this project's (size, ratio)."""
    for name, per_anchor in (("rpn/class/W", 1), ("rpn/class/b", 1), ("rpn/box/W", 4), ("rpn/box/b", 4)):
        if name in variables:
            value = variables[name]
            if value.shape[-1] % (ratios * per_anchor):
                raise UserError(f"{name} has {value.shape[-1]} channels: only anchors of {ratios} ratios are supported")
            parts = value.reshape(*value.shape[:-1], ratios, -1, per_anchor)
            variables[name] = np.swapaxes(parts, -3, -2).reshape(value.shape)


def legacy_cell_anchors(stride: int, sizes: Iterable[float], ratios: Iterable[float] = (0.5, 1.0, 2.0)) -> np.ndarray:
    """Anchors of Detectron and its successors, float64 [sizes·ratios, 4], sizes outermost, in continuous coordinates.

    They derive from a stride × stride cell whose sides are rounded to whole pixels per ratio and then scaled, centred
    in the middle of the cell (pixel indices there: the last coordinate is inclusive).
    """
    cells = []
    for size in sizes:
        for ratio in ratios:
            w = np.round(math.sqrt(stride * stride / ratio))
            h = np.round(w * ratio)
            half = np.array([w, h]) * (size / stride) / 2
            cells.append([*(stride / 2 - half), *(stride / 2 + half)])
    return np.array(cells)


def _use_legacy_boxes(settings: dict[str, Any], variables: Mapping[str, np.ndarray]) -> None:
    """The conventions of Detectron and maskrcnn-benchmark: boxes of inclusive pixel indices, the first RoIAlign, in
    C4 with as many samples as a bin has cells."""
    settings["FRCNN.ROI_ALIGNED"] = False
    settings["FRCNN.ROI_TO_LAST_PIXEL"] = True
    if any(name.startswith("fpn/") for name in variables):
        cells = [legacy_cell_anchors(2**k, [8 * 2**k]) for k in range(2, 7)]
    else:
        cells = [legacy_cell_anchors(16, [32, 64, 128, 256, 512])]
        settings.setdefault("FRCNN.ROI_SAMPLES", 0)
    if "rpn/class/b" in variables and variables["rpn/class/b"].size == len(cells[0]):
        settings["RPN.CELL_ANCHORS"] = [level.tolist() for level in cells]


def _use_cell_anchors(cells: list[np.ndarray], settings: dict[str, Any], variables: Mapping[str, np.ndarray]) -> None:
    """Stores recorded cell anchors if they are not those that this project computes by default."""
    sizes, ratios = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
    ours = [[[-s / math.sqrt(r) / 2, -s * math.sqrt(r) / 2, s / math.sqrt(r) / 2, s * math.sqrt(r) / 2] for r in ratios]
            for s in sizes]  # fmt: skip
    if not any(name.startswith("fpn/") for name in variables):
        ours = [sum(ours, [])]
    same = len(cells) == len(ours) and all(
        np.shape(a) == np.shape(b) and np.allclose(a, b, atol=1e-3) for a, b in zip(cells, ours)
    )
    if cells and not same:
        settings["RPN.CELL_ANCHORS"] = [np.asarray(level, np.float64).tolist() for level in cells]


def _fold_batch_norms(variables: dict[str, np.ndarray], report: Report) -> None:
    """Batch norms of the pyramid and the heads become the kernels and biases of their convolutions, which is what they
    compute with fixed statistics (in float64, then rounded once)."""
    folded = 0
    for name in [n for n in variables if re.match(r"(fpn|rpn|\w*rcnn(_stage\d)?)/.*/bn/gamma$", n)]:
        scope = name[: -len("bn/gamma")]
        parts = {leaf: variables.get(f"{scope}bn/{leaf}") for leaf in _NORM_LEAVES.values()}
        kernel = variables.get(f"{scope}W")
        if kernel is None or any(part is None or part.shape != kernel.shape[-1:] for part in parts.values()):
            continue  # reported as unused and missing
        gamma, beta, mean, variance = (part.astype(np.float64) for part in parts.values())
        scale = gamma / np.sqrt(variance + _BN_EPSILON)
        variables[f"{scope}W"] = (kernel * scale).astype(np.float32)
        variables[f"{scope}b"] = (beta + (variables.get(f"{scope}b", 0.0) - mean) * scale).astype(np.float32)
        for leaf in parts:
            del variables[f"{scope}bn/{leaf}"]
        report.mapped.update(
            {old: f"{scope}{'b' if 'beta' in new or 'mean' in new else 'W'}"
             for old, new in report.mapped.items() if new.startswith(f"{scope}bn/")}
        )  # fmt: skip
        folded += 1
    if folded:
        report.notes.append(f"{folded} batch norms of the pyramid and the heads are folded into their convolutions")


def _drop_gaps(variables: dict[str, np.ndarray], settings: dict[str, Any], names: list[str], path: Any) -> list[str]:
    """Of classes numbered by COCO's category ids 1..90 keeps the 80 that exist."""
    if settings.get("DATA.NUM_CATEGORY") != 90:
        raise UserError(f"--drop-unused-classes is for 90 COCO ids, {path} has {settings.get('DATA.NUM_CATEGORY', 0)}")
    kept = [i for i in range(1, 91) if i not in _GAPS_IN_COCO_IDS]
    with_background = np.array([0, *kept])
    for leaf in ("W", "b"):
        name = f"fastrcnn/outputs/class/{leaf}"
        variables[name] = variables[name][..., with_background]
        name = f"fastrcnn/outputs/box/{leaf}"
        if variables[name].shape[-1] == 4 * 91:
            columns = (with_background[:, None] * 4 + np.arange(4)).reshape(-1)
            variables[name] = variables[name][..., columns]
        name = f"maskrcnn/conv/{leaf}"
        if name in variables and variables[name].shape[-1] == 90:
            variables[name] = variables[name][..., np.array(kept) - 1]
    settings["DATA.NUM_CATEGORY"] = 80
    return [names[i - 1] for i in kept] if len(names) == 90 else names


def _coco_ids(system: str, classes: int) -> list[int]:
    """Category ids of models whose number of classes shows that they were trained on COCO."""
    if classes == 90 and system.startswith("torchvision"):
        return list(range(1, 91))
    return [i for i in range(1, 91) if i not in _GAPS_IN_COCO_IDS] if classes == 80 else []


def _default_class_names(system: str, classes: int, report: Report) -> list[str]:
    if classes == 80:
        report.notes.append(
            "80 classes are assumed to be COCO's, in the order of their ids; set others with --class-names"
        )
        return list(_COCO_NAMES)
    if classes == 90 and system.startswith("torchvision"):
        names = iter(_COCO_NAMES)
        report.notes.append(
            "90 classes are COCO's category ids, 10 of which do not exist; --drop-unused-classes keeps the other 80 "
            "(the softmax then no longer sees the 10, which moves scores by what they took)"
        )
        return [f"unused {i}" if i in _GAPS_IN_COCO_IDS else next(names) for i in range(1, 91)]
    return []


# ---------------------------------------------------------------------------------------------------------- settings
def _groups(variables: Mapping[str, np.ndarray]) -> int:
    """Groups of the bottlenecks' 3x3 convolutions."""
    try:
        width = variables["group0/block0/conv1/W"].shape[3]
        return width // variables["group0/block0/conv2/W"].shape[2]
    except KeyError:
        return 1


def _check_known_structure(variables: Mapping[str, np.ndarray], path: Any) -> None:
    if "conv0/W" not in variables or "group0/block0/conv1/W" not in variables:
        raise UserError(f"{path}: no ResNet found in it")
    if "group0/block0/conv2/W" not in variables:
        raise UserError(f"{path}: no residual blocks found in it, the second convolution of group0/block0 is missing")
    stem = variables["conv0/W"].shape[3]
    width = variables["group0/block0/conv1/W"].shape[3]
    basic = _has_basic_blocks(variables)
    if basic and _groups(variables) != 1:
        raise UserError(f"{path}: a ResNet of basic blocks with groups; only bottlenecks can have groups here")
    for name, value in variables.items():
        block = re.match(r"group\d/block(\d+)/", name)
        if block and int(block[1]) >= len(variables):
            raise UserError(f"{path}: the number of the block {name} is higher than that of all tensors")
        match = re.fullmatch(r"group(\d)/block\d+/conv([123])/W", name)
        if match:
            want = (stem if basic else stem * 4 if match[2] == "3" else width) * 2 ** int(match[1])
            if value.shape[3] != want:
                raise UserError(f"{path}: {name} has {value.shape[3]} channels where this ResNet has {want}")


def _has_basic_blocks(variables: Mapping[str, np.ndarray]) -> bool:
    """Whether the blocks are two 3x3 convolutions (ResNet-18 and 34) instead of bottlenecks."""
    return not any(name.startswith("group0/block0/conv3/") for name in variables)


def _derive_settings(variables: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The settings that shapes and names determine."""
    names = set(variables)

    def out_channels(name: str) -> int:
        return int(variables[name].shape[-1])

    blocks = [0, 0, 0, 0]
    for name in names:
        match = re.match(r"group([0-3])/block(\d+)/", name)
        if match:
            blocks[int(match[1])] = max(blocks[int(match[1])], int(match[2]) + 1)
    groups = _groups(variables)
    basic = _has_basic_blocks(variables)
    settings: dict[str, Any] = {
        "BACKBONE.RESNET_NUM_BLOCK": blocks,
        "BACKBONE.BLOCK": "basic" if basic else "bottleneck",
        "BACKBONE.NORM": "GN" if "conv0/gn/gamma" in names else "FreezeBN" if "conv0/bn/gamma" in names else None,
        "BACKBONE.STEM_CHANNELS": out_channels("conv0/W"),
        "BACKBONE.NUM_GROUPS": groups,
        "BACKBONE.WIDTH_PER_GROUP": 64 if basic else out_channels("group0/block0/conv1/W") // groups,
        "BACKBONE.BN_EPSILON": _BN_EPSILON,
        "BACKBONE.TF_PAD_MODE": False,
        "BACKBONE.STRIDE_1X1": False,
        "PREPROC.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PREPROC.PIXEL_STD": [58.395, 57.12, 57.375],
    }
    if not any(name.startswith("rpn/") for name in names):
        return settings
    fpn = any(name.startswith("fpn/") for name in names)
    settings["RPN.NUM_CONVS"] = max(1, sum(bool(re.fullmatch(r"rpn/conv\d+/W", name)) for name in names))
    scopes = _output_scopes(variables)
    cascade = bool(scopes) and scopes[0].startswith("cascade")
    settings["MODE_FPN"] = fpn
    if any(re.match(r"(fastrcnn|cascade_rcnn_stage\d|maskrcnn|keypointrcnn)/", name) for name in names):
        settings["MODE_MASK"] = "maskrcnn/conv/W" in names
        settings["MODE_KEYPOINT"] = "keypointrcnn/deconv/W" in names
        settings["FPN.CASCADE"] = cascade
    else:
        settings["MODE_RPN_ONLY"] = True
        blocks[3] = blocks[3] or blocks[0]  # C4: a last stage missing from the file; published models have this depth
    if scopes and f"{scopes[0]}class/W" in names and f"{scopes[0]}box/W" in names:
        classes = out_channels(f"{scopes[0]}class/W") - 1
        settings["DATA.NUM_CATEGORY"] = classes
        settings["FRCNN.CLASS_AGNOSTIC"] = not cascade and out_channels(f"{scopes[0]}box/W") == 4
    if fpn:
        head = "cascade_rcnn_stage1/head/" if cascade else "fastrcnn/"
        norm = next((n for n in ("gn", "bn") if f"fpn/lateral_1x1_c2/{n}/gamma" in names), None)
        settings["FPN.NORM"] = "GN" if norm == "gn" else None
        # Only tensorpack's convolutions before a group norm have biases; their order is bias, ReLU, norm.
        normalised = [n[: -len("gn/gamma")] for n in names if re.match(r"(?!conv0/|group\d/).*/gn/gamma$", n)]
        settings["FPN.GN_AFTER_RELU"] = any(f"{scope}b" in names for scope in normalised)
        if "fpn/lateral_1x1_c2/W" in names:
            settings["FPN.NUM_CHANNEL"] = out_channels("fpn/lateral_1x1_c2/W")
        if f"{head}conv0/W" in names:
            kind = "fastrcnn_4conv1fc_gn_head" if f"{head}conv0/gn/gamma" in names else "fastrcnn_4conv1fc_head"
            settings["FPN.FRCNN_CONV_HEAD_DIM"] = out_channels(f"{head}conv0/W")
            fc = f"{head}fc/W"
        else:
            kind, fc = "fastrcnn_2fc_head", f"{head}fc6/W"
        settings["FPN.FRCNN_HEAD_FUNC"] = kind
        if fc in names:
            settings["FPN.FRCNN_FC_HEAD_DIM"] = out_channels(fc)
        gn_masks = "maskrcnn/fcn0/gn/gamma" in names
        settings["FPN.MRCNN_HEAD_FUNC"] = "maskrcnn_up4conv_gn_head" if gn_masks else "maskrcnn_up4conv_head"
    elif "rpn/conv0/W" in names:
        settings["RPN.HEAD_DIM"] = out_channels("rpn/conv0/W")
    if settings.get("MODE_MASK"):
        several = settings.get("DATA.NUM_CATEGORY", 0) > 1  # with a single class both kinds of mask are the same
        settings["MRCNN.CLASS_AGNOSTIC"] = several and variables["maskrcnn/conv/W"].shape[-1] == 1
    if "maskrcnn/deconv/W" in names:
        settings["MRCNN.HEAD_DIM"] = int(variables["maskrcnn/deconv/W"].shape[2])
    if "keypointrcnn/deconv/W" in names:
        settings["KRCNN.NUM_KEYPOINT"] = int(variables["keypointrcnn/deconv/W"].shape[2])
        settings["KRCNN.HEAD_DIM"] = int(variables["keypointrcnn/deconv/W"].shape[3])
    return settings


def expected_shapes(settings: Mapping[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(shapes of the variables that a model with these settings must have, names of those that it may also have)."""
    if settings.get("BACKBONE.NAME") in NETWORKS and "MODE_FPN" not in settings:
        return dict(variable_shapes(settings["BACKBONE.NAME"])), set()
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(scope: str, kernel: Iterable[int], norm: str | None = None, bias: bool = False, size: int = 0) -> int:
        """A layer with this kernel; norms and biases are of `size`, by default the kernel's last. Returns the size."""
        shapes[f"{scope}/W"] = tuple(kernel)
        size = size or shapes[f"{scope}/W"][-1]
        leaves = {"bn": ["gamma", "beta", "mean/EMA", "variance/EMA"], "gn": ["gamma", "beta"], None: []}
        shapes.update({f"{scope}/{norm}/{leaf}": (size,) for leaf in leaves[norm]})
        if norm is None or bias:
            shapes[f"{scope}/b"] = (size,)
        return size

    norm = {"GN": "gn", None: None}.get(settings["BACKBONE.NORM"], "bn")
    stem, groups = settings["BACKBONE.STEM_CHANNELS"], settings["BACKBONE.NUM_GROUPS"]
    bottleneck = settings["BACKBONE.BLOCK"] == "bottleneck"
    per_group = settings["BACKBONE.WIDTH_PER_GROUP"]
    width = stem if not bottleneck or (groups, per_group) == (1, 64) else groups * per_group
    x = layer("conv0", (7, 7, 3, stem), norm)
    alone = settings.get("MODE_RPN_ONLY", False)
    blocks = settings["BACKBONE.RESNET_NUM_BLOCK"]
    stages = []  # channels of C2, C3, …
    for group, count in enumerate(blocks[:3] if alone and not settings["MODE_FPN"] else blocks):
        out, inner = stem * 2**group * (4 if bottleneck else 1), width * 2**group
        for block in range(count):
            scope = f"group{group}/block{block}"
            # A basic block of the first stage has the channels of its input.
            if block == 0 and (group > 0 or bottleneck):
                layer(f"{scope}/convshortcut", (1, 1, x, out), norm)
            if bottleneck:
                layer(f"{scope}/conv1", (1, 1, x, inner), norm)
                layer(f"{scope}/conv2", (3, 3, inner // groups, inner), norm)
                x = layer(f"{scope}/conv3", (1, 1, inner, out), norm)
            else:
                layer(f"{scope}/conv1", (3, 3, x, out), norm)
                x = layer(f"{scope}/conv2", (3, 3, out, out), norm)
        stages.append(x)
    if "MODE_FPN" not in settings:
        return shapes, {"linear/W", "linear/b"}

    fpn = settings["MODE_FPN"]
    biased = settings["FPN.GN_AFTER_RELU"]
    x = hidden = settings["FPN.NUM_CHANNEL"]
    anchors = len(settings["RPN.ANCHOR_RATIOS"])
    if fpn:
        norm = "gn" if settings["FPN.NORM"] == "GN" else None
        for level, channels in enumerate(stages, 2):
            layer(f"fpn/lateral_1x1_c{level}", (1, 1, channels, x), norm, biased)
            layer(f"fpn/posthoc_3x3_p{level}", (3, 3, x, x), norm, biased)
    else:
        x, hidden, anchors = stages[2], settings["RPN.HEAD_DIM"], anchors * len(settings["RPN.ANCHOR_SIZES"])
    if settings["RPN.CELL_ANCHORS"]:
        anchors = len(settings["RPN.CELL_ANCHORS"][0])
    for k in range(settings["RPN.NUM_CONVS"]):
        layer(f"rpn/conv{k}", (3, 3, hidden if k else x, hidden))
    layer("rpn/class", (1, 1, hidden, anchors))
    layer("rpn/box", (1, 1, hidden, anchors * 4))
    if alone:
        return shapes, set()
    classes = settings["DATA.NUM_CATEGORY"]
    boxes = 1 if settings["FRCNN.CLASS_AGNOSTIC"] or settings["FPN.CASCADE"] else classes + 1
    heads = [(f"cascade_rcnn_stage{k}/head/", f"cascade_rcnn_stage{k}/outputs/") for k in (1, 2, 3)]
    for head, output in heads if settings["FPN.CASCADE"] else [("fastrcnn/", f"fastrcnn/{'outputs/' * fpn}")]:
        feature, dim = stages[-1], settings["FPN.FRCNN_FC_HEAD_DIM"]
        area = settings["FRCNN.ROI_SIZE"] ** 2
        if fpn and settings["FPN.FRCNN_HEAD_FUNC"] == "fastrcnn_2fc_head":
            layer(f"{head}fc6", (x * area, dim))
            feature = layer(f"{head}fc7", (dim, dim))
        elif fpn:
            norm = "gn" if "_gn_" in settings["FPN.FRCNN_HEAD_FUNC"] else None
            feature = x
            for k in range(4):
                kernel = (3, 3, feature, settings["FPN.FRCNN_CONV_HEAD_DIM"])
                feature = layer(f"{head}conv{k}", kernel, norm, biased)
            feature = layer(f"{head}fc", (feature * area, dim))
        layer(f"{output}class", (feature, classes + 1))
        layer(f"{output}box", (feature, boxes * 4))
    if settings["MODE_MASK"]:
        feature, dim = x if fpn else stages[-1], settings["MRCNN.HEAD_DIM"]
        norm = "gn" if "_gn_" in settings["FPN.MRCNN_HEAD_FUNC"] else None
        for k in range(4 if fpn else 0):
            feature = layer(f"maskrcnn/fcn{k}", (3, 3, feature, dim), norm, biased)
        layer("maskrcnn/deconv", (2, 2, dim, feature), size=dim)
        layer("maskrcnn/conv", (1, 1, dim, 1 if settings["MRCNN.CLASS_AGNOSTIC"] else classes))
    if settings["MODE_KEYPOINT"]:
        feature, points = x, settings["KRCNN.NUM_KEYPOINT"]
        for k in range(8):
            feature = layer(f"keypointrcnn/conv{k}", (3, 3, feature, settings["KRCNN.HEAD_DIM"]))
        layer("keypointrcnn/deconv", (4, 4, points, feature), size=points)
    return shapes, set()


def _check_shapes(variables: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], path: Any) -> None:
    """Refuses what no graph of these settings takes, e.g. other numbers of anchors or channels."""
    for name, shape in shapes.items():
        if name in variables and variables[name].shape != tuple(shape):
            raise UserError(
                f"{path}: {name} is {list(variables[name].shape)} where a model with its settings has {list(shape)}; "
                "if a setting describes it (e.g. RPN.ANCHOR_RATIOS), give it with --config, else it is not supported"
            )


def _rules_of(system: str, variables: Mapping[str, Any]) -> Rules:
    """The rules by which a file of `system` with these variables would be read."""
    if system == "detectron2":
        conv_head = any(re.match(r"(fastrcnn|cascade_rcnn_stage1/head)/conv0/", name) for name in variables)
        return _detectron2_rules("fpn/lateral_1x1_c2/W" in variables, conv_head)
    return _torchvision_rules() if "rpn/conv0/W" in variables else _torchvision_imagenet_rules()


def _known_settings(settings: dict[str, Any], overrides: Iterable[str], report: Report) -> dict[str, Any]:
    """The settings as values of this configuration, with the user's `overrides`; settings without a key here become
    notes."""
    cfg = default_config()
    known = cfg.to_dict()
    for key in [k for k in settings if k not in known]:
        report.notes.append(f"the model also needs {key}={settings.pop(key)}, for which there is no setting")
    cfg.update_from_dict(settings, "derived settings")
    given = [arg.partition("=")[0].strip() for arg in overrides]
    cfg.update_args(overrides)
    flat = cfg.to_dict()
    changed = [k for k in flat if flat[k] != known[k]]
    return {k: flat[k] for k in flat if k in settings or k in given or k in changed}


def _rounded(values: Iterable[float]) -> list[float]:
    """float32 numbers as the shortest decimals that give them."""
    return [float(f"{v:.6g}") for v in values]


def _some(names: list[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" … ({len(names) - count} more)" if len(names) > count else "")


# ------------------------------------------------------------------------------------------------------ command line
def _parse_class_names(text: str | None) -> list[str] | None:
    """Names from 'a,b,c', a text file with one per line, or a COCO-style annotation file (by ascending id)."""
    if text is None:
        return None
    path = os.path.expanduser(text)
    if path.endswith(".json"):
        content = read_json(path, "annotation file")
        categories = content.get("categories") if isinstance(content, dict) else None
        try:
            names = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
        except (TypeError, KeyError):
            raise UserError(f"--class-names {text}: categories must be objects with name and id") from None
    elif os.path.isfile(path):
        names = [line.strip() for line in read_text(path, "list of class names").splitlines() if line.strip()]
    else:
        names = [name.strip() for name in text.split(",")]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"--class-names {text}: names must be texts, and none of them empty")
    return names


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "input", type=path_argument, help="weights of another system (.npz .pkl .pth .h5, or a TensorFlow checkpoint)"
    )
    parser.add_argument(
        "output", nargs="?", type=path_argument, help="the .npz to write; without it only the report is printed"
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings that win over the derived")
    parser.add_argument("--class-names", help="a,b,c or a file: one per line, or annotations .json")
    parser.add_argument("--drop-unused-classes", action="store_true", help="keep 80 of torchvision's 90 COCO ids")
    parser.add_argument(
        "--allow-unused",
        action="store_true",
        help="write although tensors of the file have no place (another model than the file's)",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="write although tensors of the model are missing (it then loads with --partial-load only)",
    )
    parser.add_argument("--verbose", action="store_true", help="list every tensor's new name")
    parser.add_argument(
        "--to", choices=sorted(ENDINGS), help="the way back: write this project's weights for that system"
    )
    args = parser.parse_args(argv)
    if args.to:
        if not args.output:
            raise UserError(f"--to {args.to} needs the name of the file to write")
        options = write_back(
            args.input, args.output, args.to, settings_words(args.config), partial(_rules_of, args.to), _NORM_LEAVES,
            convert,
        )  # fmt: skip
        print(f"options in {args.to}: " + " ".join(options))
        return 0
    if args.output and not args.output.endswith(".npz"):
        raise UserError(f"{args.output}: the output is an .npz file; give it that ending")
    if args.output:
        check_output_file(args.output, "output")
    names = _parse_class_names(args.class_names)
    variables, settings, report = convert(args.input, settings_words(args.config), names, args.drop_unused_classes)
    print(report.table(args.verbose))
    print("settings: " + " ".join(f"{k}={v}".replace(" ", "") for k, v in settings.items()))
    if (report.unused and not args.allow_unused) or (report.missing and not args.allow_missing):
        problems = [f"{len(v)} {k}" for k, v in (("unused", report.unused), ("missing", report.missing)) if v]
        logger.error(
            f"{args.input}: {' and '.join(problems)} tensors, nothing written: without them it would be another model "
            f"than the file's; they begin with {_some([*report.unused, *report.missing], 1)}"
        )
        return 3
    if args.output:
        meta = make_meta(settings, report.class_names, 0)
        if report.category_ids:
            meta["category_ids"] = report.category_ids
        meta["source"] = {"file": Path(args.input).name, "system": report.system}
        save_npz(args.output, variables, meta)
        logger.info(f"{args.output} written: {len(variables)} variables, {len(settings)} settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
