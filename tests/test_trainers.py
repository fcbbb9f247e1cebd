"""trainers.py: the rate that the graph takes at each step is the plan's; devices in words."""

import gc
import platform
import weakref

import numpy as np
import pytest
from test_training_plan import COSINE, plan_of

from common import UserError
from config import default_config
from trainers import DetectionModel, describe_devices, freeze_variables, learning_rate_tensor, training_graph
from utils.tf_v1 import tf

# isort: split
from tensorpack.tfutils.common import get_global_step_var

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


# Settings -> the decay of weights, biases and norms.
DECAY_RULES = {
    "as ever": ([], (0.01, 0, 0)),
    "detectron2": (["TRAIN.WEIGHT_DECAY_BIAS=None"], (0.01, 0.01, 0)),
    "everything": (["TRAIN.WEIGHT_DECAY_BIAS=None", "TRAIN.WEIGHT_DECAY_NORM=None"], (0.01, 0.01, 0.01)),
    "three numbers": (["TRAIN.WEIGHT_DECAY_BIAS=0.2", "TRAIN.WEIGHT_DECAY_NORM=0.5"], (0.01, 0.2, 0.5)),
    "nothing": (["TRAIN.WEIGHT_DECAY=0"], (0, 0, 0)),
}


@pytest.mark.parametrize("rule", DECAY_RULES)
def test_three_steps_are_those_of_sgd_in_float64_with_the_decay_of_each_kind_of_variable(rule):
    """v = 0.9 v + (g + decay w), w -= rate(step) v, with the rate of the warm-up's first steps."""
    settings, (of_weights, of_biases, of_norms) = DECAY_RULES[rule]
    settings = ["TRAIN.WEIGHT_DECAY=0.01", *settings, "TRAIN.BASE_LR=0.5", "TRAIN.WARMUP_INIT_LR=0.1", "TRAIN.WARMUP=4"]
    plan = plan_of(8, *settings)
    cfg = default_config().update_args(settings)
    decays = {"fpn/W": of_weights, "fpn/b": of_biases, "conv0/gn/gamma": of_norms, "conv0/gn/beta": of_norms, "own": 0}
    random = np.random.RandomState(0)
    weights = {name: random.randn(3) for name in decays}
    gradients = {name: random.randn(3, 3) for name in decays}  # of three steps
    with tf.Graph().as_default(), tf.Session() as sess:
        variables = {n: tf.get_variable(n, initializer=w.astype(np.float32)) for n, w in weights.items()}
        fed = {n: tf.placeholder(tf.float32, [3]) for n in weights}
        step = tf.train.get_or_create_global_step()
        optimizer = DetectionModel(cfg, plan, []).optimizer()
        op = optimizer.apply_gradients([(fed[n], variables[n]) for n in weights])
        sess.run([tf.global_variables_initializer(), tf.local_variables_initializer()])
        sess.run(optimizer.guard.remember)
        for i in range(3):
            sess.run(op, {fed[n]: gradients[n][i] for n in weights})
            sess.run(step.assign_add(1))
        result = sess.run(variables)
    for name, decay in decays.items():
        w, velocity = weights[name], 0.0
        for i in range(3):
            velocity = 0.9 * velocity + gradients[name][i] + decay * w
            w = w - (0.1 + (0.5 - 0.1) * i / 4) * velocity
        np.testing.assert_allclose(result[name], w, atol=1e-5, err_msg=name)


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


def test_a_graph_of_training_is_freed():
    """Functions of tensorpack that remember what they made for a graph would keep it."""
    with training_graph() as graph:
        get_global_step_var()
        freed = weakref.ref(graph)
    del graph
    gc.collect()
    assert freed() is None


def test_the_session_of_a_run_initialises_variables_of_both_kinds_and_tables():
    from training import RunSession

    with tf.Graph().as_default():
        weight = tf.get_variable("weight", initializer=2.0)
        kept = tf.get_variable("kept", initializer=3.0, collections=[tf.GraphKeys.LOCAL_VARIABLES])
        initial = tf.lookup.KeyValueTensorInitializer(["cat", "dog"], [5, 7])
        found = tf.lookup.StaticHashTable(initial, -1).lookup(tf.constant(["dog", "owl"]))
        with RunSession(["/cpu:0"]).create_session() as session:
            values = session.run([weight, kept, found])
    assert values[:2] == [2.0, 3.0] and values[2].tolist() == [7, -1]
