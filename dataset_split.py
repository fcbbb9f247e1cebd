"""The in-memory form of a data set.

A `DatasetSplit` holds a whole annotation file as a few NumPy columns. 118,000 images take a few hundred megabytes,
shared by all data workers, instead of gigabytes of Python objects in each.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import UserError, logger
from eval_protocols import PROTOCOLS, only_images
from utils.archives import split_path
from utils.coco_format import as_truth, read_document

__all__ = [
    "EVERY_CLASS",
    "MIN_SIDE",
    "DatasetSplit",
    "Objects",
    "concatenate_splits",
    "own_path",
    "pack_texts",
    "range_indices",
    "select_images",
    "text_at",
    "to_offsets",
    "unpack_texts",
]

_BLOCK = 4096  # images

EVERY_CLASS = -1  # an image's verified label

MIN_SIDE = 0.01  # pixels; boxes with a shorter side inside the image are left out: too small for float32 deltas


class Objects(NamedTuple):
    """The annotations of one image; the arrays are views that must not be written to.

    Coordinates are continuous, in the frame of the image that the annotation file describes.
    """

    boxes: np.ndarray  # float32 [n, 4] x1 y1 x2 y2, inside the image
    labels: np.ndarray  # int32 [n], 1..C
    is_crowd: np.ndarray  # bool [n]
    vertices: np.ndarray  # float32 [V, 2], all rings of all objects one after the other
    ring_sizes: np.ndarray  # int64 [R], vertices of each ring
    ring_owners: np.ndarray  # int64 [R], non-decreasing: the object of each ring
    keypoints: np.ndarray | None  # float32 [n, K, 3] x y visibility


class DatasetSplit:
    """One set of images with annotations, as columns. Made by `load_split`; `Objects` holds one image's annotations.

    Attributes:
        name: as in the settings.
        class_names: foreground classes; label i + 1 is class_names[i].
        annotation_file: the json it was read from (of concatenated sets, the first).
        dropped: {reason: number of annotations left out}.
        num_annotations: how many annotations the file has.
        keypoint_flip: int [K], the keypoint that each becomes in a mirrored image; empty without keypoints.
        oks_sigmas: falloff of each keypoint's similarity in the scores, [] for the published ones.
        read_content: picklable function that reads the ground truth again in COCO's form; None: annotation_file is a
            COCO json.
        protocols: names of the scores that `evaluate` computes, in eval_protocols.PROTOCOLS.
    """

    def __init__(
        self,
        name: str,
        annotation_file: str,
        folders: list[str],
        class_names: list[str],
        category_ids: list,
        columns: dict[str, Any],
        dropped: dict[str, int],
        num_annotations: int,
        keypoint_flip: np.ndarray,
    ):
        self.name = name
        self.annotation_file = annotation_file
        self.class_names = class_names
        self.dropped = dropped
        self.num_annotations = num_annotations
        self.keypoint_flip = keypoint_flip
        self.folders = folders
        self.category_ids = category_ids
        self.columns = columns
        self.oks_sigmas: list[float] = []
        self.read_content: Callable[[], dict[str, Any]] | None = None
        self.protocols: Sequence[str] = ("coco",)

    def __len__(self) -> int:
        return len(self.columns["sizes"])

    def image_file(self, i: int) -> str:
        """Absolute path of the image."""
        return os.path.join(self.folders[self.columns["folder"][i]], text_at(self.columns["file"], i))

    def image_id(self, i: int) -> int | str:
        """As in the json."""
        ids = self.columns["id"]
        return int(ids[i]) if isinstance(ids, np.ndarray) else json.loads(text_at(ids, i))

    def image_size(self, i: int) -> tuple[int, int]:
        """Height and width as in the json."""
        height, width = self.columns["sizes"][i].tolist()
        return height, width

    def image_sizes(self) -> np.ndarray:
        """int32 [len, 2] heights and widths."""
        return self.columns["sizes"]

    def objects(self, i: int) -> Objects:
        """The annotations of an image, without copies."""
        c = self.columns
        first, last = c["first_object"][i], c["first_object"][i + 1]
        ring_counts = np.diff(c["first_ring"][first : last + 1])
        ring0, ring1 = c["first_ring"][first], c["first_ring"][last]
        vertex0, vertex1 = c["first_vertex"][ring0], c["first_vertex"][ring1]
        return Objects(
            c["boxes"][first:last],
            c["labels"][first:last],
            c["crowd"][first:last],
            c["vertices"][vertex0:vertex1],
            np.diff(c["first_vertex"][ring0 : ring1 + 1]),
            np.repeat(np.arange(last - first), ring_counts),
            None if c["keypoints"] is None else c["keypoints"][first:last],
        )

    def annotations(self, i: int) -> dict[str, Any]:
        """The annotations of an image as boxes, labels, is_crowd, keypoints (see `Objects`) and `rings`.

        rings: for each object a list of float32 [k, 2] rings in the orientation of utils/polygons.py. Crowd regions
        given as RLE have none.
        """
        o = self.objects(i)
        rings: list[list[np.ndarray]] = [[] for _ in range(len(o.labels))]
        for owner, ring in zip(o.ring_owners, np.split(o.vertices, np.cumsum(o.ring_sizes)[:-1])):
            rings[owner].append(ring)
        return {
            "boxes": o.boxes, "labels": o.labels, "is_crowd": o.is_crowd, "rings": rings, "keypoints": o.keypoints,
        }  # fmt: skip

    def is_federated(self) -> bool:
        """Whether the set lists for each image the classes that annotators looked for (Open Images, LVIS)."""
        return self.columns["first_verified"] is not None

    def verified_classes(self, i: int) -> np.ndarray:
        """bool [C + 1]: True for the background and for the classes of which all objects in image i are annotated. For
        other classes it is unknown whether the image shows them. All True for a set that is not federated.
        """
        c = self.columns
        verified = np.full(len(self.class_names) + 1, c["first_verified"] is None)
        verified[0] = True
        if c["first_verified"] is not None:
            labels = c["verified"][c["first_verified"][i] : c["first_verified"][i + 1]]
            verified[labels] = True
            verified |= EVERY_CLASS in labels
        return verified

    def nonempty_images(self) -> np.ndarray:
        """int64 indices of the images with an object that is not a crowd."""
        c = self.columns
        before = np.concatenate([[0], np.cumsum(~c["crowd"])])  # objects before each row
        return np.flatnonzero(np.diff(before[c["first_object"]]))

    def outlined_images(self) -> np.ndarray:
        """int64 indices of the images with an object that has an outline and is not a crowd."""
        c = self.columns
        owners = np.repeat(np.arange(len(self)), np.diff(c["first_object"]))
        return np.unique(owners[~c["crowd"] & (np.diff(c["first_ring"]) > 0)])

    def class_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [C] objects that are not crowds, and images that show one, of each class."""
        c = self.columns
        size = len(self.class_names) + 1
        objects, images = np.zeros(size, np.int64), np.zeros(size, np.int64)
        # Blocks of images, so that a table of images and classes fits into the CPU cache; this is far faster than
        # sorting pairs.
        for start in range(0, len(self), _BLOCK):
            first = c["first_object"][start : start + _BLOCK + 1]
            solid = ~c["crowd"][first[0] : first[-1]]
            labels = c["labels"][first[0] : first[-1]][solid]
            shown = np.zeros((len(first) - 1, size), bool)
            shown[np.repeat(np.arange(len(first) - 1), np.diff(first))[solid], labels] = True
            images += np.count_nonzero(shown, axis=0)
            objects += np.bincount(labels, minlength=size)
        return objects[1:], images[1:]

    def label_to_category_id(self, label: int) -> int | str | None:
        """The category id of a class label 1..C; None when this set's annotation file does not have the class."""
        return self.category_ids[label - 1]

    def content(self) -> dict[str, Any]:
        """The ground truth as read from its files, in COCO's form."""
        return self.read_content() if self.read_content else read_document(self.annotation_file)

    def evaluate(
        self, results: list[dict], image_ids: Sequence[int | str] | None = None, **options: Any
    ) -> dict[str, float]:
        """Scores of results in COCO's format by the protocols of this set, see eval_protocols.py.

        Args:
            image_ids: the images to score; all of the set if not given.
            options: those of a protocol, iou_types and verbose.
        """
        if not self.protocols:
            raise ValueError(f"{self.name}: sets are scored one by one, each by its own protocol")
        known = [r for r in results if r["category_id"] is not None]
        if len(known) < len(results):
            logger.warning(
                f"{self.name}: {len(results) - len(known)} detections of classes that its annotations do not have "
                "are not scored"
            )
        if image_ids is None:
            image_ids = [self.image_id(i) for i in range(len(self))]
        content = only_images(as_truth(self.content(), self.annotation_file), image_ids)
        content["oks_sigmas"] = self.oks_sigmas
        metrics: dict[str, float] = {}
        for protocol in self.protocols:
            metrics |= PROTOCOLS[protocol](content, known, **options)
        return {name: value for name, value in metrics.items() if "/num_" not in name}

    def move_columns(self, moved: "DatasetSplit") -> None:
        """Replaces the columns by those of an equal split, e.g. in shared memory, so that its own memory is freed."""
        self.columns = moved.columns


