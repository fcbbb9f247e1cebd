"""Computing an update: the optimiser, the model in tensorpack's form, accumulation, replicas, Horovod.

In the graph, everything that determines an update (rate, sampling seeds, loss scale) is a function of the global step
and the batch, so a resumed run gives exactly the same result as an uninterrupted one.
"""

import contextlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterator
from typing import Any

from common import UserError, logger, visible_gpus
from config import Config
from model_rcnn import INPUT_TYPES, build_training
from model_syncbn import batch_statistics, collective_sum
from training_guard import StepGuard
from training_plan import TrainingPlan
from utils import ranks
from utils.checkpoint import AVERAGE_PREFIX
from utils.tensorpack_import import (
    HorovodTrainer,
    MaintainStepCounter,
    ModelDesc,
    SimpleTrainer,
    SyncMultiGPUReplicatedBuilder,
    SyncMultiGPUTrainerReplicated,
    graph_functions,
    merge_grad_list,
    override_to_local_variable,
    scope_utils,
    split_grad_list,
    summary,
)
from utils.tf_v1 import fast_graph_optimizer, gpu_count, gpu_problem, only_if, tf

__all__ = [
    "DetectionModel", "DetectionOptimizer", "average_decay_tensor", "describe_devices",
    "learning_rate_tensor", "local_devices", "make_trainer", "mean_over_devices", "session_config",
    "training_graph",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- optimiser
def learning_rate_tensor(plan: TrainingPlan, step):
    """The learning rate at the global step (a scalar tensor) as float32 scalar; equals `TrainingPlan.learning_rate`."""
    step = tf.cast(step, tf.float32)
    if plan.rise:
        return plan.warmup_lr * tf.exp(math.log(plan.rise) * step)
    ramp = plan.warmup_lr + (plan.base_lr - plan.warmup_lr) * step / max(plan.warmup_steps, 1)
    if plan.cosine_end is not None:
        left = tf.maximum(plan.cosine_end - step, 0.0) / plan.cosine_steps
        rate = plan.final_lr + (plan.base_lr - plan.final_lr) * tf.square(tf.sin(math.pi / 2 * left))
    else:
        drops = tf.add_n([tf.cast(step >= m, tf.float32) for m in plan.milestones] or [tf.zeros([])])
        rate = plan.base_lr * tf.pow(0.1, drops)
    return tf.where_v2(step < plan.warmup_steps, ramp, rate)


def average_decay_tensor(decay: float, step):
    """Decay of the weights' moving averages in the update that makes step `step` + 1: lower at the beginning of a run,
    so that the averages follow the fast changes there."""
    step = tf.cast(step, tf.float32)
    return tf.minimum(decay, (1 + step) / (10 + step))


def moving_averages(variables: list) -> list[tuple[Any, Any]]:
    """[(moving average, variable)] of the given variables and of batch norm statistics that are updated.

    Statistics are averaged like the weights to which they belong; those of frozen norms never change.
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
    """SGD with momentum on averaged gradients after dividing by the loss scale, weight decay by the kind of variable,
    and clipping. An update that the guard refuses changes nothing.

    Weight decay acts on the gradient, which equals an L2 term in the loss without the cost of evaluating one. With
    `loss_scale` (float16) the scale halves when gradients are not finite; it doubles after 2000 good updates
    (Micikevicius et al. 2018, section 3.2).
    """

    GROWTH_INTERVAL = 2000

    def __init__(
        self, learning_rate, momentum, weight_decay, clip_norm, loss_scale, average_decay=None, guard=None,
        bias_decay=0.0, norm_decay=0.0,
    ):  # fmt: skip
        """average_decay: decay of the weights' moving averages (a scalar tensor); None: no averages. guard: the
        `StepGuard` of the replicas; None: one that knows of no losses. weight_decay is that of weights "W",
        bias_decay that of biases "b", norm_decay that of gamma and beta; None: as weight_decay."""
        super().__init__(learning_rate, momentum)
        self.guard = guard or StepGuard()
        self._rate, self._momentum_factor = learning_rate, momentum
        decays = [weight_decay if d is None else d for d in (weight_decay, bias_decay, norm_decay, norm_decay)]
        self._decays = dict(zip(("W", "b", "gamma", "beta"), decays))  # by the last part of a variable's name
        self._clip_norm = clip_norm
        self._dynamic_scale = loss_scale
        self._average_decay = average_decay
        self._averages = None
        self._scale_variables = None
        self._scale_before = {}  # {name: value before the update}
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
        scale, good = (v.read_value() for v in self._scale())
        self._scale_before = self._scale_before or {"loss_scale": scale, "loss_scale_good": good}
        pairs = super().compute_gradients(loss * scale, **kwargs)
        return [(None if g is None else g / scale, v) for g, v in pairs]

    def apply_gradients(self, grads_and_vars, name=None):
        variables = [v for _, v in grads_and_vars]
        gradients = [self._decayed(tf.convert_to_tensor(g), v) for g, v in grads_and_vars]
        averages = []
        if (
            self._average_decay is not None and self._averages is None
        ):  # averages exist once, made from the first replica's weights
            averages = self._averages = moving_averages(variables)
        self._create_slots(variables)  # variables must not be created inside a conditional
        momenta = [self.get_slot(v, "momentum") for v in variables]
        if self.guard.verdict is None:  # replicas have the same gradients: those of the first one are judged
            pairs = list(zip(gradients, variables))
            self.guard.judge(pairs, momenta, self._momentum_factor, self._rate, self._clip_norm, self._scale_before)

        def update():
            changed = [  # one operation for each variable, as MomentumOptimizer makes among others
                tf.raw_ops.ResourceApplyMomentum(
                    var=v.handle, accum=m.handle, lr=rates[g.dtype], grad=g, momentum=factors[g.dtype]
                )
                for g, m, v in zip(self.guard.clipped(gradients), momenta, variables)
            ]
            with tf.control_dependencies(changed):
                shares = [tf.cast(1 - self._average_decay, a.dtype) for a, _ in averages]
                changes = [a.assign_sub(s * (a - v.read_value())) for s, (a, v) in zip(shares, averages)]
            return [*changes, *changed]

        types = {g.dtype for g in gradients}
        rates = {t: tf.cast(self._rate, t) for t in types}
        factors = {t: tf.constant(self._momentum_factor, t) for t in types}
        ops = [only_if(self.guard.good, update)]
        if self._dynamic_scale and not self._scale_updated:  # the scale is shared by the replicas
            self._scale_updated = True
            scale, good = self._scale()
            finite = self.guard.finite_gradient
            enough = good + 1 >= self.GROWTH_INTERVAL
            grown = tf.where_v2(enough, tf.minimum(scale * 2, 2.0**24), scale)
            new_scale = tf.where_v2(finite, grown, tf.maximum(scale * 0.5, 1.0))
            new_good = tf.where_v2(tf.logical_and(finite, tf.logical_not(enough)), good + 1, 0)
            with tf.control_dependencies([new_scale, new_good]):
                ops += [scale.assign(new_scale), good.assign(new_good)]
        return tf.group(*ops, name=name)

    def _decayed(self, gradient, variable):
        decay = self._decays.get(variable.op.name.rpartition("/")[2], 0.0)
        return gradient + decay * variable if decay else gradient


# --------------------------------------------------------------------------------------------------- model description
def _finite_annotations(batch):
    """The batch with 0 in the place of annotations' numbers that are not finite, since operations on boxes of NaN would
    crash, and a float32 scalar to add to the loss: 0, or the sum of those numbers, which is not finite."""
    finite, bad = {}, tf.constant(0.0)
    for key, value in batch.items():
        if value.dtype.is_floating:
            good, zeros = tf.math.is_finite(value), tf.zeros_like(value)
            bad += tf.reduce_sum(tf.where_v2(good, zeros, value))
            value = tf.where_v2(good, value, zeros)
        finite[key] = value
    return finite, bad


class DetectionModel(ModelDesc):
    """The model in tensorpack's form: its inputs, its cost on a replica, its optimiser."""

    def __init__(self, cfg: Config, plan: TrainingPlan, keys: list[str]):
        self._cfg, self._plan, self._keys = cfg, plan, keys
        self.guard = StepGuard()
        self.losses: dict[str, Any] = {}  # of the first replica
        self.stats: dict[str, Any] = {}

    def inputs(self):
        images = self._plan.images_per_replica
        return [tf.TensorSpec([images, *INPUT_TYPES[k][1]], INPUT_TYPES[k][0], k) for k in self._keys]

    def build_graph(self, *tensors):
        batch, bad = _finite_annotations(dict(zip(self._keys, tensors)))
        with batch_statistics(self._sum_over_replicas(), self._plan.accumulation):
            losses, stats = build_training(batch, self._cfg)
        frozen = freeze_variables(self._cfg.TRAIN.FREEZE_PATTERN)
        if frozen and not self.losses:
            logger.info(f"{len(frozen)} variables match TRAIN.FREEZE_PATTERN and are not trained")
        tower = tf.get_default_graph().get_name_scope()
        with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS, f"{tower}/" if tower else None)):
            total = tf.add(tf.add_n(list(losses.values())), bad, name="total_loss")
        losses = {**losses, "total_loss": total}
        self.guard.add_replica(dict(zip(self._keys, tensors)), losses)
        if not self.losses:
            self.losses, self.stats = losses, stats
        return total

    def _sum_over_replicas(self) -> Callable[[Any], Any]:
        """The function with which SyncBN sums over replicas: processes, or devices of this process."""
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
            average_decay_tensor(train.EMA_DECAY, step) if train.EMA_DECAY else None, self.guard,
            train.WEIGHT_DECAY_BIAS, train.WEIGHT_DECAY_NORM,
        )  # fmt: skip


