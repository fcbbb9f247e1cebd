"""The model of training over several ranks (benchmarks/scaling_model.py) and its measurement (scaling.py beside it)."""

import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import COCO_MINI, TINY_MODEL

from benchmarks import scaling, scaling_model
from benchmarks.scaling_model import (
    Cluster,
    Link,
    arm_step,
    calibrated,
    expected_slowest,
    fit_link,
    gpu_cluster,
    gpu_step,
    predicted_arm,
    reduced_step,
    ring_bytes,
    ring_seconds,
    spread_of_batches,
    tables,
)
from common import UserError, read_json

pytestmark = pytest.mark.quick

MEASURED = read_json(scaling.MEASURED, "measurements")

FREE = Link(0.0, np.inf)
ONE_BY_ONE = Cluster(1, FREE, Link(1e-3, 100e6))
EIGHTS = Cluster(8, Link(1e-6, 100e9), Link(1e-3, 10e9))
LAYERS = [1e6 * i for i in (4, 3, 2, 1)]  # bytes of four gradients
READY = [1.0, 2.0, 3.0, 4.0]


def free(size):
    return 0.0, 0.0


def waiting(bandwidth, busy=0.0):
    return lambda size: (size / bandwidth, busy * size / bandwidth)


# ---------------------------------------------------------------------------------------------- cost of an all-reduce
def test_a_ring_of_four_moves_six_quarters_of_the_data_in_six_rounds():
    assert ring_bytes(100.0, 4) == 150.0
    assert ring_seconds(100e6, 4, ONE_BY_ONE) == pytest.approx(6 * 1e-3 + 150e6 / 100e6)
    assert ring_seconds(100e6, 1, ONE_BY_ONE) == 0


def test_a_ring_over_machines_waits_for_the_network_once_per_machine_and_round_trip():
    # 16 ranks: 30 rounds, of which a chunk spends 4 between the two machines; the network's bandwidth sets the pace.
    expected = 26 * 1e-6 + 4 * 1e-3 + 2 * 15 / 16 * 1e9 / 10e9
    assert ring_seconds(1e9, 16, EIGHTS) == pytest.approx(expected)
    assert ring_seconds(1e9, 8, EIGHTS) == pytest.approx(14 * 1e-6 + 2 * 7 / 8 * 1e9 / 100e9)


@given(st.integers(2, 600), st.floats(1, 1e9))
def test_with_infinite_bandwidth_only_the_latency_of_2_r_minus_2_rounds_is_left(ranks, size):
    assert ring_seconds(size, ranks, Cluster(1, FREE, Link(1e-5, np.inf))) == pytest.approx(2 * (ranks - 1) * 1e-5)


@given(st.integers(1, 600), st.floats(1, 1e9))
def test_more_ranks_never_reduce_faster(ranks, size):
    assert ring_seconds(size, ranks + 1, EIGHTS) >= ring_seconds(size, ranks, EIGHTS) * (1 - 1e-12)


@given(st.floats(1e-5, 1e-2), st.floats(1e6, 1e11))
def test_latency_and_bandwidth_are_recovered_from_exact_times(latency, bandwidth):
    sizes = np.array([2.0**n for n in range(8, 30, 3)]) * latency * bandwidth / 1e6
    link = fit_link(sizes, latency + sizes / bandwidth)
    assert link == pytest.approx((latency, bandwidth), rel=1e-4)


def test_a_fit_has_no_negative_latency_nor_bandwidth():
    assert fit_link([1e6, 2e6], [1e-3, 3e-3]).latency == 0
    assert fit_link([1e6, 2e6], [3e-3, 2e-3]).bandwidth == np.inf


# -------------------------------------------------------------------------------------------- a step with communication
def test_without_cost_a_step_takes_its_computation_and_its_update():
    assert reduced_step(READY, LAYERS, 0.5, free, cycle=0) == 4.5


def test_what_is_reduced_during_the_backward_pass_is_hidden_but_for_the_last_gradient():
    # The last gradient has 1 MB: 0.1 s at 10 MB/s; 4 + 3 + 2 MB were done before it was ready.
    assert reduced_step(READY, LAYERS, 0.0, waiting(10e6), cycle=0) == pytest.approx(4.1)


