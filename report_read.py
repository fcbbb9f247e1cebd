"""What an evaluation report reads: ground truth of every protocol, results files, and both as columns of a `Scene`."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from common import UserError
from report_numbers import Scene
from utils.archives import is_file
from utils.coco_format import file_name_of
from utils.polygons import encode_segmentation

__all__ = ["PROTOCOLS", "Problem", "held_types", "image_path", "problem_of", "scene_from_coco", "scenes_of"]

# What each protocol scores.
PROTOCOLS = {
    "coco": ["bbox", "segm", "keypoints"], "lvis": ["bbox", "segm"], "voc07": ["bbox"], "voc12": ["bbox"],
    "cityscapes": ["segm"], "oid-v2": ["bbox"], "oid-challenge": ["bbox"], "oid-challenge-segm": ["segm"],
}  # fmt: skip

# Keys of an annotation that make it a region in which nothing is right or wrong, and an object that need not be found.
_CROWD_KEYS = ("iscrowd", "IsGroupOf")
_IGNORE_KEYS = ("difficult", "ignore")
RESULT_KEYS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


class Problem(NamedTuple):
    """What is to be scored, and how."""

    protocol: str  # a key of PROTOCOLS
    name: str  # of the ground truth, as the reader knows it
    content: dict[str, Any]  # in COCO's form
    types: list[str]  # what the protocol scores
    image_folders: list[str]  # where pictures are looked for; [] draws none
    settings: dict[str, Any] | None = None  # of the run that made the results
    proposals: list[dict[str, Any]] | None = None
    ancestors: np.ndarray | None = None  # Open Images: bool [C, C], see utils.oid_format.read_ancestors
    expand_detections: bool = False
    expanded: dict[str, Any] | None = None  # the content with objects of the ancestors' classes too

    @property
    def frequencies(self) -> list[str | None]:
        """LVIS: r, c or f of each class."""
        of = {c["id"]: c.get("frequency") for c in self.content["categories"]}
        return [of[i] for i in class_names(self.content["categories"])]

    @property
    def category_order(self) -> list[int]:
        """Places in the list of categories of the classes, in their order in a `Scene`."""
        place = {c["id"]: n for n, c in enumerate(self.content["categories"])}
        return [place[i] for i in class_names(self.content["categories"])]

    @property
    def point_names(self) -> list[str]:
        return next((list(c["keypoints"]) for c in self.content["categories"] if c.get("keypoints")), [])

    @property
    def flip(self) -> np.ndarray:
        """The keypoint that each becomes in a mirrored image, by "left" and "right" in their names."""
        names = self.point_names
        swapped = [n.replace("left", "\0").replace("right", "left").replace("\0", "right") for n in names]
        return np.array([names.index(n) if n in names else i for i, n in enumerate(swapped)], np.int64)


def problem_of(protocol: str, name: str, content: dict[str, Any], image_folders: Sequence[str | os.PathLike] = (),
               **more: Any) -> Problem:  # fmt: skip
    problem = Problem(protocol, name, content, PROTOCOLS[protocol], [os.fspath(f) for f in image_folders], **more)
    if protocol.startswith("oid-challenge") and problem.ancestors is not None:
        problem = problem._replace(expanded=_expanded(content, problem.ancestors))
    return problem


def _expanded(content: dict[str, Any], ancestors: np.ndarray) -> dict[str, Any]:
    """Open Images content with a copy of each object for each ancestor of its class, and labels likewise: a class that
    is there implies its ancestors, one that is not there excludes its descendants."""
    ids = [c["id"] for c in content["categories"]]
    place = {i: n for n, i in enumerate(ids)}

    def related(given: Any, table: np.ndarray) -> list:
        rows = [place[c] for c in given or () if c in place]
        return [ids[k] for k in np.flatnonzero(table[rows].any(0))] if rows else []

    images = []
    for image in content["images"]:
        there, absent = (list(image.get(key) or ()) for key in ("pos_category_ids", "neg_category_ids"))
        there, absent = there + related(there, ancestors), absent + related(absent, ancestors.T)
        images.append({**image, "pos_category_ids": there, "neg_category_ids": absent})
    more = [
        {**a, "category_id": ids[k]}
        for a in content["annotations"]
        if a["category_id"] in place
        for k in np.flatnonzero(ancestors[place[a["category_id"]]])
    ]
    return {**content, "images": images, "annotations": [*content["annotations"], *more]}


def image_path(problem: Problem, file_name: str) -> Path | None:
    """Where the image is on disk, by its name or by the end of its path; None if it is not there."""
    for name in (file_name, os.path.basename(file_name)):  # folders may hold different images of one name
        for folder in problem.image_folders:
            path = Path(folder) / name
            if is_file(path):
                return path
    return None


def scenes_of(problem: Problem, entries: list[dict[str, Any]], types: Sequence[str]) -> dict[str, Scene]:
    """The columns for each kind of result, with what the protocol leaves out or forgives."""
    scenes = {}
    for kind in types:
        if problem.protocol == "lvis":
            scene = scene_from_coco(problem.content, entries, kind, 300)
            if kind == "segm" and entries and "bbox" in entries[0]:  # LVIS measures a detection by its box if it can
                scene = scene._replace(dt_area=(scene.dt_box[:, 2:] - scene.dt_box[:, :2]).prod(1))
            scene = _federated(problem.content, scene)
        else:
            content = problem.expanded or problem.content
            copies = _copies(problem, entries) if problem.expand_detections and problem.ancestors is not None else []
            scene = scene_from_coco(content, [*entries, *copies], kind)
            if problem.protocol.startswith("oid-challenge"):
                scene = _federated(content, scene)
        scenes[kind] = scene
    return scenes


def _copies(problem: Problem, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [c["id"] for c in problem.content["categories"]]
    place = {i: n for n, i in enumerate(ids)}
    return [
        {**r, "category_id": ids[k]}
        for r in entries
        for k in np.flatnonzero(problem.ancestors[place[r["category_id"]]])
    ]


def _federated(content: dict[str, Any], scene: Scene) -> Scene:
    """Marks detections of classes that nobody looked for in their image, and of those not annotated exhaustively."""
    place = {c: n for n, c in enumerate(class_names(content["categories"]))}
    images = {image["id"]: image for image in content["images"]}
    judged = np.zeros((len(scene.image_ids), len(scene.class_names)), bool)
    partial = np.zeros_like(judged)
    judged[scene.gt_image, scene.gt_label] = True
    for n, image_id in enumerate(scene.image_ids):
        for key, table in (("pos_category_ids", judged), ("neg_category_ids", judged),
                           ("not_exhaustive_category_ids", partial)):  # fmt: skip
            table[n, [place[c] for c in images[image_id].get(key) or () if c in place]] = True
    rows = scene.dt_image, scene.dt_label
    return scene._replace(judged=judged[rows], forgiven=partial[rows])


def held_types(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the results hold: of bbox, segm, keypoints."""
    return [t for t, key in RESULT_KEYS.items() if any(r.get(key) is not None for r in results)] or ["bbox"]


