"""The official Open Images metrics: V2 detection, and the 2018/2019 challenges' detection and instance segmentation.

All are average precision at IoU 0.5 (Kuznetsova et al., "The Open Images Dataset V4", IJCV 2020, section 6; challenge
evaluation pages at storage.googleapis.com/openimages/web/evaluation.html). Everything is held in columns and one class
is scored at a time by array operations; hierarchy expansion is done by taking a class's rows together with its
descendants' rows, so nothing is copied in advance.

Equal scores are ordered by image id, and within an image false positives come first. This is one of the
orders the official tool may take, and it makes a result independent of the order of the detections.
"""

import csv
import glob
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
from pycocotools import mask as mask_utils

from common import UserError, atomic_write, logger
from utils.archives import find_folder, is_file
from utils.image_header import decode_image
from utils.oid_format import decode_mask, encode_mask, find_files, positions, read_ancestors, read_classes, read_columns
from utils.polygons import encode_mask as encode_mask_image
from utils.polygons import encode_segmentation, rle_runs

__all__ = [
    "Masks",
    "Truth",
    "DetectionTable",
    "join_by_box",
    "mask_folders",
    "read_mask_image",
    "read_truth",
    "read_detections",
    "resize_run",
    "truth_from_coco",
    "detections_from_coco",
    "evaluate",
    "average_precision",
    "best_overlaps",
    "box_overlaps",
    "first_per_object",
    "write_detections_csv",
    "write_submission_csv",
]

IOU_THRESHOLD = 0.5
# Keys of a COCO-like annotation that make it a group-of box, or a difficult one.
_SET_ASIDE = ("iscrowd", "IsGroupOf", "difficult", "ignore")


class Masks(NamedTuple):
    """COCO run lengths of D objects; an empty `counts` entry means that the object has no mask."""

    counts: Sequence[bytes]  # [D] compressed run lengths
    sizes: np.ndarray  # int32 [D, 2] height, width


class Truth(NamedTuple):
    """What the annotators said about N images and C classes: G boxes and L image labels. No expansion applied."""

    class_ids: list[str]
    class_names: list[str]
    image_ids: np.ndarray  # bytes [N]; every image with a box or an image label
    image: np.ndarray  # int32 [G] index into image_ids
    label: np.ndarray  # int32 [G] index into class_ids
    boxes: np.ndarray  # float64 [G, 4] x1 y1 x2 y2
    group_of: np.ndarray  # bool [G]
    label_image: np.ndarray  # int32 [L]
    label_class: np.ndarray  # int32 [L]
    label_positive: np.ndarray  # bool [L]
    masks: Masks | None = None
    ancestors: np.ndarray | None = None  # bool [C, C], see read_ancestors


class DetectionTable(NamedTuple):
    """D scored boxes or masks, in any order; image and label index a Truth's image_ids and class_ids."""

    image: np.ndarray  # int32 [D]
    label: np.ndarray  # int32 [D]
    score: np.ndarray  # float64 [D]
    boxes: np.ndarray  # float64 [D, 4] x1 y1 x2 y2, in the frame of the truth's boxes
    masks: Masks | None = None