def test_a_slow_network_reduces_for_longer_than_the_computation():
    # 4 MB from 1 s to 5 s; by then all others are ready, and go together: 6 s more.
    assert reduced_step(READY, LAYERS, 0.0, waiting(1e6), cycle=0) == pytest.approx(11.0)
    # At most 3 MB at a time, each with 1 s of latency: 4, then 3, then 2 + 1.
    late = lambda size: (1.0 + size / 1e6, 0.0)  # noqa: E731
    assert reduced_step(READY, LAYERS, 0.0, late, fusion=3e6, cycle=0) == pytest.approx(1 + 5 + 4 + 4)


def test_nothing_is_hidden_when_communication_needs_the_processor():
    assert reduced_step(READY, LAYERS, 0.0, waiting(10e6, busy=1.0), cycle=0) == pytest.approx(5.0)
    half = reduced_step(READY, LAYERS, 0.0, waiting(10e6, busy=0.5), cycle=0)
    assert half == pytest.approx(4 + 0.5 * 0.9 + 0.1)


def test_gradients_wait_for_the_next_look_and_for_the_agreement():
    # Looks every 2 s: the only gradient, ready after 3 s, waits 1 s in the mean of all phases, then 2 s for the others.
    assert reduced_step([3.0], [1e6], 0.0, free, coordination=2.0) == pytest.approx(3 + 1 + 2)
    assert reduced_step([3.0], [1e6], 0.0, waiting(1e6), cycle=2.0) == pytest.approx(3 + 1 + 1)


def test_the_order_in_which_variables_are_listed_does_not_matter():
    shuffled = [2, 0, 3, 1]
    a = reduced_step(READY, LAYERS, 0.0, waiting(2e6))
    assert a == reduced_step([READY[i] for i in shuffled], [LAYERS[i] for i in shuffled], 0.0, waiting(2e6))


@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.floats(1, 1e8)), min_size=1, max_size=30),
    st.floats(1e5, 1e10), st.floats(0, 1), st.floats(0, 0.1),
)  # fmt: skip
def test_a_step_lies_between_perfect_overlap_and_none(gradients, bandwidth, busy, cycle):
    ready, sizes = map(list, zip(*gradients))
    seconds = reduced_step(ready, sizes, 0.0, waiting(bandwidth, busy), cycle=cycle)
    total = sum(sizes) / bandwidth
    assert max(max(ready), total) - 1e-6 <= seconds <= max(ready) + total + (len(ready) + 1) * cycle + 1e-6


# ----------------------------------------------------------------------------------------------------- the slowest rank
def test_the_slowest_of_draws_equals_enumeration_and_ends_at_the_largest_sample():
    samples = [3.0, 1.0, 2.0]
    pairs = [max(a, b) for a in samples for b in samples]
    assert expected_slowest(samples, 1) == pytest.approx(2.0)
    assert expected_slowest(samples, 2) == pytest.approx(np.mean(pairs))
    assert expected_slowest(samples, 10_000) == pytest.approx(3.0)
    assert expected_slowest([1.5] * 4, 64) == pytest.approx(1.5)


def test_batches_of_more_images_spread_less():
    samples = np.random.default_rng(0).gamma(20, 0.1, 500)
    one, nine = spread_of_batches(samples, 1), spread_of_batches(samples, 9)
    assert one.mean() == pytest.approx(1) and nine.mean() == pytest.approx(1, abs=0.01)
    assert nine.std() == pytest.approx(one.std() / 3, rel=0.05)


# --------------------------------------------------------------------------------------------------------- measurements
def recorded(ranks_step, separate=(1.0, 1.0), reduce_seconds=0.0):
    """Measurements as `measure` writes them, of ranks whose all-reduce takes reduce_seconds per MB on the processor."""
    sizes = [10**6, 2 * 10**6, 4 * 10**6]
    times = [max(reduce_seconds, 1e-9) * s / 1e6 for s in sizes]
    return {
        "schedules": {"256": {"names": ["a", "b"], "sizes": [3e6, 1e6], "ready": [0.5, 0.8], "tail": 0.2}},
        "reductions": {"2 ranks": {"ranks": 2, "sizes": sizes, "seconds": times, "cpu": times, "idle": 0.0}},
        "arms": {
            "1 process": {"ranks": 1, "seconds": [[0.9, 0.9]]},
            "2 separate processes": {"ranks": 2, "seconds": [list(separate), list(separate)]},
            "2 ranks": {"ranks": 2, "seconds": [[ranks_step] * 3] * 2},
        },
    }


