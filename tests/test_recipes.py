"""Every recipe of docs/RECIPES.md: its graph is built at small size from its settings alone, trained for two steps
on a repeated batch of two images and asked for a prediction. Recipes that are the same model at that size are trained
once."""

import math
from pathlib import Path

import numpy as np
import pytest

from config import Config, default_config, finalize_config
from config_recipes import read_recipes
from data import training_keys
from data_workers import training_dataflow
from dataset import load_training_split
from model_flops import count
from model_rcnn import build_inference
from tests.graph import make_batch
from tests.tiny import COCO_MINI
from trainers import DetectionModel
from training_plan import make_plan
from utils.tf_v1 import tf

# isort: split
from tensorpack.tfutils.tower import TowerContext

ROOT = Path(__file__).resolve().parent.parent

# What makes a recipe small: depth, widths, pictures, counts; and one schedule, of which two steps see nothing.
# Kinds of blocks, norms, heads, losses and samplers stay the recipe's.
SMALL = [
    f"DATA.BASEDIR={COCO_MINI}",
    "DATA.NUM_WORKERS=0",
    "BACKBONE.STEM_CHANNELS=32",
    "BACKBONE.RESNET_NUM_BLOCK=[1,1,1,1]",
    "FPN.NUM_CHANNEL=32",
    "FPN.FRCNN_CONV_HEAD_DIM=32",
    "FPN.FRCNN_FC_HEAD_DIM=32",
    "MRCNN.HEAD_DIM=32",
    "KRCNN.HEAD_DIM=32",
    "RPN.HEAD_DIM=32",
    "PREPROC.SHORT_EDGE_SIZE=[64,64]",
    "PREPROC.MAX_SIZE=96",
    "PREPROC.CROP_SIZE=[64,64]",
    "PREPROC.TEST_SHORT_EDGE_SIZE=64",
    "FRCNN.BATCH_PER_IM=32",
    "TRAIN.BATCH_SIZE_PER_GPU=2",
    "TRAIN.LR_SCALING=none",
    "TRAIN.LR_SCHEDULE=2x",
    "TRAIN.WARMUP=0",
    "TRAIN.BASE_LR=0.1",
    "TRAIN.GRADIENT_CLIP=1.0",
    "TEST.RESULT_SCORE_THRESH=0.0",
]


RECIPES = {
    recipe.name: recipe
    for section in read_recipes((ROOT / "scripts" / "recipes.txt").read_text())
    for recipe in section.recipes
}


def recipes() -> dict[str, list[str]]:
    """The names and settings of scripts/recipes.txt."""
    return {recipe.name: recipe.settings for recipe in RECIPES.values()}


@pytest.mark.parametrize("name", ["r18-fpn", "r50-fpn", "rpn-r50-c4"])
def test_the_table_has_the_parameters_and_flops_that_the_tool_counts(name):
    counted = count(finalize_config(default_config().update_args(recipes()[name])), 800, 1333)
    assert float(RECIPES[name].parameters) == round(counted["parameters"] / 1e6, 1)
    assert float(RECIPES[name].gflops) == round(counted["macs"] / 1e9)


@pytest.mark.quick
@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_nothing_that_is_the_default(name):
    for setting in recipes()[name]:
        key, value = setting.split("=", 1)
        if key != "MODE_FPN":  # said in every recipe: it decides what the others mean
            changed = default_config().update_args([setting])
            assert changed.get(key) != default_config().get(key), setting


def small(settings: list[str]) -> Config:
    fixed = any(s.startswith("BACKBONE.NAME=") for s in settings)  # other backbones have one width
    widths = [s for s in SMALL if not (fixed and s.startswith("BACKBONE."))]
    return finalize_config(default_config().update_args([*settings, *widths]))


def first_batch(cfg: Config) -> dict[str, np.ndarray]:
    """Two images as the recipe's dataflow makes them; random ones where the photographs lack annotations."""
    if cfg.MODE_KEYPOINT or cfg.FRCNN.FEDERATED_LOSS:
        objects = [(4, 6, 50, 60, 1), (20, 10, 62, 40, 1)]
        return make_batch([(64, 64), (60, 64)], [objects, objects[:1]], cfg)
    dataflow = training_dataflow(load_training_split(cfg), cfg)
    dataflow.reset_state()
    return dict(zip(training_keys(cfg), next(iter(dataflow))))


