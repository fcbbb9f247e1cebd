"""The options of train.py: their help texts, checks of their combination, and suggestions for mistyped ones."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence

from common import logger, path_argument
from video_options import VIDEO_OPTIONS, add_video_options

__all__ = ["parse_args", "warn_without_effect"]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="packrcnn" if __package__ else "train.py",
        description="Train a detector, or run one: --predict for pictures, --evaluate for scores.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  ./train.py --config MODE_FPN=True DATA.BASEDIR=~/data/coco BACKBONE.WEIGHTS=R50.npz --logdir train_log/r50-fpn
  ./train.py --resume --logdir train_log/r50-fpn
  ./train.py --predict photo.jpg folder/ --load train_log/r50-fpn --output pictures
  ./train.py --evaluate results.json --load train_log/r50-fpn --config DATA.BASEDIR=~/data/coco""",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VAL",
        help="settings, or @FILE with a KEY=VAL on each line or the settings.json of a run; later ones win; "
        "--print-config lists them",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="the settings of a known model, e.g. r50-fpn (docs/RECIPES.md), before those of --config; list: show all",
    )
    parser.add_argument(
        "--load",
        type=path_argument,
        metavar="PATH",
        help="weights to start from or to run: a TensorFlow checkpoint, a run directory (its newest checkpoint), "
        "RUN/best or an .npz; their settings come along, --config wins",
    )
    parser.add_argument(
        "--trust-code",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that the settings stored in what is loaded may name (docs/SAFETY.md); repeatable",
    )
    parser.add_argument(
        "--logdir", type=path_argument, metavar="DIR", help="where a run lives; training in the same one continues it"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        type=path_argument,
        metavar="CHECKPOINT",
        help="continue the run in --logdir with its own settings, changed by --config; from its newest checkpoint or "
        "from the one given as step or path",
    )
    parser.add_argument(
        "--partial-load",
        action="store_true",
        help="load what fits and initialise the rest, instead of stopping at a tensor that is missing or differs",
    )
    parser.add_argument(
        "--trim-heads",
        action="store_true",
        help="fine-tune on other classes: initialise exactly the tensors that have entries for each class",
    )
    parser.add_argument(
        "--match-classes",
        action="store_true",
        help="fine-tune on other classes: keep what was learnt about classes of the same name, initialise the others",
    )
    parser.add_argument(
        "--report",
        type=path_argument,
        metavar="DIR",
        help="--evaluate: also write an evaluation report there (docs/REPORT.md)",
    )
    parser.add_argument(
        "--predict",
        nargs="+",
        type=path_argument,
        metavar="IMAGE",
        help="images, folders, videos, cameras (0) or streams (rtsp://…); detections of score "
        "TEST.RESULT_SCORE_THRESH_VIS (a setting) or more are drawn",
    )
    parser.add_argument(
        "--evaluate", type=path_argument, metavar="OUT.json", help="score on DATA.VAL and write the results there"
    )
    parser.add_argument(
        "--replay",
        type=path_argument,
        metavar="DIR",
        help="repeat the step that a run recorded in LOGDIR/incident-STEP and find where its bad number comes from "
        "(docs/INCIDENTS.md)",
    )
    parser.add_argument(
        "--output", type=path_argument, metavar="DIR", help="where --predict writes (default: predictions)"
    )
    parser.add_argument("--draw", choices=["all", "boxes", "masks"], default="all", help="--predict: what is drawn")
    parser.add_argument("--contour", action="store_true", help="--predict: masks as outlines, not filled")
    parser.add_argument(
        "--colors",
        choices=["class", "instance"],
        default="class",
        help="--predict: what colours stand for; with classes, neighbouring objects differ in lightness",
    )
    parser.add_argument(
        "--truth", type=path_argument, metavar="JSON", help="--predict: draw these annotations beside the detections"
    )
    parser.add_argument("--cut-outs", action="store_true", help="--predict: also every object as a PNG with alpha")
    parser.add_argument(
        "--benchmark", action="store_true", help="--predict: measure decoding, resizing, graph and masks instead"
    )
    parser.add_argument(
        "--raw", action="store_true", help="--predict: draw proposals, and the best classes of each object, instead"
    )
    parser.add_argument("--no-window", action="store_true", help="--predict: never open a window")
    add_video_options(parser)
    parser.add_argument(
        "--find-lr",
        nargs="?",
        const=200,
        type=int,
        metavar="STEPS",
        help="look for a learning rate: train so many steps (200) while it rises, write a chart to --logdir, which "
        "must be new, suggest a rate, and stop",
    )
    parser.add_argument(
        "--find-batch",
        nargs="?",
        const=64,
        type=int,
        metavar="MOST",
        help="measure which TRAIN.BATCH_SIZE_PER_GPU (up to MOST, 64) fits into memory and how fast it trains; stop",
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GB", help="--find-batch: memory that may be used (default: what is free)"
    )
    parser.add_argument("--print-config", action="store_true", help="explain the settings in effect and stop")
    parser.add_argument("--verbose-tf", action="store_true", help="show TensorFlow's start-up messages")
    parser.add_argument(
        "--version", action="store_true", help="print the version, and the git revision of a checkout, and stop"
    )
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_hint(unknown[0], re.findall(r"--[a-z-]+", parser.format_usage())))
    if args.predict and args.evaluate:
        parser.error("--predict and --evaluate exclude each other")
    if (args.predict or args.evaluate) and not (args.load or args.logdir):
        parser.error("--predict and --evaluate need --load")
    if args.benchmark and args.raw:
        parser.error("--benchmark and --raw exclude each other")
    if args.replay and (args.predict or args.evaluate or args.load or args.logdir or args.resume):
        parser.error("--replay needs no other option than --config and --trust-code")
    if args.report and not args.evaluate:
        parser.error("--report needs --evaluate; of a results file: python tools/report.py")
    if args.trim_heads and args.match_classes:
        parser.error("--trim-heads and --match-classes exclude each other")
    if isinstance(args.resume, str) and not args.logdir:  # a run directory, or a checkpoint in it
        args.logdir, args.resume = (args.resume, True) if os.path.isdir(args.resume) else (
            os.path.dirname(args.resume), args.resume)  # fmt: skip
    if args.resume and not args.logdir:
        parser.error("--resume needs --logdir")
    if args.resume and args.recipe and args.recipe != "list":
        parser.error("--resume continues a run with its own settings; leave out --recipe")
    for name in ("--find-lr", "--find-batch"):
        asked = getattr(args, name[2:].replace("-", "_"))
        if asked is None:
            continue
        other = next((o for o in ("--predict", "--evaluate", "--resume") if getattr(args, o[2:])), None)
        if other or (args.find_lr is not None and args.find_batch is not None):
            parser.error(f"{name} and {other or '--find-lr'} exclude each other")
        least = 20 if name == "--find-lr" else 1
        if asked < least:
            parser.error(f"{name} {asked}: give {least} or more")
    if args.memory_limit is not None and not args.memory_limit > 0:
        parser.error("--memory-limit takes a number of gigabytes above 0")
    if args.resume and args.load:
        parser.error("--resume continues a checkpoint of --logdir; leave out --load")
    return args


