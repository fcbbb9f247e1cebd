"""training_find_batch.py: the order of the trials, what decides them, and two real ones."""

import re
import sys
import time

import numpy as np
import pytest
from tiny import TINY_TRAINING

import training_find_batch
from augment import resized_shape
from common import UserError
from config import default_config, finalize_config
from dataset import load_training_split
from training_find_batch import Trial, largest_images, largest_that_fits, outcome, trial_settings, try_batch


def settings(*args):
    return finalize_config(default_config().update_args([*TINY_TRAINING, *args]))


@pytest.mark.parametrize("most", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 5, 6, 7, 8, 33, 100])
def test_the_largest_batch_that_fits_is_found_with_few_trials(capacity, most):
    tried = []

    def run(batch):
        tried.append(batch)
        return Trial(batch, batch <= capacity, batch << 30)

    trials = largest_that_fits(run, most)
    assert max((t.batch for t in trials if t.fits), default=0) == min(capacity, most)
    assert len(tried) == len(set(tried)) <= 2 * most.bit_length() + 1 and max(tried) <= most
    assert [t.batch for t in trials] == sorted(tried)


def test_the_outcome_names_the_largest_and_the_fastest():
    trials = [Trial(1, True, 10**9, 1.0, 1.0), Trial(2, True, 2 * 10**9, 1.0, 2.0), Trial(4, True, 3 * 10**9, 4.0, 1.0),
              Trial(8, False, 0, reason="more than 4.0 GB of memory")]  # fmt: skip
    lines = outcome(trials).splitlines()
    assert lines[-2].split()[-1] == "TRAIN.BATCH_SIZE_PER_GPU=4"
    assert "TRAIN.BATCH_SIZE_PER_GPU=2 (2.00 images/s)" in lines[-1]
    assert any(line.split()[0] == "8" and "more than 4.0 GB" in line for line in lines if line.strip())
    with pytest.raises(UserError, match="PREPROC.MAX_SIZE"):
        outcome([Trial(1, False, 0, reason="out of memory")])


def test_a_trial_sees_the_largest_images_and_the_most_objects():
    words = ["PREPROC.SHORT_EDGE_SIZE=[96,128]", "DATA.NUM_WORKERS=3", "TRAIN.TOTAL_BATCH=8"]
    cfg = trial_settings(settings(*words).to_dict())
    assert cfg.PREPROC.SHORT_EDGE_SIZE == [128, 128] and cfg.DATA.NUM_WORKERS == 0
    assert (cfg.TRAIN.ACCUMULATION, cfg.TRAIN.TOTAL_BATCH) == (2, None)
    split = load_training_split(cfg)
    some = largest_images(split, cfg, 2)
    objects = [len(split.objects(i).labels) for i in range(len(split))]
    assert max(len(some.objects(i).labels) for i in range(len(some))) == max(objects)
    areas = [np.prod(resized_shape(h, w, 128, cfg.PREPROC.MAX_SIZE)) for h, w in split.image_sizes().tolist()]
    chosen = [np.prod(resized_shape(h, w, 128, cfg.PREPROC.MAX_SIZE)) for h, w in some.image_sizes().tolist()]
    assert max(chosen) == max(areas) and len(some) <= 2


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed .signal 9., as for lack of memory"),
        ("raise SystemExit('OOM when allocating tensor')", "out of memory on the device"),
        ("raise MemoryError('no more')", "ended with code 1: MemoryError: no more"),
        ("import time; x = bytearray(300 << 20); time.sleep(60)", "more than 0.2 GB of memory"),
    ],
)
def test_a_trial_that_dies_or_takes_too_much_does_not_fit(program, reason, tmp_path, monkeypatch):
    (tmp_path / "dying_trial.py").write_text(f"import sys; sys.stdin.read()\n{program}\n")
    monkeypatch.setattr(training_find_batch, "__name__", "dying_trial")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    started = time.monotonic()
    trial = try_batch(settings(), 2, 200 << 20)
    assert not trial.fits and trial.batch == 2
    assert re.search(reason, trial.reason), trial.reason
    assert time.monotonic() - started < 50  # the one that sleeps was ended


def test_a_real_trial_measures_memory_and_time(capsys):
    trial = try_batch(settings(), 2, 16 << 30)
    assert trial.fits and 2e8 < trial.memory < 8e9 and trial.images == pytest.approx(2 / trial.seconds)
    with pytest.raises(UserError, match="nowhere"):  # what is wrong with the data is not a matter of memory
        try_batch(settings("DATA.BASEDIR=/nowhere"), 1, 16 << 30)
