"""Converted weights compute in this project's graph what the system they come from computes.

The expectations in tests/data/golden_converted_*.npz were recorded from those systems (tests/data/README.md);
the weights behind them are drawn again here, from each tensor's name and shape alone (`seeded_tensor`).
"""

import numpy as np

from basemodel import GN_EPSILON, GN_GROUPS
from model_fpn import fpn
from model_frcnn import fastrcnn_head
from model_mrcnn import mask_head
from tests.graph import tiny_config
from utils.tf_v1 import tf


# -------------------------------------------------------------------------------------------- tensorpack's group norms
def conv(x, w, b):
    """Stride-1 convolution with zero padding, float64: x [N,H,W,Ci], w [k,k,Ci,Co]."""
    k = w.shape[0]
    padded = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    rows = [padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ w[i, j] for i in range(k) for j in range(k)]
    return sum(rows) + b


def group_norm(x, gamma, beta):
    n, h, w, c = x.shape
    parts = x.reshape(n, h, w, GN_GROUPS, c // GN_GROUPS)
    mean = parts.mean((1, 2, 4), keepdims=True)
    variance = ((parts - mean) ** 2).mean((1, 2, 4), keepdims=True)
    return ((parts - mean) / np.sqrt(variance + GN_EPSILON)).reshape(x.shape) * gamma + beta


def gn_after_relu(x, v, scope, relu):
    y = conv(x, v[f"{scope}/W"], v[f"{scope}/b"])
    return group_norm(np.maximum(y, 0) if relu else y, v[f"{scope}/gn/gamma"], v[f"{scope}/gn/beta"])


def run_with_random_variables(make):
    """make() in a graph whose variables are random -> (its value, {name: float64 array})."""
    with tf.Graph().as_default(), tf.Session() as session:
        fetch = make()
        random = np.random.RandomState(1)
        variables = {}
        for variable in tf.global_variables():
            shape = variable.shape.as_list()
            value = random.standard_normal(shape) * (1 / np.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 0.5)
            variable.load(value.astype(np.float32), session)
            variables[variable.op.name] = value.astype(np.float32).astype(np.float64)
        return session.run(fetch), variables


TENSORPACK_GN = [
    "FPN.GN_AFTER_RELU=True", "FPN.NORM=GN", "FPN.NUM_CHANNEL=64", "FPN.FRCNN_CONV_HEAD_DIM=32", "MRCNN.HEAD_DIM=32",
    "FPN.FRCNN_HEAD_FUNC=fastrcnn_4conv1fc_gn_head", "FPN.MRCNN_HEAD_FUNC=maskrcnn_up4conv_gn_head",
]  # fmt: skip


def test_group_norm_heads_of_tensorpack_are_bias_relu_norm():
    cfg = tiny_config(*TENSORPACK_GN)
    x = np.random.RandomState(0).standard_normal([3, 7, 7, 32])
    got, v = run_with_random_variables(lambda: fastrcnn_head(tf.constant(x, tf.float32), cfg))
    y = x
    for k in range(4):
        y = gn_after_relu(y, v, f"conv{k}", relu=True)
    want = np.maximum(y.transpose(0, 3, 1, 2).reshape(3, -1) @ v["fc/W"] + v["fc/b"], 0)
    np.testing.assert_allclose(got, want, atol=1e-4)

    got, v = run_with_random_variables(lambda: mask_head(tf.constant(x, tf.float32), 5, cfg))
    y = x
    for k in range(4):
        y = gn_after_relu(y, v, f"fcn{k}", relu=True)
    up = np.einsum("nhwi,abci->nhawbc", y, v["deconv/W"]).reshape(3, 14, 14, 32) + v["deconv/b"]
    np.testing.assert_allclose(got, conv(np.maximum(up, 0), v["conv/W"], v["conv/b"]), atol=1e-4)


def test_group_norm_pyramid_of_tensorpack_has_biases():
    cfg = tiny_config(*TENSORPACK_GN)
    random = np.random.RandomState(0)
    stages = [random.standard_normal([2, 32 >> k, 32 >> k, 4 << k]) for k in range(4)]
    got, v = run_with_random_variables(lambda: fpn([tf.constant(s, tf.float32) for s in stages], cfg))
    merged = None
    for k in (3, 2, 1, 0):
        lateral = gn_after_relu(stages[k], v, f"fpn/lateral_1x1_c{k + 2}", relu=False)
        merged = lateral if merged is None else lateral + merged.repeat(2, 1).repeat(2, 2)
        want = gn_after_relu(merged, v, f"fpn/posthoc_3x3_p{k + 2}", relu=False)
        np.testing.assert_allclose(got[k], want, atol=1e-4)