def _sorted_ids(ids: Any) -> list:
    return sorted(set(ids), key=lambda i: (isinstance(i, str), i))


def class_names(categories: list[dict[str, Any]]) -> dict[Any, str]:
    """{category id: name} in the order of the ids, with the id added to names that occur more than once."""
    names = {c["id"]: str(c.get("name", c["id"])) for c in categories}
    often = Counter(names.values())
    ids = _sorted_ids(names)
    return {i: names[i] if often[names[i]] == 1 else f"{names[i]} ({i})" for i in ids}


def scene_from_coco(
    content: dict[str, Any], results: list[dict[str, Any]], iou_type: str, max_per_image: int | None = None
) -> Scene:
    """The columns of checked COCO-like content and results.

    An annotation without a mask becomes, where masks are scored, an ignored region of its box. Images and classes are
    in the order of their ids, as COCOeval takes them; that order decides ties.
    """
    names = class_names(content["categories"])
    label_of = {c: n for n, c in enumerate(names)}
    images = {image["id"]: image for image in content["images"]}
    image_of = {i: n for n, i in enumerate(_sorted_ids(images))}
    ordered = [images[i] for i in image_of]
    sizes = np.array([[im.get("height") or 0, im.get("width") or 0] for im in ordered], np.int32).reshape(-1, 2)
    truth = _truth_rows(content["annotations"], image_of, label_of, sizes, iou_type)
    found = _found_rows(results, image_of, label_of, sizes, iou_type, max_per_image)
    sigmas = content.get("oks_sigmas") if iou_type == "keypoints" else None
    falloffs = 2 * np.array(sigmas, np.float64) if sigmas else None
    forgiven = np.zeros(len(found[0]), bool)
    files = [str(file_name_of(im) or im["id"]) for im in ordered]
    # The columns in the order of Scene, typed as Any: mypy cannot count those of two tuples.
    columns: Any = (list(image_of), files, sizes, list(names.values()), *truth, *found, forgiven, ~forgiven, iou_type)
    return Scene(*columns)._replace(falloffs=falloffs)


