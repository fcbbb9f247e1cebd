"""The files that a report is made from: annotations of every protocol, results, images, a run's settings."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import UserError, logger, read_json
from dataset_cityscapes import cityscapes_images, read_cityscapes_content
from dataset_openimages import open_images_folders
from dataset_voc import read_voc_content, read_voc_detections, voc_images
from eval import read_results
from eval_protocols import only_images
from report_read import PROTOCOLS, Problem, held_types, problem_of
from utils import oid_eval
from utils.archives import exists, is_file, is_folder
from utils.cityscapes_eval import read_cityscapes_detections
from utils.coco_format import as_results, as_truth, in_pixels, read_document
from utils.image_header import image_header_size
from utils.oid_format import find_files, read_ancestors

__all__ = ["problem_of_split", "read_detections", "read_problem"]

_MASKED = ("cityscapes", "oid-challenge-segm")  # protocols that score masks alone
_UNKNOWN_SIDE = 1000  # of an image of Open Images that is not on disk; scores do not depend on it


def read_problem(
    protocol: str,
    truth: str | os.PathLike,
    images: Sequence[str | os.PathLike] = (),
    split: str | None = None,
    classes: str | None = None,
    hierarchy: str | None = None,
    masks: str | None = None,
    expand_detections: bool = False,
    run: str | os.PathLike | None = None,
    proposals: str | os.PathLike | None = None,
    normalised: bool = False,
) -> Problem:
    """The ground truth of a protocol from a COCO-like json or from the data set's own folder, checked.

    Args:
        images: folders in which pictures are looked for; the data set's own if its place is known.
        split, classes, hierarchy, masks, expand_detections: as for tools/score.py.
        run: a run directory, whose settings tell how the anchors fit.
        proposals: COCO results of proposals.
        normalised: the json's boxes and outlines are fractions of the image.
    """
    truth = Path(truth)
    if not exists(truth):
        raise UserError(f"--gt {truth} does not exist")
    folders, ancestors = [str(f) for f in images], None
    for folder in folders:
        if not is_folder(folder):
            raise UserError(f"--images {folder} is not a folder")
    name = f"{truth.stem}"
    if not is_folder(truth):
        content, origin = read_document(truth), f"annotation file {truth}"
        content = as_truth(in_pixels(content, origin) if normalised else content, origin, protocol in _MASKED)
        if protocol.startswith("oid-") and hierarchy:
            ids = [str(c.get("freebase_id", c["name"])) for c in content["categories"]]
            ancestors = read_ancestors(hierarchy, ids)
    elif protocol.startswith("voc"):
        content = as_truth(read_voc_content(truth, split or ""), f"VOC data {truth}")
        folders = folders or [str(voc_images(truth))]
    elif protocol == "cityscapes":
        content = as_truth(read_cityscapes_content(truth, split or "val"), f"Cityscapes data {truth}")
        folders = folders or [str(cityscapes_images(truth, split or "val")), str(truth)]
    elif protocol.startswith("oid-"):
        masked = protocol == "oid-challenge-segm"
        columns = oid_eval.read_truth(truth, split or "validation", masked, classes, hierarchy, masks)
        if not folders:  # a report can do without them
            with contextlib.suppress(UserError):
                folders = [str(f) for f in open_images_folders(truth, split or "validation")]
            folders += [str(truth / "images")] * is_folder(truth / "images")
        content, ancestors = _open_images_content(columns, folders), columns.ancestors
        name = f"{truth.name} {split or 'validation'}"
    else:
        raise UserError(f"--gt {truth}: the {protocol} protocol needs an annotation json, not a folder")
    if protocol.startswith("oid-challenge") and ancestors is None:
        logger.warning("no class hierarchy was found, so nothing is expanded; give one by --hierarchy")
    settings = None
    if run:
        settings = read_json(Path(run) / "settings.json", "settings of the run").get("settings")
    problem = problem_of(protocol, name, content, folders, settings=settings, ancestors=ancestors,
                         expand_detections=expand_detections)  # fmt: skip
    if proposals:
        problem = problem._replace(proposals=_checked_proposals(proposals, content))
    return problem


def _checked_proposals(path: str | os.PathLike, content: dict[str, Any]) -> list[dict[str, Any]]:
    entries = read_json(path, "proposals")
    known = next((c["id"] for c in content["categories"]), None)
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"proposals {path}: must hold a list of boxes in the form of COCO results")
    # Classes of proposals do not matter, so they need not be those of the annotations.
    return as_results([{**e, "category_id": known} for e in entries], content, f"proposals {path}")


def read_detections(path: str | os.PathLike, problem: Problem) -> list[dict[str, Any]]:
    """A results file as checked COCO results: their json, VOC's or Cityscapes' folder, Open Images' csv."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--detections {path} does not exist")
    if path.is_dir() and problem.protocol.startswith("voc"):
        return read_voc_detections(path, problem.content)
    if path.is_dir() and problem.protocol == "cityscapes":
        return read_cityscapes_detections(path, problem.content)
    if path.is_dir():
        raise UserError(f"--detections {path}: the {problem.protocol} protocol needs a file, not a folder")
    if path.suffix == ".csv" and problem.protocol.startswith("oid-"):
        masked = problem.protocol == "oid-challenge-segm"
        truth = oid_eval.truth_from_coco(problem.content, masked)
        return _open_images_results(oid_eval.read_detections(path, truth), truth, problem.content)
    return read_results(path, problem.content)


