"""training.py: what a schedule becomes for a number of replicas and images, and that the graph follows it."""

import math

import pytest

from config import default_config, finalize_config
from training import learning_rate_tensor, make_plan
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


def plan_of(replicas, *args, images=8000):
    return make_plan(finalize_config(default_config().update_args(args)), replicas, images)


def test_the_schedule_is_defined_at_a_total_batch_of_eight():
    plan = plan_of(8, "TRAIN.LR_SCHEDULE=1x")
    assert (plan.base_lr, plan.milestones, plan.total_steps) == (0.01, [120000, 160000], 180000)


@pytest.mark.parametrize("replicas,images,accumulation", [(1, 1, 1), (2, 4, 1), (3, 1, 1), (5, 2, 3), (64, 2, 1)])
def test_any_number_of_replicas_sees_the_same_number_of_images(replicas, images, accumulation):
    plan = plan_of(
        replicas, "TRAIN.LR_SCHEDULE=1x", f"TRAIN.BATCH_SIZE_PER_GPU={images}", f"TRAIN.ACCUMULATION={accumulation}"
    )
    total = replicas * images * accumulation
    assert plan.total_batch == total
    assert plan.base_lr == pytest.approx(0.01 * total / 8)
    assert 0 <= plan.total_steps * total - 180000 * 8 < total
    assert plan.warmup_lr <= plan.base_lr


def test_scaling_can_be_turned_off():
    plan = plan_of(64, "TRAIN.LR_SCHEDULE=1x", "TRAIN.LR_SCALING=none")
    assert (plan.base_lr, plan.total_steps) == (0.01, 180000)


def test_a_step_limit_cuts_the_run_and_the_drops_beyond_it():
    plan = plan_of(8, "TRAIN.LR_SCHEDULE=[10,20,30]", "TRAIN.MAX_STEPS=15")
    assert (plan.milestones, plan.total_steps) == ([10], 15)


COSINE = ["TRAIN.LR_POLICY=cosine", "TRAIN.WARMUP=10"]


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("args", [[], COSINE, [*COSINE, "TRAIN.LR_FINAL=0.1"]])
@pytest.mark.parametrize("milestones", [[30, 40, 50], [120000, 160000, 180000]])
def test_the_graph_follows_the_plan_at_every_step(milestones, args, warmup):
    plan = plan_of(8, f"TRAIN.LR_SCHEDULE={milestones}", *args, f"TRAIN.WARMUP={warmup}")
    steps = [*range(50), *range(milestones[-1] - 30, milestones[-1])]
    steps += range(60, milestones[-1], 9973)
    with tf.Graph().as_default(), tf.Session() as sess:
        tensor = tf.map_fn(lambda step: learning_rate_tensor(plan, step), tf.constant(steps, tf.int64), tf.float32)
        expected = [plan.learning_rate(step) for step in steps]
        assert sess.run(tensor).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_cosine_falls_from_the_first_rate_after_warmup_to_the_last_at_the_end():
    plan = plan_of(16, "TRAIN.LR_SCHEDULE=[2000,2200]", *COSINE, "TRAIN.LR_FINAL=0.1")
    assert (plan.milestones, plan.total_steps, plan.base_lr) == ([], 1100, 0.02)
    rates = [plan.learning_rate(step) for step in range(1101)]
    assert (rates[10], rates[1100]) == (pytest.approx(0.02), pytest.approx(0.002))
    for step in range(10, 1100):
        done = (step - 10) / 1090
        assert rates[step] == pytest.approx(0.002 + 0.018 * (1 + math.cos(math.pi * done)) / 2, rel=1e-12)
    assert rates[:10] == [plan_of(16, "TRAIN.WARMUP=10").learning_rate(step) for step in range(10)]  # as ever


def test_a_step_limit_cuts_the_cosine_without_changing_it():
    args = ["TRAIN.LR_SCHEDULE=[1000]", *COSINE]
    whole, cut = plan_of(8, *args), plan_of(8, *args, "TRAIN.MAX_STEPS=300")
    assert (cut.total_steps, cut.cosine_end) == (300, 1000)
    assert [cut.learning_rate(s) for s in range(300)] == [whole.learning_rate(s) for s in range(300)]
    assert "to 0 at 1000" in cut.table() and f"{whole.learning_rate(299):.6g} in the last step" in cut.table()
    assert "last step" not in whole.table() and "rate / 10" not in whole.table()
