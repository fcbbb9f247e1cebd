"""Facts of a data set for the evaluation report: classes, sizes, and which objects no anchor can match."""

import math
from typing import Any

import numpy as np

from report_numbers import Scene

__all__ = ["anchor_fit", "data_facts"]

_SIDES = [0, 8, 16, 32, 64, 96, 128, 256, 512, math.inf]  # of boxes, as the square root of their area


def data_facts(scene: Scene, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Counts of images, objects and classes, box sizes and shapes; with a run's settings also how its anchors fit."""
    real = ~scene.gt_ignore
    sides = scene.gt_box[real, 2:] - scene.gt_box[real, :2]
    per_image = np.bincount(scene.gt_image[real], minlength=len(scene.image_ids))
    ratio = sides[:, 1] / np.maximum(sides[:, 0], 1e-9)
    facts: dict[str, Any] = {
        "images": len(scene.image_ids),
        "images_without_objects": int((per_image == 0).sum()),
        "objects": int(real.sum()),
        "ignored_regions": int((~real).sum()),
        "objects_per_image": {"mean": float(per_image.mean()) if len(per_image) else math.nan,
                              "most": int(per_image.max(initial=0))},
        "sides": _by_side(sides),
        "height_by_width": [float(v) for v in np.percentile(ratio, [5, 25, 50, 75, 95])] if len(ratio) else [],
    }  # fmt: skip
    if settings and scene.sizes.all():
        facts["anchors"] = anchor_fit(scene, settings)
    return facts


def _by_side(sides: np.ndarray) -> list[dict[str, Any]]:
    """How many boxes of these widths and heights [n, 2] there are of each size."""
    root = np.sqrt(np.maximum(sides.prod(1), 0))
    return [
        {"from": low, "to": high if high < math.inf else None, "count": int(((root >= low) & (root < high)).sum())}
        for low, high in zip(_SIDES, _SIDES[1:])
    ]


def anchor_fit(scene: Scene, settings: dict[str, Any]) -> dict[str, Any]:
    """How well the anchors of the run with these settings overlap the objects, at the size that the network sees.

    Anchors are centred at the multiples of their stride. An object "fits" with an IoU of RPN.POSITIVE_ANCHOR_THRESH or
    more; one below RPN.NEGATIVE_ANCHOR_THRESH is "unmatched": it trains the network by its best anchor alone, which
    elsewhere would be background.
    """

    def get(key: str, default: Any) -> Any:
        return settings.get(key, default)

    sizes, ratios = get("RPN.ANCHOR_SIZES", [32, 64, 128, 256, 512]), get("RPN.ANCHOR_RATIOS", [0.5, 1.0, 2.0])
    if get("MODE_FPN", True):
        levels = [(stride, [size]) for stride, size in zip(get("FPN.ANCHOR_STRIDES", [4, 8, 16, 32, 64]), sizes)]
    else:
        levels = [(get("RPN.ANCHOR_STRIDE", 16), sizes)]
    shapes = get("RPN.CELL_ANCHORS", []) or [
        [[-w / 2, -r * w / 2, w / 2, r * w / 2] for s in level for r in ratios for w in [math.sqrt(s * s / r)]]
        for _, level in levels
    ]
    short, longest = get("PREPROC.TEST_SHORT_EDGE_SIZE", 800), get("PREPROC.MAX_SIZE", 1333)
    hw = scene.sizes.astype(np.float64)
    scale = np.minimum(short / hw.min(1), longest / hw.max(1))
    real = np.flatnonzero(~scene.gt_ignore)
    boxes = scene.gt_box[real] * scale[scene.gt_image[real], None]
    limit = hw[scene.gt_image[real]][:, ::-1] * scale[scene.gt_image[real], None]  # width, height
    best = np.zeros(len(boxes))
    for (stride, _), cells in zip(levels, shapes):
        for cell in np.asarray(cells, np.float64):
            # The overlap is largest where the anchor's centre is next to the object's.
            middle = (cell[:2] + cell[2:]) / 2
            steps = np.round(((boxes[:, :2] + boxes[:, 2:]) / 2 - middle) / stride)
            shift = np.clip(steps, 0, np.maximum(np.ceil(limit / stride) - 1, 0)) * stride
            low = np.maximum(boxes[:, :2], shift + cell[:2])
            high = np.minimum(boxes[:, 2:], shift + cell[2:])
            common = np.maximum(high - low, 0).prod(1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (cell[2:] - cell[:2]).prod()
            best = np.maximum(best, common / (area - common))
    positive, negative = get("RPN.POSITIVE_ANCHOR_THRESH", 0.7), get("RPN.NEGATIVE_ANCHOR_THRESH", 0.3)
    labels = scene.gt_label[real]
    lost = best < negative
    worst = np.bincount(labels[lost], minlength=len(scene.class_names))
    return {
        "positive_iou": positive, "negative_iou": negative, "objects": len(best),
        "fit": int((best >= positive).sum()), "unmatched": int(lost.sum()),
        "histogram": np.histogram(best, np.linspace(0, 1, 11))[0].tolist(),
        "mean_best_iou": float(best.mean()) if len(best) else math.nan,
        "unmatched_by_side": _by_side((scene.gt_box[real, 2:] - scene.gt_box[real, :2])[lost]),
        "unmatched_by_class": [
            {"name": scene.class_names[c], "count": int(worst[c])} for c in np.argsort(-worst)[:20] if worst[c]
        ],
    }  # fmt: skip
