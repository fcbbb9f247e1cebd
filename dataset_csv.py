"""A csv file with one row for each box."""

import csv
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import UserError, read_text
from config import Config
from dataset_build import split_from_coco
from dataset_split import DatasetSplit, own_path
from utils.archives import is_file
from utils.coco_format import Unusable, in_pixels, read_flag, read_number
from utils.image_header import header_sizes

__all__ = ["load", "read_csv_content"]

_CSV_COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "image_path", "path", "imageid", "image_id"),
    "label": ("label", "class", "class_name", "category", "name", "labelname"),
    "x1": ("x1", "xmin", "left"),
    "y1": ("y1", "ymin", "top"),
    "x2": ("x2", "xmax", "right"),
    "y2": ("y2", "ymax", "bottom"),
    "crowd": ("iscrowd", "crowd", "ignore", "isgroupof"),
}

_CSV_HEADLESS = ["image", "x1", "y1", "x2", "y2", "label"]


def load(
    name: str, path: Path, folder: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False,
    classes: str | None = None, normalised: bool = False,
) -> DatasetSplit:  # fmt: skip
    """See `read_csv_content`."""
    base = Path(cfg.DATA.BASEDIR).expanduser()
    images = own_path(base, folder)
    read = functools.partial(read_csv_content, path, images, classes and own_path(base, classes), normalised)
    return split_from_coco(name, read, images, cfg, class_names, training, f"csv of boxes {path}")


def read_csv_content(
    path: str | Path, folder: str | Path, classes: str | Path | None = None, normalised: bool = False
) -> dict[str, Any]:
    """A csv of boxes in COCO's form; image ids are the file names, sizes are those of the image files.

    The header names the columns: an image (image, file, filename, path, …), a label (label, class, …), and x1 y1 x2 y2
    (or xmin, left, …) in continuous pixels; iscrowd marks ignored regions. Without a header, the columns are image,
    x1, y1, x2, y2, label. A row that names only an image is an image without objects. `classes` is a file of class
    names,
    one a line, in the order of their ids; without it the classes are the labels that occur, sorted. `normalised`:
    coordinates
    are fractions of the image's width and height.
    """
    text = read_text(path, "csv of boxes")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as e:
        raise UserError(f"csv of boxes {path} cannot be read: {e}") from None
    if not rows:
        raise UserError(f"csv of boxes {path} is empty")
    header = [cell.strip().lower() for cell in rows[0]]
    columns = {key: header.index(n) for key, names in _CSV_COLUMNS.items() for n in names[::-1] if n in header}
    if not columns and len(header) == len(_CSV_HEADLESS):
        columns = {key: i for i, key in enumerate(_CSV_HEADLESS)}
        first = 1
    else:
        first, rows = 2, rows[1:]
    missing = [key for key in _CSV_HEADLESS if key not in columns]
    if missing:
        raise UserError(f"csv of boxes {path}: no column for {missing[0]} in its header {','.join(header)[:80]}")
    boxes: dict[str, list] = {}
    for number, row in enumerate(rows, first):
        cells = {key: row[i].strip() if i < len(row) else "" for key, i in columns.items()}
        if not cells["image"] or "\0" in cells["image"]:
            raise UserError(f"csv of boxes {path}, row {number}: no image")
        objects = boxes.setdefault(cells["image"], [])
        if not any(cells[key] for key in _CSV_HEADLESS[1:]):
            continue
        try:
            x1, y1, x2, y2 = (read_number(cells[key]) for key in ("x1", "y1", "x2", "y2"))
            crowd = read_flag(cells.get("crowd"))
        except Unusable as e:
            what = "a coordinate is not a number" if e.reason == "number" else "the flag is not 0 or 1"
            raise UserError(f"csv of boxes {path}, row {number}: {what}: {e.detail}") from None
        if not cells["label"]:
            raise UserError(f"csv of boxes {path}, row {number}: no label")
        objects.append((cells["label"], [x1, y1, x2 - x1, y2 - y1], crowd))
    found = sorted({label for objects in boxes.values() for label, _, _ in objects})
    names = found
    if classes:
        lines = read_text(classes, f"csv of boxes {path}: class list").splitlines()
        names = [line.split(",")[0].strip() for line in lines if line.strip()]
    unknown = [n for n in found if n not in names]
    if unknown:
        raise UserError(f"csv of boxes {path}: label '{unknown[0]}' is not in {classes}")
    ids = {n: i for i, n in enumerate(names, 1)}
    there = [n for n in boxes if is_file(os.path.join(folder, n))]
    sizes = dict(zip(there, header_sizes([os.path.join(folder, n) for n in there]).tolist()))
    # Missing images are counted by the caller, which does not use their size.
    images = [{"id": n, "file_name": n, "height": h, "width": w} for n in boxes for h, w in [sizes.get(n, (1, 1))]]
    annotations = [
        {"id": 0, "image_id": n, "category_id": ids[label], "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for n, objects in boxes.items()
        for label, box, crowd in objects
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    categories = [{"id": i, "name": n} for n, i in ids.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return in_pixels(content, f"csv of boxes {path}") if normalised else content
