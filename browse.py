"""Pages of a data set: its images with their annotations, and training batches exactly as the network gets them.

Choosing images looks at columns only, so a hundred thousand images are chosen from in a second; pixels are read of
those that are shown.
"""

import os
from collections.abc import Callable, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import cv2
import numpy as np

from batch_pictures import draw_batch, draw_boxes
from common import UserError, atomic_write, logger
from config import Config
from data import read_split_image, training_keys
from data_workers import training_dataflow
from dataset_split import DatasetSplit
from report_page import STYLE
from viz import Style, draw_annotations, shrunk

__all__ = ["SIZES", "Filter", "choose_images", "write_batches", "write_images"]

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # area of the box, as COCO's
SIDE = 720  # longest side of a picture


class Filter(NamedTuple):
    """Which images are shown: those that fulfil all that is given."""

    classes: Sequence[str] = ()  # with an object of one of these
    size: str | None = None  # with an object (of these classes) of this size
    empty: bool = False  # without any object
    crowd: bool = False  # with a crowd or another ignored region
    image_ids: Sequence[str] = ()


def choose_images(split: DatasetSplit, wanted: Filter) -> np.ndarray:
    """int64 indices of the images, in the order of the set, from its columns alone."""
    c = split.columns
    first = c["first_object"]
    owner = np.repeat(np.arange(len(split)), np.diff(first))
    chosen = np.ones(len(split), bool)
    unknown = [n for n in wanted.classes if n not in split.class_names]
    if unknown:
        raise UserError(
            f"--class {unknown[0]}: {split.name} has no such class; it has {', '.join(split.class_names[:8])}"
        )
    if wanted.classes or wanted.size:
        fits = ~c["crowd"]
        if wanted.classes:
            fits &= np.isin(c["labels"], [split.class_names.index(n) + 1 for n in wanted.classes])
        if wanted.size:
            low, high = SIZES[wanted.size]
            area = (c["boxes"][:, 2:] - c["boxes"][:, :2]).prod(1)
            fits &= (area >= low) & (area < high)
        chosen &= np.bincount(owner[fits], minlength=len(split)) > 0
    if wanted.crowd:
        chosen &= np.bincount(owner[c["crowd"]], minlength=len(split)) > 0
    if wanted.empty:
        chosen &= np.diff(first) == 0
    if wanted.image_ids:
        ids = {str(i) for i in wanted.image_ids}
        named = np.array([str(split.image_id(i)) in ids for i in range(len(split))], bool)
        if named.sum() < len(ids):
            known = {str(split.image_id(i)) for i in np.flatnonzero(named)}
            raise UserError(f"--image-id {sorted(ids - known)[0]} is not in {split.name}")
        chosen &= named
    return np.flatnonzero(chosen)


def write_images(
    split: DatasetSplit,
    wanted: Filter,
    out: Path,
    number: int = 60,
    start: int = 0,
    style: Style = Style(),  # noqa: B008
) -> int:
    """A page of `number` of the chosen images from the `start`-th on; returns how many were chosen in all."""
    chosen = choose_images(split, wanted)
    shown = chosen[start : start + number]
    if not len(shown):
        raise UserError(
            f"{split.name}: no image to show; {len(chosen)} of {len(split)} images fit, and --start is {start}"
        )
    entries = []
    for i in shown.tolist():
        try:
            image = read_split_image(split, i)
        except UserError as e:
            logger.warning(f"{e}; it is left out")
            continue
        annotations = split.annotations(i)
        picture = shrunk(draw_annotations(image, annotations, split.class_names, style), SIDE)
        labels = [split.class_names[label - 1] for label in annotations["labels"].tolist()]
        counts = ", ".join(f"{labels.count(n)} {n}" for n in sorted(set(labels))) or "no object"
        name = os.path.basename(split.image_file(i))
        # The number keeps ids apart that differ only in what no file name has, or in their end.
        entries.append(_write(out, f"{i}-{split.image_id(i)}", picture, f"id {split.image_id(i)} · {name}: {counts}"))
    end = start + len(shown)
    what = [f"{len(chosen):,} of {len(split):,} images fit; number {start + 1} to {end} are shown."]
    if end < len(chosen):
        what.append(f"--start {end} shows the next.")
    _write_page(out, f"{split.name}: {split.annotation_file}", what, entries)
    return len(chosen)


