"""The best checkpoint of a run and its early end: what follows from the scores of its evaluations.

`standing` is a function of the list of evaluations and of the settings alone. The list is stored with each checkpoint,
so that a run that continues from any checkpoint decides as one that was never interrupted.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from common import UserError, logger, without_nan
from config import Config
from config_check import nearest
from dataset_split import DatasetSplit
from eval import evaluate_proposals
from eval_protocols import PROTOCOLS

__all__ = [
    "Evaluation", "Rule", "Scores", "Standing", "check_metrics", "make_rule", "scored_kinds", "shown_score", "standing",
]  # fmt: skip

# TRAIN.BEST_METRIC=auto: the first of these that the evaluations give.
_AUTO = (
    "segm/AP", "bbox/AP", "keypoints/AP", "oid-v2/mAP", "oid-challenge/mAP", "oid-challenge-segm/mAP", "cityscapes/AP",
    "voc12/mAP", "voc07/mAP", "proposals/AR@1000",
)  # fmt: skip


class Evaluation(NamedTuple):
    """The scores of the model of a step, without those of single classes."""

    step: int
    metrics: dict[str, float]


class Rule(NamedTuple):
    """What the settings say about the best checkpoint and the end of a run. A metric with "-" before its name is better
    if smaller."""

    metrics: tuple[str, ...] = ()  # the first of these that an evaluation gave decides; none: there is no best
    patience: int | None = None
    min_delta: float = 0.0
    target: tuple[tuple[str, float], ...] = ()


class Standing(NamedTuple):
    """Where a run stands after its evaluations."""

    metric: str = ""  # the one that decides
    step: int | None = None  # of the best evaluation; None if no score is a number
    score: float = math.nan  # its value of the metric
    since: int = 0  # evaluations since the last improvement
    stop: str = ""  # why the run ends; "" if it goes on


def make_rule(cfg: Config, sets: Sequence[str]) -> Rule:
    """sets: names of the validation sets. With several of them, metrics begin with the name of their set, and the first
    set that has a metric decides in TRAIN.BEST_METRIC=auto."""
    train = cfg.TRAIN
    metrics: tuple[str, ...] = ()
    if train.BEST_METRIC == "auto":
        metrics = _AUTO if len(sets) < 2 else tuple(f"{name}/{metric}" for name in sets for metric in _AUTO)
        metrics += ("-val/total_loss",)
    elif train.BEST_METRIC is not None:
        metrics = (train.BEST_METRIC,)
    return Rule(metrics, train.PATIENCE, train.MIN_DELTA, tuple(sorted(train.TARGET.items())))


def _value(metric: str, metrics: dict[str, float]) -> float:
    """The metric's value such that larger is better; nan if it is not a number."""
    value = metrics.get(metric.removeprefix("-"), math.nan)
    return math.nan if not math.isfinite(value) else -value if metric.startswith("-") else value


def standing(evaluations: Iterable[Evaluation], rule: Rule) -> Standing:
    """Where a run stands. The best evaluation is the first of those with the largest score. The score must exceed the
    one of the last improvement by more than min_delta to be another improvement; nan is never one. Evaluations without
    the metric are ignored."""
    evaluations = sorted(evaluations)
    metric = next((m for m in rule.metrics if any(m.removeprefix("-") in e.metrics for e in evaluations)), "")
    best, reference, best_step, since, stop = math.nan, math.nan, None, 0, ""
    for step, metrics in evaluations:
        if rule.target and not stop and all(_value(m, metrics) >= _wanted(m, w) for m, w in rule.target):
            reached = ", ".join(shown_score(m, metrics.get(m.removeprefix("-"), math.nan)) for m, _ in rule.target)
            stop = f"TRAIN.TARGET was reached at step {step} ({reached})"
        if not metric or metric.removeprefix("-") not in metrics:
            continue
        value = _value(metric, metrics)
        if not value <= best and not math.isnan(value):
            best, best_step = value, step
        if not value <= reference + rule.min_delta and not math.isnan(value):
            reference, since = value, 0
        else:
            since += 1
    if rule.patience is not None and since >= rule.patience and not stop:
        stop = (
            f"{metric.removeprefix('-')} has not improved by more than {rule.min_delta:g} in {since} evaluations "
            f"(TRAIN.PATIENCE={rule.patience})"
        )
    score = -best if metric.startswith("-") else best
    return Standing(metric, best_step, score, since, stop)


def _wanted(metric: str, wanted: float) -> float:
    return -wanted if metric.startswith("-") else wanted


def shown_score(metric: str, score: float) -> str:
    """ "segm/AP 0.3412"."""
    return f"{metric.removeprefix('-')} {score:.4f}"


