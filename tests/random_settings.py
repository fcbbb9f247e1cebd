#!/usr/bin/env python3
"""Random settings must end in a working run or in one line: trains a tiny model for two steps with each.

    python -m tests.random_settings --minutes 30 --seed 1
    python -m tests.random_settings --graphs --minutes 30 --seed 1    in this process, on a batch made up: many more

Counted are runs that finished, those refused (exit code 2 to 4 and one line that names the reason), and those that
ended in anything else, which are printed with their settings. Each run is a process of its own, limited in memory and
time. tests/test_config.py draws from the same settings without running them.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from common import UserError
from config import SETTINGS, Config, default_config, finalize_config
from config_check import Allowed
from tests.tiny import TINY_TRAINING

__all__ = ["KEPT", "compute", "draw_settings"]

ROOT = Path(__file__).resolve().parent.parent

# Values of every kind, right or wrong; large ones would be right but take long.
_NUMBERS = [
    -1, 0, 1, 2, 3, 4, 5, 8, 16, 31, 32, 64, 96, 100, 128, 0.0, 1e-6, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999, 1.0, 1.5,
    2.0, 10.0, -0.5, 1e9, 1e30, 1e-30, float("nan"), float("inf"),
]  # fmt: skip
_WORDS = ["", "a", "None", "true", "1x", "9x", "[1,", "(a", ".*", "conv0", "keras:Nothing", "a:b", "\0", "ü"]
# Left alone: where data and weights are, and what would make a run long rather than wrong.
KEPT = {
    "DATA.BASEDIR", "DATA.TRAIN", "DATA.VAL", "DATA.DATASETS", "DATA.CLASS_NAMES", "BACKBONE.WEIGHTS", "BACKBONE.NAME",
    "TRAINER", "TRAIN.MAX_STEPS", "BACKBONE.RESNET_NUM_BLOCK", "BACKBONE.NUM_GROUPS", "TRAIN.ACCUMULATION",
}  # fmt: skip


def draw_value(rng: random.Random, allowed: Allowed, default: Any) -> Any:
    """A value like the default, one that is allowed, or any other."""
    kind = rng.random()
    if allowed.choices and kind < 0.7:
        return rng.choice(allowed.choices)
    if kind < 0.05:
        return rng.choice([None, True, [], {}, [[]], {"a": 1}, *_WORDS])
    if isinstance(default, list) and kind < 0.9:
        length = len(default) if default and rng.random() < 0.8 else rng.choice([0, 1, 2, 4, 5])
        inner = default[0] if default else 1.0
        values = [draw_value(rng, Allowed("", lambda v: v), inner) for _ in range(length)]
        return sorted(values) if rng.random() < 0.5 and all(type(v) in (int, float) for v in values) else values
    if isinstance(default, str):
        return rng.choice(_WORDS)
    return rng.choice(_NUMBERS)


def draw_settings(rng: random.Random, most: int = 6, keep: set[str] = frozenset()) -> dict[str, Any]:
    """{key: value} of up to `most` settings; three quarters of the values are allowed for their key alone."""
    keys = rng.sample([k for k in SETTINGS if k not in keep], rng.randint(1, most))
    drawn = {}
    for key in keys:
        allowed, default = SETTINGS[key].allowed, SETTINGS[key].default
        wanted = rng.random() < 0.75
        for _ in range(50):
            drawn[key] = draw_value(rng, allowed, default)
            try:
                allowed.read(drawn[key])
            except (ValueError, TypeError, OverflowError):
                continue
            if wanted:
                break
        if wanted and rng.random() < 0.2:
            drawn[key] = default
    return drawn


def _run(settings: list[str], gigabytes: int, seconds: float) -> tuple[int, str]:
    """Exit code (None -> -1 where it ran too long) and what was written to standard error."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30,) * 2)

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--logdir", f"{folder}/run", "--config", *settings]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, cwd=ROOT)
        except subprocess.TimeoutExpired as e:
            return -1, str(e.stderr or b"")
    return done.returncode, done.stderr


def compute(cfg: Config) -> None:
    """Builds the model for training and for prediction, and computes losses, gradients and detections of a small batch;
    ValueError if a loss is not finite."""
    import numpy as np

    from model_rcnn import build_inference, build_training
    from tests.graph import constants, make_batch
    from utils.tf_v1 import tf

    batch = make_batch([(64, 96), (50, 64)], [[(5, 5, 40, 50, 1), (30, 2, 90, 60, 2), (0, 0, 20, 20, 1, 1)], []], cfg)
    with tf.Graph().as_default():
        tf.set_random_seed(0)
        losses, _ = build_training(constants(batch), cfg)
        gradients = [
            g for g in tf.gradients(tf.add_n(list(losses.values())), tf.trainable_variables()) if g is not None
        ]
        with tf.variable_scope(tf.get_variable_scope(), reuse=True):
            found = build_inference(tf.constant(batch["image"]), tf.constant(batch["image_shape"]), cfg)
        options = tf.ConfigProto()
        options.graph_options.rewrite_options.disable_meta_optimizer = True  # one run does not repay it
        with tf.Session(config=options) as session:
            session.run(tf.global_variables_initializer())
            values = session.run([losses, gradients, found])[0]
    if not all(np.isfinite(v) for v in values.values()):
        raise ValueError(f"losses are {values}")


def _in_this_process(words: list[str]) -> tuple[int, str]:
    try:
        compute(finalize_config(default_config().update_args([*TINY_TRAINING, "DATA.NUM_CATEGORY=3", *words])))
    except UserError as e:
        return 2, str(e)
    except Exception:
        return 1, traceback.format_exc()
    return 0, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--graphs", action="store_true", help="compute a batch here instead of running train.py")
    parser.add_argument("--gigabytes", type=int, default=24, help="address space of a run")
    parser.add_argument("--seconds", type=float, default=180, help="time of a run")
    args = parser.parse_args()
    rng, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    finished = refused = failed = number = 0
    while time.monotonic() < end:
        number += 1
        drawn = draw_settings(rng, keep=KEPT)
        words = [f"{key}={value!r}" for key, value in drawn.items()]
        try:  # most are refused without a run, which needs no process
            finalize_config(default_config().update_args([*TINY_TRAINING, *words]))
        except UserError as e:
            if "\n" not in str(e):
                refused += 1
                continue
        if args.graphs:
            code, said = _in_this_process(words)
        else:
            code, said = _run([*TINY_TRAINING, "TRAIN.MAX_STEPS=2", *words], args.gigabytes, args.seconds)
        if code == 0:
            finished += 1
        elif code in (2, 3) and "Traceback" not in said:
            refused += 1
            print(f"refused: {said.strip().splitlines()[-1][:300]}", flush=True)
        else:
            failed += 1
            print(f"FAILED ({code}): {' '.join(words)}\n{said[-1500:]}", flush=True)
    print(f"{number} drawn: {finished} finished, {refused} refused in one line, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
