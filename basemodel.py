"""Layers and the ResNet family (He et al. 2015; ResNeXt, Xie et al. 2016), NHWC, with the variable names of
tensorpack's public checkpoints.

A layer computes in the dtype of its input. Variables are float32, or float64 for float64 inputs. For mixed precision it
is therefore enough to cast the image and the RoI features.
"""

import re
import zlib

import numpy as np

from config import Config
from model_syncbn import batch_norm, wide_type
from utils.tf_v1 import for_gpu, onednn_enabled, tf

__all__ = [
    "DEPTHWISE_GRADIENT",
    "batch_norm_frozen",
    "c4_backbone",
    "c5_on_rois",
    "conv2d",
    "deconv2d",
    "detector_group_norm",
    "fully_connected",
    "group_norm",
    "grouped_conv",
    "he_fan_out",
    "name_seed",
    "normal_init",
    "normalize_image",
    "preprocess_image",
    "resnet_stages",
    "xavier_uniform_fan_in",
]

GN_GROUPS = 32
GN_EPSILON = 1e-5
DEPTHWISE_GRADIENT = "PackRCNNDepthwiseConv"  # the name under which TensorFlow knows `_depthwise_gradient`
_NARROW = 3  # widest filter of a depthwise convolution for which oneDNN's gradient is fast


# ---------------------------------------------------------------------------------------------------- initialisation
def normal_init(stddev):
    """N(0, stddev^2)."""
    return lambda shape, fan_in, fan_out: ("normal", stddev)


def he_fan_out(shape, fan_in, fan_out):
    """N(0, 2 / fan_out) (He et al. 2015), for ResNets and mask heads."""
    return ("normal", np.sqrt(2.0 / fan_out))


def xavier_uniform_fan_in(shape, fan_in, fan_out):
    """U(-sqrt(3 / fan_in), sqrt(3 / fan_in)) (Caffe2's XavierFill), for the FPN and the box head."""
    return ("uniform", np.sqrt(3.0 / fan_in))


def name_seed(name):
    """Two seeds from the graph's seed and the variable's full name, without the scope of its replica."""
    graph_seed = tf.get_default_graph().seed or 0
    full_name = re.sub(r"^tower\d+/", "", f"{tf.get_variable_scope().name}/{name}")
    return [graph_seed & 0x7FFFFFFF, zlib.crc32(full_name.encode()) & 0x7FFFFFFF]


def _weight(name, shape, rule, fan_in, fan_out, trainable, dtype):
    """A variable whose initial value depends on the graph's seed and the variable's name alone, so that neither the
    order of construction nor the number of replicas changes it; float64 starts from float32's values."""
    kind, scale = rule(shape, fan_in, fan_out)
    seed = name_seed(name)

    def initial(shape, dtype=tf.float32, partition_info=None):
        if kind == "normal":
            return tf.cast(tf.random.stateless_normal(shape, seed, stddev=scale), dtype)
        return tf.cast(tf.random.stateless_uniform(shape, seed, -scale, scale), dtype)

    return tf.get_variable(name, shape, dtype, initial, trainable=trainable)


# ------------------------------------------------------------------------------------------------------------- norms
def _affine(channels, trainable, dtype):
    gamma = tf.get_variable("gamma", [channels], dtype, tf.ones_initializer(), trainable=trainable)
    beta = tf.get_variable("beta", [channels], dtype, tf.zeros_initializer(), trainable=trainable)
    return gamma, beta


def batch_norm_frozen(channels, epsilon, trainable, dtype):
    """Scale and shift [channels] that a frozen batch norm with variables of dtype applies: γ/√(σ²+ε) and
    β − μγ/√(σ²+ε)."""
    with tf.variable_scope("bn"):
        gamma, beta = _affine(channels, trainable, dtype)
        mean = tf.get_variable("mean/EMA", [channels], dtype, tf.zeros_initializer(), trainable=False)
        variance = tf.get_variable("variance/EMA", [channels], dtype, tf.ones_initializer(), trainable=False)
    scale = gamma * tf.rsqrt(variance + epsilon)
    return scale, beta - mean * scale


