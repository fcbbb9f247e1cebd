"""The learning-rate finder: the rate rises exponentially, step by step, and the loss says how far it may go (Smith,
"Cyclical Learning Rates for Training Neural Networks", 2017, section 3.3)."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import UserError, atomic_write
from config import Config
from training_plan import TrainingPlan
from training_trial import run_steps

__all__ = ["LOWEST", "Found", "Record", "find_rate", "rising", "suggestion", "write_found"]

LOWEST, HIGHEST = 1e-5, 1.0  # rates of the first and the last step
_SMOOTHING = 0.9  # of the loss, over steps; corrected for its beginning as in Adam (Kingma & Ba 2015)
_SETTLING = 10  # steps in which the smoothed loss is not yet looked at
_DIVERGED = 3.0  # the finder ends where the smoothed loss is so many times its lowest
_BELOW_THE_LOWEST = 10.0  # the suggested rate is so much lower than that of the lowest loss


class Record(NamedTuple):
    step: int  # from 1
    rate: float
    loss: float
    smoothed: float


class Found(NamedTuple):
    rate: float | None  # None: no rate lowered the loss
    said: str


def rising(plan: TrainingPlan, steps: int) -> TrainingPlan:
    """The plan with a rate that rises from LOWEST to HIGHEST in so many steps."""
    return dataclasses.replace(
        plan, rise=(HIGHEST / LOWEST) ** (1 / (steps - 1)), warmup_lr=LOWEST, warmup_steps=0, milestones=[],
        cosine_end=None, total_steps=steps,
    )  # fmt: skip


def find_rate(
    cfg: Config, plan: TrainingPlan, dataflow: Any, keys: list[str], devices: list[str], trainer: Any, load: Any
) -> list[Record]:
    """The losses of a run of `plan`, which is that of `rising`. It ends where the loss diverges; with several ranks,
    which must make the same steps, at the plan's end."""
    records: list[Record] = []
    mean = 0.0

    def after_step(step: int, loss: float) -> bool:
        nonlocal mean
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        records.append(Record(step, plan.learning_rate(step - 1), loss, mean / (1 - _SMOOTHING**step)))
        return step >= plan.total_steps or (_diverged(records) and not hasattr(trainer, "any_rank"))

    run_steps(cfg, plan, dataflow, keys, devices, trainer, after_step, load)
    return records


def _diverged(records: Sequence[Record]) -> bool:
    last = records[-1].smoothed
    if not math.isfinite(last):
        return True
    return len(records) > _SETTLING and last > _DIVERGED * min(r.smoothed for r in records[_SETTLING:])


def suggestion(records: Sequence[Record]) -> Found:
    """A tenth of the rate at which the smoothed loss is lowest: the loss still falls fast there, and it is far from
    where it rises. No rate if the loss never fell clearly."""
    settled = [r for r in records[_SETTLING:] if math.isfinite(r.smoothed)]
    if len(settled) < 2:
        return Found(None, "the loss was not finite from the first steps on: look at the weights and the data")
    best = min(settled, key=lambda r: r.smoothed)
    if best.smoothed > 0.98 * settled[0].smoothed:
        return Found(None, "no rate lowered the loss in so few steps: try more steps, e.g. --find-lr 500")
    rate = float(f"{best.rate / _BELOW_THE_LOWEST:.2g}")
    said = f"the smoothed loss is lowest, {best.smoothed:.3g}, at a rate of {best.rate:.2g}"
    if best.step == records[-1].step:
        said += "; it was still falling at the last step"
    return Found(rate, said)


def write_found(records: Sequence[Record], found: Found, plan: TrainingPlan, cfg: Config, folder: Path) -> list[str]:
    """Writes find_lr.jsonl and find_lr.png; returns sentences for the user, the last with the setting."""
    try:
        with atomic_write(folder / "find_lr.jsonl") as f:
            for r in records:
                finite = {k: v if math.isfinite(v) else None for k, v in r._asdict().items()}
                f.write(json.dumps(finite, allow_nan=False) + "\n")
        _draw(records, found, folder / "find_lr.png")
    except OSError as e:
        raise UserError(f"{folder} cannot be written: {e.strerror or e}") from None
    said = [f"{found.said}; {folder / 'find_lr.png'} shows it"]
    if found.rate is not None:
        factor = plan.total_batch / 8 if cfg.TRAIN.LR_SCALING == "linear" else 1
        base = float(f"{found.rate / factor:.2g}")
        how = f"a rate of {found.rate:g}, a tenth of that" + f", at a total batch of {plan.total_batch}" * (factor != 1)
        said.append(f"suggested: TRAIN.BASE_LR={base:g} ({how})")
    return said


def _draw(records: Sequence[Record], found: Found, path: Path) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rates = [r.rate for r in records]
    axes.plot(rates, [r.loss for r in records], ".", color="0.75", label="loss of a step")
    axes.plot(rates, [r.smoothed for r in records], label="smoothed")
    if found.rate is not None:
        axes.axvline(found.rate, color="C2", linestyle="--", label=f"suggested: {found.rate:g}")
    smooth = [r.smoothed for r in records if math.isfinite(r.smoothed)]
    if smooth:
        axes.set_ylim(0, _DIVERGED * min(smooth) * 1.1 if min(smooth) > 0 else None)
    axes.set(xscale="log", xlabel="learning rate", ylabel="total loss")
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path, "wb") as f:
        figure.savefig(f, format="png", dpi=120)