class Scores:
    """The evaluations of a run: those that are done, and the steps whose checkpoints are still to be evaluated."""

    def __init__(self, rule: Rule, meta: dict[str, Any] | None = None):
        """meta: the description of the checkpoint that the run continues from."""
        meta = meta or {}
        self.rule = rule
        self.done = [Evaluation(e["step"], _numbers(e["metrics"])) for e in meta.get("evaluations") or ()]
        self.pending: list[int] = list(meta.get("pending_evaluations") or ())
        # Why the run ended early, with the rule by which it did.
        self._stopped: dict[str, Any] | None = meta.get("stopped")

    def begin(self, step: int) -> None:
        """From now on a checkpoint says that the model of this step is to be evaluated."""
        if step not in self.pending and all(e.step != step for e in self.done):
            self.pending.append(step)

    def drop(self, step: int) -> None:
        """The model of this step will not be evaluated."""
        self.pending = [s for s in self.pending if s != step]

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.drop(step)
        named = {m.removeprefix("-") for m in (*self.rule.metrics, *(m for m, _ in self.rule.target))}
        overall = {k: float(v) for k, v in metrics.items() if "per_class" not in k or k in named}
        self.done = sorted([e for e in self.done if e.step != step] + [Evaluation(step, overall)])

    def standing(self) -> Standing:
        return standing(self.done, self.rule)

    def wanted(self) -> list[str]:
        """Names of the metrics that the settings name."""
        alone = self.rule.metrics if len(self.rule.metrics) == 1 else ()
        return [m.removeprefix("-") for m in (*alone, *(m for m, _ in self.rule.target))]

    def why_finished(self) -> str:
        """Why the run ends or has ended early by the present settings, or ""."""
        if self._stopped and self._stopped.get("rule") == _plain(self.rule):
            return self._stopped.get("reason") or ""
        return self.standing().stop

    def stop(self, reason: str) -> None:
        self._stopped = {"reason": reason, "rule": _plain(self.rule)}

    def description(self, step: int) -> dict[str, Any]:
        """What the description of the checkpoint of this step holds."""
        done = [{"step": e.step, "metrics": without_nan(e.metrics)} for e in self.done if e.step <= step]
        return {
            "evaluations": done, "pending_evaluations": [s for s in self.pending if s <= step] or None,
            "stopped": self._stopped,
        }  # fmt: skip


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """JSON has null for a number that is not finite."""
    return {k: math.nan if v is None else float(v) for k, v in metrics.items()}


def _plain(rule: Rule) -> list:
    """The rule as JSON gives it back."""
    return [list(rule.metrics), rule.patience, rule.min_delta, [list(t) for t in rule.target]]


# --------------------------------------------------------------------------------------------------- names of metrics
def check_metrics(cfg: Config, splits: Sequence[DatasetSplit]) -> None:
    """Raises UserError, before expensive work, for a metric of TRAIN.BEST_METRIC or TRAIN.TARGET that the evaluations
    on these sets will not give."""
    named = [("TRAIN.TARGET", m) for m in cfg.TRAIN.TARGET]
    if cfg.TRAIN.BEST_METRIC not in (None, "auto"):
        named.append(("TRAIN.BEST_METRIC", cfg.TRAIN.BEST_METRIC))
    if not named:
        return
    known: list[str] = []
    for split in splits:
        prefix = "" if len(splits) == 1 else f"{split.name}/"
        known += [prefix + name for name in _names_of_set(cfg, split)]
    for setting, metric in named:
        name = metric.removeprefix("-")
        if name in known or "val/" in name:  # names of losses come from the model; val/total_loss is always there
            continue
        near = nearest(name, known, count=3)
        overall = [n for n in known if "per_class" not in n]
        shown = ", ".join(near) if near else f"{', '.join(overall[:12])}{' …' if len(overall) > 12 else ''}"
        raise UserError(
            f"setting {setting}: the evaluations on {', '.join(s.name for s in splits)} give no {name}; "
            f"{'the nearest are' if near else 'they give'} {shown}"
        )


def _names_of_set(cfg: Config, split: DatasetSplit) -> list[str]:
    """Names of the metrics that evaluations on the set give: those of scoring nothing."""
    found = zip(split.category_ids, split.class_names)
    categories = [{"id": c, "name": name, "frequency": "f"} for c, name in found if c is not None]
    image = {"id": 1, "height": 1, "width": 1, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    content: dict[str, Any] = {"images": [image], "annotations": [], "categories": categories}
    before, logger.disabled = logger.disabled, True  # warnings that nothing is there
    try:
        if cfg.MODE_RPN_ONLY:
            return list(evaluate_proposals(content, [], verbose=False))
        if type(split).evaluate is not DatasetSplit.evaluate:  # Open Images, which has these or fewer
            protocols: Sequence[str] = ("oid-v2", "oid-challenge", "oid-challenge-segm")
        else:
            protocols = split.protocols
        kinds = scored_kinds(cfg)
        scores = [PROTOCOLS[p](_copy(content), [], iou_types=kinds, verbose=False) for p in protocols]
        return [name for metrics in scores for name in metrics if "/num_" not in name]
    finally:
        logger.disabled = before


def scored_kinds(cfg: Config) -> list[str]:
    """What COCO's and LVIS' protocols score of this model's results."""
    return ["bbox"] + ["segm"] * bool(cfg.MODE_MASK) + ["keypoints"] * bool(cfg.MODE_KEYPOINT)


def _copy(content: dict[str, Any]) -> dict[str, Any]:
    return {key: [dict(entry) for entry in entries] for key, entries in content.items()}