def _hint(word: str, options: Sequence[str]) -> str:
    """An error message for a command line argument that belongs to no option."""
    if not word.startswith("-"):
        is_setting = re.match(r"[A-Z][A-Z0-9_.]*=", word)
        return f"settings follow --config: --config {word}" if is_setting else f"no option takes the value {word}"
    near = difflib.get_close_matches(word.split("=")[0], options, 1)
    return f"there is no option {word}" + (f"; did you mean {near[0]}?" if near else "")


def warn_without_effect(args: argparse.Namespace) -> None:
    """Warns about given options that have no effect on the requested action."""
    runs = "--predict" if args.predict else "--evaluate" if args.evaluate else ""
    new = not runs and not args.resume
    plays = {
        "--output": bool(args.predict), "--no-window": bool(args.predict), "--resume": not runs,
        "--draw": bool(args.predict) or args.draw == "all",
        "--colors": bool(args.predict) or args.colors == "class",
        "--contour": bool(args.predict), "--truth": bool(args.predict), "--cut-outs": bool(args.predict),
        "--benchmark": bool(args.predict), "--raw": bool(args.predict),
        "--logdir": not (runs and args.load), "--match-classes": new and bool(args.load),
        "--memory-limit": args.find_batch is not None,
        "--trim-heads": bool(runs or new and args.load), "--partial-load": bool(runs or new),
        **{option: bool(args.predict) for option in VIDEO_OPTIONS},
    }  # fmt: skip
    idle = [name for name, part in plays.items() if getattr(args, name[2:].replace("-", "_")) and not part]
    if idle:
        mode = f"with {runs}" if runs else "when a run is resumed" if args.resume else "when training starts like this"
        logger.warning(f"without effect {mode}: {', '.join(idle)}")
