"""A training run: the loop, with progress, checkpoints and evaluations as tensorpack callbacks."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common import UserError, describe_error, logger, without_nan
from config import Config
from model_rcnn import INPUT_TYPES
from trainers import DetectionModel, session_config, training_graph
from training_best import Scores
from training_evaluation import PeriodicEvaluation
from training_incidents import IncidentRecorder
from training_monitor import InputClock, Meter, smoothed
from training_pace import TellPace
from training_pictures import show_batches
from training_plan import TrainingPlan
from training_trackers import Trackers, tracking
from utils.checkpoint import checkpoint_writer, save_tf_checkpoint, update_description
from utils.image_header import image_header_size
from utils.stopping import on_stop
from utils.tensorpack_import import Callback, DataFlow, QueueInput, SessionInit, StopTraining
from utils.tf_v1 import allow_tf32, do_not_fold_initial_values, make_deterministic, tf, without_fixed_order

__all__ = [
    "Checkpoints", "Interrupted", "LoadWeights", "ProgressLog", "RunSession", "WatchedDataflow", "build_graph",
    "run_training",
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- callbacks
class Interrupted(Exception):
    """Training stopped by a signal after its checkpoint was written; carries the signal's number."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)


class ProgressLog(Callback):
    """Fetches losses and stats with each step, prints progress with ETA, writes TensorBoard and jsonl."""

    _chief_only = False

    def __init__(
        self,
        model: DetectionModel,
        plan: TrainingPlan,
        logdir: Path,
        chief: bool,
        meter: Meter,
        clock: InputClock,
        first_pictures: Callable[[int], dict[str, Path]],
        trackers: Trackers,
        smooth: dict[str, float] | None = None,
    ):
        """first_pictures(step) writes the pictures of the first batch; smooth: the smoothed values of the run that is
        continued."""
        self._model, self._plan, self._logdir = model, plan, logdir
        self._chief = chief
        self._meter, self._clock, self._first_pictures, self._trackers = meter, clock, first_pictures, trackers
        self.smooth: dict[str, float] = dict(smooth or {})
        self._last_print = 0.0
        self._bar: Any = None
        self._writer: Any = None
        self._folder = _identity(logdir)  # before the input begins, which may take as long as it likes

    def _setup_graph(self):
        self._fetches = {**self._model.losses, **self._model.stats}

    def _before_train(self):
        self._first_step = self.global_step
        self._started = self._last_time = time.time()
        if self._chief:
            self.check_folder()  # the writer would make a new one
            with _one_line(f"the log in {self._logdir}"):
                self._writer = tf.summary.FileWriter(str(self._logdir))
            if sys.stderr.isatty():
                self._bar = tqdm(
                    total=self._plan.total_steps, initial=self._first_step, unit="step", dynamic_ncols=True
                )

    def _before_run(self, _):
        return tf.train.SessionRunArgs(self._fetches)

    def _after_run(self, _, run_values):
        self._values = {k: float(v) for k, v in run_values.results.items()}

    def restart_clock(self) -> None:
        """Keeps the time of an evaluation since the last step out of the next step's time."""
        now = time.time()
        self._meter.add_pause(now - self._last_time)
        self._last_time = now

    def _trigger_step(self):
        values, step = self._values, self.global_step
        now = time.time()
        seconds, self._last_time = now - self._last_time, now
        waited = self._clock.waited()
        if step - self._first_step > 1:  # the first step includes TensorFlow's graph optimisation
            self._meter.add_step(seconds, waited)
        elif self._chief:
            logger.info(f"first step after {now - self._started:.1f} s")
        if advice := self._meter.advice(now):
            logger.warning(advice)
        if not self._chief:
            return
        if step - self._first_step == 1:
            self.show(step, self._first_pictures(step))
            self._last_time = time.time()
        for key, value in values.items():
            mean = smoothed(self.smooth.get(key), value)
            if mean is not None:
                self.smooth[key] = mean
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if step % 5 == 0:
                words = [f"loss {self.smooth['total_loss']:.3f}", *self._meter.words(step, beside_bar=True)]
                self._bar.set_postfix_str(" · ".join(words), refresh=False)
        elif now - self._last_print > (5 if now - self._started < 60 else 30) or step == self._plan.total_steps:
            self._last_print = now
            logger.info(self._line(step, values))
        if step % 20 == 0 or step == self._plan.total_steps:
            rate = {"learning_rate": values["learning_rate"]}
            self._write(step, {**values, **self.smooth, **rate, **self._meter.speed(step), **self._meter.memory()})

    def _line(self, step: int, values: dict[str, float]) -> str:
        losses = " ".join(
            f"{k.replace('_loss', '')} {self.smooth[k]:.3f}" for k in self._model.losses if k != "total_loss"
        )
        parts = [f"step {step}/{self._plan.total_steps}", *self._meter.words(step)]
        parts.append(f"rate {values['learning_rate']:.3g}")
        if "gradient_norm" in self.smooth:
            parts.append(f"gradient {self.smooth['gradient_norm']:.3g}")
        return f"{' · '.join(parts)} · loss {self.smooth['total_loss']:.3f} = {losses}"

    def check_folder(self) -> None:
        """Raises UserError if the run directory was removed; a new one would have no settings to continue from."""
        if _identity(self._logdir) != self._folder:
            raise UserError(f"{self._logdir} was deleted or moved while this run trained in it; the run ends")

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Errors of writing `what` into the run directory become a UserError, which says so if the directory is gone,
        be it before or meanwhile."""
        self.check_folder()
        try:
            with _one_line(what):
                yield
        except UserError:
            self.check_folder()
            raise

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Writes evaluation results to TensorBoard and the jsonl log."""
        if self._chief:
            self._write(step, {k: float(v) for k, v in metrics.items()})

    def show(self, step: int, pictures: dict[str, Path]) -> None:
        """Adds pictures, {name: JPEG file}, to TensorBoard. No error in them ends a run."""
        try:
            self._writer.add_summary(picture_summary(pictures), step)
            self._writer.flush()
            self._trackers.pictures(step, pictures)
        except Exception as e:
            logger.warning(f"the pictures of step {step} are not in TensorBoard: {describe_error(e)}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        told = {k: v for k, v in values.items() if not math.isnan(v)}  # classes without an object have no score
        summary = tf.Summary(value=[tf.Summary.Value(tag=_tag(k), simple_value=v) for k, v in told.items()])
        line = json.dumps(
            without_nan({"step": step, **{k: float(f"{v:.7g}") for k, v in values.items()}}), allow_nan=False
        )
        with self.writing(f"the log in {self._logdir}"):
            with open(self._logdir / "log.jsonl", "a") as f:
                f.write(f"{line}\n")
            self._writer.add_summary(summary, step)
            self._writer.flush()
        self._trackers.scalars(step, values)

    def _after_train(self):
        if self._writer is not None:
            with contextlib.suppress(OSError, tf.errors.OpError):  # errors were already reported when writing
                self._writer.close()
        if self._bar is not None:
            self._bar.close()


def _tag(key: str) -> str:
    """TensorBoard's name for a key of the log: it puts what has the same first part together, here the classes."""
    head, per_class, name = key.partition("_per_class/")
    return head.replace("/", "_") + per_class + name if per_class else key


def picture_summary(pictures: dict[str, Path]) -> Any:
    """TensorBoard's record of {name: JPEG file}."""
    values = []
    for name, path in pictures.items():
        encoded = path.read_bytes()
        height, width = image_header_size(path)
        image = tf.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        values.append(tf.Summary.Value(tag=f"pictures/{name}", image=image))
    return tf.Summary(value=values)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns errors of writing files into a UserError. tensorpack would treat one of them (a file that exceeds a size
    limit) as the end of training."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{what} cannot be written: {e.strerror or e} ({e.filename or 'disk'})") from None
    except tf.errors.OpError as e:
        raise UserError(f"{what} cannot be written: {_reason(e)}") from None