def _truth_rows(annotations, image_of, label_of, sizes, iou_type) -> tuple:
    rows = [a for a in annotations if a.get("image_id") in image_of and a.get("category_id") in label_of]
    image = np.array([image_of[a["image_id"]] for a in rows], np.int32)
    order = np.argsort(image, kind="stable")
    rows, image = [rows[i] for i in order], image[order]
    crowd = np.array([any(a.get(k) in (1, True) for k in _CROWD_KEYS) for a in rows], bool)
    ignore = crowd | np.array([any(a.get(k) in (1, True) for k in _IGNORE_KEYS) for a in rows], bool)
    boxes, areas, masks = np.zeros((len(rows), 4)), np.zeros(len(rows)), []
    for i, a in enumerate(rows):
        size = sizes[image[i]].tolist()
        rle = None
        if iou_type == "segm" or not a.get("bbox") or a.get("area") is None:
            rle = _rle(a.get("segmentation"), size)
        box = a.get("bbox") or (rle and mask_utils.toBbox(rle).tolist())
        if not box:
            raise UserError(f"annotations: annotation {a.get('id', i)} has neither bbox nor segmentation")
        boxes[i] = box
        area = a.get("area")
        areas[i] = area if area is not None else mask_utils.area(rle) if rle else box[2] * box[3]
        if iou_type == "segm" and rle is None:
            x, y, w, h = box
            rle = _rle([[x, y, x + w, y, x + w, y + h, x, y + h]], size)
            crowd[i] = ignore[i] = True
        masks.append(rle)
    boxes[:, 2:] += boxes[:, :2]
    points = None
    if iou_type == "keypoints":
        points = _points([a.get("keypoints") for a in rows])
        stated = np.array([a.get("num_keypoints", -1) for a in rows], int)
        count = np.where(stated >= 0, stated, (points[:, :, 2] > 0).sum(1))
        ignore = ignore | (count == 0)
        crowd = np.zeros(len(rows), bool)  # similarity knows no crowds: each is an object to ignore
        crowd |= np.array([any(a.get(k) in (1, True) for k in _CROWD_KEYS) for a in rows], bool)
    label = np.array([label_of[a["category_id"]] for a in rows], np.int32)
    return image, label, boxes, areas, crowd, ignore, masks if iou_type == "segm" else None, points


def _found_rows(results, image_of, label_of, sizes, iou_type, max_per_image) -> tuple:
    key = RESULT_KEYS[iou_type]
    rows = []
    for n, r in enumerate(results):
        if r.get("image_id") not in image_of or r.get("category_id") not in label_of:
            raise UserError(f"results: entry {n}: its image or category is not in the annotation file")
        if r.get(key) is None and not (iou_type == "bbox" and r.get("segmentation")):
            raise UserError(f"results: entry {n} has no {key}, which {iou_type} scores need")
        rows.append(r)
    image = np.array([image_of[r["image_id"]] for r in rows], np.int32)
    score = np.array([r["score"] for r in rows], np.float64)
    order = np.lexsort((-score, image))  # stable, as COCOeval's mergesort
    if max_per_image is not None:
        starts = np.searchsorted(image[order], image[order])
        order = order[np.arange(len(order)) - starts < max_per_image]
    rows, image, score = [rows[i] for i in order], image[order], score[order]
    boxes, areas = np.zeros((len(rows), 4)), np.zeros(len(rows))
    masks = points = None
    if iou_type == "segm":
        masks = [_rle(r["segmentation"], sizes[n].tolist()) or _empty(sizes[n].tolist()) for r, n in zip(rows, image)]
        for i, rle in enumerate(masks):  # one by one: pycocotools' area fails for more than 255 at once
            areas[i], boxes[i] = mask_utils.area(rle), mask_utils.toBbox(rle)
    if iou_type == "keypoints":
        points = _points([r["keypoints"] for r in rows])
        boxes[:, :2] = points[:, :, :2].min(1)
        boxes[:, 2:] = points[:, :, :2].max(1) - boxes[:, :2]
        areas[:] = boxes[:, 2] * boxes[:, 3]
    for i, r in enumerate(rows):
        if r.get("bbox") is not None:
            boxes[i] = r["bbox"]
        elif iou_type == "bbox":
            boxes[i] = mask_utils.toBbox(_rle(r["segmentation"], sizes[image[i]].tolist()))
    if iou_type == "bbox":
        areas[:] = boxes[:, 2] * boxes[:, 3]
    boxes[:, 2:] += boxes[:, :2]
    label = np.array([label_of[r["category_id"]] for r in rows], np.int32)
    return image, label, score, boxes, areas, masks, points, order.astype(np.int64)


def _points(rows: list) -> np.ndarray:
    """float64 [n, K, 3]; zeros for those without."""
    count = max((len(p) // 3 for p in rows if p), default=17)
    points = np.zeros((len(rows), count, 3))
    for i, p in enumerate(rows):
        if p:
            if len(p) != 3 * count:
                raise UserError(f"keypoints of {len(p) // 3} and of {count} points are mixed")
            points[i] = np.reshape(p, (count, 3))
    return points


def _rle(segmentation: Any, size: list[int]) -> dict[str, Any] | None:
    """The mask as one RLE; None for none."""
    if not segmentation:
        return None
    if not all(size):
        raise UserError("annotations: masks need the height and width of every image")
    return encode_segmentation(segmentation, *size)


def _empty(size: list[int]) -> dict[str, Any]:
    return mask_utils.encode(np.zeros(size, np.uint8, order="F"))
