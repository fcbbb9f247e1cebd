"""The model of training over several ranks (benchmarks/scaling_model.py) and the bookkeeping of its measurement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scaling
from benchmarks.scaling_model import (
    Cluster,
    Cost,
    Link,
    coordination_seconds,
    expected_slowest,
    fit_link,
    hierarchical_seconds,
    reduced_step,
    ring_bytes,
    ring_seconds,
    spread_of_batches,
    sync_bn_bytes,
    sync_bn_seconds,
)
from common import UserError, read_json

pytestmark = pytest.mark.quick

FREE = Link(0.0, np.inf)
ONE_BY_ONE = Cluster(1, FREE, Link(1e-3, 100e6))
EIGHTS = Cluster(8, Link(1e-6, 100e9), Link(1e-3, 10e9))
LAYERS = [1e6 * i for i in (4, 3, 2, 1)]  # bytes of four gradients
READY = [1.0, 2.0, 3.0, 4.0]


def free(size):
    return Cost(0.0, 0.0)


def waiting(bandwidth, busy=0.0):
    return lambda size: Cost(size / bandwidth, busy * size / bandwidth)


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


def test_rings_on_two_levels_add_up_and_have_less_latency_than_a_flat_one_of_single_ranks():
    inside = 14 * 1e-6 + 2 * 7 / 8 * 1e9 / 100e9
    across = 2 * 3 * 1e-3 + 2 * 3 / 4 * 1e9 / 10e9
    assert hierarchical_seconds(1e9, 32, EIGHTS) == pytest.approx(inside + across)
    assert hierarchical_seconds(1e9, 8, EIGHTS) == ring_seconds(1e9, 8, EIGHTS)
    flat = Cluster(1, FREE, EIGHTS.outer)
    assert hierarchical_seconds(0.0, 512, EIGHTS) < ring_seconds(0.0, 512, flat) / 7


@given(st.integers(2, 600), st.floats(1, 1e9))
def test_with_infinite_bandwidth_only_the_latency_of_2_r_minus_2_rounds_is_left(ranks, size):
    assert ring_seconds(size, ranks, Cluster(1, FREE, Link(1e-5, np.inf))) == pytest.approx(2 * (ranks - 1) * 1e-5)


@given(st.integers(1, 600), st.floats(1, 1e9), st.sampled_from([ring_seconds, hierarchical_seconds]))
def test_more_ranks_never_reduce_faster(ranks, size, seconds):
    assert seconds(size, ranks + 1, EIGHTS) >= seconds(size, ranks, EIGHTS) * (1 - 1e-12)


def test_agreeing_on_what_is_ready_passes_every_rank_twice():
    assert coordination_seconds(1, 1e-5) == 0
    assert coordination_seconds(512, 1e-5) == pytest.approx(1022e-5)


def test_synchronised_norms_send_two_sums_forward_and_two_backward():
    # 64 channels on 2 ranks: (2 x 64 + 1) and 2 x 64 floats, each through a ring that sends every byte once.
    assert sync_bn_bytes([64], 2) == 4 * 129 + 4 * 128
    assert sync_bn_bytes([64, 8], 4) == pytest.approx(1.5 * (4 * (129 + 128) + 4 * (17 + 16)))


def test_synchronised_norms_wait_for_two_agreements_each():
    # 4 ranks: 6 messages of 1 ms, and half of that until the next look; two all-reduces without cost of their own.
    assert sync_bn_seconds([64], 4, Cluster(1, FREE, FREE), 1e-3) == pytest.approx(2 * 9e-3)


def test_resnet_50_has_26560_normalised_channels():
    row = scaling.sync_bn_table().splitlines()[2]
    assert float(row.split("|")[2]) == pytest.approx(ring_bytes(4 * (4 * 26560 + 53), 8) / 1e6, abs=5e-3)


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
    late = lambda size: Cost(1.0 + size / 1e6, 0.0)  # noqa: E731
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
def test_steps_cut_by_a_turns_begin_or_end_are_not_counted():
    stamps = np.array([[t, 100.0 * i] for i, t in enumerate([1.0, 2.0, 3.5, 8.0, 9.0, 9.5])])
    seconds, sent = scaling.whole_steps(stamps, [(0.5, 4.0), (7.0, 9.2)])
    assert seconds == pytest.approx([1.0, 1.5, 1.0]) and sent == [100.0] * 3


def recorded(ranks_step, separate=(1.0, 1.0), reduce_seconds=0.0):
    """Measurements as `measure` writes them, of ranks whose all-reduce takes reduce_seconds per MB on the processor."""
    sizes = [10**6, 2 * 10**6, 4 * 10**6]
    times = [max(reduce_seconds, 1e-9) * s / 1e6 for s in sizes]
    arm = {"ranks": 2, "megabits": None, "sent": 8e6, "others": 0.02}
    return {
        "machine": {"cores": 2},
        "schedules": {"256": {"names": ["a", "b"], "sizes": [3e6, 1e6], "ready": [0.5, 0.8], "tail": 0.2}},
        "reductions": {"2 ranks": {"ranks": 2, "sizes": sizes, "seconds": times, "cpu": times, "idle": 0.0}},
        "arms": {
            "1 process": {**arm, "ranks": 1, "seconds": [[0.9, 0.9]]},
            "2 separate processes": {**arm, "seconds": [list(separate), list(separate)]},
            "2 ranks": {**arm, "seconds": [[ranks_step] * 3] * 2},
        },
    }


def test_the_prediction_reproduces_what_it_was_calibrated_with():
    assert scaling.predicted_arm(recorded(1.0), "2 ranks") == pytest.approx(1.0, abs=3e-3)
    assert scaling.predicted_arm(recorded(1.0, separate=(0.8, 1.2)), "2 ranks") == pytest.approx(1.1, abs=3e-3)
    # On the processor: 4 MB at 50 ms/MB.
    assert scaling.predicted_arm(recorded(1.2, reduce_seconds=0.05), "2 ranks") == pytest.approx(1.2, abs=3e-3)


def test_a_step_that_something_else_interrupted_does_not_count():
    found = recorded(1.0)
    found["arms"]["2 ranks"]["seconds"] = [[1.0] * 9 + [7.0]] * 2
    assert scaling.arm_step(found["arms"]["2 ranks"]) == 1.0


def test_a_published_step_is_reproduced_by_the_computation_calibrated_with_it():
    found = read_json(scaling.MEASURED, "measurements")
    compute = scaling.calibrated(found, scaling.SINGLE)
    step, slowest = scaling.gpu_step(found, compute, 1, 8, scaling.gpu_cluster(100))
    assert step == pytest.approx(scaling.SINGLE.step, rel=0.01) and compute < slowest < step


def test_more_gpus_train_faster_and_less_efficiently():
    found = read_json(scaling.MEASURED, "measurements")
    steps = [scaling.gpu_step(found, 0.1, 4, ranks, scaling.gpu_cluster(25))[0] for ranks in (1, 8, 64, 512)]
    assert steps == sorted(steps) and steps[0] == pytest.approx(0.1, rel=0.02) and steps[-1] < 0.8


def test_the_documents_have_the_tables_of_the_measurements():
    found = read_json(scaling.MEASURED, "measurements")
    for path, names in scaling.DOCUMENTS.items():
        assert scaling.fill_document(path.read_text(), found, names) == path.read_text(), "benchmarks/scaling.py report"
    with pytest.raises(UserError, match="<!-- measured -->"):
        scaling.fill_document("", found, ["measured"])


def test_the_tables_show_efficiency_and_bytes_per_rank():
    row = next(r for r in scaling.measured_table(recorded(1.25)).splitlines() if r.startswith("| 2 ranks"))
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells[2:] == ["2%", "1.250", "0%", "1.60", "0.72", "0.80", "4.0", "4.0"]