def group_norm(x, trainable=True):
    """Group normalisation (Wu & He 2018, eq. 1-3) of x [N,H,W,C] over 32 groups of channels; statistics in float32."""
    channels = int(x.shape[-1])
    groups = GN_GROUPS
    if channels % groups:
        raise ValueError(f"group norm needs a multiple of {groups} channels, got {channels} in {x.name}")
    shape = tf.shape(x)
    # Per-channel moments first (a reduction over contiguous rows), then over the channels of a group: both reductions
    # stay cheap on CPUs, and x is read twice only.
    wide = tf.cast(x, wide_type(x))
    with tf.variable_scope("gn"):
        gamma, beta = _affine(channels, trainable, wide.dtype)
    mean_c = tf.reduce_mean(wide, [1, 2])  # [N, C]
    square_c = tf.reduce_mean(tf.square(wide), [1, 2])
    mean = tf.reduce_mean(tf.reshape(mean_c, [-1, groups, channels // groups]), 2, keepdims=True)
    square = tf.reduce_mean(tf.reshape(square_c, [-1, groups, channels // groups]), 2, keepdims=True)
    inverse = tf.rsqrt(tf.maximum(square - tf.square(mean), 0.0) + GN_EPSILON)  # [N, groups, 1]
    scale = tf.reshape(inverse * tf.reshape(gamma, [groups, -1]), [shape[0], 1, 1, channels])
    shift = tf.reshape(beta, [1, 1, 1, channels]) - scale * tf.reshape(
        tf.tile(mean, [1, 1, channels // groups]), [shape[0], 1, 1, channels]
    )
    return x * tf.cast(scale, x.dtype) + tf.cast(shift, x.dtype)


def detector_group_norm(cfg: Config):
    """The `norm` argument of `conv2d` for group norms outside the backbone."""
    return "GNLast" if cfg.FPN.GN_AFTER_RELU else "GN"


# ------------------------------------------------------------------------------------------------------------ layers
def conv2d(
    name, x, channels, kernel, stride=1, *, groups=1, norm=None, bias=True, relu=False, init=he_fan_out,
    tf_padding=True, epsilon=1e-5, trainable=True, affine_trainable=True,
):  # fmt: skip
    """Convolution [+ norm] [+ ReLU] of x [N,H,W,Ci] -> [N,H',W',channels], in x's dtype.

    norm: None, "FreezeBN" (folded into kernel and bias, so that TensorFlow fuses conv + bias + ReLU), "SyncBN" or "GN",
    all without a bias variable; or "GNLast": bias, ReLU, then group norm. tf_padding=False pads k//2 on every side
    (Caffe, PyTorch) where TensorFlow's SAME would pad stride-2 convolutions at the bottom and right only.
    """
    in_channels = int(x.shape[-1])
    with tf.variable_scope(name):
        shape = [kernel, kernel, in_channels // groups, channels]
        fans = kernel * kernel * in_channels // groups, kernel * kernel * channels // groups
        weight = _weight("W", shape, init, *fans, trainable, wide_type(x))
        shift = None
        if norm == "FreezeBN":
            scale, shift = batch_norm_frozen(channels, epsilon, trainable and affine_trainable, wide_type(x))
            weight = weight * scale
        elif norm in (None, "GNLast") and bias:
            shift = tf.get_variable("b", [channels], wide_type(x), tf.zeros_initializer(), trainable=trainable)
        if stride == 1 or tf_padding or kernel == 1:
            padding = "SAME"
        else:
            padding = "VALID"
            x = tf.pad(x, [[0, 0], [kernel // 2] * 2, [kernel // 2] * 2, [0, 0]])
        y = grouped_conv(x, tf.cast(weight, x.dtype), stride, padding, groups)
        if shift is not None:
            y = tf.nn.bias_add(y, tf.cast(shift, y.dtype))
        if norm == "GN":
            y = group_norm(y, trainable)
        elif norm == "SyncBN":
            y = batch_norm(y, epsilon, trainable)
        y = tf.nn.relu(y) if relu else y
        return group_norm(y, trainable) if norm == "GNLast" else y


def grouped_conv(x, weight, stride, padding, groups):
    """Convolution of x [N,H,W,Ci] with a kernel [k,k,Ci/groups,Co], with a gradient on every device."""
    if groups > 1 and weight.shape.as_list()[2:] == [1, groups]:
        kernel = tf.transpose(weight, [0, 1, 3, 2])  # [k, k, C, 1]
        with tf.get_default_graph().gradient_override_map({"DepthwiseConv2dNative": DEPTHWISE_GRADIENT}):
            return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], padding)
    if groups == 1 or for_gpu() or (onednn_enabled() and x.dtype in (tf.float32, tf.bfloat16)):
        return tf.nn.conv2d(x, weight, strides=stride, padding=padding)  # the group count follows from the shapes
    # TensorFlow's CPU kernels have no gradient for grouped convolutions, so groups are computed one by one. Narrow
    # groups are first joined into parts of 32 channels with block-diagonal kernels: fewer, larger convolutions.
    k, _, width, channels = weight.shape.as_list()
    joined = max(1, min(groups, 32 // width))
    while groups % joined:
        joined -= 1
    parts = groups // joined
    blocks = tf.reshape(weight, [k, k, width, parts, joined, channels // groups])
    blocks = tf.einsum("hwipjo,jg->hwpgijo", blocks, tf.eye(joined, dtype=x.dtype))
    kernels = tf.unstack(tf.reshape(blocks, [k, k, parts, joined * width, channels // parts]), axis=2)
    return tf.concat(
        [tf.nn.conv2d(a, w, strides=stride, padding=padding) for a, w in zip(tf.split(x, parts, -1), kernels)], -1
    )


@tf.RegisterGradient(DEPTHWISE_GRADIENT)
def _depthwise_gradient(op, dy):
    """The gradient of a depthwise convolution. It goes around what is slow in oneDNN: gradients of filters wider than
    3, and in bfloat16 those of the input at stride 2 (benchmarks/depthwise.py)."""
    x, kernel = op.inputs  # [N, H, W, C], [k, k, C, 1]
    rule = {"strides": op.get_attr("strides"), "padding": op.get_attr("padding").decode()}
    slow = onednn_enabled() and not for_gpu() and op.get_attr("data_format") == b"NHWC"
    wide = slow and rule["strides"][1] > 1 and x.dtype == tf.bfloat16
    dtype = tf.float32 if wide else x.dtype
    dx = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
        input_sizes=tf.shape(x), filter=tf.cast(kernel, dtype), out_backprop=tf.cast(dy, dtype), **rule
    )
    if slow and int(kernel.shape[1]) > _NARROW and x.dtype in (tf.float32, tf.bfloat16):
        d_kernel = _filter_gradient_in_strips(x, kernel, dy, rule["strides"], rule["padding"])
    else:
        d_kernel = tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=x, filter_sizes=tf.shape(kernel), out_backprop=dy, **rule
        )
    return tf.cast(dx, x.dtype), d_kernel


def _filter_gradient_in_strips(x, kernel, dy, strides, padding):
    """The gradient [h,w,C,M] of a depthwise kernel, computed for at most _NARROW of its columns at a time."""
    height, width, channels, multiplier = kernel.shape.as_list()
    spans = (tf.shape(dy)[1:3] - 1) * strides[1:3]  # from the first place of the kernel to its last
    if padding == "SAME":
        missing = tf.maximum(spans + [height, width] - tf.shape(x)[1:3], 0)
        before = missing // 2
        x = tf.pad(x, [[0, 0], [before[0], missing[0] - before[0]], [before[1], missing[1] - before[1]], [0, 0]])
    strips = []
    for first in range(0, width, _NARROW):
        columns = min(_NARROW, width - first)
        strips.append(
            tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
                input=x[:, :, first : first + spans[1] + columns], filter_sizes=[height, columns, channels, multiplier],
                out_backprop=dy, strides=strides, padding="VALID",
            )
        )  # fmt: skip
    return tf.concat(strips, 1)


def deconv2d(name, x, channels, kernel=2, stride=2, *, relu=False, bias=True, init=he_fan_out, trainable=True):
    """Transposed convolution x [N,H,W,Ci] -> [N,H·stride,W·stride,channels]; W is [k,k,channels,Ci].

    If the kernel is as large as the stride, outputs do not overlap. Then one matrix product and a transpose suffice,
    which on CPUs is several times faster than the general kernel.
    """
    in_channels = int(x.shape[-1])
    with tf.variable_scope(name):
        fans = kernel * kernel * in_channels, kernel * kernel * channels
        kernel_shape = [kernel, kernel, channels, in_channels]
        weight = tf.cast(_weight("W", kernel_shape, init, *fans, trainable, wide_type(x)), x.dtype)
        shape = tf.shape(x)
        if kernel == stride:
            product = tf.nn.conv2d(
                x, tf.reshape(tf.transpose(weight, [3, 0, 1, 2]), [1, 1, in_channels, kernel * kernel * channels]), 1,
                "VALID",
            )  # fmt: skip
            # Not depth_to_space, which gives an empty batch the wrong number of channels.
            y = tf.reshape(product, [shape[0], shape[1], shape[2], kernel, kernel, channels])
            y = tf.transpose(y, [0, 1, 3, 2, 4, 5])
            y = tf.reshape(y, [shape[0], shape[1] * kernel, shape[2] * kernel, channels])
        else:
            out_shape = [shape[0], shape[1] * stride, shape[2] * stride, channels]
            y = tf.nn.conv2d_transpose(x, weight, out_shape, stride, "SAME")
        y.set_shape([None, None, None, channels])
        if bias:
            b = tf.get_variable("b", [channels], wide_type(x), tf.zeros_initializer(), trainable=trainable)
            y = tf.nn.bias_add(y, tf.cast(b, y.dtype))
        return tf.nn.relu(y) if relu else y


def fully_connected(name, x, channels, *, relu=False, init=xavier_uniform_fan_in, trainable=True):
    """x [N,Ci] -> [N,channels] in x's dtype."""
    in_channels = int(x.shape[-1])
    with tf.variable_scope(name):
        weight = _weight("W", [in_channels, channels], init, in_channels, channels, trainable, wide_type(x))
        bias = tf.get_variable("b", [channels], wide_type(x), tf.zeros_initializer(), trainable=trainable)
        y = tf.nn.bias_add(tf.matmul(x, tf.cast(weight, x.dtype)), tf.cast(bias, x.dtype))
        return tf.nn.relu(y) if relu else y


# ------------------------------------------------------------------------------------------------------------ ResNet
def preprocess_image(image, image_shape, cfg: Config):
    """uint8 BGR image [N,H,W,3], valid sizes [N,2] -> normalised [N,H,W,3] in the compute dtype; padding is exactly
    0."""
    preproc = cfg.PREPROC
    return normalize_image(image, image_shape, preproc.PIXEL_MEAN, preproc.PIXEL_STD, tf.as_dtype(cfg.TRAIN.PRECISION))


def normalize_image(image, image_shape, mean, std, dtype):
    """`preprocess_image` with the given means and standard deviations of R, G and B, on the scale 0 to 255."""
    mean = np.asarray(mean[::-1], np.float32)
    std = np.asarray(std[::-1], np.float32)
    x = (tf.cast(image, tf.float32) - mean) * (1.0 / std)
    shape = tf.shape(image)
    rows = tf.range(shape[1])[None, :] < image_shape[:, :1]  # [N, H]
    columns = tf.range(shape[2])[None, :] < image_shape[:, 1:]  # [N, W]
    inside = tf.logical_and(rows[:, :, None], columns[:, None, :])[..., None]  # [N, H, W, 1]
    return tf.cast(tf.where_v2(inside, x, tf.zeros([], tf.float32)), dtype)


def _stage_channels(stage, cfg: Config):
    """Output channels of a stage."""
    return cfg.BACKBONE.STEM_CHANNELS * 2**stage * (1 if cfg.BACKBONE.BLOCK == "basic" else 4)


def _conv_norm(cfg: Config, trainable):
    """The arguments of `conv2d` that all convolutions of the backbone share."""
    backbone = cfg.BACKBONE
    return {
        "norm": backbone.NORM,
        "bias": backbone.NORM is None,
        "tf_padding": backbone.TF_PAD_MODE,
        "epsilon": backbone.BN_EPSILON,
        "trainable": trainable,
        "affine_trainable": not backbone.FREEZE_AFFINE,
    }


def _basic_block(x, channels, stage, stride, cfg: Config, norm):
    """Two 3x3 convolutions (He et al. 2015, fig. 5 left) before the sum: ResNet-18 and 34."""
    y = conv2d("conv1", x, channels, 3, stride, relu=True, **norm)
    return conv2d("conv2", y, channels, 3, **norm)


def _bottleneck(x, channels, stage, stride, cfg: Config, norm):
    """1x1, 3x3 and 1x1 convolutions (fig. 5 right) before the sum."""
    backbone = cfg.BACKBONE
    # A plain ResNet's bottleneck width follows from the stem; for ResNeXt it is groups x width per group.
    inner = backbone.NUM_GROUPS * backbone.WIDTH_PER_GROUP * 2**stage
    if backbone.NUM_GROUPS == 1 and backbone.WIDTH_PER_GROUP == 64:
        inner = backbone.STEM_CHANNELS * 2**stage
    stride1, stride3 = (stride, 1) if backbone.STRIDE_1X1 else (1, stride)
    y = conv2d("conv1", x, inner, 1, stride1, relu=True, **norm)
    y = conv2d("conv2", y, inner, 3, stride3, groups=backbone.NUM_GROUPS, relu=True, **norm)
    return conv2d("conv3", y, channels, 1, **norm)


def _block(x, stage, index, cfg: Config, trainable):
    """x [N,H,W,C] -> [N,H/s,W/s,channels of the stage]; s = 2 in the first block of stages 1 to 3."""
    channels = _stage_channels(stage, cfg)
    stride = 2 if index == 0 and stage > 0 else 1
    norm = _conv_norm(cfg, trainable)
    shortcut = x
    if int(x.shape[-1]) != channels or stride != 1:
        shortcut = conv2d("convshortcut", x, channels, 1, stride, **norm)
    residual = _basic_block if cfg.BACKBONE.BLOCK == "basic" else _bottleneck
    return tf.nn.relu(residual(x, channels, stage, stride, cfg, norm) + shortcut)


def _stage(x, stage, cfg: Config, trainable):
    with tf.variable_scope(f"group{stage}"):
        for index in range(cfg.BACKBONE.RESNET_NUM_BLOCK[stage]):
            with tf.variable_scope(f"block{index}"):
                x = _block(x, stage, index, cfg, trainable)
    return x


def resnet_stages(image, cfg: Config, num_stages):
    """Normalised image [N,H,W,3] -> [C2, C3, …] of `num_stages` stages, of strides 4, 8, 16, 32.

    BACKBONE.FREEZE_AT = f freezes the stem (f >= 1) and the first f - 1 stages.
    """
    backbone = cfg.BACKBONE
    trainable = backbone.FREEZE_AT < 1
    x = conv2d("conv0", image, backbone.STEM_CHANNELS, 7, 2, relu=True, **_conv_norm(cfg, trainable))
    if backbone.TF_PAD_MODE:
        x = tf.nn.max_pool2d(x, 3, 2, "SAME")
    else:  # after a ReLU, padding with 0 gives the same maximum as padding with -inf
        x = tf.nn.max_pool2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), 3, 2, "VALID")
    features = []
    for stage in range(num_stages):
        if not trainable:
            x = tf.stop_gradient(x)
        trainable = stage + 2 > backbone.FREEZE_AT
        x = _stage(x, stage, cfg, trainable)
        features.append(x if trainable else tf.stop_gradient(x))
    return features


def c4_backbone(image, cfg: Config):
    """Normalised image [N,H,W,3] -> C4 [N,H/16,W/16,1024], 256 channels with basic blocks."""
    return resnet_stages(image, cfg, 3)[-1]


def c5_on_rois(rois, cfg: Config):
    """Stage 5 as a head on RoI features [R,14,14,1024] -> [R,7,7,2048] (He et al. 2015, appendix A); with basic blocks
    256 -> 512 channels."""
    return _stage(rois, 3, cfg, cfg.BACKBONE.FREEZE_AT < 5)
