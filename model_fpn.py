"""Feature pyramid (Lin et al. 2017, Feature Pyramid Networks), NHWC."""

from basemodel import conv2d, detector_group_norm, xavier_uniform_fan_in
from config import Config
from utils.tf_v1 import tf

__all__ = ["fpn"]


def upsample_nearest_2x(x, deterministic=False):
    """[N,H,W,C] -> [N,2H,2W,C]. deterministic=True: with a gradient that is computed in a fixed order on GPUs too."""
    size = tf.shape(x)[1:3] * 2
    if not deterministic:
        return tf.image.resize_nearest_neighbor(x, size)

    @tf.custom_gradient
    def upsample(x):
        return tf.image.resize_nearest_neighbor(x, size), lambda dy: 4.0 * tf.nn.avg_pool2d(dy, 2, 2, "VALID")

    return upsample(x)


def fpn(stages, cfg: Config):
    """[C2, C3, C4, C5] with strides 4..32, C2 to C4 of even sides -> [P2, P3, P4, P5, P6] of FPN.NUM_CHANNEL channels.

    P6 subsamples P5 by 2 and is used by the RPN only.
    """
    channels, norm = cfg.FPN.NUM_CHANNEL, detector_group_norm(cfg) if cfg.FPN.NORM == "GN" else None
    options = {"norm": norm, "init": xavier_uniform_fan_in}
    with tf.variable_scope("fpn"):
        laterals = [conv2d(f"lateral_1x1_c{i + 2}", c, channels, 1, **options) for i, c in enumerate(stages)]
        merged = [laterals[-1]]
        for lateral in laterals[-2::-1]:
            merged.insert(0, lateral + upsample_nearest_2x(merged[0], cfg.TRAIN.DETERMINISTIC))
        pyramid = [conv2d(f"posthoc_3x3_p{i + 2}", m, channels, 3, **options) for i, m in enumerate(merged)]
        pyramid.append(pyramid[-1][:, ::2, ::2, :])
        return pyramid
