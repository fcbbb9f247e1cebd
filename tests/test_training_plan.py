"""training_plan.py: what a schedule becomes for a number of replicas and images."""

import math
import re

import pytest

from common import UserError
from config import default_config, finalize_config
from training_plan import make_plan

pytestmark = pytest.mark.quick

COSINE = ["TRAIN.LR_POLICY=cosine", "TRAIN.WARMUP=10"]


def settings(*args):
    return finalize_config(default_config().update_args(args))


def plan_of(replicas, *args, images=8000):
    return make_plan(settings(*args), replicas, images)


def test_the_schedule_is_defined_at_a_total_batch_of_eight():
    plan = plan_of(8, "TRAIN.LR_SCHEDULE=1x")
    assert (plan.base_lr, plan.milestones, plan.total_steps) == (0.01, [120000, 160000], 180000)


@pytest.mark.parametrize(
    "replicas,images,accumulation",
    [(1, 1, 1), (2, 4, 1), (3, 1, 1), (5, 2, 3), (7, 3, 1), (12, 1, 1), (64, 2, 1), (512, 4, 1)],
)
def test_any_number_of_replicas_sees_the_same_number_of_images(replicas, images, accumulation):
    plan = plan_of(
        replicas, "TRAIN.LR_SCHEDULE=1x", f"TRAIN.BATCH_SIZE_PER_GPU={images}", f"TRAIN.ACCUMULATION={accumulation}"
    )
    total = replicas * images * accumulation
    assert plan.total_batch == total
    assert plan.base_lr == pytest.approx(0.01 * total / 8)
    for drop, written in zip([*plan.milestones, plan.total_steps], [120000, 160000, 180000]):
        assert 0 <= drop * total - written * 8 < total
    assert plan.warmup_lr <= plan.base_lr


@pytest.mark.parametrize("replicas,images", [(1, 1), (1, 4), (2, 2), (3, 4), (5, 1), (6, 2), (12, 5), (60, 1)])
def test_a_total_batch_gives_the_same_plan_on_any_number_of_replicas(replicas, images):
    plan = plan_of(replicas, "TRAIN.TOTAL_BATCH=60", f"TRAIN.BATCH_SIZE_PER_GPU={images}")
    assert plan.accumulation == 60 // (replicas * images) and plan.total_batch == 60
    one = plan_of(1, "TRAIN.TOTAL_BATCH=60")
    assert [plan.learning_rate(s) for s in range(0, plan.total_steps, 97)] == [
        one.learning_rate(s) for s in range(0, one.total_steps, 97)
    ]
    assert (plan.total_steps, plan.milestones) == (one.total_steps, one.milestones)


@pytest.mark.parametrize(("replicas", "near"), [(3, "15, 18"), (32, "32$")])
def test_a_total_batch_that_the_replicas_cannot_make_is_refused_with_near_ones(replicas, near):
    with pytest.raises(UserError, match=f"TRAIN.TOTAL_BATCH=16 is not a multiple of {replicas} replicas x 1 .*{near}"):
        plan_of(replicas, "TRAIN.TOTAL_BATCH=16")
    with pytest.raises(UserError, match="TRAIN.ACCUMULATION"):
        plan_of(2, "TRAIN.TOTAL_BATCH=16", "TRAIN.ACCUMULATION=2")


def test_the_table_shows_each_setting_and_what_it_becomes():
    words = ["TRAIN.LR_SCHEDULE=1x", "TRAIN.BATCH_SIZE_PER_GPU=2"]
    rows = [
        re.split("  +", line.strip()) for line in plan_of(3, *words, images=600).table(settings(*words)).split("\n")
    ]
    assert ["learning rate", "0.01", "0.0075"] in rows
    assert ["total batch", "8", "3 replicas x 2 images x 1 accumulated = 6"] in rows
    assert ["warm-up", "1000 steps from 0.0033", "1000 steps from 0.002475"] in rows
    assert ["rate / 10 at", "[120000, 160000]", "160000 (epoch 1600.0), 213334 (epoch 2133.3)"] in rows
    assert ["length", "180000 steps", "240000 steps = 2400.0 epochs"] in rows


