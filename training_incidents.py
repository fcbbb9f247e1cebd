"""The flight recorder of a run: it watches the verdicts of the guard (training_guard.py), and records a step that must
not be applied in a folder (incident_files.py) from which it can be repeated (replay.py)."""

import dataclasses
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, logger
from config import Config
from incident_files import Part, numbers, with_pasted, write_incident
from training_guard import BAD_LOSS, BAD_WEIGHT, GOOD, LARGE_GRADIENT, OVERFLOW, StepGuard
from training_plan import TrainingPlan
from utils import ranks
from utils.checkpoint import AVERAGE_PREFIX, assign_weights
from utils.tensorpack_import import Callback
from utils.tf_v1 import snapshot, tf

__all__ = ["IncidentRecorder", "describe_skipped", "examine", "feeds"]

MOST_BYTES = 512 << 20  # of batches in a folder; those with a value that is not finite come first
# TRAIN.INCIDENT_GRAD_FACTOR compares with the median of so many good steps before; not with fewer than the second.
_MEDIAN_OF, _MEDIAN_FROM = 101, 20
_STEP_VARIABLES = ("global_step", "loss_scale", "loss_scale_good")  # that go on after a step without an update
_HINT = "Lower TRAIN.BASE_LR, lengthen TRAIN.WARMUP, set TRAIN.GRADIENT_CLIP, or check these images"


def feeds(guard: StepGuard, parts: Sequence[Part]) -> dict[Any, np.ndarray]:
    """What to feed so that the graph's replicas compute these parts, one for each."""
    return {
        tensor: part.batch[key]
        for replica, part in zip(guard.replicas, parts)
        for key, tensor in replica.inputs.items()
    }


def examine(sess: Any, guard: StepGuard, micro_batches: Sequence[Sequence[Part]]) -> None:
    """Fills in losses and gradient norms of the parts: for each micro-batch those of this process's replicas."""
    names = [v.op.name for _, v in guard.replicas[0].gradients]
    for parts in micro_batches:
        tensors = [(replica.losses, replica.norms) for replica in guard.replicas]
        for part, (losses, norms) in zip(parts, sess.run(tensors, feeds(guard, parts))):
            part.losses = {k: float(v) for k, v in losses.items()}
            part.norms = dict(zip(names, map(float, norms)))
        sess.run(guard.restore)  # the statistics of batch norms, which the losses update


def describe_skipped(meta: dict[str, Any]) -> str:
    """ " without the updates of 2 bad steps (5, 9)" for the last message of a run with these checkpoints, or ""."""
    steps = [entry["step"] for entry in meta.get("incidents", {}).get("skipped", [])]
    plural = "s" * (len(steps) > 1)
    return f" without the update{plural} of {len(steps)} bad step{plural} ({', '.join(map(str, steps))})" * bool(steps)


