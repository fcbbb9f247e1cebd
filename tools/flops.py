#!/usr/bin/env python3
"""Parameters and multiply-adds of the detector that some settings describe, part by part.

    tools/flops.py --config MODE_FPN=True BACKBONE.RESNET_NUM_BLOCK=[3,4,23,3] --size 800 1333

Counted are convolutions and matrix products of one prediction, from the shapes in its graph, without running it: the
image at --size, padded to a multiple of 32; the box head on --proposals; mask and keypoint heads on --detections.
A multiplication with its addition is counted as 1, as in detectron2's tables (fvcore). Not counted, as there: norms and
activations, RoIAlign, non-maximum suppression. Parameters are weights, biases and affine parameters of norms.
"""

import import_path

import argparse
import sys
from typing import Any

from tabulate import tabulate

from common import UserError, check_output_file, errors_in_one_line, path_argument, write_json
from config import default_config, finalize_config
from config_files import settings_words


# ------------------------------------------------------------------------------------------------------ command line
def table(counted: dict[str, Any]) -> str:
    def row(name: str, numbers: dict[str, int]) -> list[str]:
        gigas = numbers["macs"] / 1e9
        return [name, *(f"{numbers[key] / 1e6:.2f}" for key in ("parameters", "trainable")), f"{gigas:.2f}",
                f"{2 * gigas:.2f}"]  # fmt: skip

    rows = [row(part, numbers) for part, numbers in counted["parts"].items()] + [row("total", counted)]
    height, width = counted["size"]
    title = (
        f"{height}x{width} image, {counted['proposals']} proposals, {counted['detections']} detections; "
        "a multiply-add is one FLOP, or two in the last column"
    )
    headers = ["part", "parameters (M)", "trained (M)", "GFLOPs", "x 2"]
    return title + "\n" + tabulate(rows, headers, "simple", stralign="right", colalign=("left",))


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings as for train.py")
    parser.add_argument("--size", nargs=2, type=int, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--proposals", type=int, default=1000, metavar="N", help="RoIs of the box head")
    parser.add_argument("--detections", type=int, default=100, metavar="N", help="RoIs of mask and keypoint heads")
    parser.add_argument("--json", type=path_argument, metavar="OUT", help="write the numbers there too")
    args = parser.parse_args(argv)
    if args.json:
        check_output_file(args.json, "--json")
    if min(args.size) < 1 or min(args.proposals, args.detections) < 0:
        raise UserError(f"--size {args.size[0]} {args.size[1]}: height and width in pixels, 1 or more")
    cfg = finalize_config(default_config().update_args(settings_words(args.config)))
    from model_flops import count
    from model_rcnn import check_own_parts

    check_own_parts(cfg)
    counted = count(cfg, *args.size, args.proposals, args.detections)
    print(table(counted))
    if args.json:
        write_json(args.json, counted, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
