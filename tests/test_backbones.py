"""Keras networks and functions of one's own as backbones: the features, norms and variables they must have."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import model_backbones
from basemodel import normalize_image
from common import UserError
from config import default_config, finalize_config
from model_backbones import backbone_stages, check_backbone, load_backbone_weights
from model_rcnn import build_inference
from model_syncbn import batch_statistics
from tests.seeded_weights import seeded_image
from tests.tiny import COCO_MINI, TINY_TRAINING
from train import main
from utils.checkpoint import assign_weights, load_weights, match_weights
from utils.tf_v1 import tf

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("unoptimised_graphs")
SIZE = 64, 96
# The layers that must be found without being named, and the stage that each of some variables belongs to.
FEATURES = {
    "MobileNetV2": ["block_2_add", "block_5_add", "block_12_add", "block_16_project_BN"],
    "MobileNetV3Small": ["expanded_conv/project/BatchNorm", "expanded_conv_2/Add", "expanded_conv_7/Add",
                         "expanded_conv_10/Add"],
    "EfficientNetB0": ["block2b_add", "block3b_add", "block5c_add", "block7a_project_bn"],
    "RegNetX002": [f"regnetx002_Stage_{k}_XBlock_{n}_exit_relu" for k, n in enumerate((0, 0, 3, 6))],
}  # fmt: skip
NOT_OF_RESNETS = [s for s in TINY_TRAINING if not s.startswith(("BACKBONE.RESNET", "BACKBONE.STEM"))]

# Keras as its users run it, in a process of its own: this project's graphs need another mode of TensorFlow.
KERAS = """
import json, sys, zlib
import numpy as np
import tf_keras
from tests.seeded_weights import seeded_image
FEATURES, SIZE = json.loads(sys.argv[2])

def value(name, shape):
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name == "normalization/mean:0":
        return np.array([0.485, 0.456, 0.406])
    if name == "normalization/variance:0":
        return np.array([0.229, 0.224, 0.225]) ** 2
    if len(shape) == 4:
        inputs = shape[:2] if "depthwise" in name else shape[:3]
        return random.standard_normal(shape) * np.sqrt(2 / np.prod(inputs))
    if "moving_variance" in name:
        return random.uniform(0.5, 1.5, shape)
    return random.standard_normal(shape) * 0.1 + (1 if "gamma" in name else 0)

for application, ends in FEATURES.items():
    make = getattr(tf_keras.applications, application)
    model = make(weights=None, include_top=False)
    for layer in model.layers:
        layer.set_weights([value(w.name, tuple(w.shape)) for w in layer.weights])
    model.save_weights(f"{sys.argv[1]}/{application}_notop.h5")
    image = seeded_image(*SIZE)[None, :, :, ::-1].astype(np.float32)
    image = sys.modules[make.__module__].preprocess_input(image)
    model = tf_keras.Model(model.input, [model.get_layer(name).output for name in ends])
    stages = {f"c{k}": stage for k, stage in enumerate(model(image), 2)}
    if application == "MobileNetV2":
        stages |= {f"batch{k}": stage for k, stage in enumerate(model(image, training=True), 2)}
    np.savez(f"{sys.argv[1]}/{application}.npz", **stages)
"""


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keras")
    arguments = [sys.executable, "-c", KERAS, str(folder), json.dumps([FEATURES, SIZE])]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def settings(name, *more):
    base = ["MODE_FPN=True", "BACKBONE.FREEZE_AT=0", f"BACKBONE.NAME={name}"]
    return finalize_config(default_config().update_args([*base, *more]))


def keras_settings(folder, application, *more):
    return settings(f"keras:{application}", f"BACKBONE.WEIGHTS={folder / application}_notop.h5", *more)


def evaluate(make, cfg):
    """make()'s value in a graph of its own, with the weights of BACKBONE.WEIGHTS, or those of seed 0."""
    weights = load_backbone_weights(cfg) if cfg.BACKBONE.WEIGHTS else {}
    with tf.Graph().as_default(), tf.Session() as session:
        tf.set_random_seed(0)
        fetches = make()
        session.run(tf.global_variables_initializer())
        assert assign_weights(session, weights) == len(weights)
        return session.run(fetches)