def write_batches(
    split: DatasetSplit, cfg: Config, out: Path, batches: int = 4, start: int = 0, read_rois: Callable | None = None
) -> None:
    """A page of training batches from number `start` on: pixels after augmentation, resize and padding, with the boxes,
    outlines, keypoints and ignored regions that the losses see; read_rois, see `browse_rois.roi_reader`, adds pictures
    of the proposals and of the sampled RoIs."""
    cfg = cfg.copy()
    cfg.DATA.NUM_WORKERS = 0
    cfg.freeze()
    keys, entries = training_keys(cfg), []
    flow = training_dataflow(split, cfg, start_batch=start)
    for number, values in enumerate(islice(iter(flow), batches), start):
        batch = dict(zip(keys, values))
        for n in range(len(batch["image"])):
            picture = draw_batch(batch, n, split.class_names)
            height, width = batch["image_shape"][n].tolist()
            padded = "×".join(map(str, batch["image"].shape[1:3]))
            count = int((batch["gt_labels"][n] > 0).sum())
            text = f"batch {number}, image {n}: {height}×{width} in {padded}, {count} objects"
            entries.append(_write(out, f"batch{number}-{n}", shrunk(picture, SIDE), text))
        found = read_rois(batch) if read_rois else {}
        for n in range(len(batch["image"]) if found else 0):
            proposals = found["proposals"][n][found["valid"][n]]
            picture = draw_boxes(batch["image"][n], proposals[:100], np.zeros(100, int), split.class_names)
            text = f"batch {number}, image {n}: the best {min(100, len(proposals))} of {len(proposals)} proposals"
            entries.append(_write(out, f"batch{number}-{n}-proposals", shrunk(picture, SIDE), text))
            kept = found["kept"][n]
            rois, labels = found["rois"][n][kept], found["labels"][n][kept]
            picture = draw_boxes(batch["image"][n], rois, labels, split.class_names)
            text = f"batch {number}, image {n}: {len(rois)} sampled RoIs, {int((labels > 0).sum())} foreground"
            entries.append(_write(out, f"batch{number}-{n}-rois", shrunk(picture, SIDE), text))
    what = ["As the network gets them. Hatched: padding. Dashed grey: ignored regions."]
    _write_page(out, f"{split.name}: training batches", what, entries)


# ------------------------------------------------------------------------------------------------ pages
def _write(out: Path, name: str, picture: np.ndarray, text: str) -> dict[str, Any]:
    safe = "".join(ch if ch.isalnum() or ch in "-_" else "_" for ch in name)[:100]
    path = out / "images" / f"{safe}.jpg"
    with atomic_write(path, "wb", durable=False) as f:
        f.write(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes())
    return {"file": f"images/{path.name}", "size": picture.shape[:2], "text": text}


def _write_page(out: Path, title: str, lines: Sequence[str], entries: Sequence[dict[str, Any]]) -> None:
    figures = "".join(
        f'<figure><a href="{quote(e["file"])}"><img loading=lazy src="{quote(e["file"])}" width="{e["size"][1]}" '
        f'height="{e["size"][0]}" alt="{escape(e["text"])}"></a><figcaption>{escape(e["text"])}</figcaption></figure>'
        for e in entries
    )
    text = "".join(f"<p>{escape(line)}</p>" for line in lines)
    with atomic_write(out / "index.html") as f:
        f.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<title>{escape(title)}</title><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><style>{STYLE}{GRID}</style></head><body><main><h1>{escape(title)}</h1>'
            f"{text}<p class=js><label>Show those that name <input type=search></label> <output></output></p>"
            f"<div class=sheet>{figures}</div></main><script>{SCRIPT}</script></body></html>\n"
        )
    logger.info(f"{len(entries)} pictures in {out / 'index.html'}")


GRID = """
.sheet{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1rem;align-items:start}
.sheet figure{margin:0}
"""
SCRIPT = """
"use strict";
document.documentElement.classList.add("scripted");
const input = document.querySelector("input"), figures = [...document.querySelectorAll("figure")];
input.addEventListener("input", () => {
  const want = input.value.toLowerCase(); let shown = 0;
  for (const f of figures) {
    f.hidden = !f.querySelector("figcaption").textContent.toLowerCase().includes(want);
    shown += !f.hidden;
  }
  document.querySelector("output").textContent = want ? shown + " of " + figures.length : "";
});
"""
