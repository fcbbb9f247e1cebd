"""training.py: what a schedule becomes for a number of replicas and images, and that the graph follows it."""

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


def test_the_graph_follows_the_plan_at_every_step():
    plan = plan_of(8, "TRAIN.LR_SCHEDULE=[30,40,50]", "TRAIN.WARMUP=10")
    with tf.Graph().as_default(), tf.Session() as sess:
        step = tf.placeholder(tf.int64, [])
        rate = learning_rate_tensor(plan, step)
        for i in range(50):
            assert sess.run(rate, {step: i}) == pytest.approx(plan.learning_rate(i), rel=1e-5)