# Lines of TensorFlow's messages that tell where, or give hints about memory for a disk that is full.
_AROUND = re.compile(r"Graph exec|Detected at|Node:|Hint:")


def _reason(error: tf.errors.OpError) -> str:
    """The sentence of TensorFlow's error that says what went wrong, without the graph locations around it."""
    lines = (error.message or str(error)).splitlines()
    told = [line.strip() for line in lines if line[:1].strip() and not _AROUND.match(line)]
    return (told[-1] if told else lines[0] if lines else type(error).__name__)[:200]


def _identity(folder: Path) -> tuple[int, int] | None:
    """Identifies a folder, also among folders of the same name; None if it does not exist."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class Checkpoints(Callback):
    """Saves every `plan.checkpoint_every` steps, before evaluations, at the end, and when a signal asks to stop."""

    _chief_only = False

    def __init__(
        self,
        cfg: Config,
        plan: TrainingPlan,
        logdir: Path,
        meta: dict[str, Any],
        log: ProgressLog,
        chief: bool,
        scores: Scores,
    ):
        self._plan, self._logdir, self._meta, self._log, self._chief = plan, logdir, meta, log, chief
        self._scores = scores
        self._interval = plan.checkpoint_every
        self._keep = cfg.TRAIN.KEEP_CHECKPOINTS
        self._saved_at = None
        self._stop = False
        self.stop_signal: int | None = None
        self.last_path: str | None = None
        self.close_op: Any = None  # closes the queue of batches
        self.input_error: Callable[[], BaseException | None] = lambda: None
        self.evaluates_at: Callable[[int], bool] = lambda step: False
        self.ends_early = False  # all ranks are to stop after this step because of the scores
        self._end_asked = False
        self._handlers = contextlib.ExitStack()
        self._steps: set[int] = set()  # of the checkpoints of this run, from which later ones do not differ in history

    def _setup_graph(self):
        # A signal reaches the ranks of a job at different steps; they must stop after the same one.
        self._signalled = tf.placeholder_with_default(0.0, [], "signalled")
        any_rank = getattr(self.trainer, "any_rank", tf.identity)
        self._any_signalled = any_rank(self._signalled)
        self._writer = checkpoint_writer(tf.global_variables())

    def _before_train(self):
        self._saved_at = self.global_step  # no step was made: nothing new to save
        if self._saved_at:
            self.last_path = str(self._logdir / f"model-{self._saved_at}")
            self._steps.add(self._saved_at)
        self._handlers.enter_context(on_stop(self._on_signal, self.close_input))
        if self._chief:
            self._check_space()

    def _check_space(self) -> None:
        """Raises UserError if the first checkpoint cannot fit on the disk."""
        needed = sum(v.shape.num_elements() * v.dtype.size for v in tf.global_variables())
        with contextlib.suppress(OSError):  # a disk that does not tell
            free = shutil.disk_usage(self._logdir).free
            if free < needed:
                raise UserError(
                    f"a checkpoint takes {needed / 1e6:.1f} MB, but the disk of {self._logdir} has {free / 1e6:.1f} MB "
                    "free: make room, or give another --logdir"
                )

    def _on_signal(self, number: int) -> None:
        if self.stop_signal is not None:
            if number != signal.SIGINT:  # again, from a scheduler as well as from the launcher
                return
            raise KeyboardInterrupt
        self.stop_signal = number
        if self._chief:
            logger.warning(f"{signal.Signals(number).name}: saving a checkpoint after this step, then stopping")

    def close_input(self) -> None:
        """Ends a step that waits for images; images that are already there are still used.

        Not in a job of several ranks, which must all complete the same step.
        """
        if self.close_op is not None and not hasattr(self.trainer, "any_rank"):
            with contextlib.suppress(tf.errors.OpError, RuntimeError):
                self.trainer.sess.run(self.close_op)

    def on_end_of_input(self, error: Exception) -> None:
        """A step found no images: saves what was trained; ends training if a signal or the input's error explain it."""
        self.save()
        if self.stop_signal is not None or self.input_error() is not None:
            raise StopTraining("no input")

    def _after_train(self):
        self._handlers.close()

    def _before_run(self, _):
        asked = 1.0 if self.stop_signal is not None else 0.5 if self._end_asked else 0.0
        return tf.train.SessionRunArgs(self._any_signalled, {self._signalled: asked})

    def _after_run(self, _, run_values):
        self._stop, self.ends_early = run_values.results > 0.75, 0.25 < run_values.results < 0.75

    def end_early(self) -> None:
        """All ranks stop after the same step, one of the next, and `ends_early` is then set."""
        self._end_asked = True

    def save(self) -> None:
        step = self.global_step
        if self._chief and self._saved_at != step:
            meta = {**self._meta, "step": step, "smooth": without_nan(self._log.smooth)}
            meta |= {key: value for key, value in self._scores.description(step).items() if value is not None}
            with self._log.writing(f"checkpoint {self._logdir}/model-{step}"):
                in_use = self._scores.pending
                self.last_path = save_tf_checkpoint(
                    self._writer, self.trainer.sess, self._logdir, step, meta, self._keep, in_use
                )
            self._saved_at = step
            self._steps.add(step)

    def describe(self, since: int) -> None:
        """Updates the evaluations in the descriptions of this run's checkpoints from step `since` on."""
        for step in sorted(s for s in self._steps if s >= since):
            prefix = self._logdir / f"model-{step}"
            with self._log.writing(f"the description of {prefix}"):
                update_description(prefix, self._scores.description(step))

    def _trigger_step(self):
        step = self.global_step
        if self.evaluates_at(step) and not self.ends_early:
            self._scores.begin(step)
        if self._stop:
            self.stop_signal = self.stop_signal or signal.SIGTERM
            self.save()
            raise StopTraining("signal")
        regular = self._interval and step % self._interval == 0
        if step >= self._plan.total_steps or regular or self.evaluates_at(step) or self.ends_early:
            self.save()