def test_the_prediction_reproduces_what_it_was_calibrated_with():
    assert predicted_arm(recorded(1.0), "2 ranks") == pytest.approx(1.0, abs=3e-3)
    assert predicted_arm(recorded(1.0, separate=(0.8, 1.2)), "2 ranks") == pytest.approx(1.1, abs=3e-3)
    # On the processor: 4 MB at 50 ms/MB.
    assert predicted_arm(recorded(1.2, reduce_seconds=0.05), "2 ranks") == pytest.approx(1.2, abs=3e-3)


def test_a_step_that_something_else_interrupted_is_left_out():
    assert arm_step({"ranks": 2, "seconds": [[1.0] * 9 + [7.0]] * 2}) == 1.0


def test_a_published_step_is_reproduced_by_the_computation_calibrated_with_it():
    for images, published in scaling_model.GPUS.values():
        compute = calibrated(MEASURED, images, published)
        step, slowest = gpu_step(MEASURED, compute, images, 8, gpu_cluster(100))
        assert step == pytest.approx(published, rel=1e-3) and compute < slowest < step


def test_agreeing_on_what_is_ready_passes_every_rank_twice(monkeypatch):
    fast = gpu_cluster(1e9)
    monkeypatch.setattr(scaling_model, "BUSY", 0.0)
    steps = []
    for latency in (1e-3, 2e-3):  # 1,022 messages for each fused all-reduce
        monkeypatch.setattr(scaling_model, "MESSAGE_LATENCY", latency)
        steps.append(gpu_step(MEASURED, 0.01, 1, 512, fast)[0])
    assert steps[0] > 1.022 and steps[1] > 2.044


def test_more_gpus_train_faster_and_less_efficiently():
    steps = [gpu_step(MEASURED, 0.1, 4, ranks, gpu_cluster(25))[0] for ranks in (1, 8, 64, 512)]
    assert steps == sorted(steps) and steps[0] == pytest.approx(0.1, rel=0.02) and steps[-1] < 0.8


def test_the_document_has_the_tables_of_the_measurements():
    document = (scaling.ROOT / "docs" / "SCALING.md").read_text()
    missing = [name for name, table in tables(MEASURED).items() if table not in document]
    assert not missing, "copy the tables that `benchmarks/scaling.py tables` prints into docs/SCALING.md"


def test_the_first_steps_of_a_record_are_left_out(tmp_path):
    (tmp_path / "record").write_text("0.0\n9.0\n12.0\n13.0\n14.5\n15.5\n")
    assert scaling.steps_of(tmp_path / "record") == [1.5, 1.0]


def test_areas_are_those_of_the_images_as_training_pads_them():
    # Five photographs of 640x480 or its like become 1067x800 (portrait 640x427: 1199x800), one of 500x346 1156x800.
    areas = scaling.padded_areas(COCO_MINI)
    pixels = np.array([1184 * 800, *[1088 * 800] * 3, 1216 * 800, 1088 * 800])
    assert sorted(areas) == pytest.approx(sorted(pixels / pixels.mean()))


def test_what_a_measurement_has_started_ends_with_it(tmp_path):
    waits = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    fails = (
        f"import os, sys, time\nwhile not os.path.getsize({str(tmp_path / 'pid')!r}): time.sleep(0.01)\nsys.exit('why')"
    )
    (tmp_path / "pid").touch()
    with pytest.raises(UserError, match="why"):
        scaling.run_together([[sys.executable, "-c", fails], [sys.executable, "-c", waits]], tmp_path / "log.txt")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_steps_schedule_holds_every_trained_byte_and_the_heads_gradients_come_first():
    found = scaling.gradient_schedule(TINY_MODEL, 96, 128, repeats=1)
    ready = dict(zip(found["names"], found["ready"]))
    sizes = dict(zip(found["names"], found["sizes"]))
    assert sizes["conv0/W"] == 4 * 7 * 7 * 3 * 8 and sizes["maskrcnn/deconv/W"] == 4 * 2 * 2 * 16 * 16
    assert len(ready) == len(found["names"]) and min(ready.values()) > 0 and found["tail"] > 0
    assert ready["fastrcnn/outputs/class/W"] < ready["group3/block0/conv3/W"] < ready["conv0/W"]
