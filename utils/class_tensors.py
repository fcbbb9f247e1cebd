"""The tensors with an entry for each class, and how they are converted for a model of other classes.

Along their last axis: class scores have C + 1 entries, background first; box deltas four for each of these (or four in
all if they are the same for every class); masks C entries (or one).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from common import UserError

__all__ = ["depends_on_classes", "has_shared_masks", "keep_classes"]

_OUTPUT = re.compile(
    r"^(?:fastrcnn(?:/outputs)?|cascade_rcnn_stage\d+/outputs)/(class|box)/[Wb]$|^(mask)rcnn/conv/[Wb]$"
)
_WIDTH = {"class": 1, "box": 4, "mask": 1}  # entries of a class


def _kind(name: str) -> str:
    match = _OUTPUT.match(name)
    return (match[1] or match[2]) if match else ""


def depends_on_classes(name: str, shape: Sequence[int]) -> bool:
    """Whether a variable of this name and shape has entries for each class."""
    kind = _kind(name)
    return bool(kind) and not (kind == "box" and shape[-1] == _WIDTH["box"])


def has_shared_masks(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a model with variables of these shapes has one mask for all of several classes."""
    classes = max((shape[-1] - 1 for name, shape in shapes.items() if _kind(name) == "class"), default=0)
    return classes > 1 and any(_kind(name) == "mask" and shape[-1] == 1 for name, shape in shapes.items())


def keep_classes(
    name: str, stored: np.ndarray, initial: np.ndarray, old: Sequence[str], new: Sequence[str]
) -> np.ndarray:  # fmt: skip
    """`initial` (for the classes `new`), with the entries of the background and of classes shared by name taken from
    `stored` (for the classes `old`)."""
    kind = _kind(name)
    width, background = _WIDTH[kind], 0 if kind == "mask" else 1
    if stored.shape[-1] != (len(old) + background) * width or stored.shape[:-1] != initial.shape[:-1]:
        raise UserError(
            f"--match-classes: {name} has shape {list(stored.shape)}, which does not fit its {len(old)} class names "
            f"and this model's {list(initial.shape)}"
        )
    pairs = [(i, i) for i in range(background)]
    pairs += [(old.index(n) + background, i + background) for i, n in enumerate(new) if n in old]
    kept = initial.reshape(*initial.shape[:-1], -1, width).copy()
    source = stored.reshape(*stored.shape[:-1], -1, width)
    for there, here in pairs:
        kept[..., here, :] = source[..., there, :]
    return kept.reshape(initial.shape)
