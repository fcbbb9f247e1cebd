"""trainers.py: the rate that the graph takes at each step is the plan's."""

import pytest
from test_training_plan import COSINE, plan_of

from common import UserError
from trainers import freeze_variables, learning_rate_tensor
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
