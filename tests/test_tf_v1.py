"""utils/tf_v1.py: TensorFlow's own count of GPUs decides, not what the machine seems to have."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graph import tiny_config

import common
from utils import tf_v1

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import tensorflow
from utils.tf_v1 import gpu_count, gpu_problem
from tensorflow.python.framework.config import is_op_determinism_enabled
print(gpu_count(), is_op_determinism_enabled(), gpu_problem())
"""


def test_deterministic_kernels_are_on_where_cuda_visible_devices_names_a_gpu_that_tensorflow_lacks():
    """Also where TensorFlow was imported before."""
    if tf_v1.gpu_count():
        pytest.skip("TensorFlow has a GPU here")
    environment = {k: v for k, v in os.environ.items() if k != "TF_DETERMINISTIC_OPS"} | {"CUDA_VISIBLE_DEVICES": "0"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("0 True ") and result.stdout.count("\n") == 1


IMPORTS = """
import gc, sys, typing
from utils import ranks, tf_v1, tensorpack_import
import training
if HOROVOD:
    ranks.horovod()
print([m for m in ("tf_keras", "scipy", "dill") if m in sys.modules])
print(gc.isenabled(), gc.get_freeze_count() > 100_000, hasattr(typing, "compile"))
import scipy.sparse, tensorpack
if HOROVOD:
    print(ranks.horovod().SyncBatchNormalization.__mro__[1].__module__.split(".")[0])
print(tensorpack.l1_regularizer(0.5).get_config()["l1"], tf_v1.tf.keras.layers.Dense.__module__.split(".")[0])
"""


def test_what_tensorflow_does_not_need_is_imported_when_somebody_uses_it():
    """It would take a fifth of TensorFlow's import; so would the search for garbage in what it makes."""
    horovod = importlib.util.find_spec("horovod") is not None
    program = IMPORTS.replace("HOROVOD", str(horovod))
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\nTrue True False\n" + "tf_keras\n" * horovod + "0.5 tf_keras\n"


@pytest.mark.parametrize("optimised", [True, False])
def test_operations_run_only_if_the_condition_holds(optimised):
    tf = tf_v1.tf
    config = tf_v1.fast_graph_optimizer(tf.ConfigProto())
    config.graph_options.rewrite_options.disable_meta_optimizer = not optimised
    with tf.Graph().as_default():
        with tf.variable_scope("of_a_condition"):
            a, b, after = (tf.get_variable(name, [], tf.float32, tf.zeros_initializer()) for name in ("a", "b", "c"))
        condition, added = tf.placeholder(tf.bool, []), tf.placeholder(tf.float32, [])

        def make():
            first = tf.raw_ops.AssignAddVariableOp(resource=a.handle, value=added * 2)
            with tf.control_dependencies([first]):
                return [first, b.assign_add(a.read_value())]

        update = tf_v1.only_if(condition, make)
        with tf.control_dependencies([update]):  # what follows is run in both cases
            counted = after.assign_add(1.0)
        with tf.Session(config=config) as session:
            session.run(tf.global_variables_initializer())
            for holds, value, want in [
                (False, 1, (0, 0, 1)),
                (True, 1, (2, 2, 2)),
                (False, 9, (2, 2, 3)),
                (True, 2, (6, 8, 4)),
            ]:
                session.run(counted.op, {condition: holds, added: value})
                assert tuple(session.run([a, b, after])) == want


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(GPUs of the driver, GPUs of TensorFlow, CUDA_VISIBLE_DEVICES) pretends to be such a one."""

    def pretend(installed, usable, visible):
        for index in range(installed):
            (tmp_path / f"0000:0{index}:00.0").mkdir()
        monkeypatch.setattr(common, "_NVIDIA_GPUS", tmp_path)
        monkeypatch.setattr(tf_v1.tf.config, "list_physical_devices", lambda kind: [kind] * usable)
        tf_v1.gpu_count.cache_clear()
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    yield pretend
    tf_v1.gpu_count.cache_clear()


@pytest.mark.parametrize(
    ("installed", "usable", "visible", "problem"),
    [
        (2, 0, None, "cannot use the 2 NVIDIA GPUs .*requirements-gpu.txt.*CUDA_VISIBLE_DEVICES=-1"),
        (4, 0, "1", "cannot use the 1 NVIDIA GPU of"),
        (2, 0, "-1", None),
        (2, 0, "", None),
        (0, 0, "0", "CUDA_VISIBLE_DEVICES=0 names a GPU that this machine does not have"),
        (2, 0, "5", "CUDA_VISIBLE_DEVICES=5 names a GPU"),
        (0, 0, None, None),
        (2, 2, None, None),
        (0, 1, None, None),  # a driver without /proc, as under Windows' Linux
    ],
)
def test_gpus_that_tensorflow_cannot_use_are_said_in_one_line(machine, installed, usable, visible, problem):
    machine(installed, usable, visible)
    assert tf_v1.gpu_count() == usable
    said = tf_v1.gpu_problem()
    if problem is None:
        assert said is None
    else:
        assert re.search(problem, said) and "\n" not in said


def test_training_counts_the_gpus_that_tensorflow_has_and_refuses_those_it_cannot_use(machine, capsys):
    from trainers import local_devices

    cfg = tiny_config("TRAIN.CPU_REPLICAS=2")
    machine(0, 2, None)
    assert local_devices(cfg) == ["/gpu:0", "/gpu:1"]
    machine(0, 0, "0")
    assert local_devices(cfg) == ["/cpu:0", "/cpu:1"]
    assert "CUDA_VISIBLE_DEVICES=0 names a GPU" in capsys.readouterr().err
    machine(1, 0, None)
    with pytest.raises(common.UserError, match="requirements-gpu.txt"):
        local_devices(cfg)
    machine(0, 0, "-1")
    assert local_devices(cfg) == ["/cpu:0", "/cpu:1"] and not capsys.readouterr().err


def initial_values(fold):
    """({variable: its initial value}, bytes of the graph that TensorFlow made of the initialisation)."""
    tf = tf_v1.tf
    with tf.Graph().as_default(), tf.Session() as session:
        kernel = tf.get_variable("kernel", initializer=tf.random.stateless_normal([300, 300], [3, 4], stddev=0.1))
        tf.get_variable("bias", [300], initializer=tf.constant_initializer(0.5))
        tf.train.MomentumOptimizer(0.1, 0.9).minimize(tf.reduce_sum(kernel))
        variables = tf.global_variables()
        if not fold:
            tf_v1.do_not_fold_initial_values(variables)
        made = tf.RunMetadata()
        initialise = tf.variables_initializer(variables)
        session.run(initialise, options=tf.RunOptions(output_partition_graphs=True), run_metadata=made)
        values = {v.op.name: v for v in variables}
        return session.run(values), sum(g.ByteSize() for g in made.partition_graphs)


def test_initial_values_do_not_become_constants_of_the_graph():
    values, size = initial_values(fold=False)
    folded, folded_size = initial_values(fold=True)
    assert sorted(values) == ["bias", "kernel", "kernel/Momentum"]
    assert all(np.array_equal(values[name], folded[name]) for name in values)
    assert values["kernel"].std() > 0.01 and values["bias"].tolist() == [0.5] * 300
    assert folded_size > 300 * 300 * 4 > 10 * size  # else there is nothing to prevent


@pytest.mark.parametrize(("given", "after"), [(None, "0"), ("1", "1")])
def test_cudnn_does_not_time_its_algorithms_unless_asked_to(given, after, monkeypatch):
    name = "TF_CUDNN_USE_AUTOTUNE"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    tf_v1.take_over()
    assert os.environ[name] == after
