"""LVIS v1 (Gupta et al., CVPR 2019): COCO's json plus the classes that annotators looked for in each image."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit, own_path
from utils.archives import find_folder
from utils.coco_format import file_name_of, read_document

__all__ = ["load"]


def load(
    name: str, path: Path, folder: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False
) -> DatasetSplit:
    """LVIS's json is COCO's with more keys; image paths are <folder>/<last two parts of coco_url>, or file_name. So
    <folder> is COCO's, which holds train2017/ and val2017/, or their archives as downloaded."""
    images = own_path(Path(cfg.DATA.BASEDIR).expanduser(), folder)
    read = functools.partial(_content, path, images)
    return split_from_coco(name, read, images, cfg, class_names, training, f"annotation file {path}", ["lvis"])


def _content(path: Path, folder: Path) -> dict[str, Any]:
    """The json; images of val2017/ that lie in val2017.zip have val2017.zip/… as their file_name."""
    content, place_of = read_document(path), {}
    for image in content["images"] if isinstance(content["images"], list) else ():
        name = file_name_of(image) if isinstance(image, dict) else None
        first, _, rest = name.partition("/") if isinstance(name, str) else ("", "", "")
        if not rest or not first:
            continue
        if first not in place_of:
            place_of[first] = find_folder(folder, [first]) or folder / first
        if place_of[first] != folder / first:
            image["file_name"] = f"{place_of[first].relative_to(folder)}/{rest}"
    return content
