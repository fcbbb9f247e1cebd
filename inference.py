"""The predictor: a graph and a session that turn batches of images into detections."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from common import logger
from config import Config, inference_precision
from model_rcnn import build_inference
from utils.checkpoint import AVERAGE_PREFIX
from utils.ranks import use_own_gpu
from utils.tf_v1 import allow_tf32, fast_graph_optimizer, gpu_problem, tf

__all__ = ["Predictor", "inference_callable", "shared_variables", "start_session"]


def _averages_instead(scope: str) -> Callable:
    """A variable getter that returns a variable's moving average (TRAIN.EMA_DECAY) if the graph has one."""
    averages = {v.op.name: v for v in tf.global_variables() if v.op.name.startswith(AVERAGE_PREFIX)}

    def get(getter: Callable, name: str, **kwargs: Any) -> Any:
        average = averages.get(AVERAGE_PREFIX + name.removeprefix(f"{scope}/"))
        return getter(name, **kwargs) if average is None else average

    return get


@contextmanager
def shared_variables(scope: str, device: str | None = None, averages: bool = False, reuse: bool = True) -> Iterator:
    """What is built inside uses the variables of a replica's scope; averages: their moving averages, which exist once
    for all replicas, where the graph has them."""
    getter = _averages_instead(scope) if averages else None
    with tf.device(device) if device else nullcontext(), tf.variable_scope(scope, reuse=reuse, custom_getter=getter):
        yield


def inference_callable(cfg: Config, device: str | None = None, scope: str = "", reuse: bool = False) -> Callable:
    """Adds the inference graph to the current one; returns attach(sess) -> predict(image, image_shape) -> outputs.

    In a training graph (reuse) it shares the variables of a replica's scope, with TEST.USE_EMA their moving averages.

    image uint8 [N,H,W,3], image_shape int32 [N,2]; the outputs are those of `build_inference` as arrays, computed in
    TEST.PRECISION.
    """
    allow_tf32(cfg.TRAIN.TF32)
    cfg = inference_precision(cfg)
    with tf.name_scope("inference"):
        image = tf.placeholder(tf.uint8, [None, None, None, 3], "image")
        image_shape = tf.placeholder(tf.int32, [None, 2], "image_shape")
    with shared_variables(scope, device, reuse and cfg.TEST.USE_EMA, reuse):
        outputs = {k: tf.identity(v, f"output/{k}") for k, v in build_inference(image, image_shape, cfg).items()}

    def attach(sess: Any) -> Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
        call = sess.make_callable([outputs, []], feed_list=[image, image_shape])
        return lambda images, shapes: call(images, shapes)[0]

    return attach


def start_session(graph: Any, load: Callable[[Any], None], device: str | None = None) -> Any:
    """A session of `graph` with the weights that load(sess) assigns; of the device "/cpu:0" it leaves GPUs alone."""
    on_cpu = device == "/cpu:0"
    if not on_cpu and (problem := gpu_problem()):
        logger.warning(problem)
    config = tf.ConfigProto(allow_soft_placement=True, device_count={"GPU": 0} if on_cpu else None)
    config.gpu_options.allow_growth = True
    use_own_gpu(config)
    if device and device.startswith("/cpu:"):
        config.device_count["CPU"] = int(device.removeprefix("/cpu:")) + 1
    session = tf.Session(graph=graph, config=fast_graph_optimizer(config))
    try:
        load(session)
    except BaseException:
        session.close()
        raise
    return session


class Predictor:
    """predict(image, image_shape) -> outputs, with its own graph and session."""

    def __init__(self, cfg: Config, load: Callable[[Any], None], device: str | None = None):
        """load(sess) assigns the weights to the variables of the session's graph; device: "/cpu:0", "/gpu:1", …"""
        self.cfg = cfg
        with tf.Graph().as_default() as graph:
            attach = inference_callable(cfg, device)
            self._session = start_session(graph, load, device)
            self._predict = attach(self._session)

    def __call__(self, image: np.ndarray, image_shape: np.ndarray) -> dict[str, np.ndarray]:
        return self._predict(image, image_shape)

    def close(self) -> None:
        """Frees the weights."""
        self._session.close()
        del self._predict, self._session
