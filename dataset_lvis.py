"""LVIS v1 (Gupta et al., CVPR 2019): COCO's json with the classes that people looked for in each image."""

import functools
from pathlib import Path

from common import read_json
from dataset_build import FormatSplit, split_from_coco
from dataset_split import own_path

__all__ = ["load"]


def load(name, path, folder, cfg, **common) -> FormatSplit:
    """LVIS's json is COCO's with more keys; images are <folder>/<last two parts of coco_url>, or file_name."""
    folder = own_path(Path(cfg.DATA.BASEDIR).expanduser(), folder)
    read = functools.partial(read_json, path, "annotation file")
    return split_from_coco(name, read, folder, cfg, **common, origin=str(path), protocol="lvis")
