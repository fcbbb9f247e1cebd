"""Pictures of an evaluation report: ground truth beside the detections, mistakes marked and named."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from common import UserError, atomic_write, logger
from report_errors import BACKGROUND, CLASS, DUPLICATE, IGNORED, KINDS, RIGHT, UNJUDGED, lost_by_image
from report_numbers import Scene
from report_read import Problem, image_path
from utils.image_header import decode_image
from viz import drawable_name, drawable_text

__all__ = ["COLORS", "tag_places", "write_pictures"]

SIDE = 640  # longest side of a picture's half
CUTOUT = 224  # of a single mistake
PER_CLASS = 4  # cut-outs of a class and kind
MOST_CUTOUTS = 1200
# BGR; told apart by brightness as well as by hue. The page names each in words.
COLORS = {
    "right": (80, 175, 76), "class": (50, 110, 240), "localisation": (30, 190, 245), "both": (150, 90, 200),
    "duplicate": (200, 190, 60), "background": (70, 50, 230), "missed": (230, 110, 40), "ignored": (160, 160, 160),
    "not judged": (160, 160, 160),
}  # fmt: skip
INK, PAPER = (30, 30, 30), (255, 255, 255)


def write_pictures(problem: Problem, models: list, out: Path, most: int) -> dict[str, Any]:
    """Writes images/*.jpg for the models of a report and says which there are.

    Returns {"worst": [by model: entries by falling cost], "mistakes": [by model: …], "compared": [by comparison: …]};
    an entry names its file, image, what is lost and the mistakes shown.
    """
    result: dict[str, Any] = {"worst": [], "mistakes": [], "compared": [], "missing": 0}
    folder = out / "images"
    for old in [*folder.glob("model*-*.jpg"), *folder.glob("compare*-*.jpg")]:  # of an earlier report in this folder
        old.unlink()
    if not most or not problem.image_folders:
        return result
    folder.mkdir(exist_ok=True)
    reader = _Reader(problem, models[0].scene)
    for number, model in enumerate(models):
        result["worst"].append(_worst_images(reader, model, folder, f"model{number + 1}", most))
        result["mistakes"].append(_mistakes(reader, model, folder, f"model{number + 1}"))
    for number, model in enumerate(models[1:], 2):
        result["compared"].append(_compared(reader, models[0], model, folder, f"compare{number}", min(most, 12)))
    result["missing"] = len(reader.missing)
    if reader.missing:
        some = ", ".join(sorted(reader.missing)[:3])
        logger.warning(f"{len(reader.missing)} images are not in {', '.join(problem.image_folders)}, e.g. {some}")
    return result


class _Reader:
    """Images by their number, scaled to be drawn on."""

    def __init__(self, problem: Problem, scene: Scene):
        self.problem, self.scene = problem, scene
        self.missing: set[str] = set()

    def __call__(self, n: int) -> tuple[np.ndarray, np.ndarray] | None:
        """The image, at most SIDE long, and the scale [x, y] from annotated to drawn pixels."""
        path = image_path(self.problem, self.scene.image_files[n])
        image = None
        if path is not None:
            with contextlib.suppress(UserError):
                image = decode_image(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            self.missing.add(self.scene.image_files[n])
            return None
        height, width = image.shape[:2]
        factor = min(1.0, SIDE / max(height, width)) if max(height, width) > 320 else SIDE / 2 / max(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        drawn = cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
        declared = self.scene.sizes[n][::-1] if self.scene.sizes[n].all() else (1, 1)
        return drawn, np.array(size) / declared


def _write(path: Path, picture: np.ndarray, quality: int = 80) -> str:
    with atomic_write(path, "wb", durable=False) as f:
        f.write(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    return f"{path.parent.name}/{path.name}"


# ------------------------------------------------------------------------------------------------ drawing
def _text(canvas: np.ndarray, tags: list[tuple[str, tuple, tuple, int]]) -> None:
    """Tags (text, box of what it names, color, size), the most important first: lines of text on a ground of their
    color, inside the canvas and beside each other where there is room."""
    font, room = cv2.FontFace("sans"), canvas.shape[1] - 6

    def width(text: str, size: int) -> int:
        return cv2.getTextSize((1, 1), drawable_text(text), (0, 0), font, size, 600)[2]

    # Smaller letters where a narrow picture would cut the text.
    tags = [(text, box, color, max(7, min(size, size * room // max(1, width(text, size))))) for text, box, color, size
            in tags]  # fmt: skip
    sizes = [(width(text, size) + 6, round(1.3 * size)) for text, _, _, size in tags]
    places = tag_places([box for _, box, _, _ in tags], sizes, canvas.shape[:2])
    for (text, _, color, size), (x, y), (wide, high) in reversed(list(zip(tags, places, sizes))):
        cv2.rectangle(canvas, (x, y), (x + wide, y + high), color, -1)
        light = 0.114 * color[0] + 0.587 * color[1] + 0.299 * color[2] > 140
        ink = INK if light else PAPER
        cv2.putText(canvas, drawable_text(text), (x + 3, y + round(0.98 * size)), ink, font, size, 600)


def tag_places(boxes: list[tuple], sizes: list[tuple[int, int]], shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Left and top of tags of `sizes` (width, height): on top of their box, or as near to it as there is room beside
    the tags before; on top of it where there is none."""
    taken = np.zeros((0, 4))
    places = []
    for (left, top, *_), (width, height) in zip(boxes, sizes):
        steps = [step for k in range(1, 6) for step in (-k, k - 1)]  # rows above and below the upper edge
        wanted = np.array([[left, top + step * (height + 1)] for step in steps])
        wanted = np.clip(wanted, 0, [max(0, shape[1] - width), max(0, shape[0] - height)])
        covered = np.array([((x < taken[:, 2]) & (x + width >= taken[:, 0])
                             & (y < taken[:, 3]) & (y + height >= taken[:, 1])).any() for x, y in wanted])  # fmt: skip
        x, y = (int(v) for v in wanted[covered.argmin()])
        places.append((x, y))
        taken = np.vstack([taken, [x, y, x + width + 1, y + height + 1]])
    return places


def _outline(canvas: np.ndarray, scene: Scene, which: str, i: int, scale: np.ndarray, color: tuple, line: int) -> tuple:
    """Draws one object or detection: its box, its mask's contour where it has one, its points. Returns its box."""
    box = (scene.gt_box if which == "gt" else scene.dt_box)[i] * np.tile(scale, 2)
    masks = scene.gt_masks if which == "gt" else scene.dt_masks
    points = scene.gt_points if which == "gt" else scene.dt_points
    x1, y1, x2, y2 = (round(float(v)) for v in box)
    if masks is not None:
        mask = mask_utils.decode(masks[i])
        mask = cv2.resize(mask, canvas.shape[1::-1], interpolation=cv2.INTER_AREA)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(canvas, contours, -1, INK, line + 2, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)
    else:
        cv2.rectangle(canvas, (x1, y1), (x2, y2), INK, line + 2)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), color, line)
    if points is not None:
        for x, y, v in points[i]:
            if v > 0 or which == "dt":
                cv2.circle(canvas, (round(x * scale[0]), round(y * scale[1])), line + 2, INK, -1, cv2.LINE_AA)
                cv2.circle(canvas, (round(x * scale[0]), round(y * scale[1])), line + 1, color, -1, cv2.LINE_AA)
    return x1, y1, x2, y2


def _drawn_name(scene: Scene, label: int) -> str:
    return drawable_name(scene.class_names[label], int(label) + 1)


def _full_name(scene: Scene, label: int) -> str:
    return scene.class_names[label]


def _names(scene: Scene, verdicts: Any, d: int, name: Callable[[Scene, int], str] = _drawn_name) -> str:
    """What is written on a detection."""
    own = f"{name(scene, scene.dt_label[d])} {scene.dt_score[d]:.2f}"
    kind = verdicts.kind[d]
    if kind == CLASS:
        return f"{own}: is {name(scene, scene.gt_label[verdicts.object[d]])}"
    if kind in (RIGHT, IGNORED, UNJUDGED):
        return own
    if kind == BACKGROUND:
        return f"{own}: nothing there"
    if kind == DUPLICATE:
        return f"{own}: found twice"
    return f"{own}: {KINDS[kind]}, IoU {verdicts.overlap[d]:.2f}"


def _shown(model: Any, n: int) -> np.ndarray:
    first = model.scene.first_detection()
    rows = np.arange(first[n], first[n + 1])
    return rows[model.scene.dt_score[rows] >= model.content["threshold"]]


def _draw_truth(model: Any, n: int, image: np.ndarray, scale: np.ndarray) -> np.ndarray:
    scene, canvas = model.scene, image.copy()
    first = scene.first_object()
    shown = set(_shown(model, n).tolist())
    tags = []
    for g in range(first[n], first[n + 1]):
        found = model.verdicts.found_by[g]
        kind = "ignored" if scene.gt_ignore[g] else "right" if found in shown else "missed"
        box = _outline(canvas, scene, "gt", g, scale, COLORS[kind], 2)
        name = _drawn_name(scene, scene.gt_label[g])
        if kind == "missed":
            name += f": missed, found at {scene.dt_score[found]:.2f}" if found >= 0 else ": missed"
        tags.append((name, box, COLORS[kind]))
    missed = COLORS["missed"]
    tags.sort(key=lambda tag: tag[2] != missed)
    _text(canvas, [(name, box, color, 13 if color == missed else 11) for name, box, color in tags])
    return canvas


def _draw_found(model: Any, n: int, image: np.ndarray, scale: np.ndarray) -> np.ndarray:
    canvas = image.copy()
    rows = _shown(model, n)
    boxes = [
        _outline(canvas, model.scene, "dt", d, scale, COLORS[KINDS[model.verdicts.kind[d]]], 2) for d in rows[::-1]
    ][::-1]
    # Mistakes come first, so that no name hides theirs.
    kinds = model.verdicts.kind[rows]
    order = sorted(range(len(rows)), key=lambda i: (kinds[i] < CLASS, -model.scene.dt_score[rows[i]]))
    _text(canvas, [(_names(model.scene, model.verdicts, rows[i]), boxes[i], COLORS[KINDS[kinds[i]]],
                    13 if kinds[i] >= CLASS else 11) for i in order])  # fmt: skip
    return canvas


def _beside(panels: list[np.ndarray], captions: list[str]) -> np.ndarray:
    columns = []
    for panel, caption in zip(panels, captions):
        head = np.full((24, panel.shape[1], 3), PAPER, np.uint8)
        cv2.putText(head, drawable_text(caption), (2, 17), INK, cv2.FontFace("sans"), 14, 600)
        columns += [np.vstack([head, panel]), np.full((panel.shape[0] + 24, 6, 3), PAPER, np.uint8)]
    return np.hstack(columns[:-1])


# ------------------------------------------------------------------------------------------------ what is drawn
def _worst_images(reader: _Reader, model: Any, folder: Path, mark: str, most: int) -> list[dict[str, Any]]:
    scene, verdicts = model.scene, model.verdicts
    lost = lost_by_image(scene, model.costs)
    entries = []
    for n in np.argsort(-lost, kind="stable")[:most].tolist():
        if lost[n] <= 0:
            break
        read = reader(n)
        if read is None:
            continue
        image, scale = read
        picture = _beside(
            [_draw_truth(model, n, image, scale), _draw_found(model, n, image, scale)],
            ["ground truth", f"detections from score {model.content['threshold']:.2f}"],
        )
        rows = _shown(model, n)
        counts = {k: int((verdicts.kind[rows] == i).sum()) for i, k in enumerate(KINDS) if i >= CLASS}
        objects = np.arange(*scene.first_object()[n : n + 2])
        found = np.isin(verdicts.found_by[objects], rows)
        counts["missed"] = int((~found & ~scene.gt_ignore[objects]).sum())
        entries.append({
            "picture": _write(folder / f"{mark}-{len(entries) + 1:03d}.jpg", picture),
            "width": picture.shape[1], "height": picture.shape[0],
            "image_id": scene.image_ids[n], "file": scene.image_files[n], "lost": float(lost[n]),
            "mistakes": {k: v for k, v in counts.items() if v},
        })  # fmt: skip
    return entries


def _mistakes(reader: _Reader, model: Any, folder: Path, mark: str) -> list[dict[str, Any]]:
    """Cut-outs, by class: the most confident detections of nothing, the missed, the confused, the badly placed."""
    scene, verdicts = model.scene, model.verdicts
    chosen: list[tuple[float, int, str, str, int]] = []  # cost, class, kind, gt or dt, row
    missed = (verdicts.found_by < 0) & ~scene.gt_ignore
    for c in range(len(scene.class_names)):
        for kind, codes in (("invented", (BACKGROUND,)), ("confused", (CLASS,)), ("misplaced", (4, 5))):
            rows = np.flatnonzero((scene.dt_label == c) & np.isin(verdicts.kind, codes))
            rows = rows[np.argsort(-scene.dt_score[rows], kind="stable")][:PER_CLASS]
            chosen += [(model.costs[0][d], c, kind, "dt", int(d)) for d in rows]
        rows = np.flatnonzero(missed & (scene.gt_label == c))
        rows = rows[np.argsort(-scene.gt_area[rows], kind="stable")][:PER_CLASS]
        chosen += [(model.costs[1][g], c, "missed", "gt", int(g)) for g in rows]
    chosen = sorted(chosen, key=lambda item: -item[0])[:MOST_CUTOUTS]
    by_image: dict[int, list] = {}
    for item in chosen:
        n = int((scene.gt_image if item[3] == "gt" else scene.dt_image)[item[4]])
        by_image.setdefault(n, []).append(item)
    entries = []
    for n, items in by_image.items():
        read = reader(n)
        if read is None:
            continue
        image, scale = read
        for cost, c, kind, which, i in items:
            entries.append({
                "picture": _write(folder / f"{mark}-{which}{i}.jpg", _cutout(model, image, scale, which, i), 75),
                "class": scene.class_names[c], "kind": kind, "cost": float(cost),
                "score": float(scene.dt_score[i]) if which == "dt" else None,
                "text": _names(scene, verdicts, i, _full_name) if which == "dt" else f"{scene.class_names[c]}: missed",
                "image_id": scene.image_ids[n], "file": scene.image_files[n],
            })  # fmt: skip
    order = {name: n for n, name in enumerate(scene.class_names)}
    return sorted(entries, key=lambda e: (order[e["class"]], e["kind"], -(e["score"] or 0)))


def _cutout(model: Any, image: np.ndarray, scale: np.ndarray, which: str, i: int) -> np.ndarray:
    """A square of CUTOUT pixels around one mistake, with the object that it is about."""
    scene = model.scene
    canvas = image.copy()
    box = (scene.gt_box if which == "gt" else scene.dt_box)[i] * np.tile(scale, 2)
    kind = "missed" if which == "gt" else KINDS[model.verdicts.kind[i]]
    if which == "dt" and model.verdicts.object[i] >= 0:
        _outline(canvas, scene, "gt", model.verdicts.object[i], scale, COLORS["right"], 1)
    _outline(canvas, scene, which, i, scale, COLORS[kind], 2)
    middle = (box[:2] + box[2:]) / 2
    half = max(48.0, 0.7 * float((box[2:] - box[:2]).max()))
    x1, y1 = np.floor(middle - half).astype(int)
    side = math.ceil(2 * half)
    height, width = canvas.shape[:2]
    square = np.full((side, side, 3), 128, np.uint8)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x1 + side, width), min(y1 + side, height)
    if right > left and bottom > top:
        square[top - y1 : bottom - y1, left - x1 : right - x1] = canvas[top:bottom, left:right]
    shrink = side > CUTOUT
    return cv2.resize(square, (CUTOUT, CUTOUT), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)


def _compared(reader: _Reader, first: Any, second: Any, folder: Path, mark: str, most: int) -> list[dict[str, Any]]:
    """The images that got better and worse most, with the detections of both models."""
    gain = lost_by_image(first.scene, first.costs) - lost_by_image(second.scene, second.costs)
    order = np.argsort(-gain, kind="stable")
    half = max(1, most // 2)
    entries = []
    for n in [*order[:half].tolist(), *order[::-1][:half].tolist()]:
        if abs(gain[n]) <= 0 or any(e["number"] == n for e in entries):
            continue
        read = reader(n)
        if read is None:
            continue
        image, scale = read
        picture = _beside(
            [_draw_truth(first, n, image, scale), _draw_found(first, n, image, scale),
             _draw_found(second, n, image, scale)],
            [f"ground truth, missed by {first.name}", first.name, second.name],
        )  # fmt: skip
        entries.append({
            "picture": _write(folder / f"{mark}-{len(entries) + 1:03d}.jpg", picture),
            "width": picture.shape[1], "height": picture.shape[0], "number": n,
            "image_id": first.scene.image_ids[n], "file": first.scene.image_files[n], "gain": float(gain[n]),
        })  # fmt: skip
    return [{k: v for k, v in e.items() if k != "number"} for e in entries]
