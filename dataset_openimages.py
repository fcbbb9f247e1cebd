"""Open Images (V4 to V7 and the challenges) from the published csv files, through a cache of columns on disk."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from common import UserError, logger, write_json
from config import Config
from dataset_build import report_split, verified_columns
from dataset_split import MIN_SIDE, DatasetSplit, own_path, range_indices, to_offsets
from eval_protocols import named_scores
from utils import oid_eval, polygons
from utils.archives import find_folder, is_folder, list_folder, time_stamp
from utils.image_header import header_sizes
from utils.oid_format import find_files, read_ancestors, read_classes, read_columns
from utils.threads import in_threads

__all__ = ["OpenImagesSplit", "load", "load_openimages", "open_images_folders"]

_SIDES = ("XMin", "YMin", "XMax", "YMax")

# Increase it when the meaning of the cached columns changes.
_CACHE_VERSION = 3

_OPEN_IMAGES_COLUMNS = (
    "file_bytes", "file_offsets", "id_bytes", "id_offsets", "folder", "sizes", "first_object", "boxes", "labels",
    "crowd", "first_ring", "first_vertex", "vertices", "first_verified", "verified",
)  # fmt: skip


class _Entries(Sequence):
    """A COCO-like list whose entries are made when accessed: millions of entries would not fit into memory."""

    def __init__(self, number: int, make: Callable[[int], dict[str, Any]]):
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self._number:
            raise IndexError(i)
        return self._make(i)


class OpenImagesSplit(DatasetSplit):
    """One split of Open Images. Its columns are views of the cache files, shared by all processes of a machine.

    Attributes:
        directory, split: where it was read from.
        missing: how many of its images are not on disk (they are not part of the split).
        expanded: whether its boxes are those of the ancestor classes too.
    """

    directory: str
    split: str
    missing: int
    expanded: bool

    def content(self) -> dict[str, Any]:
        """The published files in COCO's form, unchecked: boxes in pixels, group-of as iscrowd, unknown classes None.

        "images" and "annotations" are sequences that make their entries when accessed. File names are relative to
        `image_root`; images that are not on disk are taken to be 1000 x 1000.
        """
        files = find_files(self.directory, self.split)
        class_ids, class_names = read_classes(files.classes)
        ids, rows, labels = _read_open_images(files, class_ids, np.float64)
        image, order = rows["ImageID"], np.argsort(labels["ImageID"], kind="stable")
        labels = {key: column[order] for key, column in labels.items()}
        first_label = np.searchsorted(labels["ImageID"], np.arange(len(ids) + 1))
        place = {str(self.image_id(i)).encode(): i for i in range(len(self))}
        row_of = np.array([place.get(i, -1) for i in ids.tolist()], np.int64)
        root = self.image_root()
        sizes = np.full((len(ids), 2), 1000)
        sizes[row_of >= 0] = self.image_sizes()[row_of[row_of >= 0]]
        boxes = np.stack([rows[n] for n in _SIDES], 1) * sizes[image][:, [1, 0, 1, 0]]

        def make_image(i: int) -> dict[str, Any]:
            path = self.image_file(row_of[i]) if row_of[i] >= 0 else f"{self.folders[0]}/{ids[i].decode()}.jpg"
            said = [
                (class_ids[labels["LabelName"][k]], labels["Confidence"][k] > 0.5)
                for k in range(first_label[i], first_label[i + 1])
                if labels["LabelName"][k] >= 0
            ]
            return {
                "id": ids[i].decode(), "file_name": os.path.relpath(path, root),
                "height": int(sizes[i, 0]), "width": int(sizes[i, 1]),
                "pos_category_ids": [c for c, there in said if there],
                "neg_category_ids": [c for c, there in said if not there],
            }  # fmt: skip

        def make_annotation(k: int) -> dict[str, Any]:
            x1, y1, x2, y2 = boxes[k].tolist()
            label = rows["LabelName"][k]
            return {
                "id": k + 1, "image_id": ids[image[k]].decode(),
                "category_id": class_ids[label] if label >= 0 else None,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": abs((x2 - x1) * (y2 - y1)),
                "iscrowd": int(rows["IsGroupOf"][k] > 0),
            }  # fmt: skip

        categories = [{"id": i, "name": n} for i, n in zip(class_ids, class_names)]
        return {
            "images": _Entries(len(ids), make_image), "annotations": _Entries(len(image), make_annotation),
            "categories": categories,
        }  # fmt: skip

    def image_root(self) -> str:
        """The folder that contains all images, possibly in subfolders."""
        return self.folders[0] if len(self.folders) == 1 else os.path.commonpath(self.folders)

    def _result_rows(self, results: Iterable[dict]) -> Iterable[dict]:
        place = {self.image_id(i): self.image_size(i) for i in range(len(self))}
        for r in results:
            height, width = place[r["image_id"]]
            x, y, w, h = r["bbox"]
            row = {"image_id": r["image_id"], "label": r["category_id"], "score": r["score"], "width": width}
            yield row | {"height": height, "box": (x, y, x + w, y + h), "segmentation": r.get("segmentation")}

    def write_submission(self, path: str | Path, results: list[dict]) -> list[str]:
        """Writes COCO-format results beside `path` for the official evaluator and for the challenge server.

        The files are <stem>.csv and <stem>-submission.csv, with masks also <stem>-segm.csv and
        <stem>-segm-submission.csv; their names are returned.
        """
        path = Path(path)
        results = [r for r in results if r["category_id"] is not None]
        images = [(self.image_id(i), *self.image_size(i)) for i in range(len(self))]
        written = []
        for mark in ("", "-segm"):
            rows = list(self._result_rows(r for r in results if not mark or r.get("segmentation")))
            if mark and not rows:
                break
            written += [str(path.with_name(f"{path.stem}{mark}{end}.csv")) for end in ("", "-submission")]
            oid_eval.write_detections_csv(written[-2], rows, bool(mark))
            oid_eval.write_submission_csv(written[-1], rows, images, bool(mark))
        return written

    def evaluate(
        self, results: list[dict], image_ids: Sequence[int | str] | None = None, verbose: bool = True, **_: Any
    ) -> dict[str, float]:
        """The official metrics: oid-v2/mAP and, with a hierarchy, oid-challenge/mAP, with masks oid-challenge-segm/mAP;
        each with AP_per_class/<class name>. Images missing on disk are not scored.

        For the challenges each detection is copied to the ancestors of its class, unless the set was loaded with
        expand=True: a model trained on such boxes predicts ancestors itself.
        """
        results = [r for r in results if r["category_id"] is not None]
        masked = (
            any(r.get("segmentation") for r in results) and find_files(self.directory, self.split).masks is not None
        )
        truth = oid_eval.read_truth(self.directory, self.split, masked)
        scored = [self.image_id(i) for i in range(len(self))] if image_ids is None else image_ids
        truth = _only_truth_of(truth, [str(i).encode() for i in scored])
        rows = list(self._result_rows(results))
        class_of = {c: i for i, c in enumerate(truth.class_ids)}
        ids = np.array([str(r["image_id"]).encode() for r in rows], truth.image_ids.dtype)
        place = np.searchsorted(truth.image_ids, ids)
        place = np.minimum(place, max(0, len(truth.image_ids) - 1))
        known = truth.image_ids[place] == ids if len(ids) else np.zeros(0, bool)
        rows, place = [r for r, k in zip(rows, known) if k], place[known]
        boxes = np.array([r["box"] for r in rows], np.float64).reshape(-1, 4)
        if rows:
            boxes /= np.array([[r["width"], r["height"], r["width"], r["height"]] for r in rows])
        detections = oid_eval.DetectionTable(
            place.astype(np.int32),
            np.array([class_of[r["label"]] for r in rows], np.int32),
            np.array([r["score"] for r in rows], np.float64),
            boxes,
        )
        protocols = {"v2": detections}
        if truth.ancestors is not None:
            protocols["challenge"] = detections
            if masked:
                protocols["challenge-segm"] = _with_masks(detections, rows)
        metrics: dict[str, float] = {}
        for protocol, found in protocols.items():
            scores = oid_eval.evaluate(truth, found, protocol, protocol != "v2" and not self.expanded)
            named = named_scores(f"oid-{protocol}", scores, truth.class_ids, truth.class_names)
            metrics |= {key: value for key, value in named.items() if "/num_" not in key}
            if verbose:
                logger.info(f"{self.name}: Open Images {protocol} mAP {metrics[f'oid-{protocol}/mAP']:.4f}")
        return metrics


def load(
    name: str, path: Path, split: str, cfg: Config, class_names: Sequence[str] = (), training: bool = False,
    group_of: str = "ignore", expand: bool = False, images: str | None = None, check_images: bool = True,
) -> OpenImagesSplit:  # fmt: skip
    """See `load_openimages`."""
    result = load_openimages(
        name,
        path,
        split,
        class_names,
        group_of=group_of,
        expand=expand,
        masks=cfg.MODE_MASK,
        need_masks=training and cfg.MODE_MASK,
        keep_missing=cfg.DATA.KEEP_MISSING_IMAGES,
        image_folder=images and own_path(Path(cfg.DATA.BASEDIR).expanduser(), images),
        check_images=check_images,
    )
    groups = int(result.columns["crowd"].sum())
    off = [k for k in ("RPN", "FRCNN") if cfg.get(f"{k}.CROWD_OVERLAP_THRESH") > 1]
    if training and groups and off:
        logger.warning(
            f"{name}: regions inside its {groups} group-of boxes are trained as background; to ignore them, set "
            + " ".join(f"{k}.CROWD_OVERLAP_THRESH=0.7" for k in off)
        )
    return result


def load_openimages(
    name: str,
    directory: str | Path,
    split: str,
    class_names: Sequence[str] = (),
    *,
    group_of: str = "ignore",
    expand: bool = False,
    masks: bool = False,
    need_masks: bool = False,
    keep_missing: bool = False,
    image_folder: str | Path | None = None,
    check_images: bool = True,
) -> OpenImagesSplit:
    """The published files of one split, through a cache of columns that is made once and then memory-mapped.

    Args:
        directory: holds the csv and json files; images are <ImageID>.jpg in <split>/, images/<split>/ or the folders
            <split>_0 to <split>_f that the archives unpack to, or in a .zip or .tar of such a name, unless
            `image_folder` is given.
        class_names: display names of the classes wanted, in the order of their labels; all if empty.
        group_of: what a group-of box becomes: "ignore" (a crowd region), "object", or "drop".
        expand: add a box for each ancestor class of the hierarchy, as in the challenges' ground truth; to train on
            with FRCNN.FEDERATED_LOSS, which lets an object have several labels.
        masks: trace the segmentation masks into outlines.
        need_masks: leave out boxes without a mask, except crowd regions.
        keep_missing: go on without images that are missing on disk, instead of an error.
        check_images: False: do not look for the images; their sizes then come from <split>-image-sizes.csv.

    The cache is in <directory>/.packrcnn-cache (or ~/.cache/packrcnn when that cannot be written). It is made again
    when a source file's size or time stamp, an image folder's time stamp, or an option changes. An image's size is
    read from its header, unless <split>-image-sizes.csv (ImageID,Width,Height) gives it.
    """
    started = time.time()
    directory = Path(directory).absolute()
    if group_of not in ("ignore", "object", "drop"):
        raise UserError(f"Open Images {directory}: group_of={group_of!r} must be ignore, object or drop")
    files = find_files(directory, split)
    if list(class_names) == read_classes(files.classes)[1]:
        class_names = ()  # all classes, in the usual order: use the same cache as for training
    size_file = directory / f"{split}-image-sizes.csv"
    folders = open_images_folders(directory, split, image_folder) if check_images else [directory / split]
    sources = [p for p in (*files, size_file if size_file.is_file() else None) if p is not None]
    stamps = {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in sources}
    if check_images:
        stamps |= {str(p): [0, time_stamp(p)] for p in folders}
    options = {
        "version": _CACHE_VERSION, "split": split, "classes": list(class_names), "group_of": group_of, "expand": expand,
        "masks": masks, "need_masks": need_masks, "check_images": check_images, "folders": [str(f) for f in folders],
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:16]
    columns, meta = _read_cache(directory, f"{split}-{key}", stamps)
    if columns is None:
        columns, meta = _build_open_images(files, size_file, folders, options)
        cached = _write_cache(directory, f"{split}-{key}", stamps, columns, meta)
        columns = cached or columns
    if meta["missing"]:
        what = f"{name}: {meta['missing']} of {meta['listed']} images are missing, e.g. {meta['first_missing']}"
        if not keep_missing or meta["missing"] == meta["listed"]:
            raise UserError(f"{what}; DATA.KEEP_MISSING_IMAGES=True goes on without them")
        logger.warning(f"{what}: going on without them")
    result = OpenImagesSplit(
        name, str(files.boxes), [str(f) for f in folders], meta["class_names"], meta["class_ids"],
        {
            "folder": columns["folder"], "sizes": columns["sizes"], "first_object": columns["first_object"],
            "boxes": columns["boxes"], "labels": columns["labels"], "crowd": columns["crowd"],
            "first_ring": columns["first_ring"], "first_vertex": columns["first_vertex"],
            "vertices": columns["vertices"], "keypoints": None,
            "file": (columns["file_bytes"], columns["file_offsets"]),
            "id": (columns["id_bytes"], columns["id_offsets"]),
            "first_verified": columns["first_verified"] if files.image_labels else None,
            "verified": columns["verified"],
        },
        meta["dropped"], meta["num_annotations"], np.zeros(0, np.int64),
    )  # fmt: skip
    result.directory, result.split, result.missing, result.expanded = str(directory), split, meta["missing"], expand
    report_split(result, time.time() - started)
    return result


def _with_masks(detections: oid_eval.DetectionTable, rows: list[dict]) -> oid_eval.DetectionTable:
    keep = np.array([bool(r["segmentation"]) for r in rows], bool)
    rows = [r for r in rows if r["segmentation"]]
    sizes = np.array([r["segmentation"]["size"] for r in rows], np.int32).reshape(-1, 2)
    counts = [polygons.encode_segmentation(r["segmentation"], *r["segmentation"]["size"])["counts"] for r in rows]
    boxes = np.array([mask_utils.toBbox({"counts": c, "size": s.tolist()}) for c, s in zip(counts, sizes)]).reshape(
        -1, 4
    )
    boxes[:, 2:] += boxes[:, :2]
    boxes /= sizes[:, [1, 0, 1, 0]]
    columns = (detections.image[keep], detections.label[keep], detections.score[keep])
    return oid_eval.DetectionTable(*columns, boxes, oid_eval.Masks(counts, sizes))


def _only_truth_of(truth: oid_eval.Truth, ids: list[bytes]) -> oid_eval.Truth:
    keep = np.isin(truth.image_ids, np.array(ids, truth.image_ids.dtype))
    if keep.all():
        return truth
    number = np.cumsum(keep) - 1
    box, label = keep[truth.image], keep[truth.label_image]
    masks = truth.masks
    if masks is not None:
        masks = oid_eval.Masks([c for c, k in zip(masks.counts, box) if k], masks.sizes[box])
    return truth._replace(
        image_ids=truth.image_ids[keep],
        image=number[truth.image[box]].astype(np.int32),
        label=truth.label[box],
        boxes=truth.boxes[box],
        group_of=truth.group_of[box],
        label_image=number[truth.label_image[label]].astype(np.int32),
        label_class=truth.label_class[label],
        label_positive=truth.label_positive[label],
        masks=masks,
    )


def open_images_folders(directory: Path, split: str, image_folder: str | Path | None = None) -> list[Path]:
    """The folders of the images, each of which may be an archive; a UserError if there is none."""
    if image_folder is not None:
        if not is_folder(image_folder):
            raise UserError(f"Open Images: image folder {image_folder} does not exist")
        return [Path(image_folder).absolute()]
    whole = find_folder(directory, [split, f"images/{split}"])
    folders = [whole or find_folder(directory, [f"{split}_{digit}"]) for digit in "0123456789abcdef"]
    found = list(dict.fromkeys(f for f in folders if f))
    if not found:
        raise UserError(
            f"Open Images {directory}: no image folder {split}/, images/{split}/ or {split}_0/ … {split}_f/, and no "
            ".zip or .tar of such a name"
        )
    return found


def _cache_folders(directory: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    mark = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return [directory / ".packrcnn-cache", home / "packrcnn" / mark]


def _read_cache(directory: Path, entry: str, stamps: dict) -> tuple[dict | None, dict]:
    for parent in _cache_folders(directory):
        folder = parent / entry
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["stamps"] == stamps:
                # Plain arrays: slicing a numpy.memmap is several times slower, and pickling one would copy it.
                names = _OPEN_IMAGES_COLUMNS
                return {n: np.asarray(np.load(folder / f"{n}.npy", mmap_mode="r")) for n in names}, meta
        except (OSError, EOFError, ValueError, KeyError):
            continue  # missing or damaged: the caller makes it again
    return None, {}


def _write_cache(directory: Path, entry: str, stamps: dict, columns: dict, meta: dict) -> dict | None:
    """Writes a folder, renames it into place and returns its columns as memory maps; None if nothing can be written."""
    for parent in _cache_folders(directory):
        temporary = old = parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            # Process numbers are not unique: other machines or containers, or an earlier killed process, may have the
            # same.
            temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f".{entry}."))
            os.chmod(temporary, 0o755)
            old = temporary.with_name(f"{temporary.name}.old")
            for name in _OPEN_IMAGES_COLUMNS:
                np.save(temporary / f"{name}.npy", columns[name])
            write_json(temporary / "meta.json", {**meta, "stamps": stamps})
            if (parent / entry).exists():
                os.rename(parent / entry, old)
            os.rename(temporary, parent / entry)
        except OSError as e:
            if temporary != parent:
                shutil.rmtree(temporary, ignore_errors=True)
            cached, _ = _read_cache(directory, entry, stamps)  # another process may have been faster
            if cached is not None:
                return cached
            logger.info(f"no cache in {parent}: {e.strerror}")
            continue
        shutil.rmtree(old, ignore_errors=True)
        logger.info(f"cache of the annotations: {parent / entry}")
        return _read_cache(directory, entry, stamps)[0]
    return None


def _pack(words: np.ndarray, before: bytes, after: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The strings `before` + word + `after` of an array of bytes, as one uint8 array and its offsets."""
    words = np.char.add(np.char.add(np.bytes_(before), words), np.bytes_(after)) if len(words) else words.astype("S1")
    table = words.view(np.uint8).reshape(len(words), -1)
    used = table != 0
    return table[used], to_offsets(used.sum(1))