def test_a_warm_up_that_lasts_until_the_rate_falls_is_warned_of():
    many = settings("TRAIN.LR_SCHEDULE=1x", "TRAIN.BATCH_SIZE_PER_GPU=4")  # 1x: the first drop is at step 469
    (warning,) = make_plan(many, 512, 8000).warnings(many)
    assert "TRAIN.WARMUP=1000 is longer than the first 469 steps" in warning
    assert make_plan(many, 64, 8000).warnings(many) == []
    short = settings("TRAIN.MAX_STEPS=5")
    assert make_plan(short, 1, 8000).warnings(short) == []


def test_batch_statistics_of_less_than_an_update_are_warned_of():
    norm = settings("BACKBONE.NORM=SyncBN", "TRAIN.TOTAL_BATCH=16", "TRAIN.BATCH_SIZE_PER_GPU=2")
    (warning,) = make_plan(norm, 2, 8000).warnings(norm)
    assert "SyncBN normalises over the 4 images computed together, not over the 16 of an update" in warning
    assert make_plan(norm, 8, 8000).warnings(norm) == []
    frozen = settings("TRAIN.TOTAL_BATCH=16")
    assert make_plan(frozen, 2, 8000).warnings(frozen) == []


@pytest.mark.parametrize(("replicas", "images"), [(1, 61), (2, 61), (8, 118287), (3, 7)])
def test_a_length_in_epochs_is_so_many_passes_over_the_images(replicas, images):
    plan = plan_of(replicas, "TRAIN.EPOCHS=12", images=images)
    assert (plan.total_steps - 1) * replicas < 12 * images <= plan.total_steps * replicas
    assert plan.milestones == [round(plan.total_steps * 2 / 3), round(plan.total_steps * 8 / 9)]
    assert plan.warmup_steps == min(1000, plan.total_steps // 10)
    assert plan.base_lr == pytest.approx(0.01 * replicas / 8)  # the rate is that of any other schedule
    assert plan.warnings(settings("TRAIN.EPOCHS=12")) == []


def test_a_length_in_epochs_without_scaling_and_with_a_cosine():
    plan = plan_of(4, "TRAIN.EPOCHS=0.5", "TRAIN.LR_SCALING=none", *COSINE, images=800)
    assert (plan.total_steps, plan.cosine_end, plan.milestones, plan.base_lr) == (100, 100, [], 0.01)
    assert plan_of(4, "TRAIN.EPOCHS=0.001", images=2).total_steps == 1
    table = plan.table(settings("TRAIN.EPOCHS=0.5", *COSINE))
    assert "0.5 epochs" in table and "100 steps = 0.5 epochs" in table


def test_the_table_shows_a_length_in_epochs():
    table = plan_of(2, "TRAIN.EPOCHS=30", images=90).table(settings("TRAIN.EPOCHS=30"))
    rows = [re.split("  +", line.strip()) for line in table.split("\n")]
    assert ["rate / 10 at", "2/3 and 8/9", "900 (epoch 20.0), 1200 (epoch 26.7)"] in rows
    assert ["length", "30 epochs", "1350 steps = 30.0 epochs"] in rows


def test_cocos_schedule_on_a_few_images_is_warned_of_with_the_setting_to_change():
    (warning,) = plan_of(1, images=61).warnings(settings())
    assert warning.startswith("2880000 steps are 47213 passes over 61 images") and "TRAIN.EPOCHS=" in warning
    assert plan_of(8, images=118287).warnings(settings()) == []
    assert plan_of(1, "TRAIN.MAX_STEPS=900", images=61).warnings(settings("TRAIN.MAX_STEPS=900")) == []


def test_scaling_can_be_turned_off():
    plan = plan_of(64, "TRAIN.LR_SCHEDULE=1x", "TRAIN.LR_SCALING=none")
    assert (plan.base_lr, plan.total_steps) == (0.01, 180000)


def test_a_step_limit_cuts_the_run_and_the_drops_beyond_it():
    plan = plan_of(8, "TRAIN.LR_SCHEDULE=[10,20,30]", "TRAIN.MAX_STEPS=15")
    assert (plan.milestones, plan.total_steps) == ([10], 15)


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
    tables = [plan.table(settings(*args)) for plan in (cut, whole)]
    assert "to 0 at 1000" in tables[0] and f"{whole.learning_rate(299):.6g} in the last step" in tables[0]
    assert "last step" not in tables[1] and "rate / 10" not in tables[1]