class IncidentRecorder(Callback):
    """Watches the guard's verdicts. A step that must not be applied is recorded; it ends the run, or training goes on
    without its update up to TRAIN.SKIP_BAD_STEPS times."""

    _chief_only = False

    def __init__(
        self,
        cfg: Config,
        plan: TrainingPlan,
        model: Any,
        logdir: Path,
        meta: dict[str, Any],
        held: "deque[list[np.ndarray]]",
        describe_batches: Callable[[int], list[list[dict[str, Any]]]],
        shard: tuple[int, int],
        before: dict[str, Any] | None = None,
    ):
        """model: the `DetectionModel` whose graph is trained. meta: that of the run's checkpoints, whose entry
        "incidents" is kept up to date here; before: this entry of the run that is continued. held: the batches of this
        process that were not yet used, in their order. describe_batches(step) -> for each batch of this process in the
        step, its images. shard: (rank, number of ranks)."""
        self._cfg, self._plan, self._logdir, self._meta = cfg, plan, logdir, meta
        self._guard, self._rate, self._scale = model.guard, model.stats["learning_rate"], model.guard.scale
        self._held, self._describe, (self._rank, self._size) = held, describe_batches, shard
        self._factor = cfg.TRAIN.INCIDENT_GRAD_FACTOR
        before = before or {}
        self.skipped: list[dict[str, Any]] = list(before.get("skipped", []))  # {step, what}
        self._norms = deque(before.get("norms", []), _MEDIAN_OF)
        self._bounds = [math.inf, math.inf]  # of the norms of weights and momentum
        self._update_meta()

    def _update_meta(self) -> None:
        norms = list(self._norms) if self._factor else []
        self._meta["incidents"] = {"skipped": self.skipped, "norms": norms}

    @property
    def limit(self) -> float:
        """The largest norm of a gradient that is not an incident."""
        if not self._factor or len(self._norms) < _MEDIAN_FROM:
            return math.inf
        return self._factor * statistics.median(self._norms)

    def _setup_graph(self):
        guard = self._guard
        self._state = [v for v in tf.global_variables() if not v.op.name.startswith(AVERAGE_PREFIX)]
        self._before_step = [v for v in self._state if v.op.name in _STEP_VARIABLES]
        floating = [v for v in self._state if v.dtype.is_floating]
        self._sizes = {v.op.name: tf.nn.l2_loss(snapshot(v)) for v in floating}  # half the squared norms
        self._fetches = {
            "verdict": guard.verdict, "norm": guard.norm, "norms": guard.norms, "rate": self._rate,
            "losses": [replica.losses for replica in guard.replicas], "scale": self._scale,
        }  # fmt: skip

    def _before_train(self):
        sizes, _ = self.trainer.sess.run([self._sizes, self._guard.remember])
        sizes = {name: float(size) for name, size in sizes.items()}
        bad = [name for name, size in sizes.items() if not math.isfinite(size)]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise UserError(
                f"the weights to start from are not finite, or of a norm above 1e19: {bad[0]}{more}; start from other "
                "weights"
            )
        both = self._guard.names, self._guard.momentum_names
        self._bounds = [math.sqrt(2 * sum(sizes[name] for name in names)) * 1.001 for names in both]

    def _before_run(self, _):
        fed = {self._guard.limit: self.limit, self._guard.bounds: self._bounds}
        return tf.train.SessionRunArgs(self._fetches, fed)

    def _after_run(self, _, run_values):
        self._values = run_values.results

    def _trigger_step(self):
        verdict, norm = int(self._values["verdict"]), float(self._values["norm"])
        if verdict in (GOOD, OVERFLOW):
            for _ in range(self._plan.accumulation * len(self._guard.replicas)):
                self._held.popleft()
        if verdict == GOOD:
            clip = self._cfg.TRAIN.GRADIENT_CLIP
            grown = self._cfg.TRAIN.MOMENTUM * self._bounds[1] + (min(norm, clip) if clip else norm)
            self._bounds = [self._bounds[0] + abs(float(self._values["rate"])) * grown * 1.001, grown * 1.001]
            if self._factor:
                self._norms.append(norm)
                self._update_meta()
        elif verdict != OVERFLOW:
            self._incident(verdict)

    # ------------------------------------------------------------------------------------------------- an incident
    def _incident(self, verdict: int) -> None:
        step = self.global_step
        parts = self._parts_of_step(step)
        state = self._state_before(step)
        self._examine(parts, state)
        parts = self._of_all_ranks(parts)
        what = self._what(verdict, parts)
        guilty = [p for p in parts if p.is_bad] or parts
        ids = ", ".join(dict.fromkeys(str(i["id"]) for p in guilty for i in with_pasted(p.images)))
        folder = self._logdir / f"incident-{step}"
        recorded = f"recorded in {folder}, see it with ./train.py --replay {folder}"
        if self._rank == 0:
            try:
                self._write(folder, what, verdict, parts, state)
            except (OSError, UserError) as e:
                recorded = f"it could not be recorded in {folder} ({e})"
        told = f"{what} at step {step}; images of the batch: {ids}; {recorded}"
        allowed = self._cfg.TRAIN.SKIP_BAD_STEPS
        if len(self.skipped) >= allowed:
            if self._rank:
                raise FloatingPointError(f"rank {self._rank} ends: {what} at step {step}")
            others = f"; the updates of {allowed} bad steps before it were left out" if allowed else ""
            raise FloatingPointError(f"{told}{others}. {_HINT}")
        self.skipped.append({"step": step, "what": what})
        self._update_meta()
        if self._rank == 0:
            logger.warning(f"{told}. Its update is left out ({len(self.skipped)} of at most {allowed})")

    def _parts_of_step(self, step: int) -> list[Part]:
        """The parts of this process in the step, by micro-batch and replica."""
        devices, keys, parts = len(self._guard.replicas), list(self._guard.replicas[0].inputs), []
        for number, images in enumerate(self._describe(step)):
            micro, replica = divmod(number, devices)
            batch = dict(zip(keys, self._held.popleft()))
            parts.append(Part(micro, self._rank * devices + replica, self._rank, images, batch))
        return parts

    def _state_before(self, step: int) -> dict[str, np.ndarray]:
        """The variables as they were before the step: the update was left out, and what goes on is put back."""
        state = self.trainer.sess.run({v.op.name: v for v in self._state})
        state["global_step"] = np.asarray(step - 1, state["global_step"].dtype)
        for name, value in self._values["scale"].items():
            state[name] = np.asarray(value, state[name].dtype)
        return state

    def _examine(self, parts: list[Part], state: dict[str, np.ndarray]) -> None:
        sess, devices = self.trainer.sess, len(self._guard.replicas)
        now = sess.run({v.op.name: v for v in self._before_step})
        assign_weights(sess, {name: state[name] for name in now}, self._before_step)
        examine(sess, self._guard, [parts[i : i + devices] for i in range(0, len(parts), devices)])
        assign_weights(sess, now, self._before_step)

    def _of_all_ranks(self, parts: list[Part]) -> list[Part]:
        """The parts of all ranks; so many of their batches are kept as a folder may have."""
        left = MOST_BYTES // self._size
        for part in sorted(parts, key=lambda p: not p.is_bad):
            left -= sum(a.nbytes for a in (part.batch or {}).values())
            if left < 0:
                part.batch = None
        if self._size > 1:
            parts = [p for own in ranks.gather(parts) for p in own]
        return sorted(parts, key=lambda p: (p.micro, p.replica))

    def _what(self, verdict: int, parts: list[Part]) -> str:
        if verdict == LARGE_GRADIENT:
            norm = float(self._values["norm"])
            return (
                f"the gradient norm is {norm:.6g}, more than TRAIN.INCIDENT_GRAD_FACTOR={self._factor:g} times its "
                f"median {self.limit / self._factor:.6g}"
            )
        if verdict == BAD_WEIGHT:
            return "weights could become infinite or NaN by the update"
        losses = [(k, v) for p in parts for k, v in p.losses.items() if not math.isfinite(v)]
        if losses:
            return f"{losses[0][0]} is {losses[0][1]}"
        if verdict == BAD_LOSS:
            return "a loss is not finite"
        norms = {k: v for p in parts for k, v in p.norms.items() if not math.isfinite(v)}
        if norms:
            more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
            return f"the gradient of {next(iter(norms))}{more} is infinite or NaN"
        return "the sum of the gradients is infinite or NaN"

    def _write(self, folder: Path, what: str, verdict: int, parts: list[Part], state: dict[str, np.ndarray]) -> None:
        values = self._values
        meta = {k: v for k, v in self._meta.items() if k != "incidents"}
        description = {
            "step": self.global_step,
            "what": what,
            "verdict": verdict,
            "values": {
                **numbers({"gradient_norm": float(values["norm"])}),
                "gradient_norms": numbers(dict(zip(self._guard.names, map(float, values["norms"])))),
                # those of the last micro-batch in this process
                "losses": [numbers({k: float(v) for k, v in losses.items()}) for losses in values["losses"]],
            },
            **numbers({"learning_rate": float(values["rate"]), "limit": self.limit}),
            "bounds": list(numbers({str(i): float(bound) for i, bound in enumerate(self._bounds)}).values()),
            "plan": dataclasses.asdict(self._plan),
        }
        write_incident(folder, description, meta, parts, state, self._cfg.DATA.CLASS_NAMES)
