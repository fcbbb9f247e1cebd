#!/usr/bin/env python3
"""Writes a COCO-format annotation file with some of another file's images: for over-fitting checks and quick trials.

tools/subset.py annotations/instances_train2017.json eight.json --images 8 --max-objects 6 --min-area 3000
"""

import import_path

import argparse
import sys
from collections import defaultdict
from typing import Any

from common import UserError, check_output_file, errors_in_one_line, logger, path_argument, write_json
from utils.coco_format import check_entries, read_annotation, read_document

__all__ = ["subset"]


def subset(content: dict[str, Any], images: int, max_objects: int, min_area: float) -> dict[str, Any]:
    """The first `images` images by id with 1 to `max_objects` objects, none of them a crowd or smaller than `min_area`
    square pixels; all categories are kept."""
    objects, bad = defaultdict(list), set()
    for annotation in content["annotations"]:
        typed = read_annotation(annotation)
        objects[typed.image_id].append(annotation)
        if typed.is_crowd or typed.box is None or typed.box[2] * typed.box[3] < min_area:
            bad.add(typed.image_id)

    def fits(image_id: Any) -> bool:
        return image_id not in bad and 1 <= len(objects[image_id]) <= max_objects

    chosen = [i for i in sorted(content["images"], key=lambda i: str(i["id"])) if fits(i["id"])][:images]
    if len(chosen) < images:
        raise UserError(f"only {len(chosen)} images fit; raise --max-objects or lower --min-area")
    return {**content, "images": chosen, "annotations": [a for i in chosen for a in objects[i["id"]]]}


@errors_in_one_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=path_argument, help="COCO-format json")
    parser.add_argument("output", type=path_argument, help="json to write")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--max-objects", type=int, default=1000, help="images with more are left out")
    parser.add_argument("--min-area", type=float, default=0.0, help="images with a smaller box are left out")
    args = parser.parse_args()
    check_output_file(args.output, "output")
    content = read_document(args.annotations)
    check_entries(content, f"annotation file {args.annotations}")
    content = subset(content, args.images, args.max_objects, args.min_area)
    write_json(args.output, content)
    count = len(content["annotations"])
    logger.info(f"{len(content['images'])} images with {count} objects in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
