"""training_estimate.py and training_pace.py: what a run is said to take. No test measures time."""

import numpy as np
import pytest

import training_estimate
from config import default_config, finalize_config
from model_flops import Training
from tests.tiny import TINY_MODEL
from training_estimate import estimate_step, product_speed, typical_pixels
from training_pace import TellPace
from training_plan import make_plan


def settings(*args):
    return finalize_config(default_config().update_args(args))


def test_a_step_is_its_products_at_the_measured_speed(monkeypatch):
    speeds = {"float32": {False: 1e9, True: 2e9}, "bfloat16": {False: 1e9, True: 8e9}}
    monkeypatch.setattr(training_estimate, "product_speed", lambda precision, devices: speeds[precision])
    products = Training({False: 1000.0, True: 3000.0}, {False: 1e8, True: 5e8})
    monkeypatch.setattr(training_estimate, "count_training", lambda cfg: products)
    cfg = settings("TRAIN.BATCH_SIZE_PER_GPU=2", "TRAIN.ACCUMULATION=3", "MODE_FPN=True", "PREPROC.SHORT_EDGE_SIZE=320")
    sizes = np.array([[320, 640]] * 9)
    # Two of four replicas are here.
    seconds = estimate_step(cfg, make_plan(cfg, 4, 9), sizes, ["/cpu:0", "/cpu:1"], ["float32", "bfloat16"])
    pixels = 320 * 640
    image = (1000 * pixels + 1e8) / 1e9 + (3000 * pixels + 5e8) / 2e9
    half = (1000 * pixels + 1e8) / 1e9 + (3000 * pixels + 5e8) / 8e9
    expected = {"float32": 2 * 3 * 2 * image * 1.1 + 3 * 0.05, "bfloat16": 2 * 3 * 2 * half * 1.1 + 3 * 0.05}
    assert seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("precision", "has_bfloat16", "measured", "says"),
    [
        ("float32", True, {"float32": 3.0, "bfloat16": 1.2}, "TRAIN.PRECISION=bfloat16 would be about 2.5 times"),
        ("float32", True, {"float32": 3.0, "bfloat16": 2.9}, None),
        ("float32", False, {"float32": 3.0}, "TRAIN.PRECISION=bfloat16 would be slower: this CPU has neither"),
        ("bfloat16", True, {"bfloat16": 1.2}, None),
        ("bfloat16", False, {"bfloat16": 9.0, "float32": 3.0}, "TRAIN.PRECISION=float32 would be about 3.0 times"),
        ("float16", False, {"float16": 9.0, "float32": 3.0}, "TRAIN.PRECISION=float32 would be about 3.0 times"),
        ("float64", True, {"float64": 9.0}, None),
    ],
)  # fmt: skip
def test_the_plan_tells_of_a_faster_precision(precision, has_bfloat16, measured, says):
    asked = training_estimate.precisions_to_measure(precision, has_bfloat16)
    assert asked[0] == precision and set(measured) <= set(asked)
    assert has_bfloat16 or "bfloat16" not in asked[1:]  # it may take a minute without the instructions
    advice = training_estimate.precision_advice(measured, has_bfloat16)
    assert advice is None if says is None else says in advice


def test_gpus_with_tensor_cores_are_named():
    advice = training_estimate.gpu_advice
    assert "PRECISION=bfloat16 is probably faster" in advice("float32", (8, 0))
    assert "PRECISION=float16 is probably faster" in advice("float32", (7, 5))
    assert advice("float32", (6, 1)) is advice("float32", ()) is advice("bfloat16", (9, 0)) is None


@pytest.mark.parametrize(
    ("sizes", "words", "pixels"),
    [
        ([(600, 800)], [], 800 * 1088),  # 800 x 1067, padded to multiples of 32
        ([(600, 800)], ["MODE_FPN=False"], 800 * 1067),
        ([(600, 800), (800, 600)], [], 800 * 1088),
        ([(600, 800), (600, 600)], [], (800 * 1088 + 800 * 800) / 2),
        ([(600, 800), (600, 600)], ["TRAIN.BATCH_SIZE_PER_GPU=2"], 800 * 1088),  # padded to the larger
        ([(100, 2000)], [], 96 * 1344),  # MAX_SIZE
        ([(600, 800)], ["PREPROC.SHORT_EDGE_SIZE=[200,440]"], 320 * 448),
        ([(600, 800)], ["PREPROC.SCALE_JITTER=[0.1,2.0]", "PREPROC.CROP_SIZE=[500,600]"], 512 * 608),
    ],
)
def test_the_typical_image_is_resized_and_padded(sizes, words, pixels):
    assert typical_pixels(settings("MODE_FPN=True", *words), np.array(sizes)) == pixels


def test_the_speed_of_products_is_one_that_a_machine_can_have():
    """Products that TensorFlow leaves out, because nobody reads their results, would take no time."""
    speed = product_speed("float32")
    assert set(speed) == {False, True} and all(1e7 < s < 5e12 for s in speed.values())


# ------------------------------------------------------------------------------------------------------- first steps
def told(times, caplog, *words, images=118287, start=0):
    """What is logged when steps take these times."""
    cfg = settings(*TINY_MODEL, *words)
    plan = make_plan(cfg, 1, images)
    ticks = iter(np.cumsum([0.0, *times]).tolist())
    pace = TellPace(cfg, plan, lambda: next(ticks))
    caplog.clear()
    pace._before_train()
    for step in range(start + 1, start + len(times) + 1):
        type(pace).global_step = property(lambda self, step=step: step)
        pace._trigger_step()
    return [record.getMessage() for record in caplog.records], plan


@pytest.fixture(autouse=True)
def own_step(monkeypatch):
    monkeypatch.setattr(TellPace, "global_step", TellPace.global_step, raising=False)


def test_the_time_is_told_once_after_the_first_steps_without_the_first(caplog):
    (said,), plan = told([40.0] + [0.6] * 30, caplog, "TRAIN.EPOCHS=12", images=300)
    assert plan.total_steps == 3600
    assert said == "3589 more steps take about 36 min at 0.60 s/step, evaluations not included"


def test_one_slow_step_does_not_change_the_time(caplog):
    (said,), _ = told([40.0] + [0.6] * 4 + [900.0] + [0.6] * 30, caplog, "TRAIN.EPOCHS=12", images=300)
    assert "36 min at 0.60 s/step" in said


def test_slow_steps_are_told_sooner(caplog):
    (said,), _ = told([60.0] + [25.0] * 3, caplog, "TRAIN.EPOCHS=12", "TRAIN.EVAL_PERIOD=0", images=300)
    assert said == "3596 more steps take about 25 h at 25.00 s/step"


def test_weeks_are_warned_of_with_the_setting_to_change(caplog):
    (said, warning), plan = told([9.0] + [0.6] * 10, caplog)
    assert plan.total_steps == 2880000 and "20 days" in said and "20 days" in warning and "TRAIN.EPOCHS=12" in warning


def test_less_than_a_minute_is_not_worth_telling(caplog):
    assert told([9.0] + [0.1] * 20, caplog, "TRAIN.MAX_STEPS=100")[0] == []
