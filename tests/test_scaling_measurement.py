"""What benchmarks/scaling.py measures: turns of stopped processes, and when the gradients of a step are ready."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import COCO_MINI, TINY_MODEL

from benchmarks import scaling

# Notes a step every 20 ms, and as many bytes sent as there were steps.
RANK = """
import os, sys, time
from pathlib import Path
out = Path(sys.argv[1])
out.with_suffix(".pid").write_text(str(os.getpid()))
for step in range(2000):
    time.sleep(0.02)
    with open(out, "a") as f:
        f.write(f"{time.monotonic()} {step}\\n")
"""


@pytest.mark.quick
def test_ranks_make_steps_in_the_turns_of_their_arm_alone(tmp_path):
    ranks = [scaling.Rank(tmp_path, name, 0) for name in ("a", "b")]
    started = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path / f"{r.name}-0.steps")]) for r in ranks]
    try:
        while not all(len(r.steps()) for r in ranks):
            time.sleep(0.05)
        for rank in ranks:
            rank.signal(scaling.signal.SIGSTOP)
        arms = [scaling.Arm("first", ranks[:1]), scaling.Arm("both", ranks), scaling.Arm("second", ranks[1:])]
        found = scaling.take_turns(arms, rounds=2, seconds=0.6, hosts=[], quiet=0.0, patience=3.6)
        stamps = [r.steps()[:, 0] for r in ranks]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for arm, count in zip(("first", "both", "second"), (1, 2, 1)):
        seconds = found[arm]["seconds"]
        assert len(seconds) == count and found[arm]["sent"] == 1 and 0 <= found[arm]["others"] < 1
        assert all(s and min(s) > 0.01 and max(s) < 0.6 for s in seconds)
    # Both stood still while the other had its turn: a pause as long as a turn in each one's record.
    assert all(np.diff(s).max() > 0.55 for s in stamps)


@pytest.mark.quick
def test_areas_are_those_of_the_images_as_training_pads_them():
    # Five photographs of 640x480 or its like become 1067x800 (portrait 640x427: 1199x800), one of 500x346 1156x800.
    areas = scaling.padded_areas(COCO_MINI)
    pixels = np.array([1184 * 800, *[1088 * 800] * 3, 1216 * 800, 1088 * 800])
    assert sorted(areas) == pytest.approx(sorted(pixels / pixels.mean()))


def test_a_steps_schedule_holds_every_trained_byte_and_the_heads_gradients_come_first(tmp_path):
    scaling.schedule_process(tmp_path / "s.json", TINY_MODEL, 96, 128, repeats=1)
    found = json.loads((tmp_path / "s.json").read_text())
    ready = dict(zip(found["names"], found["ready"]))
    sizes = dict(zip(found["names"], found["sizes"]))
    assert sizes["conv0/W"] == 4 * 7 * 7 * 3 * 8 and sizes["maskrcnn/deconv/W"] == 4 * 2 * 2 * 16 * 16
    assert len(ready) == len(found["names"]) and min(ready.values()) > 0 and found["tail"] > 0
    assert ready["fastrcnn/outputs/class/W"] < ready["group3/block0/conv3/W"] < ready["conv0/W"]


@pytest.mark.quick
def test_what_a_measurement_has_started_ends_with_it(tmp_path):
    log = tmp_path / "log.txt"
    job = scaling.start([sys.executable, "-c", "import time; time.sleep(60)"], log)
    with pytest.raises(subprocess.TimeoutExpired):
        scaling.finish([job], log, seconds=0.2)
    assert job.poll() == -scaling.signal.SIGTERM
