"""benchmarks/gpu_simulation.py: the arithmetic of the simulated step, on steps small enough to compute by hand."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.gpu_simulation import GPUS, KNOWN, Gpu, Known, Step, calibrated, kind_of, read_steps, simulate, tables

pytestmark = pytest.mark.quick

# 1 TFLOP/s, 1 GB/ms at full efficiency; a launch takes 10 us, noticing a result 5 us, a host's operation 1 ms.
PLAIN = Gpu("plain", {"float32": 1e12}, 1e12, {"float32": 1.0}, 1.0, 1e-6, 10e-6, 5e-6, 1e-3)


def step_of(*rows):
    """rows: (type, flops, bytes) of one image, on the GPU unless a fourth entry says "host" or "waits"."""
    flops, traffic = (np.array([[r[i] for r in rows], [2 * r[i] for r in rows]], float) for i in (1, 2))
    marks = [r[3] if len(r) > 3 else "" for r in rows]
    return Step(
        np.array([r[0] for r in rows]), flops, traffic, np.array([m != "host" for m in marks]),
        np.array([m == "waits" for m in marks]),
    )  # fmt: skip


def test_a_kernel_takes_the_larger_of_arithmetic_and_traffic():
    arithmetic = simulate(step_of(("Conv2D", 1e9, 1e6)), PLAIN, "float32", 1)  # 1 ms or 1 us
    assert arithmetic.seconds == pytest.approx(1e-3 + 10e-6) and arithmetic.busy == pytest.approx(1e-3)
    assert arithmetic.bottleneck == "convolutions and products"
    memory = simulate(step_of(("Relu", 1e6, 3e9)), PLAIN, "float32", 1)
    assert memory.busy == pytest.approx(3e-3) and memory.bottleneck == "memory traffic of the rest"
    assert simulate(step_of(("Relu", 0, 0)), PLAIN, "float32", 1).busy == pytest.approx(1e-6)  # the shortest


def test_work_grows_with_the_images_as_between_one_and_two():
    step = step_of(("Conv2D", 1e9, 0))
    fixed = step._replace(flops=np.array([[3e9], [4e9]]))
    assert simulate(step, PLAIN, "float32", 4).busy == pytest.approx(4e-3)
    assert simulate(fixed, PLAIN, "float32", 4).busy == pytest.approx(6e-3)


def test_short_kernels_are_bound_by_their_launches_and_long_ones_hide_them():
    short = simulate(step_of(*[("Relu", 0, 1e6)] * 100), PLAIN, "float32", 1)  # 1 us each, started every 10
    assert short.seconds == pytest.approx(100 * 10e-6 + 1e-6) and short.bottleneck == "starting kernels"
    long = simulate(step_of(*[("Relu", 0, 1e8)] * 100), PLAIN, "float32", 1)  # 100 us each
    assert long.seconds == pytest.approx(10e-6 + 100 * 100e-6) and long.starved == pytest.approx(10e-6)


def test_the_host_waits_for_the_gpu_where_it_needs_a_result_and_the_gpu_for_operations_on_the_host():
    waiting = simulate(step_of(("Relu", 0, 1e9), ("Relu", 0, 1e9, "waits")), PLAIN, "float32", 1)
    assert waiting.waits == 1  # 1 ms, 5 us until the host notices, 10 us for the launch
    assert waiting.seconds == pytest.approx(10e-6 + 1e-3 + 5e-6 + 10e-6 + 1e-3)
    nms = simulate(step_of(("Relu", 0, 1e9), ("Nms", 0, 0, "host"), ("Relu", 0, 1e9)), PLAIN, "float32", 2)
    assert nms.on_host == pytest.approx(2e-3)  # 1 ms for each of two images
    assert nms.seconds == pytest.approx(10e-6 + 2e-3 + 2e-3 + 10e-6 + 2e-3) and nms.launches == 2


def test_calibration_finds_the_efficiency_at_which_a_published_speed_comes_out():
    steps = {"float32": step_of(*[("Conv2D", 1e9, 0)] * 10)}
    slow = replace(PLAIN, efficiency={"float32": 0.25})
    speed = 2 / simulate(steps["float32"], slow, "float32", 2).seconds
    own = calibrated(steps, PLAIN, [Known("plain", "float32", 2, speed, "")])
    assert own.efficiency["float32"] == pytest.approx(0.25, rel=1e-4)


def test_the_recorded_steps_have_the_work_of_a_mask_rcnn_and_give_the_published_speeds():
    steps = read_steps()
    for step in steps.values():
        flops, traffic = step.work(1)
        products = np.array([kind_of(t) == "convolutions and products" for t in step.types])
        assert 0.5e12 < flops.sum() < 3e12 and (flops[~products] == 0).all() and traffic.sum() > 5e9
        assert len(step.types) > 2000
    half, full = (steps[p].work(1)[1].sum() for p in ("float16", "float32"))
    assert half < 0.8 * full
    v100 = calibrated(steps, GPUS["V100"], KNOWN)
    for known in KNOWN:
        predicted = known.images / simulate(steps[known.precision], v100, known.precision, known.images).seconds
        assert predicted == pytest.approx(known.speed, rel=0.01) or v100.efficiency[known.precision] > 0.99
    assert "H100" in tables(steps)
