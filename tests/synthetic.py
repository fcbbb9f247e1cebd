"""Random ground truth and results in COCO's form, with every kind of mistake; no image files."""

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils


def coco_case(
    seed: int = 0, images: int = 40, classes: int = 6, crowd: float = 0.05, ties: bool = False, masks: bool = False,
    keypoints: int = 0, name: str = "class {}",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """(content, results); the last class has no object, every seventh image none."""
    rng = np.random.default_rng(seed)
    entries, annotations, results = [], [], []

    def rle(box: list[float], height: int, width: int) -> dict[str, Any]:
        x, y, w, h = box
        ring = [x, y, x + w, y + 0.1 * h, x + 0.9 * w, y + h, x + 0.2 * w, y + 0.9 * h]
        run = mask_utils.merge(mask_utils.frPyObjects([ring], height, width))
        return {"size": [height, width], "counts": run["counts"].decode()}

    def points(box: list[float], noise: float) -> list[float]:
        place = np.linspace(0.1, 0.9, keypoints)[:, None] * box[2:] + box[:2]
        place = place + rng.normal(size=(keypoints, 2)) * noise * box[2]
        shown = 2 * (rng.random(keypoints) < 0.8)
        return np.concatenate([place, shown[:, None]], 1).ravel().tolist()

    for n in range(images):
        height, width = (int(v) for v in rng.integers(120, 500, 2))
        entries.append({"id": 3 * n + 1, "height": height, "width": width, "file_name": f"{n:04d}.jpg"})
        objects = []
        for _ in range(int(rng.poisson(6)) if n % 7 else 0):
            w, h = np.exp(rng.uniform(np.log(8), np.log([0.8 * width, 0.8 * height]))).tolist()
            x, y = rng.uniform(0, [width - w, height - h]).tolist()
            label = int(min(rng.geometric(0.3), classes))
            objects.append(([x, y, w, h], label))
            a = {"id": len(annotations) + 1, "image_id": 3 * n + 1, "category_id": 2 * label, "bbox": [x, y, w, h],
                 "area": float(w * h * rng.uniform(0.5, 1)), "iscrowd": int(rng.random() < crowd)}  # fmt: skip
            if masks:
                a["segmentation"] = rle([x, y, w, h], height, width)
            if keypoints:
                a["keypoints"] = points([x, y, w, h], 0.0)
                a["num_keypoints"] = sum(v > 0 for v in a["keypoints"][2::3])
            annotations.append(a)
        for _ in range(int(rng.integers(0, 18))):
            noise = 0.0
            if objects and rng.random() < 0.75:
                (x, y, w, h), label = objects[rng.integers(len(objects))]
                noise = float(rng.choice([0.02, 0.1, 0.3]))
                x, y = x + rng.normal() * noise * w, y + rng.normal() * noise * h
                w, h = w * np.exp(rng.normal() * noise), h * np.exp(rng.normal() * noise)
                label = int(rng.integers(1, classes + 1)) if rng.random() < 0.15 else label
                score = rng.beta(4, 2)
            else:
                w, h = rng.uniform(8, 110, 2)
                x, y = rng.uniform(0, [width - 8, height - 8])
                label, score = int(rng.integers(1, classes + 1)), rng.beta(1.5, 5)
            x, y = max(0.0, float(x)), max(0.0, float(y))
            box = [x, y, float(max(1.0, min(w, width - x))), float(max(1.0, min(h, height - y)))]
            entry = {"image_id": 3 * n + 1, "category_id": 2 * label, "bbox": box,
                     "score": float(np.round(score, 1 if ties else 5))}  # fmt: skip
            if masks:
                entry["segmentation"] = rle(box, height, width)
            if keypoints:
                entry["keypoints"] = points(box, noise)
            results.append(entry)
    categories = [{"id": 2 * c, "name": name.format(c)} for c in range(1, classes + 2)]
    return {"images": entries, "annotations": annotations, "categories": categories}, results
