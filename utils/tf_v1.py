"""The one place that imports TensorFlow: `from utils.tf_v1 import tf` gives tensorflow.compat.v1 in graph mode.

The environment must be set before TensorFlow is first imported, so nothing else in the project imports it directly.
PACKRCNN_VERBOSE_TF=1 in the environment (train.py --verbose-tf) brings TensorFlow's own start-up messages back.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from common import visible_gpus

__all__ = ["onednn_enabled", "tf"]

_VERBOSE = bool(os.environ.get("PACKRCNN_VERBOSE_TF"))

# tensorpack's layers need Keras 2, which TensorFlow now takes from the tf_keras package.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
if not _VERBOSE:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.filterwarnings("ignore", module=r"(tensorflow|tensorpack|tf_keras|keras)(\.|$)")
if visible_gpus() == 0:
    # The multi-threaded CPU gradient of crop_and_resize accumulates without synchronisation and is wrong (errors up
    # to 10 % of the largest gradient) unless deterministic kernels are asked for. GPU kernels refuse to run under it.
    if "tensorflow" in sys.modules and "TF_DETERMINISTIC_OPS" not in os.environ:
        raise ImportError("TensorFlow was imported before utils.tf_v1, which must prepare it: import this one first")
    os.environ.setdefault("TF_DETERMINISTIC_OPS", "1")


@contextlib.contextmanager
def _stderr_to_nowhere() -> Iterator[None]:
    """TensorFlow's C++ code writes to file descriptor 2 while it is imported, whatever the log level says."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)


with contextlib.nullcontext() if _VERBOSE else _stderr_to_nowhere():
    import tensorflow.compat.v1 as tf

if not _VERBOSE:
    tf.logging.set_verbosity(tf.logging.ERROR)
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
tf.disable_v2_behavior()
# A reference variable may be updated while other operations of the same step still read it; reads of a resource
# variable are snapshots. Without this, two runs of the same step differ by up to 1 % in some gradients.
tf.enable_resource_variables()


def onednn_enabled() -> bool:
    """Whether CPU convolutions run in oneDNN, which differentiates grouped ones; TensorFlow's own kernels do not."""
    try:
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return bool(_pywrap_util_port.IsMklEnabled())
