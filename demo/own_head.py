"""Your own heads in a few lines each: a box head that averages over the RoI, and a mask head of two convolutions.

Name them in the settings by module:function; the module must be importable from the folder the program starts in:

    ./train.py --config MODE_FPN=True FPN.FRCNN_HEAD_FUNC=demo.own_head:box_head …
    ./train.py --config MODE_FPN=True FPN.MRCNN_HEAD_FUNC=demo.own_head:mask_head …
    ./train.py --predict photo.jpg --load RUN --trust-code demo.own_head
"""

from basemodel import conv2d, deconv2d, fully_connected
from utils.tf_v1 import tf


def box_head(features, cfg):
    """RoI features [R,7,7,C] of the compute type -> [R,D]; the classes and box deltas are linear functions of these.

    Any TensorFlow 1 graph code may stand here whose variables come from tf.get_variable; kernels named W decay. In a
    cascade each stage calls it in a variable scope of its own.
    """
    x = conv2d("conv", features, cfg.FPN.FRCNN_CONV_HEAD_DIM, 3, relu=True)
    return fully_connected("fc", tf.reduce_mean(x, [1, 2]), cfg.FPN.FRCNN_FC_HEAD_DIM, relu=True)


def mask_head(features, num_classes, cfg):
    """RoI features [F,14,14,C] -> mask logits [F,28,28,num_classes], one map per class."""
    x = features
    for index in range(2):
        x = conv2d(f"conv{index}", x, cfg.MRCNN.HEAD_DIM, 3, relu=True)
    x = deconv2d("deconv", x, cfg.MRCNN.HEAD_DIM, relu=True)
    return conv2d("logits", x, num_classes, 1)
