"""One evaluation report: what a model's results are worth, where they go wrong, and what each kind of mistake costs.

`write_report` makes a folder with report.json (every number; docs/REPORT.md), index.html and pictures. Nothing here
needs TensorFlow or a model: ground truth and results are read from files of any system.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import report_errors
import report_numbers as numbers
from common import UserError, logger, without_nan, write_json
from eval import evaluate_proposals
from report_charts import write_charts
from report_data import data_facts
from report_numbers import AREAS, Record, Scene, Summary
from report_page import write_page
from report_pictures import write_pictures
from report_protocols import other_summary
from report_read import Problem, held_types, scenes_of

__all__ = ["RESAMPLES", "Model", "compare", "compared_names", "difference", "summary_of", "write_report"]

RESAMPLES = 1000
CROWDS = [(1, 3), (4, 7), (8, 15), (16, None)]  # objects in an image
LEVELS = np.arange(0, 100) / 100  # score thresholds of the page's slider
FIRST_LIMITS = {"keypoints": 20}  # detections of an image and class that take part; else 100


class Model(NamedTuple):
    """One results file: what the page and the comparison need of it, beside its part of report.json."""

    name: str
    scene: Scene
    verdicts: report_errors.Verdicts
    costs: tuple[np.ndarray, np.ndarray]  # of detections [D] and objects [G]
    summaries: dict[str, Summary]
    content: dict[str, Any]


def write_report(
    problem: Problem,
    results: dict[str, list[dict[str, Any]]],
    out: str | os.PathLike,
    iou_type: str | None = None,
    threshold: float | None = None,
    pictures: int = 40,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the report and returns the content of report.json.

    Args:
        problem: ground truth, protocol, image folder and so on, see `report_read.read_problem`.
        results: name -> entries of a COCO results file, checked; the first is the one that others are compared with.
        iou_type: what curves, errors and pictures are about: "bbox", "segm" or "keypoints"; default: the most
            detailed that all results hold and the protocol scores.
        threshold: score from which detections are drawn and counted in the confusion matrix; default: that of the
            first results' best F1.
        pictures: at most so many images in full, the worst first; 0 for none.
        resamples, seed: of the bootstrap over images.
    """
    if not results:
        raise UserError("the report needs at least one results file")
    held = [t for t in ("bbox", "segm", "keypoints") if all(t in held_types(r) for r in results.values())]
    types = [t for t in problem.types if t in held] or problem.types[:1]
    if iou_type and iou_type not in types:
        raise UserError(f"--iou-type {iou_type}: the results hold {', '.join(held)}; {problem.protocol} scores "
                        f"{', '.join(problem.types)}")  # fmt: skip
    main = iou_type or types[-1]
    weights = numbers.resample(len(problem.content["images"]), resamples, seed)
    models: list[Model] = []
    for name, entries in results.items():
        logger.info(f"{name}: {len(entries)} detections on {len(problem.content['images'])} images")
        models.append(_analyse(problem, name, entries, types, main, weights, threshold))
        threshold = models[0].content["threshold"] if threshold is None else threshold
    scene = models[0].scene
    content: dict[str, Any] = {
        "format": 1,
        "protocol": problem.protocol,
        "iou_type": main,
        "ground_truth": problem.name,
        "bootstrap": {"resamples": resamples, "seed": seed, "level": 0.95},
        "classes": scene.class_names,
        "data": data_facts(scene, problem.settings),
        "models": [m.content for m in models],
        "comparisons": [compare(models[0], m) for m in models[1:]],
    }
    if problem.settings:
        content["run"] = {"settings": problem.settings}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    content["pictures"] = write_pictures(problem, models, out, pictures)
    content = without_nan(content)
    write_json(out / "report.json", content)
    write_charts(content, out)
    write_page(out, content)
    logger.info(f"report in {out / 'index.html'}")
    return content