# ---------------------------------------------------------------------------------------------- reading and writing
def read_truth(
    directory: str | Path,
    split: str = "validation",
    with_masks: bool = False,
    classes: str | Path | None = None,
    hierarchy: str | Path | None = None,
    mask_folder: str | Path | None = None,
) -> Truth:
    """The published files of one split; `classes` and `hierarchy` override the ones found in `directory`.

    Boxes and labels of classes outside the class list are left out and counted in a warning.
    """
    files = find_files(directory, split)
    class_ids, class_names = read_classes(classes or files.classes)
    hierarchy = hierarchy or files.hierarchy
    ancestors = read_ancestors(hierarchy, class_ids) if hierarchy else None
    rows = read_columns(
        files.boxes,
        "box annotations",
        {"XMin": float, "XMax": float, "YMin": float, "YMax": float, "IsGroupOf": np.int8},
        {"ImageID": None, "LabelName": class_ids},
    )
    image_ids, label_image = rows["ImageID values"], np.zeros(0, np.int32)
    label_class, label_positive = label_image, np.zeros(0, bool)
    box_image = rows["ImageID"]
    if files.image_labels:
        labels = read_columns(
            files.image_labels, "image labels", {"Confidence": float}, {"ImageID": None, "LabelName": class_ids}
        )
        image_ids, inverse = np.unique(np.concatenate([image_ids, labels["ImageID values"]]), return_inverse=True)
        inverse = inverse.astype(np.int32)
        box_image = inverse[: len(rows["ImageID values"])][box_image]
        keep = labels["LabelName"] >= 0
        _report(
            len(keep) - keep.sum(),
            f"image labels of {files.image_labels.name} on classes outside the class list are left out",
        )
        label_image = inverse[len(rows["ImageID values"]) :][labels["ImageID"]][keep]
        label_class, label_positive = labels["LabelName"][keep], labels["Confidence"][keep] > 0.5
    keep = rows["LabelName"] >= 0
    _report(len(keep) - keep.sum(), f"boxes of {files.boxes.name} on classes outside the class list are left out")
    truth = Truth(
        class_ids,
        class_names,
        image_ids,
        box_image[keep],
        rows["LabelName"][keep],
        np.stack([rows[k] for k in ("XMin", "YMin", "XMax", "YMax")], 1)[keep],
        rows["IsGroupOf"][keep] > 0,  # -1 = unknown
        label_image,
        label_class,
        label_positive,
        None,
        ancestors,
    )
    if not with_masks:
        return truth
    if not files.masks:
        raise UserError(f"{directory}: no file {split}-annotations-object-segmentation.csv")
    folders = [mask_folder] if mask_folder else mask_folders(directory, split)
    return _join_masks(truth, files.masks, [Path(f) for f in folders])


def mask_folders(directory: str | Path, split: str) -> list[Path]:
    """Folders in which the masks of a split may have been unpacked, and the zips in which they are published."""
    directory = Path(directory)
    names = ["masks", f"{split}-masks", f"masks/{split}", f"{split}_masks"]
    places = (directory, directory.parent)
    found = [find_folder(d, [n]) for d in places for n in names]
    zips = [z for d in places for n in ("", *names) for z in sorted((d / n).glob(f"{glob.escape(split)}-masks-?.zip"))]
    return [*(f for f in found if f), *zips]


def _join_masks(truth: Truth, path: Path, folders: list[Path]) -> Truth:
    """Gives every mask to the box with its image, label and Box* coordinates; masks without a box become objects."""
    rows = read_columns(
        path,
        "segmentation masks",
        {"BoxXMin": float, "BoxXMax": float, "BoxYMin": float, "BoxYMax": float},
        {"ImageID": [i.decode() for i in truth.image_ids], "LabelName": truth.class_ids},
        ["MaskPath"],
    )
    keep = (rows["ImageID"] >= 0) & (rows["LabelName"] >= 0)
    _report(len(keep) - keep.sum(), f"masks of {path.name} on images or classes outside the set are left out")
    image, label, names = rows["ImageID"][keep], rows["LabelName"][keep], rows["MaskPath"][keep]
    boxes = np.stack([rows[k] for k in ("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax")], 1)[keep]
    mask_row, box_row, alone = join_by_box(image, label, boxes, truth.image, truth.label, truth.boxes)
    _report(len(alone), f"masks of {path.name} without a box of the same coordinates, taken as objects of their own")
    file_of = np.full(len(truth.image) + len(alone), -1)
    file_of[box_row] = mask_row
    file_of[len(truth.image) :] = alone
    counts, sizes = [b""] * len(file_of), np.zeros((len(file_of), 2), np.int32)
    for i in np.flatnonzero(file_of >= 0):
        bitmap = read_mask_image(names[file_of[i]].decode(), folders, path)
        counts[i], sizes[i] = encode_mask_image(bitmap)["counts"].encode(), bitmap.shape
    return truth._replace(
        image=np.concatenate([truth.image, image[alone]]),
        label=np.concatenate([truth.label, label[alone]]),
        boxes=np.concatenate([truth.boxes, boxes[alone]]),
        group_of=np.concatenate([truth.group_of, np.zeros(len(alone), bool)]),
        masks=Masks(counts, sizes),
    )


