#!/usr/bin/env python3
"""Reads annotations of labelling programs and writes them as a COCO json, or the other way round.

    tools/convert_data.py annotations.xml train.json                           CVAT for images 1.1
    tools/convert_data.py photos/ train.json                                   LabelMe, YOLO, Supervisely, Roboflow
    tools/convert_data.py via_region_data.json train.json --images photos      VIA
    tools/convert_data.py train.json for_labelme --to labelme --images photos  COCO as files to be corrected

What cannot be read is left out, counted and named. docs/ANNOTATE.md describes the formats.
"""

import import_path

import argparse
import sys
from collections import Counter
from pathlib import Path

from tabulate import tabulate

from common import (
    UserError,
    check_output_file,
    check_output_folder,
    errors_in_one_line,
    logger,
    path_argument,
    read_text,
    write_json,
)
from labels_read import LEFT_OUT, READERS, Labels, read_labels
from labels_write import LOST, WRITERS, Outlines, simplified, write_labels
from utils.coco_format import as_truth

__all__ = ["report_labels", "report_lost"]


def report_labels(labels: Labels, what: str) -> None:
    """Logs how much was read, and what was left out."""
    content = labels.content
    logger.info(
        f"{what}: {len(content['images'])} images, {len(content['annotations'])} objects of "
        f"{len(content['categories'])} classes"
    )
    if labels.left_out:
        rows = [[LEFT_OUT[key], n, labels.examples.get(key, "")] for key, n in labels.left_out.most_common()]
        logger.warning(f"left out:\n{tabulate(rows, ['what', 'count', 'for example'], 'pipe', disable_numparse=True)}")


def report_lost(lost: Counter, form: str) -> None:
    for key, n in lost.items():
        if n:
            logger.warning(f"{form}: {n} × {LOST[key]}")


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path_argument, help="a file or folder of annotations")
    parser.add_argument("output", type=path_argument, help="json to write; with another --to, a folder")
    parser.add_argument("--from", dest="form", choices=list(READERS), help="format of the source (default: found out)")
    parser.add_argument("--to", choices=list(WRITERS), default="coco", help="format to write (default: %(default)s)")
    parser.add_argument("--images", type=path_argument, metavar="DIR", help="the folder that holds the images")
    parser.add_argument("--classes", type=path_argument, metavar="FILE", help="class names in order, one a line")
    parser.add_argument("--attribute", default="", metavar="NAME", help="VIA: the region attribute with the class")
    parser.add_argument("--class", dest="one_class", default="", metavar="NAME", help="VIA: the class of all regions")
    parser.add_argument(
        "--tolerance", type=float, default=0.0, metavar="PIXELS",
        help="how far written polygons may be from the outline (default: %(default)s, all vertices)",
    )  # fmt: skip
    parser.add_argument("--boxes", action="store_true", help="write boxes only")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    (check_output_file if args.to == "coco" else check_output_folder)(args.output, "output")
    names = [n.strip() for n in read_text(args.classes, "class list").splitlines()] if args.classes else []
    names = [n for n in names if n]
    if args.to == "coco" and Path(args.output).exists() and not args.overwrite:
        raise UserError(f"{args.output} exists already; choose another name, or replace it with --overwrite")
    if not 0 <= args.tolerance <= 1000:
        raise UserError(f"--tolerance {args.tolerance:g} must be 0 to 1000 pixels")
    labels = read_labels(
        args.source, args.form or "", args.images, names, attribute=args.attribute, one_class=args.one_class
    )
    report_labels(labels, args.source)
    if not labels.content["images"]:
        raise UserError(f"{args.source}: no image was found that can be used")
    outlines = Outlines(args.tolerance, args.boxes)
    content = as_truth(labels.content, args.source, need_size=True)
    if args.to == "coco":
        lost: Counter = Counter()
        if args.boxes or args.tolerance:
            content, lost = simplified(content, outlines)
        write_json(args.output, content if args.boxes or args.tolerance else labels.content)
        report_lost(lost, args.to)
        folder = args.images or Path(args.output).parent
        spec = f"{{'mine': ['{Path(args.output).absolute()}', '{Path(folder).absolute()}']}}"
        logger.info(f'{args.output}; to go on: ./train.py --config DATA.TRAIN=mine DATA.DATASETS="{spec}" …')
    else:
        files, lost = write_labels(content, args.to, args.output, outlines, args.images or "", args.overwrite)
        report_lost(lost, args.to)
        logger.info(f"{len(files)} files in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