def freeze_variables(pattern: str | None) -> list[str]:
    """Removes variables whose names match TRAIN.FREEZE_PATTERN from the trainable ones; returns their names.

    Names are those in checkpoints, without the scope of a replica.
    """
    if not pattern:
        return []

    def matches(variable: Any) -> bool:
        return re.search(pattern, re.sub(r"^tower\d+/", "", variable.op.name)) is not None

    collection = tf.get_collection_ref(tf.GraphKeys.TRAINABLE_VARIABLES)
    frozen = [v for v in collection if matches(v)]
    collection[:] = [v for v in collection if not matches(v)]
    if not frozen:
        raise UserError(f"setting TRAIN.FREEZE_PATTERN={pattern!r} matches no trainable variable")
    if not collection:
        raise UserError(f"setting TRAIN.FREEZE_PATTERN={pattern!r} matches every variable; nothing is left to train")
    return sorted(v.op.name for v in frozen)


# ------------------------------------------------------------------------------------------------------------ trainers
class _Accumulation:
    """Mixin for trainers: `accumulation` micro-batches make one update from the mean of their gradients."""

    accumulation = 1
    synchronise: Any = None  # operation that gives all replicas the variables of the first one
    # Called with the error of a step without input; otherwise tensorpack would treat it as the end of training.
    on_end_of_input: Callable[[Exception], None] | None = None
    # Called before each run of the graph that takes a batch for each replica.
    on_batches: Callable[[], None] = staticmethod(lambda: None)

    def _make_get_grad_fn(self, input, get_cost_fn, get_opt_fn):
        gradients_of_tower = super()._make_get_grad_fn(input, get_cost_fn, get_opt_fn)
        self._accumulators, self._accumulate_ops = [], []

        def averaged():
            pairs = gradients_of_tower()
            self._guard = get_opt_fn().guard
            self._guard.any_rank = getattr(self, "any_rank", tf.identity)
            replica = self._guard.replicas[-1]
            replica.gradients = pairs
            if self.accumulation == 1:
                return pairs
            replica.loss_of_step = self._accumulated(replica.loss_of_step, [])
            mean = 1.0 / self.accumulation
            return [(self._accumulated(g, v.shape) * mean, v) for g, v in pairs]

        return averaged

    def _accumulated(self, value, shape):
        """The sum of a tensor over the micro-batches of a step."""
        # Not with get_variable, which inside a replica would treat it as a copy of a variable of the first replica.
        total = tf.Variable(
            tf.zeros(shape, value.dtype.base_dtype), trainable=False, collections=[tf.GraphKeys.LOCAL_VARIABLES],
            name="accumulated",
        )  # fmt: skip
        self._accumulators.append(total)
        self._accumulate_ops.append(total.assign_add(value))
        return total.read_value() + value

    def _setup_graph(self, input, get_cost_fn, get_opt_fn):
        callbacks = super()._setup_graph(input, get_cost_fn, get_opt_fn)
        self.train_op = tf.group(self.train_op, self._guard.settle)
        self.accumulate_op = tf.group(*self._accumulate_ops)
        if self.accumulation > 1:
            with tf.control_dependencies([self.train_op]):
                self.train_op = tf.group(*[a.assign(tf.zeros_like(a)) for a in self._accumulators])
        return callbacks

    def setup_callbacks(self, callbacks, monitors):
        super().setup_callbacks(callbacks, monitors)
        # The step is incremented in the same session run, after the update, which depends on it.
        counter = next(c for c in self._callbacks.cbs if isinstance(c, MaintainStepCounter))
        counter.gs_incr_op._add_control_input(self.train_op)

    def run_step(self):
        try:
            for _ in range(self.accumulation - 1):
                self.on_batches()
                self.sess.run(self.accumulate_op)
            self.on_batches()
            self.hooked_sess.run(self.train_op)
        except (tf.errors.OutOfRangeError, tf.errors.CancelledError) as e:
            if self.on_end_of_input is None:
                raise
            self.on_end_of_input(e)
            raise RuntimeError(f"a step failed: {e}") from e


