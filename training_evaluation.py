"""Evaluations during training, as a tensorpack callback: when they come, and what follows from their scores."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import logger, without_nan, write_json
from config import Config
from predict import EvaluationStopped
from training_async import AsyncEvaluations
from training_best import Scores, shown_score
from training_pictures import evaluation_pictures, pictures_of_step
from training_plan import TrainingPlan
from utils import ranks
from utils.checkpoint import best_score, keep_best, read_checkpoint_meta
from utils.tensorpack_import import Callback, StopTraining
from utils.tf_v1 import tf

__all__ = ["PeriodicEvaluation"]


class PeriodicEvaluation(Callback):
    """Evaluates every `plan.evaluate_every` steps and after the last one; ends the run where the scores ask for it.

    A checkpoint of the step is saved before, and says that its evaluation is pending. The scores are added to its
    description afterwards. So a run that was killed in between evaluates this step again when it goes on.
    """

    _chief_only = False

    def __init__(
        self,
        cfg: Config,
        plan: TrainingPlan,
        logdir: Path,
        build: Callable[[], Callable],
        log: Any,
        checkpoints: Any,
        scores: Scores,
        size: int,
    ):
        """build() -> evaluate(sess, should_stop, on_results) -> metrics; log, checkpoints: the callbacks ProgressLog
        and Checkpoints; size: the number of ranks."""
        self._cfg, self._plan, self._logdir, self._build = cfg, plan, logdir, build
        self._log, self._checkpoints = log, checkpoints
        self._scores, self._size = scores, size
        self._interval = plan.evaluate_every
        self._may_end = cfg.TRAIN.PATIENCE is not None or bool(cfg.TRAIN.TARGET)
        self._evaluate: Callable | None = None
        self._others: AsyncEvaluations | None = AsyncEvaluations(cfg, logdir) if cfg.TEST.ASYNC else None
        self.stopped = ""  # why the scores ended the run

    def due(self, step: int) -> bool:
        return step >= self._plan.total_steps or bool(self._interval and step % self._interval == 0)

    def _before_train(self):
        if self.trainer.is_chief:
            self._keep_best()
        for step in sorted(self._scores.pending):
            if self._others is not None:
                self._submit(step)
            elif step == self.global_step:
                if self.trainer.is_chief:
                    logger.info(f"evaluating step {step}, whose evaluation was not finished")
                self._evaluate_now(step)
            else:
                logger.warning(f"the evaluation of step {step} was not finished and is left out")
                self._scores.drop(step)
        # A run may be started again for evaluations alone.
        ended = self.global_step >= self._plan.total_steps
        reason = "" if ended else self._scores.why_finished()
        if self._size > 1 and self._may_end:
            reason = ranks.from_first(reason)
        if self._others is not None and (ended or reason):
            self._wait()
        self._end_if(reason)

    def _trigger_step(self):
        step = self.global_step
        if self._others is None:
            if self.due(step):
                self._evaluate_now(step)
            return
        self._take_outcome()
        if self._checkpoints.ends_early:
            self._wait()
            self.stopped = self._scores.why_finished() or "the scores of another rank"
            raise StopTraining("scores")
        if self.due(step):
            self._submit(step)
        if step >= self._plan.total_steps:
            self._wait()

    def _after_train(self):
        if self._others is not None:
            self._others.stop()

    # ------------------------------------------------------------------------------------- in another process
    def _submit(self, step: int) -> None:
        if not self.trainer.is_chief:
            self._scores.drop(step)
            return
        if not (self._logdir / f"model-{step}.index").exists():
            logger.warning(f"step {step} cannot be evaluated: its checkpoint is no longer there")
            self._scores.drop(step)
            return
        skipped = self._others.submit(step)
        if skipped is not None:
            logger.warning(f"the evaluation of step {skipped} is skipped: that of step {step} is newer")
            self._scores.drop(skipped)
            self._checkpoints.describe(skipped)

    def _take_outcome(self) -> None:
        """Records the scores of an evaluation that has ended, if one has."""
        outcome = self._others.poll()
        if outcome is None:
            return
        if outcome.metrics is None:
            logger.error(f"the evaluation of step {outcome.step} failed and training goes on: {outcome.problem}")
            self._scores.drop(outcome.step)
            self._checkpoints.describe(outcome.step)
            return
        ends = ("/AP", "/mAP", "/AR@1000", "total_loss")
        overall = [shown_score(k, v) for k, v in outcome.metrics.items() if k.endswith(ends)]
        logger.info(f"step {outcome.step} was evaluated in {outcome.seconds:.0f} s: {', '.join(overall)}")
        if self._record(outcome.step, outcome.metrics):
            self._checkpoints.end_early()

    def _wait(self) -> None:
        """Waits for the evaluations that run or wait; a signal ends that, and they come when the run is continued."""
        if self._others.busy:
            logger.info("waiting for the evaluation in the other process")
        while self._others.busy:
            if self._checkpoints.stop_signal is not None:
                self._others.stop()
                raise StopTraining("signal")
            self._take_outcome()
            time.sleep(0.05)

    # ------------------------------------------------------------------------------------------------- here
    def _evaluate_now(self, step: int) -> None:
        if self._evaluate is None:
            self._evaluate = self._add_to_graph()
        try:
            metrics = self._evaluate(
                self.trainer.sess,
                lambda: self._checkpoints.stop_signal is not None,
                evaluation_pictures(self._logdir, step, self._cfg),
            )
        except EvaluationStopped:
            self._checkpoints.save()
            raise StopTraining("signal") from None
        except tf.errors.OutOfRangeError as e:  # tensorpack would treat it as the end of training
            raise RuntimeError(f"the evaluation failed: {e.message}") from e
        self._log.restart_clock()
        reason = ""
        if self.trainer.is_chief:
            reason = self._record(step, metrics)
        self._scores.drop(step)
        if self._may_end:
            self._end_if(ranks.from_first(reason) if self._size > 1 else reason)

    def _add_to_graph(self) -> Callable:
        """The first evaluation adds its operations to the graph, so that a run starts without waiting for them."""
        graph = self.trainer.sess.graph
        graph._unsafe_unfinalize()
        with graph.as_default():
            evaluate = self._build()
        graph.finalize()
        return evaluate

    def _record(self, step: int, metrics: dict[str, float]) -> str:
        """Writes the scores of a step everywhere; returns why the run ends, or ""."""
        scores = self._scores
        with self._log.writing(f"the scores in {self._logdir}"):
            write_json(self._logdir / "metrics.json", without_nan(metrics), indent=1)
        self._log.write_metrics(step, metrics)
        self._log.show(step, pictures_of_step(self._logdir, step))
        scores.add(step, metrics)
        now = scores.standing()
        reason = scores.why_finished() if step < self._plan.total_steps else ""
        if reason:
            scores.stop(reason)
        self._checkpoints.describe(step)
        self._keep_best()
        missing = [m for m in scores.wanted() if m not in metrics]
        if missing:
            known = [k for k in metrics if "per_class" not in k]
            logger.warning(f"the evaluation gave no {missing[0]}; it gave {', '.join(known) or 'nothing'}")
        if now.step == step:
            logger.info(f"the best so far is kept: {shown_score(now.metric, now.score)} at step {step}")
        elif now.step is not None:
            since = f"; {now.since} evaluations without improvement" if now.since else ""
            logger.info(f"the best is still {shown_score(now.metric, now.score)} at step {now.step}{since}")
        return reason

    def _keep_best(self) -> None:
        """Brings model-best in line with the scores."""
        now = self._scores.standing()
        if not self._scores.rule.metrics or (now.step is None and best_score(self._logdir) is None):
            return
        with self._log.writing(f"the best checkpoint in {self._logdir}"):
            score = {"metric": now.metric.removeprefix("-"), "score": now.score}
            if not keep_best(self._logdir, now.step, score, self._best_of_others()):
                logger.warning(
                    f"the checkpoint of step {now.step}, the best so far, is no longer there; the next evaluation "
                    "with a better score is kept as the best"
                )

    def _best_of_others(self) -> set[int]:
        """The steps that were the best ones as of the checkpoints that are kept, from which a run may continue."""
        steps = set()
        for path in self._logdir.glob("model-*.index"):
            meta = read_checkpoint_meta(str(path)[: -len(".index")])
            steps.add(Scores(self._scores.rule, meta).standing().step)
        return steps - {None}

    def _end_if(self, reason: str) -> None:
        if reason:
            self.stopped = reason
            self._checkpoints.save()
            raise StopTraining("scores")
