"""VGG Image Annotator's json beside its images, and the balloon set, which is published in this form."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, logger
from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit, own_path
from labels_read import LEFT_OUT, read_via
from utils.archives import is_file

__all__ = ["BALLOON", "balloon_spec", "load"]

BALLOON = {"balloon_train": "train", "balloon_val": "val"}


def load(
    name: str, path: Path, folder: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False,
    attribute: str = "", one_class: str = "",
) -> DatasetSplit:  # fmt: skip
    """The options are those of `labels_read.read_via`."""
    images = own_path(Path(cfg.DATA.BASEDIR).expanduser(), folder)
    read = functools.partial(_content, path, images, str(attribute), str(one_class))
    return split_from_coco(name, read, images, cfg, class_names, training, f"VIA annotations {path}")


def _content(path: Path, images: Path, attribute: str, one_class: str) -> dict[str, Any]:
    content, left_out, examples = read_via(path, images, (), attribute, one_class)
    for key, count in left_out.items():
        logger.warning(f"VIA annotations {path}: left out: {count} × {LEFT_OUT[key]} (e.g. {examples[key]})")
    return content


def balloon_spec(cfg: Config, name: str) -> list[str]:
    """The DATA.DATASETS entry of balloon_train or balloon_val.

    DATA.BASEDIR, balloon/ in it, or balloon_dataset.zip in it holds train/ and val/.
    """
    base = Path(cfg.DATA.BASEDIR).expanduser()
    folders = [base / p / BALLOON[name] for p in ("", "balloon", "balloon_dataset.zip/balloon")]
    for folder in folders:
        path = folder / "via_region_data.json"
        if is_file(path):
            return ["via", str(path.absolute()), str(folder.absolute()), "one_class=balloon"]
    raise UserError(
        f"data set {name}: {folders[1] / 'via_region_data.json'} does not exist; set DATA.BASEDIR to the folder that "
        "holds balloon_dataset.zip or what is in it (`python tools/download.py balloon` does that)"
    )