IN_HALF = [
    *[(name, "bfloat16") for name in ("r50-c4", "r50-fpn-gn-cascade", "mobilenetv2-fpn", "x50-32x4d-fpn")],
    *[("keypoint-r50-fpn", "bfloat16"), ("keypoint-r50-fpn", "float16"), ("rpn-r50-fpn", "float16")],
]


def same_when_small() -> dict[str, list[str]]:
    """The names of recipes, by the first one of those that are the same model at small size."""
    names: dict[str, list[str]] = {}
    for name, settings in recipes().items():
        names.setdefault(repr(small(settings).to_dict()), []).append(name)
    return {first: [first, *others] for first, *others in names.values()}


def test_recipes_that_differ_in_their_model_are_trained_each():
    same = same_when_small()
    assert same["r50-fpn"] == ["r50-fpn", "r101-fpn", "r152-fpn"]
    assert sorted(sum(same.values(), [])) == sorted(recipes())


@pytest.mark.parametrize("name", same_when_small())
def test_a_recipe_trains_and_predicts_at_small_size(name):
    check_recipe(recipes()[name])


@pytest.mark.parametrize(("name", "precision"), IN_HALF)
def test_every_kind_of_model_trains_and_predicts_in_half_precision(name, precision):
    check_recipe([*recipes()[name], f"TRAIN.PRECISION={precision}"])


def check_recipe(settings):
    cfg = small(settings)
    cfg.freeze(False).DATA.NUM_CATEGORY = 1 if cfg.MODE_KEYPOINT else 80
    cfg.freeze()
    batch = first_batch(cfg)
    with tf.Graph().as_default():
        tf.set_random_seed(1)
        keys = training_keys(cfg)
        model = DetectionModel(cfg, make_plan(cfg, 1, 2), keys)
        inputs = [tf.placeholder(spec.dtype, spec.shape, spec.name) for spec in model.inputs()]
        with TowerContext("", is_training=True):
            cost = model.build_graph(*inputs)
            optimizer = model.optimizer()
            gradients = [(g, v) for g, v in optimizer.compute_gradients(cost) if g is not None]
            update = optimizer.apply_gradients(gradients)
        with TowerContext("", is_training=False), tf.variable_scope(tf.get_variable_scope(), reuse=True):
            outputs = build_inference(inputs[keys.index("image")], inputs[keys.index("image_shape")], cfg)
        config = tf.ConfigProto()
        config.graph_options.rewrite_options.disable_meta_optimizer = True  # two steps do not repay it
        with tf.Session(config=config) as session:
            session.run(tf.global_variables_initializer())
            for variable in tf.global_variables():
                # Frozen norms with random weights double the variance at every block; a trained net's do not.
                if variable.op.name.endswith(("conv3/bn/gamma", "conv2/bn/gamma")):
                    variable.load(np.full(variable.shape, 0.5, np.float32), session)
            feed = dict(zip(inputs, (batch[k] for k in keys)))
            totals = []
            for _ in range(2):
                losses, _ = session.run([model.losses, update], feed)
                totals.append(losses["total_loss"])
                assert all(math.isfinite(v) for v in losses.values()), losses
            totals.append(session.run(cost, feed))
            found = session.run(outputs, feed)
    assert min(totals[1:]) < totals[0], totals  # each step samples other RoIs, as proposals have moved
    assert found["count"].shape == (2,) and (found["count"] > 0).any()
    for image, number in enumerate(found["count"]):
        boxes, (height, width) = found["boxes"][image, :number], batch["image_shape"][image]
        assert (boxes >= 0).all() and (boxes <= [width, height, width, height]).all()
        assert (np.diff(found["scores"][image, :number]) <= 0).all()
    assert ("masks" in found) == (cfg.MODE_MASK)
    assert ("keypoints" in found) == cfg.MODE_KEYPOINT
