"""The demo: draws pictures of shapes, trains a small Mask R-CNN FPN on them, scores it and draws what it finds.

Everything after the drawing goes through train.py's command line, as printed; `make demo` runs this file.
"""

import import_path

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from tabulate import tabulate

from common import UserError, atomic_write, logger, read_json, write_json
from demo.make_shapes import make_dataset
from viz import contact_sheet

__all__ = ["MODEL", "TRAINING", "free_logdir", "main", "train_py", "write_sheet"]

ROOT = Path(__file__).resolve().parent.parent
MODEL = [
    "MODE_FPN=True",
    "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]",  # ResNet-14, half as wide as usual
    "BACKBONE.STEM_CHANNELS=32",
    "BACKBONE.WIDTH_PER_GROUP=32",
    "BACKBONE.NORM=GN",  # trained from scratch: GroupNorm, nothing frozen
    "BACKBONE.FREEZE_AT=0",
    "FPN.NORM=GN",
    "FPN.NUM_CHANNEL=64",
    "FPN.FRCNN_FC_HEAD_DIM=128",
    "MRCNN.HEAD_DIM=32",
    "RPN.ANCHOR_SIZES=[16,32,64,128,256]",  # half of the usual ones: the pictures are small
    "PREPROC.SHORT_EDGE_SIZE=160",
    "PREPROC.TEST_SHORT_EDGE_SIZE=160",
    "PREPROC.MAX_SIZE=320",
    "TEST.BATCH_SIZE=4",
]
TRAINING = [
    "TRAIN.BATCH_SIZE_PER_GPU=2",
    "TRAIN.LR_SCALING=none",  # rates and steps as written here, not for a total batch of 8
    "TRAIN.BASE_LR=0.03",
    "TRAIN.WARMUP=100",
    "TRAIN.WARMUP_INIT_LR=0.002",
    "TRAIN.LR_SCHEDULE=[1200,1500,1600]",
    "TRAIN.GRADIENT_CLIP=5.0",
    "TRAIN.EVAL_PERIOD=0",
    "RPN.CROWD_OVERLAP_THRESH=0.7",  # nothing is learnt from the inside of crowd regions
    "RPN.TRAIN_PER_LEVEL_NMS_TOPK=300",
    "RPN.TRAIN_FPN_NMS_TOPK=300",
    "RPN.TEST_PER_LEVEL_NMS_TOPK=300",
    "RPN.TEST_FPN_NMS_TOPK=200",
    "FRCNN.BATCH_PER_IM=256",  # fewer would rarely show parts of large shapes, which look like whole ones
]


def free_logdir(logdir: Path) -> Path | None:
    """Moves an earlier run at `logdir` aside, to the first free of logdir-1, logdir-2, …; returns where it is now."""
    if not logdir.exists():
        return None
    number = 1
    while (aside := logdir.with_name(f"{logdir.name}-{number}")).exists():
        number += 1
    logdir.rename(aside)
    return aside


def train_py(*arguments: str) -> None:
    """Runs ./train.py with `arguments` after printing the command; a failure ends the demo with its exit code."""
    print(f"\n$ {shlex.join(['./train.py', *arguments])}", flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments], cwd=ROOT)
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            pass  # the terminal has sent it to train.py too, which saves a checkpoint and ends by itself
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def write_sheet(path: Path, predictions: Path) -> None:
    """One picture of the first twelve in the folder `predictions`."""
    pictures = [cv2.imread(str(p)) for p in sorted(predictions.glob("*.jpg"))[:12]]
    good, encoded = cv2.imencode(path.suffix, contact_sheet(pictures))
    if not good:
        raise UserError(f"{path} cannot be written")
    with atomic_write(path, "wb") as f:
        f.write(np.asarray(encoded).tobytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", default="train_log/demo", help="where the run lives (default: %(default)s)")
    parser.add_argument("--data", default="demo/data", help="where the pictures are drawn (default: %(default)s)")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VAL", help="settings that win over the demo's")
    args = parser.parse_args()
    os.chdir(ROOT)
    started = time.time()
    logdir, data = Path(args.logdir), Path(args.data)

    logger.info(f"drawing the pictures into {data}")
    make_dataset(data)
    moved = free_logdir(logdir)
    if moved:
        logger.info(f"the earlier run is now {moved}")

    sets = {f"shapes_{s}": [f"annotations/instances_{s}.json", s] for s in ("train", "val")}
    where = [
        f"DATA.BASEDIR={data}",
        f"DATA.DATASETS={json.dumps(sets)}",
        "DATA.TRAIN=shapes_train",
        "DATA.VAL=shapes_val",
    ]
    train_py("--logdir", str(logdir), "--config", *where, *MODEL, *TRAINING, *args.config)
    trained, peak_kib = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    train_py("--evaluate", str(logdir / "results.json"), "--load", str(logdir))
    output = str(logdir / "predictions")
    train_py("--predict", str(data / "val"), "--load", str(logdir), "--output", output, "--no-window")
    write_sheet(logdir / "predictions.jpg", logdir / "predictions")

    metrics = read_json(logdir / "results.metrics.json", "scores")
    metrics["seconds"] = round(time.time() - started, 1)
    metrics["seconds_training"] = round(trained - started, 1)
    metrics["peak_memory_mib"] = peak_kib // 1024  # of the training process
    write_json(logdir / "metrics.json", metrics, indent=1)
    rows = [
        ["the model", logdir],
        ["losses and scores", f"tensorboard --logdir {logdir}"],
        ["found objects, COCO results", logdir / "results.json"],
        ["scores", logdir / "metrics.json"],
        ["pictures of held-out images", f"{logdir / 'predictions'}/ and {logdir / 'predictions.jpg'}"],
        ["drawn data set", data],
    ]
    print("\n" + tabulate(rows, tablefmt="plain") + "\n")
    box, mask = metrics["bbox/AP50"], metrics["segm/AP50"]
    print(f"demo: box AP50 {box:.2f}, mask AP50 {mask:.2f}, {metrics['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        logger.error(str(e))
        sys.exit(2)
