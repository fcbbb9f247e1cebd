"""LVIS v1 (Gupta et al., CVPR 2019): COCO's json plus the classes that annotators looked for in each image."""

import functools
from collections.abc import Sequence
from pathlib import Path

from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit, own_path
from utils.coco_format import read_document

__all__ = ["load"]


def load(
    name: str, path: Path, folder: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False
) -> DatasetSplit:
    """LVIS's json is COCO's with more keys; image paths are <folder>/<last two parts of coco_url>, or file_name."""
    images = own_path(Path(cfg.DATA.BASEDIR).expanduser(), folder)
    read = functools.partial(read_document, path)
    return split_from_coco(name, read, images, cfg, class_names, training, f"annotation file {path}", ["lvis"])
