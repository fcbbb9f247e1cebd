"""training_plan.py: what a schedule becomes for a number of replicas and images."""

import dataclasses
import json
import math
import re

import pytest

from common import UserError
from config import SETTINGS, default_config, finalize_config
from training_plan import make_plan, told_time

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
    assert ["warm-up", "auto from 0.0033", "1000 steps from 0.002475"] in rows
    assert ["rate / 10 at", "[120000, 160000]", "160000 (epoch 1600.0), 213334 (epoch 2133.3)"] in rows
    assert ["length", "180000 steps", "240000 steps = 2400.0 epochs"] in rows
    assert ["evaluation", "auto", "every 16000 steps = 160.0 epochs, 15 times"] in rows
    assert ["checkpoint", "auto", "every 500 steps = 5.0 epochs, 480 times"] in rows


def test_a_warm_up_that_lasts_until_the_rate_falls_is_warned_of():
    many = settings(
        "TRAIN.LR_SCHEDULE=1x", "TRAIN.BATCH_SIZE_PER_GPU=4", "TRAIN.WARMUP=1000"
    )  # 1x: the first drop is at step 469
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
    (warning,) = plan_of(1, "TRAIN.LR_SCHEDULE=2x", images=61).warnings(settings("TRAIN.LR_SCHEDULE=2x"))
    assert warning.startswith("2880000 steps are 47213 passes over 61 images") and "TRAIN.EPOCHS=" in warning
    assert plan_of(8, images=118287).warnings(settings()) == []
    for key, value in (("TRAIN.EPOCHS", 2000), ("TRAIN.MAX_STEPS", 900000)):  # with the setting that was given
        (warning,) = plan_of(1, f"{key}={value}", images=61).warnings(settings(f"{key}={value}"))
        assert f"lower {key}" in warning
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


# ------------------------------------------------------------------------------------------- without a schedule
def fitting_length(images, total):
    """The documented rule, written out plainly."""
    if images >= 50000:
        return math.ceil(360000 * 8 / total)
    shown = 24 * images
    if shown < 24000:  # small: up to 50 times, until 24,000 were shown
        shown = 50 * images if 50 * images < 24000 else 24000
    return max(math.ceil(shown / total), 500)


