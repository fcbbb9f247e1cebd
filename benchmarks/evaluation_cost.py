"""Measures the training time that evaluations cost, in the training process and in another one (TEST.ASYNC).

python benchmarks/evaluation_cost.py [--rounds 2] [--steps 40] [--every 10] [-- KEY=VAL …]

Trains on the photographs of tests/data without evaluations, with them, and with TEST.ASYNC, in turn, and compares the
time between the first and the last checkpoint. That of the last evaluation is not in it: no training waits for it.
"""

import import_path

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
MODES = {
    "no evaluation": ["TRAIN.EVAL_PERIOD=0"],
    "in the training process": ["TRAIN.EVAL_PERIOD=1"],
    "in another process": ["TRAIN.EVAL_PERIOD=1", "TEST.ASYNC=True"],
}
MODEL = [
    "MODE_FPN=True", "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]", "BACKBONE.STEM_CHANNELS=16", "FPN.NUM_CHANNEL=64",
    "FPN.FRCNN_FC_HEAD_DIM=256", "MRCNN.HEAD_DIM=64", "BACKBONE.FREEZE_AT=0",
    f"DATA.BASEDIR={ROOT / 'tests/data/coco_mini'}",
    "DATA.VAL=coco_train2017", "DATA.NUM_WORKERS=1", "PREPROC.SHORT_EDGE_SIZE=256", "PREPROC.MAX_SIZE=426",
    "PREPROC.TEST_SHORT_EDGE_SIZE=256", "TRAIN.GRADIENT_CLIP=1.0", "TRAIN.LR_SCALING=none", "TRAIN.BASE_LR=0.001",
    "TRAIN.WARMUP=0", "TRAIN.LR_SCHEDULE=1x",
]  # fmt: skip


def seconds_of_run(settings: list[str], steps: int, every: int) -> float:
    """Time between the checkpoints of steps `every` and `steps` of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        length = [f"TRAIN.MAX_STEPS={steps}", f"TRAIN.STEPS_PER_EPOCH={every}", f"TRAIN.KEEP_CHECKPOINTS={steps}"]
        command = [sys.executable, str(ROOT / "train.py"), "--logdir", str(run), "--config", *MODEL, *length, *settings]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        first, last = ((run / f"model-{step}.index").stat().st_mtime for step in (every, steps))
        return last - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind, in turn (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VAL")
    args = parser.parse_args()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(args.rounds):
        for mode, settings in MODES.items():
            times[mode].append(seconds_of_run([*settings, *args.settings], args.steps, args.every))
            print(f"{mode}: {times[mode][-1]:.1f} s", file=sys.stderr, flush=True)
    base = median(times["no evaluation"])
    rows = [[mode, ", ".join(f"{s:.1f}" for s in t), f"{median(t) / base:.2f}"] for mode, t in times.items()]
    print(tabulate(rows, ["evaluations", "s", "ratio"], tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main()
