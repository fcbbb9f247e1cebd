"""The plan of a run: its learning rate and length, from the settings and the numbers of replicas and images."""

import dataclasses
import math

from tabulate import tabulate

from common import UserError
from config import Config

__all__ = ["TrainingPlan", "make_plan"]

# TRAIN.EPOCHS: where the rate drops, as shares of the run; those of the 1x schedule.
_DROPS = (2 / 3, 8 / 9)
# A plan of more epochs is probably COCO's schedule on a small data set.
_MANY_EPOCHS = 1000


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
    # Cosine schedule: the step at which it ends (TRAIN.MAX_STEPS may end the run earlier), and its rate there.
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
            # (1 + cos(pi * done)) / 2 = sin(pi / 2 * left)^2, which stays exact in float32 near the end.
            left = max(self.cosine_end - step, 0) / self.cosine_steps
            return self.final_lr + (self.base_lr - self.final_lr) * math.sin(math.pi / 2 * left) ** 2
        return self.base_lr * 0.1 ** sum(step >= m for m in self.milestones)

    @property
    def cosine_steps(self) -> int:
        return max(self.cosine_end - self.warmup_steps, 1)

    def table(self, cfg: Config) -> str:
        """A table of the settings as written, for a total batch of 8, and their values in this run."""
        train = cfg.TRAIN
        parts = f"{self.replicas} replicas x {self.images_per_replica} images x {self.accumulation} accumulated"
        drops = ", ".join(f"{m} (epoch {self.epochs(m):.1f})" for m in self.milestones) or "none"
        by_epochs = train.EPOCHS is not None
        written = f"{train.EPOCHS:g} epochs" if by_epochs else f"{train.LR_SCHEDULE[-1]} steps"
        curve = ["rate / 10 at", "2/3 and 8/9" if by_epochs else str(train.LR_SCHEDULE[:-1]), drops]
        if self.cosine_end is not None:
            end = f"to {self.final_lr:.6g} at {self.cosine_end} (epoch {self.epochs(self.cosine_end):.1f})"
            last = f", {self.learning_rate(self.total_steps - 1):.6g} in the last step"
            curve = ["cosine", f"to {train.LR_FINAL * train.BASE_LR:.6g} at {written}", end]
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
                ["length", written, length],
            ],
            headers=["", "settings", f"this run (TRAIN.LR_SCALING={train.LR_SCALING})"],
            tablefmt="simple",
            disable_numparse=True,
        )

    def warnings(self, cfg: Config) -> list[str]:
        """Warnings about a plan that is probably not intended. Runs shortened by TRAIN.MAX_STEPS are not warned
        about."""
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
        if epochs > _MANY_EPOCHS and cfg.TRAIN.EPOCHS is None and cfg.TRAIN.MAX_STEPS is None:
            found.append(
                f"{self.total_steps} steps are {epochs:.0f} passes over {self.images_per_epoch} images: "
                "TRAIN.LR_SCHEDULE is COCO's; set the length that fits your data, e.g. TRAIN.EPOCHS=50"
            )
        return found


def make_plan(cfg: Config, replicas: int, images_per_epoch: int) -> TrainingPlan:
    """Scales the schedule, which is written for a total batch of 8, to the run's total batch (Goyal et al. 2017)."""
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
    milestones, warmup = [max(1, math.ceil(m / factor)) for m in train.LR_SCHEDULE], train.WARMUP
    if train.EPOCHS is not None:
        length = max(1, math.ceil(train.EPOCHS * images_per_epoch / total - 1e-9))
        milestones = sorted({max(1, round(share * length)) for share in _DROPS} | {length})
        warmup = min(warmup, length // 10)
    steps = milestones[-1] if train.MAX_STEPS is None else min(milestones[-1], train.MAX_STEPS)
    cosine = train.LR_POLICY == "cosine"
    return TrainingPlan(
        replicas=replicas,
        images_per_replica=train.BATCH_SIZE_PER_GPU,
        accumulation=total // at_once,
        base_lr=train.BASE_LR * factor,
        warmup_steps=warmup,
        warmup_lr=train.WARMUP_INIT_LR * min(factor, 1.0),
        milestones=[] if cosine else [m for m in milestones[:-1] if m < steps],
        total_steps=steps,
        images_per_epoch=images_per_epoch,
        cosine_end=milestones[-1] if cosine else None,
        final_lr=train.LR_FINAL * train.BASE_LR * factor,
    )
