"""Runs a training graph for some steps without a run directory: for `--find-lr` and `--find-batch`."""

import logging
import sys
from collections.abc import Callable
from typing import Any

from config import Config
from model_rcnn import INPUT_TYPES
from trainers import DetectionModel, session_config
from training_plan import TrainingPlan
from utils.tf_v1 import do_not_fold_initial_values, tf

# isort: split
from tensorpack import QueueInput
from tensorpack.callbacks import Callback
from tensorpack.dataflow import DataFlow
from tensorpack.tfutils.sesscreate import NewSessionCreator
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.train.base import StopTraining

__all__ = ["run_steps"]

# Errors are raised and reported once, by the callers.
logging.getLogger("tensorpack").setLevel("CRITICAL")


def run_steps(
    cfg: Config,
    plan: TrainingPlan,
    dataflow: Any,
    keys: list[str],
    devices: list[str],
    trainer: Any,
    after_step: Callable[[int, float], bool],
    load: Callable[[Any], None] = lambda sess: None,
) -> None:
    """Trains from step 0 as `training.run_training` does, but writes nothing.

    after_step(step, loss of the step) -> whether this was the last one; load(sess) assigns weights.
    """
    with tf.Graph().as_default():
        tf.set_random_seed(cfg.TRAIN.SEED)
        model = DetectionModel(cfg, plan, keys)
        source = _Input(dataflow)
        queue = tf.FIFOQueue(max(2, 2 * len(devices)), [INPUT_TYPES[k][0] for k in keys], name="input_queue")
        trainer.setup_graph(
            model.get_input_signature(), QueueInput(source, queue), model.build_graph, model.get_optimizer
        )
        do_not_fold_initial_values([*tf.global_variables(), *tf.local_variables()])
        watch = _Watch(model, after_step)

        def on_end_of_input(error: Exception) -> None:
            raise source.error or error

        trainer.on_end_of_input = on_end_of_input
        creator = NewSessionCreator()
        creator.config.MergeFrom(session_config(sum(d.startswith("/cpu") for d in devices) or 1))
        trainer.train([watch], [], creator, _Load(load), sys.maxsize, 1, 1)
        if not watch.done:
            raise source.error or RuntimeError("the trial ended before its last step")


class _Watch(Callback):
    """Gives every step's loss to `after_step` and ends where it says so."""

    _chief_only = False

    def __init__(self, model: DetectionModel, after_step: Callable[[int, float], bool]):
        self._model, self._after_step = model, after_step
        self.done = False

    def _before_run(self, _):
        return tf.train.SessionRunArgs(self._model.losses["total_loss"])

    def _after_run(self, _, run_values):
        self._loss = float(run_values.results)

    def _trigger_step(self):
        if self._after_step(self.global_step, self._loss):
            self.done = True
            raise StopTraining("done")


class _Load(SessionInit):
    def __init__(self, load: Callable[[Any], None]):
        self._load = load

    def _run_init(self, sess):
        self._load(sess)


class _Input(DataFlow):
    """Keeps the error that ends the input; tensorpack's thread would only log it."""

    def __init__(self, dataflow: Any):
        self._dataflow = dataflow
        self.error: BaseException | None = None

    def reset_state(self):
        self._dataflow.reset_state()

    def __iter__(self):
        try:
            yield from self._dataflow
        except BaseException as e:
            if not isinstance(e, GeneratorExit):
                self.error = e
            raise