# ------------------------------------------------------------------------------------------------ one results file
def _analyse(problem, name, entries, types, main, weights, threshold) -> Model:
    summaries, records = {}, []
    scenes = scenes_of(problem, entries, sorted({*types, *(["bbox"] if main == "segm" else [])}))
    for kind in types:
        summaries[kind], first = summary_of(problem, scenes[kind], entries, weights)
        if kind == main:
            records = first
    scene = scenes[main]
    verdicts = report_errors.judge(scene)
    costs = report_errors.cost_of_mistakes(scene, verdicts)
    together = numbers.pooled(records)
    best = numbers.best_f1(together)
    if threshold is None:
        threshold = best["threshold"] if best else 0.5
    content: dict[str, Any] = {
        "name": name,
        "detections": len(entries),
        "threshold": float(threshold),
        "summary": {kind: _with_intervals(s) for kind, s in summaries.items()},
        "classes": _class_table(scene, verdicts, costs, records, summaries),
        "sizes": _sizes(scenes, summaries, weights),
        "crowdedness": _crowdedness(scene, records, weights),
        "curves": _curves(records),
        "thresholds": {
            "best": best, "levels": LEVELS.tolist(), "table": numbers.threshold_table(together, LEVELS[5::5]),
            "classes": _threshold_counts(records), "objects": [float(r.objects.sum()) for r in records],
        },
        "calibration": numbers.calibration(together),
        "confusion": {
            "threshold": float(threshold),
            "matrix": _sparse(report_errors.confusion_matrix(scene, verdicts, threshold)),
        },
        "errors": report_errors.split_errors(scene, verdicts),
    }  # fmt: skip
    if main == "segm":
        content["masks"] = report_errors.mask_quality(scene, report_errors.judge(scenes["bbox"]))
    if main == "keypoints":
        content["keypoints"] = report_errors.keypoint_errors(scene, verdicts, problem.flip, problem.point_names)
    if problem.proposals is not None:
        content["proposals"] = evaluate_proposals(problem.content, problem.proposals, verbose=False)
    return Model(name, scene, verdicts, costs, summaries, content)


def summary_of(
    problem: Problem, scene: Scene, entries: list[dict], weights: np.ndarray
) -> tuple[Summary, list[Record]]:
    """The protocol's numbers of one kind of result, and the records by class of its AP, for the curves."""
    if problem.protocol not in ("coco", "lvis"):
        return other_summary(problem, scene, entries, weights)
    keypoints, lvis = scene.iou_type == "keypoints", problem.protocol == "lvis"
    areas = {k: v for k, v in AREAS.items() if not (keypoints and k == "s")}
    limit = 300 if lvis else FIRST_LIMITS.get(scene.iou_type, 100)
    matches = numbers.match_scene(scene, limit, areas=areas)
    by_area = {name: numbers.coco_records(scene, matches, a, limit) for a, name in enumerate(areas)}
    everything = slice(None)
    first = by_area[""]
    parts: dict[str, tuple[list[Record], Any]] = {"AP": (first, everything), "AP50": (first, [0]), "AP75": (first, [5])}
    parts |= {f"AP{a}": (by_area[a], everything) for a in areas if a}
    recalls: dict[str, tuple[list[Record], Any]]
    if keypoints:
        recalls = {"AR": (first, everything), "AR50": (first, [0]), "AR75": (first, [5])}
    elif lvis:
        recalls = {"AR": (first, everything)}
    else:
        limits = {f"AR{n}": (numbers.coco_records(scene, matches, 0, n), everything) for n in (1, 10)}
        recalls = {**limits, "AR100": (first, everything)}
    recalls |= {f"AR{a}": (by_area[a], everything) for a in areas if a}
    groups = None
    if lvis:
        of_class = np.array(problem.frequencies)
        groups = {f"AP{f}": of_class == f for f in ("r", "c", "f")}
    return numbers.summarise(parts, recalls, weights, groups), first


def _with_intervals(summary: Summary) -> dict[str, Any]:
    result = {}
    for name, value in summary.values.items():
        low, high = numbers.interval(value, summary.samples[name])
        result[name] = {"value": value, "low": low, "high": high}
    return result


