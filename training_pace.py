"""Tells after the first steps of a run how long it will take."""

import statistics
import time
from collections.abc import Callable

from common import logger
from config import Config
from training_plan import TrainingPlan, told_time
from utils.tensorpack_import import Callback

__all__ = ["TellPace"]

_STEPS, _SECONDS = 10, 60.0  # so many steps are looked at, or fewer that take so long
_WORTH_TELLING = 60.0  # seconds


class TellPace(Callback):
    """Logs the time that the rest of the run will take, and warns of weeks. The first step, which includes the
    optimisation of the graph, is left out; the median of the others hardly feels an evaluation between them."""

    def __init__(self, cfg: Config, plan: TrainingPlan, clock: Callable[[], float] = time.monotonic):
        self._cfg, self._plan, self._clock = cfg, plan, clock
        self._times: list[float] = []
        self._told = False

    def _before_train(self):
        self._last = self._clock()

    def _trigger_step(self):
        now = self._clock()
        self._times.append(now - self._last)
        self._last = now
        if not self._told:
            self.tell(self.global_step)

    def tell(self, step: int) -> None:
        """Logs the time once enough steps were seen."""
        times = self._times[1:]
        if len(times) < _STEPS and (len(times) < 3 or sum(times) < _SECONDS):
            return
        self._told = True
        pace, left = statistics.median(times), self._plan.total_steps - step
        if pace * left < _WORTH_TELLING:
            return
        rest = "" if not self._plan.evaluate_every else ", evaluations not included"
        logger.info(f"{left} more steps take about {told_time(pace * left)} at {pace:.2f} s/step{rest}")
        if warning := self._plan.long_run(self._cfg, pace * left):
            logger.warning(warning)
