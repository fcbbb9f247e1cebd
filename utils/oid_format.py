"""The files of Open Images (V4 to V7 and the 2018/2019 challenges) as columns of NumPy arrays.

Published names and columns: storage.googleapis.com/openimages/web/download.html. Box coordinates are normalised to
[0, 1] and stand in the order XMin, XMax, YMin, YMax; attribute columns hold 0, 1, or -1 for unknown.
"""

import base64
import csv
import glob
import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from common import UserError, read_json, read_text

__all__ = [
    "FileSet",
    "find_files",
    "read_classes",
    "read_ancestors",
    "read_columns",
    "positions",
    "encode_mask",
    "decode_mask",
]

_LARGEST_MASK = 64 << 20  # bytes of run lengths
# csv files are read in blocks of this size, so that memory depends on the columns kept, not on the file.
_BLOCK_BYTES = 16 << 20


class FileSet(NamedTuple):
    """The annotation files of one split of one release; a file missing from the release is None."""

    classes: Path
    hierarchy: Path | None
    boxes: Path
    image_labels: Path | None
    masks: Path | None  # csv of segmentation masks


# File names of the releases; {s} is the split. The first pattern with a match is used.
_PATTERNS = {
    "classes": ["class-descriptions-boxable.csv", "*class-descriptions-boxable.csv", "*class*-description*-500.csv",
                "*classes-description-segmentable.csv", "*class*-description*.csv"],
    "hierarchy": ["bbox_labels_hierarchy.json", "bbox_labels_600_hierarchy.json", "*label*hierarchy.json"],
    "boxes": ["{s}-annotations-bbox.csv", "*{s}-annotations-bbox.csv", "challenge-20*-{s}-detection-bbox.csv",
              "challenge-20*-{s}-bbox.csv", "challenge-20*-{s}-segmentation-bbox.csv"],
    "image_labels": ["{s}-annotations-human-imagelabels-boxable.csv", "*{s}-annotations-human-imagelabels-boxable.csv",
                     "*{s}-annotations-human-imagelabels.csv", "challenge-20*-{s}-detection-human-imagelabels.csv",
                     "challenge-20*-{s}-segmentation-labels.csv"],
    "masks": ["{s}-annotations-object-segmentation.csv", "*{s}-annotations-object-segmentation.csv",
              "challenge-20*-{s}-segmentation-masks.csv"],
}  # fmt: skip


