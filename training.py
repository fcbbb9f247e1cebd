"""Training: the plan (learning rate and length of a run), the optimiser, tensorpack trainers and callbacks.

The graph holds everything that decides an update (rate, sampling seeds, loss scale) as a function of the global step
and of the batch, so that a resumed run continues exactly as the uninterrupted one would.
"""

import dataclasses
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from common import UserError, logger, visible_gpus
from config import Config
from model_rcnn import build_training
from model_syncbn import batch_statistics, collective_sum
from utils.tf_v1 import tf

# isort: split
from tensorpack import ModelDesc, QueueInput, SimpleTrainer, SyncMultiGPUTrainerReplicated
from tensorpack.callbacks import Callback
from tensorpack.callbacks.steps import MaintainStepCounter
from tensorpack.dataflow import DataFlow
from tensorpack.graph_builder.training import SyncMultiGPUReplicatedBuilder
from tensorpack.graph_builder.utils import (
    merge_grad_list,
    override_to_local_variable,
    split_grad_list,
)
from tensorpack.tfutils.sesscreate import NewSessionCreator
from tensorpack.tfutils.sessinit import SessionInit
from tensorpack.train.base import StopTraining
from tensorpack.utils import logger as tensorpack_logger

from utils import ranks
from utils.checkpoint import AVERAGE_PREFIX, save_tf_checkpoint

__all__ = ["Interrupted", "TrainingPlan", "make_plan", "run_training", "session_config"]

# What fails is raised and reported once, by train.py; tensorpack's own report of it misuses the logging module.
tensorpack_logger._logger.setLevel("CRITICAL")


# ----------------------------------------------------------------------------------------------------------- the plan
@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What the settings become for a number of replicas and images."""

    replicas: int
    images_per_replica: int
    accumulation: int
    base_lr: float
    warmup_steps: int
    warmup_lr: float
    milestones: list[int]  # steps at which the rate drops tenfold
    total_steps: int
    images_per_epoch: int
    # Of a cosine schedule: the step at which it ends (TRAIN.MAX_STEPS may end the run before), and the rate there.
    cosine_end: int | None = None
    final_lr: float = 0.0

    @property
    def total_batch(self) -> int:
        return self.replicas * self.images_per_replica * self.accumulation

    def epochs(self, steps: int) -> float:
        return steps * self.total_batch / max(self.images_per_epoch, 1)

    def learning_rate(self, step: int) -> float:
        """The rate of the update that makes step `step` + 1; the graph's `learning_rate_tensor` equals it."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * step / self.warmup_steps
        if self.cosine_end is not None:
            # (1 + cos(pi * done)) / 2 = sin(pi / 2 * left)^2, which float32 knows as well near the end.
            left = max(self.cosine_end - step, 0) / self.cosine_steps
            return self.final_lr + (self.base_lr - self.final_lr) * math.sin(math.pi / 2 * left) ** 2
        return self.base_lr * 0.1 ** sum(step >= m for m in self.milestones)

    @property
    def cosine_steps(self) -> int:
        return max(self.cosine_end - self.warmup_steps, 1)

    def table(self, cfg: Config) -> str:
        """What the settings become: as they are written, for a total batch of 8, and in this run."""
        train = cfg.TRAIN
        parts = f"{self.replicas} replicas x {self.images_per_replica} images x {self.accumulation} accumulated"
        drops = ", ".join(f"{m} (epoch {self.epochs(m):.1f})" for m in self.milestones) or "none"
        curve = ["rate / 10 at", str(train.LR_SCHEDULE[:-1]), drops]
        if self.cosine_end is not None:
            end = f"to {self.final_lr:.6g} at {self.cosine_end} (epoch {self.epochs(self.cosine_end):.1f})"
            last = f", {self.learning_rate(self.total_steps - 1):.6g} in the last step"
            curve = ["cosine", f"to {train.LR_FINAL * train.BASE_LR:.6g} at {train.LR_SCHEDULE[-1]}", end]
            curve[2] += last * (self.total_steps < self.cosine_end)
        length = f"{self.total_steps} steps = {self.epochs(self.total_steps):.1f} epochs"
        return tabulate(
            [
                ["total batch", "8", f"{parts} = {self.total_batch}"],
                ["learning rate", f"{train.BASE_LR:.6g}", f"{self.base_lr:.6g}"],
                [
                    "warm-up",
                    f"{train.WARMUP} steps from {train.WARMUP_INIT_LR:.6g}",
                    f"{self.warmup_steps} steps from {self.warmup_lr:.6g}",
                ],
                curve,
                ["length", f"{train.LR_SCHEDULE[-1]} steps", length],
            ],
            headers=["", "settings", f"this run (TRAIN.LR_SCALING={train.LR_SCALING})"],
            tablefmt="simple",
            disable_numparse=True,
        )

    def warning(self, cfg: Config) -> str | None:
        """What is probably not meant; a run that TRAIN.MAX_STEPS cuts short is."""
        end = min([*self.milestones, self.total_steps])
        if self.warmup_steps < end or cfg.TRAIN.MAX_STEPS is not None:
            return None
        return (
            f"TRAIN.WARMUP={self.warmup_steps} reaches to step {end}, where the rate falls or the run ends, so that "
            "the learning rate is never reached: lower it, or use fewer replicas"
        )