def concatenate_splits(splits: Sequence[DatasetSplit]) -> DatasetSplit:
    """One split with the images of all; their class names must be equal."""
    if len(splits) == 1:
        return splits[0]
    if any(s.class_names != splits[0].class_names for s in splits):
        raise ValueError("concatenated splits must have the same classes")
    parts = [s.columns for s in splits]
    folders = [folder for s in splits for folder in s.folders]
    starts = np.cumsum([0] + [len(s.folders) for s in splits])
    columns: dict[str, Any] = {
        key: np.concatenate([p[key] for p in parts])
        for key in ("sizes", "boxes", "labels", "crowd", "vertices")
    }  # fmt: skip
    columns["folder"] = np.concatenate([p["folder"] + np.int16(s) for p, s in zip(parts, starts)])
    columns["file"] = _join_texts([p["file"] for p in parts])
    for key in ("first_object", "first_ring", "first_vertex"):
        columns[key] = to_offsets(np.concatenate([np.diff(p[key]) for p in parts]))
    if all(isinstance(p["id"], np.ndarray) for p in parts):
        columns["id"] = np.concatenate([p["id"] for p in parts])
    else:
        columns["id"] = pack_texts(json.dumps(s.image_id(i)) for s in splits for i in range(len(s)))
    points = [p["keypoints"] for p in parts]
    if len({None if k is None else k.shape[1] for k in points}) > 1:
        raise UserError("sets that are trained together must have the same keypoints")
    columns["keypoints"] = None if points[0] is None else np.concatenate(points)
    columns |= {"first_verified": None, "verified": None}
    if any(s.is_federated() for s in splits):
        every = [np.full(len(p["sizes"]), EVERY_CLASS, np.int32) for p in parts]
        labels = [p["verified"] if s.is_federated() else e for s, p, e in zip(splits, parts, every)]
        counts = [
            np.diff(p["first_verified"]) if s.is_federated() else np.ones(len(s), np.int64)
            for s, p in zip(splits, parts)
        ]
        columns |= {"first_verified": to_offsets(np.concatenate(counts)), "verified": np.concatenate(labels)}
    dropped = Counter()
    for s in splits:
        dropped.update(s.dropped)
    first = splits[0]
    joined = DatasetSplit(
        "+".join(s.name for s in splits), first.annotation_file, folders, first.class_names, first.category_ids,
        columns, dict(dropped), sum(s.num_annotations for s in splits), first.keypoint_flip,
    )  # fmt: skip
    joined.protocols = ()  # each set is scored separately by its own protocol
    return joined