@pytest.mark.parametrize("total", [1, 2, 3, 8, 16, 64])
@pytest.mark.parametrize("images", [1, 13, 61, 292, 480, 481, 999, 1000, 1001, 2975, 16551, 49999, 50000, 118287])
def test_a_run_without_a_schedule_gets_one_that_fits_its_data(images, total):
    plan, cfg = plan_of(total, images=images), settings()
    length = fitting_length(images, total)
    assert plan.total_steps == length and plan.warnings(cfg) == []
    if images >= 50000:
        same = plan_of(total, "TRAIN.LR_SCHEDULE=2x", "TRAIN.WARMUP=1000", images=images)
        assert (plan.milestones, plan.warmup_steps) == (same.milestones, same.warmup_steps)
    else:
        assert plan.milestones == [round(length * 2 / 3), round(length * 8 / 9)]
        assert plan.warmup_steps == min(1000, length // 10)
    assert plan.learning_rate(plan.warmup_steps) == plan.base_lr == pytest.approx(0.01 * total / 8)
    # The first evaluation comes early, and there are some, but not hundreds. No more than 500 steps can be lost.
    assert 10 <= -(-length // plan.evaluate_every) <= 20
    assert plan.checkpoint_every <= 500 and plan.evaluate_every % plan.checkpoint_every == 0
    (note,) = plan.notes(cfg)
    assert ("COCO's 2x" in note) == (images >= 50000) and "TRAIN.EPOCHS=" in note and "TRAIN.LR_SCHEDULE=" in note


def test_the_rule_is_described_where_the_plan_says_it_is():
    about = SETTINGS["TRAIN.LR_SCHEDULE"].about
    for words in ("50,000 images or more", "24 epochs", "up to 50 times", "24,000 images", "fewer than 500 updates"):
        assert words in about


@pytest.mark.parametrize("asked", [["TRAIN.EPOCHS=3"], ["TRAIN.LR_SCHEDULE=1x"], ["TRAIN.LR_SCHEDULE=[100,140,160]"]])
def test_a_schedule_that_was_given_is_followed_without_a_note(asked):
    assert plan_of(1, *asked, images=13).notes(settings(*asked)) == []
    assert plan_of(1, *asked, images=13).total_steps in (39, 1440000, 1280)


@pytest.mark.parametrize("asked", ["TRAIN.MAX_STEPS=160", "TRAIN.LR_SCHEDULE=[20,30,40]", "TRAIN.EPOCHS=24.6"])
def test_a_short_run_leaves_its_warm_up(asked):
    """160 steps on 13 photos were once spent in a warm-up of 1,000."""
    plan = plan_of(2, asked, images=13)
    assert plan.total_steps == 160 and plan.warmup_steps == 16 and plan.learning_rate(16) == plan.base_lr
    notes = plan.notes(settings(asked))
    assert len(notes) == asked.startswith("TRAIN.MAX") and all("set TRAIN.EPOCHS=24.6 instead" in n for n in notes)


def test_a_schedule_of_cocos_kind_can_be_left_to_the_size_of_the_data():
    for name in ("1x", "9x"):
        large = plan_of(8, f"TRAIN.LR_SCHEDULE=auto:{name}", images=118287)
        assert large.schedule == plan_of(8, f"TRAIN.LR_SCHEDULE={name}", images=118287).schedule
        assert plan_of(8, f"TRAIN.LR_SCHEDULE=auto:{name}", images=500).schedule == plan_of(8, images=500).schedule


# ------------------------------------------------------------------------------------------------------------- periods
def test_periods_count_passes_over_the_data():
    plan = plan_of(2, "TRAIN.EPOCHS=6", "TRAIN.EVAL_PERIOD=2", "TRAIN.CHECKPOINT_PERIOD=0.5", images=120)
    assert (plan.evaluate_every, plan.checkpoint_every) == (120, 30)
    table = plan.table(settings("TRAIN.EPOCHS=6", "TRAIN.EVAL_PERIOD=2", "TRAIN.CHECKPOINT_PERIOD=0.5"))
    assert re.search(r"evaluation +2 epochs +every 120 steps = 2.0 epochs, 3 times", table)
    assert plan_of(2, "TRAIN.EVAL_PERIOD=0").evaluate_every == 0


def test_periods_in_blocks_of_steps_are_as_they_were():
    words = ["TRAIN.LR_SCHEDULE=1x", "TRAIN.STEPS_PER_EPOCH=500", "TRAIN.EVAL_PERIOD=50", "TRAIN.CHECKPOINT_PERIOD=2"]
    plan = plan_of(2, *words, images=61)
    assert (plan.evaluate_every, plan.checkpoint_every) == (25000, 1000)
    assert "50 x 500 steps" in plan.table(settings(*words))
    assert plan_of(2, "TRAIN.PERIOD_STEPS=7", images=61).checkpoint_every == 7


def test_a_period_as_long_as_the_run_is_warned_of():
    words = ["TRAIN.EPOCHS=12", "TRAIN.EVAL_PERIOD=50"]
    (warning,) = plan_of(2, *words, images=61).warnings(settings(*words))
    assert "TRAIN.EVAL_PERIOD=50" in warning and "auto" in warning
    assert "evaluation" not in plan_of(2, *words).table(settings(*words, "DATA.VAL=[]"))


# -------------------------------------------------------------------------------------------------------- continuing
def through_json(plan, *args):
    return json.loads(json.dumps(plan.record(settings(*args))))


@pytest.mark.parametrize(
    "asked", [[], ["TRAIN.EPOCHS=30"], ["TRAIN.LR_SCHEDULE=[50,90]"], ["TRAIN.MAX_STEPS=90"], COSINE]
)
def test_a_continued_run_keeps_its_plan_when_its_data_grows(asked):
    plan = plan_of(2, *asked, images=90)
    again = make_plan(settings(*asked), 2, 500, through_json(plan, *asked))
    assert dataclasses.replace(again, images_per_epoch=90) == plan


def test_a_continued_run_follows_the_settings_that_are_given_with_it():
    record = through_json(plan_of(2, images=90))
    longer = make_plan(settings("TRAIN.EPOCHS=100"), 2, 90, record)
    assert longer == plan_of(2, "TRAIN.EPOCHS=100", images=90)
    cut = make_plan(settings("TRAIN.MAX_STEPS=700"), 2, 90, record)
    assert cut.total_steps == 700 and cut.schedule == plan_of(2, images=90).schedule  # cut, and otherwise the same
    assert cut.warmup_steps == plan_of(2, images=90).warmup_steps
    often = make_plan(settings("TRAIN.EVAL_PERIOD=1"), 2, 90, record)
    assert often.evaluate_every == 45 and often.schedule == cut.schedule


@pytest.mark.parametrize(
    "damage",
    [
        {"schedule": [5, 3]},
        {"schedule": "auto"},
        {"warmup": -1},
        {"checkpoint_every": 0},
        {"settings": 3},
        {"warmup": "x"},
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(damage):
    with pytest.raises(UserError, match="plan stored with the checkpoint is damaged"):
        make_plan(settings(), 2, 90, {**through_json(plan_of(2, images=90)), **damage})


# --------------------------------------------------------------------------------------------------------------- time
def test_a_run_of_weeks_is_warned_of_with_the_setting_to_change():
    plan = plan_of(1, images=118287)
    assert "TRAIN.EPOCHS=" in plan.long_run(settings(), 15 * 86400) and "15 days" in plan.long_run(
        settings(), 15 * 86400
    )
    assert plan.long_run(settings(), 13 * 86400) == ""


def test_times_are_told_in_the_unit_that_fits():
    told = {40: "40 s", 2280: "38 min", 7000: "1.9 h", 86400: "24 h", 9 * 86400: "9 days", 5400: "1.5 h"}
    assert {seconds: told_time(seconds) for seconds in told} == told
