"""The graph of a recorded step, run again: see replay.py."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from common import UserError
from config import Config
from data import training_keys
from incident_files import Incident, Part
from model_rcnn import INPUT_TYPES
from replay_search import Operation, first_bad_operation, guilty_annotations
from trainers import make_trainer, training_graph
from training import RunSession, build_graph
from training_guard import BAD_WEIGHT
from training_incidents import examine, feeds
from training_plan import TrainingPlan
from utils.checkpoint import assign_weights
from utils.tensorpack_import import DataFromList
from utils.tf_v1 import tf

__all__ = ["Finding", "Repeated", "repeat_step"]


class Finding(NamedTuple):
    """Where the values of a part that are not finite come from."""

    part: Part
    what: list[str]  # the numbers that are not finite
    operation: Operation | None
    blame: str  # kind of `guilty_annotations`
    image: int | None
    annotations: list[int]


class Repeated(NamedTuple):
    """A step, computed again."""

    verdict: int | None  # None if not all batches of the step were kept, so that only parts of it can be computed
    values: dict[str, Any]  # as those of an `Incident`
    parts: list[Part]  # those with a batch, with their losses and gradient norms of now
    weights: list[str]  # that would not be finite after the update
    finding: Finding | None


def repeat_step(incident: Incident, search: bool = True) -> Repeated:
    """Computes the step of an incident again, on the CPU, and searches for the cause of what is not finite."""
    kept = [p for p in incident.parts if p.batch]
    if not kept:
        raise UserError(f"{incident.folder} keeps no batch")
    known = {f.name for f in dataclasses.fields(TrainingPlan)}
    try:
        plan = TrainingPlan(**{k: v for k, v in incident.plan.items() if k in known})
    except TypeError as e:
        raise UserError(f"{incident.folder}: its plan is not as a run writes it ({e}); copy it again") from None
    complete = len(kept) == plan.replicas * plan.accumulation
    if not complete:
        plan = dataclasses.replace(plan, replicas=1, accumulation=1)
    cfg = incident.cfg.copy()
    cfg.TRAINER = "replicated"
    cfg.freeze()
    _check(kept, cfg, plan)
    with training_graph():
        return _repeat_in_graph(incident, cfg, plan, kept, complete, search)


def _check(parts: Sequence[Part], cfg: Config, plan: TrainingPlan) -> None:
    """Raises UserError if a batch is not one of these settings."""
    keys = training_keys(cfg)
    for part in parts:
        batch = part.batch or {}
        for key in keys:
            dtype, shape = INPUT_TYPES[key]
            array = batch.get(key)
            wanted = [plan.images_per_replica, *shape]
            fits = array is not None and array.ndim == len(wanted) and array.dtype == dtype.as_numpy_dtype
            if not fits or any(w is not None and w != n for w, n in zip(wanted, array.shape)):
                has = "is missing" if array is None else f"is {array.dtype.name} {list(array.shape)}"
                raise UserError(f"the batch of the incident does not fit its settings: {key} {has}")


def _repeat_in_graph(
    incident: Incident, cfg: Config, plan: TrainingPlan, kept: list[Part], complete: bool, search: bool
) -> Repeated:
    devices = [f"/cpu:{i}" for i in range(plan.replicas)]
    trainer = make_trainer(cfg, plan, devices)
    model, _ = build_graph(cfg, plan, DataFromList([]), training_keys(cfg), devices, trainer)
    guard = model.guard
    tries = guard.try_out() if incident.verdict == BAD_WEIGHT else tf.constant([], tf.bool)
    variables = tf.global_variables()
    missing = [v.op.name for v in variables if v.op.name not in incident.state and not v.op.name.startswith("EMA/")]
    if missing:
        raise UserError(f"the state of the incident does not fit its settings: {missing[0]} is missing")
    initialise = [tf.global_variables_initializer(), tf.local_variables_initializer()]
    with tf.Session(config=RunSession(devices).config) as sess:
        sess.run(initialise)

        def reset() -> None:
            assign_weights(sess, incident.state, variables)
            if trainer.synchronise is not None:
                sess.run(trainer.synchronise)
            sess.run(guard.remember)

        reset()
        rows = [kept[i : i + plan.replicas] for i in range(0, len(kept), plan.replicas)]
        verdict, values, weights = None, {}, []
        if complete:
            verdict, values, weights = _run_step(sess, trainer, model, rows, incident, tries)
            reset()
        now = [[dataclasses.replace(p) for p in row] for row in rows]
        examine(sess, guard, now)
        finding = _search(sess, guard, now) if search else None
    return Repeated(verdict, values, [p for row in now for p in row], weights, finding)


def _run_step(sess, trainer, model, rows, incident, tries):
    """The step as training runs it: all micro-batches, then the update."""
    guard = model.guard
    for row in rows[:-1]:
        sess.run(trainer.accumulate_op, feeds(guard, row))
    fetches = {
        "verdict": guard.verdict, "norm": guard.norm, "norms": guard.norms, "stats": model.stats, "tries": tries,
        "losses": [replica.losses for replica in guard.replicas], "update": trainer.train_op,
    }  # fmt: skip
    limits = {guard.limit: incident.limit, guard.bounds: incident.bounds}
    found = sess.run(fetches, feeds(guard, rows[-1]) | limits)
    values = {
        "gradient_norm": float(found["norm"]),
        "gradient_norms": dict(zip(guard.names, map(float, found["norms"]))),
        "losses": [{k: float(v) for k, v in losses.items()} for losses in found["losses"]],
    }
    return int(found["verdict"]), values, [n for n, finite in zip(guard.names, found["tries"]) if not finite]


def _search(sess, guard, rows) -> Finding | None:
    """The cause of the first part that is not finite."""
    for row in rows:
        for index, part in enumerate(row):
            if not part.is_bad:
                continue
            replica = guard.replicas[index]
            losses = [k for k, v in part.losses.items() if not math.isfinite(v)]
            single = [k for k in losses if k != "total_loss"] or losses
            if losses:
                targets, companions = [replica.losses[k] for k in single], [r.losses for r in guard.replicas]
            else:
                gradients = {v.op.name: g for g, v in guard.replicas[index].gradients}
                names = [v.op.name for _, v in guard.replicas[0].gradients]
                targets = [g for g, n in zip(gradients.values(), names) if not math.isfinite(part.norms[n])]
                single = [n for n in names if not math.isfinite(part.norms[n])]
                companions = [r.norms for r in guard.replicas]
            targets = [tf.convert_to_tensor(t) for t in targets]
            operation = first_bad_operation(sess, targets, feeds(guard, row), companions)
            is_bad = _tester(sess, guard, row, index, targets, companions)
            return Finding(part, single, operation, *guilty_annotations(part.batch, is_bad))
    return None


def _tester(sess, guard, row, index, targets, companions) -> Callable[[dict[str, np.ndarray]], bool]:
    with sess.graph.as_default():
        finite = tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(t)) for t in targets]))

    def is_bad(batch: dict[str, np.ndarray]) -> bool:
        changed = [dataclasses.replace(p, batch=batch) if i == index else p for i, p in enumerate(row)]
        found = not sess.run([finite, companions], feeds(guard, changed))[0]
        sess.run(guard.restore)
        return found

    return is_bad