def _class_table(scene, verdicts, costs, records, summaries) -> list[dict[str, Any]]:
    count = len(scene.class_names)
    real = ~scene.gt_ignore
    pairs = np.unique(np.stack([scene.gt_label[real], scene.gt_image[real]]), axis=1)
    images = np.bincount(pairs[0], minlength=count)
    detections = np.bincount(scene.dt_label, minlength=count)
    lost = np.bincount(scene.dt_label, costs[0], count) + np.bincount(scene.gt_label, costs[1], count)
    kinds = {
        name: np.bincount(scene.dt_label[verdicts.kind == k], minlength=count)
        for k, name in enumerate(report_errors.KINDS)
    }
    missed = np.bincount(scene.gt_label[real & (verdicts.found_by < 0)], minlength=count)
    rows = []
    for c, name in enumerate(scene.class_names):
        row: dict[str, Any] = {
            "name": name, "objects": int(records[c].objects.sum()), "images": int(images[c]),
            "detections": int(detections[c]), "lost": float(lost[c]), "missed": int(missed[c]),
            "kinds": {k: int(v[c]) for k, v in kinds.items() if k not in ("ignored", "not judged")},
            "best_f1": numbers.best_f1(records[c]),
        }  # fmt: skip
        for kind, summary in summaries.items():
            row[kind] = {}
            for metric, values in summary.class_values.items():
                row[kind][metric] = float(values[c])
            main = next(iter(summary.class_values))
            bounds = numbers.interval(row[kind][main], summary.class_samples[main][c])
            row[kind]["low"], row[kind]["high"] = bounds
        rows.append(row)
    return rows


def _crowdedness(scene: Scene, records: list[Record], weights: np.ndarray) -> list[dict[str, Any]]:
    """AP on the images with so many objects, with its interval."""
    per_image = np.bincount(scene.gt_image[~scene.gt_ignore], minlength=len(scene.image_ids))
    groups = [(per_image >= low) & (per_image <= (high or np.inf)) for low, high in CROWDS]
    # All groups at once: for each, its images as they are and 200 samples.
    drawn = np.concatenate([np.ones((len(weights), 1), np.float32), weights[:, :200]], 1)
    columns = np.concatenate([drawn * chosen[:, None] for chosen in groups], 1)
    table = numbers.class_mean([numbers.bootstrap(r, columns).mean(0) for r in records]).reshape(len(CROWDS), -1)
    rows = []
    for (low, high), chosen, row in zip(CROWDS, groups, table):
        bounds = numbers.interval(float(row[0]), row[1:])
        rows.append({
            "from": low, "to": high, "images": int(chosen.sum()), "objects": int(per_image[chosen].sum()),
            "AP": float(row[0]), "low": bounds[0], "high": bounds[1],
        })  # fmt: skip
    return rows


def _sizes(scenes: dict[str, Scene], summaries: dict[str, Summary], weights: np.ndarray) -> list[dict[str, Any]]:
    """AP of objects of each of COCO's sizes: the protocol's own, or where it has none AP50 by COCO's matching."""
    rows = []
    for kind, summary in summaries.items():
        scene = scenes[kind]
        sizes = {k: v for k, v in AREAS.items() if k and not (kind == "keypoints" and k == "s")}
        metric = "AP" if "APm" in summary.values else "AP50"
        if metric == "AP50":
            matches = numbers.match_scene(scene, thresholds=np.array([0.5]), areas=sizes)
            parts = {f"AP{k}": (numbers.coco_records(scene, matches, n), [0]) for n, k in enumerate(sizes)}
            summary = numbers.summarise(parts, {}, weights)
        for size, (low, high) in sizes.items():
            inside = (scene.gt_area >= low) & (scene.gt_area <= high) & ~scene.gt_ignore
            value = summary.values[f"AP{size}"]
            bounds = numbers.interval(value, summary.samples[f"AP{size}"])
            rows.append({
                "size": size, "of": kind, "objects": int(inside.sum()), "metric": metric, "value": value,
                "low": bounds[0], "high": bounds[1],
            })  # fmt: skip
    return rows