def join_by_box(image, label, boxes, box_image, box_label, box_boxes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of M masks belong to which of G boxes: those with equal image, label and coordinates.

    Returns the pairs as mask rows and box rows, and the masks without a box.
    """
    order = np.argsort(box_image, kind="stable")
    mask_row, position = _pairs(image, box_image[order])
    box_row = order[position]
    same = (label[mask_row] == box_label[box_row]) & (boxes[mask_row] == box_boxes[box_row]).all(1)
    return mask_row[same], box_row[same], np.setdiff1d(np.arange(len(image)), mask_row[same])


def read_mask_image(name: str, folders: list[Path], origin: Path) -> np.ndarray:
    """bool [h, w] of a published mask: non-zero is the object."""
    # The published archives are split by the first digit of the name and may be unpacked into folders named by it.
    for folder in folders:
        for path in (folder / name, folder / name[0] / name):
            if is_file(path):
                return decode_image(path, cv2.IMREAD_GRAYSCALE, f"mask {path}") > 0
    where = ", ".join(map(str, folders)) or f"a masks/ folder beside {origin}"
    raise UserError(f"{origin}: mask {name} is not in {where}")


def read_detections(path: str | Path, truth: Truth) -> DetectionTable:
    """A csv of detections, one row each (ImageID, LabelName, Score, and XMin, XMax, YMin, YMax or ImageWidth,
    ImageHeight, Mask), or as for the challenge server one row per image (ImageID, …, PredictionString).

    DetectionTable on images outside the truth are ignored, as in the protocol; both these and detections on
    classes outside the class list are counted in a message.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            header = [name.strip() for name in next(csv.reader(f), [])]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"detections {path} cannot be read: {getattr(e, 'strerror', e)}") from None
    if "PredictionString" in header:
        return _read_submission(path, header, truth)
    score = "Score" if "Score" in header or "Confidence" not in header else "Confidence"
    boxed = "Mask" not in header
    sides = ("XMin", "YMin", "XMax", "YMax")
    rows = read_columns(
        path,
        "detections",
        {score: float} | (dict.fromkeys(sides, float) if boxed else {"ImageWidth": np.int32, "ImageHeight": np.int32}),
        {"ImageID": [i.decode() for i in truth.image_ids], "LabelName": truth.class_ids},
        () if boxed else ["Mask"],
    )
    keep = _known(rows["ImageID"], rows["LabelName"], path)
    columns = {name: rows.pop(name)[keep] for name in list(rows)}
    if boxed:
        boxes = np.empty((len(columns[score]), 4))
        for i, name in enumerate(sides):
            boxes[:, i] = columns.pop(name)
        return DetectionTable(columns["ImageID"], columns["LabelName"], columns[score], boxes)
    sizes = np.stack([columns["ImageHeight"], columns["ImageWidth"]], 1)
    return _masked_detections(columns["ImageID"], columns["LabelName"], columns[score], columns["Mask"], sizes, path)


