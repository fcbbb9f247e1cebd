"""How well PackRCNN, detectron2 and torchvision detect blood cells after the same short training from scratch.

  python benchmarks/same_budget.py run OUT --systems packrcnn --precisions float32 bfloat16 --seeds 3
  python benchmarks/same_budget.py table OUT

A training: Faster R-CNN R50-FPN with group norm from random weights, 300 steps of 4 images of the BCCD set at short
edge 240, the same rates, anchors and numbers of RoIs, flips; scored by pycocotools on the 72 held-out images. Each
finished training is one JSON file in OUT, so that `run` goes on where it was interrupted. BCCD is expected in COCO's
format in ../shared/data/bccd or --data; the peers run in the environment of benchmarks/peers.py.
"""

import import_path

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.peers import add_environment_options, peers_command
from common import UserError, errors_in_one_line, logger, read_json, write_json
from eval import evaluate_coco

ROOT = Path(__file__).resolve().parent.parent

SYSTEMS = ["packrcnn", "detectron2", "torchvision"]
PRECISIONS = ["float32", "bfloat16"]
ANCHORS, SHORT_EDGE, MAX_SIZE, ROIS, PROPOSALS = [16, 32, 64, 128, 256], 240, 400, 128, 1000
STEPS, IMAGES, RATE, WARMUP, DROP = 300, 4, 0.02, 50, 240
PEERS_JOB = {
    "work": "train", "steps": STEPS, "images_per_step": IMAGES, "rate": RATE, "warmup": WARMUP, "drops": [DROP],
    "model": {"masks": False, "classes": 3, "norm": "GN", "freeze_at": 0, "anchor_sizes": ANCHORS, "rois": ROIS,
              "short_edge": SHORT_EDGE, "max_size": MAX_SIZE, "proposals": PROPOSALS},
}  # fmt: skip
# Biases decay in the peers.
SETTINGS = [
    "MODE_FPN=True", "MODE_MASK=False", "BACKBONE.NORM=GN", "FPN.NORM=GN", "BACKBONE.FREEZE_AT=0",
    f"RPN.ANCHOR_SIZES={ANCHORS}", f"FRCNN.BATCH_PER_IM={ROIS}", f"RPN.TRAIN_FPN_NMS_TOPK={PROPOSALS}",
    f"PREPROC.SHORT_EDGE_SIZE=[{SHORT_EDGE},{SHORT_EDGE}]", f"PREPROC.TEST_SHORT_EDGE_SIZE={SHORT_EDGE}",
    f"PREPROC.MAX_SIZE={MAX_SIZE}", "DATA.NUM_WORKERS=1", "DATA.TRAIN=train", "DATA.VAL=val",
    f"TRAIN.BATCH_SIZE_PER_GPU={IMAGES}", "TRAIN.LR_SCALING=none", f"TRAIN.BASE_LR={RATE}", f"TRAIN.WARMUP={WARMUP}",
    f"TRAIN.WARMUP_INIT_LR={RATE / WARMUP}", f"TRAIN.LR_SCHEDULE=[{DROP},{STEPS}]", "TRAIN.WEIGHT_DECAY=0.0001",
    "TRAIN.WEIGHT_DECAY_BIAS=None", f"TRAIN.PERIOD_STEPS={STEPS}", "TRAIN.EVAL_PERIOD=1", "TRAIN.PICTURES=0",
]  # fmt: skip


def annotations(data: Path, part: str) -> Path:
    path = data / "annotations" / f"instances_{part}.json"
    if not path.exists():
        raise UserError(f"--data {data}: {path} is not there; name the folder of BCCD in COCO's format")
    return path


def packrcnn_command(data: Path, logdir: Path, precision: str, seed: int) -> list[str]:
    sets = {part: [str(annotations(data, part).relative_to(data)), f"images/{part}"] for part in ("train", "val")}
    return [
        sys.executable, str(ROOT / "train.py"), "--logdir", str(logdir), "--config", *SETTINGS,
        f"DATA.BASEDIR={data}", f"DATA.DATASETS={sets}", f"TRAIN.PRECISION={precision}", f"TRAIN.SEED={seed}",
    ]  # fmt: skip


def peers_job(data: Path, system: str, precision: str, seed: int, results: Path) -> dict:
    images = {str(annotations(data, part)): str(data / "images" / part) for part in ("train", "val")}
    return PEERS_JOB | {
        "system": system, "precision": precision, "seed": seed, "results": str(results), "images": images,
        "train": str(annotations(data, "train")), "val": str(annotations(data, "val")),
    }  # fmt: skip


def run_one(system: str, precision: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if system == "packrcnn":
            command = packrcnn_command(args.data, work / "run", precision, seed)
        else:
            job = peers_job(args.data, system, precision, seed, work / "results.json")
            write_json(work / "job.json", job)
            command = peers_command(args.env, args.detectron2, work / "job.json")
        with open(args.out / f"{system}-{precision}-{seed}.log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError(f"{system} in {precision} failed with seed {seed}; {log.name} says why")
        if system == "packrcnn":
            metrics = read_json(work / "run" / "metrics.json", "scores of the run")
        else:
            results = read_json(work / "results.json", "results file")
            metrics = evaluate_coco(str(annotations(args.data, "val")), results, ["bbox"], verbose=False)
    return {
        "system": system, "precision": precision, "seed": seed, "AP": metrics["bbox/AP"], "AP50": metrics["bbox/AP50"],
        "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024,
    }  # fmt: skip


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Seed by seed, so that an interrupted series has as many of each kind as it can."""
    for seed, system, precision in itertools.product(range(args.seeds), args.systems, args.precisions):
        yield system, precision, seed


def table(records: list[dict[str, Any]]) -> str:
    """Mean and spread (least to largest) over the seeds, in AP points."""
    rows = []
    for system, precision in itertools.product(SYSTEMS, PRECISIONS):
        found = [r for r in records if (r["system"], r["precision"]) == (system, precision)]
        if not found:
            continue
        row = [system, precision, len(found)]
        for key in ("AP", "AP50"):
            values = 100 * np.array([r[key] for r in found])
            row += [f"{values.mean():.1f}", f"{values.min():.1f} to {values.max():.1f}"]
        row.append(f"{np.median([r['peak_mib'] for r in found]) / 1024:.1f}")
        rows.append(row)
    headers = ["system", "precision", "seeds", "box AP", "spread", "AP50", "spread", "peak GiB"]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def read_records(out: Path) -> list[dict[str, Any]]:
    records = [read_json(path, "record of a training") for path in sorted(out.glob("*-*-*.json"))]
    if not records:
        raise UserError(f"{out} holds no finished training; `run {out}` makes them")
    return records


@errors_in_one_line
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path, help="folder of the records")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["packrcnn"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--seeds", type=int, default=3, help="train with the seeds 0, 1, … below this number")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "bccd")
    add_environment_options(parser)
    args = parser.parse_args(arguments)
    if args.what == "run":
        if "detectron2" in args.systems and args.detectron2 is None:
            raise UserError("--systems detectron2 needs --detectron2 DIR, the folder of its sources")
        annotations(args.data, "train")
        args.out.mkdir(parents=True, exist_ok=True)
        for system, precision, seed in wanted(args):
            record = args.out / f"{system}-{precision}-{seed}.json"
            if not record.exists():
                logger.info(f"{system}, {precision}, seed {seed}")
                write_json(record, run_one(system, precision, seed, args), indent=1)
    print(table(read_records(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