def make_plan(cfg: Config, replicas: int, images_per_epoch: int) -> TrainingPlan:
    """Scales the schedule, which is written for a total batch of 8, to the batch at hand (Goyal et al. 2017)."""
    train = cfg.TRAIN
    at_once = replicas * train.BATCH_SIZE_PER_GPU
    total = train.TOTAL_BATCH or at_once * train.ACCUMULATION
    if total % at_once:
        near = ", ".join(str(k * at_once) for k in (total // at_once, total // at_once + 1) if k)
        raise UserError(
            f"setting TRAIN.TOTAL_BATCH={total} is no multiple of {replicas} replicas x {train.BATCH_SIZE_PER_GPU} "
            f"images: use another number of replicas, TRAIN.BATCH_SIZE_PER_GPU, or a total batch of {near}"
        )
    factor = total / 8.0 if train.LR_SCALING == "linear" else 1.0
    milestones = [max(1, math.ceil(m / factor)) for m in train.LR_SCHEDULE]
    steps = milestones[-1] if train.MAX_STEPS is None else min(milestones[-1], train.MAX_STEPS)
    cosine = train.LR_POLICY == "cosine"
    return TrainingPlan(
        replicas=replicas,
        images_per_replica=train.BATCH_SIZE_PER_GPU,
        accumulation=total // at_once,
        base_lr=train.BASE_LR * factor,
        warmup_steps=train.WARMUP,
        warmup_lr=train.WARMUP_INIT_LR * min(factor, 1.0),
        milestones=[] if cosine else [m for m in milestones[:-1] if m < steps],
        total_steps=steps,
        images_per_epoch=images_per_epoch,
        cosine_end=milestones[-1] if cosine else None,
        final_lr=train.LR_FINAL * train.BASE_LR * factor,
    )


def learning_rate_tensor(plan: TrainingPlan, step):
    """float32 scalar for the global step (a scalar tensor), as `TrainingPlan.learning_rate`."""
    step = tf.cast(step, tf.float32)
    ramp = plan.warmup_lr + (plan.base_lr - plan.warmup_lr) * step / max(plan.warmup_steps, 1)
    if plan.cosine_end is not None:
        left = tf.maximum(plan.cosine_end - step, 0.0) / plan.cosine_steps
        rate = plan.final_lr + (plan.base_lr - plan.final_lr) * tf.square(tf.sin(math.pi / 2 * left))
    else:
        drops = tf.add_n([tf.cast(step >= m, tf.float32) for m in plan.milestones] or [tf.zeros([])])
        rate = plan.base_lr * tf.pow(0.1, drops)
    return tf.where_v2(step < plan.warmup_steps, ramp, rate)


# ---------------------------------------------------------------------------------------------------------- optimiser
def average_decay_tensor(decay: float, step):
    """Decay of the weights' moving averages in the update that makes step `step` + 1: lower at the beginning of a run,
    so that the averages follow the fast changes there."""
    step = tf.cast(step, tf.float32)
    return tf.minimum(decay, (1 + step) / (10 + step))


def moving_averages(variables: list) -> list[tuple[Any, Any]]:
    """[(moving average, variable)] of the variables, and of the statistics of batch norms that are being updated.

    Statistics are averaged like the weights, since they belong to them; those of frozen norms never change.
    """
    if tf.get_collection(tf.GraphKeys.UPDATE_OPS):
        variables = [
            *variables,
            *(v for v in tf.global_variables() if re.search(r"/bn/(mean|variance)/EMA$", v.op.name)),
        ]
    with tf.variable_scope(tf.VariableScope(reuse=False, name=""), auxiliary_name_scope=False):
        names = [AVERAGE_PREFIX + v.op.name for v in variables]
        return [
            (tf.get_variable(n, v.shape, v.dtype.base_dtype, tf.zeros_initializer(), trainable=False), v)
            for n, v in zip(names, variables)
        ]


class DetectionOptimizer(tf.train.MomentumOptimizer):
    """SGD with momentum on averaged gradients, after: loss-scale removal, weight decay on weights "W", clipping.

    Weight decay acts on the gradient, which equals an L2 term in the loss without the cost of evaluating one. With
    `loss_scale` (float16) an update whose gradients are not finite is skipped and the scale halves; it doubles after
    2000 good updates (Micikevicius et al. 2018, section 3.2).
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, learning_rate, momentum, weight_decay, clip_norm, loss_scale, average_decay=None):
        """average_decay: decay of the moving averages of the weights (a scalar tensor), None for none."""
        super().__init__(learning_rate, momentum)
        self._weight_decay = weight_decay
        self._clip_norm = clip_norm
        self._dynamic_scale = loss_scale
        self._average_decay = average_decay
        self._averages = None
        self._scale_variables = None
        self._scale_updated = False

    def _scale(self):
        if self._scale_variables is None:
            with tf.variable_scope(tf.VariableScope(reuse=False, name=""), auxiliary_name_scope=False):
                self._scale_variables = (
                    tf.get_variable("loss_scale", [], tf.float32, tf.constant_initializer(2.0**15), trainable=False),
                    tf.get_variable("loss_scale_good", [], tf.int32, tf.zeros_initializer(), trainable=False),
                )
        return self._scale_variables

    def compute_gradients(self, loss, **kwargs):
        if not self._dynamic_scale:
            return super().compute_gradients(loss, **kwargs)
        scale = self._scale()[0].read_value()
        pairs = super().compute_gradients(loss * scale, **kwargs)
        return [(None if g is None else g / scale, v) for g, v in pairs]

    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        pairs = [(tf.convert_to_tensor(g), v) for g, v in grads_and_vars]
        averages = []
        if self._average_decay is not None and self._averages is None:  # one copy: the first replica's
            averages = self._averages = moving_averages([v for _, v in pairs])

        def update(name=None):
            done = super(DetectionOptimizer, self).apply_gradients(self._processed(pairs), global_step, name)
            with tf.control_dependencies([done]):
                shares = [tf.cast(1 - self._average_decay, a.dtype) for a, _ in averages]
                changes = [a.assign_sub(s * (a - v.read_value())) for s, (a, v) in zip(shares, averages)]
            return tf.group(*changes) if changes else done

        if not self._dynamic_scale:
            return update(name)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g, _ in pairs])
        self._create_slots([v for _, v in pairs])  # variables must not be created inside a conditional

        ops = [tf.cond(finite, update, tf.no_op)]
        if not self._scale_updated:  # replicas see the same gradients: the first one adapts the common scale
            self._scale_updated = True
            scale, good = self._scale()
            enough = good + 1 >= self.GROWTH_INTERVAL
            grown = tf.where_v2(enough, tf.minimum(scale * 2, 2.0**24), scale)
            new_scale = tf.where_v2(finite, grown, tf.maximum(scale * 0.5, 1.0))
            new_good = tf.where_v2(tf.logical_and(finite, tf.logical_not(enough)), good + 1, 0)
            with tf.control_dependencies([new_scale, new_good]):
                ops += [scale.assign(new_scale), good.assign(new_good)]
        return tf.group(*ops, name=name)

    def _processed(self, pairs):
        if self._weight_decay:
            pairs = [(g + self._weight_decay * v if v.op.name.endswith("/W") else g, v) for g, v in pairs]
        if self._clip_norm:
            clipped, _ = tf.clip_by_global_norm([g for g, _ in pairs], self._clip_norm)
            pairs = list(zip(clipped, [v for _, v in pairs]))
        return pairs


# --------------------------------------------------------------------------------------------------- model description
_INPUT_TYPES = {
    "image": (tf.uint8, [None, None, 3]),
    "image_shape": (tf.int32, [2]),
    "image_seed": (tf.int32, []),
    "gt_boxes": (tf.float32, [None, 4]),
    "gt_labels": (tf.int32, [None]),
    "gt_is_crowd": (tf.bool, [None]),
    "gt_edges": (tf.float32, [None, None, 4]),
    "gt_keypoints": (tf.float32, [None, None, 3]),
    "class_verified": (tf.bool, [None]),
}


class DetectionModel(ModelDesc):
    """tensorpack's view of the model: its inputs, its cost on a replica, its optimiser."""

    def __init__(self, cfg: Config, plan: TrainingPlan, keys: list[str]):
        self._cfg, self._plan, self._keys = cfg, plan, keys
        self.losses: dict[str, Any] = {}  # of the first replica
        self.stats: dict[str, Any] = {}

    def inputs(self):
        images = self._plan.images_per_replica
        return [tf.TensorSpec([images, *_INPUT_TYPES[k][1]], _INPUT_TYPES[k][0], k) for k in self._keys]

    def build_graph(self, *tensors):
        with batch_statistics(self._sum_over_replicas()):
            losses, stats = build_training(dict(zip(self._keys, tensors)), self._cfg)
        frozen = freeze_variables(self._cfg.TRAIN.FREEZE_PATTERN)
        if frozen and not self.losses:
            logger.info(f"{len(frozen)} variables match TRAIN.FREEZE_PATTERN and are not trained")
        tower = tf.get_default_graph().get_name_scope()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS, f"{tower}/" if tower else None)):
            total = tf.add_n(list(losses.values()), name="total_loss")
        if not self.losses:
            self.losses = {**losses, "total_loss": total}
            self.stats = stats
        return total

    def _sum_over_replicas(self) -> Callable[[Any], Any]:
        """How SyncBN adds up over replicas: processes, or devices of this process."""
        if self._plan.replicas == 1:
            return lambda x: x
        if self._cfg.TRAINER == "horovod":
            hvd = ranks.horovod()
            return lambda x: hvd.allreduce(x, op=hvd.Sum)
        return collective_sum(self._plan.replicas)

    def optimizer(self):
        train = self._cfg.TRAIN
        step = tf.train.get_or_create_global_step()
        rate = learning_rate_tensor(self._plan, step)
        self.stats["learning_rate"] = rate
        return DetectionOptimizer(
            rate, train.MOMENTUM, train.WEIGHT_DECAY, train.GRADIENT_CLIP, train.PRECISION == "float16",
            average_decay_tensor(train.EMA_DECAY, step) if train.EMA_DECAY else None,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ trainers
class _Accumulation:
    """Mixin for trainers: `accumulation` micro-batches make one update from the mean of their gradients."""

    accumulation = 1

    def _make_get_grad_fn(self, input, get_cost_fn, get_opt_fn):
        gradients_of_tower = super()._make_get_grad_fn(input, get_cost_fn, get_opt_fn)
        self._accumulators, self._accumulate_ops = [], []

        def averaged():
            pairs = gradients_of_tower()
            if self.accumulation == 1:
                return pairs
            out = []
            for gradient, variable in pairs:
                # Not by get_variable, which inside a replica would take it for a copy of one of the first replica's.
                total = tf.Variable(
                    tf.zeros(variable.shape, variable.dtype.base_dtype), trainable=False,
                    collections=[tf.GraphKeys.LOCAL_VARIABLES], name="accumulated",
                )  # fmt: skip
                self._accumulators.append(total)
                self._accumulate_ops.append(total.assign_add(gradient))
                out.append(((total.read_value() + gradient) * (1.0 / self.accumulation), variable))
            return out

        return averaged

    def _setup_graph(self, input, get_cost_fn, get_opt_fn):
        callbacks = super()._setup_graph(input, get_cost_fn, get_opt_fn)
        if self.accumulation > 1:
            self._accumulate = tf.group(*self._accumulate_ops)
            with tf.control_dependencies([self.train_op]):
                self.train_op = tf.group(*[a.assign(tf.zeros_like(a)) for a in self._accumulators])
        return callbacks

    def setup_callbacks(self, callbacks, monitors):
        super().setup_callbacks(callbacks, monitors)
        # The step is counted in the session run that makes it: not before the update, which depends on it, is done.
        counter = next(c for c in self._callbacks.cbs if isinstance(c, MaintainStepCounter))
        counter.gs_incr_op._add_control_input(self.train_op)

    def run_step(self):
        for _ in range(self.accumulation - 1):
            self.sess.run(self._accumulate)
        self.hooked_sess.run(self.train_op)


class SingleTrainer(_Accumulation, SimpleTrainer):
    """One replica: the CPU or one GPU."""


def _mean_over_devices(gradients, variables, devices):
    """gradients[device][i] of variables[i] -> their means over devices, each taken on the device that adds up least.

    With every tensor sent to the device that adds it up and its mean sent back, a device moves as many bytes as in a
    ring; on logical CPU devices this is faster than the ring of CollectiveReduce and needs less memory.
    """
    sizes = [v.shape.num_elements() for v in variables]
    means, load = [None] * len(sizes), [0] * len(devices)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = load.index(min(load))
        load[least] += sizes[i]
        with tf.device(devices[least]):
            means[i] = tf.add_n([tower[i] for tower in gradients]) * (1.0 / len(devices))
    return means


class _ReplicatedBuilder(SyncMultiGPUReplicatedBuilder):
    """Replicas on named devices, so that the same code runs on GPUs and on logical CPU devices."""

    def __init__(self, devices):
        self._device_names = devices
        super().__init__(list(range(len(devices))), True, "gpu")

    def call_for_each_tower(self, tower_fn):
        own = [False] + [True] * (len(self.towers) - 1)
        return self.build_on_towers(self.towers, tower_fn, self._device_names, own)

    def build(self, grad_list, get_opt_fn):
        all_grads, all_vars = split_grad_list(grad_list)
        mean = _mean_over_devices(all_grads, all_vars[0], self._device_names)
        self.grads = merge_grad_list([mean] * len(self.towers), all_vars)
        optimizer = get_opt_fn()
        updates = []
        for index, pairs in enumerate(self.grads):
            with tf.device(self._device_names[index]), override_to_local_variable(enable=index > 0):
                updates.append(optimizer.apply_gradients(pairs, name=f"apply_gradients_{index}"))
        with tf.name_scope("sync_variables"):
            synchronise = self.get_post_init_ops()
        return tf.group(*updates, name="train_op"), synchronise


class ReplicatedTrainer(_Accumulation, SyncMultiGPUTrainerReplicated):
    """N replicas on one machine, each with its own copy of the variables."""

    def __init__(self, devices: list[str]):
        super().__init__(len(devices))
        self._builder = _ReplicatedBuilder(devices)
        # Copies start equal and get equal updates; statistics of frozen norms never change.
        self.BROADCAST_EVERY_EPOCH = False


def _horovod_trainer():
    from tensorpack import HorovodTrainer

    class DistributedTrainer(_Accumulation, HorovodTrainer):
        """One replica per process; rank 0's variables, momentum and step included, are everybody's at the start."""

        def initialize(self, session_creator, session_init):
            # As tensorpack's, which asks TensorFlow 2 for functions it no longer has.
            self._num_global_variables = len(tf.global_variables())
            self._broadcast_op = self.hvd.broadcast_global_variables(0)
            ranks.use_own_gpu(session_creator.config)
            super(HorovodTrainer, self).initialize(session_creator, session_init)

        def any_rank(self, flag):
            """A float scalar -> its maximum over all ranks."""
            return self.hvd.allreduce(flag, op=self.hvd.Max)

    ranks.horovod()
    trainer = DistributedTrainer()
    trainer.BROADCAST_EVERY_EPOCH = False
    return trainer


def make_trainer(cfg: Config, plan: TrainingPlan, devices: list[str]):
    """The trainer for TRAINER and the devices of this process."""
    if cfg.TRAINER == "horovod":
        trainer = _horovod_trainer()
    else:
        trainer = SingleTrainer() if len(devices) == 1 else ReplicatedTrainer(devices)
    trainer.accumulation = plan.accumulation
    return trainer


def local_devices(cfg: Config) -> list[str]:
    """Devices of this process's replicas: its GPUs, else TRAIN.CPU_REPLICAS logical CPU devices."""
    gpus = visible_gpus()
    if cfg.TRAINER == "horovod":
        return ["/gpu:0" if gpus else "/cpu:0"]
    if gpus:
        return [f"/gpu:{i}" for i in range(gpus)]
    return [f"/cpu:{i}" for i in range(cfg.TRAIN.CPU_REPLICAS)]


def session_config(cpu_devices: int = 1) -> Any:
    config = tf.ConfigProto(allow_soft_placement=True)
    config.gpu_options.allow_growth = True
    config.device_count["CPU"] = cpu_devices
    return config


# ----------------------------------------------------------------------------------------------------------- callbacks
class Interrupted(Exception):
    """Training stopped by a signal after its checkpoint was written; carries the signal's number."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)


class ProgressLog(Callback):
    """Fetches losses and stats with each step, stops on NaN, prints progress with ETA, writes TensorBoard and jsonl."""

    _chief_only = False

    def __init__(
        self, model: DetectionModel, plan: TrainingPlan, logdir: Path, describe_batch: Callable[[int], str], chief: bool
    ):
        self._model, self._plan, self._logdir = model, plan, logdir
        self._describe_batch = describe_batch
        self._chief = chief
        self._smooth: dict[str, float] = {}
        self._last_print = 0.0
        self._step_time = None
        self._bar = None

    def _before_train(self):
        self._first_step = self.global_step
        self._started = self._last_time = time.time()
        if self._chief:
            self._writer = tf.summary.FileWriter(str(self._logdir))
            if sys.stderr.isatty():
                import tqdm

                self._bar = tqdm.tqdm(
                    total=self._plan.total_steps, initial=self._first_step, unit="step", dynamic_ncols=True
                )

    def _before_run(self, _):
        return tf.train.SessionRunArgs({**self._model.losses, **self._model.stats})

    def _after_run(self, _, run_values):
        self._values = {k: float(v) for k, v in run_values.results.items()}

    def _trigger_step(self):
        values, step = self._values, self.global_step
        bad = [k for k in self._model.losses if not math.isfinite(values[k])]
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is {values[bad[0]]} at step {step}; images of the batch: {self._describe_batch(step)}. "
                "Lower TRAIN.BASE_LR, lengthen TRAIN.WARMUP, set TRAIN.GRADIENT_CLIP, or check these images"
            )
        if not self._chief:
            return
        now = time.time()
        seconds, self._last_time = now - self._last_time, now
        if step - self._first_step > 1:  # the first step includes TensorFlow's graph optimisation
            self._step_time = seconds if self._step_time is None else 0.95 * self._step_time + 0.05 * seconds
        else:
            logger.info(f"first step after {now - self._started:.1f} s")
        for key, value in values.items():
            self._smooth[key] = value if key not in self._smooth else 0.95 * self._smooth[key] + 0.05 * value
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if step % 5 == 0:
                self._bar.set_postfix_str(f"loss {self._smooth['total_loss']:.3f}", refresh=False)
        elif now - self._last_print > (5 if now - self._started < 60 else 30) or step == self._plan.total_steps:
            self._last_print = now
            logger.info(self._line(step))
        if step % 20 == 0 or step == self._plan.total_steps:
            self._write(step, {**self._smooth, "learning_rate": values["learning_rate"]})

    def _line(self, step: int) -> str:
        total = self._plan.total_steps
        losses = " ".join(
            f"{k.replace('_loss', '')} {self._smooth[k]:.3f}" for k in self._model.losses if k != "total_loss"
        )
        pace = self._step_time
        eta = "" if pace is None else f" · {pace:.2f} s/step · ETA {format_seconds(pace * (total - step))}"
        return f"step {step}/{total}{eta} · loss {self._smooth['total_loss']:.3f} = {losses}"

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Evaluation results into TensorBoard and the jsonl log."""
        if self._chief:
            self._write(step, {k: float(v) for k, v in metrics.items()})
            self._writer.flush()

    def _write(self, step: int, values: dict[str, float]) -> None:
        summary = tf.Summary(value=[tf.Summary.Value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.add_summary(summary, step)
        with open(self._logdir / "log.jsonl", "a") as f:
            f.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")

    def _after_train(self):
        if self._chief:
            self._writer.close()
        if self._bar is not None:
            self._bar.close()


class Checkpoints(Callback):
    """Saves every CHECKPOINT_PERIOD epochs, at the end, and when a signal asks to stop."""

    _chief_only = False

    def __init__(self, cfg: Config, plan: TrainingPlan, logdir: Path, meta: dict[str, Any], chief: bool):
        self._plan, self._logdir, self._meta, self._chief = plan, logdir, meta, chief
        self._interval = cfg.TRAIN.CHECKPOINT_PERIOD * cfg.TRAIN.STEPS_PER_EPOCH
        self._keep = cfg.TRAIN.KEEP_CHECKPOINTS
        self._saved_at = None
        self._stop = False
        self.stop_signal = None
        self.last_path = None

    def _setup_graph(self):
        # A signal reaches the ranks of a job at different steps; they must stop after the same one.
        self._signalled = tf.placeholder_with_default(0.0, [], "signalled")
        any_rank = getattr(self.trainer, "any_rank", tf.identity)
        self._any_signalled = any_rank(self._signalled)
        self._saver = tf.train.Saver(tf.global_variables(), max_to_keep=0, save_relative_paths=True)

    def _before_train(self):
        def handler(number, _frame):
            if self.stop_signal is not None:
                if number == signal.SIGTERM:  # again, from a scheduler as well as from the launcher
                    return
                raise KeyboardInterrupt
            self.stop_signal = number
            if self._chief:
                logger.warning(f"{signal.Signals(number).name}: saving a checkpoint after this step, then stopping")

        self._old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}

    def _after_train(self):
        for number, old in self._old.items():
            signal.signal(number, old)

    def _before_run(self, _):
        return tf.train.SessionRunArgs(self._any_signalled, {self._signalled: float(self.stop_signal is not None)})

    def _after_run(self, _, run_values):
        self._stop = run_values.results > 0

    def save(self) -> None:
        step = self.global_step
        if self._chief and self._saved_at != step:
            meta = {**self._meta, "step": step}
            self.last_path = save_tf_checkpoint(
                self._saver, self.trainer.sess, self._logdir, step, meta, keep=self._keep
            )
            self._saved_at = step

    def _trigger_step(self):
        step = self.global_step
        if self._stop:
            self.stop_signal = self.stop_signal or signal.SIGTERM
            self.save()
            raise StopTraining("signal")
        if step >= self._plan.total_steps or (self._interval and step % self._interval == 0):
            self.save()


class PeriodicEvaluation(Callback):
    """Runs `evaluate(sess) -> metrics` every EVAL_PERIOD epochs and after the last step."""

    _chief_only = False

    def __init__(self, cfg: Config, plan: TrainingPlan, build: Callable[[], Callable], log: ProgressLog):
        self._plan, self._build, self._log = plan, build, log
        self._interval = cfg.TRAIN.EVAL_PERIOD * cfg.TRAIN.STEPS_PER_EPOCH
        self.metrics: dict[str, float] = {}

    def _setup_graph(self):
        self._evaluate = self._build()

    def _trigger_step(self):
        step = self.global_step
        if step >= self._plan.total_steps or (self._interval and step % self._interval == 0):
            self.metrics = self._evaluate(self.trainer.sess)
            overall = {k: v for k, v in self.metrics.items() if "per_class" not in k}
            self._log.write_metrics(step, overall)
            self._log._last_time = time.time()


class StopAtEnd(Callback):
    """Ends training at the plan's last step, wherever in tensorpack's epoch that is."""

    _chief_only = False

    def __init__(self, plan: TrainingPlan):
        self._plan = plan

    def _trigger_step(self):
        if self.global_step >= self._plan.total_steps:
            raise StopTraining("finished")


class _LoadWeights(SessionInit):
    """Runs the given function on the session once its variables are initialised."""

    def __init__(self, load: Callable[[Any], None]):
        self._load = load

    def _run_init(self, sess):
        self._load(sess)


class _WatchedDataflow(DataFlow):
    """Keeps the exception that ends the input, which tensorpack's thread would only log."""

    def __init__(self, dataflow):
        self._dataflow = dataflow
        self.error: BaseException | None = None

    def reset_state(self):
        self._dataflow.reset_state()

    def __len__(self):
        return len(self._dataflow)

    def __iter__(self):
        try:
            yield from self._dataflow
        except BaseException as e:
            if not isinstance(e, GeneratorExit):
                self.error = e
            raise


def format_seconds(seconds: float) -> str:
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


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
    describe_batch: Callable[[int], str],
    build_evaluation: Callable[[], Callable] | None,
) -> dict[str, float]:
    """Trains to the plan's end; returns the metrics of the last evaluation.

    load(sess) puts weights (and, when resuming, momentum and step) in place. Raises Interrupted after a signal.
    """
    with tf.Graph().as_default():
        return _run_in_graph(
            cfg, plan, dataflow, keys, devices, trainer, logdir, meta, load, describe_batch, build_evaluation
        )


def _run_in_graph(
    cfg, plan, dataflow, keys, devices, trainer, logdir, meta, load, describe_batch, build_evaluation
):  # fmt: skip
    chief = trainer.is_chief
    tf.set_random_seed(cfg.TRAIN.SEED)
    model = DetectionModel(cfg, plan, keys)
    watched = _WatchedDataflow(dataflow)
    capacity = max(2, 2 * len(devices))
    types = [_INPUT_TYPES[k][0] for k in keys]
    queue = tf.FIFOQueue(capacity, types, name="input_queue")
    trainer.setup_graph(model.get_input_signature(), QueueInput(watched, queue), model.build_graph, model.get_optimizer)
    log = ProgressLog(model, plan, logdir, describe_batch, chief)
    checkpoints = Checkpoints(cfg, plan, logdir, meta, chief)
    callbacks = [log, checkpoints]
    evaluation = None
    if build_evaluation is not None and cfg.TRAIN.EVAL_PERIOD:
        evaluation = PeriodicEvaluation(cfg, plan, build_evaluation, log)
        callbacks.append(evaluation)
    callbacks.append(StopAtEnd(plan))
    creator = NewSessionCreator()
    cpu_devices = sum(d.startswith("/cpu") for d in devices) or 1
    creator.config.MergeFrom(session_config(cpu_devices))
    trainer.train(callbacks, [], creator, _LoadWeights(load), sys.maxsize, 1, 1)
    if watched.error is not None:
        raise watched.error
    if checkpoints.stop_signal is not None:
        raise Interrupted(checkpoints.stop_signal)
    return evaluation.metrics if evaluation is not None else {}


def freeze_variables(pattern: str | None) -> list[str]:
    """Removes variables whose names match TRAIN.FREEZE_PATTERN from the trainable ones; returns their names."""
    if not pattern:
        return []
    collection = tf.get_collection_ref(tf.GraphKeys.TRAINABLE_VARIABLES)
    frozen = [v for v in collection if re.search(pattern, v.op.name)]
    collection[:] = [v for v in collection if not re.search(pattern, v.op.name)]
    if not frozen:
        raise UserError(f"setting TRAIN.FREEZE_PATTERN={pattern!r} matches no trainable variable")
    return sorted(v.op.name for v in frozen)