def find_files(directory: str | Path, split: str) -> FileSet:
    """The files of `split` (train, validation or test) in `directory` or its annotations/ folder."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"Open Images folder {directory} does not exist")
    folders = [directory, directory / "annotations", directory / "metadata"]
    found: dict[str, Path | None] = {}
    for kind, patterns in _PATTERNS.items():
        matches = (sorted(f.glob(p.format(s=glob.escape(split)))) for p in patterns for f in folders if f.is_dir())
        found[kind] = next((m[0] for m in matches if m), None)
    for kind in ("classes", "boxes"):
        if found[kind] is None:
            raise UserError(f"{directory}: no {kind} file {_PATTERNS[kind][0].format(s=split)} (or a later name of it)")
    return FileSet(**found)


def read_classes(path: str | Path) -> tuple[list[str], list[str]]:
    """(label names like /m/0k4j, display names like Car) of a class description csv, with or without its header."""
    text = read_text(path, "class descriptions")
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    except csv.Error as e:
        raise UserError(f"class descriptions {path} cannot be read: {e}") from None
    if rows and rows[0][0] == "LabelName":
        rows = rows[1:]
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise UserError(f"class descriptions {path}: entry {number + 1} is not 'LabelName,DisplayName': {row[0]!r}")
    labels = [row[0] for row in rows]
    if not rows or len(set(labels)) < len(labels):
        raise UserError(f"class descriptions {path}: {'a class occurs twice' if rows else 'there is no class'}")
    return labels, [row[1] for row in rows]


def read_ancestors(path: str | Path, labels: Sequence[str]) -> np.ndarray:
    """bool [C, C]: element [c, a] says that class a is a proper ancestor of class c by `Subcategory` edges.

    The root is not a class, `Part` edges are not followed, and a class that occurs several times has the ancestors of
    all its occurrences. A class missing from the hierarchy is an error, as in the official tool.
    """
    root = read_json(path, "class hierarchy")
    if not isinstance(root, dict) or not isinstance(root.get("Subcategory", []), list):
        raise UserError(f"class hierarchy {path} is not a tree of objects with LabelName and Subcategory")
    index = {label: i for i, label in enumerate(labels)}
    ancestors = np.zeros((len(labels), len(labels)), bool)
    seen: set[str] = set()
    stack: list[tuple[Any, tuple[int, ...]]] = [(child, ()) for child in root.get("Subcategory", [])]
    while stack:
        node, above = stack.pop()
        label = node.get("LabelName") if isinstance(node, dict) else None
        if not isinstance(label, str) or not isinstance(node.get("Subcategory", []), list):
            raise UserError(f"class hierarchy {path} is not a tree of objects with LabelName and Subcategory")
        seen.add(label)
        if label in index:
            ancestors[index[label], list(above)] = True
            above = (*above, index[label])
        stack.extend((child, above) for child in node.get("Subcategory", []))
    missing = [label for label in labels if label not in seen]
    if missing:
        raise UserError(f"{len(missing)} of the classes are missing from class hierarchy {path}, e.g. {missing[0]}")
    np.fill_diagonal(ancestors, False)
    return ancestors


def positions(known: pa.Array, values: pa.Array) -> np.ndarray:
    """int32: the index in `known` of each of `values`, or -1."""
    return pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy(zero_copy_only=False).astype(np.int32)


def read_columns(
    path: str | Path,
    what: str,
    numbers: dict[str, Any] | None = None,
    categories: dict[str, Sequence[str] | None] | None = None,
    texts: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """Columns of a csv file with a header, read in blocks.

    `numbers` maps a column to the NumPy type it is kept in. `categories` maps a column of repeated strings to its
    known values: the result is int32 positions among them, -1 for others; with None the values are collected, and
    "<column> values" holds them (array of bytes, sorted). `texts` are kept as bytes objects. A column in `optional`
    may be missing and is then left out of the result. Empty fields of number columns become 0.
    """
    numbers, categories = numbers or {}, categories or {}
    wanted = [*numbers, *categories, *texts]
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            header = next(csv.reader(f), [])
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{what} {path} cannot be read: {getattr(e, 'strerror', e)}") from None
    header = [name.strip() for name in header]
    absent = [name for name in wanted if name not in header]
    if any(name not in optional for name in absent):
        name = next(name for name in absent if name not in optional)
        raise UserError(f"{what} {path} has no column {name}; its header is {','.join(header)[:80]}")
    wanted = [name for name in wanted if name not in absent]
    known = {name: pa.array(values, pa.string()) for name, values in categories.items() if values is not None}
    kinds = {name: pa.float64() for name in numbers} | dict.fromkeys(texts, pa.string())
    kinds |= dict.fromkeys(categories, pa.dictionary(pa.int32(), pa.string()))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    values: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
    offsets = dict.fromkeys(wanted, 0)
    try:
        blocks = pa.csv.open_csv(
            path,
            read_options=pa.csv.ReadOptions(block_size=_BLOCK_BYTES, column_names=header, skip_rows=1),
            convert_options=pa.csv.ConvertOptions(
                column_types={name: kinds[name] for name in wanted}, include_columns=wanted, strings_can_be_null=False
            ),
        )
        for block in blocks:
            for name in wanted:
                column = block.column(name)
                if name in numbers:
                    # All numbers are parsed as float64 first, because some releases write flags as 0.0 and 1.0.
                    column = pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False)
                    parts[name].append(column.astype(numbers[name], copy=False))
                elif name in texts:
                    parts[name].extend(v.encode() for v in column.to_pylist())
                else:
                    codes = column.indices.to_numpy(zero_copy_only=False)
                    if name in known:
                        parts[name].append(positions(known[name], column.dictionary)[codes])
                    else:
                        # This block's distinct values; those of all blocks are merged below.
                        words = np.array(column.dictionary.to_pylist(), dtype=np.bytes_)
                        values[name].append(words)
                        parts[name].append(codes.astype(np.int32) + np.int32(offsets[name]))
                        offsets[name] += len(words)
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeEncodeError) as e:
        raise UserError(f"{what} {path}: {str(e).splitlines()[0]}") from None
    result: dict[str, np.ndarray] = {}
    for name in wanted:
        if name in texts:
            result[name] = np.array(parts[name], dtype=object)
            continue
        kind = numbers.get(name, np.int32)
        result[name] = np.concatenate(parts.pop(name)) if parts[name] else np.zeros(0, kind)
        if name in categories and name not in known:
            words = np.concatenate(values[name]) if values[name] else np.zeros(0, "S1")
            unique, inverse = np.unique(words, return_inverse=True)
            result[name] = inverse.astype(np.int32)[result[name]] if len(words) else result[name]
            result[f"{name} values"] = unique
    return result


def encode_mask(counts: bytes) -> str:
    """COCO's compressed run lengths as the text of a challenge csv: base64 of zlib."""
    return base64.b64encode(zlib.compress(counts)).decode()


def decode_mask(text: bytes | str) -> bytes:
    """The inverse of `encode_mask`; raises ValueError for other text."""
    try:
        decompressor = zlib.decompressobj()
        counts = decompressor.decompress(base64.b64decode(text, validate=True), _LARGEST_MASK)
        if not decompressor.eof:
            raise ValueError("cut off, or larger than any mask")
        return counts
    except (zlib.error, ValueError) as e:
        raise ValueError(f"not base64 of zlib data: {e}") from None