class StopAtEnd(Callback):
    """Ends training at the plan's last step, also in the middle of tensorpack's epoch."""

    _chief_only = False

    def __init__(self, plan: TrainingPlan):
        self._plan = plan
        self.reached = False

    def _before_train(self):
        self._trigger_step()  # a run may go on after its last step for an evaluation alone

    def _trigger_step(self):
        if self.global_step >= self._plan.total_steps:
            self.reached = True
            raise StopTraining("finished")


class LoadWeights(SessionInit):
    """Runs the given function on the session once its variables are initialised."""

    def __init__(self, load: Callable[[Any], None]):
        self._load = load

    def _run_init(self, sess):
        self._load(sess)


class OrderedInput(QueueInput):
    """Replicas take their batches in the order of their numbers, so that the same step is the same computation."""

    _taken: Any = None

    def _create_ema_callback(self):
        return Callback()  # tensorpack's averages the queue's length in every step, which nothing reads

    def _get_input_tensors(self):
        with tf.control_dependencies([] if self._taken is None else [self._taken]):
            tensors = super()._get_input_tensors()
        self._taken = tensors[0].op
        return tensors


class WatchedDataflow(DataFlow):
    """Stores the exception that ends the input, which tensorpack's thread would only log, tells a clock of each batch
    that is in the queue, keeps the first ones, and holds each until the step that it belongs to is done."""

    def __init__(self, dataflow: Any, clock: InputClock, keep: int):
        self._dataflow, self._clock = dataflow, clock
        self.keep, self.first = keep, []
        self.held: deque[list[Any]] = deque()
        self.error: BaseException | None = None

    def reset_state(self):
        self._dataflow.reset_state()

    def __len__(self):
        return len(self._dataflow)

    def __iter__(self):
        try:
            for batch in self._dataflow:
                if self.keep > 0:
                    self.keep -= 1
                    self.first.append(batch)
                self.held.append(batch)
                yield batch
                self._clock.batch_arrives()  # tensorpack's thread asks for the next one: this one is in the queue
        except BaseException as e:
            if not isinstance(e, GeneratorExit):
                self.error = e
            raise