class SingleTrainer(_Accumulation, SimpleTrainer):
    """One replica: the CPU or one GPU."""


def mean_over_devices(gradients, variables, devices):
    """gradients[device][i] of variables[i] -> their means over devices, each computed on the device with the least work
    so far.

    Each tensor is sent to one device, which sends the mean back. The traffic equals that of a ring; on logical CPU
    devices this is faster than CollectiveReduce's ring and needs less memory.
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
        mean = mean_over_devices(all_grads, all_vars[0], self._device_names)
        self.grads = merge_grad_list([mean] * len(self.towers), all_vars)
        optimizer = get_opt_fn()
        updates = []
        for index, pairs in enumerate(self.grads):
            with tf.device(self._device_names[index]), override_to_local_variable(enable=index > 0):
                updates.append(optimizer.apply_gradients(pairs, name=f"apply_gradients_{index}"))
        with tf.name_scope("sync_variables"):
            synchronise = self.get_post_init_ops()
        self.synchronise = synchronise
        return tf.group(*updates, name="train_op"), synchronise


class ReplicatedTrainer(_Accumulation, SyncMultiGPUTrainerReplicated):
    """N replicas on one machine, each with its own copy of the variables."""

    def __init__(self, devices: list[str]):
        super().__init__(len(devices))
        self._builder = _ReplicatedBuilder(devices)
        # Copies start equal and get equal updates; statistics of frozen norms never change.
        self.BROADCAST_EVERY_EPOCH = False

    @property
    def synchronise(self):
        return self._builder.synchronise


def _horovod_trainer():
    class DistributedTrainer(_Accumulation, HorovodTrainer):
        """One replica per process; at the start all ranks take rank 0's variables, including momentum and step."""

        def initialize(self, session_creator, session_init):
            # Replaces tensorpack's version, which uses functions that TensorFlow 2 no longer has.
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
    """Devices of this process's replicas: its GPUs, else TRAIN.CPU_REPLICAS logical CPU devices. GPUs that TensorFlow
    cannot use are an error: training on the CPU instead would take weeks."""
    gpus = gpu_count()
    if problem := gpu_problem():
        if visible_gpus():
            raise UserError(problem)
        logger.warning(f"{problem}: computing on the CPU")
    if cfg.TRAINER == "horovod":
        ranks.own_gpu()  # refuses ranks without one
        return ["/gpu:0" if gpus else "/cpu:0"]
    if gpus:
        return [f"/gpu:{i}" for i in range(gpus)]
    return [f"/cpu:{i}" for i in range(cfg.TRAIN.CPU_REPLICAS)]