def _read_open_images(files, class_ids: Sequence[str], kind: type) -> tuple[np.ndarray, dict, dict]:
    """The sorted image ids, and the columns of the boxes and of the image labels, with ImageID as index into the
    ids."""
    known = {"ImageID": None, "LabelName": class_ids}
    boxes = read_columns(files.boxes, "box annotations", dict.fromkeys(_SIDES, kind) | {"IsGroupOf": np.int8}, known)
    ids = boxes.pop("ImageID values")
    labels = {"ImageID": np.zeros(0, np.int32), "LabelName": np.zeros(0, np.int32), "Confidence": np.zeros(0)}
    if files.image_labels:
        labels = read_columns(files.image_labels, "image labels", {"Confidence": np.float32}, known)
        more = labels.pop("ImageID values")
        ids, inverse = np.unique(np.concatenate([ids, more]), return_inverse=True)
        inverse = inverse.astype(np.int32)
        boxes["ImageID"] = inverse[: len(inverse) - len(more)][boxes["ImageID"]]
        labels["ImageID"] = inverse[len(inverse) - len(more) :][labels["ImageID"]]
    return ids, boxes, labels


def _build_open_images(files, size_file: Path, folders: list[Path], options: dict) -> tuple[dict, dict]:
    """The columns of a split from its csv files, and the cache's further facts about it."""
    all_ids, all_names = read_classes(files.classes)
    class_names = options["classes"] or all_names
    if len(set(all_names)) < len(all_names):
        raise UserError(f"{files.classes}: class name '{Counter(all_names).most_common(1)[0][0]}' occurs twice")
    if not set(class_names) & set(all_names):
        raise UserError(f"{files.classes} has none of the model's classes, e.g. {class_names[0]}")
    by_name = dict(zip(all_names, all_ids))
    class_ids = [by_name.get(n) for n in class_names]
    label_of = np.zeros(len(all_ids) + 1, np.int32)  # the last element is for classes outside the list
    for label, class_id in enumerate(class_ids, 1):
        if class_id is not None:
            label_of[all_ids.index(class_id)] = label
    dropped: Counter = Counter()
    ids, rows, labels = _read_open_images(files, all_ids, np.float32)
    image, number = rows.pop("ImageID"), len(rows["LabelName"])
    present, folder, sizes = _open_images_on_disk(ids, size_file, folders, options["check_images"])

    group = rows.pop("IsGroupOf") > 0  # -1 = unknown
    class_index = rows.pop("LabelName")
    boxes = np.stack([rows.pop(n) for n in _SIDES], 1)
    outlines = _open_images_masks(files, ids, all_ids, options["split"], image, class_index, boxes, sizes, present) if (
        options["masks"] and files.masks) else None  # fmt: skip
    source = np.arange(number)
    if options["expand"]:
        if files.hierarchy is None:
            raise UserError(f"{files.boxes.parent}: expand needs the class hierarchy (bbox_labels_hierarchy.json)")
        ancestors = read_ancestors(files.hierarchy, all_ids)
        rows, above = _related_classes(class_index, ancestors)
        source, class_index = np.concatenate([source, rows]), np.concatenate([class_index, above])
        # A class that is present implies its ancestors; a class that is absent excludes its descendants.
        labels = _expand_image_labels(labels, ancestors)
    label = label_of[class_index]
    scale = sizes[:, [1, 0, 1, 0]].astype(np.float32)
    boxes *= scale[image]
    np.clip(boxes, 0, scale[image], out=boxes)
    solid = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    crowd = group if options["group_of"] == "ignore" else np.zeros(number, bool)
    bad = [("image is missing on disk", ~present[image]), ("box is empty inside the image", ~solid)]
    if options["group_of"] == "drop":
        bad.append(("group-of box (group_of=drop)", group))
    if options["need_masks"]:
        without_outline = np.ones(number, bool)
        if outlines is not None:
            without_outline[outlines[0]] = False
        bad.append(("no outline (MODE_MASK trains masks)", without_outline & ~crowd))
    keep = label > 0
    if not keep.all():
        dropped["class is unknown or not trained"] = int((~keep).sum())
    for why, which in bad:
        which = which[source]
        if (which & keep).any():
            dropped[why] = int((which & keep).sum())
        keep &= ~which
    unused = np.flatnonzero(~keep)
    unused = image[source[unused]], label[unused]
    source, label = source[keep], label[keep]
    order = image[source]
    if len(order) and (np.diff(order) < 0).any():
        order = np.argsort(order, kind="stable")
        source, label = source[order], label[order]
    number_of = np.cumsum(present) - 1  # the row of each listed image among the images on disk
    there = np.flatnonzero(present)
    first_ring, first_vertex, vertices = _outline_columns(outlines, source)
    columns = {
        "folder": folder[there],
        "sizes": sizes[there],
        "first_object": to_offsets(np.bincount(number_of[image[source]], minlength=len(there))),
        "boxes": boxes[source],
        "labels": label,
        "crowd": crowd[source],
        "first_ring": first_ring,
        "first_vertex": first_vertex,
        "vertices": vertices,
    }
    columns["file_bytes"], columns["file_offsets"] = _pack(ids[there], b"", b".jpg")
    columns["id_bytes"], columns["id_offsets"] = _pack(ids[there], b'"', b'"')
    row_of = np.where(present, number_of, -1)
    columns |= verified_columns(
        [(row_of[labels["ImageID"]], label_of[labels["LabelName"]]), (row_of[image[source]], label)],
        [(row_of[unused[0]], unused[1])],
        len(there), len(class_names),
    )  # fmt: skip
    lost = np.flatnonzero(~present)
    return columns, {
        "class_names": list(class_names), "class_ids": class_ids, "dropped": dict(dropped), "num_annotations": number,
        "listed": len(ids), "missing": len(lost),
        "first_missing": str(folders[0] / f"{ids[lost[0]].decode()}.jpg") if len(lost) else "",
    }  # fmt: skip


