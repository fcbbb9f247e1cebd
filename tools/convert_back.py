"""The way back: weights of this project as a file of detectron2, torchvision or tensorpack (`tools/convert.py --to`).

Names come from the converter's own rules, read backwards. Nothing is written unless the file, converted again, gives
the same variables to the bit and the same settings, apart from settings that the target has in its own configuration;
these are printed.
"""

import io
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, atomic_write, check_output_file, logger
from config import Config, default_config
from utils.checkpoint import TENSORPACK_NORMS, is_training_state, load_weights, save_npz, without_averages

__all__ = ["ENDINGS", "convert_back", "modules_by_scope", "write_back", "write_torch"]

ENDINGS = {"detectron2": (".pkl", ".pth"), "torchvision": (".pth",), "tensorpack": (".npz",)}

# Settings that change what a trained model computes and do not follow from the shapes of its tensors.
_OF_THE_MODEL = re.compile(
    r"MODE_.*|PREPROC\.PIXEL_.*|BACKBONE\.(?!WEIGHTS|FREEZE|FEATURE).*|FPN\.(?!.*_DIM).*|CASCADE\.BBOX_REG_WEIGHTS"
    r"|RPN\.(ANCHOR_.*|CELL_ANCHORS|STRIDE_FROM_SIZE|MIN_SIZE|PROPOSAL_NMS_THRESH|NUM_CONVS|TEST_.*)"
    r"|FRCNN\.(BBOX_REG_WEIGHTS|CLASS_AGNOSTIC|ROI_.*)|MRCNN\.(ROI_SIZE|CLASS_AGNOSTIC)|KRCNN\.(NUM_KEYPOINT|ROI_SIZE)"
)
_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_FC_HEADS = ("fastrcnn_2fc_head", "fastrcnn_4conv1fc_head", "fastrcnn_4conv1fc_gn_head")
_MASK_HEADS = ("maskrcnn_up4conv_head", "maskrcnn_up4conv_gn_head")


# ----------------------------------------------------------------------------------------------------- what cannot be
def _has_group_norm_of_detector(cfg: Config) -> bool:
    heads = "_gn_" in cfg.FPN.FRCNN_HEAD_FUNC or (cfg.MODE_MASK and "_gn_" in cfg.FPN.MRCNN_HEAD_FUNC)
    return bool(cfg.MODE_FPN) and (cfg.FPN.NORM == "GN" or (heads and not cfg.MODE_RPN_ONLY))


def _depth(cfg: Config) -> int | None:
    blocks = tuple(cfg.BACKBONE.RESNET_NUM_BLOCK)
    return 34 if cfg.BACKBONE.BLOCK == "basic" and blocks == (3, 4, 6, 3) else _DEPTHS.get(blocks)


