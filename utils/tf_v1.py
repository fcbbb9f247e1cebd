"""The one place that imports TensorFlow: `from utils.tf_v1 import tf` gives tensorflow.compat.v1 in graph mode.

The environment must be set before TensorFlow is first imported, so nothing else in the project imports it directly.
TensorFlow's own messages are left out, but for warnings and errors on machines with GPUs, where they say why kernels
are compiled for minutes or a library is not found. PACKRCNN_VERBOSE_TF=1 in the environment (train.py --verbose-tf)
brings them all back.
As a guest of another program (utils/guest.py) nothing is set: tf.Graph and tf.Session compute in graphs all the same.
"""

import contextlib
import contextvars
import functools
import gc
import logging
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from common import visible_gpus
from utils.guest import is_guest

__all__ = [
    "allow_tf32", "compute_capability", "detached", "do_not_fold_initial_values", "fast_graph_optimizer", "for_gpu",
    "function_to_graph", "gpu_count", "gpu_problem", "graphs_for_gpu", "keras_when_called", "make_deterministic",
    "needed_by", "onednn_enabled", "only_if", "registered_kernels", "snapshot", "take_over", "tensor_bundle_pb2", "tf",
    "without_fixed_order",
]  # fmt: skip

_VERBOSE = bool(os.environ.get("PACKRCNN_VERBOSE_TF"))
_GUEST = is_guest()
# A program that has imported TensorFlow before has decided about its messages.
_QUIET = not (_VERBOSE or _GUEST and "tensorflow" in sys.modules)

_LEVEL = "1" if visible_gpus() else "3"  # from warnings on, or from fatal errors on

if not _GUEST:
    # tensorpack's layers need Keras 2, which TensorFlow takes from the tf_keras package.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    if not _VERBOSE:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", _LEVEL)
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        warnings.filterwarnings("ignore", module=r"(tensorflow|tensorpack|tf_keras|keras)(\.|$)")


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


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """TensorFlow reads the level of its C++ messages once; a guest leaves the variable as it was."""
    unset = "TF_CPP_MIN_LOG_LEVEL" not in os.environ
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", _LEVEL)
    try:
        with _stderr_to_nowhere():
            yield
    finally:
        if unset:
            del os.environ["TF_CPP_MIN_LOG_LEVEL"]


_OPTIONAL = ("dill", "h5py", "scipy", "tf_keras.src.optimizers")


@contextlib.contextmanager
def _fast_import() -> Iterator[None]:
    """Makes TensorFlow's import two fifths shorter. Next to nothing that it makes is garbage, so Python does not search
    it for garbage, then or later. What TensorFlow would import if it is installed, for programs that read models of
    Keras or train them on sparse matrices, comes when something else uses it. And Python's typing would compile the
    18,000 names of types in TensorFlow's generated functions one by one, few of which differ."""
    if _GUEST:
        yield
        return
    absent, searched = [name for name in _OPTIONAL if name not in sys.modules], gc.isenabled()
    gc.disable()
    sys.modules.update(dict.fromkeys(absent))  # importing them fails, which TensorFlow allows
    typing.compile = functools.cache(compile)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del typing.compile  # type: ignore[attr-defined]
        for name in absent:
            del sys.modules[name]
        gc.freeze()
        if searched:
            gc.enable()


with _fast_import(), _quiet_import() if _QUIET else contextlib.nullcontext():
    import tensorflow
    import tensorflow.compat.v1 as tf
    from tensorflow.core.protobuf import rewriter_config_pb2, tensor_bundle_pb2
    from tensorflow.python.framework import kernels
    from tensorflow.python.framework.config import disable_op_determinism, enable_op_determinism
    from tensorflow.python.framework.function_def_to_graph import function_def_to_graph as function_to_graph

    if not _GUEST and not visible_gpus():
        tf.config.list_physical_devices()
if not _GUEST and visible_gpus():
    tf.config.list_physical_devices()  # its warnings name the libraries that are missing


@contextlib.contextmanager
def keras_when_called(module: str, function: str) -> Iterator[None]:
    """Inside, `tf.keras` is nothing but tf.keras.MODULE.FUNCTION, which imports Keras when it is called; everything
    where Keras is there already."""
    keras = tensorflow.keras
    if "tf_keras" in sys.modules or _GUEST:
        yield
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(keras, module), function)(*args, **kwargs)

    tensorflow.keras = SimpleNamespace(**{module: SimpleNamespace(**{function: call})})
    try:
        yield
    finally:
        tensorflow.keras = keras


