"""Your own data format: images, each with a .txt file beside it that has one "x1 y1 x2 y2 name" per line.

Register it in the settings by module:function and what the function needs; the module must be importable from where
the program is started, e.g. with this file:

    ./train.py --config "DATA.DATASETS={'mine': ['demo.own_dataset:load', 'my_images']}" DATA.TRAIN=mine DATA.VAL=mine
"""

import functools
from pathlib import Path

from dataset_build import split_from_coco
from utils.image_header import image_header_size

CLASSES = ["circle", "square", "triangle"]


def read(folder: str) -> dict:
    """The content in COCO's form; called again when the set is scored."""
    images, annotations = [], []
    for number, file in enumerate(sorted(Path(folder).glob("*.jpg"))):
        height, width = image_header_size(file)
        images.append({"id": number, "file_name": file.name, "height": height, "width": width})
        for line in file.with_suffix(".txt").read_text().splitlines():
            x1, y1, x2, y2, name = line.split()
            box = [float(x1), float(y1), float(x2) - float(x1), float(y2) - float(y1)]
            annotations.append({"image_id": number, "category_id": CLASSES.index(name) + 1, "bbox": box})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def load(name: str, folder: str, **options):
    return split_from_coco(name, functools.partial(read, folder), folder, **options)
