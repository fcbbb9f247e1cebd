"""Runs a training graph for some steps without a run directory: for `--find-lr` and `--find-batch`."""

import sys
from collections.abc import Callable
from typing import Any

from config import Config
from trainers import DetectionModel, training_graph
from training import LoadWeights, RunSession, WatchedDataflow, build_graph
from training_monitor import InputClock
from training_plan import TrainingPlan
from utils.tensorpack_import import Callback, StopTraining
from utils.tf_v1 import tf

__all__ = ["run_steps"]


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
    with training_graph():
        source = WatchedDataflow(dataflow, InputClock(len(devices)), 0)
        model, _ = build_graph(cfg, plan, source, keys, devices, trainer)

        def step_is_made(step: int, loss: float) -> bool:
            source.held.clear()  # nothing is recorded here
            return after_step(step, loss)

        watch = _Watch(model, step_is_made)

        def on_end_of_input(error: Exception) -> None:
            raise source.error or error

        trainer.on_end_of_input = on_end_of_input
        trainer.train([watch], [], RunSession(devices), LoadWeights(load), sys.maxsize, 1, 1)
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