def take_over() -> None:
    """Makes TensorFlow compute in graphs everywhere in this process, as training needs it."""
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # also where this process was a guest until now
    # cuDNN would time all of its algorithms for every size of the images and number of RoIs, which hardly ever repeat.
    os.environ.setdefault("TF_CUDNN_USE_AUTOTUNE", "0")
    if "TF_DETERMINISTIC_OPS" not in os.environ and not gpu_count():
        # The multi-threaded CPU gradient of crop_and_resize accumulates without synchronisation and is wrong (errors up
        # to 10 % of the largest gradient) unless deterministic kernels are asked for. Some GPU kernels refuse to
        # run under it: see `make_deterministic`.
        enable_op_determinism()
    if not _VERBOSE:
        tf.logging.set_verbosity(tf.logging.ERROR)
        logging.getLogger("tensorflow").setLevel(logging.ERROR)
    tf.disable_v2_behavior()
    # A reference variable may be updated while other operations of the same step still read it; reads of a resource
    # variable are snapshots. Without this, two runs of the same step differ by up to 1 % in some gradients.
    tf.enable_resource_variables()


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round the factors of this process's float32 products to TF32's 10 bits (TRAIN.TF32). For a guest
    the program around it decides."""
    if not is_guest():
        tensorflow.config.experimental.enable_tensor_float_32_execution(allowed)


def make_deterministic(wanted: bool) -> None:
    """Whether this process's GPU kernels must add in a fixed order (TRAIN.DETERMINISTIC). CPU kernels always do, see
    `take_over`."""
    if gpu_count() and "TF_DETERMINISTIC_OPS" not in os.environ:
        (enable_op_determinism if wanted else disable_op_determinism)()


# Operations whose GPU kernels have no fixed order, by the list in the documentation of TensorFlow's
# enable_op_determinism: they fail when it is on.
_NO_FIXED_ORDER = frozenset((
    "AdjustContrast", "AdjustContrastv2", "CropAndResizeGradBoxes", "CropAndResizeGradImage",
    "DepthwiseConv2dNativeBackpropFilter", "FakeQuantWithMinMaxVarsGradient",
    "FakeQuantWithMinMaxVarsPerChannelGradient", "ResizeNearestNeighborGrad", "SparseTensorDenseMatMul",
))  # fmt: skip


def without_fixed_order(target: Any) -> Any | None:
    """The first operation among those that `target`, an operation, needs which has no GPU kernel of a fixed order."""
    for op in needed_by(target):
        frozen_norm = op.type.startswith("FusedBatchNormGrad") and not op.get_attr("is_training")
        if op.type in _NO_FIXED_ORDER or frozen_norm:
            return op
    return None


def needed_by(target: Any) -> Iterator[Any]:
    """The operation `target` and all that must run for it, each once."""
    seen, todo = set(), [target]
    while todo:
        op = todo.pop()
        if op not in seen:
            seen.add(op)
            yield op
            todo += [*(tensor.op for tensor in op.inputs), *op.control_inputs]


@functools.cache
def gpu_count() -> int:
    """The number of GPUs that TensorFlow can use in this process."""
    return len(tf.config.list_physical_devices("GPU"))


def compute_capability() -> tuple[int, ...]:
    """The compute capability of the first GPU, e.g. (8, 0); () if it is unknown."""
    gpus = tf.config.list_physical_devices("GPU")
    return tuple(tf.config.experimental.get_device_details(gpus[0]).get("compute_capability") or ()) if gpus else ()


# What `graphs_for_gpu` says; None: graphs are for the devices that this process has.
_FOR_GPU: contextvars.ContextVar[bool | None] = contextvars.ContextVar("for_gpu", default=None)


def for_gpu() -> bool:
    """Whether the graph that is being built will run on a GPU. Some functions have a form for GPUs, with the same
    results, whose operations have kernels there and seldom wait for the host."""
    chosen = _FOR_GPU.get()
    return gpu_count() > 0 if chosen is None else chosen


@contextlib.contextmanager
def graphs_for_gpu(chosen: bool) -> Iterator[None]:
    """Graphs built inside take the form for GPUs, or that for CPUs, whatever devices this process has."""
    token = _FOR_GPU.set(chosen)
    try:
        yield
    finally:
        _FOR_GPU.reset(token)


def registered_kernels(operation: str) -> list[Any]:
    """The KernelDefs that this TensorFlow has for an operation, those for devices that this machine lacks included."""
    return list(kernels.get_registered_kernels_for_op(operation).kernel)


def gpu_problem() -> str | None:
    """A message of one line if TensorFlow has no GPU although this machine has one or CUDA_VISIBLE_DEVICES names
    one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    if gpu_count() or named.startswith("-1"):
        return None
    if installed := visible_gpus():
        return (
            f"TensorFlow cannot use the {installed} NVIDIA GPU{'s' * (installed > 1)} of this machine: install CUDA's "
            "libraries with pip install -r requirements-gpu.txt (or a newer driver), or set CUDA_VISIBLE_DEVICES=-1 to "
            "compute on the CPU"
        )
    return f"CUDA_VISIBLE_DEVICES={named} names a GPU that this machine does not have" if named else None


