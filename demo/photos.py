"""Fine-tunes a small Mask R-CNN on real photographs, on a CPU, scores it and draws what it finds in held-out ones.

`make photos` runs this file on the photographs of demo/photos. For your own, in COCO's format:

    python demo/photos.py --train labels.json photos/ --val others.json others/

Without --val, a fifth of the photographs is held out. Without outlines, add --config MODE_MASK=False. Everything goes
through train.py's command line, as printed.
"""

import import_path

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from common import UserError, errors_in_one_line, logger, path_argument, read_json, write_json
from demo.run import free_logdir, train_py, write_sheet
from tools.split import split

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "demo" / "photos"
TRAINING = [
    "TRAIN.LR_SCALING=none",
    "TRAIN.BASE_LR=0.02",
    "TRAIN.WARMUP=40",
    "TRAIN.WARMUP_INIT_LR=0.002",
    "TRAIN.LR_SCHEDULE=[240]",
    "TRAIN.EVAL_PERIOD=0",
]


@errors_in_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one_set = {"nargs": 2, "type": path_argument, "metavar": ("JSON", "FOLDER")}
    parser.add_argument("--train", **one_set, help="your annotations and their photographs")
    parser.add_argument("--val", **one_set, help="those to score and draw, not trained on")
    parser.add_argument("--logdir", default="train_log/photos", help="where the run lives (default: %(default)s)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings that win over these")
    args = parser.parse_args(argv)
    if args.val and not args.train:
        raise UserError("--val without --train: give --train too")
    with tempfile.TemporaryDirectory() as folder:
        sets = _sets(args, Path(folder))
        os.chdir(ROOT)
        _run(sets, args, time.time())
    return 0


def _sets(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """{set: [annotation file, folder of photographs]} with whole paths; parts of a set are written to `folder`."""
    if not args.train:
        return {f"photos_{part}": [str(PHOTOS / f"{part}.json"), str(PHOTOS / "images")] for part in ("train", "val")}
    train = [os.path.abspath(path) for path in args.train]
    if args.val:
        return {"photos_train": train, "photos_val": [os.path.abspath(path) for path in args.val]}
    content = read_json(train[0], "annotation file")
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
        raise UserError(f"{train[0]} is not in COCO's format: it needs images, annotations and categories")
    sets = {}
    for name, part in zip(("train", "val"), split(content, 0.2, 1)):
        write_json(folder / f"{name}.json", part)
        sets[f"photos_{name}"] = [str(folder / f"{name}.json"), train[1]]
    return sets


def _run(sets: dict[str, list[str]], args: argparse.Namespace, started: float) -> None:
    logdir = Path(args.logdir)
    if moved := free_logdir(logdir):
        logger.info(f"the earlier run is now {moved}")
    where = [f"DATA.DATASETS={json.dumps(sets)}", "DATA.TRAIN=photos_train", "DATA.VAL=photos_val"]
    train_py("--logdir", str(logdir), "--recipe", "laptop-mask", "--config", *where, *TRAINING, *args.config)
    trained = time.time()
    train_py("--evaluate", str(logdir / "results.json"), "--load", str(logdir))
    held_out, folder = read_json(sets["photos_val"][0], "annotation file")["images"], sets["photos_val"][1]
    pictures = [os.path.join(folder, image["file_name"]) for image in held_out[:12]]
    train_py("--predict", *pictures, "--load", str(logdir), "--output", str(logdir / "predictions"), "--no-window")
    write_sheet(logdir / "predictions.jpg", logdir / "predictions")
    scores = read_json(logdir / "results.metrics.json", "scores")
    rows = [
        ["the model", logdir],
        ["scores on the held-out photographs", logdir / "results.metrics.json"],
        ["pictures of them", f"{logdir / 'predictions'}/ and {logdir / 'predictions.jpg'}"],
        ["seconds, of which training", f"{time.time() - started:.0f}, {trained - started:.0f}"],
        *([key, f"{value:.3f}"] for key, value in scores.items() if key in ("bbox/AP", "segm/AP")),
    ]
    print("\n" + tabulate(rows, tablefmt="plain"))


if __name__ == "__main__":
    sys.exit(main())
