"""What the tests of data sets in several formats share."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from config import default_config, finalize_config
from utils import polygons

DATA = Path(__file__).parent / "data"


def settings(basedir: Path, *more: str):
    return finalize_config(default_config().update_args([f"DATA.BASEDIR={basedir}", "MODE_MASK=False", *more]))


def copy_sets(base: Path) -> Path:
    """A copy of the small sets of all formats, with images for LVIS."""
    for name in ("coco_mini", "lvis_mini", "voc_mini", "cityscapes_mini", "golden_oid", "csv_mini"):
        shutil.copytree(DATA / name, base / name)
    (base / "lvis_mini/val2017").mkdir()
    for image in json.loads((DATA / "lvis_mini/lvis_v1_mini.json").read_text())["images"]:
        file = base / "lvis_mini/val2017" / image["coco_url"].rsplit("/", 1)[1]
        cv2.imwrite(str(file), np.zeros((image["height"], image["width"], 3), np.uint8))
    return base


def annotations_as_results(split, score=lambda i: 0.9, masks: bool = False) -> list[dict]:
    """The split's own objects as detections."""
    results = []
    for i in range(len(split)):
        found = split.annotations(i)
        height, width = split.image_size(i)
        for box, label, crowd, rings in zip(found["boxes"], found["labels"], found["is_crowd"], found["rings"]):
            if crowd:
                continue
            x1, y1, x2, y2 = box.astype(float).tolist()
            result = {"image_id": split.image_id(i), "category_id": split.label_to_category_id(int(label))}
            result |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score(i)}
            if masks:
                bitmap = polygons.rasterize(
                    polygons.rings_to_edges(rings), np.array([0, 0, width, height], np.float32), (height, width)
                )
                run = mask_utils.encode(np.asfortranarray(bitmap.astype(np.uint8)))
                result["segmentation"] = {"size": run["size"], "counts": run["counts"].decode()}
            results.append(result)
    return results