# ------------------------------------------------------------------------------------------------------------- running
def run_training(
    cfg: Config,
    plan: TrainingPlan,
    dataflow: Any,
    keys: list[str],
    devices: list[str],
    trainer: Any,
    logdir: Path,
    meta: dict[str, Any],
    load: Callable[[Any], None],
    describe_batches: Callable[[int], list[list[dict[str, Any]]]],
    shard: tuple[int, int],
    build_evaluation: Callable[[], Callable] | None,
    scores: Scores,
    before: dict[str, Any] | None = None,
) -> str:
    """Trains to the plan's end and saves the model; returns why the scores ended the run earlier, or "".

    load(sess) assigns weights (and, when resuming, momentum and step); describe_batches(step) says for each batch of
    this process in the step which images it has; shard: (rank, number of ranks); scores: the run's evaluations; before:
    the description of the checkpoint that is continued. Raises Interrupted after a signal, or the error that ended
    training before the plan's end.
    """
    with tracking(cfg, logdir, trainer.is_chief) as trackers, training_graph():
        return _run_in_graph(
            cfg, plan, dataflow, keys, devices, trainer, logdir, meta, load, describe_batches, shard, build_evaluation,
            scores, trackers, before or {},
        )  # fmt: skip


def build_graph(
    cfg: Config, plan: TrainingPlan, dataflow: Any, keys: list[str], devices: list[str], trainer: Any
) -> tuple[DetectionModel, QueueInput]:
    """Builds the training graph in the default graph: the model, and the queue through which batches come."""
    allow_tf32(cfg.TRAIN.TF32)
    make_deterministic(cfg.TRAIN.DETERMINISTIC)
    tf.set_random_seed(cfg.TRAIN.SEED)
    model = DetectionModel(cfg, plan, keys)
    capacity = max(2, 2 * len(devices))
    types = [INPUT_TYPES[k][0] for k in keys]
    source = OrderedInput(dataflow, tf.FIFOQueue(capacity, types, name="input_queue"))
    trainer.setup_graph(model.get_input_signature(), source, model.build_graph, model.get_optimizer)
    if cfg.TRAIN.DETERMINISTIC and (op := without_fixed_order(trainer.train_op)) is not None:
        raise UserError(
            f"setting TRAIN.DETERMINISTIC=True: GPUs have no deterministic kernel for {op.type} ({op.name}); use "
            "another backbone or head, or set it to False, with which CPUs are deterministic too"
        )
    do_not_fold_initial_values([*tf.global_variables(), *tf.local_variables()])
    model.stats["gradient_norm"] = model.guard.norm
    return model, source


