"""Looks at a data set of any format, and at training batches exactly as the network gets them, as a page of pictures.

    python tools/browse.py --config DATA.BASEDIR=data/coco --data coco_val2017 --class dog cat --size small --out page
    python tools/browse.py --config DATA.BASEDIR=data/coco MODE_MASK=True --batches 4 --out page
    python tools/browse.py --config DATA.BASEDIR=data/coco --batches 4 --load train_log/mine --out page

--config takes what ./train.py takes; --data is a set it registers (default: the first of DATA.TRAIN).
"""

import import_path

import argparse
import sys
from pathlib import Path

from browse import SIZES, Filter, write_batches, write_images
from common import UserError, errors_in_one_line
from config import default_config, finalize_config
from config_files import settings_words
from dataset import load_split, load_training_split
from run_start import load_model
from viz import Style


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", nargs="+", action="extend", default=[], metavar="KEY=VAL", help="settings")
    parser.add_argument("--data", metavar="NAME", help="the data set; default: the first of DATA.TRAIN")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--batches", type=int, metavar="N", help="show N training batches instead of images")
    parser.add_argument("--load", metavar="PATH", help="--batches: also this model's proposals and sampled RoIs")
    parser.add_argument("--number", type=int, default=60, metavar="N", help="images on the page (%(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the first of the chosen images, or batches")
    parser.add_argument("--class", nargs="+", default=[], dest="classes", metavar="NAME", help="images that show one")
    parser.add_argument("--size", choices=list(SIZES), help="images with an object of this size (COCO's areas)")
    parser.add_argument("--empty", action="store_true", help="images without objects")
    parser.add_argument("--crowd", action="store_true", help="images with a crowd or another ignored region")
    parser.add_argument("--image-id", nargs="+", default=[], metavar="ID", help="these images")
    parser.add_argument("--contour", action="store_true", help="masks as outlines, not filled")
    parser.add_argument("--colors", choices=["class", "instance"], default="class", help="what a colour stands for")
    args = parser.parse_args(argv)
    args.config = settings_words(args.config)
    cfg = finalize_config(default_config().update_args(args.config))
    if args.load and args.batches is None:
        raise UserError("--load shows what a model makes of training batches: give --batches")
    if args.batches is not None:
        chosen = args.classes or args.size or args.empty or args.crowd or args.image_id
        if chosen or args.data:
            raise UserError("--batches shows what training reads, DATA.TRAIN; it takes no choice of images")
        read_rois = None
        if args.load:  # the run's own settings, changed by --config
            from browse_rois import roi_reader

            cfg = load_model(args.load, args.config, uses_data=True).cfg
            first_stage = load_model(args.load, [*args.config, "MODE_RPN_ONLY=True"], uses_data=True)
            read_rois = roi_reader(first_stage, first_stage.cfg)
        split = load_training_split(cfg)
        cfg = cfg.copy()
        cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = list(split.class_names), len(split.class_names)
        cfg.freeze()
        write_batches(split, cfg, Path(args.out), args.batches, args.start, read_rois)
    else:
        split = load_split(cfg, args.data or cfg.DATA.TRAIN[0])
        wanted = Filter(args.classes, args.size, args.empty, args.crowd, args.image_id)
        style = Style(contour=args.contour, colors=args.colors, smallest=320)
        write_images(split, wanted, Path(args.out), args.number, args.start, style)
    return 0


if __name__ == "__main__":
    sys.exit(main())