def describe_devices(devices: list[str]) -> str:
    """Describes this process's devices; warns if CUDA_VISIBLE_DEVICES names GPUs that the machine does not have."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [d for d in (visible or "").split(",") if d.strip() not in ("", "-1")]
    if devices[0].startswith("/cpu"):
        if named:
            logger.warning(f"CUDA_VISIBLE_DEVICES={visible} names GPUs, but none can be used here: training on the CPU")
        count = f"{len(devices)} replicas on the CPU" if len(devices) > 1 else "the CPU"
        return f"{count} of {platform.node()} ({len(os.sched_getaffinity(0))} cores)"
    chosen = f"CUDA_VISIBLE_DEVICES={visible}" if named else ", ".join(d.lstrip("/") for d in devices)
    return f"{len(devices)} GPU{'s' * (len(devices) > 1)} of {platform.node()} ({chosen})"


@contextlib.contextmanager
def training_graph() -> Iterator[Any]:
    """A new default graph, of which tensorpack remembers nothing afterwards: its functions would keep every graph that
    they have seen, at 50 MB and more each."""
    try:
        with tf.Graph().as_default() as graph:
            yield graph
    finally:
        for function in (f for module in (graph_functions, scope_utils, summary) for f in vars(module).values()):
            for cell in getattr(function, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def session_config(cpu_devices: int = 1) -> Any:
    config = tf.ConfigProto(allow_soft_placement=True)
    config.gpu_options.allow_growth = True
    config.device_count["CPU"] = cpu_devices
    return fast_graph_optimizer(config)