class RunSession(tf.train.SessionCreator):
    """Makes the session of a run, with variables that have their initial values. Its number of threads determines the
    order of sums on the CPU."""

    def __init__(self, devices: list[str]):
        self.config = session_config(sum(d.startswith("/cpu") for d in devices) or 1)

    def create_session(self) -> Any:
        sess = tf.Session(config=self.config)
        # All of them are made before the first is run: a session takes in additions to a large graph slowly. The first
        # run of any operation takes a good part of a second.
        steps = [tf.variables_initializer(v) for v in (tf.global_variables(), tf.local_variables()) if v]
        if tables := tf.get_collection(tf.GraphKeys.TABLE_INITIALIZERS):  # of a backbone or head of the user's own
            steps.append(tf.group(*tables))
        for step in steps:
            sess.run(step)
        return sess


def _run_in_graph(
    cfg, plan, dataflow, keys, devices, trainer, logdir, meta, load, describe_batches, shard, build_evaluation, scores,
    trackers, before,
):  # fmt: skip
    chief = trainer.is_chief
    clock = InputClock(len(devices))
    per_step = len(devices) * plan.accumulation
    watched = WatchedDataflow(
        dataflow, clock, min(per_step, -(-cfg.TRAIN.PICTURES // plan.images_per_replica)) if chief else 0
    )

    def first_pictures(step: int) -> dict[str, Path]:
        batches, watched.first = watched.first, []
        return show_batches(logdir, step, [dict(zip(keys, batch)) for batch in batches], cfg)

    model, source = build_graph(cfg, plan, watched, keys, devices, trainer)

    def worker_pids() -> Sequence[int]:
        return getattr(dataflow, "worker_pids", ())

    gpus = sum("gpu" in d for d in devices)
    meter = Meter(plan.total_batch, plan.total_steps, cfg.DATA.NUM_WORKERS, worker_pids, gpus)
    recorder = IncidentRecorder(
        cfg, plan, model, logdir, meta, watched.held, describe_batches, shard, before.get("incidents")
    )
    log = ProgressLog(model, plan, logdir, chief, meter, clock, first_pictures, trackers, before.get("smooth"))
    checkpoints = Checkpoints(cfg, plan, logdir, meta, log, chief, scores)
    checkpoints.close_op, checkpoints.input_error = source.thread.close_op, lambda: watched.error
    trainer.on_end_of_input = checkpoints.on_end_of_input
    trainer.on_batches = clock.run_begins
    callbacks = [recorder, log, checkpoints, TellPace(cfg, plan)]
    evaluation = None
    if build_evaluation is not None and plan.evaluate_every:
        evaluation = PeriodicEvaluation(cfg, plan, logdir, build_evaluation, log, checkpoints, scores, shard[1])
        checkpoints.evaluates_at = evaluation.due
        callbacks.append(evaluation)
    else:
        scores.pending.clear()
    end = StopAtEnd(plan)
    callbacks.append(end)
    creator = RunSession(devices)
    trainer.train(callbacks, [], creator, LoadWeights(load), sys.maxsize, 1, 1)
    stopped = evaluation.stopped if evaluation is not None else ""
    if not end.reached and not stopped:
        if checkpoints.stop_signal is not None:
            raise Interrupted(checkpoints.stop_signal)
        raise watched.error or RuntimeError(f"training ended before its last step, {plan.total_steps}")
    if chief and not Path(f"{checkpoints.last_path}.index").exists():
        raise UserError(f"the last checkpoint, {checkpoints.last_path}, is no longer there")
    return stopped