# Settings (of a detector, if they are not the backbone's) that a target has no place for: key -> whether cfg has such a
# value.
_EVERYWHERE: dict[str, Callable[[Config], bool]] = {
    "BACKBONE.NAME": lambda c: c.BACKBONE.NAME != "resnet",
    "FPN.FRCNN_HEAD_FUNC": lambda c: c.MODE_FPN and c.FPN.FRCNN_HEAD_FUNC not in _FC_HEADS,
    "FPN.MRCNN_HEAD_FUNC": lambda c: c.MODE_FPN and c.MODE_MASK and c.FPN.MRCNN_HEAD_FUNC not in _MASK_HEADS,
    "FRCNN.ROI_TO_LAST_PIXEL": lambda c: c.FRCNN.ROI_TO_LAST_PIXEL,
}
_CANNOT: dict[str, dict[str, Callable[[Config], bool]]] = {
    "detectron2": _EVERYWHERE
    | {
        "BACKBONE.NORM": lambda c: c.BACKBONE.NORM is None,
        "BACKBONE.RESNET_NUM_BLOCK": lambda c: _depth(c) is None,
        "BACKBONE.BLOCK": lambda c: c.BACKBONE.BLOCK == "basic" and not c.MODE_FPN,
        "FPN.GN_AFTER_RELU": lambda c: c.FPN.GN_AFTER_RELU and _has_group_norm_of_detector(c),
        "FRCNN.ROI_OP": lambda c: c.FRCNN.ROI_OP == "crop_and_resize",
        "RPN.MIN_SIZE": lambda c: c.RPN.MIN_SIZE % 1 > 0,
        "MODE_KEYPOINT": lambda c: c.MODE_KEYPOINT and not c.MODE_FPN,
    },
    "torchvision": _EVERYWHERE
    | {
        "BACKBONE.NORM": lambda c: c.BACKBONE.NORM is None,
        "MODE_FPN": lambda c: not c.MODE_FPN,
        "MODE_RPN_ONLY": lambda c: c.MODE_RPN_ONLY,
        "FPN.CASCADE": lambda c: c.FPN.CASCADE,
        "FPN.GN_AFTER_RELU": lambda c: c.FPN.GN_AFTER_RELU and _has_group_norm_of_detector(c),
        "FRCNN.CLASS_AGNOSTIC": lambda c: c.FRCNN.CLASS_AGNOSTIC,
        "MRCNN.CLASS_AGNOSTIC": lambda c: c.MODE_MASK and c.MRCNN.CLASS_AGNOSTIC,
    },
    "tensorpack": _EVERYWHERE
    | {
        "BACKBONE.BLOCK": lambda c: c.BACKBONE.BLOCK == "basic",
        "BACKBONE.NUM_GROUPS": lambda c: c.BACKBONE.NUM_GROUPS != 1,
        "MODE_KEYPOINT": lambda c: c.MODE_KEYPOINT,
        "MODE_RPN_ONLY": lambda c: c.MODE_RPN_ONLY,
        "RPN.NUM_CONVS": lambda c: c.RPN.NUM_CONVS != 1,
        "FPN.GN_AFTER_RELU": lambda c: not c.FPN.GN_AFTER_RELU and _has_group_norm_of_detector(c),
        "FRCNN.CLASS_AGNOSTIC": lambda c: c.FRCNN.CLASS_AGNOSTIC and not c.FPN.CASCADE,
        "MRCNN.CLASS_AGNOSTIC": lambda c: c.MODE_MASK and c.MRCNN.CLASS_AGNOSTIC,
    },
}


