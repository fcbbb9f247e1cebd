"""Your own backbone: a plain convolutional network with group norms.

Name it in the settings by module:function; the module must be importable from where the program is started:

    ./train.py --config BACKBONE.NAME=demo.own_backbone:stages BACKBONE.NORM=GN BACKBONE.FREEZE_AT=0 MODE_FPN=True …
    ./train.py --predict photo.jpg --load RUN --trust-code demo.own_backbone
"""

from basemodel import conv2d


def stages(image, cfg):
    """Normalised image [N,H,W,3] of the compute type -> [C2, C3, C4, C5], [N,H/4,W/4,64] to [N,H/32,W/32,512].

    Any TensorFlow 1 graph code may be used if its variables come from tf.get_variable; kernels named W get weight
    decay.
    """
    norm = cfg.BACKBONE.NORM
    x = conv2d("stem", image, 32, 3, 2, norm=norm, relu=True)
    features = []
    for level, channels in enumerate([64, 128, 256, 512], 2):
        x = conv2d(f"down{level}", x, channels, 3, 2, norm=norm, relu=True)
        x = x + conv2d(f"residual{level}", x, channels, 3, norm=norm, relu=True)
        features.append(x)
    return features
