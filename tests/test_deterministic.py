"""TRAIN.DETERMINISTIC and TRAIN.TF32: what they change in the graph, in TensorFlow's state and in nothing else."""

import numpy as np
import pytest
import tensorflow
from graph import constants, evaluate, make_batch, tiny_config

import training
from common import UserError
from data import training_keys
from model_fpn import upsample_nearest_2x
from model_rcnn import build_training
from trainers import DetectionOptimizer, make_trainer, training_graph
from training_plan import make_plan
from utils import ranks, tf_v1
from utils.tf_v1 import tf, without_fixed_order

# isort: split
from tensorpack.dataflow import DataFromList

pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
BACKBONES = {
    "adaptive, GN": ["BACKBONE.NORM=GN", "BACKBONE.STEM_CHANNELS=32", "FRCNN.ROI_SAMPLES=0", "MODE_KEYPOINT=True"],
    "C4": ["MODE_FPN=False", "FRCNN.ROI_OP=crop_and_resize"],
}


def tiny_step(cfg):
    """The losses and the update of a step on two images, in the present graph."""
    shapes, objects = [(96, 128), (64, 96)], [[(10, 8, 60, 70, 1), (40, 30, 120, 90, 2)], [(5, 5, 50, 40, 3)]]
    batch = constants(make_batch(shapes, objects, cfg))
    losses, _ = build_training(batch, cfg)
    optimizer = DetectionOptimizer(0.01, 0.9, 1e-4, None, False)
    pairs = optimizer.compute_gradients(tf.add_n(list(losses.values())))
    gradients = {v.op.name: g for g, v in pairs if g is not None}
    return losses, gradients, optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_deterministic_step_needs_only_operations_of_a_fixed_order(backbone):
    with tf.Graph().as_default():
        *_, update = tiny_step(tiny_config("TRAIN.DETERMINISTIC=True", *BACKBONES[backbone]))
        assert without_fixed_order(update) is None


def test_two_deterministic_runs_are_equal_bit_for_bit_and_begin_with_the_ordinary_gradients():
    found = []
    for deterministic in (False, True):
        with tf.Graph().as_default(), tf.Session() as session:
            tf.set_random_seed(1)
            fetches = tiny_step(tiny_config(f"TRAIN.DETERMINISTIC={deterministic}"))
            assert (without_fixed_order(fetches[2]) is None) == deterministic
            initialise = tf.global_variables_initializer()
            for _ in range(2 if deterministic else 1):
                session.run(initialise)
                found.append([session.run(fetches)[:2] for _ in range(3)])
    ordinary, first, second = found
    for (losses, gradients), (same_losses, same_gradients) in zip(first, second):
        assert losses == same_losses
        assert all(np.array_equal(gradients[name], same_gradients[name]) for name in gradients)
    assert first[0][0] == ordinary[0][0] and first[1][0] != first[0][0]
    for name, gradient in ordinary[0][1].items():
        np.testing.assert_allclose(first[0][1][name], gradient, atol=3e-5 * np.abs(gradient).max(), err_msg=name)


def test_the_deterministic_gradient_of_upsampling_equals_tensorflows():
    x = np.random.RandomState(0).randn(2, 3, 5, 4).astype(np.float32)
    weight = np.random.RandomState(1).randn(2, 6, 10, 4).astype(np.float32)

    def both(fixed):
        features = tf.constant(x)
        y = upsample_nearest_2x(features, fixed)
        return y, tf.gradients(tf.reduce_sum(y * weight), features)[0]

    (y, gradient), (fixed_y, fixed_gradient) = evaluate(lambda: [both(False), both(True)])
    np.testing.assert_array_equal(y, fixed_y)
    np.testing.assert_allclose(fixed_gradient, gradient, rtol=1e-6, atol=1e-6)


def depthwise(x, w):
    return tf.nn.depthwise_conv2d(x, w, [1, 1, 1, 1], "SAME")


def frozen_norm(x, w):
    return tf.nn.fused_batch_norm(x, w[0, 0, 0], *[tf.ones([1])] * 3, is_training=False)[0]


def convolution(x, w):
    return tf.nn.conv2d(x, w, 1, "SAME")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "kind"),
    [(depthwise, "DepthwiseConv2dNativeBackpropFilter"), (frozen_norm, "FusedBatchNormGradV3"), (convolution, None)],
)
def test_operations_without_a_fixed_order_are_found_in_what_a_step_needs(make, kind):
    with tf.Graph().as_default():
        w = tf.get_variable("w", [3, 3, 1, 1], initializer=tf.zeros_initializer())
        loss = tf.reduce_sum(make(tf.zeros([1, 4, 4, 1]) + tf.reduce_sum(w), w))
        found = without_fixed_order(tf.group(*tf.gradients(loss, w)))
        assert (found.type if found is not None else None) == kind
        assert without_fixed_order(loss.op) is None


def test_training_refuses_such_an_operation_in_one_line_and_sets_tf32(monkeypatch):
    monkeypatch.setattr(training, "without_fixed_order", lambda target: target)  # it is the update
    cfg = tiny_config("TRAIN.DETERMINISTIC=True", "TRAIN.TF32=False")
    plan = make_plan(cfg, 1, 10)
    trainer = make_trainer(cfg, plan, ["/cpu:0"])
    try:
        with training_graph(), pytest.raises(UserError, match=r"TRAIN.DETERMINISTIC=True: .* kernel for NoOp") as e:
            training.build_graph(cfg, plan, DataFromList([]), training_keys(cfg), ["/cpu:0"], trainer)
        assert "\n" not in str(e.value)
        assert not tensorflow.config.experimental.tensor_float_32_execution_enabled()
    finally:
        tf_v1.allow_tf32(True)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n) pretends that TensorFlow sees n GPUs."""

    def pretend(count):
        monkeypatch.setattr(tf_v1.tf.config, "list_physical_devices", lambda kind: [kind] * count)
        tf_v1.gpu_count.cache_clear()

    yield pretend
    tf_v1.gpu_count.cache_clear()


@pytest.mark.quick
def test_gpu_kernels_are_deterministic_as_set_and_cpu_kernels_always(gpus, monkeypatch):
    monkeypatch.delenv("TF_DETERMINISTIC_OPS", raising=False)
    done = []
    monkeypatch.setattr(tf_v1, "enable_op_determinism", lambda: done.append(True))
    monkeypatch.setattr(tf_v1, "disable_op_determinism", lambda: done.append(False))
    gpus(0)
    tf_v1.make_deterministic(False)
    assert not done
    gpus(1)
    tf_v1.make_deterministic(True)
    tf_v1.make_deterministic(False)
    assert done == [True, False]


@pytest.mark.quick
def test_a_rank_without_a_gpu_of_its_own_is_refused_in_one_line(gpus, monkeypatch):
    monkeypatch.setenv("HOROVOD_LOCAL_RANK", "2")
    gpus(0)
    assert ranks.own_gpu() is None
    gpus(3)
    assert ranks.own_gpu() == 2
    config = tf.ConfigProto()
    ranks.use_own_gpu(config)
    assert config.gpu_options.visible_device_list == "2"
    gpus(2)
    with pytest.raises(UserError, match=r"rank 3 of .* sees 2 GPUs") as e:
        ranks.own_gpu()
    assert "\n" not in str(e.value)
    monkeypatch.delenv("HOROVOD_LOCAL_RANK")
    assert ranks.own_gpu() is None
