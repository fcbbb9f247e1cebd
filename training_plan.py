"""The plan of a run: its learning rate and length, from the settings and the numbers of replicas and images."""

import dataclasses
import math
from typing import Any

from tabulate import tabulate

from common import UserError
from config import SETTINGS, Config

__all__ = ["COCO_SIZED", "TrainingPlan", "make_plan", "told_time"]

# TRAIN.EPOCHS: where the rate drops, as shares of the run; those of the 1x schedule.
_DROPS = (2 / 3, 8 / 9)
# TRAIN.WARMUP=auto: steps, and the share of the run that they take at most.
_WARMUP, _WARMUP_SHARE = 1000, 10
# TRAIN.LR_SCHEDULE=auto: sets of COCO_SIZED images are trained by COCO's schedule, smaller ones for _EPOCHS, as many as
# COCO's 2x. Small sets are shown up to _MOST_EPOCHS times, until _ENOUGH_IMAGES were shown.
COCO_SIZED = 50_000
_EPOCHS, _MOST_EPOCHS, _ENOUGH_IMAGES, _LEAST_STEPS = 24, 50, 24_000, 500
# TRAIN.EVAL_PERIOD=auto and TRAIN.CHECKPOINT_PERIOD=auto.
_EVALUATIONS, _LEAST_INTERVAL, _MOST_UNSAVED = 15, 20, 500
# A plan of more epochs, or of more days, is probably COCO's schedule on a small data set.
_MANY_EPOCHS = 1000
_MANY_DAYS = 14
# What a plan is made of. A continued run keeps those parts of its plan whose settings have not changed.
_OF_SCHEDULE = ("TRAIN.LR_SCHEDULE", "TRAIN.EPOCHS", "TRAIN.LR_SCALING")
_OF_WARMUP = (*_OF_SCHEDULE, "TRAIN.WARMUP")
_OF_EVALUATION = (*_OF_SCHEDULE, "TRAIN.MAX_STEPS", "TRAIN.PERIOD_STEPS", "TRAIN.EVAL_PERIOD")
_OF_CHECKPOINTS = (*_OF_SCHEDULE, "TRAIN.MAX_STEPS", "TRAIN.PERIOD_STEPS", "TRAIN.CHECKPOINT_PERIOD")


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """The schedule of a run on a given number of replicas."""

    replicas: int
    images_per_replica: int
    accumulation: int
    base_lr: float
    warmup_steps: int
    warmup_lr: float
    milestones: list[int]  # steps at which the rate drops tenfold
    total_steps: int
    images_per_epoch: int
    schedule: list[int]  # drops and the end in steps, not cut by TRAIN.MAX_STEPS
    evaluate_every: int  # steps; 0: never
    checkpoint_every: int  # steps
    # Cosine schedule: the step at which it ends (TRAIN.MAX_STEPS may end the run earlier), and its rate there.
    cosine_end: int | None = None
    final_lr: float = 0.0
    rise: float = 0.0  # learning-rate finder: the rate begins at warmup_lr and is multiplied by this at each step

    @property
    def total_batch(self) -> int:
        return self.replicas * self.images_per_replica * self.accumulation

    def epochs(self, steps: int) -> float:
        return steps * self.total_batch / max(self.images_per_epoch, 1)

    def learning_rate(self, step: int) -> float:
        """The rate of the update that makes step `step` + 1; the graph's `learning_rate_tensor` equals it."""
        if self.rise:
            return self.warmup_lr * self.rise**step
        if step < self.warmup_steps:
            return self.warmup_lr + (self.base_lr - self.warmup_lr) * step / self.warmup_steps
        if self.cosine_end is not None:
            # (1 + cos(pi * done)) / 2 = sin(pi / 2 * left)^2, which stays exact in float32 near the end.
            left = max(self.cosine_end - step, 0) / self.cosine_steps
            return self.final_lr + (self.base_lr - self.final_lr) * math.sin(math.pi / 2 * left) ** 2
        return self.base_lr * 0.1 ** sum(step >= m for m in self.milestones)

    @property
    def cosine_steps(self) -> int:
        return max(self.cosine_end - self.warmup_steps, 1)

    def record(self, cfg: Config) -> dict[str, Any]:
        """What a run stores of its plan, so that it continues with exactly this one: see `make_plan`."""
        keys = dict.fromkeys((*_OF_WARMUP, *_OF_EVALUATION, *_OF_CHECKPOINTS))
        return {
            "settings": {key: cfg.get(key) for key in keys}, "schedule": self.schedule, "warmup": self.warmup_steps,
            "evaluate_every": self.evaluate_every, "checkpoint_every": self.checkpoint_every,
        }  # fmt: skip

    def table(self, cfg: Config) -> str:
        """A table of the settings as written, for a total batch of 8, and their values in this run."""
        train = cfg.TRAIN
        parts = f"{self.replicas} replicas x {self.images_per_replica} images x {self.accumulation} accumulated"
        drops = ", ".join(f"{m} (epoch {self.epochs(m):.1f})" for m in self.milestones) or "none"
        automatic = not isinstance(train.LR_SCHEDULE, list)
        shares = train.EPOCHS is not None or automatic
        written = train.LR_SCHEDULE if automatic else f"{train.LR_SCHEDULE[-1]} steps"
        written = f"{train.EPOCHS:g} epochs" if train.EPOCHS is not None else written
        curve = ["rate / 10 at", "2/3 and 8/9" if shares else str(train.LR_SCHEDULE[:-1]), drops]
        if self.cosine_end is not None:
            end = f"to {self.final_lr:.6g} at {self.cosine_end} (epoch {self.epochs(self.cosine_end):.1f})"
            last = f", {self.learning_rate(self.total_steps - 1):.6g} in the last step"
            curve = ["cosine", f"to {train.LR_FINAL * train.BASE_LR:.6g} at {written}", end]
            curve[2] += last * (self.total_steps < self.cosine_end)
        length = f"{self.total_steps} steps = {self.epochs(self.total_steps):.1f} epochs"
        warmup = "auto" if train.WARMUP == "auto" else f"{train.WARMUP} steps"
        evaluations = []
        if self.evaluate_every and cfg.DATA.VAL:
            evaluations = [["evaluation", self._period(train.EVAL_PERIOD, cfg), self._every(self.evaluate_every)]]
        return tabulate(
            [
                ["total batch", "8", f"{parts} = {self.total_batch}"],
                ["learning rate", f"{train.BASE_LR:.6g}", f"{self.base_lr:.6g}"],
                [
                    "warm-up",
                    f"{warmup} from {train.WARMUP_INIT_LR:.6g}",
                    f"{self.warmup_steps} steps from {self.warmup_lr:.6g}",
                ],
                curve,
                ["length", written, length],
                *evaluations,
                ["checkpoint", self._period(train.CHECKPOINT_PERIOD, cfg), self._every(self.checkpoint_every)],
            ],
            headers=["", "settings", f"this run (TRAIN.LR_SCALING={train.LR_SCALING})"],
            tablefmt="simple",
            disable_numparse=True,
        )

    @staticmethod
    def _period(value: float | str, cfg: Config) -> str:
        unit = f"x {cfg.TRAIN.PERIOD_STEPS} steps" if cfg.TRAIN.PERIOD_STEPS else "epochs"
        return value if isinstance(value, str) else f"{value:g} {unit}"

    def _every(self, steps: int) -> str:
        if steps >= self.total_steps:
            return "at the end"
        times = -(-self.total_steps // steps)
        return f"every {steps} steps = {self.epochs(steps):.1f} epochs, {times} times"

    def notes(self, cfg: Config) -> list[str]:
        """What was chosen because no setting says it, why, and how to get something else."""
        train = cfg.TRAIN
        if train.EPOCHS is not None or isinstance(train.LR_SCHEDULE, list):
            return []
        coco = train.LR_SCHEDULE.partition(":")[2] or "2x"
        if train.MAX_STEPS is not None:
            if not self.milestones and self.cosine_end is None:
                return [
                    f"TRAIN.MAX_STEPS={train.MAX_STEPS} ends the run before its learning rate falls; for a whole "
                    f"schedule of this length set TRAIN.EPOCHS={self.epochs(self.total_steps):.3g} instead"
                ]
            return []
        if self.schedule == _scaled(cfg, _named(coco), self.total_batch):
            return [f"no schedule was given: COCO's {coco}; another one: TRAIN.EPOCHS=12 or TRAIN.LR_SCHEDULE=1x"]
        return [
            f"no schedule was given, and {self.images_per_epoch} images are too few for COCO's: "
            f"{self.epochs(self.total_steps):.3g} epochs, by the rule that docs/SETTINGS.md has under "
            f"TRAIN.LR_SCHEDULE; another length: e.g. TRAIN.EPOCHS=20, and COCO's schedule: TRAIN.LR_SCHEDULE={coco}"
        ]

    def warnings(self, cfg: Config) -> list[str]:
        """Warnings about a plan that is probably not intended. A warm-up in runs shortened by TRAIN.MAX_STEPS is not
        warned about."""
        found = []
        end = min([*self.milestones, self.total_steps])
        if self.warmup_steps >= end and cfg.TRAIN.MAX_STEPS is None:
            found.append(
                f"TRAIN.WARMUP={self.warmup_steps} is longer than the first {end} steps of the schedule, so the base "
                "rate is never reached: shorten the warm-up or use fewer replicas"
            )
        if cfg.BACKBONE.NORM == "SyncBN" and self.accumulation > 1:
            at_once = self.replicas * self.images_per_replica
            found.append(
                f"BACKBONE.NORM=SyncBN normalises over the {at_once} images computed together, not over the "
                f"{self.total_batch} of an update: statistics differ from those of a run without accumulation; "
                "BACKBONE.NORM=GN or FreezeBN does not depend on it"
            )
        epochs = self.epochs(self.total_steps)
        if epochs > _MANY_EPOCHS and self.total_steps > _LEAST_STEPS:
            found.append(
                f"{self.total_steps} steps are {epochs:.0f} passes over {self.images_per_epoch} images: {_shorter(cfg)}"
            )
        if cfg.DATA.VAL and self.evaluate_every >= self.total_steps and cfg.TRAIN.EVAL_PERIOD not in ("auto", 0):
            period = self._period(cfg.TRAIN.EVAL_PERIOD, cfg)
            found.append(
                f"TRAIN.EVAL_PERIOD={cfg.TRAIN.EVAL_PERIOD:g}: {period} are as long as the run or longer, so the model "
                "is only evaluated at the end; TRAIN.EVAL_PERIOD=auto evaluates in between"
            )
        return found

    def long_run(self, cfg: Config, seconds: float) -> str:
        """A warning about a run of so many seconds with the setting to change, or ""."""
        return f"this run takes {told_time(seconds)}: {_shorter(cfg)}" if seconds > _MANY_DAYS * 86400 else ""


def told_time(seconds: float) -> str:
    """A duration in words: 40 s, 38 min, 5.2 h, 9 days."""
    for unit, length, limit in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < limit * length:
            number = seconds / length
            return f"{number:.1f} {unit}" if unit == "h" and number < 10 else f"{number:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _shorter(cfg: Config) -> str:
    """How to make a run shorter."""
    if cfg.TRAIN.MAX_STEPS is not None:
        return "lower TRAIN.MAX_STEPS if this is not meant"
    if cfg.TRAIN.EPOCHS is not None:
        return "lower TRAIN.EPOCHS if this is not meant"
    if not isinstance(cfg.TRAIN.LR_SCHEDULE, list):
        return "set the length, e.g. TRAIN.EPOCHS=12"
    return "TRAIN.LR_SCHEDULE is probably COCO's; set the length that fits your data, e.g. TRAIN.EPOCHS=50"


def _named(name: str) -> list[int]:
    """The iterations of a schedule like 2x at a total batch of 8."""
    return SETTINGS["TRAIN.LR_SCHEDULE"].allowed.read(name)


def _scaled(cfg: Config, schedule: list[int], total: int) -> list[int]:
    """The schedule, which is written for a total batch of 8, in steps of `total` images."""
    factor = total / 8.0 if cfg.TRAIN.LR_SCALING == "linear" else 1.0
    return [max(1, math.ceil(m / factor)) for m in schedule]


def _with_drops(length: int) -> list[int]:
    return sorted({max(1, round(share * length)) for share in _DROPS} | {length})


def _schedule(cfg: Config, total: int, images: int) -> list[int]:
    """The steps at which the rate drops and the end."""
    train = cfg.TRAIN
    if train.EPOCHS is not None:
        return _with_drops(max(1, math.ceil(train.EPOCHS * images / total - 1e-9)))
    if isinstance(train.LR_SCHEDULE, list):
        return _scaled(cfg, train.LR_SCHEDULE, total)
    if images >= COCO_SIZED or train.MAX_STEPS is not None:
        return _scaled(cfg, _named(train.LR_SCHEDULE.partition(":")[2] or "2x"), total)
    shown = max(_EPOCHS * images, min(_MOST_EPOCHS * images, _ENOUGH_IMAGES))
    return _with_drops(max(math.ceil(shown / total), _LEAST_STEPS))


def _warmup(cfg: Config, schedule: list[int]) -> int:
    train, length = cfg.TRAIN, schedule[-1]
    if train.WARMUP == "auto":
        return min(_WARMUP, min(length, train.MAX_STEPS or length) // _WARMUP_SHARE)
    return min(train.WARMUP, length // _WARMUP_SHARE) if train.EPOCHS is not None else train.WARMUP


def _intervals(cfg: Config, steps: int, epoch: float) -> tuple[int, int]:
    """The steps between evaluations (0: none) and between checkpoints, of a run of `steps` with `epoch` steps in a
    pass. By themselves, evaluations fall on checkpoints."""
    train = cfg.TRAIN
    evaluate = max(round(steps / _EVALUATIONS), _LEAST_INTERVAL)
    parts = math.ceil(evaluate / _MOST_UNSAVED)
    checkpoint = round(evaluate / parts)
    evaluate = checkpoint * parts
    unit = train.PERIOD_STEPS or epoch
    if train.EVAL_PERIOD != "auto":
        evaluate = max(round(train.EVAL_PERIOD * unit), 1) if train.EVAL_PERIOD else 0
    if train.CHECKPOINT_PERIOD != "auto" or train.PERIOD_STEPS:
        periods = 1 if train.CHECKPOINT_PERIOD == "auto" else train.CHECKPOINT_PERIOD
        checkpoint = max(round(periods * unit), 1)
    return evaluate, checkpoint


def _read_record(record: dict[str, Any]) -> tuple[dict[str, Any], list[int], int, int, int]:
    try:
        asked, schedule = dict(record["settings"]), _named(record["schedule"])
        warmup, evaluate, checkpoint = (record[k] for k in ("warmup", "evaluate_every", "checkpoint_every"))
        if not isinstance(schedule, list) or {type(n) for n in (warmup, evaluate, checkpoint)} != {int}:
            raise ValueError
        if min(warmup, evaluate) < 0 or checkpoint < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UserError(
            "the plan stored with the checkpoint is damaged (its .meta.json): continue from an earlier checkpoint"
        ) from None
    return asked, schedule, warmup, evaluate, checkpoint


def make_plan(cfg: Config, replicas: int, images_per_epoch: int, record: dict[str, Any] | None = None) -> TrainingPlan:
    """Scales the schedule, which is written for a total batch of 8, to the run's total batch (Goyal et al. 2017).

    record: `TrainingPlan.record` of the run that is continued. What follows from settings that are still the same is
    taken from it, so that a run keeps its plan when its data has changed, or the rules for plans.
    """
    train = cfg.TRAIN
    at_once = replicas * train.BATCH_SIZE_PER_GPU
    total = train.TOTAL_BATCH or at_once * train.ACCUMULATION
    if total % at_once:
        near = ", ".join(str(k * at_once) for k in (total // at_once, total // at_once + 1) if k)
        raise UserError(
            f"setting TRAIN.TOTAL_BATCH={total} is not a multiple of {replicas} replicas x {train.BATCH_SIZE_PER_GPU} "
            f"images: use another number of replicas, TRAIN.BATCH_SIZE_PER_GPU, or a total batch of {near}"
        )
    factor = total / 8.0 if train.LR_SCALING == "linear" else 1.0
    asked, old_schedule, old_warmup, old_evaluate, old_checkpoint = (
        _read_record(record) if record else ({}, [], 0, 0, 1)
    )

    def kept(keys: tuple[str, ...]) -> bool:
        return all(key in asked and asked[key] == cfg.get(key) for key in keys)

    schedule = old_schedule if kept(_OF_SCHEDULE) else _schedule(cfg, total, images_per_epoch)
    warmup = old_warmup if kept(_OF_WARMUP) else _warmup(cfg, schedule)
    steps = schedule[-1] if train.MAX_STEPS is None else min(schedule[-1], train.MAX_STEPS)
    evaluate, checkpoint = _intervals(cfg, steps, images_per_epoch / total)
    evaluate = old_evaluate if kept(_OF_EVALUATION) else evaluate
    checkpoint = old_checkpoint if kept(_OF_CHECKPOINTS) else checkpoint
    cosine = train.LR_POLICY == "cosine"
    return TrainingPlan(
        replicas=replicas,
        images_per_replica=train.BATCH_SIZE_PER_GPU,
        accumulation=total // at_once,
        base_lr=train.BASE_LR * factor,
        warmup_steps=warmup,
        warmup_lr=train.WARMUP_INIT_LR * min(factor, 1.0),
        milestones=[] if cosine else [m for m in schedule[:-1] if m < steps],
        total_steps=steps,
        images_per_epoch=images_per_epoch,
        schedule=schedule,
        evaluate_every=evaluate,
        checkpoint_every=checkpoint,
        cosine_end=schedule[-1] if cosine else None,
        final_lr=train.LR_FINAL * train.BASE_LR * factor,
    )
