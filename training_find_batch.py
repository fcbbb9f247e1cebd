"""The batch planner: measures which TRAIN.BATCH_SIZE_PER_GPU fits into memory and how many images a second it trains.

Each size is tried in a process of its own, which trains some steps on the largest images of the data. A size whose
process dies or takes more memory than allowed does not fit.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from tabulate import tabulate

from augment import resized_shape
from common import UserError, logger
from config import Config, default_config, finalize_config
from data import training_keys
from data_sampling import training_images
from data_workers import training_dataflow
from dataset import load_training_split
from dataset_split import DatasetSplit, select_images

__all__ = ["Trial", "find_batch", "largest_that_fits", "memory_limit", "outcome", "try_batch"]

_STEPS = 4  # of a trial; the first is not timed
_RESERVE = 0.9  # a trial may take this share of the free memory
_CGROUP_FILES = (  # (limit, use) of the memory of a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Trial(NamedTuple):
    batch: int
    fits: bool
    memory: int  # the most that it took, in bytes
    seconds: float = 0.0  # of a step
    images: float = 0.0  # per second
    reason: str = ""  # why it does not fit


def find_batch(cfg: Config, most: int, limit: int | None) -> list[Trial]:
    """Tries batches up to `most` images with at most `limit` bytes of memory (None: what is free)."""
    limit = limit or memory_limit()
    logger.info(f"trying batches on the largest training images with up to {limit / 1e9:.1f} GB of memory")

    def run(batch: int) -> Trial:
        trial = try_batch(cfg, batch, limit)
        rate = f"{trial.images:.2f} images/s, {trial.memory / 1e9:.2f} GB" if trial.fits else trial.reason
        logger.info(f"TRAIN.BATCH_SIZE_PER_GPU={batch}: {rate}")
        return trial

    return largest_that_fits(run, most)


def largest_that_fits(run: Callable[[int], Trial], most: int) -> list[Trial]:
    """All trials, by batch size: doubled until one does not fit, then halved in between."""
    trials = {}
    batch = 1
    while batch <= most:
        trials[batch] = run(batch)
        if not trials[batch].fits or batch == most:
            break
        batch = min(2 * batch, most)
    good = max((b for b, t in trials.items() if t.fits), default=0)
    bad = min((b for b, t in trials.items() if not t.fits), default=good + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        trials[middle] = run(middle)
        good, bad = (middle, bad) if trials[middle].fits else (good, middle)
    return [trials[b] for b in sorted(trials)]


def outcome(trials: list[Trial]) -> str:
    """A table of the trials, and the settings to use."""
    rows = [
        [t.batch, f"{t.memory / 1e9:.2f}", f"{t.seconds:.2f}", f"{t.images:.2f}", ""]
        if t.fits
        else [t.batch, f"{t.memory / 1e9:.2f}" if t.memory else "", "", "", t.reason]
        for t in trials
    ]
    headers = ["batch", "memory (GB)", "s/step", "images/s", ""]
    table = tabulate(rows, headers, "simple", disable_numparse=True, colalign=("right",) * 4 + ("left",))
    good = [t for t in trials if t.fits]
    if not good:
        raise UserError(
            f"a batch of one image does not train here: {trials[0].reason}; lower PREPROC.MAX_SIZE, "
            "PREPROC.SHORT_EDGE_SIZE or FRCNN.BATCH_PER_IM"
        )
    largest, fastest = good[-1], max(good, key=lambda t: t.images)
    lines = [f"largest that fits:       TRAIN.BATCH_SIZE_PER_GPU={largest.batch}"]
    lines.append(f"most images per second:  TRAIN.BATCH_SIZE_PER_GPU={fastest.batch} ({fastest.images:.2f} images/s)")
    return "\n".join([table, "", *lines])


def memory_limit() -> int:
    """Bytes that a trial may take: most of what is free on this machine and in this container."""
    free = psutil.virtual_memory().available
    for limit, used in _CGROUP_FILES:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not this kind of container, or "max"
            continue
    return max(int(free * _RESERVE), 1)


# -------------------------------------------------------------------------------------------------------- one trial
def try_batch(cfg: Config, batch: int, limit: int) -> Trial:
    """A trial in a process of its own; it is ended when it takes more than `limit` bytes."""
    settings = {**cfg.to_dict(), "TRAIN.BATCH_SIZE_PER_GPU": batch}
    # This program's own settings, already checked; the child imports by the same paths.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=output, stderr=errors, env=environment
        )
        try:
            child.stdin.write(json.dumps(settings).encode())
            child.stdin.close()
            peak = 0
            while child.poll() is None:
                peak = max(peak, _resident(child.pid))
                if peak > limit:
                    return Trial(batch, False, peak, reason=f"more than {limit / 1e9:.1f} GB of memory")
                time.sleep(0.05)
        except BrokenPipeError:
            child.wait()
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
        output.seek(0)
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
        try:
            result = json.loads(output.read().splitlines()[-1])
        except (ValueError, IndexError):
            result = None
    if child.returncode != 0 or result is None:
        if result and "error" in result:
            raise UserError(result["error"])
        return Trial(batch, False, peak, reason=_reason(child.returncode, said))
    peak = max(peak, result["memory"])
    if peak > limit:
        return Trial(batch, False, peak, reason=f"more than {limit / 1e9:.1f} GB of memory")
    return Trial(batch, True, peak, result["seconds"], result["images"] / result["seconds"])


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def _reason(code: int, said: str) -> str:
    if "ResourceExhausted" in said or "OOM when" in said:
        return "out of memory on the device"
    if code < 0:
        return f"its process was killed (signal {-code})" + ", as for lack of memory" * (code == -9)
    lines = said.strip().splitlines()
    return f"its process ended with code {code}: {lines[-1][:150] if lines else 'no message'}"


def trial_settings(settings: dict[str, Any]) -> Config:
    """The settings of a run as a trial uses them: the largest images, read in its own process."""
    cfg = default_config().update_from_dict(settings, "settings of the run")
    cfg.DATA.NUM_WORKERS, cfg.DATA.VAL, cfg.TRAIN.EVAL_PERIOD = 0, [], 0
    if not cfg.PREPROC.SCALE_JITTER:
        cfg.PREPROC.SHORT_EDGE_SIZE = [max(cfg.PREPROC.SHORT_EDGE_SIZE)] * 2
    cfg.PREPROC.COPY_PASTE = 0.0
    # Accumulated gradients take memory once, however many there are.
    cfg.TRAIN.ACCUMULATION = 2 if cfg.TRAIN.ACCUMULATION > 1 or cfg.TRAIN.TOTAL_BATCH else 1
    cfg.TRAIN.TOTAL_BATCH, cfg.TRAIN.MAX_STEPS = None, _STEPS
    cfg.TRAIN.SEED = cfg.TRAIN.SEED or 0
    return finalize_config(cfg)


def largest_images(split: DatasetSplit, cfg: Config, count: int) -> DatasetSplit:
    """The split's `count` images that are largest after resizing, and the one with the most objects."""
    images = training_images(split, cfg)
    sizes, edge = split.image_sizes()[images], cfg.PREPROC.SHORT_EDGE_SIZE[-1]
    areas = [np.prod(resized_shape(h, w, edge, cfg.PREPROC.MAX_SIZE)) for h, w in sizes.tolist()]
    objects = np.diff(split.columns["first_object"])[images]
    chosen = {int(np.argmax(objects)), *np.argsort(areas)[::-1][: max(count - 1, 1)].tolist()}
    some = copy.copy(split)
    some.columns = select_images(split.columns, images[sorted(chosen)])
    return some


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Trains some steps -> their median time, the images of a step, and the most memory that this process had."""
    from trainers import local_devices, make_trainer
    from training_plan import make_plan
    from training_trial import run_steps

    cfg = trial_settings(settings)
    split = load_training_split(cfg)
    cfg = cfg.copy()
    cfg.DATA.CLASS_NAMES, cfg.DATA.NUM_CATEGORY = list(split.class_names), len(split.class_names)
    cfg.freeze()
    devices = local_devices(cfg)
    split = largest_images(split, cfg, cfg.TRAIN.BATCH_SIZE_PER_GPU * len(devices))
    plan = make_plan(cfg, len(devices), len(split))
    dataflow = training_dataflow(split, cfg, batches_per_step=plan.accumulation * len(devices))
    times = [time.perf_counter()]

    def after_step(step: int, loss: float) -> bool:
        times.append(time.perf_counter())
        return step >= _STEPS

    trainer = make_trainer(cfg, plan, devices)
    try:
        run_steps(cfg, plan, dataflow, training_keys(cfg), devices, trainer, after_step)
    finally:
        dataflow.stop()
    seconds = statistics.median(np.diff(times)[1:].tolist())
    return {"seconds": seconds, "images": plan.total_batch, "memory": _most_resident()}


def _most_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def main() -> int:
    try:
        print(json.dumps(measure(json.loads(sys.stdin.read()))))
    except UserError as e:
        print(json.dumps({"error": str(e)}))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
