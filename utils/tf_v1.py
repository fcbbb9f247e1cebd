"""The one place that imports TensorFlow: `from utils.tf_v1 import tf` gives tensorflow.compat.v1 in graph mode.

The environment must be set before TensorFlow is first imported, so nothing else in the project imports it directly.
"""

import logging
import os
import warnings

from common import visible_gpus

# tensorpack's layers need Keras 2, which TensorFlow now takes from the tf_keras package.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
if not os.environ.get("PACKRCNN_VERBOSE_TF"):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", module=r"(tensorflow|tensorpack|tf_keras|keras)(\.|$)")
if visible_gpus() == 0:
    # The multi-threaded CPU gradient of crop_and_resize accumulates without synchronisation and is wrong (errors up
    # to 10 % of the largest gradient) unless deterministic kernels are asked for. GPU kernels refuse to run under it.
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")

import tensorflow.compat.v1 as tf

tf.disable_v2_behavior()
if not os.environ.get("PACKRCNN_VERBOSE_TF"):
    tf.logging.set_verbosity(tf.logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)

__all__ = ["tf"]
