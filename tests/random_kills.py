#!/usr/bin/env python3
"""Kills a training run at random moments, and compares its model with that of a run left alone, bit for bit.

    python -m tests.random_kills --kills 100 --seed 1      a table for docs/ROBUSTNESS.md

The tests' tiny model is trained with moving averages of its weights, gradient accumulation, every augmentation and a
loss scale that moves, in float32, bfloat16 and float16 in turn. SIGKILL comes while the run starts, between two steps,
while a checkpoint is written or while an evaluation runs; then the same command is given again. The variables at the
end (momentum, averages, loss scale included) and the scores must be those of the run left alone.
tests/distributed/random_kills.py does the same to jobs of several processes.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

import predict
import train
import training
from tests.tiny import TINY_TRAINING
from trainers import DetectionOptimizer
from utils.checkpoint import load_weights

# isort: split
from tensorpack.callbacks import Callbacks

PRECISIONS = ("float32", "bfloat16", "float16")
STEPS = 16
SETTINGS = [
    *TINY_TRAINING, "PREPROC.SHORT_EDGE_SIZE=[64,96]", "PREPROC.MAX_SIZE=128", f"TRAIN.MAX_STEPS={STEPS}",
    "TRAIN.STEPS_PER_EPOCH=2", "TRAIN.EVAL_PERIOD=4", "TRAIN.KEEP_CHECKPOINTS=8", "TRAIN.EMA_DECAY=0.9",
    "TRAIN.ACCUMULATION=2", "PREPROC.RANDOM_CROP=[0.6,1.0]", "PREPROC.PHOTOMETRIC=0.5", "PREPROC.COPY_PASTE=0.5",
    "DATA.VAL=coco_val2017",
]  # fmt: skip
# What is waited for, how often (at most) and for how long after that, in seconds.
MOMENTS = {"start": (1, 3.0), "step": (6, 0.3), "save": (3, 0.05), "evaluation": (1, 0.4)}
MEETINGS = 12  # kills of one run at most: then it is left to end


class Kill(NamedTuple):
    what: str
    occurrence: int
    delay: float


def draw(rng: random.Random) -> Kill:
    what = rng.choice([*MOMENTS, "step", "save"])
    most, longest = MOMENTS[what]
    return Kill(what, rng.randint(1, most), rng.uniform(0, longest))


def train_once(logdir: Path, precision: str, kill: Kill | None) -> tuple[int, str | None]:
    """Runs train.py in a forked process -> its exit code (-9 if it was killed), what it was killed at if it was.

    Forked after TensorFlow was imported and before it has been used: each start costs its graph alone.
    """
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return code, kill.what if kill and code == -signal.SIGKILL else None
    code = 1
    try:
        with open(logdir.with_suffix(".txt"), "ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        if kill:
            _watch(kill)
        DetectionOptimizer.GROWTH_INTERVAL = 4  # so that the loss scale of float16 moves within a few steps
        code = train.main(["--logdir", str(logdir), "--config", *SETTINGS, f"TRAIN.PRECISION={precision}"])
    finally:
        os._exit(code)


def _watch(kill: Kill) -> None:
    """From now on this process kills itself at that moment."""
    seen: Counter[str] = Counter()

    def happens(what: str) -> None:
        seen[what] += 1
        if kill.what == what and seen[what] == kill.occurrence:
            timer = threading.Timer(kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()

    def telling(what: str, function: Callable) -> Callable:
        def told(*args: Any, **options: Any) -> Any:
            happens(what)
            return function(*args, **options)

        return told

    training.save_tf_checkpoint = telling("save", training.save_tf_checkpoint)
    predict.evaluate_split = telling("evaluation", predict.evaluate_split)
    Callbacks.trigger_step = telling("step", Callbacks.trigger_step)
    happens("start")


def differences(killed: Path, alone: Path) -> list[str]:
    """Names of the variables that differ in a bit, and of the scores' file if that differs."""
    (a, _), (b, _) = load_weights(killed), load_weights(alone)
    different = [n for n in {*a, *b} if n not in a or n not in b or a[n].tobytes() != b[n].tobytes()]
    scores = [run / "metrics.json" for run in (killed, alone)]
    if not scores[0].exists() or scores[0].read_text() != scores[1].read_text():
        different.append("metrics.json")
    return different


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    args = parser.parse_args(argv)
    rng, kills, runs, bad = random.Random(args.seed), Counter(), Counter(), []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        alone: dict[str, Path] = {}
        while sum(kills.values()) < args.kills:
            precision = args.precisions[sum(runs.values()) % len(args.precisions)]
            if precision not in alone:
                alone[precision] = Path(parent, f"alone-{precision}")
                if train_once(alone[precision], precision, None)[0]:
                    print(alone[precision].with_suffix(".txt").read_text()[-2000:])
                    return 1
            run, met = Path(parent, f"run-{sum(runs.values())}"), 0
            while True:
                left = args.kills - sum(kills.values())
                code, what = train_once(run, precision, draw(rng) if left and met < MEETINGS else None)
                if what is None:
                    break
                kills[precision, what] += 1
                met += 1
            runs[precision] += 1
            different = ["it does not end well"] if code else differences(run, alone[precision])
            print(f"{precision}: killed {met} times, {len(different)} differences {different[:3]}", flush=True)
            if different:
                bad.append(run.name)
                print(run.with_suffix(".txt").read_text()[-1500:])
        indices = sorted(alone["float16"].glob("model-*.index")) if "float16" in alone else []
        scales = [float(load_weights(index.with_suffix(""))[0]["loss_scale"]) for index in indices]
    rows = [[p, runs[p], *(kills[p, what] for what in MOMENTS)] for p in args.precisions]
    print(tabulate(rows, ["precision", "runs", *(f"killed: {what}" for what in MOMENTS)], tablefmt="pipe"))
    moved = not indices or len(set(scales)) > 1
    print(f"{sum(kills.values())} kills, {len(bad)} of {sum(runs.values())} runs differ; loss scales: {scales}; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return int(bool(bad) or not moved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
