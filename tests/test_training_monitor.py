"""What a run says of itself: smoothing, speed, waiting for data, advice, memory, time left."""

import math
import os
import re
import subprocess
import sys

import psutil
import pytest

import training_monitor
from training_monitor import InputClock, Meter, cores, device_memory, host_memory, input_advice, smoothed

pytestmark = pytest.mark.quick


def test_a_value_that_is_not_finite_leaves_the_mean_as_it_is():
    mean = None
    for value in (math.nan, 2.0, math.inf, 3.0, math.nan):
        mean = smoothed(mean, value)
    assert mean == pytest.approx(0.95 * 2 + 0.05 * 3)
    assert smoothed(None, math.inf) is None


def run_clock(monkeypatch, replicas, events):
    """What `waited` gives after events (time, "run" | "batch" | "read")."""
    clock, found = InputClock(replicas), []
    for time, what in events:
        monkeypatch.setattr(training_monitor.time, "monotonic", lambda time=time: time)
        if what == "read":
            found.append(clock.waited())
        else:
            (clock.run_begins if what == "run" else clock.batch_arrives)()
    return found


def test_a_run_waits_from_its_begin_to_its_last_batch(monkeypatch):
    # Two batches are there before the first run; the third comes 2 s after its run has begun, the fourth in time.
    events = [(0, "batch"), (1, "batch"), (5, "run"), (6, "read"), (7, "run"), (8, "read"), (10, "run"), (12, "batch"),
              (13, "batch"), (14, "read"), (15, "run"), (16, "read")]  # fmt: skip
    assert run_clock(monkeypatch, 1, events) == [0, 0, 2, 0]
    # Two replicas: a run takes two batches and begins when both are there; two runs between two readings add up.
    events = [(0, "run"), (1, "batch"), (4, "batch"), (5, "run"), (6, "batch"), (7, "batch"), (8, "read")]
    assert run_clock(monkeypatch, 2, events) == [4 + 2]
    # A batch that the filling thread has not noted yet is counted with the next reading.
    events = [(0, "run"), (1, "read"), (2, "batch"), (3, "run"), (3, "batch"), (4, "read")]
    assert run_clock(monkeypatch, 1, events) == [0, 2]


def test_speed_share_and_time_left_follow_from_the_steps():
    meter = Meter(total_batch=16, total_steps=1000, workers=2)
    assert meter.speed(0) == {} and meter.words(0) == [] and meter.time_left(0) is None
    for _ in range(10):
        meter.add_step(2.0, 0.5)
    assert meter.speed(10) == pytest.approx(
        {"speed/step_s": 2, "speed/images_per_s": 8, "speed/data_wait": 0.25, "speed/eta_s": 990 * 2}
    )
    meter.add_pause(30)  # an evaluation in these ten steps: as many are to come
    assert meter.time_left(10) == pytest.approx(990 * (2 + 3))
    assert [w for w in meter.words(10) if "memory" not in w] == [
        "2.00 s/step", "ETA 1:22:30", "8 images/s", "25 % waiting for data"
    ]  # fmt: skip
    assert [w for w in meter.words(10, beside_bar=True) if "memory" not in w] == ["8 images/s", "25 % waiting for data"]
    meter.add_step(1.0, 7.0)  # more than the step: clocks of two threads
    assert meter.speed(11)["speed/data_wait"] <= 1


def told(meter, share, steps=60, seconds=2.0, now=0.0):
    for _ in range(steps):
        meter.add_step(seconds, share * seconds)
    return meter.advice(now)


def test_advice_comes_at_most_once_an_hour_and_only_for_a_slow_input(monkeypatch):
    monkeypatch.setattr(training_monitor, "cores", lambda: 16)
    meter = Meter(8, 10**6, workers=2)
    assert told(meter, 0.5, steps=49) is None  # too few steps to judge
    assert told(meter, 0.5, steps=1, now=10) == (
        "input is the bottleneck: 50 % of the time waited for data; raise DATA.NUM_WORKERS (2 now, 16 cores)"
    )
    assert told(meter, 0.9, now=3000) is None
    assert told(meter, 0.1, now=4000) is None
    assert "38 % of the time" in told(meter, 0.38, now=4000)
    assert told(Meter(8, 10**6, workers=2), 0.5, steps=100, seconds=0.1) is None  # ten seconds


@pytest.mark.parametrize(
    ("workers", "ranks", "says"),
    [
        (0, 1, r"raise DATA.NUM_WORKERS \(0 now, 8 cores\)"),
        (7, 1, r"raise DATA.NUM_WORKERS \(7 now, 8 cores\)"),
        (3, 2, r"raise DATA.NUM_WORKERS \(3 for each of 2 ranks now, 8 cores\)"),
        (8, 1, r"DATA.NUM_WORKERS=8 already takes all 8 cores: smaller image files, a faster disk or more cores help"),
        (4, 2, r"DATA.NUM_WORKERS=4 for each of 2 ranks already takes all 8 cores"),
    ],
)
def test_more_workers_are_advised_only_while_there_are_cores(workers, ranks, says):
    assert re.search(says, input_advice(0.38, workers, 8, ranks))


def test_cores_are_those_of_the_container(tmp_path):
    mine = len(os.sched_getaffinity(0))
    assert cores(tmp_path / "none") == mine
    for text, expected in (("max 100000", mine), ("50000 100000", 1), ("150000 100000", min(mine, 2)), ("x", mine)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert cores(tmp_path / "cpu.max") == expected


def test_host_memory_has_that_of_the_workers_and_forgets_those_that_ended():
    code = "x = bytearray(150_000_000); print(flush=True); input()"
    process = psutil.Process()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        alone, both = host_memory(process), host_memory(process, [child.pid])
        assert 140e6 < both - alone < 250e6
        child.stdin.close()
    assert host_memory(process, [child.pid]) < both - 100e6


def test_device_memory_is_the_peak_of_the_fullest_gpu_and_no_error_ends_a_run(monkeypatch):
    from utils.tf_v1 import tensorflow

    info = {"GPU:0": {"current": 1, "peak": 5}, "GPU:1": {"current": 2, "peak": 7}}
    monkeypatch.setattr(tensorflow.config.experimental, "get_memory_info", info.__getitem__)
    monkeypatch.setattr(training_monitor, "_NO_DEVICE_MEMORY", [])
    assert device_memory(0) is None
    assert device_memory(2) == 7
    assert Meter(1, 1, 0, gpus=2).memory()["memory/device_gb"] == 7e-9
    assert device_memory(3) is None  # raises KeyError
    assert device_memory(2) is None  # not asked again
