"""EfficientNet-Lite (Tan & Le 2019) as a backbone: inverted residual blocks of depthwise convolutions with batch norms.

`utils/efficientnet_lite.py` lists the blocks of Lite0 to Lite4 and reads the published weights. Padding is TensorFlow's
SAME, as in the original.
"""

from basemodel import conv2d
from config import Config
from utils.efficientnet_lite import Block, blocks
from utils.tf_v1 import tf

__all__ = ["efficientnet_stages"]

_BN_EPSILON = 1e-3  # of the published networks


def efficientnet_stages(image, cfg: Config):
    """Normalised image, R, G, B [N,H,W,3] -> [C2, C3, C4, C5] of strides 4, 8, 16 and 32, the output of the last block
    of each stride.

    BACKBONE.FREEZE_AT = f freezes the layers of stride 2 (f >= 1) and those of the first f - 1 strides after it.
    """
    backbone = cfg.BACKBONE
    stage, frozen = 1, backbone.FREEZE_AT >= 1
    x = _conv(image, "conv0", 32, 3, cfg, frozen, stride=2, relu6=True)
    features = []
    for index, block in enumerate(blocks(backbone.NAME)):
        if block.stride == 2:
            features.append(x)
            stage += 1
            frozen = stage <= backbone.FREEZE_AT
        with tf.variable_scope(f"block{index}"):
            x = _block(x, block, cfg, frozen)
        if frozen:
            x = tf.stop_gradient(x)
    return [*features[1:], x]


def _block(x, block: Block, cfg: Config, frozen):
    """x [N,H,W,inputs] -> [N,H/stride,W/stride,outputs] (Sandler et al. 2018, figure 4d)."""
    y = x
    if block.inner != block.inputs:
        y = _conv(y, "expand", block.inner, 1, cfg, frozen, relu6=True)
    y = _conv(
        y, "depthwise", block.inner, block.kernel, cfg, frozen, stride=block.stride, groups=block.inner, relu6=True
    )
    y = _conv(y, "project", block.outputs, 1, cfg, frozen)
    return x + y if block.stride == 1 and block.inputs == block.outputs else y


def _conv(x, name, channels, kernel, cfg: Config, frozen, *, stride=1, groups=1, relu6=False):
    backbone = cfg.BACKBONE
    y = conv2d(
        name, x, channels, kernel, stride, groups=groups, norm=backbone.NORM, epsilon=_BN_EPSILON, trainable=not frozen,
        affine_trainable=not backbone.FREEZE_AFFINE,
    )  # fmt: skip
    return tf.nn.relu6(y) if relu6 else y