def onednn_enabled() -> bool:
    """Whether CPU convolutions run in oneDNN, which has gradients of grouped convolutions; TensorFlow's own kernels do
    not."""
    try:
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return bool(_pywrap_util_port.IsMklEnabled())


def fast_graph_optimizer(config: Any) -> Any:
    """The tf.ConfigProto, with a graph optimiser that does what it does once.

    Its second round and its search for memory to save find next to nothing in these graphs, and take more than half of
    its time (benchmarks/RESULTS.md, "Start of a run").
    """
    options = config.graph_options.rewrite_options
    options.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
    options.memory_optimization = rewriter_config_pb2.RewriterConfig.NO_MEM_OPT
    return config


def detached(x: Any) -> Any:
    """x, a floating-point tensor of any shape, as it is; no gradient is computed for it or for what it is made from.

    tf.stop_gradient does the same, but what comes after it still gets operations for gradients, a fifth of all, which
    take time when a run starts and are then not used. None are made for what depends on integers.
    """
    return tf.bitcast(tf.bitcast(x, {2: tf.int16, 4: tf.int32, 8: tf.int64}[x.dtype.size]), x.dtype)


def only_if(condition: Any, make: Callable[[], Sequence[Any]]) -> Any:
    """An operation that runs the operations which make() returns if condition (bool []) is True, and none of what
    make() adds to the graph if it is False. What depends on it runs in both cases.

    It does what tf.cond does with tf.no_op as its other branch. That would add a Switch for each tensor from outside
    which the branch uses: three for each variable that is updated, a twentieth of a training graph. Here the operations
    have a control dependency on the taken side of one Switch, and TensorFlow does not run what follows the other side.
    """
    no, yes = tf.raw_ops.Switch(data=condition, pred=condition)
    with tf.control_dependencies([tf.identity(yes)]):
        made = make()
    with tf.control_dependencies(made):
        done = tf.identity(yes)
    return tf.raw_ops.Merge(inputs=[done, no]).output.op


def snapshot(variable: Any) -> Any:
    """The variable's value when a run of the graph begins, from the operation that each variable has for it."""
    return variable.graph.get_tensor_by_name(variable.to_proto().snapshot_name)


def do_not_fold_initial_values(variables: Sequence[Any]) -> None:
    """Keeps the graph optimiser from computing the variables' initial values and storing them as constants.

    It would, since they depend on nothing but a seed; for an R50-FPN that is half a gigabyte which is never freed. A
    shape that comes from an operation with a state is no constant. The values are the same.
    """
    nothing = tf.random.uniform([], 0, 1, tf.int32, seed=1)  # always 0
    seen, todo = set(), [v.initializer.inputs[1].op for v in variables]
    while todo:
        op = todo.pop()
        if op in seen:
            continue
        seen.add(op)
        if op.type == "Fill" or op.type.startswith("StatelessRandom"):
            op._update_input(0, op.inputs[0] + tf.cast(nothing, op.inputs[0].dtype))  # noqa: SLF001
        else:
            todo += [tensor.op for tensor in op.inputs]


if not _GUEST:
    take_over()