# ------------------------------------------------------------------------- settings that the target's configuration has
def _detectron2_options(cfg: Config, classes: int) -> dict[str, tuple[str, Any]]:
    """{setting here: (option there, its value)}; several options of a setting have keys with a suffix after '+'."""
    b, rpn, roi = cfg.BACKBONE, cfg.RPN, cfg.FRCNN
    fpn = bool(cfg.MODE_FPN)
    norm = {"FreezeBN": "FrozenBN", None: ""}
    heads = "CascadeROIHeads" if cfg.FPN.CASCADE else "StandardROIHeads" if fpn else "Res5ROIHeads"
    pooler = "ROIPool" if roi.ROI_OP == "pool" else "ROIAlignV2" if roi.ROI_ALIGNED else "ROIAlign"
    convs = "4conv" in cfg.FPN.FRCNN_HEAD_FUNC
    gn_box, gn_mask = ("GN" if "_gn_" in head else "" for head in (cfg.FPN.FRCNN_HEAD_FUNC, cfg.FPN.MRCNN_HEAD_FUNC))
    sizes = [[s] for s in rpn.ANCHOR_SIZES] if fpn else [list(rpn.ANCHOR_SIZES)]
    mask_side = cfg.MRCNN.ROI_SIZE if fpn else 2 * roi.ROI_SIZE
    options = {
        "PREPROC.PIXEL_MEAN": ("PIXEL_MEAN", cfg.PREPROC.PIXEL_MEAN[::-1]),
        "PREPROC.PIXEL_STD": ("PIXEL_STD", cfg.PREPROC.PIXEL_STD[::-1]),
        "BACKBONE.RESNET_NUM_BLOCK": ("RESNETS.DEPTH", _depth(cfg)),
        "BACKBONE.NORM": ("RESNETS.NORM", norm.get(b.NORM, b.NORM)),
        "BACKBONE.STRIDE_1X1": ("RESNETS.STRIDE_IN_1X1", bool(b.STRIDE_1X1)),
        "BACKBONE.STEM_CHANNELS": ("RESNETS.STEM_OUT_CHANNELS", b.STEM_CHANNELS),
        "BACKBONE.STEM_CHANNELS+": ("RESNETS.RES2_OUT_CHANNELS", b.STEM_CHANNELS * (1 if b.BLOCK == "basic" else 4)),
        "BACKBONE.NUM_GROUPS": ("RESNETS.NUM_GROUPS", b.NUM_GROUPS),
        "BACKBONE.WIDTH_PER_GROUP": ("RESNETS.WIDTH_PER_GROUP", b.WIDTH_PER_GROUP),
        "MODE_FPN": ("BACKBONE.NAME", f"build_resnet_{'fpn_' * fpn}backbone"),
        "MODE_FPN+": ("RESNETS.OUT_FEATURES", [f"res{i}" for i in ((2, 3, 4, 5) if fpn else (4,))]),
        "MODE_RPN_ONLY": ("META_ARCHITECTURE", "ProposalNetwork" if cfg.MODE_RPN_ONLY else "GeneralizedRCNN"),
        "MODE_MASK": ("MASK_ON", bool(cfg.MODE_MASK)),
        "MODE_KEYPOINT": ("KEYPOINT_ON", bool(cfg.MODE_KEYPOINT)),
        "RPN.ANCHOR_SIZES": ("ANCHOR_GENERATOR.SIZES", sizes),
        "RPN.ANCHOR_RATIOS": ("ANCHOR_GENERATOR.ASPECT_RATIOS", [list(rpn.ANCHOR_RATIOS)]),
        "RPN.NUM_CONVS": ("RPN.CONV_DIMS", [-1] * rpn.NUM_CONVS),
        "RPN.MIN_SIZE": ("PROPOSAL_GENERATOR.MIN_SIZE", int(rpn.MIN_SIZE)),
        "RPN.PROPOSAL_NMS_THRESH": ("RPN.NMS_THRESH", rpn.PROPOSAL_NMS_THRESH),
        "RPN.TEST_PER_LEVEL_NMS_TOPK" if fpn else "RPN.TEST_PRE_NMS_TOPK": (
            "RPN.PRE_NMS_TOPK_TEST", rpn.TEST_PER_LEVEL_NMS_TOPK if fpn else rpn.TEST_PRE_NMS_TOPK),
        "RPN.TEST_FPN_NMS_TOPK" if fpn else "RPN.TEST_POST_NMS_TOPK": (
            "RPN.POST_NMS_TOPK_TEST", rpn.TEST_FPN_NMS_TOPK if fpn else rpn.TEST_POST_NMS_TOPK),
    }  # fmt: skip
    if fpn:
        options |= {
            "FPN.ANCHOR_STRIDES": ("RPN.IN_FEATURES", [f"p{i}" for i in range(2, 7)]),
            "FPN.ANCHOR_STRIDES+": ("FPN.IN_FEATURES", [f"res{i}" for i in range(2, 6)]),
            "FPN.NUM_CHANNEL": ("FPN.OUT_CHANNELS", cfg.FPN.NUM_CHANNEL),
            "FPN.NORM": ("FPN.NORM", cfg.FPN.NORM or ""),
        }
    if not cfg.MODE_RPN_ONLY:
        options |= {
            "FPN.CASCADE": ("ROI_HEADS.NAME", heads),
            "FPN.ANCHOR_STRIDES+heads": (
                "ROI_HEADS.IN_FEATURES", [f"p{i}" for i in range(2, 6)] if fpn else ["res4"]),
            "DATA.NUM_CATEGORY": ("ROI_HEADS.NUM_CLASSES", classes),
            "FRCNN.BBOX_REG_WEIGHTS": ("ROI_BOX_HEAD.BBOX_REG_WEIGHTS", list(roi.BBOX_REG_WEIGHTS)),
            "FRCNN.CLASS_AGNOSTIC": ("ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", bool(roi.CLASS_AGNOSTIC or cfg.FPN.CASCADE)),
            "FRCNN.ROI_OP": ("ROI_BOX_HEAD.POOLER_TYPE", pooler),
            "FRCNN.ROI_SAMPLES": ("ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", roi.ROI_SAMPLES),
            "FRCNN.ROI_SIZE": ("ROI_BOX_HEAD.POOLER_RESOLUTION", roi.ROI_SIZE if fpn else 2 * roi.ROI_SIZE),
            "FRCNN.ROI_ALIGNED": ("ROI_MASK_HEAD.POOLER_TYPE", pooler),
        }  # fmt: skip
        if fpn:
            options |= {
                "FPN.FRCNN_HEAD_FUNC": ("ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
                "FPN.FRCNN_HEAD_FUNC+fc": ("ROI_BOX_HEAD.NUM_FC", 1 if convs else 2),
                "FPN.FRCNN_HEAD_FUNC+conv": ("ROI_BOX_HEAD.NUM_CONV", 4 if convs else 0),
                "FPN.FRCNN_HEAD_FUNC+norm": ("ROI_BOX_HEAD.NORM", gn_box if convs else ""),
                "FPN.FRCNN_CONV_HEAD_DIM": ("ROI_BOX_HEAD.CONV_DIM", cfg.FPN.FRCNN_CONV_HEAD_DIM),
                "FPN.FRCNN_FC_HEAD_DIM": ("ROI_BOX_HEAD.FC_DIM", cfg.FPN.FRCNN_FC_HEAD_DIM),
            }
        if cfg.FPN.CASCADE:
            weights = [list(w) for w in cfg.CASCADE.BBOX_REG_WEIGHTS]
            options["CASCADE.BBOX_REG_WEIGHTS"] = ("ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", weights)
    if cfg.MODE_MASK:
        options |= {
            "MODE_MASK+head": ("ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            "FPN.MRCNN_HEAD_FUNC": ("ROI_MASK_HEAD.NUM_CONV", 4 if fpn else 0),
            "FPN.MRCNN_HEAD_FUNC+norm": ("ROI_MASK_HEAD.NORM", gn_mask if fpn else ""),
            "MRCNN.HEAD_DIM": ("ROI_MASK_HEAD.CONV_DIM", cfg.MRCNN.HEAD_DIM),
            "MRCNN.ROI_SIZE": ("ROI_MASK_HEAD.POOLER_RESOLUTION", mask_side),
            "MRCNN.CLASS_AGNOSTIC": ("ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", bool(cfg.MRCNN.CLASS_AGNOSTIC)),
            "FRCNN.ROI_SAMPLES+mask": ("ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", roi.ROI_SAMPLES),
        }
    if cfg.MODE_KEYPOINT:
        options |= {
            "KRCNN.NUM_KEYPOINT": ("ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", cfg.KRCNN.NUM_KEYPOINT),
            "KRCNN.HEAD_DIM": ("ROI_KEYPOINT_HEAD.CONV_DIMS", [cfg.KRCNN.HEAD_DIM] * 8),
            "KRCNN.ROI_SIZE": ("ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", cfg.KRCNN.ROI_SIZE),
            "FRCNN.ROI_ALIGNED+keypoint": ("ROI_KEYPOINT_HEAD.POOLER_TYPE", pooler),
            "FRCNN.ROI_SAMPLES+keypoint": ("ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", roi.ROI_SAMPLES),
        }
    return {key: (f"MODEL.{option}", value) for key, (option, value) in options.items()}


def _torchvision_options(cfg: Config, classes: int) -> dict[str, tuple[str, Any]]:
    """Arguments of torchvision.models.detection.FasterRCNN, MaskRCNN and KeypointRCNN, and of their parts."""
    scale = 255.0
    return {
        "DATA.NUM_CATEGORY": ("num_classes", classes + 1),
        "PREPROC.PIXEL_MEAN": ("image_mean", [m / scale for m in cfg.PREPROC.PIXEL_MEAN]),
        "PREPROC.PIXEL_STD": ("image_std", [s / scale for s in cfg.PREPROC.PIXEL_STD]),
        "BACKBONE.BN_EPSILON": ("norm_layer.eps", cfg.BACKBONE.BN_EPSILON),
        "BACKBONE.RESNET_NUM_BLOCK": ("ResNet.layers", list(cfg.BACKBONE.RESNET_NUM_BLOCK)),
        "RPN.NUM_CONVS": ("RPNHead.conv_depth", cfg.RPN.NUM_CONVS),
        "RPN.PROPOSAL_NMS_THRESH": ("rpn_nms_thresh", cfg.RPN.PROPOSAL_NMS_THRESH),
        "RPN.TEST_PER_LEVEL_NMS_TOPK": ("rpn_pre_nms_top_n_test", cfg.RPN.TEST_PER_LEVEL_NMS_TOPK),
        "RPN.TEST_FPN_NMS_TOPK": ("rpn_post_nms_top_n_test", cfg.RPN.TEST_FPN_NMS_TOPK),
        "FRCNN.BBOX_REG_WEIGHTS": ("bbox_reg_weights", list(cfg.FRCNN.BBOX_REG_WEIGHTS)),
        "FRCNN.ROI_SAMPLES": ("MultiScaleRoIAlign.sampling_ratio", cfg.FRCNN.ROI_SAMPLES or -1),
        "FRCNN.ROI_SIZE": ("box_roi_pool.output_size", cfg.FRCNN.ROI_SIZE),
        "MRCNN.ROI_SIZE": ("mask_roi_pool.output_size", cfg.MRCNN.ROI_SIZE),
        "KRCNN.NUM_KEYPOINT": ("num_keypoints", cfg.KRCNN.NUM_KEYPOINT),
        "KRCNN.ROI_SIZE": ("keypoint_roi_pool.output_size", cfg.KRCNN.ROI_SIZE),
    }


# tensorpack has these settings under the same names, except for one letter.
_OF_TENSORPACK = [
    "DATA.NUM_CATEGORY", "MODE_MASK", "MODE_FPN", "PREPROC.PIXEL_MEAN", "PREPROC.PIXEL_STD",
    "BACKBONE.RESNET_NUM_BLOCK", "BACKBONE.NORM", "BACKBONE.TF_PAD_MODE", "BACKBONE.STRIDE_1X1", "RPN.ANCHOR_STRIDE",
    "RPN.ANCHOR_SIZES", "RPN.ANCHOR_RATIOS", "RPN.MIN_SIZE", "RPN.PROPOSAL_NMS_THRESH", "RPN.HEAD_DIM",
    "RPN.TEST_PRE_NMS_TOPK", "RPN.TEST_POST_NMS_TOPK", "RPN.TEST_PER_LEVEL_NMS_TOPK", "FRCNN.BBOX_REG_WEIGHTS",
    "FPN.PROPOSAL_MODE", "FPN.NUM_CHANNEL", "FPN.NORM", "FPN.FRCNN_HEAD_FUNC", "FPN.FRCNN_CONV_HEAD_DIM",
    "FPN.FRCNN_FC_HEAD_DIM", "FPN.MRCNN_HEAD_FUNC", "FPN.CASCADE", "MRCNN.HEAD_DIM", "CASCADE.BBOX_REG_WEIGHTS",
]  # fmt: skip


def _tensorpack_options(cfg: Config, classes: int) -> dict[str, tuple[str, Any]]:
    values = {**cfg.to_dict(), "DATA.NUM_CATEGORY": classes}
    return {key: (key.replace("NUM_BLOCK", "NUM_BLOCKS"), values[key]) for key in _OF_TENSORPACK}


_OPTIONS = {
    "detectron2": _detectron2_options,
    "torchvision": _torchvision_options,
    "tensorpack": _tensorpack_options,
}


# ---------------------------------------------------------------------------------------------------- names, backwards
def modules_by_scope(rules: list[tuple[str, Callable[[re.Match], str]]], numbers: int) -> dict[str, list[str]]:
    """{scope here: the modules there that the rules take for it}, in the order of the rules; numbers below `numbers`
    stand for `\\d+`."""
    compiled = [(re.compile(pattern), rename) for pattern, rename in rules]
    found: dict[str, list[str]] = {}
    for pattern, _ in rules:
        for module in _texts(pattern, 0, numbers)[0]:
            scope = next(rename(m) for rule, rename in compiled if (m := rule.fullmatch(module)))
            found.setdefault(scope, []).append(module)
    return found


def _texts(pattern: str, at: int, numbers: int) -> tuple[list[str], int]:
    """The texts that a pattern matches from position `at` up to a closing bracket or its end, and that position. The
    patterns consist of letters, \\d with + or *, [sets], (groups), | and ?."""
    complete, current = [], [""]
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            complete, current, at = complete + current, [""], at + 1
            continue
        part, at = _part(pattern, at, numbers)
        if pattern[at : at + 1] == "?":
            part, at = ["", *part], at + 1
        current = [left + right for left in current for right in part]
    return complete + current, at


def _part(pattern: str, at: int, numbers: int) -> tuple[list[str], int]:
    digits = list("1234567890")  # counting from 1 comes first
    if pattern[at] == "(":
        part, end = _texts(pattern, at + (3 if pattern.startswith("(?:", at) else 1), numbers)
        return part, end + 1
    if pattern[at] == "[":
        end = pattern.index("]", at)
        content = pattern[at + 1 : end]
        span = range(ord(content[0]), ord(content[-1]) + 1) if "-" in content else map(ord, content)
        return [chr(c) for c in span], end + 1
    if not pattern.startswith("\\d", at):
        escaped = pattern[at] == "\\"
        return [pattern[at + escaped]], at + 1 + escaped
    following = pattern[at + 2 : at + 3]
    if following == "+":
        return [str(i) for i in range(numbers)], at + 3
    return (["", *digits], at + 3) if following == "*" else (digits, at + 2)


def _module_of(scope: str, modules: list[str], system: str, variables: Mapping[str, Any]) -> str:
    """The module that the current version of the system has."""
    if system == "torchvision":
        return max(modules, key=lambda m: m.count("."))  # newer versions have sequences where older ones had one layer
    if re.match(r"conv0|group\d|linear", scope):
        stem = {True: "backbone.bottom_up.", False: "roi_heads." if scope.startswith("group3") else "backbone."}
        detector = "rpn/conv0/W" in variables
        prefix = stem["fpn/lateral_1x1_c2/W" in variables] if detector else ""
        return next(m for m in modules if re.fullmatch(re.escape(prefix) + r"(stem|res\d|linear).*", m))
    if scope == "rpn/conv0":
        return next(m for m in modules if ("conv.conv" in m) == ("rpn/conv1/W" in variables))
    return modules[0]


# ------------------------------------------------------------------------------------------------------------- tensors
def convert_back(
    variables: Mapping[str, np.ndarray], system: str, cfg: Config, rules: list, norm_leaves: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """This project's variables -> the tensors of `system` under its names and in its layout.

    rules: of the converter, for the system; norm_leaves: its names of a norm's tensors -> ours. UserError for a
    variable without a place.
    """
    if system == "tensorpack":
        # Its group norms stand beside their convolutions.
        renames = [(p.pattern.lstrip("^"), lambda m, to=to: m.expand(to)) for p, to in TENSORPACK_NORMS]
        norms = {ours: theirs[0] for ours, theirs in modules_by_scope(renames, 4).items()}
        return {re.sub(r".*/gn/", lambda m: norms.get(m[0], m[0]), name): v for name, v in variables.items()}
    leaves = {ours: theirs for theirs, ours in norm_leaves.items()} | {"W": "weight", "b": "bias"}
    highest = max((int(m[1]) for n in variables if (m := re.match(r"group\d/block(\d+)/", n))), default=0)
    modules = modules_by_scope(rules, highest + 1)
    tensors = {}
    for name, value in variables.items():
        split = re.fullmatch(r"(.*?)(/(?:bn|gn))?/(W|b|gamma|beta|mean/EMA|variance/EMA)", name)
        scope = f"{split[1]}{'/norm' if split[2] else ''}" if split else ""
        if split is None or scope not in modules:
            raise UserError(f"{name} has no place in {system}")
        module = _module_of(scope, modules[scope], system, variables)
        value = (
            _values_of_detectron2(name, value) if system == "detectron2" else _values_of_torchvision(name, value, cfg)
        )
        tensors[f"{module}.{leaves[split[3]]}"] = np.ascontiguousarray(
            value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        )
    if system == "detectron2":
        for key in ("PIXEL_MEAN", "PIXEL_STD"):
            tensors[key.lower()] = np.array(cfg.PREPROC.get(key)[::-1], np.float32).reshape(3, 1, 1)
    if system == "torchvision" and not (cfg.BACKBONE.NORM == "GN" or "rpn/conv0/W" in variables):
        # Ordinary batch norms, which count batches, as those of its ImageNet models.
        for name in [n for n in tensors if n.endswith(".running_mean")]:
            tensors[name.replace("running_mean", "num_batches_tracked")] = np.array(0, np.int64)
    return tensors


_OUTPUT = re.compile(r"(?:fastrcnn|cascade_rcnn_stage\d)/(?:outputs/)?(class|box)/[Wb]")


def _values_of_detectron2(name: str, value: np.ndarray) -> np.ndarray:
    """The background comes last, and has no box."""
    output = _OUTPUT.fullmatch(name)
    if output and output[1] == "class":
        return np.roll(value, -1, -1)
    return value[..., 4:] if output and value.shape[-1] > 4 else value


def _values_of_torchvision(name: str, value: np.ndarray, cfg: Config) -> np.ndarray:
    """Images are R, G, B; masks have a channel for the background, which nothing reads."""
    if name == "conv0/W":
        return value[:, :, ::-1]
    if name.startswith("maskrcnn/conv/"):
        return np.concatenate([np.zeros_like(value[..., :1]), value], -1)
    return value


# --------------------------------------------------------------------------------------------------------------- files
def write_torch(file: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array of float32 or int64} as torch.save writes a dictionary of tensors (since version 1.6)."""
    storages = {"float32": b"FloatStorage", "int64": b"LongStorage"}
    ordered_dict = b"ccollections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE

    def plain(value: Any) -> bytes:  # one object, without the frame around it
        return pickle.dumps(value, protocol=2)[2:-1]

    program = io.BytesIO()
    program.write(pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK)
    for key, (name, value) in enumerate(tensors.items()):
        strides = tuple(int(s) // value.itemsize for s in np.ascontiguousarray(value).strides) if value.ndim else ()
        program.write(
            plain(name)
            + b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
            + pickle.MARK + plain("storage") + b"ctorch\n" + storages[value.dtype.name] + b"\n"
            + plain(str(key)) + plain("cpu") + plain(int(value.size)) + pickle.TUPLE + pickle.BINPERSID
            + plain(0) + plain(tuple(map(int, value.shape))) + plain(strides) + pickle.NEWFALSE + ordered_dict
            + pickle.TUPLE + pickle.REDUCE
        )  # fmt: skip
    program.write(pickle.SETITEMS + pickle.STOP)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, value in enumerate(tensors.values()):
            archive.writestr(
                f"archive/data/{key}", np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).data
            )
        archive.writestr("archive/version", "3\n")


def _write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    if path.suffix == ".npz":
        save_npz(path, dict(tensors), None)
        return
    with atomic_write(path, "wb") as file:
        if path.suffix == ".pth":
            write_torch(file, tensors)
        else:
            pickle.dump({"model": dict(tensors), "__author__": "PackRCNN"}, file, protocol=2)


# ------------------------------------------------------------------------------------------------------------- command
def write_back(
    source: str | Path,
    output: str | Path,
    system: str,
    overrides: Iterable[str],
    rules_of: Callable[[Mapping[str, Any]], list],
    norm_leaves: Mapping[str, str],
    forward: Callable[..., tuple[dict[str, np.ndarray], dict[str, Any], Any]],
) -> list[str]:
    """Writes the weights at `source` as a file of `system` -> the options (NAME VALUE) that the model needs there.

    overrides: KEY=VAL settings that win over the stored ones. rules_of(variables) gives the converter's rules of the
    system, norm_leaves its names of norms; forward is the converter, which must give the same model again.
    """
    output = Path(output)
    if output.suffix not in ENDINGS[system]:
        raise UserError(f"{output}: a file of {system} ends in {' or '.join(ENDINGS[system])}")
    check_output_file(output, "output")
    variables, meta = load_weights(source)
    stored = (meta or {}).get("settings") or forward(source)[1]
    cfg = default_config().update_from_dict(stored, f"settings stored in {source}").update_args(overrides)
    variables, averaged = without_averages(variables, cfg.TEST.USE_EMA)
    variables = {n: np.asarray(v, np.float32) for n, v in sorted(variables.items()) if not is_training_state(n)}
    detector = "rpn/conv0/W" in variables
    for key, wrong in _CANNOT[system].items():
        if wrong(cfg) and (detector or key.startswith("BACKBONE.")):
            raise UserError(f"{source}: {system} has no place for its {key}={cfg.get(key)}; nothing written")
    try:
        tensors = convert_back(variables, system, cfg, rules_of(variables), norm_leaves)
    except UserError as e:
        raise UserError(f"{source}: {e}; nothing written") from None

    classes = next(
        (v.shape[-1] - 1 for n, v in variables.items() if (m := _OUTPUT.fullmatch(n)) and m[1] == "class"), 0
    )
    options = _OPTIONS[system](cfg, classes) if detector else {}
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        trial = Path(folder) / output.name
        _write(trial, tensors)
        back, settings, report = forward(trial)
        _compare(source, system, variables, back)
        _compare_settings(source, system, cfg, settings, options, detector)
        trial.replace(output)
    if averaged:
        logger.info(
            f"{source}: {averaged} averaged weights are written; TEST.USE_EMA=False takes those of the last step"
        )
    logger.info(f"{output} written for {system}: {len(tensors)} tensors; read back, they are the same to the bit")
    return [f"{name} {value!r}".replace(", ", ",") for name, value in options.values()]


def _compare(source: Any, system: str, variables: Mapping[str, np.ndarray], back: Mapping[str, np.ndarray]) -> None:
    for name in sorted({*variables, *back}):
        want, got = variables.get(name), back.get(name)
        output = _OUTPUT.fullmatch(name)
        boxes = output is not None and output[1] == "box" and system == "detectron2"
        if boxes and want is not None and got is not None and want.shape[-1] > 4:
            want, got = want[..., 4:], got[..., 4:]  # the background's box, which nothing reads, has no place there
        if want is None or got is None or want.shape != got.shape or want.tobytes() != got.tobytes():
            raise UserError(f"{source}: {name} would come back from {system} changed; nothing written")


def _is_read(key: str, cfg: Config) -> bool:
    """Whether the model that cfg describes depends on a setting of its part."""
    if key.startswith("FPN.") or "_PER_LEVEL_" in key or "_FPN_" in key:
        return bool(cfg.MODE_FPN)
    if key in ("RPN.TEST_PRE_NMS_TOPK", "RPN.TEST_POST_NMS_TOPK"):
        return not cfg.MODE_FPN or cfg.FPN.PROPOSAL_MODE == "Joint"
    parts = {"MRCNN.": cfg.MODE_MASK, "KRCNN.": cfg.MODE_KEYPOINT, "CASCADE.": cfg.FPN.CASCADE,
             "FRCNN.": not cfg.MODE_RPN_ONLY, "RPN.ANCHOR_": not cfg.RPN.CELL_ANCHORS or key == "RPN.ANCHOR_STRIDE",
             "BACKBONE.STRIDE_1X1": cfg.BACKBONE.BLOCK == "bottleneck",
             "BACKBONE.BN_EPSILON": cfg.BACKBONE.NORM in ("FreezeBN", "SyncBN")}  # fmt: skip
    return all(wanted for part, wanted in parts.items() if key.startswith(part))


def _compare_settings(
    source: Any, system: str, cfg: Config, back: Mapping[str, Any], options: Mapping[str, Any], detector: bool
) -> None:
    known = {**default_config().to_dict(), **back}
    told = {key.partition("+")[0] for key in options}
    for key, value in cfg.to_dict().items():
        if not _OF_THE_MODEL.fullmatch(key) or not (detector or key.startswith(("BACKBONE.", "PREPROC."))):
            continue
        same_norm = key == "BACKBONE.NORM" and {value, known[key]} == {"FreezeBN", "SyncBN"}
        if key in told or value == known[key] or same_norm or not _is_read(key, cfg):
            continue
        shown = str(value) if len(str(value)) < 60 else f"{str(value)[:50]}…"
        raise UserError(
            f"{source}: {system} has no place for its {key}={shown}, it computes with {str(known[key])[:50]}; "
            "nothing written"
        )