def select_images(columns: dict[str, Any], images: np.ndarray) -> dict[str, Any]:
    """A split of only these images, in this order."""
    c = columns
    objects = range_indices(c["first_object"], images)
    rings = range_indices(c["first_ring"], objects)
    ids, first_verified = c["id"], c["first_verified"]
    return {
        "folder": c["folder"][images],
        "file": _select_texts(c["file"], images),
        "id": ids[images] if isinstance(ids, np.ndarray) else _select_texts(ids, images),
        "sizes": c["sizes"][images],
        "first_object": to_offsets(np.diff(c["first_object"])[images]),
        "boxes": c["boxes"][objects],
        "labels": c["labels"][objects],
        "crowd": c["crowd"][objects],
        "first_ring": to_offsets(np.diff(c["first_ring"])[objects]),
        "first_vertex": to_offsets(np.diff(c["first_vertex"])[rings]),
        "vertices": c["vertices"][range_indices(c["first_vertex"], rings)],
        "keypoints": None if c["keypoints"] is None else c["keypoints"][objects],
        "first_verified": None if first_verified is None else to_offsets(np.diff(first_verified)[images]),
        "verified": None if first_verified is None else c["verified"][range_indices(first_verified, images)],
    }


def own_path(base: Path, given: str) -> Path:
    """Relative to BASEDIR, or to the working directory when it exists only there."""
    path = Path(given).expanduser()

    def exists(place: Path) -> bool:
        return place.exists() or split_path(place) is not None

    return path if exists(path) and not exists(base / path) else base / path


# ------------------------------------------------------------------------------------------------ columns
def pack_texts(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 bytes of all strings and int64 offsets [n + 1]. File names may hold surrogates, as in os.fsdecode."""
    encoded = [os.fsencode(t) for t in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(e) for e in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def text_at(column: tuple[np.ndarray, np.ndarray], i: int) -> str:
    content, offsets = column
    return content[offsets[i] : offsets[i + 1]].tobytes().decode(errors="surrogateescape")


def unpack_texts(column: tuple[np.ndarray, np.ndarray]) -> list[str]:
    content, offsets = column[0].tobytes(), column[1].tolist()
    return [content[a:b].decode(errors="surrogateescape") for a, b in zip(offsets, offsets[1:])]


def _select_texts(column: tuple[np.ndarray, np.ndarray], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return column[0][range_indices(column[1], rows)], to_offsets(np.diff(column[1])[rows])


def _join_texts(columns: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([c[0] for c in columns]), to_offsets(np.concatenate([np.diff(c[1]) for c in columns]))


def to_offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def range_indices(offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The ranges offsets[r] .. offsets[r + 1] of all given rows, concatenated."""
    sizes = offsets[rows + 1] - offsets[rows]
    return np.arange(int(sizes.sum())) + np.repeat(offsets[rows] - (np.cumsum(sizes) - sizes), sizes)