def _related_classes(classes: np.ndarray, related: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (row of `classes`, class related to that row's class by `related` [C, C]); a class of -1 has no
    pairs."""
    rows = np.flatnonzero(classes >= 0)
    found = range_indices(to_offsets(related.sum(1)), classes[rows])
    return np.repeat(rows, related.sum(1)[classes[rows]]), np.nonzero(related)[1][found].astype(np.int32)


def _expand_image_labels(labels: dict[str, np.ndarray], ancestors: np.ndarray) -> dict[str, np.ndarray]:
    """The image labels, together with the labels that they imply through the hierarchy."""
    positive = labels["Confidence"] > 0.5
    rows, classes = zip(*(
        (which[row], implied)
        for which, related in ((np.flatnonzero(positive), ancestors), (np.flatnonzero(~positive), ancestors.T))
        for row, implied in [_related_classes(labels["LabelName"][which], related)]
    ))  # fmt: skip
    return {
        "ImageID": np.concatenate([labels["ImageID"], *(labels["ImageID"][r] for r in rows)]),
        "LabelName": np.concatenate([labels["LabelName"], *classes]),
    }


def _open_images_on_disk(
    ids: np.ndarray, size_file: Path, folders: list[Path], check: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each image id: whether the file exists (bool), its folder's index (int16), height and width (int32 [n,
    2])."""
    present, folder = np.full(len(ids), not check), np.zeros(len(ids), np.int16)
    sizes = np.ones((len(ids), 2), np.int32)
    if check:
        for number, path in enumerate(folders):
            names = [name[:-4].encode() for name in list_folder(path) if name.endswith(".jpg")]
            found = np.isin(ids, np.array(names, np.bytes_)) if names else np.zeros(len(ids), bool)
            folder[found & ~present] = number
            present |= found
    known = np.zeros(len(ids), bool)
    if size_file.is_file():
        rows = read_columns(
            size_file, "image sizes", {"Height": np.int32, "Width": np.int32}, {"ImageID": [i.decode() for i in ids]}
        )
        listed = rows["ImageID"] >= 0
        sizes[rows["ImageID"][listed]] = np.stack([rows["Height"], rows["Width"]], 1)[listed]
        known[rows["ImageID"][listed]] = True
    todo = np.flatnonzero(present & ~known)
    if len(todo) and not check:
        raise UserError(f"image {ids[todo[0]].decode()} is missing from {size_file}")
    if len(todo):
        sizes[todo] = header_sizes([f"{folders[folder[i]]}/{ids[i].decode()}.jpg" for i in todo])
    return present, folder, sizes


def _open_images_masks(files, ids, class_ids, split, image, class_index, boxes, sizes, present):
    """Outlines of the boxes with a mask: their rows [K], ascending, and for each a list of rings in pixels."""
    rows = read_columns(
        files.masks, "segmentation masks", dict.fromkeys(("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax"), np.float32),
        {"ImageID": [i.decode() for i in ids], "LabelName": class_ids}, ["MaskPath"],
    )  # fmt: skip
    keep = (rows["ImageID"] >= 0) & (rows["LabelName"] >= 0)
    keep[keep] = present[rows["ImageID"][keep]]
    mask_boxes = np.stack([rows[n] for n in ("BoxXMin", "BoxYMin", "BoxXMax", "BoxYMax")], 1)
    joined, box_rows, alone = oid_eval.join_by_box(
        rows["ImageID"][keep], rows["LabelName"][keep], mask_boxes[keep], image, class_index, boxes
    )
    if len(alone):
        logger.warning(f"{files.masks}: {len(alone)} masks without a box of the same coordinates are left out")
    names = rows["MaskPath"][keep][joined]
    folders = oid_eval.mask_folders(files.masks.parent, split)

    def trace(k: int) -> list[np.ndarray]:
        height, width = sizes[image[box_rows[k]]]
        bitmap = oid_eval.read_mask_image(names[k].decode(), folders, files.masks)
        stretch = np.array([width / bitmap.shape[1], height / bitmap.shape[0]], np.float32)
        return [_simplified(ring) * stretch for ring in polygons.mask_to_rings(bitmap)]

    if len(names) > 10000:
        logger.info(f"{files.masks}: tracing {len(names)} masks; the result is cached")
    rings = in_threads(trace, range(len(names)), os.cpu_count() or 1, "outlines of masks")
    order = np.argsort(box_rows, kind="stable")
    return box_rows[order], [rings[k] for k in order]


def _simplified(ring: np.ndarray) -> np.ndarray:
    """Simplifies a ring along pixel borders to about a sixth of its vertices, at most a pixel (or a hundredth of its
    extent) from the original. Two million masks with all their pixel corners would take 12 GB."""
    tolerance = min(1.0, 0.01 * float(np.ptp(ring, axis=0).max()))
    simple = cv2.approxPolyDP(ring[:, None], tolerance, True)[:, 0]
    return simple if len(simple) >= 3 else ring


def _outline_columns(outlines, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """first_ring, first_vertex and vertices for the boxes `source` (rows of the csv, in their final order)."""
    if outlines is None or not len(outlines[0]):
        return np.zeros(len(source) + 1, np.int64), np.zeros(1, np.int64), np.zeros((0, 2), np.float32)
    rows, rings = outlines
    at = np.minimum(np.searchsorted(rows, source), len(rows) - 1)
    chosen = [rings[k] if rows[k] == s else [] for k, s in zip(at, source)]
    flat = [ring for some in chosen for ring in some]
    vertices = np.concatenate(flat) if flat else np.zeros((0, 2), np.float32)
    first_vertex = to_offsets(np.array([len(ring) for ring in flat], np.int64))
    return to_offsets(np.array([len(some) for some in chosen], np.int64)), first_vertex, vertices
