#!/usr/bin/env python3
"""Splits one COCO-format annotation file into a training and a validation file.

    tools/split.py photos/labels.json --val 0.2

writes photos/train.json and photos/val.json: whole images, drawn at random by --seed, with all of their annotations.
Both files refer to the same image folder. Existing files are not overwritten.
"""

import import_path

import argparse
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common import UserError, check_output_folder, errors_in_one_line, logger, path_argument, read_json, write_json

__all__ = ["split"]


def split(content: dict[str, Any], share: float, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(training content, validation content): round(share * images) images go to validation, at least one to each.

    Everything but `images` and `annotations` (categories, info, licences) is in both. The order of the file is kept.
    """
    images = content["images"]
    if len(images) < 2:
        raise UserError(f"{len(images)} images cannot be split into two sets")
    count = min(max(round(share * len(images)), 1), len(images) - 1)
    chosen = set(random.Random(seed).sample(range(len(images)), count))
    parts = []
    for wanted in (False, True):
        kept = [image for i, image in enumerate(images) if (i in chosen) == wanted]
        ids = {image["id"] for image in kept}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        parts.append({**content, "images": kept, "annotations": annotations})
    return parts[0], parts[1]


def class_table(train: dict[str, Any], val: dict[str, Any]) -> str:
    """Objects of each class in both parts."""
    counts = [Counter(a["category_id"] for a in part["annotations"]) for part in (train, val)]
    rows = [[c["name"], *(count[c["id"]] for count in counts)] for c in train["categories"]]
    rows.append(["images", len(train["images"]), len(val["images"])])
    return tabulate(rows, ["class", "training", "validation"], "simple")


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=path_argument, help="COCO-format json")
    parser.add_argument("--val", type=float, default=0.2, metavar="SHARE", help="of the images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed draws other images (default: %(default)s)")
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="where to write (default: beside the annotation file)"
    )
    args = parser.parse_args(argv)
    if not 0 < args.val < 1:
        raise UserError(f"--val {args.val}: a share of the images between 0 and 1, e.g. 0.2")
    source = Path(args.annotations)
    folder = Path(args.output) if args.output else source.parent
    targets = [folder / "train.json", folder / "val.json"]
    check_output_folder(folder, "--output")
    for target in targets:
        if target.exists():
            raise UserError(f"{target} exists already; move it away, or choose another folder with --output")
    content = read_json(source, "annotations")
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in wanted):
        raise UserError(f"{source}: not COCO's format, which has the lists {', '.join(wanted)}")
    try:
        parts = split(content, args.val, args.seed)
        table = class_table(*parts)
    except (KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{source}: an entry is malformed ({e!r}); tools/check_data.py names it") from e
    for target, part in zip(targets, parts):
        write_json(target, part)
    logger.info(f"{targets[0]} and {targets[1]}\n{table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
