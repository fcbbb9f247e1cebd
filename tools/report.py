"""One evaluation report, from files of any system: numbers with intervals, curves, errors by cost, and pictures.

    python tools/report.py --gt instances_val2017.json --detections results.json --images val2017 --out report
    python tools/report.py --gt instances_val2017.json --detections a.json b.json --out comparison
    python tools/report.py --protocol voc07 --gt VOC2007 --split test --detections results.json --out report

The folder holds index.html (opens from disk), report.json (every number; docs/REPORT.md) and the pictures. With several
results every one is compared with the first. What --gt and --detections may be is as for tools/score.py.
"""

import import_path

import argparse
import sys

from common import UserError, check_output_folder, logger, path_argument
from report import RESAMPLES, compared_names, write_report
from report_files import read_detections, read_problem
from report_read import PROTOCOLS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--gt", type=path_argument, required=True, metavar="DIR_OR_JSON", help="the annotations")
    parser.add_argument(
        "--detections",
        type=path_argument,
        required=True,
        nargs="+",
        metavar="FILE",
        help="results; several are compared",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--protocol", default="coco", choices=list(PROTOCOLS), help="default: %(default)s")
    parser.add_argument(
        "--images", type=path_argument, nargs="+", default=[], metavar="DIR", help="folders of the images, for pictures"
    )
    parser.add_argument(
        "--run",
        type=path_argument,
        metavar="LOGDIR",
        help="the run that made the results: how its anchors fit the objects",
    )
    parser.add_argument(
        "--proposals", type=path_argument, metavar="FILE", help="COCO results of proposals: their recall"
    )
    parser.add_argument("--iou-type", choices=["bbox", "segm", "keypoints"], help="what curves and errors are about")
    parser.add_argument("--threshold", type=float, metavar="SCORE", help="of pictures and confusion; default: best F1")
    parser.add_argument("--pictures", type=int, default=40, metavar="N", help="worst images shown, 0: no pictures (40)")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="B", help="of the bootstrap (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--normalised", action="store_true", help="the json's boxes are fractions of the image")
    parser.add_argument("--split", help="of a folder; Open Images: validation; Cityscapes: val; VOC: all images")
    parser.add_argument(
        "--classes", type=path_argument, help="Open Images: class description csv, if not the one in the folder"
    )
    parser.add_argument(
        "--hierarchy", type=path_argument, help="Open Images: hierarchy json, if not the one in the folder"
    )
    parser.add_argument(
        "--masks", type=path_argument, help="Open Images: folder of mask images, if not masks/ in the folder"
    )
    parser.add_argument("--expand-detections", action="store_true", help="Open Images: copy detections to ancestors")
    args = parser.parse_args(argv)
    try:
        check_output_folder(args.out, "--out")
        for flag, low, high in (("resamples", 2, 100_000), ("pictures", 0, 10_000), ("threshold", 0, 1)):
            value = getattr(args, flag)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{flag} {value}: must be from {low} to {high}")
        names = compared_names(args.detections)
        problem = read_problem(
            args.protocol, args.gt, args.images, args.split, args.classes, args.hierarchy, args.masks,
            args.expand_detections, args.run, args.proposals, args.normalised,
        )  # fmt: skip
        results = {name: read_detections(path, problem) for name, path in zip(names, args.detections)}
        write_report(
            problem, results, args.out, args.iou_type, args.threshold, args.pictures, args.resamples, args.seed
        )
    except UserError as e:
        logger.error(str(e))
        return 2
    except OSError as e:
        logger.error(f"--out {args.out} cannot be written: {e.strerror}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