def run_stages(cfg, image, image_shape=None):
    """float32 [C2..C5] of an image [H,W,3]."""
    image_shape = image_shape or image.shape[:2]

    def fetch():
        stages = backbone_stages(tf.constant(image[None]), tf.constant([image_shape], tf.int32), cfg)
        assert all(s.dtype == tf.as_dtype(cfg.TRAIN.PRECISION) for s in stages)
        of_variables = tf.float64 if cfg.TRAIN.PRECISION == "float64" else tf.float32
        assert all(v.dtype.base_dtype == of_variables for v in tf.global_variables())
        return [tf.cast(s, tf.float32) for s in stages]

    return evaluate(fetch, cfg)


def assert_close(got, want, tolerance):
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)


# --------------------------------------------------------------------------------------------------- Keras applications
@pytest.mark.parametrize("application", list(FEATURES))
def test_features_equal_those_of_keras_with_the_same_weights_and_image(keras, application):
    got = run_stages(keras_settings(keras, application), seeded_image(*SIZE))
    with np.load(keras / f"{application}.npz") as want:
        for level, stage in enumerate(got, 2):
            assert stage.shape[1:3] == (SIZE[0] >> level, SIZE[1] >> level)
            assert_close(stage, want[f"c{level}"], 1e-4)


def test_synchronised_norms_normalise_like_keras_in_training(keras):
    cfg = keras_settings(keras, "MobileNetV2", "BACKBONE.NORM=SyncBN")
    with batch_statistics(lambda x: x):
        got = run_stages(cfg, seeded_image(*SIZE))
    with np.load(keras / "MobileNetV2.npz") as want:
        for level, stage in enumerate(got, 2):
            assert_close(stage, want[f"batch{level}"], 2e-3)
        # Without a batch's statistics, as in prediction, they are the frozen ones.
        for level, stage in enumerate(run_stages(cfg, seeded_image(*SIZE)), 2):
            assert_close(stage, want[f"c{level}"], 1e-4)


@pytest.mark.parametrize("precision, unit", [("bfloat16", 2**-8), ("float16", 2**-11), ("float64", 2**-17)])
def test_other_precisions_compute_the_same_but_for_rounding_and_variables_are_no_narrower_than_float32(
    keras, precision, unit
):
    cfg = keras_settings(keras, "MobileNetV2", f"TRAIN.PRECISION={precision}")
    with np.load(keras / "MobileNetV2.npz") as want:
        for level, stage in enumerate(run_stages(cfg, seeded_image(*SIZE)), 2):
            # This network of random weights amplifies an error about twofold from one level to the next.
            assert_close(stage, want[f"c{level}"], unit * (0, 0, 4, 6, 32, 80)[level])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gradients_exist_in_half_precision(keras, precision):
    cfg = keras_settings(keras, "EfficientNetB0", f"TRAIN.PRECISION={precision}")

    def make():
        stages = backbone_stages(tf.constant(seeded_image(32, 32)[None]), tf.constant([[32, 32]]), cfg)
        loss = tf.add_n([tf.reduce_mean(tf.cast(s, tf.float32) ** 2) for s in stages])
        return tf.gradients(loss, tf.trainable_variables())

    gradients = evaluate(make, cfg)
    assert all(g.dtype == np.float32 and np.isfinite(g).all() for g in gradients)
    assert sum(g.any() for g in gradients) > 0.9 * len(gradients)


def test_padding_is_zero_behind_the_normalisation_that_keras_has_in_the_network(keras):
    """Pixels beyond the image's size change nothing, and count as the mean colour, not as black."""
    cfg = keras_settings(keras, "EfficientNetB0")
    image, shape = seeded_image(*SIZE), (40, 64)
    other = image.copy()
    other[shape[0] :], other[:, shape[1] :] = 7, 7
    first, second = (run_stages(cfg, i, shape) for i in (image, other))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    black = other.copy()
    black[shape[0] :], black[:, shape[1] :] = 0, 0
    assert np.abs(run_stages(cfg, black)[0] - first[0]).max() > 0.1


