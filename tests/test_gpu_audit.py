"""Every operation of every recipe's graphs has a kernel for GPUs, and host and GPU seldom wait for each other."""

import json

import pytest

from common import UserError
from config import Config, default_config, finalize_config
from config_recipes import RECIPES, read_recipes
from tools import gpu_audit
from tools.gpu_audit import audit, inference_graph, training_graph
from utils.tf_v1 import tf

# Sizes that have no influence on the kinds of operations.
SMALL = [
    "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]",
    "DATA.NUM_CATEGORY=3",
    "TRAIN.BATCH_SIZE_PER_GPU=1",
    "TRAIN.LR_SCHEDULE=2x",
    "TRAIN.LR_SCALING=none",
]
NOT_IN_THE_GRAPH = ("DATA.", "PREPROC.", "TRAIN.LR_SCHEDULE", "TEST.RESULT", "BACKBONE.RESNET_NUM_BLOCK")
WITHOUT_KERNEL = {"VarHandleOp"}  # the int32 variable of the loss scale, which TensorFlow keeps in host memory
# Tensors that go to the host in a training step and in a prediction, at most.
TO_HOST = 14, 11
TO_HOST_WITH = {"FRCNN.ROI_OP=pool": (21, 22), "BACKBONE.NORM=SyncBN": (40, 11)}  # statistics of norms


OF_BACKBONES = ("BACKBONE.NAME", "BACKBONE.WEIGHTS")
RECIPE_SETTINGS = {r.name: r.settings for section in read_recipes(RECIPES.read_text()) for r in section.recipes}


def kinds(settings: list[str]) -> set[tuple[str, str]]:
    """What settings choose in a graph: numbers count as zero or not."""
    found = set()
    for setting in settings:
        key, value = setting.split("=", 1)
        if not key.startswith(NOT_IN_THE_GRAPH):
            try:
                number = json.loads(value.lower())
                value = str(bool(number))
            except ValueError:
                pass
            found.add((key, value))
    return found


def small(settings: list[str]) -> Config:
    settings = [s for s in settings if not s.startswith("BACKBONE.RESNET_NUM_BLOCK")]
    fixed = any(s.startswith("BACKBONE.NAME=") for s in settings)
    sizes = [s for s in SMALL if not (fixed and s.startswith("BACKBONE."))]
    return finalize_config(default_config().update_args([*settings, *sizes]))


def mixes() -> list[list[str]]:
    """Settings of a few mixtures of recipes that together choose what all recipes choose, on ResNets. Recipes that
    contradict each other are not mixed, nor those that leave out parts of the model."""
    left = {name: [s for s in settings if not s.startswith(OF_BACKBONES)] for name, settings in RECIPE_SETTINGS.items()}
    left["deterministic"] = ["MODE_FPN=True", "TRAIN.DETERMINISTIC=True"]
    mixed: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while True:
        new = max(left, key=lambda name: len(kinds(left[name]) - seen))
        if not kinds(left[new]) - seen:
            return [[f"{key}={value}" for key, value in values.items()] for values in mixed]
        seen |= kinds(left[new])
        values = dict(s.split("=", 1) for s in left.pop(new))
        for others in mixed:
            if agree(values, others):
                others |= values
                break
        else:
            mixed.append(values)


def agree(some: dict[str, str], others: dict[str, str]) -> bool:
    both = {**some, **others}
    if {"MODE_MASK", "MODE_RPN_ONLY"} & set(both) or both != {**others, **some}:
        return False
    try:
        small([f"{key}={value}" for key, value in both.items()])
    except UserError:
        return False
    return True


@pytest.mark.parametrize("settings", mixes())
def test_what_recipes_choose_has_kernels_for_gpus_and_few_crossings(settings):
    check(small(settings), settings)


@pytest.mark.slow
def test_depthwise_backbones_have_kernels_for_gpus_and_few_crossings():
    check(small(RECIPE_SETTINGS["laptop-mask"]), RECIPE_SETTINGS["laptop-mask"])


def check(cfg, settings):
    most = next((TO_HOST_WITH[s] for s in settings if s in TO_HOST_WITH), TO_HOST)
    for graph, limit in zip((training_graph(cfg), inference_graph(cfg)), most):
        found = audit(graph)
        assert not set(found.without_kernel) - WITHOUT_KERNEL
        assert len(found.to_host) <= limit, found.to_host


def ends(crossings):
    return {(c.made_by, c.used_by) for c in crossings}


def test_the_audit_sees_arithmetic_that_the_host_does_and_waits_for_sizes():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [None, 8])
        best, index = tf.nn.top_k(x, 3)
        tf.gather(x, index + 1, batch_dims=1)
        tf.where(best > 0)
        tf.reshape(best, [tf.shape(x)[0] * 3])  # shapes are known to the host
        with tf.device("/cpu:0"):
            tf.exp(best)
    found = audit(graph)
    assert ends(found.to_host) == {("TopKV2", "AddV2"), ("Where", "its result's size"), ("TopKV2", "Exp")}
    assert ends(found.from_host) == {("AddV2", "GatherV2")}
    assert not found.without_kernel and found.operations == len(graph.get_operations())
    text = gpu_audit.summary("a graph", found, places=True)
    assert "crossings: 3 to the host, 1 from it" in text and "without a GPU kernel: none" in text


def test_the_audit_sees_operations_without_a_kernel_for_their_types():
    with tf.Graph().as_default() as graph:
        x = tf.placeholder(tf.float32, [1, 5, 1, 4])
        tf.image.combined_non_max_suppression(x, x[..., 0], 3, 3)
    assert audit(graph).without_kernel == {"CombinedNonMaxSuppression": 1}
    with tf.Graph().as_default() as graph:
        tf.linalg.inv(tf.placeholder(tf.float32, [3, 3]))
        tf.cumsum(tf.placeholder(tf.float32, [3]))
    assert not audit(graph).without_kernel
    with tf.Graph().as_default() as graph:
        tf.cumsum(tf.placeholder(tf.int8, [3]))
    assert audit(graph).without_kernel == {"Cumsum": 1}


def test_an_unknown_recipe_is_refused(capsys):
    assert gpu_audit.main(["--recipe", "r50fpn"]) == 2
    assert "--recipe r50fpn: there is no such recipe" in capsys.readouterr().err
