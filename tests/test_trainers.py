"""trainers.py: the rate that the graph takes at each step is the plan's; devices in words."""

import platform

import pytest
from test_training_plan import COSINE, plan_of

from common import UserError
from trainers import describe_devices, freeze_variables, learning_rate_tensor
from utils.tf_v1 import tf

pytestmark = pytest.mark.quick


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


@pytest.mark.parametrize(("pattern", "wrong"), [("nothing", "matches no trainable"), (".", "nothing is left to train")])
def test_freezing_nothing_or_everything_is_refused(pattern, wrong):
    with tf.Graph().as_default():
        for name in ("fpn/W", "rpn/W"):
            tf.get_variable(name, [], initializer=tf.zeros_initializer())
        with pytest.raises(UserError, match=rf"TRAIN\.FREEZE_PATTERN='{pattern}' .*{wrong}"):
            freeze_variables(pattern)
    with tf.Graph().as_default():
        for name in ("fpn/W", "rpn/W"):
            tf.get_variable(name, [], initializer=tf.zeros_initializer())
        assert freeze_variables("^fpn/") == ["fpn/W"]
        assert [v.op.name for v in tf.trainable_variables()] == ["rpn/W"]


@pytest.mark.parametrize(("visible", "warned"), [(None, False), ("", False), ("-1", False), ("0", True), ("1,3", True)])
def test_the_plan_names_the_devices_and_gpus_that_are_not_there_are_warned_of(visible, warned, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert describe_devices(["/cpu:0"]).startswith(f"the CPU of {platform.node()} (")
    assert (
        f"CUDA_VISIBLE_DEVICES={visible} names GPUs, but none can be used here" in capsys.readouterr().err
    ) == warned
    assert describe_devices(["/cpu:0", "/cpu:1"]).startswith("2 replicas on the CPU of")
    assert describe_devices(["/gpu:0", "/gpu:1"]).startswith(f"2 GPUs of {platform.node()} (")