def _curves(records: list[Record]) -> dict[str, Any]:
    """Precision (its envelope) at 101 recalls, at the first IoU threshold; of each class and their mean."""
    table = []
    for r in records:
        if not r.objects.sum():
            table.append(None)
            continue
        precision, recall, _ = numbers.precision_recall(r)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(recall, numbers.RECALLS - 1e-12, side="left")
        table.append([round(v, 4) for v in np.append(envelope, 0.0)[np.minimum(at, len(envelope))].tolist()])
    known = [row for row in table if row]
    mean = np.mean(known, 0).round(4).tolist() if known else None
    return {"mean": mean, "classes": table}


def _threshold_counts(records: list[Record]) -> list[dict[str, list[int]]]:
    rows = []
    for r in records:
        right, wrong = numbers.score_counts(r, LEVELS)
        rows.append({"right": right.tolist(), "wrong": wrong.tolist()})
    return rows


def _sparse(matrix: np.ndarray) -> list[list[int]]:
    """[row, column, count] of every entry that is not zero: a thousand classes have a million."""
    rows, columns = np.nonzero(matrix)
    return np.stack([rows, columns, matrix[rows, columns]], 1).tolist()


# ------------------------------------------------------------------------------------------------ comparison
def compare(first: Model, second: Model) -> dict[str, Any]:
    """Differences second - first on the same images: paired bootstrap intervals and two-sided p-values."""
    if first.scene.image_ids != second.scene.image_ids:
        raise ValueError("results on different images cannot be compared")
    summary = {}
    for kind, a in first.summaries.items():
        b = second.summaries[kind]
        summary[kind] = {
            name: {"first": a.values[name], "second": b.values[name],
                   **difference(b.values[name] - a.values[name], b.samples[name] - a.samples[name])}
            for name in a.values
        }  # fmt: skip
    main = first.scene.iou_type
    a, b = first.summaries[main], second.summaries[main]
    metric = next(iter(a.class_values))
    classes = []
    for c, name in enumerate(first.scene.class_names):
        x, y = float(a.class_values[metric][c]), float(b.class_values[metric][c])
        if not math.isnan(x) and not math.isnan(y):
            samples = b.class_samples[metric][c] - a.class_samples[metric][c]
            classes.append({"name": name, "first": x, "second": y, **difference(y - x, samples)})
    lost = [report_errors.lost_by_image(m.scene, m.costs) for m in (first, second)]
    change = lost[1] - lost[0]
    order = np.argsort(change, kind="stable")
    images = [
        {"image_id": first.scene.image_ids[n], "file": first.scene.image_files[n], "change": float(-change[n])}
        for n in [*order[:50], *order[-50:][::-1]]
        if change[n]
    ]
    unique = {str(i["image_id"]): i for i in images}
    return {
        "first": first.name, "second": second.name, "metric": metric, "summary": summary, "classes": classes,
        "better": int((change < -1e-12).sum()), "worse": int((change > 1e-12).sum()),
        "images": sorted(unique.values(), key=lambda i: -i["change"]),
    }  # fmt: skip


def difference(value: float, samples: np.ndarray) -> dict[str, float]:
    """The difference with its 95 % interval, and the two-sided p that goes with it: below 0.05 where 0 lies outside."""
    samples = samples[np.isfinite(samples)]
    if not len(samples) or not math.isfinite(value):
        return {"difference": value, "low": math.nan, "high": math.nan, "p": math.nan}
    around = samples - samples.mean() + value
    low, high = (np.percentile(around, q, method=m) for q, m in ((2.5, "lower"), (97.5, "higher")))
    # One is added to both parts of the share, as no number of samples shows a probability of 0.
    beyond = min((around <= 1e-12).sum(), (around >= -1e-12).sum())
    p = min(1.0, 2 * (beyond + 1) / (len(samples) + 1))
    return {"difference": value, "low": float(low), "high": float(high), "p": float(p)}


def compared_names(paths: Sequence[str | os.PathLike]) -> list[str]:
    """A name for each results file: the shortest end of its path that tells it from the others."""
    parts = [Path(p).with_suffix("").parts for p in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"--detections names {paths[0]} twice")