def _read_submission(path: str | Path, header: list[str], truth: Truth) -> DetectionTable:
    """One row per image: "label score x1 y1 x2 y2 …", or with ImageWidth and ImageHeight "label score mask …"."""
    masked = "ImageWidth" in header
    image_column = "ImageID" if "ImageID" in header else "ImageId"
    rows = read_columns(
        path,
        "detections",
        {"ImageWidth": np.int32, "ImageHeight": np.int32} if masked else {},
        {image_column: [i.decode() for i in truth.image_ids]},
        ["PredictionString"],
    )
    words = [text.decode().split() for text in rows["PredictionString"]]
    step = 3 if masked else 6
    for row, parts in enumerate(words):
        if len(parts) % step:
            raise UserError(f"detections {path}, row {row + 2}: PredictionString is not groups of {step} words")
    lengths = [len(parts) // step for parts in words]
    flat = [word for parts in words for word in parts]
    image = np.repeat(rows[image_column], lengths)
    label = positions(pa.array(truth.class_ids, pa.string()), pa.array(flat[0::step], pa.string()))
    try:
        score = np.array(flat[1::step], float)
        boxes = np.stack([np.array(flat[i::step], float) for i in range(2, step)], 1) if not masked else None
    except ValueError as e:
        raise UserError(f"detections {path}: {e}") from None
    keep = _known(image, label, path)
    if boxes is not None:
        return DetectionTable(image[keep], label[keep], score[keep], boxes[keep])
    texts = np.array([word.encode() for word in flat[2::step]] + [None], object)[:-1]
    sizes = np.repeat(np.stack([rows["ImageHeight"], rows["ImageWidth"]], 1), lengths, axis=0)
    return _masked_detections(image[keep], label[keep], score[keep], texts[keep], sizes[keep], path)


def _known(image: np.ndarray, label: np.ndarray, path: str | Path) -> np.ndarray:
    _report((label < 0).sum(), f"detections of {path} on classes outside the class list are left out")
    _report(
        (image < 0).sum(),
        f"detections of {path} on images without annotations, which the protocol does not score, are left out",
    )
    return (image >= 0) & (label >= 0)


def _masked_detections(image, label, score, texts, sizes, path) -> DetectionTable:
    """Decodes the masks; a detection's box is its mask's tight extent divided by the mask's size."""
    counts: list[bytes] = []
    boxes = np.zeros((len(image), 4))
    for i, text in enumerate(texts):
        try:
            counts.append(decode_mask(text))
            rle = {"counts": counts[-1], "size": sizes[i].tolist()}
            rle_runs(rle, *rle["size"])
            x, y, w, h = mask_utils.toBbox(rle)
        except ValueError as e:
            raise UserError(f"detections {path}: Mask of scored row {i + 1} is damaged: {e}") from None
        boxes[i] = x / sizes[i, 1], y / sizes[i, 0], (x + w) / sizes[i, 1], (y + h) / sizes[i, 0]
    return DetectionTable(image, label, score, boxes, Masks(counts, sizes))


def truth_from_coco(content: dict[str, Any], with_masks: bool = False) -> Truth:
    """The truth of a COCO-format json (boxes in pixels): iscrowd, IsGroupOf, difficult or ignore = 1 make group_of.

    Image labels come from the optional image keys pos_category_ids and neg_category_ids; an image without them is
    verified only for the classes of its boxes.
    """
    categories, images = content["categories"], content["images"]
    class_of = {c["id"]: i for i, c in enumerate(categories)}
    image_ids, inverse = np.unique(
        np.array([str(im["id"]).encode("utf-8", "surrogatepass") for im in images], np.bytes_), return_inverse=True
    )
    image_of = {im["id"]: int(inverse[i]) for i, im in enumerate(images)}
    labels = [
        (image_of[im["id"]], class_of[c], positive)
        for im in images
        for key, positive in (("pos_category_ids", True), ("neg_category_ids", False))
        for c in im.get(key, [])
    ]
    annotations = content["annotations"]
    boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if with_masks:
        shape = {im["id"]: (im["height"], im["width"]) for im in images}
        runs = [_run_lengths(a.get("segmentation"), *shape[a["image_id"]]) for a in annotations]
        sizes = np.array([shape[a["image_id"]] for a in annotations], np.int32).reshape(-1, 2)
        masks = Masks(runs, sizes)
    label_image, label_class, label_positive = (
        np.array([row[i] for row in labels], kind) for i, kind in enumerate((np.int32, np.int32, bool))
    )
    return Truth(
        [str(c.get("freebase_id", c["name"])) for c in categories],
        [c["name"] for c in categories],
        image_ids,
        np.array([image_of[a["image_id"]] for a in annotations], np.int32),
        np.array([class_of[a["category_id"]] for a in annotations], np.int32),
        boxes,
        np.array([any(a.get(key) in (1, "1", "true", "True") for key in _SET_ASIDE) for a in annotations], bool),
        label_image,
        label_class,
        label_positive,
        masks,
    )


def _run_lengths(segmentation: Any, height: int, width: int) -> bytes:
    """COCO polygons or run lengths as compressed run lengths; b"" for none."""
    return encode_segmentation(segmentation, height, width)["counts"] if segmentation else b""


def detections_from_coco(results: Sequence[dict[str, Any]], content: dict[str, Any], truth: Truth) -> DetectionTable:
    """A COCO results list (image_id, category_id, bbox or segmentation, score) against `truth_from_coco(content)`."""
    class_of = {c["id"]: i for i, c in enumerate(content["categories"])}
    image_of = {im["id"]: str(im["id"]).encode("utf-8", "surrogatepass") for im in content["images"]}
    for r in results:
        if r["image_id"] not in image_of or r["category_id"] not in class_of:
            raise UserError(f"results: image {r['image_id']} or category {r['category_id']} is not in the annotations")
    ids = np.array([image_of[r["image_id"]] for r in results], truth.image_ids.dtype)
    masks = None
    if results and truth.masks is not None:
        if any("segmentation" not in r for r in results):
            raise UserError("results: masks are to be scored, but an entry has no segmentation")
        size_of = {im["id"]: (im["height"], im["width"]) for im in content["images"]}
        sizes = np.array([size_of[r["image_id"]] for r in results], np.int32)
        masks = Masks([_run_lengths(r["segmentation"], *size) for r, size in zip(results, sizes.tolist())], sizes)
        boxes = np.array([mask_utils.toBbox({"counts": c, "size": s.tolist()}) for c, s in zip(*masks)])
    else:
        if any("bbox" not in r for r in results):
            raise UserError("results: boxes are to be scored, but an entry has no bbox")
        boxes = np.array([r["bbox"] for r in results], float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return DetectionTable(
        np.searchsorted(truth.image_ids, ids).astype(np.int32),
        np.array([class_of[r["category_id"]] for r in results], np.int32),
        np.array([r["score"] for r in results], float),
        boxes,
        masks,
    )


def write_detections_csv(path: str | Path, rows: Iterable[dict[str, Any]], masked: bool = False) -> int:
    """Writes detections for the official evaluator, one row each; returns their number.

    A row has image_id, label (class id such as /m/0k4j), score, and width and height of the image; box (x1 y1 x2 y2 in
    pixels) or, with `masked`, segmentation (COCO run lengths).
    """
    number = 0
    with atomic_write(path) as f:
        names = ["ImageID", "ImageWidth", "ImageHeight", "LabelName", "Score", "Mask"]
        names = names if masked else ["ImageID", "LabelName", "Score", "XMin", "XMax", "YMin", "YMax"]
        f.write(",".join(names) + "\n")
        for r in rows:
            number += 1
            if masked:
                height, width = r["segmentation"]["size"]
                text = encode_mask(_run_lengths(r["segmentation"], height, width))
                f.write(f"{r['image_id']},{width},{height},{r['label']},{r['score']:.8g},{text}\n")
            else:
                x1, y1, x2, y2 = _normalised(r)
                f.write(f"{r['image_id']},{r['label']},{r['score']:.8g},{x1:.8g},{x2:.8g},{y1:.8g},{y2:.8g}\n")
    return number


def write_submission_csv(
    path: str | Path, rows: Iterable[dict[str, Any]], images: Iterable[tuple[Any, int, int]], masked: bool = False
) -> int:
    """Writes the challenge server's file, one row per image of `images` (id, height, width), empty ones included.

    `rows` as for `write_detections_csv`; returns the number of detections written.
    """
    per_image: dict[str, list[str]] = {}
    number = 0
    for r in rows:
        number += 1
        if masked:
            text = encode_mask(_run_lengths(r["segmentation"], *r["segmentation"]["size"]))
        else:
            text = " ".join(f"{v:.8g}" for v in _normalised(r))
        per_image.setdefault(str(r["image_id"]), []).append(f"{r['label']} {r['score']:.8g} {text}")
    with atomic_write(path) as f:
        f.write("ImageID,ImageWidth,ImageHeight,PredictionString\n" if masked else "ImageID,PredictionString\n")
        for image_id, height, width in images:
            size = f"{width},{height}," if masked else ""
            f.write(f"{image_id},{size}{' '.join(per_image.get(str(image_id), []))}\n")
    return number


def _normalised(r: dict[str, Any]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(v) for v in r["box"])
    return x1 / r["width"], y1 / r["height"], x2 / r["width"], y2 / r["height"]


def _report(number: int, what: str) -> None:
    if number:
        logger.warning("%d %s", number, what)


# ------------------------------------------------------------------------------------------------------ the metrics
def evaluate(
    truth: Truth,
    detections: DetectionTable,
    protocol: str,
    expand_detections: bool = False,
    on_class: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Scores detections by "v2", "challenge" or "challenge-segm".

    The challenges expand boxes and image labels over the hierarchy, count group-of boxes with weight 1 and ignore
    detections of classes that nobody verified in the image. Their official tool scores detections as submitted: a
    copies of a detection for ancestor classes are left to the submitter, and are made here only with
    `expand_detections`.
    Returns mAP, and for each class id per_class_AP (None: no ground truth), num_gt, num_scored_detections and
    num_true_positives. `on_class(index of the class, scores, hits, images, image of each object to be found)` is
    called with the inputs of each AP, see `average_precision`.
    """
    if protocol == "v2":
        return _evaluate(truth, detections, None, False, 0.0, False, False, on_class)
    if protocol not in ("challenge", "challenge-segm"):
        raise ValueError(protocol)
    if truth.ancestors is None and expand_detections:
        raise UserError("expanding detections needs the class hierarchy (bbox_labels_hierarchy.json)")
    masked = protocol == "challenge-segm"
    if masked and (truth.masks is None or (detections.masks is None and len(detections.image))):
        raise UserError("the segmentation challenge needs masks in the ground truth and in the detections")
    return _evaluate(truth, detections, truth.ancestors, expand_detections, 1.0, True, masked, on_class)


def _evaluate(
    truth: Truth,
    detections: DetectionTable,
    ancestors: np.ndarray | None,
    expand_detections: bool,
    group_weight: float,
    verified_only: bool,
    masked: bool,
    on_class: Callable[..., None] | None,
) -> dict[str, Any]:
    """One metric over all classes; `ancestors` None means no expansion of the ground truth."""
    finite = np.isfinite(detections.score) & np.isfinite(detections.boxes).all(1)
    if not finite.all():
        raise UserError(f"{int((~finite).sum())} detections have a score or box that is not a finite number")
    solid = (detections.boxes[:, 0] < detections.boxes[:, 2]) & (detections.boxes[:, 1] < detections.boxes[:, 3])
    classes = len(truth.class_ids)
    related = np.eye(classes, dtype=bool) if ancestors is None else np.eye(classes, dtype=bool) | ancestors
    overlaps = _MaskOverlaps(truth, detections, solid) if masked else _BoxOverlaps(truth, detections)
    has_mask = np.array([bool(c) for c in truth.masks.counts], bool) if masked else np.ones(len(truth.image), bool)
    det_rows = _rows_by_class(detections.label, classes, solid)
    gt_rows = _rows_by_class(truth.label, classes)
    positive_rows = _rows_by_class(truth.label_class, classes, truth.label_positive)
    negative_rows = _rows_by_class(truth.label_class, classes, ~truth.label_positive)
    result: dict[str, Any] = {"mAP": None}
    for name in ("per_class_AP", "num_gt", "num_scored_detections", "num_true_positives"):
        result[name] = {}
    for c in range(classes):
        below = np.flatnonzero(related[:, c])  # the class and its descendants
        dets = _join(det_rows, below if expand_detections else [c])
        gts = _join(gt_rows, below)
        gts = gts[np.argsort(truth.image[gts], kind="stable")]
        if verified_only:
            # A negative label holds for all descendants, so labels of the class and of its ancestors apply.
            labels = np.concatenate([_join(positive_rows, below), _join(negative_rows, np.flatnonzero(related[c]))])
            verified = np.zeros(len(truth.image_ids), bool)
            verified[truth.label_image[labels]] = True
            verified[truth.image[gts]] = True
            dets = dets[verified[detections.image[dets]]]
        scores, hits, images, number = _settle_class(
            truth, detections, dets, gts, has_mask[gts], group_weight, overlaps
        )
        if on_class is not None:
            to_find = has_mask[gts] & (~truth.group_of[gts] | (group_weight > 0))
            on_class(c, scores, hits, images, truth.image[gts[to_find]])
        label = truth.class_ids[c]
        result["per_class_AP"][label] = average_precision(scores, hits, number, images) if number > 0 else None
        result["num_gt"][label] = float(number)
        result["num_scored_detections"][label] = len(scores)
        result["num_true_positives"][label] = float(hits.sum())
    valid = [ap for ap in result["per_class_AP"].values() if ap is not None]
    result["mAP"] = float(np.mean(valid)) if valid else None
    return result


def _rows_by_class(label: np.ndarray, classes: int, keep: np.ndarray | None = None) -> list[np.ndarray]:
    rows = np.argsort(label, kind="stable")
    if keep is not None:
        rows = rows[keep[rows]]
    return np.split(rows, np.searchsorted(label[rows], np.arange(1, classes)))


def _join(rows: list[np.ndarray], classes: Iterable[int]) -> np.ndarray:
    parts = [rows[c] for c in classes]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _settle_class(truth, detections, dets, gts, has_mask, group_weight, overlaps):
    """Matches one class. dets [D] and gts [G] are rows, gts sorted by image; has_mask bool [G].

    Returns scores float64 [S], weights float64 [S] (0 = false positive) and image int [S] of the scored detections, and
    the number of ground truths. The four steps are the protocol's: objects, group-of, and for masks the objects and
    groups
    without a mask.
    """
    image, score, group = detections.image[dets], detections.score[dets], truth.group_of[gts]
    open_, hit = np.ones(len(dets), bool), np.zeros(len(dets), bool)
    group_scores, group_image = np.zeros(0), np.zeros(0, np.int64)
    for with_mask in (True, False):
        for is_group in (False, True):
            members = gts[(has_mask == with_mask) & (group == is_group)]
            todo = np.flatnonzero(open_)
            if not len(members) or not len(todo):
                continue
            measure = overlaps.counted if with_mask else overlaps.ignored
            best, overlap = best_overlaps(
                image[todo],
                truth.image[members],
                lambda d, g: measure(dets[todo[d]], members[g], is_group),  # noqa: B023
            )
            good = np.flatnonzero((best >= 0) & (overlap >= IOU_THRESHOLD))
            if is_group:
                open_[todo[good]] = False
                absorbed = score[todo[good]]
                if with_mask and group_weight > 0:
                    top = np.zeros(len(members))
                    np.maximum.at(top, best[good], absorbed)
                    group_scores, group_image = top[top > 0], truth.image[members[top > 0]]
                continue
            first = first_per_object(best[good], score[todo[good]], overlap[good], detections.boxes[dets[todo[good]]])
            open_[todo[good[first]]] = False
            if with_mask:
                hit[todo[good[first]]] = True
    scores = np.concatenate([score[hit], score[open_], group_scores])
    weights = np.zeros(len(scores))
    weights[: hit.sum()] = 1.0
    weights[len(scores) - len(group_scores) :] = group_weight
    images = np.concatenate([image[hit], image[open_], group_image])
    return scores, weights, images, (has_mask & ~group).sum() + group_weight * (has_mask & group).sum()


def _pairs(image: np.ndarray, gt_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, g) of the same image, by ascending i, then g; `gt_image` must be sorted."""
    start = np.searchsorted(gt_image, image, "left")
    counts = np.searchsorted(gt_image, image, "right") - start
    i = np.repeat(np.arange(len(image)), counts)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts - start, counts)


def best_overlaps(image: np.ndarray, gt_image: np.ndarray, measure) -> tuple[np.ndarray, np.ndarray]:
    """For each of D detections the ground truth of its image with which `measure(d, g)` [pairs] is largest.

    Returns index int64 [D] into the G ground truths (-1: none in the image) and that overlap float64 [D].
    `gt_image` [G] must be sorted; of equal overlaps the first ground truth is taken.
    """
    best, overlap = np.full(len(image), -1), np.zeros(len(image))
    d, g = _pairs(image, gt_image)
    if len(d):
        value = measure(d, g)
        starts = np.flatnonzero(np.concatenate([[True], d[1:] != d[:-1]]))
        largest = np.maximum.reduceat(value, starts)
        lengths = np.diff(np.append(starts, len(d)))
        at = np.where(value == np.repeat(largest, lengths), np.arange(len(d)), len(d))
        at = np.minimum.reduceat(at, starts)
        best[d[starts]], overlap[d[starts]] = g[at], largest
    return best, overlap


def first_per_object(gt: np.ndarray, score: np.ndarray, overlap: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """For each ground truth in `gt` [K] the position of its first detection: highest score, overlap, then box."""
    order = np.lexsort((*boxes.T, -overlap, -score, gt))
    sorted_gt = gt[order]
    return order[np.concatenate([[True], sorted_gt[1:] != sorted_gt[:-1]])] if len(order) else order


def average_precision(scores: np.ndarray, hits: np.ndarray, number: float, images: np.ndarray) -> float:
    """Area under precision and recall, precision made non-increasing from the right (PASCAL VOC 2010).

    `hits` [S] is each detection's weight as a true positive, 0 for a false one; `number` > 0 ground truths; `images`
    [S] orders equal scores.
    """
    if not len(scores):
        return 0.0
    hits = hits[np.lexsort((hits, images, -scores))]
    true = np.cumsum(hits)
    precision = true / (true + np.cumsum(hits == 0))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(true / number, prepend=0.0) * precision).sum())


def box_overlaps(detected: np.ndarray, annotated: np.ndarray, over_detection: bool = False) -> np.ndarray:
    """IoU, or intersection over the first box's area, of P pairs of boxes float64 [P, 4]: float64 [P]."""
    det, gt = detected.T, annotated.T
    width = np.minimum(det[2], gt[2]) - np.maximum(det[0], gt[0])
    height = np.minimum(det[3], gt[3]) - np.maximum(det[1], gt[1])
    intersection = np.maximum(width, 0) * np.maximum(height, 0)
    area = (det[2] - det[0]) * (det[3] - det[1])
    if over_detection:
        return intersection / area
    return intersection / (area + (gt[2] - gt[0]) * (gt[3] - gt[1]) - intersection)


class _BoxOverlaps:
    """Box IoU, or intersection over the detection's area, of pairs of detection and ground-truth rows."""

    def __init__(self, truth: Truth, detections: DetectionTable):
        self.gt_boxes, self.det_boxes = truth.boxes, detections.boxes

    def counted(self, d: np.ndarray, g: np.ndarray, over_detection: bool) -> np.ndarray:
        return box_overlaps(self.det_boxes[d], self.gt_boxes[g], over_detection)

    ignored = counted


class _MaskOverlaps(_BoxOverlaps):
    """Mask overlaps with ground truths that have a mask, box overlaps with the others.

    The masks of an image are compared once, whatever number of classes a detection is expanded to; `table` holds the
    D x G matrices of all images one after the other.
    """

    def __init__(self, truth: Truth, detections: DetectionTable, solid: np.ndarray):
        super().__init__(truth, detections)
        has_mask = np.array([bool(c) for c in truth.masks.counts], bool)
        dets = np.flatnonzero(solid)
        gts = np.flatnonzero(has_mask)
        dets = dets[np.argsort(detections.image[dets], kind="stable")]
        gts = gts[np.argsort(truth.image[gts], kind="stable")]
        images = np.arange(len(truth.image_ids) + 1)
        det_start = np.searchsorted(detections.image[dets], images)
        gt_start = np.searchsorted(truth.image[gts], images)
        tables, resized, filled = [], 0, 0
        # Element (d, g) of an image's matrix is table[det_base[d] + gt_column[g]].
        self.det_base = np.zeros(len(detections.image), np.int64)
        self.gt_column = np.zeros(len(truth.image), np.int64)
        for n in range(len(truth.image_ids)):
            d, g = dets[det_start[n] : det_start[n + 1]], gts[gt_start[n] : gt_start[n + 1]]
            if not len(d) or not len(g):
                continue
            gt_runs = [{"counts": truth.masks.counts[i], "size": truth.masks.sizes[i].tolist()} for i in g]
            det_runs = [{"counts": detections.masks.counts[i], "size": detections.masks.sizes[i].tolist()} for i in d]
            size = gt_runs[0]["size"]
            if any(run["size"] != size for run in gt_runs):
                name = truth.image_ids[n].decode()
                raise UserError(f"image {name}: its ground-truth masks have different sizes")
            resized += sum(run["size"] != size for run in det_runs)
            det_runs = [resize_run(run, size) for run in det_runs]
            self.det_base[d] = filled + np.arange(len(d)) * len(g)
            self.gt_column[g] = np.arange(len(g))
            tables.append(mask_utils.iou(det_runs, gt_runs, truth.group_of[g].tolist()).ravel())
            filled += len(d) * len(g)
        if resized:
            logger.warning("%d detection masks were resampled to the size of the ground-truth masks", resized)
        self.table = np.concatenate(tables) if tables else np.zeros(0)

    def counted(self, d: np.ndarray, g: np.ndarray, over_detection: bool) -> np.ndarray:
        return self.table[self.det_base[d] + self.gt_column[g]]

    ignored = _BoxOverlaps.counted


def resize_run(run: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """The run lengths of a mask resampled to `size` (height, width) by nearest neighbour."""
    if list(run["size"]) == list(size):
        return run
    bitmap = cv2.resize(mask_utils.decode(run), (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    return mask_utils.encode(np.asfortranarray(bitmap))