def test_stated_conventions_of_images_are_those_of_keras():
    pixels = np.random.RandomState(0).randint(0, 256, (1, 4, 4, 3)).astype(np.uint8)  # B, G, R
    for application, make in model_backbones._applications().items():
        (mean, std, order), _ = model_backbones._family(application)
        with tf.Graph().as_default(), tf.Session() as session:
            ours = session.run(normalize_image(tf.constant(pixels), tf.constant([[4, 4]]), mean, std, tf.float32))
        theirs = sys.modules[make.__module__].preprocess_input(pixels[..., ::-1].astype(np.float32))
        if np.array_equal(theirs, pixels[..., ::-1]):  # the network does it itself
            assert application.startswith(("EfficientNet", "ConvNeXt", "RegNet", "ResNetRS", "MobileNetV3"))
        else:
            np.testing.assert_allclose(ours[..., ::-1] if order == "rgb" else ours, theirs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("application", ["EfficientNetV2B0", "EfficientNetV2S", "ConvNeXtTiny", "ResNetRS50",
                                         "RegNetY002", "MobileNetV3Large"])  # fmt: skip
def test_stated_conventions_equal_the_layers_that_networks_open_with(application):
    network = model_backbones._network(application, "float32")
    pixels = np.random.RandomState(0).randint(0, 256, (1, 64, 64, 3)).astype(np.float32)  # R, G, B
    with tf.Session(graph=network.graph) as session:
        theirs = session.run(network.start, {network.model.input: pixels})
    (mean, std, order), _ = model_backbones._family(application)
    assert order == "rgb"
    np.testing.assert_allclose(theirs, (pixels - mean) / std, atol=1e-4)


@pytest.mark.parametrize("size", [(96, 160), (32, 224)])
def test_strides_hold_for_sides_that_are_odd_multiples_of_32(size):
    stages = run_stages(settings("keras:MobileNetV2"), seeded_image(*size))
    assert [s.shape for s in stages] == [
        (1, size[0] // stride, size[1] // stride, channels)
        for stride, channels in zip((4, 8, 16, 32), (24, 32, 96, 320))
    ]


@pytest.mark.parametrize("frozen", range(6))
def test_freezing_is_by_stage(frozen):
    first = {1: "Conv1/W", 2: "block_2_expand/W", 3: "block_3_expand/W", 4: "block_6_expand/W", 5: "block_13_expand/W"}
    last = {1: "block_1_expand/W", 2: "block_2_project/W", 3: "block_5_project/W", 4: "block_12_project/W",
            5: "block_16_project/W"}  # fmt: skip
    cfg = settings("keras:MobileNetV2", f"BACKBONE.FREEZE_AT={frozen}")
    with tf.Graph().as_default():
        stages = backbone_stages(tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([[64, 64]]), cfg)
        trained = {v.op.name for v in tf.trainable_variables()}
        everything = {v.op.name for v in tf.global_variables()}
        gradients = tf.gradients(tf.add_n([tf.reduce_sum(s) for s in stages]), tf.trainable_variables() or [stages[0]])
    assert all(g is not None for g in gradients)
    for stage in range(1, 6):
        for name in (first[stage], last[stage]):
            assert (f"backbone/{name}" in trained) == (stage > frozen), name
    assert not any("/EMA" in name for name in trained)
    # 17 blocks and the stem: 52 convolutions in all less the last one, which no feature needs, and their norms
    assert len([n for n in everything if n.endswith("/W")]) == 51 and len(everything) == 51 * 5


def test_affine_parameters_of_norms_can_be_frozen():
    cfg = settings("keras:MobileNetV2", "BACKBONE.FREEZE_AFFINE=True")
    with tf.Graph().as_default():
        backbone_stages(tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([[64, 64]]), cfg)
        assert {v.op.name.rpartition("/")[2] for v in tf.trainable_variables()} == {"W"}


def test_initial_values_are_those_of_keras_and_depend_on_seed_and_name_alone():
    cfg = settings("keras:MobileNetV2")

    def initial(seed, scope=""):
        with tf.Graph().as_default(), tf.Session() as session:
            tf.set_random_seed(seed)
            with tf.variable_scope(scope):
                backbone_stages(tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([[64, 64]]), cfg)
            session.run(tf.global_variables_initializer())
            return session.run({v.op.name.removeprefix(f"{scope}/"): v for v in tf.global_variables()})

    first, again, other = initial(1), initial(1, "tower1"), initial(2)
    assert set(first) == set(again)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if name.endswith("/W"):
            assert (value != other[name]).all()
            k, _, inputs, outputs = value.shape
            limit = np.sqrt(6 / (k * k * (inputs + outputs)))  # Glorot's uniform distribution
            assert np.abs(value).max() <= limit
            assert value.size < 1000 or np.abs(value).max() > 0.95 * limit
    assert (first["backbone/bn_Conv1/gamma"] == 1).all() and (first["backbone/bn_Conv1/variance/EMA"] == 1).all()


def test_variables_are_shared_between_replicas_of_prediction(keras):
    cfg = keras_settings(keras, "MobileNetV2", "DATA.NUM_CATEGORY=2")
    image = seeded_image(*SIZE)[None]

    def both():
        first = build_inference(tf.constant(image), tf.constant([SIZE]), cfg)
        names = [v.op.name for v in tf.global_variables()]
        with tf.name_scope("again"), tf.variable_scope("", reuse=True):
            second = build_inference(tf.constant(image), tf.constant([SIZE]), cfg)
        assert [v.op.name for v in tf.global_variables()] == names
        return first["scores"], second["scores"]

    first, second = evaluate(both, cfg)
    np.testing.assert_array_equal(first, second)


def test_given_layers_are_used():
    layers = ["block_1_expand_relu", "block_3_expand_relu", "block_6_expand_relu", "out_relu"]
    with pytest.raises(UserError, match=r"block_1_expand_relu gives 512x512 .* C2 must be 256x256 \(stride 4\)"):
        check_backbone(settings("keras:MobileNetV2", f"BACKBONE.FEATURE_LAYERS={layers}"))
    layers[0] = "block_3_expand_relu"
    layers[1:3] = "block_6_expand_relu", "block_13_expand_relu"
    stages = run_stages(settings("keras:MobileNetV2", f"BACKBONE.FEATURE_LAYERS={layers}"), seeded_image(*SIZE))
    assert [s.shape[3] for s in stages] == [144, 192, 576, 1280]


@pytest.mark.parametrize(
    "given, message",
    [
        (["BACKBONE.NAME=keras:MobilNetV2"], r"keras:MobilNetV2: .* did you mean MobileNetV2"),
        (["BACKBONE.NAME=keras:mobilenetv2"], r"keras:mobilenetv2: .* did you mean MobileNetV2"),
        (["BACKBONE.NAME=keras:InceptionV3"], r"keras:InceptionV3: no layer is exactly 4 times smaller"),
        (["BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.FEATURE_LAYERS=['block_2_ad','a','b','c']"], "mean block_2_add"),
        (["BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.FEATURE_LAYERS=['block_2_add']"], "four layers"),
        (["BACKBONE.NAME=keras:MobileNetV2", "MODE_FPN=False"], "BACKBONE.NAME=.*needs MODE_FPN=True"),
        (["BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.NORM=GN"], "BACKBONE.NORM='GN'.*FreezeBN .* or SyncBN"),
        (["BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.NORM=SyncBN", "TRAIN.PRECISION=float64"], "float32 or less"),
        (["BACKBONE.NAME=keras:MobileNetV2", "BACKBONE.BLOCK=basic"], "BACKBONE.BLOCK='basic' applies to ResNets"),
        (["BACKBONE.NAME=keras:MobileNetV2", "PREPROC.PIXEL_MEAN=[1,2,3]"], "PIXEL_MEAN=.*applies to ResNets only"),
        (["BACKBONE.NAME=resnet50"], "must be resnet, efficientnet_lite0 to 4, keras:NETWORK or module:function"),
        (["BACKBONE.NAME=demo.own_backbone:stages", "BACKBONE.FREEZE_AT=2"], "BACKBONE.FREEZE_AT=2 must be 0"),
        (["BACKBONE.NAME=demo.own_backbone:nothing"], "own_backbone:nothing: .*no attribute 'nothing'"),
        (["BACKBONE.NAME=demo.absent:stages"], "demo.absent:stages: No module named"),
        (["BACKBONE.NAME=tests.test_backbones:wrong_strides"], r"must return .*\[\[1, 128, 128, 3\]"),
        (["BACKBONE.NAME=tests.test_backbones:one_map"], r"must return .*it returned \[\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_backbone_is_named_in_one_line(given, message):
    with pytest.raises(UserError, match=message) as error:
        check_backbone(finalize_config(default_config().update_args(
            ["MODE_FPN=True", "BACKBONE.FREEZE_AT=0", *given])))  # fmt: skip
    assert "\n" not in str(error.value)


def wrong_strides(image, cfg):
    return [image[:, ::stride, ::stride] for stride in (2, 4, 8, 16)]


def one_map(image, cfg):
    return image


def test_weights_that_do_not_fit_are_named_in_one_line(keras, tmp_path):
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
    for path, message in (
        (keras / "EfficientNetB0_notop.h5", "EfficientNetB0_notop.h5 does not fit keras:MobileNetV2"),
        (tmp_path / "broken.h5", "broken.h5"),
        (tmp_path / "absent.h5", "absent.h5 does not exist"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_backbone_weights(settings("keras:MobileNetV2", f"BACKBONE.WEIGHTS={path}"))
        assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- whole runs
def detect(run, output, *options):
    images = sorted((COCO_MINI / "val2017").glob("*.jpg"))[:1]
    return main(["--predict", *map(str, images), "--load", str(run), "--output", str(output), "--no-window", *options])


@pytest.mark.slow
def test_training_changes_what_is_not_frozen_and_its_checkpoint_predicts(keras, tmp_path):
    weights = keras / "MobileNetV2_notop.h5"
    run = tmp_path / "run"
    config = [*NOT_OF_RESNETS, "BACKBONE.NAME=keras:MobileNetV2", f"BACKBONE.WEIGHTS={weights}", "BACKBONE.FREEZE_AT=3",
              "TRAIN.MAX_STEPS=2", "BACKBONE.NORM=SyncBN"]  # fmt: skip
    assert main(["--logdir", str(run), "--config", *config]) == 0
    trained, meta = load_weights(run)
    assert meta["settings"]["BACKBONE.NAME"] == "keras:MobileNetV2"
    start = load_backbone_weights(keras_settings(keras, "MobileNetV2"))
    assert set(start) == {n for n in trained if n.startswith("backbone/") and not n.endswith("/Momentum")}
    stages = model_backbones._variable_stages("MobileNetV2", ())
    for keras_name, stage in stages.items():
        name = f"backbone/{model_backbones._own_name(keras_name)}"
        # Affine parameters may stay where no gradient reached them; kernels decay at least.
        if stage <= 3:
            np.testing.assert_array_equal(trained[name], start[name], err_msg=name)
        elif name.endswith(("/W", "/EMA")):
            assert (trained[name] != start[name]).any(), name
    assert detect(run, tmp_path / "pictures") == 0
    assert (tmp_path / "pictures" / "predictions.json").exists()


def test_your_own_backbone_and_heads_train_and_predict(tmp_path):
    run = tmp_path / "run"
    config = [*NOT_OF_RESNETS, "BACKBONE.NAME=demo.own_backbone:stages", "BACKBONE.NORM=GN", "TRAIN.MAX_STEPS=2",
              "FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head", "FPN.MRCNN_HEAD_FUNC=demo.own_head:mask_head",
              "FPN.FRCNN_CONV_HEAD_DIM=24"]  # fmt: skip
    assert main(["--logdir", str(run), "--config", *config]) == 0
    trained, _ = load_weights(run)
    assert trained["fastrcnn/conv/W"].shape == (3, 3, 16, 24) and trained["fastrcnn/fc/W"].shape == (24, 32)
    assert trained["maskrcnn/logits/W"].shape == (1, 1, 16, trained["fastrcnn/outputs/class/b"].size - 1)
    assert not {"fastrcnn/fc6/W", "maskrcnn/fcn0/W"} & set(trained)
    assert trained["fastrcnn/conv/b"].any() and trained["maskrcnn/logits/b"].any()  # from zeros, by a gradient
    assert trained["backbone/down5/W"].shape == (3, 3, 256, 512) and "backbone/residual2/gn/gamma" in trained
    assert trained["fpn/lateral_1x1_c2/W"].shape[2] == 64
    # The run's settings name code, which they do not get by themselves.
    assert detect(run, tmp_path / "pictures") == 2
    trust = ["--trust-code", "demo.own_backbone", "--trust-code", "demo.own_head"]
    assert detect(run, tmp_path / "pictures", *trust) == 0


@pytest.mark.quick
def test_pretrained_variables_of_other_backbones_are_looked_for():
    graph = {"backbone/stem/W": (3, 3), "backbone/stem/gn/gamma": (3,), "fpn/lateral_1x1_c2/W": (3, 3)}
    pretrained = {name: shape for name, shape in graph.items() if name.startswith("backbone")}
    assert match_weights(graph, pretrained, expect="backbone").check().loaded == list(pretrained)
    with pytest.raises(UserError, match="does not contain .*backbone/stem/gn/gamma"):
        match_weights(graph, {"backbone/stem/W": (3, 3)}, expect="backbone").check()