def _open_images_content(truth: oid_eval.Truth, folders: Sequence[str]) -> dict[str, Any]:
    """The published files in COCO's form, boxes in pixels."""
    ids = [i.decode() for i in truth.image_ids]
    sizes = np.full((len(ids), 2), _UNKNOWN_SIDE)
    for n, image_id in enumerate(ids):
        path = next((p for f in folders for p in [Path(f) / f"{image_id}.jpg"] if is_file(p)), None)
        if path is not None:
            sizes[n] = image_header_size(path)
    if truth.masks is not None:  # masks come in a size of their own
        has = np.array([bool(c) for c in truth.masks.counts], bool)
        sizes[truth.image[has]] = truth.masks.sizes[has]
    said: dict[bool, list[list[str]]] = {True: [[] for _ in ids], False: [[] for _ in ids]}
    for n, c, positive in zip(truth.label_image, truth.label_class, truth.label_positive):
        said[bool(positive)][n].append(truth.class_ids[c])
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": int(sizes[n, 0]), "width": int(sizes[n, 1]),
         "pos_category_ids": said[True][n], "neg_category_ids": said[False][n]} for n, i in enumerate(ids)
    ]  # fmt: skip
    scale = sizes[truth.image][:, [1, 0, 1, 0]]
    boxes = truth.boxes * scale
    boxes[:, 2:] -= boxes[:, :2]
    annotations = [
        {"id": k + 1, "image_id": ids[truth.image[k]], "category_id": truth.class_ids[truth.label[k]],
         "bbox": boxes[k].tolist(), "area": float(boxes[k, 2] * boxes[k, 3]), "IsGroupOf": int(truth.group_of[k])}
        for k in range(len(truth.image))
    ]  # fmt: skip
    if truth.masks is not None:
        for k, a in enumerate(annotations):
            if truth.masks.counts[k]:
                a["segmentation"] = {"size": truth.masks.sizes[k].tolist(), "counts": truth.masks.counts[k].decode()}
    categories = [{"id": i, "name": n, "freebase_id": i} for i, n in zip(truth.class_ids, truth.class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _open_images_results(
    found: oid_eval.DetectionTable, truth: oid_eval.Truth, content: dict[str, Any]
) -> list[dict[str, Any]]:
    size_of = {str(im["id"]).encode(): (im["height"], im["width"]) for im in content["images"]}
    sizes = np.array([size_of[i] for i in truth.image_ids.tolist()]).reshape(-1, 2)
    boxes = found.boxes * sizes[found.image][:, [1, 0, 1, 0]]
    boxes[:, 2:] -= boxes[:, :2]
    if found.masks is not None:  # theirs may be another size than the annotated masks
        runs = [
            oid_eval.resize_run({"counts": c, "size": s.tolist()}, sizes[n].tolist())
            for c, s, n in zip(*found.masks, found.image)
        ]
    ids = {str(im["id"]).encode(): im["id"] for im in content["images"]}
    categories = [c["id"] for c in content["categories"]]
    results = []
    for k in range(len(found.image)):
        entry = {
            "image_id": ids[bytes(truth.image_ids[found.image[k]])], "category_id": categories[found.label[k]],
            "score": float(found.score[k]), "bbox": boxes[k].tolist(),
        }  # fmt: skip
        if found.masks is not None:
            entry["segmentation"] = {"size": list(runs[k]["size"]), "counts": runs[k]["counts"].decode()}
        results.append(entry)
    return results


def problem_of_split(split: Any, results: Sequence[dict[str, Any]], settings: dict[str, Any] | None = None) -> Problem:
    """The ground truth of a `DatasetSplit`, by the last of its protocols that scores what the results hold (Pascal
    VOC's of 2010; Cityscapes' for masks, COCO's for boxes alone), Open Images' V2 or, where its classes are expanded,
    the challenge's."""
    content = as_truth(split.content(), split.annotation_file)
    content = {**only_images(content, [split.image_id(i) for i in range(len(split))]), "oks_sigmas": split.oks_sigmas}
    # Names are relative to the first; images of LVIS and of several folders are found by the second.
    roots = [split.image_root()] if hasattr(split, "image_root") else list(split.folders)
    folders = [*roots, *sorted({os.path.dirname(split.image_file(i)) for i in range(len(split))} - {*roots})]
    held = held_types(results)
    scored = [p for p in split.protocols if not results or set(PROTOCOLS[p]) & {*held}]
    protocol, ancestors = (scored or ["coco"])[-1], None
    if hasattr(split, "expanded"):  # Open Images
        protocol = "oid-challenge" if split.expanded else "oid-v2"
        if split.expanded:
            files = find_files(split.directory, split.split)
            ancestors = read_ancestors(files.hierarchy, [str(c["id"]) for c in content["categories"]])
            for c in content["categories"]:
                c.setdefault("freebase_id", c["id"])
    return problem_of(protocol, split.name, content, folders, settings=settings, ancestors=ancestors)
